"""Losses, one idea a file.

`squared_error` compares numbers with numbers, `trajectory` a model's solve with a series.
"""

from nde.losses.horizon import growing_horizon as growing_horizon
from nde.losses.squared_error import log_mse as log_mse
from nde.losses.squared_error import mse as mse
from nde.losses.trajectory import trajectory as trajectory

__all__ = ["growing_horizon", "log_mse", "mse", "trajectory"]

# Losses whose data begins with the times of the series, shape (examples, times).
TIMES_FIRST = (trajectory,)
