"""The backward pass that takes many steps at once, against the one that goes step by step."""

import functools as ft

import diffrax as dfx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import CONSTANT, PARAMS, Y0, field, relative, weigh
from sweeps import sweep

from nde.solvers import DiscreteAdjoint, Estimates
from nde.solvers.adjoint import parallel

PID = dfx.PIDController(rtol=1e-5, atol=1e-7)
JUMPS = dfx.ClipStepSizeController(PID, jump_ts=np.array([0.33, 0.77]))
NOISE = dfx.VirtualBrownianTree(0.0, 1.5, 2**-6, (), jax.random.key(0))
EVERY = dfx.SaveAt(ts=np.array([0.1, 0.2, 0.4]), steps=2, t1=True)
END = dfx.SaveAt(t1=True)
ESTIMATES = Estimates()
CASES = {
    "constant, 37 steps": (dfx.Heun(), CONSTANT, 1.5 / 37, EVERY, None),
    "adaptive, with the last stage": (dfx.Tsit5(), PID, 0.05, EVERY, ESTIMATES),
    "adaptive, end": (dfx.Tsit5(), PID, 0.05, END, None),
    "jumps": (dfx.Bosh3(), JUMPS, 0.05, EVERY, None),
    "noise": (dfx.Heun(), CONSTANT, 1.5 / 20, EVERY, None),
    "state of a solver": (dfx.ReversibleHeun(), CONSTANT, 1.5 / 20, EVERY, None),
}
QUICK = ("constant, 37 steps", "adaptive, with the last stage")


def gradient(case, checkpoints, at_once):
    """Of two lanes that end at other times, one of which fails."""
    solver, controller, dt0, saveat, estimates = CASES[case]
    adjoint = DiscreteAdjoint(checkpoints, estimates, at_once)
    terms = dfx.ODETerm(field)
    if case == "noise":
        terms = dfx.MultiTerm(terms, dfx.ControlTerm(lambda t, y, a: 0.3 * jnp.cos(y), NOISE))

    def one(p, y, t1):
        sol = dfx.diffeqsolve(
            terms, solver, 0.0, t1, dt0, y, p, adjoint=adjoint, stepsize_controller=controller,
            saveat=saveat, max_steps=64, throw=False,
        )  # fmt: skip
        return weigh(sol.ys) + sol.stats.get("error_estimate", 0.0)

    @jax.jit
    def both(p, ys, t1):
        each = jax.vmap(jax.grad(one, argnums=(0, 1)), in_axes=(None, 0, 0))
        summed = lambda p, ys: jnp.sum(jax.vmap(one, in_axes=(None, 0, 0))(p, ys, t1))
        return jax.grad(summed, argnums=(0, 1))(p, ys), each(p, ys, t1)

    return both(PARAMS, jnp.stack([Y0, -Y0, Y0 * jnp.nan]), jnp.array([1.5, 0.4, 1.0]))


step_by_step = ft.cache(lambda case: gradient(case, 64, False))


@pytest.mark.parametrize("length, checkpoints", sweep([(8, 64), (4, 8), (16, 8)], (4, 8)))
@pytest.mark.parametrize("case", sweep(CASES, *QUICK))
def test_gradient_is_that_of_the_steps_one_by_one(case, length, checkpoints, monkeypatch):
    """Whatever the chunk: all rows kept, stretches within a chunk, and of many chunks."""
    monkeypatch.setattr(parallel, "CHUNK", length)
    got = gradient(case, checkpoints, True)
    # An estimate is a small difference of large numbers, and sees the rounding of a replay.
    assert relative(got, step_by_step(case)) < (1e-12 if CASES[case][-1] is None else 1e-11)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(got))


def loops(lanes, width):
    """Whether a solve takes its steps at once, by itself: only then is there a loop over d x d products."""
    w = jnp.eye(width) / 4

    def loss(w, ys):
        network = lambda t, y, w: (jnp.tanh(w @ jnp.tanh(w[:, :2] @ y)))[:2]
        solve = lambda y: dfx.diffeqsolve(
            dfx.ODETerm(network), dfx.Heun(), 0.0, 1.0, 0.25, y, w, adjoint=DiscreteAdjoint(),
            max_steps=16,
        ).ys  # fmt: skip
        return jnp.sum(jax.vmap(solve)(ys))

    text = jax.jit(jax.grad(loss)).lower(w, jnp.ones((lanes, 2))).as_text()
    return f"tensor<16x{lanes}x2x2xf64>" in text


def test_it_is_chosen_for_few_trajectories_of_a_small_field():
    assert loops(1, 2) and loops(2, 2)
    assert not loops(64, 2) and not loops(1, 128)
