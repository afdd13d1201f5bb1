"""# Which way does it turn? A neural CDE reads irregular series

Each series is a spiral in the plane, seen at points in time of its own; half of them are mirrored.
A neural controlled differential equation follows the path through the points and says which half a
series belongs to. Then 30, 50 and 70 % of the points are dropped, others from each series.

*Gotcha: time is a channel of the path. Two spirals that pass through the same points, one twice as
fast, are otherwise the same path.*

Reference:  Neural controlled differential equations for irregular time series (2020) |
            arXiv:2005.08926
"""

import time

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

import nde
from nde import paths
from nde.cde import NeuralCDE

MATRIX = np.array([[-0.3, 2.0], [-2.0, -0.3]])  # decay and rotation: y' = MATRIX y
POINTS = 100  # on [0, 4 pi]: a series turns four times
HIDDEN = 8


def observed(number, dropped, rng):
    """Times (points,), values (number, points, 2), which are seen, and labels; 1 is mirrored."""
    ts = np.linspace(0.0, 4 * np.pi, POINTS)
    angle = rng.uniform(0, 2 * np.pi, number)[:, None] - 2.0 * ts
    radius = np.exp(-0.3 * ts)
    labels = (np.arange(number) % 2).astype(float)
    mirror = np.where(labels == 1, -1.0, 1.0)[:, None]
    ys = np.stack([mirror * radius * np.cos(angle), radius * np.sin(angle)], axis=-1)
    seen = rng.uniform(size=(number, POINTS)) >= dropped
    seen[:, 0] = seen[:, -1] = True
    return ts, ys, seen, labels


def spirals(number, dropped, rng):
    """Paths through `number` spirals without a fraction of their points, and labels."""
    ts, ys, seen, labels = observed(number, dropped, rng)
    series = [(ts[rows], y[rows]) for rows, y in zip(seen, ys, strict=True)]
    # Series of unequal length become one array; their padding never reaches the model.
    ts, ys, _, lengths = paths.pad_series(series)
    return jax.jit(jax.vmap(paths.hermite_cubic))(ts, ys, lengths), jnp.asarray(labels)


def make_model(key):
    """From (time, x, y) to the logarithm of the odds of being mirrored."""
    key_field, key_initial, key_readout = jax.random.split(key, 3)
    field = nde.fields.MatrixField(HIDDEN, 3, width=128, depth=1, key=key_field)
    initial = eqx.nn.MLP(3, HIDDEN, 128, 1, key=key_initial)
    return NeuralCDE(field, initial, eqx.nn.Linear(HIDDEN, "scalar", key=key_readout))


def loss(model, batch, key):
    """Cross-entropy, and the fraction that is classified rightly."""
    controls, labels = batch.data
    logits = jax.vmap(model)(controls)
    entropy = optax.sigmoid_binary_cross_entropy(logits, labels)
    right = (logits > 0) == (labels > 0.5)

    accuracy = jnp.mean(right.astype(entropy.dtype), where=batch.mask)
    return jnp.mean(entropy, where=batch.mask), {"accuracy": accuracy}


def train(dropped, steps, seed):
    """Train on 256 series and test on 256 others with as many points dropped."""
    rng = np.random.default_rng(seed)
    began = time.perf_counter()
    model, history = nde.fit(
        make_model(jax.random.key(seed)),
        loss,
        spirals(256, dropped, rng),
        optim=optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-2)),
        steps=steps,
        batch_size=32,
        progress=False,
        key=jax.random.key(seed + 1),
    )
    controls, labels = spirals(256, dropped, rng)
    right = (jax.jit(jax.vmap(model))(controls) > 0) == (labels > 0.5)
    return model, {
        "loss": history.final_loss,
        "accuracy": float(right.mean()),
        "seconds": time.perf_counter() - began,
    }


def picture(models):
    """Three series with 70 % of their points dropped, and what the model thinks as they go on."""
    import matplotlib.pyplot as plt

    model = models[max(models)]
    controls, labels = spirals(6, max(models), np.random.default_rng(5))
    fig, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    odds = jax.jit(jax.vmap(model.trajectory))(controls)
    for i, label in enumerate(labels):
        control = jax.tree.map(lambda leaf, i=i: leaf[i], controls)
        color = "#EE7733" if label > 0.5 else "#4477AA"
        fine = jax.vmap(control.evaluate)(jnp.linspace(control.t0, control.t1, 400))
        at = jax.vmap(control.evaluate)(control.times)
        if i < 2:
            name = "mirrored" if label > 0.5 else "not mirrored"
            left.plot(fine[:, 1], fine[:, 2], color=color, lw=1.2, label=name)
            left.plot(at[:, 1], at[:, 2], color=color, ls="", marker="o", ms=4)
        right.plot(control.times, jax.nn.sigmoid(odds[i]), color=color, marker=".", lw=1.2)
    left.set(xlabel="x", ylabel="y", title=f"{max(models):.0%} of the points dropped", aspect=1)
    fig.legend(ncols=2, loc="outside upper left", frameon=False)
    right.set(xlabel="time", ylabel="probability of being mirrored", ylim=(-0.03, 1.03))
    for ax in (left, right):
        ax.spines[["top", "right"]].set_visible(False)
    nde.plot.save(fig, "cde_spirals.png")


def main(
    steps: int = 120, plot: bool = True, *, drops: tuple = (0.0, 0.3, 0.5, 0.7), seed: int = 0
) -> dict:
    """Train for each fraction of dropped points; test accuracies, losses and seconds by fraction."""
    runs = {dropped: train(dropped, steps, seed) for dropped in drops}
    results = {dropped: report for dropped, (_, report) in runs.items()}
    print(f"{'dropped':>8}{'loss':>10}{'accuracy':>10}{'seconds':>9}")
    for dropped, row in results.items():
        print(f"{dropped:>8.0%}{row['loss']:>10.4f}{row['accuracy']:>10.1%}{row['seconds']:>9.1f}")
    if plot:
        picture({dropped: model for dropped, (model, _) in runs.items()})
    if steps >= 100:  # fewer are a trial of the program, not a fit
        for dropped, row in results.items():
            assert row["accuracy"] >= (1.0 if dropped == 0 else 0.97), (dropped, row)
    return results


# *What to take away*: where the points are does not matter, what the path through them does matters.
# *Next*: a series that arrives point by point, `nde.paths.Stream`; a longer one, `log_ode_long.py`.

if __name__ == "__main__":
    main()
