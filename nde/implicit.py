r"""Layers that solve: fixed points, steady states, minima, and their gradients.

    z* = f(z*, c),      dz*/dc = (I - df/dz)^-1 df/dc                    (`fixed_point`)
    0 = g(y*, c),       dy*/dc = -(dg/dy)^-1 dg/dc                       (`steady_state` of y' = g)
    x* = argmin F,      the same with g = dF/dx, or with f the projected gradient step   (`argmin`)

The solve itself is not differentiated: the pullback of v solves u = v + u df/dz without forming a matrix,
and gives u df/dc, so memory does not grow with the iterations, and it does not matter how z* was found.
Cheaper or simpler gradients, as objects:

    Implicit()       the above, by GMRES
    JacobianFree()   u = v: one pullback, biased, mostly in a direction that descends
    Phantom(k, b)    pullback through k steps z <- (1 - b) z + b f(z) that begin at z*
    Unrolled(k)      z_k of z <- f(z), pulled back step by step: memory grows with k

In code:    f -> function(z, args), F -> function(x, args); `args`, and whatever `function` holds, is c
Not for:    maps without df/dz, or with an eigenvalue 1 of it (a line of equilibria): I - df/dz is singular.
Reference:  Deep Equilibrium Models (2019) | arXiv:1909.01377
            JFB: Jacobian-Free Backpropagation for Implicit Networks (2021) | arXiv:2103.12803
            On Training Implicit Models (2021) | arXiv:2111.05177 (phantom)
            Efficient and Modular Implicit Differentiation (2021) | arXiv:2105.15183

A loose tolerance of the solve biases the gradient by as much.
"""

import importlib
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.flatten_util
import jax.numpy as jnp
import lineax
import optimistix
from jaxtyping import Array, Bool, Float, PyTree

from nde.solvers.inputs import check_count, is_traced

__all__ = [
    "Equilibrium",
    "Implicit",
    "JacobianFree",
    "Phantom",
    "Unrolled",
    "argmin",
    "fixed_point",
    "project_simplex",
    "quadratic_program",
    "steady_state",
]


class Implicit(eqx.Module):
    """The gradient of the implicit function theorem.

    Args:
        linear_solver: A `lineax` solver; None is GMRES with a tolerance that fits the dtype.
    """

    linear_solver: lineax.AbstractLinearSolver | None = None


class JacobianFree(eqx.Module):
    """The gradient with the inverse left out."""


class Phantom(eqx.Module):
    """The gradient through a few damped steps at the fixed point.

    Args:
        steps: Their number.
        damping: b in z <- (1 - b) z + b f(z).
    """

    steps: int = eqx.field(default=5, static=True)
    damping: float = eqx.field(default=0.5, static=True)

    def __check_init__(self):
        check_count("steps", self.steps)
        if not 0 < self.damping <= 1:
            raise ValueError(f"`damping` is {self.damping}; it is above 0 and at most 1.")


class Unrolled(eqx.Module):
    """No solve: some steps z <- f(z), and the gradient through all of them.

    Args:
        steps: Their number.
    """

    steps: int = eqx.field(static=True)

    def __check_init__(self):
        check_count("steps", self.steps)


Gradient = Implicit | JacobianFree | Phantom | Unrolled


class Equilibrium(eqx.Module):
    """What was solved for.

    Args:
        value: The point, shaped like the guess.
        converged: Whether it is one: with `Unrolled`, whether it is finite.
        stats: `residual`, the largest entry by which the equation is missed; `iterations`;
            `spectral_radius` of df/dz (`fixed_point`, `argmin` with `project`), above 1 where f does
            not contract; `growth`, the largest real part of an eigenvalue of dg/dy (`steady_state`),
            positive where the steady state is unstable.
    """

    value: PyTree[Float[Array, "..."]]
    converged: Bool[Array, ""]
    stats: dict[str, Array]


def fixed_point(
    function: Callable,
    z0: PyTree[Float[Array, "..."]],
    args: PyTree[Any] = None,
    *,
    solver: optimistix.AbstractFixedPointSolver | optimistix.AbstractRootFinder | None = None,
    gradient: Gradient = Implicit(),
    max_steps: int = 256,
    throw: bool = True,
) -> Equilibrium:
    """z with z = function(z, args), differentiable by `args` and by what `function` holds.

    Args:
        function: `function(z, args) -> z`. The same z must give the same value: no new dropout mask.
        z0: Where to begin; it has no gradient.
        args: Passed to `function`: the input of a layer.
        solver: An `optimistix` solver. None iterates z <- f(z), which converges where f contracts;
            `optimistix.Newton(rtol=1e-6, atol=1e-6)` needs no contraction.
        gradient: How to differentiate.
        max_steps: Largest number of iterations.
        throw: Whether to raise where nothing was found. If not, look at `.converged`.

    Raises:
        ValueError: for a function that does not keep the shape of z.
        RuntimeError: with `throw`, if nothing was found, with the spectral radius.

    Example: a deep equilibrium layer.
        >>> class Layer(eqx.Module):
        ...     cell: nde.fields.MLPField  # with `context`: cell(t, z, x)
        ...     def __call__(self, x):
        ...         f = lambda z, x: self.cell(0.0, z, x)
        ...         return nde.implicit.fixed_point(f, jnp.zeros(64), x).value
    """
    check_count("max_steps", max_steps)
    z0 = jax.tree.map(jnp.asarray, z0)
    _check_shapes(function, z0, args)
    fixed = eqx.filter_closure_convert(function, z0, args)
    if isinstance(gradient, Unrolled):
        step = lambda z, _: (fixed(z, args), None)
        value, _ = jax.lax.scan(step, z0, length=gradient.steps)
        steps, converged = jnp.asarray(gradient.steps), _all_finite(value)
    else:
        tolerance = _tolerance(z0)
        solver = optimistix.FixedPointIteration(tolerance, tolerance) if solver is None else solver
        inputs = (fixed, args) if isinstance(gradient, Implicit) else _stopped((fixed, args))
        found = optimistix.fixed_point(
            inputs[0],
            solver,
            _stopped(z0),
            inputs[1],
            max_steps=max_steps,
            throw=False,
            adjoint=_adjoint(gradient, z0),
        )
        value = _refined(gradient, fixed, found.value, args)
        steps = found.stats["num_steps"]
        converged = (found.result == optimistix.RESULTS.successful) & _all_finite(value)
    stats = _fixed_point_stats(*_stopped((fixed, value, args))) | {"iterations": steps}
    return _checked(Equilibrium(value, converged, stats), throw, _no_fixed_point)


def steady_state(
    model: Any,
    y0: PyTree[Float[Array, "..."]],
    args: PyTree[Any] = None,
    *,
    horizon: float,
    t: float = 0.0,
    solver: optimistix.AbstractRootFinder | None = None,
    gradient: Implicit = Implicit(lineax.AutoLinearSolver(well_posed=None)),
    max_steps: int = 64,
    throw: bool = True,
) -> Equilibrium:
    """The steady state that a model reaches from `y0`, with the gradient of the infinitely long solve.

    A short solve ends in the basin of one steady state, Newton's method finds it, and the implicit
    function theorem gives its gradient, at a cost that does not depend on how long the approach takes.

    Args:
        model: A model with `vector_field(t, y, args)` and `model(ts, y0, args)`, such as
            `nde.NeuralODE` (without `augment`) or `nde.HybridODE`.
        y0: Where the short solve begins. It has no gradient: a steady state does not depend on it.
        args: Passed to the vector field.
        horizon: Length of the short solve: long enough to come near.
        t: The time at which the field is looked at.
        solver: An `optimistix` root finder; None is Newton's method.
        gradient: How its linear system is solved. The default forms the Jacobian, which for small
            systems is fastest; `Implicit()` does not.
        max_steps: Largest number of iterations.
        throw: Whether to raise where nothing was found, or an unstable steady state, which no long
            solve reaches. If not, look at `.converged` and at `.stats["growth"]`.

    Raises:
        ValueError: for a horizon that is not positive.
        RuntimeError: with `throw`, if no stable steady state was found.
    """
    if not horizon > 0:
        raise ValueError(f"`horizon` is {horizon}; it is the positive length of the short solve.")
    if getattr(model, "augment", 0):
        raise ValueError(
            "`model` has `augment`, whose channels have no steady state in the output."
        )
    y0 = jax.tree.map(jnp.asarray, y0)
    now = jnp.asarray(t, jax.tree.leaves(y0)[0].dtype)
    still = lambda tree: _stopped(tree)
    near = still(model)(jnp.stack([now, now + horizon]), still(y0), still(args))
    near = still(jax.tree.map(lambda y: y[-1], near))
    field = eqx.filter_closure_convert(lambda y, args: model.vector_field(now, y, args), near, args)
    found, residual = _root(field, near, args, solver, gradient, max_steps)
    stats = {
        "residual": residual,
        "iterations": found.stats["num_steps"],
        "growth": _growth(*still((field, found.value, args))),
    }
    found_one = (found.result == optimistix.RESULTS.successful) & _all_finite(found.value)
    return _checked(Equilibrium(found.value, found_one, stats), throw, _no_steady_state)


def argmin(
    function: Callable,
    x0: PyTree[Float[Array, "..."]],
    args: PyTree[Any] = None,
    *,
    project: Callable | None = None,
    solver: optimistix.AbstractMinimiser | None = None,
    gradient: Implicit = Implicit(lineax.AutoLinearSolver(well_posed=None)),
    max_steps: int = 4096,
    throw: bool = True,
) -> Equilibrium:
    """The x that minimizes function(x, args), differentiable by `args` and by what `function` holds.

    Args:
        function: `function(x, args) -> scalar`, twice differentiable.
        x0: Where to begin; it has no gradient.
        args: Passed to `function`.
        project: `project(x) -> x`, onto a convex set to which x is confined: `project_simplex`, or
            `lambda x: jnp.maximum(x, 0)`. Then x is the fixed point of projected gradient steps of
            length 1/L, with L the largest curvature at `x0`.
        solver: An `optimistix` minimizer, without `project`; None is BFGS. Newton's method for the
            gradient ends what it begins.
        gradient: How the linear system of the gradient is solved.
        max_steps: Largest number of iterations.
        throw: Whether to raise where nothing was found.

    Raises:
        RuntimeError: with `throw`, if no minimum was found.
    """
    x0 = jax.tree.map(jnp.asarray, x0)
    objective = eqx.filter_closure_convert(function, x0, args)
    slope = eqx.filter_closure_convert(lambda x, args: jax.grad(objective)(x, args), x0, args)
    if project is not None:
        curvature = _radius(lambda x: slope(x, _stopped(args)), x0)[0]
        step = 1 / jnp.maximum(jax.lax.stop_gradient(curvature), jnp.finfo(curvature.dtype).tiny)

        def projected(x: Array, args: PyTree[Any]):
            return project(jax.tree.map(lambda x, d: x - step * d, x, slope(x, args)))

        return fixed_point(projected, x0, args, gradient=gradient, max_steps=max_steps, throw=throw)
    tolerance = _tolerance(x0) ** 0.5
    solver = optimistix.BFGS(tolerance, tolerance) if solver is None else solver
    near = optimistix.minimise(
        _stopped(objective), solver, _stopped(x0), _stopped(args), max_steps=max_steps, throw=False
    )
    found, residual = _root(slope, _stopped(near.value), args, None, gradient, 64)
    steps = near.stats["num_steps"] + found.stats["num_steps"]
    converged = (found.result == optimistix.RESULTS.successful) & _all_finite(found.value)
    stats = {"residual": residual, "iterations": steps}
    return _checked(Equilibrium(found.value, converged, stats), throw, _no_minimum)


def quadratic_program(
    Q: Float[Array, "n n"],
    q: Float[Array, " n"],
    A: Float[Array, "equalities n"],
    b: Float[Array, " equalities"],
    G: Float[Array, "inequalities n"],
    h: Float[Array, " inequalities"],
    *,
    smoothing: float = 1e-3,
    tolerance: float | None = None,
    throw: bool = True,
) -> Equilibrium:
    """The x that minimizes x Q x / 2 + q x where A x = b and G x <= h, by qpax (extra `qp`).

    Args:
        Q: Positive semidefinite, shape (n, n).
        q: Shape (n,).
        A: Shape (equalities, n), perhaps none; as `b`.
        b: Shape (equalities,).
        G: Shape (inequalities, n); as `h`.
        h: Shape (inequalities,).
        smoothing: The gradient is that of the barrier problem with this parameter: useful also where
            the active constraints are about to change, and exact as it goes to 0.
        tolerance: Of the conditions of optimality; None fits the dtype.
        throw: Whether to raise where nothing was found.

    Raises:
        ImportError: without qpax.
        RuntimeError: with `throw`, if it did not converge: the constraints may exclude each other.

    Reference:
        On the Differentiability of the Primal-Dual Interior-Point Method (2024) | arXiv:2406.11749
    """
    try:
        qpax: Any = importlib.import_module("qpax")
    except ImportError as error:
        raise ImportError("`quadratic_program` needs qpax: python -m pip install qpax.") from error
    problem = (Q, q, A, b, G, h)
    # 1e-6 in float64: closer to the boundary, its equations are too ill-conditioned.
    tolerance = float(jnp.finfo(q.dtype).eps) ** 0.375 if tolerance is None else tolerance
    # qpax multiplies integers by Booleans: strict promotion is for code of our own.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        *_, converged, iterations = qpax.solve_qp(*_stopped(problem), solver_tol=tolerance)
        x = qpax.solve_qp_primal(*problem, solver_tol=tolerance, target_kappa=smoothing)
    still = jax.lax.stop_gradient(x)
    violations = [jnp.abs(A @ still - b), jnp.maximum(G @ still - h, 0), jnp.zeros_like(q)]
    stats = {"residual": jnp.max(jnp.concatenate(violations)), "iterations": iterations}
    fine = (converged == 1) & _all_finite(x)
    return _checked(Equilibrium(x, fine, stats), throw, _no_feasible_point)


def project_simplex(x: Float[Array, " n"]) -> Float[Array, " n"]:
    """The nearest point with entries that are not negative and sum to 1.

    It is max(x - s, 0) with one shift s, that of the largest entries for which it is consistent.

    Reference:
        Efficient projections onto the l1-ball for learning in high dimensions (2008) |
        doi:10.1145/1390156.1390191
    """
    ordered = jnp.sort(x)[::-1]
    counts = jnp.arange(1, x.shape[0] + 1)
    shifts = (jnp.cumsum(ordered) - 1) / counts.astype(x.dtype)
    support = jnp.sum(ordered > shifts)
    return jnp.maximum(x - shifts[support - 1], 0)


def _root(function, y0, args, solver, gradient: Implicit, max_steps: int):
    """A root of function(y, args) near `y0`, and the largest entry by which it is missed."""
    tolerance = _tolerance(y0)
    solver = optimistix.Newton(tolerance, tolerance) if solver is None else solver
    found = optimistix.root_find(
        function, solver, y0, args, max_steps=max_steps, throw=False, adjoint=_adjoint(gradient, y0)
    )
    return found, _largest(_stopped(function)(*_stopped((found.value, args))))


def _adjoint(gradient: Gradient, z0: PyTree) -> optimistix.AbstractAdjoint:
    solver = gradient.linear_solver if isinstance(gradient, Implicit) else None
    if solver is None:
        tolerance = _tolerance(z0)
        solver = lineax.GMRES(rtol=tolerance, atol=tolerance, restart=40)
    return optimistix.ImplicitAdjoint(solver)


def _refined(gradient: Gradient, function: Callable, value: PyTree, args: PyTree) -> PyTree:
    """The value again, with the gradient that was asked for."""
    if isinstance(gradient, Implicit):
        return value
    steps, damping = 1, 1.0
    if isinstance(gradient, Phantom):
        steps, damping = gradient.steps, gradient.damping

    def step(z: PyTree[Array], _: Any):
        mix = lambda old, new: (1 - damping) * old + damping * new
        return jax.tree.map(mix, z, function(z, args)), None

    return jax.lax.scan(step, _stopped(value), length=steps)[0]


def _fixed_point_stats(function: Callable, value: PyTree, args: PyTree) -> dict[str, Array]:
    radius, image = _radius(lambda z: function(z, args), value)
    missed = jax.tree.map(jnp.subtract, image, value)
    return {"residual": _largest(missed), "spectral_radius": radius}


def _radius(function: Callable, z: PyTree, iterations: int = 20) -> tuple[Array, PyTree]:
    """The spectral radius of the derivative at z, by the growth of powers; and function(z).

    The mean over the second half of the iterations: a pair of complex eigenvalues makes it swing.
    """
    image, push = jax.linearize(function, z)
    flat, unravel = jax.flatten_util.ravel_pytree(z)
    start = jax.random.normal(jax.random.key(0), flat.shape, flat.dtype)

    def step(v: Array, _: Any):
        v = jax.flatten_util.ravel_pytree(push(unravel(v)))[0]
        size = jnp.linalg.norm(v)
        return v / jnp.where(size > 0, size, 1), size

    sizes = jax.lax.scan(step, start / jnp.linalg.norm(start), length=iterations)[1]
    return jnp.exp(jnp.mean(jnp.log(sizes[iterations // 2 :]))), image


def _growth(field: Callable, y: PyTree, args: PyTree) -> Float[Array, ""]:
    """The largest real part of an eigenvalue of the Jacobian at y; NaN where that is not finite."""
    flat, unravel = jax.flatten_util.ravel_pytree(y)
    rates = lambda flat: jax.flatten_util.ravel_pytree(field(unravel(flat), args))[0]
    jacobian = jax.jacfwd(rates)(flat)
    return jnp.max(jnp.real(jnp.linalg.eigvals(jacobian)))


def _stopped(tree: PyTree) -> PyTree:
    """Without a gradient."""
    arrays, rest = eqx.partition(tree, eqx.is_inexact_array)
    return eqx.combine(jax.lax.stop_gradient(arrays), rest)


def _tolerance(tree: PyTree) -> float:
    """2e-12 in float64, 6e-6 in float32."""
    return max(float(jnp.finfo(x.dtype).eps) for x in jax.tree.leaves(tree)) ** 0.75


def _largest(tree: PyTree) -> Float[Array, ""]:
    return jnp.max(jnp.stack([jnp.max(jnp.abs(x)) for x in jax.tree.leaves(tree)]))


def _all_finite(tree: PyTree) -> Bool[Array, ""]:
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(tree)]))


def _check_shapes(function: Callable, z0: PyTree, args: PyTree) -> None:
    image = eqx.filter_eval_shape(function, z0, args)
    shapes = [jax.tree.map(lambda x: (x.shape, str(x.dtype)), tree) for tree in (z0, image)]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"`function` takes z with shape and dtype {shapes[0]} and returns {shapes[1]}; a fixed "
            "point needs the same of both."
        )


def _checked(found: Equilibrium, throw: bool, say: Callable) -> Equilibrium:
    """Raise where nothing was found: with numbers where there are some."""
    fails = ~found.converged
    if "growth" in found.stats:
        fails = fails | ~(found.stats["growth"] < 0)
    if not throw:
        return found
    if is_traced(found):
        return eqx.error_if(found, fails, say({}))
    if bool(fails):
        raise RuntimeError(say({name: float(value) for name, value in found.stats.items()}))
    return found


def _no_fixed_point(stats: dict[str, float]) -> str:
    said = ""
    if stats:
        said = (
            f" after {stats['iterations']:.0f} iterations: residual {stats['residual']:.1e}, spectral "
            f"radius about {stats['spectral_radius']:.3g}"
        )
    return (
        f"No fixed point was found{said}. Iterating converges only below radius 1: use "
        "solver=optimistix.Newton(rtol=1e-6, atol=1e-6), a smaller initial weight, or the penalty "
        "nde.regularizers.equilibrium; close to 1, raise `max_steps`."
    )


def _no_steady_state(stats: dict[str, float]) -> str:
    if stats and stats["growth"] >= 0 and stats["residual"] < 1e-3:
        return (
            f"The steady state that was found is unstable: a disturbance grows at the rate "
            f"{stats['growth']:.3g}. It is a saddle or a source, and no long solve ends there. Start "
            "from another `y0`, or with throw=False take it as it is."
        )
    said = (
        f" after {stats['iterations']:.0f} iterations: residual {stats['residual']:.1e}"
        if stats
        else ""
    )
    return (
        f"No stable steady state was found{said}. Raise `horizon`, so that the solve ends closer to "
        "it; a limit cycle has none."
    )


def _no_minimum(stats: dict[str, float]) -> str:
    said = (
        f" after {stats['iterations']:.0f} iterations: slope {stats['residual']:.1e}"
        if stats
        else ""
    )
    return (
        f"No minimum was found{said}. The function may be unbounded below, or flat at its minimum: add "
        "a term such as 1e-6 |x|^2."
    )


def _no_feasible_point(stats: dict[str, float]) -> str:
    said = ""
    if stats:
        said = f" after {stats['iterations']:.0f} iterations: violated by {stats['residual']:.1e}"
    return (
        f"The quadratic program was not solved{said}. The constraints may exclude each other (it is "
        "infeasible), or Q may have a negative eigenvalue."
    )
