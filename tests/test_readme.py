"""The README runs, its names and links exist, it is short, and every figure shown is one of the committed results."""

import hashlib
import inspect
import json
import operator
import os
import re
import warnings
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
README, MEASUREMENTS = ROOT / "README.md", ROOT / "docs" / "measurements"
PAGES = [README, *sorted(MEASUREMENTS.glob("*.md"))]
"""Where figures are shown."""
TEXT = README.read_text()
REGION = re.compile(r"<!-- figures: \w+ -->.*?<!-- end of figures -->", re.S)


def blocks(language, text=TEXT):
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.S | re.M)


def name_of(page):
    return os.fspath(page.relative_to(ROOT))


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_every_python_block_runs(page, tmp_path, monkeypatch):
    code = blocks("python", (ROOT / page).read_text())
    assert code
    monkeypatch.chdir(tmp_path)  # a block writes a file
    namespace = {}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for block in code:
            exec(compile(block, page, "exec"), namespace)


def test_the_commands_are_those_that_ci_runs():
    """`.ci/run` reads the commands from the README and runs them verbatim."""
    main, test = blocks("bash")
    assert "examples/ten_techniques.py" in main and "pytest" in test
    assert all(len(c.strip().splitlines()) == 1 for c in (main, test))
    assert "README.md" in (ROOT / ".ci" / "run").read_text()


def test_every_block_is_of_a_kind_that_is_run_or_shown():
    assert set(re.findall(r"^```(\w+)", TEXT, re.M)) <= {"python", "bash", "sh", "text"}


def test_it_is_read_in_minutes():
    assert len(TEXT.splitlines()) <= 170
    assert len(re.sub(r"^\|.*", "", TEXT, flags=re.M).split()) <= 900  # words, but those of tables


def test_every_name_of_the_table_of_techniques_is_public():
    import jaxweights as jw

    table = TEXT.split("## Ten techniques")[1].split("## ")[0]
    _, _, *rows = re.findall(r"^\|.*", table, re.M)
    names = [re.findall(r"`([\w.]+)`", row) for row in rows]
    assert len(rows) == 10 and all(len(of) >= 2 for of in names)  # a function, and what works at the other levels
    assert all(operator.attrgetter(name)(jw) for of in names for name in of)
    assert all(inspect.isfunction(getattr(jw, of[0])) for of in names)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_link_and_picture_is_there(page):
    links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text())
    missing = [link for link in links if not link.startswith("http") and not (page.parent / link).exists()]
    assert links
    assert not missing


@pytest.fixture
def figures(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import figures

    return figures


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_table_of_figures_is_written_from_the_committed_results(page, figures):
    """If this fails: `python benchmarks/remake.py --render`, or name the parts to run them again."""
    text = page.read_text()
    assert figures.render(text) == text
    changed = REGION.sub(lambda region: re.sub(r"\d", "7", region[0]), text)
    assert figures.render(changed) == text


def test_every_table_of_figures_is_on_a_page(figures):
    shown = {name for page in PAGES for name in re.findall(r"<!-- figures: (\w+) -->", page.read_text())}
    assert shown == set(figures.REGIONS)


def test_a_region_without_results_names_the_benchmark(figures, monkeypatch, tmp_path):
    monkeypatch.setitem(figures.FILES, "low_bit", tmp_path / "low_bit.json")
    assert figures.written("low_bit") == "Not measured yet: `python benchmarks/low_bit.py`."


def cell(page, row, i):
    """The numbers in the i-th cell of the row of a table that starts so."""
    (line,) = (line for line in page.read_text().splitlines() if line.startswith(f"| {row}"))
    return [float(n.replace(",", "")) for n in re.findall(r"[\d.,]*\d(?:e-?\d+)?", line.split(" | ")[i])]


def test_a_figure_of_each_table_is_what_was_measured():
    read = lambda path: json.loads((ROOT / f"{path}.json").read_text())
    shown = lambda page, row, i: cell(MEASUREMENTS / f"{page}.md", row, i)
    cases = read("benchmarks/results/cpu")["results"]
    (projected,) = (r for r in cases if r["name"] == "decay, project: clip, mask" and r["against"] == "Adam")
    slower = pytest.approx([projected["ratio"]["median"]], abs=0.006)
    assert shown("speed", "Adam, decay, `project` of a clip and a mask", 2) == slower
    assert cell(README, "a step of Adam", 1) == slower
    spectral = read("benchmarks/results/spectral_norm")["errors"]
    assert shown("peers", "σ̂ after 20 updates", 2) == [pytest.approx(100 * spectral["Flax"][19], rel=0.05)]
    errors = pytest.approx([100 * spectral[peer][19] for peer in ("Flax", "torch")], rel=0.05)
    assert cell(README, "spectral norm: mean error", 2) == errors
    kept = read("benchmarks/results/norms")["results"]["layer norm, 16384 × 1024"]["stored"]
    assert shown("peers", "what layer norm keeps", 1) == [pytest.approx(kept["jaxweights"], abs=0.006)]
    cosines = read("examples/minilm")["results"]
    assert shown("sparsity", "Wanda |", 4) == [pytest.approx(cosines["Wanda"]["2:4"], abs=6e-4)]
    assert cell(README, "MiniLM-L6 pruned", 1) == [pytest.approx(cosines["SparseGPT + repair"]["2:4"], abs=6e-4)]
    seeds = read("examples/sparse_training")["results"]
    of_seeds = [100 * np.mean(seeds["RigL"]["98%"]), 100 * np.std(seeds["RigL"]["98%"])]
    assert shown("sparsity", "RigL", 3) == pytest.approx(of_seeds, abs=0.06)
    assert cell(README, "a CNN trained", 1) == pytest.approx(of_seeds[:1], abs=0.06)
    critics = read("examples/gan_fashion_mnist")["results"]
    assert shown("training", "`ConvSpectralNorm`", 3) == [
        pytest.approx(critics["ConvSpectralNorm"]["distance"], abs=0.06)
    ]
    (four,) = (
        r for r in read("benchmarks/results/quantization")["minilm"] if (r["format"], r["method"]) == ("4 bits", "GPTQ")
    )
    assert shown("quantization", "4 bits | 4.1", 6) == [pytest.approx(four["cosine"], abs=6e-5)]
    assert cell(README, "MiniLM-L6 in 4 bits", 1) == [
        pytest.approx(four["cosine"], abs=6e-4),
        pytest.approx(four["file"] / 1e6, abs=0.6),
    ]
    sorts = read("benchmarks/results/selection")["results"]
    (sort,) = (r for r in sorts if (r["size"], r["dtype"], r["other"]) == (10**8, "float32", "argsort"))
    assert cell(README, "the mask of the smallest", 1) == [pytest.approx(sort["speedup"]["median"], abs=6e-4)]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_no_figure_is_written_by_hand(page):
    """Outside the tables of figures and code, a number with a point or a percent sign is a setting or a version."""
    prose = REGION.sub("", page.read_text().split("## Versions")[0])
    prose = re.sub(r"```.*?```|`[^`]*`|\]\([^)]*\)", "", prose, flags=re.S)
    settings = {"3.11", "50%", "98%"}  # a version of Python, and sparsities
    assert set(re.findall(r"\d*\.\d+|\d+%|\d+ times", prose)) <= settings


PICTURES = sorted(
    path.relative_to(ROOT)
    for folder in ("examples", "benchmarks/results")
    for path in (ROOT / folder).glob("**/*.png")
    if not path.stem.endswith("-quick")
)


@pytest.mark.parametrize("picture", PICTURES, ids=str)
def test_every_picture_has_its_record(picture):
    """If this fails: `python benchmarks/remake.py PART` makes the picture and its record in one run."""
    record = json.loads((ROOT / picture).with_suffix(".json").read_text())
    script = record["command"].split()[1]
    assert record["command"].startswith("python ") and (ROOT / script).is_file()
    assert {"device", "python", "jaxweights", "jax", "flax", "optax"} <= set(record["environment"])
    assert record["picture_sha256"] == hashlib.sha256((ROOT / picture).read_bytes()).hexdigest()


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_picture_that_is_shown_is_recorded(page):
    shown = re.findall(r"!\[([^\]]*)\]\(([^)]+)\)", page.read_text())
    assert all(alt for alt, _ in shown)
    assert {Path(os.path.relpath(page.parent / target, ROOT)) for _, target in shown} <= set(PICTURES)
