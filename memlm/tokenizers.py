"""Text to token ids and back: raw bytes, or any Hugging Face ``tokenizer.json``.

Every tokenizer knows how many UTF-8 bytes each of its tokens stands for, so that a loss in nats per token
becomes bits per byte, which compares models whose tokenizers differ.
"""

import hashlib
import json
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from memlm.errors import ConfigError, DataError

EOS_TOKENS = ("<|eos|>", "<|endoftext|>", "</s>", "<eos>", "<|end_of_text|>")
"""Names under which a ``tokenizer.json`` may hold its end-of-document token, in the order they are tried."""


class Tokenizer(ABC):
    """Maps text to token ids and back.

    Attributes:
        vocab_size: Number of token ids, i.e. the largest id + 1.
        eos_id: The id that separates documents. No text encodes to it.
        hash: SHA-256 (hex) of the vocabulary and its rules; equal hashes mean equal ids for every text.
    """

    vocab_size: int
    eos_id: int
    hash: str

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Token ids of one text, without any end-of-document token."""

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Token ids of several texts."""
        return [self.encode(text) for text in texts]

    @abstractmethod
    def decode(self, ids: list[int]) -> str:
        """Text of token ids; end-of-document tokens are left out, invalid UTF-8 becomes U+FFFD."""

    @property
    @abstractmethod
    def token_bytes(self) -> Tensor:
        """UTF-8 bytes each token stands for, int64 [vocab_size]; 0 for special tokens."""


class ByteTokenizer(Tokenizer):
    """The 256 bytes of UTF-8 text, and 256 for the end of a document."""

    vocab_size = 257
    eos_id = 256
    hash = hashlib.sha256(b"memlm bytes, eos 256").hexdigest()

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: list[int]) -> str:
        return bytes(i for i in ids if i < 256).decode(errors="replace")

    @cached_property
    def token_bytes(self) -> Tensor:
        return torch.tensor([1] * 256 + [0])


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
        try:
            self.description: dict[str, Any] = json.loads(content)
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
        self.hash = hashlib.sha256(json.dumps(self.description, sort_keys=True).encode()).hexdigest()
        self._lengths = _token_lengths(self.description, vocabulary, eos, self.source)

    def encode(self, text: str) -> list[int]:
        try:
            return self.backend.encode(text, add_special_tokens=False).ids
        except Exception as error:  # a word-level vocabulary without an unknown token
            raise DataError(self.source, f"cannot encode {text[:60]!r} ({error})") from None

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        try:
            return [e.ids for e in self.backend.encode_batch(texts, add_special_tokens=False)]
        except Exception:
            return [self.encode(text) for text in texts]  # names the text at fault

    def decode(self, ids: list[int]) -> str:
        return self.backend.decode([i for i in ids if i != self.eos_id], skip_special_tokens=False)

    @cached_property
    def token_bytes(self) -> Tensor:
        lengths = torch.zeros(self.vocab_size, dtype=torch.long)
        lengths[list(self._lengths)] = torch.tensor(list(self._lengths.values()))
        return lengths


class FileTokenizer(JsonTokenizer):
    """The tokenizer of a ``tokenizer.json`` file.

    Args:
        path: The file.

    Raises:
        DataError: The file is missing, unreadable, or not a tokenizer that can be used here.
    """

    def __init__(self, path: str | Path) -> None:
        try:
            content = Path(path).read_text(encoding="utf-8")
        except IsADirectoryError:
            raise DataError(path, "is a directory; give the path of its tokenizer.json") from None
        except FileNotFoundError:
            raise DataError(
                path, "no such file; a tokenizer is 'bytes' or a tokenizer.json (data.tokenizer)"
            ) from None
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(path, f"cannot be read ({error})") from None
        super().__init__(content, path)


def load_tokenizer(name: str) -> Tokenizer:
    """The tokenizer of that name: ``bytes``, or the path of a ``tokenizer.json``."""
    return ByteTokenizer() if name == "bytes" else FileTokenizer(name)


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


def train_bpe(texts: Iterable[str], vocab_size: int, output: str | Path) -> FileTokenizer:
    """Train a byte-level BPE tokenizer and write its ``tokenizer.json``, complete or not at all.

    Args:
        texts: The documents to train on.
        vocab_size: Number of tokens wanted, in tokens: 256 bytes, ``<|eos|>`` and merges. Fewer come out
            where the texts hold fewer distinct pairs.
        output: The file to write.

    Returns:
        The tokenizer, read back from the file.

    Raises:
        ConfigError: ``vocab_size`` is below 257.
        DataError: ``output`` exists or cannot be written.
    """
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers, trainers

    if vocab_size < 257:
        raise ConfigError("vocab_size", f"is {vocab_size}; 256 bytes and <|eos|> need at least 257")
    output = Path(output)
    if output.exists():
        raise DataError(output, "exists already; choose another output or remove it")
    if not output.parent.is_dir():
        raise DataError(output, f"cannot be written: {output.parent} is not a directory")
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS_TOKENS[0]],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    unfinished = output.with_name(f".{output.name}.{os.getpid()}")
    try:
        unfinished.write_text(backend.to_str(pretty=True), encoding="utf-8")
        unfinished.replace(output)
    except OSError as error:
        raise DataError(output, f"cannot be written ({error})") from None
    finally:
        unfinished.unlink(missing_ok=True)
    return FileTokenizer(output)


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
