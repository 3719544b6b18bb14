"""Which logits and temperatures are refused."""

import pytest
import torch

from mdistiller.distillers._logits import check_logits


def test_check_logits():
    check_logits(torch.zeros(2, 3), torch.zeros(2, 3), 0.1)
    with pytest.raises(ValueError, match=r"student logits \(2, 3\) and teacher logits \(2, 4\)"):
        check_logits(torch.zeros(2, 3), torch.zeros(2, 4), 4)
    with pytest.raises(ValueError, match="it is -1"):
        check_logits(torch.zeros(2, 3), torch.zeros(2, 3), -1)
