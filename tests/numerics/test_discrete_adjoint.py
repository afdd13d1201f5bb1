"""Gradients of `DiscreteAdjoint` against autodiff through the very same steps."""

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import optimistix as optx
import pytest
from oracles import PARAMS, Y0, field, relative, weigh
from sweeps import sweep

from nde.solvers import DiscreteAdjoint


def unrolled(solver, times, y0, params, ts=None):
    """A plain Python loop over the solver's own steps, and its interpolation."""
    term = dfx.ODETerm(field)
    state = solver.init(term, times[0], times[1], y0, params)
    y, outputs = y0, []
    for a, b in zip(times[:-1], times[1:], strict=True):
        y0_step = y
        y, _, info, state, _ = solver.step(term, a, b, y0_step, params, state, False)
        if ts is not None:
            path = solver.interpolation_cls(t0=a, t1=b, **info)
            low = -np.inf if a == times[0] else a
            outputs += [path.evaluate(t) for t in ts if low < t <= b]
    return jnp.stack(outputs) if ts is not None else y[None]


ODE_SOLVERS = {
    "Tsit5": dfx.Tsit5(),
    "Dopri5": dfx.Dopri5(),
    "Dopri8": dfx.Dopri8(),
    "Bosh3": dfx.Bosh3(),
    "Heun": dfx.Heun(),
    "Midpoint": dfx.Midpoint(),
    "Ralston": dfx.Ralston(),
    "Euler": dfx.Euler(),
    "ReversibleHeun": dfx.ReversibleHeun(),
    "LeapfrogMidpoint": dfx.LeapfrogMidpoint(),
    "HalfSolver(Heun)": dfx.HalfSolver(dfx.Heun()),
}
OUTPUTS = {"t1": None, "ts": np.array([0.0, 0.13, 0.5, 0.51, 0.52, 1.1])}


# One of every kind of tableau and of state.
QUICK = ("Tsit5", "Heun", "Euler", "ReversibleHeun", "LeapfrogMidpoint")


@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("name", sweep(ODE_SOLVERS, *QUICK))
def test_gradient_is_that_of_the_unrolled_steps(name, output):
    solver, ts = ODE_SOLVERS[name], OUTPUTS[output]
    times = np.array([0.0, 0.2, 0.3, 0.55, 0.8, 1.1])
    saveat = dfx.SaveAt(t1=True) if ts is None else dfx.SaveAt(ts=ts)

    def ours(y0, params):
        sol = dfx.diffeqsolve(
            dfx.ODETerm(field), solver, 0.0, 1.1, None, y0, params, saveat=saveat,
            stepsize_controller=dfx.StepTo(times), adjoint=DiscreteAdjoint(), max_steps=8,
        )  # fmt: skip
        return weigh(sol.ys)

    got = jax.jit(jax.value_and_grad(ours, argnums=(0, 1)))(Y0, PARAMS)
    theirs = lambda y0, params: weigh(unrolled(solver, times, y0, params, ts))
    want = jax.jit(jax.value_and_grad(theirs, argnums=(0, 1)))(Y0, PARAMS)
    assert relative(got, want) < 1e-12


def solve(
    adjoint, y0, params, *, solver=None, controller=None, saveat=None, t0=0.0, t1=1.5, **kwargs
):
    """One solve with the defaults of this file."""
    options = dict(dt0=0.05 if t1 > t0 else -0.05, max_steps=256) | kwargs
    return dfx.diffeqsolve(
        dfx.ODETerm(field), solver or dfx.Tsit5(), t0, t1, y0=y0, args=params,
        saveat=saveat or dfx.SaveAt(t1=True), adjoint=adjoint,
        stepsize_controller=controller or dfx.PIDController(rtol=1e-5, atol=1e-7), **options,
    )  # fmt: skip


def both(fn, *args):
    """Value and gradient with our adjoint, and with diffrax's."""
    results = []
    for adjoint in (DiscreteAdjoint(), dfx.RecursiveCheckpointAdjoint()):
        value_and_grad = jax.value_and_grad(lambda *a, adj=adjoint: fn(adj, *a), argnums=(0, 1))
        results.append(jax.jit(value_and_grad)(*args))
    return results


IMPLICIT = {
    "Kvaerno5": dfx.Kvaerno5(),
    "KenCarp3": dfx.KenCarp3(),
    "ImplicitEuler": dfx.ImplicitEuler(dfx.VeryChord(rtol=1e-10, atol=1e-10, norm=optx.rms_norm)),
}


# One stiff method and one with a given root finder.
@pytest.mark.parametrize("name", sweep(IMPLICIT, "Kvaerno5", "ImplicitEuler"))
def test_implicit_solvers(name):
    tight, loose = dfx.PIDController(rtol=1e-9, atol=1e-11), dfx.PIDController(1e-3, 1e-5)
    constant = dfx.ConstantStepSize()
    controller = {"Kvaerno5": tight, "KenCarp3": loose, "ImplicitEuler": constant}[name]
    term = dfx.ODETerm(field)
    if name == "KenCarp3":
        term = dfx.MultiTerm(dfx.ODETerm(field), dfx.ODETerm(lambda t, y, args: -args["b"] * y))

    def loss(adjoint, y0, params):
        sol = dfx.diffeqsolve(
            term, IMPLICIT[name], 0.0, 0.4, 0.02, y0, params, adjoint=adjoint, max_steps=256,
            stepsize_controller=controller,
        )  # fmt: skip
        return weigh(sol.ys)

    got, want = both(loss, Y0, PARAMS)
    assert relative(got, want) < 1e-7  # both solve their nonlinear systems to a tolerance


CONTROLLERS = {
    "constant": dfx.ConstantStepSize(),
    "pid": dfx.PIDController(rtol=1e-5, atol=1e-7, pcoeff=0.2, icoeff=0.4),
    "step_ts": dfx.ClipStepSizeController(
        dfx.PIDController(rtol=1e-5, atol=1e-7), step_ts=[0.33, 0.77]
    ),
    "jump_ts": dfx.ClipStepSizeController(
        dfx.PIDController(rtol=1e-5, atol=1e-7), jump_ts=[0.33, 0.77]
    ),
    "rejecting": dfx.PIDController(rtol=1e-7, atol=1e-9),
}
SAVES = {
    "ts": dfx.SaveAt(ts=np.linspace(0.0, 1.5, 6)),
    "all": dfx.SaveAt(t0=True, ts=np.linspace(0.1, 1.4, 5), steps=2, t1=True),
    "subs": dfx.SaveAt(
        subs={
            "mean": dfx.SubSaveAt(
                ts=np.array([0.2, 0.9]), fn=lambda t, y, args: t * jnp.sum(y * args["b"])
            ),
            "end": dfx.SubSaveAt(t0=True, t1=True),
            "steps": dfx.SubSaveAt(steps=1, fn=lambda t, y, args: (y[0], jnp.exp(t) * y[1:])),
        }
    ),
}  # fmt: skip


EVERY = [(name, save, 1) for name in CONTROLLERS for save in SAVES]
BACKWARDS = [("pid", "all", -1), ("jump_ts", "all", -1)]
# Every controller, every `SaveAt` and both directions.
ONCE = [
    ("constant", "all", 1), ("pid", "ts", 1), ("pid", "subs", 1), ("step_ts", "all", 1),
    ("rejecting", "all", 1), ("jump_ts", "all", -1),
]  # fmt: skip


@pytest.mark.parametrize("name, save, direction", sweep(EVERY + BACKWARDS, *ONCE))
def test_controllers_and_saves_agree_with_diffrax(name, save, direction):
    controller, saveat = CONTROLLERS[name], SAVES[save]
    dt0 = (0.6 if name == "rejecting" else 0.05) * direction
    if direction == -1:
        saveat = jax.tree.map(lambda x: -x if eqx.is_array(x) else x, saveat)
        flip = lambda times: None if times is None else -times
        if isinstance(controller, dfx.ClipStepSizeController):
            controller = dfx.ClipStepSizeController(
                controller.controller, flip(controller.step_ts), flip(controller.jump_ts)
            )

    def run(adjoint, y0, params):
        return solve(
            adjoint, y0, params, controller=controller, saveat=saveat, t1=1.5 * direction, dt0=dt0
        )

    def loss(adjoint, y0, params):
        sol = run(adjoint, y0, params)
        return weigh(sol.ys), (sol.ts, sol.ys, sol.stats, sol.result)

    ours, theirs = (
        jax.jit(jax.value_and_grad(lambda y, p, a=adj: loss(a, y, p), argnums=(0, 1), has_aux=True))
        for adj in (DiscreteAdjoint(), dfx.RecursiveCheckpointAdjoint())
    )
    (value, (ts, ys, stats, result)), grads = ours(Y0, PARAMS)
    (_, (want_ts, want_ys, want_stats, want_result)), want = theirs(Y0, PARAMS)
    for count in ("num_steps", "num_accepted_steps", "num_rejected_steps"):
        assert stats[count] == want_stats[count]
    assert result == want_result
    # Adaptive step ends differ by the rounding of the error estimate; fixed ones do not.
    loose = 1e-12 if name == "constant" or save == "ts" else 1e-8
    for a, b in zip(jax.tree.leaves((ts, ys)), jax.tree.leaves((want_ts, want_ys)), strict=True):
        np.testing.assert_allclose(a, b, rtol=loose, atol=loose)
    assert relative(grads, want) < 100 * loose


def test_rejections_do_happen():
    sol = solve(DiscreteAdjoint(), Y0, PARAMS, controller=CONTROLLERS["rejecting"], dt0=0.6)
    assert sol.stats["num_rejected_steps"] > 0


def test_replayed_chunks_give_the_same_gradient():
    """Few checkpoints and many steps: every chunk length, and the slots are used again."""

    def loss(adjoint, y0, params, dt0):
        sol = solve(
            adjoint, y0, params, controller=dfx.ConstantStepSize(), dt0=dt0, max_steps=40,
            solver=dfx.Heun(), saveat=dfx.SaveAt(ts=np.linspace(0.0, 1.5, 4), steps=3),
        )  # fmt: skip
        return weigh(sol.ys)

    gradient = jax.jit(jax.grad(loss, argnums=(1, 2)), static_argnums=0)
    for steps in (1, 3, 4, 5, 20, 37):
        args = (Y0, PARAMS, 1.5 / steps)
        ours, theirs = DiscreteAdjoint(checkpoints=2), dfx.RecursiveCheckpointAdjoint()
        assert relative(gradient(ours, *args), gradient(theirs, *args)) < 1e-12


def test_pytree_state_and_captured_values():
    """The field closes over a traced array, and the state is a dictionary."""

    def loss(adjoint, scale, y0):
        def vector_field(t, y, args):
            return {"x": scale * y["v"], "v": -(scale**2) * y["x"] * args[1]}

        sol = dfx.diffeqsolve(
            dfx.ODETerm(vector_field), dfx.Dopri5(), 0.0, 1.0, 0.1, y0, ("text", 2),
            adjoint=adjoint, saveat=dfx.SaveAt(ts=np.array([0.3, 1.0])), max_steps=32,
        )  # fmt: skip
        return weigh(sol.ys)

    y0 = {"x": jnp.array([1.0, 2.0]), "v": jnp.array([0.1, -0.3])}
    got, want = both(loss, jnp.array(1.3), y0)
    assert relative(got, want) < 1e-12


def test_generic_solver_state_is_differentiated():
    """Reversible Heun carries a copy of the solution; chained solves pass it on."""

    def loss(adjoint, y0, params):
        options = dict(solver=dfx.ReversibleHeun(), controller=dfx.ConstantStepSize())
        saveat = dfx.SaveAt(t1=True, solver_state=True)
        first = solve(adjoint, y0, params, saveat=saveat, t1=0.7, **options)
        second = solve(
            adjoint, first.ys[0], params, t0=0.7, solver_state=first.solver_state, **options
        )
        return weigh((second.ys, first.solver_state))

    got, want = both(loss, Y0, PARAMS)
    assert relative(got, want) < 1e-12


def test_chained_fsal_solves():
    def loss(adjoint, y0, params):
        saveat = dfx.SaveAt(t1=True, solver_state=True, controller_state=True, made_jump=True)
        first = solve(adjoint, y0, params, saveat=saveat, t1=0.7)
        second = solve(
            adjoint, first.ys[0], params, t0=0.7, solver_state=first.solver_state,
            controller_state=first.controller_state, made_jump=first.made_jump,
        )  # fmt: skip
        return weigh(second.ys) + jnp.sum(first.solver_state[1])

    got, want = both(loss, Y0, PARAMS)
    assert relative(got, want) < 1e-9


@pytest.mark.parametrize("hand_over", ["dense", "event"])
def test_what_the_loop_lacks_is_handed_over(hand_over):
    def loss(adjoint, y0, params):
        if hand_over == "dense":
            sol = solve(adjoint, y0, params, saveat=dfx.SaveAt(dense=True))
            return weigh(jax.vmap(sol.evaluate)(jnp.linspace(0.0, 1.5, 4)))
        event = dfx.Event(lambda t, y, args, **kwargs: y[0] - 0.5)
        return weigh(solve(adjoint, y0, params, event=event).ys)

    got, want = both(loss, Y0, PARAMS)
    assert relative(got, want) < 1e-12


def test_zero_length_solve():
    def loss(adjoint, y0, params):
        saveat = dfx.SaveAt(t0=True, ts=np.array([0.5, 0.5]), t1=True)
        sol = solve(adjoint, y0, params, t0=0.5, t1=0.5, dt0=0.1, saveat=saveat)
        assert sol.ys.shape == (4, 3)
        return weigh(sol.ys)

    got, want = both(loss, Y0, PARAMS)
    assert relative(got[0], want[0]) == 0
    assert relative(got[1][0], want[1][0]) < 1e-15
    assert not any(jnp.any(x) for x in jax.tree.leaves(got[1][1]))


@pytest.mark.parametrize("every", [1, 2])
def test_rows_of_a_zero_length_solve(every):
    def rows(adjoint):
        saveat = dfx.SaveAt(t0=True, steps=every, t1=True)
        return solve(adjoint, Y0, PARAMS, t0=0.5, t1=0.5, dt0=0.1, saveat=saveat, max_steps=4).ys

    np.testing.assert_array_equal(rows(DiscreteAdjoint()), rows(dfx.RecursiveCheckpointAdjoint()))


NOISE = dfx.VirtualBrownianTree(0.0, 1.0, tol=2**-8, shape=(3,), key=jax.random.key(1))
LEVY = dfx.VirtualBrownianTree(
    0.0, 1.0, tol=2**-8, shape=(), key=jax.random.key(1), levy_area=dfx.SpaceTimeLevyArea
)
SDE_SOLVERS = {
    "Euler": (dfx.Euler(), NOISE),
    "Heun": (dfx.Heun(), NOISE),
    "EulerHeun": (dfx.EulerHeun(), NOISE),
    "ReversibleHeun": (dfx.ReversibleHeun(), NOISE),
    "ItoMilstein": (dfx.ItoMilstein(), NOISE),
    "SPaRK": (dfx.SPaRK(), LEVY),
}


# One with a state, one with adaptive steps; explicit ones in `test_noise`.
@pytest.mark.parametrize("name", sweep(SDE_SOLVERS, "ReversibleHeun", "SPaRK"))
def test_stochastic_solvers(name):
    solver, path = SDE_SOLVERS[name]
    scalar = path is LEVY

    def diffusion(t, y, args):
        sigma = 0.2 * jnp.cos(args["b"]) * (1.0 + 0.1 * y)
        if scalar:
            return sigma
        return lx.DiagonalLinearOperator(sigma)

    terms = dfx.MultiTerm(dfx.ODETerm(field), dfx.ControlTerm(diffusion, path))
    adaptive = name == "SPaRK"
    controller = dfx.PIDController(rtol=1e-2, atol=1e-2) if adaptive else dfx.ConstantStepSize()

    def loss(adjoint, y0, params):
        sol = dfx.diffeqsolve(
            terms, solver, 0.0, 1.0, 1 / 16, y0, params, adjoint=adjoint, max_steps=64,
            stepsize_controller=controller, saveat=dfx.SaveAt(ts=np.array([0.4, 1.0])),
        )  # fmt: skip
        return weigh(sol.ys)

    got, want = both(loss, Y0, PARAMS)
    assert relative(got, want) < (1e-7 if adaptive else 1e-12)


def test_a_wrong_gradient_would_be_seen():
    """Negative control of `relative`: one cotangent of a hundred scaled by 1 + 1e-11."""
    want = jax.grad(lambda p: jnp.sum(field(0.3, Y0, p)))(PARAMS)
    got = eqx.tree_at(lambda p: p["b"], want, want["b"] * (1 + 1e-11))
    assert relative(got, want) > 1e-12


@pytest.mark.parametrize("jumps", [None, np.array([0.7, 0.05])], ids=["smooth", "jumps"])
def test_an_implicit_lane_is_as_it_is_alone(jumps):
    """The last stage of a step is the first of the next, but known to a tolerance only: a lane that
    begins, or waits where it began, must not make the others evaluate it anew."""

    def one(y, t1, jump):
        controller = dfx.PIDController(rtol=1e-1, atol=1e-2)
        if jumps is not None:
            controller = dfx.ClipStepSizeController(controller, jump_ts=jump[None])
        return dfx.diffeqsolve(
            dfx.ODETerm(lambda t, y, args: -5 * y**3 + jnp.sin(5 * t)), dfx.Kvaerno3(), 0.0, t1,
            0.05, y, adjoint=DiscreteAdjoint(), stepsize_controller=controller, max_steps=40,
        ).ys[0]  # fmt: skip

    lanes = (np.array([1.0, 1.1]), np.array([2.0, 0.1]), np.zeros(2) if jumps is None else jumps)
    gradient = jax.jit(jax.value_and_grad(lambda *lanes: jax.vmap(one)(*lanes).sum()))
    value, got = gradient(*lanes)
    alone = [gradient(*(x[i : i + 1] for x in lanes)) for i in range(2)]
    np.testing.assert_allclose(value, sum(v for v, _ in alone), rtol=1e-14)
    np.testing.assert_allclose(got, np.concatenate([g for _, g in alone]), rtol=1e-12)
