"""A reversal that does not hold is replayed, and one that holds evaluates no point of its own making."""

import diffrax as dfx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracles import DIFFRAX

from nde.solvers import EES25, BrownianInterval, DiscreteAdjoint, ReversibleAdjoint, ReversibleHeun


@pytest.mark.parametrize("dtype, size", [(np.float32, 1e-6), (np.float64, 1e-14)])
@pytest.mark.parametrize("beside", [0.0, 1.0])
def test_small_states_are_replayed_like_large_ones(dtype, size, beside):
    """The same decay in other units, alone or beside an entry of order one that rests."""

    def gradient(adjoint):
        def final(rate):
            y0, decays = jnp.asarray([size, beside], dtype), jnp.asarray([1.0, 0.0], dtype)
            field = dfx.ODETerm(lambda t, y, rate: -rate * decays * y * (1 + (y / size) ** 2))
            sol = dfx.diffeqsolve(
                field, EES25(), 0.0, 16.0, 1.0, y0, rate, adjoint=adjoint, max_steps=16,
                saveat=dfx.SaveAt(ts=jnp.asarray([8.0, 16.0], dtype)),
            )  # fmt: skip
            return jnp.sum(sol.ys[:, 0] / size)

        return jax.jit(jax.grad(final))(jnp.asarray(1.0, dtype))

    exact = gradient(DiscreteAdjoint())
    np.testing.assert_allclose(gradient(ReversibleAdjoint()), exact, rtol=1e-5)


@pytest.mark.parametrize("every", [1, 4, None])
def test_a_lane_that_has_ended_is_not_evaluated_beside_its_trajectory(every):
    """At the start of its last step, the field is undefined for the state at its end."""

    def final(rate, end, adjoint):
        field = dfx.ODETerm(lambda t, y, rate: rate * jnp.sqrt(1 + t - y))
        return dfx.diffeqsolve(
            field, ReversibleHeun(), 0.0, end, 0.1, jnp.array(15 / 16), rate, adjoint=adjoint,
            max_steps=16,
        ).ys[0]  # fmt: skip

    def gradient(adjoint):
        ends = jnp.array([0.4, 1.0])
        return jax.grad(lambda a: jnp.sum(jax.vmap(lambda t: final(a, t, adjoint))(ends)))(4.0)

    exact = jax.jit(gradient, static_argnums=0)(DIFFRAX)
    found = jax.jit(gradient, static_argnums=0)(ReversibleAdjoint(every))
    np.testing.assert_allclose(found, exact, rtol=1e-10)


@pytest.mark.parametrize("every", [1, None])
def test_a_stretch_that_ends_behind_a_jump_is_not_evaluated_before_it(every):
    """There, the field is undefined for the state at the end."""

    def gradient(adjoint):
        def final(rate):
            behind = lambda t, y: rate * jnp.sqrt(jnp.where(t < 0.95, 1 - y, 1.0))
            field = dfx.ODETerm(lambda t, y, args: jnp.where(t < 0.9, 1.0, behind(t, y)))
            loose = dfx.PIDController(rtol=10.0, atol=10.0)
            return dfx.diffeqsolve(
                field, ReversibleHeun(), 0.0, 1.0, 0.05, jnp.array(0.0), adjoint=adjoint,
                stepsize_controller=dfx.ClipStepSizeController(loose, jump_ts=[0.9]), max_steps=16,
            ).ys[0]  # fmt: skip

        return jax.jit(jax.grad(final))(4.0)

    np.testing.assert_allclose(gradient(ReversibleAdjoint(every)), gradient(DIFFRAX), rtol=1e-10)


def test_a_stretch_is_no_longer_than_the_solve():
    def final(y, every):
        return dfx.diffeqsolve(
            dfx.ODETerm(lambda t, y, args: -y), EES25(), 0.0, 1.0, 0.1, y, max_steps=16,
            adjoint=ReversibleAdjoint(every),
        ).ys[0]  # fmt: skip

    def memory(every):
        compiled = jax.jit(jax.grad(lambda y: final(y, every))).lower(1.0).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert memory(10**7) == memory(16)


def test_steps_that_must_be_met_are_met_behind_two_wrappers():
    """On an interval that rounds the ends of steps."""
    path = BrownianInterval(0.0, 1.0, (), jax.random.key(0), tol=2.0**-12)
    terms = dfx.MultiTerm(
        dfx.ODETerm(lambda t, y, args: -y), dfx.ControlTerm(lambda t, y, args: 0.0 * y, path)
    )
    pid = dfx.PIDController(rtol=1e-2, atol=1e-2, dtmax=0.25)
    clipped = dfx.ClipStepSizeController(pid, step_ts=[1 / 3])
    steps = [
        dfx.diffeqsolve(
            terms, dfx.Heun(), 0.0, 1.0, 0.25, jnp.array(1.0), adjoint=adjoint,
            stepsize_controller=dfx.ClipStepSizeController(clipped, store_rejected_steps=8),
        ).stats["num_accepted_steps"]
        for adjoint in (DiscreteAdjoint(), DIFFRAX)
    ]  # fmt: skip
    assert steps[0] == steps[1]
