"""A training run that is to be killed: `python interrupted.py CHECKPOINT SECONDS_PER_STEP` prints the
digest of what it leads to."""

import hashlib
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

import nde
from nde.train import Average, Stage, Validation

STEPS = 40
RNG = np.random.default_rng(0)
X = RNG.normal(size=(20, 3)).astype(np.float32)
Y = X @ np.array([1.0, -2.0, 0.5], np.float32)


def loss(model, batch, key):
    x, y = batch.data
    noise = jax.vmap(lambda key: jax.random.normal(key, (), jnp.float32))(batch.keys)
    return nde.losses.mse(x @ model["w"] + 0.1 * noise, y, batch.mask)


def run(checkpoint=None, *, steps=STEPS, seed=0, **options):
    """The model and the history of a run with everything that has a state."""
    stages = [Stage(10, rate=2.0), Stage(steps - 10)]
    return nde.fit(
        {"w": jnp.zeros(3, jnp.float32), "n": jnp.arange(2)},
        loss,
        (X, Y),
        steps=stages,
        optim=optax.chain(optax.add_noise(1e-3, 0.5, jax.random.key(3)), optax.adam(0.05)),
        batch_size=6,
        validation=Validation((X, Y), every=3),
        average=Average(decay=0.9),
        checkpoint=checkpoint,
        progress=False,
        **{"key": jax.random.key(seed), "every": 1} | options,
    )


def digest(model, history):
    """Of every bit, but the seconds."""
    found = hashlib.sha256(np.asarray(model["w"]).tobytes())
    for name in sorted(set(history.columns) - {"seconds"}):
        found.update(name.encode() + np.asarray(history[name]).tobytes())
    return f"{len(history)} {found.hexdigest()}"


if __name__ == "__main__":
    path, seconds = sys.argv[1], float(sys.argv[2])
    print("begins", flush=True)
    print(digest(*run(path, callbacks=lambda numbers: time.sleep(seconds))), flush=True)
