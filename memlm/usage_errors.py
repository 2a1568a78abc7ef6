"""One line in place of the parser's many: which key is wrong, what it holds, what was expected."""

import difflib
import importlib
import inspect
import re
import typing
from pathlib import Path
from typing import Any

import yaml

from memlm.errors import DataError, UserError


class UsageError(UserError):
    """The command line or a config file does not parse."""


def usage_error(message: str, config_files: list[str]) -> UserError:
    """The error to show for a complaint of the parser.

    Args:
        message: The parser's message, of many lines.
        config_files: The ``--config`` files, among which a syntax error is looked for.
    """
    if "Problems parsing config" in message:
        for file in config_files:
            try:
                yaml.safe_load(Path(file).read_text(encoding="utf-8"))
            except yaml.MarkedYAMLError as error:
                line = error.problem_mark.line + 1 if error.problem_mark else None
                return DataError(file, f"is not valid YAML: {error.problem or error}", line)
            except (yaml.YAMLError, UnicodeDecodeError) as error:
                return DataError(file, f"is not valid YAML: {error}")
    in_class = re.search(r"Problem with given class_path '[^']+':\s+the following arguments", message)
    if (required := re.search(r"arguments are required: (.*)", message)) and not in_class:
        keys = ", ".join(key.split(".", 1)[-1] for key in required[1].split(", "))
        return UsageError(f"{keys}: needed, but not set; pass --config FILE.yaml (of a run: its config.yaml)")
    return UsageError(explain(message))


def config_files_of(arguments: list[str]) -> list[str]:
    """The values of ``--config`` and ``-c``, in order."""
    files = []
    for word, following in zip(arguments, [*arguments[1:], ""], strict=False):
        if word in ("--config", "-c"):
            files.append(following)
        elif word.startswith(("--config=", "-c=")):
            files.append(word.split("=", 1)[1])
    return files


def explain(message: str, owner: str | None = None) -> str:
    """``key: what is wrong`` from a message of jsonargparse; other messages are put on one line.

    Args:
        message: The message.
        owner: The class path whose options the message is about, None for those of the command line.
    """
    found = re.match(r'\s*Parser key "([^"]+)":\s*(.*)', message, re.DOTALL)
    if not found:
        option = _unknown_option(message)
        return f"{option}: is not an option" if option else " ".join(message.split())
    key, body = found.groups()
    given = re.search(r"\n\s*Given value: (.*)$", body)
    alternatives = _alternatives(body)
    for alternative in alternatives:
        problem = re.match(r"Problem with given class_path '([^']+)':\s*(.*)", alternative, re.DOTALL)
        if problem:
            class_path, inner = problem.groups()
            if 'Parser key "' in inner:
                inner_key, reason = explain(inner, class_path).split(": ", 1)
                return f"{key}.{inner_key}: {reason}"
            if option := _unknown_option(inner):
                return f"{key}.{option}: is not an option of {class_path.rsplit('.', 1)[-1]}"
            name = class_path.rsplit(".", 1)[-1]
            if required := re.match(r"the following arguments are required: (.*)", inner):
                return f"{key}: {name}: {required[1]}: needed, but not set"
            return f"{key}: {name}: {' '.join(inner.split())}"
    for alternative in alternatives:
        if unknown := re.match(r"Expected a dot import path string: (.*)", alternative):
            base = _base_named(body) or (owner and _base_of_option(owner, key))
            return f"{key}: no class {unknown[1]!r} is known{_suggestions(unknown[1], base)}"
    reasons = list(dict.fromkeys(_readable(alternative) for alternative in alternatives))
    value = f"is {given[1]}, " if given else ""
    return f"{key}: {value}{' or '.join(reasons)}"


def _alternatives(body: str) -> list[str]:
    """What each type that the key may have says to the value, the null type left out."""
    if "Errors:\n" not in body:
        return [body]
    listed = body.split("Errors:\n", 1)[1]
    indent = re.match(r"( *)- ", listed)
    assert indent, listed
    # Messages nest, each level indented deeper: only this level's marks count.
    listed = re.split(rf"(?:^|\n) {{,{len(indent[1]) - 1}}}Given value type:", listed)[0]
    parts = [part.strip() for part in re.split(rf"(?:^|\n){indent[0]}", listed)]
    kept = [part for part in parts if part and part != "Expected a <class 'NoneType'>"]
    return [part for part in kept if not part.startswith("Not a valid subclass")] or kept


def _unknown_option(text: str) -> str | None:
    if group := re.search(r"Group '([^']+)' does not accept option '([^']+)'", text):
        return f"{group[1]}.{group[2]}"
    option = re.search(r"(?:Option '|does not accept option '|unrecognized arguments: -*)([\w.]+)", text)
    return option[1] if option else None


def _readable(text: str) -> str:
    text = " ".join(text.split())
    text = re.sub(r"<class '([\w.]+)'>", lambda match: match[1].rsplit(".", 1)[-1], text)
    text = re.sub(r"typing\.Literal\[(.*?)\]", r"one of \1", text)
    return re.sub(r"^Expected an? ", "expected ", text)


def _base_named(body: str) -> Any:
    """The class that a message names as the base of those it expects."""
    named = re.search(r"<class '([\w.]+)'>", body)
    if not named or "." not in named[1]:
        return None
    module, class_name = named[1].rsplit(".", 1)
    return getattr(importlib.import_module(module), class_name)


def _base_of_option(owner: str, option: str) -> Any:
    """The class of an option's value, or of the entries of its list, from its owner's signature."""
    module, class_name = owner.rsplit(".", 1)
    constructor = getattr(importlib.import_module(module), class_name).__init__
    try:
        hint = typing.get_type_hints(constructor).get(option)
    except NameError:  # written for a type checker alone
        return None
    while typing.get_args(hint):
        hint = typing.get_args(hint)[0]
    return hint if isinstance(hint, type) else None


def _suggestions(name: str, base: Any) -> str:
    if base is None:
        return ""
    names = sorted({cls.__name__ for cls in _subclasses(base) if not inspect.isabstract(cls)})
    close = difflib.get_close_matches(name.rsplit(".", 1)[-1], names, n=3)
    if close:
        return f"; did you mean {' or '.join(close)}?"
    return f"; known are {', '.join(names)}" if len(names) < 20 else ""


def _subclasses(cls: Any) -> list[Any]:
    return [found for child in cls.__subclasses__() for found in (child, *_subclasses(child))]
