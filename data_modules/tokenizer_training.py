"""The verb ``memlm tokenizer``: train a byte-level BPE tokenizer on text files, or show a tokenizer."""

import math
from collections.abc import Iterator
from pathlib import Path

from jsonargparse import auto_cli

from data_modules.prepared.progress import progress_bar
from data_modules.readers import Piece, find_files, piece_bytes
from data_modules.text_sample import sample_documents
from memlm.errors import ConfigError
from memlm.tokenizers import load_tokenizer, train_bpe


def train(
    paths: list[str],
    vocab_size: int = 16384,
    output: str = "tokenizer.json",
    text_key: str = "text",
    sample_megabytes: float | None = None,
) -> None:
    """Train a byte-level BPE tokenizer on text files and write its tokenizer.json.

    It is then used by ``--data.tokenizer tokenizer.json``. Texts that a run holds out for validation are
    trained on too.

    Args:
        paths: Files to read: paths, directories or patterns such as 'my/*.jsonl.zst'; JSON lines, parquet or
            plain text, also compressed by gzip or zstandard.
        vocab_size: Tokens wanted: 256 bytes, <|eos|> and merges.
        output: The file to write; it must not exist.
        text_key: Key of the text in a JSON object, or column of a table.
        sample_megabytes: Train on about so many megabytes of text, taken evenly over the files (from the
            beginning of each that is compressed), instead of all.
    """
    files = find_files(paths, "paths")
    tokenizer = train_bpe(_documents(files, text_key, sample_megabytes), vocab_size, output)
    share = "" if sample_megabytes is None else f"up to {sample_megabytes:g} MB of "
    print(f"{output}: {tokenizer.vocab_size:,} tokens, trained on {share}{len(files):,} files")
    if tokenizer.vocab_size < vocab_size:
        print(f"The text holds no more pairs to merge: fewer tokens than the {vocab_size:,} wanted.")


def show(
    tokenizer: str,
    paths: list[str] | None = None,
    text_key: str = "text",
    sample_megabytes: float | None = 10,
) -> None:
    """Print what a tokenizer is and, given text, how many bytes a token stands for.

    Args:
        tokenizer: 'bytes', or the path of a tokenizer.json, of a SentencePiece model or of tiktoken ranks.
        paths: Text to try it on: paths, directories or patterns.
        text_key: Key of the text in a JSON object, or column of a table.
        sample_megabytes: Text to take of these files, evenly; null for all.
    """
    loaded = load_tokenizer(tokenizer)
    print(f"kind             {type(loaded).__name__}")
    print(f"entries          {loaded.vocab_size:,}")
    print(f"end of document  {loaded.eos_id}")
    print(f"hash             {loaded.hash}")
    if paths is not None:
        size = tokens = 0
        for text in _documents(find_files(paths, "paths"), text_key, sample_megabytes):
            size += len(text.encode())
            tokens += sum(map(len, loaded.encode_batch([text])))
        print(f"bytes per token  {size / max(tokens, 1):.3f} ({size:,} bytes)")


def _documents(files: list[Path], text_key: str, megabytes: float | None) -> Iterator[str]:
    """All texts, or a sample of them, with a progress bar."""
    if megabytes is not None and not megabytes > 0:
        raise ConfigError("sample_megabytes", f"is {megabytes}; expected a positive number, or null for all")
    most = None if megabytes is None else math.ceil(megabytes * 1e6)
    total = sum(piece_bytes(Piece(file)) for file in files)
    with progress_bar(total, 0, "reading", "B") as bar:
        yield from sample_documents(files, text_key, most, bar.update)


def main(argv: list[str]) -> None:
    """Run ``memlm tokenizer ARGV``, where argv starts with ``train`` or ``show``."""
    auto_cli({"train": train, "show": show}, args=argv, as_positional=False, prog="memlm tokenizer")
