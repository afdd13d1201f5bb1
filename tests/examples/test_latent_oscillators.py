"""The example of latent and recurrent ODEs: what is shown of its series, and a trial run."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scripts import load_example


def test_what_is_shown_is_a_share_of_the_past():
    example = load_example("latent_oscillators")
    ts, xs = example.sines(0, 200, 50)
    assert np.all(np.diff(ts, axis=1) >= 0) and np.all(ts[:, 0] == 0) and np.isnan(xs[:, 0]).all()
    assert abs(np.nanmean(xs**2) - 0.5) < 0.02  # of a sine with amplitude 1
    ends = jnp.where(jnp.arange(200) % 2, 2.5, 5.0)
    shown = example.show(jax.random.key(0), ts, xs, jnp.full(200, 0.3), ends)
    seen = ~np.isnan(shown[..., 0])
    np.testing.assert_array_equal(shown[seen], xs[seen])
    assert not np.any(seen & (ts > ends[:, None]))
    share = seen.sum() / ((ts <= ends[:, None]) & ~np.isnan(xs[..., 0])).sum()
    assert abs(share - 0.3) < 0.02


@pytest.mark.slow
def test_a_trial_run_of_the_oscillators(tmp_path, monkeypatch, capsys):
    example = load_example("latent_oscillators")
    monkeypatch.chdir(tmp_path)
    results = example.main(steps=40, plot=False, series=64, tested=8)
    assert list(results) == ["latent ODE", "ODE-RNN"] and not list(tmp_path.iterdir())
    text = capsys.readouterr().out
    for rows in results.values():
        assert len(rows) == 8
        for error in rows.values():
            assert 0 < error < 1.5 and f"{error:.4f}" in text
