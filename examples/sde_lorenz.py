"""# A stochastic Lorenz attractor, with and without simulation

    dx = a_1 (y - x) dt + b dW_1     dy = (x (a_2 - z) - y) dt + b dW_2     dz = (x y - a_3 z) dt + b dW_3

with a = (10, 28, 8/3), b = 0.15, observed at 41 times in [0, 1] with noise. One latent SDE is trained in
two ways to the same evidence lower bound:

- **simulated**: the posterior is solved, and its divergence from the prior rides along;
- **matched**: the posterior is given by its marginals, and nothing is solved (SDE Matching).

Both are judged by the simulated bound of series that were held out, in nats per series, and by their
priors, which should draw Lorenz paths. The first is judged with the steps that it was trained with, whose
error its drift makes good; the second never saw a step, and is judged with finer ones.

*Gotcha: time is rescaled in the encoder (`time_scale`), not in the equation: the integral of the
divergence is over the time of the equation, and the factor T in front of its mean is that time.*

Source: X. Li et al., Scalable Gradients for Stochastic Differential Equations (2020) | arXiv:2001.01328;
SDE Matching (2025) | arXiv:2502.02472
"""

import dataclasses
import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

import nde
from nde import losses
from nde.latent_sde import Gaussian, GRUEncoder, PosteriorDrift, PosteriorMarginals

TIMES = np.linspace(0.0, 1.0, 41)
A, B = (10.0, 28.0, 8 / 3), 0.15
LATENT, HIDDEN, CONTEXT = 4, 64, 32
STD = 0.05  # noise of an observation, in standard deviations of the data
STEPS = {
    "simulated": 2,
    "matched": 16,
}  # per interval when judged: matching learns without any steps
COLORS = {"simulated": "#4477AA", "matched": "#228833"}


def simulate(seed, series, cells=50):
    """Standardized, noisy series, shape (series, 41, 3): Euler-Maruyama in small steps."""
    rng, h = np.random.default_rng(seed), (TIMES[1] - TIMES[0]) / cells
    u = rng.standard_normal((series, 3))
    rows = [u]
    for _ in TIMES[1:]:
        for _ in range(cells):
            x, y, z = u.T
            drift = np.stack([A[0] * (y - x), x * (A[1] - z) - y, x * y - A[2] * z], axis=1)
            u = u + h * drift + B * np.sqrt(h) * rng.standard_normal(u.shape)
        rows.append(u)
    ys = np.stack(rows, axis=1)
    scale = np.array([8.0, 9.0, 9.0])
    ys = (ys - np.array([0.0, 0.0, 16.0])) / scale
    return ys + STD * rng.standard_normal(ys.shape)


def make_model(kind, key):
    """The same prior, diffusion and decoder; the posterior as a drift or as its marginals."""
    keys = jax.random.split(key, 6)
    if kind == "simulated":
        field = nde.fields.MLPField(
            LATENT, HIDDEN, 1, context=CONTEXT, time=True, scale=20.0, key=keys[2]
        )
        posterior = PosteriorDrift(eqx.nn.Linear(CONTEXT, 2 * LATENT, key=keys[1]), field)
    else:
        network = nde.fields.MLPField(
            CONTEXT,
            HIDDEN,
            1,
            out_size=2 * LATENT,
            time=True,
            final_activation=lambda x: x,
            key=keys[2],
        )
        posterior = PosteriorMarginals(network, 40.0)
    return nde.LatentSDE(
        GRUEncoder(3, HIDDEN, CONTEXT, both_ways=kind == "matched", key=keys[0]),
        posterior,
        nde.fields.MLPField(LATENT, HIDDEN, 2, scale=20.0, key=keys[3]),
        nde.fields.OwnNoise(LATENT, 8, least=0.05, most=2.0, key=keys[4]),
        eqx.nn.Linear(LATENT, 3, key=keys[5]),
        Gaussian(jnp.zeros(LATENT), jnp.zeros(LATENT)),
        observation_std=STD,
        steps_per_interval=2,
    )


def data_of(ys):
    ts = jnp.asarray(TIMES, dtype=float)
    return jnp.tile(ts, (len(ys), 1)), jnp.asarray(ys, dtype=float)


@eqx.filter_jit
def bound(model, ts, ys, key):
    """The simulated bound of each series."""
    run = lambda ts, ys, key: model.evidence(ts, ys, throw=False, key=key).elbo()
    return jax.vmap(run)(ts, ys, jax.random.split(key, ys.shape[0]))


def train(kind, data, *, steps, batch, seed):
    """A trained model and its history."""
    losses_by_kind = {
        "simulated": losses.evidence,
        "matched": functools.partial(losses.matched_evidence, samples=4),
    }
    warm = optax.linear_schedule(0.01, 1.0, max(1, steps // 5))
    optim = optax.chain(
        optax.clip_by_global_norm(1000.0), optax.adam(optax.cosine_decay_schedule(5e-3, steps))
    )
    return nde.fit(
        make_model(kind, jax.random.key(seed)),
        functools.partial(losses_by_kind[kind], kl_weight=warm),
        data,
        optim=optim,
        steps=steps,
        batch_size=batch,
        progress=False,
        key=jax.random.key(seed + 1),
    )


def bound_in_training(history):
    """The bound at each step (both divergences in full), smoothed over a fiftieth of the steps."""
    value = history["log_likelihood"] - history["kl_start"] - history["kl_path"]
    width = max(1, len(value) // 50)
    return np.convolve(value, np.full(width, 1 / width), mode="valid")


@eqx.filter_jit
def draw(model, key, paths):
    """Paths of the prior, shape (paths, 41, 3)."""
    ts = jnp.asarray(TIMES, dtype=float)
    return jax.vmap(lambda key: model.sample(ts, key=key))(jax.random.split(key, paths))


def table(results):
    """One row per way to train."""
    lines = [
        f"{'':<11}{'held-out bound':>20}{'KS of marginals':>17}{'ms a step':>11}{'train s':>9}"
    ]
    for name, row in results.items():
        value = f"{row['bound']:.1f} +- {row['error']:.1f}"
        step = 1e3 * row["seconds"] / max(1, row["steps"])
        lines.append(f"{name:<11}{value:>20}{row['ks']:>17.3f}{step:>11.1f}{row['seconds']:>9.1f}")
    return "\n".join(lines)


def picture(models, histories, ys):
    """The bound against the seconds of training; paths of the data and of both priors."""
    import matplotlib.pyplot as plt

    fig, axes = plt.subplots(1, 4, figsize=(13, 3.4), layout="constrained")
    for name, history in histories.items():
        curve = bound_in_training(history)
        seconds = np.linspace(0, history.seconds, len(curve))
        axes[0].plot(seconds, curve, color=COLORS[name], label=name)
    axes[0].set(xlabel="seconds of training", ylabel="bound, nats per series", ylim=(-500, 250))
    axes[0].legend(frameon=False)
    drawn = {name: draw(model, jax.random.key(3), 40) for name, model in models.items()}
    for ax, (name, paths) in zip(axes[1:], ({"data": ys[:40]} | drawn).items(), strict=False):
        ax.plot(
            np.asarray(paths)[:, :, 0].T,
            np.asarray(paths)[:, :, 2].T,
            lw=0.7,
            alpha=0.6,
            color=COLORS.get(name, "0.3"),
        )
        ax.set(
            title=name if name == "data" else f"{name}: prior",
            xlabel="x",
            ylabel="z",
            xlim=(-3, 3),
            ylim=(-3, 4),
        )
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
    nde.plot.save(fig, "sde_lorenz.png")


def main(
    steps: int = 1000,
    plot: bool = True,
    *,
    series: int = 1024,
    judged: int = 256,
    batch: int = 64,
    seed: int = 0,
) -> dict:
    """Train in both ways, print the table, save the picture; the rows of the table by name."""
    data, held_out = data_of(simulate(seed, series)), data_of(simulate(seed + 1000, judged))
    models, histories, results = {}, {}, {}
    for kind in ("simulated", "matched"):
        model, history = train(kind, data, steps=steps, batch=batch, seed=seed)
        model = dataclasses.replace(model, steps_per_interval=STEPS[kind])
        models[kind], histories[kind] = model, history
        values = np.asarray(bound(model, *held_out, jax.random.key(seed + 2)))
        drawn = np.asarray(draw(model, jax.random.key(seed + 3), judged))
        test = nde.evaluate.ks(drawn[:, ::10], np.asarray(held_out[1])[:, ::10])
        results[kind] = {
            "bound": float(values.mean()),
            "error": float(values.std() / np.sqrt(len(values))),
            "ks": float(np.median(test.statistic)),
            "seconds": history.seconds,
            "steps": steps,
        }
    print(table(results))
    if plot:
        picture(models, histories, np.asarray(held_out[1]))
    return results


# *What to take away*: both ways train the same prior, and after as many steps matching has the better
# bound. A step of it is not cheaper here: 80 steps of four entries take less time than the encoder.
# Matching is for long or stiff paths.
# *Next*: a score in place of a likelihood, `sde_ou.py`.

if __name__ == "__main__":
    main()
