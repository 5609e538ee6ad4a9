"""The Python blocks of every page run, in order, and print what the page says they print."""

import warnings
from pathlib import Path

import pytest
from pages import blocks, execute

DOCS = Path(__file__).parents[2] / "docs"
PAGES = sorted(
    page.relative_to(DOCS)
    for page in DOCS.glob("**/*.md")
    if not {"_build", "reference"} & set(page.relative_to(DOCS).parts) and "```python" in page.read_text()
    if page.name != "ten_tasks.md"  # test_ten_tasks.py
)
FIRST = {Path("index.md"), Path("levels.md")}
"""What a newcomer reads first. The other pages are slow tests."""
SHORTER = {"steps=500": "steps=2"}
"""What would take long, and does not matter to whether the code runs."""


def run(page: Path) -> None:
    """Runs the blocks of a page in one namespace."""
    text, namespace = page.read_text(), {"__name__": "page"}
    for long, short in SHORTER.items():
        text = text.replace(long, short)
    for block in blocks(text):
        execute(block, namespace, str(page))


@pytest.mark.parametrize(
    "page", [pytest.param(page, id=str(page), marks=[pytest.mark.slow] if page not in FIRST else []) for page in PAGES]
)
def test_the_code_of_every_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(DOCS / page)
