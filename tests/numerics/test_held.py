"""Vector fields with cotangents that are computed once: the same numbers, and less work."""

import functools

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nde.solvers.adjoint.stepper import holding
from nde.solvers.lanes.held import Held
from nde.solvers.methods import explicit_rk


def lorenz(t, y, p):
    x, z = y["x"], y["z"]
    return {
        "x": jnp.stack([p[0] * (x[1] - x[0]), x[0] * (p[1] - z) - x[1]]),
        "z": x[0] * x[1] - p[2] * z + 0 * jnp.abs(x[0]),
    }


def step(field, y, p):
    tableau, term = diffrax.Tsit5.tableau, diffrax.ODETerm(field)
    at = (jnp.asarray(0.0), jnp.asarray(0.05), jnp.asarray(0.05))
    ks, y_last, _ = explicit_rk.stages(tableau, term, *at, y, p, 6)
    y1 = explicit_rk.solution(tableau, y, ks, y_last)
    return jnp.sum(jnp.sin(y1["x"])) + y1["z"] ** 2


LANES = 64
Y = {"x": jnp.linspace(-1.0, 2.0, 2 * LANES).reshape(LANES, 2), "z": jnp.linspace(0.0, 3.0, LANES)}
P = jnp.outer(jnp.linspace(0.9, 1.1, LANES), jnp.array([10.0, 28.0, 8 / 3]))
FIELDS = (lorenz, Held(lorenz))
PLAIN, HELD = (
    jax.jit(jax.vmap(jax.grad(functools.partial(step, field), (0, 1)))) for field in FIELDS
)


def test_a_held_field_has_the_same_gradient_whatever_stands_in_other_lanes():
    plain, held = PLAIN(Y, P), HELD(Y, P)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-14), held, plain)
    for odd in (jnp.nan, jnp.inf):
        spoiled = Y | {"z": Y["z"].at[0].set(odd)}
        off, _ = HELD(spoiled, P)
        np.testing.assert_array_equal(off["x"][1:], held[0]["x"][1:])
        assert not np.isfinite(off["x"][0]).any()


def test_tangents_and_tangents_of_gradients_go_through():
    y, p = jax.tree.map(lambda x: x[3], (Y, P))
    for derivative in (jax.jacfwd, jax.hessian):
        plain, held = (derivative(lambda y, f=f: step(f, y, p))(y) for f in FIELDS)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12), held, plain)


def test_the_transpose_of_a_step_reads_less():
    plain, held = (fn.lower(Y, P).compile().cost_analysis()["flops"] for fn in (PLAIN, HELD))
    assert held < 0.5 * plain


def test_only_fields_of_ordinary_terms_are_held():
    ode, control = diffrax.ODETerm(lorenz), diffrax.ControlTerm(lorenz, lambda t0, t1: t1 - t0)
    held = holding(diffrax.MultiTerm(ode, control))
    assert type(held.terms[0].vector_field) is Held
    assert held.terms[1].vector_field is lorenz


@pytest.mark.parametrize("uses, branches", [(1, False), (5, True)])
def test_a_field_that_uses_its_state_once_has_no_branch(uses, branches):
    field = Held(lambda t, y, args: sum(jnp.sin(i * y) for i in range(uses)))
    pull = jax.jit(jax.grad(lambda y: jnp.sum(field(0.0, y, None) ** 2)))
    text = pull.lower(jnp.ones((30,))).compile().as_text()
    assert (" conditional(" in text) == branches
