"""A failed solve, repeated so that it leaves behind what `causes` asks for: where it stopped, its steps."""

import dataclasses
from typing import Any, NamedTuple

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from nde.solvers.adjoint.discrete_adjoint import DiscreteAdjoint
from nde.solvers.failures import jacobian
from nde.solvers.inputs import tolerances


class End(NamedTuple):
    """What a repeated solve leaves behind."""

    t: Array
    y: PyTree[Array]
    lengths: np.ndarray  # of the accepted steps
    rejected: int
    result: Any

    @property
    def steps(self) -> int:
        return len(self.lengths) + self.rejected


@dataclasses.dataclass(frozen=True)
class Problem:
    """A solve that can be repeated; times are arrays, and the state has at least their dtype."""

    terms: PyTree[diffrax.AbstractTerm]
    solver: diffrax.AbstractSolver
    t0: Array
    t1: Array
    dt0: Array | None
    y0: PyTree[Array]
    args: PyTree[Any]
    controller: diffrax.AbstractStepSizeController
    max_steps: int
    options: dict[str, Any]

    @property
    def direction(self) -> int:
        return 1 if self.t0 < self.t1 else -1

    @property
    def span(self) -> float:
        return abs(float(self.t1) - float(self.t0))

    @property
    def endless(self) -> bool:
        """Whether it runs until an event, whenever that is."""
        return bool(jnp.isinf(self.t1)) and self.options.get("event") is not None

    @property
    def adapts(self) -> bool:
        return bool(known_tolerances(self.controller))

    @property
    def dtmin(self) -> Any:
        """The smallest step of the controller, if it has one."""
        found = [
            x.dtmin for x in _adaptive(self.controller) if isinstance(x, diffrax.PIDController)
        ]
        return found[0] if found else None

    def tightened(self, factor: float) -> "Problem":
        """The same solve with tolerances so many times smaller, as far as the state resolves them."""
        least = 10 * max(float(jnp.finfo(x.dtype).eps) for x in jax.tree.leaves(self.y0))
        rtol, atol = tolerances(self.controller)
        largest = float(np.max(rtol))  # times a number: Python's keep their weak type
        share = max(1 / factor, min(1.0, least / largest)) if largest > 0 else 1 / factor
        return self.controlled(rtol=rtol * share, atol=atol / factor)

    def looking_ahead(self, end: End) -> "Problem":
        """The same, where it has no end as far ahead as the solve came."""
        return dataclasses.replace(self, t1=2 * end.t - self.t0) if self.endless else self

    def is_held(self, end: End) -> bool:
        """Whether its last steps are as short as the controller may take them."""
        if self.dtmin is None:
            return False
        last = end.lengths[-20:]
        held = last.size > 0 and np.median(last) <= 1.01 * float(self.dtmin)
        return bool(held or end.result == diffrax.RESULTS.dt_min_reached)

    def controlled(self, **values: Any) -> "Problem":
        """The same solve with other values in the controller that has the tolerances."""
        change = lambda inner: dataclasses.replace(inner, **values)
        return dataclasses.replace(self, controller=_map_adaptive(self.controller, change))

    def run(self) -> End:
        """Repeats the solve, keeping its last state and the times of its steps."""
        subs = [diffrax.SubSaveAt(t1=True), diffrax.SubSaveAt(steps=True, fn=_time)]
        solution: Any = diffrax.diffeqsolve(
            self.terms,
            self.solver,
            self.t0,
            self.t1,
            self.dt0,
            self.y0,
            self.args,
            saveat=diffrax.SaveAt(subs=subs),
            adjoint=DiscreteAdjoint(),
            max_steps=self.max_steps,
            stepsize_controller=_map_adaptive(self.controller, _with_arrays),
            throw=False,
            **self.options,
        )
        (t, *_), times = solution.ts
        accepted = int(solution.stats["num_accepted_steps"])
        times = np.concatenate([np.asarray(self.t0)[None], np.asarray(times)[:accepted]])
        last = jax.tree.map(lambda x: x[0], solution.ys[0])
        rejected = int(solution.stats["num_rejected_steps"])
        return End(t, last, np.abs(np.diff(times)), rejected, solution.result)

    def field(self, t: Any, y: PyTree[Array]) -> PyTree[Array]:
        """dy/dt without noise."""
        return jacobian.rate_at(self.terms, jnp.asarray(t, self.t0.dtype), y, self.args)

    def rates(self, t: Array, y: PyTree[Array]) -> tuple[float, float]:
        """The fastest growth and decay at (t, y)."""
        return jacobian.growth_and_decay(self.terms, t, y, self.args, self.direction)


def _time(t, y, args):
    del y, args
    return t


def _adaptive(controller: Any) -> list[Any]:
    return [x for x in jax.tree.leaves(controller, is_leaf=_is_adaptive) if _is_adaptive(x)]


def _is_adaptive(x: Any) -> bool:
    """Whether it has tolerances of its own, and not those of a controller that it wraps."""
    if not isinstance(x, diffrax.AbstractAdaptiveStepSizeController):
        return False
    return "rtol" in {field.name for field in dataclasses.fields(x)}


def _map_adaptive(controller: Any, change: Any) -> Any:
    """The controller, which may wrap another, with `change` applied to the one with tolerances."""
    return jax.tree.map(
        lambda x: change(x) if _is_adaptive(x) else x, controller, is_leaf=_is_adaptive
    )


def known_tolerances(controller: diffrax.AbstractStepSizeController) -> dict[str, np.ndarray]:
    """`rtol` and `atol`; empty for a controller that has none."""
    pairs = zip(("rtol", "atol"), tolerances(controller), strict=True)
    return {name: np.asarray(x) for name, x in pairs if x is not None}


def _with_arrays(inner: Any) -> Any:
    """Tolerances as arrays: the solve is compiled once for all of them, and none is refused."""
    known = lambda x: (x.rtol, x.atol)
    return eqx.tree_at(known, inner, tuple(map(jnp.asarray, known(inner))))
