"""# Influenza in a school: parameters with errors, a forecast, and a learned transmission

763 boys, January 1978; every day those confined to bed were counted. The SIR equations are known,

    dS/dt = -beta S I / N,      dI/dt = beta S I / N - gamma I,

their rates are not. Three questions: how contagious was it (R0 = beta / gamma), could one have known
after a week, and was the transmission constant? For the last, beta is multiplied by exp(g(t)), g a
small network that starts at zero and costs something.

*Gotcha: counts scatter more than Poisson. A negative binomial makes the bands honest.*
Source: British Medical Journal 1978, 1:587.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

import nde
from nde.hybrid import Positive

jax.config.update("jax_enable_x64", True)

DATA = Path(__file__).parent / "data" / "boarding_school_flu.csv"
DAYS, IN_BED = np.genfromtxt(DATA, delimiter=",", skip_header=1, usecols=(0, 2)).T
BOYS = 763
WEEK = 8  # observations up to day 7
SCATTER, PENALTY = 20.0, 0.1  # size of the negative binomial; weight of the mean square of g


def sir(t, y, p):
    susceptible, ill = y
    new = p["beta"] * susceptible * ill / BOYS
    return jnp.stack([-new, new - p["gamma"] * ill])


def changing(known, network, t, y, p, args):
    """The same equations with a transmission that depends on time."""
    return known(t, y, p | {"beta": p["beta"] * jnp.exp(log_change(network, t))})


def log_change(network, t):
    """g(t), of a network of the time in weeks around day 7."""
    week = jnp.asarray(t, float) / 7 - 1
    return network(week, week[None])[0]


def model(network=None, parameters=None):
    """The boys in bed are those ill; how many were so at first is a parameter like the others."""
    p = parameters or {"beta": Positive(1.5), "gamma": Positive(0.5), "first": Positive(2.0)}
    combine = {} if network is None else {"combine": changing}
    ode = nde.HybridODE(sir, network, p, coordinates=nde.hybrid.Logarithms(), **combine)
    return nde.Measured(
        ode,
        start=lambda p, x: jnp.stack([BOYS - p["first"], p["first"]]),
        observe=lambda t, y, p, x: y[1:],
        errors=nde.measured.NegativeBinomial(SCATTER),
    )


def observed(days):
    return nde.measured.experiments([(DAYS[:days], IN_BED[:days])])


def least_squares(days):
    """The maximum of the likelihood on the first `days` days, by least squares of the deviances."""
    return nde.least_squares(model(), observed(days), nde.inference.measured_residuals, noise=1.0)


def loss(model, batch, key):
    value, metrics = nde.losses.negative_log_likelihood(model, batch, key)
    g = jax.vmap(lambda t: log_change(model.ode.network, t))(jnp.linspace(0.0, 13.0, 27))
    return value + PENALTY * jnp.mean(g**2), metrics


def learn(parameters, steps, seed):
    """A transmission that changes, from where the constant one is best."""
    network = nde.fields.MLPField(1, 8, 1, last_layer_scale=0.0, key=jax.random.key(seed))
    return nde.fit(
        model(network, parameters),
        loss,
        observed(len(DAYS)),
        optim=optax.adam(optax.cosine_decay_schedule(2e-2, steps)),
        steps=steps,
        progress=False,
        key=jax.random.key(seed + 1),
    )[0]


def draws(estimate, data, count, seed):
    """What could be counted, the errors of the parameters included; shape (count, times)."""
    first, second = jax.random.split(jax.random.key(seed))
    thetas = estimate.samples(count, key=first)
    sample = lambda theta, key: estimate.at(theta).sample(data[0], key=key)[:, 0]
    return np.asarray(jax.jit(jax.vmap(sample))(thetas, jax.random.split(second, count)))


def r0(model):
    p = model.ode.physical_parameters()
    return p["beta"] / p["gamma"]


def picture(ts, bands, changed):
    import matplotlib.pyplot as plt

    fig, axes = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
    titles = ("known equations, all days", "the same, as known on day 7", "learned transmission")
    for ax, title, sample, days in zip(axes, titles, bands, (len(DAYS), WEEK), strict=False):
        nde.plot.fan(ts, sample, ax=ax, levels=(0.5, 0.9), color="#4477AA")
        ax.plot(DAYS[:days], IN_BED[:days], "ko", ms=5, label="counted")
        ax.plot(DAYS[days:], IN_BED[days:], "ko", ms=5, mfc="white", label="not yet known")
        ax.set(title=title, xlabel="day", ylabel="boys in bed", ylim=(0, 450))
        ax.legend(frameon=False)
    axes[2].plot(ts, changed, color="#228833", lw=2)
    axes[2].axhline(1.0, color="0.6", lw=1)
    axes[2].set(title=titles[2], xlabel="day", ylabel="factor on the transmission", ylim=(0, 2.5))
    nde.plot.save(fig, "school_flu.png")


def main(steps: int = 500, plot: bool = True, *, seed: int = 0) -> dict:
    """R0 with its error, the forecast of the second week, and how the transmission changed."""
    known, week = least_squares(len(DAYS)), least_squares(WEEK)
    (value, error), (early, early_error) = known.of(r0), week.of(r0)
    ts = jnp.linspace(0.0, 13.0, 53)
    every = observed(len(DAYS))
    forecast = draws(week, every, 400, seed)
    low, high = np.quantile(forecast[:, WEEK:], [0.05, 0.95], axis=0)
    inside = np.mean((low <= IN_BED[WEEK:]) & (high >= IN_BED[WEEK:]))
    learned = learn(known.model.ode.parameters, steps, seed)
    changed = np.exp(jax.vmap(lambda t: log_change(learned.ode.network, t))(ts))
    print(f"R0, all days             {value:.2f} +- {error:.2f}")
    print(f"R0, as known on day 7    {early:.2f} +- {early_error:.2f}")
    print(f"second week in its 90 % band: {inside:.0%}")
    print(f"transmission changes by factors {changed.min():.2f} to {changed.max():.2f}")
    if plot:
        at = every.at(ts)
        picture(ts, [draws(found, at, 400, seed) for found in (known, week)], changed)
    assert 3.5 < value < 4.0, "published values of R0"
    assert abs(early - value) < 2 * np.hypot(early_error, error), "a week must not mislead"
    return {"R0": float(value), "error": float(error), "inside": float(inside)}


# *What to take away*: two rates explain the outbreak, and the error of R0 says how well.
# *Next*: let the boys who leave the bed be a state of their own, and compare.

if __name__ == "__main__":
    main()
