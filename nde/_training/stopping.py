"""Whether a training run can go on, and what to say if it cannot."""

from collections.abc import Callable
from typing import Any

import diffrax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from nde._training.batching import ArrayBatches, IteratorBatches, some
from nde._training.history import MOST_FAILED, NonFiniteError
from nde._training.options import leaf_paths
from nde._training.ragged import RaggedBatches
from nde._training.step import reasons
from nde.solvers import SolveError
from nde.solvers.adjoint.traced import from_code
from nde.solvers.inputs import run_time_message


def check_report(
    step: int,
    record: dict[str, np.ndarray],
    params: PyTree,
    batches: ArrayBatches | IteratorBatches | RaggedBatches,
    max_skips: int,
    first: bool,
) -> None:
    """Raise if the record of a step says that no start can go on. `first`: of its turn."""
    examples = batches.examples
    _check_gaps(step, record, batches)
    _check_failed(step, record, examples)
    still = (record["gradient_norm"] == 0) & (record["loss"] != 0) & ~record["skipped"]
    if first and np.all(still):
        raise ValueError(
            f"`loss` has a gradient of zero at step {step}: it does not depend on what is trained, "
            f"{leaf_paths(params)}."
        )
    skips = np.min(record["skips"])
    if skips < max_skips:
        return
    what = reasons(params)[int(np.min(record["reason"]))]
    numbers = examples(step)
    where = f" (examples {some(numbers)})" if numbers else ""
    failed = np.max(record.get("failed", 0.0))
    if failed > 0:
        where += (
            f", where {failed:.0%} of the solves failed (an adjoint of diffrax lets them reach the "
            "gradient, `nde.solvers.DiscreteAdjoint()` does not)"
        )
    advice = (
        "No step was ever taken: look at the loss of the model that training began with, "
        "loss(model, batch, key), at what it takes the logarithm or the root of, and whether a mask "
        "leaves anything to compare (a series whose times are all equal is all padding: examples come "
        "first, then times)."
        if skips > step
        else "Lower the learning rate, clip the gradient (optax.clip_by_global_norm), or train on a "
        "shorter horizon first."
    )
    raise NonFiniteError(
        f"{what} is not finite at step {step}{where}, for {skips} steps in a row. The last good "
        f"model is in `error.model`. {advice}"
    )


def _check_gaps(step: int, record: dict[str, np.ndarray], batches: Any) -> None:
    """Raise if the loss makes nothing of a batch that holds nan, and never did."""
    gaps = batches.gaps_of(step)
    if not gaps or batches.takes_gaps:
        return
    if not np.all(record["skipped"]):
        batches.takes_gaps = True
        return
    raise NonFiniteError(
        f"{gaps}, and the loss is not finite at step {step}, where they are in the batch. Leave them "
        "out, or use a loss that takes nan for what was not observed, such as nde.losses.trajectory, "
        "or fill them in and give a mask as another array of the data."
    )


def _check_failed(step: int, record: dict[str, np.ndarray], examples: Callable) -> None:
    """Raise if more than a tenth of the solves failed, in the best of several starts."""
    failed = np.atleast_1d(record.get("failed", 0.0))
    if np.isnan(failed).any():
        raise ValueError(
            f"`loss` returned the metric `failed` = nan at step {step}; it is the share of the solves "
            "that failed, a mean over at least one."
        )
    best = int(np.argmin(failed))
    if failed[best] <= MOST_FAILED:
        return
    lane, found = None, ""
    if "result" in record:
        codes = np.reshape(record["result"], (failed.size, -1))[best]
        lane, numbers = int(np.argmax(codes != 0)), examples(step)
        which = f"example {numbers[lane]}" if numbers else f"number {lane} of the batch"
        kinds, counts = np.unique(codes[codes != 0], return_counts=True)
        causes = (f"{n} x {_text(kind)}" for kind, n in zip(kinds, counts, strict=True))
        found = f" The first is {which}. {'; '.join(causes)}"
    advice = (
        "Raise `max_steps`, loosen the tolerances, train on a shorter horizon first, or call "
        "model.solve on the example to see why."
    )
    if step > 0:
        advice = (
            "If earlier steps went well, lower the learning rate or clip the gradient. " + advice
        )
    raise SolveError(
        f"{failed[best]:.0%} of the solves failed at step {step}, more than {MOST_FAILED:.0%}."
        f"{found} The model so far is in `error.model`. {advice}",
        lane=lane,
        advice=advice,
    )


def _text(kind: int) -> str:
    """The first sentence of what diffrax says of a result."""
    return str(diffrax.RESULTS[from_code(jnp.asarray(kind))]).strip().split(".")[0] + "."


def plain(error: BaseException) -> BaseException:
    """The error that a check inside the compiled step meant, from the one that the compiler makes of it."""
    sentence = run_time_message(error) if isinstance(error, RuntimeError | ValueError) else None
    return error if sentence is None else RuntimeError(f"{sentence} (While computing `loss`.)")
