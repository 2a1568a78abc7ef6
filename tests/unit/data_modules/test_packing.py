import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from data_modules.hashed_random import draw, hashed, permutation
from data_modules.packing import batch_of_rows, concatenate, one_document_a_row

EOS = 0
documents_of = st.lists(st.lists(st.integers(1, 9), max_size=12), min_size=1, max_size=8)


def positioned(documents):
    return [
        ({"record": i, "token": 0}, np.array([EOS, *document], np.int32))
        for i, document in enumerate(documents)
    ]


@given(documents_of, st.integers(1, 9))
def test_concatenate_makes_every_token_a_target_once(documents, length):
    stream = [token for document in documents for token in [EOS, *document]]
    rows = list(concatenate(positioned(documents), length))
    targets = [int(token) for row, _ in rows for token in row[1:]]
    assert targets == stream[1:]
    assert all(len(row) == length + 1 for row, _ in rows[:-1])
    for i, (row, _) in enumerate(rows):
        assert row.tolist() == stream[i * length : (i + 1) * length + 1]


@given(documents_of, st.integers(1, 9))
def test_concatenate_positions_continue_the_stream(documents, length):
    rows = list(concatenate(positioned(documents), length))
    for i, (_, after) in enumerate(rows[:-1]):
        (_, tokens), *later = positioned(documents)[after["record"] :]
        rest = [(after, tokens[after["token"] :]), *later]
        again = list(concatenate(rest, length))
        assert [row.tolist() for row, _ in again] == [row.tolist() for row, _ in rows[i + 1 :]]
        assert [position for _, position in again][:-1] == [position for _, position in rows[i + 1 : -1]]


@given(documents_of, st.integers(1, 9))
def test_one_document_a_row_loses_and_mixes_nothing(documents, length):
    rows = list(one_document_a_row(positioned(documents), length, EOS))
    at = 0
    for number, document in enumerate(documents):
        whole, got = [EOS, *document, EOS], []
        while len(got) < len(whole) - 1:
            row, after = rows[at]
            assert row[0] == whole[len(got)] and len(row) <= length + 1
            got += row[1:].tolist()
            at += 1
            finished = len(got) == len(whole) - 1
            assert after == {"record": number + finished, "token": 0 if finished else len(got)}
        assert got == whole[1:]
    assert at == len(rows)


def test_batch_of_rows_pads_and_numbers_documents():
    rows = [np.array(row, np.int32) for row in ([0, 5, 6, 0, 7], [3, 0, 4], [])]
    batch = batch_of_rows(rows, 4, EOS, confine_attention=True)
    assert batch["tokens"].tolist() == [[0, 5, 6, 0], [3, 0, 4, 0], [0, 0, 0, 0]]
    assert batch["targets"].tolist() == [[5, 6, 0, 7], [0, 4, -100, -100], [-100] * 4]
    assert batch["documents"].tolist() == [[0, 0, 0, 1], [0, 1, 1, 2], [0, 1, 2, 3]]
    assert all(value.dtype == torch.int64 and value.is_contiguous() for value in batch.values())
    assert batch_of_rows(rows, 4, EOS, confine_attention=False).keys() == {"tokens", "targets"}


def test_hashed_draws_are_uniform_and_pinned():
    assert hashed(1, 2, 3).tolist() == [7702586659592502839]
    assert hashed(-1) != hashed(1)  # negative seeds are seeds
    counts = np.bincount(draw(10, 0, np.arange(100_000)), minlength=10)
    assert (((counts - 10_000) ** 2) / 10_000).sum() < 27.9  # chi-square, 9 degrees of freedom, 0.1 %
    pairs = draw(4, 0, np.arange(300)[:, None], np.arange(300)).reshape(-1, 2)
    counts = np.bincount(pairs[:, 0] * 4 + pairs[:, 1], minlength=16)
    assert (((counts - 45_000 / 16) ** 2) / (45_000 / 16)).sum() < 37.7  # 15 degrees of freedom
    assert (
        len({*hashed(0, 1).tolist(), *hashed(1, 0).tolist(), *hashed(1).tolist(), *hashed(0).tolist()}) == 4
    )


@pytest.mark.parametrize("count", [1, 2, 1000])
def test_permutation(count):
    order = permutation(count, 3, 4)
    assert sorted(order) == list(range(count))
    if count == 1000:
        assert (order == permutation(count, 3, 4)).all() and (order != permutation(count, 3, 5)).mean() > 0.98
