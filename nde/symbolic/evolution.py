r"""Regularized evolution: islands of expressions; the fittest have children, the oldest die.

Each generation, on each island of `population` expressions, `births` times at once:

    parent     the fittest of a tournament on the island; sometimes of one on the next island, or an
               entry of the hall of fame: that is all the migration there is
    child      one change of the parent (`variation`), then a few steps for its constants (`constants`)
    accepted   with probability exp(-(F_child - F_parent) / T); otherwise the parent takes its place
    death      the `births` oldest of the island make room

Fitness (the smaller the better) is F = log loss + parsimony size + 20 share(size): the last term, the
share of all expressions that have this size, keeps every size alive ("adaptive parsimony"). T falls from
1 to 0 and starts again. The hall of fame keeps the smallest loss of every size. A loss is relative to the
variance of the targets; one that is not finite is inf, and inf is never kept.

Reference:  Regularized evolution for image classifier architecture search (2019) | arXiv:1802.01548
            Interpretable machine learning for science with PySR (2023) | arXiv:2305.01582
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from nde.symbolic.constants import fit_constants, has_room
from nde.symbolic.tape import INDEX, Language, complexity
from nde.symbolic.units import Units, agree
from nde.symbolic.variation import DRAWS, Tape, random_tape, vary

FROM_HALL, FROM_NEXT = 0.05, 0.05
CROWDING = 20.0
COOLING = 20  # generations until the temperature starts again


@dataclasses.dataclass(frozen=True)
class Settings:
    """What stays the same during a search; see `nde.symbolic.search`."""

    language: Language
    islands: int
    population: int
    births: int
    tournament: int
    constant_steps: int
    parsimony: float
    units: Units | None


class Members(NamedTuple):
    """Expressions with their losses: leaves have the axes of a population, or none."""

    tape: Tape
    loss: Float[Array, "..."]


class State(NamedTuple):
    """A search after some generations."""

    islands: Members  # (islands, population)
    hall: Members  # (length + 1,), the best of each size
    share: Float[Array, " sizes"]
    generation: Int[Array, ""]


Data = tuple[Float[Array, "variables points"], Float[Array, " points"]]


def start(settings: Settings, data: Data, key: PRNGKeyArray) -> State:
    """Islands of small random expressions, whose losses count as inf until they had their turn."""
    language, dtype = settings.language, data[1].dtype
    count, sizes = settings.islands * settings.population, language.length + 1
    draws = jax.random.uniform(key, (count, DRAWS))
    tapes = jax.vmap(lambda draws: random_tape(language, draws, dtype))(draws)
    members = Members(tapes, jnp.full(count, jnp.inf, dtype))
    empty = Tape(
        jnp.zeros((sizes, language.length), INDEX), jnp.zeros((sizes, language.length), dtype)
    )
    hall = Members(empty, jnp.full(sizes, jnp.inf, dtype))
    shape = (settings.islands, settings.population)
    islands = jax.tree.map(lambda x: x.reshape(shape + x.shape[1:]), members)
    share = jnp.full(sizes, 1 / sizes, dtype)
    return State(islands, hall, share, jnp.zeros((), INDEX))


@functools.partial(jax.jit, static_argnums=0)
def advance(
    settings: Settings, state: State, data: Data, key: PRNGKeyArray, generations: int
) -> State:
    """The search after some more generations; what generation n draws depends on `key` and n."""

    def step(_, state):
        return _generation(settings, state, data, jax.random.fold_in(key, state.generation))

    return jax.lax.fori_loop(0, generations, step, state)


def _generation(settings: Settings, state: State, data: Data, key: PRNGKeyArray) -> State:
    shape = (settings.islands, settings.births)
    # Drawn at once: every call of the generator is a good part of what has to be compiled.
    draws = jax.random.uniform(key, (*shape, 2 * settings.tournament + 7 + DRAWS))
    contests, rest = jnp.split(draws, [2 * settings.tournament + 6], axis=-1)
    parents, partners = (
        _parents(settings, state, half) for half in jnp.split(contests, 2, axis=-1)
    )
    rest = rest.reshape(-1, DRAWS + 1)
    tapes = jax.vmap(functools.partial(vary, settings.language))(
        parents.tape, partners.tape, rest[:, 1:]
    )
    first = state.generation * settings.births
    oldest = (first + jnp.arange(settings.births, dtype=INDEX)) % settings.population
    # Everyone of the first population has a turn, as it is.
    is_first = first < settings.population
    founders = jax.tree.map(lambda x: x[:, oldest].reshape(-1, x.shape[-1]), state.islands.tape)
    tapes = jax.tree.map(lambda old, new: jnp.where(is_first, old, new), founders, tapes)
    children = _measured(settings, tapes, data)
    kept = _accepted(settings, state, parents, children, rest[:, 0].astype(state.share.dtype))
    kept = _where(jnp.broadcast_to(is_first, kept.loss.shape), children, kept)
    kept = jax.tree.map(lambda x: x.reshape(shape + x.shape[1:]), kept)
    islands = jax.tree.map(lambda old, new: old.at[:, oldest].set(new), state.islands, kept)
    share = _shares(islands, state.share)
    return State(islands, _improved(state.hall, children), share, state.generation + 1)


def _measured(settings: Settings, tapes: Tape, data: Data) -> Members:
    """Tapes with fitted constants, and their losses."""
    language = settings.language

    def one(tape):
        constants, loss = fit_constants(language, *tape, *data, steps=settings.constant_steps)
        is_fine = has_room(tape.codes)
        if settings.units is not None:
            is_fine = is_fine & agree(language, settings.units, tape.codes)
        return Members(Tape(tape.codes, constants), jnp.where(is_fine, loss, jnp.inf))

    return jax.vmap(one)(tapes)


def _fitness(settings: Settings, state: State, members: Members) -> Float[Array, "..."]:
    size = jnp.sum(members.tape.codes != 0, axis=-1, dtype=INDEX)
    tiny = jnp.finfo(members.loss.dtype).tiny
    crowding = settings.parsimony * size.astype(members.loss.dtype) + CROWDING * state.share[size]
    return jnp.log(members.loss + tiny) + crowding


def _parents(settings: Settings, state: State, draws: Float[Array, "..."]) -> Members:
    """Winners of tournaments and entries of the hall of fame, shape (islands * births,)."""
    ends = settings.tournament + np.arange(3)
    rivals, moves, fame, entry = jnp.split(draws, ends, axis=-1)
    island = jnp.arange(settings.islands, dtype=INDEX)[:, None]
    island = (island + (moves[..., 0] < FROM_NEXT).astype(INDEX)) % settings.islands
    rivals = (rivals * settings.population).astype(INDEX)
    fitness = _fitness(settings, state, state.islands)[island[..., None], rivals]
    best = jnp.argmin(fitness, axis=-1)[..., None]
    winner = jnp.take_along_axis(rivals, best, axis=-1)[..., 0]
    members = jax.tree.map(lambda x: x[island, winner], state.islands)

    is_found = jnp.isfinite(state.hall.loss)
    found = jnp.cumsum(is_found, dtype=INDEX)
    wanted = (entry[..., 0] * found[-1].astype(entry.dtype)).astype(INDEX)
    number = jnp.minimum(jnp.searchsorted(found, wanted, side="right"), found.shape[0] - 1)
    use = (fame[..., 0] < FROM_HALL) & is_found[number]
    famous = jax.tree.map(lambda x: x[number], state.hall)
    chosen = _where(use, famous, members)
    return jax.tree.map(lambda x: x.reshape((-1, *x.shape[2:])), chosen)


def _accepted(
    settings: Settings, state: State, parents: Members, children: Members, draws: Float[Array, " n"]
) -> Members:
    """The children, or in the place of some of them their parents."""
    phase = (state.generation % COOLING).astype(state.share.dtype)
    temperature = 1 - phase / (COOLING - 1) + 1e-3
    worse = _fitness(settings, state, children) - _fitness(settings, state, parents)
    accept = jnp.isfinite(children.loss) & (worse <= -temperature * jnp.log(draws))
    return _where(accept | ~jnp.isfinite(parents.loss), children, parents)


def _shares(islands: Members, share: Float[Array, " sizes"]) -> Float[Array, " sizes"]:
    """The share of every size, averaged over some ten generations."""
    size = jnp.sum(islands.tape.codes != 0, axis=-1, dtype=INDEX).reshape(-1)
    now = jnp.zeros_like(share).at[size].add(1.0) / size.shape[0]
    return 0.9 * share + 0.1 * now


def _improved(hall: Members, members: Members) -> Members:
    """The hall of fame with every member that is better than the entry of its size."""
    size = jax.vmap(complexity)(members.tape.codes)
    sizes = jnp.arange(hall.loss.shape[0], dtype=INDEX)
    losses = jnp.where(size[None] == sizes[:, None], members.loss[None], jnp.inf)
    found = jax.tree.map(lambda x: x[jnp.argmin(losses, axis=1)], members)
    return _where(jnp.min(losses, axis=1) < hall.loss, found, hall)


def _where(condition: Bool[Array, "..."], new: Members, old: Members) -> Members:
    """By member: the condition has the axes of the losses."""

    def choose(a, b):
        return jnp.where(
            condition.reshape(condition.shape + (1,) * (a.ndim - condition.ndim)), a, b
        )

    return jax.tree.map(choose, new, old)
