"""What every adjoint's `loop` does around its own forward and backward passes.

diffrax calls `adjoint.loop(...)` once, with everything prepared; see `diffrax.AbstractAdjoint`. Here the
input is checked, the solve traced and run, and the result put into diffrax's final state.
"""

import dataclasses
import functools as ft
from collections.abc import Callable
from typing import Any

import diffrax
import equinox as eqx
import jax
from jaxtyping import Array

from nde.solvers.adjoint import checks
from nde.solvers.adjoint.forward import ForwardCarry
from nde.solvers.adjoint.solve import AbstractSolve
from nde.solvers.adjoint.state import begin, finish
from nde.solvers.adjoint.stepper import AbstractStepper
from nde.solvers.adjoint.traced import Start, Traced, trace
from nde.solvers.estimates.estimates import Estimates, judge_for, reduced
from nde.solvers.inputs import check_count, check_tolerances

Options = dict[str, Any]  # the keyword arguments of `loop`
_CLIPPING = ("dtmin", "dtmax")  # of a controller: lengths of steps themselves


def check(options: Options) -> set[str]:
    """Refuses what no adjoint could solve; returns the names of the effects of the vector fields."""
    if options["max_steps"] is not None:
        check_count("max_steps", options["max_steps"])
    y0 = options["init_state"].y
    if None in jax.tree.leaves(y0, is_leaf=lambda x: x is None) and not jax.tree.leaves(y0):
        raise ValueError(
            f"`y0` is {y0!r}, which holds no array: there is nothing to solve. Give the state as an "
            "array, or as a pytree of arrays."
        )
    check_tolerances(options["stepsize_controller"], y0)
    solver, terms, args = options["solver"], options["terms"], options["args"]
    checks.check_mesh(y0, args)
    checks.check_noise(options["terms"], options["stepsize_controller"])
    return checks.check_fields(solver, terms, options["t0"], options["t1"], y0, args)


def lacking(options: Options, effects: set[str]) -> str | None:
    """What the lane-aware loop does not have, if it was asked for."""
    if any("NamedAxis" in name for name in effects):
        return "a vector field with a collective over a mapped axis"
    if any("Ordered" in name for name in effects):
        return "a vector field with an ordered callback"
    if options["event"] is not None:
        return "`event`"
    if options["saveat"].dense:
        return "`SaveAt(dense=True)`"
    if type(options["progress_meter"]) is not diffrax.NoProgressMeter:
        return "`progress_meter`"
    return None


def stopped(tree: Any, controller: diffrax.AbstractStepSizeController) -> Any:
    """A solver, or the controller itself, without the derivative of the controller's arrays.

    A step may read its tolerances: an implicit one iterates to them, estimates are in units of them.
    Were they not stopped before, an adjoint would take them for what it has a derivative of.
    """
    theirs = {id(x) for x in jax.tree.leaves(controller)}
    shared = lambda x: eqx.is_inexact_array(x) and id(x) in theirs
    return jax.tree.map(lambda x: jax.lax.stop_gradient(x) if shared(x) else x, tree)


@ft.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _without_derivative(x: Array, name: str) -> Array:
    return x


@_without_derivative.defjvp
def _refuse(name, primals, tangents):
    raise ValueError(
        f"A derivative with respect to `{name}` of the step size controller was asked for, but there is "
        "none: the lengths of steps carry no gradient. Wrap it in `jax.lax.stop_gradient`."
    )


def refusing(controller: Any) -> Any:
    """The controller, whose tolerances and coefficients have no derivative: never a silent zero."""
    is_pid = lambda x: isinstance(x, diffrax.PIDController)

    def refused(pid: Any) -> Any:
        if not is_pid(pid):
            return pid
        fields = {f.name: getattr(pid, f.name) for f in dataclasses.fields(pid)}
        arrays = [n for n, x in fields.items() if eqx.is_inexact_array(x) and n not in _CLIPPING]
        if not arrays:
            return pid
        new = [_without_derivative(fields[name], name) for name in arrays]
        return eqx.tree_at(lambda pid: [getattr(pid, name) for name in arrays], pid, new)

    return jax.tree.map(refused, controller, is_leaf=is_pid)


def solve_with(
    name: str,
    options: Options,
    stepper: AbstractStepper,
    make: Callable[[Traced, Start], AbstractSolve],
    estimates: Estimates | None,
) -> tuple[Any, dict[str, Array], ForwardCarry]:
    """Solves; returns diffrax's final state, the statistics, and the last state of the loop."""
    saveat, init_state, dt0 = options["saveat"], options["init_state"], options["dt0"]
    t0, t1, args = options["t0"], options["t1"], options["args"]
    checks.check_options(name, options["max_steps"], saveat)
    start = begin(stepper, saveat, t1, init_state, options["passed_solver_state"])
    start = checks.stop_bad_start(start, dt0, stepper.terms, options["throw"])
    fresh_jumps = init_state.made_jump is not False
    controller = options["stepsize_controller"]
    judge = None
    if estimates is not None:
        checks.check_estimates(options["solver"])
        still = stopped(controller, controller)
        judge = judge_for(options["solver"], still, options["terms"], estimates.scaled)
    traced = trace(stepper, refusing(controller), saveat, init_state, start, fresh_jumps, judge)
    out = make(traced, start).solve(traced.pool.consts, start)
    final = finish(stepper, saveat, args, t0, t1, init_state, traced, out)
    stats = evaluations(traced, judge is not None, out)
    if estimates is not None and out.judged is not None:
        stats |= reduced(estimates, out.judged, out.accepted)
    return final, stats, out


def evaluations(traced: Traced, judged: bool, out: ForwardCarry) -> dict[str, Array]:
    """`nfe`, the evaluations of the vector field, of a solver that declares what its steps take."""
    assert traced.stepper is not None
    declared = traced.stepper.declared()
    if declared is None:
        return {}
    inside = any(save.at_time is not None for save in traced.saves)
    with_error = not traced.uniform or judged or inside
    each = declared.evaluations_with_error if with_error else declared.evaluations
    attempts = out.accepted + out.rejected
    return {"nfe": declared.at_start + each * attempts + declared.after_jump * out.restarts}
