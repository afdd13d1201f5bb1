r"""The signature kernel of two paths, its exact gradient, and Gram matrices of many.

The kernel k of paths x and y, the inner product of their signatures, solves the Goursat problem

    d2k/ds dt = <x'_s, y'_t> k,     k = 1 on both edges,     the value is k at the far corner.

On paths of straight pieces with increments dx_i, dy_j the cell (i, j) has D = <dx_i, dy_j>, or, for paths
lifted by a static kernel,

    D = kappa(x_i+1, y_j+1) - kappa(x_i+1, y_j) - kappa(x_i, y_j+1) + kappa(x_i, y_j).

Each cell is cut into R x R, R = 2^dyadic_order, of D / R^2 each. With alpha = 1 + D/2 + D^2/12 and
beta = 1 - D^2/12 of a cut cell, a scheme of second order in 1/R is

    k[i+1,j+1] = alpha (k[i+1,j] + k[i,j+1]) - beta k[i,j].

All nodes of an antidiagonal i + j = d follow from the two before it, so the sweep keeps two. Its adjoint
is a sweep of the same kind from the far corner: with u the derivative with respect to k[i+1,j+1],

    k[i+1,j], k[i,j+1]  receive  alpha u        k[i,j]  receives  -beta u
    D  receives  u ((k[i+1,j] + k[i,j+1]) (1/2 + D/6) + k[i,j] D/6).

It needs k once more, in reverse order: two diagonals are kept of every segment of about sqrt(2 (m + n) / R)
antidiagonals, and each segment is recomputed. (Solved for k[i,j] the scheme runs backwards
from two diagonals alone, but multiplies rounding by about k^2: float32 has no digit left at k = 1000.)

In code:    i in 0..m and j in 0..n count points, E = i + j antidiagonals of whole cells; y is reversed
            and repeats its ends, so that those of a diagonal are one slice (cells outside have D = 0,
            where k stays 1 before the edge and continues constantly behind it); channels come first.
Cost:       R^2 m n cells per pair, about four times that with the gradient. Memory of a pair: a few times
            R m numbers, with the gradient about 3 R m sqrt(R (m + n)); nothing has R^2 m n. Blocks of pairs
            are taken one by one, also by the gradient, whose memory is that of one block.
Accuracy:   wants |D| / R^2 < 1: scale the paths.
Not for:    derivatives of derivatives, and forward mode.
Reference:  The signature kernel is the solution of a Goursat PDE (2021) | arXiv:2006.14794
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from nde.solvers.inputs import check_count

Path = Float[Array, "channels paths points"]
Cells = Float[Array, "xs ys cells"]


def signature_kernel(
    x: Float[Array, "times channels"],
    y: Float[Array, "times2 channels"],
    *,
    static_kernel: Callable | None = None,
    dyadic_order: int = 1,
) -> Float[Array, ""]:
    """The signature kernel of two paths: 1 for a constant path, I0(2 sqrt<a, b>) for straight lines
    with increments a and b.

    It sees a path up to its start and its speed: give time as a channel if they matter, and the start
    by a first point at 0. For many paths `signature_gram` is leaner than `jax.vmap` of this.

    Args:
        x: Points of a path of straight pieces, shape (times, channels), two or more.
        y: Another one, of as many channels.
        static_kernel: `kernel(x, y)` on features that come first, as `RBF(1.0)`, whose
            features the path is lifted to; None for the path itself.
        dyadic_order: Each piece is cut into 2^dyadic_order; the error falls by 4 per order.

    Raises:
        ValueError: for paths of other shapes, or of unequal channels.

    Reference:
        The signature kernel is the solution of a Goursat PDE (2021) | arXiv:2006.14794
    """
    if jnp.ndim(x) != 2 or jnp.ndim(y) != 2:
        raise ValueError(
            f"`x` has shape {jnp.shape(x)} and `y` has shape {jnp.shape(y)}; one path is (times, "
            "channels). For samples of paths use signature_gram."
        )
    gram = signature_gram(
        x[None], y[None], static_kernel=static_kernel, dyadic_order=dyadic_order, block=1
    )
    return gram[0, 0]


def signature_gram(
    x: Float[Array, "paths times channels"],
    y: Float[Array, "paths2 times2 channels"] | None = None,
    *,
    static_kernel: Callable | None = None,
    dyadic_order: int = 1,
    block: int = 16,
) -> Float[Array, "paths paths2"]:
    """The signature kernel of every path of one sample with every path of another.

    Args:
        x: Paths, shape (paths, times, channels).
        y: Another sample, of as many channels; None for `x` itself, which costs half.
        static_kernel: As in `signature_kernel`; not a function of what is differentiated.
        dyadic_order: As in `signature_kernel`.
        block: Paths on either side that are worked on at once: memory grows with its square.

    Raises:
        ValueError: for paths of other shapes, or of unequal channels.
    """
    _check_paths("x", x)
    check_count("dyadic_order", dyadic_order, ", such as 1", least=0)
    check_count("block", block, ", such as 16")
    if y is None:
        block = min(block, x.shape[0])
        rows, columns = np.triu_indices(-(-x.shape[0] // block))
        blocks = _in_blocks(x, block)
        values = _grams(static_kernel, dyadic_order, rows, columns, blocks, blocks)
        upper = _assembled(values, rows, columns)
        side = np.arange(upper.shape[0]) // block
        gram = jnp.where(side[:, None] <= side[None, :], upper, upper.T)
        return gram[: x.shape[0], : x.shape[0]]
    _check_paths("y", y)
    if x.shape[2] != y.shape[2]:
        raise ValueError(
            f"`x` has shape {x.shape} but `y` has shape {y.shape}; a kernel compares paths of as "
            "many channels."
        )
    if x.shape[1] > y.shape[1]:  # the diagonals lie along the shorter path
        options: Any = {"static_kernel": static_kernel, "dyadic_order": dyadic_order}
        return signature_gram(y, x, block=block, **options).T
    xs, ys = (_in_blocks(paths, min(block, paths.shape[0])) for paths in (x, y))
    pairs = np.indices((xs.shape[0], ys.shape[0])).reshape(2, -1)
    values = _grams(static_kernel, dyadic_order, *pairs, xs, ys)
    return _assembled(values, *pairs)[: x.shape[0], : y.shape[0]]


def _in_blocks(
    paths: Float[Array, "paths times channels"], block: int
) -> Float[Array, "blocks channels block times"]:
    """Channels first; the last block is filled up with constant paths."""
    extra = -paths.shape[0] % block
    paths = jnp.pad(paths, ((0, extra), (0, 0), (0, 0)))
    paths = paths.reshape(-1, block, *paths.shape[1:])
    return jnp.transpose(paths, (0, 3, 1, 2))


def _assembled(
    blocks: Float[Array, "blocks xs ys"], rows: np.ndarray, columns: np.ndarray
) -> Float[Array, "paths paths2"]:
    _, height, width = blocks.shape
    matrix = jnp.zeros((rows.max() + 1, columns.max() + 1, height, width), blocks.dtype)
    matrix = matrix.at[rows, columns].set(blocks)
    return matrix.transpose(0, 2, 1, 3).reshape(matrix.shape[0] * height, -1)


def _grams(
    static_kernel: Callable | None,
    order: int,
    rows: np.ndarray,
    columns: np.ndarray,
    xs: Float[Array, "blocks channels block times"],
    ys: Float[Array, "blocks2 channels block2 times2"],
) -> Float[Array, "pairs block block2"]:
    """The Gram matrices of the blocks xs[rows] with ys[columns], one after the other."""

    def gram(pair: tuple[Array, Array], xs: Array, ys: Array) -> Array:
        return _Sweep(static_kernel, order, xs[pair[0]], ys[pair[1]]).value()

    @jax.custom_vjp
    def grams(xs: Array, ys: Array):
        return jax.lax.map(lambda pair: gram(pair, xs, ys), (rows, columns))

    def backward(paths, cts: Any):
        xs, ys = paths

        def add(totals: Any, pair):
            row, column, ct = pair
            ct_x, ct_y = _Sweep(static_kernel, order, xs[row], ys[column]).pullback(ct)
            return (totals[0].at[row].add(ct_x), totals[1].at[column].add(ct_y)), None

        zeros = (jnp.zeros_like(xs), jnp.zeros_like(ys))
        return jax.lax.scan(add, zeros, (rows, columns, cts))[0]

    grams.defvjp(lambda xs, ys: (grams(xs, ys), (xs, ys)), backward)
    return grams(xs, ys)


class _Sweep(eqx.Module):
    """The scheme on all pairs of two blocks of paths, channels first, and its adjoint.

    A diagonal has shape (xs, ys, R m + 1).
    """

    static_kernel: Callable | None = eqx.field(static=True)
    order: int = eqx.field(static=True)
    x: Path
    y: Path  # reversed, ends repeated

    def __init__(self, static_kernel: Callable | None, order: int, x: Path, y: Path):
        self.static_kernel, self.order, self.x = static_kernel, order, x
        m = x.shape[2] - 1
        self.y = jnp.pad(y, ((0, 0), (0, 0), (m, m)), mode="edge")[..., ::-1]

    @property
    def m(self) -> int:
        return self.x.shape[2] - 1

    @property
    def n(self) -> int:
        return self.y.shape[2] - 1 - 2 * self.m

    @property
    def R(self) -> int:
        return 2**self.order

    def value(self) -> Float[Array, "xs ys"]:
        """The kernel of every pair."""
        diagonals = jnp.arange(self.m + self.n)
        (new, _, _), _ = jax.lax.scan(
            lambda carry, E: (self.advance(carry, E)[0], None), self.edge(), diagonals
        )
        return new[..., -1]

    def pullback(self, ct: Float[Array, "xs ys"]) -> tuple[Path, Path]:
        """The derivatives with respect to the two blocks of paths, of the sum of ct times k."""
        total = self.m + self.n
        length = max(1, round(math.sqrt(2 * total / self.R)))
        segments = -(-total // length)  # the last may go on behind the corner, where k is constant
        diagonals = jnp.arange(segments * length).reshape(segments, length)

        def forward(carry: Any, Es):
            return jax.lax.scan(lambda c, E: (self.advance(c, E)[0], None), carry, Es)[0], carry

        (new, old, _), starts = jax.lax.scan(forward, self.edge(), diagonals)

        def backward(carry: Any, segment: Any):
            Es, start = segment
            _, olds = jax.lax.scan(lambda c, E: self.advance_and_keep(c, E), start, Es)
            retreat = lambda carry, step: (self.retreat(*carry, *step), None)
            return jax.lax.scan(retreat, carry, (Es, olds), reverse=True)[0], None

        zeros, none = jnp.zeros_like(new), jnp.zeros_like(new[..., : self.m])
        end = (
            (old, zeros.at[..., -1].set(ct), zeros),
            none,
            (jnp.zeros_like(self.x), jnp.zeros_like(self.y)),
        )
        (_, _, cts), _ = jax.lax.scan(backward, end, (diagonals, starts), reverse=True)
        return cts[0], _unpadded(cts[1][..., ::-1], self.m)

    def edge(self) -> tuple[Array, Array, Cells]:
        """What `advance` starts from: two diagonals of ones, and cells before the first."""
        ones = jnp.ones((self.x.shape[1], self.y.shape[1], self.R * self.m + 1), self.x.dtype)
        return ones, ones, jnp.zeros_like(ones[..., : self.m])

    def advance(self, carry: Any, E: Int[Array, ""]) -> tuple[Any, list[Array]]:
        """One antidiagonal of whole cells: the last two diagonals (newest first) and the cells. Also
        the diagonals that fell out of the window on the way.
        """
        new, old, before = carry
        cells, olds = self.cells(self.x, self.window(E)), []
        for s in range(self.R):
            D = self.refined(cells, before, s)
            olds.append(old)
            inner = (1 + D / 2 + D**2 / 12) * _neighbors(new) - (1 - D**2 / 12) * old[..., :-1]
            new, old = jnp.concatenate([jnp.ones_like(inner[..., :1]), inner], axis=-1), new
        return (new, old, cells), olds

    def advance_and_keep(self, carry: Any, E: Int[Array, ""]) -> tuple[Any, Array]:
        carry, olds = self.advance(carry, E)
        return carry, jnp.stack(olds)

    def retreat(self, nodes: Any, ct_cells: Array, cts: Any, E: Array, olds: Array) -> Any:
        """One antidiagonal of whole cells back; `olds` are the diagonals that `advance` gave away."""
        (old, ct_new, ct_old), (ct_x, ct_y) = nodes, cts
        cells, before = (self.cells(self.x, self.window(at)) for at in (E, E - 1))
        ct_before = jnp.zeros_like(ct_cells)
        for s in reversed(range(self.R)):
            D = self.refined(cells, before, s)
            alpha, beta = 1 + D / 2 + D**2 / 12, 1 - D**2 / 12
            u = ct_new[..., 1:]
            ct_D = u * (_neighbors(old) * (0.5 + D / 6) + olds[s][..., :-1] * D / 6)
            own, lower = self.coarse(ct_D, s)
            ct_cells, ct_before = ct_cells + own, ct_before + lower
            old = olds[s]
            ct_new, ct_old = ct_old + _to_neighbors(alpha * u), _to_left(-beta * u)
        j = E - jnp.arange(self.m)
        inside = (0 <= j) & (j < self.n)
        _, pull = jax.vjp(lambda x, y: self.cells(x, y), self.x, self.window(E))
        add_x, add_y = pull(jnp.where(inside[None, None], ct_cells, 0.0))
        at = (0, 0, self.start(E))
        seen = jax.lax.dynamic_slice(ct_y, at, add_y.shape)
        ct_y = jax.lax.dynamic_update_slice(ct_y, seen + add_y, at)
        return (old, ct_new, ct_old), ct_before, (ct_x + add_x, ct_y)

    def start(self, E: Int[Array, ""] | int) -> Int[Array, ""]:
        return jnp.maximum(self.n + self.m - 1 - E, 0)  # behind the corner all cells have D = 0

    def window(self, E: Int[Array, ""] | int) -> Path:
        """The m + 1 points of y that meet those of x in the cells of antidiagonal E."""
        return jax.lax.dynamic_slice_in_dim(self.y, self.start(E), self.m + 1, axis=2)

    def cells(self, x: Path, y: Path) -> Cells:
        """D of the cells (i, E - i)."""
        x, y = x[:, :, None], y[:, None]
        if self.static_kernel is None:
            dx, dy = x[..., 1:] - x[..., :-1], y[..., :-1] - y[..., 1:]
            return functools.reduce(jnp.add, [dx[c] * dy[c] for c in range(x.shape[0])])
        kappa, along = self.static_kernel, self.static_kernel(x, y)  # of nodes (i, E + 1 - i)
        corner, start = kappa(x[..., 1:], y[..., :-1]), kappa(x[..., :-1], y[..., 1:])
        return corner - along[..., 1:] - along[..., :-1] + start

    def refined(self, cells: Cells, before: Cells, s: int) -> Float[Array, "xs ys nodes"]:
        """D of the cut cells on antidiagonal R E + s: those in the first s + 1 columns of a whole cell
        lie in antidiagonal E, the others in the one before.
        """
        if self.R == 1:
            return cells
        mine = (np.arange(self.R) <= s)[None, None, None]
        D = jnp.where(mine, cells[..., None], before[..., None]) / self.R**2
        return D.reshape(*cells.shape[:2], -1)

    def coarse(self, ct_D: Float[Array, "xs ys nodes"], s: int) -> tuple[Cells, Cells]:
        """The transpose of `refined`."""
        if self.R == 1:
            return ct_D, jnp.zeros_like(ct_D)
        ct_D = ct_D.reshape(*ct_D.shape[:2], self.m, self.R) / self.R**2
        return jnp.sum(ct_D[..., : s + 1], axis=-1), jnp.sum(ct_D[..., s + 1 :], axis=-1)


def _neighbors(k: Array) -> Array:
    """k[i+1,j] + k[i,j+1], for all i, of the diagonal between."""
    return k[..., 1:] + k[..., :-1]


def _to_neighbors(ct: Array) -> Array:
    """The transpose of `_neighbors`."""
    return _to_left(ct) + jnp.pad(ct, ((0, 0), (0, 0), (1, 0)))


def _to_left(ct: Array) -> Array:
    return jnp.pad(ct, ((0, 0), (0, 0), (0, 1)))


def _unpadded(ct: Path, m: int) -> Path:
    """The transpose of the repetition of both ends; what is outside has no derivative."""
    return ct[..., m : ct.shape[2] - m]


def _check_paths(name: str, paths: Any) -> None:
    if not eqx.is_array(paths) or paths.ndim != 3 or paths.shape[0] < 1 or paths.shape[1] < 2:
        raise ValueError(
            f"`{name}` is {eqx.tree_pformat(paths)}; a sample of paths is an array (paths, times, "
            "channels) with two times or more. One path is path[None]; paths of unequal length repeat "
            "their last row, which adds nothing to them."
        )
    if not jnp.issubdtype(paths.dtype, jnp.floating):
        raise ValueError(f"`{name}` has dtype {paths.dtype}; paths are floating.")
