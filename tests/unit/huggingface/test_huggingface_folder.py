"""Reading a checkpoint's folder: one file or several, in place, and everything that can be wrong with it."""

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file

from memlm.errors import CheckpointError, ConfigError
from memlm.huggingface import Checkpoint, config_json, load_pretrained, read_architecture, read_config, to_hf
from memlm.memory import MemoryConfig
from memlm.transformer import MoEConfig, Transformer
from memlm.transformer.config import RopeScaling, TransformerConfig

ROWS = 19
OPTIONS = {"dim": 16, "layers": 2, "heads": 4, "kv_heads": 2, "feed_forward_dim": 24}
MIXTRAL = MoEConfig(3, "token_choice", 2, normalise_weights=True)
SAFE, INDEX = "model.safetensors", "model.safetensors.index.json"


def build(seed=0, memory=None, moe=None, **options) -> Transformer:
    torch.manual_seed(seed)
    model = Transformer(ROWS, TransformerConfig(**{**OPTIONS, **options}), memory, moe)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".memory." not in name and ("norm" in name or name.endswith("bias")):
                parameter.uniform_(0.5, 1.5)
    return model


def write(folder, model, files=1, moe=None, pickled=False, dtype=torch.float32):
    """A checkpoint folder, its tensors dealt out to this many files."""
    folder.mkdir(exist_ok=True)
    described = config_json(model.config, len(model.embedding.weight), 128, moe)
    (folder / "config.json").write_text(json.dumps(described))
    tensors = {k: v.detach().to(dtype).clone() for k, v in to_hf(model.state_dict(), model.config).items()}
    stem, suffix = ("pytorch_model", "bin") if pickled else ("model", "safetensors")
    weight_map = {}
    for number in range(files):
        name = f"{stem}.{suffix}" if files == 1 else f"{stem}-{number + 1:05}-of-{files:05}.{suffix}"
        part = {key: tensors[key] for key in sorted(tensors)[number::files]}
        torch.save(part, folder / name) if pickled else save_file(part, folder / name)
        weight_map |= dict.fromkeys(part, name)
    if files > 1:
        index = {"metadata": {}, "weight_map": weight_map}
        (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))
    return folder


@pytest.mark.parametrize("files", [1, 3])
@pytest.mark.parametrize("pickled", [False, True])
@pytest.mark.parametrize(
    "options", [{}, {"tie_embeddings": True}, {"attention_bias": True}, {"head_dim": 6}, {"moe": MIXTRAL}]
)
def test_a_model_is_read_back_in_place(tmp_path, files, pickled, options):
    saved = build(0, **options)
    write(tmp_path, saved, files, options.get("moe"), pickled)
    model = build(1, **options)
    storages = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    load_pretrained(model, str(tmp_path), allow_pickle=pickled)
    assert {name: parameter.data_ptr() for name, parameter in model.named_parameters()} == storages
    for name, parameter in saved.named_parameters():
        assert torch.equal(model.get_parameter(name), parameter), name
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("stored,own", [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)])
def test_tensors_take_the_parameters_dtype(tmp_path, stored, own):
    saved = build(0)
    write(tmp_path, saved, dtype=stored)
    model = build(1).to(own)
    load_pretrained(model, tmp_path)
    for name, parameter in saved.named_parameters():
        found = model.get_parameter(name)
        assert found.dtype == own
        assert torch.equal(found, parameter.to(stored).to(own)), name


@pytest.mark.parametrize("moe", [None, MIXTRAL])
def test_memory_stays_as_it_is_and_starts_by_adding_nothing(tmp_path, moe):
    saved = build(0, moe=moe).eval()
    write(tmp_path, saved, moe=moe)
    memory = MemoryConfig(half_keys=4, heads=2, reads=3, layers=[1], mode="beside", start_at_zero=True)
    model = build(1, memory, moe).eval()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    load_pretrained(model, tmp_path)
    of_memory = [name for name in before if name.startswith("pools.") or ".memory." in name]
    assert len(of_memory) > 4
    for name, parameter in model.named_parameters():
        expected = before[name] if name in of_memory else saved.get_parameter(name)
        assert torch.equal(parameter, expected), name
    tokens = torch.randint(ROWS, (2, 9))
    torch.testing.assert_close(model(tokens), saved(tokens))


def test_a_tokenizer_may_have_fewer_entries_than_the_embedding_rows(tmp_path):
    saved = build(0)
    write(tmp_path, saved)
    model = Transformer(ROWS - 5, TransformerConfig(**OPTIONS))
    with pytest.raises(ConfigError) as error:
        load_pretrained(model, tmp_path)
    assert error.value.key == "model.transformer.vocab_size"
    assert all(part in str(error.value) for part in ("14", "19", "config.json")), str(error.value)
    model = Transformer(ROWS - 5, TransformerConfig(**OPTIONS, vocab_size=ROWS))
    load_pretrained(model, tmp_path)
    assert torch.equal(model.output.weight, saved.output.weight)


def test_architecture_is_sections_of_our_config(tmp_path):
    scaling = RopeScaling("llama3", 8.0, 64)
    write(tmp_path / "dense", build(rope_scaling=scaling))
    sections = read_architecture(tmp_path / "dense")
    assert sections.keys() == {"transformer"}
    assert sections["transformer"]["rope_scaling"] == {
        "kind": "llama3", "factor": 8.0, "original_length": 64, "slow_turns": 1.0, "fast_turns": 4.0,
    }  # fmt: skip
    assert (sections["transformer"]["dim"], sections["transformer"]["vocab_size"]) == (16, ROWS)
    write(tmp_path / "experts", build(moe=MIXTRAL), moe=MIXTRAL)
    sections = read_architecture(tmp_path / "experts")
    assert (sections["moe"]["experts"], sections["moe"]["top_k"]) == (3, 2)
    assert sections["transformer"]["feed_forward_dim"] == 24


@pytest.mark.parametrize(
    "options,key,parts",
    [
        ({"layers": 1}, "layers", ["is 1", "says 2"]),
        ({"dim": 32}, "dim", ["is 32", "says 16"]),
        ({"heads": 2}, "heads", ["is 2", "says 4"]),
        ({"kv_heads": None}, "kv_heads", ["is 4", "says 2"]),
        ({"head_dim": 8}, "head_dim", ["is 8", "says 4"]),
        ({"feed_forward_dim": None}, "feed_forward_dim", ["is 256", "says 24"]),
        ({"tie_embeddings": True}, "tie_embeddings", ["is True", "says False"]),
        ({"rope_theta": 5.0}, "rope_theta", ["is 5.0", "says 10000.0"]),
        ({"norm_eps": 1e-6}, "norm_eps", ["is 1e-06", "says 1e-05"]),
        ({"attention_bias": True}, "attention_bias", ["is True", "says False"]),
        ({"rope_scaling": RopeScaling("linear", 2.0)}, "rope_scaling", ["'linear'", "says None"]),
    ],
)
def test_another_config_than_the_checkpoint_s(tmp_path, options, key, parts):
    write(tmp_path, build())
    with pytest.raises(ConfigError) as error:
        load_pretrained(build(**options), tmp_path)
    assert error.value.key == f"model.transformer.{key}"
    assert all(part in str(error.value) for part in (*parts, str(tmp_path / "config.json"))), str(error.value)


def test_rope_scaling_is_compared_by_what_it_means(tmp_path):
    write(tmp_path, build(rope_scaling=RopeScaling("llama3", 8.0, 64)))
    load_pretrained(build(1, rope_scaling=RopeScaling("llama3", 8.0, 64, 1.0, 4.0)), tmp_path)
    with pytest.raises(ConfigError, match=r"fast_turns': 5\.0"):
        load_pretrained(build(1, rope_scaling=RopeScaling("llama3", 8.0, 64, 1.0, 5.0)), tmp_path)
    write(tmp_path, build(rope_scaling=RopeScaling("linear", 2.0)))
    load_pretrained(build(1, rope_scaling=RopeScaling("linear", 2.0)), tmp_path)


@pytest.mark.parametrize(
    "changes,key", [({"top_k": 3}, "top_k"), ({"normalise_weights": False}, "normalise_weights")]
)
def test_other_experts_than_the_checkpoint_s(tmp_path, changes, key):
    write(tmp_path, build(moe=MIXTRAL), moe=MIXTRAL)
    options = {"experts": 3, "routing": "token_choice", "top_k": 2, "normalise_weights": True, **changes}
    with pytest.raises(ConfigError) as error:
        load_pretrained(build(moe=MoEConfig(**options)), tmp_path)
    assert error.value.key == f"model.moe.{key}"


def test_a_parameter_that_gets_nothing_or_has_no_place(tmp_path):
    write(tmp_path / "dense", build())
    with pytest.raises(ConfigError, match=r"model\.moe: makes mixtures of experts, but .*config\.json"):
        load_pretrained(build(moe=MIXTRAL), tmp_path / "dense")
    replaced = build(memory=MemoryConfig(half_keys=4, heads=2, reads=3, layers=[1]))
    before = replaced.embedding.weight.detach().clone()
    with pytest.raises(CheckpointError, match=r"blocks\.1\.feed_forward\.down\.weight, .* \(3 such"):
        load_pretrained(replaced, tmp_path / "dense")
    assert torch.equal(replaced.embedding.weight, before)
    write(tmp_path / "experts", build(moe=MIXTRAL), moe=MIXTRAL)
    narrow = MoEConfig(3, "token_choice", 2, expert_dim=16, normalise_weights=True)
    with pytest.raises(
        CheckpointError, match=r"gate_up of shape \[3, 48, 16\]; the model's is \[3, 32, 16\]"
    ):
        load_pretrained(build(moe=narrow), tmp_path / "experts")


# -- what can be wrong with a folder


def remove(name):
    return lambda folder: (folder / name).unlink()


def replace(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def cut(name, length):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:length])


def rewrite_index(change):
    def apply(folder):
        content = json.loads((folder / INDEX).read_text())
        change(content["weight_map"])
        (folder / INDEX).write_text(json.dumps(content))

    return apply


SECOND = "model-00002-of-00003.safetensors"


@pytest.mark.parametrize(
    "damage,file,parts",
    [
        (shutil.rmtree, "", ["does not exist", "expected a folder"]),
        (
            lambda folder: (shutil.rmtree(folder), folder.write_text("")),
            "",
            ["is a file", "expected a folder"],
        ),
        (remove("config.json"), "config.json", ["does not exist", SAFE]),
        (cut("config.json", 40), "config.json", ["not readable as JSON"]),
        (replace("config.json", b"\xff\xfe"), "config.json", ["not readable as JSON"]),
        (replace("config.json", b"[" * 100_000), "config.json", ["not readable as JSON"]),
        (replace("config.json", b"[1]"), "config.json", ["holds a list", "JSON object"]),
        (remove(INDEX), "", ["holds no weights", SAFE, INDEX]),
        (cut(INDEX, 30), INDEX, ["not readable as JSON"]),
        (replace(INDEX, b"{}"), INDEX, ["no weight_map"]),
        (replace(INDEX, b'{"weight_map": []}'), INDEX, ["no weight_map"]),
        (remove(SECOND), SECOND, ["does not exist", INDEX, "1 of 3"]),
        (cut(SECOND, 0), SECOND, ["truncated", "safetensors"]),
        (cut(SECOND, 50), SECOND, ["truncated", "safetensors"]),
        (cut(SECOND, 2000), SECOND, ["truncated", "safetensors"]),
        (replace(SECOND, b"x" * 5000), SECOND, ["truncated", "safetensors"]),
        (
            rewrite_index(lambda names: names.update({"model.norm.weight": SECOND, "extra": SECOND})),
            SECOND,
            ["lacks tensor extra", INDEX],
        ),
        (
            rewrite_index(lambda names: names.update({"lm_head.weight": "../other.safetensors"})),
            INDEX,
            ["lm_head.weight", "'../other.safetensors'"],
        ),
        (rewrite_index(lambda names: names.update({"lm_head.weight": 3})), INDEX, ["lm_head.weight", "3"]),
        (rewrite_index(lambda names: names.pop("lm_head.weight")), "", ["lacks the tensor lm_head.weight"]),
    ],
)
def test_damaged_folders(tmp_path, damage, file, parts):
    folder = write(tmp_path / "llama", build(), files=3)
    damage(folder)
    model = build(1)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    with pytest.raises(CheckpointError) as error:
        load_pretrained(model, folder)
    message = str(error.value)
    assert message.startswith(f"{folder / file}: "), message
    assert "\n" not in message
    assert all(part in message for part in parts), message
    assert all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())


@pytest.mark.parametrize("files", [1, 2])
def test_pickles_are_refused_unless_allowed(tmp_path, files):
    write(tmp_path, build(), files, pickled=True)
    with pytest.raises(CheckpointError) as error:
        load_pretrained(build(), tmp_path)
    assert all(part in str(error.value) for part in ("pytorch_model", "can run code", "allow_pickle"))
    write(tmp_path, build())  # beside safetensors they are not looked at
    load_pretrained(build(), tmp_path)


class Harmful:
    def __reduce__(self):
        return (print, ("ran",))


@pytest.mark.parametrize(
    "content,parts",
    [
        ({"model.norm.weight": Harmful()}, ["more than tensors"]),
        ({"model.norm.weight": 3}, ["other than a dict of tensors"]),
        ([torch.ones(3)], ["other than a dict of tensors"]),
        (b"PK\x03\x04 no zip", ["truncated"]),
        (b"", ["truncated"]),
    ],
)
def test_pickles_of_anything_but_tensors(tmp_path, capsys, content, parts):
    file = write(tmp_path, build(), pickled=True) / "pytorch_model.bin"
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        torch.save(content, file)
    with pytest.raises(CheckpointError) as error:
        load_pretrained(build(), tmp_path, allow_pickle=True)
    assert str(error.value).startswith(f"{file}: ")
    assert all(part in str(error.value) for part in parts), str(error.value)
    assert "ran" not in capsys.readouterr().out


def test_a_checkpoint_is_a_mapping_that_reads_no_more_than_asked(tmp_path):
    model = build()
    write(tmp_path, model, files=4)
    checkpoint = Checkpoint(tmp_path)
    assert set(checkpoint) == to_hf(model.state_dict(), model.config).keys()
    assert len(checkpoint) == len(set(checkpoint))
    assert torch.equal(checkpoint["lm_head.weight"], model.output.weight)
    with pytest.raises(KeyError):
        checkpoint["model.absent"]
    assert read_config(tmp_path)["model_type"] == "llama"
