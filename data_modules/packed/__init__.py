"""Rows of prepared tokens in any order, for `data_modules.packed_tokens.PackedTokens`."""
