"""BatchNorm over the ranks: which layers are replaced, and with what."""

import torch
import torch.nn as nn

from mdistiller.distributed.sync_batchnorm import HostSyncBatchNorm2d, synchronize_batchnorm

CPU = torch.device("cpu")


def test_every_batchnorm2d_is_replaced_and_keeps_its_tensors_and_its_mode():
    inner = nn.Sequential(nn.BatchNorm2d(4, eps=1e-3, momentum=0.3), nn.BatchNorm1d(4))
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, affine=False).eval(), inner)
    own, names = {id(t) for t in (*net.parameters(), *net.buffers())}, list(net.state_dict())
    assert synchronize_batchnorm(net, CPU) is net
    assert [type(m) for m in (net[1], inner[0], inner[1])] == [HostSyncBatchNorm2d, HostSyncBatchNorm2d, nn.BatchNorm1d]
    assert (inner[0].eps, inner[0].momentum, net[1].affine) == (1e-3, 0.3, False)
    assert not net[1].training and inner[0].training
    assert {id(t) for t in (*net.parameters(), *net.buffers())} == own and list(net.state_dict()) == names


def test_a_layer_that_stands_in_two_places_stays_one():
    shared = nn.BatchNorm2d(2)
    net = nn.ModuleList([nn.Sequential(shared, shared), nn.Sequential(shared)])
    synchronize_batchnorm(net, CPU)
    assert net[0][0] is net[0][1] is net[1][0] and isinstance(net[0][0], HostSyncBatchNorm2d)


def test_one_process_computes_what_batchnorm_computes():
    torch.manual_seed(0)
    plain, image = nn.BatchNorm2d(3), torch.randn(4, 3, 5, 5)
    synchronised = HostSyncBatchNorm2d.like(plain)
    assert torch.equal(synchronised(image), nn.BatchNorm2d(3)(image))
    assert torch.equal(synchronised.running_mean, plain.running_mean)  # shared
