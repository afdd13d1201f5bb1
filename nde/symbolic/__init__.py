"""From data and networks to formulas: symbolic regression by regularized evolution, in JAX.

    fronts = symbolic.distill(model, states, variables=("q", "v"), key=key)   # what a network has learned,
    fronts = symbolic.search(*symbolic.slopes(ts, ys), variables=..., key=key)        # or raw trajectories
    print(fronts[0].table())                                             # loss against complexity
    fronts = symbolic.distill(..., by=symbolic.sparse, library=...)      # or sums of the terms of a library
    found = symbolic.refine(fronts, nde.NeuralODE, ts, y0s, ys)          # constants through the solve
    model = found.model()                                                # solves, trains and saves

Evolution minimizes the residuals of a regression, which is cheap; the formulas that survive it are judged
by what they do in the equation.
"""

from nde.symbolic.expression import Expression, Field
from nde.symbolic.front import Front
from nde.symbolic.operators import OPERATORS as OPERATORS
from nde.symbolic.refinement import Refined, refine
from nde.symbolic.regression import distill, search, slopes
from nde.symbolic.sparse import polynomials, sparse
from nde.symbolic.units import Units

__all__ = [
    "Expression",
    "Field",
    "Front",
    "Refined",
    "Units",
    "distill",
    "polynomials",
    "refine",
    "search",
    "slopes",
    "sparse",
]
