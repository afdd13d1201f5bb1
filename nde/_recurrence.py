r"""The linear recurrence whose matrices are made while it runs.

    h_k = h_(k-1) + E_k h_(k-1),    E_k = step(sum_i A_i dw_k^i),    k = 1 .. n

E_k is `block` times larger than h_k: to keep it for all times costs more than to make it again, so
it is made where it is used, forwards and backwards.

`in_order`      n products of matrix and vector, hidden * block work each. The gradient is the loop
                backwards; it keeps the h_k alone.
`in_chunks`     the series is cut into about sqrt(n) chunks that advance side by side:
                    P_c = product of (1 + E_k) over chunk c,    block times the work of `in_order`
                    s_(c+1) = P_c s_c,                          the states between chunks
                    h_k within chunk c, from s_c.
                These are 3 sqrt(n) dependent steps instead of n. The gradient goes backwards in the
                same way, g_c = P_c^T g_(c+1) + (what chunk c adds), without products of matrices.
`by_platform`   `in_order` on a CPU, which has few cores for the extra work; `in_chunks` elsewhere.

Lanes (blocks, and chunks) stand last. A small product is written out, one column after the other,
elementwise over lanes; a large one is a matrix product.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Generators = Float[Array, "driver block block blocks"]
Increments = Float[Array, "intervals driver"]
State = Float[Array, "block blocks"]
States = Float[Array, "intervals block blocks"]

WRITTEN_OUT = 8  # largest product written out: its text grows with the size
VECTOR = 16  # chunks come in multiples of what a processor does at once


@jax.custom_vjp
def product(
    left: Float[Array, "a b *lanes"], right: Float[Array, "b c *lanes"]
) -> Float[Array, "a c *lanes"]:
    """Matrix times matrix in every lane."""
    size = left.shape[1]
    if size > WRITTEN_OUT:
        return jnp.einsum("ij...,jk...->ik...", left, right)
    columns = (left[:, j, None] * right[j][None] for j in range(size))
    return functools.reduce(jnp.add, columns)


def _product_backward(residuals, ct):
    left, right = residuals
    return product(ct, jnp.swapaxes(right, 0, 1)), product(jnp.swapaxes(left, 0, 1), ct)


# Autodiff would take the columns out one by one and sum their padded gradients.
product.defvjp(lambda left, right: (product(left, right), (left, right)), _product_backward)


def apply(
    matrix: Float[Array, "a b *lanes"], vector: Float[Array, "b *lanes"]
) -> Float[Array, "a *lanes"]:
    """Matrix times vector in every lane."""
    return product(matrix, vector[:, None])[:, 0]


def in_order(
    step: Callable, generators: Generators, increments: Increments, start: State
) -> tuple[State, States]:
    """The last state, and the state before every interval."""
    matrix = _matrices(step, generators)

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def interval(h: Array, dw: Array):
        return h + apply(matrix(dw), h), h

    return jax.lax.scan(interval, start, increments)


def in_chunks(
    step: Callable, generators: Generators, increments: Increments, start: State
) -> tuple[State, States]:
    """As `in_order`, in chunks side by side. `step` must make 0 of 0, which the last chunk is padded
    with."""
    intervals = increments.shape[0]
    chunks = VECTOR * max(1, round(math.sqrt(intervals) / VECTOR))
    times = -(-intervals // chunks)
    padded = jnp.pad(increments, [(0, times * chunks - intervals), (0, 0)])
    lanes = jnp.moveaxis(padded.reshape(chunks, times, -1), 0, -1)
    both: Any = _side_by_side(step, generators, lanes, start)  # pyright sees an object
    end, hs = both
    return end, jnp.moveaxis(hs, -1, 0).reshape(-1, *start.shape)[:intervals]


def by_platform(
    step: Callable, generators: Generators, increments: Increments, start: State
) -> tuple[State, States]:
    """As `in_order`, in the way that suits the device."""
    first, other = functools.partial(in_order, step), functools.partial(in_chunks, step)
    return jax.lax.platform_dependent(generators, increments, start, cpu=first, default=other)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _side_by_side(step, generators, increments, start):
    _, end, starts = _links(step, generators, increments, start)
    return end, in_order(step, generators, increments, starts)[1]


def _links(step, generators, increments, start):
    """The product over each chunk, the last state, and the state before each chunk."""
    matrix = _matrices(step, generators)
    one = jnp.eye(start.shape[0], dtype=start.dtype)[:, :, None, None]

    def grow(whole: Array, dw: Array):
        return product(one + matrix(dw), whole), None

    shape = (*generators.shape[1:], increments.shape[-1])
    wholes = jax.lax.scan(grow, jnp.broadcast_to(one, shape), increments)[0]
    wholes = jnp.moveaxis(wholes, -1, 0)
    end, starts = jax.lax.scan(lambda h, whole: (apply(whole, h), h), start, wholes)
    return wholes, end, jnp.moveaxis(starts, 0, -1)


def _forward(step, generators, increments, start):
    wholes, end, starts = _links(step, generators, increments, start)
    within = functools.partial(in_order, step)
    (_, hs), pull = jax.vjp(within, generators, increments, starts)
    return (end, hs), (wholes, pull)


def _backward(step, residuals, cotangents):
    wholes, pull = residuals
    ct_end, ct_hs = cotangents
    nothing = jnp.zeros((*ct_end.shape, wholes.shape[0]), ct_end.dtype)
    added = jnp.moveaxis(pull((nothing, ct_hs))[2], -1, 0)

    def back(g: Array, chunk: Any):
        whole, added = chunk
        return apply(jnp.swapaxes(whole, 0, 1), g) + added, g

    ct_start, ends = jax.lax.scan(back, ct_end, (wholes, added), reverse=True)
    ct_generators, ct_increments, _ = pull((jnp.moveaxis(ends, 0, -1), ct_hs))
    return ct_generators, ct_increments, ct_start


_side_by_side.defvjp(_forward, _backward)


def _matrices(step, generators):
    """dw -> E. The order of the factors is the one that leaves the lanes where they are used."""
    large = generators.shape[1] > WRITTEN_OUT
    arranged = jnp.moveaxis(generators, -1, 1) if large else generators

    def matrix(dw: Array):
        if large:
            return step(jnp.einsum("c...,cnij->...nij", dw, arranged).T.swapaxes(0, 1))
        if dw.ndim == 1:
            return step(jnp.einsum("c,cijn->ijn", dw, arranged))
        return step(jnp.einsum("cijn,ck->ijnk", arranged, dw))

    return matrix
