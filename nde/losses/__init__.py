"""Losses, one idea a file.

`squared_error` compares numbers with numbers, `trajectory` a model's solve with a series. For models that
draw paths, scores compare a sample of paths with another, `score(ts, fake, real, mask=None, key=None)`:
`finite_dimensional_score`, `signature_score`, `moments`; `path_score` binds one to a model and a batch.
`likelihood` is for SDEs whose state is observed, `flow_likelihood` and `flow_matching` for an `nde.CNF`.
`evidence` is for an `nde.LatentODE` or an `nde.LatentSDE`, `matched_evidence` for the latter;
`prediction_error` and `prediction_likelihood` for an `nde.ODERNN`.
`negative_log_likelihood` is that of measurements of an `nde.Measured`. `shooting` and `collocation` train
where a whole trajectory does not.
"""

from nde.losses.collocation import collocation as collocation
from nde.losses.evidence import evidence as evidence
from nde.losses.evidence import matched_evidence as matched_evidence
from nde.losses.finite_dimensional import finite_dimensional_score as finite_dimensional_score
from nde.losses.flow_likelihood import flow_likelihood as flow_likelihood
from nde.losses.horizon import growing_horizon as growing_horizon
from nde.losses.kernels import RBF as RBF
from nde.losses.kernels import Energy as Energy
from nde.losses.matching import Entropic as Entropic
from nde.losses.matching import SchroedingerBridge as SchroedingerBridge
from nde.losses.matching import Straight as Straight
from nde.losses.matching import VariancePreserving as VariancePreserving
from nde.losses.matching import flow_matching as flow_matching
from nde.losses.matching import independent as independent
from nde.losses.matching import optimal as optimal
from nde.losses.measurements import negative_log_likelihood as negative_log_likelihood
from nde.losses.moments import moments as moments
from nde.losses.path_score import path_score as path_score
from nde.losses.prediction import prediction_error as prediction_error
from nde.losses.prediction import prediction_likelihood as prediction_likelihood
from nde.losses.shooting import shooting as shooting
from nde.losses.shooting import shooting_nodes as shooting_nodes
from nde.losses.signature_kernel import signature_gram as signature_gram
from nde.losses.signature_kernel import signature_kernel as signature_kernel
from nde.losses.signature_score import signature_score as signature_score
from nde.losses.squared_error import log_mse as log_mse
from nde.losses.squared_error import mse as mse
from nde.losses.trajectory import trajectory as trajectory
from nde.losses.transitions import bridge_density as bridge_density
from nde.losses.transitions import euler_density as euler_density
from nde.losses.transitions import likelihood as likelihood

__all__ = [
    "RBF",
    "Energy",
    "Entropic",
    "SchroedingerBridge",
    "Straight",
    "VariancePreserving",
    "bridge_density",
    "collocation",
    "euler_density",
    "evidence",
    "finite_dimensional_score",
    "flow_likelihood",
    "flow_matching",
    "growing_horizon",
    "independent",
    "likelihood",
    "log_mse",
    "matched_evidence",
    "moments",
    "mse",
    "negative_log_likelihood",
    "optimal",
    "path_score",
    "prediction_error",
    "prediction_likelihood",
    "shooting",
    "shooting_nodes",
    "signature_gram",
    "signature_kernel",
    "signature_score",
    "trajectory",
]

# Losses whose data begins with the times of the series, shape (examples, times).
TIMES_FIRST = (
    evidence,
    likelihood,
    matched_evidence,
    path_score,
    prediction_error,
    prediction_likelihood,
    shooting,
    trajectory,
)
