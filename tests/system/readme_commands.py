"""The commands of a Markdown file's bash blocks. Standard library only: .ci/run uses it before installing.

An HTML comment on the line above a block says how it is checked:

- ``<!-- ci: NAME -->``: installs something; ``.ci/run`` runs it, the README test does not.
- ``<!-- no-ci: REASON -->``: cannot run in a test; only its options are checked.

Blocks without one are run by the README test, verbatim and in their order.

    python3 tests/system/readme_commands.py README.md NAME

prints the commands of the block that ``.ci/run`` knows as NAME.
"""

import re
import shlex
import sys
from pathlib import Path
from typing import NamedTuple

_BLOCK = re.compile(
    r"^(?:<!-- *(?P<kind>ci|no-ci): *(?P<note>.*?) *-->\n)?```(?:bash|sh|console|shell)\n(?P<body>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)


class Block(NamedTuple):
    """One fenced block of shell commands.

    Attributes:
        line: 1-based line of the file on which its first command may stand.
        kind: ``ci``, ``no-ci`` or empty.
        note: What follows the kind in the comment: a name or a reason.
        commands: One a logical line; continued lines are kept as they are.
    """

    line: int
    kind: str
    note: str
    commands: list[str]


def find_blocks(markdown: str) -> list[Block]:
    """The shell blocks of a Markdown text, in their order."""
    return [
        Block(
            markdown.count("\n", 0, found.start("body")) + 1,
            found["kind"] or "",
            found["note"] or "",
            split_commands(found["body"]),
        )
        for found in _BLOCK.finditer(markdown)
    ]


def split_commands(body: str) -> list[str]:
    """Commands of a block: lines, joined where a quote or a backslash continues them; comments dropped.

    Raises:
        ValueError: A quote is left open at the end.
    """
    commands: list[str] = []
    pending = ""
    for line in body.splitlines():
        if not pending and (not line.strip() or line.lstrip().startswith("#")):
            continue
        pending += line
        if pending.endswith("\\"):
            pending += "\n"
            continue
        try:
            shlex.split(pending, comments=True)
        except ValueError:
            pending += "\n"
            continue
        commands.append(pending.strip())
        pending = ""
    if pending:
        raise ValueError(f"unfinished command: {pending.strip()}")
    return commands


def named_commands(markdown: str, name: str) -> list[str]:
    """The commands of the one block marked ``<!-- ci: name -->``.

    Raises:
        ValueError: There is no such block, or several.
    """
    found = [block for block in find_blocks(markdown) if (block.kind, block.note) == ("ci", name)]
    if len(found) != 1 or not found[0].commands:
        raise ValueError(f"expected one block of commands marked '<!-- ci: {name} -->', found {len(found)}")
    return found[0].commands


if __name__ == "__main__":
    print("\n".join(named_commands(Path(sys.argv[1]).read_text(encoding="utf-8"), sys.argv[2])))
