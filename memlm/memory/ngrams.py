"""Which slots the n-grams of a text have: hashes of token ids, known before any layer has run."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from memlm.kernels.interface import slot_dtype

# Token ids and multipliers have at most 31 bits, so that no product leaves the 63 of a positive int64: the
# same slots on every device, and under a compiler that may take an overflow for impossible.
_BITS = 31
_LOW = (1 << _BITS) - 1
_MIXER = 0x7FEB352D


@dataclass(frozen=True)
class NgramHashes:
    """The hash functions of a pool; from :func:`ngram_hashes`.

    A table for each order and head, one after the other: those of the first order first.
    """

    sizes: tuple[int, ...]
    """``[G]`` rows of each table, distinct primes."""
    multipliers: tuple[tuple[int, ...], ...]
    """``[largest order][G]`` by how far back the token is; odd, or zero for a token that is no part of the
    n-gram."""

    @property
    def slots(self) -> int:
        """Rows of all tables."""
        return sum(self.sizes)


def ngram_hashes(orders: Sequence[int], heads: int, slots: int, seed: int, name: str) -> NgramHashes:
    """Draw the hash functions of a pool.

    Args:
        orders: Lengths of the n-grams, tokens.
        heads: Hash functions for each order.
        slots: Rows that the tables have together, at least; divided evenly, each is the next free prime.
        seed: Of the multipliers.
        name: Of the pool; pools of different names hash differently.
    """
    tables = [(order, head) for order in orders for head in range(heads)]
    primes = _primes_from(-(-slots // len(tables)))
    return NgramHashes(
        sizes=tuple(next(primes) for _ in tables),
        multipliers=tuple(
            tuple(
                _multiplier(f"{seed}/{name}/{order}/{head}/{back}") if back < order else 0
                for order, head in tables
            )
            for back in range(max(orders))
        ),
    )


def ngram_slots(tokens: Tensor, documents: Tensor | None, hashes: NgramHashes) -> Tensor:
    """The slots of the n-grams that end at each token (Engram, arXiv 2601.07372, section 2.2, equation 1).

    A multiplicative-xor hash: with ``x`` the token ids from 1 on, and 0 for what lies before the row or in
    another document, ``h[g] = xor over k < order of x[t-k] * m[g, k]``, then one round that mixes the halves
    of ``h``, and the remainder by the prime size of table ``g``. The round is ours: without it the n-grams
    that differ in one token alone are spread less evenly than chance would.

    Args:
        tokens: ``[B, T]`` integer, from 0 to ``2^31 - 2``; -1 stands for what lies before the row.
        documents: ``[B, T]`` document indices, or None where a row is one document.
        hashes: Of the pool.

    Returns:
        ``[N, G]`` int32 (int64 above 2^31 slots): slots of the pool, a table's all in its own part of it.
    """
    multipliers, sizes, offsets = _constants(hashes, tokens.device)
    ids = tokens.long() + 1
    mixed = ids.unsqueeze(-1) * multipliers[0]
    for back in range(1, len(hashes.multipliers)):
        earlier = shifted(ids, back)
        if documents is not None:
            earlier = earlier.masked_fill(documents != shifted(documents, back), 0)
        mixed = mixed ^ (earlier.unsqueeze(-1) * multipliers[back])
    mixed = (mixed >> _BITS) ^ ((mixed & _LOW) * _MIXER)
    slots = mixed % sizes + offsets
    return slots.flatten(0, 1).to(slot_dtype(hashes.slots))


def shifted(x: Tensor, back: int) -> Tensor:
    """``x`` ``[B, T]`` as it was so many positions ago; 0 before the row's start."""
    return F.pad(x, (back, 0))[:, : x.shape[1]]


@torch.compiler.assume_constant_result
def _constants(hashes: NgramHashes, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Multipliers ``[largest order, G]``, sizes and offsets ``[G]`` of the tables; part of a compiled graph.

    They are no buffers of a layer, which a moving average of the model would average.
    """
    return _on_device(hashes, device)


@lru_cache(maxsize=64)  # making them waits for the device
def _on_device(hashes: NgramHashes, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    sizes = torch.tensor(hashes.sizes, device=device)
    return torch.tensor(hashes.multipliers, device=device), sizes, sizes.cumsum(0) - sizes


def _multiplier(label: str) -> int:
    """An odd number of exactly 31 bits, the same for a label on every machine and in every version."""
    drawn = int.from_bytes(hashlib.sha256(label.encode()).digest()[:4], "little")
    return drawn & _LOW | 1 << (_BITS - 1) | 1


def _primes_from(least: int) -> Iterator[int]:
    """The primes that are at least so large, ascending."""
    number = max(least, 2)
    while True:
        if _is_prime(number):
            yield number
        number += 1


def _is_prime(number: int) -> bool:
    """Miller-Rabin with the first twelve primes as bases: exact below 3.18e23 (Sorenson and Webster 2015)."""
    bases = (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37)
    if number < 2 or any(number % base == 0 for base in bases):
        return number in bases
    odd, twos = number - 1, 0
    while odd % 2 == 0:
        odd, twos = odd // 2, twos + 1
    for base in bases:
        power = pow(base, odd, number)
        if power in (1, number - 1):
            continue
        for _ in range(twos - 1):
            power = power * power % number
            if power == number - 1:
                break
        else:
            return False
    return True
