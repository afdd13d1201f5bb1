"""`drift` and `split`: what may be trusted, what may not, and what restarts repair."""

import diffrax as dfx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import PROBLEMS, terms
from reversibles import RK4

from nde.solvers import (
    EES27,
    DiscreteAdjoint,
    Reversible,
    ReversibleAdjoint,
    ReversibleHeun,
    StormerVerlet,
)

TRUST = 1e-3
STRONG, WEAK = PROBLEMS["strong dissipation"], PROBLEMS["weak dissipation"]
PID = dfx.PIDController(rtol=1e-3, atol=1e-4)


def span(steps, dt, dtype):
    """(t0, t1, dt0)."""
    return jnp.zeros((), dtype), jnp.asarray(dt * steps, dtype), jnp.asarray(dt, dtype)


def gradient(solver, adjoint, problem=STRONG, dtype=jnp.float32, steps=500, dt=0.01):
    """(gradient to y0 and the parameters, stats) of y(T)."""
    cast = lambda tree: jax.tree.map(lambda x: x.astype(dtype), tree)

    @jax.jit
    def run(y0, params):
        def loss(y0, params):
            sol = dfx.diffeqsolve(
                terms(problem), solver, *span(steps, dt, dtype), y0, params, adjoint=adjoint,
                max_steps=steps + 2,
            )  # fmt: skip
            return jnp.sum(sol.ys), sol.stats

        return jax.grad(loss, argnums=(0, 1), has_aux=True)(y0, params)

    (ct_y, ct_p), stats = run(cast(problem.y0), cast(problem.params))
    return np.array([ct_y, ct_p["a"]], np.float64), stats


def error(got, want):
    """Entry by entry: the gradient to y0 is eight digits smaller than the one to the decay."""
    return np.max(np.abs(got - want) / np.abs(want))


def test_strong_dissipation_in_single_precision():
    """`numerics.md` 3.1: the reversal alone is lost and says so, the default gives the gradient."""
    want, _ = gradient(EES27(), DiscreteAdjoint(), dtype=jnp.float64)
    pure, stats = gradient(EES27(), ReversibleAdjoint(None, certify=True))
    assert stats["drift"] > 10 * TRUST  # how much more is a matter of a few roundings
    assert not error(pure, want) < 1e-4
    safe, stats = gradient(EES27(), ReversibleAdjoint(certify=True))
    assert stats["drift"] < TRUST and stats["split"] == 0.0
    assert error(safe, want) < 1e-4
    assert error(gradient(EES27(), ReversibleAdjoint())[0], want) < 1e-4


@pytest.mark.parametrize("every", [16, 64])
def test_restarts_keep_the_drift_small(every):
    """`numerics.md` 3.2."""
    for problem, steps in ((STRONG, 500), (WEAK, 2000)):
        for solver in (EES27(), Reversible(dfx.Bosh3(), 0.95)):
            adjoint = ReversibleAdjoint(every, certify=True)
            stats = solved(solver, adjoint, problem, steps=steps).stats
            assert stats["drift"] < 1e-4


def solved(solver, adjoint, problem, dtype=jnp.float32, steps=500, dt=0.01):
    cast = lambda tree: jax.tree.map(lambda x: x.astype(dtype), tree)
    run = jax.jit(
        lambda y0, params: dfx.diffeqsolve(
            terms(problem), solver, *span(steps, dt, dtype), y0, params, adjoint=adjoint,
            max_steps=steps + 2,
        )
    )  # fmt: skip
    return run(cast(problem.y0), cast(problem.params))


@pytest.mark.parametrize(
    "solver, decay, trusted",
    [
        (Reversible(RK4(), 0.99), 4.0, False),
        (Reversible(RK4(), 0.9), 4.0, True),
        (ReversibleHeun(), 1.0, False),
    ],
    ids=["lam=.99", "lam=.9", "ReversibleHeun"],
)
def test_split_sees_what_drift_does_not(solver, decay, trusted):
    """A forward map that has gone parasitic can be undone very well."""
    problem = STRONG._replace(params={"a": jnp.array(decay)})
    steps = 500 if decay == 4.0 else 3000
    stats = solved(solver, ReversibleAdjoint(certify=True), problem, steps=steps).stats
    assert stats["drift"] < TRUST
    assert (stats["split"] < TRUST) == trusted


def test_solvers_without_a_second_copy_have_no_split():
    problem = PROBLEMS["driven pendulum"]
    stats = solved(StormerVerlet(), ReversibleAdjoint(certify=True), problem, jnp.float64, 50).stats
    assert stats["split"] == 0.0 and stats["drift"] < 1e-12


def there_and_back(solver, problem, steps, dt, every):
    """Drift and split by their definitions, in single precision, from an ordinary loop."""
    its_terms, single = terms(problem), np.float32
    cast = lambda tree: jax.tree.map(lambda x: x.astype(single), tree)
    y0, params = cast(problem.y0), cast(problem.params)
    ts = np.cumsum(np.full(steps + 1, single(dt)), dtype=single) - single(dt)

    @jax.jit
    def run(y0, params):
        first = (y0, solver.init(its_terms, ts[0], ts[1], y0, params))

        def forward(carry, when):
            y, state = carry
            y, _, _, state, _ = solver.step(its_terms, *when, y, params, state, False)
            return (y, state), (y, state)

        def backward(carry, when):
            *when, after, restart = when
            carry = jax.tree.map(lambda a, b: jnp.where(restart, a, b), after, carry)
            carry = solver.unstep(its_terms, *when, *carry, params, False)
            return carry, carry

        _, states = jax.lax.scan(forward, first, (ts[:-1], ts[1:]))
        restarts = (np.arange(1, steps + 1) % every == 0) | (np.arange(steps) == steps - 1)
        _, back = jax.lax.scan(backward, first, (ts[:-1], ts[1:], states, restarts), reverse=True)
        states = jax.tree.map(lambda a, b: jnp.concatenate([a[None], b]), first, states)
        return states, back

    (ys, state), (back_ys, back_state) = run(y0, params)
    kept = np.arange(0, steps, every)
    rms = lambda a, b: np.abs(a - b) / (1 + np.abs(b))  # the states are scalars
    pairs = [(back_ys, ys)]
    if state.others is not None:
        pairs += zip(back_state.others, state.others, strict=True)
    drift = max(np.max(rms(np.asarray(b)[kept], np.asarray(a)[kept])) for b, a in pairs)
    if not solver.twins:
        return drift, 0.0
    kept = np.append(kept, steps)
    return drift, np.max(rms(np.asarray(state.others[0])[kept], np.asarray(ys)[kept]))


@pytest.mark.parametrize("every", [None, 64])
@pytest.mark.parametrize(
    "solver", [EES27(), Reversible(RK4(), 0.9), ReversibleHeun()], ids=["EES27", "lam=.9", "RH"]
)
def test_drift_and_split_are_what_they_say(solver, every):
    steps = 150
    stats = solved(solver, ReversibleAdjoint(every, certify=True), STRONG, steps=steps).stats
    drift, split = there_and_back(solver, STRONG, steps, 0.01, every or steps)
    floor = 2e-6  # a few roundings, which two compilations need not share
    assert drift / 10 - floor < stats["drift"] < 10 * drift + 2 * floor
    np.testing.assert_allclose(stats["split"], split, rtol=0.3, atol=1e-6)


def test_each_lane_has_its_own_certificate():
    """Lanes with different numbers of steps, against the same solves one by one."""
    adjoint = ReversibleAdjoint(8, certify=True)

    def one(decay, t1):
        sol = dfx.diffeqsolve(
            terms(STRONG), ReversibleHeun(), 0.0, t1, 0.01, jnp.array(1.0), {"a": decay},
            adjoint=adjoint, max_steps=512, stepsize_controller=PID,
        )  # fmt: skip
        return sol.stats["drift"], sol.stats["split"], sol.stats["num_accepted_steps"]

    decays, ends = jnp.array([0.2, 3.0]), jnp.array([0.5, 1.5])
    drift, split, steps = jax.jit(jax.vmap(one))(decays, ends)
    assert steps[0] != steps[1]
    for i in range(2):
        alone = jax.jit(one)(decays[i], ends[i])
        assert steps[i] == alone[2]
        np.testing.assert_allclose(split[i], alone[1], rtol=1e-3)
        assert drift[i] < 1e-12 and alone[0] < 1e-12
    assert split[1] > 3 * split[0]


def test_nothing_is_reported_unless_asked_for():
    stats = solved(EES27(), ReversibleAdjoint(), STRONG, steps=10).stats
    assert "drift" not in stats and "split" not in stats


def test_times_may_have_less_precision_than_the_state():
    single = jnp.float32

    def run(adjoint):
        return dfx.diffeqsolve(
            dfx.ODETerm(lambda t, y, args: -y), ReversibleHeun(), single(0), single(1), single(0.125),
            jnp.ones(2), adjoint=adjoint, max_steps=8,
        )  # fmt: skip

    sol = run(ReversibleAdjoint(certify=True))
    np.testing.assert_array_equal(sol.ys, run(ReversibleAdjoint()).ys)
    assert sol.stats["drift"] < 1e-12 and sol.stats["split"] > 0


def test_the_certificate_does_not_change_the_gradient():
    plain, _ = gradient(EES27(), ReversibleAdjoint(), steps=100)
    certified, _ = gradient(EES27(), ReversibleAdjoint(certify=True), steps=100)
    np.testing.assert_array_equal(plain, certified)


def test_an_empty_member_says_nothing():
    def certificate(y0):
        decay = lambda t, y, p: jax.tree.map(lambda x: -p * x, y)
        adjoint = ReversibleAdjoint(checkpoint_every=2, certify=True)
        options = dict(adjoint=adjoint, max_steps=8)
        return dfx.diffeqsolve(
            dfx.ODETerm(decay), ReversibleHeun(), 0.0, 1.0, 0.25, y0, 1.5, **options
        ).stats

    alone, beside = (certificate({"b": jnp.array(2.0)} | more) for more in ({}, {"a": jnp.ones(0)}))
    assert alone["drift"] == beside["drift"] < 1e-12
    assert alone["split"] == beside["split"] > 0.01
