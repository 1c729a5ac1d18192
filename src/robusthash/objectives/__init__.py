"""Outputs -> loss terms: hashing objectives and the code memory."""

from robusthash.core.registry import discover
from robusthash.objectives.base import HashObjective, TrainFacts
from robusthash.objectives.centers import CSQ
from robusthash.objectives.memory import CodeMemory
from robusthash.objectives.pairwise import DPH, DPSH, HashNet

__all__ = ["CSQ", "DPH", "DPSH", "CodeMemory", "HashNet", "HashObjective", "TrainFacts"]

discover(__name__, __path__)
