"""What both packages ask of numbers, arrays and tolerances."""

from typing import Any

import diffrax
import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

USE_FLOAT64 = 'use float64: `jax.config.update("jax_enable_x64", True)`'
FINER_TIMES = (
    "Use a larger `dt0`, dt0=None with adaptive steps, float64 times, or shift the time so that it starts "
    "near 0."
)
FINITE_TIMES = (
    "Times must be finite. To run to a steady state, use a large `t1` and "
    "`event=diffrax.Event(diffrax.steady_state_event())`."
)


def check_count(name: str, value: Any, hint: str = "", least: int = 1) -> None:
    """`value` is an integer, and large enough."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
        raise ValueError(f"`{name}` is {value!r}; it must be an integer >= {least}{hint}.")


def known_number(x: Any) -> float | None:
    """A scalar as a Python number; None where there is none before the program runs."""
    if x is None or np.ndim(x) != 0:
        return None
    try:
        return float(x)
    except (jax.errors.ConcretizationTypeError, jax.errors.TracerArrayConversionError):
        return None


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
    pairs = zip(("rtol", "atol"), tolerances(controller), strict=True)
    known = {name: known_number(x) for name, x in pairs}
    known = {name: x for name, x in known.items() if x is not None}
    wrong = bad_tolerance(known)
    if wrong is not None:
        raise ValueError(". ".join(wrong))
    eps = max((float(jnp.finfo(x.dtype).eps) for x in jax.tree.leaves(y0)), default=0.0)
    if len(known) == 2 and known["rtol"] > 0 and max(known.values()) < eps:
        raise ValueError(
            f"`rtol` is {known['rtol']:.1e}, below what the state can resolve: the smallest usable value "
            f"is {10 * eps:.1e}. For tighter ones {USE_FLOAT64}."
        )


def bad_tolerance(known: dict[str, float]) -> tuple[str, str] | None:
    """What is wrong with the `rtol` and `atol` that are known, and what to do."""
    for name, value in known.items():
        if not value >= 0:
            return f"`{name}` is {value}", "A tolerance must be positive, for example 1e-6."
    if len(known) == 2 and max(known.values()) == 0:
        reason = "`rtol` and `atol` are both 0, which no step can meet"
        return reason, "At least one must be positive: `PIDController(rtol=1e-6, atol=1e-9)`."
    return None


def check_key(key: Any, owner: str = "") -> None:
    """`key`, of the `owner` if one is named, is one JAX random key: no number, no batch of keys."""
    given = repr(key)
    if isinstance(key, jax.Array):
        is_typed = jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
        if key.ndim == (0 if is_typed else 1) and (is_typed or key.dtype == jnp.uint32):
            return
        given = f"an array of shape {key.shape} and type {key.dtype}"
    name = f"`key` of {owner}" if owner else "`key`"
    raise ValueError(
        f"{name} is {given}; pass one key, such as jax.random.key(0). For a batch, `jax.vmap` "
        "over the keys whatever takes one."
    )


def check_rates(rates: PyTree, y: PyTree[Array], name: str = "vector_field(t, y, args)") -> None:
    """What `name` returned is one real, floating rate for every entry of the state `y`."""
    if jax.tree.structure(rates) != jax.tree.structure(y):
        raise ValueError(
            f"`{name}` returned the structure {jax.tree.structure(rates)} for a state of structure "
            f"{jax.tree.structure(y)}. Return one rate for each part of `y`."
        )
    for (path, rate), state in zip(
        jax.tree.leaves_with_path(rates), jax.tree.leaves(y), strict=True
    ):
        leaf = f"`{name}{jax.tree_util.keystr(path)}`"
        if jnp.shape(rate) != jnp.shape(state):
            raise ValueError(
                f"{leaf} has shape {jnp.shape(rate)}, but the state there has shape {jnp.shape(state)}. "
                "Return an array of the shape of `y`."
            )
        check_rate_type(leaf, jnp.result_type(rate), state.dtype)


def check_rate_type(name: str, dtype: Any, of_state: Any) -> None:
    """A rate is floating, and real where its state is: an imaginary part would be dropped."""
    if not jnp.issubdtype(dtype, jnp.inexact):
        raise ValueError(
            f"{name} has dtype {dtype}; a rate must be floating point. Write 1.0 instead of 1, or use "
            "`.astype(y.dtype)`."
        )
    is_complex = [jnp.issubdtype(x, jnp.complexfloating) for x in (dtype, of_state)]
    if is_complex == [True, False]:
        raise ValueError(
            f"{name} is complex ({dtype}), but the state there is real ({of_state}): its imaginary part "
            "would be lost. Return `.real`, or carry the real and the imaginary part as two entries."
        )


def run_time_message(error: BaseException) -> str | None:
    """The sentence of a check at run time, in what equinox or the compiler makes of it."""
    _, found, rest = str(error).rpartition("EquinoxRuntimeError: ")
    return rest.split("\n\n-----")[0].strip() if found else None
