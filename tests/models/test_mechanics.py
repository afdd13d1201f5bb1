"""Mechanics against SciPy on the textbook equations, and what each structure must keep."""

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from messages import mentions
from scipy.integrate import solve_ivp

import nde
from nde.mechanics import OfPosition, Quadratic, Separable
from nde.solvers import StormerVerlet, Yoshida4

KEY = jax.random.key(0)
TIGHT = {"stepsize_controller": diffrax.PIDController(rtol=1e-10, atol=1e-10)}
CONSTANT = {"stepsize_controller": diffrax.ConstantStepSize()}
TS = jnp.linspace(0.0, 3.0, 7)
HALVES = (jnp.array([1.0, -0.5]), jnp.array([0.3, 0.2]))


def reference(rate, y0, ts=TS):
    solution = solve_ivp(rate, (ts[0], ts[-1]), y0, t_eval=ts, rtol=1e-11, atol=1e-12)
    return solution.y.T


def test_a_damped_driven_oscillator():
    def acceleration(t, q, v, args):
        return -jnp.sin(q) - 0.1 * v + jnp.cos(t)

    qs, vs = nde.SecondOrderODE(acceleration, **TIGHT)(TS, (jnp.array([1.0]), jnp.array([0.0])))
    expected = reference(lambda t, y: [y[1], -np.sin(y[0]) - 0.1 * y[1] + np.cos(t)], [1.0, 0.0])
    np.testing.assert_allclose(jnp.concatenate([qs, vs], axis=1), expected, atol=1e-8)


def double_pendulum(t, q, v, args):
    """Unit masses and lengths, angles from the vertical, g = 9.8."""
    kinetic = v[0] ** 2 + v[1] ** 2 / 2 + v[0] * v[1] * jnp.cos(q[0] - q[1])
    return kinetic + 9.8 * (2 * jnp.cos(q[0]) + jnp.cos(q[1]))


def double_pendulum_rate(t, y):
    a, b, va, vb = y
    c, s = np.cos(a - b), np.sin(a - b)
    mass = np.array([[2.0, c], [c, 1.0]])
    right = [-s * vb**2 - 19.6 * np.sin(a), s * va**2 - 9.8 * np.sin(b)]
    return [va, vb, *np.linalg.solve(mass, right)]


def test_the_double_pendulum_from_its_lagrangian():
    q0, v0 = jnp.array([1.0, 2.0]), jnp.array([0.0, 0.5])
    qs, vs = nde.LagrangianODE(double_pendulum, **TIGHT)(TS, (q0, v0))
    expected = reference(double_pendulum_rate, [*q0, *v0])
    np.testing.assert_allclose(jnp.concatenate([qs, vs], axis=1), expected, atol=1e-6)


def test_time_and_force_in_a_lagrangian():
    """L = m(t) v^2 / 2 - q^2 / 2 with m = 1 + t/2 and friction: (m v)' = -q - v / 5."""
    lagrangian = lambda t, q, v, args: jnp.sum((1 + t / 2) * v**2 - q**2) / 2
    friction = lambda t, q, v, args: -0.2 * v
    model = nde.LagrangianODE(lagrangian, friction, **TIGHT)
    qs, _ = model(TS, (jnp.array([1.0]), jnp.array([0.0])))
    rate = lambda t, y: [y[1], (-y[0] - 0.7 * y[1]) / (1 + t / 2)]
    np.testing.assert_allclose(qs[:, 0], reference(rate, [1.0, 0.0])[:, 0], atol=1e-8)


def test_a_network_keeps_its_energy():
    field = nde.fields.ScalarField(4, 8, 1, activation=jnp.tanh, key=KEY)
    energy = lambda t, q, p, args: field(t, jnp.concatenate([q, p]))
    model = nde.HamiltonianODE(energy, **TIGHT)
    energies = model.energy(TS, model(TS, HALVES))
    assert np.ptp(energies) < 1e-9 < np.ptp(model(TS, HALVES)[0])


def kepler(t, q, args):
    return -1 / jnp.sqrt(jnp.sum(q**2))


@pytest.mark.parametrize("steps, worst", [(200, 1.3e-3), (400, 3.4e-4)])
def test_energy_of_kepler_has_no_trend(steps, worst):
    """Eccentricity 1/2, 100 periods: a known table of the largest error of Verlet's method."""
    model = nde.HamiltonianODE(
        Separable(Quadratic(), kepler),
        solver=StormerVerlet(),
        dt0=2 * np.pi / steps,
        max_steps=100 * steps + 1,
        **CONSTANT,
    )
    ts = jnp.linspace(0.0, 200 * np.pi, 4001)
    start = (jnp.array([0.5, 0.0]), jnp.array([0.0, np.sqrt(3.0)]))
    error = np.abs(model.energy(ts, model(ts, start)) + 0.5)
    assert worst * 0.9 < error[:2001].max() < worst * 1.1
    assert error[2001:].max() < worst * 1.1


@pytest.mark.parametrize("solver", [StormerVerlet(), Yoshida4()], ids=["Verlet", "Yoshida"])
def test_symplectic_solvers_follow_a_second_order_model(solver):
    """They are reached from a model, and their gradient is that of the steps."""
    field = nde.fields.MLPField(2, 8, 1, key=KEY)

    def end(field, adjoint):
        options = {"solver": solver, "adjoint": adjoint, "dt0": 0.01, **CONSTANT}
        return sum(
            x[-1].sum() for x in nde.SecondOrderODE(OfPosition(field), **options)(TS, HALVES)
        )

    value, grads = eqx.filter_value_and_grad(end)(field, nde.solvers.DiscreteAdjoint())
    fine = nde.SecondOrderODE(OfPosition(field), **TIGHT)(TS, HALVES)
    assert abs(value - sum(x[-1].sum() for x in fine)) < 1e-4
    expected = eqx.filter_grad(end)(field, diffrax.DirectAdjoint())
    for ours, theirs in zip(jax.tree.leaves(grads), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-12)


def test_power_balance():
    """dH/dt = -lost + entered, integrated beside the solve; and without a port H only falls."""
    energy = nde.fields.ScalarField(3, 8, 1, activation=jnp.tanh, key=KEY)
    A, B, G = (
        jax.random.normal(k, shape)
        for k, shape in zip(jax.random.split(KEY, 3), [(3, 3), (3, 2), (3, 1)], strict=True)
    )
    drive = lambda t, args: jnp.sin(3 * t)[None]
    x0 = jnp.array([0.5, -1.0, 0.3])
    driven = nde.PortHamiltonianODE(energy, A, lambda t, x, args: B * x[0], G, drive, **TIGHT)
    power = lambda t, x, args: driven.power(t, x, args)
    xs, (lost, entered) = driven.solve(TS, x0, integrand=power).ys
    gained = jax.vmap(energy)(TS, xs) - energy(0.0, x0)
    np.testing.assert_allclose(gained, entered - lost, atol=1e-6)
    assert lost[-1] > 1e-3 and abs(entered[-1]) > 1e-3
    alone = nde.PortHamiltonianODE(energy, A, B, **TIGHT)
    assert np.all(np.diff(jax.vmap(energy)(TS, alone(TS, x0))) < 0)


BAD = [
    (lambda: nde.HamiltonianODE(kepler), ["`hamiltonian` has signature"]),
    (
        lambda: nde.HamiltonianODE(lambda t, q, p, a: q)(TS, HALVES),
        ["`hamiltonian` returned shape (2,)", "scalar"],
    ),
    (
        lambda: nde.HamiltonianODE(Separable(Quadratic(), kepler))(TS, HALVES[0]),
        ["`y0` has the shapes [(2,)]", "pair"],
    ),
    (
        lambda: nde.HamiltonianODE(
            lambda t, q, p, a: jnp.sum(q * p), solver=StormerVerlet(), dt0=0.1, **CONSTANT
        )(TS, HALVES),
        ["`solver` is StormerVerlet", "Separable"],
    ),
    (
        lambda: nde.SecondOrderODE(
            lambda t, q, v, a: -q - v, solver=StormerVerlet(), dt0=0.1, **CONSTANT
        )(TS, HALVES),
        ["`acceleration` looks at the velocity", "OfPosition"],
    ),
    (
        lambda: nde.LagrangianODE(lambda t, q, v, a: v[0] ** 2 - q[1] ** 2)(TS, HALVES),
        ["`lagrangian` has a singular mass matrix", "kinetic energy"],
    ),
    (
        lambda: nde.PortHamiltonianODE(lambda t, x, a: jnp.sum(x**2), jnp.eye(3))(TS, HALVES[0]),
        ["`interconnection` has shape (3, 3)", "(2, 2)"],
    ),
    (
        lambda: nde.PortHamiltonianODE(kepler, jnp.eye(2), ports=jnp.eye(2)),
        ["`ports` and `control` go together"],
    ),
]


@pytest.mark.parametrize("call, words", BAD)
def test_bad_input(call, words):
    with pytest.raises(ValueError, match=mentions(words)):
        call()
