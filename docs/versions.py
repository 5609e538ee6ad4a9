"""The versions that pyproject.toml allows, as Markdown."""

import re
import tomllib
from pathlib import Path

PROJECT = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]


def table() -> str:
    needs = [f"python{PROJECT['requires-python']}", *PROJECT["dependencies"]]
    rows = [re.fullmatch(r"([\w-]+)>=(.+)", need).groups() for need in needs]
    lines = "\n".join(f"| {name} | {lowest} |" for name, lowest in rows)
    return f"jaxweights {PROJECT['version']} needs:\n\n| package | at least |\n| --- | --- |\n{lines}"
