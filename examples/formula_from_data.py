"""# Formulas from data: a saturating reaction, and two species of which one is seen

First, trajectories of y' = (v / (1 + v), x / (1 + x)): slopes of local polynomials, evolution, and
the constants once more through the solve. Second, predator and prey of which only the prey is
observed, from known beginnings: a neural ODE learns both rates from the prey alone, evolution reads
formulas from it, and the solve decides between them.

*Gotcha: a network means nothing where it has seen no data, so formulas are read from it at states
of its own trajectories; and its errors are no noise: a long formula fits them too. So the loss that
decides is that of the solve.*

Source: P. Kidger, On Neural Differential Equations (2021) | arXiv:2202.02435, chapter 6; the second
problem as in S. de Vries et al., Kozax (2025) | arXiv:2502.03047.
"""

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import optax

import nde
from nde import symbolic

jax.config.update("jax_enable_x64", True)
TOLERANCES = diffrax.PIDController(rtol=1e-6, atol=1e-8)
SATURATING = symbolic.Field.parse(["v / (1.0 + v)", "x / (1.0 + x)"], ("x", "v"))
SPECIES = symbolic.Field.parse(["1.1 * x - 0.4 * x * v", "0.4 * x * v - 0.4 * v"], ("x", "v"))


def make_model(field):
    return nde.NeuralODE(field, stepsize_controller=TOLERANCES)


def observe(field, series, end, times, *, low, high, seed):
    """Trajectories of an equation from random beginnings."""
    ts = jnp.linspace(0.0, end, times)
    y0s = jax.random.uniform(jax.random.key(seed), (series, 2), minval=low, maxval=high)
    return ts, y0s, jax.vmap(make_model(field), in_axes=(None, 0))(ts, y0s)


def saturating(generations, seed):
    """Raw trajectories -> slopes -> fronts -> constants through the solve."""
    ts, y0s, ys = observe(SATURATING, 8, 2.0, 21, low=0.0, high=1.5, seed=seed)
    fronts = symbolic.search(
        *symbolic.slopes(ts, ys),
        variables=("x", "v"),
        length=10,
        generations=generations,
        tolerance=1e-10,
        progress=False,
        key=jax.random.key(seed),
    )
    return symbolic.refine(fronts, make_model, ts, y0s, ys)


def learn_rates(ts, y0s, prey, steps, seed):
    """A neural ODE of both species, trained on the prey alone: on more and more of the series."""

    def loss(model, batch, key):
        del key
        y0s, prey = batch.data
        horizon = jnp.minimum(1.0, 0.2 + 1.2 * batch.step / steps) * ts[-1]
        solve = lambda y0: model.solve(ts, y0, throw=False).ys[:, 0]
        misfit = jnp.where(ts[None] <= horizon, jax.vmap(solve)(y0s) - prey, 0.0)
        return jnp.mean(misfit**2)

    field = nde.fields.MLPField(
        2, width=32, depth=2, final_activation=lambda x: x, key=jax.random.key(seed)
    )
    model = nde.NeuralODE(field, stepsize_controller=diffrax.PIDController(rtol=1e-4, atol=1e-6))
    optim = optax.adam(optax.cosine_decay_schedule(1e-2, max(steps, 1)))
    return nde.fit(
        model, loss, (y0s, prey), optim=optim, steps=steps, progress=False, key=jax.random.key(seed)
    )[0]


def species(steps, generations, seed):
    """Prey -> neural ODE -> fronts -> constants through the solve, of the prey alone."""
    ts, y0s, ys = observe(SPECIES, 16, 4.0, 41, low=0.5, high=3.0, seed=seed)
    model = learn_rates(ts, y0s, ys[..., 0], steps, seed)
    states = jax.vmap(model, in_axes=(None, 0))(ts, y0s)[:, ::4].reshape(-1, 2)
    fronts = symbolic.distill(
        model,
        states,
        variables=("x", "v"),
        operators=("+", "-", "*"),
        length=10,
        generations=generations,
        progress=False,
        key=jax.random.key(seed),
    )
    seen = ys.at[..., 1].set(jnp.nan)
    return symbolic.refine(fronts, make_model, ts, y0s, seen), (ts, y0s, ys)


def error(found, truth):
    """The largest relative difference of two fields on a grid: small only for the same formulas."""
    grid = np.stack(np.meshgrid(*[np.linspace(0.3, 3.0, 8)] * 2), axis=-1).reshape(-1, 2)
    ours, theirs = (jax.vmap(lambda y, f=f: f(0.0, y))(jnp.asarray(grid)) for f in (found, truth))
    return float(jnp.max(jnp.abs(ours - theirs) / (1 + jnp.abs(theirs))))


def picture(refined, ts, y0s, ys):
    """The predator that nobody saw."""
    import matplotlib.pyplot as plt

    fig, axes = plt.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
    model = refined.model()
    for at, ax in enumerate(axes):
        found = model(ts, y0s[at])
        seen = ys[at, ::2].at[:, 1].set(jnp.nan)
        nde.plot.trajectories(ts, found, (ts[::2], seen), ax, labels=["prey", "predator"])
        ax.plot(ts, ys[at, :, 1], "k:", lw=1, label="predator, not shown to the model")
        ax.legend(frameon=False, fontsize=8)
    nde.plot.save(fig, "formula_from_data.png")


def main(steps: int = 600, plot: bool = True, *, generations: int = 60, seed: int = 0) -> dict:
    """Both problems; for each the chosen formulas and the largest relative error of the field."""
    first = saturating(generations, seed)
    print(first.table())
    second, data = species(steps, generations, seed)
    print(second.table())
    if plot:
        picture(second, *data)
    results = {}
    for name, refined, truth in (("saturating", first, SATURATING), ("species", second, SPECIES)):
        field = refined.choose()
        results[name] = {"formulas": str(field), "error": error(field, truth)}
    print(results)
    return results


# *What to take away*: regression proposes, the solve disposes. *Next*: a formula for the part of an
# equation that is not known, `pendulum_formula.py`.

if __name__ == "__main__":
    main()
