"""The reusable ways to turn tasks into graded groups."""

from gruppo.rollouts.allocate import Allocate
from gruppo.rollouts.branching import Branches
from gruppo.rollouts.conversation import Conversation, Tags, Talk, ToolCalls, Transcript, WithTools, talked
from gruppo.rollouts.dynamic import Dynamic
from gruppo.rollouts.parallel import Parallel, Reread, WithReference
from gruppo.rollouts.segmented import Pieces, Segmented
from gruppo.rollouts.stale import Stale
from gruppo.rollouts.stored import Stored
from gruppo.rollouts.trajectories import Trajectories
from gruppo.rollouts.tree import Tree

__all__ = [
    "Allocate",
    "Branches",
    "Conversation",
    "Dynamic",
    "Parallel",
    "Pieces",
    "Reread",
    "Segmented",
    "Stale",
    "Stored",
    "Tags",
    "Talk",
    "ToolCalls",
    "Trajectories",
    "Transcript",
    "Tree",
    "WithReference",
    "WithTools",
    "talked",
]
