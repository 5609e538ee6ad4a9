"""Methods of `one_shot` and `compress`: what makes a new weight, once, from a weight and what it is multiplied by."""

from jaxweights.core.method import Method
from jaxweights.techniques.quantization.one_shot.awq import AWQ
from jaxweights.techniques.quantization.one_shot.gptq import GPTQ
from jaxweights.techniques.quantization.one_shot.hqq import HQQ
from jaxweights.techniques.quantization.one_shot.round_to_nearest import RoundToNearest
from jaxweights.techniques.sparsification.one_shot.magnitude import Magnitude
from jaxweights.techniques.sparsification.one_shot.packing import Pack
from jaxweights.techniques.sparsification.one_shot.sparsegpt import SparseGPT
from jaxweights.techniques.sparsification.one_shot.wanda import Wanda
from jaxweights.techniques.weight_sharing.one_shot import Cluster

__all__ = [
    "AWQ",
    "GPTQ",
    "HQQ",
    "Cluster",
    "Magnitude",
    "Method",
    "Pack",
    "RoundToNearest",
    "SparseGPT",
    "Wanda",
]
