"""The Python blocks of every page run, in order, and print what the page says they print."""

import re
import sys
import warnings
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"
PAGES = sorted(
    page.relative_to(DOCS)
    for page in DOCS.glob("**/*.md")
    if not {"_build", "reference"} & set(page.relative_to(DOCS).parts) and "```python" in page.read_text()
)
FIRST = {Path("index.md"), Path("levels.md")}
"""What a newcomer reads first. The other pages are slow tests."""
SHORTER = {"steps=500": "steps=2"}
"""What would take long, and does not matter to whether the code runs."""
BLOCK = re.compile(r"^```python\n(.*?)^```", re.S | re.M)


def run(page: Path) -> dict:
    """Runs the blocks of a page in one namespace; `print(...)  # text` must print the text."""
    text, namespace = page.read_text(), {"__name__": "page"}
    for long, short in SHORTER.items():
        text = text.replace(long, short)
    for match in BLOCK.finditer(text):
        code = "\n" * (text[: match.start(1)].count("\n")) + match[1]  # so that errors have the line of the page
        lines = code.splitlines()

        def checked(*values, lines=lines):
            shown = " ".join(map(str, values))
            _, _, said = lines[sys._getframe(1).f_lineno - 1].partition(")  # ")
            assert not said or shown == said, f"{page}: printed {shown!r}, the page says {said!r}"

        namespace["print"] = checked
        exec(compile(code, page, "exec"), namespace)
    return namespace


@pytest.mark.parametrize(
    "page", [pytest.param(page, id=str(page), marks=[pytest.mark.slow] if page not in FIRST else []) for page in PAGES]
)
def test_the_code_of_every_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(DOCS / page)
