"""The sentence encoder of the examples: matches the published model, and pruning methods rank as expected."""

import sys
from pathlib import Path

import numpy as np
import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def minilm():
    """Imports the example, or skips if its packages are missing."""
    sys.path.insert(0, str(EXAMPLES))
    try:
        import minilm
        import minilm_model

        if lacking := minilm_model.missing():
            pytest.skip(f"MiniLM needs packages that are not installed: {'; '.join(lacking)}")
        yield minilm
    finally:
        sys.path.remove(str(EXAMPLES))


def test_it_gives_the_cosines_that_its_authors_publish(minilm):
    model, variables = minilm.minilm_model.MiniLM(), minilm.minilm_model.weights()
    y = np.asarray(minilm.minilm_model.encode(model, variables, minilm.EXAMPLES))
    published = [[1.0, 0.6660, 0.1046], [0.6660, 1.0, 0.1411], [0.1046, 0.1411, 1.0]]
    np.testing.assert_allclose(y @ y.T, published, atol=6e-5)


@pytest.mark.slow
def test_calibration_and_comparison_share_no_sentence(minilm):
    tokens = [{tuple(s) for b in minilm.minilm_model.shakespeare(64, held_out=h) for s in b} for h in (False, True)]
    assert len(tokens[0]) == len(tokens[1]) == 64 * len(minilm.minilm_model.TOKENS)
    assert not tokens[0] & tokens[1]


@pytest.mark.slow
def test_data_helps_to_prune(minilm, tmp_path, capsys):
    cosines = minilm.main(["--quick", "--out", str(tmp_path / "minilm.png")])
    at = {method: c["2:4"] for method, c in cosines.items()}
    assert at["magnitude"] < at["Wanda"] < at["SparseGPT"] < 1
    assert "Calibrated on" in capsys.readouterr().out
    assert (tmp_path / "minilm.png").stat().st_size > 10_000


@pytest.mark.slow
def test_a_recipe_gives_the_same_in_memory_and_by_the_command(minilm, tmp_path, capsys):
    import compress_minilm

    results = compress_minilm.main(["--quick", "--out", str(tmp_path / "picture.png")])
    before, after = results["float32"]["bytes"], results["NF4"]["bytes"]
    assert 6.9 < before / after < 32 / 4.5  # 4 bits and a scale of 32 for 64 weights; biases and norms stay
    assert results["NF4"]["command_bytes"] == pytest.approx(after, rel=0.02)
    assert 0.95 < results["NF4"]["cosine"] < 0.99
    assert results["NF4"]["command_cosine"] == pytest.approx(results["NF4"]["cosine"], abs=0.01)
    assert "NF4" in capsys.readouterr().out
    assert (tmp_path / "picture.png").stat().st_size > 10_000
