r"""Paths that are a polynomial between two knots.

On the piece [t_k, t_{k+1}] and with s = t - t_k,

    X(t) = c_k0 + c_k1 s + c_k2 s^2 + ...,        X'(t) = c_k1 + 2 c_k2 s + ...

A padded path repeats its last knot: those pieces have length zero and are never entered, so that
what stands in them changes nothing. Outside its knots a path stands still.
"""

import diffrax
import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Real

__all__ = ["AbstractControl", "ControlPath"]

# Up to here one comparison with every knot is faster than a search by halves, which is sequential.
_COMPARE_ALL = 1024


class AbstractControl(diffrax.AbstractPath):
    """A path over knots that a model can be driven by: the values of a series, or its
    log-signatures.

    Args:
        ts: Knots, shape (knots,), in order; repeats of the last one are padding.
        start: What the path knows at its first knot, shape (channels,): the initial state of a
            model is made from it.
        times: The times of the observations, shape (times,), padded as the data.
        smooth: Whether the derivative exists at the knots. Where it jumps, steps end there.
        causal: Whether the path up to an observation depends on nothing that comes after it.
    """

    ts: eqx.AbstractVar[Float[Array, " knots"]]
    start: eqx.AbstractVar[Float[Array, " channels"]]
    times: eqx.AbstractVar[Float[Array, " times"]]
    smooth: eqx.AbstractVar[bool]
    causal: eqx.AbstractVar[bool]


class ControlPath(AbstractControl):
    """A piecewise polynomial through the observations; `linear`, `rectilinear`, `hermite_cubic` and
    `natural_cubic` make one.

    Outside [t0, t1] the path stands still: `evaluate` gives the value at the nearer end,
    `derivative` gives zero.

    Args:
        ts: Knots, shape (knots,), in order; repeats of the last one are padding.
        coefficients: Shape (knots - 1, degree + 1, channels), of the powers of t - ts[k].
        times: The times of the observations, shape (times,).
        smooth: Whether the derivative is continuous.
        causal: Whether the path up to an observation depends on nothing that comes after it.
    """

    ts: Float[Array, " knots"]
    coefficients: Float[Array, "pieces powers channels"]
    times: Float[Array, " times"]
    smooth: bool = eqx.field(static=True)
    causal: bool = eqx.field(static=True)

    @property
    def t0(self) -> Float[Array, ""]:
        """The first knot."""
        return self.ts[..., 0]

    @property
    def t1(self) -> Float[Array, ""]:
        """The last knot."""
        return self.ts[..., -1]

    @property
    def start(self) -> Float[Array, " channels"]:
        """The value at the first knot."""
        return self.coefficients[..., 0, 0, :]

    @property
    def degree(self) -> int:
        """Of the polynomials."""
        return self.coefficients.shape[-2] - 1

    def evaluate(
        self,
        t0: Real[Array, ""],
        t1: Real[Array, ""] | None = None,
        left: bool = True,
    ) -> Float[Array, " channels"]:
        """The value at `t0`; with `t1` the increment from `t0` to `t1`."""
        if t1 is None:
            base, rest = self._at(t0, left)
            return base + rest
        # Inside one piece the bases cancel exactly, whatever the size of the values.
        (base0, rest0), (base1, rest1) = self._at(t0, left=False), self._at(t1, left=True)
        return (base1 - base0) + (rest1 - rest0)

    def derivative(self, t: Real[Array, ""], left: bool = True) -> Float[Array, " channels"]:
        """dX/dt at `t`; at a knot where it jumps, its limit from the `left` or from the right."""
        t = jnp.asarray(t, dtype=self.ts.dtype)
        piece = find_piece(self.ts, t, left)
        s, rows = t - self.ts[piece], self.coefficients[piece]
        slope = self.degree * rows[-1]
        for power in range(self.degree - 1, 0, -1):
            slope = slope * s + power * rows[power]
        inside = (self.ts[0] <= t) & (t <= self.ts[-1])
        return jnp.where(inside, slope, jnp.zeros_like(slope))

    def _at(self, t: Real[Array, ""], left: bool) -> tuple[Array, Array]:
        """The value at the beginning of the piece that `t` is in, and what is added since."""
        t = jnp.clip(jnp.asarray(t, dtype=self.ts.dtype), self.ts[0], self.ts[-1])
        piece = find_piece(self.ts, t, left)
        s, rows = t - self.ts[piece], self.coefficients[piece]
        rest = rows[-1]
        for power in range(self.degree - 1, 0, -1):
            rest = rest * s + rows[power]
        return rows[0], rest * s


def find_piece(ts: Float[Array, " knots"], t: Float[Array, ""], left: bool) -> Int[Array, ""]:
    """Number of the piece of positive length that `t` is in; at a knot, the one on that side."""
    method = "compare_all" if ts.shape[0] <= _COMPARE_ALL else "scan"
    last = jnp.searchsorted(ts, ts[-1], side="left", method=method) - 1
    found = jnp.searchsorted(ts, t, side="left" if left else "right", method=method) - 1
    return jnp.clip(found, 0, last)
