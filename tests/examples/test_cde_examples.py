"""Trial runs of the examples of controlled equations, and what their data are."""

import jax
import numpy as np
import pytest
from scripts import load_example


def test_spirals_lose_points_and_turn_as_their_label_says():
    example = load_example("cde_spirals")
    controls, labels = example.spirals(64, 0.7, np.random.default_rng(0))
    assert sorted(np.unique(labels)) == [0.0, 1.0]
    points = np.array([np.unique(ts).size for ts in np.asarray(controls.times)])
    assert 20 < points.mean() < 42  # 30 of 100, and both ends
    ends = jax.vmap(jax.vmap(lambda path, t: path.evaluate(t), (None, 0)))(
        controls, controls.times[:, :2]
    )
    (x0, y0), (x1, y1) = ends[:, 0, 1:].T, ends[:, 1, 1:].T
    gap = controls.times[:, 1] - controls.times[:, 0]
    turned = np.sign(x0 * y1 - y0 * x1) * np.sign(np.sin(2.0 * gap))
    np.testing.assert_array_equal(turned, np.where(labels > 0.5, 1.0, -1.0))


def test_a_trial_run_of_spirals_reports_every_fraction_and_writes_nothing(
    tmp_path, monkeypatch, capsys
):
    example = load_example("cde_spirals")
    monkeypatch.chdir(tmp_path)
    results = example.main(steps=3, plot=False, drops=(0.0, 0.7))
    assert list(results) == [0.0, 0.7] and not list(tmp_path.iterdir())
    table = capsys.readouterr().out
    for row in results.values():
        assert f"{row['accuracy']:.1%}" in table and 0 <= row["accuracy"] <= 1


@pytest.mark.slow
def test_spirals_reach_what_is_claimed():
    results = load_example("cde_spirals").main(plot=False)
    assert results[0.0]["accuracy"] == 1.0 and results[0.7]["accuracy"] >= 0.97


@pytest.mark.slow
def test_a_trial_run_of_digits():
    pytest.importorskip("sklearn")
    example = load_example("cde_digits")
    images, labels = example.digits(0.5, np.random.default_rng(0))
    assert images.shape == (example.TRAIN * example.COPIES + 497, 8, 8) and labels.max() == 9
    assert 0.4 < np.isnan(images).mean() < 0.5
    assert not np.isnan(images).all(axis=1).any()
    results = example.main(steps=3, missing=(0.5,))
    assert list(results) == [0.5] and results[0.5]["regression"] > 0.5


@pytest.mark.slow
def test_a_trial_run_of_the_long_series():
    example = load_example("log_ode_long")
    results = example.main(steps=3, length=64, window=16)
    assert list(results) == ["log-ODE, depth 1", "log-ODE, depth 2", "neural CDE"]
    assert all(np.isfinite(row["loss"]) for row in results.values())


def test_the_label_of_a_walk_is_the_sign_of_its_area():
    example = load_example("log_ode_long")
    controls, labels = example.walks(32, 16, np.random.default_rng(0))
    whole = jax.jit(jax.vmap(lambda path: example.paths.log_signature(path, 16, 2)))(controls)
    words = example.paths.lyndon_words(4, 2)
    area = whole.increments[:, 0, words.index((1, 2))]
    np.testing.assert_array_equal(labels, area > 0)
