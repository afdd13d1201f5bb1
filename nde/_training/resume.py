"""A training run in a file: all that its next step depends on, and its history.

The state of a run is that of the compiled step (parameters, optimizers, averages, the best model, the
guard), the number of steps and the columns of the history. Keys and the order of the data are functions
of the step, and need no state of their own; an iterator is wound forward. What the call was is written
beside it, and another one is refused.
"""

import hashlib
import os
from pathlib import Path
from typing import Any

import jax
import jax.tree_util as jtu
import numpy as np
from jaxtyping import PRNGKeyArray, PyTree

from nde._saving import CheckpointError, Reader, Writer, differences, listed, members, pack, unpack
from nde._saving import write as write_file


class Checkpoint:
    """The file of a run.

    Args:
        path: Where it is written.
        every: Steps from one writing to the next.
        call: What has to be the same when it is continued, as plain data.
    """

    def __init__(self, path: str | os.PathLike, every: int, call: dict[str, Any]):
        self.path, self.every, self.call = Path(path), every, call

    def check(self) -> None:
        """Raise early if the file could not be written."""
        folder = self.path.parent
        if self.path.is_dir():
            raise IsADirectoryError(
                f"`checkpoint` is {str(self.path)!r}, a folder; give a file in it."
            )
        if not folder.is_dir():
            raise FileNotFoundError(
                f"`checkpoint` is {str(self.path)!r}, but the folder {str(folder)!r} does not exist."
            )
        if not os.access(folder, os.W_OK):
            raise PermissionError(
                f"`checkpoint` is {str(self.path)!r}, in a folder that cannot be written to."
            )

    def write(self, state: PyTree, columns: dict[str, np.ndarray], step: int) -> None:
        """Put the state after `step` steps into the file."""
        if jax.process_index() == 0:
            notes = {"kind": "training", "step": step, "call": self.call}
            write_file(self.path, pack({"state": state, "columns": columns}, notes))

    def read(self, state: PyTree) -> tuple[PyTree, dict[str, np.ndarray], int]:
        """The state, columns and number of steps in the file; `state` says what it looks like.

        Raises:
            CheckpointError: for a file that is damaged, or of another run.
        """
        manifest, arrays = unpack(self.path)
        if manifest.get("kind") != "training":
            raise CheckpointError(
                f"`checkpoint` {str(self.path)!r} holds a {manifest.get('kind')!r}, not a training run; "
                "give another path."
            )
        found, call = [], manifest["call"]
        for name in sorted({*call, *self.call}):
            if call.get(name) != self.call.get(name):
                found.append(f"`{name}` was {call.get(name)} and is {self.call.get(name)}")
        parts = members(manifest["tree"], "")
        node = parts["['state']"]
        found += differences(Writer().describe(state, "state"), node, "state")
        if found:
            raise CheckpointError(
                f"`checkpoint` {str(self.path)!r} is of another run: {listed(found)} Make the call that "
                "began it, or remove the file to begin anew."
            )
        reader = Reader(arrays)
        columns = reader.build(parts["['columns']"], "columns")
        return reader.fill(state, node), columns, int(manifest["step"])


def described_call(data: Any, batch_size: int | None, key: PRNGKeyArray) -> dict[str, Any]:
    """What a run depends on beside the model, as plain data."""
    return {
        "batch_size": None if batch_size is None else int(batch_size),
        "key": np.asarray(jax.random.key_data(key)).tolist(),
        "data": _digest(data),
    }


def _digest(data: Any) -> str:
    """Of all arrays; an iterator is taken to be the same."""
    if hasattr(data, "__next__"):
        return "iterator"
    found = hashlib.sha256()
    tree = getattr(data, "series", data)
    for path, leaf in jtu.tree_leaves_with_path(tree):
        array = np.ascontiguousarray(np.asarray(leaf))
        found.update(f"{jtu.keystr(path)} {array.dtype} {array.shape} ".encode())
        found.update(array.tobytes())
    return found.hexdigest()[:16]
