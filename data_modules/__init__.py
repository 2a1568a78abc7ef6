"""Data modules: sources of token batches for training and evaluation.

To add one, write a subclass of `LanguageDataModule` into a file of this directory and name it in a YAML by
its class path.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from data_modules.base import LanguageDataModule
    from data_modules.fact_questions import FactQuestions
    from data_modules.packed_tokens import PackedTokens
    from data_modules.synthetic_facts import SyntheticFacts
    from data_modules.text_stream import TextStream

__all__ = ["FactQuestions", "LanguageDataModule", "PackedTokens", "SyntheticFacts", "TextStream"]

_MODULES = {
    "FactQuestions": "fact_questions",
    "LanguageDataModule": "base",
    "PackedTokens": "packed_tokens",
    "SyntheticFacts": "synthetic_facts",
    "TextStream": "text_stream",
}


def __getattr__(name: str) -> Any:
    # `memlm prepare` reads files and writes tokens: it must not wait for torch and lightning.
    if name in _MODULES:
        return getattr(importlib.import_module(f"data_modules.{_MODULES[name]}"), name)
    raise AttributeError(f"module 'data_modules' has no attribute {name!r}")
