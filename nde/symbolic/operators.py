"""The operators that a formula may use, and what they mean to NumPy and to sympy.

None is protected. Where an operator is undefined its value is NaN, and NaN spreads: an expression has a
finite value only where every part of it has one (1/(1/x) has none at x = 0), so what evolution selects
means the same on paper.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

__all__ = ["OPERATORS", "Operator"]


class Operator(NamedTuple):
    """An operator of one or two arguments.

    Args:
        name: In formulas: `+`, or a function name.
        arity: Number of arguments, 1 or 2.
        function: Elementwise, of arrays.
        power: What it does to the unit of its argument: that power of it; None where the argument must
            be dimensionless (of binary operators see `nde.symbolic.units`).
        commutes: Whether the order of the arguments does not matter.
    """

    name: str
    arity: int
    function: Callable[..., Array]
    power: float | None = None
    commutes: bool = False


def finite(value: Float[Array, "..."]) -> Float[Array, "..."]:
    """`value` where it is finite, else NaN."""
    return jnp.where(jnp.isfinite(value), value, jnp.full_like(value, jnp.nan))


_ALL = (
    Operator("+", 2, jnp.add, commutes=True),
    Operator("-", 2, jnp.subtract),
    Operator("*", 2, jnp.multiply, commutes=True),
    Operator("/", 2, jnp.divide),
    Operator("neg", 1, jnp.negative, 1.0),
    Operator("abs", 1, jnp.abs, 1.0),
    Operator("square", 1, lambda x: x * x, 2.0),
    Operator("cube", 1, lambda x: x * x * x, 3.0),
    Operator("sqrt", 1, jnp.sqrt, 0.5),
    Operator("exp", 1, jnp.exp),
    Operator("log", 1, jnp.log),
    Operator("sin", 1, jnp.sin),
    Operator("cos", 1, jnp.cos),
    Operator("tanh", 1, jnp.tanh),
)
OPERATORS = {operator.name: operator for operator in _ALL}


def check_operators(names: Sequence[str]) -> tuple[str, ...]:
    """Known operators, each once."""
    unknown = [name for name in names if name not in OPERATORS]
    if isinstance(names, str) or unknown or not names or len(set(names)) < len(names):
        raise ValueError(
            f"`operators` is {names!r}; it is a sequence of different names out of "
            f"{', '.join(OPERATORS)}."
        )
    return tuple(names)
