"""The verbs ``memlm prepare`` and ``memlm verify``."""

import os
import sys
from pathlib import Path

from jsonargparse import auto_cli

from data_modules.prepared.manifest import Manifest
from data_modules.prepared.plan import Options, Plan
from data_modules.prepared.preparation import Preparation, Result
from data_modules.prepared.progress import progress_bar
from data_modules.prepared.reading import Faults
from data_modules.readers import find_files
from memlm.errors import ConfigError, DataError
from memlm.tokenizers import load_tokenizer


def prepare(
    paths: list[str],
    tokenizer: str,
    output: str,
    text_key: str = "text",
    document_separator: str | None = None,
    validation_fraction: float = 0.005,
    seed: int = 0,
    deduplicate: bool = False,
    compress: bool = False,
    workers: int | None = None,
    shard_megabytes: float = 256,
    skip_malformed: bool = False,
    skip_empty: bool = False,
    skip_unreadable: bool = False,
) -> None:
    """Turn text files into shards of tokens with a manifest, which --data PackedTokens reads.

    What is finished is kept when it is interrupted; the same command goes on.

    Args:
        paths: Files to read: directories, paths or patterns such as 'my/*.jsonl.zst'; JSON lines, parquet or
            plain text, also compressed by gzip or zstandard.
        tokenizer: 'bytes' or the file of a tokenizer, such as tokenizer.json.
        output: The folder to make.
        text_key: Key of the text in a JSON object, or column of a parquet file.
        document_separator: What stands between the documents of a plain text file, such as '<|endoftext|>';
            by default each file is one document.
        validation_fraction: Share of the documents that make the validation split, chosen by a hash of their
            text; data.TextStream with the same share and seed chooses the same ones.
        seed: Chooses the documents that validation_fraction holds out.
        deduplicate: Whether to keep only the first of all documents with the same text; reads the files
            twice.
        compress: Whether to store shards compressed by zstandard; they are expanded on first use.
        workers: Processes; by default one for each core.
        shard_megabytes: Input that goes into one shard, in 10^6 bytes of the files as they are on the disk.
        skip_malformed: Whether to skip and count records that hold no text, instead of ending.
        skip_empty: Whether to skip and count documents of nothing but white space, instead of ending.
        skip_unreadable: Whether to keep the documents before the fault of a truncated or unreadable file and
            list the file in the manifest, instead of ending.
    """
    options = Options(
        text_key,
        document_separator,
        validation_fraction,
        seed,
        deduplicate,
        compress,
        float(shard_megabytes),
    )
    if workers is not None and workers < 1:
        raise ConfigError("workers", f"is {workers}; expected at least 1")
    used = load_tokenizer(tokenizer)
    files = find_files(paths, "paths")
    _check_apart(Path(output).resolve(), paths, files)
    plan = Plan.of(files, options, used, skip_unreadable)
    faults = Faults(skip_malformed, skip_empty, skip_unreadable)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        result = Preparation(plan, Path(output), used, faults, workers or cores).run()
    except KeyboardInterrupt:
        print(f"{output}: finished shards are kept; the same command goes on", file=sys.stderr)
        raise
    if result is None:
        manifest = Manifest.load(output)
        print(f"{output} is complete: {manifest.counts.tokens:,} tokens; nothing to do")
    else:
        print(summary(result))


def _check_apart(output: Path, paths: list[str], files: list[Path]) -> None:
    """What is written must not be among the inputs of the same command when it is run again."""
    for file in files:
        if output in file.resolve().parents:
            raise ConfigError("output", f"is {output}, which holds an input: {file}; expected another folder")
    for path in paths:
        folder = Path(path).expanduser().resolve()
        if folder.is_dir() and folder in (output, *output.parents):
            raise ConfigError("output", f"is {output}, within the input {path}; expected a folder outside")


def summary(result: Result) -> str:
    """The table that ends a preparation."""
    manifest = result.manifest
    counts = manifest.counts
    held_out = manifest.shards("validation")
    rows = {
        "documents": f"{counts.documents:,}",
        "tokens": f"{counts.tokens:,}",
        "bytes of text": f"{counts.text_bytes:,}",
        "bytes per token": f"{counts.text_bytes / counts.tokens:.3f}",
        "held out documents": f"{sum(shard.documents for shard in held_out):,}",
        "held out tokens": f"{sum(shard.tokens for shard in held_out):,}",
        "shards": f"{sum(map(len, manifest.splits.values())):,}",
        "skipped as malformed": f"{counts.malformed:,}",
        "skipped as empty": f"{counts.empty:,}",
        "dropped as duplicates": f"{counts.duplicates:,}",
        "files not read to their end": f"{len({fault['file'] for fault in manifest.unreadable}):,}",
    }
    width = max(map(len, rows))
    lines = [f"{name:<{width}}  {value}" for name, value in rows.items()]
    if not held_out and manifest.options["validation_fraction"]:
        lines.append("No document is held out: there is no validation split; raise validation_fraction.")
    seconds = max(result.seconds, 1e-9)
    speed = f"{result.new.text_bytes / seconds / 1e6:.1f} MB of text/s"
    speed += f", {result.new.tokens / seconds:,.0f} tokens/s"
    return "\n".join([f"{manifest.folder} in {seconds:.1f} s: {speed}", *lines])


def verify(folder: str) -> None:
    """Check every shard of a prepared folder by its checksum, and the tokenizer by its hash.

    Args:
        folder: A folder made by memlm prepare.
    """
    manifest = Manifest.load(folder)
    manifest.load_tokenizer()
    faults = []
    with progress_bar(manifest.stored_bytes(), 0, "verifying", "B") as bar:
        for fault in manifest.faults(bar.update):
            bar.write(str(fault), file=sys.stderr)
            faults.append(fault)
    count = sum(map(len, manifest.splits.values()))
    if len(faults) == 1:
        raise faults[0]
    if faults:
        raise DataError(
            folder, f"{len(faults)} of {count} shards are missing or altered; the first: {faults[0]}"
        )
    print(f"{folder}: all {count:,} shards are as they were made ({manifest.counts.tokens:,} tokens)")


def prepare_main(argv: list[str]) -> None:
    """Run ``memlm prepare ARGV``."""
    auto_cli(prepare, args=argv, as_positional=False, prog="memlm prepare")


def verify_main(argv: list[str]) -> None:
    """Run ``memlm verify FOLDER``."""
    auto_cli(verify, args=argv, prog="memlm verify")
