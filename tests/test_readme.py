"""The code blocks of the README run, its names and links exist, and its figures are those of the committed results."""

import hashlib
import inspect
import json
import operator
import pathlib
import re
import warnings

import numpy as np
import pytest

ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.S | re.M)


def test_every_python_block_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # a block writes a file
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


REGION = re.compile(r"<!-- figures: \w+ -->.*?<!-- end of figures -->", re.S)


def test_every_table_of_figures_is_written_from_the_committed_results(monkeypatch):
    """If this fails: `python benchmarks/readme.py --render`, or name the parts to run them again."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import figures

    assert figures.render(README) == README
    changed = REGION.sub(lambda region: re.sub(r"\d", "7", region[0]), README)
    assert len(REGION.findall(README)) >= 5 and changed != README
    assert figures.render(changed) == README


def cell(row, i):
    """The numbers in the i-th cell of the row of a table that starts so."""
    (line,) = (line for line in README.splitlines() if line.startswith(f"| {row}"))
    return [float(n.replace(",", "")) for n in re.findall(r"[\d.,]*\d(?:e-?\d+)?", line.split(" | ")[i])]


def test_a_figure_of_each_table_is_what_was_measured():
    read = lambda path: json.loads((ROOT / f"{path}.json").read_text())
    cases = read("benchmarks/results/cpu")["results"]
    (projected,) = (r for r in cases if r["name"] == "decay, project: clip, mask" and r["against"] == "Adam")
    assert cell("Adam, decay, `project` of a clip and a mask", 2) == [
        pytest.approx(projected["ratio"]["median"], abs=0.006)
    ]
    spectral = read("benchmarks/results/spectral_norm")
    assert cell("σ̂ after 20 updates", 2) == [pytest.approx(100 * spectral["errors"]["Flax"][19], rel=0.05)]
    kept = read("benchmarks/results/norms")["results"]["layer norm, 16384 × 1024"]["stored"]
    assert cell("what layer norm keeps", 1) == [pytest.approx(kept["jaxweights"], abs=0.006)]
    cosines = read("examples/minilm")["results"]
    assert cell("Wanda |", 4) == [pytest.approx(cosines["Wanda"]["2:4"], abs=6e-4)]
    seeds = read("examples/sparse_training")["results"]["RigL"]["98%"]
    assert cell("RigL", 3) == pytest.approx([100 * np.mean(seeds), 100 * np.std(seeds)], abs=0.06)
    critics = read("examples/gan_fashion_mnist")["results"]
    assert cell("`ConvSpectralNorm`", 3) == [pytest.approx(critics["ConvSpectralNorm"]["distance"], abs=0.06)]


def test_no_figure_is_written_by_hand():
    """Outside the tables of figures and code, a number with a point or a percent sign is a setting or a version."""
    prose = REGION.sub("", README.split("## Versions")[0])
    prose = re.sub(r"```.*?```|`[^`]*`|\]\([^)]*\)", "", prose, flags=re.S)
    settings = {"60%"}  # what an example removes
    assert set(re.findall(r"\d*\.\d+|\d+%|\d+ times", prose)) <= settings


PICTURES = sorted(
    path.relative_to(ROOT)
    for folder in ("examples", "benchmarks/results")
    for path in (ROOT / folder).glob("**/*.png")
    if not path.stem.endswith("-quick")
)


@pytest.mark.parametrize("picture", PICTURES, ids=str)
def test_every_picture_has_its_record(picture):
    """If this fails: `python benchmarks/readme.py PART` makes the picture and its record in one run."""
    record = json.loads((ROOT / picture).with_suffix(".json").read_text())
    script = record["command"].split()[1]
    assert record["command"].startswith("python ") and (ROOT / script).is_file()
    assert {"device", "python", "jaxweights", "jax", "flax", "optax"} <= set(record["environment"])
    assert record["picture_sha256"] == hashlib.sha256((ROOT / picture).read_bytes()).hexdigest()


def test_every_picture_of_the_readme_is_recorded():
    shown = {pathlib.Path(target) for target in re.findall(r"\]\(([^)]+\.png)\)", README)}
    assert shown and shown <= set(PICTURES)
