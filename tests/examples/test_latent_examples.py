"""The examples of latent models and of augmentation: what their data are, and a trial run of each."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


def load(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_an_oscillator_is_seen_at_its_share_of_its_own_times():
    example = load("latent_oscillators")
    ts, xs = example.sines(0, 12)
    seen_ts, seen = example.observe(ts, xs, np.repeat([0.1, 0.5], 6), seed=1)
    assert seen.shape == (12, 51, 1) and np.all(np.diff(seen_ts, axis=1) >= 0)
    count = np.sum(~np.isnan(seen[..., 0]), axis=1)
    np.testing.assert_array_equal(count, np.repeat([10, 50], 6))
    for row in range(12):
        rows = np.isin(ts[row], seen_ts[row])
        assert rows.sum() == count[row]
        np.testing.assert_array_equal(seen[row, 1 : 1 + count[row], 0], xs[row, rows, 0])
    half_ts, half = example.observe(ts, xs, np.full(12, 0.5), seed=1, end=2.5)
    assert half_ts.max() <= 2.5 and np.all(np.isnan(half[:, 0]))
    assert abs(np.mean(xs**2) - 0.5) < 0.1


def test_the_annuli_do_not_touch():
    example = load("augmented_annuli")
    x, outer = (np.asarray(part) for part in example.annuli(0, 200))
    radius, outer = np.linalg.norm(x, axis=1), outer > 0.5
    assert radius[~outer].max() <= 0.5 and 1.0 <= radius[outer].min() and radius.max() <= 1.5
    points, targets = example.reflection(0, 10)
    np.testing.assert_array_equal(points, -targets)


@pytest.mark.slow
def test_a_trial_run_of_the_oscillators(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    results = load("latent_oscillators").main(2, series=8, tested=3, batch=4, draws=2)
    assert set(results) == {"latent ODE", "ODE-RNN"} and len(results["ODE-RNN"]) == 4
    for rows in results.values():
        assert all(np.isfinite(row["interpolate"] + row["extrapolate"]) for row in rows)
    assert (tmp_path / "latent_oscillators.png").is_file()


@pytest.mark.slow
def test_a_trial_run_of_the_annuli(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    results = load("augmented_annuli").main(60, extras=(0, 1), examples=256)
    assert len(results) == 4 and (tmp_path / "augmented_annuli.png").is_file()
    assert results["x -> -x", 1]["loss"] < 0.5 * results["x -> -x", 0]["loss"]
