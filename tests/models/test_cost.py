"""What a network costs."""

import torch.nn as nn

from mdistiller.models.cost import count_parameters


def test_count_parameters():
    assert count_parameters(nn.Linear(3, 4)) == 16
