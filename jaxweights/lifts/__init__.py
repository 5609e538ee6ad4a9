"""The levels: each carries every transform to trees, optax, Linen or NNX, and knows none of them."""
