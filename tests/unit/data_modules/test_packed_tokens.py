"""The data module: its options, what it reports, faults of folders, and resumption."""

import shutil
import time
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from written_folders import documents, write_folder, write_sparse_folder

from data_modules import PackedTokens
from data_modules.prepared.compression import compress_file
from data_modules.prepared.manifest import Manifest
from memlm.errors import CheckpointError, ConfigError, DataError
from memlm.tokenizers import ByteTokenizer, train_bpe

HASH = ByteTokenizer().hash
OTHER_HASH = "0123456789abcdef" * 4
TRAIN = {"a": [documents(1, 14), documents(2, 9)], "b": [documents(4, 20, 9)]}


@pytest.fixture
def folders(tmp_path):
    """Folder a holds documents out, b does not."""
    held_out = {"a": [documents(7, 5)], "b": []}
    return {name: write_folder(tmp_path / name, TRAIN[name], held_out[name]) for name in TRAIN}


def module(folders, **options):
    return PackedTokens(**({"folders": folders, "sequence_length": 16, "batch_size": 2} | options))


def batches(data, count, cursor=0):
    return list(islice(data.training_source().batches(cursor, 1, 0), count))


def rows(data, count, cursor=0):
    return torch.cat([batch["tokens"] for batch in batches(data, count, cursor)])


def tokens_of(source):
    return sum((batch["targets"] >= 0).sum().item() for batch in source.batches(0, 1, 0))


# -- folders and their tokenizer


def test_a_single_folder_is_called_by_its_name(folders, monkeypatch):
    monkeypatch.chdir(folders["a"])
    for path in [folders["a"], folders["a"] + "/", "."]:
        assert list(module(path).evaluation_sources(test=True)) == ["a"]
    assert torch.equal(rows(module("."), 9), rows(module({"x": folders["a"]}), 9))


def test_the_tokenizer_is_the_folders(folders):
    data = module(folders)
    assert data.tokenizer.hash == HASH and data.vocab_size == ByteTokenizer().vocab_size
    assert module(folders, tokenizer="bytes").tokenizer.hash == HASH


def test_another_tokenizer_is_refused(folders, tmp_path):
    path = str(tmp_path / "t.json")
    other = train_bpe(["some text to train on"], 260, path)
    with pytest.raises(ConfigError) as caught:
        module(folders, tokenizer=path)
    assert str(caught.value) == (
        f"data.tokenizer: is {path} with the hash {other.hash}; expected the tokenizer that {folders['a']} "
        f"was prepared with, {HASH} (leave data.tokenizer out to take it)"
    )


@pytest.mark.parametrize("key", ["folders", "validation_folders"])
def test_folders_of_different_tokenizers_are_refused(folders, tmp_path, key):
    other = write_folder(tmp_path / "c", TRAIN["a"], tokenizer=OTHER_HASH)
    options = {"folders": folders | {"c": other}} if key == "folders" else {key: other, "folders": folders}
    with pytest.raises(ConfigError) as caught:
        module(**options)
    assert str(caught.value) == (
        f"data.{key}: {folders['a']} was prepared with the tokenizer {HASH}, {other} with {OTHER_HASH}; "
        "expected one tokenizer for all"
    )


def test_folders_that_are_missing_or_unfinished(folders, tmp_path):
    missing = str(tmp_path / "nowhere")
    with pytest.raises(DataError, match=f"^{missing}: no such folder; expected one made by memlm prepare$"):
        module(missing)
    (Path(folders["b"]) / "manifest.json").unlink()
    with pytest.raises(DataError, match=r"/b: holds no manifest.json; .*run the same memlm prepare again$"):
        module(folders)
    for key in ["folders", "validation_folders"]:
        with pytest.raises(ConfigError, match=rf"^data\.{key}: is empty; expected a prepared folder$"):
            module(**({"folders": folders["a"]} | {key: {}}))


def test_folders_without_documents(folders, tmp_path):
    empty = write_folder(tmp_path / "empty", [[]])
    with pytest.raises(DataError, match="/empty: holds no document to train on"):
        module({"a": folders["a"], "c": empty}).setup("fit")
    with pytest.raises(DataError, match="/empty: holds no document to validate on"):
        module(folders, validation_folders=empty).evaluation_sources(test=False)


# -- weights


def test_weights_that_do_not_fit_the_folders(folders):
    for weights, message in {
        (("c", 1.0), ("a", 1.0)): r"data\.weights\.c: is the weight of no source; data\.folders has a, b$",
        (("a", 1.0),): r"data\.weights: has none for 'b' of data\.folders; expected one for each$",
        (("a", 1.0), ("b", 0.0)): r"data\.weights\.b: is 0\.0; expected a positive number",
        (("a", 1.0), ("b", float("nan"))): r"data\.weights\.b: is nan; expected a positive number",
        (("a", 1.0), ("b", 1e-5)): r"data\.weights\.b: is 1e-05 of all weights; expected at least 1/65,536",
        (): r"data\.weights: has none for 'a'",
    }.items():
        with pytest.raises(ConfigError, match=message):
            module(folders, weights=dict(weights))


def test_neither_names_nor_places_nor_their_order_change_the_rows(folders, tmp_path):
    data = module(folders, weights={"a": 2, "b": 1})
    shutil.copytree(folders["a"], tmp_path / "elsewhere" / "a")
    moved = {"z": str(tmp_path / "elsewhere" / "a"), "b": folders["b"]}
    for same in [
        module(dict(reversed(folders.items())), weights={"a": 2, "b": 1}),
        module(moved, weights={"b": 1, "z": 2.0}),
        module(moved, weights={"b": 1, "z": 2.0}, batch_size=1, num_workers=2, confine_attention=True),
    ]:
        assert same.fingerprint() == data.fingerprint()
    assert torch.equal(rows(module(moved, weights={"b": 1, "z": 2}), 40), rows(data, 40))


def test_the_fingerprint_names_what_gives_the_cursor_its_meaning(folders, tmp_path):
    altered = write_folder(tmp_path / "c", [TRAIN["a"][0], documents(3, 9)])
    options = [
        {},
        {"weights": {"a": 2, "b": 1}},
        {"weights": {"a": 1, "b": 2}},
        {"seed": 1},
        {"sequence_length": 15},
        {"packing": "best_fit"},
        {"packing": "documents"},
        {"folders": folders["a"]},
        {"folders": folders | {"a": altered}},
        {"folders": folders | {"c": altered}},
    ]
    assert len({module(**({"folders": folders} | each)).fingerprint() for each in options}) == len(options)


# -- validation


def test_validation_is_of_what_the_folders_hold_out(folders):
    sources = module(folders).evaluation_sources(test=False)
    assert list(sources) == ["a"]
    assert tokens_of(sources["a"]) == sum(map(len, documents(7, 5)))


def test_validation_folders_replace_what_is_held_out(folders):
    data = module(folders["b"], validation_folders={"held": folders["a"], "all": folders["b"]})
    sizes = {name: tokens_of(source) for name, source in data.evaluation_sources(test=True).items()}
    assert sizes == {"held": sum(map(len, documents(7, 5))), "all": sum(map(len, TRAIN["b"][0]))}


def test_no_validation(folders):
    data = module(folders["b"])
    assert data.evaluation_sources(test=False) == {} and data.val_dataloader() == []
    with pytest.raises(ConfigError, match=r"^data\.validation_folders: is not set and data\.folders hold no"):
        data.evaluation_sources(test=True)


# -- shards


def shard(folder, number=0):
    return Path(folder) / f"train-{number:05d}.tokens"


def test_faulty_shards_are_known_before_training(folders):
    content = shard(folders["b"]).read_bytes()
    shard(folders["b"]).write_bytes(content[:-8])
    with pytest.raises(DataError, match=r"b/train-00000\.tokens: is truncated: .* bytes; its header says"):
        module(folders).setup("fit")
    shutil.copy(shard(folders["a"]), shard(folders["b"]))
    with pytest.raises(DataError, match=r"b/train-00000\.tokens: is altered: it holds 14 documents"):
        module(folders).setup("fit")
    shard(folders["b"]).unlink()
    with pytest.raises(DataError, match=r"b/train-00000\.tokens: no such file"):
        module(folders).setup("validate")


def test_altered_content_is_found_if_it_is_verified(folders):
    content = bytearray(shard(folders["a"], 1).read_bytes())
    content[140] ^= 1
    shard(folders["a"], 1).write_bytes(content)
    unverified = module(folders)
    unverified.prepare_data()
    unverified.setup("fit")
    with pytest.raises(DataError, match=r"a/train-00001\.tokens: is altered: its content has the SHA-256"):
        module(folders, verify=True).prepare_data()


def test_compressed_shards_are_expanded(folders):
    expected = rows(module(folders), 30)
    for folder in folders.values():
        for file in Path(folder).glob("*.tokens"):
            compress_file(file, file.with_name(file.name + ".zst"))
            file.unlink()
        content = (Path(folder) / "manifest.json").read_text()
        assert '"compressed": false' in content
        (Path(folder) / "manifest.json").write_text(
            content.replace('"compressed": false', '"compressed": true')
        )
    data = module(folders, verify=True)
    data.prepare_data()
    data.setup("fit")
    assert torch.equal(rows(data, 30), expected)


# -- reports


class Remembering(LightningModule):
    """Remembers what it was trained on."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen = []

    def training_step(self, batch, index):
        self.seen.append(batch["tokens"])
        return self.weight * 1.0

    def validation_step(self, batch, index, dataloader_idx=0):
        assert "cursor" not in batch

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(data, steps, folder, trainer_options=None, **options):
    model = Remembering()
    trainer = Trainer(max_steps=steps, accelerator="cpu", logger=False, enable_progress_bar=False,
                      enable_model_summary=False, enable_checkpointing=False, num_sanity_val_steps=1,
                      val_check_interval=2, default_root_dir=folder, **(trainer_options or {}))  # fmt: skip
    trainer.fit(model, datamodule=data, **options)
    return model, trainer


def reports(caplog):
    return [r.message.removeprefix("PackedTokens: ") for r in caplog.records if "PackedTokens" in r.message]


def test_what_there_is_to_read_is_reported(folders, tmp_path, caplog):
    counts = {name: sum(len(d) for s in shards for d in s) for name, shards in TRAIN.items()}
    size = {name: -(-count // 16) for name, count in counts.items()}
    expected = {
        name: f"{name}: {len([d for s in TRAIN[name] for d in s])} documents, {counts[name]} tokens in "
        f"{size[name]} rows of 16 ({1 - counts[name] / size[name] / 16:.2%} padding)"
        for name in TRAIN
    }
    with caplog.at_level("INFO"):
        module(folders).setup("fit")
        assert sorted(reports(caplog)) == sorted(expected.values())
        caplog.clear()
        module(folders).setup("validate")
        assert not reports(caplog)
        fit(module(folders), 3, tmp_path, {"accumulate_grad_batches": 2})
    epochs = f"; {12 / sum(size.values()):.2f} epochs by step 3"  # 3 steps x 2 batches x 2 rows
    assert sorted(reports(caplog)) == sorted(text + epochs for text in expected.values())


def test_too_many_epochs_are_warned_of(folders, tmp_path, caplog):
    data = module(folders, weights={"a": 9, "b": 1}, batch_size=20)
    with (
        caplog.at_level("INFO"),
        pytest.warns(UserWarning, match=r"^a will be read \d\.\d times: .*2305\.16264"),
    ):
        fit(data, 5, tmp_path)
    of_a = next(text for text in reports(caplog) if text.startswith("a: "))
    given = np.bincount(data._order.locate(np.arange(100))[0])
    epochs = given / [source.layout.rows for source in data._rows]
    assert f"; weight 0.9; {epochs.max():.2f} epochs by step 5" in of_a


# -- resumption


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("weights", [None, {"a": 1, "b": 2}])
def test_a_run_resumes_at_its_checkpoint_also_with_other_batches(folders, tmp_path, workers, weights):
    def data(**options):
        return module(folders, weights=weights, packing="best_fit", **options)

    whole, _ = fit(data(), 12, tmp_path)
    first, trainer = fit(data(num_workers=workers), 5, tmp_path)
    trainer.save_checkpoint(tmp_path / "5.ckpt")
    assert trainer.datamodule.cursor == 10
    second, _ = fit(data(num_workers=workers), 12, tmp_path, ckpt_path=tmp_path / "5.ckpt")
    assert all(torch.equal(a, b) for a, b in zip(whole.seen, first.seen + second.seen, strict=True))
    larger, _ = fit(data(batch_size=7), 7, tmp_path, ckpt_path=tmp_path / "5.ckpt")
    assert torch.equal(torch.cat(larger.seen), torch.cat(whole.seen)[10:])


def test_a_position_in_other_data_is_not_taken_over(folders, tmp_path):
    data = module(folders)
    data.advance(36)
    state = data.state_dict()
    (same := module(folders, batch_size=5)).load_state_dict(state)
    assert same.cursor == 36
    with pytest.warns(UserWarning, match="trained on other data"):
        (other := module(folders, packing="documents")).load_state_dict(state)
    assert other.cursor == 0
    with pytest.raises(CheckpointError, match="was trained with another tokenizer"):
        data.load_state_dict(state | {"tokenizer_hash": OTHER_HASH})


# -- size


@pytest.mark.slow
@pytest.mark.parametrize("shards", [80, 10_000])
def test_ten_billion_tokens_start_and_resume_within_two_seconds(tmp_path, shards):
    tokens = 10**10 // shards
    folder = write_sparse_folder(tmp_path / "f", shards, tokens, documents=tokens // 1000)
    begin = time.perf_counter()
    data = module({"a": folder}, weights={"a": 1}, sequence_length=4096, batch_size=8)
    data.prepare_data()
    data.setup("fit")
    [batch] = batches(data, 1, cursor=123_456_789)
    assert time.perf_counter() - begin < 2
    assert batch["cursor"] == 123_456_797 and Manifest.load(folder).counts.tokens == 10**10
