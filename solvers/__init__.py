"""Adjoints, solvers and paths that a diffrax user drops into `diffrax.diffeqsolve`.

Imported as `nde.solvers`. It knows nothing of neural networks.
"""

if __name__ != "nde.solvers":
    raise ImportError(
        "Import this package as `nde.solvers`, not as `solvers`: a second copy of every class would "
        "not be recognised by the first. Install the project with `pip install -e .`."
    )

from nde.solvers.adjoint.discrete_adjoint import DiscreteAdjoint
from nde.solvers.adjoint.reversible_adjoint import ReversibleAdjoint
from nde.solvers.brownian import BrownianGrid, BrownianInterval, SpaceSpaceLevyArea
from nde.solvers.estimates.estimates import Estimates
from nde.solvers.estimates.wrapper import WithEstimates
from nde.solvers.failures.diagnosis import Diagnosis, SolveError, diagnose
from nde.solvers.integrals import ride_along
from nde.solvers.methods.hypersolver import Hypersolver, fingerprint
from nde.solvers.methods.levy_heun import LevyHeun
from nde.solvers.methods.sosri import SOSRI, SOSRI2
from nde.solvers.reversible.ees import EES25, EES27
from nde.solvers.reversible.leapfrog import AsynchronousLeapfrog
from nde.solvers.reversible.mccallum_foster import Reversible
from nde.solvers.reversible.reversible_heun import ReversibleHeun
from nde.solvers.reversible.symplectic import StormerVerlet, Yoshida4

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
    "Hypersolver",
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
    "fingerprint",
    "ride_along",
]
