"""Tokenizers in Hugging Face's JSON format, by the package ``tokenizers``."""

import hashlib
import json
import re
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from memlm.errors import DataError
from memlm.tokenizers.base import EOS_TOKENS, Tokenizer
from memlm.tokenizers.files import read_file, save_file

if TYPE_CHECKING:
    from torch import Tensor


class JsonTokenizer(Tokenizer):
    """A tokenizer in Hugging Face's JSON format.

    The text of an end-of-document token inside a document is encoded as ordinary text, so that no document
    can end early by what it says.

    Args:
        content: The JSON text.
        source: Where it came from, for error messages.

    Raises:
        DataError: The JSON is broken, has no end-of-document token, or has tokens whose bytes are unknown.
    """

    def __init__(self, content: str, source: str | Path) -> None:
        from tokenizers import Tokenizer as Backend

        self.source = str(source)
        self._content = content
        try:
            description: dict[str, Any] = json.loads(content)
            self.backend = Backend.from_str(content)
        except Exception as error:  # the tokenizers package raises bare Exception
            raise DataError(source, f"is not a Hugging Face tokenizer.json ({error})") from None
        self.backend.no_truncation()
        self.backend.no_padding()
        self.backend.encode_special_tokens = True
        vocabulary = self.backend.get_vocab(with_added_tokens=True)
        eos = next((name for name in EOS_TOKENS if name in vocabulary), None)
        if eos is None:
            raise DataError(source, f"has no end-of-document token; expected one of {', '.join(EOS_TOKENS)}")
        self.eos_id = vocabulary[eos]
        self.vocab_size = max(vocabulary.values()) + 1
        self.hash = hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()
        self._lengths = _token_lengths(description, vocabulary, eos, self.source)
        # A Unigram vocabulary finds the name of its end-of-document token in ordinary text, too.
        self._spelled_eos = eos if self._can_spell(eos) else None

    def __reduce__(self) -> tuple[Any, ...]:
        # The backend's own pickling forgets `encode_special_tokens`.
        return JsonTokenizer, (self._content, self.source)

    def decode(self, ids: list[int]) -> str:
        return self.backend.decode([i for i in ids if i != self.eos_id], skip_special_tokens=False)

    @cached_property
    def token_bytes(self) -> "Tensor":
        import torch  # takes a second, which preparing need not wait for

        lengths = torch.zeros(self.vocab_size, dtype=torch.long)
        lengths[list(self._lengths)] = torch.tensor(list(self._lengths.values()))
        return lengths

    def save(self, folder: Path) -> str:
        return save_file(folder, "tokenizer.json", self._content.encode())

    def _encode(self, text: str) -> list[int]:
        try:
            parts = self._parts(text)
            # Not encode_batch_fast: processes forked after its first use have one thread for it.
            return [i for part in parts for i in self.backend.encode(part, add_special_tokens=False).ids]
        except Exception as error:  # a word-level vocabulary without an unknown token
            raise DataError(self.source, f"cannot encode {text[:60]!r} ({error})") from None

    def _encode_many(self, texts: list[str]) -> list[NDArray[np.int32]]:
        if self._spelled_eos and any(self._spelled_eos in text for text in texts):
            return [np.array(self._encode(text), np.int32) for text in texts]
        try:
            encodings = self.backend.encode_batch_fast(texts, add_special_tokens=False)
        except Exception:
            return [np.array(self._encode(text), np.int32) for text in texts]  # names the text at fault
        return [np.fromiter(ids, np.int32, len(ids)) for ids in (encoding.ids for encoding in encodings)]

    def _can_spell(self, eos: str) -> bool:
        try:
            return self.eos_id in self.backend.encode(eos, add_special_tokens=False).ids
        except Exception:  # not even by its characters
            return False

    def _parts(self, text: str) -> list[str]:
        """The text, cut inside every name of the end-of-document token if the vocabulary would find it."""
        if self._spelled_eos is None or self._spelled_eos not in text:
            return [text]
        half = len(self._spelled_eos) // 2
        head, tail = self._spelled_eos[:half], self._spelled_eos[half:]
        first, *others = text.split(self._spelled_eos)
        return [first + head, *(tail + part + head for part in others[:-1]), tail + others[-1]]


class FileTokenizer(JsonTokenizer):
    """The tokenizer of a ``tokenizer.json`` file.

    Args:
        path: The file.

    Raises:
        DataError: The file is missing, unreadable, or not a tokenizer that can be used here.
    """

    def __init__(self, path: str | Path) -> None:
        try:
            content = read_file(path).decode()
        except UnicodeDecodeError as error:
            raise DataError(path, f"cannot be read ({error})") from None
        super().__init__(content, path)


def word_tokenizer(words: list[str], source: str) -> JsonTokenizer:
    """A tokenizer of whole words separated by white space: word i has id i, the end of a document comes last.

    Args:
        words: Distinct words without white space.
        source: What made the words, for error messages.
    """
    from tokenizers import AddedToken, models, pre_tokenizers
    from tokenizers import Tokenizer as Backend

    # An unknown token outside the vocabulary makes an unknown word an error instead of a silent loss.
    backend = Backend(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=""))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens([AddedToken(EOS_TOKENS[0], special=True)])
    return JsonTokenizer(backend.to_str(), source)


def _token_lengths(
    description: dict[str, Any], vocabulary: dict[str, int], eos: str, source: str
) -> dict[int, int]:
    """UTF-8 bytes by token id, for the kinds of vocabulary whose tokens name their bytes."""
    kinds = _component_types(description.get("pre_tokenizer")) | _component_types(description.get("decoder"))
    model = description["model"]
    marks_spaces = "Metaspace" in kinds or "▁" in json.dumps(
        [description.get("normalizer"), description.get("decoder")], ensure_ascii=False
    )

    def length(token: str) -> int:
        if "ByteLevel" in kinds:
            return len(token)  # every character stands for one byte
        if model.get("byte_fallback") and re.fullmatch(r"<0x[0-9A-F]{2}>", token):
            return 1
        if marks_spaces:
            return len(token.replace("▁", " ").encode())
        return len(token.encode()) + 1  # a word and the space that separates it from the next

    if "ByteLevel" not in kinds and not marks_spaces and model.get("type") != "WordLevel":
        raise DataError(
            source,
            f"is a {model.get('type')} tokenizer that does not say which bytes its tokens stand for, so bits "
            "per byte would be wrong; expected byte-level BPE, a SentencePiece vocabulary or WordLevel",
        )
    lengths = {i: length(token) for token, i in vocabulary.items()}
    for added in description.get("added_tokens") or []:
        lengths[added["id"]] = 0 if added["special"] else len(added["content"].encode())
    lengths[vocabulary[eos]] = 0
    return lengths


def _component_types(component: dict[str, Any] | None) -> set[str]:
    """Types of a pre-tokenizer or decoder and of the members of a sequence of them."""
    if not component:
        return set()
    members = component.get("pretokenizers") or component.get("decoders") or []
    return {component["type"]}.union(*(_component_types(member) for member in members))
