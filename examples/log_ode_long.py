"""# A long series in few steps: the log-ODE method

Walks of three channels and 512 steps. What a walk has done is not where it is: the label says
whether the first two channels have run around each other to the left or to the right, the sign of
their area. Three models of the same size, with the same network:

- A **neural CDE** takes a step per observation: it sees everything, and takes 512 steps in a row.
- A **log-ODE of depth 1** takes two steps per window of 128: it sees what a series of five points
  would show.
- A **log-ODE of depth 2** takes as few, and knows from each window its area too.

*Gotcha: the log-signature of a window of size e has a level 2 of size e^2. Scale the channels so that
a window is of order one.*

Reference:  Log neural controlled differential equations (2024) | arXiv:2402.18512
"""

import time

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

import nde
from nde import paths
from nde.cde import NeuralCDE
from nde.log_cde import LogNeuralCDE

HIDDEN, CHANNELS = 8, 4  # time and three channels


def walks(number, length, rng):
    """Straight paths through walks, and labels: whether the area of channels 1 and 2 is positive."""
    steps = rng.normal(size=(number, length, 3)) * np.sqrt(2.0 / length)
    ys = np.concatenate([np.zeros((number, 1, 3)), np.cumsum(steps, axis=1)], axis=1)
    x, y = ys[:, :-1, 0], ys[:, :-1, 1]
    area = np.sum(x * steps[:, :, 1] - y * steps[:, :, 0], axis=1)
    ts = jnp.linspace(0.0, 1.0, length + 1)
    make = jax.jit(jax.vmap(paths.linear, in_axes=(None, 0)))
    return make(ts, jnp.asarray(ys, dtype=ts.dtype)), jnp.asarray(area > 0, dtype=ts.dtype)


def make_model(kind, key, **numerics):
    """From (time, three channels) to the logarithm of the odds of a positive area."""
    key_field, key_initial, key_readout = jax.random.split(key, 3)
    field = nde.fields.MatrixField(
        HIDDEN, CHANNELS, width=32, depth=1, activation=jax.nn.silu, key=key_field
    )
    initial = eqx.nn.Linear(CHANNELS, HIDDEN, key=key_initial)
    return kind(field, initial, eqx.nn.Linear(HIDDEN, "scalar", key=key_readout), **numerics)


def loss(model, batch, key):
    """Cross-entropy."""
    controls, labels = batch.data
    entropy = optax.sigmoid_binary_cross_entropy(jax.vmap(model)(controls), labels)
    return jnp.mean(entropy, where=batch.mask)


def train(model, known, held, steps, seed):
    """Test accuracy, seconds of a training step, and the steps of a solve."""
    began = time.perf_counter()
    model, history = nde.fit(
        model,
        loss,
        known,
        optim=optax.chain(
            optax.clip_by_global_norm(1.0), optax.adam(optax.cosine_decay_schedule(1e-2, steps))
        ),
        steps=steps,
        batch_size=64,
        progress=False,
        key=jax.random.key(seed),
    )
    controls, labels = held
    right = (jax.jit(jax.vmap(model))(controls) > 0) == (labels > 0.5)
    return {
        "loss": history.final_loss,
        "accuracy": float(right.mean()),
        "milliseconds": 1e3 * history.seconds / steps,
        "seconds": time.perf_counter() - began,
    }


def main(
    steps: int = 300, plot: bool = True, *, length: int = 512, window: int = 128, seed: int = 0
) -> dict:
    """Train the three models; test accuracies, losses and times by model. There is nothing to
    plot."""
    del plot
    rng = np.random.default_rng(seed)
    known, held = walks(2048, length, rng), walks(1024, length, rng)
    key, results = jax.random.key(seed), {}

    def windows(data, depth):
        shorten = jax.vmap(lambda path: paths.log_signature(path, window, depth))
        return jax.jit(shorten)(data[0]), data[1]

    for depth in (1, 2):
        model = make_model(LogNeuralCDE, key, solver=diffrax.Heun(), steps_per_interval=2)
        data = windows(known, depth), windows(held, depth)
        results[f"log-ODE, depth {depth}"] = train(model, *data, steps, seed + 1)
    results["neural CDE"] = train(make_model(NeuralCDE, key), known, held, steps, seed + 1)
    print(f"{'':<18}{'loss':>8}{'accuracy':>10}{'ms per step':>13}{'seconds':>9}")
    for name, row in results.items():
        errors = f"{row['loss']:>8.3f}{row['accuracy']:>10.1%}"
        print(f"{name:<18}{errors}{row['milliseconds']:>13.1f}{row['seconds']:>9.1f}")
    if steps >= 300:  # fewer are a trial of the program, not a fit
        first, second, plain = (results[name] for name in results)
        assert second["accuracy"] > first["accuracy"] + 0.05, "the area must help"
        assert second["accuracy"] > plain["accuracy"] - 0.03, "and tell nearly all"
        assert second["milliseconds"] < plain["milliseconds"] / 3, "in a fraction of the time"
    return results


# *What to take away*: a window is not its increment. With its area, few long steps are enough.
# *Next*: deeper log-signatures with a network of their own, `LogNeuralCDE(..., brackets=False)`.

if __name__ == "__main__":
    main()
