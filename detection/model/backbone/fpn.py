"""Feature pyramids p2..p6 on the students' networks."""

from __future__ import annotations

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY
from detectron2.modeling.backbone.fpn import FPN, LastLevelMaxPool, build_resnet_fpn_backbone

from .mobilenetv2 import MobileNetV2


@BACKBONE_REGISTRY.register()
def build_resnet_fpn_backbone_kd(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """detectron2's ResNet with FPN, under the name that the published configs give it."""
    return build_resnet_fpn_backbone(cfg, input_shape)


@BACKBONE_REGISTRY.register()
def build_mobilenetv2_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """MobileNetV2 with FPN; `cfg.MODEL.MOBILENETV2` and `cfg.MODEL.BACKBONE.FREEZE_AT` describe the network."""
    network = MobileNetV2(
        input_shape.channels,
        cfg.MODEL.MOBILENETV2.OUT_FEATURES,
        norm=cfg.MODEL.MOBILENETV2.NORM,
        freeze_at=cfg.MODEL.BACKBONE.FREEZE_AT,
    )
    return FPN(
        bottom_up=network,
        in_features=cfg.MODEL.FPN.IN_FEATURES,
        out_channels=cfg.MODEL.FPN.OUT_CHANNELS,
        norm=cfg.MODEL.FPN.NORM,
        top_block=LastLevelMaxPool(),
        fuse_type=cfg.MODEL.FPN.FUSE_TYPE,
    )
