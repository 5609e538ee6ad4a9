"""Train a GAN whose critic has a bounded slope: by weight clipping or by spectral normalization.

    python examples/gan.py
    python examples/gan.py --data fashion-mnist

The generator learns from the gradient of the critic, so that gradient must be bounded. WGAN (Arjovsky, Chintala and
Bottou, arXiv:1701.07875, 2017) clips every weight of the critic to ±0.01 after each step:
`jw.project(jw.ClipWeights(0.01))` at the end of its optax chain. SN-GAN (Miyato et al., arXiv:1802.05957, 2018) divides
each kernel by its spectral norm: `jw.linen.Transformed(critic, jw.SpectralNorm())`. Miyato et al. flatten the kernel of
a convolution to a matrix; `jw.ConvSpectralNorm` uses the norm of the convolution itself, which bounds the slope of the
whole critic by 1. All critics train the same networks with the settings of the papers, except that the learning rate of
WGAN is 1e-4 instead of 5e-5 because training is short.

The example bounds the Lipschitz constant of each critic: from above by the product of the exact operator norms of its
layers, and from below by the largest gradient or difference quotient found at real, generated and mixed images. The
gap E f(real) - E f(generated), divided by the upper bound, is a lower bound of the Wasserstein distance.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import gan_measures
import gan_report
import image_data
import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxweights as jw

CRITICS = ("clipping", "SpectralNorm", "ConvSpectralNorm")
LATENT, HIDDEN = 32, 128
BATCH = 64
CRITIC_STEPS = 5
"""Critic steps per generator step, as in both papers."""
AVERAGE = 0.01
SAMPLES, MEASURED = 2000, 500
"""Numbers of generated images used to measure the distance to real images and the slope of the critic."""
ROUNDS = 25
"""Number of measurements per run."""


class Generator(nn.Module):
    """Maps noise to images in [-1, 1]: two dense layers, then convolutions that upsample by 2."""

    size: int
    width: int

    @nn.compact
    def __call__(self, z):
        norm = lambda x: nn.relu(jw.linen.BatchNorm(use_running_average=False)(x))
        sides = [self.size // 2]
        while sides[0] > 7:
            sides.insert(0, sides[0] // 2)
        x = norm(nn.Dense(HIDDEN)(z))
        x = norm(nn.Dense(sides[0] ** 2 * 2 * self.width)(x).reshape(len(z), sides[0], sides[0], -1))
        for _ in sides[1:]:
            x = norm(enlarge(nn.Conv(4 * self.width, (3, 3))(x)))
        return nn.tanh(enlarge(nn.Conv(4, (3, 3))(x)))


def enlarge(x: jax.Array) -> jax.Array:
    """Depth to space: (n, h, w, 4c) -> (n, 2h, 2w, c)."""
    n, h, w, c = x.shape
    return x.reshape(n, h, w, 2, 2, c // 4).transpose(0, 1, 3, 2, 4, 5).reshape(n, 2 * h, 2 * w, c // 4)


class Critic(nn.Module):
    """Maps each image to a number. Its slope is at most the product of the norms of its three layers."""

    width: int

    @nn.compact
    def __call__(self, x):
        x = nn.leaky_relu(nn.Conv(self.width, (4, 4), strides=2, name="conv0")(x), 0.1)
        x = nn.leaky_relu(nn.Conv(2 * self.width, (4, 4), strides=2, name="conv1")(x), 0.1)
        return nn.Dense(1, name="head")(x.reshape(len(x), -1))[:, 0]


def convolutions(size: int, width: int) -> dict[str, tuple[int, int, int]]:
    """The convolutions of the critic and their input shapes."""
    return {"conv0": (size, size, 1), "conv1": (size // 2, size // 2, width)}


def hinge(real: jax.Array, fake: jax.Array) -> jax.Array:
    return nn.relu(1 - real).mean() + nn.relu(1 + fake).mean()


def wasserstein(real: jax.Array, fake: jax.Array) -> jax.Array:
    return fake.mean() - real.mean()


class Way(NamedTuple):
    """A way to bound the slope of a critic, and the settings of the paper that proposed it."""

    loss: Callable[[jax.Array, jax.Array], jax.Array]
    optimizer: optax.GradientTransformation
    transform: Any = None
    """Wraps the critic, which then computes with transformed weights."""
    project: Any = None
    """Changes the stored weights after each update."""


def way(critic: str, size: int, width: int) -> Way:
    sn_gan = optax.adam(2e-4, b1=0.0, b2=0.9)
    if critic == "clipping":
        return Way(wasserstein, optax.rmsprop(1e-4), project=jw.ClipWeights(0.01))
    if critic == "SpectralNorm":
        return Way(hinge, sn_gan, transform=jw.SpectralNorm())
    shapes = convolutions(size, width)
    rules = {f"{name}/kernel": jw.ConvSpectralNorm(shape, strides=2) for name, shape in shapes.items()}
    return Way(hinge, sn_gan, transform={**rules, "head/kernel": jw.SpectralNorm()})


@partial(jax.jit, static_argnums=0)
def initialize(model: nn.Module, key: jax.Array, x: jax.Array) -> dict[str, Any]:
    return model.init(key, x)


@partial(jax.jit, static_argnums=(0, 3))
def draw(generator: Generator, params: Any, key: jax.Array, n: int) -> jax.Array:
    """Generated images."""
    z = jax.random.normal(key, (n, LATENT))
    return generator.apply({"params": params}, z, mutable=["batch_stats"])[0]


class State(NamedTuple):
    """The state of training."""

    generator: Any
    average: Any
    """Moving average of the generator's parameters, used for sampling."""
    critic: Any
    rest: Any
    """The state of the critic's transform, which the critic updates itself."""
    optimizers: Any


class Gan:
    """A generator and a critic during training."""

    def __init__(self, way: Way, images: jax.Array, width: int, seed: int):
        self.way, self.images = way, images
        self.generator, critic = Generator(images.shape[1], width), Critic(width)
        self.critic = jw.linen.Transformed(critic, way.transform) if way.transform else critic
        clip = [jw.project(way.project, "**")] if way.project else []
        self.txs = way.optimizer, optax.chain(way.optimizer, *clip)
        keys = jax.random.split(jax.random.key(seed), 3)
        generator = initialize(self.generator, keys[0], jnp.zeros((1, LATENT)))["params"]
        rest = dict(jax.jit(self.critic.init)(keys[1], images[:1]))
        critic = rest.pop("params")
        states = self.txs[0].init(generator), self.txs[1].init(critic)
        self.state, self.key = State(generator, generator, critic, rest, states), keys[2]
        self._move_critic, self._move_generator = jax.jit(self._critic_step), jax.jit(self._generator_step)

    def samples(self, n: int) -> jax.Array:
        return draw(self.generator, self.state.average, jax.random.key(0), n)

    def weights(self) -> dict[str, Any]:
        """The weights the critic computes with, as parameters of a plain `Critic`."""
        variables = {"params": self.state.critic, **self.state.rest}
        return (jw.linen.fold(self.critic, variables) if self.way.transform else variables)["params"]

    def step(self) -> None:
        """Five critic steps and one generator step."""
        self.key, *keys = jax.random.split(self.key, CRITIC_STEPS + 2)
        for key in keys[1:]:
            self.state = self._move_critic(self.state, key)
        self.state = self._move_generator(self.state, keys[0])

    def _critic_step(self, state: State, key) -> State:
        keys = jax.random.split(key)
        real = self.images[jax.random.randint(keys[0], (BATCH,), 0, len(self.images))]
        both = jnp.concatenate([real, draw(self.generator, state.generator, keys[1], BATCH)])

        def loss(params):
            scores, rest = self.critic.apply({"params": params, **state.rest}, both, mutable=list(state.rest))
            return self.way.loss(scores[:BATCH], scores[BATCH:]), rest

        grads, rest = jax.grad(loss, has_aux=True)(state.critic)
        updates, moved = self.txs[1].update(grads, state.optimizers[1], state.critic)
        critic = optax.apply_updates(state.critic, updates)
        return state._replace(critic=critic, rest=rest, optimizers=(state.optimizers[0], moved))

    def _generator_step(self, state: State, key) -> State:
        variables = {"params": state.critic, **state.rest}
        loss = lambda params: -self.critic.apply(variables, draw(self.generator, params, key, BATCH)).mean()
        updates, moved = self.txs[0].update(jax.grad(loss)(state.generator), state.optimizers[0])
        generator = optax.apply_updates(state.generator, updates)
        average = optax.incremental_update(generator, state.average, AVERAGE)
        return state._replace(generator=generator, average=average, optimizers=(moved, state.optimizers[1]))


class Measurer:
    """Measures a critic: the norms of its layers, its slope, and its gap between real and generated images."""

    def __init__(self, images: jax.Array, width: int):
        self.images = images
        shapes = convolutions(images.shape[1], width)

        @jax.jit
        def measure(weights, fake, key):
            score = lambda x: Critic(width).apply({"params": weights}, x)
            kernels = {name: w["kernel"] for name, w in weights.items()}
            norms = {name: jw.conv_spectral_norm(kernels[name], s, strides=2) for name, s in shapes.items()}
            norms["head"] = jw.spectral_norm(kernels["head"])
            real = jax.random.choice(key, images, (len(fake),))
            gap = score(images).mean() - score(fake).mean()
            return norms, gan_measures.steepest(score, real, fake, key), gap

        self._measure = measure

    def __call__(self, gan: Gan, fake: jax.Array) -> tuple[dict[str, float], float, float]:
        """Returns (layer norms, lower bound of the Lipschitz constant, E f(real) - E f(generated))."""
        norms, lower, gap = self._measure(gan.weights(), fake[:MEASURED], jax.random.key(0))
        return {name: float(n) for name, n in norms.items()}, float(lower), float(gap)


def run(way: Way, images: jax.Array, args, measurer: Measurer, features: gan_measures.Features, advance) -> Any:
    """Trains with one critic and measures it along the way."""
    gan = Gan(way, images, args.width, args.seed)
    curves = gan_report.Curves([], [], [], [], [])
    seconds = []
    for step in range(1, args.steps + 1):
        start = time.perf_counter()
        gan.step()
        jax.block_until_ready(gan.state)
        seconds.append(time.perf_counter() - start)
        advance()
        if step % max(1, args.steps // ROUNDS) == 0 or step == args.steps:
            fake = gan.samples(SAMPLES)
            norms, lower, gap = measurer(gan, fake)
            upper = float(np.prod(list(norms.values())))
            for values, value in zip(curves, (step, lower, upper, gap, features.distance(fake)), strict=True):
                values.append(value)
    samples = np.asarray(gan.samples(gan_report.SHOWN))
    return gan_report.Result(samples, norms, curves, float(np.median(seconds)), features.held_out)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Returns the result of each critic."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=("digits", "fashion-mnist"), default="digits")
    parser.add_argument("--critics", nargs="+", choices=CRITICS, default=CRITICS)
    parser.add_argument("--steps", type=int, default=1500, help="generator steps; each follows five critic steps")
    parser.add_argument("--width", type=int, default=32, help="channels of the first convolution of the critic")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", help="path of the picture; gan_<data>.png by default")
    args = parser.parse_args(argv)

    data = image_data.load(args.data)
    low, high = data.train_images.min(), data.train_images.max()
    scaled = lambda images: 2 * (images - low) / (high - low) - 1
    data = data._replace(train_images=scaled(data.train_images), test_images=scaled(data.test_images))
    images = jnp.asarray(data.train_images)
    features = gan_measures.Features(data, min(400, 10 * args.steps))
    measurer = Measurer(images[:SAMPLES], args.width)
    results = {}
    with gan_report.progress() as bar:
        for critic in args.critics:
            task = bar.add_task(critic, total=args.steps)
            chosen = way(critic, images.shape[1], args.width)
            results[critic] = run(chosen, images, args, measurer, features, lambda task=task: bar.advance(task))
    title = f"{args.data}, {args.steps:,} steps of the generator"
    gan_report.table(title, results, features.held_out, features.accuracy)
    real = np.asarray(data.test_images[: gan_report.SHOWN])
    gan_report.picture(args.out or f"gan_{args.data.replace('-', '_')}.png", title, real, results)
    return results


if __name__ == "__main__":
    main()
