"""Brownian paths that can be reconstructed: on a grid, at any times, with their Levy areas."""

from nde.solvers.brownian.grid import BrownianGrid as BrownianGrid
from nde.solvers.brownian.increment import SpaceSpaceLevyArea as SpaceSpaceLevyArea
from nde.solvers.brownian.interval import BrownianInterval as BrownianInterval
from nde.solvers.brownian.levy import foster_area as foster_area
