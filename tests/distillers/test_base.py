"""What every method inherits."""

import pytest
import torch
import torch.nn as nn

from mdistiller.distillers import Distiller
from mdistiller.distillers._base import FeatureDistiller, warm_up

from .._networks import Net


def test_a_feature_distiller_must_define_its_loss():
    with pytest.raises(NotImplementedError, match="FeatureDistiller defines no feature_loss"):
        FeatureDistiller.feature_loss(object.__new__(FeatureDistiller), {}, {})


@pytest.mark.parametrize(("epoch", "epochs", "factor"), [(1, 4, 0.25), (4, 4, 1.0), (9, 4, 1.0), (1, 0, 1.0)])
def test_the_warm_up_is_a_number_for_a_number_and_a_tensor_for_a_tensor(epoch, epochs, factor):
    assert warm_up(epoch, epochs) == factor and isinstance(warm_up(epoch, epochs), float)
    of_tensor = warm_up(torch.tensor(epoch), epochs)
    assert of_tensor.shape == () and of_tensor.dtype == torch.float32 and of_tensor.item() == factor


class Noting(Distiller):
    """Notes each call, and whether gradients were on."""

    def __init__(self):
        super().__init__(Net(), nn.Identity())
        self.calls = []

    def forward_train(self, image, target, **kwargs):
        self.calls.append(("forward", torch.is_grad_enabled()))
        logits, _ = self.student(image)
        return logits, {"ce": logits.sum()}

    def after_step(self):
        self.calls.append(("after", torch.is_grad_enabled()))


def test_after_step_is_called_by_forward_unless_the_caller_does():
    distiller, batch = Noting(), {"image": torch.rand(2, 3, 4, 4), "target": torch.zeros(2, dtype=torch.int64)}
    distiller(**batch)
    assert distiller.calls == [("forward", True), ("after", False)]
    distiller.calls.clear()
    with pytest.raises(KeyError), distiller.one_step():
        distiller(**batch)
        distiller(**batch)
        raise KeyError
    assert distiller.calls == [("forward", True)] * 2
    distiller(**batch)
    assert distiller.calls[-1] == ("after", False), "an error within a step leaves no trace"
    distiller.calls.clear()
    distiller.eval()(**batch)
    assert distiller.calls == []
