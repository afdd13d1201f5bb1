"""Callbacks: functions of the numbers of a step, as plain Python."""

import json
import os
from pathlib import Path
from typing import Any


class JSONLines:
    """A log with one line of JSON for every step: `fit(..., callbacks=JSONLines("log.jsonl"))`.

    A run that is continued from a checkpoint takes back the lines after it. A number that is not finite
    is null: what JSON can hold.

    Args:
        path: The file; it is begun anew by a run that starts at step 0.
    """

    def __init__(self, path: str | os.PathLike):
        self.path, self.length = Path(path), None

    def __call__(self, numbers: dict[str, Any]) -> None:
        """Write the line of one step."""
        if self.length != numbers["step"]:
            self._take_back(numbers["step"])
        self.length = numbers["step"] + 1
        with self.path.open("a") as file:
            file.write(json.dumps(_finite(numbers)) + "\n")

    def _take_back(self, step: int) -> None:
        lines = self.path.read_text().splitlines() if step and self.path.exists() else []
        self.path.write_text("".join(line + "\n" for line in lines[:step]))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and value - value != 0 else value
