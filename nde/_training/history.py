"""What a training run reports: columns with one row per step, and the progress on the screen."""

import csv
import importlib.util
import os
import sys
import time
from typing import Any

import jax
import numpy as np

from nde._training.packing import Packed

MOST_FAILED = 0.1  # of the solves of a batch
ROWS = 1000  # of the history that are kept as they came
HIDDEN = ("reason", "skips", "result", "alarm")  # looked at once, and not kept


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

    @property
    def best_step(self) -> int | None:
        """The step whose model was the best validated one; `None` without a validation."""
        values = self.columns.get("validation", np.zeros(0))
        return int(np.nanargmin(values)) if np.isfinite(values).any() else None

    @property
    def score(self) -> float:
        """What starts are compared by: the best validation, or `final_loss`."""
        best = self.best_step
        return self.final_loss if best is None else float(self["validation"][best])

    def save_csv(self, path: str | os.PathLike) -> None:
        """Write the columns to a file of comma-separated values, one row per step."""
        names = ["step", *self.columns]
        rows = zip(range(len(self)), *self.columns.values(), strict=True)
        with open(path, "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(names)
            writer.writerows([np.asarray(x).item() for x in row] for row in rows)

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
        self.pending: list[tuple[list[Packed], dict[str, int]]] = []
        self.blocks: list[dict[str, np.ndarray]] = []  # columns: of a run continued, then of this
        self.records: list[dict[str, np.ndarray]] = []  # the rows since then
        self.steps, self.progress, self.shown = steps, progress, None
        self.began = time.perf_counter()
        self.last = 0.0  # seconds at the last record

    @property
    def length(self) -> int:
        """Number of steps that were reported."""
        return sum(len(block["seconds"]) for block in self.blocks) + len(self.records)

    def begin(self) -> None:
        """Start the clock, and the progress on the screen."""
        self.began = time.perf_counter() - self.last
        if self.progress:
            self.shown = _progress(self.steps)
            if self.length:
                self.shown.update(self.length, {})

    def restore(self, columns: dict[str, np.ndarray]) -> None:
        """Go on where another run was interrupted."""
        if len(columns["seconds"]):
            self.blocks, self.last = [columns], float(columns["seconds"][-1])

    def pause(self, seconds: float) -> None:
        """Leave out of the clock what the last seconds were spent on."""
        self.began += seconds

    def add(self, reported: list[Packed], numbers: dict[str, int]) -> None:
        """Keep what one more step reported, on the device, and numbers that the host knows."""
        self.pending.append((reported, numbers))

    def fetch(self) -> list[tuple[int, dict[str, np.ndarray]]]:
        """Bring the pending records to the host: pairs of step and record."""
        first, pending = self.length, jax.device_get(self.pending)
        self.pending, fetched = [], []
        for reported, numbers in pending:
            record = {name: np.int32(number) for name, number in numbers.items()}
            for packed in reported:
                record |= packed.unpacked()
            fetched.append(record)
        now = max(self.last, time.perf_counter() - self.began)
        seconds = np.linspace(self.last, now, len(fetched) + 1)[1:]
        for row, at in zip(fetched, seconds, strict=True):
            kept = {name: value for name, value in row.items() if name not in HIDDEN}
            self.records.append(kept | {"seconds": at})
        self.last = now
        if self.shown is not None and fetched:
            self.shown.update(len(fetched), fetched[-1])
        return list(enumerate(fetched, start=first))

    def drop_ended(self) -> None:
        """Forget the steps that were handed out before it was known that training had ended, and
        keep the others in little memory: a row holds on to the array that the device gave."""
        while self.records and np.all(self.records[-1]["ended"]):
            self.records.pop()
        if len(self.records) >= ROWS:
            self.blocks.append(_columns(self.records))
            self.records = []

    def close(self) -> None:
        """End the progress on the screen."""
        if self.shown is not None:
            self.shown.close()

    def columns(self) -> dict[str, np.ndarray]:
        """Name to array, the first axis one row per step; nan where a step did not report it."""
        blocks = [*self.blocks, *([_columns(self.records)] if self.records else [])]
        columns = {}
        for name in dict.fromkeys(name for block in blocks for name in block):
            shape = next(block[name].shape[1:] for block in blocks if name in block)
            columns[name] = np.concatenate(
                [b.get(name, np.full((len(b["seconds"]), *shape), np.nan)) for b in blocks]
            )
        return columns | {"seconds": columns.pop("seconds", np.zeros(0))}


def _columns(records: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    columns = {}
    for name in dict.fromkeys(name for row in records for name in row):
        shape = next(np.shape(row[name]) for row in records if name in row)
        gap = np.full(shape, np.nan)
        columns[name] = np.stack([row.get(name, gap) for row in records])
    return columns


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
