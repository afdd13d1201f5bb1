"""Mean squared errors under masks that are safe to differentiate.

A mask says which entries count. A masked entry is replaced *before* the arithmetic: 0 * nan is nan,
and so is its gradient. A mask without a true entry gives nan, which `nde.fit` reports: nothing to
learn from must not look like a loss of zero.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def mse(
    prediction: Float[Array, "*shape"],
    target: Float[Array, "*shape"],
    mask: Bool[Array, "..."] | None = None,
) -> Float[Array, ""]:
    """Mean squared error.

    Args:
        prediction: Any shape.
        target: The same shape.
        mask: The entries that count: the leading axes of `prediction`, such as (examples, times).

    Raises:
        ValueError: if the shapes do not fit, or the mask is not boolean.
    """
    if prediction.shape != target.shape:
        raise ValueError(
            f"`prediction` has shape {prediction.shape} but `target` has shape {target.shape}; "
            "give one target for every prediction."
        )
    if mask is None:
        return jnp.mean((prediction - target) ** 2)
    mask = broadcast_mask(mask, target)
    error = jnp.where(mask, prediction, 0.0) - jnp.where(mask, target, 0.0)
    return jnp.mean(error**2, where=mask)


def log_mse(
    prediction: Float[Array, "*shape"],
    target: Float[Array, "*shape"],
    mask: Bool[Array, "..."] | None = None,
) -> Float[Array, ""]:
    """Mean squared error of the logarithms: log-normal errors, for positive quantities over several
    orders of magnitude.

    Its square root is close to the typical relative error. Arguments and errors as in `mse`; a
    prediction that is not positive gives nan.
    """
    if mask is not None:
        prediction, target = (
            jnp.where(broadcast_mask(mask, values), values, 1.0) for values in (prediction, target)
        )
    return mse(jnp.log(prediction), jnp.log(target), mask)


def broadcast_mask(mask: Bool[Array, "..."], values: Array) -> Bool[Array, "..."]:
    """A mask of leading axes as one of the shape of `values`."""
    if mask.dtype != bool:
        raise ValueError(
            f"`mask` has dtype {mask.dtype}; a mask is boolean, True where an entry counts: "
            "mask > 0. Weights need a loss of their own."
        )
    if mask.shape != values.shape[: mask.ndim]:
        raise ValueError(
            f"`mask` has shape {mask.shape} but the values have shape {values.shape}; "
            f"a mask has the leading axes, {values.shape[: mask.ndim]}."
        )
    mask = jnp.expand_dims(mask, tuple(range(mask.ndim, values.ndim)))
    return jnp.broadcast_to(mask, values.shape)
