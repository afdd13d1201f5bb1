"""Rewinding gives the gradient that autodiff of the forward steps gives, to rounding.

The oracle is `jax.grad` through a plain scan of `solver.step`. The rewinding loop below is what an
adjoint does: all lanes at once, one `jax.vjp` of a vmapped function per evaluation.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Array, PyTree
from problems import PROBLEMS, terms
from sweeps import sweep

from nde.solvers import trees
from nde.solvers.reversible.coupling import Coupling, StepInput
from nde.solvers.reversible.ees import EES25, EES27
from nde.solvers.reversible.leapfrog import AsynchronousLeapfrog
from nde.solvers.reversible.mccallum_foster import Reversible
from nde.solvers.reversible.reversible_heun import ReversibleHeun
from nde.solvers.reversible.symplectic import StormerVerlet, Yoshida4

LANES = 2


class Grid(NamedTuple):
    """The steps of every lane: times of shape (steps, lanes), and the jump bits or False."""

    t0: Array
    t1: Array
    made_jump: Any = False

    def at(self, k):
        jump = self.made_jump if self.made_jump is False else self.made_jump[k]
        return Grid(self.t0[k], self.t1[k], jump)

    @property
    def steps(self):
        return len(self.t0)


def grid(steps: int, t1: float, vary: float = 0.3) -> Grid:
    """Steps that vary by up to 30 % and differ between lanes."""
    h = 1.0 + vary * jnp.sin(jnp.arange(steps)[:, None] + jnp.arange(LANES)[None, :])
    ts = jnp.concatenate([jnp.zeros((1, LANES)), jnp.cumsum(h, axis=0)])
    ts = t1 * ts / ts[-1:]
    return Grid(ts[:-1], ts[1:])


class Case(NamedTuple):
    """`build(params, lane) -> terms`: the parameters are shared, `lane` is one entry of `lanes`."""

    build: Callable[[PyTree, PyTree], PyTree[diffrax.AbstractTerm]]
    params: PyTree[Array]
    lanes: PyTree[Array]
    y0: PyTree[Array]


class LanePull(NamedTuple):
    """`coupling.Pullback` for all lanes at one step."""

    case: Case
    params: PyTree[Array]
    now: Grid
    following: Grid

    def _one(self, fn, params, lane, now, following, x):
        its_terms = self.case.build(params, lane)
        step = StepInput.over(its_terms, now.t0, now.t1, params, now.made_jump)
        after = StepInput.over(its_terms, following.t0, following.t1, params, following.made_jump)
        return fn(step, after, x)

    def _all(self, fn, params, x):
        def one(lane, times, after, jumps, x):
            now, following = Grid(*times, jumps[0]), Grid(*after, jumps[1])
            return self._one(fn, params, lane, now, following, x)

        jumps = (self.now.made_jump, self.following.made_jump)
        axes = (0, 0, 0, None if jumps[0] is False else 0, 0)
        if jumps[0] is False:  # stays static
            return jax.vmap(
                lambda lane, times, after, x: one(lane, times, after, jumps, x),
            )(self.case.lanes, self.now[:2], self.following[:2], x)
        return jax.vmap(one, axes)(self.case.lanes, self.now[:2], self.following[:2], jumps, x)

    def value(self, fn, x):
        return self._all(fn, self.params, x)

    def pull(self, fn, x, ct):
        value, transpose = jax.vjp(lambda p, x: self._all(fn, p, x), self.params, x)
        return (value, *transpose(ct))


def solve(solver, case: Case, steps: Grid, params, y0, jumps=True):
    """Every y, by `solver.step` alone, for one lane at a time."""

    def one(lane, t0s, t1s, made_jump, y0):
        its_terms = case.build(params, lane)
        state = solver.init(its_terms, t0s[0], t1s[0], y0, params)

        def body(carry, step):
            y, state = carry
            t0, t1, jump = step
            jump = False if steps.made_jump is False else jump
            y1, _, _, state, _ = solver.step(its_terms, t0, t1, y, params, state, jump)
            return (y1, state), y1

        (y1, state), out = jax.lax.scan(body, (y0, state), (t0s, t1s, made_jump))
        return (y1, state), out

    bits = jnp.zeros(steps.t0.shape, bool) if steps.made_jump is False else steps.made_jump
    return jax.vmap(one, (0, 1, 1, 1, 0))(case.lanes, steps.t0, steps.t1, bits, y0)


def loss(out):
    """A number from the states after every step, weighted unevenly."""
    return sum(jnp.mean(jnp.sin(x + 0.1 * i)) for i, x in enumerate(jax.tree.leaves(out)))


def rewound_gradient(solver, case: Case, steps: Grid):
    """The gradient of `loss`, and the y0 that came back, without any stored state."""
    (y1, state), out = solve(solver, case, steps, case.params, case.y0)
    ct_saved = jax.grad(loss)(out)  # (lanes, steps, ...)
    members = jax.vmap(solver.members)(y1, state.others)
    zeros = jax.tree.map(jnp.zeros_like, members)
    back = solver.start_rewind(members, zeros, (LANES,))
    ct_params = jax.tree.map(jnp.zeros_like, case.params)

    def saved(cts, k):
        y_bar, others = solver.split(cts)
        y_bar = jax.tree.map(lambda c, s: c + s[:, k], y_bar, ct_saved)
        return solver.members(y_bar, others)

    def body(i, carry):
        back, ct_params = carry
        k = steps.steps - 1 - i
        now, following = steps.at(k), steps.at(jnp.minimum(k + 1, steps.steps - 1))
        pull = LanePull(case, case.params, now, following)
        back, ct_p = solver.rewind(pull, back._replace(cts=saved(back.cts, k)))
        return back, trees.add(ct_params, ct_p)

    back, ct_params = jax.lax.fori_loop(0, steps.steps, body, (back, ct_params))
    first = LanePull(case, case.params, steps.at(0), steps.at(0))
    members, cts, ct_p = solver.finish_rewind(first, back)
    ct_params = trees.add(ct_params, ct_p)

    def start(params, y0):
        one = lambda lane, t, y: solver.initial_members(case.build(params, lane), t, y, params)
        return jax.vmap(one)(case.lanes, steps.t0[0], y0)

    _, transpose = jax.vjp(start, case.params, case.y0)
    ct_p, ct_y0 = transpose(cts)
    return trees.add(ct_params, ct_p), ct_y0, solver.split(members)[0]


def relative(a, b):
    """The largest difference between two pytrees, relative to the largest entry of each leaf."""
    scale = lambda y: jnp.max(jnp.abs(y)) + 1e-300
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return max(float(jnp.max(jnp.abs(x - y)) / scale(y)) for x, y in pairs)


def repeated(y0):
    return jax.tree.map(lambda x: jnp.stack([x, 0.7 * x]), y0)


def ode(name: str) -> Case:
    problem = PROBLEMS[name]
    build = lambda params, lane: terms(problem)
    return Case(build, problem.params, jnp.zeros(LANES), repeated(problem.y0))


def cde() -> Case:
    """A linear path with learned values: the control is differentiated too."""
    ts = jnp.linspace(0.0, 1.0, 6)
    keys = jax.random.split(jax.random.key(1), 3)

    def build(params, lane):
        path = diffrax.LinearInterpolation(ts, params["xs"] * lane)
        field = lambda t, y, p: jnp.tanh(p["A"] @ y).reshape(3, 2)
        return diffrax.ControlTerm(field, path)

    params = {
        "xs": jax.random.normal(keys[0], (6, 2)),
        "A": jax.random.normal(keys[1], (6, 3)),
    }
    return Case(build, params, jnp.array([1.0, 0.5]), repeated(jax.random.normal(keys[2], (3,))))


def sde() -> Case:
    """Drift and matrix noise; one Brownian path per lane."""
    keys = jax.random.split(jax.random.key(2), 3)

    def build(params, lane):
        brownian = diffrax.UnsafeBrownianPath((2,), lane)  # keyed by the bits of both times
        drift = lambda t, y, p: jnp.tanh(p["A"] @ y)
        diffusion = lambda t, y, p: 0.3 * jnp.sin(p["B"] @ y).reshape(3, 2)
        return diffrax.MultiTerm(diffrax.ODETerm(drift), diffrax.ControlTerm(diffusion, brownian))

    params = {
        "A": jax.random.normal(keys[0], (3, 3)),
        "B": jax.random.normal(keys[1], (6, 3)),
    }
    lanes = jax.random.split(jax.random.key(3), LANES)
    return Case(build, params, lanes, repeated(jax.random.normal(keys[2], (3,))))


def gradients(solver, case, steps):
    """(autodiff, rewound, the y0 that came back)."""

    def objective(params, y0):
        return loss(solve(solver, case, steps, params, y0)[1])

    expected = jax.jit(jax.grad(objective, argnums=(0, 1)))(case.params, case.y0)
    *found, start = jax.jit(lambda: rewound_gradient(solver, case, steps))()
    return expected, tuple(found), start


ODE_SOLVERS = {
    "ReversibleHeun": ReversibleHeun(),
    "ALF": AsynchronousLeapfrog(),
    "Reversible(Tsit5)": Reversible(diffrax.Tsit5(), coupling=0.999),
    "EES27": EES27(),
}


@pytest.mark.parametrize("name", sweep(ODE_SOLVERS, "ALF", "EES27"))
def test_gradient_of_1000_steps(name):
    steps = grid(1000, PROBLEMS["network"].t1)
    expected, found, start = gradients(ODE_SOLVERS[name], ode("network"), steps)
    assert relative(found, expected) < 1e-12
    assert relative(start, ode("network").y0) < 1e-12


@pytest.mark.parametrize("solver", [StormerVerlet(), Yoshida4()], ids=["Verlet", "Yoshida4"])
def test_gradient_of_a_separable_system(solver):
    case = ode("driven pendulum")
    expected, found, start = gradients(solver, case, grid(1000, 3.0))
    assert relative(found, expected) < 1e-12
    assert relative(start, case.y0) < 1e-12


@pytest.mark.parametrize(
    "solver",
    [
        pytest.param(ReversibleHeun(), id="ReversibleHeun"),
        pytest.param(Reversible(diffrax.Bosh3()), id="Reversible(Bosh3)", marks=pytest.mark.slow),
        pytest.param(EES27(), id="EES27"),
    ],
)
def test_gradient_of_a_controlled_equation_reaches_the_control(solver):
    # Defects of EES27 shrink with the eighth power of the increment.
    steps = grid(400 if isinstance(solver, EES27) else 40, 1.0)
    expected, found, start = gradients(solver, cde(), steps)
    assert relative(found, expected) < 1e-12
    assert relative(start, cde().y0) < 1e-12


@pytest.mark.parametrize(
    "solver",
    [
        pytest.param(ReversibleHeun(), id="ReversibleHeun"),
        pytest.param(Reversible(diffrax.Heun()), id="Reversible(Heun)", marks=pytest.mark.slow),
    ],
)
def test_gradient_of_a_stochastic_equation(solver):
    expected, found, start = gradients(solver, sde(), grid(40, 1.0))
    assert relative(found, expected) < 1e-12
    assert relative(start, sde().y0) < 1e-12


def test_gradient_across_a_jump_of_the_field():
    """The field changes at t = 1/2, between the end of one step and the start of the next."""
    steps = grid(20, 1.0, vary=0.0)
    jump = jnp.full(LANES, 0.5)
    steps = Grid(
        steps.t0.at[10].set(jump),
        steps.t1.at[9].set(jnp.nextafter(jump, jnp.zeros(LANES))),
        jnp.zeros((20, LANES), bool).at[10].set(True),
    )
    problem = PROBLEMS["network"]

    def field(t, y, p):
        after = jnp.where(t < 0.5, 0.0, 1.0)
        out = problem.vector_field(t, y, p)
        return jax.tree.map(lambda x: x + after * (1.0 + x**2), out)

    case = ode("network")._replace(build=lambda params, lane: diffrax.ODETerm(field))
    expected, found, start = gradients(ReversibleHeun(), case, steps)
    assert relative(found, expected) < 1e-12
    assert relative(start, case.y0) < 1e-12
    forgotten, _, _ = gradients(ReversibleHeun(), case, steps._replace(made_jump=False))
    assert relative(forgotten, expected) > 1e-3


@pytest.mark.parametrize("solver", [ReversibleHeun(), Reversible(diffrax.Midpoint())])
def test_an_inverse_with_one_wrong_sign_is_noticed(solver, monkeypatch):
    right = Coupling.inverse

    def wrong(self, members, g):
        return right(self, members, trees.scale(-1.0, g))

    monkeypatch.setattr(Coupling, "inverse", wrong)
    case = ode("network")
    expected, found, start = gradients(solver, case, grid(20, 1.0))
    assert relative(found, expected) > 1e-4
    assert relative(start, case.y0) > 1e-4


def count_evaluations(fn) -> int:
    """How often `fn(field)` evaluates the field: its one tanh, counted in the traced computation."""

    def count(jaxpr) -> int:
        inner = [getattr(x, "jaxpr", x) for eqn in jaxpr.eqns for x in eqn.params.values()]
        here = sum(eqn.primitive.name == "tanh" for eqn in jaxpr.eqns)
        return here + sum(count(x) for x in inner if hasattr(x, "eqns"))

    return count(jax.make_jaxpr(lambda: fn(lambda t, y, args: jnp.tanh(y)))().jaxpr)


@pytest.mark.parametrize(
    "solver, evaluations",
    [
        (ReversibleHeun(), 1),
        (AsynchronousLeapfrog(), 1),
        (Reversible(diffrax.Tsit5()), 12),
        (Reversible(diffrax.Bosh3()), 6),
        (EES25(), 6),
        (EES27(), 8),
    ],
)
def test_evaluations_of_one_rewound_step(solver, evaluations):
    def rewind(field):
        build = lambda params, lane: diffrax.ODETerm(field)
        case = Case(build, (), jnp.zeros(LANES), jnp.ones((LANES, 3)))
        members = jax.vmap(
            lambda y: solver.initial_members(diffrax.ODETerm(lambda *a: a[1]), 0.0, y, None)
        )
        members = members(case.y0)
        back = solver.start_rewind(members, members, (LANES,))
        steps = grid(2, 1.0)
        return solver.rewind(LanePull(case, (), steps.at(0), steps.at(1)), back)

    assert count_evaluations(rewind) == evaluations


def test_constant_weights_cost_nothing():
    """A weight of one or zero leaves no arithmetic behind."""
    x = jnp.ones(3)
    jaxpr = jax.make_jaxpr(lambda x: Coupling(0, 1).forward((x, x), x))(x)
    assert [str(eqn.primitive) for eqn in jaxpr.eqns] == ["add"]


def test_an_undamped_coupling_has_no_gap():
    """coupling=1: all weights of the gap are zero, and outputs between steps still work."""
    sol = diffrax.diffeqsolve(
        diffrax.ODETerm(lambda t, y, args: -y), Reversible(diffrax.Bosh3(), coupling=1.0), 0.0, 1.0,
        0.1, jnp.array([1.0]), saveat=diffrax.SaveAt(ts=[0.55, 1.0]),
    )  # fmt: skip
    np.testing.assert_allclose(sol.ys[:, 0], np.exp([-0.55, -1.0]), atol=1e-4)
