r"""The solver's own error and stiffness estimates, as differentiable numbers.

Over an accepted step of length h from y0 to y1, with embedded error e and stages k_i at the states g_i,

    E = rms(e / (atol + rtol max(|y0|, |y1|)))               scaled: at most 1 where a step is accepted
    E = rms(e)                                               raw
    S = rms(k_last - k_prev) / (h rms(g_last - g_prev)) / s*  if the last two stages share a time

where k includes the factor h, so S estimates |df/dy| (of the drift, in an SDE), and s* is the real
stability limit of the method: h S = 1 is where its steps become unstable. Nothing is evaluated that
the step has not evaluated already.

    error estimate        sum_j E_j h_j        (`reduce="sum"`; or the mean, or the maximum, over steps)
    stiffness estimate    sum_j S_j

The steps themselves carry no gradient: h is a constant, the scale is not. At e = 0 the value is 0 with
gradient 0, and so it is where k_last - k_prev or g_last - g_prev is within the rounding of a stage (in
single precision that is so in steps that are short for the accuracy of the method; in slightly longer
ones S is right to a few per cent, and its gradient to some twenty).

Reference:  Opening the Blackbox: Accelerating Neural Differential Equations by Regularizing Internal
            Solver Heuristics (2021) | arXiv:2105.03918
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import optimistix
from jaxtyping import Array, Float, PyTree

from nde.solvers import trees
from nde.solvers.inputs import tolerances
from nde.solvers.integrals import riding, state_of
from nde.solvers.methods.declared import declared_by

_ROUNDINGS = 32  # of a stage: a difference that is larger is known to a few per cent


@dataclasses.dataclass(frozen=True)
class Estimates:
    """Which estimates of a solve an adjoint puts into `sol.stats`, as differentiable numbers.

    `stats["error_estimate"]`, for any solver with an error estimate, and `stats["stiffness_estimate"]`,
    for `diffrax.Tsit5`, `Dopri5`, `Dopri8` and `SOSRI2`: one number per trajectory, over its accepted
    steps. See the module for the equations.

    Args:
        scaled: Whether errors are in units of the controller's tolerances; raw where it has none.
        reduce: `"sum"` of E h and of S; `"mean"`, the same over the number of steps; or `"max"`.
        series: Whether `stats["error_steps"]` (E) and `stats["stiffness_steps"]` (S) are there too,
            shape (max_steps,), with `stats["step_lengths"]` (h); zero where there was no step.

    Raises:
        ValueError: for an unknown `reduce`, and, at a solve, for a solver without error estimate.
    """

    scaled: bool = True
    reduce: Literal["sum", "mean", "max"] = "sum"
    series: bool = False

    def __post_init__(self) -> None:
        if self.reduce not in ("sum", "mean", "max"):
            raise ValueError(
                f'`reduce` is {self.reduce!r}; it must be "sum", "mean" or "max" over the steps.'
            )


class Judged(NamedTuple):
    """The estimates of one step, or of all, row by row; among cotangents an entry is None where nothing
    depends on it."""

    error: Array  # E
    stiffness: Array | None  # S; None for a solver without it
    length: Array  # h, positive


class Judge(NamedTuple):
    """Turns what a step leaves behind into its estimates."""

    rtol: Any  # None: raw
    atol: Any
    stage_difference: Sequence[float] | None  # g_last - g_prev, in weights of the stages
    limit: float
    integrals: int  # beside the state, see `nde.solvers.integrals`: not judged

    def in_units(self, error: PyTree, y0: PyTree, y1: PyTree) -> PyTree[Array]:
        """The error of a step from y0 to y1 in units of the tolerances, if there are any."""
        error, y0, y1 = (state_of(x, self.integrals) for x in (error, y0, y1))
        if self.rtol is None:
            return error
        in_units = functools.partial(_in_units, jnp.asarray(self.rtol), jnp.asarray(self.atol))
        return jax.tree.map(in_units, error, y0, y1)

    def __call__(
        self, t0: Array, t1: Array, y0: PyTree[Array], error: PyTree, ks: Sequence[PyTree] | None
    ) -> Judged:
        """The estimates of the step from t0 to t1: `error` is in units, `ks` are its stages times h."""
        length = jax.lax.stop_gradient(jnp.abs(t1 - t0))
        stiffness = None
        if self.stage_difference is not None and ks is not None:
            y0, *ks = (state_of(x, self.integrals) for x in (y0, *ks))
            stiffness = _quotient(self.stage_difference, length, y0, ks) / self.limit
        return Judged(_rms(error), stiffness, length)


def judge_for(
    solver: diffrax.AbstractSolver,
    controller: diffrax.AbstractStepSizeController,
    terms: PyTree[diffrax.AbstractTerm],
    scaled: bool,
) -> Judge:
    """The judge of a solver's steps, with the tolerances of the controller."""
    rtol, atol = tolerances(controller) if scaled else (None, None)
    declared = declared_by(solver)
    if declared is None:
        return Judge(rtol, atol, None, 1.0, riding(terms))
    weights, limit = declared.stage_difference, declared.stability_limit
    return Judge(rtol, atol, weights, limit, riding(terms))


def stages(dense_info: dict[str, PyTree[Array]]) -> list[PyTree[Array]] | None:
    """The stages of a step, from the dense output of a solver that keeps them there; else None."""
    if "k" not in dense_info:
        return None
    count = jax.tree.leaves(dense_info["k"])[0].shape[0]
    return [jax.tree.map(lambda k, i=i: k[i], dense_info["k"]) for i in range(count)]


def reduced(how: Estimates, judged: Judged, steps: Array) -> dict[str, Float[Array, "..."]]:
    """The statistics, from rows of estimates (steps first) and the number of accepted steps."""
    lengths = jax.lax.stop_gradient(judged.length)
    each = {"error": judged.error * lengths, "stiffness": judged.stiffness}
    out = {}
    for name, rows in each.items():
        if rows is None:
            continue
        total = jnp.max(rows, axis=0) if how.reduce == "max" else jnp.sum(rows, axis=0)
        if how.reduce == "mean":
            total = total / jnp.maximum(steps, 1).astype(total.dtype)
        out[f"{name}_estimate"] = total
    if how.series:
        out |= {"error_steps": judged.error, "step_lengths": lengths}
        if judged.stiffness is not None:
            out["stiffness_steps"] = judged.stiffness
    return out


# XLA on a CPU recomputes a cheap value in every stage that uses it, unless it comes from a division (or
# from a selection or product behind one): so both derivatives end in one.
@jax.custom_jvp
def _in_units(rtol: Array, atol: Array, error: Array, y0: Array, y1: Array) -> Array:
    """The error in units of the tolerances."""
    return error / _unit(rtol, atol, y0, y1)


@_in_units.defjvp
def _in_units_jvp(primals, tangents):
    rtol, atol, error, y0, y1 = primals
    *_, error_dot, y0_dot, y1_dot = tangents
    unit = _unit(rtol, atol, y0, y1)
    unit = jnp.where(unit > 0, unit, 1)
    out, later = error / unit, jnp.abs(y1) > jnp.abs(y0)
    slope = rtol.astype(out.dtype) * out
    slope0 = jnp.where(later, 0, slope * jnp.sign(y0)) / unit
    slope1 = jnp.where(later, slope * jnp.sign(y1), 0) / unit
    return out, error_dot / unit - finite(slope0) * y0_dot - finite(slope1) * y1_dot


def _unit(rtol: Array, atol: Array, y0: Array, y1: Array) -> Array:
    return atol.astype(y0.dtype) + jnp.maximum(jnp.abs(y0), jnp.abs(y1)) * rtol.astype(y0.dtype)


@jax.custom_jvp
def _rms(tree: PyTree[Array]) -> Array:
    """The root mean square over all entries; its gradient is 0 where it is 0 or not finite, as in a
    step that is not accepted."""
    return optimistix.rms_norm(tree)


@_rms.defjvp
def _rms_jvp(primals, tangents):
    (tree,), (tree_dot,) = primals, tangents
    out, count = _rms(tree), sum(x.size for x in jax.tree.leaves(tree))
    fine = (out > 0) & jnp.isfinite(out)
    size = count * jnp.where(fine, out, 1)
    dots = jax.tree.map(
        lambda x, x_dot: jnp.vdot(jnp.where(fine, finite(x) / size, 0), x_dot), tree, tree_dot
    )
    return out, functools.reduce(jnp.add, jax.tree.leaves(dots))


def finite(x: Array) -> Array:
    """`x`, with zeros for entries that are nan or infinite."""
    return jnp.where(jnp.isfinite(x), x, 0)


def _quotient(
    weights: Sequence[float], length: Array, y0: PyTree[Array], ks: Sequence[PyTree]
) -> Array:
    """rms(k_last - k_prev) / (h rms(g_last - g_prev)); the differences of the g are sums of k."""
    apart = _rms(trees.combine(weights, ks))
    moved = _rms(trees.subtract(ks[-1], ks[-2]))
    # Both are small differences, of k and of states: below that they are rounding.
    k, y = (jax.lax.stop_gradient(_rms(x)) for x in (ks[-1], y0))
    eps = (float(jnp.finfo(x.dtype).eps) for x in jax.tree.leaves(ks[-1]))
    least = _ROUNDINGS * max(eps, default=0.0)
    known = (moved > least * k) & (apart > least * jnp.maximum(y, k * float(np.abs(weights).sum())))
    known &= length > 0  # diffrax steps on where a lane has ended
    below = jnp.where(known, length.astype(apart.dtype) * apart, 1)
    return jnp.where(known, moved / below, 0)
