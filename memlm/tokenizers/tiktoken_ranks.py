"""Tiktoken's files of ranks, by the optional package ``tiktoken``."""

import base64
import binascii
import hashlib
import re
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray

from memlm.errors import DataError
from memlm.tokenizers.base import Tokenizer
from memlm.tokenizers.files import save_file
from memlm.tokenizers.threads import batch_threads

if TYPE_CHECKING:
    from torch import Tensor


class Family(NamedTuple):
    """What a file of ranks does not say.

    Attributes:
        name: Of the tokenizer.
        pattern: The regular expression whose matches are tokenized one by one.
        special: Ids of the special tokens.
        eos: The special token that ends a document.
        size: Ids in all, where the last of them have no lasting names; 0 where the last one has.
    """

    name: str
    pattern: str
    special: dict[str, int]
    eos: str = "<|endoftext|>"
    size: int = 0


_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_END = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = _CONTRACTION + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|" + _END
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_O200K = "|".join(
    [
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTION}?",
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTION}?",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
        _END,
    ]
)
FAMILIES = {
    50256: Family("GPT-2 (r50k)", _GPT2, {"<|endoftext|>": 50256}),
    50280: Family("p50k", _GPT2, {"<|endoftext|>": 50256}),
    100256: Family(
        "cl100k",
        _LLAMA3,
        {
            "<|endoftext|>": 100257,
            "<|fim_prefix|>": 100258,
            "<|fim_middle|>": 100259,
            "<|fim_suffix|>": 100260,
        }
        | {"<|endofprompt|>": 100276},
    ),
    128000: Family(
        "Llama 3",
        _LLAMA3,
        {"<|begin_of_text|>": 128000, "<|end_of_text|>": 128001, "<|start_header_id|>": 128006}
        | {"<|end_header_id|>": 128007, "<|eot_id|>": 128009},
        eos="<|end_of_text|>",
        size=128256,
    ),
    151643: Family(
        "Qwen",
        _LLAMA3.replace("{1,3}", ""),
        {"<|endoftext|>": 151643, "<|im_start|>": 151644, "<|im_end|>": 151645},
    ),
    199998: Family("o200k", _O200K, {"<|endoftext|>": 199999, "<|endofprompt|>": 200018}),
}
"""What the files do not say, by their number of ranks."""

_LINE = re.compile(rb"([A-Za-z0-9+/]+={0,2}) (\d+)")


def looks_like_ranks(content: bytes) -> bool:
    """Whether the first line of a file is a token in base64 and its rank."""
    return _LINE.fullmatch(content[:4096].split(b"\n", 1)[0].rstrip(b"\r")) is not None


class TiktokenTokenizer(Tokenizer):
    """A byte-level BPE in tiktoken's format: a line for each token, in base64, with its rank.

    Such a file holds neither the pattern that cuts the text first nor the special tokens. They are those of
    the known tokenizer with that number of ranks, `FAMILIES`. Special tokens inside a text are encoded as
    ordinary text. The text is taken as it is, also for Qwen, whose own code composes characters first.

    Args:
        content: The file's content.
        source: Where it came from, for error messages.

    Raises:
        DataError: A line is malformed, no known tokenizer has as many ranks, or the package is missing.
    """

    # A million spaces overflow the stack of the regular expressions of tiktoken 0.14; a quarter never does.
    longest_piece: ClassVar[int] = 1 << 18

    def __init__(self, content: bytes, source: str | Path) -> None:
        try:
            from tiktoken import Encoding
        except ImportError:
            raise DataError(
                source,
                "holds tiktoken ranks, which need the package tiktoken: pip install 'memlm[tokenizers]'",
            ) from None
        self.source = str(source)
        self._content = content
        self._ranks = _parse(content, self.source)
        family = FAMILIES.get(len(self._ranks))
        if family is None:
            known = ", ".join(f"{ranks:,} ({family.name})" for ranks, family in sorted(FAMILIES.items()))
            raise DataError(
                source,
                f"holds {len(self._ranks):,} tiktoken ranks, like no known tokenizer, and the file does not "
                f"hold its pattern and special tokens; expected {known}; use its tokenizer.json instead",
            )
        self._special = family.special
        if clash := sorted(set(self._ranks.values()) & set(family.special.values())):
            raise DataError(
                source, f"gives rank {clash[0]} to a token, which is a special token of {family.name}"
            )
        self.eos_id = family.special[family.eos]
        self.vocab_size = max(family.size, 1 + max(*self._ranks.values(), *family.special.values()))
        rules = repr((family.pattern, sorted(family.special.items()), family.eos)).encode()
        self.hash = hashlib.sha256(b"memlm tiktoken\0" + rules + b"\0" + content).hexdigest()
        self.encoding = Encoding(
            family.name, pat_str=family.pattern, mergeable_ranks=self._ranks, special_tokens=family.special
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return TiktokenTokenizer, (self._content, self.source)

    def decode(self, ids: list[int]) -> str:
        known = (self._texts.get(i, b"") for i in ids if i != self.eos_id)
        return b"".join(known).decode(errors="replace")

    @cached_property
    def token_bytes(self) -> "Tensor":
        import torch  # takes a second, which preparing need not wait for

        lengths = torch.zeros(self.vocab_size, dtype=torch.long)
        lengths[list(self._ranks.values())] = torch.tensor([len(token) for token in self._ranks])
        return lengths

    def save(self, folder: Path) -> str:
        return save_file(folder, "tokenizer.tiktoken", self._content)

    def _encode(self, text: str) -> list[int]:
        return self._encode_one(text).tolist()

    def _encode_many(self, texts: list[str]) -> list[NDArray[np.int32]]:
        threads = min(batch_threads(), len(texts))
        if threads <= 1:
            return [self._encode_one(text) for text in texts]
        with ThreadPoolExecutor(threads) as pool:
            return list(pool.map(self._encode_one, texts))

    def _encode_one(self, text: str) -> NDArray[np.int32]:
        return self.encoding.encode_to_numpy(text, disallowed_special=()).astype(np.int32)

    @cached_property
    def _texts(self) -> dict[int, bytes]:
        texts = {i: name.encode() for name, i in self._special.items()}
        return texts | {rank: token for token, rank in self._ranks.items()}


def _parse(content: bytes, source: str) -> dict[bytes, int]:
    ranks: dict[bytes, int] = {}
    taken: set[int] = set()
    for number, line in enumerate(content.split(b"\n"), 1):
        line = line.rstrip(b"\r")
        if not line:
            continue
        token, rank = _parse_line(line)
        if not token:
            raise DataError(source, f"holds {line[:60]!r}; expected a token in base64 and its rank", number)
        if token in ranks or rank in taken:
            raise DataError(source, f"repeats the token {token[:60]!r} or its rank {rank}", number)
        ranks[token] = rank
        taken.add(rank)
    if missing := [byte for byte in range(256) if bytes([byte]) not in ranks]:
        raise DataError(source, f"has no rank for the byte {missing[0]}; expected one for each of 256 bytes")
    return ranks


def _parse_line(line: bytes) -> tuple[bytes, int]:
    """The token and its rank; no token where the line is malformed."""
    match = _LINE.fullmatch(line)
    try:
        return (base64.b64decode(match[1], validate=True), int(match[2])) if match else (b"", -1)
    except binascii.Error:
        return b"", -1
