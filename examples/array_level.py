"""The array level: every technique is a function of an array.

The weight is the 64x10 matrix of a ridge regression from scikit-learn's digits to their classes.
"""

import jax
import jax.numpy as jnp
import numpy as np
from sklearn.datasets import load_digits

import jaxweights as jw

pixels, labels = load_digits(return_X_y=True)
x = jnp.asarray(pixels / 16, jnp.float32)
classes = np.eye(10)[labels]
w = jnp.linalg.solve(x.T @ x + 10 * jnp.eye(64), x.T @ classes)


def accuracy(w) -> float:
    return float(np.mean(np.argmax(x @ w, axis=-1) == labels))


codebook, index = jw.cluster(w, 16)
versions = {
    "as it is": w,
    "weight norm: columns of length 1": jw.weight_normalize(w),
    "spectral norm: σ = 1": jw.spectral_normalize(w),
    "clipped to ±0.1": jw.clip_weights(w, 0.1),
    "shared: 16 values": jw.share(codebook, index),
    "quantized to 4 bits": jw.fake_quantize(w, 4),
    "sparse: 50% zeros": w * jw.magnitude_mask(w, 0.5),
}
print(f"{'weight':34}{'σ':>7}{'max |w|':>9}{'values':>8}{'zeros':>7}{'accuracy':>10}")
for name, v in versions.items():
    values, zeros = np.unique(v).size, float(jnp.mean(v == 0))
    print(f"{name:34}{jw.spectral_norm(v):7.2f}{abs(v).max():9.2f}{values:8}{zeros:7.0%}{accuracy(v):10.1%}")

stored = jw.quantize(w, 8)
error = float(jnp.linalg.norm(jw.matmul(x, stored) - x @ w) / jnp.linalg.norm(x @ w))
print(f"\nstored in 8 bits: {stored.nbytes:,} bytes for {w.nbytes:,}, the product is off by {error:.1%}")

he = jw.he_normal(jax.random.key(0), (64, 1000))
print(f"He initialization: std {he.std():.4f}, √(2/64) = {np.sqrt(2 / 64):.4f}")

loss = lambda w: jnp.mean((x @ w - classes) ** 2)
decayed = w - 0.1 * jw.weight_decay(jax.grad(loss)(w), w, 0.5)
print(f"weight decay: ‖w‖ {jnp.linalg.norm(w):.3f} -> {jnp.linalg.norm(decayed):.3f} after one step")

hidden = jax.nn.relu(x @ he)
for norm in (jw.batch_norm, jw.layer_norm):
    y = norm(hidden)
    print(f"{norm.__name__}: activations of mean {hidden.mean():.2f} and std {hidden.std():.2f} -> ", end="")
    print(f"{abs(y.mean()):.2f} and {y.std():.2f}")
