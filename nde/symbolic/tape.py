r"""Expressions as tapes of fixed length: postfix notation, evaluated for many at once.

    x / (c + x)   ->   x  c  x  +  /        codes, shape (length,), padded at the end
                       .  c  .  .  .        constants, shape (length,), read where the code says so

The last argument of the operator at place i ends at i - 1; the first of two ends where the last one
begins. With s_i the number of tokens of the part that ends at i,

    s_i = 1 + s_right + s_left,     right = i - 1,     left = i - 1 - s_{i-1},

so one sweep forward gives every part's value v_i, and one sweep back every part's derivative:

    v_i = f_i(v_left, v_right),     w_left += w_i df_i/dv_left,     w_right += w_i df_i/dv_right.

Data points do not mix, so the sweep back gives the derivatives by all constants at all points at once.

In code:    f_i -> the operator of `codes[i]`; v -> `values`, w -> `weights`, both (length, points)
Cost:       every operator of the language at every place and point, most of it thrown away: choose few.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from nde.symbolic.operators import OPERATORS, Operator, finite

PAD, CONSTANT, FIRST_VARIABLE = 0, 1, 2
INDEX = jnp.int32

Codes = Int[Array, " length"]
Constants = Float[Array, " length"]


@dataclasses.dataclass(frozen=True)
class Language:
    """What a tape may hold: `variables` and `operators` by name, and at most `length` tokens."""

    variables: tuple[str, ...]
    operators: tuple[str, ...]
    length: int

    @property
    def table(self) -> tuple[Operator, ...]:
        """The operators, in the order of their codes."""
        return tuple(OPERATORS[name] for name in self.operators)

    @property
    def first_operator(self) -> int:
        """The code of the first operator."""
        return FIRST_VARIABLE + len(self.variables)

    @property
    def arity(self) -> np.ndarray:
        """The number of arguments of every code."""
        return np.array([0] * self.first_operator + [o.arity for o in self.table], np.int32)

    def codes_of(self, arity: int) -> np.ndarray:
        """The codes of all operators with that many arguments."""
        codes = np.arange(len(self.arity), dtype=np.int32)
        return codes[(self.arity == arity) & (codes >= self.first_operator)]


def complexity(codes: Codes) -> Int[Array, ""]:
    """The number of tokens."""
    return jnp.sum(codes != PAD, dtype=INDEX)


def parts(language: Language, codes: Codes) -> tuple[Int[Array, " length"], Int[Array, " length"]]:
    """The size of the part that ends at each place, and the place where its first argument ends."""
    arity = jnp.asarray(language.arity)[codes]

    def step(size, i):
        right = jnp.maximum(i - 1, 0)
        left = jnp.maximum(right - size[right], 0)
        here = 1 + jnp.where(arity[i] > 0, size[right], 0) + jnp.where(arity[i] > 1, size[left], 0)
        return size.at[i].set(here), left

    places = jnp.arange(codes.shape[0], dtype=INDEX)
    return jax.lax.scan(step, jnp.zeros_like(codes), places)


def evaluate(
    language: Language, codes: Codes, constants: Constants, inputs: Float[Array, "variables points"]
) -> Float[Array, " points"]:
    """The values of one expression at all points; NaN where it is undefined."""
    left = parts(language, codes)[1]
    return _values(language, codes, constants, inputs, left)[complexity(codes) - 1]


def evaluate_with_jacobian(
    language: Language, codes: Codes, constants: Constants, inputs: Float[Array, "variables points"]
) -> tuple[Float[Array, " points"], Float[Array, "length points"]]:
    """The values, and their derivatives by the constant at each place (0 where there is none)."""
    left = parts(language, codes)[1]
    values = _values(language, codes, constants, inputs, left)
    root = complexity(codes) - 1
    weights = jnp.zeros_like(values).at[root].set(1.0)

    def back(count, weights):
        i = codes.shape[0] - 1 - count
        by_left, by_right = _partials(language, codes[i], values[left[i]], values[i - 1])
        weights = weights.at[left[i]].add(weights[i] * by_left)
        return weights.at[i - 1].add(weights[i] * by_right)

    weights = jax.lax.fori_loop(0, codes.shape[0] - 1, back, weights)
    return values[root], jnp.where((codes == CONSTANT)[:, None], weights, 0.0)


def _values(language, codes, constants, inputs, left) -> Float[Array, "length points"]:
    """The value of the part that ends at each place."""
    variable = jnp.clip(codes - FIRST_VARIABLE, 0, inputs.shape[0] - 1)
    leaves = jnp.where((codes == CONSTANT)[:, None], constants[:, None], inputs[variable])

    def forward(i, values):
        arguments = {1: (values[i - 1],), 2: (values[left[i]], values[i - 1])}
        value = values[i]
        for code, operator in enumerate(language.table, language.first_operator):
            here = operator.function(*arguments[operator.arity])
            value = jnp.where(codes[i] == code, finite(here), value)
        return values.at[i].set(value)

    return jax.lax.fori_loop(1, codes.shape[0], forward, leaves)


def _partials(
    language, code, left, right
) -> tuple[Float[Array, " points"], Float[Array, " points"]]:
    """The derivatives of one operator by its arguments. What is not chosen is never multiplied by
    zero: it may be infinite."""
    one, zero = jnp.ones_like(right), jnp.zeros_like(right)
    by_left = by_right = zero
    for number, operator in enumerate(language.table, language.first_operator):
        chosen, f = code == number, operator.function
        if operator.arity == 1:
            partial = jax.jvp(f, (right,), (one,))[1]
        else:
            partial = jax.jvp(f, (left, right), (zero, one))[1]
            by_left = jnp.where(chosen, jax.jvp(f, (left, right), (one, zero))[1], by_left)
        by_right = jnp.where(chosen, partial, by_right)
    return by_left, by_right
