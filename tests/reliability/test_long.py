"""Ten thousand steps: memory, threads and open files do not grow."""

import os
import threading
from pathlib import Path

import optax
import pytest
from least_squares import DATA, START, fit

from nde.train import Average, Validation


def resident():
    """Bytes of memory in use."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")
def test_ten_thousand_steps_leave_nothing_behind(tmp_path):
    seen = []

    def look(numbers):
        if numbers["step"] in (1000, 9999):
            files = len(os.listdir("/proc/self/fd"))
            seen.append((resident(), threading.active_count(), files))

    fit(
        START, optim=optax.adam(1e-3), steps=10_000, batch_size=4, callbacks=look,
        validation=Validation(DATA, every=100), average=Average(decay=0.99),
        checkpoint=tmp_path / "run", every=1000,
    )  # fmt: skip
    (memory, threads, files), (later, *after) = seen
    assert later < 1.05 * memory and after == [threads, files]
