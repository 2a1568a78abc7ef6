"""A tokenizer by its name: ``bytes``, or a file of any of the known formats."""

from memlm.errors import DataError
from memlm.tokenizers.base import Tokenizer
from memlm.tokenizers.byte_tokenizer import ByteTokenizer
from memlm.tokenizers.files import read_file
from memlm.tokenizers.huggingface_json import FileTokenizer
from memlm.tokenizers.sentencepiece_model import SentencePieceTokenizer
from memlm.tokenizers.tiktoken_ranks import TiktokenTokenizer, looks_like_ranks

_FIRST_FIELD = b"\x0a"
"""A SentencePiece model is a protocol buffer message that begins with its pieces: field 1, of some length."""


def load_tokenizer(name: str) -> Tokenizer:
    """The tokenizer of that name.

    What a file is shows its content, not its suffix: Llama 2's ``tokenizer.model`` is a SentencePiece model,
    Llama 3's holds tiktoken ranks.

    Args:
        name: ``bytes``, or the path of a ``tokenizer.json``, of a SentencePiece model or of tiktoken ranks.

    Raises:
        DataError: The file is missing, unreadable, none of these, or the package that reads it is missing.
    """
    if name == "bytes":
        return ByteTokenizer()
    content = read_file(name)
    if name.endswith(".json") or content.lstrip()[:1] == b"{":
        return FileTokenizer(name)
    if looks_like_ranks(content):
        return TiktokenTokenizer(content, name)
    if content.startswith(_FIRST_FIELD):
        return SentencePieceTokenizer(content, name)
    raise DataError(
        name,
        f"is no tokenizer ({f'begins with {content[:20]!r}' if content else 'is empty'}); expected a "
        "tokenizer.json of Hugging Face, a SentencePiece model or tiktoken ranks",
    )
