"""# A noisy spiral: a neural SDE that its solver likes

The stochastic spiral

    du1 = (-0.1 u1^3 - 2.0 u2^3) dt + 0.2 u1 dW1        du2 = (2.0 u1^3 - 0.1 u2^3) dt + 0.2 u2 dW2

starts at (2, 0). A neural SDE is trained until the mean and the variance of its paths over time are
those of the spiral, once plain and once with the error estimates of its own solver, an adaptive
SOSRI, in the loss (ERNSDE). Each is then judged by paths on a fine grid.

*Gotcha: a mean over 64 paths is itself noise. Its error is an eighth of the standard deviation, so
the training loss cannot fall to zero. And adaptive steps at a loose tolerance have moments of their
own. So models are compared by many paths on a fine grid.*

Source: A. Pal et al., Opening the Blackbox (2021) | arXiv:2105.03918
"""

import functools
from pathlib import Path
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import optax
from jaxtyping import Array

import nde
from nde import regularizers
from nde.solvers import SOSRI, BrownianGrid, BrownianInterval, DiscreteAdjoint

START = (2.0, 0.0)
# Multiples of 1/32: a step that ends there ends there exactly. The last bit of another number could
# leave a step too short for the path to resolve, which is rejected for ever.
TS = np.linspace(0.0, 1.0, 33)
TOLERANCE = 1e-2  # of the adaptive steps, relative and absolute
FINE = 20  # cells of the fine grid between two saved times
# name -> (reduction of E h over the steps, its weight in the loss); None: no regularizer
METHODS = {"vanilla": None, "ERNSDE": ("sum", 0.2)}
PICTURE = Path(__file__).parents[1] / "docs" / "images" / "ernsde_spiral.png"
COLORS = dict(zip(METHODS, ("#4477AA", "#EE7733"), strict=True))


def true_moments(paths, seed, cells=12):
    """Means and variances of the spiral at `TS`, shape (times, 2) each: half a step of the noise,
    which is geometric and so exact, a step of the drift by Runge-Kutta, half a step of noise."""
    rng, h = np.random.default_rng(seed), (TS[1] - TS[0]) / cells
    u = np.tile(START, (paths, 1))

    def drift(u):
        x, y = u.T**3
        return np.stack([-0.1 * x - 2.0 * y, 2.0 * x - 0.1 * y], axis=1)

    def noise(u):
        return u * np.exp(0.2 * np.sqrt(h / 2) * rng.standard_normal(u.shape) - 0.02 * h / 2)

    moments = [(u.mean(axis=0), u.var(axis=0))]
    for _ in TS[1:]:
        for _ in range(cells):
            u = noise(u)
            k1 = drift(u)
            k2 = drift(u + h / 2 * k1)
            k3 = drift(u + h / 2 * k2)
            u = noise(u + h / 6 * (k1 + 2 * k2 + 2 * k3 + drift(u + h * k3)))
        moments.append((u.mean(axis=0), u.var(axis=0)))
    means, variances = zip(*moments, strict=True)
    return np.stack(means), np.stack(variances)


class NeuralSpiral(eqx.Module):
    """du = F(u^3) dt + (slope u + offset) dW, F a network of one hidden tanh layer.

    The noise of a component depends on that component alone: what SOSRI needs for its order.
    """

    network: eqx.nn.MLP
    slope: Array
    offset: Array
    adjoint: diffrax.AbstractAdjoint

    def __init__(self, key):
        self.network = eqx.nn.MLP(2, 2, 50, 1, jnp.tanh, key=key)
        self.slope, self.offset = jnp.full(2, 0.1), jnp.zeros(2)
        self.adjoint = DiscreteAdjoint()

    def drift(self, t: Any, u: Array, args: Any) -> Array:
        return self.network(u**3)

    def diffusion(self, t: Any, u: Array, args: Any) -> lx.DiagonalLinearOperator:
        return lx.DiagonalLinearOperator(self.slope * u + self.offset)

    def solve(self, key, *, throw: bool = True, fine: bool = False) -> diffrax.Solution:
        """One path at `TS`: adaptive, or on the fine grid."""
        ts, cell = jnp.asarray(TS, dtype=float), float(TS[1]) / FINE
        area = diffrax.SpaceTimeLevyArea
        if fine:
            path = BrownianGrid(0.0, 1.0, cell, (2,), key, levy_area=area)
            controller, first = diffrax.ConstantStepSize(), cell
        else:
            path = BrownianInterval(0.0, 1.0, (2,), key, levy_area=area)
            # Saved times end steps, and rejected steps are made up for: the noise that made
            # a step fail must not be forgotten.
            pid = diffrax.PIDController(TOLERANCE, TOLERANCE)
            controller = diffrax.ClipStepSizeController(pid, ts, store_rejected_steps=100)
            first = 0.01
        terms = (diffrax.ODETerm(self.drift), diffrax.ControlTerm(self.diffusion, path))
        return diffrax.diffeqsolve(
            diffrax.MultiTerm(*terms),
            SOSRI(),
            0.0,
            1.0,
            first,
            jnp.asarray(START, dtype=float),
            saveat=diffrax.SaveAt(ts=ts),
            stepsize_controller=controller,
            adjoint=self.adjoint,
            max_steps=1024,
            throw=throw,
        )


def loss(model, batch, key, *, paths, method):
    """Squared errors of mean and variance over the paths, and the regularizer."""
    means, variances = (leaf[0] for leaf in batch.data)

    def one(key):
        if method is None:
            return model.solve(key, throw=False), jnp.zeros(())
        return regularizers.error_estimate(model, key, reduce=method[0])

    solutions, penalties = jax.vmap(one)(jax.random.split(key, paths))
    errors = moment_errors(solutions.ys, means, variances)
    penalty = jnp.mean(penalties)
    failed = jnp.mean((solutions.result != diffrax.RESULTS.successful).astype(float))
    nfe = jnp.mean(solutions.stats["nfe"].astype(float))
    metrics = {"moments": sum(errors), "penalty": penalty, "nfe": nfe, "failed": failed}
    return sum(errors) + (0.0 if method is None else method[1]) * penalty, metrics


def moment_errors(ys, means, variances):
    """Mean squared errors of the mean and of the variance of paths, shape (paths, times, 2)."""
    return jnp.mean((ys.mean(0) - means) ** 2), jnp.mean((ys.var(0) - variances) ** 2)


def train(moments, method, *, steps, paths, seed):
    """A trained model and its history."""
    return nde.fit(
        NeuralSpiral(jax.random.key(seed)),
        functools.partial(loss, paths=paths, method=method),
        tuple(jnp.asarray(moment, dtype=float)[None] for moment in moments),  # one example
        optim=optax.chain(
            optax.clip_by_global_norm(10.0),
            optax.adabelief(optax.cosine_decay_schedule(3e-2, steps)),
        ),
        steps=steps,
        progress=False,
        key=jax.random.key(seed + 1),
    )


@eqx.filter_jit
def simulate(model, key, paths, fine):
    """Paths, shape (paths, times, 2), their mean number of evaluations, and how many failed."""
    solve = lambda key: model.solve(key, throw=False, fine=fine)
    solutions = jax.vmap(solve)(jax.random.split(key, paths))
    failed = jnp.sum(solutions.result != diffrax.RESULTS.successful)
    return solutions.ys, jnp.mean(solutions.stats["nfe"].astype(float)), failed


def report(model, history, moments, paths, seed):
    """Errors of the moments on the fine grid, NFE of adaptive paths, seconds of training."""
    ys, _, _ = simulate(model, jax.random.key(seed + 2), paths, True)
    mean, variance = moment_errors(ys, *(jnp.asarray(moment, dtype=float) for moment in moments))
    _, nfe, failed = simulate(model, jax.random.key(seed + 3), paths, False)
    return {
        "train": float(history["moments"][-max(1, len(history) // 10) :].mean()),
        "mean": float(jnp.sqrt(mean)),
        "variance": float(jnp.sqrt(variance)),
        "nfe": float(nfe),
        "failed": int(failed),
        "seconds": history.seconds,
    }


def picture(moments, models, paths, seed):
    """Means and variances over time: the spiral's, and those of the models on the fine grid."""
    import matplotlib.pyplot as plt

    fig, axes = plt.subplots(2, 2, figsize=(9, 5), sharex=True, layout="constrained")
    for name, (model, _) in models.items():
        ys = np.asarray(simulate(model, jax.random.key(seed + 2), paths, True)[0])
        for row, values in zip(axes, (ys.mean(0), ys.var(0)), strict=True):
            for channel, ax in enumerate(row):
                ax.plot(TS, values[:, channel], color=COLORS[name], label=name)
    for row, kind, truth in zip(axes, ("mean", "variance"), moments, strict=True):
        for channel, ax in enumerate(row):
            ax.plot(TS, truth[:, channel], "o", ms=3, color="black", label="spiral")
            ax.set(ylabel=f"{kind} of u{channel + 1}", xlabel="t" if kind == "variance" else "")
            ax.spines[["top", "right"]].set_visible(False)
    axes[0, 0].legend(frameon=False)
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(PICTURE, dpi=150)
    plt.close(fig)


def main(
    steps: int = 250, plot: bool = True, *, paths: int = 64, judged: int = 1000, seed: int = 0
) -> dict:
    """Train plain and regularized, print the table, save the picture; errors and NFE by method."""
    moments = true_moments(10 * judged, seed)
    models = {
        name: train(moments, method, steps=steps, paths=paths, seed=seed)
        for name, method in METHODS.items()
    }
    results = {name: report(*run, moments, judged, seed) for name, run in models.items()}
    head = ("train loss", "error, mean", "variance", "NFE", "seconds")
    print(f"{'':<10}" + "".join(f"{title:>13}" for title in head))
    for name, row in results.items():
        errors = f"{row['train']:>13.4f}{row['mean']:>13.4f}{row['variance']:>13.4f}"
        print(f"{name:<10}{errors}{row['nfe']:>13.1f}{row['seconds']:>13.1f}")
    if plot:
        picture(moments, models, judged, seed)
    return results


# *What to take away*: the solver already knows how hard a path was; asking for easy ones costs
# nothing forward. What it costs in the moments stands in the table.
# *Next*: the same for ordinary equations, `ernode_digits.py`.

if __name__ == "__main__":
    main()
