r"""Least squares through a solve, and what the data say about the parameters.

    minimize  S(theta) = |r(theta)|^2,        r_i = (y(t_i; theta) - y_i) / scale

by Levenberg-Marquardt (`optimistix`). Each step needs J = dr/dtheta, one tangent of the solve per
parameter: for equations with up to some twenty numbers, in place of thousands of gradient steps.

At the minimum, with independent errors of variance s^2 (in units of the scale) and n values,

    s^2 = S / (n - p),      C = s^2 (J^T J)^-1,      var f(theta) = grad f^T C grad f

to first order in the errors (Gauss-Newton, Laplace): of the parameters, of the prediction at a time, of
anything. Where the columns of J are nearly dependent, the data do not tell the parameters apart:

    VIF_k = (J^T J)_kk ((J^T J)^-1)_kk = 1 / (1 - cos^2),

cos the cosine between column k and the span of the others. A network beside the known equations that
explains what a parameter does shows here.

In code:    theta -> what trains, as in `nde.fit`; S -> cost; C -> covariance
Not for:    networks with more weights than data: J^T J is singular. Freeze them, or use `nde.fit`.
Reference:  Nonlinear Regression (1989) | doi:10.1002/0471725315
"""

import dataclasses
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.flatten_util
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import optimistix as optx
from jaxtyping import Array, ArrayLike, Float, PRNGKeyArray, PyTree

from nde._inputs import check_callable
from nde._model import AbstractModel
from nde._parameters import Frozen, random_effects
from nde._training.parameters import split
from nde.losses.trajectory import series
from nde.measured import Experiments, Measured

__all__ = [
    "Estimate",
    "least_squares",
    "measured_residuals",
    "profile",
    "relative_offset",
    "trajectory_residuals",
]

COLLINEAR = 50.0  # VIF of a cosine of .99
CONVERGED = 1e-3  # relative offset: the estimate is within a thousandth of its standard error


def trajectory_residuals(
    model: Any, data: PyTree[Array], scale: ArrayLike = 1.0
) -> Float[Array, "examples times ..."]:
    """(y(t_i) - y_i) / scale of an ODE model that starts at the first observation.

    Args:
        model: An ODE model: `model.solve(ts, y0, throw=False)`.
        data: (ts, ys) or (ts, ys, mask), as for `nde.losses.trajectory`; nan is a missing value.
        scale: Standard deviation of the errors, or what they are proportional to; any shape that
            broadcasts with `ys`.

    Returns:
        Zero where nothing was observed.
    """
    ts, ys, observed = series(data)
    predicted = jax.vmap(lambda ts, y0: model.solve(ts, y0, throw=False).ys)(ts, ys[:, 0])
    return jnp.where(observed, predicted - jnp.where(observed, ys, 0.0), 0.0) / scale


def measured_residuals(model: Measured, data: Experiments) -> list[Array]:
    """Of an `nde.Measured`: the signed roots of the deviances of what was measured, so that least squares
    is maximum likelihood, and the random effects in units of their spread, as their law asks.

    Args:
        model: Its errors are held, such as `Gaussian(0.1)`: what is left over says how large they were
            (with `noise=None`), and `nde.mixed_effects` finds it.
        data: `nde.measured.experiments`.

    Returns:
        A list of arrays; zero where nothing was observed.
    """
    is_frozen = lambda node: isinstance(node, Frozen)
    if not all(map(is_frozen, jax.tree.leaves(model.errors, is_leaf=is_frozen))):
        raise ValueError(
            f"`errors` is {model.errors}, with a parameter to be found, which least squares cannot: give "
            "a number, such as Gaussian(1.0), or use nde.losses.negative_log_likelihood."
        )
    observed = ~jnp.isnan(data.ys)
    means, _ = jax.vmap(model.means)(data)
    ys, means = jnp.where(observed, data.ys, 1.0), jnp.where(observed, means, 1.0)
    found = jnp.where(observed, model.errors.residual(ys, means), 0.0)
    return [found, *(effect.offsets for effect in random_effects(model))]


class Estimate(eqx.Module):
    """A model at the least squares, and what the data say about it.

    Args:
        model: The model.
        cost: S, the sum of the squared residuals.
        steps: Steps of the optimizer.
        values: Number n of observed values.
        theta: What was trained, as one vector of p entries: in the coordinates in which the parameters
            are stored (the logarithm of a `Positive`).
        names: Of its entries.
        covariance: C, shape (p, p).
        inflation: VIF of each entry, shape (p,).
    """

    model: Any
    cost: Float[Array, ""]
    steps: int = eqx.field(static=True)
    values: int = eqx.field(static=True)
    theta: Float[Array, " p"]
    names: list[str] = eqx.field(static=True)
    covariance: Float[Array, "p p"]
    inflation: Float[Array, " p"]
    frozen: Callable | None = eqx.field(static=True)

    def at(self, theta: Float[Array, " p"]) -> Any:
        """The model with other values of what was trained."""
        params, fixed, static = split(self.model, self.frozen)
        _, unravel = jax.flatten_util.ravel_pytree(params)
        return eqx.combine(unravel(theta), fixed, static)

    def of(self, function: Callable[[Any], PyTree[Array]]) -> tuple[PyTree[Array], PyTree[Array]]:
        """`function(model)`, any arrays, and its standard errors: `of(lambda m:
        m.physical_parameters())`, or the band of a prediction, `of(lambda m: m(ts, y0))`.
        """
        derived = lambda theta: function(forward(self.at(theta)))
        value, push = jax.linearize(derived, self.theta)
        roots = _root(self.covariance)  # C = roots roots^T
        moved = jax.vmap(push, in_axes=1, out_axes=-1)(roots)
        return value, jax.tree.map(lambda x: jnp.sqrt(jnp.sum(x**2, axis=-1)), moved)

    def samples(self, count: int, *, key: PRNGKeyArray) -> Float[Array, "count p"]:
        """Draws of theta from the normal law around the estimate, for `jax.vmap` over `at`."""
        draws = jax.random.normal(key, (count, self.theta.size), self.theta.dtype)
        return self.theta[None] + draws @ _root(self.covariance).T


def least_squares(
    model: Any,
    data: PyTree[Array],
    residuals: Callable = trajectory_residuals,
    *,
    frozen: Callable | None = None,
    noise: float | None = None,
    solver: Any = optx.LevenbergMarquardt(rtol=1e-6, atol=1e-8),
    max_steps: int = 256,
) -> Estimate:
    """Fits the parameters of a model by least squares.

    Args:
        model: A model, or a tuple or dict of models and arrays.
        data: What `residuals` takes.
        residuals: `residuals(model, data)`, any arrays: the errors in units of their standard deviation,
            or proportional to it. Zero where a value is missing.
        frozen: As in `nde.fit`.
        noise: Standard deviation of the residuals, if it is known (1 where they are in its units); None
            estimates it from what is left over.
        solver: An `optimistix` least-squares solver.
        max_steps: Largest number of its steps.

    Raises:
        ValueError: for residuals that are not finite at the start, or fewer values than parameters.
        RuntimeError: if the optimizer does not converge.

    Warns:
        UserWarning: where the data do not tell parameters apart; not with random effects.
    """
    check_callable("residuals", residuals, "(model, data)")
    params, fixed, static = split(model, frozen)
    flat = _Flat(params, fixed, static, residuals)
    theta = jax.flatten_util.ravel_pytree(params)[0]
    _check_residuals(np.asarray(_evaluated(flat, theta, data)), theta.size)
    found = optx.least_squares(flat, solver, theta, data, max_steps=max_steps, throw=False)
    left, jacobian = _linearized(flat, found.value, data)
    offset = relative_offset(left, jacobian)
    if found.result != optx.RESULTS.successful and not offset < CONVERGED:
        raise RuntimeError(
            f"Least squares did not converge in {int(found.stats['num_steps'])} steps (relative offset "
            f"{offset:.1e}, wanted {CONVERGED}): {optx.RESULTS[found.result]} Start closer, raise "
            "`max_steps`, or tighten the tolerances of the model: their error should be far below that "
            "of the data."
        )
    # A residual that no parameter moves, and that is zero, is a missing value.
    seen = int(jnp.sum(jnp.any(jacobian != 0, axis=1) | (left != 0)))
    cost = jnp.sum(left**2)
    variance = cost / max(seen - theta.size, 1) if noise is None else jnp.asarray(noise**2)
    inverse = _inverse(jacobian.T @ jacobian)
    inflation = jnp.sum(jacobian**2, axis=0) * jnp.diagonal(inverse)
    names = _names(params)
    if not random_effects(model):  # what the data do not tell from the center, their law does
        _warn_collinear(names, np.asarray(inflation), np.asarray(inverse))
    return Estimate(
        model=flat.model(found.value),
        cost=cost,
        steps=int(found.stats["num_steps"]),
        values=seen,
        theta=found.value,
        names=names,
        covariance=variance * inverse,
        inflation=inflation,
        frozen=frozen,
    )


def relative_offset(
    left: Float[Array, " values"], jacobian: Float[Array, "values p"]
) -> Float[Array, ""]:
    """How far the residuals are from orthogonal to what the parameters can change: 0 at a minimum.

    Reference:
        A relative offset orthogonality convergence criterion for nonlinear least squares (1981) |
        doi:10.1080/00401706.1981.10486268
    """
    along = jnp.linalg.norm(jnp.linalg.qr(jacobian)[0].T @ left)
    across = jnp.sqrt(jnp.maximum(jnp.sum(left**2) - along**2, 0.0))
    values, p = jacobian.shape
    scale = np.sqrt(max(values - p, 1) / p)
    return jnp.where(along > 0, scale * along / jnp.maximum(across, along * 1e-12), 0.0)


def profile(
    make_model: Callable[[float], Any],
    data: PyTree[Array],
    values: Sequence[float],
    residuals: Callable = trajectory_residuals,
    **options: Any,
) -> Float[np.ndarray, " values"]:
    """The least sum of squares for each value of one parameter, the others fitted anew.

    A confidence interval of level a is where the profile is below S + s^2 q, with q the a quantile of
    chi^2 with one degree of freedom (3.84 for 95 %).

    Args:
        make_model: `make_model(value)`: the model with the parameter held there, such as
            `lambda k: nde.HybridODE(known, None, {"k": Frozen(k), "d": Positive(1.0)})`.
        data: As in `least_squares`, like what follows.
        values: Of the parameter.
        residuals: As in `least_squares`.
        options: Of `least_squares`.

    Reference:
        Structural and practical identifiability analysis of partially observed dynamical models by
        exploiting the profile likelihood (2009) | doi:10.1093/bioinformatics/btp358
    """
    costs = [least_squares(make_model(v), data, residuals, **options).cost for v in values]
    return np.asarray(costs)


def forward(model: PyTree) -> PyTree:
    """The model with an adjoint that knows forward mode."""
    is_model = lambda x: isinstance(x, AbstractModel)

    def changed(node: Any) -> Any:
        return dataclasses.replace(node, adjoint=diffrax.ForwardMode()) if is_model(node) else node

    return jax.tree.map(changed, model, is_leaf=is_model)


class _Flat(eqx.Module):
    """Residuals as one vector, a function of one vector. A Module, and no closure: the second fit of the
    same shapes compiles nothing."""

    params: PyTree[Array]  # what is trained: the structure and the shapes count
    fixed: PyTree[Array]
    static: PyTree[Any]
    residuals: Callable = eqx.field(static=True)

    def model(self, theta: Float[Array, " p"]) -> Any:
        _, unravel = jax.flatten_util.ravel_pytree(self.params)
        return eqx.combine(unravel(theta), self.fixed, self.static)

    def __call__(self, theta: Float[Array, " p"], data: PyTree[Array]) -> Float[Array, " values"]:
        found = self.residuals(forward(self.model(theta)), data)
        return jnp.concatenate([jnp.ravel(x) for x in jax.tree.leaves(found)])


@eqx.filter_jit
def _evaluated(flat: _Flat, theta: Array, data: PyTree[Array]) -> Array:
    return flat(theta, data)


@eqx.filter_jit
def _linearized(flat: _Flat, theta: Array, data: PyTree[Array]) -> tuple[Array, Array]:
    value, push = jax.linearize(lambda theta: flat(theta, data), theta)
    return value, jax.vmap(push, out_axes=1)(jnp.eye(theta.size, dtype=theta.dtype))


def _inverse(matrix: Float[Array, "p p"]) -> Float[Array, "p p"]:
    """Of a positive semidefinite matrix, scaled to a unit diagonal first."""
    scale = jnp.sqrt(jnp.diagonal(matrix))
    scale = jnp.where(scale > 0, scale, 1.0)
    values, vectors = jnp.linalg.eigh(matrix / jnp.outer(scale, scale))
    # What the data do not determine is given a large variance, and not none as a pseudo-inverse would.
    values = jnp.maximum(values, jnp.finfo(values.dtype).eps * values.size)
    return (vectors / values[None]) @ vectors.T / jnp.outer(scale, scale)


def _root(covariance: Float[Array, "p p"]) -> Float[Array, "p p"]:
    values, vectors = jnp.linalg.eigh(covariance)
    return vectors * jnp.sqrt(jnp.maximum(values, 0.0))[None]


def _names(params: PyTree) -> list[str]:
    names = []
    for path, leaf in jtu.tree_leaves_with_path(params):
        name = jtu.keystr(path)
        names += [name + str(list(i)) for i in np.ndindex(leaf.shape)] if leaf.ndim else [name]
    return names


def _check_residuals(start: np.ndarray, parameters: int) -> None:
    if not np.isfinite(start).all():
        raise ValueError(
            f"`residuals` gives {int((~np.isfinite(start)).sum())} of {start.size} values that are not "
            "finite at the start: the solve fails there, or the data has gaps that it does not leave "
            "out."
        )
    if start.size < parameters:
        raise ValueError(
            f"`residuals` gives {start.size} values for {parameters} parameters; freeze some "
            "(`frozen`, nde.hybrid.Frozen), or use nde.fit."
        )


def _warn_collinear(
    names: list[str], inflation: Float[np.ndarray, " p"], inverse: Float[np.ndarray, "p p"]
) -> None:
    """Names the parameters that the data do not tell apart."""
    size = np.sqrt(np.diagonal(inverse))
    with np.errstate(all="ignore"):
        correlation = np.abs(inverse / np.outer(size, size)) - np.eye(len(names))
    worst = [k for k in np.argsort(-inflation) if not inflation[k] < COLLINEAR]
    if worst:
        said = [f"{names[k]} (with {names[int(np.nanargmax(correlation[k]))]})" for k in worst[:4]]
        warnings.warn(
            f"The data do not tell these parameters apart: {', '.join(said)}. Freeze one, keep a network "
            "small by a penalty, or give data in which they differ.",
            stacklevel=3,
        )
