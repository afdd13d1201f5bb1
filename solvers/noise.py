"""Brownian increments of a step, drawn by a path that remembers where it was last asked.

A `BrownianInterval` answers cheaply when it is asked next to where it was asked before. The loops ask it
once per step, forwards and then backwards, so they carry its memory, draw the increment themselves, and
hand the solver a path that already knows it. Only the cost depends on the memory, never the result.

A solver that asks more than once in a step (as `HalfSolver` does) asks about parts of the step; then
the path is left to answer by itself.
"""

from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from nde.solvers.brownian import BrownianInterval

Terms = PyTree[diffrax.AbstractTerm]


class Noise(eqx.Module):
    """The remembering paths among some terms, in order.

    Args:
        terms: as diffrax hands them over, time pointing forwards.
        use_levy: whether the solver asks for Levy area, one entry per path.
    """

    terms: Terms
    use_levy: tuple[bool, ...] = eqx.field(static=True)

    def init(self) -> PyTree[Array]:
        """A memory of nothing, one entry per path."""
        return tuple(path.init() for path in _paths(self.terms))

    def draw(
        self, t0: Array, t1: Array, memory: PyTree[Array]
    ) -> tuple[PyTree[Array], PyTree[Array]]:
        """The increments over a step, and the memory for the next."""
        increments, memories = [], []
        queries = self._queries(t0, t1)
        for (path, a, b), levy, remembered in zip(queries, self.use_levy, memory, strict=True):
            increment, remembered = path.advance(a, b, remembered, use_levy=levy)
            increments.append(increment)
            memories.append(remembered)
        return tuple(increments), tuple(memories)

    def round_end(self, t0: Array, t1: Array) -> Array:
        """The end of a proposed step, moved to where every path finds it quickly."""
        for path, a, b in self._queries(t0, t1):
            forward = b == t1  # else time runs backwards, and the path sees the step from its end
            end = path.round_down(jnp.where(forward, a, b), jnp.where(forward, b, a))
            t1 = jnp.where(forward, end, -end)
        return t1

    def known(self, increments: PyTree[Array]) -> Terms:
        """The terms, with paths that know the increments of the step at hand."""
        return _replaced(self.terms, [_Known(p, i) for p, i in zip(_paths(self.terms), increments)])

    def _queries(self, t0: Array, t1: Array) -> list[tuple[BrownianInterval, Array, Array]]:
        """The paths with the times at which the terms ask them over a step."""
        heard: list[tuple[Array, Array]] = []
        listening = _replaced(self.terms, [_Listening(p, heard) for p in _paths(self.terms)])
        for term in jax.tree.leaves(listening, is_leaf=_is_single_term):
            term.contr(t0, t1)
        return [(path, a, b) for path, (a, b) in zip(_paths(self.terms), heard, strict=True)]


def with_terms(stepper: Any, terms: Terms) -> Any:
    """The stepper, for other terms."""
    return eqx.tree_at(lambda s: s.terms, stepper, terms)


def noise_of(stepper: Any, t0: Array, t1: Array, y: PyTree, state: PyTree) -> Noise | None:
    """The paths to remember for, if there are any and the solver asks each once per step."""
    paths = _paths(stepper.terms)
    if not paths:
        return None
    heard = [[] for _ in paths]
    listening = [_Listening(p, times, levy=True) for p, times in zip(paths, heard, strict=True)]
    listener = with_terms(stepper, _replaced(stepper.terms, listening))
    cache = jax.eval_shape(stepper.cache, t0, y, state)
    for times in heard:
        times.clear()
    jax.eval_shape(
        lambda t0, t1, y, state, cache: listener.attempt(t0, t1, y, state, cache, False)[:2],
        t0, t1, y, state, cache,
    )  # fmt: skip
    if any(len(asked) != 1 for asked in heard):
        return None
    return Noise(stepper.terms, tuple(asked[0] for asked in heard))


class _Listening(diffrax.AbstractBrownianPath):
    """Writes down when it is asked (or whether for Levy area)."""

    path: BrownianInterval
    heard: list = eqx.field(static=True)
    levy: bool = eqx.field(static=True, default=False)

    @property
    def t0(self):
        return self.path.t0

    @property
    def t1(self):
        return self.path.t1

    @property
    def levy_area(self):
        return self.path.levy_area

    def evaluate(self, t0, t1=None, left=True, use_levy=False):
        self.heard.append(use_levy if self.levy else (t0, t1))
        answer = jax.eval_shape(lambda: self.path.evaluate(t0, t1, left, use_levy))
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), answer)


class _Known(diffrax.AbstractBrownianPath):
    """Knows the increment over one step, whatever the times."""

    path: BrownianInterval
    increment: PyTree[Array]

    @property
    def t0(self):
        return self.path.t0

    @property
    def t1(self):
        return self.path.t1

    @property
    def levy_area(self):
        return self.path.levy_area

    def evaluate(self, t0, t1=None, left=True, use_levy=False):
        return self.increment


def _is_path(x: Any) -> bool:
    return isinstance(x, BrownianInterval)


def _is_single_term(x: Any) -> bool:
    return isinstance(x, diffrax.AbstractTerm) and not isinstance(x, diffrax.MultiTerm)


def _paths(terms: Terms) -> list[BrownianInterval]:
    return [x for x in jax.tree.leaves(terms, is_leaf=_is_path) if _is_path(x)]


def _replaced(terms: Terms, paths: list[diffrax.AbstractBrownianPath]) -> Terms:
    new = iter(paths)
    return jax.tree.map(lambda x: next(new) if _is_path(x) else x, terms, is_leaf=_is_path)
