# %% [markdown]
# # An outbreak: two rates, their errors, and a forecast
#
# In January 1978 influenza went through an English boarding school of 763 boys. Every day those
# confined to bed were counted. The SIR equations say how such an outbreak goes,
#
#     S' = -beta S I / 763,      I' = beta S I / 763 - gamma I,
#
# with S the boys who can still catch it and I those who are ill. Two rates are unknown. How
# contagious was it: how many others does the first ill boy infect, R0 = beta / gamma? Could one
# have known after a week? And was the transmission constant?

# %%
import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import nde
from nde.hybrid import Positive

jax.config.update("jax_enable_x64", True)

days = np.arange(14.0)  # from 22 January
in_bed = np.array([3, 8, 26, 76, 225, 298, 258, 233, 189, 128, 68, 29, 14, 4], dtype=float)
known_on_day_7 = np.where(days <= 7, in_bed, np.nan)
data, week = (nde.measured.experiments([(days, counts)]) for counts in (in_bed, known_on_day_7))

# %% [markdown]
# ## The equations, and how they are observed
#
# `nde.Measured` joins an equation to data: where it starts, what of it is seen, with what error. The
# number of boys ill at first is a parameter like the rates. Counts scatter more than those of a
# Poisson law, since boys infect each other: the variance of this law is m + m^2 / 20 for a mean m.


# %%
def sir(t, y, p):
    susceptible, ill = y
    new = p["beta"] * susceptible * ill / 763
    return jnp.stack([-new, new - p["gamma"] * ill])


def make_model(ode):
    return nde.Measured(
        ode,
        start=lambda p, x: jnp.stack([763 - p["first"], p["first"]]),
        observe=lambda t, y, p, x: y[1:],  # those ill are in bed
        errors=nde.measured.NegativeBinomial(20.0),
    )


guess = {"beta": Positive(1.5), "gamma": Positive(0.5), "first": Positive(2.0)}
model = make_model(nde.HybridODE(sir, None, guess, coordinates=nde.hybrid.Logarithms()))

# %% [markdown]
# ## Three numbers with their errors
#
# Three parameters need no network's training: `nde.least_squares` takes a few steps of
# Levenberg-Marquardt to the most probable ones. What it returns knows how well the data determine
# any function of the model. In the week's data, the days after day 7 are missing values.


# %%
def r0(model):
    p = model.ode.physical_parameters()
    return p["beta"] / p["gamma"]


residuals = nde.inference.measured_residuals
full = nde.least_squares(model, data, residuals, noise=1.0)
early = nde.least_squares(model, week, residuals, noise=1.0)
values, errors = full.of(lambda m: m.ode.physical_parameters())
for name in values:
    print(f"{name:6} {values[name]:.2f} +- {errors[name]:.2f}")
for name, estimate in (("all days", full), ("day 7   ", early)):
    print("R0, {}: {:.2f} +- {:.2f}".format(name, *estimate.of(r0)))

# %% [markdown]
# A boy was ill for 1 / gamma, about two days, and infected between three and four others while
# nearly all could still catch it.
#
# ## A forecast from day 7
#
# What can be counted tomorrow is uncertain for two reasons: the parameters are, and counts scatter.
# So parameters are drawn, and counts from each.

# %%
ts = jnp.linspace(0.0, 13.0, 53)


@eqx.filter_jit
def counts_of(models, keys):
    """Counts that could be, of models side by side; shape (models, times)."""
    return eqx.filter_vmap(lambda m, key: m.sample(data[0].at(ts), key=key)[:, 0])(models, keys)


def draw(estimate):
    models = eqx.filter_vmap(estimate.at)(estimate.samples(200, key=jax.random.key(0)))
    return np.asarray(counts_of(models, jax.random.split(jax.random.key(1), 200)))


forecast = draw(early)
bottom, top = np.quantile(forecast[:, ::4], [0.05, 0.95], axis=0)  # at the days
inside = (bottom <= in_bed) & (in_bed <= top)
print(f"of days 8 to 13 in their 90 % band: {inside[8:].sum()} of 6")

# %% [markdown]
# ## Was the transmission constant?
#
# Let beta be multiplied by exp(g(t)), g a small network that starts at zero. The fourteen counts do
# not determine its 25 weights, so each costs what it moves from its start, in units of 0.25: a
# change of the transmission by a factor of about 1.5 is then plausible before one has seen the
# data. That cost is more residuals, and the same call gives g with its band.


# %%
def log_change(network, t):
    """g(t), of a network of the time in weeks around day 7."""
    week = t / 7 - 1
    return network(week, week[None])[0]


def changing(known, network, t, y, p, args):
    return known(t, y, p | {"beta": p["beta"] * jnp.exp(log_change(network, t))})


network = nde.fields.MLPField(
    1, 8, 1, activation=jnp.tanh, last_layer_scale=0.0, key=jax.random.key(0)
)
held = full.model.ode.parameters | {"beta": nde.hybrid.Frozen(values["beta"])}  # g has its scale
free = nde.HybridODE(sir, network, held, combine=changing, coordinates=nde.hybrid.Logarithms())


def residuals_and_weights(model, data):
    arrays = lambda tree: jax.tree.leaves(eqx.filter(tree, eqx.is_inexact_array))
    pairs = zip(arrays(model.ode.network), arrays(network), strict=True)
    return residuals(model, data), [(now - start) / 0.25 for now, start in pairs]


learned = nde.least_squares(make_model(free), data, residuals_and_weights, noise=1.0)
g, band = learned.of(lambda m: jax.vmap(lambda t: log_change(m.ode.network, t))(ts))
factor, low, high = (np.exp(g + k * band) for k in (0.0, -1.645, 1.645))
for i in (0, 16, 32, 48):
    print(f"day {ts[i]:2.0f}: {factor[i]:.2f} times ({low[i]:.2f} to {high[i]:.2f})")
print(f"cost {full.cost:.1f} with a constant one, {learned.cost:.1f} with a learned one")

# %%
fig, axes = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
titles = ("all days", "as known on day 7", "learned transmission")
for ax, title, draws, seen in zip(axes, titles, (draw(full), forecast), (14, 8), strict=False):
    nde.plot.fan(ts, draws, ax=ax, levels=(0.5, 0.9), color="#4477AA")
    ax.plot(days[:seen], in_bed[:seen], "ko", ms=4, label="counted")
    ax.plot(days[seen:], in_bed[seen:], "ko", ms=4, mfc="white", label="not yet known")
    ax.set(title=title, xlabel="day", ylabel="boys in bed", ylim=(0, 450))
axes[1].legend(frameon=False)
axes[2].plot(ts, factor, color="#228833")
axes[2].fill_between(ts, low, high, color="#228833", alpha=0.25, lw=0)
axes[2].axhline(1.0, color="0.6", lw=1)
axes[2].set(title=titles[2], xlabel="day", ylabel="factor on the transmission", ylim=(0, 4))

assert 3.5 < r0(full.model) < 4.0, "published values"
assert inside[8:].sum() >= 4
assert np.all((low < 1.2) & (high > 0.85)), "a constant transmission is not refuted"

# %% [markdown]
# The band holds 1, or nearly so, on every day, and the cost hardly falls: fourteen counts do not ask
# for a transmission that changes. Take away:
#
# - A few numbers want least squares, which gives their errors with them.
# - A forecast needs both: the errors of the parameters and those of the counts.
# - A network of which every weight has its price gets a band too, and may say that it is not needed.
#
# Next: [from a table to a forecast with bands](../hybrid_tutorial.md), and
# [what the data say](../api/inference.md).
