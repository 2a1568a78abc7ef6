"""Data modules: sources of token batches for training and evaluation.

To add one, write a subclass of `LanguageDataModule` into a file of this directory and name it in a YAML by
its class path.
"""

from data_modules.base import LanguageDataModule
from data_modules.fact_questions import FactQuestions
from data_modules.packed_tokens import PackedTokens
from data_modules.synthetic_facts import SyntheticFacts
from data_modules.text_stream import TextStream

__all__ = ["FactQuestions", "LanguageDataModule", "PackedTokens", "SyntheticFacts", "TextStream"]
