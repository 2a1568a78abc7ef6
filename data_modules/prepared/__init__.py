"""Prepared data: text as memory-mapped shards of tokens with a manifest, made by ``memlm prepare``."""
