"""The reusable ways to turn tasks into graded groups."""

from gruppo.rollouts.dynamic import Dynamic
from gruppo.rollouts.parallel import Parallel, Reread, WithReference

__all__ = ["Dynamic", "Parallel", "Reread", "WithReference"]
