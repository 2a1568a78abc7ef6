"""One line in place of the parser's many: which key is wrong, what it holds, what was expected."""

import difflib
import importlib
import re
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
    if required := re.search(r"arguments are required: (.*)", message):
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


def explain(message: str) -> str:
    """``key: what is wrong`` from a message of jsonargparse; other messages are put on one line."""
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
                inner_key, reason = explain(inner).split(": ", 1)
                return f"{key}.{inner_key}: {reason}"
            if option := _unknown_option(inner):
                return f"{key}.{option}: is not an option of {class_path.rsplit('.', 1)[-1]}"
            return f"{key}: {class_path.rsplit('.', 1)[-1]}: {' '.join(inner.split())}"
    for alternative in alternatives:
        if unknown := re.match(r"Expected a dot import path string: (.*)", alternative):
            return f"{key}: no class {unknown[1]!r} is known{_suggestions(unknown[1], body)}"
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


def _suggestions(name: str, body: str) -> str:
    base = re.search(r"<class '([\w.]+)'>", body)
    if not base or "." not in base[1]:
        return ""
    module, class_name = base[1].rsplit(".", 1)
    names = sorted(
        {cls.__name__ for cls in _subclasses(getattr(importlib.import_module(module), class_name))}
    )
    close = difflib.get_close_matches(name.rsplit(".", 1)[-1], names, n=3)
    if close:
        return f"; did you mean {' or '.join(close)}?"
    return f"; known are {', '.join(names)}" if len(names) < 20 else ""


def _subclasses(cls: Any) -> list[Any]:
    return [found for child in cls.__subclasses__() for found in (child, *_subclasses(child))]
