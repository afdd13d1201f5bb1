"""Times, values and which of them count, from the data of a batch."""

from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from nde.losses.squared_error import broadcast_mask


def as_series(
    data: Any, name: str
) -> tuple[
    Float[Array, "examples times"],
    Float[Array, "examples times channels"],
    Bool[Array, "examples times channels"],
]:
    """Data as `(ts, ys)` or `(ts, ys, mask)`; nan is missing, and a series that repeats its
    last time has ended there.
    """
    arrays = isinstance(data, tuple | list) and len(data) in (2, 3) and all(map(eqx.is_array, data))
    if (
        not arrays
        or data[0].ndim != 2
        or data[0].shape[1] < 2
        or data[1].ndim != 3
        or data[1].shape[:2] != data[0].shape
    ):
        raise ValueError(
            f"`batch.data` is {eqx.tree_pformat(data)}; `{name}` takes (ts, ys) or (ts, ys, mask), of "
            "shapes (examples, times) and (examples, times, channels), with two times or more. Repeat "
            "times that all examples share: jnp.tile(ts, (len(ys), 1)). One channel is ys[..., None]."
        )
    return data[0], data[1], which_count(*data)


def which_count(
    ts: Float[Array, "examples times"],
    ys: Float[Array, "examples times ..."],
    mask: Bool[Array, "..."] | None = None,
) -> Bool[Array, "examples times ..."]:
    """The values that are there: not nan, not masked, not copies of the last time."""
    padded = (ts[:, 1:] == ts[:, :-1]) & (ts[:, 1:] == ts[:, -1:])
    observed = broadcast_mask(jnp.pad(~padded, ((0, 0), (1, 0)), constant_values=True), ys)
    observed = observed & ~jnp.isnan(ys)
    return observed if mask is None else observed & broadcast_mask(mask, ys)
