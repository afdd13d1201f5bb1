"""Test problems: a field, a start, an end and, where it is known, the solution.

Fields take `args`, a dictionary of parameters; `params` holds values for it. Where `exact` is None
the reference is Dopri8 with small steps, see `reference`. Separable systems hold a pair of fields,
(dq/dt of p, dp/dt of q), and y = (q, p).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import diffrax
import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree


class Problem(NamedTuple):
    """dy/dt = vector_field(t, y, params), y(0) = y0, on [0, t1]."""

    vector_field: Any
    y0: PyTree[Array]
    t1: float
    params: PyTree[Array]
    exact: Callable[[Array], PyTree[Array]] | None
    tags: frozenset[str]


def terms(problem: Problem) -> PyTree[diffrax.AbstractTerm]:
    """The terms of the problem: a pair for a separable system."""
    return jax.tree.map(diffrax.ODETerm, problem.vector_field)


def reference(problem: Problem, ts: Array) -> PyTree[Array]:
    """The solution at the times `ts`, from either end of the interval, to about 1e-13."""
    if problem.exact is not None and ts[0] == 0.0:
        return jax.vmap(problem.exact)(ts)
    field = problem.vector_field
    if "separable" in problem.tags:
        dq, dp = problem.vector_field
        field = lambda t, y, params: (dq(t, y[1], params), dp(t, y[0], params))
    sol = diffrax.diffeqsolve(
        diffrax.ODETerm(field),
        diffrax.Dopri8(),
        ts[0],
        ts[-1],
        (ts[-1] - ts[0]) / 1000,
        problem.y0,
        problem.params,
        saveat=diffrax.SaveAt(ts=ts),
    )
    return sol.ys


def _forced(t, y, p):
    return jnp.cos(p["omega"] * t) * y - p["cubic"] * y**3 + jnp.sin(y)


def _network(t, y, p):
    out = jnp.tanh(p["W"] @ jnp.concatenate([y["a"], y["b"]]) + jnp.sin(t) * p["b"])
    return {"a": out[:3], "b": out[3:]}


def _dissipative(t, y, p):
    return -p["a"] * y + jnp.sin(t) + jnp.tanh(y) / 2


def _decay(t, y, p):
    return -p["a"] * y


def _rotation(t, y, p):
    return p["omega"] * jnp.stack([y[1], -y[0]])


def _velocity(t, p, params):
    return p


def _gravity(t, q, params):
    return -params["mass"] * q / jnp.sum(q**2) ** 1.5


def _swing(t, q, params):
    return -(1 + params["drive"] * jnp.sin(2 * t)) * jnp.sin(q)


def _parameters(**values) -> dict[str, Array]:
    return {name: jnp.asarray(value) for name, value in values.items()}


_key = jax.random.key(0)

PROBLEMS = {
    "forced": Problem(
        _forced,
        jnp.linspace(0.4, 1.2, 5),
        2.0,
        _parameters(omega=3.0, cubic=0.3),
        None,
        frozenset({"nonautonomous"}),
    ),
    "network": Problem(
        _network,
        {"a": jnp.array([0.3, -0.5, 0.8]), "b": jnp.array([1.0, 0.2])},
        1.0,
        _parameters(W=jax.random.normal(_key, (5, 5)) / 3, b=jnp.linspace(-1.0, 1.0, 5)),
        None,
        frozenset({"nonautonomous", "pytree"}),
    ),
    "decay": Problem(
        _decay,
        jnp.array([1.0, -0.5]),
        2.0,
        _parameters(a=1.0),
        lambda t: jnp.exp(-t) * jnp.array([1.0, -0.5]),
        frozenset({"dissipative"}),
    ),
    "strong dissipation": Problem(
        _dissipative, jnp.array(1.0), 5.0, _parameters(a=5.0), None, frozenset({"dissipative"})
    ),
    "weak dissipation": Problem(
        _dissipative, jnp.array(1.0), 20.0, _parameters(a=1.0), None, frozenset({"dissipative"})
    ),
    "rotation": Problem(
        _rotation,
        jnp.array([1.0, 0.0]),
        2.0,
        _parameters(omega=2.0),
        lambda t: jnp.array([jnp.cos(2 * t), -jnp.sin(2 * t)]),
        frozenset({"oscillatory"}),
    ),
    "kepler": Problem(
        (_velocity, _gravity),
        (jnp.array([0.7, 0.0]), jnp.array([0.0, (1.3 / 0.7) ** 0.5])),
        3.0,
        _parameters(mass=1.0),
        None,
        frozenset({"oscillatory", "separable"}),
    ),
    "driven pendulum": Problem(
        (_velocity, _swing),
        (jnp.array([1.0]), jnp.array([0.2])),
        3.0,
        _parameters(drive=0.3),
        None,
        frozenset({"oscillatory", "nonautonomous", "separable"}),
    ),
}
