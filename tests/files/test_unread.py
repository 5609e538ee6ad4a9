"""Quantized tensors of formats that are not read, and names that are like theirs."""

import jax.numpy as jnp
import numpy as np
import pytest
from files.oracles import write

from jaxweights import files


@pytest.mark.parametrize(
    ("tensors", "config", "message"),
    [
        ({"l.weight": np.zeros((4, 8), "u1").view(jnp.float8_e4m3fn), "l.weight_scale": np.ones((4, 1), "f4")},
         {"quant_method": "compressed-tensors", "format": "float-quantized"}, "float-quantized"),
        ({"l.weight": np.zeros((4, 8), "u1").view(jnp.float8_e4m3fn), "l.weight_scale_inv": np.ones((1, 1), "f4")},
         {"quant_method": "fp8"}, "quant_method='fp8'"),
        ({"l.weight": np.zeros((4, 8), "i1"), "l.SCB": np.ones(4, "f4")}, None, "codes in int8"),
        ({"l.weight": np.zeros((4, 8), "u4"), "l.scales": np.ones((4, 1), "f2"), "l.biases": np.ones((4, 1), "f2")},
         None, "codes in uint32"),
        ({"l.W_q": np.zeros((4, 8), "u1"), "l.scale": np.ones((4, 1), "f2")}, None, "'l.W_q'"),
        ({"l.weight_packed": np.zeros((4, 8), "u1"), "l.weight_scale": np.zeros((4, 1), "u1")},
         {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"}, "nvfp4-pack-quantized"),
        ({"l.qweight": np.zeros((4, 8), "i4"), "l.qzeros": np.zeros((1, 1), "i4"), "l.scales": np.ones((1, 8), "f2")},
         {"quant_method": "auto-round"}, "quant_method='auto-round'"),
    ],
)  # fmt: skip
def test_formats_that_are_not_read_are_named(tensors, config, message, tmp_path):
    """Codes without their scales would be taken for weights."""
    path = write(tmp_path, tensors, config)
    with pytest.raises(
        ValueError, match=rf"(?s)a format that is not read.*{message}|{message}.*a format that is not read"
    ):
        files.load(path)


def test_parameters_of_such_names_are_read(tmp_path):
    tensors = {"l.weight": np.ones((4, 8), "f4"), "l.weight_scale": np.ones((4, 1), "f4"), "m.scales": np.ones(3, "f4")}
    tensors |= {"attention.W_q": np.ones((4, 4), "f4"), "attention.q_weight": np.ones((4, 4), "f2")}
    tree = files.load(write(tmp_path, tensors))
    np.testing.assert_array_equal(tree["attention"]["W_q"], tensors["attention.W_q"])
    np.testing.assert_array_equal(tree["attention"]["q_weight"], tensors["attention.q_weight"])
    np.testing.assert_array_equal(tree["l"]["weight_scale"], tensors["l.weight_scale"])
    np.testing.assert_array_equal(tree["m"]["scales"], tensors["m.scales"])
