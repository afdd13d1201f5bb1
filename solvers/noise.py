"""Brownian increments of a step, drawn by a path that remembers where it was last asked.

A `BrownianInterval` answers cheaply when it is asked next to where it was asked before. The loops ask it
once per step, forwards and then backwards, so they carry its memory, draw the increment themselves, and
hand the solver a path that already knows it. Only the cost depends on the memory, never the result.

A solver that asks more than once in a step (as `HalfSolver` does) asks about parts of the step; then
the path is left to answer by itself.
"""

from collections.abc import Callable, Sequence
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
        pairs = zip(_paths(self.terms), increments, strict=True)
        return _replaced(self.terms, [_StandIn(p, lambda *_, x=x: x) for p, x in pairs])

    def _queries(self, t0: Array, t1: Array) -> list[tuple[BrownianInterval, Array, Array]]:
        """The paths with the times at which the terms ask them over a step."""
        heard: list[Any] = []
        listening = _replaced(self.terms, [_listening(p, heard) for p in _paths(self.terms)])
        for term in jax.tree.leaves(listening, is_leaf=_is_single_term):
            term.contr(t0, t1)
        return [(path, a, b) for path, (a, b, _) in zip(_paths(self.terms), heard, strict=True)]


def with_terms(stepper: Any, terms: Terms) -> Any:
    """The stepper, for other terms."""
    return eqx.tree_at(lambda s: s.terms, stepper, terms)


def noise_of(stepper: Any, t0: Array, t1: Array, y: PyTree, state: PyTree) -> Noise | None:
    """The paths to remember for, if there are any and the solver asks each once per step."""
    paths = _paths(stepper.terms)
    if not paths:
        return None
    heard: list[list[Any]] = [[] for _ in paths]
    listening = [_listening(path, times) for path, times in zip(paths, heard, strict=True)]
    listener = with_terms(stepper, _replaced(stepper.terms, listening))
    cache = jax.eval_shape(stepper.cache, t0, y, state)
    jax.eval_shape(
        lambda t0, t1, y, state, cache: listener.attempt(t0, t1, y, state, cache, False)[:2],
        t0, t1, y, state, cache,
    )  # fmt: skip
    if any(len(asked) != 1 for asked in heard):
        return None
    return Noise(stepper.terms, tuple(asked[0][2] for asked in heard))


class _StandIn(diffrax.AbstractBrownianPath):
    """Takes the place of a path for one step."""

    t0: Any
    t1: Any
    levy_area: Any = eqx.field(static=True)
    answer: Callable[[Any, Any, bool], PyTree[Array]] = eqx.field(static=True)

    def __init__(self, path: BrownianInterval, answer: Callable[[Any, Any, bool], PyTree[Array]]):
        self.t0, self.t1, self.levy_area, self.answer = path.t0, path.t1, path.levy_area, answer

    def evaluate(self, t0, t1=None, left=True, use_levy=False):
        return self.answer(t0, t1, use_levy)


def _listening(path: BrownianInterval, heard: list[Any]) -> _StandIn:
    """Writes down what it is asked, and answers with zeros."""

    def answer(t0, t1, use_levy):
        heard.append((t0, t1, use_levy))
        increment = jax.eval_shape(lambda: path.evaluate(t0, t1, use_levy=use_levy))
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), increment)

    return _StandIn(path, answer)


def _is_path(x: Any) -> bool:
    return isinstance(x, BrownianInterval)


def _is_single_term(x: Any) -> bool:
    return isinstance(x, diffrax.AbstractTerm) and not isinstance(x, diffrax.MultiTerm)


def _paths(terms: Terms) -> list[BrownianInterval]:
    return [x for x in jax.tree.leaves(terms, is_leaf=_is_path) if _is_path(x)]


def _replaced(terms: Terms, paths: Sequence[diffrax.AbstractBrownianPath]) -> Terms:
    new = iter(paths)
    return jax.tree.map(lambda x: next(new) if _is_path(x) else x, terms, is_leaf=_is_path)
