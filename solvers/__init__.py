"""Adjoints, solvers and paths that a diffrax user drops into `diffrax.diffeqsolve`.

Imported as `nde.solvers`. It knows nothing of neural networks.
"""

if __name__ != "nde.solvers":
    raise ImportError(
        "Import this package as `nde.solvers`, not as `solvers`: a second copy of every class would "
        "not be recognised by the first. Install the project with `pip install -e .`."
    )

from nde.solvers.brownian import BrownianGrid, BrownianInterval, SpaceSpaceLevyArea
from nde.solvers.diagnosis import Diagnosis, SolveError, diagnose
from nde.solvers.discrete_adjoint import DiscreteAdjoint
from nde.solvers.ees import EES25, EES27
from nde.solvers.estimating import WithEstimates
from nde.solvers.heuristics import Estimates
from nde.solvers.leapfrog import AsynchronousLeapfrog
from nde.solvers.levy_heun import LevyHeun
from nde.solvers.mccallum_foster import Reversible
from nde.solvers.reversible_adjoint import ReversibleAdjoint
from nde.solvers.reversible_heun import ReversibleHeun
from nde.solvers.sosri import SOSRI, SOSRI2
from nde.solvers.symplectic import StormerVerlet, Yoshida4

__all__ = [
    "SOSRI",
    "SOSRI2",
    "AsynchronousLeapfrog",
    "BrownianGrid",
    "BrownianInterval",
    "Diagnosis",
    "DiscreteAdjoint",
    "EES25",
    "EES27",
    "Estimates",
    "LevyHeun",
    "Reversible",
    "ReversibleAdjoint",
    "ReversibleHeun",
    "SolveError",
    "SpaceSpaceLevyArea",
    "StormerVerlet",
    "WithEstimates",
    "Yoshida4",
    "diagnose",
]
