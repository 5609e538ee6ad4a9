"""Recipes: what TOML means, which weights a glob takes, and what is done to a tree."""

import itertools
import random
import re
import tomllib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxweights as jw
from jaxweights.models.recipe import matches
from jaxweights.recipes import Recipe, Rule

TEXT = """
[[rules]]
weights = ["*embed*", "**/head"]
bits = 8

[[rules]]
weights = "*.1.*"
keep = true

[[rules]]
weights = "*"
prune = "2:4"
bits = 4
block = 8
symmetric = false
scale = "bfloat16"

[output]
to = "jaxweights"
"""


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def test_toml_is_the_same_as_python():
    recipe = Recipe(
        (
            Rule(("*embed*", "**/head"), bits=8),
            Rule("*.1.*", keep=True),
            Rule("*", prune=(2, 4), bits=4, block=8, symmetric=False, scale="bfloat16"),
        ),
        "jaxweights",
    )
    assert Recipe.parse(TEXT) == recipe


def test_toml_round_trip():
    keys = {"prune": [None, 0.25, (2, 4)], "block": [None, 64], "input": [None, -1, -2]}
    ways = [{"bits": 3}, {"bits": 4, "symmetric": False, "scale": "float16"}, {"format": "nf4"}, {"cluster": 17}]
    names = itertools.cycle(["*", 'a "quoted" \\ name', ("*.ä", "b\t*"), "layers.[0-9].*"])
    rules = [Rule("kept", keep=True)]
    for way, *values in itertools.product(ways, *keys.values()):
        rest = {key: value for key, value in zip(keys, values, strict=True) if value is not None}
        if "cluster" not in way or "block" not in rest:
            rules.append(Rule(next(names), **way, **rest))
    recipe = Recipe(tuple(rules), "gguf")
    assert len(tomllib.loads(recipe.toml())["rules"]) == len(rules) > 60
    assert Recipe.parse(recipe.toml()) == recipe
    for other in (Recipe(recipe.rules), Recipe(recipe.rules, entropy_coding=True)):
        assert Recipe.parse(other.toml()) == other


NAMES = ("kernel", "a.kernel", "a.b.kernel", "a/b/kernel", "a.kernel_1", "layers.10.w", "layers.2.w", "a+b", "x")
GLOBS = {  # what each means, as a regular expression on names with dots
    "*": r".*",
    "*kernel": r".*kernel",
    "**/kernel": r"(.*\.)?kernel",
    "a.**.kernel": r"a\.(.*\.)?kernel",
    "a/*": r"a\..*",
    "layers.?.w": r"layers\..\.w",
    "layers.[0-9].w": r"layers\.\d\.w",
    "layers.[!0-9]*": r"layers\.[^0-9].*",
    "a+b": r"a\+b",
    "kernel": r"kernel",
}


def test_globs():
    for glob, meaning in GLOBS.items():
        for name in NAMES:
            assert matches(glob, name) == bool(re.fullmatch(meaning, name.replace("/", "."))), (glob, name)


def test_a_tree_is_compressed_as_by_hand():
    params = {
        "embed": {"embedding": normal(16, 8)},
        "layers": [{"kernel": normal(8, 8, seed=i), "bias": normal(8, seed=i)} for i in range(2)],
        "head": normal(8, 4, seed=5),
        "step": jnp.arange(4).reshape(2, 2),
    }
    recipe = Recipe.parse(TEXT)
    with pytest.warns(jw.AxesWarning):  # "head" tells nothing of its axes
        small = jw.one_shot(params, recipe.methods(params))
    format = jw.formats.integers(4, block=8, symmetric=False, scale="bfloat16")

    @jax.jit
    def by_hand():
        kernel = params["layers"][0]["kernel"]
        pruned = jnp.where(jw.magnitude_mask(kernel, (2, 4)), kernel, 0)
        return [
            jw.quantize(params["embed"]["embedding"], 8),
            jw.quantize(params["head"], 8),
            jw.quantize(pruned, format),
        ]

    got = [small["embed"]["embedding"], small["head"], small["layers"][0]["kernel"]]
    for one, other in zip(got, by_hand(), strict=True):
        assert one.format == other.format
        assert jax.tree.all(jax.tree.map(np.array_equal, one, other))
    assert np.mean(got[2].todense() == 0) >= 0.5
    for path in (lambda t: t["layers"][1]["kernel"], lambda t: t["layers"][0]["bias"], lambda t: t["step"]):
        assert path(small) is path(params)


def test_scales_have_the_dtype_of_the_weight():
    for dtype in ("float32", "float16", "bfloat16"):
        params = {"kernel": normal(8, 4).astype(dtype)}
        assert jw.one_shot(params, Recipe((Rule("*", bits=4),)).methods(params))["kernel"].scale.codes.dtype == dtype


ERRORS = {
    "no toml": ("weights = ", "is no TOML"),
    "no rules": ("", "has no rules"),
    "rules no tables": ("rules = 3", "has no rules"),
    "unknown section": ("[[rules]]\nweights='*'\nbits=4\n[outputs]", "the unknown key 'outputs'"),
    "unknown key": ("[[rules]]\nweights='*'\nbit=4", "rule 1 (weights = '*') has the unknown key 'bit'"),
    "second rule": ("[[rules]]\nweights='*'\nbits=4\n[[rules]]\nbits=4", "rule 2 has no weights"),
    "bits 9": ("[[rules]]\nweights='*'\nbits=9", "rule 1 (weights = '*'): bits must be from 2 to 8, got 9"),
    "bits a text": ("[[rules]]\nweights='*'\nbits='4'", "bits must be an integer"),
    "bits a boolean": ("[[rules]]\nweights='*'\nbits=true", "bits must be an integer"),
    "two ways": ("[[rules]]\nweights='*'\nbits=4\nformat='nf4'", "bits and format are two ways"),
    "no way": ("[[rules]]\nweights='*'", "nothing is to be done"),
    "keep and more": ("[[rules]]\nweights='*'\nkeep=true\nprune=0.5", "keep leaves weights as they are"),
    "keep no boolean": ("[[rules]]\nweights='*'\nkeep='yes'", "keep must be true or false"),
    "block alone": ("[[rules]]\nweights='*'\nprune=0.5\nblock=8", "block is of bits or format"),
    "symmetric alone": ("[[rules]]\nweights='*'\nformat='nf4'\nsymmetric=false", "symmetric is of bits"),
    "prune 1": ("[[rules]]\nweights='*'\nprune=1", "prune must be in [0, 1)"),
    "prune 50": ("[[rules]]\nweights='*'\nprune=50", "prune must be in [0, 1), got 50: write 0.5 for 50%"),
    "prune text": ("[[rules]]\nweights='*'\nprune='half'", "n:m such as 2:4"),
    "prune 4:2": ("[[rules]]\nweights='*'\nprune='4:2'", "prune: "),
    "format": ("[[rules]]\nweights='*'\nformat='int9'", "format must be"),
    "no zero": ("[[rules]]\nweights='*'\nformat='binary'\nprune=0.5", "'binary' has no 0"),
    "cluster 257": ("[[rules]]\nweights='*'\ncluster=257", "cluster must be from 1 to 256"),
    "input": ("[[rules]]\nweights='*'\nbits=4\ninput=0", "input must be -1 or -2"),
    "scale": ("[[rules]]\nweights='*'\nbits=4\nscale='int8'", "scale must be one of"),
    "empty glob": ("[[rules]]\nweights=''\nbits=4", "weights must be a glob"),
    "glob a number": ("[[rules]]\nweights=[3]\nbits=4", "weights must be a glob"),
    "coding": ("[[rules]]\nweights='*'\nbits=4\n[output]\nentropy_coding=3", "[output]: entropy_coding must be true"),
    "deep": ("rules = " + 10_000 * "[", "the recipe is nested too deeply"),
    "deep keys": ("[output]\nto" + 10_000 * ".a" + " = 1\n[[rules]]\nweights='*'\nbits=4", "nested too deeply"),
    "to": ("[[rules]]\nweights='*'\nbits=4\n[output]\nto=3", "to in [output] must be a string"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_name_the_rule_and_the_key(case):
    text, message = ERRORS[case]
    with pytest.raises(ValueError, match=re.escape(message)):
        Recipe.parse(text)


VALUES = ("-1", "0", "1", "2", "8", "9", "64", "256", "1e999", "nan", "0.5", "true", "9" * 99, "1979-05-27")
VALUES += ("'2:4'", "'4:2'", "'x'", "''", "'*'", "'int4'", "'nf4'", "'float16'", "'jaxweights'", "'gguf'")
VALUES += ("[]", "['*']", "[[1]]", "{}", "{a = 1}")
KEYS = ("weights", "keep", "prune", "bits", "format", "block", "symmetric", "scale", "cluster", "input", "to", "x")


def test_damaged_recipes_are_refused_or_can_be_kept():
    """Only a ValueError, which is what the command expects; and what is accepted is the same once written and read."""
    rng, accepted = random.Random(0), 0
    for _ in range(20_000):
        lines = TEXT.splitlines()
        for _ in range(rng.randint(1, 3)):
            i = rng.randrange(len(lines))
            key, line = lines[i].partition(" = ")[0], lines[i]
            lines[i] = rng.choice(
                (
                    f"{key} = {rng.choice(VALUES)}",
                    f"{rng.choice(KEYS)} = {rng.choice(VALUES)}",
                    f"{line}\n{rng.choice(KEYS)} = {rng.choice(VALUES)}",
                    "".join(rng.sample(line, len(line))),
                    "[[rules]]",
                    "",
                )
            )
        try:
            recipe = Recipe.parse("\n".join(lines))
        except ValueError:
            continue
        accepted += 1
        assert Recipe.parse(recipe.toml()) == recipe
    assert accepted > 500


def test_errors_name_the_file(tmp_path):
    (tmp_path / "mine.toml").write_text("[[rules]]\nweights='*'\nbits=1\n")
    with pytest.raises(ValueError, match=r"mine.toml: rule 1 .*bits must be from 2 to 8"):
        Recipe.load(tmp_path / "mine.toml")


def test_the_name_of_integers_is_their_bits():
    assert Rule("*", format="int4", block=32) == Rule("*", bits=4, block=32)
    with pytest.raises(ValueError, match="bits and format are two ways"):
        Rule("*", format="int4", bits=4)


def test_a_glob_that_matches_nothing_is_an_error():
    with pytest.raises(ValueError, match=r"rule 2: weights = 'decoder\*' matches nothing. The names are: kernel"):
        Recipe((Rule("*", bits=4), Rule("decoder*", bits=8))).methods({"kernel": normal(4, 4)})
