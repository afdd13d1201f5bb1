"""The examples of stochastic equations: their data against exact numbers, and a trial run of each."""

import numpy as np
import pytest
from scripts import load_example


def test_the_process_of_the_four_losses_has_its_moments():
    """Closed forms at 6, 18 and 63; the start is uniform on (-1, 1)."""
    ys = load_example("sde_ou").process(seed=0, paths=20000)[:, :, 0]
    for index, t in ((2, 6.0), (6, 18.0), (21, 63.0)):
        mean = 0.02 * (t / 0.1 - (1 - np.exp(-0.1 * t)) / 0.01)
        noise = t**2 / 0.2 - 2 * t / 0.04 + 250 * (1 - np.exp(-0.2 * t))
        variance = np.exp(-0.2 * t) / 3 + (0.8 / 63) ** 2 * noise
        assert abs(ys[:, index].mean() - mean) < 4 * np.sqrt(variance / 20000)
        assert abs(ys[:, index].var() / variance - 1) < 4 * np.sqrt(2 / 20000)


def test_one_loss_runs_and_reports(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    results = load_example("sde_ou").main(2, names=("moments",), paths=32, judged=64)
    assert set(results) == {"moments"} and np.all(np.isfinite(results["moments"]["ks"]))
    assert (tmp_path / "sde_ou.png").is_file()


@pytest.mark.slow
def test_every_loss_runs():
    results = load_example("sde_ou").main(2, plot=False, paths=32, judged=64)
    assert set(results) == {"moments", "pairs", "signature", "GAN"}


@pytest.mark.slow
def test_the_indices_are_read_and_both_models_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    example = load_example("stocks")
    ts, ys = example.series()
    assert ys.shape == (4, 1860, 2) and ts[-1] == 1859
    np.testing.assert_allclose(ys[0, 1, 0], 100 * np.log(1613.63 / 1628.75))
    results = example.main(5, paths=16)
    for row in results.values():
        assert np.isfinite(row["likelihood"]) and 0 <= row["coverage"] <= 1
    assert (tmp_path / "stocks.png").is_file()


def test_the_filter_has_its_error_and_sees_no_future():
    example = load_example("double_ou")
    ts, ys = example.simulate(1, 3000)
    *past, target, values = example.task(ts, ys)
    assert past[0].max() <= 4 < target.min()
    mean, variance = example.kalman(*past, target)
    width = 1.645 * np.sqrt(variance)
    row = example.score(mean, mean - width, mean + width, values)
    assert abs(row["mse"] - 0.00566) < 0.0005
    assert abs(row["coverage"] - 0.9) < 0.02


@pytest.mark.slow
def test_the_forecast_beside_the_filter_runs():
    results = load_example("double_ou").main(2, plot=False, series=8, tested=8, batch=4, draws=4)
    assert np.isfinite(results["latent SDE"]["mse"])
    assert results["Kalman"]["mse"] < results["last value"]["mse"]


@pytest.mark.slow
def test_the_attractor_is_trained_in_both_ways(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    results = load_example("sde_lorenz").main(4, series=8, judged=4, batch=4)
    assert all(np.isfinite(row["bound"]) for row in results.values())
    assert (tmp_path / "sde_lorenz.png").is_file()
