r"""The linear recurrence, for matrices that are blocks side by side.

    h_k = M_k h_(k-1) + v_k,    k = 1 .. n

Its gradient is the same recurrence, run backwards with transposed matrices:

    g_k = M_(k+1)^T g_(k+1) + ct_k,    ct_v = g,    ct_M_k = g_k h_(k-1)^T,    ct_h_0 = M_1^T g_1

so the backward pass keeps M and h, whatever the way forwards keeps.

`sequential`    one product of matrix and vector per time, O(n b^2) work in each block
`parallel`      an associative scan of (M, v), O(n b^3) work in O(log n) dependent passes
`by_platform`   `sequential` on a CPU, which has few cores for the extra work; `parallel` elsewhere

Blocks stand in the last axis, so that for small blocks every operation is elementwise over lanes.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Matrices = Float[Array, "times block block blocks"]
Vectors = Float[Array, "times block blocks"]
UNROLLED = 8  # largest block written out: the text of a product grows with it


def product(
    left: Float[Array, "*times block block blocks"],
    right: Float[Array, "*times block block blocks"],
) -> Float[Array, "*times block block blocks"]:
    """Matrix times matrix in every block."""
    size = left.shape[-2]
    if size > UNROLLED:
        return jnp.einsum("...ijn,...jkn->...ikn", left, right)
    columns = (left[..., :, j, None, :] * right[..., j, None, :, :] for j in range(size))
    return functools.reduce(jnp.add, columns)


def apply(
    matrix: Float[Array, "*times block block blocks"], vector: Float[Array, "*times block blocks"]
) -> Float[Array, "*times block blocks"]:
    """Matrix times vector in every block."""
    size = matrix.shape[-2]
    if size > UNROLLED:
        return jnp.einsum("...ijn,...jn->...in", matrix, vector)
    columns = (matrix[..., :, j, :] * vector[..., j, None, :] for j in range(size))
    return functools.reduce(jnp.add, columns)


def _in_order(matrices: Matrices, offsets: Vectors, start: Float[Array, "block blocks"]) -> Vectors:
    def step(h, interval):
        matrix, offset = interval
        h = apply(matrix, h) + offset
        return h, h

    return jax.lax.scan(step, start, (matrices, offsets))[1]


def _at_once(matrices: Matrices, offsets: Vectors, start: Float[Array, "block blocks"]) -> Vectors:
    def compose(early, late):
        (m1, v1), (m2, v2) = early, late
        return product(m2, m1), apply(m2, v1) + v2

    offsets = offsets.at[0].add(apply(matrices[0], start))
    return jax.lax.associative_scan(compose, (matrices, offsets))[1]


def _by_platform(
    matrices: Matrices, offsets: Vectors, start: Float[Array, "block blocks"]
) -> Vectors:
    return jax.lax.platform_dependent(matrices, offsets, start, cpu=_in_order, default=_at_once)


def _differentiable(recurrence):
    """The recurrence with the gradient above, which is a call of itself."""

    @jax.custom_vjp
    def solve(matrices, offsets, start):
        return recurrence(matrices, offsets, start)

    def forward(matrices, offsets, start):
        hs = solve(matrices, offsets, start)
        return hs, (matrices, hs, start)

    def backward(residuals, ct_hs):
        matrices, hs, start = residuals
        transposed = jnp.swapaxes(matrices, -3, -2)
        # Backwards in time g begins at ct_n: the first matrix is not used.
        shifted = jnp.concatenate([transposed[:1], transposed[:0:-1]])
        gs = solve(shifted, ct_hs[::-1], jnp.zeros_like(start))[::-1]
        before = jnp.concatenate([start[None], hs[:-1]])
        return gs[:, :, None] * before[:, None], gs, apply(transposed[0], gs[0])

    solve.defvjp(forward, backward)
    return solve


sequential = _differentiable(_in_order)
parallel = _differentiable(_at_once)
by_platform = _differentiable(_by_platform)
