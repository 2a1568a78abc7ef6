"""Finds what users drop into ``callbacks/`` and ``data_modules/``."""

import importlib
import pkgutil
import warnings
from types import ModuleType


def import_all(package: ModuleType) -> None:
    """Imports every module of a package: YAML can then name a class in any of them by its bare name.

    A module that lacks one of its imports (an optional dependency) is left out with a warning.
    """
    for module in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
        try:
            importlib.import_module(module.name)
        except ImportError as error:
            warnings.warn(f"{module.name} is not available: {error}", stacklevel=2)
