"""What every method inherits."""

import pytest

from mdistiller.distillers._base import FeatureDistiller


def test_a_feature_distiller_must_define_its_loss():
    with pytest.raises(NotImplementedError, match="FeatureDistiller defines no feature_loss"):
        FeatureDistiller.feature_loss(object.__new__(FeatureDistiller), {}, {})
