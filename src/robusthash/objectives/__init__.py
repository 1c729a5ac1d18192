"""Outputs -> loss terms: hashing objectives and the code memory."""

from robusthash.objectives.base import HashObjective, TrainFacts
from robusthash.objectives.centers import CSQ
from robusthash.objectives.cpah import CPAH
from robusthash.objectives.crossmodal import DCMH
from robusthash.objectives.dadh import DADH
from robusthash.objectives.daph import DAPH
from robusthash.objectives.memory import CodeMemory
from robusthash.objectives.pairwise import DPH, DPSH, HashNet
from robusthash.objectives.polarized import DPN

__all__ = [
    "CPAH",
    "CSQ",
    "DADH",
    "DAPH",
    "DCMH",
    "DPH",
    "DPN",
    "DPSH",
    "CodeMemory",
    "HashNet",
    "HashObjective",
    "TrainFacts",
]
