r"""What a field does at one point: where it is undefined, how fast it moves, grows and decays.

With the eigenvalues l of J = df/dy at (t, y), seen along the direction of time,

    growth = max(0, max Re l),    decay = max(0, max -Re l).

In a small state J is formed column by column. In a large one it is projected on the Krylov space
{v, J v, J^2 v, ...}, whose projection has the outermost eigenvalues of J among its own.

In code:    f -> rate, J v -> push; vectors are float64, the field runs in the dtype of the state
Cost:       at most `SIZE` products with J. It is run once, after a solve has failed.
Reference:  The principle of minimized iterations in the solution of the matrix eigenvalue problem,
            Arnoldi (1951)
"""

from collections.abc import Iterator
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

SIZE = 48  # the largest matrix whose eigenvalues are taken


def vector(tree: PyTree[Array]) -> np.ndarray:
    """All entries of a state, in float64."""
    leaves = [np.asarray(x, np.float64).ravel() for x in jax.tree.leaves(tree)]
    return np.concatenate(leaves) if leaves else np.zeros(0)


def tree_like(entries: np.ndarray, like: PyTree[Array]) -> PyTree[Array]:
    """The inverse of `vector`, in the shapes and dtypes of `like`."""
    leaves, structure = jax.tree.flatten(like)
    ends = np.cumsum([x.size for x in leaves])[:-1]
    parts = np.split(entries, ends)
    with np.errstate(over="ignore"):
        cast = [
            jnp.asarray(p.reshape(x.shape).astype(x.dtype))
            for p, x in zip(parts, leaves, strict=True)
        ]
    return jax.tree.unflatten(structure, cast)


def entry(tree: PyTree[Array], position: int) -> str:
    """Where an entry of `vector(tree)` stands: "['b'][1]"."""
    for path, leaf in jax.tree.leaves_with_path(tree):
        if position < leaf.size:
            index = np.unravel_index(position, leaf.shape)
            return jax.tree_util.keystr(path) + (f"[{', '.join(map(str, index))}]" if index else "")
        position -= leaf.size
    raise IndexError(position)


def is_noise(term: Any) -> bool:
    """Whether a term is driven by Brownian motion."""
    control = getattr(term, "control", None)
    return isinstance(control, diffrax.AbstractBrownianPath)


def parts(terms: PyTree[diffrax.AbstractTerm]) -> Iterator[diffrax.AbstractTerm]:
    """The single terms of what a solver was given."""
    is_term = lambda x: isinstance(x, diffrax.AbstractTerm)
    for term in jax.tree.leaves(terms, is_leaf=is_term):
        if isinstance(term, diffrax.MultiTerm):
            yield from parts(term.terms)
        else:
            yield term


def knows_rate(terms: PyTree[diffrax.AbstractTerm], t: Array, y: PyTree[Array], args: Any) -> bool:
    """Whether the rate of change, without noise, can be evaluated."""
    if not all(isinstance(x, diffrax.ODETerm | diffrax.ControlTerm) for x in parts(terms)):
        return False
    try:
        eqx.filter_eval_shape(rate, terms, t, y, args)
    except Exception:  # a control without derivative fails in a way of its own
        return False
    return True


def rate(
    terms: PyTree[diffrax.AbstractTerm], t: Array, y: PyTree[Array], args: Any
) -> PyTree[Array]:
    """dy/dt without noise."""
    if isinstance(terms, tuple):  # a separable system: each half moves by the other
        return tuple(term.vf(t, x, args) for term, x in zip(terms, y[::-1], strict=True))
    total = jax.tree.map(jnp.zeros_like, y)
    for term in parts(terms):
        if not is_noise(term):
            ode = term.to_ode() if isinstance(term, diffrax.ControlTerm) else term
            with jax.numpy_dtype_promotion("standard"):
                total = jax.tree.map(jnp.add, total, ode.vf(t, y, args))
    return total


@eqx.filter_jit
def rate_at(terms: PyTree, t: Any, y: PyTree, args: Any):
    """`rate`, compiled."""
    return rate(terms, t, y, args)


@eqx.filter_jit
def noise_at(terms: PyTree, t: Any, y: PyTree, args: Any):
    """The coefficients of the noise."""
    return [term.vf(t, y, args) for term in parts(terms) if is_noise(term)]


@eqx.filter_jit
def push(terms: PyTree, t: Any, y: PyTree, args: Any, tangent: PyTree):
    """J times a tangent."""
    return jax.jvp(lambda y: rate(terms, t, y, args), (y,), (tangent,))[1]


def growth_and_decay(
    terms: PyTree[diffrax.AbstractTerm], t: Array, y: PyTree[Array], args: Any, direction: int
) -> tuple[float, float]:
    """The fastest growth and the fastest decay at (t, y).

    nan where J is not finite, 0 where the field cannot be differentiated forwards.
    """
    product = lambda v: vector(push(terms, t, y, args, tree_like(v, y)))
    try:
        matrix = _projected(product, vector(y).size)
    except (TypeError, NotImplementedError):
        return 0.0, 0.0
    if not np.isfinite(matrix).all():
        return np.nan, np.nan
    scale = np.abs(matrix).max() or 1.0
    values = scale * np.linalg.eigvals(matrix / scale)
    # Beside the largest, what is smaller than its rounding is nothing.
    eps = max(float(jnp.finfo(x.dtype).eps) for x in jax.tree.leaves(y))
    floor = 100 * eps * np.abs(values).max()
    real = direction * values.real
    growth, decay = (float(x) if x > floor else 0.0 for x in (real.max(), -real.min()))
    return growth, decay


def _projected(product: Any, n: int) -> np.ndarray:
    """J, or its projection on a Krylov space of `SIZE` dimensions."""
    if n <= SIZE:
        return np.stack([product(e) for e in np.eye(n)], axis=1)
    draw = np.random.default_rng(0)
    basis, images = np.zeros((0, n)), []
    v = draw.standard_normal(n)
    for _ in range(SIZE):
        size = np.linalg.norm(v)
        for _ in range(2):  # once leaves rounding behind
            v = v - basis.T @ (basis @ v)
        if not np.linalg.norm(v) > 1e-10 * size:  # the space is exhausted: go on elsewhere
            v = draw.standard_normal(n)
            v -= basis.T @ (basis @ v)
        basis = np.concatenate([basis, v[None] / np.linalg.norm(v)])
        images.append(product(basis[-1]))
        v = images[-1]
        if not np.isfinite(v).all():
            return np.full((1, 1), np.nan)
    return basis @ np.stack(images, axis=1)
