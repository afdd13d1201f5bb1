"""What an ODE model is, and every check that stands before its solve.

A model maps one example to its output: times `ts` of shape (times,) and a state `y0` in, states at
`ts` out. The solve starts at `t0 = ts[0]` and ends at `t1 = ts[-1]`; `ts` may decrease, and may
repeat its last value (padding). A check needs either shapes and types, and then works under `jit`
and `vmap` too, or it needs numbers, and then it runs only where there are some: outside a
transformation.
"""

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, Float, PyTree

from nde._run import run
from nde.solvers import DiscreteAdjoint
from nde.solvers.inputs import check_count, check_tolerances, is_traced


class AbstractODE(eqx.Module):
    """Anything that is solved as dy/dt = vector_field(t, y, args): the numerics, as fields.

    Args:
        solver: How one step is taken, a `diffrax` solver.
        stepsize_controller: How long a step is, a `diffrax` step-size controller.
        adjoint: How gradients are taken.
        dt0: First step (every step, with `diffrax.ConstantStepSize`), in the unit of `ts`; `None`
            lets the controller choose.
        max_steps: Largest number of attempted steps of one solve.
    """

    vector_field: eqx.AbstractVar[Callable]
    solver: diffrax.AbstractSolver = eqx.field(default=diffrax.Tsit5(), kw_only=True)
    stepsize_controller: diffrax.AbstractStepSizeController = eqx.field(
        default=diffrax.PIDController(rtol=1e-3, atol=1e-6), kw_only=True
    )
    adjoint: diffrax.AbstractAdjoint = eqx.field(default=DiscreteAdjoint(), kw_only=True)
    dt0: float | None = eqx.field(default=None, kw_only=True)
    max_steps: int | None = eqx.field(default=4096, kw_only=True)

    def __check_init__(self):
        check_numerics(self)

    def lift(self, y0: PyTree[Float[Array, "..."]]) -> PyTree[Float[Array, "..."]]:
        """The state that is solved for, from the one that is given."""
        return y0

    def read(self, t: Array, y: PyTree[Float[Array, "..."]], args: PyTree[Any]) -> PyTree[Array]:
        """The output, from the state that is solved for."""
        return y

    def __call__(
        self, ts: Float[Array, " times"], y0: PyTree[Float[Array, "..."]], args: PyTree[Any] = None
    ) -> PyTree[Float[Array, "times ..."]]:
        """The states at `ts`, shape (times, ...) for every leaf of `y0`."""
        return self.solve(ts, y0, args).ys

    def solve(
        self,
        ts: Float[Array, " times"],
        y0: PyTree[Float[Array, "..."]],
        args: PyTree[Any] = None,
        *,
        throw: bool = True,
    ) -> diffrax.Solution:
        """The same solve with its `.stats` and `.result`.

        Args:
            ts: Times, shape (times,), ordered; the solve runs from the first to the last.
            y0: State at `ts[0]`, an array or a PyTree of arrays, of any shape. It takes the
                precision of `ts` if that is higher, and keeps it whatever the parameters have.
            args: Passed to the vector field, or to the network in it.
            throw: Whether a failed solve raises. If not, look at `.result`: `.ys` is inf where it
                was not reached.

        Raises:
            ValueError: if `ts`, `y0` or what the vector field returns cannot be solved.
            nde.solvers.SolveError: with `throw`, if the solve fails, with the cause; inside `jax.jit`
                and other transformations a RuntimeError without it.
        """
        return solve_ode(self, ts, y0, args, throw=throw)


def solve_ode(
    model: AbstractODE,
    ts: Float[Array, " times"],
    y0: PyTree[Float[Array, "..."]],
    args: PyTree[Any],
    *,
    throw: bool,
    integrand: Callable | None = None,
    also: diffrax.SubSaveAt | None = None,
) -> diffrax.Solution:
    """Check the input and solve from `ts[0]` to `ts[-1]`.

    `.ys` is the output at `ts`, leaves of shape (times, ...). With `integrand(t, y, args)`, a scalar
    function of the state, it is (output, integral from `ts[0]`); the integral takes no part in the
    choice of steps. With `also`, `.ts` and `.ys` are lists: that, and what `also` saves.
    """
    ts, y0 = checked(ts, y0, model.dt0)
    y0 = model.lift(y0)
    check_tolerances(model.stepsize_controller, y0)
    check_context("vector_field", model.vector_field, args)
    check_vector_field(model.vector_field, ts[0], y0, args)
    field: Any = model.vector_field
    controller, read = model.stepsize_controller, model.read
    if integrand is not None:
        pair = _Pair(model, integrand)
        field, controller, read = pair.vector_field, _blind(controller), pair.read
        y0 = (y0, jnp.zeros((), ts.dtype))
    saveat: Any = diffrax.SubSaveAt(ts=ts, fn=read)
    if also is not None:
        saveat = [saveat, also]
    return run(
        model,
        diffrax.ODETerm(Rates(field)),
        t0=ts[0],
        t1=ts[-1],
        dt0=model.dt0,
        y0=y0,
        args=args,
        saveat=diffrax.SaveAt(subs=saveat),
        stepsize_controller=controller,
        max_steps=model.max_steps,
        throw=throw,
    )


def checked(
    ts: Float[Array, " times"], y0: PyTree[Float[Array, "..."]], dt0: float | None
) -> tuple[Float[Array, " times"], PyTree[Float[Array, "..."]]]:
    """`ts` and `y0` in the higher precision of the two: they meet in every step."""
    check_times(ts, dt0)
    check_spacing("ts", ts)
    check_state(y0)
    ts, y0 = jax.tree.map(jnp.asarray, (ts, y0))
    dtype = max((x.dtype for x in jax.tree.leaves((ts, y0))), key=lambda d: jnp.finfo(d).bits)
    return jax.tree.map(lambda x: x.astype(dtype), (ts, y0))


class Rates(eqx.Module):
    """A vector field whose rates have the precision of the state, whatever its parameters have: a
    state that changed its type from step to step would have no gradient.
    """

    vector_field: Callable

    def __call__(self, t: Any, y: PyTree[Array], args: PyTree[Any]) -> PyTree[Array]:
        dy = self.vector_field(t, y, args)
        return jax.tree.map(lambda rate, state: jnp.asarray(rate, state.dtype), dy, y)


class _Pair(eqx.Module):
    """A model whose state carries an integral along."""

    model: AbstractODE
    integrand: Callable

    def vector_field(self, t: Array, y: tuple[PyTree, Array], args: PyTree) -> tuple[PyTree, Array]:
        return self.model.vector_field(t, y[0], args), self.integrand(t, y[0], args)

    def read(self, t: Array, y: tuple[PyTree, Array], args: PyTree) -> tuple[PyTree, Array]:
        return self.model.read(t, y[0], args), y[1]


def _blind(controller: diffrax.AbstractStepSizeController) -> diffrax.AbstractStepSizeController:
    """A controller that looks at the state and not at the integral beside it."""
    if isinstance(controller, diffrax.ClipStepSizeController):
        return dataclasses.replace(controller, controller=_blind(controller.controller))
    if isinstance(controller, diffrax.PIDController):
        return dataclasses.replace(controller, norm=_FirstOnly(controller.norm))
    return controller


@dataclasses.dataclass(frozen=True)
class _FirstOnly:
    norm: Callable

    def __call__(self, error: tuple[PyTree, Array]) -> Array:
        return self.norm(error[0])


def check_numerics(model: AbstractODE) -> None:
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
    dt0 = _number(model.dt0)
    if dt0 == 0:
        raise ValueError("`dt0` is zero; give a step, or `dt0=None` to let the controller choose.")
    if dt0 is not None and not np.isfinite(dt0):
        raise ValueError(f"`dt0` is {dt0}; it must be finite, or `dt0=None`.")
    check_tolerances(model.stepsize_controller, ())


def check_times(ts: Float[Array, " times"], dt0: float | None) -> None:
    """`ts`: one series of finite, ordered, floating times; `dt0`, a step that moves them."""
    if not eqx.is_array(ts):
        raise ValueError(f"`ts` is a {type(ts).__name__}; pass an array: jnp.asarray(ts).")
    if ts.ndim != 1 or ts.size == 0:
        raise ValueError(
            f"`ts` has shape {ts.shape}; one model call takes one series of at least one time, "
            "shape (times,). Use jax.vmap over the batch."
        )
    if not jnp.issubdtype(ts.dtype, jnp.floating):
        raise ValueError(f"`ts` has dtype {ts.dtype}; times are floating: ts.astype(float).")
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
    _check_first_step(times, _number(dt0))


def _check_first_step(times: np.ndarray, dt0: float | None) -> None:
    t0, span = times[0], times[-1] - times[0]
    if dt0 is None or span == 0:
        return
    if dt0 * span < 0:
        raise ValueError(f"`dt0` is {dt0} but `t1 - t0` is {span}; give both the same sign.")
    if t0 + times.dtype.type(dt0) == t0:
        raise ValueError(
            f"`dt0` is {dt0}, which does not move t0={t0} in {times.dtype}: the smallest usable "
            "step "
            f"there is {np.spacing(abs(t0))}. Use float64 times, or shift the time to start near 0."
        )


def check_spacing(name: str, times: Float[np.ndarray, "... times"] | Array) -> None:
    """The distances between times, along the last axis, survive the precision that jax gives them."""
    kept = jax.dtypes.canonicalize_dtype(times.dtype)
    if kept == times.dtype:  # as it is of everything that jax holds already
        return
    times = np.asarray(times)
    steps = np.diff(times)
    rounded = np.diff(times.astype(kept).astype(times.dtype))
    lost = np.abs(rounded - steps) > 0.01 * np.abs(steps)
    if lost.any():
        at = tuple(np.argwhere(lost)[0])
        raise ValueError(
            f"`{name}` has neighbors {steps[at]} apart that jax would hold as {rounded[at]} apart: they "
            f"are near {times[at]}, and {kept} has 7 digits. Subtract an offset (such as the first "
            'time), or allow 64 bits: jax.config.update("jax_enable_x64", True).'
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
    vector_field: Callable, t: Float[Array, ""], y0: PyTree[Float[Array, "..."]], args: PyTree[Any]
) -> None:
    """`vector_field(t, y, args)` gives one floating rate for every entry of the state."""
    check_callable("vector_field", vector_field, "(t, y, args)")
    shapes = jax.tree.map(lambda leaf: f"{leaf.dtype}{list(leaf.shape)}", y0)
    try:
        dy = eqx.filter_eval_shape(vector_field, t, y0, args)
    except (TypeError, IndexError) as error:
        raise ValueError(
            f"`vector_field` cannot be applied to `y0` = {shapes}: {str(error).splitlines()[0]} "
            "One call takes one example; use jax.vmap over the batch."
        ) from error
    if jax.tree.structure(dy) != jax.tree.structure(y0):
        raise ValueError(
            f"`vector_field` returned {jax.tree.structure(dy)} but the state is "
            f"{jax.tree.structure(y0)}; "
            "return one rate for every entry of the state."
        )
    for (path, rate), state in zip(jtu.tree_leaves_with_path(dy), jax.tree.leaves(y0), strict=True):
        where = jtu.keystr(path)
        if not eqx.is_array_like(rate) and not isinstance(rate, jax.ShapeDtypeStruct):
            raise ValueError(
                f"`vector_field` returned {rate!r}{where}; return arrays, shaped like the state."
            )
        shape, dtype = jnp.shape(rate), jnp.result_type(rate)
        if shape != state.shape:
            raise ValueError(
                f"`vector_field` returned shape {shape} but the state{where} has shape "
                f"{state.shape}; "
                "return one rate for every entry of the state."
            )
        if not jnp.issubdtype(dtype, jnp.floating):
            raise ValueError(
                f"`vector_field` returned dtype {dtype}{where}; rates are floating: "
                "dy.astype(y.dtype)."
            )


def check_context(name: str, field: Any, args: PyTree[Any]) -> None:
    """A field made without a context is given none, which it would never see."""
    context = getattr(field, "context", None)
    if args is not None and isinstance(context, int) and context == 0:
        raise ValueError(
            f"`args` was given, but `{name}` takes no context and would never see it. Make it with "
            "`context`, the number of entries of `args`, or leave `args` out."
        )


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


def check_key(key: Any) -> None:
    """`key` is one new-style random key."""
    hint = "Pass one key: jax.random.key(0)."
    if not eqx.is_array(key) or not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        raise ValueError(f"`key` is {key!r}, not a random key. {hint}")
    if key.shape != ():
        raise ValueError(f"`key` is a batch of keys, shape {key.shape}. {hint}")


def _number(x: Any) -> float | None:
    return None if x is None or is_traced(x) else float(x)
