"""# Kepler's orbits: how long does a learned energy last?

    q'' = -q / |q|^3,        H(q, p) = |p|^2 / 2 - 1 / |q|

Short arcs of many orbits (eccentricity up to 0.3, unit semi-axis, a period of 2 pi) train three models:
a **plain** neural ODE of the four coordinates; a **Hamiltonian** one, any network H(q, p), whose flow
keeps it; a **separable** one, |p|^2 / 2 + V(|q|) with a network V, in symplectic steps (`Yoshida4`).

Each then follows an orbit it has not seen for 8 periods, and the *true* energy is read off. Solver
errors are below 1e-6, so what is compared is the models. A learned H that is kept stays as near to the
true one as the networks are; the energy of the plain model walks away.

*Gotcha: of V(q), without the symmetry, the angular momentum is not kept. Orbits then widen until they
leave what the network has seen, and no energy holds them there.*

Reference: Hamiltonian neural networks (2019) | arXiv:1906.01563
"""

import dataclasses

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

import nde
from nde.mechanics import Quadratic, Separable
from nde.solvers import Yoshida4

jax.config.update("jax_enable_x64", True)

PERIODS, STEPS = 8, 100  # of a forecast; its times in a period
ARC = jnp.linspace(0.0, 0.6, 7)
TIMES = 2 * np.pi * jnp.arange(PERIODS * STEPS + 1) / STEPS
TIGHT = diffrax.PIDController(rtol=1e-9, atol=1e-9)
COLORS = {"plain": "#EE7733", "Hamiltonian": "#4477AA", "separable": "#228833"}


def energy(q, p):
    """The true one."""
    return jnp.sum(p**2, -1) / 2 - 1 / jnp.linalg.norm(q, axis=-1)


def truth():
    potential = lambda t, q, args: -1 / jnp.linalg.norm(q)
    return nde.HamiltonianODE(Separable(Quadratic(), potential), stepsize_controller=TIGHT)


def orbits(count, seed, most=0.3):
    """Positions and momenta at a random place of random orbits; shapes (count, 2)."""
    rng = np.random.default_rng(seed)
    e, turn, phase = rng.uniform(0, most, count), *rng.uniform(0, 2 * np.pi, (2, count))
    turn, phase = np.exp(1j * turn), np.exp(1j * phase)
    q = turn * phase * (1 - e**2) / (1 + e * phase.real)
    p = 1j * turn * (e + phase) / np.sqrt(1 - e**2)
    return tuple(jnp.asarray(np.stack([z.real, z.imag], axis=1)) for z in (q, p))


class OfBoth(eqx.Module):
    network: nde.fields.ScalarField

    def __call__(self, t, q, p, args):
        return self.network(t, jnp.concatenate([q, p]), args)


class OfDistance(eqx.Module):
    network: nde.fields.ScalarField

    def __call__(self, t, q, args):
        return self.network(t, jnp.linalg.norm(q)[None], args)


class OfPair(eqx.Module):
    network: nde.fields.MLPField

    def __call__(self, t, y, args):
        return tuple(jnp.split(self.network(t, jnp.concatenate(y), args), 2))


def models(key):
    """The three of them, with steps for short arcs."""
    keys = jax.random.split(key, 3)
    plain = OfPair(nde.fields.MLPField(4, 48, 2, scale=3.0, key=keys[0]))
    energy = OfBoth(nde.fields.ScalarField(4, 48, 2, key=keys[1]))
    parts = Separable(Quadratic(), OfDistance(nde.fields.ScalarField(1, 48, 2, key=keys[2])))
    arcs = {"stepsize_controller": diffrax.ConstantStepSize(), "dt0": 0.1}
    return {
        "plain": nde.NeuralODE(plain, **arcs),
        "Hamiltonian": nde.HamiltonianODE(energy, **arcs),
        "separable": nde.HamiltonianODE(parts, solver=Yoshida4(), **arcs),
    }


def loss(model, batch, key):
    """Mean squared error of arcs that start where they were seen to start."""
    ts, ys = batch.data
    solve = lambda ts, q, p: model.solve(ts, (q[0], p[0]), throw=False).ys
    return nde.losses.mse(jnp.stack(jax.vmap(solve)(ts, *ys)), jnp.stack(ys)), {}


def train(model, data, steps, seed):
    options = {"optim": optax.adam(optax.cosine_decay_schedule(5e-3, steps)), "progress": False}
    key = jax.random.key(seed)
    return nde.fit(model, loss, data, steps=steps, batch_size=64, key=key, **options)[0]


def forecast(model, start):
    """The orbit from `start`, with solver errors below 1e-6, at `STEPS` times a period."""
    if isinstance(model.solver, Yoshida4):
        fine = {"stepsize_controller": diffrax.ConstantStepSize(), "dt0": 2 * np.pi / (4 * STEPS)}
    else:
        fine = {"stepsize_controller": TIGHT, "dt0": None, "solver": diffrax.Dopri8()}
    fine = dataclasses.replace(model, max_steps=2**16, **fine)
    return [np.asarray(x) for x in fine.solve(TIMES, start, throw=False).ys]


def drift(orbit):
    """The largest error of the true energy, period by period, as a share of the energy at the start."""
    e = energy(*orbit)
    errors = np.nan_to_num(np.abs(e / e[0] - 1)[1:], nan=np.inf)
    return np.maximum.accumulate(errors.reshape(PERIODS, STEPS).max(axis=1))


def picture(orbits, drifts):
    import matplotlib.pyplot as plt

    fig, axes = plt.subplots(1, 4, figsize=(13, 3.4), layout="constrained")
    truth = orbits.pop("truth")[0][:STEPS]
    for ax, (name, (q, _)) in zip(axes[:3], orbits.items(), strict=True):
        ax.plot(*q.T, color=COLORS[name], lw=0.6)
        ax.plot(*truth.T, "k--", lw=1)
        ax.set(title=name, aspect="equal", xlim=(-1.6, 1.6), ylim=(-1.6, 1.6))
        axes[3].semilogy(1 + np.arange(PERIODS), drifts[name], color=COLORS[name])
    axes[3].set(xlabel="periods", title="error of the true energy")
    nde.plot.save(fig, "kepler.png")


def main(steps: int = 2000, plot: bool = True, *, seed: int = 0) -> dict:
    """The drift of the true energy over 8 periods of unseen orbits, by model."""
    true = truth()
    data = jnp.tile(ARC, (512, 1)), jax.vmap(true, (None, 0))(ARC, orbits(512, seed))
    unseen = [tuple(x[i] for x in orbits(3, seed + 1, 0.1)) for i in range(3)]
    found, drifts = {}, {}
    for name, model in models(jax.random.key(seed)).items():
        model = train(model, data, steps, seed)
        found[name] = [forecast(model, start) for start in unseen]
        drifts[name] = np.median([drift(orbit) for orbit in found[name]], axis=0)
        first, *_, last = drifts[name]
        print(f"{name:<12} energy off by {first:.1e} after one period, {last:.1e} after {PERIODS}")
    found["truth"] = [forecast(true, unseen[0])]
    last = {name: float(values[-1]) for name, values in drifts.items()}
    if plot:
        picture({name: orbit[0] for name, orbit in found.items()}, drifts)
    if steps >= 2000:  # fewer are a trial of the program
        assert drift(found["truth"][0])[-1] < 1e-6, "compared are models, not solvers"
        assert last["plain"] > 30 * last["separable"] and last["plain"] > 30 * last["Hamiltonian"]
    return last


# *What to take away*: a structure that is true of nature need not be learned, and then it is kept.

if __name__ == "__main__":
    main()
