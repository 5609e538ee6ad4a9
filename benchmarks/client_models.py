"""Small models by other authors, each built by its own code, with the line that reads its layout.

Frameworks are imported only where a model needs them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import jaxweights as jw

KEY = jax.random.key(0)


class Built(NamedTuple):
    """A model in use.

    Attributes:
      layout: how it reads its weights, as the line of the client says.
      f: the model as a function (params, *args).
      params: its weights.
      args: the data.
    """

    layout: Any
    f: Callable[..., Any]
    params: Any
    args: tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class Client:
    """A model by other authors.

    Attributes:
      name: of the model.
      package: on the package index.
      framework: in which it is written.
      line: the code that reads its layout.
      build: makes the model and reads its layout.
      positions: the most rows of data that a kernel meets.
      shared: a glob of stacks whose matrices meet the same data.
    """

    name: str
    package: str
    framework: str
    line: str
    build: Callable[[], Built]
    positions: int = 2
    shared: str = ""


def linen(model: Any, *args: Any, **kwargs: Any) -> Built:
    variables = model.init({"params": KEY, "dropout": KEY}, *args, **kwargs)
    rest = {name: collection for name, collection in variables.items() if name != "params"}
    f = lambda p, *args: model.apply({**rest, "params": p}, *args, **kwargs)
    return Built(jw.linen.layout(model, variables, *args, **kwargs), f, variables["params"], args)


def of_nnx(model: Any, *args: Any, **kwargs: Any) -> Built:
    from flax import nnx

    graph, params, rest = nnx.split(model, nnx.Param, ...)
    f = lambda p, *args: nnx.merge(graph, p, rest, copy=True)(*args, **kwargs)
    return Built(jw.nnx.layout(model, *args, **kwargs), f, params, args)


def equinox(model: Any, *args: Any, call: Callable[..., Any] = lambda model, *args: jax.vmap(model)(*args)) -> Built:
    import equinox as eqx

    params, static = eqx.partition(model, eqx.is_inexact_array)
    f = lambda p, *args: call(eqx.combine(p, static), *args)
    return Built(jw.layout(call, model, *args), f, params, args)


def function(f: Callable[..., Any], params: Any, *args: Any) -> Built:
    return Built(jw.layout(f, params, *args), f, params, args)


def normal(*shape: int) -> jax.Array:
    return jax.random.normal(KEY, shape)


TOKENS = jnp.array([[3, 1]])


def flax_linen() -> Built:
    import flax.linen as nn

    class ViT(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Conv(16, (4, 4), (4, 4), padding="VALID", name="patches")(x).reshape(len(x), -1, 16)
            x = jnp.concatenate([self.param("cls_token", nn.initializers.normal(), (1, 1, 16)), x], 1)
            x = x + self.param("pos_embedding", nn.initializers.normal(), (1, x.shape[1], 16))
            x = x + nn.MultiHeadDotProductAttention(4)(nn.LayerNorm()(x))
            x = x + nn.Dense(16)(nn.gelu(nn.Dense(32)(nn.LayerNorm()(x))))
            return nn.Dense(10, name="head")(x[:, 0])

    return linen(ViT(), normal(1, 4, 4, 3))


def flax_nnx() -> Built:
    from flax import nnx

    class Decoder(nnx.Module):
        def __init__(self, rngs):
            self.embed = nnx.Embed(11, 12, rngs=rngs)
            self.attention = nnx.MultiHeadAttention(3, 12, decode=False, rngs=rngs)
            self.norm = nnx.RMSNorm(12, rngs=rngs)
            self.layers = nnx.split_rngs(splits=2)(
                nnx.vmap(lambda rngs: nnx.Linear(12, 12, use_bias=False, rngs=rngs))
            )(rngs)

        def __call__(self, tokens):
            x = self.embed(tokens)
            x = x + self.attention(self.norm(x))
            x = nnx.scan(lambda x, layer: jnp.tanh(layer(x)), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(
                x, self.layers
            )
            return self.embed.attend(x)

    return of_nnx(Decoder(nnx.Rngs(0)), TOKENS)


def eqx_ensemble() -> Built:
    import equinox as eqx

    make = eqx.filter_vmap(lambda key: eqx.nn.MLP(4, 5, 16, 2, jax.nn.tanh, key=key))
    call = lambda models, x: eqx.filter_vmap(lambda model: jax.vmap(model)(x))(models)
    return equinox(make(jax.random.split(KEY, 3)), normal(2, 4), call=call)


def eqx_attention() -> Built:
    import equinox as eqx

    attention = eqx.nn.MultiheadAttention(3, 12, use_query_bias=True, key=KEY)
    return equinox(attention, normal(2, 12), call=lambda model, x: model(x, x, x))


def gemma() -> Built:
    from gemma.gm.nn import _config, _modules, _transformer  # gemma.gm itself needs one version of kauldron

    config = _config.TransformerConfig(
        **{"num_embed": 20, "embed_dim": 16, "hidden_dim": 24, "num_heads": 4, "head_dim": 8, "num_kv_heads": 2},
        **{"use_post_attn_norm": True, "use_post_ffw_norm": True, "use_qk_norm": True, "transpose_gating_einsum": True},
        attention_types=(_modules.AttentionType.LOCAL_SLIDING, _modules.AttentionType.GLOBAL),
        sliding_window_size=4,
        final_logit_softcap=None,
    )
    return linen(_transformer.Transformer(config=config, dtype=jnp.float32), TOKENS)


def tunix_llama() -> Built:
    from flax import nnx
    from tunix.models.llama3 import model as llama3

    config = llama3.ModelConfig(
        **{"num_layers": 2, "vocab_size": 20, "embed_dim": 16, "hidden_dim": 24, "num_heads": 4, "head_dim": 8},
        **{"num_kv_heads": 2, "rope_theta": 500_000, "norm_eps": 1e-5},
    )
    return _tunix(llama3.Llama3(config, rngs=nnx.Rngs(0)))


def tunix_qwen() -> Built:
    from flax import nnx
    from tunix.models.qwen3 import model as qwen3

    config = qwen3.ModelConfig(
        **{"num_layers": 2, "vocab_size": 20, "embed_dim": 16, "hidden_dim": 24, "num_heads": 4, "head_dim": 8},
        **{"num_kv_heads": 2, "rope_theta": 1_000_000, "norm_eps": 1e-6},
        **{"num_experts": 5, "num_experts_per_tok": 2, "use_tied_embedding": True},
    )
    return _tunix(qwen3.Qwen3(config, rngs=nnx.Rngs(0)))


def _tunix(model: Any) -> Built:
    return of_nnx(model, TOKENS, jnp.arange(2)[None], None, jnp.tril(jnp.ones((1, 2, 2), bool)))


def mamba() -> Built:
    import mamba2_jax
    from flax import nnx

    config = mamba2_jax.Mamba2Config(
        **{"vocab_size": 20, "hidden_size": 8, "state_size": 6, "head_dim": 4, "chunk_size": 2, "num_hidden_layers": 2}
    )
    return of_nnx(mamba2_jax.Mamba2ForCausalLM(config, rngs=nnx.Rngs(0)), TOKENS)


def _transformers(model: Any, *args: Any) -> Built:
    return function(lambda p, *args: model(*args, params=p), model.params, *args)


def bert() -> Built:
    import transformers

    config = transformers.BertConfig(
        vocab_size=20, hidden_size=12, num_hidden_layers=2, num_attention_heads=3, intermediate_size=24
    )
    return _transformers(transformers.FlaxBertForMaskedLM(config), TOKENS)


def gpt2() -> Built:
    import transformers

    config = transformers.GPT2Config(vocab_size=20, n_positions=8, n_embd=12, n_layer=2, n_head=3)
    return _transformers(transformers.FlaxGPT2LMHeadModel(config), TOKENS)


def vit() -> Built:
    import transformers

    config = transformers.ViTConfig(
        hidden_size=12, num_hidden_layers=2, num_attention_heads=3, intermediate_size=24, image_size=4, patch_size=4
    )
    return _transformers(transformers.FlaxViTForImageClassification(config), normal(1, 3, 4, 4))


def equimo() -> Built:
    import equimo.models as models

    model = models.VisionTransformer(4, 3, 12, 4, 3, [2], num_classes=5, reg_tokens=0, key=KEY)
    return equinox(
        model, normal(1, 3, 4, 4), call=lambda model, x: jax.vmap(lambda x: model(x, KEY, inference=True))(x)
    )


def flow() -> Built:
    import flowjax.bijections as bijections
    import paramax

    model = bijections.MaskedAutoregressive(KEY, transformer=bijections.Affine(), dim=4, nn_width=10, nn_depth=2)
    return equinox(model, normal(2, 4), call=lambda model, x: jax.vmap(paramax.unwrap(model).transform)(x))


def haiku() -> Built:
    import haiku as hk

    def f(x):
        y = hk.nets.MLP([12, 12], activation=jnp.tanh, activate_final=True)(x)
        y = hk.LayerNorm(-1, True, True)(y + hk.MultiHeadAttention(3, 4, w_init_scale=1.0)(y, y, y))
        return hk.Linear(5)(hk.LSTM(8)(y, hk.LSTM(8).initial_state(2))[0])

    net = hk.without_apply_rng(hk.transform(f))
    x = normal(2, 4)
    return function(net.apply, net.init(KEY, x), x)


def keras_convnet() -> Built:
    import keras

    layers = keras.layers
    model = keras.Sequential(
        [
            layers.Input((4, 5, 3)),
            layers.Conv2D(8, 3, activation="tanh"),
            layers.SeparableConv2D(8, (2, 3), activation="tanh"),
            layers.Flatten(),
            layers.Dense(5),
        ]
    )
    fixed = [v.value for v in model.non_trainable_variables]
    f = lambda p, x: model.stateless_call([p[v.path] for v in model.trainable_variables], fixed, x)[0]
    return function(f, {v.path: v.value for v in model.trainable_variables}, normal(1, 4, 5, 3))


def keras_transformer() -> Built:
    import keras

    layers = keras.layers
    tokens = layers.Input((2,), dtype="int32")
    x = layers.Embedding(20, 12)(tokens)
    x = layers.LayerNormalization()(x + layers.MultiHeadAttention(3, 5)(x, x))
    x = layers.GRU(8)(layers.EinsumDense("abc,cde->abde", (None, 2, 6), bias_axes="de")(x)[:, :, 0])
    model = keras.Model(tokens, layers.Dense(5)(x))
    fixed = [v.value for v in model.non_trainable_variables]
    f = lambda p, x: model.stateless_call([p[v.path] for v in model.trainable_variables], fixed, x)[0]
    return function(f, {v.path: v.value for v in model.trainable_variables}, TOKENS)


def brax() -> Built:
    from brax.training.agents.ppo import networks

    policy = networks.make_ppo_networks(6, 3, policy_hidden_layer_sizes=(16, 16)).policy_network
    return function(lambda p, x: policy.apply(None, p, x), policy.init(KEY), normal(2, 6))


def sbx_critics() -> Built:
    from sbx.common.policies import VectorCritic

    return linen(VectorCritic((16, 16), n_critics=3, output_dim=3), normal(2, 5), normal(2, 3))


def netket() -> Built:
    import netket as nk

    hilbert = nk.hilbert.Spin(0.5, 4)
    model = nk.models.ARNNDense(hilbert, layers=3, features=6, param_dtype=jnp.float32)
    return linen(model, jnp.array([[1.0, -1, 1, 1], [-1, -1, 1, -1]]))


LINEN, NNX, FUNCTION = (
    "jw.linen.layout(model, variables, x)",
    "jw.nnx.layout(model, x)",
    "jw.layout(f, params, x)",
)
TRANSFORMERS = "jw.layout(lambda p, x: model(x, params=p), model.params, x)"
KERAS = "jw.layout(lambda p, x: model.stateless_call(p, fixed, x)[0], weights, x)"
VMAPPED = "jw.layout(lambda model, x: jax.vmap(model)(x), model, x)"
TUNIX = "jw.nnx.layout(model, tokens, positions, None, mask)"

CLIENTS = (
    Client("ViT of Flax layers", "flax", "Linen", LINEN, flax_linen),
    Client("decoder of Flax layers", "flax", "NNX", NNX, flax_nnx),
    Client("ensemble of MLPs", "equinox", "Equinox", "jw.layout(call, model, x)", eqx_ensemble, shared="layers/0/*"),
    Client("MultiheadAttention", "equinox", "Equinox", "jw.layout(lambda m, x: m(x, x, x), model, x)", eqx_attention),
    Client("Gemma 3", "gemma", "Linen", LINEN, gemma),
    Client("Llama 3", "google-tunix", "NNX", TUNIX, tunix_llama),
    Client("Qwen 3, experts", "google-tunix", "NNX", TUNIX, tunix_qwen, shared="*/mlp/[gu]*_proj"),
    Client("Mamba 2", "mamba2-jax", "NNX", NNX, mamba),
    Client("BERT", "transformers", "Linen", TRANSFORMERS, bert),
    Client("GPT-2", "transformers", "Linen", TRANSFORMERS, gpt2),
    Client("ViT", "transformers", "Linen", TRANSFORMERS, vit),
    Client("ViT", "equimo", "Equinox", VMAPPED, equimo),
    Client("autoregressive flow", "flowjax", "Equinox", "jw.layout(call, model, x)", flow),
    Client("MLP, attention, LSTM", "dm-haiku", "Haiku", "jw.layout(net.apply, params, x)", haiku),
    Client("convolutions", "keras", "Keras", KERAS, keras_convnet, positions=6),
    Client("attention, GRU", "keras", "Keras", KERAS, keras_transformer),
    Client("PPO policy", "brax", "Linen", "jw.layout(lambda p, x: policy.apply(None, p, x), p, x)", brax),
    Client(
        "SAC critics",
        "sbx-rl",
        "Linen",
        "jw.linen.layout(critics, variables, obs, action)",
        sbx_critics,
        shared="*Dense_0/*",
    ),
    Client("autoregressive spins", "netket", "Linen", LINEN, netket),
)
