"""The levels: the same verbs on trees, in optax chains, and around Linen and NNX modules."""
