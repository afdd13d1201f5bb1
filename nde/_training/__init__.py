"""The parts of `nde.train`."""
