"""Runs that end before their time, and go on as if they had not."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from least_squares import DATA, START, fit
from messages import mentions
from reliability.interrupted import STEPS, digest, run

import nde
from nde.train import CheckpointError, Turn

ROOT = Path(__file__).parents[2]
SCRIPT = Path(__file__).with_name("interrupted.py")


@pytest.fixture(scope="module")
def whole():
    """The digest of a run that nothing interrupts."""
    return digest(*run())


class Stop(Exception):
    pass


@pytest.mark.parametrize("after", [1, 7, 11, 39])
def test_a_run_goes_on_bit_for_bit(after, whole, tmp_path):
    def stop(numbers):
        if numbers["step"] == after:
            raise Stop

    with pytest.raises(Stop):
        run(tmp_path / "run", callbacks=stop)
    model, history = run(tmp_path / "run")
    assert digest(model, history) == whole
    np.testing.assert_array_equal(model["n"], np.arange(2))
    assert np.all(np.diff(history["seconds"]) >= 0)


def test_a_checkpoint_changes_nothing_and_a_finished_run_is_returned(whole, tmp_path):
    assert digest(*run(tmp_path / "run", every=7)) == whole
    assert digest(*run(tmp_path / "run", every=7)) == whole
    _, longer = run(tmp_path / "run", steps=STEPS + 5, every=7)
    assert len(longer) == STEPS + 5


@pytest.mark.parametrize("moment", ["fsync", "replace"])
def test_an_end_in_the_middle_of_writing(moment, whole, monkeypatch, tmp_path):
    """Only the temporary file is there, or nothing of it: the last checkpoint stands."""
    original, calls = getattr(os, moment), []

    def fail(*args):
        calls.append(args)
        if len(calls) == 9:
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(os, moment, fail)
    with pytest.raises(KeyboardInterrupt) as caught:
        run(tmp_path / "run")
    assert len(caught.value.history) > 0
    monkeypatch.undo()
    assert digest(*run(tmp_path / "run")) == whole


def start(path, seconds):
    command = [sys.executable, str(SCRIPT), str(path), str(seconds)]
    return subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )


def killed(path, kills, seed):
    """What a run leads to that is killed so many times, at random moments."""
    rng = random.Random(seed)
    for _ in range(kills):
        process = start(path, 0.01)
        process.stdout.readline()
        waited, before = time.monotonic(), path.stat().st_mtime_ns if path.exists() else 0
        while process.poll() is None and time.monotonic() - waited < 100:
            if path.exists() and path.stat().st_mtime_ns != before:
                break  # it has gone on
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.1))
        process.send_signal(signal.SIGKILL)
        process.communicate()
    return start(path, 0.0).communicate(timeout=600)[0].split("\n")[1]


def test_a_killed_process_goes_on(tmp_path):
    expected = start(tmp_path / "whole", 0.0).communicate(timeout=600)[0].split("\n")[1]
    assert killed(tmp_path / "run", 1, seed=0) == expected


@pytest.mark.slow
def test_fifty_kills(tmp_path):
    expected = start(tmp_path / "whole", 0.0).communicate(timeout=600)[0].split("\n")[1]
    found = [killed(tmp_path / f"run{i}", 5, seed=i) for i in range(10)]
    assert found == [expected] * 10


def test_an_iterator_is_wound_forward(tmp_path):
    def batches():
        for i in range(20):
            yield jax.tree.map(lambda leaf, i=i: np.asarray(leaf[i % 5 : i % 5 + 4]), DATA)

    options = {"optim": optax.adam(0.1), "steps": 20}
    expected, reference = fit(START, data=batches(), **options)
    with pytest.raises(Stop):
        fit(
            START,
            data=batches(),
            checkpoint=tmp_path / "run",
            every=5,
            callbacks=stop_at(12),
            **options,
        )
    model, history = fit(START, data=batches(), checkpoint=tmp_path / "run", every=5, **options)
    np.testing.assert_array_equal(model["w"], expected["w"])
    np.testing.assert_array_equal(history["loss"], reference["loss"])


def stop_at(step):
    def stop(numbers):
        if numbers["step"] >= step:
            raise Stop

    return stop


def test_players_and_skipped_steps_go_on(tmp_path):
    def bad(model, batch, key):
        return jnp.where(batch.step == 7, jnp.nan, 1.0) * (model["g"] * model["c"]) ** 2

    turns = [
        Turn(bad, optax.adam(0.1), lambda m: m["c"], steps=2),
        Turn(lambda m, b, k: (m["g"] - m["c"]) ** 2, optax.adam(0.1), lambda m: m["g"]),
    ]

    def play(**options):
        start = {"g": jnp.asarray(1.0), "c": jnp.asarray(2.0)}
        return nde.fit(
            start, turns, DATA, steps=15, key=jax.random.key(0), progress=False, **options
        )

    expected, reference = play()
    with pytest.raises(Stop):
        play(checkpoint=tmp_path / "run", every=1, callbacks=stop_at(9))
    model, history = play(checkpoint=tmp_path / "run", every=1)
    assert float(model["g"]) == float(expected["g"]) and float(model["c"]) == float(expected["c"])
    for name in ("loss", "turn", "skipped"):
        np.testing.assert_array_equal(history[name], reference[name])
    assert list(np.flatnonzero(history["skipped"])) == [7]


def test_another_call_is_refused_with_what_differs(tmp_path):
    path = tmp_path / "run"
    fit(START, steps=3, checkpoint=path)
    cases = [
        ({"key": jax.random.key(5)}, ["`key` was [0, 0] and is [0, 5]"]),
        ({"batch_size": 3}, ["`batch_size` was None and is 3"]),
        ({"data": jax.tree.map(lambda leaf: leaf + 1, DATA)}, ["`data` was"]),
        ({"optim": optax.adam(0.1)}, ["state", "opt_states[0]"]),
        ({"model": {"w": jnp.ones(3), "scale": jnp.ones(()), "v": jnp.ones(1)}}, ["['v']"]),
        ({"average": nde.train.Average()}, ["`state.average"]),
    ]
    for options, fragments in cases:
        with pytest.raises(CheckpointError, match=mentions([str(path), *fragments])):
            fit(**{"model": START, "steps": 3, "checkpoint": path} | options)
    nde.save(path, START)
    with pytest.raises(CheckpointError, match="holds a 'model', not a training run"):
        fit(START, steps=3, checkpoint=path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="damaged"):
        fit(START, steps=3, checkpoint=path)


def test_a_disk_that_is_full_keeps_the_last_checkpoint(whole, monkeypatch, tmp_path):
    with pytest.raises(Stop):
        run(tmp_path / "run", callbacks=stop_at(12))
    before, fsync = (tmp_path / "run").read_bytes(), os.fsync

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left") as caught:
        run(tmp_path / "run")
    assert caught.value.model is not None
    monkeypatch.setattr(os, "fsync", fsync)
    assert (tmp_path / "run").read_bytes() == before
    assert digest(*run(tmp_path / "run")) == whole
