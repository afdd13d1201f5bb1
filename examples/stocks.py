"""# Volatility that depends on the state: four stock indices

Daily closing values of DAX, SMI, CAC and FTSE, 1991-1998. Calm and nervous times alternate, and a
model of constant volatility,

    dx = m dt + s dW,        x the logarithm of an index, in per cent, t in trading days

is too wide in the first and too narrow in the second. The neural SDE

    dx = m(v) dt + exp(v + n_1(v)) dW_1
    dv = n_2(v) dt + exp(n_3(v)) dW_2

also has v, the logarithm of the recent volatility (the exponentially weighted root mean square of
returns), as a state: observed, because it is computed from the past. m, n_1 to n_3 are one network.

Both are trained by the likelihood of one step, which needs no simulation, on the first 1,500 days of
all four indices, and judged on the 359 days after: by the same likelihood, and by how often prices
20 days ahead stay inside bands of 90 % that are simulated.

*Gotcha: compare likelihoods of the same thing. The neural model also predicts v; only its density of
x enters the table.*

Source: Erste Bank AG, Vienna; distributed with R as `EuStockMarkets`.
"""

from pathlib import Path

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

import nde
from nde import losses
from nde.hybrid import Positive

DATA = Path(__file__).parent / "data" / "european_stock_indices.csv"
NAMES = ("DAX", "SMI", "CAC", "FTSE")
TRAIN, AHEAD = 1500, 20  # days
MEMORY = 0.94  # weight of yesterday in the recent variance
COLORS = {"constant": "#EE7733", "neural": "#4477AA"}


def series():
    """Days, shape (days,), and (x, v) of each index, shape (4, days, 2)."""
    prices = np.loadtxt(DATA, delimiter=",", skiprows=1)
    x = 100 * np.log(prices / prices[0])
    returns = np.diff(x, axis=0)
    variance = np.empty_like(x)
    variance[0] = returns[:250].var(axis=0)
    for day, r in enumerate(returns):
        variance[day + 1] = MEMORY * variance[day] + (1 - MEMORY) * r**2
    ys = np.stack([x, np.log(variance) / 2], axis=2)
    return np.arange(len(x), dtype=float), np.swapaxes(ys, 0, 1)


def constant():
    """Geometric Brownian motion, in logarithms."""
    return nde.HybridSDE(
        lambda t, y, p, args: jnp.full_like(y, 1.0) * p["mean"],
        lambda t, y, p, args: jnp.full_like(y, 1.0) * p["volatility"],
        {"mean": 0.0, "volatility": Positive(1.0)},
        noise_type="additive",
        calculus="ito",
        solver=diffrax.Euler(),
    )


def neural(key):
    """The state is (x, v); the network sees v."""
    net = nde.fields.MLPField(1, 16, 1, out_size=4, last_layer_scale=0.1, key=key)

    def drift(t, y, p, args):
        n = p["net"](t, y[1:])
        return jnp.stack([0.2 * n[0], 0.2 * n[1]])

    def diffusion(t, y, p, args):
        n = p["net"](t, y[1:])
        return jnp.stack([jnp.exp(y[1] + n[2]), 0.1 * jnp.exp(n[3])])

    return nde.HybridSDE(drift, diffusion, {"net": net}, calculus="ito", solver=diffrax.Euler())


def train(model, ts, ys, *, steps, rate):
    """Maximum likelihood of one-day transitions, all indices together."""
    tiled = jnp.tile(jnp.asarray(ts, dtype=float), (len(ys), 1))
    data = (tiled, jnp.asarray(ys, dtype=float))
    optim = optax.adam(optax.cosine_decay_schedule(rate, steps))
    return nde.fit(
        model,
        losses.likelihood,
        data,
        optim=optim,
        steps=steps,
        progress=False,
        key=jax.random.key(1),
    )


@eqx.filter_jit
def density_of_returns(model, ts, ys):
    """log p(x(t + 1) | state(t)), shape (indices, days - 1): Gaussian, one day ahead."""

    def one(t, y0, y1):
        mean = y0[0] + model.drift(t, y0, None)[0]
        std = model.diffusion(t, y0, None)[0]
        return jax.scipy.stats.norm.logpdf(y1[0], mean, std)

    along = jax.vmap(one)
    return jax.vmap(along, (None, 0, 0))(ts[:-1], ys[:, :-1], ys[:, 1:])


@eqx.filter_jit
def ahead(model, y0s, key, paths, days):
    """Simulated x from each state, at every day from there on, shape (states, paths, days + 1)."""
    ts = jnp.linspace(0.0, days, days + 1)
    path = lambda y0, key: model(ts, y0, key=key)[:, 0]
    many = jax.vmap(path, (None, 0))
    keys = jax.random.split(key, (y0s.shape[0], paths))
    return jax.vmap(many)(y0s, keys)


def judge(model, ts, ys, paths, key):
    """Mean log-likelihood of a return in the tail with its standard error, and the coverage of bands."""
    tail = jnp.asarray(ys[:, TRAIN - 1 :], dtype=float)
    logs = np.asarray(density_of_returns(model, jnp.asarray(ts[TRAIN - 1 :], dtype=float), tail))
    starts = np.arange(TRAIN - 1, ys.shape[1] - AHEAD, AHEAD)
    y0s = jnp.asarray(ys[:, starts].reshape(-1, ys.shape[2]), dtype=float)
    drawn = np.asarray(ahead(model, y0s, key, paths, AHEAD))[:, :, -1]
    real = ys[:, starts + AHEAD, 0].reshape(-1)
    low, high = np.quantile(drawn, [0.05, 0.95], axis=1)
    inside = (low <= real) & (real <= high)
    daily = logs.mean(axis=0)  # the indices move together: days are independent, not indices
    return {
        "likelihood": float(logs.mean()),
        "error": float(daily.std() / np.sqrt(daily.size)),
        "coverage": float(inside.mean()),
        "width": float((high - low).mean()),
    }


def table(results):
    """One row per model."""
    lines = [
        f"{'':<10}{'log-likelihood of a return':>28}{'90 % bands hold':>17}{'width':>8}{'train s':>9}"
    ]
    for name, row in results.items():
        likelihood = f"{row['likelihood']:>20.3f} +- {row['error']:.3f}"
        rest = f"{row['coverage']:>16.0%}{row['width']:>9.1f}{row['seconds']:>9.1f}"
        lines.append(f"{name:<10}{likelihood:>28}{rest}")
    return "\n".join(lines)


def picture(models, ts, ys, paths):
    """Bands from the first day of the tail, and the volatility that each model gives to the DAX."""
    import matplotlib.pyplot as plt

    fig, (left, right) = plt.subplots(1, 2, figsize=(11, 3.6), layout="constrained")
    day = TRAIN + 240
    for name, (model, channels) in models.items():
        y0 = jnp.asarray(ys[:1, day, :channels], dtype=float)
        drawn = np.asarray(ahead(model, y0, jax.random.key(3), paths, 40))[0]
        nde.plot.fan(
            ts[day : day + 41], drawn, ax=left, color=COLORS[name], label=name, levels=(0.9,)
        )
        sigma = jax.vmap(lambda y, model=model: model.diffusion(0.0, y, None)[0])
        values = sigma(jnp.asarray(ys[0, 1:, :channels], dtype=float))
        right.plot(ts[1:], values, color=COLORS[name], lw=1, label=name)
    left.plot(
        ts[day - 40 : day + 41], ys[0, day - 40 : day + 41, 0], color="black", lw=1, label="DAX"
    )
    right.plot(ts[1:], np.abs(np.diff(ys[0, :, 0])), ".", ms=1.5, color="0.6", label="|return|")
    right.axvline(TRAIN, color="0.5", lw=0.8, ls="--")
    right.set(ylim=(0, 4), xlabel="trading day", ylabel="volatility of the DAX, % a day")
    left.set(xlabel="trading day", ylabel="log price, %")
    for ax in (left, right):
        ax.legend(frameon=False)
        ax.spines[["top", "right"]].set_visible(False)
    nde.plot.save(fig, "stocks.png")


def main(steps: int = 1000, plot: bool = True, *, paths: int = 512, seed: int = 0) -> dict:
    """Train both models, print the table, save the picture; the rows of the table by model."""
    ts, ys = series()
    models, results = {}, {}
    for name, model, channels, rate in (
        ("constant", constant(), 1, 5e-2),
        ("neural", neural(jax.random.key(seed)), 2, 1e-2),
    ):
        part = ys[:, :, :channels]
        model, history = train(model, ts[:TRAIN], part[:, :TRAIN], steps=steps, rate=rate)
        models[name] = (model, channels)
        results[name] = judge(model, ts, part, paths, jax.random.key(2))
        results[name]["seconds"] = history.seconds
    print(table(results))
    if plot:
        picture(models, ts, ys, paths)
    return results


# *What to take away*: where the state is observed, the likelihood of one step trains an SDE in seconds,
# and a held-out likelihood compares models fairly. *Next*: when it is not observed, `double_ou.py`.

if __name__ == "__main__":
    main()
