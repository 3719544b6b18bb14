"""The context in which networks are in eval mode."""

import pytest
import torch

from mdistiller.models import cifar_model_dict
from mdistiller.models.eval_mode import eval_mode


def test_the_modes_are_restored_after_an_error():
    model = cifar_model_dict["resnet8"][0](num_classes=10).train()
    with pytest.raises(KeyError), eval_mode(model):
        assert not model.training and not torch.is_grad_enabled()
        raise KeyError
    assert model.training and torch.is_grad_enabled()
