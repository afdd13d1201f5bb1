"""The compiled step of a training run: loss, gradient, guard, update."""

from collections.abc import Callable
from typing import Any, NamedTuple

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import optax
from jaxtyping import Array, Bool, Float, Int, PyTree

from nde._training.batching import Batch
from nde.solvers.adjoint.traced import code

COLUMNS = ("loss", "gradient_norm", "skipped", "reason", "skips", "seconds")


class State(NamedTuple):
    """What one step hands to the next."""

    params: PyTree[Array]
    opt_state: PyTree[Array]
    skips: Int[Array, ""]  # in a row; at the limit the state stays what it is
    reason: Int[Array, ""]  # of the last skip: an index into `reasons(params)`, 0 for none


def initial_state(optim: optax.GradientTransformation, params: PyTree[Array]) -> State:
    """The state before the first step."""
    zero = jnp.zeros((), dtype=jnp.int32)
    return State(params, strongly_typed(_leniently(optim.init, params)), zero, zero)


def make_step(
    loss: Callable,
    optim: optax.GradientTransformationExtraArgs,
    static: PyTree,
    assemble: Callable,
    max_skips: int,
) -> Callable:
    """`step(state, fixed, payload, index, key) -> (state, record)`, to be compiled once."""

    def step(state: State, fixed, payload, index, key):
        batch = Batch(*assemble(payload), step=index)

        def objective(params):
            model = eqx.combine(params, fixed, static)
            out = loss(model, batch, jax.random.fold_in(key, index))
            return _checked_loss(out, batch.mask)

        def update(grads, value):
            updates, opt_state = optim.update(grads, state.opt_state, state.params, value=value)
            return (
                updates,
                optax.apply_updates(state.params, updates),
                opt_state,
                gradient_norm(grads),
            )

        (value, metrics), grads = jax.value_and_grad(objective, has_aux=True)(state.params)
        updates, params, opt_state, norm = _leniently(update, grads, value)

        stopped = state.skips >= max_skips
        reason = jnp.where(stopped, state.reason, _first_not_finite(value, grads, updates))
        ok = (reason == 0) & ~stopped
        skips = jnp.where(ok, 0, jnp.where(stopped, state.skips, state.skips + 1))
        params, opt_state = jax.tree.map(
            lambda new, old: jnp.where(ok, _cast(new, old.dtype), old),
            (params, opt_state),
            (state.params, state.opt_state),
        )
        record = {
            "loss": value,
            "gradient_norm": norm,
            "skipped": ~ok,
            "reason": reason,
            "skips": skips,
        }
        return State(params, opt_state, skips, reason), record | metrics

    return step


def reasons(params: PyTree[Array]) -> list[str]:
    """What each value of `State.reason` means; the order of `_first_not_finite`."""
    paths = leaf_paths(params)
    return [
        "nothing",
        "the value of the loss",
        *(f"the gradient of `{path}`" for path in paths),
        *(f"the update of `{path}`" for path in paths),
    ]


def leaf_paths(tree: PyTree, name: str = "model") -> list[str]:
    """The path of every leaf, such as `model.vector_field.scale`."""
    return [name + jtu.keystr(path) for path, _ in jtu.tree_leaves_with_path(tree)]


def strongly_typed(tree: PyTree) -> PyTree:
    """Arrays whose type an update cannot change: a weakly typed one would be compiled for again."""
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype=jnp.asarray(leaf).dtype), tree)


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


def _first_not_finite(value: Float[Array, ""], grads: PyTree, updates: PyTree) -> Int[Array, ""]:
    leaves = [value, *jax.tree.leaves(grads), *jax.tree.leaves(updates)]
    bad = jnp.stack([~jnp.all(jnp.isfinite(leaf)) for leaf in leaves])
    return jnp.where(jnp.any(bad), jnp.argmax(bad).astype(jnp.int32) + 1, 0)


def _checked_loss(
    out: Any, mask: Bool[Array, " examples"]
) -> tuple[Float[Array, ""], dict[str, Array]]:
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
    results = metrics.pop("result", None)
    for name, metric in metrics.items():
        if not isinstance(name, str) or name in COLUMNS or not _is_number(metric):
            raise ValueError(
                f"`loss` returned the metric {name!r}, {eqx.tree_pformat(metric)}; a metric is a "
                f"scalar (jnp.mean) and its name is a string, none of {COLUMNS}."
            )
    if results is not None:
        metrics["result"] = jnp.where(mask, _codes(results, mask), 0)
    return value, {
        name: jax.lax.stop_gradient(jnp.asarray(metric)) for name, metric in metrics.items()
    }


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
                "state, params, value=loss), where `params` is the model with None for all that is "
                "not trained; line searches, such as optax.lbfgs, need more. A tree of labels or masks "
                "goes in as a function, `lambda params: labels`: optax would call a model, which is "
                "callable. Use optax.adam(1e-3)."
            ) from error


def _cast(leaf: Array, dtype: Any) -> Array:
    return leaf if leaf.dtype == dtype else leaf.astype(dtype)
