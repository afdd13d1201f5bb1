"""# Oscillators at a few times: a latent ODE beside an ODE-RNN

Sines of amplitude 1, frequency U(0.4, 0.8) and any phase, each seen at irregular times of its own in
[0, 5], with noise 0.01: at 10, 20, 30 or 50 of a hundred points. Two tasks:

- **interpolate**: from what was seen, all hundred points;
- **extrapolate**: from what was seen up to t = 2.5, the points after it.

The latent ODE encodes a series backwards in time (by an ODE-RNN) into the law of one hidden state at
the first time, and its ODE does the rest. The ODE-RNN goes forwards: its state flows between
observations, jumps at them, and is trained to predict each from those before.

Every series keeps its own times: under `jax.vmap` each is encoded in as many steps as it has
observations, and not in as many as the times of all series together.

*Gotcha: an observation std far below the residual makes the divergence worthless and the training
spiky. It is 0.05 here, not the 0.01 of the data.*

Source: Y. Rubanova et al., Latent ODEs for Irregularly-Sampled Time Series (2019) | arXiv:1907.03907
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

import nde
from nde import losses
from nde.latent_ode import Gaussian
from nde.odernn import Backwards, Cell

POINTS, END, HALF, NOISE = 100, 5.0, 2.5, 0.01
SHARES = (0.1, 0.2, 0.3, 0.5)
MOST = 50  # observations
LATENT, HIDDEN, CONTEXT = 6, 32, 16
STD = 0.05  # of an observation, in the model


def sines(seed, series):
    """All times and values, shapes (series, 100) and (series, 100, 1)."""
    rng = np.random.default_rng(seed)
    ts = np.sort(rng.uniform(0.0, END, (series, POINTS)), axis=1)
    frequency, phase = rng.uniform(0.4, 0.8, (series, 1)), rng.uniform(0, 2 * np.pi, (series, 1))
    xs = np.sin(2 * np.pi * frequency * ts + phase) + NOISE * rng.standard_normal(ts.shape)
    return ts, xs[..., None]


def observe(ts, xs, shares, seed, end=END):
    """Series of the rows that were seen, up to a time: times (series, 51), values (series, 51, 1).

    They begin with a row at t = 0 where nothing is seen, where the hidden state starts; the last time
    repeats, without values.
    """
    rng = np.random.default_rng(seed)
    order = rng.uniform(size=ts.shape).argsort(axis=1).argsort(axis=1)
    seen = (order < np.round(POINTS * np.asarray(shares))[:, None]) & (ts <= end)
    first = np.argsort(~seen, axis=1, kind="stable")[:, :MOST]
    take = lambda x: np.take_along_axis(x, first, 1)
    last = np.max(np.where(seen, ts, 0.0), axis=1, keepdims=True)
    values = np.where(take(seen), take(xs[..., 0]), np.nan)
    values = np.pad(values, ((0, 0), (1, 0)), constant_values=np.nan)[..., None]
    return np.pad(np.where(take(seen), take(ts), last), ((0, 0), (1, 0))), values


def latent_ode(key):
    """An ODE-RNN as encoder, a linear readout of the hidden state, networks between."""
    keys = jax.random.split(key, 6)
    encoder = nde.ODERNN(
        nde.fields.MLPField(HIDDEN, HIDDEN, 1, scale=2.0, key=keys[0]),
        Cell(eqx.nn.GRUCell(2, HIDDEN, key=keys[1])),
        eqx.nn.Linear(HIDDEN, CONTEXT, key=keys[2]),
        jnp.zeros(HIDDEN),
    )
    return nde.LatentODE(
        Backwards(encoder),
        eqx.nn.MLP(CONTEXT, 2 * LATENT, HIDDEN, 1, jax.nn.softplus, key=keys[3]),
        nde.fields.MLPField(LATENT, 2 * HIDDEN, 1, scale=5.0, key=keys[4]),
        eqx.nn.Linear(LATENT, 1, key=keys[5]),
        Gaussian(jnp.zeros(LATENT), jnp.zeros(LATENT)),
        observation_std=STD,
    )


def ode_rnn(key):
    """A GRU whose state flows."""
    keys = jax.random.split(key, 3)
    return nde.ODERNN(
        nde.fields.MLPField(HIDDEN, 2 * HIDDEN, 1, scale=5.0, key=keys[0]),
        Cell(eqx.nn.GRUCell(2, HIDDEN, key=keys[1])),
        eqx.nn.Linear(HIDDEN, 1, key=keys[2]),
        jnp.zeros(HIDDEN),
    )


def bound(model, batch, key, *, steps):
    """The ELBO per value of both tasks: what is encoded is the whole series, or its first half."""
    options = {"per": "value", "kl_weight": optax.linear_schedule(0.01, 1.0, max(1, steps // 2))}
    whole, metrics = losses.evidence(model, batch, key, **options)
    half, _ = losses.evidence(model, batch, key, shown=lambda ts: ts <= HALF, **options)
    return (whole + half) / 2, metrics


def train(model, loss, data, *, steps, batch, seed):
    """A trained model and its history."""
    schedule = optax.cosine_decay_schedule(1e-2, steps)
    optim = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))
    options = dict(optim=optim, steps=steps, batch_size=batch, progress=False)
    return nde.fit(model, loss, data, **options, key=jax.random.key(seed))


@eqx.filter_jit
def predict(model, ts, ys, wanted, draws):
    """What a model says of each series at the wanted times, shape (series, draws, times)."""
    keys = jax.random.split(jax.random.key(0), draws)

    def latent(ts, ys, wanted):
        return jax.vmap(lambda key: model.forecast(ts, ys, wanted, key=key)[:, 0])(keys)

    def recurrent(ts, ys, wanted):
        """Each time from what was seen up to it: one run through the times of both."""
        times = jnp.concatenate([ts, wanted])
        order = jnp.argsort(times)
        values = jnp.concatenate([ys, jnp.full((len(wanted), 1), jnp.nan)])
        found = model(times[order], values[order])[:, 0]
        return found[jnp.argsort(order)][len(ts) :][None]

    return jax.vmap(latent if isinstance(model, nde.LatentODE) else recurrent)(ts, ys, wanted)


def judge(model, ts, xs, seed, draws):
    """Mean squared errors of both tasks at every share, and how often bands of 90 % hold."""
    rows = []
    for share in SHARES:
        shares = np.full(len(ts), share)
        row = {"share": share}
        for task, end in (("interpolate", END), ("extrapolate", HALF)):
            seen = (jnp.asarray(x, dtype=float) for x in observe(ts, xs, shares, seed, end))
            drawn = np.asarray(predict(model, *seen, jnp.asarray(ts, dtype=float), draws))
            counts = ts > end if task == "extrapolate" else np.full(ts.shape, True)
            error = (drawn.mean(axis=1) - xs[..., 0]) ** 2
            row[task] = float(error[counts].mean())
            noise = STD * np.random.default_rng(seed).standard_normal(drawn.shape)
            low, high = np.quantile(drawn + noise, [0.05, 0.95], axis=1)
            row[task + "_band"] = float(((low <= xs[..., 0]) & (xs[..., 0] <= high))[counts].mean())
        rows.append(row)
    return rows


def table(results):
    """One row per model and task."""
    lines = [f"{'mean squared error, observed':<34}" + "".join(f"{s:>9.0%}" for s in SHARES)]
    for name, rows in results.items():
        for task in ("interpolate", "extrapolate"):
            lines.append(f"{name + ', ' + task:<34}" + "".join(f"{r[task]:>9.4f}" for r in rows))
    return "\n".join(lines)


def picture(models, seed):
    """Two series from what was seen up to the half: the truth, and what both models make of it."""
    import matplotlib.pyplot as plt

    ts, xs = sines(seed, 2)
    seen = [jnp.asarray(x, dtype=float) for x in observe(ts, xs, np.full(2, 0.3), seed, HALF)]
    times = np.tile(np.linspace(0.0, 2 * END, 201), (2, 1))
    fig, axes = plt.subplots(1, 2, figsize=(10, 3.2), sharey=True, layout="constrained")
    drawn = np.asarray(predict(models["latent ODE"], *seen, jnp.asarray(times), 100))
    single = np.asarray(predict(models["ODE-RNN"], *seen, jnp.asarray(times), 1))[:, 0]
    for i, ax in enumerate(axes):
        nde.plot.fan(times[i], drawn[i][..., None], ax=ax, color="#4477AA", label="latent ODE")
        ax.plot(times[i], single[i], color="#EE6677", label="ODE-RNN")
        ax.plot(ts[i], xs[i, :, 0], ".", color="0.7", ms=3, label="not seen")
        ax.plot(seen[0][i], seen[1][i, :, 0], "o", color="black", ms=4, label="seen")
        ax.axvline(HALF, color="0.5", lw=0.8, ls=":")
        ax.set(xlabel="t", ylim=(-2, 2))
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("x")
    axes[1].legend(frameon=False, ncols=4, loc="upper center", fontsize=8)
    nde.plot.save(fig, "latent_oscillators.png")


def main(
    steps: int = 1000,
    plot: bool = True,
    *,
    series: int = 1000,
    tested: int = 200,
    batch: int = 64,
    draws: int = 20,
    seed: int = 0,
) -> dict:
    """Train both, judge them at every share, print the table, save the picture; the rows by model."""
    ts, xs = sines(seed, series)
    shares = np.random.default_rng(seed).choice(SHARES, series)
    data = tuple(jnp.asarray(x, dtype=float) for x in observe(ts, xs, shares, seed))
    key_latent, key_recurrent = jax.random.split(jax.random.key(seed))
    options = {"steps": steps, "batch": batch, "seed": seed + 1}
    loss = lambda model, batch, key: bound(model, batch, key, steps=steps)
    models, histories = {}, {}
    models["latent ODE"], histories["latent ODE"] = train(
        latent_ode(key_latent), loss, data, **options
    )
    models["ODE-RNN"], histories["ODE-RNN"] = train(
        ode_rnn(key_recurrent), losses.prediction_error, data, **options
    )
    unseen = sines(seed + 1000, tested)
    results = {name: judge(model, *unseen, seed, draws) for name, model in models.items()}
    print(table(results))
    bands = ", ".join(f"{row['extrapolate_band']:.0%}" for row in results["latent ODE"])
    print(f"90 % bands of the latent ODE hold, extrapolated: {bands}")
    print("seconds: " + ", ".join(f"{name} {h.seconds:.0f}" for name, h in histories.items()))
    if plot:
        picture(models, seed + 2000)
    return results


# *What to take away*: what a latent ODE knows of a series is a state at one time, so its forecast is as
# good as its encoding, however far; the flow of an ODE-RNN has only learned to reach the next observation.
# *Next*: noise in the hidden state itself, `double_ou.py`.

if __name__ == "__main__":
    main()
