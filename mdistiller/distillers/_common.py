"""Helpers under the import path that they have in the original; they are defined in `_feature_maps.py`."""

from ._feature_maps import ConvReg, get_feat_shapes

__all__ = ["ConvReg", "get_feat_shapes"]
