"""The students' backbones, by the names that MODEL.BACKBONE.NAME accepts."""

from .fpn import build_mobilenetv2_fpn_backbone, build_resnet_fpn_backbone_kd

__all__ = ["build_mobilenetv2_fpn_backbone", "build_resnet_fpn_backbone_kd"]
