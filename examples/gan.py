"""A small GAN with three critics: clipped weights, and spectral norm of the kernels or of the convolutions.

    python examples/gan.py
    python examples/gan.py --data digits --steps 300

The Wasserstein loss asks for a critic of bounded slope. Clipping its weights and normalizing its layers are the two
classic ways to bound it. The same networks are trained with each, and the slope of each critic is measured. It is at
least the largest gradient found at real, generated and mixed images, at most the product of the norms of the layers.
The transforms are used at the Linen level, the clipping in an optax chain.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

import jaxweights as jw

LATENT = 64
BATCH = 64
CRITIC_STEPS = 2
"""Steps of the critic for each of the generator."""
ROUND = 25
LIMIT = 0.05
WIDTH = 32


class Generator(nn.Module):
    """Noise to images in [-1, 1]: two convolutions, each of which makes four pixels of one."""

    size: int

    @nn.compact
    def __call__(self, z):
        norm = lambda x: nn.relu(jw.linen.BatchNorm(use_running_average=False)(x))
        x = nn.Dense(self.size**2 // 16 * 2 * WIDTH)(z)
        x = norm(x.reshape(len(z), self.size // 4, self.size // 4, -1))
        x = norm(enlarge(nn.Conv(4 * WIDTH, (3, 3))(x)))
        return nn.tanh(enlarge(nn.Conv(4, (3, 3))(x)))


def enlarge(x):
    """(n, h, w, 4c) -> (n, 2h, 2w, c): the channels of a pixel become four pixels."""
    n, h, w, c = x.shape
    return x.reshape(n, h, w, 2, 2, c // 4).transpose(0, 1, 3, 2, 4, 5).reshape(n, 2 * h, 2 * w, c // 4)


class Critic(nn.Module):
    """Images to a number each. Its slope is at most the product of the norms of its four layers."""

    @nn.compact
    def __call__(self, x):
        for i in range(3):
            x = nn.leaky_relu(nn.Conv(WIDTH * 2**i, (4, 4), strides=2, name=f"conv{i}")(x), 0.2)
        return nn.Dense(1, name="head")(x.reshape(len(x), -1))[:, 0]


class Way(NamedTuple):
    """A way to bound the slope of a critic."""

    name: str
    transform: Any = None
    """Around the critic: it computes with transformed weights."""
    project: Any = None
    """After each update: the stored weights themselves are changed."""


def layers(size: int) -> dict[str, tuple[int, int, int]]:
    """The convolutions of the critic, and the shapes of the images they see."""
    sides = [size, -(-size // 2), -(-size // 4)]
    return {f"conv{i}": (n, n, WIDTH * 2 ** (i - 1) if i else 1) for i, n in enumerate(sides)}


def ways(size: int) -> list[Way]:
    operators = {f"{name}/kernel": jw.ConvSpectralNorm(shape, strides=2) for name, shape in layers(size).items()}
    return [
        Way("clipping", project=jw.ClipWeights(LIMIT)),
        Way("SpectralNorm", transform=jw.SpectralNorm()),
        Way("ConvSpectralNorm", transform={**operators, "head/kernel": jw.SpectralNorm()}),
    ]


class State(NamedTuple):
    """All that training moves."""

    generator: Any
    average: Any
    """Of the generator's parameters over the last steps: pictures are made with it."""
    critic: Any
    rest: Any
    """What the critic moves itself: the state of its transform."""
    tx: Any
    """The states of the two optimizers."""


class Gan:
    """A generator and a critic in training."""

    def __init__(self, way: Way, images: jax.Array, seed: int, args):
        self.way, self.images = way, images
        size = images.shape[1]
        self.generator = Generator(size)
        critic = Critic()
        self.critic = jw.linen.Transformed(critic, way.transform) if way.transform else critic
        adam = lambda rate: optax.adam(optax.linear_schedule(rate, 0.0, args.steps), b1=args.b1, b2=0.9)
        self.txs = (
            adam(args.g),
            optax.chain(
                optax.adam(optax.linear_schedule(args.d, 0.0, CRITIC_STEPS * args.steps), b1=args.b1, b2=0.9),
                jw.project(way.project, "**") if way.project else optax.identity(),
            ),
        )
        keys = jax.random.split(jax.random.key(seed))
        g = self.generator.init(keys[0], jnp.zeros((1, LATENT)))["params"]
        rest = dict(self.critic.init(keys[1], images[:1]))
        d = rest.pop("params")
        self.state = State(g, g, d, rest, (self.txs[0].init(g), self.txs[1].init(d)))
        self._critic, self._gen = jax.jit(self._critic_step), jax.jit(self._generator_step)

    def draw(self, params, key, n: int):
        z = jax.random.normal(key, (n, LATENT))
        return self.generator.apply({"params": params}, z, mutable=["batch_stats"])[0]

    def judge(self, params, rest, x, train: bool = False):
        return self.critic.apply({"params": params, **rest}, x, mutable=list(rest) if train else [])

    def _critic_step(self, state: State, key):
        keys = jax.random.split(key)
        real = self.images[jax.random.randint(keys[0], (BATCH,), 0, len(self.images))]
        both = jnp.concatenate([real, self.draw(state.generator, keys[1], BATCH)])

        def loss(params):
            scores, rest = self.judge(params, state.rest, both, train=True)
            gap = scores[:BATCH].mean() - scores[BATCH:].mean()
            return -gap, (gap, rest)

        grads, (gap, rest) = jax.grad(loss, has_aux=True)(state.critic)
        updates, tx = self.txs[1].update(grads, state.tx[1], state.critic)
        return state._replace(critic=optax.apply_updates(state.critic, updates), rest=rest, tx=(state.tx[0], tx)), gap

    def _generator_step(self, state: State, key):
        def loss(params):
            return -self.judge(state.critic, state.rest, self.draw(params, key, BATCH))[0].mean()

        updates, tx = self.txs[0].update(jax.grad(loss)(state.generator), state.tx[0])
        new = optax.apply_updates(state.generator, updates)
        average = optax.incremental_update(new, state.average, 0.02)
        return state._replace(generator=new, average=average, tx=(tx, state.tx[1]))

    def step(self, key):
        keys = jax.random.split(key, CRITIC_STEPS + 1)
        for k in keys[1:]:
            self.state, gap = self._critic(self.state, k)
        self.state = self._gen(self.state, keys[0])
        return gap
