"""Lanes, mixtures, ranks and workers of TextStream against its definition, row by row."""

import gzip
import json
import os
import subprocess
import sys
from itertools import islice
from math import gcd
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data_modules import TextStream
from data_modules.mixture import Mixture
from data_modules.streaming.lanes import joined, own_lanes, rows_given
from memlm.errors import CheckpointError, ConfigError, DataError
from memlm.tokenizers import ByteTokenizer, train_bpe

EOS = 256
FILES = [[f"file {f} record {r} " + "abcdefg"[f] * (7 * r % 50) for r in range(3 + 5 * f)] for f in range(5)]
"""Texts by file and record; every text is another one."""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """More files than lanes in most tests; returns their directory."""
    root = tmp_path_factory.mktemp("lanes")
    for number, texts in enumerate(FILES):
        content = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
        if number % 2:
            (root / f"{number}.jsonl.gz").write_bytes(gzip.compress(content))
        else:
            (root / f"{number}.jsonl").write_bytes(content)
    return root


def stream(root, **options):
    options = {"sequence_length": 60, "batch_size": 4, "validation_fraction": 0.0} | options
    return TextStream(**({"paths": [str(root)]} | options))


def mixed(root, **options):
    paths = {"few": [f"{root}/[01]*"], "many": [f"{root}/[234]*"]}
    return stream(root, **({"paths": paths, "weights": {"few": 1, "many": 3}} | options))


def rows_of(module, count):
    """The rows of a run and the cursor after each, one at a time."""
    source = module.training_source()
    source.format = type(source.format)(**(vars(source.format) | {"batch_size": 1}))
    found = list(islice(source.batches(module.start(), 1, 0), count))
    return [batch["tokens"][0] for batch in found], [batch["cursor"] for batch in found]


def run(module, cursor, world, workers, steps):
    """What `world` ranks with `workers` loader processes each read: the rows in order and the last cursor."""
    source, ranks = module.training_source(), []
    for rank in range(world):
        parts = [source.batches(cursor, world, rank, worker, workers) for worker in range(workers)]
        items = (next(parts[i % workers]) for i in range(steps * workers))
        ranks.append(list(source.join(items, workers)))
    rows = [batch["tokens"][row] for n in range(steps) for row in range(module.batch_size)
            for batch in [ranks[rank][n] for rank in range(world)]]  # fmt: skip
    return rows, joined(batches[-1]["cursor"] for batches in ranks)


def text_of(rows):
    return bytes(int(t) for row in rows for t in row if t < 256).decode()


@pytest.mark.parametrize("lanes", [1, 2, 3, 7, 11])
@pytest.mark.parametrize("packing", ["concatenate", "documents"])
def test_every_document_is_in_one_lane(corpus, lanes, packing):
    module = stream(corpus, lanes=lanes, packing=packing, sequence_length=20)
    rows, cursors = rows_of(module, 400 * lanes)
    found = []
    for lane in range(lanes):
        epochs = [cursor["lanes"][lane][0]["epoch"] for cursor in cursors[lane::lanes]]
        own = torch.cat(rows[lane::lanes][: epochs.index(1) + 2 * 20])
        first = [t for t in bytes(own.where(own < 256, 0).tolist()).decode().split("\0") if t]
        expected = [
            text for f, texts in enumerate(FILES) for r, text in enumerate(texts) if (f + r) % lanes == lane
        ]
        assert first[: len(expected)] == expected and first[len(expected)] == expected[0]
        found += expected
    assert sorted(found) == sorted(text for texts in FILES for text in texts)


@given(st.data())
@settings(max_examples=40, deadline=None)
def test_ranks_and_workers_change_nothing(corpus, data):
    """Stopped and resumed with other numbers of both, and with another batch size."""
    lanes = data.draw(st.sampled_from([1, 2, 3, 4, 6]))
    packing = data.draw(st.sampled_from(["concatenate", "documents"]))
    make = data.draw(st.sampled_from([stream, mixed])) if lanes < 4 else stream
    expected, cursors = rows_of(make(corpus, lanes=lanes, packing=packing), 250)
    cursor, got = make(corpus, lanes=lanes).start(), []
    for _ in range(3):
        world, batch_size = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 5))
        workers = data.draw(st.integers(1, lanes // gcd(lanes, world)))
        module = make(corpus, lanes=lanes, packing=packing, batch_size=batch_size)
        rows, cursor = run(module, cursor, world, workers, data.draw(st.integers(1, 4)))
        got += rows
        assert cursor == cursors[len(got) - 1]
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=False)) and len(got) <= 250


@given(st.integers(0, 1000), st.integers(1, 12), st.integers(1, 8), st.integers(1, 4))
def test_own_lanes_by_their_definition(row, lanes, world, workers):
    for rank in range(world):
        needed = {k % lanes for k in range(row, row + lanes * world) if (k - row) % world == rank}
        shares = [own_lanes(row, lanes, world, rank, worker, workers) for worker in range(workers)]
        assert sorted(lane for share in shares for lane in share) == sorted(needed)
        assert max(map(len, shares)) - min(map(len, shares)) <= 1
    assert [rows_given(row, lane, lanes) for lane in range(lanes)] == [
        sum(k % lanes == lane for k in range(row)) for lane in range(lanes)
    ]


@pytest.mark.parametrize("lanes", [1, 3])
def test_sources_give_rows_by_weight_and_lose_nothing(corpus, lanes):
    module = mixed(corpus, lanes=lanes, seed=5)
    rows, cursors = rows_of(module, 240)
    for lane in range(lanes):
        sources, ordinals = Mixture([1, 3], 5, lane).assign(0, 80 // lanes)
        own = rows[lane::lanes]
        for source, pattern in enumerate(["[01]*", "[234]*"]):
            alone = stream(corpus, paths=[f"{corpus}/{pattern}"], lanes=lanes)
            expected = rows_of(alone, 240)[0][lane::lanes]
            for place in np.flatnonzero(sources == source):
                assert torch.equal(own[place], expected[ordinals[place]])
    epochs = [[at["epoch"] for at in positions] for positions in cursors[-1]["lanes"]]
    assert all(many >= 1 for _, many in epochs)


def test_a_rank_reads_its_own_lanes_alone(corpus, monkeypatch):
    encoded, encode = [], ByteTokenizer.encode_batch
    monkeypatch.setattr(
        ByteTokenizer, "encode_batch", lambda self, texts: encoded.extend(texts) or encode(self, texts)
    )
    module = stream(corpus, lanes=4)
    list(islice(module.training_source().batches(module.start(), 2, 1, worker=1, workers=2), 9))
    of_lane_3 = {text for f, texts in enumerate(FILES) for r, text in enumerate(texts) if (f + r) % 4 == 3}
    assert set(encoded) == of_lane_3  # rank 1 has lanes 1 and 3; this is its second worker


@pytest.mark.parametrize("make", [stream, mixed])
def test_loader_processes_give_the_same_batches(corpus, tmp_path, make, monkeypatch):
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")  # hangs a process that was forked after its use
    train_bpe([text for texts in FILES for text in texts], 300, tmp_path / "t.json")
    options = {"lanes": 4, "tokenizer": str(tmp_path / "t.json"), "confine_attention": True}
    module = make(corpus, num_workers=2, batch_size=7, sequence_length=15, **options)
    module.setup("fit")  # tokenizes in this process, which then forks
    loader = module.train_dataloader()
    assert loader.prefetch_factor > 2
    loader.timeout = 30
    ahead = list(islice(iter(loader), 8))
    alone = islice(module.training_source().batches(module.start(), 1, 0), 8)
    for a, b in zip(ahead, alone, strict=True):
        assert a.keys() == b.keys() and a["cursor"] == b["cursor"]
        assert all(torch.equal(a[key], b[key]) for key in a.keys() - {"cursor"})


def test_more_workers_than_lanes_and_shared_lanes_are_named(corpus, monkeypatch):
    module = stream(corpus, lanes=4, num_workers=2)
    monkeypatch.setattr(TextStream, "world", (4, 0))
    with pytest.raises(
        ConfigError, match=r"data\.num_workers: is 2, but each of 4 ranks has 1 of data\.lanes 4"
    ):
        module.setup("fit")
    monkeypatch.setattr(TextStream, "world", (3, 0))
    with pytest.warns(UserWarning, match=r"data\.lanes 4 is no multiple of the 3 ranks"):
        module.setup("fit")


def test_a_lane_without_documents_is_an_error(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "' + "x" * 99 + '"}\n')
    with pytest.raises(
        DataError, match=r"in lane 1 of data.lanes 2: no document to train on; .* fewer lanes"
    ):
        stream(tmp_path, lanes=2).setup("fit")


def test_a_cursor_of_one_rank_is_no_checkpoint(corpus):
    module = stream(corpus, lanes=4)
    module.advance(next(module.training_source().batches(module.start(), 2, 0))["cursor"])
    state = module.state_dict()
    with pytest.raises(CheckpointError, match=r"checkpoint: lacks the positions of lanes \[1, 3\]"):
        stream(corpus, lanes=4).load_state_dict(state)
    with pytest.warns(UserWarning, match="training starts at the beginning"):
        (other := stream(corpus, lanes=2)).load_state_dict(state)
    assert other.cursor == other.start()


def test_files_are_shuffled_anew_in_every_epoch(corpus):
    module = stream(corpus, lanes=2, shuffle_files=True, packing="documents", sequence_length=200)
    rows, _ = rows_of(module, 10 * sum(map(len, FILES)))
    orders = []
    for lane in range(2):
        own = [(f, r) for f, texts in enumerate(FILES) for r in range(len(texts)) if (f + r) % 2 == lane]
        for epoch in range(5):
            some = rows[lane::2][epoch * len(own) : (epoch + 1) * len(own)]
            read = [tuple(int(n) for n in text_of([row]).split()[1:4:2]) for row in some]
            assert sorted(read) == own
            orders.append(list(dict.fromkeys(f for f, _ in read)))
            assert read == [pair for f in orders[-1] for pair in own if pair[0] == f]
    assert orders[:5] == orders[5:] and len(set(map(tuple, orders[:5]))) == 5


@pytest.mark.slow
def test_two_processes_save_what_one_or_two_continue(corpus, tmp_path):
    """DistributedDataParallel on two CPU ranks whose lanes differ, saved by Lightning and resumed."""
    script = Path(__file__).with_name("text_ranks.py")
    subprocess.run(
        [sys.executable, script, corpus, tmp_path],
        check=True,
        timeout=300,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])},
    )
    expected, _ = rows_of(stream(corpus, lanes=4), 48)
    for name, first in {"whole": 0, "resumed": 24}.items():
        ranks = [torch.load(tmp_path / f"{name}{rank}.pt") for rank in range(2)]
        rows = torch.stack(ranks, dim=2).flatten(0, 2)  # steps, rows, ranks
        assert torch.equal(rows, torch.stack(expected[first : first + len(rows)])) and len(rows) == 48 - first
    saved = torch.load(tmp_path / "3.ckpt", weights_only=True)["TextStream"]
    alone = stream(corpus, lanes=4, batch_size=3)
    alone.load_state_dict(saved)
    rows, _ = run(alone, alone.cursor, 1, 1, 8)
    assert torch.equal(torch.stack(rows), torch.stack(expected[24:]))
