"""Control paths: from times and values, with gaps and of any length, to what drives a model.

    observations --> pad_series --> linear, rectilinear, hermite_cubic, natural_cubic --> a path
    observations, one at a time --> Stream --> a path per interval
    a path of straight pieces --> log_signature --> a path of a coarser grid

Every path is a `diffrax.AbstractPath` and a PyTree of plain arrays: make the paths of all series
once, `paths = jax.vmap(hermite_cubic)(ts, ys, lengths)`, and batch, index and save them like data.
"""

from nde.paths.control import AbstractControl, ControlPath
from nde.paths.interpolation import held, hermite_cubic, linear, natural_cubic, rectilinear
from nde.paths.logsignature import LogSignaturePath, log_signature, lyndon_words
from nde.paths.series import PaddedSeries, fill_gaps, pad_series
from nde.paths.stream import Stream

__all__ = [
    "AbstractControl",
    "ControlPath",
    "LogSignaturePath",
    "PaddedSeries",
    "Stream",
    "fill_gaps",
    "held",
    "hermite_cubic",
    "linear",
    "log_signature",
    "lyndon_words",
    "natural_cubic",
    "pad_series",
    "rectilinear",
]
