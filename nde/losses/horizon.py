"""A training horizon that grows without changing a shape."""

import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float


def growing_horizon(
    ts: Float[Array, " times"], fraction: ArrayLike
) -> tuple[Float[Array, " times"], Bool[Array, " times"]]:
    """The first `fraction` of a series at a fixed shape: the rest repeats the last time reached.

    A model that is trained on all of an oscillating series at once settles on its mean. Trained on
    a short beginning that grows, it follows the oscillation. The shape never changes, so nothing is
    compiled again, and the solve ends at the horizon, so it costs what it covers.

    Args:
        ts: Times, shape (times,), ordered.
        fraction: Of the intervals, in (0, 1]; may be traced. At least one interval is kept.

    Returns:
        The times to solve at, and the mask of those that count, both of shape (times,).
    """
    last = ts.shape[0] - 1
    # Rounding up must not be undone by round-off: 0.1 * 50 is 5.000000001 in some precisions.
    reached = jnp.ceil(jnp.asarray(fraction, dtype=float) * last - 1e-3)
    reached = jnp.clip(reached.astype(int), min(1, last), last)
    seen = jnp.arange(ts.shape[0]) <= reached
    return jnp.where(seen, ts, ts[reached]), seen
