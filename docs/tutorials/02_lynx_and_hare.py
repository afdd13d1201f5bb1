# %% [markdown]
# # Lynx and hare: equations, a network, and both
#
# Pelts of snowshoe hare and Canadian lynx traded by the Hudson's Bay Company, in thousands: prey
# and predator in the wild. Three models are fitted to 1900 to 1914 and asked for 1915 to 1920.
#
# - **Equations**: hares grow at the rate `birth - predation * lynxes`, lynxes at `conversion *
#   hares - death` (Lotka and Volterra). Four numbers.
# - **A network**: a neural ODE, which knows nothing.
# - **Both**: the equations plus a network that starts at zero and is kept small.
#
# The data are those that C. G. Hewitt printed in *The Conservation of the Wild Life of Canada*
# (1921).

# %%
import functools

import diffrax
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import nde
from nde.hybrid import Positive

jax.config.update("jax_enable_x64", True)

HARE = """30 47.2 70.2 77.4 36.3 20.6 18.1 21.4 22 25.4 27.1 40.3 57 76.6 52.3 19.5 11.2 7.6 14.6
          16.2 24.7"""
LYNX = "4 6.1 9.8 35.2 59.4 41.7 19 13 8.3 9.1 7.4 8 12.3 19.5 45.7 51.1 29.7 15.8 9.7 10.1 8.6"
pelts = np.array([HARE.split(), LYNX.split()], dtype=float).T
years = np.arange(1900, 1921)
seen = 15  # of the 21 years are trained on
print(pelts.shape)

# %% [markdown]
# The state is the logarithm of the populations, in units of a typical one. So populations stay
# positive, errors are relative, and what enters a network is of order one.

# %%
typical = np.array([30.0, 15.0])
ts = jnp.asarray(years - 1900, dtype=float)
logs = jnp.log(jnp.asarray(pelts / typical, dtype=float))
numerics = {"stepsize_controller": diffrax.PIDController(rtol=1e-4, atol=1e-6)}


def lotka_volterra(t, y, p):
    """Rates of change of the logarithms of hares and lynxes."""
    hare, lynx = typical * jnp.exp(y)
    return jnp.stack([p["birth"] - p["predation"] * lynx, p["conversion"] * hare - p["death"]])


# %% [markdown]
# ## The equations
#
# Four rates and the state at the start are six numbers: least squares. A model may be a tuple, here
# of an equation and its start. Orders of magnitude are enough to begin with.


# %%
def residuals(model, data):
    (ode, start), (ts, logs) = model, data
    return ode.solve(ts, start, throw=False).ys - logs


guess = {"birth": 0.5, "predation": 0.02, "conversion": 0.02, "death": 0.5}
known = nde.HybridODE(
    lotka_volterra, None, {name: Positive(rate) for name, rate in guess.items()}, **numerics
)
fitted = nde.least_squares((known, logs[0]), (ts[:seen], logs[:seen]), residuals)
rates, deviations = fitted.of(lambda model: model[0].physical_parameters())
for name in guess:
    print(f"{name:11}{rates[name]:.4f} +- {deviations[name]:.4f}")

# %% [markdown]
# ## The network, and both
#
# Weights by the hundred need gradient descent. A network that is asked for fifteen years at once
# settles on their mean; so it is asked for a beginning of the series that grows. Several starts
# train side by side: where they agree on the data and not on the forecast, the data do not
# determine it.
#
# The errors of the data are about 20 %, and a correction of the growth by 10 % a year is plausible.
# The most probable correction minimizes error^2 / 0.2^2 + correction^2 / 0.1^2.

# %%
penalty = (0.2 / 0.1) ** 2


def loss(model, batch, key, *, horizon):
    """Mean square error of the logarithms, and what the correction costs."""
    (ode, start), (ts, logs) = model, batch.data
    ts, mask = nde.losses.growing_horizon(ts[0], horizon(batch.step))
    value = nde.losses.mse(ode.solve(ts, start, throw=False).ys, logs[0], mask)
    if isinstance(ode, nde.HybridODE):
        correction = jax.vmap(ode.network, in_axes=(None, 0))(ts[0], logs[0])
        value += penalty * jnp.mean(correction**2)
    return value


def train(make_model, steps, first):
    """Three starts, best first; `first` is the part of the series that is asked for at first."""
    return nde.train.multi_start(
        make_model,
        functools.partial(loss, horizon=optax.linear_schedule(first, 1.0, steps // 2)),
        (ts[None, :seen], logs[None, :seen]),  # one example
        starts=3,
        optim=optax.chain(
            optax.clip_by_global_norm(1.0), optax.adam(optax.cosine_decay_schedule(5e-3, steps))
        ),
        steps=steps,
        progress=False,
        key=jax.random.key(0),
    )[0]


def make_neural(key):
    field = nde.fields.MLPField(2, width=32, depth=2, scale=2.0, key=key)
    return nde.NeuralODE(field, **numerics), logs[0]


def make_hybrid(key):
    network = nde.fields.MLPField(2, width=16, depth=2, last_layer_scale=0.0, key=key)
    ode, start = fitted.model  # begin where the equations alone are best
    return nde.HybridODE(lotka_volterra, network, ode.parameters, **numerics), start


models = {
    "equations": [fitted.model],
    "network": train(make_neural, 1000, first=0.2),
    "both": train(make_hybrid, 300, first=1.0),
}

# %% [markdown]
# ## Six years that no model has seen

# %%
fine = jnp.linspace(0.0, 20.0, 401)  # every 20th is a year
curves = {name: [ode(fine, start) for ode, start in starts] for name, starts in models.items()}


def errors(curve):
    """Root mean square error of the logarithms: of the years trained on, and of the forecast."""
    squares = (curve[::20] - logs) ** 2
    return float(jnp.sqrt(squares[:seen].mean())), float(jnp.sqrt(squares[seen:].mean()))


table = {name: [errors(curve) for curve in starts] for name, starts in curves.items()}
for name, rows in table.items():
    forecasts = ", ".join(f"{forecast:.2f}" for _, forecast in rows)
    print(f"{name:10} error of the fit {rows[0][0]:.3f}, of the forecast {forecasts}")
fit, forecast = ({name: rows[0][i] for name, rows in table.items()} for i in (0, 1))
assert fit["network"] < fit["both"] < fit["equations"] < 0.2
assert forecast["both"] < forecast["network"]

# %%
colors = {"equations": "#4477AA", "network": "#EE7733", "both": "#228833"}
fig, axes = plt.subplots(2, 1, figsize=(9, 5), sharex=True, layout="constrained")
for name, starts in curves.items():
    for rank, curve in enumerate(starts):  # the best start and, thin, the others
        style = {"lw": 0.7, "alpha": 0.6} if rank else {"lw": 1.8, "label": name}
        for ax, ys in zip(axes, (typical * np.exp(curve)).T, strict=True):
            ax.plot(1900 + fine, ys, color=colors[name], **style)
for ax, species, values in zip(axes, ("hare", "lynx"), pelts.T, strict=True):
    ax.plot(years[:seen], values[:seen], "ko", ms=4, label="trained on")
    ax.plot(years[seen:], values[seen:], "ko", ms=4, mfc="white", label="held out")
    ax.axvspan(1914, 1920.5, color="0.95", zorder=0)
    ax.set(yscale="log", ylabel=f"{species}, thousand pelts", xticks=range(1900, 1921, 5))
axes[0].legend(frameon=False, ncols=5, loc="lower center", bbox_to_anchor=(0.5, 1.0))
