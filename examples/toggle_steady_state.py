"""# A genetic toggle switch, fitted to where it comes to rest

Two genes repress each other: y' = (a / (1 + v^2) - y, b / (1 + y^2) - v), and where both are strong
the switch remembers which of them was on. What is measured is only the level at rest, for several
doses of an inducer that weakens the first; the rates come from there, through the gradient of the
steady state: no long solve is stored, and none is needed once a short one has come near.

*Gotcha: close to the dose where one of the two states vanishes, the switch relaxes ever more
slowly, and its sensitivity grows without bound. That is the biology, not the solver;
`stats["growth"]` near 0 says so.*

Source: T. S. Gardner et al., Construction of a genetic toggle switch in Escherichia coli (2000) |
doi:10.1038/35002131; the data are simulated.
"""

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import optax

import nde
from nde.hybrid import Positive

jax.config.update("jax_enable_x64", True)
TRUTH = {"first": 4.0, "second": 3.0, "half": 3.0}
DOSES = jnp.linspace(0.0, 1.0, 9)
START = jnp.array([3.0, 0.1])  # the first gene is on
HORIZON = 8.0


def toggle(t, y, p):
    """The first gene is weakened by the dose: a / (1 + dose / half)."""
    del t
    strength = p["first"] / (1 + p["dose"] / p["half"])
    return jnp.stack([strength / (1 + y[1] ** 2) - y[0], p["second"] / (1 + y[0] ** 2) - y[1]])


def make_model(rates):
    """The switch; `args` is the dose."""
    return nde.HybridODE(
        toggle,
        None,
        {name: Positive(value) for name, value in rates.items()},
        combine=lambda known, network, t, y, p, dose: known(t, y, p | {"dose": dose}),
        stepsize_controller=diffrax.PIDController(rtol=1e-6, atol=1e-8),
    )


def at_rest(model, dose):
    """The steady state that the switch reaches, and its statistics."""
    return nde.implicit.steady_state(model, START, dose, horizon=HORIZON, throw=False)


def loss(model, batch, key):
    """Relative misfit of the levels at rest."""
    del key
    doses, levels = batch.data
    found = jax.vmap(at_rest, in_axes=(None, 0))(model, doses)
    misfit = jnp.log(found.value) - jnp.log(levels)
    failed = jnp.mean((~found.converged).astype(float))
    return jnp.mean(misfit**2), {"failed": failed}


def picture(models, doses, levels):
    """Levels at rest against the dose."""
    import matplotlib.pyplot as plt

    fig, ax = plt.subplots(figsize=(6, 3.5), layout="constrained")
    fine = jnp.linspace(0.0, 3.0, 61)
    for (name, model), style in zip(models.items(), (":", "-"), strict=True):
        found = jax.vmap(at_rest, in_axes=(None, 0))(model, fine)
        ax.plot(fine, found.value[:, 0], style, color="tab:blue", label=f"first gene, {name}")
        ax.plot(fine, found.value[:, 1], style, color="tab:orange", label=f"second gene, {name}")
    ax.plot(doses, levels, "k.")
    ax.set(xlabel="dose", ylabel="level at rest", yscale="log")
    ax.legend(frameon=False, fontsize=8)
    nde.plot.save(fig, "toggle_steady_state.png")


def main(steps: int = 1000, plot: bool = True, *, noise: float = 0.01, seed: int = 0) -> dict:
    """True and fitted rates, and the slowest rate of relaxation over the doses."""
    exact = jax.vmap(at_rest, in_axes=(None, 0))(make_model(TRUTH), DOSES).value
    levels = exact * jnp.exp(noise * jax.random.normal(jax.random.key(seed), exact.shape))
    guess = make_model({"first": 5.0, "second": 2.0, "half": 1.5})
    model, _ = nde.fit(
        guess,
        loss,
        (DOSES, levels),
        steps=steps,
        progress=False,
        key=jax.random.key(seed),
        optim=optax.adam(optax.cosine_decay_schedule(5e-2, max(steps, 1))),
    )
    found = {name: float(value) for name, value in model.physical_parameters().items()}
    growth = jax.vmap(at_rest, in_axes=(None, 0))(model, DOSES).stats["growth"]
    if plot:
        picture({"guess": guess, "fitted": model}, DOSES, levels)
    errors = [abs(found[name] / TRUTH[name] - 1) for name in TRUTH]
    return {"rates": found, "error": float(np.max(errors)), "slowest": float(jnp.max(growth))}


# *What to take away*: the gradient of a steady state costs one linear solve, however long the way there.
# *Next*: a solver that learns, `hypersolver_flow.py`.

if __name__ == "__main__":
    print(main())
