"""What every tokenizer can do, and how long texts and many texts are encoded in bounded memory."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from numpy.typing import NDArray

from memlm.errors import DataError
from memlm.tokenizers.long_texts import CutRule, cut

if TYPE_CHECKING:
    from torch import Tensor

EOS_TOKENS = ("<|eos|>", "<|endoftext|>", "</s>", "<eos>", "<|end_of_text|>")
"""Names that an end-of-document token may have in a tokenizer's file, in the order they are tried."""

CHARACTERS_AT_ONCE = 1 << 22
"""Text encoded together: enough to keep many threads busy, little enough to bound memory."""


class Tokenizer(ABC):
    """Maps text to token ids and back.

    A text longer than ``piece_length`` is encoded in pieces, cut where that does not change the ids. For
    byte-level BPE that is so after a single newline and before a single space, if a letter or digit follows,
    since the patterns in use (GPT-2's, Llama 3's and their like) never merge across those places. Tokenizers
    that begin each text with a space of their own (SentencePiece) are cut between words, and the space that
    is cut away is the one they add. What holds is found by trying it on two letters; the ids beside a cut may
    differ for a vocabulary with tokens that reach across words. A text without any such place in
    ``longest_piece`` characters (white space alone, or a script without spaces) is cut anywhere, which may
    change the ids beside that cut, too.

    Attributes:
        vocab_size: Number of token ids, i.e. the largest id + 1.
        eos_id: The id that separates documents. No text encodes to it.
        hash: SHA-256 (hex) of the vocabulary and its rules; equal hashes mean equal ids for every text.
        piece_length: Characters above which a text is cut where that does no harm. Longer pieces are slower
            and need more memory.
        longest_piece: Characters above which a text is cut anywhere.
    """

    vocab_size: int
    eos_id: int
    hash: str
    piece_length: ClassVar[int] = 1 << 16
    longest_piece: ClassVar[int] = 1 << 20

    def encode(self, text: str) -> list[int]:
        """Token ids of one text, without any end-of-document token.

        Raises:
            DataError: The text cannot be encoded.
        """
        if len(text) <= self.piece_length:
            return self._encode(text)
        return [i for piece in self._pieces(text) for i in self._encode(piece)]

    def encode_batch(self, texts: list[str]) -> list[NDArray[np.int32]]:
        """Token ids of several texts, int32 [tokens of the text] each: those of `encode`, but faster.

        Raises:
            DataError: A text cannot be encoded.
        """
        ids: list[list[NDArray[np.int32]]] = [[] for _ in texts]
        group: list[str] = []
        owners: list[int] = []
        room = CHARACTERS_AT_ONCE
        for owner, text in enumerate(texts):
            for piece in self._pieces(text):
                if group and len(piece) > room:
                    self._encode_group(group, owners, ids)
                    group, owners, room = [], [], CHARACTERS_AT_ONCE
                group.append(piece)
                owners.append(owner)
                room -= len(piece)
        self._encode_group(group, owners, ids)
        return [parts[0] if len(parts) == 1 else np.concatenate(parts) for parts in ids]

    def _encode_group(self, group: list[str], owners: list[int], ids: list[list[NDArray[np.int32]]]) -> None:
        for owner, part in zip(owners, self._encode_many(group), strict=True):
            ids[owner].append(part)

    @abstractmethod
    def decode(self, ids: list[int]) -> str:
        """Text of token ids; end-of-document tokens are left out, invalid UTF-8 becomes U+FFFD."""

    @property
    @abstractmethod
    def token_bytes(self) -> "Tensor":
        """UTF-8 bytes each token stands for, int64 [vocab_size]; 0 for special tokens.

        Those of a document's tokens sum to the bytes of its text. Tokenizers that begin each text with a
        space of their own count that space too: one byte more for each document (and for each place where a
        long text had to be cut inside a word). Where such a tokenizer changes the text first (composes
        characters, folds case), the bytes are those of the changed text.
        """

    @abstractmethod
    def save(self, folder: Path) -> str:
        """Write what `load_tokenizer` needs to make this tokenizer again, whole or not at all.

        Args:
            folder: An existing folder. A file of the same content that is there already is left as it is.

        Returns:
            The tokenizer's name: ``bytes``, which needs no file, or the file's name in the folder.

        Raises:
            DataError: The file cannot be written, or one of that name holds something else.
        """

    @abstractmethod
    def _encode(self, text: str) -> list[int]:
        """Token ids of a text that is not too long."""

    @abstractmethod
    def _encode_many(self, texts: list[str]) -> list[NDArray[np.int32]]:
        """Token ids of texts none of which is too long, on several threads where that is possible."""

    def _pieces(self, text: str) -> Iterator[str]:
        if len(text) <= self.piece_length:
            return iter((text,))
        return cut(text, self.piece_length, self.longest_piece, self._cut_rule)

    @cached_property
    def _cut_rule(self) -> CutRule:
        """Where this tokenizer's texts can be cut, found by trying."""
        try:
            a, b, a_b = self._encode("a"), self._encode("b"), self._encode("a b")
            keep, drop = a_b == a + self._encode(" b"), a_b == a + b
            after_newline = self._encode("a\nb") == self._encode("a\n") + b
            return CutRule(after_newline, at_space=keep or drop, drop_space=not keep)
        except DataError:  # a vocabulary of words, which are whole between any spaces
            return CutRule(after_newline=False, at_space=True)
