"""The NNX level: class and names are kept, train/eval controls the state, every kind of module content."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxweights as jw
from jaxweights.levels.paths import STATE

pytestmark = pytest.mark.filterwarnings("ignore:Using 'Module.sow:DeprecationWarning")  # old Flax lacks capture
X = jax.random.normal(jax.random.key(1), (4, 6))
LOOSENED = jw.ClipWeights(lambda step: 0.1 + 0.1 * step)  # has state and compiles fast


def sigma(w):
    return np.linalg.norm(np.asarray(w, np.float64), 2)


class Mlp(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(6, 8, rngs=rngs)
        self.bn = nnx.BatchNorm(8, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.last = nnx.Linear(8, 3, rngs=rngs)
        self.calls = 0

    def __call__(self, x):
        self.calls += 1
        x = self.bn(self.first(x))
        self.sow(nnx.Intermediate, "hidden", x)
        return self.last(self.dropout(nnx.relu(x)))

    def project(self, x):
        return x @ self.first.kernel[...]


def names(module, *filters):
    return sorted("/".join(map(str, p)) for p, _ in nnx.to_flat_state(nnx.state(module, *filters)))


def make(transform, where=None, seed=0):
    return jw.nnx.transformed(Mlp(nnx.Rngs(seed)), transform, where, rngs=nnx.Rngs(1))


def test_class_attributes_and_parameter_names_stay():
    plain = Mlp(nnx.Rngs(0))
    model = jw.nnx.transformed(plain, LOOSENED, rngs=nnx.Rngs(1))
    assert isinstance(model, Mlp)
    assert names(model, nnx.Param) == names(plain, nnx.Param)
    assert model.first.kernel is plain.first.kernel  # the variables are shared


def test_stored_parameters_are_never_overwritten():
    model = make(jw.ClipWeights(0.1))
    before = jax.tree.map(np.asarray, nnx.state(model, nnx.Param))
    model.eval()
    y = model(X)
    jax.tree.map(np.testing.assert_array_equal, nnx.state(model, nnx.Param), before)
    plain = Mlp(nnx.Rngs(0))
    for layer in (plain.first, plain.last):
        layer.kernel[...] = jnp.clip(layer.kernel[...], -0.1, 0.1)
    plain.eval()
    np.testing.assert_allclose(y, plain(X), rtol=1e-6)


def test_train_and_eval_decide_whether_the_state_moves():
    model = make(LOOSENED)
    read = lambda: jax.tree.map(np.asarray, nnx.state(model, jw.nnx.TransformVariable))
    before = read()
    model.eval()
    model(X)
    jax.tree.map(np.testing.assert_array_equal, read(), before)
    model.train()
    model(X)
    assert any(not np.array_equal(a, b) for a, b in zip(jax.tree.leaves(read()), jax.tree.leaves(before), strict=True))


def test_dropout_batch_norm_sow_and_attributes_belong_to_the_model():
    model = make(jw.ClipWeights(1.0))
    mean, key_count = model.bn.mean[...], model.dropout.rngs.count[...]
    model(X)
    model(X)
    assert model.calls == 2
    assert not np.allclose(model.bn.mean[...], mean)
    assert model.dropout.rngs.count[...] == key_count + 2
    assert len(jax.tree.leaves(nnx.state(model, nnx.Intermediate))) == 2


@pytest.mark.skipif(not hasattr(nnx, "capture"), reason="this Flax has no nnx.capture")
def test_capture_collects_intermediates():
    model = make(jw.ClipWeights(1.0))
    _, sown = nnx.capture(model, nnx.Intermediate)(X)
    assert jax.tree.leaves(sown)[0].shape == (4, 8)


def test_other_methods_see_transformed_weights():
    model = make(jw.ClipWeights(0.1))
    expected = np.asarray(X) @ np.clip(np.asarray(model.first.kernel[...]), -0.1, 0.1)
    np.testing.assert_allclose(model.project(X), expected, rtol=1e-5, atol=1e-6)


def test_weight_norm_trains_its_scale_like_linen():
    import flax.linen as nn

    linen = jw.linen.Transformed(nn.Dense(3), jw.WeightNorm())
    variables = jax.jit(linen.init)(jax.random.key(0), X)
    model = jw.nnx.transformed(nnx.Linear(6, 3, rngs=nnx.Rngs(0)), jw.WeightNorm())
    model.kernel[...] = variables["params"]["kernel"]
    model.weight_transform.learned["kernel"]["scale"][...] = variables["params"][STATE]["kernel"]["scale"]

    params, tx = variables["params"], optax.adam(1e-1)
    opt_state, opt = tx.init(params), nnx.Optimizer(model, tx, wrt=nnx.Param)

    @jax.jit
    def linen_step(params, opt_state):
        grads = jax.grad(lambda p: ((linen.apply({"params": p}, X) - 1) ** 2).mean())(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    @nnx.jit
    def nnx_step(model, opt):
        opt.update(model, nnx.grad(lambda m: ((m(X) - 1) ** 2).mean())(model))

    for _ in range(10):
        params, opt_state = linen_step(params, opt_state)
        nnx_step(model, opt)
    np.testing.assert_allclose(model.kernel[...], params["kernel"], rtol=1e-5)
    scale = model.weight_transform.learned["kernel"]["scale"][...]
    np.testing.assert_allclose(scale, params[STATE]["kernel"]["scale"], rtol=1e-5)
    assert not np.allclose(scale, variables["params"][STATE]["kernel"]["scale"])


def test_a_jitted_step_compiles_once_and_follows():
    layers = nnx.Sequential(nnx.Linear(6, 8, rngs=nnx.Rngs(0)), nnx.BatchNorm(8, rngs=nnx.Rngs(0)))
    model = jw.nnx.transformed(layers, jw.Chain(LOOSENED, jw.WeightNorm()), rngs=nnx.Rngs(1))
    opt = nnx.Optimizer(model, optax.adam(1e-3), wrt=nnx.Param)
    traces = []

    @nnx.jit
    def step(model, opt):
        traces.append(1)
        grads = nnx.grad(lambda m: (m(X) ** 2).mean())(model)
        opt.update(model, grads)

    for _ in range(5):
        step(model, opt)
    assert len(traces) == 1
    eye = jw.nnx.transformed(nnx.Linear(6, 8, use_bias=False, rngs=nnx.Rngs(0)), jw.SpectralNorm(n_steps=30))
    assert sigma(eye(jnp.eye(6))) == pytest.approx(1, abs=1e-4)


def test_equal_modules_trace_once():
    build = lambda: jw.nnx.transformed(nnx.Linear(6, 3, rngs=nnx.Rngs(0)), LOOSENED, rngs=nnx.Rngs(0))
    assert type(build()) is type(build())
    traces = []

    @nnx.jit
    def call(model, x):
        traces.append(1)
        return model(x)

    call(build(), X)
    call(build(), X)
    assert len(traces) == 1


@pytest.mark.filterwarnings("ignore::jaxweights.StaleStateWarning")  # a gradient that nothing is trained with
def test_closed_over_in_vmap_and_scan_and_remat():
    model = jw.nnx.transformed(nnx.Linear(6, 6, rngs=nnx.Rngs(0)), jw.SpectralNorm(), rngs=nnx.Rngs(0))
    model.eval()
    np.testing.assert_allclose(jax.vmap(model)(X), model(X), rtol=1e-5, atol=1e-6)
    twice, _ = jax.lax.scan(lambda x, _: (model(x), None), X, None, length=2)
    np.testing.assert_allclose(twice, model(model(X)), rtol=1e-5, atol=1e-6)
    grad = lambda f: nnx.grad(lambda m: f(m, X).sum())(model).kernel[...]
    np.testing.assert_allclose(grad(nnx.remat(lambda m, x: m(x))), grad(lambda m, x: m(x)), rtol=1e-6)


def test_a_scanned_stack_is_normalised_layer_by_layer():
    @nnx.split_rngs(splits=3)
    @nnx.vmap(in_axes=0, out_axes=0)
    def layers(rngs):
        return nnx.Linear(6, 6, rngs=rngs)

    class Stack(nnx.Module):
        def __init__(self, rngs):
            self.layers = layers(rngs)

        def __call__(self, x):
            return nnx.scan(lambda x, layer: layer(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, self.layers)

    model = jw.nnx.transformed(Stack(nnx.Rngs(0)), jw.SpectralNorm(n_steps=100), rngs=nnx.Rngs(0))
    assert model.weight_transform.fixed["layers"]["kernel"]["v"].shape == (3, 6)
    y = X
    for w in model.layers.kernel[...]:
        y = np.asarray(y) @ (np.asarray(w) / sigma(w))
    np.testing.assert_allclose(nnx.jit(lambda m, x: m(x))(model, X), y, rtol=1e-3, atol=1e-5)


def test_shared_variables_are_transformed_once():
    class Tied(nnx.Module):
        def __init__(self, rngs):
            self.a = nnx.Linear(6, 6, use_bias=False, rngs=rngs)
            self.b = self.a

        def __call__(self, x):
            return self.b(self.a(x))

    model = jw.nnx.transformed(Tied(nnx.Rngs(0)), jw.ClipWeights(0.1))
    w = np.clip(np.asarray(model.a.kernel[...]), -0.1, 0.1)
    np.testing.assert_allclose(model(X), np.asarray(X) @ w @ w, rtol=1e-4, atol=1e-6)


@pytest.fixture
def larger():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.first = nnx.Linear(6, 6, rngs=rngs)
            self.loosened = jw.nnx.transformed(nnx.Linear(6, 2, rngs=rngs), LOOSENED, rngs=rngs)

        def __call__(self, x):
            return self.loosened(self.first(x))

    return Model(nnx.Rngs(0))


def test_a_wrapped_layer_inside_a_larger_model(larger):
    larger.eval()
    assert larger.loosened.weight_transform.deterministic
    larger.train()
    assert not larger.loosened.weight_transform.deterministic
    assert nnx.jit(lambda m, x: m(x))(larger, X).shape == (4, 2)


@pytest.mark.skipif(not hasattr(nnx, "view"), reason="this Flax has no nnx.view")
def test_a_view_sets_the_mode(larger):
    assert nnx.view(larger, deterministic=True).loosened.weight_transform.deterministic
    assert not larger.loosened.weight_transform.deterministic


def test_fold_gives_the_plain_module():
    model = make(jw.Chain(LOOSENED, jw.WeightNorm()))
    model.eval()
    plain = jw.nnx.fold(model)
    assert type(plain) is Mlp and names(plain, nnx.Param) == names(Mlp(nnx.Rngs(0)), nnx.Param)
    np.testing.assert_allclose(plain(X), model(X), rtol=1e-6)
    plain.first.bias[...] += 1.0
    assert not np.array_equal(plain.first.bias[...], model.first.bias[...])


def test_store_keeps_the_weights_of_training_in_few_bits():
    model = make(jw.Chain(LOOSENED, jw.FakeQuantize("int4", decay=0.9)))
    model(X)
    model.eval()
    graph, stored = nnx.split(jw.nnx.store(model))
    assert str(nnx.to_pure_dict(stored)["first"]["kernel"].format) == "int4"
    assert "int4" in str(stored) and "QuantizedArray" in str(nnx.merge(graph, stored))
    folded = nnx.state(jw.nnx.fold(model), nnx.Param)
    jax.tree.map(np.testing.assert_array_equal, jw.densify(nnx.filter_state(stored, nnx.Param)), folded)
    y = jax.jit(jw.with_stored(lambda state, x: nnx.merge(graph, state)(x)))(stored, X)
    np.testing.assert_allclose(y, model(X), rtol=1e-5, atol=1e-6)


def test_split_merge_and_clone_keep_the_transform():
    model = make(jw.ClipWeights(0.1))
    model.eval()
    graphdef, state = nnx.split(model)
    np.testing.assert_array_equal(nnx.merge(graphdef, state)(X), model(X))
    np.testing.assert_array_equal(nnx.clone(model)(X), model(X))


def test_a_module_without_pytree_is_fine():
    class Old(nnx.Module, pytree=False):
        def __init__(self, rngs):
            self.layers = [nnx.Linear(6, 6, use_bias=False, rngs=rngs)]

        def __call__(self, x):
            return self.layers[0](x)

    model = jw.nnx.transformed(Old(nnx.Rngs(0)), jw.ClipWeights(0.0))
    np.testing.assert_array_equal(model(X), np.zeros((4, 6)))


@pytest.mark.parametrize("ours, flaxs", [(jw.nnx.BatchNorm, nnx.BatchNorm), (jw.nnx.LayerNorm, nnx.LayerNorm)])
def test_norms_have_the_names_and_numbers_of_flax(ours, flaxs):
    a, b = ours(6, rngs=nnx.Rngs(0)), flaxs(6, rngs=nnx.Rngs(0))
    assert names(a) == names(b)
    np.testing.assert_allclose(a(X), b(X), rtol=1e-4, atol=1e-5)
    a.eval(), b.eval()
    np.testing.assert_allclose(a(X), b(X), rtol=1e-4, atol=1e-5)


def test_a_batch_in_which_nothing_counts_leaves_the_statistics():
    norm = jw.nnx.BatchNorm(6)
    y = nnx.jit(lambda norm, x: norm(x, mask=jnp.zeros((4, 1), bool)))(norm, X)
    assert np.isfinite(y).all()
    np.testing.assert_array_equal(norm.mean[...], np.zeros(6))
    np.testing.assert_array_equal(norm.var[...], np.ones(6))


def test_a_part_that_is_called_by_itself_warns():
    """Its weights are those that are stored. Calls within the module, its methods and its clones do not warn."""

    class Parts(nnx.Module):
        def __init__(self, rngs):
            self.encoder = nnx.Sequential(nnx.Linear(6, 6, rngs=rngs), nnx.relu)
            self.decoder = nnx.Linear(6, 3, rngs=rngs)

        def __call__(self, x):
            return self.decoder(self.encode(x))

        def encode(self, x):
            x = nnx.remat(lambda part, x: part(x))(self.encoder, x)
            return jax.jit(lambda part, x: part(x))(nnx.merge(*nnx.split(self.encoder)), x)

    plain = Parts(nnx.Rngs(0))
    model = jw.nnx.transformed(plain, jw.ClipWeights(0.0), where="encoder/**/kernel")
    for each in (model, nnx.clone(model), nnx.merge(*nnx.split(model))):
        np.testing.assert_array_equal(each.encode(X), np.zeros_like(X))
        each(X)
        nnx.jit(lambda m, x: m(x))(each, X)
        for part, expected in ((each.encoder, plain.encoder), (each.encoder.layers[0], plain.encoder.layers[0])):
            assert isinstance(part, type(expected))
            with pytest.warns(jw.nnx.StoredWeightsWarning, match="Call a method of the transformed module"):
                y = part(X)
            np.testing.assert_array_equal(y, expected(X))
        np.testing.assert_array_equal(each.decoder(X), plain.decoder(X))  # no weight in it is transformed
    folded = jw.nnx.fold(model)
    assert type(folded.encoder) is nnx.Sequential
    np.testing.assert_array_equal(folded.encoder(X), np.zeros_like(X))
