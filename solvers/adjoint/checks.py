"""Bad input to a solve, told apart before the first step.

Inside `diffeqsolve` the numbers are traced even in an eager call. So there are two kinds of check: what
shapes, types and options show (an exception while tracing), and what only the numbers show (an error at
run time if `throw=True`, else a result code in that lane; either way the lane takes no step).
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import diffrax
import equinox as eqx
import jax
import jax.core
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from nde.solvers.adjoint.noise import covered
from nde.solvers.adjoint.traced import Start, code
from nde.solvers.brownian import BrownianGrid
from nde.solvers.inputs import FINER_TIMES, FINITE_TIMES, check_rate_type, check_rates
from nde.solvers.integrals import riding, without_integral
from nde.solvers.lanes.primitives import largest
from nde.solvers.reversible.symplectic import AbstractSymplecticSolver


def check_options(name: str, max_steps: int | None, saveat: diffrax.SaveAt) -> None:
    """What an adjoint of ours needs whatever the numbers are."""
    if max_steps is None:
        raise ValueError(
            f"`max_steps=None` was given, but `{name}` stores steps and must know how many there can "
            "be. Pass a bound, for example `max_steps=100_000`, or use `adjoint=diffrax.ForwardMode()`."
        )
    for sub in jax.tree.leaves(saveat.subs, is_leaf=lambda x: isinstance(x, diffrax.SubSaveAt)):
        if sub.ts is not None and jnp.ndim(sub.ts) != 1:
            raise ValueError(
                f"`SaveAt(ts=...)` has shape {jnp.shape(sub.ts)}; one solve takes one series of times, "
                "shape (times,). Use `jax.vmap` over the batch."
            )


def check_estimates(solver: diffrax.AbstractSolver) -> None:
    """Only a solver that adapts its steps has an error estimate."""
    if not isinstance(solver, diffrax.AbstractAdaptiveSolver):
        raise ValueError(
            f"`estimates` were asked for, but {type(solver).__name__} has no error estimate. Use a solver "
            f"that has one, such as diffrax.Tsit5(), or diffrax.HalfSolver({type(solver).__name__}())."
        )


def check_noise(
    terms: PyTree[diffrax.AbstractTerm], controller: diffrax.AbstractStepSizeController
) -> None:
    """Noise that stands on a grid cannot follow steps that leave it."""
    is_grid = lambda x: isinstance(x, BrownianGrid)
    on_grid = any(is_grid(x) for x in jax.tree.leaves(terms, is_leaf=is_grid))
    if on_grid and isinstance(controller, diffrax.AbstractAdaptiveStepSizeController):
        raise ValueError(
            f"`BrownianGrid` with `stepsize_controller={type(controller).__name__}(...)`: adaptive steps "
            "leave the grid. Use `BrownianInterval(t0, t1, shape, key)`, or `ConstantStepSize()`."
        )


def check_mesh(y0: PyTree[Array], args: Any) -> None:
    """The loops do not say which of their arrays differ between devices; none of diffrax does."""
    for x in jax.tree.leaves((y0, args)):
        kind = getattr(jax.typeof(x), "manual_axis_type", None) if eqx.is_array(x) else None
        if getattr(kind, "varying", ()):
            raise ValueError(
                "A solve of `nde` stands in `jax.shard_map` with `check_vma=True`, which its loops cannot "
                "answer (nor can those of diffrax). Pass `jax.shard_map(..., check_vma=False)`."
            )


def check_fields(
    solver: diffrax.AbstractSolver,
    terms: PyTree[diffrax.AbstractTerm],
    t0: Array,
    t1: Array,
    y0: PyTree[Array],
    args: Any,
) -> set[str]:
    """What the terms give for a state: rates of its shape, floating, and real where it is real. Returns
    the names of what they do besides."""
    for _ in range(riding(terms)):
        terms, y0 = without_integral(terms), y0[0]
    if isinstance(terms, diffrax.MultiTerm):
        parts = [(term, y0, y0) for term in terms.terms]
    elif issubclass(type(solver), AbstractSymplecticSolver | diffrax.SemiImplicitEuler):
        parts = zip(terms, y0, y0[::-1], strict=True)  # each half moves by the other
    else:
        parts = [(terms, y0, y0)]
    effects: set[str] = set()
    for part, moved, by in parts:
        term = getattr(part, "term", None)  # diffrax wraps what it was given
        if isinstance(term, diffrax.ODETerm):
            rates, found = _traced(term.vector_field, t0, by, args)
            check_rates(rates, moved)
            effects |= found
        elif isinstance(term, diffrax.ControlTerm):
            effects |= _check_products(term, t0, t1, moved, by, args)
    return effects


def _traced(fn: Callable[..., Any], *args: Any) -> tuple[Any, set[str]]:
    """The shapes of what a function returns, and the names of its effects."""
    jaxpr, shapes, static = eqx.filter_make_jaxpr(fn)(*args)
    return eqx.combine(shapes, static), {type(effect).__name__ for effect in jaxpr.effects}


def _check_products(term: diffrax.ControlTerm, t0, t1, moved, by, args) -> set[str]:
    """The products of a vector field, or of a diffusion, with the increment of its control."""
    control: Any = term.control
    is_noise = isinstance(term.control, diffrax.AbstractBrownianPath)
    increment: Any = control.shape if is_noise else eqx.filter_eval_shape(term.contr, t0, t1)
    field, effects = _traced(term.vf, t0, by, args)
    with jax.numpy_dtype_promotion("standard"):
        products = eqx.filter_eval_shape(term.prod, field, increment)
    for rate, state in zip(jax.tree.leaves(products), jax.tree.leaves(moved), strict=True):
        check_rate_type("The vector field times its control", rate.dtype, state.dtype)
    return effects


class _Fault(NamedTuple):
    """Something that may be wrong with the numbers of one lane."""

    holds: Array
    result: Any  # what stands in `sol.result` if `throw=False`
    message: str


def _faults(start: Start, dt0: Array | None, terms: PyTree) -> list[_Fault]:
    """The first that holds is reported."""
    t0, t1, tnext = start.tprev, start.t1, start.tnext
    some = lambda test, tree: functools.reduce(jnp.logical_or, (jnp.any(test(x)) for x in tree))
    infinite = diffrax.RESULTS.nonfinite
    return [
        _Fault(
            ~(jnp.isfinite(t0) & jnp.isfinite(t1)),
            infinite,
            f"`t0` or `t1` is nan or inf. {FINITE_TIMES}",
        ),
        _Fault(
            some(lambda x: ~jnp.isfinite(x), [t0, *jax.tree.leaves(start.y)]),
            infinite,
            "`y0` is not finite: it contains nan or inf. Look for the leaf with "
            "`jax.tree.map(lambda x: jnp.isfinite(x).all(), y0)`.",
        ),
        _Fault(
            some(jnp.isnan, [t0, *start.ts]),
            infinite,
            "`SaveAt(ts=...)` contains nan; every index of `ts` must hold a finite time. Look for it "
            "with `jnp.isnan(ts)`.",
        ),
        _Fault(
            ~jnp.isfinite(tnext if dt0 is None else dt0),
            infinite,
            "`dt0` is nan or inf; it must be finite. Pass a number, or `dt0=None` with an adaptive "
            "controller.",
        ),
        _Fault(
            (tnext <= t0) & (t0 < t1),
            diffrax.RESULTS.dt_min_reached,
            "`dt0` is zero, or too small for the precision of the time: `t0 + dt0 == t0`. The smallest "
            f"usable step is about eps * |t0|. {FINER_TIMES}",
        ),
        *(
            _Fault(
                ~covers,
                infinite,
                "The `BrownianInterval` does not cover the solve: `t0` or `t1` is outside its interval. "
                "Give it the interval of the solve, in increasing order.",
            )
            for _, covers in covered(terms, t0, t1)
        ),
    ]


def stop_bad_start(start: Start, dt0: Array | None, terms: PyTree, throw: bool) -> Start:
    """Stops a solve that cannot start: an error if `throw`, else a result code."""
    faults = _faults(start, dt0, terms)
    first, result = jnp.asarray(len(faults)), start.result
    for i, fault in reversed(list(enumerate(faults))):
        first = jnp.where(fault.holds, i, first)
        result = jnp.where(fault.holds, code(fault.result), result)
    if throw:
        messages = [fault.message for fault in faults]
        # A batch reports the largest number of its lanes, so a good lane must have the smallest.
        is_bad = first < len(faults)
        first = largest(jnp.where(is_bad, first, 0))
        start = start._replace(t1=eqx.branched_error_if(start.t1, is_bad, first, messages))
    return start._replace(result=result)
