"""Continuing prompts: decoding, and what the command line makes of it."""
