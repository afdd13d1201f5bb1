"""Every check of what a user hands to a model, each condition once.

A check needs either shapes and types, and then works under `jit` and `vmap` too, or it needs numbers,
and then it runs only where there are some: outside a transformation.
"""

import inspect
from collections.abc import Callable
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, ArrayLike, Float, PyTree

from nde._times import check_kind
from nde.solvers.inputs import check_count, check_rate_type, check_tolerances, is_traced
from nde.solvers.inputs import check_key as check_key


def check_numerics(model: Any) -> None:
    """Known when the model is made: classes given for instances, `max_steps`, `dt0`, tolerances."""
    for name, kind in (
        ("solver", diffrax.AbstractSolver),
        ("stepsize_controller", diffrax.AbstractStepSizeController),
        ("adjoint", diffrax.AbstractAdjoint),
    ):
        value = getattr(model, name)
        if isinstance(value, type):
            raise ValueError(f"`{name}` is the class {value.__name__}; write `{value.__name__}()`.")
        if not isinstance(value, kind):
            raise ValueError(f"`{name}` is {value!r}; it must be an instance of {kind.__name__}.")
    if model.max_steps is not None:
        check_count("max_steps", model.max_steps, ", such as 4096")
    if isinstance(model.adjoint, diffrax.ImplicitAdjoint):
        raise ValueError(
            "`adjoint` is ImplicitAdjoint(), which differentiates a steady state alone, but the models "
            "of nde save states on the way. Solve for the steady state with diffrax.diffeqsolve, the "
            "vector field of the model and event=diffrax.Event(diffrax.steady_state_event())."
        )
    dt0 = None if model.dt0 is None or is_traced(model.dt0) else float(model.dt0)
    if dt0 == 0:
        raise ValueError("`dt0` is zero; give a step, or `dt0=None` to let the controller choose.")
    if dt0 is not None and not np.isfinite(dt0):
        raise ValueError(f"`dt0` is {dt0}; it must be finite, or `dt0=None`.")
    check_tolerances(model.stepsize_controller, ())


def check_times(ts: Float[Array, " times"]) -> None:
    """`ts`: one series of finite, ordered, floating times."""
    if not eqx.is_array(ts):
        raise ValueError(f"`ts` is a {type(ts).__name__}; pass an array: jnp.asarray(ts).")
    if ts.ndim != 1 or ts.size == 0:
        raise ValueError(
            f"`ts` has shape {ts.shape}; one model call takes one series of at least one time, "
            "shape (times,). Use jax.vmap over the batch."
        )
    check_kind("ts", ts)
    if is_traced(ts):
        return
    times = np.asarray(ts)
    if not np.isfinite(times).all():
        at = int(np.flatnonzero(~np.isfinite(times))[0])
        end = " (it is `t1`)" if at == times.size - 1 else ""
        raise ValueError(
            f"`ts` is {times[at]} at index {at}{end}; times must be finite. To run to a steady "
            "state, use diffrax.diffeqsolve with event=diffrax.Event(diffrax.steady_state_event())."
        )
    backward = times[-1] < times[0]
    wrong = np.flatnonzero(np.diff(times) > 0 if backward else np.diff(times) < 0)
    if wrong.size:
        at = int(wrong[0])
        raise ValueError(
            f"`ts` runs from {times[0]} to {times[-1]} but is not in order: ts[{at}]={times[at]}, "
            f"ts[{at + 1}]={times[at + 1]}. Sort it (and the data with it)."
        )


def check_first_step(ts: Float[Array, " times"], dt0: ArrayLike | None) -> None:
    """`dt0`: a step that moves the first time, towards the last."""
    if dt0 is None or is_traced(ts, dt0):
        return
    times, dt0 = np.asarray(ts), float(np.asarray(dt0))
    t0, span = times[0], times[-1] - times[0]
    if span == 0:
        return
    if dt0 * span < 0:
        raise ValueError(f"`dt0` is {dt0} but `t1 - t0` is {span}; give both the same sign.")
    if t0 + times.dtype.type(dt0) == t0:
        raise ValueError(
            f"`dt0` is {dt0}, which does not move t0={t0} in {times.dtype}: the smallest usable "
            f"step there is {np.spacing(abs(t0))}. Use float64 times, or shift the time to start near 0."
        )


def check_state(y0: PyTree[Float[Array, "..."]]) -> None:
    """`y0`: arrays (in any PyTree) that are floating, not empty and finite."""
    leaves = jtu.tree_leaves_with_path(y0)
    if not leaves:
        raise ValueError(f"`y0` is {y0!r}, which holds no array; a state has at least one entry.")
    for path, leaf in leaves:
        name = "y0" + jtu.keystr(path)
        if not eqx.is_array(leaf):
            raise ValueError(
                f"`{name}` is a Python {type(leaf).__name__}; a state is an array, or a PyTree of "
                "arrays: y0=jnp.asarray(y0)."
            )
        if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
            raise ValueError(
                f"`{name}` is complex ({leaf.dtype}); stack its real and imaginary parts: two real "
                "channels."
            )
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise ValueError(
                f"`{name}` has dtype {leaf.dtype}; states are floating: y0.astype(float)."
            )
        if leaf.size == 0:
            raise ValueError(f"`{name}` has shape {leaf.shape}; a state has at least one entry.")
        if not is_traced(leaf) and not np.isfinite(np.asarray(leaf)).all():
            at = tuple(map(int, np.argwhere(~np.isfinite(np.asarray(leaf)))[0]))
            raise ValueError(f"`{name}` is {leaf[at]} at index {at}; a state must be finite.")


def check_vector_field(
    vector_field: Callable,
    t: Float[Array, ""],
    y0: PyTree[Float[Array, "..."]],
    args: PyTree[Any],
    name: str = "vector_field",
) -> None:
    """`vector_field(t, y, args)` gives one real, floating rate for every entry of the state."""
    check_callable(name, vector_field, "(t, y, args)")
    dy = applied(name, vector_field, t, y0, args)
    if jax.tree.structure(dy) != jax.tree.structure(y0):
        raise ValueError(
            f"`{name}` returned {jax.tree.structure(dy)} but the state is "
            f"{jax.tree.structure(y0)}; return one rate for every entry of the state."
        )
    for (path, rate), state in zip(jtu.tree_leaves_with_path(dy), jax.tree.leaves(y0), strict=True):
        where = jtu.keystr(path)
        if not eqx.is_array_like(rate) and not isinstance(rate, jax.ShapeDtypeStruct):
            raise ValueError(
                f"`{name}` returned {rate!r}{where}; return arrays, shaped like the state."
            )
        check_real(name + where, rate)
        if jnp.shape(rate) != state.shape:
            raise ValueError(
                f"`{name}` returned shape {jnp.shape(rate)} but the state{where} has shape "
                f"{state.shape}; return one rate for every entry of the state."
            )


def applied(
    name: str, field: Callable, t: ArrayLike, y: PyTree[Array], args: PyTree[Any]
) -> PyTree[Any]:
    """The shapes of field(t, y, args), or what is wrong with the call."""
    try:
        return eqx.filter_eval_shape(field, t, y, args)
    except jax.errors.TracerArrayConversionError as error:
        raise ValueError(
            f"`{name}` hands what jax traces to NumPy; write it with jax.numpy: jnp.stack([...]) or "
            "jnp.array([...]) in place of np.array([...]), jnp.sin in place of np.sin."
        ) from error
    except (TypeError, IndexError, AttributeError) as error:
        shapes = jax.tree.map(lambda leaf: f"{leaf.dtype}{list(leaf.shape)}", y)
        raise ValueError(
            f"`{name}` cannot be applied to `y0` = {shapes}: {str(error).splitlines()[0]} "
            "One call takes one example; use jax.vmap over the batch."
        ) from error


def check_real(name: str, rate: Any) -> None:
    """A rate is floating, and real: the states of models are."""
    check_rate_type(f"What `{name}` returned", jnp.result_type(rate), jnp.result_type(float))


def check_instance(name: str, value: Any) -> None:
    """`value` is made, and not the class of it."""
    if isinstance(value, type):
        kind = value.__name__
        raise ValueError(f"`{name}` is the class {kind}; make one: {kind}(...).")


def check_callable(name: str, function: Any, arguments: str) -> None:
    """`function` can be called with the positional `arguments`, written like "(t, y, args)"."""
    if not callable(function):
        raise ValueError(f"`{name}` is {function!r}; it must be a function {name}{arguments}.")
    check_instance(name, function)
    try:
        signature = inspect.signature(function)
    except ValueError:  # some builtins have no signature to look at
        return
    try:
        signature.bind(*arguments.strip("()").split(","))
    except TypeError as error:
        raise ValueError(
            f"`{name}` has signature {signature}; it is called as {name}{arguments}."
        ) from error
