"""Unrolled Runge-Kutta steps against diffrax's own, and evaluations counted on real runs."""

import diffrax as dfx
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import pytest
from oracles import ADAPTIVE, CONSTANT, OURS, PARAMS, Y0, field, relative, solve, weigh

from nde.solvers.adjoint.stepper import SolverStepper, UnrolledStepper, stepper_for
from nde.solvers.methods import explicit_rk

EXPLICIT = {
    "Bosh3": dfx.Bosh3(),
    "Dopri5": dfx.Dopri5(),
    "Dopri8": dfx.Dopri8(),
    "Heun": dfx.Heun(),
    "Midpoint": dfx.Midpoint(),
    "Ralston": dfx.Ralston(),
    "Tsit5": dfx.Tsit5(),
}
PATH = dfx.LinearInterpolation(
    jnp.array([0.0, 0.25, 1.0]), jnp.array([[0.0, 1.0], [0.5, 0.8], [0.2, 1.7]])
)


def matrix(t, y, args):
    return jnp.stack([jnp.sin(args["w"] @ y + t), args["b"] * y], axis=1)


def diagonal(t, y, args):
    return lx.DiagonalLinearOperator(jnp.cos(args["w"][:2, :2] @ y + t))


TERMS = {
    "ode": (dfx.ODETerm(field), Y0),
    "control, matrix": (dfx.ControlTerm(matrix, PATH), Y0),
    "control, diagonal": (dfx.ControlTerm(diagonal, PATH), Y0[:2]),
    "pytree": (
        dfx.ODETerm(lambda t, y, args: {"p": y["q"] * t, "q": -args["b"] * y["p"]}),
        {"p": Y0, "q": Y0[::-1]},
    ),
}


EVERY = [(solver, kind) for solver in EXPLICIT for kind in ("ode", "control, matrix")]
SOME = [(solver, kind) for solver in ("Heun", "Tsit5") for kind in ("control, diagonal", "pytree")]


@pytest.mark.parametrize("name, kind", EVERY + SOME)
def test_steps_are_those_of_diffrax(name, kind):
    """Solution, error and dense output; the second step takes over the last stage of the first."""
    solver, (term, y0) = EXPLICIT[name], TERMS[kind]
    stepper = stepper_for(solver, term, PARAMS, 0.0, 0.2, y0)
    assert isinstance(stepper, UnrolledStepper)

    @jax.jit
    def run(y):
        state = solver.init(term, 0.0, 0.2, y, PARAMS)
        one = solver.step(term, 0.0, 0.2, y, PARAMS, state, False)
        two = solver.step(term, 0.2, 0.5, one[0], PARAMS, one[3], False)
        our_one = stepper.attempt(0.0, 0.2, y, None, stepper.cache(0.0, y, None), False)
        our_two = stepper.attempt(0.2, 0.5, our_one.y1, None, our_one.cache, False)
        repeated = stepper.advance(0.2, 0.5, our_one.y1, None, False, True)
        short = stepper.advance(0.2, 0.5, our_one.y1, None, False, False)
        whole = lambda step: (step.y1, step.y_error, step.dense_info)
        ours = whole(our_one), whole(our_two), whole(repeated), short.y1
        return ours, (one[:3], two[:3], two[:3], two[0])

    ours, theirs = run(y0)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-15)


def test_only_known_steps_are_unrolled():
    class Damped(dfx.Heun):
        def step(self, terms, t0, t1, y0, args, solver_state, made_jump):
            y1, *rest = super().step(terms, t0, t1, y0, args, solver_state, made_jump)
            return 0.5 * y1, *rest

    start = (dfx.ODETerm(field), PARAMS, 0.0, 0.1, Y0)
    assert isinstance(stepper_for(dfx.Heun(), *start), UnrolledStepper)
    assert isinstance(stepper_for(Damped(), *start), SolverStepper)
    options = dict(solver=Damped(), stepsize_controller=CONSTANT, dt0=0.25)
    got, want = solve(**options).ys, solve(adjoint=dfx.DirectAdjoint(), **options).ys
    assert relative(got, want) < 1e-14
    assert "nfe" not in solve(**options).stats  # nobody knows what its step does
    assert isinstance(stepper_for(dfx.Kvaerno3(), *start), SolverStepper)


def test_stages_that_the_solution_needs():
    assert explicit_rk.needed_stages(dfx.Tsit5.tableau) == 6
    assert explicit_rk.needed_stages(dfx.Heun.tableau) == 2


# --- evaluations, counted --------------------------------------------------------------------


class Counter:
    """A vector field that reports every evaluation to Python."""

    def __init__(self, vector_field):
        self.vector_field, self.calls = vector_field, 0

    def __call__(self, t, y, args):
        jax.debug.callback(self.count, t)
        return self.vector_field(t, y, args)

    def count(self, t):
        self.calls += 1

    def during(self, fn, *args):
        """The result of `fn(*args)` and the number of evaluations that it took."""
        jax.effects_barrier()
        before = self.calls
        out = jax.block_until_ready(fn(*args))
        jax.effects_barrier()
        return out, self.calls - before


def steps_of(sol):
    return int(sol.stats["num_accepted_steps"]), int(sol.stats["num_rejected_steps"])


CUBIC = lambda t, y, args: -args["b"] * y**3 + jnp.sin(5.0 * t)


def counted(counter, **options):
    @jax.jit
    def run(y0, params):
        return solve(y0, params, vector_field=counter, **options)

    sol, calls = counter.during(run, Y0, PARAMS)
    return sol, calls


JUMPS = dfx.ClipStepSizeController(ADAPTIVE, jump_ts=[0.3, 0.6])
LOOSE = dfx.ClipStepSizeController(dfx.PIDController(rtol=1e-3, atol=1e-3), jump_ts=[0.3, 0.6])

LOOPS = {
    "Tsit5": dict(solver=dfx.Tsit5()),
    "Tsit5, rejecting": dict(solver=dfx.Tsit5(), dt0=0.9, t1=3.0),
    "Tsit5, jumps": dict(
        solver=dfx.Tsit5(),
        stepsize_controller=JUMPS,
    ),
    "Tsit5, outputs": dict(saveat=dfx.SaveAt(ts=np.linspace(0.0, 1.0, 4))),
    "Dopri8": dict(solver=dfx.Dopri8()),
    "Heun": dict(solver=dfx.Heun(), stepsize_controller=CONSTANT),
    "Euler": dict(solver=dfx.Euler(), stepsize_controller=CONSTANT),
    "ReversibleHeun": dict(solver=dfx.ReversibleHeun(), stepsize_controller=CONSTANT),
    "LeapfrogMidpoint": dict(solver=dfx.LeapfrogMidpoint(), stepsize_controller=CONSTANT),
    "HalfSolver": dict(solver=dfx.HalfSolver(dfx.Heun())),
    "HalfSolver, FSAL": dict(solver=dfx.HalfSolver(dfx.Tsit5())),
    # diffrax's own FSAL methods evaluate anew in every attempt behind a jump.
    "ReversibleHeun, jumps": dict(solver=dfx.ReversibleHeun(), stepsize_controller=LOOSE),
    "HalfSolver, FSAL, jumps": dict(solver=dfx.HalfSolver(dfx.Bosh3()), stepsize_controller=LOOSE),
    "HalfSolver, jumps": dict(
        solver=dfx.HalfSolver(dfx.ReversibleHeun()), stepsize_controller=LOOSE
    ),
}


@pytest.mark.parametrize("name", LOOPS)
def test_nfe_is_the_number_of_evaluations(name):
    sol, calls = counted(Counter(CUBIC), **LOOPS[name])
    assert sol.stats["nfe"] == calls
    accepted, rejected = steps_of(sol)
    if name == "Tsit5":
        assert calls == 1 + 6 * (accepted + rejected)
    if name == "Tsit5, rejecting":
        assert rejected > 0
    if name == "Tsit5, jumps":
        assert calls == 1 + 2 + 6 * (accepted + rejected)


NOISE = dfx.UnsafeBrownianPath((3,), jax.random.key(1))
AREA = dfx.UnsafeBrownianPath((), jax.random.key(1), dfx.SpaceTimeLevyArea)
STOCHASTIC = {
    "Euler": (dfx.Euler(), NOISE),
    "Heun": (dfx.Heun(), NOISE),
    "ItoMilstein": (dfx.ItoMilstein(), NOISE),
    "ReversibleHeun": (dfx.ReversibleHeun(), NOISE),
    "SPaRK": (dfx.SPaRK(), AREA),
    "GeneralShARK": (dfx.GeneralShARK(), AREA),
}


@pytest.mark.parametrize("name", STOCHASTIC)
def test_nfe_of_stochastic_solvers_counts_the_drift(name):
    solver, path = STOCHASTIC[name]
    counter = Counter(CUBIC)

    def noise(t, y, args):
        return 0.1 * y if path is AREA else lx.DiagonalLinearOperator(0.1 * y)

    terms = dfx.MultiTerm(dfx.ODETerm(counter), dfx.ControlTerm(noise, path))

    @jax.jit
    def run(y0):
        return dfx.diffeqsolve(
            terms, solver, 0.0, 1.0, 0.25, y0, PARAMS, adjoint=OURS, max_steps=8
        ).stats["nfe"]

    nfe, calls = counter.during(run, Y0)
    assert nfe == calls


@pytest.mark.parametrize("solver", [dfx.ALIGN(0.05), dfx.ShOULD(0.05), dfx.QUICSORT(0.05)])
def test_langevin_solvers(solver):
    path = dfx.UnsafeBrownianPath((2,), jax.random.key(1), dfx.SpaceTimeTimeLevyArea)
    counter = Counter(lambda x, y, args: 2 * x)

    @jax.jit
    def run(y0):
        drift = dfx.UnderdampedLangevinDriftTerm(0.5, 1.0, lambda x, args: counter(x, x, args))
        terms = dfx.MultiTerm(drift, dfx.UnderdampedLangevinDiffusionTerm(0.5, 1.0, path))
        return dfx.diffeqsolve(terms, solver, 0.0, 1.0, 0.25, y0, adjoint=OURS, max_steps=8).stats[
            "nfe"
        ]

    nfe, calls = counter.during(run, (jnp.ones(2), jnp.zeros(2)))
    assert nfe == calls


def test_evaluations_of_a_gradient():
    """Tsit5 with constant steps: 6 n forward, 6 n backward, no replay. With `ts` the last stage takes
    part: it is handed over, which is one more to begin with in either direction."""
    n = 5
    ts = dfx.SaveAt(ts=np.array([0.3, 1.0]))
    for saveat, once, per_step in ((dfx.SaveAt(t1=True), 0, 6), (ts, 2, 12)):
        counter = Counter(CUBIC)

        @jax.jit
        def gradient(y0, params, counter=counter, saveat=saveat):
            def loss(y0):
                sol = solve(
                    y0, params, vector_field=counter, saveat=saveat,
                    stepsize_controller=CONSTANT, dt0=1.0 / n,
                )  # fmt: skip
                return weigh(sol.ys)

            return jax.grad(loss)(y0)

        _, calls = counter.during(gradient, Y0, PARAMS)
        assert calls == once + 6 * n + per_step * n


def test_replayed_steps_are_evaluated_once_more():
    """4 slots, 8 steps: chunks of two steps, whose first is replayed."""
    counter = Counter(CUBIC)
    adjoint = type(OURS)(checkpoints=4)

    @jax.jit
    def gradient(y0):
        options = dict(adjoint=adjoint, stepsize_controller=CONSTANT, dt0=1.0 / 8, max_steps=8)
        return jax.grad(lambda y: weigh(solve(y, vector_field=counter, **options).ys))(y0)

    _, calls = counter.during(gradient, Y0)
    assert calls == 6 * 8 + 6 * 8 + 6 * 4
