"""The pictures of the pages, one function each. `{picture} NAME` in a page shows what NAME draws."""

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import jaxweights as jw

BEFORE, AFTER, MORE, LAST = "#9aa0a6", "#1a73e8", "#e8710a", "#188038"
plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "svg.fonttype": "none"})
KEY = jax.random.key(0)


def panels(n: int, width: float = 2.2, height: float = 2.2):
    _, axes = plt.subplots(1, n, figsize=(width * n, height), layout="constrained")
    return np.atleast_1d(axes)


def levels():
    """The same transform at five levels."""
    _, panel = plt.subplots(figsize=(7, 1.9), layout="constrained")
    panel.axis("off")
    rows = [
        ("array", "jw.clip_weights(w, 0.1)", "returns the clipped array"),
        ("tree", "jw.on_tree(jw.ClipWeights(0.1))", "the tree with clipped kernels"),
        ("optax", "jw.project(jw.ClipWeights(0.1))", "the stored weights are clipped after every step"),
        ("Linen", "jw.linen.Transformed(module, jw.ClipWeights(0.1))", "the module computes with clipped weights"),
        ("NNX", "jw.nnx.transformed(module, jw.ClipWeights(0.1))", "the module computes with clipped weights"),
    ]
    for i, (level, code, effect) in enumerate(rows):
        panel.text(0, 1 - i / 5, level, weight="bold", va="top")
        panel.text(0.1, 1 - i / 5, code, family="monospace", size=8, va="top", color=AFTER)
        panel.text(0.66, 1 - i / 5, effect, size=8, va="top")


def weight_norm():
    """Weight vectors of ten units with two inputs: as they are, of length 1, and with learned lengths."""
    w = np.array(jax.random.normal(KEY, (2, 10))) * np.linspace(0.3, 1.2, 10)
    unit = np.array(jw.weight_normalize(jnp.array(w)))
    learned = np.array(jw.weight_normalize(jnp.array(w), jnp.linspace(1.4, 0.6, 10)))
    titles = ["w", "w / ‖w‖", "g · w / ‖w‖"]
    for panel, v, title, color in zip(panels(3), (w, unit, learned), titles, (BEFORE, AFTER, MORE), strict=True):
        panel.add_patch(plt.Circle((0, 0), 1, fill=False, color="#dadce0"))
        zero = np.zeros(10)
        panel.quiver(zero, zero, v[0], v[1], angles="xy", scale_units="xy", scale=1, color=color, width=0.012)
        panel.set(xlim=(-2, 2), ylim=(-2, 2), aspect="equal", title=title, xticks=[-1, 0, 1], yticks=[-1, 0, 1])


def spectral_norm():
    """Singular values of a 64 × 48 kernel after each function."""
    w = 0.15 * jax.random.normal(KEY, (64, 48))
    lines = {
        "w": (w, BEFORE),
        "spectral_normalize(w)": (jw.spectral_normalize(w), AFTER),
        "clip_singular_values(w, 1)": (jw.projections.clip_singular_values(w, 1.0), MORE),
        "orthogonalize(w)": (jw.projections.orthogonalize(w), LAST),
    }
    (panel,) = panels(1, 5.5, 2.6)
    for name, (v, color) in lines.items():
        panel.plot(np.linalg.svd(np.array(v), compute_uv=False), label=name, color=color)
    panel.set(xlabel="singular value, largest first", ylabel="σ", ylim=(0, None))
    panel.legend(frameon=False)


def weight_decay():
    """Four weights without a gradient under L2, L1, and L2 towards ±0.6."""
    w0, rate, n = jnp.array([1.0, 0.5, -0.25, -0.75]), 0.02, 150
    rules = {
        "L2: λw": {},
        "L1: λ sign(w)": {"penalty_grad": jnp.sign},
        "L2-SP: λ(w − w₀)": {"toward": jnp.array([0.6, 0.6, -0.6, -0.6])},
    }
    for panel, (title, options) in zip(panels(3, 2.5), rules.items(), strict=True):

        def step(w, _, options=options):
            w = w - 0.5 * jw.weight_decay(jnp.zeros(4), w, rate, **options)
            return w, w

        panel.plot(np.array(jax.lax.scan(step, w0, length=n)[1]), color=AFTER)
        panel.axhline(0, color="#dadce0", lw=1)
        panel.set(title=title, xlabel="step", ylim=(-1, 1.1))


def weight_clipping():
    """Where each projection takes weights of one unit with two inputs."""
    points = np.array(jax.random.normal(KEY, (14, 2))) * 1.3
    project = {
        "clip_weights(w, 1)": lambda w: jw.clip_weights(w, 1.0),
        "clip_norm(w, 1)": lambda w: jw.clip_norm(w, 1.0),
        "project_l1_ball(w, 1)": lambda w: jw.projections.project_l1_ball(w, 1.0),
        "project_simplex(w)": jw.projections.project_simplex,
    }
    outlines = [
        np.array([(1, 1), (1, -1), (-1, -1), (-1, 1), (1, 1)]),
        np.array([(np.cos(t), np.sin(t)) for t in np.linspace(0, 2 * np.pi, 90)]),
        np.array([(1, 0), (0, -1), (-1, 0), (0, 1), (1, 0)]),
        np.array([(1, 0), (0, 1)]),
    ]
    for panel, (title, f), outline in zip(panels(4, 2.0, 2.2), project.items(), outlines, strict=True):
        new = np.array(jax.vmap(f)(jnp.array(points)))
        panel.plot(*outline.T, color="#dadce0")
        for old, to in zip(points, new, strict=True):
            panel.plot(*np.stack([old, to]).T, color=BEFORE, lw=0.8)
        panel.scatter(*points.T, s=10, color=BEFORE)
        panel.scatter(*new.T, s=14, color=AFTER, zorder=3)
        panel.set(xlim=(-3, 3), ylim=(-3, 3), aspect="equal", xticks=[], yticks=[])
        panel.set_title(title, size=8)


def weight_sharing():
    """Eight shared values for a weight with an outlier, from evenly spaced starts and at the optimum."""
    w = jnp.append(jax.random.normal(KEY, (399,)), 8.0)
    for panel, start in zip(panels(2, 3.4, 2.4), ("linear", "optimal"), strict=True):
        codebook, index = jw.cluster(w, 8, start=start)
        error = float(jnp.mean((jw.share(codebook, index) - w) ** 2))
        panel.hist(np.array(w), bins=60, color="#dadce0")
        for value in np.array(codebook):
            panel.axvline(value, color=AFTER, lw=1.2)
        panel.set(xlabel="w", yticks=[])
        panel.set_title(f'start="{start}": mean square error {error:.3f}', size=9)


def initialization():
    """The size of activations along 30 layers of width 256 with ReLU."""
    rules = {
        "normal, std 0.05": lambda k, s: 0.05 * jax.random.normal(k, s),
        "xavier_normal": jw.xavier_normal,
        "he_normal": jw.he_normal,
        "orthogonal, gain √2": lambda k, s: jw.initializers.orthogonal(k, s, gain=2**0.5),
    }
    (panel,) = panels(1, 5.5, 2.6)
    for (name, init), color in zip(rules.items(), (BEFORE, MORE, AFTER, LAST), strict=True):
        x, sizes = np.random.default_rng(0).standard_normal((64, 256)), []
        for w in np.array(jax.vmap(lambda key, init=init: init(key, (256, 256)))(jax.random.split(KEY, 30))):
            x = np.maximum(x @ w, 0)
            sizes.append(np.sqrt(np.mean(x**2)))
        panel.semilogy(sizes, label=name, color=color)
    panel.set(xlabel="layer", ylabel="root mean square", ylim=(1e-6, 10))
    panel.legend(frameon=False)


def shared_statistics(kinds: dict[str, np.ndarray]):
    """Grids of samples by features: entries of one color share a mean and a variance."""
    for panel, (title, group) in zip(panels(len(kinds), 2.0, 2.1), kinds.items(), strict=True):
        panel.pcolormesh(group, cmap="tab20", edgecolors="white", linewidth=1.5, vmin=0, vmax=19)
        panel.invert_yaxis()
        panel.set(xticks=[], yticks=[], xlabel="features", ylabel="samples", aspect="equal")
        panel.set_title(title, size=9)


def batch_norm():
    rows, columns = np.indices((8, 8))
    shared_statistics({"batch norm": columns, "ghost batches of 4": columns + 8 * (rows // 4)})


def layer_norm():
    rows, columns = np.indices((8, 8))
    kinds = {
        "layer norm": rows,
        "group norm, 4 groups": (4 * rows + columns // 2) % 20,
        "instance norm": (3 * rows + 7 * columns) % 20,
    }
    shared_statistics(kinds)


def quantization():
    """The values of four formats, and rounding to 3 bits."""
    left, right = panels(2, 3.4, 2.6)
    w = jnp.linspace(-1, 1, 801)
    formats = ("int3", "int4", "fp4", "nf4")
    for y, name in enumerate(formats):
        values = np.unique(np.array(jw.fake_quantize(w, name, block=w.size)))
        left.scatter(values, np.full(values.size, y), marker="|", s=160, color=AFTER)
    left.set(yticks=range(4), yticklabels=formats, xlabel="w / max|w|", ylim=(-0.6, 3.6))
    right.plot(w, w, color="#dadce0", lw=1)
    right.plot(w, np.array(jw.fake_quantize(w, "int3")), color=AFTER, label="int3")
    right.plot(w, np.array(jw.fake_quantize(w, 2)), color=MORE, label="2 bits, min-max")
    right.set(xlabel="w", ylabel="ŵ")
    right.legend(frameon=False)


def sparsification():
    """Masks of half of a 16 × 16 kernel."""
    w = jax.random.normal(KEY, (16, 16))
    masks = {
        "single weights": jw.magnitude_mask(w, 0.5),
        "2:4": jw.magnitude_mask(w, (2, 4)),
        "Blocks(4, 4)": jw.magnitude_mask(w, 0.5, structure=jw.pruning.Blocks(4, 4)),
        "OutputUnits()": jw.magnitude_mask(w, 0.5, structure=jw.pruning.OutputUnits()),
    }
    for panel, (title, mask) in zip(panels(4, 2.0, 2.3), masks.items(), strict=True):
        panel.pcolormesh(
            np.array(mask), cmap=plt.matplotlib.colors.ListedColormap(["#f1f3f4", AFTER]), edgecolors="white"
        )
        panel.invert_yaxis()
        panel.set(xticks=[], yticks=[], xlabel="outputs", ylabel="inputs", aspect="equal")
        panel.set_title(title, size=9)
