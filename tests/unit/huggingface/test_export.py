"""What an exported folder holds, and that it is written whole or not at all."""

import io
import json
import os
from dataclasses import replace

import pytest
import torch
from exported_models import ARCHITECTURES, STANDARD, trained
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from memlm.errors import CheckpointError, ConfigError
from memlm.huggingface import export as export_module
from memlm.huggingface.export import export
from memlm.huggingface.shards import Entry, entry, write_shards
from memlm.memory.quantised import quantise
from memlm.run_directory import RunFiles
from memlm.tokenizers import ByteTokenizer, load_tokenizer, word_tokenizer
from memlm.trained import load_trained


def read(folder, name="config.json"):
    return json.loads((folder / name).read_text())


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_loaded_again_it_is_the_same_model(tmp_path, name):
    ours = trained(name)
    again = load_trained(export(ours, tmp_path / "out"))
    assert (again.context, again.step, again.tokens) == (ours.context, ours.step, ours.tokens)
    assert again.tokenizer.hash == ours.tokenizer.hash
    tokens = torch.randint(257, (2, 30), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        # Tensors that lie elsewhere in memory may be multiplied in another order.
        torch.testing.assert_close(again.model(tokens), ours.model(tokens), rtol=0, atol=1e-5)
    state = again.model.state_dict()
    assert all(torch.equal(state[key], tensor) for key, tensor in ours.model.state_dict().items())


def test_names_shapes_and_types_of_the_tensors(tmp_path):
    ours = trained("peer")
    folder = export(ours, tmp_path / "out", dtype="bfloat16", values="int8")
    found = load_file(folder / "model.safetensors")
    state = ours.model.state_dict()
    pools = {name for name in state if name.startswith("pools.")}
    expected = {f"model.{name}" for name in state} | {f"model.{n}".replace("values", "scales") for n in pools}
    assert found.keys() == expected
    for name, tensor in state.items():
        stored = found[f"model.{name}"]
        if name in pools:
            codes, scales = quantise(tensor, "int8")
            assert torch.equal(stored, codes)
            assert torch.equal(found[f"model.{name}".replace("values", "scales")], scales)
        elif tensor.is_floating_point():
            assert torch.equal(stored, tensor.bfloat16())
        else:
            assert torch.equal(stored, tensor)


def test_shards_hold_at_most_the_size_and_an_index_names_them(tmp_path):
    ours = trained("memory plus")
    whole = load_file(export(ours, tmp_path / "whole") / "model.safetensors")
    folder = export(ours, tmp_path / "parts", shard_bytes=20_000)
    index = read(folder, "model.safetensors.index.json")
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    assert files == [f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)]
    assert len(files) > 3 and set(index["weight_map"].values()) == set(files)
    sizes, found = [], {}
    for file in files:
        part = load_file(folder / file)
        assert all(index["weight_map"][name] == file for name in part)
        size = sum(tensor.nbytes for tensor in part.values())
        assert size <= 20_000 or len(part) == 1
        sizes.append(size)
        found |= part
    assert sum(sizes) == index["metadata"]["total_size"]
    assert found.keys() == whole.keys() and all(torch.equal(found[name], whole[name]) for name in whole)


@pytest.mark.parametrize("seed", range(3))
def test_files_are_those_of_safetensors(tmp_path, seed):
    generator = torch.Generator().manual_seed(seed)
    types = [
        torch.float32,
        torch.bfloat16,
        torch.float16,
        torch.int8,
        torch.float8_e4m3fn,
        torch.int64,
        torch.bool,
    ]
    tensors = {}
    for index in range(12):
        shape = torch.randint(
            0, 7, (int(torch.randint(4, (), generator=generator)),), generator=generator
        ).tolist()
        kind = types[int(torch.randint(len(types), (), generator=generator))]
        tensors[f"t{index}"] = (torch.randn(shape, generator=generator) * 3).to(kind)
    tensors["across"] = torch.randn(5, 7, generator=generator).t()
    (file,) = write_shards(tmp_path, [entry(name, tensor) for name, tensor in tensors.items()], 10**9)
    found = load_file(file)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape
        assert torch.equal(found[name].float(), tensor.float())
    save_file(found, tmp_path / "other", {"format": "pt"})
    with safe_open(tmp_path / "other", "pt") as other, safe_open(file, "pt") as own:
        assert other.metadata() == own.metadata() == {"format": "pt"}
    assert abs(file.stat().st_size - (tmp_path / "other").stat().st_size) < 64


@pytest.mark.parametrize("values_format", ["float32", "bfloat16", "int8", "fp8"])
def test_no_table_is_converted_as_a_whole(tmp_path, monkeypatch, values_format):
    """Not even one that is far larger than a chunk."""
    monkeypatch.setattr("memlm.huggingface.shards._CHUNK_ELEMENTS", 100)
    monkeypatch.setattr("memlm.memory.quantised._CHUNK_ELEMENTS", 100)
    seen = []
    original = export_module.write_shards

    def watched(folder, entries, shard_bytes):
        def watch(item):
            def chunks():
                for chunk in item.chunks():
                    seen.append((item.name, chunk.numel()))
                    yield chunk

            return Entry(item.name, item.dtype, item.shape, chunks)

        return original(folder, map(watch, entries), shard_bytes)

    monkeypatch.setattr(export_module, "write_shards", watched)
    ours = trained("memory plus")
    again = load_trained(export(ours, tmp_path / "out", values=values_format))
    tables = [size for name, size in seen if name.endswith(".values")]
    assert len(tables) > 10 and max(tables) <= 100
    for name, pool in ours.model.pools.items():
        codes, scales = quantise(pool.values, values_format)
        assert torch.equal(again.model.pools[name].values.float(), codes.float())
        assert scales is None or torch.equal(again.model.pools[name].scales, scales)


def test_float16_refuses_what_it_cannot_hold(tmp_path):
    ours = trained("dense")
    ours.model.norm.weight[3] = 1e5
    with pytest.raises(CheckpointError, match=r"some.ckpt: model.norm.weight holds 1e\+05, beyond the range"):
        export(ours, tmp_path / "out", dtype="float16")
    assert not list(tmp_path.iterdir())


def test_nothing_is_overwritten(tmp_path):
    ours = trained("dense")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious.txt").write_text("x")
    with pytest.raises(
        CheckpointError, match=r"out: already holds precious.txt; expected a folder that is new"
    ):
        export(ours, tmp_path / "out")
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="file: exists and is no folder"):
        export(ours, tmp_path / "file")
    (tmp_path / "empty").mkdir()
    assert read(export(ours, tmp_path / "empty"))["model_type"] == "llama"
    assert read(export(ours, tmp_path / "deep" / "er"))["model_type"] == "llama"
    (tmp_path / "dangling").symlink_to("nowhere")
    with pytest.raises(CheckpointError, match="dangling: exists and is no folder"):
        export(ours, tmp_path / "dangling")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dangling", "deep", "empty", "file", "out"]


@pytest.mark.parametrize("as_given", [".", "link"])
def test_an_empty_folder_is_filled_and_not_replaced(tmp_path, monkeypatch, as_given):
    """It may be a mount, the current folder, or reached by a link."""
    folder = tmp_path / "empty"
    folder.mkdir()
    (tmp_path / "link").symlink_to("empty")
    before = folder.stat().st_ino
    monkeypatch.chdir(folder if as_given == "." else tmp_path)
    moved = []
    original = os.replace
    monkeypatch.setattr(os, "replace", lambda *paths: (moved.append(paths[1].name), original(*paths)))
    ours = trained("memory plus")
    export(ours, as_given)
    assert folder.stat().st_ino == before and (tmp_path / "link").is_symlink()
    assert moved[-1] == "config.json" and sorted(moved) == sorted(path.name for path in folder.iterdir())
    assert load_trained(as_given).step == ours.step


def test_two_exports_into_one_empty_folder_do_not_mix(tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    write, ours = export_module.write_shards, trained("dense")

    def beside(folder, *rest):
        (tmp_path / "out" / ".other.1.tmp").mkdir()
        return write(folder, *rest)

    monkeypatch.setattr(export_module, "write_shards", beside)
    with pytest.raises(CheckpointError, match="out: was empty, and something else writes to it"):
        export(ours, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".other.1.tmp"]


def test_a_full_disk_leaves_nothing_that_looks_whole(tmp_path, monkeypatch):
    ours = trained("memory plus")

    def full(*_):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr("memlm.huggingface.shards.os.fsync", full)
    with pytest.raises(CheckpointError, match=r"out: cannot be written \(No space left on device\)"):
        export(ours, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="--dtype: is int8, must be one of float32, bfloat16, float16"):
        export(trained("dense"), tmp_path / "out", dtype="int8")
    with pytest.raises(CheckpointError, match=r"some\.ckpt: has no value tables that could be int8"):
        export(trained("dense"), tmp_path / "out", values="int8")
    with pytest.raises(ConfigError, match="--values: is int4, must be one of float32"):
        export(trained("peer"), tmp_path / "out", values="int4")
    quantised = load_trained(export(trained("peer"), tmp_path / "small", values="int8"))
    with pytest.raises(CheckpointError, match="small: holds int8 values, which fp8 would round again"):
        export(quantised, tmp_path / "out", values="fp8")
    again = load_trained(export(quantised, tmp_path / "again"))
    assert torch.equal(again.model.pools["main"].values, quantised.model.pools["main"].values)
    assert torch.equal(again.model.pools["main"].scales, quantised.model.pools["main"].scales)


def test_values_that_are_not_numbers_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("memlm.memory.quantised._CHUNK_ELEMENTS", 64)
    ours = trained("memory")
    ours.model.pools["main"].values[3, 1] = float("nan")
    with pytest.raises(
        CheckpointError, match=r"pools\.main\.values, of rows from 2 on: row 1 of .* NaN or infinity"
    ):
        export(ours, tmp_path / "out", values="int8")
    assert not list(tmp_path.iterdir())


def test_the_model_card(tmp_path):
    run = RunFiles(tmp_path / "run")
    run.checkpoints.mkdir(parents=True)
    run.metrics.write_text(
        "step,train/loss,val/loss,val/recall\n10,3.5,,\n10,,3.25,0.5\n20,,2.125,0.75\n20,3.0,,\n"
    )
    run.test.write_text(json.dumps({"test/loss": 2.0625, "step": 20, "checkpoint": "x"}))
    ours = replace(trained("memory plus"), run=run, step=20)
    folder = export(ours, tmp_path / "out", values="int8", losses={"float32": 2.125, "int8": 2.12575})
    text = (folder / "README.md").read_text()
    assert text.startswith("---\nlibrary_name: transformers\n") and "# license: fill in" in text
    assert (
        "| val/loss | 2.125 |" in text
        and "| val/recall | 0.75 |" in text
        and "Validation at step 20:" in text
    )
    assert "| test/loss | 2.0625 |" in text and "Test at step 20:" in text and "checkpoint" not in text
    assert "| int8 | 2.125750 | +0.000750 |" in text
    total = sum(parameter.numel() for parameter in ours.model.parameters())
    assert f"| parameters | {total:,} |" in text and "| values stored as | int8 |" in text
    assert 'from_pretrained("out", trust_remote_code=True)' in text and "value_dim: 24" in text
    earlier = export(replace(ours, step=12), tmp_path / "earlier")
    assert "| val/loss | 3.25 |" in (earlier / "README.md").read_text()
    # Of the folder itself, whose values are no parameters of a module.
    again = export(load_trained(folder), tmp_path / "again")
    assert f"| parameters | {total:,} |" in (again / "README.md").read_text()


@pytest.mark.parametrize("name", ["dense", "memory plus"])
def test_the_model_card_s_example_runs(tmp_path, monkeypatch, capsys, name):
    transformers = pytest.importorskip("transformers")
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    text = (export(trained(name), tmp_path / "out") / "README.md").read_text()
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    code = text.split("```python\n")[1].split("```")[0]
    exec(code.replace('from_pretrained("out"', 'from_pretrained("./out"'), {})
    assert len(capsys.readouterr().out) > 10
    assert transformers.GenerationConfig.from_pretrained(tmp_path / "out").eos_token_id == 256


TEXTS = ["", "a", " two  words\n\tand é ü 漢字 🙂", "x" * 300, "\x00\x7f\xad\u00a0"]


def test_bytes_have_the_same_ids_in_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    folder = export(trained("dense"), tmp_path / "out")
    assert read(folder)["memlm_tokenizer"] == "bytes"
    theirs, ours = transformers.AutoTokenizer.from_pretrained(folder), ByteTokenizer()
    for text in TEXTS:
        assert theirs(text)["input_ids"] == ours.encode(text)
        assert theirs.decode(ours.encode(text)) == text
    assert (theirs.eos_token_id, theirs.bos_token_id, len(theirs)) == (256, 256, 257)
    assert theirs("<|eos|>a")["input_ids"] == [256, 97]
    assert theirs.model_max_length == 128


def test_a_tokenizer_json_is_copied(tmp_path):
    transformers = pytest.importorskip("transformers")
    tokenizer = word_tokenizer(["one", "two", "three"], "test")
    folder = export(replace(trained("memory plus"), tokenizer=tokenizer), tmp_path / "out")
    config = read(folder)
    assert (config["memlm_tokenizer"], config["eos_token_id"]) == ("tokenizer.json", 3)
    assert load_tokenizer(str(folder / "tokenizer.json")).hash == tokenizer.hash
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    assert theirs("three one")["input_ids"] == tokenizer.encode("three one") == [2, 0]
    assert theirs.eos_token_id == 3


@pytest.mark.parametrize("name", STANDARD)
def test_standard_models_bring_no_code(tmp_path, name):
    folder = export(trained(name), tmp_path / "out")
    assert read(folder)["architectures"] == [STANDARD[name]]
    assert not (folder / "modeling_memlm.py").exists()
    assert "trust_remote_code" not in (folder / "README.md").read_text()


def test_a_tokenizer_of_another_format_is_copied_and_named(tmp_path):
    sentencepiece = pytest.importorskip("sentencepiece")
    content = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["one two three", "three two one and more"] * 5),
        model_writer=content,
        vocab_size=17,
        minloglevel=2,
    )
    (tmp_path / "my.model").write_bytes(content.getvalue())
    tokenizer = load_tokenizer(str(tmp_path / "my.model"))
    folder = export(replace(trained("memory plus"), tokenizer=tokenizer), tmp_path / "out")
    assert read(folder)["memlm_tokenizer"] == "tokenizer.model"
    assert load_trained(folder).tokenizer.hash == tokenizer.hash
    assert not list(folder.glob("tokenizer*.json"))
    text = (folder / "README.md").read_text()
    assert "`tokenizer.model`, is not in a format that `AutoTokenizer` reads" in text
    assert "AutoTokenizer.from_pretrained" not in text
