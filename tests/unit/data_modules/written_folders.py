"""Prepared folders written by tests, with documents of any token ids."""

import os
from pathlib import Path

import numpy as np

from data_modules.prepared.files import checksum
from data_modules.prepared.manifest import Counts, Manifest, ShardInfo
from data_modules.prepared.shard import Header, ShardWriter
from memlm.tokenizers import ByteTokenizer

EOS = ByteTokenizer().eos_id


def documents(seed, count, longest=30):
    """Documents of 1 to ``longest`` tokens, the first of which is eos: lists of integers."""
    generator = np.random.default_rng(seed)
    lengths = generator.integers(1, longest + 1, count)
    return [[EOS, *generator.integers(0, EOS, length - 1).tolist()] for length in lengths]


def write_folder(folder, train, validation=(), tokenizer=None, dtype="uint16"):
    """Write a prepared folder.

    Args:
        folder: Where.
        train: For each shard its documents.
        validation: The same for the documents held out.
        tokenizer: Its tokenizer (hash); the files hold bytes' by default.
        dtype: Of the tokens.
    """
    folder = Path(folder)
    folder.mkdir(parents=True)
    tokenizer = tokenizer or ByteTokenizer().hash
    splits, total = {}, Counts()
    for split, shards in {"train": train, "validation": validation}.items():
        splits[split] = []
        for number, shard in enumerate(shards):
            name = f"{split}-{number:05d}.tokens"
            writer = ShardWriter(folder / name, np.dtype(dtype), tokenizer)
            for document in shard:
                writer.add(np.array(document))
            counts = writer.finish()
            text_bytes = counts[1] - counts[0]
            splits[split].append(ShardInfo(name, *counts, text_bytes, checksum(folder / name)))
            total += Counts(*counts, text_bytes)
    _manifest(folder, tokenizer, dtype, splits, total).save()
    return str(folder)


def write_sparse_folder(folder, shards, tokens, documents=1):
    """Write a folder of shards without content: sparse files of any size that take no room on the disk.

    Args:
        folder: Where.
        shards: Their number.
        tokens: Of each shard; all are token 0.
        documents: Of each shard, which divide it evenly.
    """
    folder = Path(folder)
    folder.mkdir(parents=True)
    header = Header(np.dtype("<u2"), documents, tokens, ByteTokenizer().hash)
    infos = [
        ShardInfo(f"train-{number:05d}.tokens", documents, tokens, tokens, f"{number:064x}")
        for number in range(shards)
    ]
    starts = (np.arange(documents + 1, dtype=np.uint64) * tokens // documents).tobytes()
    for info in infos:
        with open(folder / info.file, "wb") as file:
            file.write(header.pack())
            file.seek(header.starts_at)
            file.write(starts)
            assert file.tell() == header.file_bytes
    total = Counts(documents * shards, tokens * shards, tokens * shards)
    _manifest(folder, ByteTokenizer().hash, "uint16", {"train": infos, "validation": []}, total).save()
    return str(folder)


def _manifest(folder, tokenizer, dtype, splits, counts):
    return Manifest(
        folder=folder,
        tokenizer="bytes",
        tokenizer_hash=tokenizer,
        vocab_size=ByteTokenizer().vocab_size,
        eos_id=EOS,
        dtype=dtype,
        compressed=False,
        splits=splits,
        counts=counts,
    )


def open_descriptors():
    return len(os.listdir("/proc/self/fd"))
