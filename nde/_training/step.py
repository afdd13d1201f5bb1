"""The compiled step of a training run: loss, gradient, guard, update; and the validation beside it.

A batch may be divided into parts, over the devices of a mesh or one after the other to save memory.
Each part gives the sums

    w value,  w gradient,  w,  n metrics,  n        n: its valid examples, w: the metric `weight`, or n

which are added up, over devices in one all-reduce of one vector, and divided by the total weight: the
batch has the loss of its parts' weighted mean. Every device then makes the same update.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree

from nde._training.batching import ArrayRows, Batch, GivenRows
from nde._training.options import Average, Turn, leaf_paths
from nde._training.parameters import strongly_typed
from nde.solvers.adjoint.traced import code

COLUMNS = (
    *("loss", "gradient_norm", "skipped", "reason", "skips", "seconds"),
    *("turn", "stage", "validation", "ended", "alarm"),
)


@dataclass(frozen=True)
class Problem:
    """All that is compiled in, and nothing that is handed to a step.

    `masks`: for every turn, which leaves of the model it trains.
    """

    turns: tuple[Turn, ...]
    masks: tuple[PyTree[bool], ...]
    static: PyTree
    max_skips: int
    average: Average | None = None
    project: Callable | None = None
    accumulate: int = 1
    validation_loss: Callable | None = None
    validation_parts: int = 1
    patience: int | None = None
    mesh: Mesh | None = None
    starts: bool = False  # several models side by side

    @property
    def axes(self) -> tuple[str, ...]:
        """The axes of the mesh that a batch is divided over."""
        return () if self.mesh is None or self.starts else tuple(self.mesh.axis_names)

    @property
    def alarmed(self) -> bool:
        """Whether a step is also told if a process is about to end: there is more than one."""
        return bool(self.axes) and jax.process_count() > 1

    @property
    def devices(self) -> int:
        """Number of devices that a batch is divided over."""
        return self.mesh.size if self.mesh is not None and not self.starts else 1


class Best(NamedTuple):
    """The best validated model so far."""

    params: PyTree[Array]
    value: Float[Array, ""]
    waited: Int[Array, ""]  # validations since


class State(NamedTuple):
    """What one step hands to the next."""

    params: PyTree[Array]
    opt_states: tuple[PyTree[Array], ...]  # one for each turn
    skips: Int[Array, ""]  # in a row; at the limit the state stays what it is
    reason: Int[Array, ""]  # of the last skip: an index into `reasons`, 0 for none
    average: PyTree[Array] | None
    averaged: Int[Array, " turns"] | None  # steps in the average
    best: Best | None
    ended: Bool[Array, ""]  # by the validation: the state stays what it is


def initial_state(problem: Problem, params: PyTree[Array]) -> State:
    """The state before the first step."""
    zero = jnp.zeros((), dtype=jnp.int32)
    opt_states = tuple(
        strongly_typed(_leniently(turn.optim.init, eqx.filter(params, mask)))
        for turn, mask in zip(problem.turns, problem.masks, strict=True)
    )
    average = problem.average
    best = None
    if problem.validation_loss is not None:
        best = Best(params, jnp.asarray(jnp.inf, dtype=float), zero)
    return State(
        params=params,
        opt_states=opt_states,
        skips=zero,
        reason=zero,
        average=None if average is None else params,
        averaged=None if average is None else jnp.zeros(len(problem.turns), dtype=jnp.int32),
        best=best,
        ended=jnp.zeros((), dtype=bool),
    )


def make_step(problem: Problem, number: int, rows: ArrayRows | GivenRows) -> Callable:
    """`step(state, fixed, payload, index, key, setting) -> (state, record)` of one turn."""
    turn, mask = problem.turns[number], problem.masks[number]

    def step(
        state: State, fixed: PyTree[Array], payload: PyTree[Any], index: Array, key, setting: Any
    ):
        key, alarm = jax.random.fold_in(key, index), None
        if problem.alarmed:
            payload, alarm = payload
        batch = _assemble(problem, rows, payload, index, key, setting)
        mine, held = eqx.partition(state.params, mask)

        def objective(mine: PyTree[Array], part: Any, part_key):
            model = eqx.combine(mine, held, fixed, problem.static)
            return _checked_loss(turn.loss(model, part, part_key), part.mask)

        differentiate = jax.value_and_grad(objective, has_aux=True)
        of_batch = _whole(problem, differentiate, problem.accumulate, True)
        value, grads, metrics = of_batch(mine, batch, key, alarm)
        alarm = metrics.pop("alarm", jnp.zeros(()))
        evaluate = _searched(lambda mine: of_batch(mine, batch, key)[:2])
        trains = eqx.filter(setting["trains"], mask) if "trains" in setting else None
        grads = _kept(trains, grads)

        def update(grads: PyTree[Array], value: Array):
            opt_state = state.opt_states[number]
            updates, opt_state = turn.optim.update(
                grads, opt_state, mine, value=value, grad=grads, value_fn=evaluate
            )
            if "rate" in setting:
                updates = jax.tree.map(lambda u: u * setting["rate"].astype(u.dtype), updates)
            return optax.apply_updates(mine, updates), opt_state, gradient_norm(grads)

        new, opt_state, norm = _leniently(update, grads, value)
        new = _kept(trains, _projected(problem, new, held, fixed, mask), mine)

        stopped = (state.skips >= problem.max_skips) | state.ended | (alarm > 0)
        found = _first_not_finite(value, grads, new)
        ok = (found == 0) & ~stopped
        choose = lambda new, old: jnp.where(ok, _cast(new, old.dtype), old)
        new = jax.tree.map(choose, new, mine)
        opt_states = list(state.opt_states)
        opt_states[number] = jax.tree.map(choose, opt_state, opt_states[number])
        skips = jnp.where(ok, 0, jnp.where(stopped, state.skips, state.skips + 1))
        reason = jnp.where(stopped, state.reason, found)
        record = {"loss": value, "gradient_norm": norm, "skipped": ~ok, "reason": reason}
        record |= {"skips": skips, "ended": state.ended}
        if problem.alarmed:
            record["alarm"] = alarm
        after = state._replace(
            params=eqx.combine(new, held),
            opt_states=tuple(opt_states),
            skips=skips,
            reason=reason,
        )
        return _averaged(problem, number, after, new, ok, index), record | metrics

    return step


def _searched(value_and_grad: Callable) -> Callable:
    """The loss along a line, with the gradient of the whole batch wherever that is divided."""

    @jax.custom_vjp
    def value(mine: PyTree[Array]):
        return value_and_grad(mine)[0]

    def pull(grads: PyTree[Array], cotangent: Array):
        return (jax.tree.map(lambda g: cotangent.astype(g.dtype) * g, grads),)

    value.defvjp(value_and_grad, pull)
    return value


def make_validation(problem: Problem, rows: ArrayRows) -> Callable:
    """`validate(state, fixed, payload, index, key) -> (state, record)`: keeps the best model."""
    loss: Any = problem.validation_loss

    def validate(
        state: State, fixed: PyTree[Array], payload: PyTree[Any], index: Array, key, setting: Any
    ):
        params = state.params if state.average is None else state.average
        batch = _assemble(problem, rows, payload, index, key, setting | {"training": False})

        def objective(params: PyTree[Array], part: Any, part_key):
            model = eqx.combine(params, fixed, problem.static)
            return _checked_loss(loss(model, part, part_key), part.mask)

        value, _ = _whole(problem, objective, problem.validation_parts)(params, batch, key)
        best: Any = state.best
        value = value.astype(best.value.dtype)
        better = (value < best.value) & ~state.ended
        keep = lambda new, old: jnp.where(better, new, old)
        waited = jnp.where(better, 0, best.waited + 1)
        waited = jnp.where(state.ended, best.waited, waited)
        kept = Best(
            jax.tree.map(keep, params, best.params),
            keep(value, best.value),
            waited,
        )
        ended = state.ended
        if problem.patience is not None:
            ended |= waited >= problem.patience
        return state._replace(best=kept, ended=ended), {"validation": value}

    return validate


def _assemble(problem, rows, payload, index, key, setting) -> Batch:
    """The batch of a step, or this device's part of it; every example has the key it has anywhere."""
    part, parts = 0, problem.devices
    if problem.axes:
        part = jax.lax.axis_index(problem.axes)
    data, mask = rows(payload, part, parts)
    keys = jax.random.split(key, rows.padded)
    if parts > 1:
        share = rows.padded // parts
        keys = jax.lax.dynamic_slice_in_dim(keys, part * share, share)
    return Batch(
        data,
        mask,
        index,
        keys=keys,
        horizon=setting.get("horizon"),
        weights=setting.get("weights"),
        training=setting.get("training", True),
    )


def _whole(problem: Problem, function: Callable, count: int, grad: bool = False) -> Callable:
    """`function(params, batch, key)` of a whole batch, from its parts: (value, metrics), or (value,
    gradient, metrics) where it is a `jax.value_and_grad`."""
    axes = problem.axes
    unpack = lambda out: (out[0][0], out[1], out[0][1]) if grad else (out[0], (), out[1])

    def undivided(params: PyTree[Array], batch: Any, key, alarm=None):
        value, grads, extra = unpack(function(params, batch, key))
        metrics = extra.metrics
        if extra.codes is not None:
            metrics = metrics | {"result": extra.codes}
        return (value, grads, metrics) if grad else (value, metrics)

    def sums(params: PyTree[Array], part: Any, key):
        value, grads, extra = unpack(function(params, part, key))
        valid = jnp.sum(part.mask, dtype=value.dtype)
        weight = valid if extra.weight is None else extra.weight.astype(value.dtype)
        # A part without anything valid is nan, and counts for nothing.
        scaled = lambda w: lambda x: jnp.where(w > 0, x * w.astype(x.dtype), jnp.zeros((), x.dtype))
        metrics = jax.tree.map(lambda x: scaled(valid)(x.astype(value.dtype)), extra.metrics)
        weighted = jax.tree.map(scaled(weight), (value, grads))
        return (weighted, weight, metrics, valid), extra.codes

    def divided(params: PyTree[Array], batch: Any, key, alarm=None):
        if count == 1:
            total, codes = sums(params, batch, key)
        else:
            total, codes = _scanned(sums, params, batch, key, count)
        if axes:
            (total, alarm), codes = _all_reduced((total, alarm), codes, axes, problem.devices)
        (value, grads), weight, metrics, valid = total
        mean = lambda w: lambda x: x / w.astype(x.dtype)
        value, grads = jax.tree.map(mean(weight), (value, grads))
        metrics = jax.tree.map(mean(valid), metrics)
        if alarm is not None:
            metrics = metrics | {"alarm": alarm[0]}
        if codes is not None:
            metrics = metrics | {"result": codes}
        return (value, grads, metrics) if grad else (value, metrics)

    return undivided if count == 1 and not axes else divided


def _scanned(sums: Callable, params: PyTree, batch: Batch, key: PRNGKeyArray, count: int) -> Any:
    """The sums over `count` equal parts of a batch, one after the other."""
    cut = lambda x: x.reshape(count, -1, *x.shape[1:])
    parts = jax.tree.map(cut, (batch.data, batch.mask, batch.keys))

    def of_part(part: Any):
        return sums(params, eqx.tree_at(lambda b: (b.data, b.mask, b.keys), batch, part), key)

    def add(total: Any, part: Any):
        more, codes = of_part(part)
        return jax.tree.map(jnp.add, total, more), codes

    out, _ = jax.eval_shape(of_part, jax.tree.map(lambda x: x[0], parts))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), out)
    total, codes = jax.lax.scan(add, zeros, parts)
    return total, None if codes is None else codes.reshape(-1)


def _all_reduced(total: PyTree, codes: Any, axes: Sequence[str], devices: int) -> Any:
    """The sums over all devices, and the codes of all examples, by one all-reduce of one vector."""
    leaves, tree = jax.tree.flatten(total)
    dtype = max((leaf.dtype for leaf in leaves), key=lambda d: jnp.finfo(d).bits)
    dtype = jnp.float32 if jnp.finfo(dtype).bits < 32 else dtype
    flat = [leaf.reshape(-1).astype(dtype) for leaf in leaves]
    if codes is not None:
        place = jax.nn.one_hot(jax.lax.axis_index(axes), devices, dtype=dtype)
        flat.append((place[:, None] * codes.astype(dtype)[None]).reshape(-1))
    vector = jax.lax.psum(jnp.concatenate(flat), tuple(axes))
    out, start = [], 0
    for leaf in leaves:
        out.append(vector[start : start + leaf.size].reshape(leaf.shape).astype(leaf.dtype))
        start += leaf.size
    if codes is not None:
        codes = vector[start:].astype(codes.dtype)
    return jax.tree.unflatten(tree, out), codes


def _kept(trains: PyTree[Array] | None, tree: PyTree, other: PyTree = None) -> PyTree:
    """`tree` where the stage trains something; elsewhere `other`, or zeros."""
    if trains is None:
        return tree
    other = jax.tree.map(jnp.zeros_like, tree) if other is None else other
    return jax.tree.map(lambda on, x, y: jnp.where(on, x, y.astype(x.dtype)), trains, tree, other)


def _projected(problem: Problem, new: PyTree, held: PyTree, fixed: PyTree, mask: PyTree) -> PyTree:
    """What the user's projection makes of the updated parameters."""
    if problem.project is None:
        return new
    before = eqx.combine(new, held, fixed, problem.static)
    after = problem.project(before)
    if jax.tree.structure(after) != jax.tree.structure(before):
        raise ValueError(
            f"`project` returned {eqx.tree_pformat(after)}; it gives back the model with other values "
            "of its arrays, and all else as it was (equinox.tree_at)."
        )
    found = eqx.filter(after, mask)
    for (path, leaf), old in zip(
        jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(new), strict=True
    ):
        if jnp.shape(leaf) != old.shape:
            raise ValueError(
                f"`project` gave `model{jax.tree_util.keystr(path)}` the shape {jnp.shape(leaf)} "
                f"instead of {old.shape}; it may change values alone."
            )
    return found


def _averaged(
    problem: Problem, number: int, state: State, new: PyTree, ok: Array, index: Array
) -> State:
    """The state with its average moved towards the parameters that this turn has trained."""
    average = problem.average
    if average is None:
        return state
    count: Any = state.averaged
    due = ok & (index >= average.start) & ((index - average.start) % average.every == 0)
    n = count[number].astype(float)
    weight = 1.0 / (n + 1.0)
    if average.decay is not None:
        weight = jnp.maximum(weight, 1.0 - average.decay)
    weight = jnp.where(due, weight, jnp.where(n == 0, 1.0, 0.0))
    mask = problem.masks[number]
    mine, others = eqx.partition(state.average, mask)
    mine = jax.tree.map(lambda a, x: a + weight.astype(a.dtype) * (x - a), mine, new)
    counts = count.at[number].add(due.astype(count.dtype))
    return state._replace(average=eqx.combine(mine, others), averaged=counts)


def reasons(params: PyTree[Array]) -> list[str]:
    """What each value of `State.reason` means; the order of `_first_not_finite`."""
    paths = leaf_paths(params)
    return [
        "nothing",
        "the value of the loss",
        *(f"the gradient of `{path}`" for path in paths),
        *(f"the update of `{path}`" for path in paths),
    ]


def gradient_norm(tree: PyTree[Array]) -> Float[Array, ""]:
    """Euclidean, in float32 at least: first leaf by leaf, which is also faster to compile."""
    leaves = jax.tree.leaves(tree)
    dtype = max((leaf.dtype for leaf in leaves), key=lambda dtype: jnp.finfo(dtype).bits)
    dtype = jnp.float32 if jnp.finfo(dtype).bits < 32 else dtype
    return _scaled_norm(jnp.stack([_scaled_norm(leaf.astype(dtype)) for leaf in leaves]))


def _scaled_norm(x: Array) -> Float[Array, ""]:
    """In units of the largest entry: below 1e-19, squares underflow in float32."""
    largest = jnp.max(jnp.abs(x), initial=0.0)
    scale = jnp.where((largest > 0) & jnp.isfinite(largest), largest, 1.0)
    return scale * jnp.sqrt(jnp.sum((x / scale) ** 2))


def _first_not_finite(value: Float[Array, ""], grads: PyTree, new: PyTree) -> Int[Array, ""]:
    leaves = [value, *jax.tree.leaves(grads), *jax.tree.leaves(new)]
    bad = jnp.stack([~jnp.all(jnp.isfinite(leaf)) for leaf in leaves])
    return jnp.where(jnp.any(bad), jnp.argmax(bad).astype(jnp.int32) + 1, 0)


class Extra(NamedTuple):
    """What a loss gives beside its value."""

    metrics: dict[str, Array]
    codes: Int[Array, " examples"] | None  # the results of the solves
    weight: Float[Array, ""] | None  # of this part of a batch


def _checked_loss(out: Any, mask: Bool[Array, " examples"]) -> tuple[Float[Array, ""], Extra]:
    pair: Any = out if isinstance(out, tuple) and len(out) == 2 else (out, {})
    value, metrics = pair
    if (
        not eqx.is_array(value)
        or value.shape != ()
        or not jnp.issubdtype(value.dtype, jnp.floating)
    ):
        what = f"shape {value.shape}, dtype {value.dtype}" if eqx.is_array(value) else repr(value)
        raise ValueError(
            f"`loss` returned {what}; return a floating scalar (jnp.mean of the errors), or a pair "
            "of it and a dict."
        )
    if not isinstance(metrics, dict):
        raise ValueError(
            f"`loss` returned metrics {metrics!r}; return a dict of scalars as the second value."
        )
    metrics = dict(metrics)
    results, weight = metrics.pop("result", None), metrics.pop("weight", None)
    if weight is not None and not _is_number(weight):
        raise ValueError(
            f"`loss` returned the metric 'weight', {eqx.tree_pformat(weight)}; it is a scalar, the "
            "number of entries in the mean that the loss is."
        )
    for name, metric in metrics.items():
        if not isinstance(name, str) or name in COLUMNS or not _is_number(metric):
            raise ValueError(
                f"`loss` returned the metric {name!r}, {eqx.tree_pformat(metric)}; a metric is a "
                f"scalar (jnp.mean) and its name is a string, none of {COLUMNS}."
            )
    codes = None if results is None else jnp.where(mask, _codes(results, mask), 0)
    numbers = {name: jnp.asarray(metric) for name, metric in metrics.items()}
    weight = None if weight is None else jnp.asarray(weight, dtype=float)
    return value, jax.lax.stop_gradient(Extra(numbers, codes, weight))


def _is_number(metric: Any) -> bool:
    if not eqx.is_array_like(metric) or jnp.shape(metric) != ():
        return False
    return not jnp.issubdtype(jnp.result_type(metric), jax.dtypes.extended)


def _codes(results: Any, mask: Bool[Array, " examples"]) -> Int[Array, " examples"]:
    if isinstance(results, diffrax.RESULTS) and code(results).shape == mask.shape:
        return code(results)
    raise ValueError(
        f"`loss` returned the metric 'result' {results!r}; it is the `result` of the solves, one per "
        f"example: a batch of diffrax.RESULTS of shape {mask.shape}."
    )


def _leniently(function: Callable, *args: Any) -> Any:
    """Call an optimizer, which need not be written for strict promotion."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        try:
            return function(*args)
        except (AttributeError, TypeError) as error:
            raise ValueError(
                f"`optim` cannot be used: {error}. It is called as init(params) and update(grads, "
                "state, params, value=loss, grad=grads, value_fn=loss_of_params), where `params` is "
                "the model with None for all that is not trained. A tree of labels or masks "
                "goes in as a function, `lambda params: labels`: optax would call a model, which is "
                "callable. Use optax.adam(1e-3)."
            ) from error


def _cast(leaf: Array, dtype: Any) -> Array:
    return leaf if leaf.dtype == dtype else leaf.astype(dtype)
