r"""Brownian bridges: cut an increment in two, or join two, without changing its law.

On [s, t] of length h the increment and its space-time Levy area are independent normals,

    W = W_t - W_s ~ N(0, h),      H = 1/h int_s^t (W_{s,r} - (r-s)/h W) dr ~ N(0, h/12).

Cut at s + l, with l = p h, r = q h, p + q = 1 and X1, X2 ~ N(0, 1):

    W alone:   W_l = p W + sqrt(p q h) X1                                                W_r = W - W_l
    with H:    W_l = p W + 6 p q H + g X1      H_l = p^2 H - a X1 + c q X2               W_r = W - W_l
                                               H_r = q^2 H - b X1 - c p X2
               u = sqrt(p q / (p^3 + q^3)),  a, b = u sqrt(h)/2 (p^2, q^2),
               c = u sqrt(h) / (2 sqrt 3),   g = sqrt(p q (p^3 + q^3) h)

Join with the integral J = int_s^t W_{s,r} dr = h (W/2 + H), which needs no division:

    W = W_1 + W_2,      J = J_1 + J_2 + h_2 W_1,      H = J/h - W/2

In code:    p -> fraction    h -> width    X1, X2 -> noise    (W,) or (W, H) -> one array (1 | 2, size)
Bits:       a compiler may contract `a * b + c` into one rounding in one program and not in another, so
            the same query would give two answers. `pinned` products are rounded before they are
            added.
Reference:  Numerical approximations for stochastic differential equations, theorem 6.1.4 (2020,
    thesis)
            Single-seed generation of Brownian paths and integrals (2024) | arXiv:2405.06464
"""

import math
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, UInt

Node = tuple[Float[Array, " size"], ...]
Draws = TypeVar("Draws")


def opaque_zero(key: PRNGKeyArray, *numbers: Int[Array, ""]) -> UInt[Array, ""]:
    """Zero, but no compiler can tell: n (n + 1) is even for every word n of the (scalar) key.

    `numbers`: of the query, which also change where a program has only one key.
    """
    word = jnp.ravel(jax.random.key_data(key))[0]
    for number in numbers:
        word ^= number.astype(jnp.uint32)
    return (word * (word + jnp.uint32(1))) & jnp.uint32(1)


def pinned(x: Float[Array, "*shape"], zero: UInt[Array, ""]) -> Float[Array, "*shape"]:
    """`x`, rounded here and nowhere later: what is added to it cannot be fused into its last product."""
    word = jnp.uint64 if x.dtype.itemsize == 8 else jnp.uint32
    bits = jax.lax.bitcast_convert_type(x, word) ^ zero.astype(word)
    return jax.lax.bitcast_convert_type(bits, x.dtype)


def materialized(always: Bool[Array, ""], compute: Callable[[], Draws]) -> Draws:
    """compute(), kept in memory and not fused with what uses it.

    Fused, it would be repeated for every number made from it (the inverse error function!), and could
    be rounded differently in each place. What a conditional returns is never fused with its users;
    `always` is a condition that holds, though XLA cannot know, best one that `vmap` leaves a scalar.
    """

    def zeros():
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(compute))

    return jax.lax.cond(always, compute, zeros)


def coefficients(fraction: Float[Array, ""], width: Float[Array, ""], parts: int) -> Array:
    """What multiplies (W, X1), shape (1, 2), or (W, H, X1, X2), shape (3, 4), in the halves.

    Args:
        fraction: p in (0, 1): the cut, in units of the interval.
        width: h, the length of the interval (time).
        parts: 1 gives the row of W_l; 2 gives the rows of W_l, H_l and H_r.
    """
    p, q = fraction, 1 - fraction
    if parts == 1:
        return jnp.stack([p, jnp.sqrt(p * q * width)])[None]
    cubes = p * p * p + q * q * q
    scale = jnp.sqrt(p * q / cubes) * jnp.sqrt(width) / 2
    g, c, none = jnp.sqrt(p * q * cubes * width), scale / math.sqrt(3), jnp.zeros_like(p)
    rows = (
        (p, 6 * p * q, g, none),
        (none, p * p, -scale * p * p, c * q),
        (none, q * q, -scale * q * q, -c * p),
    )
    return jnp.stack([jnp.stack(row) for row in rows])


def split(node: Node, weights: Array, noise: Node, zero: UInt[Array, ""]) -> tuple[Node, Node]:
    """Cuts an interval in two: the left part and the right part.

    Args:
        node: (W,) or (W, H) of the whole interval, each of shape (size,).
        weights: The `coefficients` of the cut.
        noise: As many independent standard normals, of the same shapes.
        zero: See `opaque_zero`.
    """
    columns = (*node, *noise)

    def row(i: int, start: int, stop: int):
        terms = [pinned(weights[i, j] * columns[j], zero) for j in range(start, stop)]
        return sum(terms[1:], start=terms[0])

    if len(node) == 1:
        left = row(0, 0, 2)
        return (left,), (node[0] - left,)
    left = row(0, 0, 3)
    return (left, row(1, 1, 4)), (node[0] - left, row(2, 1, 4))


class Piece(NamedTuple):
    """A stretch of path: its length h, and (W,) or (W, J), of shape (size,). Length 0 is nothing."""

    width: Float[Array, ""]
    value: Node


def piece(node: Node, width: Float[Array, ""], zero: UInt[Array, ""]) -> Piece:
    """The stretch whose increment (and Levy area) is `node`, ready to be joined."""
    if len(node) == 1:
        return Piece(width, node)
    w, h = node
    return Piece(width, (w, pinned(width * (w / 2 + h), zero)))


def join(first: Piece, second: Piece, zero: UInt[Array, ""]) -> Piece:
    """The stretch made of `first`, then `second`."""
    w, *integral = (a + b for a, b in zip(first.value, second.value, strict=True))
    shift = pinned(second.width * first.value[0], zero)
    return Piece(first.width + second.width, (w, *(x + shift for x in integral)))


def area(whole: Piece, zero: UInt[Array, ""]) -> Node:
    """(W,) or (W, H) of a stretch; zeros for an empty one."""
    w, *integral = whole.value
    width = jnp.where(whole.width > 0, whole.width, 1)
    return (w, *(pinned(x / width, zero) - w / 2 for x in integral))
