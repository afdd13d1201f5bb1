"""Adjoints, solvers and paths that a diffrax user drops into `diffrax.diffeqsolve`.

Imported as `nde.solvers`. It knows nothing of neural networks.
"""

if __name__ != "nde.solvers":
    raise ImportError(
        "Import this package as `nde.solvers`, not as `solvers`: a second copy of every class would "
        "not be recognised by the first. Install the project with `pip install -e .`."
    )

from nde.solvers.discrete_adjoint import DiscreteAdjoint

__all__ = ["DiscreteAdjoint"]
