"""A small network and the settings of its optimizer."""

import torch
import torch.nn as nn
from yacs.config import CfgNode as CN

from mdistiller.engine.cfg import CFG


def config(**solver: object) -> CN:
    cfg = CFG.clone()
    cfg.SOLVER.update({"LR": 0.1, "MOMENTUM": 0.9, "WEIGHT_DECAY": 0.01} | solver)
    return cfg


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3))
