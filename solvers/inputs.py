"""What both packages ask of numbers, arrays and tolerances."""

from typing import Any

import diffrax
import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree


def check_count(name: str, value: Any, hint: str = "", least: int = 1) -> None:
    """`value` is an integer, and large enough."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
        raise ValueError(f"`{name}` is {value!r}; it must be an integer >= {least}{hint}.")


def is_traced(*trees: PyTree) -> bool:
    """Whether there are no numbers to look at: inside `jax.jit` or another transformation."""
    return any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(trees))


def tolerances(controller: diffrax.AbstractStepSizeController) -> tuple[Any, Any]:
    """`rtol` and `atol` of a controller, or of the one that it wraps; None where there are none."""
    is_adaptive = lambda x: isinstance(x, diffrax.AbstractAdaptiveStepSizeController)
    for inner in jax.tree.leaves(controller, is_leaf=is_adaptive):
        if is_adaptive(inner):
            return getattr(inner, "rtol", None), getattr(inner, "atol", None)
    return None, None


def check_tolerances(controller: diffrax.AbstractStepSizeController, y0: PyTree[Array]) -> None:
    """Tolerances that are known, against what the dtype of the state can resolve."""
    is_known = lambda x: x is not None and not is_traced(x) and np.ndim(x) == 0
    pairs = zip(("rtol", "atol"), tolerances(controller), strict=True)
    known = {name: float(x) for name, x in pairs if is_known(x)}
    for name, value in known.items():
        if not value >= 0:
            raise ValueError(
                f"`{name}` is {value}; a tolerance must be positive, for example 1e-6."
            )
    if len(known) < 2:
        return
    if max(known.values()) == 0:
        raise ValueError(
            "`rtol` and `atol` are both 0, which no step can meet; at least one must be positive, for "
            "example `PIDController(rtol=1e-6, atol=1e-9)`."
        )
    eps = max((float(jnp.finfo(x.dtype).eps) for x in jax.tree.leaves(y0)), default=0.0)
    if known["rtol"] > 0 and max(known.values()) < eps:
        raise ValueError(
            f"`rtol` is {known['rtol']:.1e}, below what the state can resolve: the smallest usable value "
            f'is {10 * eps:.1e}. For tighter ones use float64: `jax.config.update("jax_enable_x64", True)`.'
        )


def said(error: BaseException) -> str | None:
    """The sentence of a check at run time, in what equinox or the compiler makes of it."""
    _, found, rest = str(error).rpartition("EquinoxRuntimeError: ")
    return rest.split("\n\n-----")[0].strip() if found else None
