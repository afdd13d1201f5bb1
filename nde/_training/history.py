"""What a training run reports: columns with one row per step, and the progress on the screen."""

import importlib.util
import sys
import time
from typing import Any

import jax
import numpy as np

MOST_FAILED = 0.1  # of the solves of a batch
HIDDEN = ("reason", "skips", "result")  # looked at once, and not kept


class History:
    """One row per training step: `history["loss"]`, `history.columns`.

    Args:
        columns: Name to array of shape (steps,): `loss`, `gradient_norm`, `skipped` (the update was
            not finite and not made), `seconds` (since the first step) and the metrics of the loss,
            such as `nfe`.
        compile_seconds: Time of the one compilation before the first step.
    """

    def __init__(self, columns: dict[str, np.ndarray], compile_seconds: float):
        self.columns, self.compile_seconds = columns, compile_seconds

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self.columns:
            raise KeyError(f"`{name}` is not in the history; it has {sorted(self.columns)}.")
        return self.columns[name]

    def __len__(self) -> int:
        return len(self.columns.get("loss", ()))

    def __repr__(self) -> str:
        return self.summary()

    @property
    def seconds(self) -> float:
        """Duration of the training without the compilation."""
        return float(self["seconds"][-1]) if len(self) else 0.0

    @property
    def final_loss(self) -> float:
        """Mean loss of the last tenth of the steps; inf if one of them was skipped, or more than a
        tenth of its solves failed.
        """
        if not len(self):
            return np.inf
        last = slice(-max(1, len(self) // 10), None)
        failed = self.columns.get("failed", np.zeros(len(self)))[last]
        bad = self["skipped"][last].any() or (failed > MOST_FAILED).any()
        return np.inf if bad else float(self["loss"][last].mean())

    def summary(self) -> str:
        """A table of the columns: first value, last value, smallest and largest."""
        lines = [
            f"{len(self)} steps in {self.seconds:.1f} s after {self.compile_seconds:.1f} s of "
            "compiling; "
            f"{int(np.sum(self.columns.get('skipped', 0)))} skipped",
            f"{'':<16}{'first':>12}{'last':>12}{'smallest':>12}{'largest':>12}",
        ]
        for name, rows in self.columns.items():
            rows = rows[np.isfinite(rows)]
            if name not in ("skipped", "seconds") and rows.size:
                values = (rows[0], rows[-1], rows.min(), rows.max())
                lines.append(f"{name:<16}" + "".join(f"{value:>12.4g}" for value in values))
        return "\n".join(lines)


class NonFiniteError(FloatingPointError):
    """Data or training that is not finite.

    Args:
        message: What was found, where, and what to do.
        model: The last good model; `None` if training had not begun.
        history: The `History` up to the error; `None` if training had not begun.
    """

    def __init__(self, message: str, model: Any = None, history: History | None = None):
        super().__init__(message)
        self.model, self.history = model, history


class Reports:
    """Collects what the compiled steps return, and waits for the device only in `fetch`."""

    def __init__(self, steps: int, progress: bool):
        self.pending, self.records, self.times = [], [], []
        self.steps, self.progress, self.shown = steps, progress, None
        self.began = time.perf_counter()

    def begin(self) -> None:
        """Start the clock, and the progress on the screen."""
        self.began = time.perf_counter()
        if self.progress:
            self.shown = _progress(self.steps)

    def add(self, record: dict[str, Any]) -> None:
        """Keep the record of one more step, on the device."""
        self.pending.append(record)

    def fetch(self) -> list[tuple[int, dict[str, np.ndarray]]]:
        """Bring the pending records to the host: pairs of step and record."""
        first, fetched = len(self.records), jax.device_get(self.pending)
        self.pending = []
        now, last = time.perf_counter() - self.began, self.times[-1] if self.times else 0.0
        self.times += np.linspace(last, now, len(fetched) + 1)[1:].tolist()
        self.records += [{k: v for k, v in row.items() if k not in HIDDEN} for row in fetched]
        if self.shown is not None:
            self.shown.update(len(fetched), fetched[-1])
        return list(enumerate(fetched, start=first))

    def close(self) -> None:
        """End the progress on the screen."""
        if self.shown is not None:
            self.shown.close()

    def columns(self) -> dict[str, np.ndarray]:
        """Name to array, the first axis one row per step."""
        names = list(self.records[0]) if self.records else []
        columns = {name: np.stack([record[name] for record in self.records]) for name in names}
        return columns | {"seconds": np.asarray(self.times)}


def _numbers(record: dict[str, np.ndarray]) -> dict[str, str]:
    """What the progress shows: the best of several starts."""
    shown = {name: np.min(record[name]) for name in ("loss", "nfe") if name in record}
    return {name: f"{value:.4g}" for name, value in shown.items()}


def _progress(steps: int):
    return _Bar(steps) if importlib.util.find_spec("tqdm") else _Lines(steps)


class _Bar:
    def __init__(self, steps: int):
        from tqdm.auto import tqdm

        self.bar = tqdm(total=steps, desc="fit", unit="step")

    def update(self, steps: int, record: dict[str, np.ndarray]) -> None:
        self.bar.set_postfix(_numbers(record), refresh=False)
        self.bar.update(steps)

    def close(self) -> None:
        self.bar.close()


class _Lines:
    """About ten lines for a run."""

    def __init__(self, steps: int):
        self.steps, self.done, self.tenth = steps, 0, 0

    def update(self, steps: int, record: dict[str, np.ndarray]) -> None:
        self.done += steps
        if self.done * 10 // self.steps > self.tenth:
            self.tenth = self.done * 10 // self.steps
            text = " ".join(f"{name} {value}" for name, value in _numbers(record).items())
            sys.stderr.write(f"fit: step {self.done}/{self.steps} {text}\n")

    def close(self) -> None:
        sys.stderr.flush()
