"""What the pictures show, read back from the axes."""

import jax.numpy as jnp
import matplotlib
import numpy as np
import pytest

matplotlib.use("Agg")

import matplotlib.pyplot as plt

import nde
from nde import plot
from nde.train import History


@pytest.fixture
def ax():
    figure, ax = plt.subplots()
    yield ax
    figure.canvas.draw()
    plt.close(figure)


def test_loss_shows_every_step_its_median_and_the_skipped_ones(ax):
    rows = np.geomspace(1.0, 1e-3, 100)
    skipped = np.arange(100) == 7
    values = np.where(skipped, np.nan, rows)
    columns = {"loss": values, "skipped": skipped, "seconds": np.arange(100.0)}
    assert plot.loss(History(columns, 0.0), ax) is ax
    median, every, crosses = ax.lines
    np.testing.assert_array_equal(every.get_ydata(), values)
    np.testing.assert_allclose(median.get_ydata()[0], np.median(rows[:2]))
    np.testing.assert_array_equal(crosses.get_xdata(), [7])
    assert ax.get_yscale() == "log"


def test_trajectories_pair_lines_and_observations_by_color(ax):
    ts, ys = jnp.arange(4.0), jnp.arange(8.0).reshape(4, 2)
    seen = (ts[:2], ys[:2] + 0.5)
    assert plot.trajectories(ts, ys, seen, ax, labels=["hare", "lynx"], linewidth=3) is ax
    for channel, label in enumerate(["hare", "lynx"]):
        line, dots = ax.lines[2 * channel : 2 * channel + 2]
        np.testing.assert_array_equal(line.get_ydata(), ys[:, channel])
        np.testing.assert_array_equal(dots.get_ydata(), seen[1][:, channel])
        assert line.get_color() == dots.get_color()
        assert (line.get_label(), line.get_linewidth()) == (label, 3)


def test_trajectories_refuse_what_is_not_one_trajectory(ax):
    ts = np.arange(4.0)
    with pytest.raises(ValueError, match=r"`ys` has .* \(3, 4, 2\); one trajectory is"):
        plot.trajectories(ts, np.zeros((3, 4, 2)), ax=ax)
    with pytest.raises(ValueError, match=r"values of shape \(2, 4\)"):
        plot.trajectories(ts, np.zeros((2, 4)), ax=ax)
    with pytest.raises(ValueError, match=r"`observed` has times of shape \(4,\)"):
        plot.trajectories(ts, np.zeros((4, 2)), (ts, np.zeros((2, 4))), ax)
    with pytest.raises(ValueError, match="`observed` has 1 channels but `ys` has 2"):
        plot.trajectories(ts, np.zeros((4, 2)), (ts, ts), ax)
    with pytest.raises(ValueError, match="`labels` has 1 names but `ys` has 2"):
        plot.trajectories(ts, np.zeros((4, 2)), ax=ax, labels=["hare"])
    with pytest.raises(ValueError, match=r"observed=\(ts, ys\)"):
        plot.trajectories(ts, np.zeros((4, 2)), np.zeros((4, 2)), ax)
    assert not ax.lines


def test_phase_shows_the_field_and_where_trajectories_start(ax):
    seen = []

    def turn(t, y, args):
        seen.append((t, args))
        return args * jnp.stack([-y[1], y[0]])

    ys = np.array([[[1.0, 0.0], [0.0, 1.0]], [[0.5, 0.0], [0.0, 0.5]]])
    args = jnp.asarray(2.0)
    assert plot.phase(turn, (-2.0, 2.0), (-1.0, 1.0), ys, ax, args=args, grid=8) is ax
    np.testing.assert_array_equal(ax.lines[0].get_xydata(), ys[0])
    np.testing.assert_array_equal(ax.lines[3].get_xydata(), ys[1][:1])
    segments = np.concatenate(ax.collections[0].get_segments())
    radius = np.hypot(*segments.T)
    assert ax.get_xlim() == (-2.0, 2.0) and ax.get_ylim() == (-1.0, 1.0)
    assert radius.min() > 0  # streamlines turn around the center
    assert seen


def test_a_loss_that_is_not_positive_has_a_linear_axis(ax):
    values = np.linspace(-1.0, -5.0, 20)
    plot.loss(History({"loss": values, "skipped": np.zeros(20, bool)}, 0.0), ax)
    assert ax.get_yscale() == "linear"
    low, high = ax.get_ylim()
    assert low < -4.5 and high > -1.5


def test_no_observation_in_sight(ax):
    plot.trajectories(np.arange(4.0), np.zeros((4, 2)), (np.zeros(0), np.zeros((0, 2))), ax)
    assert [line.get_xdata().size for line in ax.lines] == [4, 0, 4, 0]


def test_a_history_without_steps(ax):
    with pytest.raises(ValueError, match="`history` has no steps"):
        plot.loss(History({}, 0.0), ax)


def test_phase_refuses_what_is_not_planar(ax):
    draw = lambda field, ys=None: plot.phase(field, (-1.0, 1.0), (1.0, -1.0), ys, ax, grid=4)
    with pytest.raises(ValueError, match=r"`vector_field` .*\(f64\[\], f64\[\]\).*\(2,\)"):
        draw(lambda t, y, args: (y[1], -y[0]))
    with pytest.raises(ValueError, match=r"`vector_field` .* f64\[3\].*\(2,\)"):
        draw(lambda t, y, args: jnp.ones(3))
    for shape in [(10, 3), (10,)]:
        with pytest.raises(ValueError, match=r"`ys` has shape .* ys\[..., :2\]"):
            draw(lambda t, y, args: y, np.zeros(shape))
    with pytest.raises(ValueError, match="cannot be applied to a state .* model.vector_field"):
        draw(nde.NeuralODE(lambda t, y, args: y))
    with pytest.raises(ValueError, match=r"`xlim` is \(1, 1\)"):
        plot.phase(lambda t, y, args: y, (1, 1), (-1, 1), ax=ax)
    assert not ax.lines
    draw(lambda t, y, args: y)
    assert ax.get_ylim() == (1.0, -1.0)


def test_an_axis_is_made_where_none_is_given():
    before = set(plt.get_fignums())
    ax = plot.trajectories(np.arange(3.0), np.arange(3.0))
    assert set(plt.get_fignums()) - before == {ax.figure.number}
    np.testing.assert_array_equal(ax.lines[0].get_ydata(), np.arange(3.0))
    plt.close(ax.figure)


def test_a_picture_goes_to_the_working_directory_and_says_where(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    figure, _ = plt.subplots()
    path = plot.save(figure, "picture.png")
    assert path == tmp_path / "picture.png" and path.read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr().out == f"picture: {path}\n"
    assert not plt.fignum_exists(figure.number)


def test_fan_shows_the_bands_of_the_draws_and_the_data(ax):
    ts, draws = np.arange(3.0), np.random.default_rng(0).normal(size=(500, 3, 2))
    seen = ts[:2], np.ones((2, 2))
    assert plot.fan(ts, draws, seen, ax, levels=(0.9,), channel=1, label="model") is ax
    median, dots = ax.lines
    np.testing.assert_allclose(median.get_ydata(), np.median(draws[..., 1], axis=0))
    np.testing.assert_array_equal(dots.get_ydata(), [1, 1])
    (band,) = ax.collections
    corners = band.get_paths()[0].vertices
    low, high = np.quantile(draws[:, 0, 1], [0.05, 0.95])
    at_start = corners[corners[:, 0] == 0, 1]
    assert (at_start.min(), at_start.max()) == pytest.approx((low, high))
    plot.fan(ts, draws[..., 0], (ts, draws[:4]), ax)
    assert len(ax.lines) == 2 + 1 + 4


def test_marginals_put_data_left_and_model_right(ax):
    ts, rng = np.arange(11.0), np.random.default_rng(0)
    model, data = rng.normal(size=(400, 11, 1)), 2 * rng.normal(size=(300, 11, 1))
    assert plot.marginals(ts, model, data, ax, at=[4, 8]) is ax
    left, right = (patch.get_data() for patch in ax.patches[:2])
    assert (left.baseline, right.baseline) == (4, 4)
    assert np.all(left.values <= 4) and np.all(right.values >= 4)
    assert 4.4 < right.values.max() < 8 - 4.4 + 4
    areas = [abs(np.sum((s.values - 4) * np.diff(s.edges))) for s in (left, right)]
    assert areas[0] == pytest.approx(areas[1])  # both are densities


def test_fans_and_marginals_refuse_what_is_not_a_sample(ax):
    ts, draws = np.arange(3.0), np.zeros((4, 3, 1))
    with pytest.raises(ValueError, match="`paths` has times .* several paths at the same times"):
        plot.fan(ts, draws[0], ax=ax)
    with pytest.raises(ValueError, match="`channel` is 1 but `paths` has 1 channels"):
        plot.fan(ts, draws, ax=ax, channel=1)
    with pytest.raises(ValueError, match=r"`observed` has times of shape \(3,\)"):
        plot.marginals(ts, draws, draws[:, 1:], ax)
