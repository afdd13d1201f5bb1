"""EES25 and EES27: tableau conditions, stability polynomials, and how nearly a step is undone."""

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nde.solvers.reversible.coupling import StepInput
from nde.solvers.reversible.ees import EES25, EES27

r = np.sqrt(2.0)
# Butcher form, as published: (a, b, c).
PUBLISHED = {
    "EES25": (
        [[1 / 3], [-5 / 48, 15 / 16]],
        [1 / 10, 1 / 2, 2 / 5],
        [0, 1 / 3, 5 / 6],
    ),
    "EES27": (
        [
            [(2 - r) / 3],
            [(-4 + r) / 24, (4 + r) / 8],
            [(-176 + 145 * r) / 168, 3 * (8 - 5 * r) / 56, 3 * (3 - r) / 7],
        ],
        [(5 - 3 * r) / 14, (3 + r) / 14, 3 * (-1 + 2 * r) / 14, (9 - 4 * r) / 14],
        [0, (2 - r) / 3, (2 + r) / 6, (4 + r) / 6],
    ),
}
EES = {"EES25": EES25(), "EES27": EES27()}
DEFECT = {"EES25": 6, "EES27": 8}


def butcher(solver):
    """(a, b) of the low-storage form: unit vectors in place of the stages."""
    stages = len(solver.B)
    register, change, rows = np.zeros(stages), np.zeros(stages), []
    for i, (a, b) in enumerate(zip(solver.A, solver.B, strict=True)):
        rows.append(change.copy())
        register = a * register + np.eye(stages)[i]
        change = change + b * register
    return np.array(rows), change


@pytest.mark.parametrize("name", EES)
def test_tableau(name):
    a, b = butcher(EES[name])
    published_a, published_b, published_c = PUBLISHED[name]
    np.testing.assert_allclose(b, published_b, atol=1e-14)
    np.testing.assert_allclose(EES[name].c, published_c, atol=1e-15)
    for row, expected in zip(a[1:], published_a, strict=True):
        np.testing.assert_allclose(row[: len(expected)], expected, atol=1e-14)
    np.testing.assert_allclose(a.sum(axis=1), EES[name].c, atol=1e-14)
    assert b.sum() == pytest.approx(1.0, abs=1e-14)
    assert b @ EES[name].c == pytest.approx(0.5, abs=1e-14)


@pytest.mark.parametrize("name", EES)
def test_stability_polynomial(name):
    z = np.array([-3.0, -0.4 + 1.1j, 2.0j, 0.7])
    a, b = butcher(EES[name])
    cubic, quartic = (1 / 8, 0.0) if name == "EES25" else (1 / 2 - r / 4, 3 / 8 - r / 4)
    expected = 1 + z + z**2 / 2 + cubic * z**3 + quartic * z**4
    ones, eye = np.ones(len(b)), np.eye(len(b))
    found = [1 + s * b @ np.linalg.solve(eye - s * a, ones) for s in z]
    np.testing.assert_allclose(found, expected, rtol=1e-13)
    limit = {"EES25": 3.087, "EES27": 3.916}[name]
    s = -np.linspace(0.001, 5.0, 5000)
    amplification = np.abs(1 + s + s**2 / 2 + cubic * s**3 + quartic * s**4)
    assert -s[np.argmax(amplification > 1)] == pytest.approx(limit, abs=2e-3)


def field(t, y, args):
    """Nonlinear, coupled, dependent on time."""
    return jnp.stack([jnp.sin(y[1] + t), jnp.cos(y[0]) * y[1] - jnp.sin(2 * t) * y[0]])


@pytest.mark.parametrize("name", EES)
@pytest.mark.parametrize("direction", [1.0, -1.0], ids=["forward", "backward"])
def test_order_of_the_reverse_defect(name, direction):
    """Phi_{-h}(Phi_h(y)) - y shrinks as h^6, h^8; that of other methods of order 2 as h^3."""
    starts = jax.random.normal(jax.random.key(0), (16, 2))

    @jax.jit
    def defect(h):
        step = StepInput.over(diffrax.ODETerm(field), jnp.array(0.2), 0.2 + direction * h, None)

        def one(y0):
            y1, _ = EES[name].forward(step, (y0,))
            (back,), _ = EES[name].inverse(step, y1)
            return back - y0

        return jnp.linalg.norm(jax.vmap(one)(starts))

    hs = {"EES25": 0.1, "EES27": 0.25}[name] * 0.8 ** np.arange(6)
    measured = np.polyfit(np.log(hs), np.log([float(defect(h)) for h in hs]), 1)[0]
    assert abs(measured - DEFECT[name]) < 0.2


def test_the_same_step_for_a_controlled_equation():
    """A control of (t, t) with half the field on each channel is the ODE, to the last bits."""
    ode = diffrax.ODETerm(field)
    path = diffrax.LinearInterpolation(jnp.array([0.0, 1.0]), jnp.array([[0.0, 0.0], [1.0, 1.0]]))
    halves = lambda t, y, args: jnp.stack([field(t, y, args) / 2] * 2, axis=-1)
    cde = diffrax.ControlTerm(halves, path)
    y0 = (jnp.array([0.4, 0.9]),)
    for solver in EES.values():
        one, _ = solver.forward(StepInput.over(ode, 0.2, 0.3, None), y0)
        two, _ = solver.forward(StepInput.over(cde, 0.2, 0.3, None), y0)
        np.testing.assert_allclose(one[0], two[0], rtol=1e-14)
