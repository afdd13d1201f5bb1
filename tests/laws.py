"""Samples of known processes: an Ornstein-Uhlenbeck process and noise with the same marginals."""

import jax.numpy as jnp
import numpy as np

TIMES = np.linspace(0.0, 2.0, 9)


def ornstein_uhlenbeck(paths, *, seed, ts=TIMES, sigma=1.0):
    """dX = -X dt + sigma dW, stationary: variance sigma^2 / 2, correlation exp(-|t - s|)."""
    rng = np.random.default_rng(seed)
    spread = sigma / np.sqrt(2)
    rows = [spread * rng.normal(size=paths)]
    for step in np.diff(ts):
        keep = np.exp(-step)
        rows.append(keep * rows[-1] + spread * np.sqrt(1 - keep**2) * rng.normal(size=paths))
    return jnp.asarray(np.stack(rows, axis=1)[..., None])


def white_noise(paths, *, ts=TIMES, seed=99):
    """Independent at each time, variance 1/2."""
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.normal(scale=np.sqrt(0.5), size=(paths, len(ts), 1)))
