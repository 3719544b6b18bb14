"""Every distillation method by its name.

A new method is one file in this folder. Either decorate its class with `@register(NAME, defaults)` and import it here,
or add it to `distiller_dict` at the end of this file and its hyper-parameters to `engine/cfg.py`.
"""

from ._base import Distiller, Vanilla, logits_of
from .AB import AB
from .ABKD import ABKD
from .AT import AT
from .CAT_KD import CAT_KD
from .CC import CC
from .CRD import CRD
from .CRLD import CRLD
from .CTKD import CTKD
from .DCGD import DCGD, DCGD_CE, DCGD_DKD, DCGD_KD
from .DHKD import DHKD
from .DIST import DIST
from .DKD import DKD
from .facts import RunFacts
from .FitNet import FitNet
from .FSP import FSP
from .FT import FT
from .ICKD import ICKD
from .KD import KD
from .KDSVD import KDSVD
from .LDRLD import LDRLD
from .MLKD import MLKD
from .NKD import NKD
from .NORM import NORM
from .NormKD import NormKD
from .NST import NST
from .OFD import OFD
from .PKT import PKT
from .registration import declare_defaults, distiller_dict, method_defaults, method_ranges, register
from .ReviewKD import ReviewKD
from .RKD import RKD
from .RLD import RLD
from .SDD import SDD_DKD, SDD_KD, SDD_NKD
from .SemCKD import SemCKD
from .SimKD import SimKD
from .SP import SP
from .SRRL import SRRL
from .stages import Stage
from .TTM import TTM
from .VID import VID
from .WKD import WKD
from .WTTM import WTTM

__all__ = [
    "AB",
    "ABKD",
    "AT",
    "CAT_KD",
    "CC",
    "CRD",
    "CRLD",
    "CTKD",
    "DCGD",
    "DCGD_CE",
    "DCGD_DKD",
    "DCGD_KD",
    "DHKD",
    "DIST",
    "DKD",
    "FSP",
    "FT",
    "ICKD",
    "KD",
    "KDSVD",
    "LDRLD",
    "MLKD",
    "NKD",
    "NORM",
    "NST",
    "OFD",
    "PKT",
    "RKD",
    "RLD",
    "SDD_DKD",
    "SDD_KD",
    "SDD_NKD",
    "SP",
    "SRRL",
    "TTM",
    "VID",
    "WKD",
    "WTTM",
    "Distiller",
    "FitNet",
    "NormKD",
    "ReviewKD",
    "RunFacts",
    "SemCKD",
    "SimKD",
    "Stage",
    "Vanilla",
    "declare_defaults",
    "distiller_dict",
    "logits_of",
    "method_defaults",
    "method_ranges",
    "register",
]

# Add a method without the `@register` decorator here, as in "MYKD": MyKD.
distiller_dict.update({})
