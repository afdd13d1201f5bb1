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
            the same query would give two answers. `pinned` products are rounded before they are added.
Reference:  Numerical approximations for stochastic differential equations, theorem 6.1.4 (2020, thesis)
            Single-seed generation of Brownian paths and integrals (2024) | arXiv:2405.06464
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, UInt


def opaque_zero(key: PRNGKeyArray) -> UInt[Array, ""]:
    """Zero, but no compiler can tell: n (n + 1) is even for every word n of the (scalar) key."""
    word = jnp.ravel(jax.random.key_data(key))[0]
    return (word * (word + jnp.uint32(1))) & jnp.uint32(1)


def pinned(x: Float[Array, "*shape"], zero: UInt[Array, ""]) -> Float[Array, "*shape"]:
    """`x`, rounded here and nowhere later: what is added to it cannot be fused into its last product."""
    word = jnp.uint64 if x.dtype.itemsize == 8 else jnp.uint32
    bits = jax.lax.bitcast_convert_type(x, word) ^ zero.astype(word)
    return jax.lax.bitcast_convert_type(bits, x.dtype)


def split(
    node: Float[Array, "parts size"],
    fraction: Float[Array, ""],
    width: Float[Array, ""],
    noise: Float[Array, "parts size"],
    zero: UInt[Array, ""],
) -> Float[Array, "2 parts size"]:
    """Cuts an interval of length `width` at `fraction` of it: the left part and the right part.

    Args:
        node: W (one row), or W and H (two rows), of the whole interval.
        fraction: p in (0, 1).
        width: h, in units of time.
        noise: As many rows of independent standard normals.
        zero: See `opaque_zero`.
    """
    p, q = fraction, 1 - fraction
    if node.shape[0] == 1:
        bridge = pinned(jnp.sqrt(p * q * width) * noise, zero)
        left = pinned(p * node, zero) + bridge
        return jnp.stack([left, node - left])
    cubes = pinned(p * p * p, zero) + pinned(q * q * q, zero)
    scale = jnp.sqrt(p * q / cubes) * jnp.sqrt(width) / 2
    g, c = jnp.sqrt(p * q * cubes * width), scale / math.sqrt(3)
    (w, h), (x1, x2) = node, noise
    w_left = pinned(p * w, zero) + pinned(6 * p * q * h, zero) + pinned(g * x1, zero)
    h_left = pinned(p * p * h, zero) - pinned(scale * p * p * x1, zero) + pinned(c * q * x2, zero)
    h_right = pinned(q * q * h, zero) - pinned(scale * q * q * x1, zero) - pinned(c * p * x2, zero)
    return jnp.stack([jnp.stack([w_left, h_left]), jnp.stack([w - w_left, h_right])])


class Piece(NamedTuple):
    """A stretch of path: its length h, and rows W (and J), shape (parts, size). Length 0 joins as nothing."""

    width: Float[Array, ""]
    value: Float[Array, "parts size"]


def piece(
    node: Float[Array, "parts size"], width: Float[Array, ""], zero: UInt[Array, ""]
) -> Piece:
    """The stretch whose increment (and Levy area) is `node`, ready to be joined."""
    if node.shape[0] == 1:
        return Piece(width, node)
    w, h = node
    return Piece(width, jnp.stack([w, pinned(width * (pinned(w / 2, zero) + h), zero)]))


def join(first: Piece, second: Piece, zero: UInt[Array, ""]) -> Piece:
    """The stretch made of `first`, then `second`."""
    value = first.value + second.value
    if value.shape[0] == 2:
        value = value.at[1].add(pinned(second.width * first.value[0], zero))
    return Piece(first.width + second.width, value)


def area(whole: Piece, zero: UInt[Array, ""]) -> Float[Array, "parts size"]:
    """W (and H) of a stretch; zeros for an empty one."""
    if whole.value.shape[0] == 1:
        return whole.value
    w, integral = whole.value
    width = jnp.where(whole.width > 0, whole.width, 1)
    return jnp.stack([w, pinned(integral / width, zero) - pinned(w / 2, zero)])
