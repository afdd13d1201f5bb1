r"""A reversible step is a sequence of invertible couplings.

The state is a tuple of members x = (x_1, .., x_m) of equal structure. A coupling changes one
member i from another one j, with constants a != 0 and b:

    forward     x_i <- a x_i + b x_j + g,         g = G(v),  v = F(p, x_j)
    inverse     x_i <- (x_i - b x_j - g) / a
    transpose   (ct_p, u) = (dg/d(p, x_j))^T ct_i,    ct_j <- ct_j + b ct_i + u,    ct_i <- a ct_i

F evaluates the vector field, G is linear in v and multiplies with the control. x_j is untouched, so
the value that un-steps is the primal of the very `jax.vjp` that the transpose needs: one evaluation
and one transpose per coupling, and nothing is stored.

*Shared ends.* Where the last coupling of a step and the first of the next evaluate F at one point
(t, x_j), the two are one *node*: v = F(p, x_j), g_last = G_last(v), g_first = G_first(v). Forwards,
v travels with the solver state. Backwards, the first coupling of a step is left *pending* until the
node that ends the step before it: n steps cost n + 1 evaluations and n + 1 transposes. A jump of
the field at t breaks the tie: then the node evaluates once on each side.

In code:    i, j, a, b, F, G -> `Coupling`    p -> what `Pullback` differentiates    (v, g) -> `Record`
Cost:       that of F, once per coupling, in either direction.
Not for:    dissipative fields over long times: volume shrinks by the product of the a forwards, and
            rounding grows by as much backwards.
Reference:  Efficient and accurate gradients for neural SDEs (2021) | arXiv:2105.13493
            Efficient, accurate and stable gradients for neural ODEs (2024) | arXiv:2410.11648
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import diffrax
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, PyTree

from nde.solvers import trees

Members = tuple[PyTree, ...]


class StepInput(NamedTuple):
    """A step from `t0` to `t1`: all that an increment may depend on, besides the state.

    Attributes:
        control: The increment of the control over the step, negated where a method goes back and
            never queried again. A value handed in is differentiated as a constant.
        made_jump: Whether the field jumped at `t0`; the Python `False` where no step can.
    """

    terms: PyTree[diffrax.AbstractTerm]
    t0: Any
    t1: Any
    args: Any
    control: Any
    made_jump: bool | Bool[Array, ""] = False

    @staticmethod
    def over(terms: PyTree, t0: Any, t1: Any, args: Any, made_jump: Any = False) -> "StepInput":
        """The step with its control, queried once."""
        control = jax.tree.map(lambda term: term.contr(t0, t1), terms, is_leaf=_is_term)
        return StepInput(terms, t0, t1, args, control, made_jump)


class Record(NamedTuple):
    """What one coupling computed: the field value v (None without F) and the increment g."""

    field: PyTree
    increment: PyTree


class Coupling(NamedTuple):
    """x[target] <- a x[target] + b x[source] + G(F(x[source])). See the module for the equations.

    Attributes:
        target: Which member changes.
        source: Which member it changes from.
        a: A nonzero Python float, static so that the compiler drops multiplications by one.
        b: A Python float, static so that the compiler drops a zero term.
        field: F(step, x_source) -> v, the evaluation; None if G acts on x_source itself.
        increment: G(step, v) -> g, linear in v, of the structure of x_target; None for g = 0.
    """

    target: int
    source: int
    a: float = 1.0
    b: float = 0.0
    field: Callable[[StepInput, PyTree], PyTree] | None = None
    increment: Callable[[StepInput, PyTree], PyTree] | None = None

    def evaluate(self, step: StepInput, other: PyTree) -> PyTree:
        """v, given the source member."""
        return other if self.field is None else self.field(step, other)

    def record(self, step: StepInput, v: PyTree) -> Record:
        """(v, g), given v."""
        g = None if self.increment is None else self.increment(step, v)
        return Record(None if self.field is None else v, g)

    def forward(self, members: Members, g: PyTree) -> Members:
        """The members after the coupling, from those before."""
        x, w = members[self.target], members[self.source]
        return _put(members, self.target, trees.combine((self.a, self.b, 1.0), (x, w, g)))

    def inverse(self, members: Members, g: PyTree) -> Members:
        """The members before the coupling, from those after."""
        x, w = members[self.target], members[self.source]
        x = trees.combine((1.0, -self.b, -1.0), (x, w, g))
        if self.a != 1.0:
            x = jax.tree.map(lambda leaf: leaf / self.a, x)
        return _put(members, self.target, x)

    def transpose(self, cts: Members, u: PyTree) -> Members:
        """The cotangents before the coupling, from those after and u, the pullback of g."""
        ct = cts[self.target]
        cts = _put(cts, self.source, trees.combine((1.0, self.b, 1.0), (cts[self.source], ct, u)))
        return _put(cts, self.target, trees.combine((self.a,), (ct,)))


def forward(
    couplings: Sequence[Coupling], step: StepInput, members: Members, known: PyTree = None
) -> tuple[Members, list[Record]]:
    """The members at `t1` from those at `t0`.

    Args:
        couplings: The couplings of the step, in order.
        step: The step.
        members: The members at `t0`.
        known: The field value of the first coupling, if it is known already.

    Returns:
        The members, and what every coupling computed.
    """
    records = []
    for c in couplings:
        v = c.evaluate(step, members[c.source]) if known is None else known
        known = None
        records.append(c.record(step, v))
        members = c.forward(members, records[-1].increment)
    return members, records


def inverse(
    couplings: Sequence[Coupling], step: StepInput, members: Members, known: PyTree = None
) -> tuple[Members, list[Record]]:
    """The members at `t0` from those at `t1`: the exact inverse of `forward`.

    Args:
        couplings: The couplings of the step, in order.
        step: The step.
        members: The members at `t1`.
        known: The field value of the last coupling, if it is known already.

    Returns:
        The members, and what every coupling had computed, in the order of `couplings`.
    """
    records = []
    for c in reversed(couplings):
        v = c.evaluate(step, members[c.source]) if known is None else known
        known = None
        records.append(c.record(step, v))
        members = c.inverse(members, records[-1].increment)
    return members, records[::-1]


class Pullback(Protocol):
    """How the caller evaluates and transposes a function that is written for one trajectory.

    `fn(step, following, x)` gets the step at hand, the one after it and a member. The caller
    supplies both steps from the leaves it differentiates and may map `fn` over lanes inside one
    `jax.vjp`, so that the cotangent of a shared parameter arrives summed. Members and cotangents
    carry whatever lane axes the caller gave them; the functions here only add and scale them.
    """

    def value(self, fn: Callable[[StepInput, StepInput, PyTree], PyTree], x: PyTree) -> PyTree:
        """fn(step, following, x)."""
        ...

    def pull(
        self, fn: Callable[[StepInput, StepInput, PyTree], PyTree], x: PyTree, ct: PyTree
    ) -> tuple[PyTree, PyTree, PyTree]:
        """(value, cotangent of the parameters, cotangent of x), given `ct`, that of the value."""
        ...


class RewindState(NamedTuple):
    """What travels backwards from step to step.

    Between two calls of `rewind` the cotangents are those at the earlier end of the step just
    undone: add the cotangents of outputs saved there to `cts`. The members are those values too,
    except that the first coupling of that step is still to be undone where `pending`.

    Attributes:
        members: The members of the state.
        cts: Their cotangents.
        ct_first: With shared ends, the cotangent of the pending increment; otherwise None.
        pending: Whether there is such an increment, one entry per lane.
    """

    members: Members
    cts: Members
    ct_first: PyTree
    pending: Bool[Array, "..."]


def start_rewind(
    couplings: Sequence[Coupling],
    shared_ends: bool,
    members: Members,
    cts: Members,
    lanes: tuple[int, ...] = (),
) -> RewindState:
    """The `RewindState` at the end of the solve, or at a stored state: nothing is pending.

    Args:
        couplings: The step.
        shared_ends: Whether its first and last coupling are shared with the neighboring steps.
        members: The members of the state, with the leading axes `lanes`.
        cts: Their cotangents.
        lanes: The shape of the lane axes, () for one trajectory.
    """
    ct_first = trees.zeros_like(members[couplings[0].target]) if shared_ends else None
    return RewindState(members, cts, ct_first, jnp.zeros(lanes, bool))


def rewind(
    couplings: Sequence[Coupling],
    shared_ends: bool,
    pullback: Pullback,
    back: RewindState,
) -> tuple[RewindState, PyTree]:
    """Un-steps one step and pulls the cotangents back through it.

    Args:
        couplings: The step.
        shared_ends: Whether its first and last coupling are shared with the neighboring steps.
        pullback: The caller's evaluations.
        back: The state and cotangents at the end of the step.

    Returns:
        The state and cotangents at the start of the step, and the cotangent of the parameters.
    """
    if not shared_ends:
        members, cts, ct_p = _pull_each(couplings, pullback, back.members, back.cts)
        return RewindState(members, cts, None, back.pending), ct_p
    first, last = couplings[0], couplings[-1]
    node = _node(first, last)
    ct_increments = (back.cts[last.target], back.ct_first)
    (g_last, g_next), ct_p, u = pullback.pull(node, back.members[last.source], ct_increments)
    members = _undo_pending(first, back, g_next)
    members = last.inverse(members, g_last)
    cts = last.transpose(back.cts, u)
    members, cts, more = _pull_each(couplings[1:-1], pullback, members, cts)
    back = RewindState(members, cts, cts[first.target], jnp.ones_like(back.pending))
    return back, trees.add(ct_p, more)


def finish_rewind(
    couplings: Sequence[Coupling], shared_ends: bool, pullback: Pullback, back: RewindState
) -> tuple[Members, Members, PyTree]:
    """The members, their cotangents and the cotangent of the parameters, nothing left pending.

    Called at the start of the solve, and wherever the reconstruction is compared with a stored
    state. `following` is the step last undone; `step` is not used.
    """
    if not shared_ends:
        return back.members, back.cts, None
    first = couplings[0]

    def first_increment(step: StepInput, following: StepInput, other: PyTree) -> PyTree:
        del step
        return first.record(following, first.evaluate(following, other)).increment

    g, ct_p, u = pullback.pull(first_increment, back.members[first.source], back.ct_first)
    cts = _put(back.cts, first.source, trees.add(back.cts[first.source], u))
    return _undo_pending(first, back, g), cts, ct_p


def _is_term(x: Any) -> bool:
    return isinstance(x, diffrax.AbstractTerm)


def _put(members: Members, i: int, x: PyTree) -> Members:
    return members[:i] + (x,) + members[i + 1 :]


def _node(first: Coupling, last: Coupling):
    """The evaluation shared by the last coupling of a step and the first of the next."""

    def node(step: StepInput, following: StepInput, other: PyTree) -> tuple[PyTree, PyTree]:
        v = v_next = last.evaluate(step, other)
        if following.made_jump is not False:
            v_next = jax.lax.cond(
                following.made_jump, lambda: first.evaluate(following, other), lambda: v
            )
        return last.record(step, v).increment, first.record(following, v_next).increment

    return node


def _undo_pending(first: Coupling, back: RewindState, g: PyTree) -> Members:
    """Undoes the pending increment in the lanes that have one."""
    return trees.where(back.pending, first.inverse(back.members, g), back.members)


def _pull_each(
    couplings: Sequence[Coupling], pullback: Pullback, members: Members, cts: Members
) -> tuple[Members, Members, PyTree]:
    """The inverse and the transpose of couplings that share nothing."""
    ct_params = None
    for c in reversed(couplings):
        if c.increment is None:
            members, cts = c.inverse(members, None), c.transpose(cts, None)
            continue

        def increment(step: StepInput, following: StepInput, x: PyTree, c: Coupling = c) -> PyTree:
            del following
            return c.record(step, c.evaluate(step, x)).increment

        g, ct_p, u = pullback.pull(increment, members[c.source], cts[c.target])
        members, cts = c.inverse(members, g), c.transpose(cts, u)
        ct_params = trees.add(ct_params, ct_p)
    return members, cts, ct_params
