"""Integrals that ride along: they are right, and nothing but themselves can tell that they are there.

Every method is linear in the increments of its state, so where the integrand is w . (what moves y), q
is w . (y(t1) - y(t0)) to rounding, for any solver, any steps and any noise. Integrands are large here,
so that a controller that saw them would choose other steps.
"""

import functools

import diffrax
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import optimistix
import pytest

from nde.solvers import (
    SOSRI,
    SOSRI2,
    BrownianGrid,
    BrownianInterval,
    DiscreteAdjoint,
    Estimates,
    LevyHeun,
    Reversible,
    ReversibleAdjoint,
    ReversibleHeun,
    SpaceSpaceLevyArea,
    WithEstimates,
    ride_along,
)
from nde.solvers.integrals import riding, without_integral

KEY = jax.random.key(5)
W = jnp.array([1e6, -2e6])  # far above what the state weighs in an error norm
Y0 = jnp.array([1.0, -0.5])
P = {"rate": jnp.array(-0.7), "A": jnp.array([[-0.3, 1.1], [-0.9, -0.2]])}
PID = diffrax.PIDController(rtol=1e-5, atol=1e-7)
STIFF = diffrax.PIDController(rtol=1e-4, atol=1e-6, norm=optimistix.max_norm)


def field(t, y, p):
    return p["A"] @ y + jnp.sin(2 * t) * p["rate"] * y**2


def work(t, y, p):
    return W @ field(t, y, p)


def diagonal(t, y, p):
    return lx.DiagonalLinearOperator(0.3 * jnp.cos(y) * p["rate"])


def matrix(t, y, p):
    return 0.3 * jnp.stack([jnp.sin(y), y * p["rate"], jnp.ones(2)], axis=1)


def sde(diffusion, path):
    return diffrax.MultiTerm(diffrax.ODETerm(field), diffrax.ControlTerm(diffusion, path))


def solved(
    terms, solver, controller, adjoint, p, *, integrand=None, noise=None, dt0=None, t=(0, 1)
):
    """A solution, with an integral if there is an integrand."""
    y0, t0 = Y0, jnp.asarray(t[0], float)
    if integrand is not None:
        terms, y0, controller = ride_along(
            terms, y0, controller, integrand, t0=t0, args=p, noise=noise
        )
    return diffrax.diffeqsolve(
        terms, solver, t0, t[1], dt0, y0, p, stepsize_controller=controller, adjoint=adjoint,
        saveat=diffrax.SaveAt(t1=True), max_steps=256,
    )  # fmt: skip


def few(cases, slow):
    """The cases, those that only repeat what another one shows marked slow."""
    marks = lambda name: [pytest.mark.slow] if name in slow else []
    return [pytest.param(name, marks=marks(name)) for name in cases]


ODE = diffrax.ODETerm(field)
CLIP = diffrax.ClipStepSizeController(PID, step_ts=jnp.array([0.3]), jump_ts=jnp.array([0.6]))
ODES = {
    "pid": (diffrax.Tsit5(), PID, None, DiscreteAdjoint()),
    "clip": (diffrax.Tsit5(), CLIP, 0.1, DiscreteAdjoint()),
    "constant": (diffrax.Heun(), diffrax.ConstantStepSize(), 0.1, DiscreteAdjoint()),
    "times": (
        diffrax.Heun(),
        diffrax.StepTo(jnp.array([0.0, 0.2, 0.7, 1.0])),
        None,
        DiscreteAdjoint(),
    ),
    "diffrax": (diffrax.Dopri5(), PID, None, diffrax.DirectAdjoint()),
    "implicit": (diffrax.Kvaerno5(), STIFF, 0.1, DiscreteAdjoint()),
    "reversible": (Reversible(diffrax.Bosh3()), PID, 0.01, ReversibleAdjoint()),
}


@functools.cache
def with_and_without(case):
    solver, controller, dt0, adjoint = ODES[case]
    run = functools.partial(solved, ODE, solver, controller, adjoint, P, dt0=dt0)
    return run(), run(integrand=work)


@pytest.mark.parametrize("case", few(ODES, ["diffrax", "times"]))
def test_the_state_and_its_steps_are_those_without_the_integral(case):
    plain, both = with_and_without(case)
    y, _ = both.ys
    if case == "implicit":  # one linear system for stages of y and q: rounded differently
        np.testing.assert_allclose(y, plain.ys, rtol=1e-12)
    else:
        np.testing.assert_array_equal(y, plain.ys)
    assert int(both.stats["num_steps"]) == int(plain.stats["num_steps"]) > 2
    assert int(both.stats["num_rejected_steps"]) == int(plain.stats["num_rejected_steps"])
    if "nfe" in plain.stats:
        assert int(both.stats["nfe"]) == int(plain.stats["nfe"])


@pytest.mark.parametrize("case", few(ODES, ["diffrax", "times"]))
def test_an_integral_of_the_field_is_the_way_gone(case):
    _, both = with_and_without(case)
    y, q = both.ys
    # An implicit stage is known to the tolerance, its integral too.
    tolerance = 1e-3 if case == "implicit" else 1e-12
    np.testing.assert_allclose(q[0], W @ (y[0] - Y0), rtol=tolerance)


def test_a_controller_that_saw_the_integral_would_take_other_steps():
    plain, _ = with_and_without("pid")
    terms, y0, _ = ride_along(ODE, Y0, PID, work, t0=0.0, args=P)
    seen = diffrax.diffeqsolve(
        terms, diffrax.Tsit5(), 0.0, 1.0, None, y0, P, stepsize_controller=PID
    )
    assert int(seen.stats["num_steps"]) != int(plain.stats["num_steps"])


def test_integrals_are_trees_and_ride_on_one_another_in_either_direction():
    decay = diffrax.ODETerm(lambda t, y, args: -y)
    integrand = lambda t, y, args: {"y": y, "t": jnp.array(1.0)}
    both = ride_along(decay, Y0, PID, integrand, t0=1.0)
    # int_1^0 q_y dt with q_y = y(1) (1 - exp(1 - t)); y is seen as (y, q) by what rides on it.
    terms, y0, controller = ride_along(*both, lambda t, y, args: y[1]["y"], t0=1.0)
    assert riding(terms) == 2 and riding(without_integral(terms)) == 1
    sol = diffrax.diffeqsolve(
        terms, diffrax.Dopri8(), 1.0, 0.0, None, y0, adjoint=DiscreteAdjoint(),
        stepsize_controller=controller,
    )  # fmt: skip
    (_, q), twice = sol.ys
    np.testing.assert_allclose(q["y"][0], Y0 * (1 - np.e), rtol=1e-5)
    np.testing.assert_allclose(q["t"][0], -1.0, rtol=1e-12)
    np.testing.assert_allclose(twice[0], Y0 * (np.e - 2), rtol=1e-5)


def test_estimates_do_not_see_the_integral():
    estimates = Estimates(reduce="sum")
    for adjoint in (DiscreteAdjoint(estimates=estimates), ReversibleAdjoint(estimates=estimates)):
        solver = diffrax.Tsit5() if isinstance(adjoint, DiscreteAdjoint) else ReversibleHeun()
        run = functools.partial(solved, ODE, solver, PID, adjoint, P, dt0=0.05)
        plain, both = run().stats, run(integrand=work).stats
        for name in {"error_estimate", "stiffness_estimate"} & set(plain):
            np.testing.assert_allclose(both[name], plain[name], rtol=1e-12)
    solver, saveat = WithEstimates(diffrax.Tsit5()), diffrax.SaveAt(solver_state=True)
    terms, y0, _ = ride_along(ODE, Y0, PID, work, t0=0.0, args=P)
    run = lambda terms, y0: diffrax.diffeqsolve(terms, solver, 0.0, 1.0, 0.1, y0, P, saveat=saveat)
    plain, both = (run(*x).solver_state.estimates for x in ((ODE, Y0), (terms, y0)))
    for name, value in plain.items():
        np.testing.assert_allclose(both[name], value, rtol=1e-12)


# Noise. On a grid the increments are known: so is the sum that Euler's method makes of them.

N = 16
GRID = BrownianGrid(0.0, 1.0, 1 / N, shape=(3,), key=KEY)
DIAGONAL_GRID = BrownianGrid(
    0.0, 1.0, 1 / N, shape=(2,), key=KEY, levy_area=diffrax.SpaceTimeLevyArea
)
AREA_GRID = BrownianGrid(0.0, 1.0, 1 / N, shape=(3,), key=KEY, levy_area=SpaceSpaceLevyArea)
TREE = BrownianInterval(0.0, 1.0, (2,), KEY, levy_area=diffrax.SpaceTimeLevyArea)
STEPS = diffrax.ConstantStepSize()
MATRIX_WORK = lambda t, y, p: W @ matrix(t, y, p)
DIAGONAL_WORK = lambda t, y, p: W * diagonal(t, y, p).diagonal
SDES = {
    "Euler": (diffrax.Euler(), matrix, GRID, MATRIX_WORK, STEPS),
    "EulerHeun": (diffrax.EulerHeun(), matrix, GRID, MATRIX_WORK, STEPS),
    "ReversibleHeun": (ReversibleHeun(), matrix, GRID, MATRIX_WORK, STEPS),
    "LevyHeun": (LevyHeun(), matrix, AREA_GRID, MATRIX_WORK, STEPS),
    "SOSRI": (SOSRI(), diagonal, DIAGONAL_GRID, DIAGONAL_WORK, STEPS),
    "SOSRI2": (SOSRI2(), diagonal, TREE, DIAGONAL_WORK, diffrax.PIDController(1e-2, 1e-3)),
    "SPaRK": (diffrax.SPaRK(), diagonal, TREE, DIAGONAL_WORK, diffrax.PIDController(1e-2, 1e-3)),
}


@pytest.mark.parametrize("case", few(SDES, ["Euler", "EulerHeun", "LevyHeun", "SPaRK"]))
def test_an_integral_with_noise_is_the_way_gone_and_the_way_is_unchanged(case):
    solver, diffusion, path, noise, controller = SDES[case]
    adjoint = ReversibleAdjoint() if case == "ReversibleHeun" else DiscreteAdjoint()
    run = functools.partial(solved, sde(diffusion, path), solver, controller, adjoint, P, dt0=1 / N)
    plain, both, drift = run(), run(integrand=work, noise=noise), run(integrand=work)
    y, q = both.ys
    np.testing.assert_allclose(y, plain.ys, rtol=1e-13)
    np.testing.assert_allclose(drift.ys[0], plain.ys, rtol=1e-13)
    np.testing.assert_allclose(q[0], W @ (y[0] - Y0), rtol=1e-11)
    assert abs(drift.ys[1][0] - q[0]) > 1e-3 * abs(q[0])
    assert int(both.stats["num_steps"]) == int(plain.stats["num_steps"])
    assert int(both.stats["nfe"]) == int(plain.stats["nfe"])


def test_the_sum_of_eulers_method_is_the_sum_over_the_increments():
    a, b = lambda t, y, p: jnp.sum(y**2), lambda t, y, p: jnp.sin(y[0]) * jnp.arange(3.0)
    terms, y0, steps = ride_along(sde(matrix, GRID), Y0, STEPS, a, t0=0.0, args=P, noise=b)
    sol = diffrax.diffeqsolve(
        terms, diffrax.Euler(), 0.0, 1.0, 1 / N, y0, P, stepsize_controller=steps,
        adjoint=DiscreteAdjoint(), saveat=diffrax.SaveAt(t0=True, steps=True), max_steps=N,
    )  # fmt: skip
    ys, qs = sol.ys
    times = np.arange(N + 1) / N
    total = np.zeros(N + 1)
    for i in range(N):
        dw = np.asarray(GRID.evaluate(times[i], times[i + 1]))
        total[i + 1] = total[i] + np.sum(ys[i] ** 2) / N + np.sin(ys[i, 0]) * np.arange(3.0) @ dw
    np.testing.assert_allclose(qs, total, rtol=1e-12)


@pytest.mark.parametrize("solver", [diffrax.Heun(), ReversibleHeun()], ids=["Heun", "reversible"])
def test_a_cde_and_noise_without_a_drift_equal_the_system_written_by_hand(solver):
    ts = jnp.linspace(0.0, 1.0, 9)
    knots = jnp.stack([jnp.sin(3 * ts), ts**2, jnp.cos(ts)], axis=1)
    paths = {"cde": diffrax.LinearInterpolation(ts, knots), "sde": GRID}
    weights = jnp.array([0.3, -0.2, 0.5])
    a, b = lambda t, y, p: jnp.sum(jnp.sin(y)), lambda t, y, p: y[1] * weights

    class WithTime(diffrax.AbstractPath):
        path: diffrax.AbstractPath
        t0: float = 0.0
        t1: float = 1.0

        def evaluate(self, t0, t1=None, left=True):
            return jnp.append(self.path.evaluate(t0, t1), t1 - t0)

    def by_hand(t, z, p):
        y = z[:2]
        top = jnp.concatenate([matrix(t, y, p), jnp.zeros((2, 1))], axis=1)
        return jnp.concatenate([top, jnp.append(b(t, y, p), a(t, y, p))[None]])

    for path in paths.values():
        term = diffrax.ControlTerm(matrix, path)
        terms, y0, steps = ride_along(term, Y0, STEPS, a, t0=0.0, args=P, noise=b)
        run = lambda terms, y0, steps: diffrax.diffeqsolve(
            terms, solver, 0.0, 1.0, 1 / N, y0, P, stepsize_controller=steps,
            adjoint=ReversibleAdjoint() if isinstance(solver, ReversibleHeun) else DiscreteAdjoint(),
        ).ys  # fmt: skip
        y, q = run(terms, y0, steps)
        hand = run(diffrax.ControlTerm(by_hand, WithTime(path)), jnp.append(Y0, 0.0), STEPS)
        np.testing.assert_allclose(jnp.append(y[0], q[0]), hand[0], rtol=1e-12)
        np.testing.assert_allclose(y, run(term, Y0, STEPS), rtol=1e-13)


# Gradients.

GRADIENTS = {
    "explicit": (ODE, diffrax.Tsit5(), DiscreteAdjoint(), None),
    "reversible": (ODE, Reversible(diffrax.Bosh3()), ReversibleAdjoint(), None),
    "stochastic": (sde(matrix, GRID), ReversibleHeun(), ReversibleAdjoint(), MATRIX_WORK),
    "diagonal": (sde(diagonal, DIAGONAL_GRID), SOSRI(), DiscreteAdjoint(), DIAGONAL_WORK),
}


@pytest.mark.parametrize("case", few(GRADIENTS, ["explicit", "diagonal"]))
def test_the_gradient_of_an_integral_equals_autodiff_for_a_batch(case):
    terms, solver, adjoint, noise = GRADIENTS[case]
    scaled = lambda f: None if f is None else lambda *x: 1e-6 * jnp.tanh(f(*x) * 1e-6)

    def loss(p, starts, adjoint):
        def one(y0):
            rides, z0, steps = ride_along(
                terms, y0, STEPS, scaled(work), t0=0.0, args=p, noise=scaled(noise)
            )
            y, q = diffrax.diffeqsolve(
                rides, solver, 0.0, 1.0, 1 / N, z0, p, stepsize_controller=steps, adjoint=adjoint,
                max_steps=N,
            ).ys  # fmt: skip
            return jnp.sum(jnp.sin(y)) + 1e6 * q[0]

        return jnp.sum(jax.vmap(one)(starts))

    starts = Y0[None] + jnp.linspace(0.0, 0.5, 3)[:, None]
    gradient = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)), static_argnums=2)
    got = gradient(P, starts, adjoint)
    want = gradient(P, starts, diffrax.DirectAdjoint())
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10), got, want)


BAD = {
    "pair": (
        (diffrax.ODETerm(field), diffrax.ODETerm(field)), work, None,
        "`terms` is a tuple; .* separable system neither field sees the whole state",
    ),
    "integer": (ODE, lambda *x: jnp.array(1), None, "`integrand` returned an array of dtype int"),
    "no control": (ODE, work, work, "`noise` was given, but there are 0 terms with a control"),
    "channels": (
        sde(matrix, GRID), work, DIAGONAL_WORK,
        r"`noise` returned the shapes \[\(2,\)\], but .* need \[\(3,\)\]",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_ride_along_is_refused(case):
    terms, integrand, noise, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        ride_along(terms, Y0, PID, integrand, t0=0.0, args=P, noise=noise)


def test_the_noise_of_the_state_must_still_be_diagonal_for_sosri():
    path = BrownianGrid(0.0, 1.0, 1 / N, shape=(3,), key=KEY, levy_area=diffrax.SpaceTimeLevyArea)
    with pytest.raises(ValueError, match="SOSRI needs diagonal noise, but `diffusion` returned an"):
        solved(sde(matrix, path), SOSRI(), STEPS, DiscreteAdjoint(), P, integrand=work, dt0=1 / N)
