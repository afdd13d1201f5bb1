r"""Units: a formula that adds meters to seconds is never selected.

A unit is a row of exponents, one per base unit: (1, -2) for m s^-2. A free constant may have any unit,
and so may a part with one as a factor. The rules for parts with units a and b:

    a + b, a - b    equal, or one of them free: then the unit of the other
    a * b, a / b    a + b, a - b as rows; free if one of them is
    square, sqrt    2 a, a/2;  neg, abs: a
    exp, sin, ...   a = 0, or free; the value is dimensionless

Reference:  Deep symbolic regression for physics guided by units constraints (2023) | arXiv:2303.03192
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool

from nde.symbolic.tape import CONSTANT, FIRST_VARIABLE, INDEX, Codes, Language, complexity, parts

Row = tuple[float, ...]


class Units(tuple):
    """The units of the inputs and of the output: `Units({"q": (0, 0), "v": (0, -1)}, (0, -2))`.

    Args:
        inputs: Exponents of the base units by variable.
        output: Those of the formula.

    Raises:
        ValueError: for rows of different length.
    """

    def __new__(cls, inputs: dict[str, Sequence[float]], output: Sequence[float]):
        rows = tuple((name, tuple(map(float, row))) for name, row in inputs.items())
        output = tuple(map(float, output))
        if any(len(row) != len(output) for _, row in rows):
            raise ValueError(
                f"`units` has rows {dict(rows)} and output {output}; each has one exponent per base "
                "unit, and all the same number of them."
            )
        return super().__new__(cls, (rows, output))

    def of(self, variables: Sequence[str]) -> np.ndarray:
        """One row per variable."""
        rows = dict(self[0])
        missing = [name for name in variables if name not in rows]
        if missing:
            raise ValueError(f"`units` says nothing of {missing}; give a row for every variable.")
        return np.array([rows[name] for name in variables])


def agree(language: Language, units: Units, codes: Codes) -> Bool[Array, ""]:
    """Whether the units of a tape agree, inside it and with the output."""
    rows, (size, left) = units.of(language.variables), parts(language, codes)
    del size
    variable = jnp.clip(codes - FIRST_VARIABLE, 0, len(rows) - 1)
    unit = jnp.asarray(rows)[variable]
    free = codes == CONSTANT

    def step(i, state):
        unit, free, fine = state
        a, b = (unit[left[i]], free[left[i]]), (unit[i - 1], free[i - 1])
        for code, operator in enumerate(language.table, language.first_operator):
            row, is_free, agrees = _rule(operator, a, b)
            here = codes[i] == code
            unit = unit.at[i].set(jnp.where(here, row, unit[i]))
            free = free.at[i].set(jnp.where(here, is_free, free[i]))
            fine = fine & (agrees | ~here)
        return unit, free, fine

    unit, free, fine = jax.lax.fori_loop(1, codes.shape[0], step, (unit, free, jnp.ones((), bool)))
    root = (complexity(codes) - 1).astype(INDEX)
    return fine & (free[root] | _same(unit[root], jnp.asarray(units[1])))


def _rule(operator, a, b):
    """Unit of the result, whether it is free, and whether the arguments agree."""
    (left, left_free), (right, right_free) = a, b
    yes = jnp.ones((), bool)
    if operator.name in ("+", "-"):
        row = jnp.where(left_free, right, left)
        either = left_free | right_free
        return row, left_free & right_free, either | _same(left, right)
    if operator.name in ("*", "/"):
        sign = 1.0 if operator.name == "*" else -1.0
        return left + sign * right, left_free | right_free, yes
    if operator.power is not None:
        return operator.power * right, right_free, yes
    return jnp.zeros_like(right), ~yes, right_free | _same(right, jnp.zeros_like(right))


def _same(a: Array, b: Array) -> Bool[Array, ""]:
    return jnp.all(jnp.abs(a - b) < 1e-6)
