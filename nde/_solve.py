"""The one solve of every model: `diffrax.diffeqsolve`, an integral beside it, and why it failed.

A family of models gives the terms of its equation, the state and what is saved of it. Times and states
come in one floating type (`in_one_precision`), and rates keep it (`Rates`): a state that changed its
type from step to step would have no gradient.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, PyTree

from nde._model import AbstractModel
from nde.solvers import Hypersolver, SolveError, diagnose
from nde.solvers.adjoint.traced import code
from nde.solvers.inputs import check_tolerances, is_traced
from nde.solvers.integrals import ride_along


class Stepping(NamedTuple):
    """How the steps of a solve are chosen, where a model does not leave it to its fields."""

    stepsize_controller: diffrax.AbstractStepSizeController
    dt0: ArrayLike | None
    max_steps: int | None


class Rates(eqx.Module):
    """A field whose rates have the precision of the state, whatever its parameters have."""

    vector_field: Callable

    def __call__(self, t: ArrayLike, y: PyTree[Array], args: PyTree[Any]) -> PyTree[Array]:
        dy = self.vector_field(t, y, args)
        return jax.tree.map(lambda rate, state: jnp.asarray(rate, state.dtype), dy, y)


def in_one_precision(*trees: PyTree[Array]) -> Any:
    """The trees with all floating arrays in the highest precision of any: they meet in every step."""
    trees = jax.tree.map(jnp.asarray, trees)
    is_floating = lambda x: jnp.issubdtype(x.dtype, jnp.floating)
    types = [x.dtype for x in jax.tree.leaves(trees) if is_floating(x)]
    dtype = max(types, key=lambda d: jnp.finfo(d).bits)
    return jax.tree.map(lambda x: x.astype(dtype) if is_floating(x) else x, trees)


def solve(
    model: AbstractModel,
    terms: PyTree[diffrax.AbstractTerm],
    y0: PyTree[Array],
    *,
    t0: ArrayLike,
    t1: ArrayLike,
    saveat: PyTree[diffrax.SubSaveAt],
    args: PyTree[Any] = None,
    stepping: Stepping | None = None,
    integrand: Callable | None = None,
    noise: Callable | None = None,
    throw: bool = True,
) -> diffrax.Solution:
    """Solves the equation of `terms` from t0 to t1 with the numerics of the model.

    With `integrand(t, y, args)` its integral from t0 rides along, and whatever is saved is a pair: what
    `saveat` says of the state, and the integral. It takes no part in the choice of steps.
    `noise(t, y, args)` adds a stochastic integral to it, see `nde.solvers.ride_along`.

    With `throw`, a failure raises: `SolveError`, with what `nde.solvers.diagnose` finds, where there
    are numbers to look at; inside a transformation, the error of diffrax.
    """
    if stepping is None:
        stepping = Stepping(model.stepsize_controller, model.dt0, model.max_steps)
    check_tolerances(stepping.stepsize_controller, y0)
    if isinstance(model.solver, Hypersolver):
        model.solver.check_field(terms)
    if integrand is not None:
        terms, y0, controller = ride_along(
            terms, y0, stepping.stepsize_controller, integrand, t0=t0, args=args, noise=noise
        )
        stepping = stepping._replace(stepsize_controller=controller)
        is_sub = lambda x: isinstance(x, diffrax.SubSaveAt)
        both = lambda sub: dataclasses.replace(sub, fn=_Both(sub.fn))
        saveat = jax.tree.map(both, saveat, is_leaf=is_sub)
    options: dict[str, Any] = stepping._asdict() | {"t0": t0, "t1": t1, "y0": y0, "args": args}
    options["saveat"] = diffrax.SaveAt(subs=saveat)
    looks = throw and not is_traced(terms, options)
    # Products of reduced precision, a default of recent GPUs, look like a rough field.
    # pyright does not see the attributes that jax adds to its configuration.
    precision = jax.config.jax_default_matmul_precision  # pyright: ignore[reportAttributeAccessIssue]
    with jax.default_matmul_precision(precision or "highest"):
        solution = diffrax.diffeqsolve(
            terms, model.solver, adjoint=model.adjoint, throw=throw and not looks, **options
        )
        if not looks:
            return solution
        if is_traced(solution):  # the field closes over what is traced
            return solution.result.error_if(solution, ~diffrax.is_okay(solution.result))
        # 0 is success. The comparison with `diffrax.RESULTS.successful` is ten times slower.
        if int(code(solution.result)):
            raise _reason(model, terms, options, solution)
    return solution


class _Both(eqx.Module):
    """What is saved of a state, and the integral beside it."""

    of_state: Callable

    def __call__(self, t: Array, y: tuple[PyTree, PyTree], args: PyTree) -> tuple[PyTree, PyTree]:
        return self.of_state(t, y[0], args), y[1]


def _reason(
    model: AbstractModel, terms: PyTree, options: dict[str, Any], solution: diffrax.Solution
) -> SolveError:
    found = diagnose(terms, model.solver, **options)
    if found.cause is None:
        advice = "With adjoint=nde.solvers.DiscreteAdjoint() the same solve succeeds."
        message = f"{diffrax.RESULTS[solution.result]} {advice}"
        return SolveError(message, cause="unknown", advice=advice)
    known = {name: getattr(found, name) for name in ("cause", "t", "leaf", "steps", "advice")}
    return SolveError(found.message, **known)
