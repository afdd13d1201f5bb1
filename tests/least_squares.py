"""A training whose every step is known: a line through ten points."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

import nde

RNG = np.random.default_rng(0)
X = RNG.normal(size=(10, 3))
Y = X @ np.array([1.0, -2.0, 0.5]) + 0.1 * RNG.normal(size=10)
DATA = (jnp.asarray(X), jnp.asarray(Y))
KEY = jax.random.key(0)
START = {"w": jnp.zeros(3), "scale": jnp.ones(())}


def squares(model, batch, key):
    x, y = batch.data
    return nde.losses.mse(model["scale"] * (x @ model["w"]), y, batch.mask)


def fit(model, loss=squares, data=DATA, optim=None, steps=20, **options):
    optim = optax.sgd(0.1) if optim is None else optim
    return nde.fit(
        model, loss, data, optim=optim, steps=steps, **({"progress": False, "key": KEY} | options)
    )
