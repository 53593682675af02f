"""Graders measure what a completion is worth and know nothing of algorithms."""

from gruppo.graders.grade import Abstained, Grading, text_of
from gruppo.graders.http import HttpScorer
from gruppo.graders.images import ImageScore
from gruppo.graders.judge import Margin, WinRate
from gruppo.graders.math import MathAnswer
from gruppo.graders.ranking import NDCGAt, Ranking, RecallAt
from gruppo.graders.reward_model import RewardModel
from gruppo.graders.sources import build, describe
from gruppo.graders.text import Budget, Choice, Exact, Matches, Number, SoftOverlong, Tags, characters, soft_overlong, tokens
from gruppo.graders.trl import TrlRewards
from gruppo.graders.vision import VisionJudge

__all__ = [
    "Abstained",
    "Budget",
    "Choice",
    "Exact",
    "Grading",
    "HttpScorer",
    "ImageScore",
    "Margin",
    "Matches",
    "MathAnswer",
    "NDCGAt",
    "Number",
    "Ranking",
    "RecallAt",
    "RewardModel",
    "SoftOverlong",
    "Tags",
    "TrlRewards",
    "VisionJudge",
    "WinRate",
    "build",
    "characters",
    "describe",
    "soft_overlong",
    "text_of",
    "tokens",
]
