# %% [markdown]
# # From a network to a formula
#
# A network that fits does not explain, and does not extrapolate. Here a damped pendulum is learned
# by a neural ODE, and regularized evolution looks for formulas that give what the network gives.
# Then the solve decides between them, against the data, and fits their constants.

# %%
import diffrax
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import optax

import nde

jax.config.update("jax_enable_x64", True)
tolerances = diffrax.PIDController(rtol=1e-5, atol=1e-7)


def make_model(field):
    return nde.NeuralODE(field, stepsize_controller=tolerances)


truth = nde.symbolic.Field.parse(["v", "-2.0 * sin(q) - 0.3 * v"], ("q", "v"))
ts = jnp.linspace(0.0, 3.0, 31)
y0s = jax.random.uniform(jax.random.key(0), (12, 2), minval=-2.0, maxval=2.0)
ys = jax.vmap(make_model(truth), in_axes=(None, 0))(ts, y0s)

# %% [markdown]
# The network knows nothing of pendulums. It is trained on trajectories, and not for long: for this
# it need not be good.

# %%
field = nde.fields.MLPField(
    2, width=32, depth=2, scale=6.0, last_layer_scale=0.1, key=jax.random.key(1)
)
network, history = nde.fit(
    make_model(field),
    nde.losses.trajectory,
    (jnp.tile(ts, (12, 1)), ys),
    optim=optax.adam(optax.cosine_decay_schedule(1e-2, 400)),
    steps=400,
    progress=False,
    key=jax.random.key(2),
)
print(f"loss {history.final_loss:.1e}")

# %% [markdown]
# Formulas are read from it at states that its own trajectories visit: elsewhere it has seen
# nothing.

# %%
states = jax.vmap(network, in_axes=(None, 0))(ts, y0s)[:, ::3].reshape(-1, 2)
fronts = nde.symbolic.distill(
    network,
    states,
    variables=("q", "v"),
    operators=("+", "-", "*", "sin"),
    length=10,
    generations=30,
    progress=False,
    key=jax.random.key(3),
)
print(fronts[1].table())

# %% [markdown]
# The errors of a network are no noise: a longer formula fits them too. So each pair of formulas is
# solved, its constants are fitted to the data, and the shortest that explains them is chosen.

# %%
refined = nde.symbolic.refine(fronts, make_model, ts, y0s, ys)
found = refined.choose()
print(found)

# %% [markdown]
# A formula may be used where there were no data: for three times as long, from a state outside.

# %%
later, far = jnp.linspace(0.0, 9.0, 91), jnp.array([2.6, 0.0])
curves = {
    "truth": make_model(truth)(later, far),
    "network": network(later, far),
    "formula": refined.model()(later, far),
}
for name in ("network", "formula"):
    print(f"{name}: largest error {float(jnp.max(jnp.abs(curves[name] - curves['truth']))):.1e}")
assert jnp.max(jnp.abs(curves["formula"] - curves["truth"])) < 1e-2

fig, ax = plt.subplots(figsize=(6, 3.2), layout="constrained")
for (name, curve), style in zip(curves.items(), ("k-", "C1--", "C0:"), strict=True):
    ax.plot(later, curve[:, 0], style, label=name)
ax.axvspan(0.0, 3.0, color="0.93")
ax.set(xlabel="t", ylabel="angle q")
ax.legend(frameon=False)

# %% [markdown]
# Next: [symbolic](../api/symbolic.md), with units, sparse regression, and formulas for a part of an
# equation.
