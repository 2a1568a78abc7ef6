"""Prompts: where they come from, and their tokens."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from memlm.errors import DataError, UserError
from memlm.tokenizers import Tokenizer
from memlm.usage_errors import UsageError

_JSON = (".jsonl", ".ndjson", ".json")

WRITTEN_FIELDS = ("text", "tokens", "finish", "seed", "sample")
"""What an answer adds to the fields of its prompt."""


@dataclass(frozen=True)
class Prompt:
    """A text to continue.

    Attributes:
        text: What the document begins with; empty for a document from its start.
        fields: What stands beside it in its line, to be kept with the answer.
        path: The file it comes from; None for a word of the command line.
        line: Of that file, from 1.
    """

    text: str
    fields: dict[str, Any] = field(default_factory=dict)
    path: str | None = None
    line: int | None = None

    def error(self, message: str) -> UserError:
        """An error that says which prompt is wrong."""
        if self.path is not None:
            return DataError(self.path, message, self.line)
        return UsageError(f"prompt {_shown(self.text)}: {message}")

    def encode(self, tokenizer: Tokenizer, longest: int | None) -> list[int]:
        """Its tokens as the beginning of a document: the end of the document before it, then the text.

        Args:
            tokenizer: The model's.
            longest: Most tokens allowed, the first included; None for any number.

        Raises:
            UserError: The tokenizer does not know a word, or there are too many tokens; names the prompt.
        """
        try:
            ids = [tokenizer.eos_id, *tokenizer.encode(self.text)]
        except DataError as error:
            raise self.error(f"the tokenizer {error}") from None
        if longest is not None and len(ids) > longest:
            raise self.error(
                f"is {len(ids):,} tokens long with the one that begins a document, more than the {longest:,} "
                "of the context that the model was trained with; --long_context (of memlm predict: "
                "--prompts.long_context true) lets it be longer"
            )
        return ids


def command_line_prompts(texts: list[str]) -> list[Prompt]:
    """Prompts given on the command line; an empty one stands for a document from its start."""
    prompts = [Prompt(text) for text in texts]
    for prompt in prompts:
        if not _is_text(prompt.text):
            raise UsageError(f"prompt {_shown(prompt.text)}: is not valid UTF-8")
    return prompts


def read_prompts(path: str | Path) -> list[Prompt]:
    """The prompts of a file: JSON lines (.jsonl, .ndjson, .json), else one prompt in each line of text.

    A line of JSON is an object with the string ``prompt``; its other fields are kept. Blank lines between
    objects are passed over. A line of text without its end is the prompt, and none may be blank.

    Raises:
        DataError: The file cannot be read, has no prompts or a malformed line; names the line.
    """
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise DataError(path, f"cannot be read: {error.strerror}") from error
    return parse_prompts(content, str(path), as_json=Path(path).suffix.lower() in _JSON)


def parse_prompts(content: bytes, path: str, as_json: bool) -> list[Prompt]:
    """The prompts of a file's content, see `read_prompts`.

    Args:
        content: Its bytes.
        path: Its name, for messages.
        as_json: Whether its lines are JSON.

    Raises:
        DataError: As `read_prompts`.
    """
    lines = content.split(b"\n")
    if not lines[-1]:
        lines.pop()  # what follows the last line's end
    prompts = []
    for number, line in enumerate(lines, 1):
        try:
            text = line.decode().removesuffix("\r")
        except UnicodeDecodeError as error:
            fault = f"is not valid UTF-8 ({error.reason} at byte {error.start} of the line)"
            raise DataError(path, fault, number) from None
        if not as_json:
            prompts.append(Prompt(text, {}, path, number))
        elif text.strip():
            prompts.append(_of_json(text, path, number))
        if prompts and not prompts[-1].text.strip():
            raise prompts[-1].error(
                'is an empty prompt; a document from its start is written for --prompt "" alone'
            )
    if not prompts:
        raise DataError(path, "holds no prompts; expected at least one line")
    return prompts


def _of_json(text: str, path: str, number: int) -> Prompt:
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        # Not str(error), whose "line 1" is that within the line.
        reason = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else error
        fault = f"is not valid JSON ({reason}); expected one JSON object on each line"
        raise DataError(path, fault, number) from None
    if not isinstance(record, dict):
        raise DataError(path, "expected an object with the string 'prompt'; this is no object", number)
    if not isinstance(record.get("prompt"), str):
        found = f"the fields {', '.join(map(repr, record)) or '(none)'}"
        if "prompt" in record:
            found = f"{json.dumps(record['prompt'])[:60]} as its prompt"
        raise DataError(path, f"expected an object with the string 'prompt'; this has {found}", number)
    if not _is_text(record["prompt"]):
        raise DataError(path, "'prompt' holds half a surrogate pair, which is no text", number)
    if clash := [name for name in WRITTEN_FIELDS if name in record]:
        raise DataError(path, f"has the field {clash[0]!r}, which is the answer's; rename it", number)
    fields = {name: value for name, value in record.items() if name != "prompt"}
    return Prompt(record["prompt"], fields, path, number)


def _is_text(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _shown(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")
