"""memlm: train and study memory-layer language models."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from memlm.language_models import PEERLM, DenseLM, EngramLM, LanguageModel, MemoryLM, MoELM

__version__ = "0.1.0"
__all__ = ["PEERLM", "DenseLM", "EngramLM", "LanguageModel", "MemoryLM", "MoELM"]


def __getattr__(name: str) -> Any:
    # `memlm --help` must not wait seconds for torch and lightning to be imported.
    if name in __all__:
        from memlm import language_models

        return getattr(language_models, name)
    raise AttributeError(f"module 'memlm' has no attribute {name!r}")
