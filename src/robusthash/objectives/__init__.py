"""Outputs -> loss terms: hashing objectives and the code memory."""

from robusthash.objectives.agah import AGAH
from robusthash.objectives.base import CodeMemory, HashObjective, TrainFacts
from robusthash.objectives.centers import CSQ, DPN
from robusthash.objectives.cpah import CPAH
from robusthash.objectives.cross_modal import DCMH
from robusthash.objectives.dadh import DADH
from robusthash.objectives.daph import DAPH
from robusthash.objectives.dcph import DCPH
from robusthash.objectives.dgcpn import DGCPN
from robusthash.objectives.pairwise import DPH, DPSH, HashNet
from robusthash.objectives.similarity_matrices import DJSRH, DSAH, JDSH
from robusthash.objectives.ssah import SSAH
from robusthash.objectives.ucch import UCCH
from robusthash.objectives.ukd import UKD

__all__ = ["CPAH", "CSQ", "DADH", "DAPH", "DCMH", "DPH", "DPN", "DPSH"]
__all__ += ["CodeMemory", "HashNet", "HashObjective", "TrainFacts"]
__all__ += ["AGAH", "DCPH", "DGCPN", "DJSRH", "DSAH", "JDSH", "SSAH", "UCCH", "UKD"]
