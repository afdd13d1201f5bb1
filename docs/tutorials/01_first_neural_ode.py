# %% [markdown]
# # A first neural ODE on your own arrays
#
# What you need is two arrays: times of shape `(times,)` and states of shape `(series, times,
# channels)`. Here they are made by NumPy; put yours in their place. The model is
#
#     y' = f(y),   y(0) = the first observation,
#
# where the network f is learned from the trajectories.

# %%
import pathlib
import tempfile

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import nde

ts = np.linspace(0.0, 2.0, 21)
rng = np.random.default_rng(0)
radius, phase = rng.uniform(0.5, 1.5, (12, 1)), rng.uniform(0.0, 2 * np.pi, (12, 1))
angle = phase + 2.0 * ts
ys = (radius * np.exp(-0.2 * ts))[..., None] * np.stack([np.cos(angle), np.sin(angle)], axis=-1)
ys = ys + 0.01 * rng.standard_normal(ys.shape)
print(ts.shape, ys.shape)

# %% [markdown]
# `nde.fit` wants one leading axis of examples on all arrays, so the times are repeated. Two series
# are held out. `scale` bounds the rates that the network can give: take a little more than the
# largest slope. A small `last_layer_scale` starts it near y' = 0.

# %%
data = (jnp.tile(jnp.asarray(ts), (12, 1)), jnp.asarray(ys))
train, held_out = (jax.tree.map(lambda a: a[:10], data), jax.tree.map(lambda a: a[10:], data))

field = nde.fields.MLPField(
    2, width=32, depth=2, scale=4.0, last_layer_scale=0.1, key=jax.random.key(0)
)
model, history = nde.fit(
    nde.NeuralODE(field),
    nde.losses.trajectory,
    train,
    optim=optax.adam(optax.cosine_decay_schedule(1e-2, 1000)),
    steps=1000,
    progress=False,
    key=jax.random.key(1),
)
print(history.summary())

# %% [markdown]
# The series that were held out start where the network has not been told to start.

# %%
predicted = jax.vmap(model)(held_out[0], held_out[1][:, 0])
error = float(jnp.sqrt(jnp.mean((predicted - held_out[1]) ** 2)))
print(f"root mean square error of the held-out series: {error:.3f}")
assert error < 0.1

fig, axes = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
for ax, y, seen in zip(axes, predicted, held_out[1], strict=True):
    ax.plot(ts, y, lw=1.5)
    ax.set_prop_cycle(None)
    ax.plot(ts, seen, ".", ms=4)
    ax.set_xlabel("t")

# %% [markdown]
# A file holds the arrays of the model; they are read into a model of the same structure.

# %%
file = pathlib.Path(tempfile.mkdtemp()) / "model.safetensors"
nde.save(file, model)
loaded = nde.load(file, nde.NeuralODE(field))
assert jnp.array_equal(jax.vmap(loaded)(held_out[0], held_out[1][:, 0]), predicted)

# %% [markdown]
# Next: [which model, solver and loss](../choosing.md), and [what to do when it does not
# train](../does_not_train.md).
