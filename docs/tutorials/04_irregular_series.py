# %% [markdown]
# # Irregular series with a neural CDE
#
# Each series is seen at times of its own, and some values are missing. A controlled equation
#
#     dz = F(z) dX,   z(t0) = g(X(t0)),   answer = a linear function of z(t1)
#
# is driven by a path X through what was observed, with the time as its first channel. So the
# observations need no grid. The question here: which way does a noisy spiral turn?

# %%
import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import nde


def spirals(number, rng):
    """A list of (times, values) of unequal lengths, and labels: 1 turns left, 0 turns right."""
    series, labels = [], np.arange(number) % 2
    for label in labels:
        inside = 0.02 * np.sort(rng.choice(np.arange(1, 200), rng.integers(10, 20), replace=False))
        ts = np.concatenate([[0.0], inside, [4.0]])
        angle = rng.uniform(0, 2 * np.pi) + (2 * label - 1) * 2.0 * ts
        y = np.exp(-0.2 * ts)[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=-1)
        y = y + 0.02 * rng.standard_normal(y.shape)
        y[1:-1][rng.uniform(size=(len(ts) - 2, 2)) < 0.2] = np.nan  # not observed
        series.append((ts, y))
    return series, jnp.asarray(labels, dtype=float)


rng = np.random.default_rng(0)
series, labels = spirals(128, rng)
print("lengths:", [len(ts) for ts, _ in series[:8]], "...")

# %% [markdown]
# `pad_series` makes one array of them, `hermite_cubic` the paths. The padding never reaches the
# model, and a channel with a gap is interpolated from the observations on both sides of it.

# %%


def make_paths(series):
    ts, ys, _, lengths = nde.paths.pad_series(series)
    return jax.vmap(nde.paths.hermite_cubic)(ts, ys, lengths)


controls = make_paths(series)
keys = jax.random.split(jax.random.key(0), 3)
model = nde.NeuralCDE(
    nde.fields.MatrixField(8, 3, width=32, depth=1, key=keys[0]),
    eqx.nn.MLP(3, 8, 32, 1, key=keys[1]),
    eqx.nn.Linear(8, "scalar", key=keys[2]),
)


def loss(model, batch, key):
    """Cross-entropy of the labels."""
    controls, labels = batch.data
    entropy = optax.sigmoid_binary_cross_entropy(jax.vmap(model)(controls), labels)
    return jnp.mean(entropy, where=batch.mask)


model, history = nde.fit(
    model,
    loss,
    (controls, labels),
    optim=optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-2)),
    steps=80,
    batch_size=32,
    progress=False,
    key=jax.random.key(1),
)
print(history.summary())

# %% [markdown]
# New series, which the model has not seen:

# %%
series, labels = spirals(128, rng)
controls = make_paths(series)
predict = eqx.filter_jit(lambda model, controls: jax.vmap(model)(controls))
logits = predict(model, controls)
accuracy = float(jnp.mean((logits > 0) == (labels > 0.5)))
print(f"right: {accuracy:.1%}")
assert accuracy > 0.95

# %% [markdown]
# `model.trajectory` gives the answer at every observation: how soon does the model know?

# %%
odds = jax.vmap(model.trajectory)(controls)
fig, (left, right) = plt.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
for i in range(6):
    ts, y = series[i]
    color = "#EE7733" if labels[i] else "#4477AA"
    if i < 2:
        path = jax.tree.map(lambda leaf, i=i: leaf[i], controls)
        fine = jax.vmap(path.evaluate)(jnp.linspace(0.0, 4.0, 200))
        left.plot(fine[:, 1], fine[:, 2], color=color, lw=1)
        left.plot(y[:, 0], y[:, 1], "o", color=color, ms=3)
    right.plot(ts, jax.nn.sigmoid(odds[i, : len(ts)]), ".-", color=color, lw=1)
left.set(xlabel="x", ylabel="y", title="two series and the paths through them", aspect=1)
right.set(xlabel="t", ylabel="probability of a left turn")

# %% [markdown]
# Next: series that arrive point by point are read by `nde.paths.Stream`; long ones by the log-ODE
# method ([control paths](../theory/control_paths.md)).
