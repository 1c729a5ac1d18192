"""Outputs -> loss terms: hashing objectives and the code memory."""

from robusthash.objectives.base import HashObjective, TrainFacts
from robusthash.objectives.code_memory import CodeMemory
from robusthash.objectives.cpah import CPAH
from robusthash.objectives.cross_modal import DCMH
from robusthash.objectives.csq import CSQ
from robusthash.objectives.dadh import DADH
from robusthash.objectives.daph import DAPH
from robusthash.objectives.dpn import DPN
from robusthash.objectives.pairwise import DPH, DPSH, HashNet

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
