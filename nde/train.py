"""Training: compiled steps, called until it is enough.

    loss, gradient, update -> the new model if everything is finite, else the old one

A step whose loss, gradient or update is not finite changes neither the model nor the optimizer: the
run equals the one in which that step did not happen. Its batch and its random key are spent. The
decision is part of the compiled step, so nothing waits for the host; losses and metrics are fetched
every few steps. What changes while training goes on (a horizon, a rate, what trains) is data of that
step, so it is compiled once; a later `fit` with the same functions and shapes finds it compiled.
"""

import functools
import os
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import PRNGKeyArray, PyTree

from nde import losses
from nde._inputs import check_callable, check_key
from nde._saving import CheckpointError
from nde._times import check_spacing
from nde._training.batching import ArrayBatches, Batch, IteratorBatches
from nde._training.callbacks import JSONLines
from nde._training.history import History, NonFiniteError
from nde._training.options import (
    Average,
    Stage,
    Turn,
    Validation,
    as_stages,
    as_turns,
    count,
    marked,
    selected,
)
from nde._training.parameters import split, trained
from nde._training.ragged import Ragged, RaggedBatches
from nde._training.resume import Checkpoint, described_call
from nde._training.run import Job, Parts, train

__all__ = [
    "Average",
    "Batch",
    "CheckpointError",
    "History",
    "JSONLines",
    "NonFiniteError",
    "Ragged",
    "Stage",
    "Turn",
    "Validation",
    "fit",
    "multi_start",
]


def fit(
    model: PyTree,
    loss: Callable | Sequence[Turn],
    data: PyTree | Iterator | Ragged,
    *,
    optim: optax.GradientTransformation | None = None,
    steps: int | Sequence[Stage],
    batch_size: int | None = None,
    frozen: Callable | None = None,
    validation: Validation | None = None,
    average: Average | None = None,
    project: Callable | None = None,
    accumulate: int = 1,
    checkpoint: str | os.PathLike | None = None,
    every: int = 100,
    mesh: Mesh | None = None,
    callbacks: Callable | Sequence[Callable] = (),
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
            counts), `batch.step` and more. A metric `nfe` is shown in the progress; a metric
            `failed`, the fraction of solves that failed, stops training above 0.1, and a metric
            `result` (`solution.result` of all examples) says which of them and how. A metric
            `weight`, the number of entries that the loss is a mean of, says what a part of a batch
            counts for where it is divided (`mesh`, `accumulate`); otherwise its valid examples do.
            Several losses that are minimized in turn are a sequence of `Turn`.
        data: PyTree of arrays with a leading example axis, an iterator of such batches, or series
            of unequal length as `Ragged`. A value that is nan was not observed, for a loss that
            takes it.
        optim: An optax optimizer, also one that searches along a line (`optax.lbfgs`).
        steps: Number of steps, or a sequence of `Stage`.
        batch_size: Examples per step, in an order that is new in every epoch; `None` for all of
            them, in their own order.
        frozen: `frozen(model)` gives what is not trained: a node or a tuple of nodes, as `where` in
            `equinox.tree_at`.
        validation: Data to find the best model with, and when to stop: a `Validation`.
        average: Average the parameters over the steps: an `Average`.
        project: `project(model) -> model` after every update, to keep constraints: a clipped
            critic, a positive diagonal. It changes values of arrays alone.
        accumulate: Number of equal parts in which a batch is worked through, one after the other,
            to save memory; the update is that of the whole batch. (`optax.MultiSteps` updates once
            in several batches.)
        checkpoint: File to write all of the run to. If it is there, the run continues from it, bit
            for bit as if it had not been interrupted; another call is refused. A finished run that
            is called again returns what it returned. `steps` may have grown.
        every: Steps from one checkpoint to the next; the last step writes one too.
        mesh: Devices over which every batch is divided, `jax.make_mesh((2,), ("data",))`; all its
            axes count as one. With several processes (`jax.distributed`), each makes the same call
            with the same data. Noise per example stays the same on any number of devices if it is
            drawn with `batch.keys`; `key` is the same on all of them. The adjoints are those of
            `nde.solvers`.
        callbacks: `callback(numbers)` or several, called for every step, a few steps late, with
            its numbers by name (`step`, `loss`, metrics): plain Python numbers. All are called;
            training ends if one returns True. `JSONLines` writes them to a file.
        max_skips: Steps in a row that may be skipped because something was not finite, before
            training stops.
        progress: Whether to show progress: a bar if tqdm is installed, lines otherwise.
        key: Of the order of the examples and of the keys given to `loss`: step k has fold_in(key, k).

    Returns:
        The trained model and its `History`. With `validation` it is exactly the best validated
        model, with `average` an average.

    Raises:
        ValueError: for arguments that do not fit, a loss that is not a floating scalar, a gradient
            that is zero.
        NonFiniteError: for infinite data, for nan that the loss makes nothing of, and after
            `max_skips` skipped steps in a row.
        nde.solvers.SolveError: if more than a tenth of the solves of a batch fail.
        nde.train.CheckpointError: if `checkpoint` is damaged or of another run.
        OSError: if `checkpoint` cannot be written.

        Whatever ends the training early, also an error of the user's iterator or an interrupt from
        the keyboard, has `.model`, as far as it was trained by then, and `.history` (in a notebook:
        `sys.last_value.model`). On a mesh of several processes all raise the same.
    """
    job = _make_job(
        loss,
        data,
        optim=optim,
        steps=steps,
        batch_size=batch_size,
        validation=validation,
        average=average,
        project=project,
        accumulate=accumulate,
        checkpoint=checkpoint,
        every=every,
        mesh=mesh,
        callbacks=callbacks,
        max_skips=max_skips,
        progress=progress,
        key=key,
    )
    parts = _take_apart(model, frozen, job)
    params, columns, compile_seconds = train(job, parts)
    columns.pop("ended", None)
    return eqx.combine(params, parts.fixed, parts.static), History(columns, compile_seconds)


def multi_start(
    make_model: Callable,
    loss: Callable | Sequence[Turn],
    data: PyTree | Iterator | Ragged,
    *,
    starts: int,
    frozen: Callable | None = None,
    key: PRNGKeyArray,
    **options: Any,
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
        loss: As in `fit`, like every other argument. A `mesh` divides the starts over its devices,
            and not the batches.

    Returns:
        The models and their histories, best first: by the mean loss of the last tenth of the steps,
        or by the best validation.

    Raises:
        ValueError, NonFiniteError, nde.solvers.SolveError: as `fit`, if it concerns every start;
            the arrays in `.model` are those of all starts, stacked.
    """
    starts = count("starts", starts, 1)
    check_key(key)
    check_callable("make_model", make_model, "(key)")
    model_key, key = jax.random.split(key)
    job = _make_job(loss, data, key=key, **options)
    if job.mesh is not None and (starts % job.mesh.size or jax.process_count() > 1):
        raise ValueError(
            f"`mesh` has {job.mesh.size} devices but there are {starts} starts; every device of one "
            "process takes the same number of them."
        )
    made = [make_model(k) for k in jax.random.split(model_key, starts)]
    _check_alike(made)
    every_part = [_take_apart(model, frozen, job) for model in made]
    params, fixed = jax.tree.map(
        lambda *leaves: jnp.stack(leaves), *((parts.params, parts.fixed) for parts in every_part)
    )
    parts = every_part[0]._replace(params=params, fixed=fixed)
    params, columns, compile_seconds = train(job, parts, starts=True)
    found = []
    for i in range(starts):
        arrays = jax.tree.map(lambda leaf, i=i: leaf[i], (params, fixed))
        rows = {
            name: column if column.ndim == 1 else column[:, i] for name, column in columns.items()
        }
        ended = rows.pop("ended", np.zeros(0, bool)).astype(bool)
        rows = {name: column[~ended] for name, column in rows.items()}
        found.append((eqx.combine(*arrays, parts.static), History(rows, compile_seconds)))
    models, histories = zip(*sorted(found, key=lambda pair: pair[1].score), strict=True)
    return list(models), list(histories)


def _make_job(
    loss: Callable | Sequence[Turn],
    data: PyTree | Iterator | Ragged,
    *,
    steps: int | Sequence[Stage],
    key: PRNGKeyArray,
    optim: optax.GradientTransformation | None = None,
    batch_size: int | None = None,
    validation: Validation | None = None,
    average: Average | None = None,
    project: Callable | None = None,
    accumulate: int = 1,
    checkpoint: str | os.PathLike | None = None,
    every: int = 100,
    mesh: Mesh | None = None,
    callbacks: Callable | Sequence[Callable] = (),
    max_skips: int = 10,
    progress: bool = True,
) -> Job:
    """Check what can be checked before a model is looked at."""
    check_key(key)
    turns, stages = as_turns(loss, optim), as_stages(steps)
    _check_kinds(validation, average, mesh)
    if project is not None:
        check_callable("project", project, "(model)")
    if validation is not None and validation.loss is None and len(turns) > 1:
        raise ValueError(
            "`validation` has no loss, and training has several: Validation(data, loss=...)."
        )
    for turn in turns:
        _check_data_times(turn.loss, data)
    devices = 1 if mesh is None else mesh.size
    accumulate = count("accumulate", accumulate, 1)
    order_key, loss_key = jax.random.split(key)
    saved = None
    if checkpoint is not None:
        call = described_call(data, batch_size, key)
        saved = Checkpoint(checkpoint, count("every", every, 1), call)
    validated, parts = _validated(validation, order_key, devices)
    return Job(
        turns=turns,
        stages=stages,
        batches=_make_batches(data, batch_size, order_key, accumulate * devices),
        key=loss_key,
        max_skips=count("max_skips", max_skips, 1),
        progress=progress,
        validation=validation,
        validated=validated,
        validation_key=jax.random.fold_in(order_key, 2**31 - 1),
        validation_parts=parts,
        average=average,
        project=project,
        accumulate=accumulate,
        callbacks=_as_callbacks(callbacks),
        checkpoint=saved,
        mesh=mesh,
    )


def _check_data_times(loss: Callable, data: Any) -> None:
    """The losses of nde know which array holds times, and are asked before jax rounds it."""
    while isinstance(loss, functools.partial):
        loss = loss.func
    first = next(iter(data), None) if isinstance(data, tuple | list) else None
    if loss in losses.TIMES_FIRST and isinstance(first, np.ndarray):
        check_spacing("data[0]", first)


def _check_kinds(validation: Any, average: Any, mesh: Any) -> None:
    """Raise for options that are not what they are called."""
    for name, value, kind, example in (
        ("validation", validation, Validation, "nde.train.Validation(data, every=100)"),
        ("average", average, Average, "nde.train.Average(decay=0.999)"),
        ("mesh", mesh, Mesh, 'jax.make_mesh((2,), ("data",))'),
    ):
        if value is not None and not isinstance(value, kind):
            raise ValueError(f"`{name}` is {value!r}; give {example}.")


def _as_callbacks(callbacks: Callable | Sequence[Callable]) -> tuple[Callable, ...]:
    found = (callbacks,) if callable(callbacks) else callbacks
    if not isinstance(found, Sequence):
        raise ValueError(f"`callbacks` is {callbacks!r}; give a function, or a list of them.")
    for callback in found:
        check_callable("callbacks", callback, "(numbers)")
    return tuple(found)


def _make_batches(
    data: Any, batch_size: int | None, key: PRNGKeyArray, parts: int
) -> ArrayBatches | IteratorBatches | RaggedBatches:
    """The source of batches for `data`."""
    if isinstance(data, Ragged):
        return RaggedBatches(data, batch_size, key, parts)
    if not isinstance(data, Iterator):
        return ArrayBatches(data, batch_size, key, parts)
    if batch_size is not None:
        raise ValueError(
            f"`batch_size` is {batch_size} but `data` is an iterator, which makes its own batches; "
            "pass None."
        )
    return IteratorBatches(data, parts)


def _validated(
    validation: Validation | None, key: PRNGKeyArray, devices: int
) -> tuple[ArrayBatches | None, int]:
    """The data of the validation, and in how many parts it is gone through."""
    if validation is None:
        return None, 1
    try:
        whole = ArrayBatches(validation.data, None, key, devices)
        if validation.batch_size is None:
            return whole, 1
        parts = -(-whole.size // (validation.batch_size * devices))
        return ArrayBatches(validation.data, None, key, devices * parts), parts
    except (ValueError, NonFiniteError) as error:
        raise type(error)(f"In the data of `validation`: {error}") from None


def _take_apart(model: PyTree, frozen: Callable | None, job: Job) -> Parts:
    """The model as a run needs it, and which of its leaves train when."""
    params, fixed, static = split(model, frozen)
    mask = trained(model, frozen)
    turn_masks = tuple(selected(turn.trains, "trains", mask, model) for turn in job.turns)
    for number, found in enumerate(turn_masks):
        if not any(jax.tree.leaves(found)):
            raise ValueError(f"`trains` of turn {number} gives nothing that is trained.")
    stage_masks = tuple(
        eqx.filter(
            mask if stage.frozen is None else marked(stage.frozen, "frozen", mask, model, False),
            mask,
        )
        for stage in job.stages
    )
    return Parts(params, fixed, static, turn_masks, stage_masks)


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
