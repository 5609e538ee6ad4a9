"""Weight sharing: the positions of a weight share a few values."""

from jaxweights.techniques.weight_sharing.clustered import ClusteredArray, store_clusters
from jaxweights.techniques.weight_sharing.clustering import cluster
from jaxweights.techniques.weight_sharing.indices import conv_index, hash_index
from jaxweights.techniques.weight_sharing.sharing import ShareWeights, share

__all__ = ["ClusteredArray", "ShareWeights", "cluster", "conv_index", "hash_index", "share", "store_clusters"]
