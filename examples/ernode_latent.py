"""# Irregular time series: a latent ODE that is cheap to solve

Damped oscillations x(t) = a exp(-g t) cos(w t + p), each with its own numbers, seen with noise at 40
irregular times of its own. A latent ODE reads every second observation backwards with a GRU, which
gives the latent state at the first time; the state follows a neural ODE, and a decoder reads it at
all 40 times. It is trained plain and with five regularizers of the dynamics.

*Gotcha: the times of the series differ, so every series has its own steps (`jax.vmap`); a batch takes
as long as its hardest series, and the regularizers are means over series.*

Source: Y. Rubanova et al., Latent ODEs for Irregularly-Sampled Time Series (2019) | arXiv:1907.03907
"""

import functools
import time

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

import nde
from nde import regularizers

SERIES, TEST, TIMES = 384, 128, 40
LATENT, HIDDEN = 6, 32
NOISE = 0.05
TOLERANCE = 1e-5  # of the adaptive steps, relative and absolute
# name -> (regularizer, its coefficient at the first step, and at the last); None: no regularizer
METHODS = {
    "vanilla": None,
    "STEER": (regularizers.steer, 1.0, 1.0),
    "SRNODE": (regularizers.stiffness_estimate, 1e-2, 1e-2),
    "ERNODE": (regularizers.error_estimate, 10.0, 1.0),
    "local, unbiased": (regularizers.local, 10.0, 1.0),
    "local, biased": (functools.partial(regularizers.local, biased=True), 10.0, 1.0),
}


def oscillators(series, seed):
    """Times on [0, 1], shape (series, times), and noisy values, shape (series, times, 1)."""
    rng = np.random.default_rng(seed)
    gaps = rng.uniform(0.2, 1.8, (series, TIMES))
    gaps[:, 0] = 0.0
    ts = np.cumsum(gaps, axis=1) / gaps.sum(axis=1, keepdims=True)
    draw = lambda low, high: rng.uniform(low, high, (series, 1))
    size, damping, phase = draw(0.5, 1.5), draw(0.0, 2.0), draw(0.0, 2 * np.pi)
    xs = size * np.exp(-damping * ts) * np.cos(draw(np.pi, 3 * np.pi) * ts + phase)
    xs = xs + NOISE * rng.standard_normal(xs.shape)
    return jnp.asarray(ts, dtype=float), jnp.asarray(xs[..., None], dtype=float)


class LatentODE(eqx.Module):
    """Encoder, latent neural ODE, decoder."""

    cell: eqx.nn.GRUCell
    initial: eqx.nn.Linear
    ode: nde.NeuralODE
    decoder: eqx.nn.MLP

    def __init__(self, key):
        keys = jax.random.split(key, 4)
        self.cell = eqx.nn.GRUCell(2, HIDDEN, key=keys[0])
        self.initial = eqx.nn.Linear(HIDDEN, LATENT, key=keys[1])
        self.ode = nde.NeuralODE(
            nde.fields.MLPField(LATENT, width=32, depth=2, scale=5.0, key=keys[2]),
            stepsize_controller=diffrax.PIDController(rtol=TOLERANCE, atol=TOLERANCE),
        )
        self.decoder = eqx.nn.MLP(LATENT, 1, 32, 1, jax.nn.softplus, key=keys[3])

    def encode(self, ts, xs):
        """The latent state at `ts[0]`, from every second observation, the last one first."""
        ts, xs = ts[::2], xs[::2]
        gaps = jnp.diff(ts, append=ts[-1:])[:, None] * TIMES

        def read(state, seen):
            return self.cell(seen, state), None

        inputs = jnp.concatenate([xs, gaps], axis=1)
        state, _ = jax.lax.scan(read, jnp.zeros(HIDDEN, xs.dtype), inputs, reverse=True)
        return self.initial(state)

    def __call__(self, ts, xs, key=None, regularizer=None):
        """Values at `ts`, the penalty of the regularizer, and the number of evaluations."""
        z0 = self.encode(ts, xs)
        if regularizer is None:
            solution, penalty = self.ode.solve(ts, z0, throw=False), jnp.zeros(())
        else:
            solution, penalty = regularizer(self.ode, ts, z0, key=key)
        failed = solution.result != diffrax.RESULTS.successful
        return jax.vmap(self.decoder)(solution.ys), penalty, solution.stats["nfe"], failed


def loss(model, batch, key, *, method, steps):
    """Mean squared error over all observations, and the regularizer."""
    regularizer, first, last = (None, 1.0, 1.0) if method is None else method
    ts, xs = batch.data
    solve = functools.partial(model, regularizer=regularizer)
    found, penalties, nfe, failed = jax.vmap(solve)(ts, xs, jax.random.split(key, ts.shape[0]))
    error, penalty = nde.losses.mse(found, xs), jnp.mean(penalties)
    coefficient = regularizers.exponential_decay(first, last, steps)(batch.step)
    metrics = {"error": error, "penalty": penalty, "failed": jnp.mean(failed.astype(float))}
    return error + coefficient * penalty, metrics | {"nfe": jnp.mean(nfe.astype(float))}


def train(data, method, *, steps, seed):
    """A trained model and its history."""
    return nde.fit(
        LatentODE(jax.random.key(seed)),
        functools.partial(loss, method=method, steps=steps),
        data,
        optim=optax.chain(
            optax.clip_by_global_norm(1.0), optax.adam(optax.cosine_decay_schedule(1e-2, steps))
        ),
        steps=steps,
        batch_size=SERIES // 6,  # divides the number of series: no batch is filled up
        progress=False,
        key=jax.random.key(seed + 1),
    )


@eqx.filter_jit
def predict(model, ts, xs):
    """Mean squared error and mean number of evaluations of plain solves."""
    found, _, nfe, _ = jax.vmap(model)(ts, xs)
    return nde.losses.mse(found, xs), jnp.mean(nfe.astype(float))


def report(model, history, known, held):
    """Errors, cost of training, cost of a prediction for all test series (the best of ten)."""
    (fitted, _), (test, nfe) = predict(model, *known), predict(model, *held)
    seconds = []
    for _ in range(10):
        began = time.perf_counter()
        jax.block_until_ready(predict(model, *held))
        seconds.append(time.perf_counter() - began)
    return {
        "train": float(fitted),
        "test": float(test),
        "seconds": history.seconds,
        "prediction_ms": 1e3 * min(seconds),
        "nfe": float(nfe),
    }


def main(
    steps: int = 1000, plot: bool = True, *, methods: tuple = tuple(METHODS), seed: int = 0
) -> dict:
    """Train with each method and print the table; errors, times and NFE by method.

    There is nothing to plot.
    """
    del plot
    known, held = oscillators(SERIES, seed), oscillators(TEST, seed + 1000)
    results = {}
    for name in methods:
        results[name] = report(*train(known, METHODS[name], steps=steps, seed=seed), known, held)
    print(f"{'':<17}{'train loss':>12}{'test loss':>12}{'train s':>9}{'predict ms':>12}{'NFE':>8}")
    for name, row in results.items():
        losses = f"{row['train']:>12.5f}{row['test']:>12.5f}"
        costs = f"{row['seconds']:>9.1f}{row['prediction_ms']:>12.1f}{row['nfe']:>8.1f}"
        print(f"{name:<17}{losses}{costs}")
    return results


# *What to take away*: many latent fields explain the same series (no loss can be below the noise,
# 0.0025). They differ in what a solver has to do, and its own error estimate picks a cheap one.
# *Next*: the same on images, with the trade-off of NFE and accuracy: `ernode_digits.py`.

if __name__ == "__main__":
    main()
