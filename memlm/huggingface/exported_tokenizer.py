"""The tokenizer's files in an exported folder."""

import json
from pathlib import Path

from memlm.tokenizers import EOS_TOKENS, ByteTokenizer, JsonTokenizer, Tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path, context: int) -> str:
    """Write what we and, where the format is theirs, ``AutoTokenizer`` need to make the tokenizer again.

    The bytes become a byte-level BPE without merges, which gives the same ids. SentencePiece models and ranks
    of tiktoken are written as they are, and ``AutoTokenizer`` finds nothing.

    Args:
        tokenizer: Of the model.
        folder: Exists.
        context: Longest sequence of the model, tokens.

    Returns:
        Its name for :func:`memlm.tokenizers.load_tokenizer`: ``bytes``, or a file in the folder.

    Raises:
        DataError: The file cannot be written.
    """
    name = tokenizer.save(folder)
    if isinstance(tokenizer, ByteTokenizer):
        (folder / "tokenizer.json").write_text(_bytes_as_bpe() + "\n", encoding="utf-8")
    eos = end_of_document(tokenizer)
    if eos is not None:
        content = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": eos,
            "eos_token": eos,
            "pad_token": eos,
            "model_max_length": context,
            "padding_side": "left",
            "clean_up_tokenization_spaces": False,
        }
        path = folder / "tokenizer_config.json"
        path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return name


def end_of_document(tokenizer: Tokenizer) -> str | None:
    """Text of the end-of-document token for ``AutoTokenizer``; None if it cannot load this tokenizer."""
    if isinstance(tokenizer, ByteTokenizer):
        return EOS_TOKENS[0]
    return tokenizer.backend.id_to_token(tokenizer.eos_id) if isinstance(tokenizer, JsonTokenizer) else None


def _bytes_as_bpe() -> str:
    """A ``tokenizer.json`` of bytes, each of them the token of its number, and the end of a document.

    Byte-level BPE writes each byte as a printable character: those that are one in Latin-1 as themselves, the
    others as the characters from 256 on.
    """
    from tokenizers import AddedToken, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Backend

    vocabulary, others = {}, 0
    for byte in range(256):
        printable = 33 <= byte <= 126 or (byte >= 161 and byte != 173)
        vocabulary[chr(byte if printable else 256 + others)] = byte
        others += not printable
    backend = Backend(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(EOS_TOKENS[0], special=True)])
    return backend.to_str(pretty=True)
