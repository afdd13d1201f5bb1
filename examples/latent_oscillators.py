"""# Oscillators at a few times: a latent ODE beside an ODE-RNN

Sines of amplitude 1, frequency U(0.4, 0.8) and any phase, seen with noise 0.01 at irregular times of
their own in [0, 5]: at 10, 20, 30 or 50 of a hundred. Two tasks, judged where nothing was seen:

- **interpolate**: between observations in [0, 5];
- **extrapolate**: from observations in [0, 2.5], the values after them.

The latent ODE encodes what was seen backwards in time (by an ODE-RNN) into the law of one hidden state
at the first time; its ODE does the rest. The ODE-RNN goes forwards: its state flows between
observations, jumps at them, and is trained to predict each from those before.

*Gotcha: on five units at once a latent ODE easily stays at the mean, 0. Here it is trained on one unit
first, less than a period, and on more as it learns (`end` in `bound`).*

Source: Y. Rubanova et al., Latent ODEs for Irregularly-Sampled Time Series (2019) | arXiv:1907.03907
"""

import functools

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

import nde
from nde.latent_ode import Gaussian
from nde.odernn import Backwards, Cell

END, HALF, NOISE = 5.0, 2.5, 0.01
SHARES = (0.1, 0.2, 0.3, 0.5)
KNOWN, POINTS = 50, 100  # values of a series, in training and in the test
LATENT, HIDDEN, CONTEXT = 8, 32, 16
STD = 0.05  # of an observation, in the latent ODE: its error is larger than the noise


def sines(seed, count, points, end=END):
    """Times (count, points + 1) and values (count, points + 1, 1); nothing is known at the first, 0."""
    rng = np.random.default_rng(seed)
    ts = np.sort(rng.uniform(0.0, end, (count, points)), axis=1)
    frequency, phase = rng.uniform(0.4, 0.8, (count, 1)), rng.uniform(0, 2 * np.pi, (count, 1))
    xs = np.sin(2 * np.pi * frequency * ts + phase) + NOISE * rng.standard_normal(ts.shape)
    xs = np.pad(xs, ((0, 0), (1, 0)), constant_values=np.nan)[..., None]
    return jnp.asarray(np.pad(ts, ((0, 0), (1, 0))), float), jnp.asarray(xs, float)


def show(key, ts, xs, shares, ends):
    """The values of a random share of each series up to a time, NaN elsewhere."""
    chosen = jax.random.uniform(key, ts.shape) < shares[:, None]
    return jnp.where((chosen & (ts <= ends[:, None]))[..., None], xs, jnp.nan)


def latent_ode(key):
    """An ODE-RNN as encoder, a linear readout of the hidden state, networks between."""
    keys = jax.random.split(key, 4)
    return nde.LatentODE(
        Backwards(ode_rnn(keys[0], CONTEXT)),
        eqx.nn.MLP(CONTEXT, 2 * LATENT, HIDDEN, 1, jax.nn.softplus, key=keys[1]),
        nde.fields.MLPField(LATENT, 2 * HIDDEN, 1, scale=5.0, key=keys[2]),
        eqx.nn.Linear(LATENT, 1, key=keys[3]),
        Gaussian(jnp.zeros(LATENT), jnp.zeros(LATENT)),
        observation_std=STD,
        stepsize_controller=diffrax.PIDController(rtol=1e-3, atol=1e-3),
    )


def ode_rnn(key, outputs=1):
    """A GRU whose state flows."""
    keys = jax.random.split(key, 3)
    return nde.ODERNN(
        nde.fields.MLPField(HIDDEN, HIDDEN, 1, scale=2.0, key=keys[0]),
        Cell(eqx.nn.GRUCell(2, HIDDEN, key=keys[1])),
        eqx.nn.Linear(HIDDEN, outputs, key=keys[2]),
        jnp.zeros(HIDDEN),
        solver=diffrax.Euler(),
    )


def thinned(ts, xs, key, end):
    """What is shown of each series: 20 to 100 % of its values, of every other to half the time only."""
    share_key, key = jax.random.split(key)
    shares = 0.2 ** jax.random.uniform(share_key, ts.shape[:1])
    return show(key, ts, xs, shares, jnp.where(jnp.arange(len(ts)) % 2, end / 2, end))


def bound(model, batch, key, *, steps):
    """The negative ELBO per known value, up to a time that grows over the first half of the steps."""
    ts, xs = batch.data
    end = optax.linear_schedule(1.0, END, max(1, steps // 2))(batch.step).astype(ts.dtype)
    show_key, key = jax.random.split(key)
    ts, known = jnp.minimum(ts, end), jnp.where((ts < end)[..., None], xs, jnp.nan)
    shown = thinned(ts, known, show_key, end)

    def one(ts, shown, known, key):
        return model.evidence(ts, shown, targets=known, throw=False, key=key)

    parts = jax.vmap(one)(ts, shown, known, jax.random.split(key, len(ts)))
    weight = optax.linear_schedule(0.01, 1.0, steps)(batch.step)
    return -jnp.sum(parts.elbo(weight)) / jnp.sum(~jnp.isnan(known), dtype=ts.dtype)


def one_step(model, batch, key):
    """The squared error of what is predicted of each value that is shown."""
    ts, xs = batch.data
    shown = thinned(ts, xs, key, END)
    return nde.losses.prediction_error(model, nde.train.Batch((ts, shown)), key)


def train(model, loss, data, steps, seed):
    """A trained model and its history."""
    optim = optax.adam(optax.cosine_decay_schedule(1e-2, steps))
    return nde.fit(
        model, loss, data, optim=optax.chain(optax.clip_by_global_norm(1.0), optim), steps=steps,
        batch_size=32, progress=False, key=jax.random.key(seed),
    )  # fmt: skip


@eqx.filter_jit
def predict(model, ts, shown, key, draws):
    """What a model says of each series at its times, shape (series, draws, times)."""
    if isinstance(model, nde.ODERNN):
        return jax.vmap(model)(ts, shown)[..., 0][:, None]
    draw = jax.vmap(lambda ts, shown, key: model(ts, shown, key=key)[:, 0], (None, None, 0))
    return jax.vmap(draw, (0, 0, None))(ts, shown, jax.random.split(key, draws))


def judge(model, ts, xs, key, draws=8):
    """Mean squared error of the mean of the draws by task and share, where nothing was seen."""
    rows = {}
    for task, end in (("interpolate", END), ("extrapolate", HALF)):
        for share in SHARES:
            shown = show(key, ts, xs, jnp.full(len(ts), share), jnp.full(len(ts), end))
            mean = predict(model, ts, shown, key, draws).mean(axis=1)
            counts = jnp.isnan(shown) & ~jnp.isnan(xs)
            if task == "extrapolate":
                counts = counts & (ts > HALF)[..., None]
            rows[task, share] = float(nde.losses.mse(mean[..., None], xs, counts))
    return rows


def picture(models, seed):
    """Two series from what was seen up to the half: the truth, and what both models make of it."""
    import matplotlib.pyplot as plt

    ts, xs = sines(seed, 2, 4 * POINTS, 2 * END)
    shown = show(jax.random.key(seed), ts, xs, jnp.full(2, 0.15), jnp.full(2, HALF))
    fig, axes = plt.subplots(1, 2, figsize=(10, 3.2), sharey=True, layout="constrained")
    found = {name: predict(m, ts, shown, jax.random.key(0), 100) for name, m in models.items()}
    for i, ax in enumerate(axes):
        ax.plot(ts[i], xs[i], ".", color="0.7", ms=2, label="not seen")
        drawn = np.asarray(found["latent ODE"][i])[..., None]
        nde.plot.fan(np.asarray(ts[i]), drawn, ax=ax, color="#4477AA", label="latent ODE")
        ax.plot(ts[i], found["ODE-RNN"][i, 0], color="#EE6677", lw=1, label="ODE-RNN")
        ax.plot(ts[i], shown[i], "o", color="black", ms=4, label="seen")
        ax.axvline(HALF, color="0.5", lw=0.8, ls=":")
        ax.set(xlabel="t", ylim=(-2, 2))
    axes[0].set_ylabel("x")
    axes[1].legend(frameon=False, ncols=4, loc="upper center", fontsize=8)
    nde.plot.save(fig, "latent_oscillators.png")


def main(steps: int = 2500, plot: bool = True, *, series: int = 1000, tested: int = 200) -> dict:
    """Train both, judge them at every share, print the table, save the picture; errors by model."""
    data, test = sines(0, series, KNOWN), sines(1000, tested, POINTS)
    models = {
        "latent ODE": (latent_ode(jax.random.key(0)), functools.partial(bound, steps=steps), steps),
        "ODE-RNN": (ode_rnn(jax.random.key(1)), one_step, max(1, steps // 2)),
    }
    results = {}
    print(f"{'mean squared error, seen':<34}" + "".join(f"{share:>9.0%}" for share in SHARES))
    for name, (model, loss, count) in models.items():
        models[name], history = train(model, loss, data, count, seed=2)
        results[name] = judge(models[name], *test, jax.random.key(3))
        for task in ("interpolate", "extrapolate"):
            numbers = "".join(f"{results[name][task, share]:>9.4f}" for share in SHARES)
            print(f"{name + ', ' + task:<34}{numbers}{history.seconds:>7.0f} s of training")
    if steps >= 2500:  # trained, and not only tried
        latent, recurrent = results.values()
        for share in (0.3, 0.5):  # from fewer values it is not three times better
            assert latent["extrapolate", share] < recurrent["extrapolate", share] / 3, share
    if plot:
        picture(models, 2000)
    return results


# *What to take away*: what a latent ODE knows of a series is a state at one time, so its forecast is as
# good as its encoding, however far; the flow of an ODE-RNN has only learned to reach the next observation.
# *Next*: noise in the hidden state itself, `double_ou.py`.

if __name__ == "__main__":
    main()
