r"""Constants by Levenberg-Marquardt: a few steps for every expression that is born.

With residuals r(c) at n points and J = dr/dc from one sweep back over the tape,

    (J^T J + l diag(J^T J)) d = J^T r,
    c' = c - d and l' = l / 10 if the loss falls,  else c' = c and l' = 10 l.

Cost:       four evaluations of the tape a step, and one solve of `slots` equations.
Reference:  Parameter identification for symbolic regression using nonlinear least squares (2020) |
    doi:10.1007/s10710-019-09371-3
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from nde.symbolic.tape import (
    CONSTANT,
    INDEX,
    Codes,
    Constants,
    Language,
    complexity,
    evaluate,
    evaluate_with_jacobian,
)

SLOTS = 8  # constants beyond these stay as they are


def loss_of(
    language: Language,
    codes: Codes,
    constants: Constants,
    inputs: Float[Array, "variables points"],
    targets: Float[Array, " points"],
) -> Float[Array, ""]:
    """The mean square of the residuals; inf where one of them is not finite."""
    loss = jnp.mean((evaluate(language, codes, constants, inputs) - targets) ** 2)
    return jnp.where(jnp.isfinite(loss), loss, jnp.inf)


def fit_constants(
    language: Language,
    codes: Codes,
    constants: Constants,
    inputs: Float[Array, "variables points"],
    targets: Float[Array, " points"],
    *,
    steps: int,
) -> tuple[Constants, Float[Array, ""]]:
    """Constants after `steps` steps, and their loss, which is never above that at the start."""
    slots = min(SLOTS, language.length)
    (places,) = jnp.nonzero(codes == CONSTANT, size=slots, fill_value=language.length)
    is_used = places < language.length

    def loss(constants):
        return loss_of(language, codes, constants, inputs, targets)

    def step(state, _):
        constants, before, damping = state
        values, jacobian = evaluate_with_jacobian(language, codes, constants, inputs)
        rows = jnp.where(is_used[:, None], jacobian.at[places].get(mode="fill", fill_value=0), 0.0)
        square = rows @ rows.T
        diagonal = jnp.where(is_used, damping * jnp.diag(square) + tiny, 1.0)
        change = jnp.linalg.solve(square + jnp.diag(diagonal), rows @ (values - targets))
        trial = constants.at[places].add(-change, mode="drop")
        after = loss(trial)
        better = after < before
        constants = jnp.where(better, trial, constants)
        damping = jnp.where(better, damping / 10, damping * 10)
        return (constants, jnp.where(better, after, before), damping), None

    tiny = jnp.finfo(constants.dtype).tiny ** 0.5
    start = (constants, loss(constants), jnp.full((), 1e-3, constants.dtype))
    return jax.lax.scan(step, start, length=steps)[0][:2]


def has_room(codes: Codes) -> Array:
    """Whether every constant has a slot."""
    return (jnp.sum(codes == CONSTANT, dtype=INDEX) <= SLOTS) & (complexity(codes) > 0)
