r"""Multiple shooting: a long series as short solves side by side, which must join.

A trajectory of an oscillation depends on its parameters ever more strongly as it goes on, so the loss of
a whole series is full of local minima. On segments from node s_k at time t_k it is not:

    loss = mean |y(t_j; s_k) - y_j|^2 + continuity * mean |y(t_(k+1); s_k) - s_(k+1)|^2,

the mean of the first over all observations, of the second over the joints. Where all joints close the
segments are one trajectory, and the loss is that of it. The nodes are the data, or are trained, where
data are noisy or incomplete: the model is then the pair `(ode, nodes)`. Segments are a batch axis: they
are solved at the same time.

Reference:  Multiple shooting algorithms for jump-discontinuous problems in optimal control and
            estimation (Bock, 1984) | doi:10.1016/S1474-6670(17)61205-9
"""

from collections.abc import Callable
from typing import Any

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from nde.losses.metrics import mean_that_counts
from nde.losses.squared_error import broadcast_mask, mse
from nde.losses.trajectory import series, trajectory
from nde.paths import fill_gaps
from nde.solvers.inputs import check_count


def shooting(
    model: Any,
    batch: Any,
    key: PRNGKeyArray,
    *,
    segments: int,
    continuity: float | Callable = 1.0,
    error: Callable = mse,
) -> tuple[Float[Array, ""], dict[str, Any]]:
    """The loss of an ODE model on segments of each series, see the module.

    Args:
        model: An ODE model, which starts every segment at the data; or `(ode, nodes)` with trained
            nodes, shape (examples, segments, ...), from `shooting_nodes`. They belong to the examples:
            give all of them at every step.
        batch: As of `trajectory`. In a validation the loss is that of `trajectory`.
        key: Not used.
        segments: Number of segments; with one and without nodes this is `trajectory`.
        continuity: Weight of the joints: a number, or a function of the step, such as an optax
            schedule. It is multiplied by the weight `"continuity"` of the `nde.train.Stage`, if it
            has one. Neither compiles anything anew.
        error: As of `trajectory`.

    Returns:
        The loss, and as metrics the fraction of examples that `failed`, the mean squared `gap` of the
        joints, and the `weight`, the number of values that the loss is a mean of.

    Raises:
        ValueError: for data as of `trajectory`, for more segments than intervals, and for nodes that do
            not fit.
    """
    ode, nodes = model if isinstance(model, tuple) else (model, None)
    if not batch.training:
        return trajectory(ode, batch, key, error=error)
    ts, ys, observed = series(batch.data, starts=nodes is None)
    bounds = _bounds(ts.shape[1], segments)
    rows = _rows(bounds)
    if nodes is None:
        starts = ys[:, bounds[:-1]]
    else:
        starts = nodes
        wanted = (ys.shape[0], segments, *ys.shape[2:])
        if nodes.shape != wanted:
            raise ValueError(
                f"`nodes` has shape {nodes.shape}; for these data and {segments} segments it is {wanted}: "
                "nde.losses.shooting_nodes(ts, ys, segments)."
            )
    solve = lambda ts, y0: ode.solve(ts, y0, throw=False)
    solution = jax.vmap(jax.vmap(solve))(ts[:, rows], starts)
    failed = jnp.any(solution.result != diffrax.RESULTS.successful, axis=1)
    counts = batch.mask & ~failed
    # Each observation counts once: at the end of a segment, not at the start of the next one.
    fresh = np.concatenate([np.zeros((segments, 1), bool), np.diff(rows, axis=1) > 0], axis=1)
    fresh[0, 0] = nodes is not None  # a free start is compared with the data
    fresh = jnp.asarray(fresh)[None] & counts[:, None, None]
    mask = observed[:, rows] & broadcast_mask(fresh, observed[:, rows])
    loss = error(solution.ys, ys[:, rows], mask)
    gap = solution.ys[:, :-1, -1] - starts[:, 1:]
    # A series that has ended has no joints left.
    joined = counts[:, None] & (ts[:, bounds[1:-1]] != ts[:, -1:])
    joined = broadcast_mask(joined, gap)
    gap = jnp.sum(jnp.where(joined, gap, 0.0) ** 2) / jnp.maximum(
        jnp.sum(joined, dtype=gap.dtype), 1.0
    )
    weight = continuity(batch.step) if callable(continuity) else continuity
    weight = weight * batch.weights.get("continuity", 1.0)
    metrics = {"failed": mean_that_counts(failed, batch.mask), "gap": gap}
    metrics["weight"] = jnp.sum(mask, dtype=float)
    return loss + jnp.asarray(weight, loss.dtype) * gap, metrics


def shooting_nodes(
    ts: Float[Array, "examples times"], ys: Float[Array, "examples times channels"], segments: int
) -> Float[Array, "examples segments channels"]:
    """The data at the start of every segment, with gaps filled: nodes to be trained.

    Args:
        ts: Times, shape (examples, times).
        ys: Values, shape (examples, times, channels); nan is missing.
        segments: As of `shooting`.
    """
    bounds = _bounds(ts.shape[1], segments)
    lengths = 1 + jnp.sum(jnp.diff(ts, axis=1) != 0, axis=1)
    return jax.vmap(fill_gaps)(jnp.asarray(ts), jnp.asarray(ys), lengths)[:, bounds[:-1]]


def _bounds(times: int, segments: int) -> np.ndarray:
    """The row at which each segment begins, and the last one."""
    check_count("segments", segments)
    if segments > times - 1:
        raise ValueError(
            f"`segments` is {segments}, more than the {times - 1} intervals of the series."
        )
    return np.round(np.linspace(0, times - 1, segments + 1)).astype(int)


def _rows(bounds: np.ndarray) -> np.ndarray:
    """The rows of each segment, its end included; the last one repeats."""
    length = np.diff(bounds).max() + 1
    return np.minimum(bounds[:-1, None] + np.arange(length), bounds[1:, None])
