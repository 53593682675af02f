"""The reusable ways to turn tasks into graded groups."""

from gruppo.rollouts.parallel import Parallel, Reread, WithReference

__all__ = ["Parallel", "Reread", "WithReference"]
