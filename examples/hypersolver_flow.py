"""# A flow in two evaluations: solvers with a learned correction

A neural ODE is trained by flow matching to carry normal noise into two moons. Then a small network
learns what one step of Euler's or Heun's method leaves out, and both, with their corrections,
sample beside Euler, Heun and Runge-Kutta 4 at equal numbers of evaluations, and at equal time.

*Gotcha: the correction belongs to this flow. Train the flow on, and it corrects for another one:
`check_field` warns.*

Source: M. Poli et al., Hypersolvers: Toward Fast Continuous-Depth Models (2020) | arXiv:2007.09601;
Y. Lipman et al., Flow Matching for Generative Modeling (2022) | arXiv:2210.02747.
"""

import functools
import time
from typing import ClassVar

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

import nde
from nde.solvers import Hypersolver, fingerprint

EVALUATIONS = (2, 4, 8, 16)
ENDS = jnp.array([0.0, 1.0])


class RK4(diffrax.AbstractERK):
    """The classical method of order 4."""

    tableau: ClassVar = diffrax.ButcherTableau(
        c=np.array([0.5, 0.5, 1.0]),
        a_lower=(np.array([0.5]), np.array([0.0, 0.5]), np.array([0.0, 0.0, 1.0])),
        b_sol=np.array([1.0, 2.0, 2.0, 1.0]) / 6,
        b_error=np.array([1.0, 2.0, 2.0, -5.0]) / 6,  # against Euler's method
    )
    interpolation_cls: ClassVar = diffrax.ThirdOrderHermitePolynomialInterpolation.from_k

    def order(self, terms):
        return 4


class Correction(eqx.Module):
    """g(t, y, f, h): what a step leaves out, over h^(p+1); zero at the start."""

    mlp: eqx.nn.MLP

    def __init__(self, key):
        mlp = eqx.nn.MLP(6, 2, 32, 2, jax.nn.silu, key=key)
        last = jax.tree.map(lambda x: 0 * x if eqx.is_array(x) else x, mlp.layers[-1])
        self.mlp = eqx.tree_at(lambda m: m.layers[-1], mlp, last)

    def __call__(self, t, y, f, h, args):
        del args
        return self.mlp(jnp.concatenate([jnp.stack([t, h]).astype(y.dtype), y, f]))


def moons(key, count):
    """Two half circles, of unit standard deviation or so."""
    which, angle, noise = jax.random.split(key, 3)
    side = jax.random.bernoulli(which, 0.5, (count,)).astype(float)
    angle = jnp.pi * jax.random.uniform(angle, (count,))
    x = jnp.where(side > 0, 1 - jnp.cos(angle), jnp.cos(angle)) - 0.5
    y = jnp.where(side > 0, 0.5 - jnp.sin(angle), jnp.sin(angle)) - 0.25
    return 1.5 * jnp.stack([x, y], axis=1) + 0.07 * jax.random.normal(noise, (count, 2))


def flow_loss(field, batch, key):
    """Conditional flow matching: from noise to data on straight lines."""
    keys = jax.random.split(key, 2)
    start = jax.random.normal(keys[0], batch.data.shape)
    t = jax.random.uniform(keys[1], (len(start), 1))
    state = (1 - t) * start + t * batch.data
    rates = jax.vmap(lambda t, y: field(t[0], y))(t, state)
    return jnp.mean((rates - (batch.data - start)) ** 2)


def train_correction(field, base, *, steps, seed):
    """The base with a correction, trained on what it leaves out along trajectories of the flow."""
    keys = jax.random.split(jax.random.key(seed), 4)
    y0s = jax.random.normal(keys[0], (512, 2))
    solver = Hypersolver(base, Correction(keys[1]), fingerprint(field))
    starts = jnp.linspace(0.0, 0.9, 10)
    states = jax.vmap(nde.NeuralODE(field), in_axes=(None, 0))(starts, y0s).reshape(-1, 2)
    times = jnp.tile(starts, 512)
    # From one step of the whole length to sixteen.
    h = jnp.minimum(
        2.0 ** jax.random.uniform(keys[2], times.shape, minval=-4.0, maxval=0.0), 1 - times
    )
    residual = lambda t, h, y: solver.residual(diffrax.ODETerm(field), t, t + h, y, tolerance=1e-6)
    targets = jax.jit(jax.vmap(residual))(times, h, states)
    rates = jax.vmap(field)(times, states)
    power = 1 + base.order(diffrax.ODETerm(field))

    def loss(correction, batch, key):
        del key
        t, h, y, f, target = batch.data
        found = jax.vmap(correction, in_axes=(0, 0, 0, 0, None))(t, y, f, h, None)
        return jnp.mean(((h ** (power - 1))[:, None] * (found - target)) ** 2)

    correction, _ = nde.fit(
        solver.correction,
        loss,
        (times, h, states, rates, targets),
        steps=steps,
        batch_size=512,
        optim=optax.adam(optax.cosine_decay_schedule(1e-2, max(steps, 1))),
        progress=False,
        key=keys[3],
    )
    return eqx.tree_at(lambda s: s.correction, solver, correction)


@eqx.filter_jit
def sample(field, solver, steps, noise):
    """Where constant steps of a solver take the noise; `steps` is a number."""
    model = nde.NeuralODE(
        field, solver=solver, stepsize_controller=diffrax.ConstantStepSize(), dt0=1.0 / steps
    )
    return jax.vmap(lambda y0: model(ENDS, y0)[-1])(noise)


def measured(field, solver, steps, noise, exact):
    """Mean error, and milliseconds for all samples (the best of ten)."""
    run = functools.partial(sample, field, solver, steps, noise)
    error, seconds = float(jnp.mean(jnp.linalg.norm(run() - exact, axis=1))), []
    for _ in range(10):
        began = time.perf_counter()
        jax.block_until_ready(run())
        seconds.append(time.perf_counter() - began)
    return {"error": error, "ms": 1e3 * min(seconds)}


def picture(results, samples):
    """Error against evaluations and against time; samples of two evaluations."""
    import matplotlib.pyplot as plt

    fig, axes = plt.subplots(1, 4, figsize=(14, 3.5), layout="constrained")
    for name, rows in results.items():
        errors = [row["error"] for row in rows.values()]
        style = "o-" if name.startswith("Hyper") else "s--"
        axes[0].loglog(list(rows), errors, style, label=name, ms=4)
        axes[1].loglog([row["ms"] for row in rows.values()], errors, style, ms=4)
    axes[0].set(xlabel="evaluations of the field", ylabel="mean error of a sample")
    axes[0].legend(frameon=False, fontsize=7)
    axes[0].set_xticks(EVALUATIONS, [str(n) for n in EVALUATIONS])
    axes[1].set(xlabel="ms for all samples")
    for ax in axes[:2]:
        ax.minorticks_off()
    for ax, (name, points) in zip(axes[2:], samples.items(), strict=True):
        ax.plot(*np.asarray(points).T, ".", ms=2)
        ax.set(title=name, aspect="equal", xlim=(-3.5, 3.5), ylim=(-3, 3))
    nde.plot.save(fig, "hypersolver_flow.png")


def main(steps: int = 2000, plot: bool = True, *, seed: int = 0) -> dict:
    """By solver and number of evaluations: mean error of a sample, and time."""
    keys = jax.random.split(jax.random.key(seed), 4)
    field = nde.fields.MLPField(
        2,
        width=64,
        depth=3,
        time=True,
        activation=jax.nn.silu,
        final_activation=lambda x: x,
        key=keys[0],
    )
    field, _ = nde.fit(
        field,
        flow_loss,
        moons(keys[1], 8192),
        steps=steps,
        batch_size=256,
        progress=False,
        optim=optax.adam(optax.cosine_decay_schedule(3e-3, max(steps, 1))),
        key=keys[2],
    )
    solvers = {"Euler": (diffrax.Euler(), 1), "Heun": (diffrax.Heun(), 2), "RK4": (RK4(), 4)}
    for name in ("Euler", "Heun"):
        base, stages = solvers[name]
        solvers[f"Hyper{name}"] = (train_correction(field, base, steps=steps, seed=seed), stages)
    noise = jax.random.normal(keys[3], (1024, 2))
    tight = nde.NeuralODE(field, stepsize_controller=diffrax.PIDController(rtol=1e-5, atol=1e-6))
    exact = jax.vmap(lambda y0: tight(ENDS, y0)[-1])(noise)
    results = {
        name: {
            n: measured(field, solver, n // stages, noise, exact)
            for n in EVALUATIONS
            if n % stages == 0
        }
        for name, (solver, stages) in solvers.items()
    }
    if plot:
        few = {name: sample(field, solvers[name][0], 2, noise) for name in ("Euler", "HyperEuler")}
        picture(results, {f"{name}, 2 evaluations": points for name, points in few.items()})
    return results


# *What to take away*: where evaluations are few, a correction is worth several of them; where they are
# many, a method of higher order is cheaper. *Next*: `formula_from_data.py`.

if __name__ == "__main__":
    for name, rows in main().items():
        print(name, {n: f"{row['error']:.4f}, {row['ms']:.1f} ms" for n, row in rows.items()})
