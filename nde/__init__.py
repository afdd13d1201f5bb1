"""Neural differential equations on JAX, on top of diffrax.

The models and their parts are imported here. `fit`, `train` and `plot` are imported on first use:
they need optax and matplotlib, which a program that only solves does not have to load.
"""

import importlib
import importlib.metadata
from typing import TYPE_CHECKING, Any

from nde import evaluate as evaluate
from nde import fields as fields
from nde import gan as gan
from nde import implicit as implicit
from nde import losses as losses
from nde import paths as paths
from nde import regularizers as regularizers
from nde import solvers as solvers
from nde import symbolic as symbolic
from nde._saving import load as load
from nde._saving import save as save
from nde.cde import NeuralCDE as NeuralCDE
from nde.cnf import CNF as CNF
from nde.hybrid import HybridODE as HybridODE
from nde.latent_ode import LatentODE as LatentODE
from nde.latent_sde import LatentSDE as LatentSDE
from nde.linear_cde import LinearCDE as LinearCDE
from nde.log_cde import LogNeuralCDE as LogNeuralCDE
from nde.measured import Measured as Measured
from nde.mechanics import HamiltonianODE as HamiltonianODE
from nde.mechanics import LagrangianODE as LagrangianODE
from nde.mechanics import PortHamiltonianODE as PortHamiltonianODE
from nde.mechanics import SecondOrderODE as SecondOrderODE
from nde.ode import NeuralODE as NeuralODE
from nde.odernn import ODERNN as ODERNN
from nde.sde import HybridSDE as HybridSDE
from nde.sde import NeuralSDE as NeuralSDE

if TYPE_CHECKING:
    from nde import inference as inference
    from nde import plot as plot
    from nde import train as train
    from nde._mixed_effects import mixed_effects as mixed_effects
    from nde.inference import least_squares as least_squares
    from nde.train import fit as fit

    __version__: str

__all__ = [
    "CNF",
    "ODERNN",
    "HamiltonianODE",
    "HybridODE",
    "HybridSDE",
    "LagrangianODE",
    "LatentODE",
    "LatentSDE",
    "LinearCDE",
    "LogNeuralCDE",
    "Measured",
    "NeuralCDE",
    "NeuralODE",
    "NeuralSDE",
    "PortHamiltonianODE",
    "SecondOrderODE",
    "evaluate",
    "fields",
    "fit",
    "gan",
    "implicit",
    "inference",
    "least_squares",
    "load",
    "losses",
    "mixed_effects",
    "paths",
    "plot",
    "regularizers",
    "save",
    "solvers",
    "symbolic",
    "train",
]


def __getattr__(name: str) -> Any:
    if name in ("inference", "plot", "train"):
        return importlib.import_module(f"nde.{name}")
    if name == "fit":
        return importlib.import_module("nde.train").fit
    if name == "least_squares":
        return importlib.import_module("nde.inference").least_squares
    if name == "mixed_effects":
        return importlib.import_module("nde._mixed_effects").mixed_effects
    if name == "__version__":
        return importlib.metadata.version("nde")
    raise AttributeError(f"module 'nde' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
