r"""How expressions vary: a change puts other tokens in the place of the part that ends at one place.

    perturb     a constant        c -> c (1 + 0.1 e)          insert    p -> p + x, x + p, f(p)
    replace     a token           x -> y, + -> *              delete    p + q -> p or q, f(p) -> p
    graft       a part            p -> a random one           forth     (p + q) * r -> p + (q * r)
    cross       a part            p -> a part of a partner    back      p + (q * r) -> (p + q) * r
    fold        constants         c1 * c2 -> c                swap      p - q -> q - p

Here e is normal, x a random leaf, + and * stand for any two operators of two arguments, f for any of
one. Whatever comes is a row of at most four segments of a pool: the tape, its partner, and fresh tokens.
So a change is two numbers a segment, and one gather makes the new tape. A change that a tape has no
place for, or no room for, leaves it as it is.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from nde.symbolic.tape import (
    CONSTANT,
    FIRST_VARIABLE,
    INDEX,
    PAD,
    Codes,
    Constants,
    Language,
    complexity,
    parts,
)

Index = Int[Array, ""]
Draws = Float[Array, " draws"]  # uniform on [0, 1)
DRAWS = 20
FRESH = 5  # tokens of a random expression

WEIGHTS = {
    "perturb": 0.3,
    "replace": 1.0,
    "graft": 0.5,
    "insert": 1.0,
    "delete": 1.0,
    "forth": 0.5,
    "back": 0.5,
    "swap": 0.3,
    "fold": 0.3,
    "cross": 0.8,
}
_BOUNDS = np.cumsum(list(WEIGHTS.values())) / sum(WEIGHTS.values())


class Tape(NamedTuple):
    """Codes and constants of one expression."""

    codes: Codes
    constants: Constants


class Segment(NamedTuple):
    """`size` tokens of the pool, from `start`."""

    start: Index
    size: Index


def random_tape(language: Language, draws: Draws, dtype: np.dtype) -> Tape:
    """A random expression of one, two, three or five tokens, as far as there is room."""
    fresh, _ = _random_tokens(language, draws, dtype)
    count = min(FRESH, language.length)
    empty = Tape(jnp.zeros(language.length, INDEX), jnp.zeros(language.length, dtype))
    return jax.tree.map(lambda x, tokens: x.at[:count].set(tokens[:count]), empty, fresh)


def vary(language: Language, tape: Tape, partner: Tape, draws: Draws) -> Tape:
    """A tape with one random change.

    Args:
        language: What tapes may hold.
        tape: To change; it has one token at least.
        partner: To take a part from.
        draws: `DRAWS` numbers, uniform on [0, 1): all the chance there is.
    """
    kind = jnp.sum(draws[0] > jnp.asarray(_BOUNDS, draws.dtype), dtype=INDEX)
    about = _look(language, tape)
    place, found = _pick(_places(language, tape, about)[kind], draws[1])
    fresh, segments = _segments(language, tape, partner, about, place, draws[2:])
    start = place + 1 - jnp.where(kind == list(WEIGHTS).index("replace"), 1, about.size[place])
    after = Segment(place + 1, about.count - place - 1)
    row = [Segment(jnp.zeros_like(start), start)]
    for choices in zip(*segments.values(), strict=True):
        starts, sizes = (jnp.stack(x)[kind] for x in zip(*choices, strict=True))
        row.append(Segment(starts, sizes))
    pool = jax.tree.map(lambda *x: jnp.concatenate(x), tape, partner, fresh)
    changed, total = _gathered(pool, [*row, after], language.length)
    fine = found & (total <= language.length)
    return jax.tree.map(lambda new, old: jnp.where(fine, new, old), changed, tape)


class _Structure(NamedTuple):
    size: Int[Array, " length"]
    left: Int[Array, " length"]
    arity: Int[Array, " length"]
    count: Index


def _look(language: Language, tape: Tape) -> _Structure:
    size, left = parts(language, tape.codes)
    return _Structure(size, left, jnp.asarray(language.arity)[tape.codes], complexity(tape.codes))


def _places(language: Language, tape: Tape, about: _Structure) -> Bool[Array, "kinds length"]:
    """Where each kind of change can happen."""
    codes, places = tape.codes, jnp.arange(language.length, dtype=INDEX)
    is_token, is_binary = codes != PAD, about.arity == 2
    is_variable = (codes >= FIRST_VARIABLE) & (codes < language.first_operator)
    before = jnp.concatenate([jnp.zeros(1, INDEX), jnp.cumsum(is_variable, dtype=INDEX)])
    variables = before[places + 1] - before[jnp.maximum(places + 1 - about.size, 0)]
    where = {
        "perturb": codes == CONSTANT,
        "replace": is_token,
        "graft": is_token,
        "insert": is_token,
        "delete": about.arity > 0,
        "forth": is_binary & is_binary[about.left],
        "back": is_binary & is_binary[jnp.maximum(places - 1, 0)],
        "swap": is_binary,
        "fold": (about.size > 1) & (variables == 0) & is_token,
        "cross": is_token,
    }
    return jnp.stack([where[kind] for kind in WEIGHTS])


def _segments(language, tape, partner, about, place, draws) -> tuple[Tape, dict]:
    """Fresh tokens, and for every kind of change the four segments that come to `place`."""
    dtype, length = tape.constants.dtype, language.length
    fresh, fresh_size = _random_tokens(language, draws, dtype)
    new = 2 * length  # where the fresh tokens are in the pool
    one, two = language.codes_of(1), language.codes_of(2)
    unary, binary = _choose(one, draws[12]), _choose(two, draws[12])
    same = jnp.where(about.arity[place] == 2, binary, fresh.codes[0])
    same = jnp.where(about.arity[place] == 1, unary, same)
    value = tape.constants[place] * (1 + 0.1 * _normal(draws[13], dtype))
    code = jnp.asarray(CONSTANT, INDEX)
    extra = Tape(
        jnp.stack([unary, binary, same, code, code]),
        jnp.stack([value, value, fresh.constants[0], value, fresh.constants[1]]),
    )
    fresh = jax.tree.map(lambda *x: jnp.concatenate(x), fresh, extra)
    token = lambda start: Segment(jnp.asarray(start, INDEX), jnp.ones((), INDEX))
    part = lambda end, size, offset=0: Segment(offset + end + 1 - size[end], size[end])
    nothing = Segment(jnp.zeros((), INDEX), jnp.zeros((), INDEX))
    right, left, whole = jnp.maximum(place - 1, 0), about.left[place], part(place, about.size)
    is_left = (draws[14] < 0.5) & (about.arity[place] == 2)
    kept = part(jnp.where(is_left, left, right), about.size)
    leaf, is_first = token(new), draws[14] < 0.5
    first = jax.tree.map(lambda a, b: jnp.where(is_first, a, b), leaf, whole)
    second = jax.tree.map(lambda a, b: jnp.where(is_first, b, a), leaf, whole)
    is_unary = one.size > 0 and two.size == 0 or (one.size > 0) & (draws[15] < 0.25)
    insert = jax.tree.map(
        lambda a, b: jnp.where(is_unary, a, b),
        [whole, token(new + FRESH), nothing],
        [first, second, token(new + FRESH + 1)],
    )
    inner = about.left[right]  # back: where q ends, in p (q r *) +
    size, _ = parts(language, partner.codes)
    end, _ = _pick(partner.codes != PAD, draws[16])
    rows = {
        "perturb": [token(new + FRESH + 3)],
        "replace": [token(new + FRESH + 2)],
        "graft": [Segment(jnp.asarray(new, INDEX), fresh_size)],
        "insert": insert,
        "delete": [kept],
        "forth": [Segment(whole.start, left - whole.start), Segment(left + 1, place - left - 1),
                  token(place), token(left)],
        "back": [Segment(whole.start, inner + 1 - whole.start), token(place),
                 Segment(inner + 1, place - 2 - inner), token(right)],
        "swap": [part(right, about.size), part(left, about.size), token(place)],
        "fold": [token(new + FRESH + 4)],
        "cross": [part(end, size, length)],
    }  # fmt: skip
    return fresh, {kind: (rows[kind] + [nothing] * 4)[:4] for kind in WEIGHTS}


def _random_tokens(language: Language, draws: Draws, dtype: np.dtype) -> tuple[Tape, Index]:
    """`FRESH` tokens, the first of which are a random expression, and how many those are. The token
    at 0 is a leaf in any case."""
    count = len(language.variables)
    variables = FIRST_VARIABLE + jnp.minimum((count * draws[:3]).astype(INDEX), count - 1)
    leaves = jnp.where(draws[3:6] < 2 / 3, variables, CONSTANT)
    one, two = language.codes_of(1), language.codes_of(2)
    shapes = [(leaves[0],)]
    if one.size and language.length >= 2:
        shapes.append((leaves[0], _choose(one, draws[9])))
    if two.size and language.length >= 3:
        shapes.append((leaves[0], leaves[1], _choose(two, draws[9])))
    if two.size and language.length >= 5:
        outer, inner = _choose(two, draws[9]), _choose(two, draws[10])
        shapes += 2 * [(leaves[0], leaves[1], inner, leaves[2], outer)]  # (x + y) * z
        shapes += 2 * [(leaves[0], leaves[1], leaves[2], inner, outer)]  # x * (y + z)
    pad = jnp.full((), PAD, INDEX)
    rows = jnp.stack([jnp.stack([*row, *[pad] * (FRESH - len(row))]) for row in shapes])
    number = _below(len(shapes), draws[11])
    sizes = jnp.asarray([len(row) for row in shapes], INDEX)
    # The third leaf stands at 2 or 3; where there is no constant the number is not read.
    values = _normal(draws[6:9], dtype)[np.array([0, 1, 2, 2, 2])]
    return Tape(rows[number], values), sizes[number]


def _gathered(pool: Tape, row: list[Segment], length: int) -> tuple[Tape, Index]:
    """The segments one after the other as a tape, and how many tokens they have."""
    sizes = jnp.stack([segment.size for segment in row])
    ends = jnp.cumsum(sizes, dtype=INDEX)
    places = jnp.arange(length, dtype=INDEX)
    which = jnp.sum(places[:, None] >= ends[None], axis=1, dtype=INDEX)
    which = jnp.minimum(which, len(row) - 1)
    starts = jnp.stack([segment.start for segment in row])
    source = starts[which] + places - (ends - sizes)[which]
    source = jnp.clip(source, 0, pool.codes.shape[0] - 1)
    inside = places < ends[-1]
    codes = jnp.where(inside, pool.codes[source], PAD)
    return Tape(codes, jnp.where(inside, pool.constants[source], 0)), ends[-1]


def _pick(mask: Bool[Array, " length"], draw: Float[Array, ""]) -> tuple[Index, Bool[Array, ""]]:
    """One of the places where `mask` holds, each as likely, and whether there is any."""
    count = jnp.cumsum(mask, dtype=INDEX)
    wanted = (draw * count[-1].astype(draw.dtype)).astype(INDEX)
    return jnp.argmax(count > wanted).astype(INDEX), count[-1] > 0


def _choose(codes: np.ndarray, draw: Float[Array, ""]) -> Index:
    """One of the codes; of none, padding."""
    return (
        jnp.asarray(codes, INDEX)[_below(codes.size, draw)]
        if codes.size
        else jnp.full((), PAD, INDEX)
    )


def _below(count: int, draw: Float[Array, ""]) -> Index:
    """A whole number below `count`, each as likely."""
    return jnp.minimum((count * draw).astype(INDEX), count - 1)


def _normal(draw: Float[Array, "..."], dtype: np.dtype) -> Float[Array, "..."]:
    return jax.scipy.special.ndtri(jnp.clip(draw, 1e-6, 1 - 1e-6)).astype(dtype)
