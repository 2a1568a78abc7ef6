"""Named groups of text files, as the options of `TextStream` give them."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from data_modules.readers import find_files
from memlm.errors import ConfigError

Paths = list[str] | dict[str, list[str]]


@dataclass
class TextSource:
    """Some text files that belong together.

    Args:
        name: What metrics and weights call it.
        patterns: Paths, patterns or directories.
        text_key: Key of the text in a JSON object, or the column of a Parquet file.
        key: The YAML key of the patterns.
    """

    name: str
    patterns: list[str]
    text_key: str
    key: str

    @cached_property
    def files(self) -> list[tuple[Path, str]]:
        """Each file and the key of its text, sorted.

        Raises:
            DataError: A pattern names no file.
        """
        return [(path, self.text_key) for path in find_files(self.patterns, self.key)]


def text_sources(paths: Paths, text_key: str | dict[str, str], key: str) -> list[TextSource]:
    """The sources of an option; a plain list is one, called ``all``.

    Args:
        paths: Patterns, or patterns by name.
        text_key: One key for all sources, or keys by name.
        key: The YAML key that ``paths`` come from.

    Raises:
        ConfigError: There is no source, or one has no key for its text.
    """
    by_name = paths if isinstance(paths, dict) else {"all": paths}
    if not by_name:
        raise ConfigError(key, "names no source")
    if isinstance(text_key, str):
        return [TextSource(name, patterns, text_key, key) for name, patterns in by_name.items()]
    if not isinstance(paths, dict):
        raise ConfigError("data.text_key", f"gives keys by source, but {key} names no sources")
    if lacking := [name for name in by_name if name not in text_key]:
        raise ConfigError(
            "data.text_key", f"has no key for {lacking[0]!r} of {key}; it has {_names(text_key)}"
        )
    return [TextSource(name, patterns, text_key[name], key) for name, patterns in by_name.items()]


def _names(mapping: dict[str, object] | dict[str, str] | dict[str, list[str]]) -> str:
    return ", ".join(map(repr, mapping))
