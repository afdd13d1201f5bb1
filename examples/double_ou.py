"""# Sporadic observations: a latent SDE and GRU-ODE-Bayes beside the Kalman filter

Two coordinates revert to levels that differ from series to series, driven by nearly the same noise,

    dx = (mu - x) dt + 0.1 dW,        corr(W_1, W_2) = 0.99,        x(0) = 0,        t in [0, 10]
    mu = (1, -1) + U(-0.5, 0.5)^2

and are seen at 16 to 23 random times: 40 % the first coordinate alone, 40 % the second, 20 % both. The
task is to predict the first observation after t = 4 from those before. The Kalman filter that knows
the equations (mu is part of its state, with a Gaussian prior) is the answer to compare with; its mean
squared error is 0.0057. Below 0.0055 something has seen the future.

The latent SDE knows nothing but the series. Its posterior is trained on series of any length, for it
must not count on a future; at the test it follows what was seen up to t = 4, and from there the
prior goes on.

GRU-ODE-Bayes is made for the task: a GRU in continuous time whose state jumps at observations, trained to
predict each of them from those before, as a normal law.

*Gotcha: a good mean is no proof of a good law. Look also at how often bands of 90 % hold.*

Source: E. De Brouwer et al., GRU-ODE-Bayes (2019) | arXiv:1905.12374
"""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

import nde
from nde import losses
from nde.latent_sde import Gaussian, GRUEncoder, PosteriorDrift
from nde.odernn import BayesCell

NOISE, CORRELATION, END, SPLIT = 0.1, 0.99, 10.0, 4.0
MOST = 23  # observations
LATENT, HIDDEN, CONTEXT = 4, 64, 32
STD = 0.05  # of an observation, in the model; the data have none
COVARIANCE = NOISE**2 * np.array([[1.0, CORRELATION], [CORRELATION, 1.0]])


def simulate(seed, series):
    """Times (series, 23), padded with 10, and values (series, 23, 2), NaN where not observed: exact."""
    rng = np.random.default_rng(seed)
    mu = np.array([1.0, -1.0]) + rng.uniform(-0.5, 0.5, (series, 2))
    count = rng.integers(16, MOST + 1, series)
    cells = rng.uniform(size=(series, 199)).argsort(axis=1)[:, :MOST]
    ts = 0.05 * (1 + np.sort(cells, axis=1))
    root = np.linalg.cholesky(COVARIANCE)
    x, before, rows = np.zeros((series, 2)), np.zeros(series), []
    for k in range(MOST):
        decay = np.exp(-(ts[:, k] - before))[:, None]
        noise = np.sqrt((1 - decay**2) / 2) * (rng.standard_normal((series, 2)) @ root.T)
        x, before = mu + decay * (x - mu) + noise, ts[:, k]
        kind = rng.uniform(size=series)
        seen = np.stack([(kind < 0.4) | (kind >= 0.8), kind >= 0.4], axis=1)
        rows.append(np.where(seen, x, np.nan))
    ys, used = (
        np.stack(rows, axis=1),
        rng.uniform(size=(series, MOST)).argsort(axis=1) < count[:, None],
    )
    return padded(ts, ys, used)


def padded(ts, ys, used):
    """Series of the used rows alone, moved to the front; the last time repeats, without values."""
    order = np.argsort(~used, axis=1, kind="stable")
    ts, ys = np.take_along_axis(ts, order, 1), np.take_along_axis(ys, order[..., None], 1)
    used = np.take_along_axis(used, order, 1)
    last = np.take_along_axis(ts, used.sum(axis=1, keepdims=True) - 1, 1)
    return np.where(used, ts, last), np.where(used[..., None], ys, np.nan)


def cut(ts, ys, seed):
    """Every other series, up to a random time: a posterior must also know how to end."""
    rng = np.random.default_rng(seed)
    ends = np.where(np.arange(len(ts)) % 2, rng.uniform(2.0, END, len(ts)), END)
    used = ~np.isnan(ys).all(axis=2) & (ts <= ends[:, None])
    few = used.sum(axis=1) < 2
    used[few] = ~np.isnan(ys[few]).all(axis=2)
    return padded(ts, ys, used)


def task(ts, ys):
    """What is seen before t = 4, and the time and the values of the first observation after."""
    seen = ~np.isnan(ys).all(axis=2)
    after = seen & (ts > SPLIT)
    rows = np.arange(len(ts))
    first = after.argmax(axis=1)
    usable = after.any(axis=1) & ((seen & (ts <= SPLIT)).sum(axis=1) >= 2)
    past = padded(ts, ys, seen & (ts <= SPLIT))
    past = past[0][:, :16], past[1][:, :16]  # hardly any series has more before 4
    return tuple(x[usable] for x in (*past, ts[rows, first], ys[rows, first]))


def kalman(ts, ys, target):
    """Mean and variance of both coordinates at the target time, of the state (x, mu)."""
    means, variances = [], []
    for times, values, end in zip(ts, ys, target, strict=True):
        m = np.array([0.0, 0.0, 1.0, -1.0])
        P = np.diag([0.0, 0.0, 1 / 12, 1 / 12])
        before = 0.0
        for t, y in [*zip(times, values, strict=True), (end, np.full(2, np.nan))]:
            decay = np.exp(-(t - before))
            F = np.block(
                [[decay * np.eye(2), (1 - decay) * np.eye(2)], [np.zeros((2, 2)), np.eye(2)]]
            )
            Q = np.zeros((4, 4))
            Q[:2, :2] = COVARIANCE * (1 - decay**2) / 2
            m, P, before = F @ m, F @ P @ F.T + Q, t
            H = np.eye(2, 4)[~np.isnan(y)]
            if len(H):
                gain = P @ H.T @ np.linalg.inv(H @ P @ H.T + 1e-12 * np.eye(len(H)))
                m = m + gain @ (y[~np.isnan(y)] - H @ m)
                P = P - gain @ H @ P
        means.append(m[:2])
        variances.append(np.diag(P)[:2])
    return np.array(means), np.array(variances)


def make_model(key):
    """Everything a small network."""
    keys = jax.random.split(key, 6)
    posterior = nde.fields.MLPField(
        LATENT, HIDDEN, 1, context=CONTEXT, time=True, scale=2.0, key=keys[2]
    )
    return nde.LatentSDE(
        GRUEncoder(2, HIDDEN, CONTEXT, time_scale=4.0, key=keys[0]),
        PosteriorDrift(eqx.nn.Linear(CONTEXT, 2 * LATENT, key=keys[1]), posterior),
        nde.fields.MLPField(LATENT, HIDDEN, 1, scale=2.0, key=keys[3]),
        nde.fields.OwnNoise(LATENT, 8, least=0.01, most=0.15, key=keys[4]),
        eqx.nn.Linear(LATENT, 2, key=keys[5]),
        Gaussian(jnp.zeros(LATENT), jnp.zeros(LATENT)),
        observation_std=STD,
        steps_per_interval=2,
    )


def make_filter(key):
    """GRU-ODE-Bayes; the readout is mean and log standard deviation of both coordinates."""
    keys = jax.random.split(key, 3)
    return nde.ODERNN(
        nde.fields.GRUField(HIDDEN, key=keys[0]),
        BayesCell(2, HIDDEN, 8, key=keys[1]),
        eqx.nn.MLP(HIDDEN, 4, HIDDEN, 1, jax.nn.softplus, key=keys[2]),
        jnp.zeros(HIDDEN),
        steps_per_interval=2,
    )


def bound(steps):
    """The ELBO, with a divergence that counts more and more over the first fifth of the steps."""
    weight = optax.linear_schedule(0.01, 1.0, max(1, steps // 5))
    return functools.partial(losses.evidence, kl_weight=weight, low_variance=True)


def train(model, loss, data, *, steps, batch, clip, rate, key):
    """A trained model and its history."""
    optim = optax.chain(
        optax.clip_by_global_norm(clip), optax.adam(optax.cosine_decay_schedule(rate, steps))
    )
    options = dict(optim=optim, steps=steps, batch_size=batch, progress=False, key=key)
    return nde.fit(model, loss, data, **options)


def from_the_start(ts, ys):
    """The series with a row at t = 0, where nothing is seen: the state knows how long it has run."""
    ts = jnp.concatenate([jnp.zeros((len(ts), 1)), ts], axis=1)
    return ts, jnp.concatenate([jnp.full((len(ys), 1, 2), jnp.nan), ys], axis=1)


@eqx.filter_jit
def forecast(model, ts, ys, target, key, draws):
    """Draws of both coordinates at the target time, shape (series, draws, 2)."""

    def one(ts, ys, target, key):
        draw = lambda key: model.forecast(ts, ys, target[None], key=key)[0]
        return jax.vmap(draw)(jax.random.split(key, draws))

    return jax.vmap(one)(ts, ys, target, jax.random.split(key, ts.shape[0]))


@eqx.filter_jit
def filtered(model, ts, ys, target):
    """Mean and standard deviation of both coordinates at the target time, by GRU-ODE-Bayes."""
    law = lambda ts, ys, target: model.forecast(ts, ys, target[None])[0]
    mean, log_std = jnp.split(jax.vmap(law)(*from_the_start(ts, ys), target), 2, axis=1)
    return mean, jnp.exp(log_std)


def score(mean, low, high, values):
    """Mean squared error over what was observed, its standard error, and how often bands hold."""
    seen = ~np.isnan(values)
    square = (mean - values)[seen] ** 2
    inside = ((low <= values) & (values <= high))[seen]
    return {
        "mse": float(square.mean()),
        "error": float(square.std() / np.sqrt(square.size)),
        "coverage": float(inside.mean()),
    }


def table(results):
    """One row per way to predict."""
    lines = [f"{'':<15}{'mean squared error':>22}{'90 % bands hold':>18}"]
    for name, row in results.items():
        error = f"{row['mse']:.5f} +- {row['error']:.5f}"
        lines.append(f"{name:<15}{error:>22}{row['coverage']:>18.0%}")
    return "\n".join(lines)


def picture(model, ts, ys, past):
    """One series: what was seen, the posterior up to the last time before 4, and the forecast."""
    import matplotlib.pyplot as plt

    i = 3
    seen, values = (jnp.asarray(x[i], dtype=float) for x in past[:2])
    future = jnp.linspace(float(seen[-1]) + 0.1, END, 40)
    keys = jax.random.split(jax.random.key(4), 256)
    run = lambda key: model.forecast(seen, values, future, key=key)
    paths = np.asarray(jax.jit(jax.vmap(run))(keys))
    smooth = np.asarray(jax.jit(jax.vmap(lambda key: model(seen, values, key=key)))(keys))
    fig, axes = plt.subplots(1, 2, figsize=(10, 3.4), sharex=True, layout="constrained")
    for channel, ax in enumerate(axes):
        style = dict(channel=channel, levels=(0.9,))
        nde.plot.fan(np.asarray(seen), smooth, ax=ax, color="#228833", label="posterior", **style)
        nde.plot.fan(np.asarray(future), paths, ax=ax, color="#4477AA", label="forecast", **style)
        ax.plot(seen, values[:, channel], "o", color="black", ms=4, label="seen")
        later = ts[i] > SPLIT
        ax.plot(
            ts[i][later],
            ys[i][later][:, channel],
            "o",
            mfc="none",
            color="black",
            ms=4,
            label="later",
        )
        ax.set(xlabel="t", ylabel=f"x{channel + 1}")
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False, loc="lower right")
    nde.plot.save(fig, "double_ou.png")


def main(
    steps: int = 800,
    plot: bool = True,
    *,
    series: int = 4000,
    tested: int = 1000,
    batch: int = 128,
    draws: int = 64,
    seed: int = 0,
) -> dict:
    """Train, predict, print the table, save the picture; the rows of the table by name."""
    data = tuple(jnp.asarray(x, dtype=float) for x in cut(*simulate(seed, series), seed))
    ts, ys = simulate(seed + 1000, tested)
    *past, target, values = task(ts, ys)
    mean, variance = kalman(*past, target)
    width = 1.645 * np.sqrt(variance)
    results = {"Kalman": score(mean, mean - width, mean + width, values)}
    model, history = train(
        make_model(jax.random.key(seed)), bound(steps), data,
        steps=steps, batch=batch, clip=100.0, rate=1e-2, key=jax.random.key(seed + 1),
    )  # fmt: skip
    inputs = tuple(jnp.asarray(x, dtype=float) for x in (*past, target))
    drawn = np.asarray(forecast(model, *inputs, jax.random.key(seed + 2), draws))
    noise = STD * np.random.default_rng(seed).standard_normal(drawn.shape)
    low, high = np.quantile(drawn + noise, [0.05, 0.95], axis=1)
    results["latent SDE"] = score(drawn.mean(axis=1), low, high, values)
    results["latent SDE"]["seconds"] = history.seconds
    bayes, history = train(
        make_filter(jax.random.key(seed)), losses.prediction_likelihood, from_the_start(*data),
        steps=steps, batch=batch, clip=1.0, rate=5e-3, key=jax.random.key(seed + 1),
    )  # fmt: skip
    mean, std = (np.asarray(x) for x in filtered(bayes, *inputs))
    results["GRU-ODE-Bayes"] = score(mean, mean - 1.645 * std, mean + 1.645 * std, values)
    results["GRU-ODE-Bayes"]["seconds"] = history.seconds
    filled = np.where(np.isnan(past[1]), -np.inf, past[0][..., None]).argmax(axis=1)
    last = np.take_along_axis(past[1], filled[:, None], 1)[:, 0]
    results["last value"] = score(
        last, last - np.inf, last + np.inf, np.where(np.isnan(last), np.nan, values)
    )
    print(table(results))
    if plot:
        picture(model, *task_series(ts, ys), past)
    return results


def task_series(ts, ys):
    """The whole series of the task, in its order."""
    seen = ~np.isnan(ys).all(axis=2)
    after, before = seen & (ts > SPLIT), seen & (ts <= SPLIT)
    usable = after.any(axis=1) & (before.sum(axis=1) >= 2)
    return ts[usable], ys[usable]


# *What to take away*: for the next value, a learned filter (GRU-ODE-Bayes) comes as near as the filter that
# knows the equations. The latent SDE, which also draws whole paths, forecasts better than the last value in
# as many seconds, with two to three times the squared error of the filters and bands that are too narrow.
# *Next*: the same without simulation in training, `sde_lorenz.py`.

if __name__ == "__main__":
    main()
