"""The reversible solvers as solvers: order, round trips, cost, diffrax's interface."""

import functools

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import PROBLEMS, reference, terms
from reversibles import RK4, there_and_back
from sweeps import sweep

from nde.solvers.reversible.ees import EES25, EES27
from nde.solvers.reversible.leapfrog import AsynchronousLeapfrog
from nde.solvers.reversible.mccallum_foster import Reversible
from nde.solvers.reversible.reversible_heun import ReversibleHeun
from nde.solvers.reversible.symplectic import StormerVerlet, Yoshida4

REVERSIBLE = {
    "ReversibleHeun": ReversibleHeun(),
    "ALF": AsynchronousLeapfrog(),
    "Reversible(Midpoint)": Reversible(diffrax.Midpoint()),
    "Reversible(Bosh3)": Reversible(diffrax.Bosh3()),
    "Reversible(RK4)": Reversible(RK4()),
    "Reversible(Tsit5)": Reversible(diffrax.Tsit5()),
    "EES25": EES25(),
    "EES27": EES27(),
}
SYMPLECTIC = {"StormerVerlet": StormerVerlet(), "Yoshida4": Yoshida4()}
EVERY = REVERSIBLE | SYMPLECTIC


# --- order ---------------------------------------------------------------------------------------


# At nodes of every grid, and scattered over the steps.
NODES = np.arange(1, 5) / 4
SCATTERED = np.random.default_rng(0).uniform(0.02, 1, 30)


@functools.cache
def output(name: str, backward: bool):
    """(output times, the exact solution there), in the direction of the solve."""
    problem = PROBLEMS[name]
    parts = np.sort(np.concatenate([[0.0], NODES, SCATTERED]))
    ts = jnp.asarray(problem.t1 * (1 - parts if backward else parts))
    return ts, reference(problem, ts)


def errors(solver, name: str, counts, backward: bool):
    """Root mean square errors at the nodes and between them, for each number of steps."""
    problem = PROBLEMS[name]
    ts, exact = output(name, backward)
    at_node = jnp.isin(jnp.sort(jnp.concatenate([NODES, SCATTERED])), NODES)

    @jax.jit
    def run(dt0):
        ys = diffrax.diffeqsolve(
            terms(problem),
            solver,
            ts[0],
            ts[-1],
            dt0,
            problem.y0,
            problem.params,
            saveat=diffrax.SaveAt(ts=ts[1:]),
        ).ys
        pairs = zip(jax.tree.leaves(ys), jax.tree.leaves(exact), strict=True)
        square = sum(jnp.mean((y - e[1:]) ** 2, axis=range(1, y.ndim)) for y, e in pairs)
        return [jnp.sqrt(jnp.mean(square, where=here)) for here in (at_node, ~at_node)]

    return np.array([run((ts[-1] - ts[0]) / float(n)) for n in counts]).T


def slope(counts, errors):
    return -np.polyfit(np.log(counts), np.log(errors), 1)[0]


# The numbers of steps start where the damping has had time to act, and end above rounding.
ORDERS = {
    "ReversibleHeun": (ReversibleHeun(), "forced", 80),
    "ALF": (AsynchronousLeapfrog(), "forced", 80),
    "Reversible(Midpoint)": (Reversible(diffrax.Midpoint()), "forced", 80),
    "Reversible(Bosh3)": (Reversible(diffrax.Bosh3(), 0.5), "forced", 80),
    "Reversible(RK4)": (Reversible(RK4()), "forced", 40),
    "Reversible(Dopri5)": (Reversible(diffrax.Dopri5(), 0.5), "decay", 32),
    "EES25": (EES25(), "forced", 40),
    "EES27": (EES27(), "forced", 40),
    "StormerVerlet": (StormerVerlet(), "kepler", 80),
    "Yoshida4": (Yoshida4(), "kepler", 40),
}


# The others share their code with one of these.
QUICK = ("ReversibleHeun", "ALF", "Reversible(RK4)", "EES27", "Yoshida4")


@pytest.mark.parametrize("name", sweep(ORDERS, *QUICK))
def test_order(name):
    """The stated order, in both directions of time, at the steps and between them."""
    solver, problem, first = ORDERS[name]
    order = solver.order(terms(PROBLEMS[problem]))
    counts = first * np.array([1, 2, 4, 6 if order == 5 else 8])
    for backward in (False, True):
        at_nodes, scattered = errors(solver, problem, counts, backward)
        assert abs(slope(counts, at_nodes) - order) < 0.15, f"backward={backward}"
        assert abs(slope(counts, scattered) - order) < 0.15, f"backward={backward}"


def test_order_of_the_reversible_tsit5():
    """At least five: its fifth-order error is so small that the sixth dominates until rounding."""
    counts = np.array([16, 32, 64, 128])
    solver = Reversible(diffrax.Tsit5())
    for measured in errors(solver, "forced", counts, backward=False):
        assert slope(counts, measured) > 4.85


def test_orders_reported_for_stochastic_equations():
    path = diffrax.UnsafeBrownianPath((), jax.random.key(0))
    term = diffrax.ControlTerm(lambda t, y, args: y, path)
    for solver in (ReversibleHeun(), Reversible(diffrax.Heun()), EES25(), EES27()):
        assert solver.strong_order(term) == 0.5
        assert solver.error_order(term) == 1.0
    ode = diffrax.ODETerm(lambda t, y, args: y)
    assert AsynchronousLeapfrog().error_order(ode) == 2
    assert Reversible(diffrax.Tsit5()).error_order(ode) == 5


# --- there and back ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EVERY)
def test_a_thousand_steps_can_be_undone(name):
    solver = EVERY[name]
    problem = PROBLEMS["driven pendulum" if name in SYMPLECTIC else "network"]
    if name.startswith("Reversible("):
        # Damping is paid for on the way back, so what is undamped is undone exactly.
        solver = Reversible(solver.base, 0.999)
    _, back = there_and_back(solver, problem, 1000)
    differences = jax.tree.map(lambda x, y: jnp.max(jnp.abs(x - y)), back, problem.y0)
    assert max(jax.tree.leaves(differences)) < 1e-12


def test_the_state_comes_back_across_a_jump():
    """After a jump the carried value is the caller's to refresh, on the side it came from."""
    solver = ReversibleHeun()
    term = diffrax.ODETerm(lambda t, y, args: jnp.where(t < 0.5, -y, 1.0 + y**2))
    before = jnp.nextafter(jnp.array(0.5), jnp.array(0.0))
    y0 = jnp.array([0.3, 0.4])
    state0 = solver.init(term, 0.4, before, y0, None)
    y1, _, _, state1, _ = solver.step(term, 0.4, before, y0, None, state0, False)
    y2, _, _, state2, _ = solver.step(term, 0.5, 0.6, y1, None, state1, jnp.array(True))
    y, state = solver.unstep(term, 0.5, 0.6, y2, state2, None, jnp.array(True))
    state = solver.refresh(term, before, y, state, None)
    np.testing.assert_allclose(y, y1, rtol=1e-15)
    np.testing.assert_allclose(state.carried, state1.carried, rtol=1e-15)
    y, state = solver.unstep(term, 0.4, before, y, state, None, False)
    np.testing.assert_allclose(y, y0, rtol=1e-15)
    np.testing.assert_allclose(state.carried, state0.carried, rtol=1e-15)


# --- cost ----------------------------------------------------------------------------------------


def evaluations_compiled(fn, *args) -> int:
    """Evaluations left after dead code is gone: the field sorts, and nothing else does."""
    return jax.jit(fn).lower(*args).compile().as_text().count(" sort(")


EVALUATIONS = {
    "ReversibleHeun": (1, 1),
    "ALF": (1, 1),
    "Reversible(Midpoint)": (4, 4),
    "Reversible(Bosh3)": (6, 6),
    "Reversible(RK4)": (8, 8),
    "Reversible(Tsit5)": (12, 12),
    "EES25": (3, 3),
    "EES27": (4, 4),
    "StormerVerlet": (2, 2),  # one of each field
    "Yoshida4": (6, 6),
}


@pytest.mark.parametrize("name", EVALUATIONS)
def test_evaluations_per_step(name):
    solver = EVERY[name]
    its_terms = diffrax.ODETerm(lambda t, y, args: jnp.sin(t) - jnp.sort(y))
    y0 = jnp.linspace(1.0, 2.0, 4)
    fields = 1
    if name in SYMPLECTIC:
        its_terms, y0, fields = (its_terms, its_terms), (y0, y0 + 0.1), 2
    state = solver.init(its_terms, 0.0, 0.1, y0, None)

    def forward(t0, t1, y, state):
        y1, _, _, state1, _ = solver.step(its_terms, t0, t1, y, None, state, False)
        return y1, state1

    def backward(t0, t1, y, state):
        return solver.unstep(its_terms, t0, t1, y, state, None, False)

    there = evaluations_compiled(forward, 0.0, 0.1, y0, state)
    back = evaluations_compiled(backward, 0.0, 0.1, y0, state)
    assert (there, back) == EVALUATIONS[name]
    assert there == fields * solver.declared.evaluations


# --- diffrax's interface -------------------------------------------------------------------------


ADAPTIVE = {k: v for k, v in REVERSIBLE.items() if k not in ("Reversible(RK4)")}


@pytest.mark.parametrize("name", ADAPTIVE)
def test_adaptive_steps_meet_the_tolerance(name):
    problem = PROBLEMS["forced"]
    atol = rtol = 1e-5
    ts = jnp.linspace(0.0, problem.t1, 12)
    sol = diffrax.diffeqsolve(
        terms(problem),
        ADAPTIVE[name],
        0.0,
        problem.t1,
        None,
        problem.y0,
        problem.params,
        saveat=diffrax.SaveAt(ts=ts),
        stepsize_controller=diffrax.PIDController(rtol=rtol, atol=atol),
    )
    exact = reference(problem, ts)
    error = jnp.abs(sol.ys - exact) / (atol + rtol * jnp.abs(exact))
    assert jnp.max(error) < 5
    assert 5 < sol.stats["num_accepted_steps"] < 1500


def stochastic(key, y0=jnp.array([0.3, -0.5, 0.8])):
    brownian = diffrax.VirtualBrownianTree(0.0, 1.0, 1e-3, (2,), key)
    diffusion = lambda t, y, args: jnp.sin(y)[:, None] * jnp.array([[1.0, -0.4]])
    drift = diffrax.ODETerm(lambda t, y, args: -y + jnp.sin(t))
    return diffrax.MultiTerm(drift, diffrax.ControlTerm(diffusion, brownian)), y0


def test_reversible_heun_is_diffrax_s():
    """The same numbers, on an SDE with matrix noise, at the steps.

    Not across a jump: there diffrax evaluates the field at y, which cannot be undone; we at z.
    """
    its_terms, y0 = stochastic(jax.random.key(4))

    def solve(solver):
        saveat = diffrax.SaveAt(steps=True)
        return diffrax.diffeqsolve(
            its_terms, solver, 0.0, 1.0, 0.05, y0, saveat=saveat, max_steps=20
        ).ys

    np.testing.assert_allclose(solve(ReversibleHeun()), solve(diffrax.ReversibleHeun()), rtol=1e-12)


@pytest.mark.parametrize(
    "solver",
    [
        pytest.param(ReversibleHeun(), id="ReversibleHeun"),
        pytest.param(
            Reversible(diffrax.Heun(), 0.99), id="Reversible(Heun)", marks=pytest.mark.slow
        ),
        pytest.param(EES25(), id="EES25"),
    ],
)
def test_stochastic_solves_converge_to_the_stratonovich_solution(solver):
    """dY = Y o dW has Y = exp(W); the Ito solution is exp(W - t/2)."""

    @jax.jit
    @jax.vmap
    def run(key):
        brownian = diffrax.VirtualBrownianTree(0.0, 1.0, 2**-9, (), key)
        term = diffrax.ControlTerm(lambda t, y, args: y, brownian)
        one = lambda n: diffrax.diffeqsolve(
            term, solver, 0.0, 1.0, 1.0 / n, jnp.array(1.0), max_steps=256
        ).ys[0]
        return jax.lax.map(one, jnp.array([16.0, 32.0, 64.0, 128.0])), brownian.evaluate(0.0, 1.0)

    ys, w = run(jax.random.split(jax.random.key(5), 200))
    strong = np.mean(np.abs(np.asarray(ys) - np.exp(np.asarray(w))[:, None]), axis=0)
    assert slope(np.array([16, 32, 64, 128]), strong) > 0.8  # one channel: strong order 1
    assert strong[-1] < 0.05
    assert np.mean(np.abs(ys[:, -1] - np.exp(w - 0.5))) > 0.3


@pytest.mark.parametrize(
    "name, adjoint, tolerance",
    [
        ("ReversibleHeun", diffrax.DirectAdjoint(), 1e-11),
        pytest.param("EES25", diffrax.BacksolveAdjoint(), 1e-3, marks=pytest.mark.slow),
    ],
)
def test_any_adjoint_of_diffrax_takes_them(name, adjoint, tolerance):
    problem = PROBLEMS["network"]

    def gradient(adjoint):
        def loss(params):
            sol = diffrax.diffeqsolve(
                terms(problem),
                REVERSIBLE[name],
                0.0,
                problem.t1,
                problem.t1 / 20,
                problem.y0,
                params,
                adjoint=adjoint,
                max_steps=32,
            )
            return jnp.sum(sol.ys["a"] ** 2)

        return jax.jit(jax.grad(loss))(problem.params)["W"]

    default = gradient(diffrax.RecursiveCheckpointAdjoint())
    np.testing.assert_allclose(gradient(adjoint), default, rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", ["ReversibleHeun", "ALF", "Reversible(Tsit5)", "EES27"])
def test_single_precision_stays_single(name):
    problem = PROBLEMS["network"]
    y0, params = jax.tree.map(lambda x: x.astype(jnp.float32), (problem.y0, problem.params))
    sol = diffrax.diffeqsolve(
        terms(problem),
        REVERSIBLE[name],
        0.0,
        1.0,
        0.05,
        y0,
        params,
        saveat=diffrax.SaveAt(ts=jnp.linspace(0.0, 1.0, 3, dtype=jnp.float32), solver_state=True),
    )
    for leaf in jax.tree.leaves((sol.ys, sol.solver_state)):
        assert leaf.dtype == jnp.float32
    exact = reference(problem, jnp.linspace(0.0, 1.0, 3))
    np.testing.assert_allclose(sol.ys["a"], exact["a"], atol=2e-3)


@pytest.mark.parametrize("base", [diffrax.Kvaerno5(), diffrax.Euler(), diffrax.KenCarp3()])
def test_a_base_that_is_not_explicit_is_refused(base):
    with pytest.raises(TypeError, match=r"`base` is \w+, .* Use Reversible\(diffrax.Tsit5\(\)\)"):
        Reversible(base)


@pytest.mark.parametrize("coupling", [0.0, -0.5, 1.5])
def test_a_coupling_outside_its_range_is_refused(coupling):
    with pytest.raises(ValueError, match=r"`coupling` is .*, needed: 0 < coupling <= 1"):
        Reversible(diffrax.Tsit5(), coupling=coupling)
