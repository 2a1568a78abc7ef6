"""The slots of n-grams in plain Python, one token at a time."""

import random


def python_slots(tokens: list[list[int]], documents: list[list[int]] | None, hashes) -> list[list[int]]:
    """Of every token of every row, as :func:`memlm.memory.ngrams.ngram_slots` gives them."""
    result = []
    for row, ids in enumerate(tokens):
        for end in range(len(ids)):
            slots, first = [], 0
            for table, size in enumerate(hashes.sizes):
                mixed = 0
                for back, multipliers in enumerate(hashes.multipliers):
                    at = end - back
                    if at >= 0 and (documents is None or documents[row][at] == documents[row][end]):
                        mixed ^= (ids[at] + 1) * multipliers[table]
                high, low = divmod(mixed, 2**31)
                slots.append(first + (high ^ (low * 0x7FEB352D)) % size)
                first += size
            result.append(slots)
    return result


def random_documents(random_source: random.Random, rows: int, length: int) -> list[list[int]]:
    """Rows of documents of any lengths, of one token too."""
    result = []
    for _ in range(rows):
        document, row = 0, []
        for _ in range(length):
            document += random_source.random() < 0.3
            row.append(document)
        result.append(row)
    return result
