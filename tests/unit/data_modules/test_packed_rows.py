"""Rows against naive ones: which tokens each holds, and in what order they come for any ranks and workers."""

import os
from collections import Counter
from itertools import chain, islice
from pickle import dumps, loads
from resource import RLIMIT_NOFILE, getrlimit, setrlimit

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from written_folders import EOS, documents, open_descriptors, write_folder

from data_modules import PackedTokens
from data_modules.packed.sharded_tokens import OpenShards, ShardedTokens
from data_modules.prepared.manifest import Manifest
from memlm.errors import DataError

SHARDS = {"a": [documents(1, 14), [], documents(2, 9), documents(3, 1)], "b": [documents(4, 20, 9)]}
PACKINGS = ["concatenate", "best_fit", "documents"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("prepared")
    return {name: write_folder(root / name, shards) for name, shards in SHARDS.items()}


def module(folders, **options):
    return PackedTokens(**({"folders": folders, "sequence_length": 16, "batch_size": 1} | options))


def rows_of(source, count, cursor=0, **place):
    """The first rows of batches of one rank: (tokens, counted targets, numbers of documents)."""
    found = []
    for batch in source.batches(cursor, **({"world": 1, "rank": 0} | place)):
        for i, (tokens, targets) in enumerate(
            zip(batch["tokens"].tolist(), batch["targets"].tolist(), strict=True)
        ):
            counted = targets.index(-100) if -100 in targets else len(targets)
            assert targets[counted:] == [-100] * (len(targets) - counted)
            assert tokens[counted:] == [EOS] * (len(targets) - counted)
            numbers = batch["documents"][i].tolist()[:counted] if "documents" in batch else None
            found.append((tokens[:counted], targets[:counted], numbers))
        if len(found) >= count:
            break
    return found[:count]


def expected_rows(shards, packing, length):
    """All rows that a source must have but for best_fit, in which these are the pieces of rows."""
    whole = list(chain(*shards))
    if packing == "concatenate":
        stream = [*chain(*whole), EOS]
        cuts = range(0, len(stream) - 1, length)
        return [(stream[i : i + length][: len(stream) - 1 - i], stream[i + 1 : i + length + 1]) for i in cuts]
    rows = []
    for document in whole:
        closed = [*document, EOS]
        for i in range(0, len(document), length):
            rows.append((document[i : i + length], closed[i + 1 : i + length + 1]))
    return rows


def as_tuples(rows):
    return Counter((tuple(tokens), tuple(targets)) for tokens, targets, *_ in rows)


def epoch_of(data):
    return rows_of(data.training_source(), int(data._order.rows.sum()))


@pytest.mark.parametrize("length", [1, 5, 16, 1000])
@pytest.mark.parametrize("packing", ["concatenate", "documents"])
def test_an_epoch_is_every_row_once(folders, packing, length):
    data = module(folders, packing=packing, sequence_length=length)
    expected = [row for shards in SHARDS.values() for row in expected_rows(shards, packing, length)]
    found = epoch_of(data)
    assert as_tuples(found) == as_tuples(expected)
    assert len(found) < 3 or [row[0] for row in found] != [row[0] for row in expected]  # and in another order
    following = rows_of(data.training_source(), len(expected), cursor=len(expected))
    assert as_tuples(following) == as_tuples(expected) and (len(found) < 9 or following != found)


@pytest.mark.parametrize("length", [1, 5, 16, 1000])
def test_best_fit_holds_every_piece_once_and_whole(folders, length):
    data = module(folders, packing="best_fit", sequence_length=length, confine_attention=True)
    pieces = []
    for tokens, targets, numbers in epoch_of(data):
        ends = [*(np.flatnonzero(np.diff(numbers)) + 1).tolist(), len(tokens)]
        begins = [0, *ends[:-1]]
        pieces += [(tokens[a:b], targets[a:b]) for a, b in zip(begins, ends, strict=True)]
    expected = [row for shards in SHARDS.values() for row in expected_rows(shards, "best_fit", length)]
    assert as_tuples(pieces) == as_tuples(expected)
    least = -(-sum(len(tokens) for tokens, _ in expected) // length)
    assert len(epoch_of(data)) <= least * 1.2 + 2


@pytest.mark.parametrize("packing", PACKINGS)
def test_documents_are_numbered_where_they_begin(folders, packing):
    for tokens, _, numbers in epoch_of(module(folders, packing=packing, confine_attention=True)):
        begins = np.diff(numbers)
        assert numbers[0] == 0 and set(begins) <= {0, 1}
        if packing != "best_fit":
            assert (np.array(tokens[1:]) == EOS).astype(int).tolist() == begins.tolist()
        else:  # also the rest of a document that was cut
            assert (begins[np.array(tokens[1:]) == EOS] == 1).all()


@settings(deadline=None, max_examples=40)
@given(
    st.sampled_from(PACKINGS),
    st.sampled_from([None, {"a": 2, "b": 1}, {"a": 0.1, "b": 5}]),
    st.integers(0, 500),
    st.integers(1, 5),
    st.integers(1, 4),
    st.integers(1, 3),
    st.integers(0, 3),
)
def test_any_ranks_and_workers_give_the_same_rows(
    folders, packing, weights, cursor, world, batch_size, workers, seed
):
    options = {"packing": packing, "weights": weights, "seed": seed, "confine_attention": True}
    reference = rows_of(module(folders, **options).training_source(), 120, cursor)
    data = module(folders, batch_size=batch_size, **options)
    count = 120 // (world * batch_size)  # batches of each rank
    found = {}
    for rank in range(world):
        places = [{"world": world, "rank": rank, "worker": w, "workers": workers} for w in range(workers)]
        streams = [data.training_source().batches(cursor, **place) for place in places]
        for number in range(count):
            batch = next(streams[number % workers])
            assert batch["cursor"] == cursor + (number + 1) * world * batch_size
            first = batch["cursor"] - world * batch_size - cursor
            for i in range(batch_size):
                found[first + rank + world * i] = {key: batch[key][i] for key in batch if key != "cursor"}
    assert sorted(found) == list(range(count * world * batch_size))
    for number, row in found.items():
        tokens, targets, numbers = reference[number]
        assert row["tokens"].tolist()[: len(tokens)] == tokens
        assert row["targets"].tolist() == targets + [-100] * (16 - len(targets))
        assert row["documents"].tolist()[: len(tokens)] == numbers


@pytest.mark.parametrize("packing", PACKINGS)
def test_weighted_sources_are_repeated_at_their_own_pace(folders, packing):
    data = module(folders, packing=packing, weights={"a": 1, "b": 3})
    rows = rows_of(data.training_source(), 2000)
    for name, share in {"a": 0.25, "b": 0.75}.items():
        own = as_tuples(epoch_of(module(folders[name], packing=packing)))
        drawn = [row for row in rows if own[tuple(row[0]), tuple(row[1])]]
        assert abs(len(drawn) / 2000 - share) < 0.05
        size, last = own.total(), None
        for epoch in range(len(drawn) // size):
            this = drawn[epoch * size : (epoch + 1) * size]
            assert as_tuples(this) == own and this != last
            last = this


@settings(deadline=None)
@given(st.sampled_from(["a", "b"]), st.integers(1, 7), st.integers(1, 5), st.integers(1, 40))
def test_evaluation_gives_every_rank_equally_many_rows_in_order(folders, name, world, batch_size, length):
    options = {"sequence_length": length, "batch_size": batch_size, "confine_attention": True}
    data = module(folders, validation_folders=folders[name], **options)
    source = data.evaluation_sources(test=True)[name]
    ranks = [rows_of(source, 10_000, world=world, rank=rank) for rank in range(world)]
    assert len({len(rows) for rows in ranks}) == 1
    rows = list(chain(*zip(*ranks, strict=True)))
    expected = expected_rows(SHARDS[name], "concatenate", length)
    assert [row[:2] for row in rows[: len(expected)]] == expected
    assert len(rows) - len(expected) < world and not any(row[1] for row in rows[len(expected) :])
    halves = [list(source.batches(0, 1, 0, worker, 2)) for worker in range(2)]
    joined = [batch for pair in zip(*halves, strict=False) for batch in pair]
    for a, b in zip(joined, source.batches(0, 1, 0), strict=False):
        assert all(torch.equal(a[key], b[key]) for key in b)
    assert sum(len(half) for half in halves) == len(list(source.batches(0, 1, 0)))


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_windows_are_parts_of_the_whole(tmp_path, dtype):
    shards = [documents(n, 3, 4) for n in range(6)]
    manifest = Manifest.load(write_folder(tmp_path / "f", shards, dtype=dtype))
    tokens = ShardedTokens(manifest, "train", OpenShards(most=2))
    stream = [*chain(*chain(*shards)), EOS]
    assert tokens.tokens == len(stream) - 1 and tokens.documents == 18
    for start in range(tokens.tokens):
        for stop in range(start + 1, len(stream) + 1):
            window = tokens.window(start, stop)
            assert window.tolist() == stream[start:stop] and window.dtype == dtype


def test_more_shards_than_files_that_may_be_open(tmp_path):
    shards = [documents(n, 2, 5) for n in range(320)]
    folder = write_folder(tmp_path / "f", shards)
    soft, hard = getrlimit(RLIMIT_NOFILE)
    before = open_descriptors()
    setrlimit(RLIMIT_NOFILE, (before + 290, hard))
    try:
        for packing in ["concatenate", "best_fit"]:
            data = module(folder, packing=packing)
            rows = epoch_of(data)
            assert sum(len(row[0]) for row in rows) == sum(len(d) for shard in shards for d in shard)
            assert open_descriptors() <= before + 256
            del data
    finally:
        setrlimit(RLIMIT_NOFILE, (soft, hard))


def test_a_source_goes_to_another_process_without_its_open_files(folders):
    data = module(folders, packing="best_fit")
    expected = epoch_of(data)  # all shards are open now
    copy = dumps(data.training_source())
    assert len(copy) < 20_000
    assert rows_of(loads(copy), len(expected)) == expected


def test_starts_that_make_no_sense_are_an_error(tmp_path):
    folder = write_folder(tmp_path / "f", [documents(1, 5)])
    shard = tmp_path / "f" / "train-00000.tokens"
    content = bytearray(shard.read_bytes())
    content[-16:-8] = (10**6).to_bytes(8, "little")
    shard.write_bytes(content)
    for packing in ["best_fit", "documents"]:
        with pytest.raises(DataError, match=r"train-00000\.tokens: is altered: the starts of its documents"):
            module(folder, packing=packing).training_source()


def test_a_shard_that_vanishes_while_reading_is_named(folders, tmp_path):
    folder = write_folder(tmp_path / "f", [documents(1, 20), documents(2, 20)])
    data = module(folder)
    batches = data.training_source().batches(0, 1, 0)
    (tmp_path / "f" / "train-00001.tokens").unlink()
    with pytest.raises(DataError, match=r"train-00001\.tokens: no such file"):
        list(islice(batches, 40))


def test_a_shard_that_becomes_shorter_while_reading_is_named(tmp_path):
    folder = write_folder(tmp_path / "f", [documents(1, 2000)])
    batches = module(folder).training_source().batches(0, 1, 0)
    next(batches)
    os.truncate(tmp_path / "f" / "train-00000.tokens", 1000)
    with pytest.raises(DataError, match=r"train-00000\.tokens: is truncated: it became shorter while"):
        list(islice(batches, 1000))
