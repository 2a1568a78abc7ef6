"""The tokenizer without a vocabulary: bytes."""

import hashlib
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from memlm.tokenizers.base import Tokenizer

if TYPE_CHECKING:
    from torch import Tensor


class ByteTokenizer(Tokenizer):
    """The 256 bytes of UTF-8 text, and 256 for the end of a document."""

    vocab_size = 257
    eos_id = 256
    hash = hashlib.sha256(b"memlm bytes, eos 256").hexdigest()

    def decode(self, ids: list[int]) -> str:
        return bytes(i for i in ids if i < 256).decode(errors="replace")

    @cached_property
    def token_bytes(self) -> "Tensor":
        import torch  # takes a second, which preparing need not wait for

        return torch.tensor([1] * 256 + [0])

    def save(self, folder: Path) -> str:
        return "bytes"

    def _encode(self, text: str) -> list[int]:
        return list(text.encode())

    def _encode_many(self, texts: list[str]) -> list[NDArray[np.int32]]:
        return [np.frombuffer(text.encode(), np.uint8).astype(np.int32) for text in texts]
