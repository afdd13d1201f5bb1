"""The solve of a model: one call of `diffrax.diffeqsolve`, and why it failed if it did."""

from typing import Any

import diffrax
import jax
from jaxtyping import PyTree

from nde.solvers import SolveError, diagnose
from nde.solvers.adjoint.traced import code
from nde.solvers.inputs import is_traced


def run(
    model: Any, terms: PyTree[diffrax.AbstractTerm], *, throw: bool, **options: Any
) -> diffrax.Solution:
    """`diffrax.diffeqsolve` with the solver and the adjoint of the model.

    With `throw`, a failure raises: `SolveError`, with what `nde.solvers.diagnose` finds, where there
    are numbers to look at; inside a transformation, the error of diffrax.
    """
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
            raise _why(model, terms, options, solution)
    return solution


def _why(model: Any, terms: PyTree, options: dict, solution: diffrax.Solution) -> SolveError:
    found = diagnose(terms, model.solver, **options)
    if found.cause is None:
        advice = "With adjoint=nde.solvers.DiscreteAdjoint() the same solve succeeds."
        message = f"{diffrax.RESULTS[solution.result]} {advice}"
        return SolveError(message, cause="unknown", advice=advice)
    known = {name: getattr(found, name) for name in ("cause", "t", "leaf", "steps", "advice")}
    return SolveError(found.message, **known)
