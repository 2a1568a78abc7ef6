"""Folders of Hugging Face and of memlm export become run directories that compute the same."""

import errno
import json
import os

import pytest
import torch
import yaml
from exported_models import ARCHITECTURES, CONTEXT, STANDARD, TINY, trained
from safetensors.torch import load_file, save_file

from memlm.__main__ import main as memlm
from memlm.errors import CheckpointError, DataError, UserError
from memlm.huggingface.export import export
from memlm.huggingface.importing import import_model
from memlm.huggingface.loading import load_exported
from memlm.import_verb import main
from memlm.memory.file_rows import file_of
from memlm.memory.quantised import dequantise, quantise
from memlm.resume import flatten, plain, read_checkpoint
from memlm.run_directory import RunFiles
from memlm.tokenizers import ByteTokenizer, word_tokenizer
from memlm.trained import load_trained

TOKENS = torch.randint(257, (2, 30), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty current folder, with texts."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MEMLM_TRACEBACK", raising=False)
    (tmp_path / "a.txt").write_text("Some words to train on. " * 300)
    (tmp_path / "b.txt").write_text("Others, to be measured on. " * 30)
    return tmp_path


def run(name="new"):
    return RunFiles(f"runs/{name}")


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_an_exported_model_comes_back(folder, name):
    model = trained(name)
    export(model, "out")
    exported = load_exported("out")
    assert (exported.context, exported.tokenizer) == (CONTEXT, "bytes")
    assert (exported.step, exported.tokens) == (7, 1234)
    assert exported.ours == (name not in STANDARD)
    assert exported.state.keys() == model.model.state_dict().keys()
    for key, tensor in model.model.state_dict().items():
        assert torch.equal(exported.state[key], tensor), key
    import_model("out", run())
    back = load_trained("runs/new")
    assert torch.equal(back.model(TOKENS), model.model(TOKENS))
    assert back.context == CONTEXT
    assert (back.step, back.tokens) == (0, 1234)
    if exported.ours:
        assert flatten(plain(model.architecture)).items() <= flatten(plain(back.architecture)).items()
    for key, tensor in model.model.state_dict().items():
        assert back.model.state_dict()[key].dtype == tensor.dtype


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("memory plus", "bfloat16"),
        ("memory plus", "int8"),
        ("memory plus bf16", "fp8"),
        ("peer", "fp8"),
        ("engram", "int8"),
    ],
)
def test_quantised_values_come_back_as_what_they_stand_for(folder, name, values):
    model = trained(name)
    export(model, "out", values=values)
    exported = load_exported("out")
    assert exported.values_format == values
    import_model("out", run())
    back = load_trained("runs/new").model
    for key, pool in model.model.pools.items():
        codes, scales = quantise(pool.values, values)
        expected = torch.empty_like(pool.values)
        expected = expected.copy_(codes) if scales is None else dequantise(codes, scales, expected)
        assert torch.equal(back.pools[key].values, expected)
        assert back.pools[key].values.dtype == pool.values.dtype
    direct = load_trained("out").model
    assert not any(pool.values.dtype == torch.float32 for pool in direct.pools.values())
    # bf16 values are read into bf16, fp32 ones that were imported into fp32.
    close = {"rtol": 1e-4, "atol": 1e-4} if values != "bfloat16" else {"rtol": 0.1, "atol": 0.1}
    if name != "memory plus bf16":
        torch.testing.assert_close(direct(TOKENS), back(TOKENS), **close)


def test_tensors_are_mapped_from_the_files(folder):
    export(trained("memory plus"), "out", shard_bytes=2000)
    matrices = [tensor for tensor in load_exported("out").state.values() if tensor.dim() == 2]
    assert len(matrices) > 20
    assert all(file_of(tensor) is not None for tensor in matrices)


def test_other_types_are_stored_in_fp32(folder):
    model = trained("memory plus")
    export(model, "out", dtype="bfloat16")
    import_model("out", run())
    state = load_trained("runs/new").model.state_dict()
    for key, tensor in model.model.state_dict().items():
        assert state[key].dtype == torch.float32
        assert torch.equal(state[key], tensor if key.startswith("pools.") else tensor.bfloat16().float())


@pytest.mark.parametrize(
    "name",
    [
        "dense tied, grouped",
        "memory plus",
        pytest.param("mixtral", marks=pytest.mark.slow),
        pytest.param("engram", marks=pytest.mark.slow),
    ],
)
def test_test_and_fit_go_on_from_an_imported_run(folder, name, capsys):
    export(trained(name), "out")
    assert main(["out", "new", "--paths", "a.txt"]) == 0
    assert "memlm test --config runs/new/config.yaml --ckpt_path last\n" in capsys.readouterr().out
    quiet = ["--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"]
    quiet += ["--data.validation_paths", '["b.txt"]', "--data.sequence_length", "32"]
    config = ["--config", "runs/new/config.yaml"]
    assert memlm(["test", *config, "--ckpt_path", "last", *quiet]) == 0
    first = json.loads((folder / "runs/new/test.json").read_text())
    assert (first["step"], first["tokens"]) == (0, 1234)
    trains = ["--trainer.max_steps", "4", "--trainer.val_check_interval", "2", "--run.name", "more"]
    last = "runs/new/checkpoints/last.ckpt"
    assert memlm(["fit", *config, "--ckpt_path", last, *trains, *quiet]) == 0
    checkpoint = read_checkpoint(folder / "runs/more/checkpoints/last.ckpt")
    assert checkpoint["global_step"] == 4
    assert checkpoint["tokens_seen"] == 1234 + 4 * 16 * 32
    assert checkpoint["optimizer_states"][0]["state"]
    # It went on from these weights: those of a fresh start are nowhere near.
    before, after = read_checkpoint(folder / last)["state_dict"], checkpoint["state_dict"]
    for key, tensor in before.items():
        if tensor.is_floating_point() and tensor.dim() > 1:
            assert (after[key] - tensor).abs().max() < 0.05, key
    assert any(not torch.equal(after[key], tensor) for key, tensor in before.items())
    trains[1], trains[5] = "6", "more"
    assert memlm(["fit", "--config", "runs/more/config.yaml", "--ckpt_path", "last", *trains, *quiet]) == 0


@pytest.fixture
def words():
    """A tokenizer with fewer entries than the model has rows."""
    return word_tokenizer([f"w{i}" for i in range(50)], "words")


@pytest.mark.parametrize("kind", ["Llama", "Mixtral"])
def test_a_folder_that_transformers_wrote(folder, words, kind):
    transformers = pytest.importorskip("transformers", reason="an oracle only, no dependency")
    options = {"num_local_experts": 4, "num_experts_per_tok": 2} if kind == "Mixtral" else {}
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=40, **options,
    )  # fmt: skip
    torch.manual_seed(0)
    theirs = getattr(transformers, f"{kind}ForCausalLM")(config).to(torch.bfloat16).eval()
    theirs.save_pretrained("theirs", max_shard_size="20KB")
    words.save(folder / "theirs")
    (folder / "runs").mkdir()
    assert main(["theirs", "new"]) == 0
    back = load_trained("runs/new")
    assert back.architecture["vocab_size"] == words.vocab_size < 64
    assert back.tokenizer.hash == words.hash
    assert back.context == 40
    tokens = TOKENS % 50
    with torch.no_grad():
        expected = theirs.float()(tokens).logits
    torch.testing.assert_close(back.model(tokens), expected, rtol=1e-4, atol=1e-4)
    # Its tokenizer lies in the run.
    (folder / "theirs").rename("gone")
    assert load_trained("runs/new").tokenizer.hash == words.hash


def test_what_the_run_directory_holds(folder):
    export(trained("memory plus"), "out")
    assert main(["out", "group/new", "--root", "elsewhere", "--paths", "a.txt", "b.txt"]) == 0
    directory = folder / "elsewhere/group/new"
    assert sorted(path.name for path in directory.iterdir()) == [
        "checkpoints",
        "config.yaml",
        "environment.json",
    ]
    assert [path.name for path in (directory / "checkpoints").iterdir()] == ["last.ckpt"]
    config = yaml.safe_load((directory / "config.yaml").read_text())
    assert config["run"] == {"name": "new", "root": "elsewhere/group"}
    assert config["model"]["init_args"]["memory"]["half_keys"] == [7, 5]
    assert config["data"]["init_args"] == {
        "paths": ["a.txt", "b.txt"], "tokenizer": "bytes", "sequence_length": CONTEXT,
    }  # fmt: skip
    environment = json.loads((directory / "environment.json").read_text())
    assert environment["imported_from"] == "out"
    assert environment["command"] == "memlm import out group/new --root elsewhere --paths a.txt b.txt"
    assert memlm(["params", "--config", str(directory / "config.yaml")]) == 0


def refused(message, error=CheckpointError, **options):
    """An import fails with this message, and leaves nothing behind."""
    with pytest.raises(error, match=message):
        import_model("out", run(), **options)
    assert not os.path.exists("runs/new")
    assert not os.path.exists("runs") or not os.listdir("runs")


def edit(folder, **changes):
    config = json.loads((folder / "out/config.json").read_text())
    config |= changes
    (folder / "out/config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))


def test_what_is_no_exported_folder(folder):
    refused("out: does not exist; expected a folder")
    (folder / "out").mkdir()
    refused("config.json: does not exist; expected a folder that holds config.json")
    export(trained("memory plus"), "out2")
    (folder / "out2/config.json").rename(folder / "out/config.json")
    refused("out: holds no weights; expected model.safetensors")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"memlm": ...}, "config.json: has no architecture under memlm"),
        ({"memlm": {"transformer": {}, "vocab_size": 3}}, r"config.json: has no memlm\.class_path"),
        (
            {
                "memlm": {
                    "transformer": {"dim": 32, "heads": 5},
                    "class_path": "memlm.DenseLM",
                    "vocab_size": 257,
                }
            },
            "out: describes no possible model: .*heads",
        ),
        (
            {"memlm": {"transformer": {}, "class_path": "memlm.NoLM", "vocab_size": 257}},
            "(?s)out: describes no possible model: .*NoLM",
        ),
        ({"values_format": "int4"}, "values_format is 'int4'; expected one of float32, bfloat16, int8, fp8"),
        ({"values_format": "int8"}, r"out: lacks the tensor pools\.\w+\.scales of its architecture"),
        ({"max_position_embeddings": None}, "max_position_embeddings is None; expected a number of tokens"),
        ({"memlm_tokenizer": "../bytes"}, "memlm_tokenizer is '../bytes'; expected 'bytes' or the name"),
        ({"memlm_tokenizer": "gone.json"}, "memlm_tokenizer is 'gone.json'; expected 'bytes' or the name"),
        ({"model_type": "gpt2"}, 'model_type is "gpt2"; expected one of llama'),
    ],
)
def test_a_config_that_says_something_wrong(folder, changes, message):
    export(trained("memory plus"), "out")
    edit(folder, **changes)
    refused(message)


def test_tensors_that_do_not_fit(folder):
    export(trained("memory plus"), "out")
    file = folder / "out/model.safetensors"
    whole = file.read_bytes()
    tensors = load_file(file)
    name = "model.blocks.1.feed_forward.up.weight"
    save_file({key: tensor for key, tensor in tensors.items() if key != name}, file)
    refused(rf"lacks the tensor {name.removeprefix('model.')} of its architecture \(1 such\)")
    save_file(tensors | {"model.other": torch.zeros(1)}, file)
    refused(r"has no place for the tensor other of its architecture \(1 such\)")
    save_file(tensors | {"other": torch.zeros(1)}, file)
    refused("holds the tensor other; expected names that begin with 'model.'")
    save_file(tensors | {name: torch.zeros(3, 4)}, file)
    refused(r"up\.weight has shape \[3, 4\]; expected \[40, 32\]")
    file.write_bytes(whole[:-1000])
    refused("is truncated, or is not a safetensors file at all")


def test_tokenizers_that_do_not_fit(folder, words):
    export(trained("memory plus"), "out")
    words.save(folder)
    refused("out: needs a tokenizer of 257 entries; this one has 51", DataError, tokenizer="tokenizer.json")
    refused(r"nope\.json: no such file", DataError, tokenizer="nope.json")
    large = word_tokenizer([f"w{i}" for i in range(300)], "words")
    (folder / "large").mkdir()
    large.save(folder / "large")
    (folder / "out").rename("ours")
    export(trained("dense"), "out")
    refused(
        f"needs a tokenizer of at most {TINY['vocab_size']} entries; this one has 301",
        DataError,
        tokenizer="large/tokenizer.json",
    )
    edit(folder, memlm_tokenizer=...)
    (folder / "out/tokenizer.json").unlink()
    refused("out: holds no tokenizer; name one with --tokenizer", DataError)
    import_model("out", run(), tokenizer="bytes")
    assert load_trained("runs/new").tokenizer.hash == ByteTokenizer().hash


def test_nothing_is_overwritten(folder):
    export(trained("dense"), "out")
    (folder / "runs/new").mkdir(parents=True)
    import_model("out", run())
    before = (folder / "runs/new/checkpoints/last.ckpt").read_bytes()
    with pytest.raises(DataError, match="runs/new: exists already, and an import overwrites nothing"):
        import_model("out", run())
    assert (folder / "runs/new/checkpoints/last.ckpt").read_bytes() == before


def test_a_full_disk_leaves_nothing_that_looks_whole(folder, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    export(trained("memory plus"), "out")
    monkeypatch.setattr(os, "posix_fallocate", full)
    refused(r"runs/new: cannot be written \(No space left on device\)", DataError)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required: FOLDER, NAME"),
        (["out"], "required: NAME"),
        (["out", "../new"], "run.name: '../new' is not the name of a folder under run.root 'runs'"),
        (["out", "new", "--name", "x"], "--name x: is not an option of memlm import"),
    ],
)
def test_wrong_words_are_one_line(folder, arguments, message):
    with pytest.raises(UserError) as error:
        main(arguments)
    assert message in str(error.value)
