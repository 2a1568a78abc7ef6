"""SentencePiece models, by the optional package ``sentencepiece``."""

import hashlib
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from memlm.errors import DataError
from memlm.tokenizers.base import EOS_TOKENS, Tokenizer
from memlm.tokenizers.files import save_file
from memlm.tokenizers.threads import batch_threads

if TYPE_CHECKING:
    from torch import Tensor


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model (BPE, Unigram, ...).

    Control pieces are never found in a text: what spells one is encoded as ordinary text. Most models change
    the text before they cut it (compatibility characters, runs of spaces), so that decoding gives the changed
    text. Characters that a model without byte pieces does not know become its unknown piece, which counts no
    bytes. A Unigram model sums its scores in single precision: where two ways to cut a word are equally good,
    a long text encoded in pieces may get the other one.

    Args:
        content: The serialized model.
        source: Where it came from, for error messages.

    Raises:
        DataError: It is no such model, it has no end-of-document piece, or the package is missing.
    """

    def __init__(self, content: bytes, source: str | Path) -> None:
        try:
            from sentencepiece import SentencePieceProcessor
        except ImportError:
            raise DataError(
                source,
                "is a SentencePiece model, which needs the package sentencepiece: "
                "pip install 'memlm[tokenizers]'",
            ) from None
        self.source = str(source)
        self._content = content
        try:
            self.processor: Any = SentencePieceProcessor(model_proto=content)
        except RuntimeError as error:
            raise DataError(source, f"is not a SentencePiece model ({error})") from None
        self.vocab_size = self.processor.vocab_size()
        self.eos_id = self._find_eos()
        self.hash = hashlib.sha256(b"memlm SentencePiece\0" + content).hexdigest()

    def __reduce__(self) -> tuple[Any, ...]:
        return SentencePieceTokenizer, (self._content, self.source)

    def decode(self, ids: list[int]) -> str:
        return self.processor.decode([int(i) for i in ids if i != self.eos_id and i < self.vocab_size])

    @cached_property
    def token_bytes(self) -> "Tensor":
        import torch  # takes a second, which preparing need not wait for

        return torch.tensor([self._length(i) for i in range(self.vocab_size)])

    def save(self, folder: Path) -> str:
        return save_file(folder, "tokenizer.model", self._content)

    def _encode(self, text: str) -> list[int]:
        try:
            return self.processor.encode(text, out_type=int)
        except RuntimeError as error:
            raise DataError(self.source, f"cannot encode {text[:60]!r} ({error})") from None

    def _encode_many(self, texts: list[str]) -> list[NDArray[np.int32]]:
        try:
            ids = self.processor.encode(texts, out_type=int, num_threads=batch_threads())
        except RuntimeError:
            ids = map(self._encode, texts)  # names the text at fault
        return [np.array(i, np.int32) for i in ids]

    def _find_eos(self) -> int:
        pieces = self.processor
        named = (pieces.piece_to_id(name) for name in EOS_TOKENS)
        for candidate in (pieces.eos_id(), *named):
            # Any other kind of piece could be spelled by a text, and would end it.
            if candidate >= 0 and pieces.is_control(candidate):
                return candidate
        raise DataError(
            self.source,
            "has no end-of-document piece; expected an eos_id or a control piece named one of "
            + ", ".join(EOS_TOKENS),
        )

    def _length(self, i: int) -> int:
        pieces = self.processor
        if pieces.is_control(i) or pieces.is_unknown(i) or pieces.is_unused(i):
            return 0
        return 1 if pieces.is_byte(i) else len(pieces.id_to_piece(i).replace("▁", " ").encode())
