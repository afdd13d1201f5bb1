r"""Regularizers of the dynamics: what makes a trained equation cheap to solve.

Each is called for one example in place of `model.solve`, and returns the solution and a penalty:

    solution, penalty = regularizer(model, ts, y0, args, key=key)
    loss = mse(solution.ys, ys) + coefficient * penalty                 (mean over the batch)

Options are bound with `functools.partial`, a coefficient that changes is any optax schedule, and
`nde.losses.trajectory(regularizer=..., coefficient=...)` does the sum. While training only: solve with
`model.solve` afterwards.

    name                   penalty                                              extra cost
    error_estimate         sum or mean of E h, or of E^2 (ERNODE)               no evaluation forward
    stiffness_estimate     sum, mean or maximum of S (SRNODE)                   no evaluation forward
    error_and_stiffness    the mean of E h + w S                                no evaluation forward
    local                  E h or S of one step, drawn at random                one step
    steer                  none: the end of the solve is drawn at random        none
    kinetic                int |f|^2 + |e^T df/dy|^2 dt (RNODE)                 1 F + 1 B per evaluation
    taylor                 int |d^K y / dt^K|^2 dt (TayNODE)                    about 2^K F per evaluation
    equilibrium            |e^T df/dz|^2 / dim at a fixed point z               1 B

E and S are those of `nde.solvers.Estimates`. They need `DiscreteAdjoint` or `ReversibleAdjoint`; the
others work with any adjoint, and all but the first three are for ODE models.

With `jax.vmap` over examples every trajectory has its own steps. For one step size for the whole
batch, as in the papers, give the batch as one state to a field that takes one (`nde.fields.Batched`).

Reference:  Opening the Blackbox (2021) | arXiv:2105.03918 (error, stiffness)
            Locally Regularized Neural Differential Equations (2023) | arXiv:2303.02262
            STEER: Simple Temporal Regularization for Neural ODEs (2020) | arXiv:2006.10711
            How to train your neural ODE (2020) | arXiv:2002.02798 (kinetic)
            Learning Differential Equations that are Easy to Solve (2020) | arXiv:2007.04504 (taylor)
            Stabilizing Equilibrium Models by Jacobian Regularization (2021) | arXiv:2106.14342
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from nde._initial_value import AbstractODE, checked, solve_from
from nde._inputs import check_key
from nde._solve import Rates
from nde.implicit import Equilibrium, fixed_point
from nde.solvers import DiscreteAdjoint, Estimates, WithEstimates
from nde.solvers.inputs import check_count, tolerances

__all__ = [
    "equilibrium",
    "error_and_stiffness",
    "error_estimate",
    "exponential_decay",
    "kinetic",
    "local",
    "steer",
    "stiffness_estimate",
    "taylor",
]

Penalized = tuple[diffrax.Solution, Float[Array, ""]]


def error_estimate(
    model: Any,
    *inputs: Any,
    key: PRNGKeyArray | None = None,
    reduce: Literal["sum", "mean", "max"] = "mean",
    squared: bool = False,
) -> Penalized:
    """ERNODE: the solver's own error estimate, E h over the accepted steps.

    Args:
        model: Any model with `.adjoint` and `.solve(*inputs, throw=...)`.
        inputs: What `model.solve` takes for one example: `ts, y0` and perhaps `args`.
        key: Not used: nothing is drawn.
        reduce: Over the steps. The paper writes the sum, its experiments mostly take the mean.
        squared: E^2 instead of E h.

    Raises:
        ValueError: for an adjoint without estimates, or a solver without error estimate.
    """
    del key
    solution = _solve(model, inputs, Estimates(reduce=reduce, series=squared))
    stats = solution.stats
    if not squared:
        return solution, stats["error_estimate"]
    squares, steps = stats["error_steps"] ** 2, stats["num_accepted_steps"]
    if reduce == "max":
        return solution, jnp.max(squares)
    total = jnp.sum(squares)
    return solution, total if reduce == "sum" else total / jnp.maximum(steps, 1).astype(total.dtype)


def stiffness_estimate(
    model: Any,
    *inputs: Any,
    key: PRNGKeyArray | None = None,
    reduce: Literal["sum", "mean", "max"] = "mean",
) -> Penalized:
    """SRNODE: the solver's own stiffness estimate S over the accepted steps.

    Arguments as in `error_estimate`, but `model.solver` is one of `diffrax.Tsit5`, `Dopri5`, `Dopri8`
    and, for a stochastic equation (SRNSDE), `nde.solvers.SOSRI2`.

    Raises:
        ValueError: for an adjoint or a solver without it.
    """
    del key
    solution = _solve(model, inputs, Estimates(reduce=reduce))
    return solution, _stiffness(model, solution)


def error_and_stiffness(
    model: Any,
    *inputs: Any,
    key: PRNGKeyArray | None = None,
    reduce: Literal["sum", "mean", "max"] = "mean",
    weight: float = 0.1,
) -> Penalized:
    """Both: E h + `weight` S over the accepted steps, arguments as in `error_estimate`."""
    del key
    solution = _solve(model, inputs, Estimates(reduce=reduce))
    return solution, solution.stats["error_estimate"] + weight * _stiffness(model, solution)


def local(
    model: AbstractODE,
    ts: Float[Array, " times"],
    y0: PyTree[Float[Array, "..."]],
    args: PyTree[Any] = None,
    *,
    key: PRNGKeyArray,
    of: Literal["error", "stiffness"] = "error",
    biased: bool = False,
) -> Penalized:
    """Local regularization: the estimate of one step of the solver, from a state on the trajectory.

    The state and the step carry no gradient, so the penalty says how rough the field is there, and
    costs one step whatever the adjoint. It is 0 where the solve failed or had no step to take.

    Args:
        model: An ODE model.
        ts: Times, shape (times,).
        y0: State at `ts[0]`.
        args: Passed to the vector field.
        key: Of the time that is drawn.
        of: Which estimate: E h, or S.
        biased: Whether to draw one of the solver's steps, so more often where they are small; keeps
            the states of all of them, `max_steps` at most. Otherwise the time is uniform on
            [ts[0], ts[-1]], and the step the one the controller would begin with there: with
            `dt0=None` a cautious one, whose small estimate asks for a large coefficient.

    Raises:
        ValueError: for a solver without that estimate, or `diffrax.StepTo` unless `biased`.
    """
    check_key(key)
    if not biased and isinstance(model.stepsize_controller, diffrax.StepTo):
        raise ValueError("`stepsize_controller` is StepTo, with times of its own; use biased=True.")
    ts, y0 = checked(model, ts, y0)
    draw = _drawn_step if biased else _drawn_time
    solution, t, t_end, y = draw(model, ts, y0, args, key)
    usable = diffrax.is_okay(solution.result) & (solution.stats["num_accepted_steps"] > 0)
    solver = WithEstimates(model.solver, *tolerances(model.stepsize_controller))
    direction = _direction(ts)
    terms = _forward(model, direction)
    s = direction * t
    s_end = direction * t_end
    if not biased:
        s_end = jnp.minimum(s_end, _first_step(model, solver, terms, s, s_end, y, args, direction))
    s, s_end, y = jax.lax.stop_gradient((s, jnp.where(usable, s_end, s), y))
    # One step of a solve, which leaves out lanes without a step: there the field may be undefined.
    step = diffrax.diffeqsolve(
        terms,
        solver,
        s,
        s_end,
        dt0=s_end - s,
        y0=y,
        args=args,
        saveat=diffrax.SaveAt(solver_state=True),
        adjoint=DiscreteAdjoint(),
        max_steps=1,
        throw=False,
    )
    state: Any = step.solver_state
    name = f"{of}_estimate"
    if name not in state.estimates:
        raise ValueError(
            f"{type(model.solver).__name__} has no {of} estimate; `of` is 'error', or 'stiffness' with "
            "solver=diffrax.Tsit5()."
        )
    return solution, state.estimates[name]


def steer(
    model: Any,
    ts: Float[Array, " times"],
    y0: PyTree[Float[Array, "..."]],
    args: PyTree[Any] = None,
    *,
    key: PRNGKeyArray,
    width: float | None = None,
) -> Penalized:
    """STEER: every time but the first is drawn at random around its place. No penalty: it is 0.

    Args:
        model: An ODE model.
        ts: Times, shape (times,).
        y0: State at `ts[0]`.
        args: Passed to the vector field.
        key: Of the times.
        width: A time is uniform within this distance of its place, in the unit of `ts`, but never
            leaves the half of the intervals beside it, so that the order stays. None: all of that.

    Returns:
        The solution, whose `.ys` stand for the states at `ts`, and 0.

    Raises:
        ValueError: for a width that is not positive, or fewer than two times.
    """
    check_key(key)
    if width is not None and not width > 0:
        raise ValueError(f"`width` is {width}; it must be positive, in the unit of `ts`.")
    ts, y0 = checked(model, ts, y0)
    if ts.shape[0] < 2:
        raise ValueError(
            f"`ts` has shape {ts.shape}; `steer` moves the second time and later ones."
        )
    half = jnp.abs(jnp.diff(ts)) / 2
    real = half > 0  # repeated last times are padding
    behind = jnp.where(jnp.append(real[1:], False), jnp.append(half[1:], 0), jnp.inf)
    reach = jnp.minimum(jnp.minimum(half, behind), jnp.inf if width is None else width)
    moved = ts[1:] + reach * jax.random.uniform(key, half.shape, ts.dtype, -1.0, 1.0)
    # Padding repeats the last time to the last bit: a copy of it might be rounded differently.
    sign = _direction(ts)
    times = sign * jnp.append(ts[:1], jnp.where(real, moved, ts[0]))
    solution = model.solve(sign * jax.lax.cummax(times), y0, args, throw=False)
    return solution, jnp.zeros((), ts.dtype)


def kinetic(
    model: AbstractODE,
    ts: Float[Array, " times"],
    y0: PyTree[Float[Array, "..."]],
    args: PyTree[Any] = None,
    *,
    key: PRNGKeyArray,
    energy: float = 1.0,
    jacobian: float = 1.0,
) -> Penalized:
    """RNODE: kinetic energy and Jacobian norm, int `energy` |f|^2 + `jacobian` |e^T df/dy|^2 dt.

    |.|^2 is the mean over the entries of the state; e is normal, drawn once per solve, so that the
    second term is the squared Frobenius norm of the Jacobian in expectation, over the entries.

    Args:
        model: An ODE model.
        ts: Times, shape (times,).
        y0: State at `ts[0]`.
        args: Passed to the vector field.
        key: Of e.
        energy: Weight of the kinetic energy.
        jacobian: Weight of the Jacobian norm.
    """
    check_key(key)
    ts, y0 = checked(model, ts, y0)
    leaves, tree = jax.tree.flatten(model.lift(ts[0], y0, args))
    keys = jax.random.split(key, len(leaves))
    noise = [jax.random.normal(k, x.shape, x.dtype) for k, x in zip(keys, leaves, strict=True)]
    noise = jax.tree.unflatten(tree, noise)

    integrand = _Kinetic(model.vector_field, _direction(ts), noise, energy, jacobian)
    return _integrated(model, ts, y0, args, integrand)


class _Kinetic(eqx.Module):
    """The integrand of `kinetic`. Like every integrand a Module, so that a call after the first is not
    compiled anew."""

    vector_field: Callable
    direction: Float[Array, ""]
    noise: PyTree[Float[Array, "..."]]
    energy: float
    jacobian: float

    def __call__(self, t: Array, y: PyTree[Array], args: PyTree[Any]) -> Float[Array, ""]:
        rate, pull = jax.vjp(lambda y: Rates(self.vector_field)(t, y, args), y)
        (product,) = pull(self.noise)
        terms = self.energy * _mean_square(rate) + self.jacobian * _mean_square(product)
        return self.direction * terms


def taylor(
    model: AbstractODE,
    ts: Float[Array, " times"],
    y0: PyTree[Float[Array, "..."]],
    args: PyTree[Any] = None,
    *,
    key: PRNGKeyArray | None = None,
    order: int = 3,
) -> Penalized:
    """TayNODE: int |d^K y / dt^K|^2 dt, the mean square of the K-th total derivative.

    Args:
        model: An ODE model.
        ts: Times, shape (times,).
        y0: State at `ts[0]`.
        args: Passed to the vector field.
        key: Not used: nothing is drawn.
        order: K >= 1: 2, 3 or 4 in practice. The field must be that often differentiable.

    Raises:
        ValueError: for an order below 1.
    """
    del key
    check_count("order", order, ", usually 2, 3 or 4")

    integrand = _Taylor(model.vector_field, _direction(ts), order)
    return _integrated(model, ts, y0, args, integrand)


class _Taylor(eqx.Module):
    """The integrand of `taylor`."""

    vector_field: Callable
    direction: Float[Array, ""]
    order: int = eqx.field(static=True)

    def __call__(self, t: Array, y: PyTree[Array], args: PyTree[Any]) -> Float[Array, ""]:
        flow = lambda t, y: (jnp.ones_like(t), Rates(self.vector_field)(t, y, args))
        derivative = flow
        for _ in range(self.order - 1):
            # Along a solution, d/dt of D(t, y) is its derivative in the direction (1, f).
            derivative = lambda t, y, D=derivative: jax.jvp(D, (t, y), flow(t, y))[1]
        return self.direction * _mean_square(derivative(t, y)[1])


def equilibrium(
    function: Callable,
    z0: PyTree[Float[Array, "..."]],
    args: PyTree[Any] = None,
    *,
    key: PRNGKeyArray,
    **options: Any,
) -> tuple[Equilibrium, Float[Array, ""]]:
    """Called in place of `nde.implicit.fixed_point`: |e^T df/dz|^2 / dim at the fixed point.

    With e normal that is the squared Frobenius norm of the Jacobian over the entries of z, in
    expectation: where it is small, the iteration contracts and takes few steps. Larger models apply it
    on a random part of the training steps.

    Args:
        function: `function(z, args) -> z`.
        z0: Where to begin.
        args: Passed to `function`.
        key: Of e.
        options: Of `fixed_point`.

    Returns:
        The fixed point and the penalty.
    """
    check_key(key)
    solution = fixed_point(function, z0, args, **options)
    _, pull = jax.vjp(lambda z: function(z, args), solution.value)
    leaves, tree = jax.tree.flatten(solution.value)
    keys = jax.random.split(key, len(leaves))
    noise = [jax.random.normal(k, x.shape, x.dtype) for k, x in zip(keys, leaves, strict=True)]
    (product,) = pull(jax.tree.unflatten(tree, noise))
    return solution, _mean_square(product)


def exponential_decay(start: float, end: float, steps: int) -> Callable[[Array], Array]:
    """A coefficient that falls exponentially from `start` to `end` over `steps` training steps.

    Raises:
        ValueError: unless both are positive and `steps` is at least 1.
    """
    if not (start > 0 and end > 0 and steps >= 1):
        raise ValueError(
            f"exponential_decay({start}, {end}, {steps}) needs positive coefficients and steps >= 1."
        )

    def coefficient(step: Array) -> Array:
        return start * (end / start) ** jnp.minimum(jnp.asarray(step, float) / steps, 1.0)

    return coefficient


def _solve(model: Any, inputs: tuple, estimates: Estimates) -> diffrax.Solution:
    """The model's own solve, with estimates in its statistics."""
    adjoint = model.adjoint
    if not hasattr(adjoint, "estimates"):
        raise ValueError(
            f"`adjoint` is {type(adjoint).__name__}(), which gives no estimates; use "
            "adjoint=nde.solvers.DiscreteAdjoint(), or the regularizer `local`."
        )
    adjoint = dataclasses.replace(adjoint, estimates=estimates)
    model = eqx.tree_at(lambda m: m.adjoint, model, adjoint, is_leaf=lambda x: x is adjoint)
    return model.solve(*inputs, throw=False)


def _stiffness(model: Any, solution: diffrax.Solution) -> Float[Array, ""]:
    if "stiffness_estimate" not in solution.stats:
        raise ValueError(
            f"{type(model.solver).__name__} has no stiffness estimate; use solver=diffrax.Tsit5(), or "
            "nde.solvers.SOSRI2() for a stochastic equation with diagonal noise."
        )
    return solution.stats["stiffness_estimate"]


def _integrated(
    model: AbstractODE,
    ts: Float[Array, " times"],
    y0: PyTree[Array],
    args: PyTree[Any],
    integrand: Callable,
) -> Penalized:
    """The solution, and the integral to its end; `integrand` is in the direction of the solve, so that
    the integral of a failed one is inf either way."""
    solution: Any = model.solve(ts, y0, args, integrand=integrand, throw=False)
    return eqx.tree_at(lambda s: s.ys, solution, solution.ys[0]), solution.ys[1][-1]


def _mean_square(tree: PyTree[Array]) -> Float[Array, ""]:
    leaves = jax.tree.leaves(tree)
    total = sum((jnp.sum(x**2) for x in leaves[1:]), start=jnp.sum(leaves[0] ** 2))
    return total / sum(x.size for x in leaves)


def _drawn_step(model: AbstractODE, ts, y0, args, key):
    """The solution, and the start, end and first state of one of its steps, each as likely."""
    also = diffrax.SubSaveAt(t0=True, steps=True)
    solution: Any = solve_from(model, ts, y0, args, throw=False, also=also)
    steps = jnp.maximum(solution.stats["num_accepted_steps"], 1)
    j = jax.random.randint(key, (), 0, steps)
    (_, times), (_, states) = solution.ts, solution.ys
    return _first(solution), times[j], times[j + 1], jax.tree.map(lambda x: x[j], states)


def _drawn_time(model: AbstractODE, ts, y0, args, key):
    """The solution, a time between its ends, each as likely, the end, and the state there."""
    t = ts[0] + (ts[-1] - ts[0]) * jax.random.uniform(key, (), ts.dtype)
    also = diffrax.SubSaveAt(ts=t[None])
    solution: Any = solve_from(model, ts, y0, args, throw=False, also=also)
    return _first(solution), t, ts[-1], jax.tree.map(lambda x: x[0], solution.ys[1])


def _first(solution: Any) -> diffrax.Solution:
    """A solution that was saved twice, without the second."""
    return eqx.tree_at(lambda s: (s.ts, s.ys), solution, (solution.ts[0], solution.ys[0]))


def _direction(ts: Float[Array, " times"]) -> Float[Array, ""]:
    """Of time: 1, or -1 where `ts` decreases."""
    return jnp.where(ts[-1] < ts[0], -1.0, 1.0)


def _forward(model: AbstractODE, direction: Array) -> diffrax.ODETerm:
    """The equation in s = direction t, which increases: the only time that controllers know."""
    rates = Rates(model.vector_field)

    def vector_field(s, y, args):
        return jax.tree.map(lambda dy: direction * dy, rates(direction * s, y, args))

    return diffrax.ODETerm(vector_field)


def _first_step(model: AbstractODE, solver, terms, s, s_end, y, args, direction) -> Array:
    """Where the controller would end a first step at (s, y)."""
    dt0 = None if model.dt0 is None else (direction * model.dt0).astype(s.dtype)
    controller, order = model.stepsize_controller.wrap(direction), solver.error_order(terms)
    return jnp.asarray(controller.init(terms, s, s_end, y, dt0, args, solver.func, order)[0])
