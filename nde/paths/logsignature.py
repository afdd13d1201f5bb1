r"""Log-signatures of a path of straight pieces, window by window.

The signature of a path collects its iterated integrals, level by level, in the tensor algebra. For
a straight piece d it is the tensor exponential, and pieces multiply (Chen):

    S_m(d) = d^(x)m / m!,        S_m(a b) = sum_{i <= m} S_i(a) (x) S_{m-i}(b),

and its logarithm log S = sum_m (-1)^(m+1) / m (S - 1)^(x)m lies in the free Lie algebra: it has one
coordinate for every Lyndon word w, those of the basis of brackets P_w, where P_w = [P_u, P_v] and
v is the longest proper suffix of w = uv that is itself a Lyndon word. Level 1 is the increment, and
level 2 the Levy area,

    log S_ij = (1/2) int (X_i dX_j - X_j dX_i),        i < j.

In code:    w -> a tuple of channels, ordered by length, then alphabetically (`lyndon_words`)
Cost:       c^depth numbers per level while it is computed, of c channels.
Reference:  Neural rough differential equations for long time series (2021) | arXiv:2009.08295
            Free Lie Algebras, Reutenauer (1993), chapter 5
"""

import functools
import itertools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Real

from nde.paths.control import AbstractControl, ControlPath
from nde.solvers.inputs import check_count

__all__ = ["LogSignaturePath", "log_signature", "lyndon_words"]

Word = tuple[int, ...]
Levels = list[Array]  # entry m - 1 has m axes of the size of the path


class LogSignaturePath(AbstractControl):
    """A path whose increment over a window is the log-signature of the data there, growing linearly
    inside the window; `log_signature` makes it.

    Args:
        control: The path, with the ends of the windows for knots; shape (coordinates,), in the
            order of `lyndon_words`.
        start: Value of the path of the data at its first knot, shape (channels,).
        depth: Number of levels.
    """

    control: ControlPath
    start: Float[Array, " channels"]
    depth: int = eqx.field(static=True)

    @property
    def ts(self) -> Float[Array, " knots"]:
        """The ends of the windows, shape (windows + 1,); repeats of the last one are padding."""
        return self.control.ts

    @property
    def times(self) -> Float[Array, " knots"]:
        """The ends of the windows: a log-ODE follows the data no closer than that."""
        return self.control.ts

    @property
    def t0(self) -> Float[Array, ""]:
        """The first knot."""
        return self.control.t0

    @property
    def t1(self) -> Float[Array, ""]:
        """The last knot."""
        return self.control.t1

    @property
    def smooth(self) -> bool:
        """False: the derivative jumps from window to window."""
        return self.control.smooth

    @property
    def causal(self) -> bool:
        """As the path of the data, at the ends of the windows."""
        return self.control.causal

    @property
    def increments(self) -> Float[Array, "windows coordinates"]:
        """The log-signature of every window."""
        return self.control.coefficients[..., 1, :] * jnp.diff(self.ts)[..., None]

    def evaluate(
        self, t0: Real[Array, ""], t1: Real[Array, ""] | None = None, left: bool = True
    ) -> Float[Array, " coordinates"]:
        """The sum of the log-signatures up to `t0`; with `t1` the increment from `t0` to `t1`."""
        return self.control.evaluate(t0, t1, left)

    def derivative(self, t: Real[Array, ""], left: bool = True) -> Float[Array, " coordinates"]:
        """The log-signature of the window that `t` is in, divided by its length."""
        return self.control.derivative(t, left)


def log_signature(path: ControlPath, window: int, depth: int) -> LogSignaturePath:
    """The log-signatures of a path over windows of so many pieces each.

    Args:
        path: Of straight pieces, from `linear` or `rectilinear` (which has two pieces per interval).
        window: Pieces per window; the last window may have fewer.
        depth: Number of levels. There are `len(lyndon_words(channels, depth))` coordinates.

    Raises:
        ValueError: for a path that is curved, or a window or depth below 1.

    Example:
        >>> control = nde.paths.log_signature(nde.paths.linear(ts, ys), window=32, depth=2)
        >>> control.ts, control.increments          # (windows + 1,), (windows, coordinates)
    """
    check_count("window", window)
    check_count("depth", depth)
    if not isinstance(path, ControlPath) or path.degree != 1:
        raise ValueError(
            "`path` is not made of straight pieces, whose log-signature is known exactly; use "
            "nde.paths.linear or nde.paths.rectilinear."
        )
    pieces, channels = path.coefficients.shape[0], path.coefficients.shape[-1]
    windows = -(-pieces // window)
    steps = path.coefficients[:, 1] * jnp.diff(path.ts)[:, None]
    steps = jnp.pad(steps, ((0, windows * window - pieces), (0, 0)))  # standing still adds nothing
    steps = steps.reshape(windows, window, channels)
    increments = jax.vmap(lambda steps: _in_basis(_log(_signature(steps, depth))))(steps)
    ts = path.ts[jnp.minimum(jnp.arange(windows + 1) * window, pieces)]
    length = jnp.diff(ts)[:, None]
    base = jnp.cumsum(increments, axis=0) - increments
    coefficients = jnp.stack([base, increments / jnp.where(length > 0, length, 1)], axis=1)
    control = ControlPath(ts, coefficients, ts, smooth=False, causal=path.causal)
    return LogSignaturePath(control, path.start, depth)


def lyndon_words(channels: int, depth: int) -> tuple[Word, ...]:
    """The coordinates of a log-signature: words of up to `depth` channels that are smaller than all
    of their rotations, the shorter ones first.

    Example:
        >>> nde.paths.lyndon_words(2, 3)
        ((0,), (1,), (0, 1), (0, 0, 1), (0, 1, 1))
    """
    return tuple(word for length in range(1, depth + 1) for word in _words(channels, length))


@functools.cache
def _words(channels: int, length: int) -> tuple[Word, ...]:
    every = itertools.product(range(channels), repeat=length)
    return tuple(word for word in every if _is_lyndon(word))


def _is_lyndon(word: Word) -> bool:
    return all(word < word[i:] + word[:i] for i in range(1, len(word)))


@functools.cache
def _bracket(word: Word) -> dict[Word, int]:
    """P_w as a sum of words."""
    if len(word) == 1:
        return {word: 1}
    cut = next(i for i in range(1, len(word)) if _is_lyndon(word[i:]))
    left, right = _bracket(word[:cut]), _bracket(word[cut:])
    total: dict[Word, int] = {}
    for (u, a), (v, b) in itertools.product(left.items(), right.items()):
        total[u + v] = total.get(u + v, 0) + a * b
        total[v + u] = total.get(v + u, 0) - a * b
    return {u: a for u, a in total.items() if a}


@functools.cache
def _from_words(channels: int, length: int) -> np.ndarray:
    """The coordinates of one level, from its coefficients at the Lyndon words.

    P_w is w plus larger words: the matrix is triangular with ones on its diagonal, and its inverse
    has integer entries too.
    """
    words = _words(channels, length)
    matrix = np.array([[_bracket(w).get(v, 0) for w in words] for v in words], dtype=float)
    return np.round(np.linalg.inv(matrix))


def _in_basis(levels: Levels) -> Float[Array, " coordinates"]:
    parts = []
    for length, level in enumerate(levels, start=1):
        words = np.array(_words(level.shape[0], length), dtype=int).reshape(-1, length)
        if words.size:  # one channel has none beyond the first level
            matrix = jnp.asarray(_from_words(level.shape[0], length), dtype=level.dtype)
            coefficients = level[tuple(words.T)]
            if length > 2:  # up to there the matrix is the identity
                coefficients = jnp.matmul(matrix, coefficients, precision="highest")
            parts.append(coefficients)
    return jnp.concatenate(parts)


def _signature(steps: Float[Array, "pieces channels"], depth: int) -> Levels:
    """Levels 1 to `depth` of the signature of straight pieces."""

    def append(levels, d):
        # Level m of S exp(d): ((d/m + S_1) d/(m-1) + S_2) d/(m-2) + ... + S_m.
        longer = []
        for m in range(1, depth + 1):
            total = d / m
            for i in range(1, m):
                total = _outer(levels[i - 1] + total, d / (m - i))
            longer.append(levels[m - 1] + total)
        return longer, None

    channels = steps.shape[1]
    start = [jnp.zeros((channels,) * m, dtype=steps.dtype) for m in range(1, depth + 1)]
    return jax.lax.scan(append, start, steps)[0]


def _log(x: Levels) -> Levels:
    """log(1 + x) = x (1 - x (1/2 - x (1/3 - ...)))."""
    inner, scalar = [jnp.zeros_like(level) for level in x], 1 / len(x)
    for power in range(len(x) - 1, 0, -1):
        product = _product(x, inner, scalar)
        inner, scalar = [-level for level in product], 1 / power
    return _product(x, inner, scalar)


def _product(x: Levels, y: Levels, scalar: float) -> Levels:
    """x (scalar + y), up to the common depth."""
    return [
        sum((_outer(x[i], y[m - i - 1]) for i in range(m)), start=scalar * x[m])
        for m in range(len(x))
    ]


def _outer(a: Array, b: Array) -> Array:
    return jnp.tensordot(a, b, axes=0)
