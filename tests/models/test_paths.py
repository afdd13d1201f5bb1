"""Control paths beside SciPy's splines and plain loops."""

import functools

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.interpolate
from jax.test_util import check_grads

import nde
from nde import paths

RANDOM = np.random.default_rng(0)
TIMES = np.cumsum(RANDOM.uniform(0.05, 0.3, 12))
VALUES = RANDOM.normal(size=(12, 3))
GAPS = VALUES.copy()
GAPS[0, 0] = GAPS[-2:, 1] = GAPS[3:6, 1] = GAPS[1:4, 2] = np.nan
EAGER = [paths.linear, paths.rectilinear, paths.hermite_cubic, paths.natural_cubic]
ALL = {make.__name__: eqx.filter_jit(make) for make in EAGER}  # an eager path compiles every line
CAUSAL = {
    "linear": functools.partial(ALL["linear"], causal=True),
    "rectilinear": ALL["rectilinear"],
    "hermite_cubic": functools.partial(ALL["hermite_cubic"], causal=True),
}
everywhere = np.linspace(TIMES[0], TIMES[-1], 101)


@eqx.filter_jit
def values(path, at):
    return jax.vmap(path.evaluate)(at)


@eqx.filter_jit
def slopes(path, at, left=True):
    return jax.vmap(functools.partial(path.derivative, left=left))(at)


@eqx.filter_jit
def jacobians(path, at):
    return jax.vmap(jax.jacfwd(path.evaluate))(at)


@eqx.filter_jit
def increment(path, a, b):
    return path.evaluate(a, b)


def filled(ts, ys):
    """Line between the neighbors, nearest observation at the ends: numpy.interp does just that."""
    known = [~np.isnan(y) for y in ys.T]
    columns = [np.interp(ts, ts[k], y[k]) for y, k in zip(ys.T, known, strict=True)]
    return np.stack(columns, axis=1)


def forward_filled(ys):
    rows, last = [], np.zeros(ys.shape[1])
    for row in ys:
        last = np.where(np.isnan(row), last, row)
        rows.append(last)
    return np.stack(rows)


def naive_linear(ts, ys):
    return lambda t: np.stack([np.interp(t, ts, y) for y in filled(ts, ys).T], axis=-1)


def naive_hermite(ts, ys):
    xs = filled(ts, ys)
    slopes = np.diff(xs, axis=0) / np.diff(ts)[:, None]
    return scipy.interpolate.CubicHermiteSpline(ts, xs, np.concatenate([slopes[:1], slopes]))


def naive_natural(ts, ys):
    splines = []
    for y, x in zip(ys.T, filled(ts, ys).T, strict=True):
        seen = np.flatnonzero(~np.isnan(y))
        knots = np.unique(np.r_[np.arange(seen[0]), seen, np.arange(seen[-1], len(ts))])
        splines.append(scipy.interpolate.CubicSpline(ts[knots], x[knots], bc_type="natural"))
    return lambda t: np.stack([spline(t) for spline in splines], axis=-1)


@pytest.mark.parametrize("ys", [VALUES, GAPS], ids=["complete", "gaps"])
@pytest.mark.parametrize(
    "make, naive",
    [
        (ALL["linear"], naive_linear),
        (ALL["hermite_cubic"], naive_hermite),
        (ALL["natural_cubic"], naive_natural),
    ],
)
def test_interpolates_as_the_textbook(make, naive, ys):
    path = make(jnp.asarray(TIMES), jnp.asarray(ys))
    assert isinstance(path, diffrax.AbstractPath)
    found = np.asarray(values(path, jnp.asarray(everywhere)))
    np.testing.assert_allclose(found[:, 0], everywhere, rtol=1e-14)
    np.testing.assert_allclose(found[:, 1:], naive(TIMES, ys)(everywhere), atol=1e-12)


def test_rectilinear_moves_time_first_and_then_the_values():
    path = ALL["rectilinear"](jnp.asarray(TIMES), jnp.asarray(GAPS), counts=True)
    held = forward_filled(GAPS)
    counts = np.cumsum(~np.isnan(GAPS), axis=0)
    rows = [np.r_[TIMES[0], held[0], counts[0]]]
    for i in range(1, 12):
        rows.append(np.r_[TIMES[i], held[i - 1], counts[i - 1]])
        rows.append(np.r_[TIMES[i], held[i], counts[i]])
    np.testing.assert_allclose(values(path, path.ts), np.stack(rows), atol=1e-13)
    np.testing.assert_array_equal(path.ts[::2], TIMES)
    np.testing.assert_array_equal(path.times, TIMES)


@pytest.mark.parametrize("make", ALL.values(), ids=ALL)
def test_the_derivative_is_that_of_the_path(make):
    path = make(jnp.asarray(TIMES), jnp.asarray(GAPS), counts=True)
    inside = jnp.asarray(everywhere[1:-1])
    np.testing.assert_allclose(slopes(path, inside), jacobians(path, inside), atol=1e-9)
    knots = jnp.asarray(np.asarray(path.ts)[1:-1])
    left, right = (slopes(path, knots, left=s) for s in (True, False))
    assert np.allclose(left, right, atol=1e-8) == path.smooth


@pytest.mark.parametrize("make", ALL.values(), ids=ALL)
def test_increments_are_differences_and_the_path_stands_still_outside(make):
    path = make(jnp.asarray(TIMES), jnp.asarray(VALUES))
    first, last = float(path.t0), float(path.t1)
    at = jnp.asarray([0.5, 1.1, last, last + 1.0, first, first - 1.0])
    found, slope = np.asarray(values(path, at)), np.asarray(slopes(path, at))
    np.testing.assert_allclose(increment(path, at[0], at[1]), found[1] - found[0], atol=1e-13)
    np.testing.assert_array_equal(found[3], found[2])
    np.testing.assert_array_equal(found[5], found[4])
    np.testing.assert_array_equal(slope[[3, 5]], np.zeros((2, 4)))


def test_time_and_counts_are_channels_on_request():
    ts, ys = jnp.asarray(TIMES), jnp.asarray(GAPS)
    plain = ALL["linear"](ts, ys, time=False)
    full = ALL["linear"](ts, ys, counts=True)
    at = values(full, ts)
    np.testing.assert_allclose(at[:, 0], TIMES, rtol=1e-14)
    np.testing.assert_allclose(at[:, 1:4], values(plain, ts), atol=1e-14)
    np.testing.assert_allclose(at[:, 4:], np.cumsum(~np.isnan(GAPS), axis=0), rtol=1e-14)


@eqx.filter_jit
def gradient(make, ts, ys):
    return jax.grad(lambda ys: make(ts, ys, jnp.asarray(12)).evaluate(jnp.asarray(1.0)).sum())(ys)


@pytest.mark.parametrize("junk", [0.0, 1e30, np.nan, np.inf])
@pytest.mark.parametrize("make", ALL.values(), ids=ALL)
def test_padding_of_any_content_changes_nothing(make, junk):
    plain = make(jnp.asarray(TIMES), jnp.asarray(GAPS), counts=True)
    ts = jnp.asarray(np.append(TIMES, [junk] * 4))
    ys = jnp.asarray(np.append(GAPS, np.full((4, 3), junk), axis=0))
    padded = make(ts, ys, jnp.asarray(12), counts=True)
    at = jnp.asarray(np.append(everywhere, TIMES))
    for of in (values, slopes):
        np.testing.assert_allclose(of(padded, at), of(plain, at), rtol=1e-12, atol=1e-12)
    assert (padded.t0, padded.t1) == (plain.t0, plain.t1)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(padded))
    slope = gradient(make, ts, ys)
    np.testing.assert_array_equal(slope[12:], np.zeros((4, 3)))
    assert np.isfinite(slope).all() and np.any(np.asarray(slope) != 0)


@pytest.mark.parametrize("make", CAUSAL.values(), ids=CAUSAL)
def test_a_causal_path_up_to_an_observation_does_not_know_the_future(make):
    later = GAPS.copy()
    later[6:] = RANDOM.normal(size=(6, 3))
    path, other = (make(jnp.asarray(TIMES), jnp.asarray(ys)) for ys in (GAPS, later))
    assert path.causal
    past = jnp.linspace(TIMES[0], TIMES[5], 31)
    np.testing.assert_array_equal(values(path, past), values(other, past))


@pytest.mark.parametrize("name", ["linear", "hermite_cubic", "natural_cubic"])
def test_the_other_paths_do_know_it_and_say_so(name):
    later = GAPS.copy()
    later[6:] = RANDOM.normal(size=(6, 3))
    path, other = (ALL[name](jnp.asarray(TIMES), jnp.asarray(ys)) for ys in (GAPS, later))
    assert not path.causal
    past = jnp.linspace(TIMES[0], TIMES[5], 31)
    found, changed = values(path, past), values(other, past)
    assert np.abs(found - changed).max() > 1e-3


def test_a_rectilinear_path_knows_no_value_before_its_time():
    later = VALUES.copy()
    later[6:] += 1.0
    make = ALL["rectilinear"]
    path, other = (make(jnp.asarray(TIMES), jnp.asarray(ys)) for ys in (VALUES, later))
    before = (path.ts[:-1] + path.ts[1:])[:11] / 2  # until the values of TIMES[6] begin to move
    np.testing.assert_array_equal(values(path, before), values(other, before))
    after = (path.ts[11:12] + path.ts[12:13]) / 2
    assert np.abs(values(path, after) - values(other, after)).max() > 0.1


@pytest.mark.parametrize("interpolation", [paths.linear, paths.rectilinear])
def test_a_stream_gives_the_pieces_of_the_causal_path(interpolation):
    ts, ys = jnp.asarray(TIMES), jnp.asarray(GAPS)
    whole = CAUSAL[interpolation.__name__](ts, ys, counts=True)
    stream = paths.Stream(ts[0], ys[0], interpolation=interpolation, counts=True)
    np.testing.assert_array_equal(stream.start, whole.start)
    append = jax.jit(lambda stream, t, y: stream.append(t, y))
    for t, y in zip(ts[1:], ys[1:], strict=True):
        stream, piece = append(stream, t, y)
        at = jnp.linspace(piece.t0, piece.t1, 7)
        np.testing.assert_allclose(values(piece, at), values(whole, at), atol=1e-13)
        assert piece.causal


@pytest.mark.parametrize("interpolation", [paths.linear, paths.rectilinear])
def test_a_stream_keeps_the_precision_of_its_times(interpolation):
    ts, ys = 1e6 + jnp.asarray(TIMES), jnp.asarray(VALUES, dtype=jnp.float32)
    whole = CAUSAL[interpolation.__name__](ts, ys)
    stream = paths.Stream(ts[0], ys[0], interpolation=interpolation)
    for t, y in zip(ts[1:], ys[1:], strict=True):
        stream, piece = stream.append(t, y)
        assert piece.t1 == t
        np.testing.assert_array_equal(piece.evaluate(t), whole.evaluate(t))


@pytest.mark.parametrize("make", [paths.natural_cubic, paths.hermite_cubic, paths.linear])
def test_a_path_far_from_zero_keeps_its_first_value(make):
    """Single precision cannot subtract one from its times."""
    ts = jnp.asarray(2e7 + 4000.0 * np.arange(6), jnp.float32)
    ys = jnp.asarray([5.0, 1.0, 2.0, 0.0, 3.0, 1.0], jnp.float32)
    found = jax.vmap(make(ts, ys[:, None]).evaluate)(ts)[:, -1]
    np.testing.assert_allclose(found, ys, atol=1e-5)


@pytest.mark.parametrize("make", [paths.natural_cubic, paths.linear, paths.rectilinear])
def test_a_path_has_a_derivative_by_its_times(make):
    ts, ys = jnp.array([0.0, 1.0, 2.5, 3.0]), jnp.array([[0.0], [1.0], [0.5], [2.0]])
    area = lambda ts: jnp.sum(make(ts, ys).evaluate(ts[0] + 1.7) * jnp.array([0.3, 1.0]))
    check_grads(area, (ts,), order=1, modes=["rev"])


def test_series_of_unequal_length_are_padded_with_their_last_row():
    batch = paths.pad_series([(TIMES, GAPS), (TIMES[:5], GAPS[:5]), (TIMES[2:4], VALUES[2:4])])
    assert batch.ts.shape == (3, 12) and batch.ys.shape == (3, 12, 3)
    np.testing.assert_array_equal(batch.lengths, [12, 5, 2])
    np.testing.assert_array_equal(batch.mask, np.arange(12) < np.array([[12], [5], [2]]))
    np.testing.assert_array_equal(batch.ts[1], np.append(TIMES[:5], [TIMES[4]] * 7))
    np.testing.assert_array_equal(batch.ys[1, 5:], np.stack([GAPS[4]] * 7))
    together = jax.jit(jax.vmap(paths.hermite_cubic))(batch.ts, batch.ys, batch.lengths)
    alone = ALL["hermite_cubic"](jnp.asarray(TIMES[:5]), jnp.asarray(GAPS[:5]))
    second = jax.tree.map(lambda leaf: leaf[1], together)
    at = jnp.linspace(TIMES[0], TIMES[4], 31)
    np.testing.assert_allclose(values(second, at), values(alone, at), atol=1e-13)


def test_times_that_single_precision_would_move_are_refused():
    seconds, ys, key = 1.7e9 + 3600.0 * np.arange(20), np.ones((20, 1)), jax.random.key(0)
    assert nde.paths.pad_series([(seconds, ys)]).ts.dtype == np.float64
    with jax.enable_x64(False):
        moved = "has neighbors 3600.0 apart .* as 3712.0 apart.* Subtract an offset"
        with pytest.raises(ValueError, match=r"`series\[0\]`: `ts` " + moved):
            nde.paths.pad_series([(seconds, ys)])
        data = (np.stack([seconds, seconds]), np.stack([ys, ys]))
        with pytest.raises(ValueError, match=r"`data\[0\]` " + moved):
            nde.fit(ys, nde.losses.trajectory, data, optim=optax.sgd(0.1), steps=1, key=key)
        for make in EAGER:
            with pytest.raises(ValueError, match="`ts` " + moved):
                make(seconds, ys)
        near = nde.paths.pad_series([(seconds - seconds[0], ys)])
    np.testing.assert_array_equal(near.ts[0], 3600 * np.arange(20))


def test_ordinary_rounding_of_times_passes_whatever_it_does_to_one_gap():
    close = np.linspace(0.0, 5.0, 30)
    close[10] = close[9] + 1e-6  # single precision moves their distance by 5 %
    merged = np.insert(close, 20, close[19] + 1e-8)
    bursts = np.cumsum(np.tile([1.0, 1.0, 1.0, 1e7], 4))  # the mean gap would hide them
    with jax.enable_x64(False):
        single = np.diff(close.astype(np.float32))
        assert np.abs(single / np.diff(close) - 1).max() > 0.02 and (single > 0).all()
        assert paths.pad_series([(close, np.ones((30, 1)))]).ts.dtype == np.float32
        assert paths.linear(close, np.ones((30, 1))).ts.dtype == np.float32
        with pytest.raises(ValueError, match="would hold as one and the same"):
            paths.pad_series([(merged, np.ones((31, 1)))])
        with pytest.raises(ValueError, match=r"neighbors 1.0 apart .* Subtract an offset"):
            paths.pad_series([(bursts, np.ones((16, 1)))])


def test_gaps_are_filled_in_public_as_the_paths_fill_them():
    both = jax.jit(jax.vmap(paths.fill_gaps))(jnp.stack([TIMES, TIMES]), jnp.stack([GAPS, VALUES]))
    np.testing.assert_allclose(both, np.stack([filled(TIMES, GAPS), VALUES]), atol=1e-14)
    held = paths.fill_gaps(TIMES, GAPS, causal=True)
    np.testing.assert_array_equal(held, forward_filled(GAPS))
    short = paths.fill_gaps(jnp.asarray(TIMES), jnp.asarray(GAPS), jnp.asarray(6))
    np.testing.assert_allclose(short[:6], filled(TIMES[:6], GAPS[:6]), atol=1e-14)
    np.testing.assert_array_equal(short[6:], np.stack([short[5]] * 6))


def test_padding_says_which_single_values_were_observed():
    batch = paths.pad_series([(TIMES, GAPS), (TIMES[:5], GAPS[:5])])
    assert np.isnan(batch.ys[1, 5:]).any(axis=1).all()  # the last row repeats, with its gap
    np.testing.assert_array_equal(batch.observed[0], ~np.isnan(GAPS))
    np.testing.assert_array_equal(batch.observed[1, :5], ~np.isnan(GAPS[:5]))
    assert not batch.observed[1, 5:].any()


DAYS = np.array(["2024-01-01", "2024-01-03", "2024-01-04"], "datetime64[s]")


@pytest.mark.parametrize(
    "dates, message",
    [
        (DAYS, r"dtype datetime64\[s\].*\(ts - origin\) / np.timedelta64"),
        (DAYS - DAYS[0], r"dtype timedelta64\[s\].*ts / np.timedelta64"),
        (DAYS.astype(object), r"Python objects \(datetime\).*np.asarray\(ts, 'datetime64\[us\]'\)"),
        (np.arange(3), r"dtype int64; times are floating: ts.astype\(float\)"),
    ],
    ids=["dates", "durations", "objects", "integers"],
)
def test_dates_are_told_how_to_become_times(dates, message):
    model = nde.NeuralODE(lambda t, y, args: -y)
    for call in (paths.linear, lambda ts, ys: paths.pad_series([(ts, ys)]), model):
        with pytest.raises(ValueError, match=message):
            call(dates, np.ones((3, 1)))


def test_single_precision_stays_single_unless_the_values_are_double():
    ts, ys = jnp.asarray(TIMES, dtype=jnp.float32), jnp.asarray(GAPS, dtype=jnp.float32)
    for make in EAGER:
        leaves = jax.tree.leaves(eqx.filter_eval_shape(make, ts, ys, counts=True))
        assert {leaf.dtype for leaf in leaves} == {jnp.dtype("float32")}
        double = ys.astype(jnp.float64)
        mixed = jax.tree.leaves(eqx.filter_eval_shape(make, ts, double, counts=True))
        assert {leaf.dtype for leaf in mixed} == {jnp.dtype("float64")}


def changed(array, at, value):
    array = np.array(array)
    array[at] = value
    return array


BAD = {
    "unsorted": (changed(TIMES, 4, 0.0), VALUES, r"not in order: ts\[3\]=.*, ts\[4\]=0.0"),
    "repeated": (changed(TIMES, 4, TIMES[3]), VALUES, r"repeats a time: ts\[3\]=.*`length`"),
    "nan in time": (changed(TIMES, 4, np.nan), VALUES, "`ts` is nan at index 4"),
    "channel never observed": (TIMES, changed(VALUES, np.s_[:, 1], np.nan), "channel 1"),
    "infinite": (TIMES, changed(VALUES, (2, 0), np.inf), r"`ys` is inf at index \(2, 0\)"),
    "empty": (TIMES[:0], VALUES[:0], "length 0; a path needs at least 2"),
    "one observation": (TIMES[:1], VALUES[:1], "length 1; a path needs at least 2"),
    "lengths differ": (TIMES[:5], VALUES, "5 times but `ys` has 12 rows"),
    "a batch": (TIMES[None], VALUES[None], "jax.vmap for a batch"),
    "no channel axis": (TIMES, VALUES[:, 0], r"ys\[:, None\] for one channel"),
    "no channels": (TIMES, VALUES[:, :0], "no channels"),
    "integers": (TIMES, VALUES.astype(int), "dtype int64; values are floating"),
}


@pytest.mark.parametrize("make", EAGER)
@pytest.mark.parametrize("ts, ys, message", BAD.values(), ids=BAD)
def test_bad_series_are_told_apart(make, ts, ys, message):
    with pytest.raises(ValueError, match=message):
        make(jnp.asarray(ts), jnp.asarray(ys))
    with pytest.raises(ValueError, match=r"`series\[1\]`: .*" + message):
        paths.pad_series([(TIMES, VALUES), (ts, ys)])


IN_A_TRANSFORMATION = {
    "unsorted": "must increase",
    "repeated": "must increase",
    "nan in time": "`ts` must be finite",
    "channel never observed": "channel without an observation",
    "infinite": "`ys` must be finite",
}


batches = jax.jit(jax.vmap(paths.linear))


@pytest.mark.parametrize("name, message", IN_A_TRANSFORMATION.items())
def test_bad_numbers_are_told_apart_in_a_transformation(name, message):
    ts, ys, _ = BAD[name]
    batch = jnp.asarray(np.stack([TIMES, ts])), jnp.asarray(np.stack([VALUES, ys]))
    with pytest.raises(RuntimeError, match=message):
        jax.block_until_ready(batches(*batch))


@pytest.mark.parametrize("length", [0, 1, 13])
def test_a_length_that_cannot_be(length):
    with pytest.raises(ValueError, match=f"`length` is {length} of 12"):
        paths.linear(jnp.asarray(TIMES), jnp.asarray(VALUES), length)
    with pytest.raises(RuntimeError, match="`length` must be at least 2"):
        ALL["linear"](jnp.asarray(TIMES), jnp.asarray(VALUES), jnp.asarray(length))


def test_what_does_not_fit_together():
    ts, ys = jnp.asarray(TIMES), jnp.asarray(VALUES)
    with pytest.raises(ValueError, match=r"`series\[1\]` has 2 channels but `series\[0\]` has 3"):
        paths.pad_series([(TIMES, VALUES), (TIMES, VALUES[:, :2])])
    with pytest.raises(ValueError, match="`series` is empty"):
        paths.pad_series([])
    with pytest.raises(ValueError, match=r"`series\[0\]` is not a pair"):
        paths.pad_series([TIMES])
    with pytest.raises(ValueError, match="natural cubic looks ahead"):
        paths.natural_cubic(ts, ys, causal=True)
    with pytest.raises(ValueError, match="not causal piece by piece"):
        paths.Stream(ts[0], ys[0], interpolation=paths.hermite_cubic)
    with pytest.raises(ValueError, match="an integer"):
        paths.linear(ts, ys, 3.0)


def test_a_stream_refuses_the_past_and_other_channels():
    stream = paths.Stream(jnp.asarray(1.0), jnp.ones(2))
    with pytest.raises(ValueError, match="`t` is 1.0 but the stream is at 1.0"):
        stream.append(jnp.asarray(1.0), jnp.ones(2))
    with pytest.raises(RuntimeError, match="after the last observation"):
        jax.jit(lambda t: stream.append(t, jnp.ones(2))[0].t)(jnp.asarray(0.5))
    with pytest.raises(ValueError, match=r"shape \(3,\) but the stream has shape \(2,\)"):
        stream.append(jnp.asarray(2.0), jnp.ones(3))
    with pytest.raises(ValueError, match=r"of shape \(channels,\)"):
        paths.Stream(jnp.asarray(1.0), jnp.asarray(1.0))
    with pytest.raises(ValueError, match="a missing value is NaN"):
        stream.append(jnp.asarray(2.0), jnp.asarray([0.0, jnp.inf]))
    with pytest.raises(RuntimeError, match="a missing value is NaN"):
        jax.jit(lambda x: stream.append(2.0, x)[0].values)(jnp.asarray([0.0, jnp.inf]))


def test_a_stream_refuses_times_that_it_would_move():
    with jax.enable_x64(False):
        stream = paths.Stream(np.float64(1.7e9), jnp.ones(1))
        with pytest.raises(ValueError, match="`t` has neighbors .* near 1700000200.0"):
            stream.append(np.float64(1.7e9 + 200), jnp.ones(1))
        with pytest.raises(ValueError, match=r"`t` has dtype datetime64.*\(t - origin\)"):
            stream.append(np.datetime64("2024-01-01"), jnp.ones(1))
        stream = paths.Stream(np.float64(0.0), jnp.ones(1))
        for t in (3.0, 3.0 + 1e-6, 5.0):  # one close pair
            stream, _ = stream.append(np.float64(t), jnp.ones(1))
        with pytest.raises(ValueError, match="would hold as one and the same"):
            stream.append(np.float64(5.0 + 1e-8), jnp.ones(1))
