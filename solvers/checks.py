"""Bad input to a solve, told apart before the first step.

Inside `diffeqsolve` the numbers are traced even in an eager call. So there are two kinds of check: what
shapes, types and options show (an exception while tracing), and what only the numbers show (an error at
run time if `throw=True`, else a result code in that lane; either way the lane takes no step).
"""

from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from nde.solvers.program import Start, code


def check_options(
    name: str, max_steps: int | None, saveat: diffrax.SaveAt, y0: PyTree[Array]
) -> None:
    """What an adjoint of ours needs whatever the numbers are."""
    if max_steps is None:
        raise ValueError(
            f"`max_steps=None` was given, but `{name}` stores steps and must know how many there can "
            "be. Pass a bound, for example `max_steps=100_000`, or use `adjoint=diffrax.ForwardMode()`."
        )
    for path, leaf in jax.tree_util.tree_leaves_with_path(y0):
        if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
            raise ValueError(
                f"`y0{jax.tree_util.keystr(path)}` is complex ({leaf.dtype}); `{name}` needs real "
                "states. Split it into two real arrays: `y0 = (y.real, y.imag)`."
            )
    for sub in jax.tree.leaves(saveat.subs, is_leaf=lambda x: isinstance(x, diffrax.SubSaveAt)):
        if sub.ts is not None and jnp.ndim(sub.ts) != 1:
            raise ValueError(
                f"`SaveAt(ts=...)` has shape {jnp.shape(sub.ts)}; one solve takes one series of times, "
                "shape (times,). Use `jax.vmap` over the batch."
            )


def check_max_steps(max_steps: int | None) -> None:
    if max_steps is not None and max_steps < 1:
        raise ValueError(f"`max_steps` is {max_steps}; it must be >= 1.")


def check_tolerances(controller: diffrax.AbstractStepSizeController, y0: PyTree[Array]) -> None:
    """Tolerances that are plain numbers, against what the dtype of the state can resolve."""
    if not isinstance(controller, diffrax.AbstractAdaptiveStepSizeController):
        return
    tolerances = {"rtol": controller.rtol, "atol": controller.atol}
    known = {k: float(v) for k, v in tolerances.items() if isinstance(v, (int, float, np.ndarray))}
    for name, value in known.items():
        if not value >= 0:
            raise ValueError(
                f"`{name}` is {value}; a tolerance must be positive, for example 1e-6."
            )
    if len(known) == 2 and max(known.values()) == 0:
        raise ValueError(
            "`rtol` and `atol` are both 0, which no step can meet; at least one must be positive, for "
            "example `PIDController(rtol=1e-6, atol=1e-9)`."
        )
    eps = max((float(jnp.finfo(x.dtype).eps) for x in jax.tree.leaves(y0)), default=0.0)
    if known.get("rtol", 1.0) < eps and known.get("atol", 1.0) < eps:
        raise ValueError(
            f"`rtol` is {known['rtol']:.1e}, below what the state can resolve: the smallest usable value "
            f'is {10 * eps:.1e}. For tighter ones use float64: `jax.config.update("jax_enable_x64", True)`.'
        )


def check_vector_field(
    terms: PyTree[diffrax.AbstractTerm], t0: Array, y0: PyTree[Array], args: Any
):
    """The field of an ODE must return what the state is made of."""
    term = getattr(terms, "term", None)  # diffrax wraps what it was given
    if not isinstance(term, diffrax.ODETerm):
        return
    field = term.vector_field
    try:
        out = eqx.filter_eval_shape(field, t0, y0, args)
    except (TypeError, ValueError):
        raise  # the user's own error is the clearest
    if jax.tree.structure(out) != jax.tree.structure(y0):
        raise ValueError(
            f"`vector_field` returned the structure {jax.tree.structure(out)} for a state of structure "
            f"{jax.tree.structure(y0)}. Return one derivative for each part of `y`."
        )
    for dy, y in zip(jax.tree.leaves(out), jax.tree.leaves(y0), strict=True):
        if jnp.shape(dy) != jnp.shape(y):
            raise ValueError(
                f"`vector_field` returned shape {jnp.shape(dy)} for a state of shape {jnp.shape(y)}. "
                "Return an array of the shape of `y`."
            )
        if not jnp.issubdtype(jnp.result_type(dy), jnp.floating):
            raise ValueError(
                f"`vector_field` returned dtype {jnp.result_type(dy)}; a derivative must be floating "
                "point. Write 1.0 instead of 1, or use `.astype(y.dtype)`."
            )


_MESSAGES = (
    "`t0` or `t1` is not finite (nan or inf). Give a finite end; to run to a steady state use "
    "`diffrax.Event(diffrax.steady_state_event())` with a large finite `t1`.",
    "`dt0` is nan or inf; it must be finite. Pass a number, or `dt0=None` with an adaptive controller.",
    "`dt0` is zero: no step would ever be taken. Pass a positive number (negative if t1 < t0), or "
    "`dt0=None` with an adaptive controller.",
    "`dt0` is too small for the precision of the time: `t0 + dt0 == t0`. The smallest usable step is "
    "about eps * |t0|. Use a larger `dt0`, float64 times, or shift the time so that t0 is near 0.",
    "`SaveAt(ts=...)` contains nan; every index of `ts` must hold a finite time.",
    "`y0` is not finite: it contains nan or inf. Look for the leaf with "
    "`jax.tree.map(lambda x: jnp.isfinite(x).all(), y0)`.",
)


def diagnose_start(start: Start, dt0: Array | None) -> Array:
    """0 if one lane may start, else 1 + the index of a message."""
    t0, t1, tnext = start.tprev, start.t1, start.tnext
    bad_dt0 = jnp.array(False) if dt0 is None else ~jnp.isfinite(dt0)
    zero = jnp.array(False) if dt0 is None else dt0 == 0
    nan_ts = jnp.array(False)
    for ts in start.ts:
        if ts is not None:
            nan_ts |= jnp.any(jnp.isnan(ts))
    finite_y = jnp.array(True)
    for leaf in jax.tree.leaves(start.y):
        finite_y &= jnp.all(jnp.isfinite(leaf))
    faults = (
        ~(jnp.isfinite(t0) & jnp.isfinite(t1)),
        bad_dt0 | ~jnp.isfinite(tnext),
        zero,
        (tnext <= t0) & (t0 < t1),
        nan_ts,
        ~finite_y,
    )
    fault = jnp.array(0)
    for i, is_fault in reversed(list(enumerate(faults))):
        fault = jnp.where(is_fault, i + 1, fault)
    return fault


def apply(start: Start, fault: Array, throw: bool) -> Start:
    """Stops a solve that cannot start: an error if `throw`, else a result code."""
    if throw:
        t1 = eqx.branched_error_if(start.t1, fault > 0, jnp.maximum(fault - 1, 0), list(_MESSAGES))
        start = start._replace(t1=t1)
    bad_input = code(diffrax.RESULTS.nonfinite_input)
    return start._replace(result=jnp.where(fault > 0, bad_input, start.result))
