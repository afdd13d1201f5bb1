# %% [markdown]
# # A neural SDE without an adversary
#
# Paths of an Ornstein-Uhlenbeck process are given, its equation is not. A neural SDE
#
#     dX = f(t, X) dt + G(t, X) dW,   Y = a linear function of X
#
# is fitted to them. A squared error between drawn and observed paths is least at a model *without*
# noise. So the two laws are compared, by the energy score of the values at pairs of times: for a
# Markov process these determine the law.

# %%
import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import nde
from nde.solvers import ReversibleHeun

ts = np.linspace(0.0, 2.0, 9)


def process(paths, rng):
    """Exact paths of dY = -Y dt + 0.7 dW from Y(0) ~ N(1, 0.2^2), shape (paths, times, 1)."""
    rows = [1.0 + 0.2 * rng.standard_normal(paths)]
    decay = np.exp(-(ts[1] - ts[0]))
    spread = 0.7 * np.sqrt((1 - decay**2) / 2)
    for _ in ts[1:]:
        rows.append(decay * rows[-1] + spread * rng.standard_normal(paths))
    return np.stack(rows, axis=1)[..., None]


rng = np.random.default_rng(0)
observed = process(2048, rng)
data = (jnp.tile(jnp.asarray(ts), (2048, 1)), jnp.asarray(observed))

# %% [markdown]
# The model draws its start from a normal distribution through a network, and its noise inside the
# solve.

# %%
keys = jax.random.split(jax.random.key(0), 4)
model = nde.NeuralSDE(
    eqx.nn.MLP(2, 4, 16, 1, key=keys[0]),
    nde.fields.MLPField(4, 16, 1, time=True, key=keys[1]),
    nde.fields.MatrixField(4, 2, 16, 1, time=True, key=keys[2]),
    eqx.nn.Linear(4, 1, key=keys[3]),
    initial_noise=2,
    solver=ReversibleHeun(),
)
score = functools.partial(nde.losses.finite_dimensional_score, draws=8)
model, history = nde.fit(
    model,
    functools.partial(nde.losses.path_score, score=score),
    data,
    optim=optax.chain(
        optax.clip_by_global_norm(1.0), optax.adam(optax.cosine_decay_schedule(1e-2, 400))
    ),
    steps=400,
    batch_size=256,
    progress=False,
    key=jax.random.key(1),
)
print(history.summary())

# %% [markdown]
# A falling score proves little. Fresh paths of both are compared: mean, spread, and the correlation
# of neighboring times, which no marginal shows.

# %%
times = jnp.asarray(ts)
draw = eqx.filter_jit(lambda model, keys: jax.vmap(lambda key: model(times, key=key))(keys))
drawn = np.asarray(draw(model, jax.random.split(jax.random.key(2), 2048)))
fresh = process(2048, rng)


def summary(y):
    correlation = np.corrcoef(y[:, -2, 0], y[:, -1, 0])[0, 1]
    return y[:, -1].mean(), y[:, -1].std(), correlation


for name, y in (("process", fresh), ("model", drawn)):
    mean, spread, correlation = summary(y)
    print(f"{name:<8} mean {mean:.3f}, spread {spread:.3f}, correlation {correlation:.3f}")
assert np.allclose(summary(drawn), summary(fresh), atol=0.12)

fig, axes = plt.subplots(1, 2, figsize=(9, 3.2), sharey=True, layout="constrained")
for ax, y, title in zip(axes, (fresh, drawn), ("process", "model"), strict=True):
    nde.plot.fan(ts, y, ax=ax)
    ax.plot(ts, y[:5, :, 0].T, color="0.3", lw=0.7)
    ax.set(title=title, xlabel="t")

# %% [markdown]
# Next: [which loss for which SDE](../stochastic_losses.md).
