"""What a training run may be told beside its data: stages, turns, validation, averages.

Small frozen records. What changes from stage to stage is data of the one compiled step, never a part
of it: a new horizon, rate, weight or set of trained leaves compiles nothing.
"""

import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import optax
from jaxtyping import Array, PyTree

from nde._inputs import check_callable
from nde._training.batching import as_integer


@dataclass(frozen=True)
class Stage:
    """A part of a training run: `fit(..., steps=[Stage(500, horizon=0.2), Stage(2000)])`.

    Args:
        steps: Number of steps of this stage.
        horizon: Share of each series to train on, in (0, 1], as `batch.horizon`;
            `nde.losses.trajectory` follows it. Where another stage has one, `None` is all of it.
        rate: Factor on the update of the optimizer: of its learning rate.
        frozen: `frozen(model)` gives what is not trained in this stage, as in `fit`. The optimizer
            sees a gradient of zero there, and its update is not made.
        weights: Of the terms of the loss, by name, as `batch.weights`: `nde.losses.trajectory`
            multiplies its regularizer by `weights["penalty"]`. All stages name the same.

    Raises:
        ValueError: for numbers out of their range.
    """

    steps: int
    horizon: float | None = None
    rate: float = 1.0
    frozen: Callable | None = None
    weights: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self):
        object.__setattr__(self, "steps", count("steps", self.steps, 0))
        if self.horizon is not None and not 0 < number("horizon", self.horizon) <= 1:
            raise ValueError(
                f"`horizon` is {self.horizon}; it is a share of the series, in (0, 1]."
            )
        if number("rate", self.rate) < 0:
            raise ValueError(f"`rate` is {self.rate}; it is a factor >= 0 on the learning rate.")
        if self.frozen is not None:
            check_callable("frozen", self.frozen, "(model)")
        if not isinstance(self.weights, Mapping):
            raise ValueError(
                f"`weights` is {self.weights!r}; give numbers by name: {{'penalty': 0.1}}."
            )
        for name, weight in self.weights.items():
            number(f"weights[{name!r}]", weight)


@dataclass(frozen=True)
class Turn:
    """One of several losses that are minimized in turn, each over its own part of the model: a
    generator and its critic.

        fit({"generator": g, "critic": c}, [
            Turn(critic_loss, optax.rmsprop(1e-3), lambda m: m["critic"], steps=5),
            Turn(generator_loss, optax.rmsprop(1e-3), lambda m: m["generator"]),
        ], data, steps=6000, project=lambda m: m | {"critic": clipped(m["critic"])}, key=key)

    Every step of `fit` is an update of one turn, on a batch of its own: here 5 steps of the critic,
    one of the generator, and so on. `loss(model, batch, key)` sees the whole model, and only what
    `trains` gives is differentiated and updated, with an optimizer state of its own. Keys come from
    one stream, fold_in(key, step), whoever's turn it is; so do batches, validation, the count of
    skipped steps, the checkpoint and the history, whose column `turn` says who had a step.

    Args:
        loss: As in `fit`. A critic that maximizes returns minus its objective.
        optim: An optax optimizer.
        trains: `trains(model)` gives what this turn trains: a node or a tuple of nodes.
        steps: Number of steps before the next one has its turn.

    Raises:
        ValueError: for arguments that do not fit.
    """

    loss: Callable
    optim: optax.GradientTransformation
    trains: Callable
    steps: int = 1

    def __post_init__(self):
        check_callable("loss", self.loss, "(model, batch, key)")
        check_callable("trains", self.trains, "(model)")
        object.__setattr__(self, "steps", count("steps", self.steps, 1))
        object.__setattr__(self, "optim", optimizer(self.optim))


@dataclass(frozen=True)
class Validation:
    """Data that are not trained on. With it `fit` returns the best validated model.

    The loss is that of training or `loss`, always with the same key; the batch it is given has
    `training=False`, and `nde.losses.trajectory` then leaves out its horizon, its regularizer and its
    dropout. Where there is an `Average`, the average is validated. What it finds changes nothing in
    training, but when it ends.

    Args:
        data: Arrays as in `fit`.
        every: Steps from one validation to the next; the last step is validated as well.
        patience: Validations in a row without a better value after which training ends; `None`
            trains on to the last step.
        loss: Another loss than that of training; needed where training has several.
        batch_size: Examples at a time, to save memory; `None` for all at once.

    Raises:
        ValueError: for arguments that do not fit.
    """

    data: PyTree
    every: int = 100
    patience: int | None = None
    loss: Callable | None = None
    batch_size: int | None = None

    def __post_init__(self):
        object.__setattr__(self, "every", count("every", self.every, 1))
        if self.patience is not None:
            object.__setattr__(self, "patience", count("patience", self.patience, 1))
        if self.batch_size is not None:
            object.__setattr__(self, "batch_size", count("batch_size", self.batch_size, 1))
        if self.loss is not None:
            check_callable("loss", self.loss, "(model, batch, key)")


@dataclass(frozen=True)
class Average:
    """The average of the parameters over the steps, which `fit` validates and returns.

    After n averaged steps the next one has the weight max(1 - decay, 1 / (n + 1)): a plain mean at
    first, and an exponential one when it has become longer. `None` stays with the plain mean, which
    is stochastic weight averaging: `Average(start=8000, every=50)`. A part that did not have its
    `Turn` is not averaged in that step.

    Args:
        decay: Of the exponential average, in [0, 1), such as 0.999.
        start: The first step that is averaged. Before it the average is the model itself.
        every: Steps from one averaged step to the next.

    Raises:
        ValueError: for numbers out of their range.

    References:
        Averaging Weights Leads to Wider Optima and Better Generalization (2018) | arXiv:1803.05407
    """

    decay: float | None = None
    start: int = 0
    every: int = 1

    def __post_init__(self):
        object.__setattr__(self, "start", count("start", self.start, 0))
        object.__setattr__(self, "every", count("every", self.every, 1))
        if self.decay is not None and not 0 <= number("decay", self.decay) < 1:
            raise ValueError(f"`decay` is {self.decay}; it is in [0, 1), such as 0.999.")


def count(name: str, value: Any, least: int) -> int:
    """`value` as an int that is large enough."""
    found = as_integer(value)
    if found is None or found < least:
        raise ValueError(f"`{name}` is {value!r}; it must be an integer >= {least}.")
    return found


def number(name: str, value: Any) -> float:
    """`value` as a finite float."""
    try:
        found = float(value)
    except (TypeError, ValueError):
        found = np.nan
    if isinstance(value, bool) or not np.isfinite(found):
        raise ValueError(f"`{name}` is {value!r}; it must be a finite number.")
    return found


def optimizer(optim: Any) -> optax.GradientTransformationExtraArgs:
    """An optimizer that may be handed more than it needs."""
    if isinstance(optim, optax.MultiSteps):
        optim = optim.gradient_transformation()
    if not isinstance(optim, optax.GradientTransformation):
        raise ValueError(f"`optim` is {optim!r}, not an optimizer; write optax.adam(1e-3).")
    return optax.with_extra_args_support(optim)


def as_stages(steps: Any) -> tuple[Stage, ...]:
    """The stages that `steps` means: a number, or a sequence of them."""
    if isinstance(steps, Stage):
        return (steps,)
    if not isinstance(steps, Sequence):
        return (Stage(count("steps", steps, 0)),)
    if not steps or not all(isinstance(stage, Stage) for stage in steps):
        raise ValueError(
            f"`steps` is {steps!r}; give a number, or stages: [nde.train.Stage(500, horizon=0.2), "
            "nde.train.Stage(2000)]."
        )
    names = [sorted(stage.weights) for stage in steps]
    for number_of, found in enumerate(names):
        if found != names[0]:
            raise ValueError(
                f"`weights` of stage 0 are {names[0]} but those of stage {number_of} are {found}; "
                "all stages name the same, with 0.0 where a term is off."
            )
    return tuple(steps)


def as_turns(loss: Any, optim: Any) -> tuple[Turn, ...]:
    """The turns that `loss` and `optim` mean: one loss, or a sequence of turns."""
    if not isinstance(loss, Sequence) or isinstance(loss, str):
        check_callable("loss", loss, "(model, batch, key)")
        return (Turn(loss, optim, lambda model: model),)
    if not loss or not all(isinstance(turn, Turn) for turn in loss):
        raise ValueError(
            f"`loss` is {loss!r}; give a function, or turns: [nde.train.Turn(loss, optim, trains), "
            "...]."
        )
    if optim is not None:
        raise ValueError("`optim` was given, but every `Turn` has its own; leave it out.")
    return tuple(loss)


class Settings:
    """What a step is told of its stage: arrays, and nothing where no stage says anything.

    `masks`: of each stage, a bool for every trained leaf.
    """

    def __init__(self, stages: Sequence[Stage], masks: Sequence[PyTree[bool]]):
        self.ends = np.cumsum([stage.steps for stage in stages]).tolist()
        self.rows = [
            self._row(stages, stage, mask) for stage, mask in zip(stages, masks, strict=True)
        ]

    def number_at(self, step: int) -> int:
        """The stage that a step is in."""
        return next(i for i, end in enumerate(self.ends) if step < end)

    def at(self, step: int) -> dict[str, PyTree[Array]]:
        """What a step is told of its stage."""
        return self.rows[self.number_at(step)]

    @staticmethod
    def _row(stages, stage: Stage, mask: PyTree[bool]) -> dict[str, PyTree[Array]]:
        row: dict[str, Any] = {}
        if any(other.horizon is not None for other in stages):
            row["horizon"] = jnp.asarray(1.0 if stage.horizon is None else float(stage.horizon))
        if any(other.rate != 1.0 for other in stages):
            row["rate"] = jnp.asarray(float(stage.rate))
        if any(other.frozen is not None for other in stages):
            row["trains"] = jax.tree.map(jnp.asarray, mask)
        if stage.weights:
            row["weights"] = {name: jnp.asarray(float(w)) for name, w in stage.weights.items()}
        return row


def selected(where: Callable, name: str, mask: PyTree[bool], model: PyTree) -> PyTree[bool]:
    """`mask` of the leaves of a model, False outside the nodes that `where` gives."""
    inside = marked(where, name, jax.tree.map(lambda _: False, mask), model, True)
    return jax.tree.map(lambda a, b: a and b, mask, inside)


def marked(
    where: Callable, name: str, mask: PyTree[bool], model: PyTree, value: bool
) -> PyTree[bool]:
    """`mask` with `value` at every leaf of the nodes that `where` gives."""
    try:
        return eqx.tree_at(where, mask, replace_fn=lambda node: jax.tree.map(lambda _: value, node))
    except (TypeError, ValueError, KeyError, AttributeError, IndexError) as error:
        try:
            found = f"gave {textwrap.shorten(eqx.tree_pformat(where(model)), 200)}"
        except Exception as inner:  # whatever a user's function does
            found = f"raised {type(inner).__name__}: {inner}"
        raise ValueError(
            f"`{name}` {found}; it gives one or several nodes of the model, none of them None or "
            "inside another: lambda model: model.vector_field."
        ) from error


def leaf_paths(tree: PyTree, name: str = "model") -> list[str]:
    """The path of every leaf, such as `model.vector_field.scale`."""
    return [name + jtu.keystr(path) for path, _ in jtu.tree_leaves_with_path(tree)]
