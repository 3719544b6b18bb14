"""The fake GPU: its numbers are the CPU's, its backward pass is torch's, and it tells which copies wait."""

import copy

import pytest
import torch
import torch.nn as nn

from mdistiller.distillers import distiller_dict

from ..distillers.test_registry import batch, build
from ._fake_gpu import GPU, FakeGPU, GPUTensor, WrongDevice


def step(distiller, fields):
    """The losses of a step by itself; afterwards the parameters have their gradients."""
    _, losses = distiller(**fields)
    sum(losses.values()).backward()
    return losses


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in ("CRD", "DCGD_KD") else pytest.mark.slow) for n in sorted(distiller_dict)]
)
def test_losses_gradients_and_buffers_are_those_of_the_cpu(name):
    theirs, ours = build(name), build(name)
    losses = step(theirs, batch())
    with FakeGPU():
        ours.to("cuda")
        fields = {k: v.to("cuda") if isinstance(v, torch.Tensor) else v for k, v in batch().items()}
        found = {key: loss.held for key, loss in step(ours, fields).items()}
        pairs = list(zip(theirs.get_learnable_parameters(), ours.get_learnable_parameters(), strict=True))
        assert all(type(q.grad) is GPUTensor and q.grad.device == q.device == GPU for _, q in pairs)
        gradients = [(p.grad, q.grad.held) for p, q in pairs]
        state = {key: tensor.held for key, tensor in ours.state_dict().items()}
    torch.testing.assert_close(found, losses, rtol=1e-5, atol=1e-6)
    for theirs_, ours_ in gradients:
        torch.testing.assert_close(ours_, theirs_, rtol=1e-4, atol=1e-5 * float(theirs_.abs().max() + 1))
    for key, tensor in theirs.state_dict().items():
        torch.testing.assert_close(state[key], tensor, rtol=1e-5, atol=1e-6, msg=key)


class Twice(torch.autograd.Function):
    """(2 x, a constant), which is used by none; its backward pass gets zeros for that."""

    @staticmethod
    def forward(ctx, x):
        constant = torch.ones_like(x)
        return 2 * x, constant

    @staticmethod
    def backward(ctx, grad, of_constant):
        assert of_constant is not None and not of_constant.any()
        return 2 * grad


def forked(x):
    """Uses a tensor several times, broadcasts, and takes one of several outputs."""
    first, _, third = x.chunk(3, dim=1)
    doubled, _ = Twice.apply(first * third + x.mean())
    return (doubled * first.sum(dim=0)).square().sum()


def test_its_backward_pass_is_that_of_torch():
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    (forked(x) + forked(x)).backward()
    with FakeGPU():
        y = x.detach().to("cuda").requires_grad_()
        forked(y).backward()
        forked(y).backward()  # is added to the first
        found = y.grad.held
    torch.testing.assert_close(found, x.grad)


def test_autocast_and_its_loss_scale_are_those_of_a_gpu():
    with FakeGPU() as gpu:
        layer = nn.Linear(3, 2).to("cuda")
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, fused=True)
        scaler = torch.amp.GradScaler("cuda", init_scale=8.0)
        x = torch.ones(4, 3).to("cuda")
        gpu.waits.clear()
        before = layer.weight.held.clone()
        with torch.autocast("cuda", torch.float16):
            assert layer(x).dtype == torch.float16
            loss = layer(x).float().square().mean()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        assert gpu.waits == []
    assert not torch.equal(layer.weight.held, before)


def test_an_optimizer_that_is_not_fused_waits_for_the_scaler():
    with FakeGPU() as gpu:
        layer = nn.Linear(3, 2).to("cuda")
        optimizer, scaler = torch.optim.SGD(layer.parameters(), lr=0.1), torch.amp.GradScaler("cuda")
        scaler.scale(layer(torch.ones(4, 3).to("cuda")).mean()).backward()
        gpu.waits.clear()
        scaler.step(optimizer)
    assert [wait.what for wait in gpu.waits] == ["aten._local_scalar_dense.default waits for the GPU"]


COPIES = {
    "from memory that is not pinned": lambda x: x.to("cuda", non_blocking=True),
    "without non_blocking": lambda x: x.pin_memory().to("cuda"),
    "": lambda x: x.pin_memory()[1:].to("cuda", non_blocking=True),
    " from memory that is not pinned": lambda x: torch.zeros(3, device="cuda").copy_(x, non_blocking=True),
    "of numbers": lambda x: torch.tensor([1.0, 2.0], device="cuda"),
    "of nothing": lambda x: torch.full((2,), 1.0, device="cuda") + 1.0,
    "in memory made pinned": lambda x: torch.empty(3, pin_memory=True).copy_(x).to("cuda", non_blocking=True),
}
FREE = {"", "of nothing", "in memory made pinned"}


@pytest.mark.parametrize("why", COPIES)
def test_which_copies_to_the_gpu_wait(why):
    with FakeGPU() as gpu:
        COPIES[why](torch.ones(3))
    assert len(gpu.waits) == (why not in FREE)
    assert {wait.file for wait in gpu.waits} <= {"tests/rehearsal/test_fake_gpu.py"}


READINGS = {
    "float": lambda x: float(x[0]),
    "bool": lambda x: bool(x[0] > 0),
    "tolist": lambda x: x.tolist(),
    "cpu": lambda x: x.cpu(),
    "repr": repr,
    "nonzero": lambda x: x.nonzero(),
    "a mask": lambda x: x[x > 0],
    "set to a tensor by a mask": lambda x: x.index_put_((x > 0,), x.sum()),
    "set to a number": lambda x: x.__setitem__(torch.zeros(1, dtype=torch.int64, device="cuda"), 1.0),
    "an index of the CPU": lambda x: x[torch.zeros(1, dtype=torch.int64)],
    "equal": lambda x: torch.equal(x, x),
    "cholesky": lambda x: torch.linalg.cholesky(x.diag()),
    "solve": lambda x: torch.linalg.solve(x.diag(), x),
    "svd": lambda x: torch.linalg.svdvals(x.diag()),
    "pinv": lambda x: torch.linalg.pinv(x.diag()),
    "matrix_exp": lambda x: torch.matrix_exp(x.diag()),
    "multinomial": lambda x: torch.multinomial(x, 2),
    "normal": lambda x: torch.normal(x, x),
    "histc": lambda x: torch.histc(x, 4),
}
NO_READINGS = {
    "isfinite": torch.isfinite,
    "deepcopy": copy.deepcopy,
    "set to a number by a mask": lambda x: x.__setitem__(x > 0, 2.0),
    "where": lambda x: torch.where(x > 0, x, 0),
    "an index": lambda x: x[x.argsort()],
    "set to a tensor": lambda x: x.__setitem__(x.argsort(), x.clone()),
    "a number": lambda x: 2 * x + 1,
    "a slice": lambda x: x[1:].sum(),
}


@pytest.mark.parametrize("what", [*READINGS, *NO_READINGS])
def test_which_readings_wait(what):
    with FakeGPU() as gpu:
        x = torch.ones(3, device="cuda")
        (READINGS | NO_READINGS)[what](x)
    assert len(gpu.waits) == (what in READINGS), gpu.waits


MIXED = {
    "sum": lambda x, y: x + y,
    "into the CPU's": lambda x, y: y.add_(x),
    "index of the CPU's": lambda x, y: y[x.argsort()],
    "set to the CPU's": lambda x, y: x.index_put_((x.argsort(),), y),
    "list": lambda x, y: torch._foreach_add_([x], [y]),
    "out": lambda x, y: torch.add(x, x, out=y),
}


@pytest.mark.parametrize("what", MIXED)
def test_tensors_of_two_devices_fail(what):
    with FakeGPU(), pytest.raises(WrongDevice, match=r"^tests/rehearsal/test_fake_gpu.py:\d+: aten"):
        MIXED[what](torch.ones(3, device="cuda"), torch.ones(3))


def test_nothing_of_it_is_left():
    before = torch.cuda.is_available(), torch.Tensor.pin_memory, torch.backends.cudnn.enabled
    with FakeGPU():
        assert torch.cuda.is_available()
    assert (torch.cuda.is_available(), torch.Tensor.pin_memory, torch.backends.cudnn.enabled) == before
    assert not torch.__future__.get_swap_module_params_on_conversion()
    assert type(torch.ones(2) + 1) is torch.Tensor
