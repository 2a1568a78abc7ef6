import gzip
import json
from itertools import islice
from pydoc_data.topics import topics

import numpy as np
import pytest
import torch
import zstandard
from lightning.pytorch import LightningModule, Trainer

from data_modules import TextStream
from data_modules.streaming.documents import ENCODED_FIRST
from data_modules.tokenizer_training import main as tokenizer_verb
from memlm.errors import CheckpointError, ConfigError, DataError
from memlm.tokenizers import ByteTokenizer, FileTokenizer

TEXTS = [topics[name] for name in sorted(topics)][:24]
EOS = 256


def lines(texts):
    return "".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(texts)).encode()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """The standard library's help texts in every kind of file; returns the directory."""
    root = tmp_path_factory.mktemp("corpus")
    (root / "a.jsonl").write_bytes(lines(TEXTS[:6]) + b"\n" + lines(["", " \n"]))
    (root / "b.jsonl.gz").write_bytes(gzip.compress(lines(TEXTS[6:12])))
    (root / "c.jsonl.zst").write_bytes(
        zstandard.compress(lines(TEXTS[12:15])) + zstandard.compress(lines(TEXTS[15:20]))
    )
    (root / "d.txt").write_text(TEXTS[20])
    (root / "e.txt.zst").write_bytes(zstandard.compress(TEXTS[21].encode()))
    (root / "f.rst.gz").write_bytes(gzip.compress(TEXTS[22].encode()))
    (root / "g.txt").write_text(TEXTS[23])
    return root


def stream(root, **options):
    options = {
        "sequence_length": 500,
        "batch_size": 4,
        "validation_fraction": 0.0,
        "skip_empty": True,
    } | options
    return TextStream(**({"paths": [f"{root}/*"]} | options))


def batches(module, count, world=1, rank=0, cursor=None):
    source = module.training_source()
    return list(islice(source.batches(module.start() if cursor is None else cursor, world, rank), count))


def at(batch):
    """The position of the only stream of the only lane."""
    [[position]] = batch["cursor"]["lanes"]
    return position


def same(a, b):
    return a.keys() == b.keys() and all(
        torch.equal(a[key], b[key]) if key != "cursor" else a[key] == b[key] for key in a
    )


def texts_in(targets):
    """The documents that rows of targets spell, split at their ends."""
    flat = [t for t in targets.flatten().tolist() if t != -100]
    documents, current = [], []
    for token in flat:
        if token == EOS:
            documents.append(bytes(current).decode())
            current = []
        else:
            current.append(token)
    return documents


def validation_texts(module):
    [loader] = module.val_dataloader()
    return texts_in(torch.cat([batch["targets"] for batch in loader]))


def epoch_of(module):
    """All batches that begin in the first epoch, and one more."""
    found = [{"cursor": module.start()}]
    endless = module.training_source().batches(module.start(), 1, 0)
    while at(found[-1])["epoch"] == 0:
        found.append(next(endless))
    return found[1:]


@pytest.mark.parametrize("packing", ["concatenate", "documents"])
def test_an_epoch_is_every_text_once_in_order(corpus, packing):
    found = epoch_of(stream(corpus, packing=packing))
    documents = texts_in(torch.cat([batch["targets"] for batch in found]))
    assert documents[:24] == TEXTS
    assert at(found[-1])["empty"] == 2 and at(found[-1])["skipped"] == 0


def test_joined_rows_follow_each_other(corpus):
    some = batches(stream(corpus, confine_attention=True), 30)
    tokens = torch.cat([batch["tokens"] for batch in some]).flatten()
    targets = torch.cat([batch["targets"] for batch in some]).flatten()
    assert tokens[0] == EOS and torch.equal(tokens[1:], targets[:-1]) and (targets >= 0).all()
    for batch in some:
        started = (batch["tokens"][:, 1:] == EOS).long()
        assert torch.equal(batch["documents"].diff(dim=1), started) and not batch["documents"][:, 0].any()


def test_separate_rows_hold_one_document(corpus):
    for batch in batches(stream(corpus, packing="documents"), 30):
        for tokens, targets in zip(batch["tokens"], batch["targets"], strict=True):
            counted = targets != -100
            assert not (tokens[1 : counted.sum()] == EOS).any()
            assert torch.equal(tokens[1:][counted[:-1]][: counted.sum() - 1], targets[counted][:-1])
            assert (tokens[counted.sum() :] == EOS).all()


@pytest.mark.parametrize("packing", ["concatenate", "documents"])
@pytest.mark.parametrize("options", [{}, {"validation_fraction": 0.3}, {"sequence_length": 37}])
def test_any_cursor_continues_the_same_stream(corpus, packing, options):
    options = {"packing": packing} | options
    whole = epoch_of(stream(corpus, **options))
    whole += batches(stream(corpus, **options), 6, cursor=whole[-1]["cursor"])  # into the second epoch
    assert at(whole[-1])["epoch"] == 1
    for stop in [*np.random.default_rng(0).integers(0, len(whole) - 4, 6), len(whole) - 6, len(whole) - 7]:
        resumed = batches(stream(corpus, **options), 4, cursor=whole[stop]["cursor"])
        assert all(same(x, y) for x, y in zip(whole[stop + 1 : stop + 5], resumed, strict=False)), stop


def test_a_separator_makes_documents_of_a_text_file(tmp_path):
    texts = [f"story {i} " * (1 + i % 5) for i in range(40)]
    (tmp_path / "a.txt").write_text("<|endoftext|>".join(texts))
    (tmp_path / "b.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    made = [
        stream(
            "",
            paths=[str(tmp_path / name)],
            document_separator="<|endoftext|>",
            validation_fraction=0.3,
            sequence_length=50,
        )
        for name in ("a.txt", "b.jsonl")
    ]
    split, lines = [batches(module, 12) for module in made]
    assert at(split[-1])["epoch"] > 0 and all(same(a, b) for a, b in zip(split, lines, strict=True))
    for stop in (0, 4):
        resumed = batches(made[0], 1, cursor=split[stop]["cursor"])[0]
        assert same(resumed, split[stop + 1])
    assert validation_texts(made[0]) == validation_texts(made[1])
    with pytest.raises(ConfigError, match=r"data\.document_separator: is empty"):
        stream(tmp_path, document_separator="")


def test_resuming_tokenizes_nothing_before_the_cursor(corpus, monkeypatch):
    module = stream(corpus)
    cursor = next(b["cursor"] for b in epoch_of(module) if at(b)["file"] == 2)
    encoded, encode = [], ByteTokenizer.encode_batch
    monkeypatch.setattr(
        ByteTokenizer, "encode_batch", lambda self, texts: encoded.append(texts) or encode(self, texts)
    )
    batches(module, 1, cursor=cursor)
    first = 12 + cursor["lanes"][0][0]["record"]
    assert len(encoded) == 1 and encoded[0] == TEXTS[first : first + len(encoded[0])]
    assert sum(map(len, encoded[0][:-1])) < ENCODED_FIRST  # begins soon


@pytest.mark.parametrize("packing", ["concatenate", "documents"])
@pytest.mark.parametrize("world", [2, 3])
def test_ranks_share_the_rows_of_one(corpus, packing, world):
    whole = batches(stream(corpus, packing=packing, batch_size=4 * world), 12)
    for rank in range(world):
        for part, all_rows in zip(
            batches(stream(corpus, packing=packing), 12, world, rank), whole, strict=True
        ):
            assert part["cursor"] == all_rows["cursor"]
            assert torch.equal(part["tokens"], all_rows["tokens"][rank::world])
            assert torch.equal(part["targets"], all_rows["targets"][rank::world])


@pytest.mark.parametrize("packing", ["concatenate", "documents"])
@pytest.mark.parametrize("world", [1, 3, 4])
def test_validation_is_one_even_pass_over_every_text(corpus, packing, world):
    module = stream(corpus, validation_paths=[f"{corpus}/[bd]*"], packing=packing, sequence_length=301)
    source = module.evaluation_sources(test=False)["all"]
    for _ in range(2):  # the second time from memory
        parts = [
            torch.cat([batch["targets"] for batch in source.batches(module.start(), world, rank)])
            for rank in range(world)
        ]
        assert len({part.shape for part in parts}) == 1
        together = torch.stack(parts, dim=1).flatten(0, 1)
        assert texts_in(together) == [*TEXTS[6:12], TEXTS[20]]
        assert (together != -100).any(dim=1).sum() > len(together) - world


def test_a_fraction_of_the_documents_is_held_out_and_never_trained(corpus):
    module = stream(corpus, validation_fraction=0.3)
    trained = texts_in(torch.cat([batch["targets"] for batch in epoch_of(module)]))
    held_out = validation_texts(module)
    assert 3 <= len(held_out) <= 12 and not set(trained) & set(held_out)
    assert sorted([*trained[: 24 - len(held_out)], *held_out]) == sorted(TEXTS)
    other = stream(corpus, validation_fraction=0.3, seed=1)
    assert held_out != validation_texts(other)


def test_copies_of_a_text_stay_on_one_side(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(lines([f"text {i % 40}" for i in range(400)]))
    module = stream(tmp_path, validation_fraction=0.3, sequence_length=20)
    held_out = validation_texts(module)
    assert len(held_out) == 10 * len(set(held_out)) > 0


def test_every_source_has_its_own_validation(corpus, tmp_path):
    (tmp_path / "other.jsonl").write_bytes(lines(TEXTS[:9]).replace(b'"text"', b'"body"'))
    paths = {"help": [str(corpus)], "other": [str(tmp_path)]}
    options = {"paths": paths, "text_key": {"help": "text", "other": "body"}, "validation_fraction": 0.3}
    for weights in (None, {"help": 2, "other": 1}):
        module = stream(corpus, weights=weights, **options)
        sets = module.evaluation_sources(test=True)
        held_out = [
            texts_in(torch.cat([batch["targets"] for batch in source.batches(module.start(), 1, 0)]))
            for source in sets.values()
        ]
        assert list(sets) == ["help", "other"] and len(held_out[0]) > len(held_out[1]) > 0
        assert held_out[1] == [text for text in TEXTS[:9] if text in held_out[0]]  # copies are on one side
    named = {"one": [f"{corpus}/b*"], "two": [f"{corpus}/d*"]}
    module = stream(corpus, validation_paths=named)
    assert list(module.evaluation_sources(test=False)) == ["one", "two"]
    assert len(module.val_dataloader()) == 2


def test_sources_without_weights_follow_each_other(corpus):
    paths = {"second": [f"{corpus}/[d-g]*"], "first": [f"{corpus}/[abc]*"]}
    found = epoch_of(stream(corpus, paths=paths))
    read = texts_in(torch.cat([batch["targets"] for batch in found]))
    assert read[:24] == [*TEXTS[20:], *TEXTS[:20]]


def test_no_validation(corpus):
    module = stream(corpus)
    assert module.val_dataloader() == []
    with pytest.raises(
        ConfigError, match=r"data.validation_paths: is not set and data.validation_fraction is 0"
    ):
        module.test_dataloader()


def test_bits_per_byte_counts_the_bytes_of_the_text(corpus, tmp_path, capsys):
    path = tmp_path / "tokenizer.json"
    verb = ["train", "--paths", json.dumps([f"{corpus}/*"]), "--vocab_size", "500", "--output", str(path)]
    tokenizer_verb(verb)
    assert capsys.readouterr().out == f"{path}: 500 tokens, trained on 7 files\n"
    assert FileTokenizer(path).vocab_size == 500
    expected = sum(len(text.encode()) for text in [*TEXTS[6:12], TEXTS[20]])
    for name in ["bytes", str(path)]:
        module = stream(corpus, tokenizer=name, validation_paths=[f"{corpus}/[bd]*"])
        [loader] = module.val_dataloader()
        targets = torch.cat([batch["targets"] for batch in loader])
        assert module.tokenizer.token_bytes[targets[targets != -100]].sum() == expected
        assert module.vocab_size == len(module.tokenizer.token_bytes)
    with pytest.raises(DataError, match="exists already"):
        tokenizer_verb(verb)


def test_the_tokenizer_verb_says_when_text_runs_out(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("aaaa")
    arguments = ["train", "--paths", json.dumps([f"{tmp_path}/a.txt"]), "--output", f"{tmp_path}/t.json"]
    tokenizer_verb(arguments)
    assert "fewer tokens than the 16,384 wanted" in capsys.readouterr().out
    (tmp_path / "b.jsonl").write_text('{"text": "x"}\n{"txt": "x"}\n')
    arguments[2] = json.dumps([f"{tmp_path}/b.jsonl"])
    arguments[-1] = f"{tmp_path}/u.json"
    with pytest.raises(DataError, match=r"b.jsonl:2: has no key 'text'"):
        tokenizer_verb(arguments)
    assert not (tmp_path / "u.json").exists()


BROKEN = (
    b'{"text": "'
    + b"good " * 40
    + b'"}\n{"text": "bad\n{"txt": "x"}\n{"text": "\xff"}\n{"text": "'
    + b"fine " * 40
    + b'"}\n'
)


def test_malformed_records_are_errors_unless_skipped_and_counted(tmp_path, caplog):
    (tmp_path / "a.jsonl").write_bytes(BROKEN)
    with pytest.raises(
        DataError, match=r"a.jsonl:2: is not valid JSON .*; data.skip_malformed: true skips and"
    ):
        batches(stream(tmp_path, sequence_length=50), 2)
    module = stream(tmp_path, sequence_length=50, skip_malformed=True, batch_size=1)
    with pytest.warns(UserWarning, match=r"skipped a malformed record.*a.jsonl:2: is not valid JSON"):
        whole = batches(module, 20)
    assert texts_in(torch.cat([b["targets"] for b in whole]))[:3] == [
        "good " * 40,
        "fine " * 40,
        "good " * 40,
    ]
    skipped = [at(b)["skipped"] for b in whole]
    assert skipped == sorted(skipped) and set(skipped) == {0, 3, 6}
    for i in range(19):  # counts do not depend on where a run was interrupted
        assert batches(module, 1, cursor=whole[i]["cursor"])[0]["cursor"] == whole[i + 1]["cursor"]
    with caplog.at_level("INFO"):
        for batch in whole:
            module.advance(batch["cursor"])
    with caplog.at_level("INFO"):
        module.teardown("fit")
    expected = "TextStream: 6 malformed records skipped, 0 empty documents dropped, 0 files unreadable in all"
    assert caplog.messages[-1] == expected
    reports = [record.message for record in caplog.records if "epochs read" in record.message]
    assert reports == [
        f"TextStream: {epochs} epochs read; {3 * epochs} malformed records skipped, 0 empty documents "
        "dropped, 0 files unreadable so far"
        for epochs in (1, 2)
    ]


@pytest.mark.parametrize("workers", [0, 1])
def test_errors_arrive_whole_from_a_worker(tmp_path, workers):
    (tmp_path / "a.jsonl").write_bytes(BROKEN)
    loader = stream(tmp_path, sequence_length=50, num_workers=workers, batch_size=1).train_dataloader()
    found = iter(loader)
    assert at(next(found))["token"] == 50
    with pytest.raises(DataError) as caught:
        list(found)
    assert str(caught.value).startswith(f"{tmp_path}/a.jsonl:2: is not valid JSON") and caught.value.line == 2
    assert "\n" not in str(caught.value) and str(caught.value).count("a.jsonl") == 1


def test_a_worker_gives_the_same_batches(corpus):
    ahead = islice(iter(stream(corpus, num_workers=1).train_dataloader()), 10)
    assert all(same(x, y) for x, y in zip(ahead, batches(stream(corpus), 10), strict=True))


def test_a_truncated_file_is_an_error_even_if_malformed_records_are_skipped(tmp_path):
    data = zstandard.compress(lines(TEXTS[:5]))
    (tmp_path / "a.jsonl.zst").write_bytes(data[:-10])
    with pytest.raises(DataError, match=r"a.jsonl.zst:\d: is truncated"):
        batches(stream(tmp_path, skip_malformed=True), 10_000)


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        ("", {}, "no document to train on; all are empty$"),
        (" \n\t\n", {}, "no document to train on; all are empty$"),
        (
            "x" * 99,
            {},
            r"100 tokens in all, but data.sequence_length \+ 1 are 501; shorten it or use packing",
        ),
        ("x" * 99, {"sequence_length": 100}, r"100 tokens in all, but data.sequence_length \+ 1 are 101"),
        ("x", {"validation_fraction": 0.999999}, "no document to train on; all are empty or held out"),
    ],
)
def test_too_little_text(tmp_path, content, options, message):
    (tmp_path / "a.txt").write_text(content)
    with pytest.raises(DataError, match=message):
        batches(stream(tmp_path, **options), 1)


def test_just_enough_text(tmp_path):
    (tmp_path / "a.txt").write_text("x" * 99)
    assert batches(stream(tmp_path, sequence_length=99), 1)[0]["tokens"].shape == (4, 99)
    assert batches(stream(tmp_path, packing="documents"), 1)[0]["tokens"].shape == (4, 500)


def test_nothing_held_out(tmp_path):
    (tmp_path / "a.txt").write_text("x" * 999)
    with pytest.raises(
        DataError, match=r"no document is held out by data.validation_fraction 0.001; raise it"
    ):
        validation_texts(stream(tmp_path, validation_fraction=0.001))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"paths": ["nowhere/*.txt"]}, DataError, r"nowhere/\*.txt: data.paths: matches no file"),
        ({"validation_paths": ["nowhere"]}, DataError, "nowhere: data.validation_paths: matches no file"),
        ({"validation_fraction": 1.0}, ConfigError, "data.validation_fraction: is 1.0; expected 0 <= it < 1"),
        (
            {"num_workers": 2},
            ConfigError,
            "data.num_workers: is 2, but each of 1 ranks has 1 of data.lanes 1 .* to a multiple of 2 ",
        ),
        ({"lanes": 0}, ConfigError, "data.lanes: is 0; expected at least 1"),
        ({"batch_size": 0}, ConfigError, "data.batch_size: is 0; expected at least 1"),
        ({"sequence_length": 0}, ConfigError, "data.sequence_length: is 0; expected at least 1"),
        ({"tokenizer": "none.json"}, DataError, "none.json: no such file; a tokenizer is 'bytes' or"),
    ],
)
def test_wrong_options_are_named_before_training(corpus, options, error, message):
    with pytest.raises(error, match=message):
        stream(corpus, **options).setup("fit")


def test_checkpoints_know_their_tokenizer_and_files(corpus, tmp_path):
    module = stream(corpus)
    module.advance(batches(module, 5)[-1]["cursor"])
    state = module.state_dict()
    longer = stream(corpus, sequence_length=100, packing="documents")  # tokens of a record are still the same
    longer.load_state_dict(state)
    assert longer.cursor == module.cursor
    with pytest.warns(UserWarning, match="training starts at the beginning"):
        (fewer := stream(corpus, paths=[f"{corpus}/[ab]*"])).load_state_dict(state)
    assert fewer.cursor == fewer.start()
    tokenizer_verb(["train", "--paths", json.dumps([f"{corpus}/d.txt"]), "--output", f"{tmp_path}/t.json"])
    with pytest.raises(CheckpointError, match=r"checkpoint: was trained with another tokenizer \(hash"):
        stream(corpus, tokenizer=f"{tmp_path}/t.json").load_state_dict(state)


def test_a_checkpoint_of_another_kind_of_cursor_starts_anew(corpus):
    module = stream(corpus)
    cursor = dict.fromkeys(["epoch", "file", "record", "token", "skipped", "empty"], 1)
    state = module.state_dict() | {"cursor": cursor, "fingerprint": "of the time when cursors were flat"}
    with pytest.warns(UserWarning, match="training starts at the beginning"):
        module.load_state_dict(state)
    assert module.cursor == module.start()


class Remembering(LightningModule):
    """Remembers what it was trained on."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen = []

    def training_step(self, batch, index):
        self.seen.append(batch["tokens"])
        return self.weight * 1.0

    def validation_step(self, batch, index):
        assert "cursor" not in batch

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_run_resumes_at_its_checkpoint_and_not_at_what_was_read_ahead(corpus, tmp_path, workers):
    def run(steps, **options):
        model = Remembering()
        trainer = Trainer(max_steps=steps, accelerator="cpu", logger=False, enable_progress_bar=False,
                          enable_model_summary=False, enable_checkpointing=False, num_sanity_val_steps=1,
                          val_check_interval=2, limit_val_batches=2, default_root_dir=tmp_path)  # fmt: skip
        trainer.fit(model, datamodule=stream(corpus, num_workers=workers, validation_fraction=0.2), **options)
        return model, trainer

    whole, _ = run(9)
    first, trainer = run(5)
    trainer.save_checkpoint(tmp_path / "5.ckpt")
    second, _ = run(9, ckpt_path=tmp_path / "5.ckpt")
    assert len(first.seen) == 5 and len(second.seen) == 4
    assert all(torch.equal(a, b) for a, b in zip(whole.seen, first.seen + second.seen, strict=True))
