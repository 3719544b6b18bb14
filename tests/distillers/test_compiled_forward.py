"""CompiledForward with torch's own backend, on a function of one layer."""

import shutil

import pytest
import torch

from mdistiller.distillers._compiled import CompiledForward


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile builds its kernels with a C++ compiler")
def test_a_graph_can_go_backward_as_often_as_it_says():
    """DOT goes backward twice. By default, torch's graph may give its memory away the first time."""
    layer = torch.nn.Linear(4, 4)

    def losses(image, target, epoch):
        x = layer(image).sin().exp()
        return x.square().mean(), epoch * (x.log() * target[:, None]).sum()

    batch = {"image": torch.rand(2, 4), "target": torch.arange(2), "epoch": 3}
    one, other = losses(**batch)
    expected = [torch.autograd.grad(loss, layer.weight, retain_graph=True)[0] for loss in (one, other)]
    compiled = CompiledForward(losses, [2], backward_passes=2)
    one, other = compiled(batch)
    found = [torch.autograd.grad(one, layer.weight, retain_graph=True)[0], torch.autograd.grad(other, layer.weight)[0]]
    torch.testing.assert_close(found, expected)


def test_which_batches_are_compiled():
    sure = False
    compiled = CompiledForward(lambda **_: None, [2, 5], ready=lambda: sure)
    batches = {n: {"target": torch.zeros(n)} for n in range(1, 6)}
    assert not any(map(compiled.takes, batches.values()))
    sure = True
    assert [n for n, batch in batches.items() if compiled.takes(batch)] == [2, 5]
