"""Brownian increments of a step, drawn by a path that remembers where it was last asked.

A `BrownianInterval` answers cheaply when it is asked next to where it was asked before. The loops ask it
once per step, forwards and then backwards, so they carry its memory, draw the increment themselves, and
hand the solver a path that already knows it. Only the cost depends on the memory, never the result.

A solver that asks more than once in a step (as `HalfSolver` does), or about other times than the step's
(as `LeapfrogMidpoint` does), or does not declare what it does, is not told: then the path answers by
itself.
"""

import functools
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
        return tuple(path.init() for path in intervals(self.terms))

    def draw(
        self, t0: Array, t1: Array, memory: PyTree[Array]
    ) -> tuple[PyTree[Array], PyTree[Array]]:
        """The increments over a step, and the memory for the next."""
        increments, memories = [], []
        queries = self._queries(t0, t1)
        for (path, a, b), levy, remembered in zip(queries, self.use_levy, memory, strict=True):
            increment, remembered = path.draw(a, b, remembered, use_levy=levy)
            increments.append(increment)
            memories.append(remembered)
        return tuple(increments), tuple(memories)

    def round_end(self, t0: Array, t1: Array) -> Array:
        """The end of a proposed step, moved to where every path finds it quickly."""
        for path, a, b in self._queries(t0, t1):
            forward = (a == t0) & (b == t1)
            backward = (a == -t1) & (b == -t0)  # the path sees the step from its end
            end = path.round_down(jnp.where(forward, a, b), jnp.where(forward, b, a))
            # A path with a time of its own is asked where it happens to be.
            t1 = jnp.where(forward, end, jnp.where(backward, -end, t1))
        return t1

    def known(self, increments: PyTree[Array]) -> Terms:
        """The terms, with paths that know the increments of the step at hand."""
        pairs = zip(intervals(self.terms), increments, strict=True)
        return _replaced(self.terms, [_StandIn(p, lambda *_, x=x: x) for p, x in pairs])

    def _queries(self, t0: Array, t1: Array) -> list[tuple[BrownianInterval, Array, Array]]:
        """The paths with the times at which the terms ask them over a step."""
        asked = _asked(self.terms, lambda terms: _controls(terms, t0, t1))
        return [
            (path, a, b) for path, [(a, b, _)] in zip(intervals(self.terms), asked, strict=True)
        ]


def with_terms(stepper: Any, terms: Terms) -> Any:
    """The stepper, for other terms."""
    return eqx.tree_at(lambda s: s.terms, stepper, terms)


def noise_of(stepper: Any, t0: Array, t1: Array, y: PyTree, state: PyTree) -> Noise | None:
    """The paths to remember for, if there are any and the solver asks each once, about the whole step."""
    declared = stepper.declared()
    if not intervals(stepper.terms) or declared is None or not declared.asks_noise_once:
        return None
    by_terms = _asked(stepper.terms, lambda terms: _controls(terms, t0, t1))

    def attempt(terms: Terms) -> None:
        cache = jax.eval_shape(stepper.cache, t0, y, state)
        jax.eval_shape(with_terms(stepper, terms).attempt, t0, t1, y, state, cache, False)

    by_attempt = _asked(stepper.terms, attempt)  # the vector field may ask, too
    if any(len(queries) != 1 for queries in by_terms + by_attempt):
        return None
    return Noise(stepper.terms, tuple(use_levy for [(_, _, use_levy)] in by_attempt))


def covered(terms: Terms, t0: Array, t1: Array) -> list[tuple[BrownianInterval, Array]]:
    """The paths among the terms, with whether each covers a solve from t0 to t1."""
    asked = _asked(terms, lambda terms: _controls(terms, t0, t1))
    found = []
    for path, queries in zip(intervals(terms), asked, strict=True):
        inside = [path.covers(t) for a, b, _ in queries for t in (a, b) if t is not None]
        found.append((path, functools.reduce(jnp.logical_and, inside, jnp.array(True))))
    return found


class _StandIn(diffrax.AbstractBrownianPath):
    """Takes the place of a path for one step."""

    t0: Any
    t1: Any
    levy_area: Any = eqx.field(static=True)
    answer: Callable[[Any, Any, bool], PyTree[Array]] = eqx.field(static=True)

    def __init__(self, path: BrownianInterval, answer: Callable[[Any, Any, bool], PyTree[Array]]):
        self.t0, self.t1, self.levy_area, self.answer = path.t0, path.t1, path.levy_area, answer

    def evaluate(self, t0: Array, t1: Any = None, left: Any = True, use_levy: bool = False):
        return self.answer(t0, t1, use_levy)


def _asked(terms: Terms, use: Callable[[Terms], Any]) -> list[list[tuple[Any, Any, bool]]]:
    """What each path is asked while `use` runs on the terms: (t0, t1, use_levy)."""
    paths = intervals(terms)
    heard: list[list[Any]] = [[] for _ in paths]
    if not paths:
        return heard
    use(_replaced(terms, list(map(_listening, paths, heard))))
    return heard


def _controls(terms: Terms, t0: Array, t1: Array) -> list[Any]:
    """The control of every term over a step."""
    return [term.contr(t0, t1) for term in jax.tree.leaves(terms, is_leaf=_is_single_term)]


def _listening(path: BrownianInterval, heard: list[Any]) -> _StandIn:
    """Writes down what it is asked, and answers with zeros."""

    def answer(t0: Array, t1: Array, use_levy: bool):
        heard.append((t0, t1, use_levy))
        increment = jax.eval_shape(lambda: path.evaluate(t0, t1, use_levy=use_levy))
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), increment)

    return _StandIn(path, answer)


def _is_path(x: Any) -> bool:
    return isinstance(x, BrownianInterval)


def _is_single_term(x: Any) -> bool:
    return isinstance(x, diffrax.AbstractTerm) and not isinstance(x, diffrax.MultiTerm)


def intervals(terms: Terms) -> list[BrownianInterval]:
    return [x for x in jax.tree.leaves(terms, is_leaf=_is_path) if _is_path(x)]


def _replaced(terms: Terms, paths: Sequence[diffrax.AbstractBrownianPath]) -> Terms:
    new = iter(paths)
    return jax.tree.map(lambda x: next(new) if _is_path(x) else x, terms, is_leaf=_is_path)
