"""The loop on the host: hand out batches, fetch what was reported every few steps, stop when told to.

Nothing here waits for the device but the fetch. What ends a run early raises with the model and the
history so far.
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import PRNGKeyArray, PyTree

from nde._training.batching import ArrayBatches, IteratorBatches
from nde._training.history import History, Reports
from nde._training.options import Average, Settings, Stage, Turn, Validation
from nde._training.packing import Packed
from nde._training.program import Programs
from nde._training.ragged import RaggedBatches
from nde._training.resume import Checkpoint
from nde._training.step import Problem, State, initial_state
from nde._training.stopping import check_report, plain


@dataclass(frozen=True)
class Job:
    """What a run was asked for, checked, before a model is looked at."""

    turns: tuple[Turn, ...]
    stages: tuple[Stage, ...]
    batches: ArrayBatches | IteratorBatches | RaggedBatches
    key: PRNGKeyArray
    max_skips: int
    progress: bool
    validation: Validation | None
    validated: ArrayBatches | None  # the data of the validation
    validation_key: PRNGKeyArray
    validation_parts: int
    average: Average | None
    project: Callable | None
    accumulate: int
    callbacks: tuple[Callable, ...]
    checkpoint: Checkpoint | None
    mesh: Mesh | None

    @property
    def steps(self) -> int:
        return sum(stage.steps for stage in self.stages)


class Parts(NamedTuple):
    """A model, taken apart, and which of its leaves train when."""

    params: PyTree
    fixed: PyTree
    static: PyTree
    turn_masks: tuple[PyTree, ...]
    stage_masks: tuple[PyTree, ...]


class Trained(NamedTuple):
    """What a run leads to."""

    params: PyTree
    columns: dict[str, np.ndarray]
    compile_seconds: float


def train(job: Job, parts: Parts, starts: bool = False) -> Trained:
    """Run all steps."""
    if not job.steps:
        return Trained(parts.params, {}, 0.0)
    return _Run(job, parts, starts).whole()


class _Run:
    """One training run."""

    def __init__(self, job: Job, parts: Parts, starts: bool):
        self.job, self.parts = job, parts
        self.problem = Problem(
            turns=job.turns,
            masks=parts.turn_masks,
            static=parts.static,
            max_skips=job.max_skips,
            average=job.average,
            project=job.project,
            accumulate=job.accumulate,
            validation_loss=None if job.validation is None else _validated_loss(job),
            validation_parts=job.validation_parts,
            patience=None if job.validation is None else job.validation.patience,
            mesh=job.mesh,
            starts=starts,
        )
        self.settings = Settings(job.stages, parts.stage_masks)
        self.order = [i for i, turn in enumerate(job.turns) for _ in range(turn.steps)]
        self.first_steps = {self.order.index(i) for i in range(len(job.turns))}
        self.reports = Reports(job.steps, job.progress)
        self.trained = [eqx.filter(parts.params, mask) for mask in parts.turn_masks]
        self.compile_seconds, self.stopped = 0.0, False
        self.compiled: dict[Any, Callable] = {}
        make = lambda params: initial_state(self.problem, params)
        state = jax.vmap(make)(parts.params) if starts else make(parts.params)
        self.programs = Programs(self.problem, state, parts.fixed)
        self.leaves, self.tree = jax.tree.flatten(state)
        self.good, self.begin = self.leaves, 0
        self.alarm: Exception | None = None  # what ends this process at the next report
        self.last_payload: PyTree = None

    def whole(self) -> Trained:
        """All steps, from the first or from the checkpoint."""
        job = self.job
        try:
            self._restore()
            models = (
                PartitionSpec(job.mesh.axis_names) if self.problem.starts and job.mesh else None
            )
            self.leaves = self._place(self.leaves, models)
            self.fixed = self._place(jax.tree.leaves(self.parts.fixed), models)
            self._move_data()
            self.reports.begin()
            if not self.stopped:
                for index in range(self.begin, job.steps):
                    self._step(index)
                    if self.stopped:
                        break
            if self.alarm is not None:
                raise self.alarm
        except (Exception, KeyboardInterrupt) as error:
            self._raise(error)
        finally:
            self.reports.close()
        params = _chosen(self.state)
        if job.mesh is not None:  # a model is used on one device, where nothing else is said
            params = jax.tree.map(_on_host, params)
        return Trained(params, self.reports.columns(), self.compile_seconds)

    def _move_data(self) -> None:
        """Put what every step is handed on the devices of the mesh, once."""
        job = self.job
        self.key, self.validation_key = self._place((job.key, job.validation_key))
        if job.mesh is None:
            return
        self.settings.rows = [self._place(row) for row in self.settings.rows]
        for batches in (job.batches, job.validated):
            if batches is not None:
                batches.move(self._place)

    def _step(self, index: int) -> None:
        job, turn = self.job, self.order[index % len(self.order)]
        rows = job.batches.rows(index)
        payload = self._payload(index, rows)
        setting = self.settings.at(index)
        self.leaves, report = self._call(
            (turn, rows),
            lambda: self.programs.step(turn, rows),
            (self.leaves, self.fixed, payload, np.int32(index), self.key, setting),
        )
        reported, numbers = [report], {}
        if len(job.turns) > 1:
            numbers["turn"] = turn
        if len(job.stages) > 1:
            numbers["stage"] = self.settings.number_at(index)
        last = index + 1 == job.steps
        if job.validation is not None and (last or (index + 1) % job.validation.every == 0):
            reported.append(self._validate(index, setting))
        self.reports.add(reported, numbers)
        saves = job.checkpoint is not None and (last or (index + 1) % job.checkpoint.every == 0)
        cadence = max(10, job.steps // 100)
        if last or saves or index == self.begin or (index + 1) % cadence == 0:
            self._fetch()
            if saves or (self.stopped and job.checkpoint is not None):
                self._save()

    def _validate(self, index: int, setting: dict[str, Any]) -> Packed:
        validated: Any = self.job.validated
        rows = validated.rows(0)
        self.leaves, report = self._call(
            ("validation", rows),
            lambda: self.programs.validation(rows),
            (
                *(self.leaves, self.fixed, self._divided(validated.payload(0), rows)),
                *(np.int32(index), self.validation_key, setting),
            ),
        )
        return report

    def _call(self, name: Any, program: Callable, arguments: tuple) -> Any:
        """Call a program; what its first call takes is compiling."""
        if name in self.compiled:
            return self.compiled[name](*arguments)
        began = time.perf_counter()
        self.compiled[name] = program()
        out = self.compiled[name](*arguments)
        seconds = time.perf_counter() - began
        self.compile_seconds += seconds
        self.reports.pause(seconds)
        return out

    def _fetch(self) -> None:
        """Bring the reports to the host, and see whether to go on."""
        job = self.job
        limit = min(job.max_skips, job.steps)
        fetched = self.reports.fetch()
        wanted = False
        for index, record in fetched:
            if np.all(record["ended"]):
                self.stopped = True
                break
            params = self.trained[self.order[index % len(self.order)]]
            if record.get("alarm", 0) > 0:
                raise self.alarm or RuntimeError(
                    "Another process ended the training of all; its own error says why."
                )
            check_report(index, record, params, job.batches, limit, index in self.first_steps)
            numbers = None
            for callback in job.callbacks:
                numbers = _plain_numbers(index, record) if numbers is None else numbers
                with self._postponed():
                    wanted |= bool(callback(dict(numbers)))
        self.stopped |= wanted or bool(
            self.problem.patience and np.all(np.asarray(self.state.ended))
        )
        self.reports.drop_ended()
        self.good = self.leaves

    @property
    def state(self) -> State:
        """The state of the training, from its leaves."""
        return self.tree.unflatten(self.leaves)

    def _restore(self) -> None:
        checkpoint = self.job.checkpoint
        if checkpoint is None:
            return
        checkpoint.check()
        if not checkpoint.path.exists():
            return
        state, columns, self.begin = checkpoint.read(self.state)
        self.leaves = self.good = self.tree.flatten_up_to(state)
        self.reports.restore(columns)
        if isinstance(self.job.batches, IteratorBatches):
            self.job.batches.skip(self.begin)
        self.stopped = bool(np.all(np.asarray(self.state.ended)))

    def _save(self) -> None:
        state = jax.tree.map(_on_host, self.state)
        with self._postponed():
            self.job.checkpoint.write(state, self.reports.columns(), self.reports.length)

    def _raise(self, error: BaseException) -> None:
        """Raise what ended the run, with the model and the history so far."""
        meant = plain(error)
        if self.job.mesh is not None and "Closure-converted function" in str(error):
            meant = ValueError(
                "`mesh` was given, and the loss solves with an adjoint that cannot be divided over "
                "devices, such as diffrax.RecursiveCheckpointAdjoint(); use that of the models, "
                "nde.solvers.DiscreteAdjoint()."
            )
        with contextlib.suppress(Exception):  # where a step itself broke, there is nothing to fetch
            self.reports.fetch()
            self.good = self.leaves
        good: State = self.tree.unflatten(self.good)
        params = good.params if good.average is None else good.average
        if self.job.mesh is not None:
            params = jax.tree.map(_on_host, params)
        model = eqx.combine(params, self.parts.fixed, self.parts.static)
        history = History(self.reports.columns(), self.compile_seconds)
        vars(meant).update(model=model, history=history)
        if meant is error:
            raise error
        raise meant from None

    def _payload(self, index: int, rows: Any) -> PyTree:
        """What a step is handed; if this process cannot go on, what the last one was, and an alarm."""
        if not self.problem.alarmed:
            return self._divided(self.job.batches.payload(index), rows)
        with self._postponed():
            self.last_payload = self.job.batches.payload(index)
        if self.last_payload is None:  # there never was a batch to go on with
            raise self.alarm or ValueError("`data` gave nothing.")
        alarm = np.full(self.problem.devices, float(self.alarm is not None))
        divided = PartitionSpec(self.job.mesh.axis_names)
        return self._divided(self.last_payload, rows), self._place(alarm, divided)

    @contextlib.contextmanager
    def _postponed(self) -> Iterator[None]:
        """Where several processes train together, one that fails goes along until the next report:
        all others would wait for it. The report then ends all."""
        try:
            yield
        except Exception as error:
            if not self.problem.alarmed:
                raise
            self.alarm = self.alarm or error

    def _divided(self, payload: PyTree, rows: Any) -> PyTree:
        """A batch from the host, every part on its device."""
        if self.job.mesh is None or not rows.divided or self.problem.starts:
            return payload
        return self._place(payload, PartitionSpec(self.job.mesh.axis_names))

    def _place(self, tree: PyTree, spec: PartitionSpec | None = None) -> PyTree:
        """Arrays on the devices of the mesh."""
        if self.job.mesh is None:
            return tree
        return placed(tree, self.job.mesh, spec or PartitionSpec())


def placed(tree: PyTree, mesh: Mesh, spec: PartitionSpec) -> PyTree:
    """Arrays that every process has, on the devices of a mesh."""
    sharding = NamedSharding(mesh, spec)
    if jax.process_count() == 1:
        return jax.device_put(tree, sharding)

    def put(leaf: Any) -> Any:
        if eqx.is_array(leaf) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            impl = jax.random.key_impl(leaf)
            return jax.random.wrap_key_data(put(jax.random.key_data(leaf)), impl=impl)
        values = np.asarray(leaf)
        return jax.make_array_from_callback(values.shape, sharding, lambda index: values[index])

    return jax.tree.map(put, tree)


def _on_host(leaf: Any) -> Any:
    """An array that is read from this process alone."""
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(
            _on_host(jax.random.key_data(leaf)), impl=jax.random.key_impl(leaf)
        )
    return jnp.asarray(np.asarray(leaf))


def _chosen(state: State) -> PyTree:
    """The best validated parameters, else their average, else the last ones."""
    last = state.params if state.average is None else state.average
    if state.best is None:
        return last
    validated = jnp.isfinite(state.best.value)

    def choose(best, other):
        shape = validated.shape + (1,) * (best.ndim - validated.ndim)
        return jnp.where(validated.reshape(shape), best, other)

    return jax.tree.map(choose, state.best.params, last)


def _validated_loss(job: Job) -> Callable:
    loss = job.validation.loss if job.validation is not None else None
    return job.turns[0].loss if loss is None else loss


def _plain_numbers(step: int, record: dict[str, np.ndarray]) -> dict[str, Any]:
    """What a callback is told of a step."""
    numbers: dict[str, Any] = {"step": step}
    for name, value in record.items():
        if name not in ("reason", "skips", "result", "ended"):
            numbers[name] = np.asarray(value).tolist()
    return numbers
