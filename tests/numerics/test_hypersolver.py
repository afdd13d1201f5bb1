"""Hypersolvers: the base to the last bit, its order, and the exact correction of a linear equation."""

import warnings

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from messages import mentions

import nde
from nde.solvers import DiscreteAdjoint, Hypersolver, fingerprint

DECAY = diffrax.ODETerm(lambda t, y, args: -y)
PENDULUM = diffrax.ODETerm(lambda t, y, args: jnp.stack([y[1], -jnp.sin(y[0]) * jnp.cos(t)]))
Y0 = jnp.array([1.0, 0.5])
BASES = {"Euler": diffrax.Euler(), "Heun": diffrax.Heun(), "Bosh3": diffrax.Bosh3()}


def end(terms, solver, steps, t0=0.0, t1=1.0, **options):
    options = {"adjoint": diffrax.DirectAdjoint(), "max_steps": 64} | options
    solve = jax.jit(
        lambda dt0: diffrax.diffeqsolve(terms, solver, t0, t1, dt0, Y0, **options).ys[-1]
    )
    return solve((t1 - t0) / steps)


@pytest.mark.parametrize("name", BASES)
def test_a_zero_correction_is_the_base_bit_for_bit(name):
    zero = Hypersolver(BASES[name], lambda t, y, f, h, args: jnp.zeros_like(y))
    np.testing.assert_array_equal(end(PENDULUM, zero, 7), end(PENDULUM, BASES[name], 7))


@pytest.mark.parametrize(("name", "order"), [("Euler", 1), ("Heun", 2)])
def test_a_bounded_correction_keeps_the_order(name, order):
    solver = Hypersolver(BASES[name], lambda t, y, f, h, args: jnp.cos(y) + f)
    exact = end(PENDULUM, diffrax.Dopri8(), 50)
    errors = [np.linalg.norm(end(PENDULUM, solver, n) - exact) for n in (8, 16, 32, 64)]
    slope = np.polyfit(np.log([8, 16, 32, 64]), np.log(errors), 1)[0]
    assert abs(slope + order) < 0.15


@pytest.mark.parametrize("backward", [False, True])
def test_the_exact_correction_of_a_linear_equation_is_exact(backward):
    """y' = -y: R = (exp(-h) - 1 + h)/h^2 y for Euler; h < 0 in a solve that runs backward."""
    solver = Hypersolver(
        diffrax.Euler(), lambda t, y, f, h, args: -f * (jnp.exp(-h) - 1 + h) / h**2
    )
    t0, t1 = (1.0, 0.0) if backward else (0.0, 1.0)
    np.testing.assert_allclose(end(DECAY, solver, 3, t0, t1), Y0 * np.exp(t0 - t1), rtol=1e-13)


def test_the_residual_is_what_the_step_leaves_out():
    solver = Hypersolver(diffrax.Euler(), lambda t, y, f, h, args: y)
    h = 0.3
    found = solver.residual(DECAY, jnp.array(0.2), jnp.array(0.2 + h), Y0, tolerance=1e-11)
    np.testing.assert_allclose(found, Y0 * (np.exp(-h) - 1 + h) / h**2, rtol=1e-8)


def test_time_is_that_of_the_equation():
    """The correction of y' = t is h^2/2, whatever t; one that reads t must see the true one."""
    terms = diffrax.ODETerm(lambda t, y, args: jnp.full_like(y, t))
    solver = Hypersolver(diffrax.Euler(), lambda t, y, f, h, args: 0.5 + 0 * f + (t - f))
    np.testing.assert_allclose(end(terms, solver, 4, 2.0, 1.0), Y0 - 1.5, rtol=1e-14)


def test_evaluations_are_those_of_the_base_and_gradients_go_through_the_correction():
    def solve(weight, adjoint):
        solver = Hypersolver(diffrax.Heun(), lambda t, y, f, h, args: weight * f)
        return diffrax.diffeqsolve(
            PENDULUM, solver, 0.0, 1.0, 0.25, Y0, adjoint=adjoint, max_steps=8
        )

    weight = jnp.array([0.3, -0.2])
    assert int(solve(weight, DiscreteAdjoint()).stats["nfe"]) == 8
    total = lambda weight, adjoint: jnp.sum(solve(weight, adjoint).ys ** 2)
    ours = jax.grad(total)(weight, DiscreteAdjoint())
    np.testing.assert_allclose(ours, jax.grad(total)(weight, diffrax.DirectAdjoint()), rtol=1e-12)


class Field(eqx.Module):
    weight: jax.Array

    def __call__(self, t, y, args):
        return self.weight * y


def test_a_field_that_has_changed_warns():
    field = Field(jnp.array(-1.0))
    solver = Hypersolver(
        diffrax.Euler(), lambda t, y, f, h, args: 0 * y, trained_for=fingerprint(field)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        solver.check_field(field)
        solver.check_field(diffrax.ODETerm(field))
        model = nde.NeuralODE(
            field, solver=solver, stepsize_controller=diffrax.ConstantStepSize(), dt0=0.5
        )
        model(jnp.array([0.0, 1.0]), Y0)
    with pytest.warns(UserWarning, match="parameters have changed"):
        solver.check_field(Field(jnp.array(-1.1)))
    changed = eqx.tree_at(lambda m: m.vector_field.weight, model, jnp.array(-1.1))
    with pytest.warns(UserWarning, match="parameters have changed"):
        changed(jnp.array([0.0, 1.0]), Y0)


@pytest.mark.parametrize(
    ("base", "correction", "words"),
    [
        (diffrax.Kvaerno3(), jnp.sin, ["`base`", "explicit"]),
        (diffrax.Euler, jnp.sin, ["`base`", "diffrax.Euler()"]),
        (diffrax.Euler(), 3.0, ["`correction` is 3.0"]),
    ],
)
def test_bad_parts_are_refused(base, correction, words):
    with pytest.raises(ValueError, match=mentions(words)):
        Hypersolver(base, correction)
