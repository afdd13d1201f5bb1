"""# The friction of a pendulum: known mechanics, an unknown law, a formula

    q'' = -w^2 sin q + F(v)

Gravity is known up to a number; the friction F is not. Angles and velocities of four swings are
measured with 2 % noise. The network F is trained through the solve; sparse regression on its values
along the model's own swings proposes laws, and the solve chooses among them and fits their constants.
The truth is a drag, F = -0.3 v |v|. A neural ODE that knows nothing is trained beside it, and both are
asked for a longer and larger swing than any they have seen.

*Gotcha: v, v |v| and v^3 look alike on a narrow range of velocities. Swings of different size, and their
trajectories, tell them apart.*
"""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

import nde
from nde.hybrid import Positive

jax.config.update("jax_enable_x64", True)

NAMES = ("q", "v")
LIBRARY = ("v", "v * abs(v)", "cube(v)", "q", "cube(q)", "q * v")
TS = jnp.linspace(0.0, 8.0, 65)
STARTS = jnp.array([[2.4, 0.0], [1.2, 1.0], [-1.8, 0.5], [0.5, -2.2]])
NOISE = 0.02  # of the standard deviation of each channel
NEW = jnp.array([-2.6, 0.3])


def pendulum(t, y, p):
    return jnp.stack([y[1], -(p["w"] ** 2) * jnp.sin(y[0])])


def friction(known, network, t, y, p, args):
    """The network sees the velocity, and pushes it."""
    return known(t, y, p) + jnp.array([0.0, 1.0], y.dtype) * network(t, y, args)


def hybrid(network, w):
    return nde.HybridODE(pendulum, network, {"w": w}, combine=friction)


class OfVelocity(eqx.Module):
    """F(v), of a network."""

    network: nde.fields.MLPField

    def __call__(self, t, y, args):
        return self.network(t, y[1:])


def truth():
    return hybrid(lambda t, y, args: -0.3 * y[1:] * jnp.abs(y[1:]), Positive(1.5))


def measurements(seed):
    """Noisy swings, shape (swings, times, 2); each starts where it was set free, which is known."""
    ys = jax.vmap(truth(), in_axes=(None, 0))(TS, STARTS)
    noise = NOISE * np.random.default_rng(seed).normal(size=ys.shape) * np.std(ys, axis=(0, 1))
    return ys + jnp.where(TS > 0, 1.0, 0.0)[None, :, None] * noise


def train(model, ys, steps, rate, seed):
    """On a beginning of the swings that grows to all of them."""
    horizon = optax.linear_schedule(0.15, 1.0, steps // 2)
    return nde.fit(
        model,
        functools.partial(nde.losses.trajectory, horizon=horizon),
        (jnp.tile(TS, (len(ys), 1)), ys),
        optim=optax.adam(optax.cosine_decay_schedule(rate, steps)),
        steps=steps,
        progress=False,
        key=jax.random.key(seed),
    )[0]


def law(model, v):
    """F of a model."""
    return np.asarray(jax.vmap(lambda v: model.network(0.0, jnp.stack([0 * v, v]), None)[0])(v))


def formula(model, ys):
    """Laws for what the network has learned, chosen and fitted through the solve."""
    states = jax.vmap(model, (None, 0))(TS, STARTS).reshape(-1, 2)
    by = {"by": nde.symbolic.sparse, "variables": NAMES, "library": LIBRARY}
    fronts = nde.symbolic.distill(model, states, **by)
    make = lambda field: hybrid(field, model.parameters["w"])
    return nde.symbolic.refine(fronts, make, TS, STARTS, ys, candidates=6)


def picture(v, laws, swings, ys):
    import matplotlib.pyplot as plt

    fig, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    colors = {"truth": "black", "network": "#228833", "formula": "#4477AA", "neural ODE": "#EE7733"}
    for name, values in laws.items():
        left.plot(v, values, color=colors[name], label=name, lw=4 if name == "truth" else 1.8)
    left.lines[0].set_alpha(0.3)
    left.set(xlabel="velocity", ylabel="friction F", title="the law")
    ts = np.linspace(0.0, 24.0, len(swings["truth"]))
    for name, swing in swings.items():
        width = 4 if name == "truth" else 1.5
        right.plot(ts, swing[:, 0], color=colors[name], label=name, lw=width)
    right.set(xlabel="t", ylabel="angle", title="an unseen swing, three times as long")
    right.set_ylim(-4, 4)
    right.legend(frameon=False)
    nde.plot.save(fig, "pendulum_friction.png")


def main(steps: int = 600, plot: bool = True, *, seed: int = 0) -> dict:
    """The error of the law, the formula, and the errors on a swing that was not seen."""
    ys = measurements(seed)
    keys = jax.random.split(jax.random.key(seed))
    network = nde.fields.MLPField(1, 16, 2, scale=3.0, last_layer_scale=0.1, key=keys[0])
    model = train(hybrid(OfVelocity(network), Positive(1.0)), ys, steps, 2e-2, seed)
    free = nde.NeuralODE(nde.fields.MLPField(2, 32, 2, scale=4.0, key=keys[1]))
    free = train(free, ys, steps, 1e-2, seed)
    found = formula(model, ys)
    v = jnp.linspace(np.min(ys[..., 1]), np.max(ys[..., 1]), 101)
    models = {"truth": truth(), "network": model, "formula": found.model()}
    laws = {name: law(m, v) for name, m in models.items()}
    ts = jnp.linspace(0.0, 24.0, 193)
    swings = {name: np.asarray(m(ts, NEW)) for name, m in (models | {"neural ODE": free}).items()}
    distance = lambda a, b: float(np.linalg.norm(a - b) / np.linalg.norm(b))
    errors = {name: distance(laws[name], laws["truth"]) for name in ("network", "formula")}
    unseen = {name: distance(swings[name], swings["truth"]) for name in swings if name != "truth"}
    print(found.table())
    print(f"w = {float(model.physical_parameters()['w']):.3f} (1.5)")
    for name, error in unseen.items():
        known = f"law within {errors[name]:.1%}, " if name in errors else ""
        print(f"{name:<11} {known}unseen swing within {error:.1%}")
    if plot:
        picture(v, laws, swings, ys)
    if steps >= 500:  # fewer are a trial of the program
        assert errors["network"] < 0.05 and errors["formula"] < 0.05
        assert unseen["network"] < unseen["neural ODE"] / 3
        assert "abs(v)" in str(found.choose()), "the law is a drag"
    return {"law": errors, "unseen": unseen, "formula": str(found.choose())}


# *What to take away*: what is known need not be learned, and what is learned can be read.

if __name__ == "__main__":
    main()
