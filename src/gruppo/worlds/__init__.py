"""Embedded tasks: a seeded generator, a verifier and a tiny trained base model each."""

from gruppo.worlds.arithmetic import ARITHMETIC
from gruppo.worlds.catalog import CATALOG
from gruppo.worlds.countdown import COUNTDOWN
from gruppo.worlds.glyphs import GLYPHS, PictureWorld
from gruppo.worlds.safety import SAFETY
from gruppo.worlds.search import SEARCH
from gruppo.worlds.world import World

WORLDS: dict[str, World | PictureWorld] = {w.name: w for w in (ARITHMETIC, CATALOG, COUNTDOWN, GLYPHS, SAFETY, SEARCH)}

__all__ = ["WORLDS", "PictureWorld", "World"]
