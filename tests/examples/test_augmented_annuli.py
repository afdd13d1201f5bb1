"""The example of augmentation: what its data are, and a trial run."""

import numpy as np
import pytest
from scripts import load_example


def test_the_annuli_do_not_touch():
    example = load_example("augmented_annuli")
    x, outer = (np.asarray(part) for part in example.annuli(0, 200))
    radius, outer = np.linalg.norm(x, axis=1), outer > 0.5
    assert radius[~outer].max() <= 0.5 and 1.0 <= radius[outer].min() and radius.max() <= 1.5
    points, targets = example.reflection(0, 10)
    np.testing.assert_array_equal(points, -targets)


@pytest.mark.slow
def test_a_trial_run_of_the_annuli(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    results = load_example("augmented_annuli").main(60, extras=(0, 1), examples=256)
    assert len(results) == 4 and (tmp_path / "augmented_annuli.png").is_file()
    assert results["x -> -x", 1]["loss"] < 0.5 * results["x -> -x", 0]["loss"]
