"""A model whose solve fails says why: outside of a transformation, with every number."""

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import nde
from nde import _solve
from nde.solvers import SolveError
from nde.train import NonFiniteError

TS, Y0 = jnp.linspace(0.0, 1.0, 5), jnp.array([1.0, 2.0])
LONG = 1e4 * TS
FIELDS = [
    lambda t, y: -y,
    lambda t, y: -y * jnp.where(t > 0.5, jnp.array([1.0, jnp.nan]), 1.0),
    lambda t, y: y**2,
    lambda t, y: -1e6 * (y - jnp.cos(t)),
    lambda t, y: jnp.stack([y[1], -y[0]]),
]


def field(t, y, kind):
    return jax.lax.switch(kind, FIELDS, t, y)


HEALTHY, UNDEFINED, ESCAPES, STIFF, OSCILLATES = map(jnp.asarray, range(5))
ADAPTIVE = nde.NeuralODE(field)
CONSTANT = nde.NeuralODE(field, stepsize_controller=dfx.ConstantStepSize(), dt0=0.01)

# (row of the table of bad inputs, model, times, kind, cause, message)
ROWS = [
    (28, ADAPTIVE, TS, UNDEFINED, "vector_field", r"`vector_field\(t, y, args\)\[1\]` is nan at t=0.5"),
    (29, CONSTANT, TS, UNDEFINED, "vector_field", r"`vector_field\(t, y, args\)\[1\]` is nan at t=0.5"),
    (30, ADAPTIVE, TS, ESCAPES, "blow_up", r"stopped at t=0.50.*`y\[1\]` grows without bound: it is .*e\+"),
    (30, CONSTANT, TS, ESCAPES, "blow_up", r"stopped at t=0.5.*`y\[1\]` grows without bound: it is .*e\+"),
    (31, ADAPTIVE, TS, STIFF, "stiff", r"stiff \(fastest mode ≈ -1e\+06.*max_steps≈\d+.*Kvaerno5\(\)"),
    (31, CONSTANT, TS, STIFF, "stiff", r"stiff, and unstable .*-1e\+06.*below 3.5e-06.*Kvaerno5\(\)"),
    (32, ADAPTIVE, LONG, OSCILLATES, "too_few_steps", r"t=\d+.* of 10000 after 4096 steps.*max_steps≈\d+"),
    (32, CONSTANT, LONG, OSCILLATES, "too_few_steps", r"t=40.96 of 10000 after 4096.*max_steps≈1000000"),
]  # fmt: skip


@pytest.mark.parametrize("row, model, ts, kind, cause, message", ROWS)
def test_a_failed_solve_says_why(row, model, ts, kind, cause, message):
    with pytest.raises(SolveError, match=message) as raised:
        model(ts, Y0, kind)
    error = raised.value
    assert error.cause == cause and error.steps > 0 and 0 < error.t <= ts[-1]
    assert (error.leaf == "y[1]") == (cause in ("vector_field", "blow_up"))
    assert error.advice and str(error).endswith(error.advice)


@pytest.mark.parametrize("kind", [HEALTHY, UNDEFINED])
def test_a_solve_that_does_not_raise_is_not_looked_at(kind, monkeypatch):
    """Neither one that succeeds, nor one that is asked not to raise."""
    monkeypatch.setattr(_solve, "diagnose", None)
    sol = ADAPTIVE.solve(TS, Y0, kind, throw=False)
    assert (sol.result == dfx.RESULTS.successful) == (kind == HEALTHY)
    if kind == HEALTHY:
        np.testing.assert_array_equal(ADAPTIVE(TS, Y0, kind), sol.ys)


def test_success_costs_no_second_solve_and_no_second_compilation():
    traces, solves = [], []

    def counted(t, y, args):
        traces.append(t)
        jax.debug.callback(lambda _: solves.append(1), y[0])
        return -y

    model = nde.NeuralODE(counted, stepsize_controller=dfx.ConstantStepSize(), dt0=0.25)
    raw = lambda throw: dfx.diffeqsolve(
        dfx.ODETerm(counted), dfx.Tsit5(), TS[0], TS[-1], 0.25, Y0,
        saveat=dfx.SaveAt(ts=TS), adjoint=model.adjoint, throw=throw,
    )  # fmt: skip
    counts = []
    for call in (lambda: raw(True), lambda: model(TS, Y0), lambda: model(TS, Y0)):
        traces.clear(), solves.clear()
        jax.block_until_ready(call())
        jax.effects_barrier()
        counts.append((len(traces), len(solves)))
    # The model looks once at the shape that the field returns.
    assert counts[1] == (counts[0][0] + 1, counts[0][1])
    assert counts[2] == (1, counts[0][1])


TRANSFORMS = {
    "jit": eqx.filter_jit,
    "vmap": lambda f: lambda ts, y, kind: jax.vmap(f, (None, 0, None))(ts, y[None], kind),
    "grad": lambda f: lambda ts, y, kind: jax.grad(lambda y: jnp.sum(f(ts, y, kind)))(y),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_inside_a_transformation_the_error_is_that_of_diffrax(name):
    call = TRANSFORMS[name](ADAPTIVE)
    with pytest.raises(RuntimeError, match="maximum number of solver steps was reached") as raised:
        call(TS, Y0, UNDEFINED)
    assert not isinstance(raised.value, SolveError)
    assert np.all(np.isfinite(call(TS, Y0, HEALTHY)))


@pytest.mark.parametrize("transform", [eqx.filter_jit, jax.grad])
def test_a_field_may_close_over_what_is_traced(transform):
    def loss(rate):
        model = nde.NeuralODE(lambda t, y, args: jnp.log(rate) * y, max_steps=64)
        return jnp.sum(model(TS, Y0))

    assert np.all(np.isfinite(transform(loss)(jnp.array(0.5))))
    with pytest.raises(RuntimeError, match="maximum number of solver steps was reached"):
        transform(loss)(jnp.array(-1.0))


def test_a_path_drives_a_state_away():
    control = nde.paths.linear(TS, jnp.linspace(0.0, 3.0, 5)[:, None])
    square = lambda t, z, args: jnp.stack([z * 0, 40.0 * z**2], axis=1)
    model = nde.NeuralCDE(square, lambda x: jnp.ones(2))
    with pytest.raises(SolveError, match="`y.0.` grows without bound") as raised:
        model(control)
    assert raised.value.cause == "blow_up"


def test_another_adjoint_may_fail_where_ours_does_not():
    """y' = e^y (5 - y) is smooth; a trial step that overflows stops the loop of diffrax."""
    adjoint = dfx.RecursiveCheckpointAdjoint()
    steep = lambda t, y, args: jnp.exp(y) * (5 - y)
    model = nde.NeuralODE(steep, adjoint=adjoint, dt0=100.0)
    with pytest.raises(SolveError, match="adjoint=nde.solvers.DiscreteAdjoint") as raised:
        model(10 * TS, jnp.zeros(1))
    assert raised.value.cause == "unknown"


@pytest.mark.parametrize(
    "adjoint", [nde.solvers.DiscreteAdjoint(), dfx.RecursiveCheckpointAdjoint()]
)
def test_one_failed_solve_of_a_batch(adjoint):
    """Too few to stop for. With an adjoint of diffrax its nan reaches the gradient: that is said."""
    decay = lambda t, y, p: -p * jnp.log(y)
    model = nde.HybridODE(decay, None, 0.7, adjoint=adjoint, max_steps=64)
    y0s = jnp.linspace(0.5, 2.0, 12).at[4].set(-1.0)
    data = (jnp.tile(TS, (12, 1)), jnp.tile(y0s[:, None, None], (1, 5, 1)))
    train = lambda: nde.fit(
        model, nde.losses.trajectory, data, optim=optax.adam(1e-2), steps=3, max_skips=2,
        progress=False, key=jax.random.key(0),
    )  # fmt: skip
    if isinstance(adjoint, nde.solvers.DiscreteAdjoint):
        _, history = train()
        assert not history["skipped"].any() and np.allclose(history["failed"], 1 / 12)
        return
    with pytest.raises(NonFiniteError, match=r"where 8% of the solves failed .*DiscreteAdjoint"):
        train()
