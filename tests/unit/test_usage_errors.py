from typing import Literal

import pytest
from jsonargparse import ArgumentParser

from memlm.errors import DataError
from memlm.usage_errors import config_files_of, explain, usage_error


class Base:
    """Base of a key that takes classes."""


class Leaf(Base):
    def __init__(
        self,
        size: int = 1,
        kind: Literal["a", "b"] = "a",
        inner: Base | None = None,
        more: list[Base] | None = None,
    ):
        """A class with options."""


class Needy(Base):
    def __init__(self, path: str):
        """A class with an option that must be set."""


def complaint(*arguments: str) -> str:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(Base, "model", required=True)
    parser.add_argument("--count", type=int | None)
    with pytest.raises(Exception) as error:
        parser.parse_args(list(arguments))
    return str(error.value)


LEAF = ("--model", f"{__name__}.Leaf")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((*LEAF, "--model.size", "x"), "model.size: expected int. Got value: x"),
        ((*LEAF, "--model.kind", "c"), "model.kind: "),
        ((*LEAF, "--model.sizes", "1"), "model.sizes: is not an option of Leaf"),
        ((*LEAF, "--model.inner", "Nope"), "model.inner: no class 'Nope' is known; known are Leaf, Needy"),
        ((*LEAF, "--model.more", "[Nedy]"), "model.more: no class 'Nedy' is known; did you mean Needy?"),
        (("--model", "Laef"), "model: no class 'Laef' is known; did you mean Leaf?"),
        (("--model", "Qqqqq"), "model: no class 'Qqqqq' is known; known are Leaf, Needy"),
        ((*LEAF, "--count", "x"), "count: is x, expected int"),
        ((*LEAF, "--counts", "1"), "counts: is not an option"),
    ],
)
def test_jsonargparse_in_one_line(arguments, expected):
    line = explain(complaint(*arguments))
    assert line.startswith(expected)
    assert "\n" not in line
    assert "Union subtypes" not in line and "NoneType" not in line


def test_literal_lists_the_choices():
    assert "'a', 'b'" in explain(complaint(*LEAF, "--model.kind", "c"))


def test_other_messages_are_only_joined():
    assert explain("something\n   went  wrong") == "something went wrong"


def test_an_option_missing_in_a_class_names_the_class():
    message = complaint(*LEAF, f"--model.inner={__name__}.Needy")
    assert str(usage_error(message, [])) == "model.inner: Needy: path: needed, but not set"


def test_missing_keys_lose_the_verb():
    error = usage_error("the following arguments are required: fit.data, fit.model", [])
    assert str(error).startswith("data, model: needed, but not set; pass --config")


def test_the_broken_file_is_found_among_several(tmp_path):
    good, bad = tmp_path / "good.yaml", tmp_path / "bad.yaml"
    good.write_text("a: 1\n")
    bad.write_text("a: 1\nb:\n  - [2\n")
    error = usage_error("Problems parsing config: while parsing", [str(good), str(bad)])
    assert isinstance(error, DataError)
    assert error.path == str(bad) and error.line == 4


def test_config_files_of():
    arguments = [
        "--config",
        "a.yaml",
        "--x",
        "--config",
        "--config=b.yaml",
        "-c",
        "c.yaml",
        "--configs",
        "no",
    ]
    assert config_files_of(arguments) == ["a.yaml", "--config=b.yaml", "b.yaml", "c.yaml"]
    assert config_files_of([]) == []
