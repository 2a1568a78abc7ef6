"""Facts as questions with one answer each: from installed packages, or from the user's JSON lines.

A *fact* is a field ("capital"; empty where a source has only one), what it is about ("France", the question)
and the answer ("Paris"). A *phrasing* is a template that a sentence begins with, such as "The capital of
{question} is"; the answer and a full stop complete it. A line of a file is an object with ``question``,
``answer`` and, if wanted, ``phrasing`` and ``field``; lines that differ in nothing but the phrasing are one
fact.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from data_modules.file_bytes import COMPRESSED, contents
from data_modules.json_lines import read_lines
from data_modules.readers import JSON_LINES
from data_modules.real_facts.fact_packages import FACT_PACKAGES
from memlm.errors import ConfigError, DataError

QUESTION, FIELD = "{question}", "{field}"


@dataclass(frozen=True)
class Fact:
    """One question that has one answer.

    Args:
        field: The relation; a question may have one answer in each field.
        question: What the fact is about.
        answer: The answer.
        phrasings: Different templates, each with ``{question}`` in it, sorted.
    """

    field: str
    question: str
    answer: str
    phrasings: tuple[str, ...]

    def prompt(self, phrasing: str) -> str:
        """The sentence up to the answer."""
        return phrasing.replace(FIELD, self.field).replace(QUESTION, self.question)


@dataclass(frozen=True)
class Claim:
    """What one line says: a fact in one phrasing, or in none of its own."""

    field: str
    question: str
    answer: str
    phrasing: str | None = None
    line: int | None = None


def read_facts(
    source: str, fields: list[str] | None, phrasings: list[str] | None, skip_ambiguous: bool
) -> tuple[list[Fact], int]:
    """All facts of a source, in its order, and the number of questions dropped for having several answers.

    Args:
        source: A name in `FACT_PACKAGES`, or the path of a JSON-lines file, also compressed.
        fields: The fields wanted. By default all.
        phrasings: Templates for the facts whose lines have none. By default those of the package; for a file
            the question alone.
        skip_ambiguous: Whether to drop questions with several answers. Those of packages always are.

    Raises:
        ConfigError: A package is missing, or there is no such source, field or phrasing.
        DataError: A line is malformed, or a question has two answers.
    """
    _check_phrasings(phrasings)
    package = FACT_PACKAGES.get(source)
    if package is not None:
        _check_fields(fields, list(package.phrasings))
        claims: Iterable[Claim] = (Claim(*entry) for entry in package.entries())
    else:
        claims = list(read_claims(source))
        _check_fields(fields, list(dict.fromkeys(claim.field for claim in claims)))
    wanted = (claim for claim in claims if fields is None or claim.field in fields)
    kept, own, dropped = _one_answer_each(wanted, source, skip_ambiguous or package is not None)
    bare = {claim.field for key, claim in kept.items() if key not in own}
    if phrasings is not None and len(bare) > 1 and not all(FIELD in phrasing for phrasing in phrasings):
        raise ConfigError(
            "data.phrasings",
            f"is {phrasings}, for facts of {len(bare)} fields ({', '.join(sorted(bare)[:4])} ..); expected "
            f"{FIELD} in each, or one of them in data.fields",
        )

    def templates(key: tuple[str, str]) -> tuple[str, ...]:
        if key in own:
            return tuple(sorted(own[key]))
        if phrasings is not None:
            return tuple(sorted({phrasing.strip() for phrasing in phrasings}))
        return tuple(sorted(package.phrasings[key[0]])) if package is not None else (QUESTION,)

    facts = [Fact(*key, claim.answer, templates(key)) for key, claim in kept.items()]
    _check_prompts(facts)
    return facts, dropped


def _check_prompts(facts: list[Fact]) -> None:
    """A prompt with two answers cannot be answered: facts of several fields need different phrasings."""
    answers: dict[str, str] = {}
    for fact in facts:
        for phrasing in fact.phrasings:
            prompt = fact.prompt(phrasing)
            if answers.setdefault(prompt, fact.answer) != fact.answer:
                raise ConfigError(
                    "data.phrasings",
                    f"make {prompt!r} begin two facts, with the answers {answers[prompt]!r} and "
                    f"{fact.answer!r}; expected {FIELD} in them, or a 'phrasing' of its own for each field",
                )


def _one_answer_each(
    claims: Iterable[Claim], source: str, skip_ambiguous: bool
) -> tuple[dict[tuple[str, str], Claim], dict[tuple[str, str], set[str]], int]:
    """By field and question: the first claim of each, the phrasings of its lines; how many were dropped."""
    first: dict[tuple[str, str], Claim] = {}
    phrasings: dict[tuple[str, str], set[str]] = {}
    ambiguous = set()
    for claim in claims:
        key = (claim.field, claim.question)
        known = first.setdefault(key, claim)
        if known.answer != claim.answer:
            if not skip_ambiguous:
                raise DataError(
                    source,
                    f"answers {claim.question!r} with {claim.answer!r}, but line {known.line} with "
                    f"{known.answer!r}; expected one answer to a question: tell relations apart by a "
                    "'field', or drop such questions by data.skip_ambiguous: true",
                    claim.line,
                )
            ambiguous.add(key)
        if claim.phrasing is not None:
            phrasings.setdefault(key, set()).add(claim.phrasing)
    return {key: claim for key, claim in first.items() if key not in ambiguous}, phrasings, len(ambiguous)


def read_claims(source: str) -> Iterator[Claim]:
    """The lines of a JSON-lines file; blank ones are passed over.

    Raises:
        ConfigError: There is no such file.
        DataError: The file cannot be read, or a line is no object with the strings it needs.
    """
    path = Path(source).expanduser()
    if not path.is_file():
        names = ", ".join(sorted(FACT_PACKAGES))
        raise ConfigError("data.facts", f"is {source!r}; expected {names} or the path of a JSON-lines file")
    named = path.with_suffix("") if path.suffix.lower() in COMPRESSED else path
    if named.suffix.lower() not in JSON_LINES:
        raise DataError(path, f"is not named like JSON lines ({', '.join(sorted(JSON_LINES))}, data.facts)")
    for number, line in read_lines(contents(path), path, 0, 1, lambda number: number + 1):
        if line.strip():
            yield _claim(line, path, number + 1)


def _claim(line: bytes, path: Path, number: int) -> Claim:
    def fail(message: str) -> NoReturn:
        raise DataError(path, message, number) from None

    try:
        record = json.loads(line.decode())
    except UnicodeDecodeError as error:
        fail(f"is not valid UTF-8 ({error.reason} at byte {error.start} of the line)")
    except (ValueError, RecursionError) as error:
        # Not str(error), whose "line 1" is that within the line.
        reason = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else error
        fail(f"is not valid JSON ({reason}); expected one object on each line")
    if not isinstance(record, dict):
        fail(f"is {str(record)[:60]!r}; expected an object with 'question' and 'answer'")
    texts: dict[str, str | None] = {"field": "", "phrasing": None}
    for key in ("field", "question", "answer", "phrasing"):
        value = record.get(key)
        if value is None and key in texts:
            continue
        if key not in record:
            keys = ", ".join(map(repr, list(record)[:8])) or "no keys"
            fail(f"has no key {key!r}; it has {keys}")
        if not isinstance(value, str) or not value.strip():
            fail(f"{key!r} is {value!r}; expected a string that is not blank")
        try:
            value.encode()
        except UnicodeEncodeError:
            fail(f"{key!r} holds half a surrogate pair, which is no text")
        texts[key] = value.strip()
    if texts["phrasing"] is not None and QUESTION not in texts["phrasing"]:
        fail(f"'phrasing' is {texts['phrasing']!r}; expected {QUESTION} in it")
    return Claim(**texts, line=number)  # type: ignore[arg-type]  # field, question and answer are no None


def _check_fields(fields: list[str] | None, known: list[str]) -> None:
    for field in fields or []:
        if field not in known:
            raise ConfigError("data.fields", f"is {field!r}; expected some of {', '.join(map(repr, known))}")


def _check_phrasings(phrasings: list[str] | None) -> None:
    if phrasings is None:
        return
    bad = [phrasing for phrasing in phrasings if QUESTION not in phrasing]
    if bad or not phrasings:
        raise ConfigError("data.phrasings", f"is {bad[0] if bad else []!r}; expected {QUESTION} in each")
