"""The original's names for the helpers of its methods; they are defined in `_feature_maps.py`."""

from ._feature_maps import ConvReg, get_feat_shapes

__all__ = ["ConvReg", "get_feat_shapes"]
