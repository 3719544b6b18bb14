"""`distill` by methods that deploy more than the student, on networks of the caller's own."""

import pytest
import torch
import torch.nn as nn
from torch.utils.data import DataLoader, TensorDataset

import mdistiller


def network(width):
    torch.manual_seed(width)
    return nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(),
        nn.Conv2d(width, 2 * width, 3, stride=2, padding=1), nn.BatchNorm2d(2 * width), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * width, 5),
    )  # fmt: skip


def top1(net, images, labels):
    with torch.no_grad():
        return float((net(images).argmax(1) == labels).float().mean()) * 100


@pytest.mark.parametrize("method", ["SIMKD", "NORM"])
def test_the_network_that_is_deployed_is_returned(method, tmp_path):
    torch.manual_seed(0)
    images, labels = torch.randn(40, 3, 16, 16), torch.arange(40) % 5
    data, student = TensorDataset(images, labels), network(4)
    result = mdistiller.distill(
        student, network(8), DataLoader(data, 8), DataLoader(data, 20), method=method, epochs=2, lr=0.01,
        verbose=False, ema=0.5, device="cpu",
    )  # fmt: skip
    assert result.student is not student
    assert top1(result.student, images, labels) == pytest.approx(result.accuracy, abs=1e-3)
    assert top1(result.ema, images, labels) == pytest.approx(result.ema_accuracy, abs=1e-3)
    assert student(images).shape == (40, 5) and not any(layer._forward_hooks for layer in student.modules())
    path = result.save(tmp_path / "deployed.pth")
    assert torch.load(path, weights_only=True).keys() == result.student.state_dict().keys()
