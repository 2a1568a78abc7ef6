"""The verb ``memlm tokenizer train``: a byte-level BPE tokenizer from text files."""

from jsonargparse import auto_cli

from data_modules.readers import find_files, read_documents
from memlm.tokenizers import train_bpe


def train(
    paths: list[str], vocab_size: int = 16384, output: str = "tokenizer.json", text_key: str = "text"
) -> None:
    """Train a byte-level BPE tokenizer on text files and write its tokenizer.json.

    It is then used by ``--data.tokenizer tokenizer.json``. All texts are read, those that a run holds out for
    validation too.

    Args:
        paths: Files to read: paths or patterns such as 'my/*.jsonl.zst'; JSON lines or plain text, also
            compressed by gzip or zstandard.
        vocab_size: Tokens wanted: 256 bytes, <|eos|> and merges.
        output: The file to write; it must not exist.
        text_key: Key of the text in a JSON object.
    """
    files = find_files(paths, "paths")
    tokenizer = train_bpe(read_documents(files, text_key), vocab_size, output)
    print(f"{output}: {tokenizer.vocab_size:,} tokens, trained on {len(files):,} files")
    if tokenizer.vocab_size < vocab_size:
        print(f"The text holds no more pairs to merge: fewer tokens than the {vocab_size:,} wanted.")


def main(argv: list[str]) -> None:
    """Run ``memlm tokenizer ARGV``, where argv starts with ``train``."""
    auto_cli({"train": train}, args=argv, as_positional=False, prog="memlm tokenizer")
