"""Placeholder until the engine lands in the next commits."""

import diffrax


class DiscreteAdjoint(diffrax.AbstractAdjoint):
    """Stores and replays; currently diffrax's own loop."""

    checkpoints: int = 64

    def loop(self, **kwargs):
        return diffrax.RecursiveCheckpointAdjoint().loop(**kwargs)
