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

In code:    i, j, a, b, F, G -> `Coupling`    p -> what `Pull` differentiates    (v, g) -> `Record`
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

Members = tuple[PyTree, ...]


class Step(NamedTuple):
    """One step from `t0` to `t1`: all that an increment may depend on, besides the state.

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
    def over(terms: PyTree, t0: Any, t1: Any, args: Any, made_jump: Any = False) -> "Step":
        """The step with its control, queried once."""
        control = jax.tree.map(lambda term: term.contr(t0, t1), terms, is_leaf=_is_term)
        return Step(terms, t0, t1, args, control, made_jump)


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
    field: Callable[[Step, PyTree], PyTree] | None = None
    increment: Callable[[Step, PyTree], PyTree] | None = None

    def evaluate(self, step: Step, other: PyTree) -> PyTree:
        """v, given the source member."""
        return other if self.field is None else self.field(step, other)

    def record(self, step: Step, v: PyTree) -> Record:
        """(v, g), given v."""
        g = None if self.increment is None else self.increment(step, v)
        return Record(None if self.field is None else v, g)

    def forward(self, members: Members, g: PyTree) -> Members:
        """The members after the coupling, from those before."""
        x, w = members[self.target], members[self.source]
        return _put(members, self.target, total((self.a, x), (self.b, w), (1.0, g)))

    def inverse(self, members: Members, g: PyTree) -> Members:
        """The members before the coupling, from those after."""
        x, w = members[self.target], members[self.source]
        x = total((1.0, x), (-self.b, w), (-1.0, g))
        if self.a != 1.0:
            x = jax.tree.map(lambda leaf: leaf / self.a, x)
        return _put(members, self.target, x)

    def transpose(self, cts: Members, u: PyTree) -> Members:
        """The cotangents before the coupling, from those after and u, the pullback of g."""
        ct = cts[self.target]
        cts = _put(cts, self.source, total((1.0, cts[self.source]), (self.b, ct), (1.0, u)))
        return _put(cts, self.target, total((self.a, ct)))


def advance(
    couplings: Sequence[Coupling], step: Step, members: Members, first: PyTree = None
) -> tuple[Members, list[Record]]:
    """The members at `t1` from those at `t0`.

    Args:
        first: The field value of the first coupling, if it is known already.

    Returns:
        The members, and what every coupling computed.
    """
    records = []
    for c in couplings:
        v = c.evaluate(step, members[c.source]) if first is None else first
        first = None
        records.append(c.record(step, v))
        members = c.forward(members, records[-1].increment)
    return members, records


def undo(
    couplings: Sequence[Coupling], step: Step, members: Members, last: PyTree = None
) -> tuple[Members, list[Record]]:
    """The members at `t0` from those at `t1`: the exact inverse of `advance`.

    Args:
        last: The field value of the last coupling, if it is known already.

    Returns:
        The members, and what every coupling had computed, in the order of `couplings`.
    """
    records = []
    for c in reversed(couplings):
        v = c.evaluate(step, members[c.source]) if last is None else last
        last = None
        records.append(c.record(step, v))
        members = c.inverse(members, records[-1].increment)
    return members, records[::-1]


class Pull(Protocol):
    """How the caller evaluates and transposes a function that is written for one trajectory.

    `fn(step, following, x)` gets the step at hand, the one after it and a member. The caller
    supplies both steps from the leaves it differentiates and may map `fn` over lanes inside one
    `jax.vjp`, so that the cotangent of a shared parameter arrives summed. Members and cotangents
    carry whatever lane axes the caller gave them; the functions here only add and scale them.
    """

    def value(self, fn: Callable[[Step, Step, PyTree], PyTree], x: PyTree) -> PyTree:
        """fn(step, following, x)."""
        ...

    def pull(
        self, fn: Callable[[Step, Step, PyTree], PyTree], x: PyTree, ct: PyTree
    ) -> tuple[PyTree, PyTree, PyTree]:
        """(value, cotangent of the parameters, cotangent of x), given `ct`, that of the value."""
        ...


class Rewind(NamedTuple):
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
    ends: bool,
    members: Members,
    cts: Members,
    lanes: tuple[int, ...] = (),
) -> Rewind:
    """The `Rewind` at the end of the solve, or at a stored state: nothing is pending.

    Args:
        couplings: The step.
        ends: Whether its first and last coupling are shared with the neighboring steps.
        members: The members of the state, with the leading axes `lanes`.
        cts: Their cotangents.
        lanes: The shape of the lane axes, () for one trajectory.
    """
    ct_first = jax.tree.map(jnp.zeros_like, members[couplings[0].target]) if ends else None
    return Rewind(members, cts, ct_first, jnp.zeros(lanes, bool))


def rewind(
    couplings: Sequence[Coupling],
    ends: bool,
    pull: Pull,
    back: Rewind,
    ct_records: Sequence[Record | None] | None = None,
) -> tuple[Rewind, PyTree]:
    """Un-steps one step and pulls the cotangents back through it.

    Args:
        couplings: The step.
        ends: Whether its first and last coupling are shared with the neighboring steps.
        pull: The caller's evaluations, see `Pull`.
        back: The state and cotangents at the end of the step.
        ct_records: For each coupling, the cotangents of (v, g) if an output or a regularizer uses
            them, else None. With shared ends those of g only, for the first and last coupling.

    Returns:
        The state and cotangents at the start of the step, and the cotangent of the parameters.
    """
    ct_records = [None] * len(couplings) if ct_records is None else list(ct_records)
    if not ends:
        members, cts, ct_p = _pull_each(couplings, pull, back.members, back.cts, ct_records)
        return Rewind(members, cts, None, back.pending), ct_p
    first, last = couplings[0], couplings[-1]
    node = _node(first, last)
    ct_last = _increment_ct(back.cts[last.target], ct_records[-1])
    (g_last, g_next), ct_p, u = pull.pull(node, back.members[last.source], (ct_last, back.ct_first))
    members = _settle(first, back, g_next)
    members = last.inverse(members, g_last)
    cts = last.transpose(back.cts, u)
    members, cts, more = _pull_each(couplings[1:-1], pull, members, cts, ct_records[1:-1])
    ct_first = _increment_ct(cts[first.target], ct_records[0])
    return Rewind(members, cts, ct_first, jnp.ones_like(back.pending)), _add(ct_p, more)


def finish_rewind(
    couplings: Sequence[Coupling], ends: bool, pull: Pull, back: Rewind
) -> tuple[Members, Members, PyTree]:
    """The members, their cotangents and the cotangent of the parameters, nothing left pending.

    Called at the start of the solve, and wherever the reconstruction is compared with a stored
    state. `following` is the step last undone; `step` is not used.
    """
    if not ends:
        return back.members, back.cts, None
    first = couplings[0]

    def enter(step: Step, following: Step, other: PyTree) -> PyTree:
        del step
        return first.record(following, first.evaluate(following, other)).increment

    g, ct_p, u = pull.pull(enter, back.members[first.source], back.ct_first)
    cts = _put(back.cts, first.source, total((1.0, back.cts[first.source]), (1.0, u)))
    return _settle(first, back, g), cts, ct_p


def total(*weighted: tuple[float, PyTree]) -> PyTree:
    """The sum of w x over the pairs (w, x), leaving out w = 0 and x = None; zeros if all are zero."""
    terms = [(w, x) for w, x in weighted if w != 0.0 and x is not None]
    if not terms:
        return jax.tree.map(jnp.zeros_like, next(x for _, x in weighted if x is not None))
    scaled = [x if w == 1.0 else jax.tree.map(lambda leaf, w=w: w * leaf, x) for w, x in terms]
    out = scaled[0]
    for x in scaled[1:]:
        out = jax.tree.map(jnp.add, out, x)
    return out


def _is_term(x: Any) -> bool:
    return isinstance(x, diffrax.AbstractTerm)


def _put(members: Members, i: int, x: PyTree) -> Members:
    return members[:i] + (x,) + members[i + 1 :]


def _add(x: PyTree, y: PyTree) -> PyTree:
    return y if x is None else x if y is None else total((1.0, x), (1.0, y))


def _increment_ct(ct: PyTree, ct_record: Record | None) -> PyTree:
    return ct if ct_record is None else total((1.0, ct), (1.0, ct_record.increment))


def _node(first: Coupling, last: Coupling):
    """The evaluation shared by the last coupling of a step and the first of the next."""

    def node(step: Step, following: Step, other: PyTree) -> tuple[PyTree, PyTree]:
        v = v_next = last.evaluate(step, other)
        if following.made_jump is not False:
            v_next = jax.lax.cond(
                following.made_jump, lambda: first.evaluate(following, other), lambda: v
            )
        return last.record(step, v).increment, first.record(following, v_next).increment

    return node


def _settle(first: Coupling, back: Rewind, g: PyTree) -> Members:
    """Undoes the pending increment in the lanes that have one."""
    undone = first.inverse(back.members, g)

    def choose(new: Array, old: Array) -> Array:
        pending = back.pending.reshape(back.pending.shape + (1,) * (new.ndim - back.pending.ndim))
        return jnp.where(pending, new, old)

    return jax.tree.map(choose, undone, back.members)


def _pull_each(couplings, pull: Pull, members, cts, ct_records):
    """The inverse and the transpose of couplings that share nothing."""
    ct_params = None
    for c, ct_record in zip(reversed(couplings), reversed(ct_records), strict=True):
        if c.increment is None:
            members, cts = c.inverse(members, None), c.transpose(cts, None)
            continue

        def both(step: Step, following: Step, other: PyTree, c: Coupling = c) -> Record:
            del following
            return c.record(step, c.evaluate(step, other))

        def only(step: Step, following: Step, other: PyTree, both=both) -> PyTree:
            return both(step, following, other).increment

        ct_g = _increment_ct(cts[c.target], ct_record)
        if ct_record is None or ct_record.field is None:
            g, ct_p, u = pull.pull(only, members[c.source], ct_g)
        else:
            ct = Record(ct_record.field, ct_g)
            (_, g), ct_p, u = pull.pull(both, members[c.source], ct)
        members, cts = c.inverse(members, g), c.transpose(cts, u)
        ct_params = _add(ct_params, ct_p)
    return members, cts, ct_params
