"""Outputs -> loss terms: hashing objectives and the code memory."""

from robusthash.objectives.base import CodeMemory, HashObjective, TrainFacts
from robusthash.objectives.centers import CSQ, DPN
from robusthash.objectives.cpah import CPAH
from robusthash.objectives.cross_modal import DCMH
from robusthash.objectives.dadh import DADH
from robusthash.objectives.daph import DAPH
from robusthash.objectives.pairwise import DPH, DPSH, HashNet

__all__ = ["CPAH", "CSQ", "DADH", "DAPH", "DCMH", "DPH", "DPN", "DPSH"]
__all__ += ["CodeMemory", "HashNet", "HashObjective", "TrainFacts"]
