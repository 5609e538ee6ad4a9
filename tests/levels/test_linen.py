"""The Linen level: names, state, and every kind of module content."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxweights as jw
from jaxweights.levels.paths import STATE, entries

X = jax.random.normal(jax.random.key(1), (4, 6))
LOOSENED = jw.ClipWeights(lambda step: 0.1 + 0.1 * step)  # has state and compiles fast


def init(model, x=X):
    return jax.jit(model.init)(jax.random.key(0), x)


def sigma(w):
    return np.linalg.norm(np.asarray(w, np.float64), 2)


class Mlp(nn.Module):
    """Dropout, batch norm and sow between two dense layers."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Dense(8, name="first")(x)
        x = nn.BatchNorm(use_running_average=not train)(x)
        self.sow("intermediates", "hidden", x)
        x = nn.Dropout(0.5, deterministic=not train)(nn.relu(x))
        return nn.Dense(3, name="last")(x)

    def hidden(self, x):
        return self.variables["params"]["first"]["kernel"].sum() + x.sum()


def test_parameter_names_are_those_of_the_module():
    shapes = lambda model: jax.eval_shape(model.init, jax.random.key(0), X)
    plain, wrapped = shapes(Mlp()), shapes(jw.linen.Transformed(Mlp(), jw.SpectralNorm()))
    names = lambda tree: sorted("/".join(p) for p in flat(tree))
    assert names(plain["params"]) == names(wrapped["params"])
    assert names(plain["batch_stats"]) == names(wrapped["batch_stats"])
    assert set(wrapped) == {"params", "batch_stats", STATE}


def flat(tree):
    from flax.traverse_util import flatten_dict

    return flatten_dict(tree)


def test_plain_parameters_are_used_as_they_are():
    plain = nn.Dense(3)
    params = init(plain)["params"]
    y = jw.linen.Transformed(plain, jw.ClipWeights(0.1)).apply({"params": params}, X)
    expected = np.asarray(X) @ np.clip(np.asarray(params["kernel"]), -0.1, 0.1) + np.asarray(params["bias"])
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6)


def test_state_moves_only_when_its_collection_is_mutable():
    model = jw.linen.Transformed(nn.Dense(3), LOOSENED)
    variables = init(model)
    before = jax.tree.map(np.asarray, variables)
    model.apply(variables, X)
    _, moved = model.apply(variables, X, mutable=[STATE])
    assert set(moved) == {STATE}
    assert moved[STATE]["kernel"]["step"] == before[STATE]["kernel"]["step"] + 1
    jax.tree.map(np.testing.assert_array_equal, variables, before)  # apply does not modify its input


def test_evaluation_uses_the_stored_state():
    model = jw.linen.Transformed(nn.Dense(3, use_bias=False), jw.SpectralNorm())
    variables = model.init(jax.random.key(0), X)
    move = jax.jit(lambda v: model.apply(v, X, mutable=[STATE])[1])
    for _ in range(30):
        moved = move(variables)
        variables = {**variables, **moved}
    y = model.apply(variables, jnp.eye(6))
    assert sigma(y) == pytest.approx(1, abs=1e-5)


def test_weight_norm_preserves_the_function_and_trains_its_scale():
    plain = Mlp()
    model = jw.linen.Transformed(Mlp(), jw.WeightNorm())
    variables = init(model)
    names = {n: v for n, v in variables["params"].items() if n != STATE}
    y, expected = jax.jit(lambda v, p: (model.apply(v, X), plain.apply({**v, "params": p}, X)))(variables, names)
    np.testing.assert_allclose(y, expected, rtol=1e-6, atol=1e-6)
    grads = jax.jit(jax.grad(lambda p: model.apply({**variables, "params": p}, X).sum()))(variables["params"])
    assert np.abs(grads[STATE]["last"]["kernel"]["scale"]).min() > 0
    # ∂/∂g = ∂/∂w · w/‖w‖, and ∂/∂v is orthogonal to v (Salimans and Kingma, equation 3).
    kernel, g = variables["params"]["last"]["kernel"], grads["last"]["kernel"]
    np.testing.assert_allclose((kernel * g).sum(0), 0, atol=1e-5)


def test_dropout_batch_norm_and_sow_work_inside():
    model = jw.linen.Transformed(Mlp(), LOOSENED)
    variables = init(model)
    train = dict(train=True, rngs={"dropout": jax.random.key(2)})
    run = jax.jit(lambda v: model.apply(v, X, mutable=[STATE, "batch_stats", "intermediates"], **train))
    variables[STATE] = run(variables)[1][STATE]  # from here on, each step changes the limit
    y, moved = run(variables)
    assert set(moved) == {STATE, "batch_stats", "intermediates"}
    assert len(moved["intermediates"]["hidden"]) == 1
    stats = moved["batch_stats"]["BatchNorm_0"]
    assert not np.allclose(stats["mean"], variables["batch_stats"]["BatchNorm_0"]["mean"])
    # The plain module with manually transformed weights gives the same values.
    lifted = jw.on_tree(LOOSENED)

    @jax.jit
    def plain(params, state, stats):
        params = lifted.apply(params, jw.TreeState({}, entries(state)))
        return Mlp().apply({"params": params, "batch_stats": stats}, X, mutable=["batch_stats"], **train)

    by_hand, stats_by_hand = plain(variables["params"], moved[STATE], variables["batch_stats"])
    np.testing.assert_allclose(y, by_hand, rtol=1e-6)
    jax.tree.map(np.testing.assert_allclose, moved["batch_stats"], stats_by_hand["batch_stats"])


def test_fold_gives_the_variables_of_the_plain_module():
    model = jw.linen.Transformed(Mlp(), jw.Chain(LOOSENED, jw.WeightNorm()))
    variables = model.init(jax.random.key(0), X)
    plain = jw.linen.fold(model, variables)
    assert jax.tree.structure(plain) == jax.tree.structure(jax.eval_shape(Mlp().init, jax.random.key(0), X))
    np.testing.assert_allclose(Mlp().apply(plain, X), model.apply(variables, X), rtol=1e-6)


def test_store_keeps_the_weights_of_training_in_few_bits():
    model = jw.linen.Transformed(Mlp(), jw.Chain(LOOSENED, jw.FakeQuantize("int4", decay=0.9)))
    variables = model.init(jax.random.key(0), X)
    grown = variables | {"params": jax.tree.map(lambda w: 1.5 * w, variables["params"])}
    _, moved = model.apply(grown, X, mutable=True)
    stored, folded = jw.linen.store(model, moved), jw.linen.fold(model, moved)
    assert str(stored["params"]["first"]["kernel"].format) == "int4"
    jax.tree.map(np.testing.assert_array_equal, jw.densify(stored), folded)
    y = jax.jit(jw.with_stored(Mlp().apply))(stored, X)
    np.testing.assert_allclose(y, model.apply(moved, X), rtol=1e-5, atol=1e-6)


def test_other_methods_see_transformed_weights():
    model = jw.linen.Transformed(Mlp(), jw.ClipWeights(0.0))
    variables = init(model)
    assert model.apply(variables, X, method="hidden") == pytest.approx(float(X.sum()), rel=1e-5)


class Scanned(nn.Module):
    """A stack of three layers with rematerialization."""

    @nn.compact
    def __call__(self, x):
        body = nn.remat(nn.Dense)
        stack = nn.scan(
            lambda layer, carry, _: (layer(carry), None),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=3,
        )
        return stack(body(6, name="layers"), x, None)[0]


@pytest.mark.filterwarnings("ignore::jaxweights.StaleStateWarning")  # a gradient that nothing is trained with
def test_a_scanned_stack_is_normalised_layer_by_layer():
    model = jw.linen.Transformed(Scanned(), jw.SpectralNorm(n_steps=30))
    variables = init(model)
    new = jax.jit(jw.on_tree(jw.SpectralNorm()).apply)(variables["params"], jw.TreeState({}, entries(variables[STATE])))
    (kernel,) = (v for p, v in flat(new).items() if p[-1] == "kernel")
    assert kernel.shape == (3, 6, 6)
    for layer in kernel:
        assert sigma(layer) == pytest.approx(1, abs=1e-2)
    run = lambda params: model.apply({**variables, "params": params}, X)
    y, grads = jax.jit(lambda params: (run(params), jax.grad(lambda p: run(p).sum())(params)))(variables["params"])
    np.testing.assert_allclose(y, jax.jit(Scanned().apply)({"params": new}, X), rtol=1e-6, atol=1e-6)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))


def test_a_wrapper_inside_scan_keeps_its_state_per_layer():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            layer = jw.linen.Transformed(nn.Dense(6), jw.SpectralNorm())
            stack = nn.scan(
                lambda m, carry, _: (m(carry), None),
                variable_axes={"params": 0, STATE: 0},
                split_rngs={"params": True},
                length=3,
            )
            return stack(layer, x, None)[0]

    variables = init(Model())
    leaves = jax.tree.leaves(variables[STATE])
    assert {a.shape for a in leaves} == {(3, 6), (3, 4, 6)}  # v, basis
    y, moved = jax.jit(lambda v: Model().apply(v, X, mutable=[STATE]))(variables)
    assert y.shape == X.shape and set(moved) == {STATE}


def test_a_shared_submodule_is_transformed_once_and_used_twice():
    class Twice(nn.Module):
        @nn.compact
        def __call__(self, x):
            dense = nn.Dense(6, use_bias=False)
            return dense(dense(x))

    model = jw.linen.Transformed(Twice(), jw.ClipWeights(0.1))
    variables = init(model)
    kernel = np.clip(np.asarray(variables["params"]["Dense_0"]["kernel"]), -0.1, 0.1)
    np.testing.assert_allclose(model.apply(variables, X), np.asarray(X) @ kernel @ kernel, rtol=1e-4, atol=1e-6)


def test_a_wrapped_layer_inside_a_larger_model():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Dense(6)(x)
            x = jw.linen.Transformed(nn.Dense(6, name="spectral"), LOOSENED)(x)
            return jw.linen.Transformed(nn.Dense(2), jw.ClipWeights(0.1))(x)

    variables = init(Model())
    assert {"Dense_0", "spectral"} <= set(variables["params"])
    assert all(set(v) == {"kernel", "bias"} for v in variables["params"].values())
    y, moved = jax.jit(lambda v: Model().apply(v, X, mutable=[STATE]))(variables)
    assert y.shape == (4, 2) and jax.tree.leaves(moved)


def test_a_weight_that_is_not_reached_is_an_error(monkeypatch):
    """Weights are swapped by identity: if Flax copied them, none would be transformed."""
    original = nn.map_variables

    def copying(fn, collections, trans_in_fn=lambda scope: scope, **options):
        copied = lambda scope: trans_in_fn(jax.tree.map(jnp.copy, scope))
        return original(fn, collections, trans_in_fn=copied, **options)

    monkeypatch.setattr(nn, "map_variables", copying)
    with pytest.raises(ValueError, match=r"did not reach the weights \['kernel'\]"):
        init(jw.linen.Transformed(nn.Dense(3), jw.ClipWeights(0.1)))


def test_rules_choose_by_path():
    model = jw.linen.Transformed(Mlp(), {"first/kernel": jw.ClipWeights(0.0), "last/kernel": jw.ClipWeights(0.1)})
    variables = init(model)
    new = model.bind(variables)
    assert new is not None
    y = model.apply(variables, X)
    last = np.clip(np.asarray(variables["params"]["last"]["kernel"]), -0.1, 0.1)
    hidden = np.maximum(np.asarray(variables["params"]["first"]["bias"]), 0)
    np.testing.assert_allclose(y, np.tile(hidden @ last, (4, 1)), atol=1e-6)


def test_it_trains_in_a_jitted_step_that_compiles_once():
    model = jw.linen.Transformed(nn.Dense(3), jw.Chain(LOOSENED, jw.WeightNorm()))
    variables = init(model)
    params, state = variables["params"], {STATE: variables[STATE]}
    tx = optax.adam(1e-2)
    opt = tx.init(params)
    traces = []

    @jax.jit
    def step(params, state, opt):
        traces.append(1)

        def loss(p):
            y, moved = model.apply({"params": p, **state}, X, mutable=[STATE])
            return (y**2).mean(), moved

        (value, moved), grads = jax.value_and_grad(loss, has_aux=True)(params)
        updates, opt = tx.update(grads, opt, params)
        return optax.apply_updates(params, updates), moved, opt, value

    losses = []
    for _ in range(20):
        params, state, opt, value = step(params, state, opt)
        losses.append(float(value))
    assert len(traces) == 1
    assert losses[-1] < losses[0]


def test_masked_and_merged_batch_norm_equals_one_big_batch():
    x = np.random.default_rng(0).normal(3, 2, (8, 5)).astype(np.float32)
    mask = np.arange(8)[:, None] < np.array([8, 8, 8, 8, 8])[None] - 3
    model = jw.linen.BatchNorm(use_running_average=False, momentum=0.5)
    variables = init(model, x)
    run = jax.jit(lambda v, mask: model.apply(v, x, mask=mask, mutable=["batch_stats"]))
    y, moved = run(variables, mask)
    kept = x[:5].astype(np.float64)
    np.testing.assert_allclose(moved["batch_stats"]["mean"], 0.5 * kept.mean(0), rtol=1e-5)
    np.testing.assert_allclose(moved["batch_stats"]["var"], 0.5 + 0.5 * kept.var(0), rtol=1e-5)
    np.testing.assert_allclose(y, (x - kept.mean(0)) / np.sqrt(kept.var(0) + 1e-5), rtol=1e-4, atol=1e-5)
    _, same = run(variables, np.zeros(mask.shape, bool))
    jax.tree.map(np.testing.assert_array_equal, same["batch_stats"], variables["batch_stats"])


@pytest.mark.parametrize("ours, flaxs", [(jw.linen.BatchNorm, nn.BatchNorm), (jw.linen.LayerNorm, nn.LayerNorm)])
def test_norms_have_the_names_and_numbers_of_flax(ours, flaxs):
    kwargs = {"use_running_average": False} if flaxs is nn.BatchNorm else {}
    variables = init(flaxs(**kwargs))
    assert jax.tree.structure(init(ours(**kwargs))) == jax.tree.structure(variables)
    variables["params"] = jax.tree.map(lambda p: p + 0.5, variables["params"])
    run = lambda v: [norm(**kwargs).apply(v, X, mutable=["batch_stats"]) for norm in (ours, flaxs)]
    (y, moved), (y_flax, moved_flax) = jax.jit(run)(variables)
    np.testing.assert_allclose(y, y_flax, rtol=1e-4, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), moved, moved_flax)
