"""Outputs of networks, and their t-SNE."""

import numpy as np
import pytest
import torch

from mdistiller.analysis.outputs import collect, tsne
from mdistiller.errors import UserError
from mdistiller.models import GroupedStudent, cifar_model_dict


@pytest.fixture
def batches():
    images = torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    return [(images[:3], torch.tensor([0, 1, 2])), (images[3:], torch.tensor([3, 4]))]


def test_outputs_are_those_of_the_network_in_order(batches):
    net = cifar_model_dict["resnet8"][0](num_classes=10).eval()
    outputs = collect(net, batches)
    with torch.no_grad():
        logits, features = net(torch.cat([image for image, _ in batches]))
    assert outputs.logits == pytest.approx(logits.double().numpy(), abs=1e-5)
    assert outputs.pooled == pytest.approx(features["pooled_feat"].double().numpy(), abs=1e-5)
    assert [s.shape for s in outputs.stages] == [(5, 16), (5, 16), (5, 32), (5, 64)]
    assert outputs.stages[-1] == pytest.approx(features["pooled_feat"].double().numpy(), abs=1e-5)
    assert outputs.targets.tolist() == [0, 1, 2, 3, 4]


def test_a_head_is_chosen_by_name(batches):
    net = GroupedStudent(cifar_model_dict["resnet8"][0](num_classes=10), [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]).eval()
    with torch.no_grad():
        heads = net.forward_heads(torch.cat([image for image, _ in batches]))
    for head, chosen in ((None, "grouped"), ("single", "single")):
        assert collect(net, batches, head).logits == pytest.approx(heads[chosen].double().numpy(), abs=1e-5)
    with pytest.raises(UserError, match="unknown head 'sngle'; did you mean single"):
        collect(net, batches, "sngle")


def test_tsne_keeps_neighbours_together_and_repeats():
    rng = np.random.default_rng(0)
    features = np.concatenate([rng.normal(0, 1, (15, 8)), rng.normal(20, 1, (15, 8))])
    xy = tsne(features)
    distance = np.linalg.norm(xy[:, None] - xy[None], axis=-1) + 1e9 * np.eye(30)
    assert ((distance.argmin(axis=1) < 15) == (np.arange(30) < 15)).all()
    assert (tsne(features) == xy).all()
    with pytest.raises(UserError, match="four images at least, not 3"):
        tsne(features[:3])
