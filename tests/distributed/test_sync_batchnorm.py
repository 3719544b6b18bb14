"""BatchNorm over the ranks: which layers are replaced, and with what."""

import pytest
import torch
import torch.distributed as dist
import torch.nn as nn

from mdistiller.distributed.sync_batchnorm import HostSyncBatchNorm2d, synchronize_batchnorm

CPU, CUDA = torch.device("cpu"), torch.device("cuda")  # only names here: no tensor is on a GPU
KINDS = {"cpu": HostSyncBatchNorm2d, "cuda": nn.SyncBatchNorm}


def test_every_batchnorm2d_is_replaced_and_keeps_its_tensors_and_its_mode():
    inner = nn.Sequential(nn.BatchNorm2d(4, eps=1e-3, momentum=0.3), nn.BatchNorm1d(4))
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, affine=False).eval(), inner)
    own, names = {id(t) for t in (*net.parameters(), *net.buffers())}, list(net.state_dict())
    assert synchronize_batchnorm(net, CPU) is net
    assert [type(m) for m in (net[1], inner[0], inner[1])] == [HostSyncBatchNorm2d, HostSyncBatchNorm2d, nn.BatchNorm1d]
    assert (inner[0].eps, inner[0].momentum, net[1].affine) == (1e-3, 0.3, False)
    assert not net[1].training and inner[0].training
    assert {id(t) for t in (*net.parameters(), *net.buffers())} == own and list(net.state_dict()) == names


@pytest.mark.parametrize("device", [CPU, CUDA], ids=str)
def test_a_layer_that_stands_in_two_places_stays_one(device):
    shared = nn.BatchNorm2d(2)
    net = nn.ModuleList([nn.Sequential(shared, shared), nn.Sequential(shared)])
    synchronize_batchnorm(net, device)
    assert net[0][0] is net[0][1] is net[1][0] and type(net[0][0]) is KINDS[device.type]


@pytest.mark.parametrize("device", [CPU, CUDA], ids=str)
def test_a_batchnorm_by_itself_and_one_that_is_synchronised_already(device):
    layer = nn.BatchNorm2d(2).eval()
    synchronised = synchronize_batchnorm(layer, device)
    assert type(synchronised) is KINDS[device.type] and synchronised.weight is layer.weight
    assert not synchronised.training and list(synchronised.state_dict()) == list(layer.state_dict())
    assert synchronize_batchnorm(synchronised, device) is synchronised


def test_for_gpus_every_batchnorm_is_replaced():
    net = nn.Sequential(nn.BatchNorm1d(2), nn.BatchNorm2d(2), nn.BatchNorm3d(2), nn.GroupNorm(1, 2))
    synchronize_batchnorm(net, CUDA)
    assert [type(m) for m in net] == [nn.SyncBatchNorm] * 3 + [nn.GroupNorm]


def distiller() -> nn.Module:
    """A student, a frozen teacher and a layer of the method's."""
    net = nn.Module()
    net.student = nn.Sequential(nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2))
    net.teacher = nn.Sequential(nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2), nn.Sequential(nn.BatchNorm2d(2)))
    net.teacher.requires_grad_(False).eval()
    net.connector = nn.BatchNorm2d(2)
    return net


@pytest.mark.parametrize("device", [CPU, CUDA], ids=str)
def test_skipped_networks_keep_their_layers(device):
    net = distiller()
    before = list(net.teacher.modules())
    assert synchronize_batchnorm(net, device, skip=["teacher"]) is net
    assert all(a is b for a, b in zip(net.teacher.modules(), before, strict=True))
    assert [type(m) for m in (net.teacher[1], net.teacher[2][0])] == [nn.BatchNorm2d] * 2
    assert type(net.student[1]) is type(net.connector) is KINDS[device.type]


@pytest.mark.parametrize("device", [CPU, CUDA], ids=str)
def test_skip_takes_names_inside_and_several(device):
    net = distiller()
    synchronize_batchnorm(net, device, skip=("teacher.2", "connector"))
    assert type(net.teacher[2][0]) is type(net.connector) is nn.BatchNorm2d
    assert type(net.teacher[1]) is type(net.student[1]) is KINDS[device.type]
    with pytest.raises(AttributeError, match="techer"):
        synchronize_batchnorm(net, device, skip=["techer"])


@pytest.mark.parametrize("device", [CPU, CUDA], ids=str)
@pytest.mark.parametrize("whole", [False, True], ids=["a layer", "a module that holds layers"])
def test_what_a_skipped_network_shares_stays_as_it_is(device, whole):
    """It stays one layer, whose mode the frozen network sets."""
    net = distiller()
    shared = net.teacher[2][0]
    net.student.append(net.teacher[2] if whole else shared)
    synchronize_batchnorm(net, device, skip=["teacher"])
    own = net.student[2][0] if whole else net.student[2]
    assert own is net.teacher[2][0] is shared and type(shared) is nn.BatchNorm2d
    assert type(net.student[1]) is KINDS[device.type]
    net.student.train()
    net.teacher.eval()
    assert not own.training


def test_one_process_computes_what_batchnorm_computes():
    torch.manual_seed(0)
    plain, image = nn.BatchNorm2d(3), torch.randn(4, 3, 5, 5)
    synchronised = HostSyncBatchNorm2d.like(plain)
    assert torch.equal(synchronised(image), nn.BatchNorm2d(3)(image))
    assert torch.equal(synchronised.running_mean, plain.running_mean)  # shared


@pytest.fixture
def alone():
    """A process group of this process only, so that the layer takes its way through torch.distributed."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def settings() -> dict[str, nn.BatchNorm2d]:
    torch.manual_seed(0)
    layers = {
        "default": nn.BatchNorm2d(3),
        "own settings": nn.BatchNorm2d(3, eps=0.1, momentum=0.7),
        "mean of all batches": nn.BatchNorm2d(3, momentum=None),
        "no weights": nn.BatchNorm2d(3, affine=False),
        "no bias": nn.BatchNorm2d(3),
        "no statistics": nn.BatchNorm2d(3, track_running_stats=False),
    }
    layers["no bias"].register_parameter("bias", None)
    for layer in layers.values():
        for p in layer.parameters():
            nn.init.normal_(p)
    return layers


@pytest.mark.parametrize("name", settings())
def test_a_rank_alone_computes_what_batchnorm_computes(alone, name):
    """Output, gradients, statistics and evaluation, in float64 to 1e-12, for every setting of the layer."""
    plain, like = settings()[name].double(), HostSyncBatchNorm2d.like(settings()[name].double())
    assert list(like.state_dict()) == list(plain.state_dict())
    inputs = [torch.randn(4, 3, 5, 5, dtype=torch.float64) for _ in range(2)]
    results = []
    for layer in (plain, like):
        images = [x.clone().requires_grad_() for x in inputs]
        outputs = [layer(x) for x in images]
        sum((y * y.detach().cos()).sum() for y in outputs).backward()
        gradients = [t.grad for t in (*images, *layer.parameters())]
        results.append([*outputs, *gradients, *layer.buffers(), layer.eval()(inputs[0])])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("layers_too", [False, True], ids=["autocast", "whole network"])
def test_half_precision(alone, layers_too):
    """As BatchNorm2d does, it computes in float32 and returns bfloat16; a sum of 10,000 in bfloat16 loses terms."""
    torch.manual_seed(0)
    image = (3 + torch.randn(4, 3, 50, 50)).bfloat16()
    plain, like = nn.BatchNorm2d(3), HostSyncBatchNorm2d(3)
    if layers_too:
        plain, like = plain.bfloat16(), like.bfloat16()
    expected, found = plain(image), like(image)
    assert found.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(like.running_mean, plain.running_mean, rtol=1e-2, atol=1e-3)
    torch.testing.assert_close(like.running_var, plain.running_var, rtol=1e-2, atol=1e-3)
