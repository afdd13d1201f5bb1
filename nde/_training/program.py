"""The compiled programs of a training run, and the cache that later runs find them in.

A program is a step, or a validation, for given functions and a given shape of batch. It is lifted over
several starts or divided over a mesh, and handed to `jax.jit`. Runs whose functions and options have the
same fingerprint share their programs, and `jax.jit` sees to the shapes and types of the arrays.

State and model go in and out as lists of their leaves, and what is reported as a few vectors: to walk
over the modules of a model at every call would take longer than a small step.
"""

import collections
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import PartitionSpec
from jaxtyping import PyTree

from nde._training.batching import ArrayRows, GivenRows
from nde._training.fingerprint import Unknown, fingerprint
from nde._training.packing import pack
from nde._training.step import Problem, State, make_step, make_validation

KEPT = 16  # runs whose programs are kept
_programs: collections.OrderedDict[Any, dict[Any, Callable]] = collections.OrderedDict()


class Programs:
    """The programs of one problem, compiled as they are asked for."""

    def __init__(self, problem: Problem, state: State, fixed: PyTree):
        self.problem = problem
        self.trees = jax.tree.structure(state), jax.tree.structure(fixed)
        try:
            functions = [(turn.loss, turn.optim) for turn in problem.turns]
            options = {name: value for name, value in vars(problem).items() if name != "turns"}
            key = fingerprint((functions, options | {"mesh": _described(problem.mesh)}))
        except Unknown:
            self.found: dict[Any, Callable] = {}
            return
        self.found = _programs.setdefault((key, self.trees), {})
        _programs.move_to_end((key, self.trees))
        while len(_programs) > KEPT:
            _programs.popitem(last=False)

    def step(self, turn: int, rows: ArrayRows | GivenRows) -> Callable:
        """`step(leaves of the state, of the fixed, payload, index, key, setting) -> (leaves of the
        state, what is reported)`."""
        return self._get((turn, rows), lambda: make_step(self.problem, turn, rows), rows)

    def validation(self, rows: ArrayRows) -> Callable:
        """The same for `validate`."""
        return self._get(("validation", rows), lambda: make_validation(self.problem, rows), rows)

    def _get(self, name: Any, make: Callable, rows: Any) -> Callable:
        if name not in self.found:
            alarmed = self.problem.alarmed and name[0] != "validation"
            lifted = _lifted(_reporting(make()), self.problem, rows, alarmed)
            self.found[name] = jax.jit(_of_leaves(lifted, *self.trees))
        return self.found[name]


def _reporting(function: Callable) -> Callable:
    """`function` with its record packed."""

    def packed(*arguments: Any) -> Any:
        state, record = function(*arguments)
        return state, pack(record)

    return packed


def _of_leaves(function: Callable, state_tree: Any, fixed_tree: Any) -> Callable:
    """`function` of the leaves of its first two arguments."""

    def flat(state: list, fixed: list, *arguments: Any) -> Any:
        whole = state_tree.unflatten(state), fixed_tree.unflatten(fixed)
        state, record = function(*whole, *arguments)
        return state_tree.flatten_up_to(state), record

    return flat


def _lifted(
    function: Callable, problem: Problem, rows: ArrayRows | GivenRows, alarmed: bool
) -> Callable:
    """`function` of all starts, on every device of the mesh."""
    if problem.starts:
        function = jax.vmap(function, in_axes=(0, 0, None, None, None, None))
    if problem.mesh is None:
        return function
    everywhere, divided = PartitionSpec(), PartitionSpec(problem.mesh.axis_names)
    models = divided if problem.starts else everywhere
    payload = divided if rows.divided and not problem.starts else everywhere
    if alarmed:
        payload = (payload, divided)
    return jax.shard_map(
        function,
        mesh=problem.mesh,
        in_specs=(models, models, payload, everywhere, everywhere, everywhere),
        out_specs=(models, models),
        # The parts of a solve stop at different steps; jax would put an all-reduce into their loop.
        check_vma=False,
    )


def _described(mesh: Any) -> Any:
    if mesh is None:
        return None
    return mesh.axis_names, mesh.devices.shape, [device.id for device in mesh.devices.flat]
