r"""The front: for each complexity the best formula, where that is better than every simpler one.

Going from one entry to the next, the score is the fall of the log loss per token,

    score = -(d log loss) / (d complexity).

Formulas that only fit noise, or the error of a network, buy little with every token. So of the lower convex
hull of (complexity, log loss), where scores fall, the chosen entry is the last with a score above `worth`;
if the size of the noise is known, it is the simplest entry whose loss is not above that.

Reference:  Discovering symbolic models from deep learning with inductive biases (2020) | arXiv:2006.11287
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from nde.symbolic.expression import Expression

__all__ = ["Front"]

WORTH = 0.5


class Front(NamedTuple):
    """Formulas from simple to exact.

    Args:
        expressions: In order of complexity.
        losses: The mean square of the residuals over the variance of the targets; strictly falling.
    """

    expressions: tuple[Expression, ...]
    losses: np.ndarray

    @property
    def complexities(self) -> np.ndarray:
        """The number of tokens of each."""
        return np.array([expression.complexity for expression in self.expressions])

    @property
    def scores(self) -> np.ndarray:
        """The fall of the log loss per token since the entry before; that of the first is 0."""
        return np.concatenate([[0.0], -np.diff(_log(self.losses)) / np.diff(self.complexities)])

    def choose(self, *, noise: float | None = None, worth: float = WORTH) -> Expression:
        """One formula of the front.

        Args:
            noise: Relative loss that the true formula would have: the simplest entry that reaches it
                is taken, or the best if none does.
            worth: Without `noise`, the score that a longer formula must have.
        """
        if noise is not None:
            good = np.flatnonzero(self.losses <= noise)
            return self.expressions[good[0] if good.size else -1]
        return self.expressions[last_worth(self.complexities, self.losses, worth)]

    def table(self, digits: int = 4) -> str:
        """Complexity, loss, score and formula, a line each; the chosen one is marked."""
        chosen = self.choose()
        lines = [f"{'size':>5} {'loss':>9} {'score':>6}"]
        for expression, loss, score in zip(*self, self.scores, strict=True):
            mark = "<-" if expression is chosen else "  "
            lines.append(
                f"{expression.complexity:>5} {loss:>9.2e} {score:>6.2f} {mark} {_short(expression, digits)}"
            )
        return "\n".join(lines)


def make_front(expressions: Sequence[Expression], losses: np.ndarray) -> Front:
    """The entries that are better than all simpler ones; nothing that is not finite."""
    complexities = [expression.complexity for expression in expressions]
    order = np.lexsort((losses, complexities))  # the better of two with as many tokens comes first
    kept, best = [], np.inf
    for at in order:
        if np.isfinite(losses[at]) and losses[at] < best * (1 - 1e-6):
            kept.append(at)
            best = losses[at]
    return Front(tuple(expressions[at] for at in kept), np.asarray(losses)[kept])


def last_worth(complexities: np.ndarray, losses: np.ndarray, worth: float) -> int:
    """The last vertex of the lower convex hull that is reached with a score above `worth`."""
    logs, at = _log(losses), 0
    while at + 1 < len(logs):
        scores = -(logs[at + 1 :] - logs[at]) / (complexities[at + 1 :] - complexities[at])
        if scores.max() < worth:
            break
        at += 1 + int(scores.argmax())
    return at


def _log(losses: np.ndarray) -> np.ndarray:
    # Below the square of the rounding error of a solve all are equally good.
    return np.log(np.maximum(losses, 1e-22))


def _short(expression: Expression, digits: int) -> str:
    """The formula with rounded constants."""
    constants = [float(f"{c:.{digits}g}") for c in np.asarray(expression.constants).tolist()]
    return str(Expression(np.asarray(constants), expression.tokens, expression.variables))
