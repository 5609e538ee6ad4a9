"""Every code block of the README runs, and its names and links exist."""

import inspect
import operator
import pathlib
import re
import warnings

ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.S | re.M)


def test_every_python_block_runs():
    namespace = {}
    code = blocks("python")
    assert len(code) >= 8
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for block in code:
            exec(compile(block, "README.md", "exec"), namespace)


def test_the_commands_are_those_that_ci_runs():
    """`.ci/run` reads the commands from the README and runs them verbatim."""
    commands = blocks("bash")
    assert len(commands) >= 2
    assert all(len(c.strip().splitlines()) == 1 for c in commands)
    assert "README.md" in (ROOT / ".ci" / "run").read_text()


def test_every_block_is_of_a_kind_that_is_run_or_shown():
    assert set(re.findall(r"^```(\w+)", README, re.M)) <= {"python", "bash", "text"}


def test_every_name_of_the_table_is_public():
    import jaxweights as jw

    table = README.split("## Techniques and levels")[1].split("## Ten formulas")[0]
    rows = "\n".join(line for line in table.splitlines() if line.startswith("| "))
    names = set(re.findall(r"`((?:\w+\.)?\w+)", rows)) - {"kernel_init"}
    assert len(names) > 30
    parts = [jw, *(part for name in jw.__all__ if inspect.ismodule(part := getattr(jw, name)))]
    missing = [name for name in names if not any(name.split(".")[0] in part.__all__ for part in parts)]
    assert not missing
    assert all(operator.attrgetter(name)(jw) for name in names if "." in name)


def test_every_link_and_picture_is_there():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("http") or (ROOT / target).exists(), target
