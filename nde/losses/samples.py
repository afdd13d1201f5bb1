"""Two samples of paths, and the means that a score takes over their pairs.

Every score of samples is `score(ts, fake, real, mask=None, key=None) -> scalar`, to be made small:

    ts of shape (times,)            one grid for all paths; the samples are independent of each other;
    ts of shape (examples, times)   path i of both samples is seen at ts[i], and where mask[i] is true.

In the second case paths i of the two samples share their times, so a mean over independent pairs leaves
out the pair (i, i), also between the samples:

    sum_{i != j} w_i w_j k_ij / sum_{i != j} w_i w_j      with w_i = 1 where path i is observed, else 0.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from nde.solvers.inputs import is_traced


class Samples(NamedTuple):
    """Two samples of paths with their times, checked.

    Args:
        ts: Shape (examples or 1, times).
        fake: Shape (paths, times, channels).
        real: Shape (paths2, times, channels).
        mask: Shape (examples, times), or None if all is observed.
        paired: Whether path i of both is seen at the same times.
    """

    ts: Float[Array, "examples times"]
    fake: Float[Array, "paths times channels"]
    real: Float[Array, "paths2 times channels"]
    mask: Bool[Array, "examples times"] | None
    paired: bool


def check_samples(
    ts: Array, fake: Array, real: Array, mask: Array | None = None, *, least: int = 2
) -> Samples:
    """The samples, or the error that says what does not fit."""
    for name, paths in (("fake", fake), ("real", real)):
        if jnp.ndim(paths) != 3:
            raise ValueError(
                f"`{name}` has shape {jnp.shape(paths)}; a sample of paths is (paths, times, channels)."
            )
        if paths.shape[0] < least:
            raise ValueError(
                f"`{name}` has {paths.shape[0]} path; a law is judged by two paths or more: draw them "
                "with jax.vmap over keys."
            )
    if fake.shape[1:] != real.shape[1:]:
        raise ValueError(
            f"`fake` has shape {fake.shape} but `real` has shape {real.shape}; paths are compared at as "
            "many times and in as many channels."
        )
    paired = jnp.ndim(ts) == 2
    if jnp.shape(ts) != ((fake.shape[0], fake.shape[1]) if paired else (fake.shape[1],)):
        raise ValueError(
            f"`ts` has shape {jnp.shape(ts)} but `fake` has shape {fake.shape}; give the times (times,) "
            "of all paths, or (paths, times), those of each."
        )
    if paired and fake.shape[0] != real.shape[0]:
        raise ValueError(
            f"`fake` has {fake.shape[0]} paths but `real` has {real.shape[0]}; where each path has its "
            "own times, draw one path at the times of each."
        )
    if not is_traced(ts) and np.any(np.diff(np.asarray(ts)) < 0):
        raise ValueError("`ts` is not in order; sort it, and the paths with it.")
    if mask is not None and not paired:
        raise ValueError(
            "`mask` was given, but `ts` has one grid for all paths; a mask says where path i of both "
            "samples is observed: give ts of shape (paths, times) too."
        )
    if mask is not None and (mask.shape != fake.shape[:2] or mask.dtype != bool):
        raise ValueError(
            f"`mask` is {mask.dtype}{mask.shape}; it is boolean, of shape {fake.shape[:2]}."
        )
    if mask is not None:  # what is not observed may be nan
        fake, real = (jnp.where(mask[..., None], paths, 0.0) for paths in (fake, real))
    return Samples(ts if paired else ts[None], fake, real, mask, paired)


def last_observed(
    values: Float[Array, "paths times *rest"], mask: Bool[Array, "paths times"]
) -> Float[Array, "paths times *rest"]:
    """At each time the value at the last observed time; before the first one, that at the first.

    Done to times and values alike it leaves the path of straight pieces through what is observed.
    """
    index = jnp.where(mask, jnp.arange(mask.shape[1])[None], -1)
    index = jax.lax.cummax(index, axis=1)
    index = jnp.where(index < 0, jnp.argmax(mask, axis=1)[:, None], index)
    return jax.vmap(lambda rows, at: rows[at])(values, index)


def mean_of_pairs(
    gram: Float[Array, "xs ys"],
    weights: Float[Array, " examples"] | None = None,
    *,
    independent: bool = True,
) -> Float[Array, ""]:
    """The mean over i and j, without i = j unless the two are `independent`; nan of no pair."""
    if weights is None:
        pairs = jnp.ones_like(gram)
    else:
        pairs = weights[:, None] * weights[None, :]
    if not independent:
        pairs = pairs * (1 - jnp.eye(gram.shape[0], dtype=gram.dtype))
    total = jnp.sum(pairs)
    mean = jnp.sum(jnp.where(pairs > 0, gram, 0.0) * pairs) / jnp.where(total > 0, total, 1.0)
    return jnp.where(total > 0, mean, jnp.nan)
