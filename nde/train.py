"""Training: one compiled step, called until it is enough.

    loss, gradient, update -> the new model if everything is finite, else the old one

A step whose loss, gradient or update is not finite changes neither the model nor the optimizer: the
run equals the one in which that step did not happen. Its batch and its random key are spent. The
decision is part of the compiled step, so nothing waits for the host; losses and metrics are fetched
every few steps.
"""

import contextlib
import functools
import textwrap
import time
import types
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import optax
from jaxtyping import PRNGKeyArray, PyTree

from nde import losses
from nde._inputs import check_callable, check_instance, check_key
from nde._times import check_spacing
from nde._training.batching import ArrayBatches, Batch, IteratorBatches, as_integer, make_batches
from nde._training.history import History, NonFiniteError, Reports
from nde._training.step import initial_state, leaf_paths, make_step, strongly_typed
from nde._training.stopping import check_report, plain
from nde.hybrid import Frozen

__all__ = ["Batch", "History", "NonFiniteError", "fit", "multi_start"]

FIXED = (
    diffrax.AbstractSolver,
    diffrax.AbstractStepSizeController,
    diffrax.AbstractAdjoint,
    diffrax.AbstractPath,  # a measured input, a Brownian path: data
    Frozen,
)
FIRST_STEP = (jtu.GetAttrKey("dt0"),)  # the field of a model: a number, so no type tells it


def fit(
    model: PyTree,
    loss: Callable,
    data: PyTree | Iterator,
    *,
    optim: optax.GradientTransformation,
    steps: int,
    batch_size: int | None = None,
    frozen: Callable | None = None,
    max_skips: int = 10,
    progress: bool = True,
    key: PRNGKeyArray,
) -> tuple[Any, History]:
    """Train a model: any PyTree whose floating arrays are to be learned.

    Everything is compiled once. Not trained are the arrays inside solvers, step-size controllers,
    adjoints, paths (a measured input is data) and `nde.hybrid.Frozen`, and the `dt0` of a model.

    Args:
        model: A model, or a tuple or dict of models and arrays (such as a model and its initial
            state).
        loss: `loss(model, batch, key) -> scalar`, or `(scalar, metrics)` with a dict of scalars.
            `batch` is a `Batch`: `batch.data` as in `data`, `batch.mask` (True where an example
            counts) and `batch.step`. A metric `nfe` is shown in the progress; a metric `failed`,
            the fraction of solves that failed, stops training above 0.1, and a metric `result`
            (`solution.result` of all examples) says which of them and how.
        data: PyTree of arrays with a leading example axis, or an iterator of such batches.
        optim: An optax optimizer.
        steps: Number of steps.
        batch_size: Examples per step, in an order that is new in every epoch; `None` for all of
            them, in their own order.
        frozen: `frozen(model)` gives what is not trained: a node or a tuple of nodes, as `where` in
            `equinox.tree_at`.
        max_skips: Steps in a row that may be skipped because something was not finite, before
            training stops.
        progress: Whether to show progress: a bar if tqdm is installed, lines otherwise.
        key: Of the order of the examples and of the keys given to `loss`.

    Returns:
        The trained model and its `History`.

    Raises:
        ValueError: for arguments that do not fit, a loss that is not a floating scalar, a gradient
            that is zero.
        NonFiniteError: for data that are not finite, and after `max_skips` skipped steps in a row.
        nde.solvers.SolveError: if more than a tenth of the solves of a batch fail.

        Whatever ends the training early, also an error of the user's iterator or an interrupt from
        the keyboard, has `.model`, as far as it was trained by then, and `.history` (in a notebook:
        `sys.last_value.model`).
    """
    job = _make_job(loss, data, optim, steps, batch_size, max_skips, progress, key)
    params, fixed, static = split(model, frozen)
    params, columns, compile_seconds = _train(job, params, fixed, static)
    return eqx.combine(params, fixed, static), History(columns, compile_seconds)


def multi_start(
    make_model: Callable,
    loss: Callable,
    data: PyTree | Iterator,
    *,
    starts: int,
    optim: optax.GradientTransformation,
    steps: int,
    batch_size: int | None = None,
    frozen: Callable | None = None,
    max_skips: int = 10,
    progress: bool = True,
    key: PRNGKeyArray,
) -> tuple[list[Any], list[History]]:
    """Train from several starting points, for losses with many local minima (oscillations, few
    data).

    The starts train side by side in one compiled step, on the same batches. One that diverges stops
    alone. Starts that agree in the loss and not in the forecast show what the data do not
    determine.

    Args:
        make_model: `make_model(key) -> model`, called once per start; only the values of its arrays
            may differ.
        starts: Number of starting points.
        loss: As in `fit`, like every other argument.

    Returns:
        The models and their histories, best first, by the mean loss of the last tenth of the steps.

    Raises:
        ValueError, NonFiniteError, nde.solvers.SolveError: as `fit`, if it concerns every start;
            the arrays in `.model` are those of all starts, stacked.
    """
    starts = _count("starts", starts, 1)
    check_key(key)
    check_callable("make_model", make_model, "(key)")
    model_key, key = jax.random.split(key)
    job = _make_job(loss, data, optim, steps, batch_size, max_skips, progress, key)
    made = [make_model(k) for k in jax.random.split(model_key, starts)]
    _check_alike(made)
    parts = [split(model, frozen) for model in made]
    params, fixed = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(part[:2] for part in parts))
    static = parts[0][2]
    params, columns, compile_seconds = _train(job, params, fixed, static, jax.vmap)
    found = []
    for i in range(starts):
        arrays = jax.tree.map(lambda leaf, i=i: leaf[i], (params, fixed))
        rows = {
            name: column if column.ndim == 1 else column[:, i] for name, column in columns.items()
        }
        found.append((eqx.combine(*arrays, static), History(rows, compile_seconds)))
    models, histories = zip(*sorted(found, key=lambda pair: pair[1].final_loss), strict=True)
    return list(models), list(histories)


class _Job(NamedTuple):
    loss: Callable
    batches: ArrayBatches | IteratorBatches
    optim: optax.GradientTransformationExtraArgs
    steps: int
    max_skips: int
    progress: bool
    key: PRNGKeyArray


def _make_job(loss, data, optim, steps, batch_size, max_skips, progress, key) -> _Job:
    """Check what can be checked before a model is looked at."""
    check_key(key)
    check_callable("loss", loss, "(model, batch, key)")
    steps, max_skips = _count("steps", steps, 0), _count("max_skips", max_skips, 1)
    if isinstance(optim, optax.MultiSteps):
        optim = optim.gradient_transformation()
    if not isinstance(optim, optax.GradientTransformation):
        raise ValueError(f"`optim` is {optim!r}, not an optimizer; write optax.adam(1e-3).")
    order_key, loss_key = jax.random.split(key)
    _check_data_times(loss, data)
    batches = make_batches(data, batch_size, order_key)
    return _Job(
        loss, batches, optax.with_extra_args_support(optim), steps, max_skips, progress, loss_key
    )


def _check_data_times(loss: Callable, data: Any) -> None:
    """The losses of nde know which array holds times, and are asked before jax rounds it."""
    while isinstance(loss, functools.partial):
        loss = loss.func
    first = next(iter(data), None) if isinstance(data, tuple | list) else None
    if loss in losses.TIMES_FIRST and isinstance(first, np.ndarray):
        check_spacing("data[0]", first)


def _count(name: str, value: Any, least: int) -> int:
    count = as_integer(value)
    if count is None or count < least:
        raise ValueError(f"`{name}` is {value!r}; it must be an integer >= {least}.")
    return count


def split(model: PyTree, frozen: Callable | None) -> tuple[PyTree, PyTree, PyTree]:
    """The trained arrays, the other arrays, and everything that is not an array."""

    def is_fixed(node):
        return isinstance(node, FIXED)

    def trains(path, node):
        if is_fixed(node) or path[-1:] == FIRST_STEP:
            return jax.tree.map(lambda leaf: False, node)
        return eqx.is_array(node) and bool(jnp.issubdtype(node.dtype, jnp.floating))

    check_instance("model", model)
    mask = jtu.tree_map_with_path(trains, model, is_leaf=is_fixed)
    if frozen is not None:
        check_callable("frozen", frozen, "(model)")
        try:
            mask = eqx.tree_at(
                frozen, mask, replace_fn=lambda node: jax.tree.map(lambda _: False, node)
            )
        except (TypeError, ValueError) as error:
            found = textwrap.shorten(eqx.tree_pformat(frozen(model)), 200)
            raise ValueError(
                f"`frozen` gave {found}; it gives one or several nodes of the model, none of them "
                "None or inside another: lambda model: model.vector_field."
            ) from error
    params, rest = eqx.partition(model, mask)
    if not jax.tree.leaves(params):
        raise ValueError(
            f"`model` has nothing to train: of its leaves {leaf_paths(model)} none is a floating "
            "array that is not frozen."
        )
    fixed, static = eqx.partition(rest, eqx.is_array)
    return strongly_typed(params), fixed, static


def _check_alike(models: list[PyTree]) -> None:
    """Raise if starts differ in more than the values of their arrays: they share one step."""
    advice = "Only the values of arrays may differ: the starts share one compiled step."
    for number, model in enumerate(models[1:], start=1):
        try:
            jax.tree.map(lambda *leaves: None, models[0], model)
        except ValueError as error:
            raise ValueError(
                f"`make_model` made starts 0 and {number} of different structure. {advice} {error}"
            ) from None
        pairs = zip(jtu.tree_leaves_with_path(models[0]), jax.tree.leaves(model), strict=True)
        for (path, first), other in pairs:
            if not _is_same(first, other):
                raise ValueError(
                    f"`make_model` made starts 0 and {number} with different "
                    f"`model{jtu.keystr(path)}`: {eqx.tree_pformat(first)} and "
                    f"{eqx.tree_pformat(other)}. {advice} Make a number an array (jnp.asarray), and "
                    "a function or an object once, outside `make_model`."
                )


def _is_same(first: Any, other: Any) -> bool:
    """Whether two leaves differ in the values of an array at most."""
    if eqx.is_array(first) and eqx.is_array(other):
        return (first.shape, first.dtype) == (other.shape, other.dtype)
    if isinstance(first, types.FunctionType) and isinstance(other, types.FunctionType):
        # A function that is made again is the same if it holds no values of its own.
        holds = first.__closure__ or first.__defaults__ or first.__kwdefaults__
        return first is other or (not holds and first.__code__ == other.__code__)
    return bool(first == other)


def _train(
    job: _Job,
    params: PyTree,
    fixed: PyTree,
    static: PyTree,
    lift: Callable = lambda function, in_axes: function,
) -> tuple[PyTree, dict[str, np.ndarray], float]:
    """Compile and run all steps: the parameters, the columns, the seconds of compiling."""
    if not job.steps:
        return params, {}, 0.0
    step = make_step(job.loss, job.optim, static, job.batches.assemble, job.max_skips)
    step = lift(step, (0, 0, None, None, None))
    state = lift(functools.partial(initial_state, job.optim), (0,))(params)

    def arguments(state, index):
        return state, fixed, job.batches.payload(index), np.int32(index), job.key

    reports, good = Reports(job.steps, job.progress), state
    every, compile_seconds = max(10, job.steps // 100), 0.0
    try:
        began, first = time.perf_counter(), arguments(state, 0)
        compiled = jax.jit(step).lower(*first).compile()
        compile_seconds = time.perf_counter() - began
        reports.begin()
        for index in range(job.steps):
            state, record = compiled(*(arguments(state, index) if index else first))
            reports.add(record)
            if index == 0 or (index + 1) % every == 0 or index + 1 == job.steps:
                for report in reports.fetch():
                    check_report(*report, params, job.batches, min(job.max_skips, job.steps))
                good = state
    except (Exception, KeyboardInterrupt) as error:
        meant = plain(error)
        with contextlib.suppress(Exception):  # where a step itself broke, there is nothing to fetch
            reports.fetch()
            good = state
        model = eqx.combine(good.params, fixed, static)
        vars(meant).update(model=model, history=History(reports.columns(), compile_seconds))
        if meant is error:
            raise
        raise meant from None
    finally:
        reports.close()
    return state.params, reports.columns(), compile_seconds
