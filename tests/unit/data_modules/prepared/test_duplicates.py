import hashlib
import random

import numpy as np
import pytest

from data_modules.prepared import duplicates
from data_modules.prepared.duplicates import are_found, duplicates_of, find_duplicates, save_hashes


def digest(text):
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


@pytest.mark.parametrize("bucket", [1, 7, 1 << 20])
@pytest.mark.parametrize("seed", range(4))
def test_all_but_the_first_copy_are_marked(tmp_path, monkeypatch, bucket, seed):
    monkeypatch.setattr(duplicates, "BUCKET_DOCUMENTS", bucket)
    draw = random.Random(seed)
    units = [[str(draw.randrange(60)) for _ in range(draw.randrange(50))] for _ in range(9)]
    for number, texts in enumerate(units):
        save_hashes(tmp_path, number, b"".join(map(digest, texts)))
    told = []
    assert not are_found(tmp_path)
    find_duplicates(tmp_path, len(units), told.append)
    assert are_found(tmp_path)
    assert sum(told) == sum(map(len, units))
    seen: set[str] = set()
    for number, texts in enumerate(units):
        marks = duplicates_of(tmp_path, number).tolist()
        assert len(marks) == len(texts)
        for text, is_copy in zip(texts, marks, strict=True):
            assert is_copy == (text in seen)
            seen.add(text)


def test_hashes_that_differ_in_their_last_or_first_bytes_are_no_copies(tmp_path):
    ends = [bytes(15) + bytes([i]) for i in range(3)] + [bytes([i]) + bytes(15) for i in range(3)]
    save_hashes(tmp_path, 0, b"".join(ends))
    find_duplicates(tmp_path, 1, lambda count: None)
    # The fourth is sixteen zeros like the first.
    assert np.flatnonzero(duplicates_of(tmp_path, 0)).tolist() == [3]


def test_hashes_that_differ_in_one_bit_are_no_copies(tmp_path):
    """All 128 bits count, the lowest of each half too."""
    digest = bytes(np.random.default_rng(0).integers(128, 256, 16, np.uint8))
    others = [
        bytes(byte ^ (1 << bit if i == place else 0) for i, byte in enumerate(digest))
        for place in range(16)
        for bit in (0, 7)
    ]
    save_hashes(tmp_path, 0, b"".join([digest, *others, b"\xff" * 16]))
    save_hashes(tmp_path, 1, b"".join([others[3], digest]))
    find_duplicates(tmp_path, 2, lambda count: None)
    assert not duplicates_of(tmp_path, 0).any()
    assert duplicates_of(tmp_path, 1).all()


def test_no_documents_at_all(tmp_path):
    save_hashes(tmp_path, 0, b"")
    find_duplicates(tmp_path, 1, lambda count: None)
    assert len(duplicates_of(tmp_path, 0)) == 0
