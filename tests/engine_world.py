"""What the tests of the engines share: the small world of ``tests/data/house``; its model does all things by chance."""

from pathlib import Path

from records import HOUSE, LIMITS, reward, world

MODEL = str(HOUSE / "model")
ROOT = Path(__file__).parent.parent

__all__ = ["HOUSE", "LIMITS", "MODEL", "ROOT", "reward", "world"]
