r"""Heun's method with space-space Levy area: strong order 1 for noise that does not commute.

For dy = f dt + sum_j g_j o dW_j (Stratonovich) the expansion of the solution needs, at order 1,

    sum_ij (D g_j) g_i  int W_i o dW_j,      int W_i o dW_j = W_i W_j / 2 + A_ij,      A_ij = -A_ji

Heun's method supplies the symmetric half on its own; the antisymmetric half is added:

    k1 = f(y0) h + g(y0) W,      k2 = f(y0 + k1) h + g(y0 + k1) W
    y1 = y0 + (k1 + k2)/2 + sum_j (D g_j)(y0) [sum_i g_i(y0) A_ij]

The added sum is sum_{i<j} [g_i, g_j] A_ij, zero where the noise commutes.

Cost:       2 evaluations of drift and diffusion, and n derivatives of the diffusion for n noise channels.
Not for:    adaptive steps (areas of a rejected step do not bind its parts), or commuting noise (use Heun).
Reference:  Pathwise approximation of stochastic differential equations using coupling (2014, Davie)
"""

from typing import Any, ClassVar

import diffrax
import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from nde.solvers import trees
from nde.solvers.brownian import SpaceSpaceLevyArea
from nde.solvers.methods.declared import AbstractDeclaring, Declared


class LevyHeun(AbstractDeclaring, diffrax.AbstractStratonovichSolver):
    """Heun with space-space Levy area: strong order 1 for general noise. See the module.

    Call it with `terms=MultiTerm(ODETerm(drift), ControlTerm(diffusion, path))`, where `path` is a
    `BrownianGrid(..., levy_area=SpaceSpaceLevyArea)` with n channels, and `diffusion` returns an
    array of the shape of y and one more axis of length n, or a lineax operator.

    Raises:
        ValueError: if the path makes no space-space Levy area.
    """

    term_structure: ClassVar = diffrax.MultiTerm[
        tuple[diffrax.AbstractTerm, diffrax.AbstractTerm]  # type: ignore[type-arg] (any field)
    ]
    interpolation_cls: ClassVar = diffrax.LocalLinearInterpolation

    @property
    def declared(self) -> Declared:
        return Declared(2, 2)

    def order(self, terms: PyTree):
        del terms
        return 2

    def strong_order(self, terms: PyTree):
        del terms
        return 1

    def init(self, terms: PyTree, t0: Any, t1: Any, y0: PyTree, args: Any) -> None:
        _, diffusion = terms.terms
        increment = jax.eval_shape(lambda: diffusion.contr(t0, t1, use_levy=True))
        if not isinstance(increment, SpaceSpaceLevyArea):
            raise ValueError(
                f"LevyHeun was given increments of type {type(increment).__name__}; it needs a Brownian "
                "path with space-space area: BrownianGrid(..., levy_area=nde.solvers.SpaceSpaceLevyArea)."
            )

    def step(
        self,
        terms: PyTree,
        t0: Any,
        t1: Any,
        y0: PyTree,
        args: Any,
        solver_state: PyTree,
        made_jump: Any,
    ):
        del solver_state, made_jump
        drift, diffusion = terms.terms
        h = drift.contr(t0, t1)
        noise = diffusion.contr(t0, t1, use_levy=True)

        def increment(t: Array, y: PyTree[Array]):
            return trees.add(drift.vf_prod(t, y, args, h), diffusion.vf_prod(t, y, args, noise.W))

        def correction(channel, area: Any):
            # (D g_j) [sum_i g_i A_ij], with g_j picked by the unit vector of channel j.
            direction = diffusion.vf_prod(t0, y0, args, area)
            return jax.jvp(lambda y: diffusion.vf_prod(t0, y, args, channel), (y0,), (direction,))[
                1
            ]

        k1 = increment(t0, y0)
        k2 = increment(t1, trees.add(y0, k1))
        corrections = jax.vmap(correction)(jnp.eye(*noise.A.shape, dtype=noise.A.dtype), noise.A.T)
        y1 = jax.tree.map(
            lambda y, a, b, c: y + (a + b) / 2 + jnp.sum(c, axis=0), y0, k1, k2, corrections
        )
        return y1, None, dict(y0=y0, y1=y1), None, diffrax.RESULTS.successful

    def func(self, terms: PyTree, t0: Any, y0: PyTree, args: Any) -> Any:
        return terms.vf(t0, y0, args)
