"""# Hares and lynxes: known equations, a neural network, and both

Thousands of pelts of snowshoe hare and Canadian lynx traded by the Hudson's Bay Company, 1900-1920:
prey and predator in the wild. Three models are trained on 1900-1914 and forecast 1915-1920.

- **Lotka-Volterra**: hares grow at rate `birth - predation * lynxes`, lynxes at
  `conversion * hares - death`. Four numbers.
- A **neural ODE**, which knows nothing.
- The **hybrid**: Lotka-Volterra plus a network that starts at zero and is kept small.

*Gotcha: the state is the logarithm of the populations. They stay positive, errors are relative, and
what enters a network is of order one.*

Source: C. G. Hewitt, The Conservation of the Wild Life of Canada (1921), as tabulated in
J. M. Mahaffy's lecture notes, Math 636.
"""

import functools

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import optax

import nde

HARE = """30 47.2 70.2 77.4 36.3 20.6 18.1 21.4 22 25.4 27.1 40.3 57 76.6 52.3 19.5 11.2 7.6 14.6
          16.2 24.7"""
LYNX = "4 6.1 9.8 35.2 59.4 41.7 19 13 8.3 9.1 7.4 8 12.3 19.5 45.7 51.1 29.7 15.8 9.7 10.1 8.6"
PELTS = np.array([HARE.split(), LYNX.split()], dtype=float).T  # thousands, shape (years, 2)
YEARS = np.arange(1900, 1921)
TRAIN = 15  # years: 1900-1914
CENTER = np.array([30.0, 15.0])  # thousands; the state is log(population / CENTER)
RATES = {"birth": 0.5, "predation": 0.02, "conversion": 0.02, "death": 0.5}  # orders of magnitude
# The errors of the data are about 20 % and a correction of 10 % a year is plausible; the most
# probable network minimizes error^2 / 0.2^2 + correction^2 / 0.1^2.
PENALTY = (0.2 / 0.1) ** 2
COLORS = {"Lotka-Volterra": "#4477AA", "neural ODE": "#EE7733", "hybrid": "#228833"}
NUMERICS = {"stepsize_controller": diffrax.PIDController(rtol=1e-4, atol=1e-6)}


def lotka_volterra(t, y, rates):
    """Rates of change of the logarithms of hares and lynxes."""
    hare, lynx = CENTER * jnp.exp(y)
    growth = rates["birth"] - rates["predation"] * lynx
    return jnp.stack([growth, rates["conversion"] * hare - rates["death"]])


def mechanistic(key):
    spread = dict(zip(RATES, jnp.exp(0.5 * jax.random.normal(key, (4,))), strict=True))
    rates = {name: nde.hybrid.Positive(RATES[name] * spread[name]) for name in RATES}
    return nde.HybridODE(lotka_volterra, None, rates, **NUMERICS)


def neural(key):
    return nde.NeuralODE(nde.fields.MLPField(2, width=32, depth=2, scale=2.0, key=key), **NUMERICS)


def hybrid(key, rates):
    network = nde.fields.MLPField(2, width=16, depth=2, last_layer_scale=0.0, key=key)
    return nde.HybridODE(lotka_volterra, network, rates, **NUMERICS)


def loss(model, batch, key, *, horizon):
    """Mean squared error of the logarithms, on a beginning of the series that grows."""
    (ode, start), (ts, logs) = model, batch.data
    ts, seen = nde.losses.growing_horizon(ts[0], horizon(batch.step))
    solution = ode.solve(ts, start, throw=False)
    value = nde.losses.mse(solution.ys, logs[0], seen)
    if isinstance(ode, nde.HybridODE) and ode.network is not None:
        correction = jax.vmap(ode.network, in_axes=(None, 0))(ts[0], logs[0])
        value += PENALTY * jnp.mean(correction**2)
    return value, {"nfe": solution.stats["nfe"]}


def train(make, *, years=TRAIN, steps, rate, starts, seed):
    """Train `(model, initial state)` from several starts: pairs with histories, best first."""
    ts = jnp.arange(years, dtype=float)
    logs = jnp.log(jnp.asarray(PELTS / CENTER)[:years])
    models, histories = nde.train.multi_start(
        lambda key: (make(key), logs[0]),
        functools.partial(loss, horizon=optax.linear_schedule(0.2, 1.0, steps // 2)),
        (ts[None], logs[None]),  # one example
        starts=starts,
        optim=optax.chain(
            optax.clip_by_global_norm(1.0), optax.adam(optax.cosine_decay_schedule(rate, steps))
        ),
        steps=steps,
        key=jax.random.key(seed),
    )
    return list(zip(models, histories, strict=True))


def report(runs):
    """The best start: its rates, errors in log units, cost; the forecast errors of all starts."""
    forecasts = np.stack([populations(*model, YEARS - YEARS[0]) for model, _ in runs])
    squares = np.log(forecasts / PELTS) ** 2
    fitted, forecast = (
        np.sqrt(part.mean(axis=(1, 2))) for part in np.split(squares, [TRAIN], axis=1)
    )
    (ode, _), history = runs[0]
    rates = ode.physical_parameters() if isinstance(ode, nde.HybridODE) else {}
    return {name: float(value) for name, value in rates.items()} | {
        "train": float(fitted[0]),
        "forecast": float(forecast[0]),
        "lowest": float(forecast.min()),
        "highest": float(forecast.max()),
        "nfe": int(history["nfe"][-1]),
        "seconds": history.compile_seconds + history.seconds,
    }


def populations(ode, start, ts):
    """Thousands of pelts at `ts`, years after 1900; shape (times, 2)."""
    return CENTER * np.exp(ode(jnp.asarray(ts, dtype=float), start))


def table(results):
    """One row per model."""
    head = f"{'':<16}" + "".join(f"{name:>11}" for name in RATES)
    lines = [head + f"{'train':>9}{'forecast':>10}{'(all starts)':>15}{'NFE':>6}{'seconds':>9}"]
    for name, row in results.items():
        rates = "".join(f"{row[rate]:>11.4f}" if rate in row else f"{'-':>11}" for rate in RATES)
        spread = f"({row['lowest']:.3f}-{row['highest']:.3f})"
        errors = f"{row['train']:>9.3f}{row['forecast']:>10.3f}{spread:>15}"
        lines.append(f"{name:<16}{rates}{errors}{row['nfe']:>6}{row['seconds']:>9.1f}")
    return "\n".join(lines)


def picture(runs):
    """Both species with every model, and the field of the hybrid model."""
    import matplotlib.pyplot as plt

    fig, axes = plt.subplot_mosaic(
        [["hare", "field"], ["lynx", "field"]],
        figsize=(11, 5),
        width_ratios=[1.6, 1],
        layout="constrained",
    )
    ts = np.linspace(0, 20, 401)
    for channel, species in enumerate(("hare", "lynx")):
        ax = axes[species]
        ax.axvspan(YEARS[TRAIN - 1], 1920.5, color="0.95", zorder=0)
        for name, starts in runs.items():
            for rank, (model, _) in enumerate(starts):  # the best start and, thin, the others
                style = {"lw": 0.7, "alpha": 0.4} if rank else {"lw": 2.0, "label": name}
                ys = populations(*model, ts)[:, channel]
                nde.plot.trajectories(1900 + ts, ys, ax=ax, color=COLORS[name], **style)
        pelts(ax, YEARS, PELTS[:, channel])
        ax.set(xlim=(1899.5, 1920.5), xlabel="", yscale="log", ylabel=f"{species}, thousand pelts")
        ax.set(xticks=range(1900, 1921, 5), yticks=[5, 10, 20, 50], yticklabels=[5, 10, 20, 50])
        ax.tick_params(which="minor", left=False, labelleft=False)
    axes["hare"].text(1920.2, 80, "forecast", color="0.4", ha="right", va="center")
    handles, labels = axes["hare"].get_legend_handles_labels()
    fig.legend(handles, labels, ncols=5, loc="outside upper left", frameon=False)
    ode, start = runs["hybrid"][0][0]
    ax = nde.plot.phase(
        lambda t, p, args: p * ode.vector_field(t, jnp.log(p / CENTER), args),
        (1.0, 90.0),
        (1.0, 70.0),
        populations(ode, start, ts),
        ax=axes["field"],
        color=COLORS["hybrid"],
        lw=2.0,
    )
    pelts(ax, *PELTS.T)
    ax.set(title="field of the hybrid model", xlabel="hare", ylabel="lynx")
    for ax in axes.values():
        ax.spines[["top", "right"]].set_visible(False)
    nde.plot.save(fig, "lynx_hare.png")


def pelts(ax, x, y):
    """Observations: full where trained, open where forecast."""
    style = {"ls": "", "marker": "o", "ms": 4.5, "color": "black", "zorder": 3}
    ax.plot(x[:TRAIN], y[:TRAIN], label="pelts, trained on", **style)
    ax.plot(x[TRAIN:], y[TRAIN:], label="held out", mfc="white", **style)


def main(steps: int = 2000, plot: bool = True, *, seed: int = 0) -> dict:
    """Fit the three models, print the table, save the picture; errors and rates by model."""
    known = train(mechanistic, steps=steps, rate=5e-2, starts=8, seed=seed)
    rates = known[0][0][0].parameters  # the hybrid model starts at the best known one
    runs = {
        "Lotka-Volterra": known,
        "neural ODE": train(neural, steps=steps, rate=5e-3, starts=4, seed=seed),
        "hybrid": train(
            lambda key: hybrid(key, rates), steps=steps, rate=5e-3, starts=4, seed=seed
        ),
    }
    results = {name: report(starts) for name, starts in runs.items()}
    print(table(results))
    if plot:
        picture(runs)
    if steps >= 1000:  # fewer are a trial of the program, not a fit
        known, free, both = (results[name]["train"] for name in runs)
        assert free < both < known < 0.2, "more freedom must fit the training years better"
        assert results["hybrid"]["forecast"] < results["neural ODE"]["forecast"], (
            "physics must help"
        )
    return results


# *What to take away*: the freer the model, the better it fits the years it has seen. The forecast
# is carried by the equations: the network beside them changes it by less than its starts differ.
# *Next*: give the network another prior (`PENALTY`), or a place inside the equations (`combine=`).

if __name__ == "__main__":
    main()
