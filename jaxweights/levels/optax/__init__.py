"""The optax level: projections after the update, optimizers confined to masks, weight decay, unbiased rounding."""
