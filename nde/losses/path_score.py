"""The loss of a model that draws paths: one path per example, scored against the data as two samples."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, PRNGKeyArray, PyTree

from nde.losses.finite_dimensional import finite_dimensional_score
from nde.losses.series import as_series


def path_score(
    model: Any,
    batch: Any,
    key: PRNGKeyArray,
    *,
    score: Callable = finite_dimensional_score,
    args: PyTree[Any] = None,
) -> Float[Array, ""]:
    """The score of paths that a model draws, against those of the data: the law is fitted, not each path.

    A squared error on paths would teach a model to have no noise; this does not. Give it to `nde.fit`
    with a score: `functools.partial(losses.path_score, score=losses.signature_score)`.

    Args:
        model: Draws paths: `model(ts, key=key)`, or `model(ts, args, key=key)`, is of shape (times,
            channels).
        batch: An `nde.train.Batch` whose data is `(ts, ys)`, shapes (examples, times) and (examples, times,
            channels), or `(ts, ys, mask)`, as of `trajectory` (nan is missing).
            A time counts where all channels do.
        key: Of the paths and of what the score draws.
        score: `score(ts, fake, real, mask=mask, key=key) -> scalar`: `finite_dimensional_score`,
            `signature_score`, `moments`, with their options bound by `functools.partial`.
        args: Passed to the model if it is not None, the same for every path.

    Raises:
        ValueError: for other data.
    """
    ts, ys, observed = as_series(batch.data, "path_score")
    observed = jnp.all(observed, axis=2) & batch.mask[:, None]
    for_paths, for_score = jax.random.split(key)
    drawn = draw(model, ts, args, batch.example_keys(for_paths))
    return score(ts, drawn, ys, mask=observed, key=for_score)


def draw(
    model: Any,
    ts: Float[Array, "examples times"],
    args: PyTree[Any],
    keys: Key[Array, " examples"],
) -> Float[Array, "examples times channels"]:
    """One path per row of times."""

    def path(ts: Array, key: PRNGKeyArray) -> Array:
        return model(ts, key=key) if args is None else model(ts, args, key=key)

    return jax.vmap(path)(ts, keys)
