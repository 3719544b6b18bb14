"""What this project adds to detectron2: a meta-architecture, two backbones, their configuration."""

from .backbone import build_mobilenetv2_fpn_backbone, build_resnet_fpn_backbone_kd
from .config import add_distillation_cfg
from .rcnn import RCNNKD

__all__ = ["RCNNKD", "add_distillation_cfg", "build_mobilenetv2_fpn_backbone", "build_resnet_fpn_backbone_kd"]
