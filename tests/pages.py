"""The Python blocks of a Markdown page: where they are, and how they are run."""

import re
import sys
from typing import NamedTuple

BLOCK = re.compile(r"^```python\n(.*?)^```", re.S | re.M)


class Block(NamedTuple):
    code: str
    line: int
    """How many lines of the page come before the code."""


def blocks(text):
    return [Block(match[1], text[: match.start(1)].count("\n")) for match in BLOCK.finditer(text)]


def execute(block, namespace, page):
    """Runs a block; `print(...)  # text` must print the text, and the other prints are dropped."""
    code = "\n" * block.line + block.code  # so that errors have the line of the page
    lines = code.splitlines()

    def checked(*values):
        shown = " ".join(map(str, values))
        _, _, said = lines[sys._getframe(1).f_lineno - 1].partition(")  # ")
        assert not said or shown == said, f"{page}: printed {shown!r}, the page says {said!r}"

    namespace["print"] = checked
    exec(compile(code, page, "exec"), namespace)
