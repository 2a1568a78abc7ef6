"""Training a byte-level BPE tokenizer."""

from collections.abc import Iterable
from pathlib import Path

from memlm.errors import ConfigError, DataError
from memlm.tokenizers.base import EOS_TOKENS, Tokenizer
from memlm.tokenizers.files import write_whole
from memlm.tokenizers.huggingface_json import FileTokenizer
from memlm.tokenizers.long_texts import CutRule, cut


def _check(vocab_size: int, output: Path) -> None:
    """Refuse what cannot be trained, before any text is read.

    Raises:
        ConfigError: ``vocab_size`` is below 257.
        DataError: ``output`` exists or its directory does not.
    """
    if vocab_size < 257:
        raise ConfigError("vocab_size", f"is {vocab_size}; 256 bytes and <|eos|> need at least 257")
    if output.exists():
        raise DataError(output, "exists already; choose another output or remove it")
    if not output.parent.is_dir():
        raise DataError(output, f"cannot be written: {output.parent} is not a directory")


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

    output = Path(output)
    _check(vocab_size, output)
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS_TOKENS[0]],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    # The package needs some hundred bytes for each byte of a text that it counts; cut here, the counts stay.
    lengths, rule = (Tokenizer.piece_length, Tokenizer.longest_piece), CutRule(True, at_space=True)
    pieces = (piece for text in texts for piece in cut(text, *lengths, rule))
    backend.train_from_iterator(pieces, trainer)
    write_whole(output, backend.to_str(pretty=True).encode())
    return FileTokenizer(output)
