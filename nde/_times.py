"""How times of all kinds enter: what single precision would move is refused."""

import jax
import numpy as np
from jaxtyping import Array, Float


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
