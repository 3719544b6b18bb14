"""CRD's loss, memory and widths against loops, numbers computed by hand and finite differences."""

from __future__ import annotations

import math
import sys

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from yacs.config import CfgNode as CN

from mdistiller.distillers import distiller_dict, method_defaults
from mdistiller.distillers.CRD import ContrastMemory, _last_places, nce_loss
from mdistiller.engine.cfg import CFG, check_cfg
from mdistiller.errors import UserError

from .oracles.crd import naive_nce, naive_update, naive_z

DENSE, GATHERED = 20, 300  # bank sizes for which K = 5 uses _dense_scores or _gathered_scores


def draw(num_data: int, dtype: torch.dtype = torch.float64, batch: int = 4, dim: int = 3) -> tuple[Tensor, ...]:
    """Embeddings, bank, a contrastive_index of K = 5 in which some entries occur twice."""
    g = torch.Generator().manual_seed(num_data)
    embed = F.normalize(torch.randn(batch, dim, generator=g, dtype=torch.float64), dim=1)
    bank = F.normalize(torch.randn(num_data, dim, generator=g, dtype=torch.float64), dim=1)
    index = torch.randint(0, num_data, (batch, 6), generator=g)
    index[0, 2] = index[0, 3]
    index[1, 4] = index[1, 0]
    return embed.to(dtype), bank.to(dtype), index


def scalar(value: float, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.tensor(value, dtype=dtype)


@pytest.mark.parametrize("chunk", [1, 50, 2**22])
@pytest.mark.parametrize("num_data", [DENSE, GATHERED])
def test_loss_and_gradient_agree_with_the_loops(num_data, chunk, monkeypatch):
    # The package's attribute CRD is the class, not this module.
    monkeypatch.setattr(sys.modules["mdistiller.distillers.CRD"], "_CHUNK", chunk)
    embed, bank, index = draw(num_data)
    ours, theirs = embed.clone().requires_grad_(), embed.clone().requires_grad_()
    value = nce_loss(ours, bank, index, scalar(0.3), scalar(7.0))
    expected = naive_nce(theirs, bank, index, 0.3, 7.0)
    (3 * value).backward()
    (3 * expected).backward()
    assert value.shape == ()
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("num_data", [DENSE, GATHERED])
def test_gradcheck(num_data):
    embed, bank, index = draw(num_data)
    assert torch.autograd.gradcheck(
        lambda v: nce_loss(v, bank, index, scalar(0.3), scalar(7.0)), embed.requires_grad_()
    )


def test_loss_by_hand():
    """Scores 1 and 0 at z = e give p = 1 and 1/e; K/N = 1/2: log(1.5/1) + log((0.5 + 0.36788)/0.5) = 0.95691."""
    value = nce_loss(
        scalar([[1.0, 0.0]]), torch.eye(2, dtype=torch.float64), torch.tensor([[0, 1]]), scalar(1.0), scalar(math.e)
    )
    assert value.item() == pytest.approx(math.log(1.5) + math.log(1 + 2 / math.e), abs=5e-7)
    assert value.item() == pytest.approx(0.95691, abs=5e-6)


def test_finite_where_exponentials_overflow():
    """A score of -1 at temperature 0.001 is exp(-1000): the positive costs 1000 + log(z K/N), not infinity."""
    embed = torch.tensor([[-1.0, 0.0]], requires_grad=True)
    bank = torch.eye(2)
    value = nce_loss(embed, bank, torch.tensor([[0, 1]]), torch.tensor(0.001), torch.tensor(2.0))
    value.backward()
    # z K/N = 1: 1000 for the positive, log 2 for the negative.
    assert value.item() == pytest.approx(1000 + math.log(2), rel=1e-6)
    assert embed.grad.tolist() == [[pytest.approx(-1000), pytest.approx(500)]]


class _LargestTensor(TorchDispatchMode):
    """Records the number of elements of the largest tensor that any operation returned."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self.elements = max(self.elements, out.numel())
        return out


def test_no_tensor_of_batch_by_negatives_by_width():
    embed, bank = torch.randn(16, 64, requires_grad=True), torch.randn(1000, 64)
    index = torch.randint(0, 1000, (16, 513))
    with _LargestTensor() as largest:
        nce_loss(embed, bank, index, torch.tensor(1.0), torch.tensor(1000.0)).backward()
    assert largest.elements == 1000 * 64  # the bank itself, transposed; 16 * 513 * 64 would be 525,312


def memory(num_data: int = DENSE, dtype: torch.dtype = torch.float64, momentum: float = 0.5) -> ContrastMemory:
    torch.manual_seed(1)
    module = ContrastMemory(3, num_data, num_negatives=5, temperature=0.25, momentum=momentum).to(dtype)
    for bank in (module.memory_v1, module.memory_v2):
        bank.copy_(F.normalize(bank, dim=1))
    return module


def test_memory_agrees_with_the_loops():
    """Two steps: loss of both networks, Z set once, banks updated."""
    module = memory()
    bank_s, bank_t = module.memory_v1.clone(), module.memory_v2.clone()
    constants = None
    for step in range(2):
        v_s, _, contrastive = draw(DENSE)
        v_t = v_s.roll(1 + step, 0)
        index = contrastive[:, 0]
        if constants is None:
            constants = naive_z(v_s, bank_t, contrastive, 0.25), naive_z(v_t, bank_s, contrastive, 0.25)
        before = module.memory_v1.clone(), module.memory_v2.clone()
        value = module(v_s, v_t, index, contrastive)
        assert torch.equal(module.memory_v1, before[0]) and torch.equal(module.memory_v2, before[1])  # not yet
        module.update()
        expected = naive_nce(v_s, bank_t, contrastive, 0.25, constants[0])
        expected += naive_nce(v_t, bank_s, contrastive, 0.25, constants[1])
        bank_s, bank_t = naive_update(bank_s, v_s, index, 0.5), naive_update(bank_t, v_t, index, 0.5)
        torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)
        torch.testing.assert_close(module.memory_v1, bank_s, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(module.memory_v2, bank_t, rtol=1e-12, atol=1e-14)
        assert module.params.tolist() == [5, 0.25, *(pytest.approx(z, rel=1e-12) for z in constants), 0.5]


def test_update_by_hand():
    """0.5 (1, 0, 0) + 0.5 (0, 1, 0), at unit length. If an image is in the batch twice, the last one counts."""
    module = memory()
    module.memory_v1[3] = scalar([1.0, 0.0, 0.0])
    views = scalar([[0.0, 0.0, 1.0], [0.0, 0.0, 1.0], [0.0, 1.0, 0.0]])
    before = module.memory_v1.clone()
    index = torch.tensor([3, 7, 3])
    module._update(module.memory_v1, views, index, _last_places(index))
    assert module.memory_v1[3].tolist() == [pytest.approx(math.sqrt(0.5)), pytest.approx(math.sqrt(0.5)), 0.0]
    changed = (module.memory_v1 != before).any(1).nonzero().flatten().tolist()
    assert changed == [3, 7]


def test_z_follows_the_loaded_state():
    v, _, contrastive = draw(DENSE)
    trained, fresh = memory(), memory()
    untouched = fresh.state_dict()
    untouched = {k: x.clone() for k, x in untouched.items()}
    for module in (trained, fresh):
        if module is fresh:
            fresh.load_state_dict(trained.state_dict())
        module(v, v, contrastive[:, 0], contrastive)
        module.update()
    assert torch.equal(fresh.params, trained.params)
    fresh.load_state_dict(untouched)
    assert fresh.params[2] == -1
    fresh(v, v, contrastive[:, 0], contrastive)
    fresh.update()
    assert torch.equal(fresh.params, trained.params)


class Network(nn.Module):
    """A 1x1 convolution to `width` channels, average-pooled, then a linear layer to 10 logits."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, width, 1), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> tuple[Tensor, dict]:
        pooled = self.conv(x).mean((2, 3))
        return self.fc(pooled), {"pooled_feat": pooled}


def config(**changes: object) -> CN:
    cfg = CN({"CRD": method_defaults["CRD"].clone()})
    cfg.merge_from_list(["CRD.NCE.K", 7, "CRD.FEAT.DIM", 5])
    cfg.merge_from_list([x for key, value in changes.items() for x in (f"CRD.{key.replace('__', '.')}", value)])
    return cfg


def build(student: int = 6, teacher: int = 12, **changes: object) -> nn.Module:
    torch.manual_seed(2)
    return distiller_dict["CRD"](Network(student), Network(teacher), config(**changes), num_data=40).train()


def batch() -> dict:
    g = torch.Generator().manual_seed(3)
    contrastive = torch.randint(0, 40, (4, 8), generator=g)
    return {
        "image": torch.randn(4, 3, 8, 8, generator=g),
        "target": torch.randint(0, 10, (4,), generator=g),
        "index": contrastive[:, 0],
        "contrastive_index": contrastive,
        "epoch": 1,
    }


def test_widths_are_read_from_the_networks():
    distiller = build()
    assert distiller.embed_s.linear.weight.shape == (5, 6)
    assert distiller.embed_t.linear.weight.shape == (5, 12)
    assert build(FEAT__STUDENT_DIM=6).embed_s.linear.in_features == 6


@pytest.mark.parametrize("key, own", [("STUDENT_DIM", 6), ("TEACHER_DIM", 12)])
def test_a_width_that_contradicts_the_network_is_refused(key, own):
    with pytest.raises(UserError, match=rf"CRD.FEAT.{key} is 128.* {own} channels"):
        build(**{f"FEAT__{key}": 128})


@pytest.mark.parametrize(
    "key, value", [("K", 0), ("TEMPERATURE", 0.0), ("TEMPERATURE", math.nan), ("MOMENTUM", 1.0), ("MOMENTUM", -0.5)]
)
def test_values_out_of_range_are_refused(key, value):
    cfg = CFG.clone()
    cfg.CRD.NCE[key] = value
    with pytest.raises(UserError, match=f"CRD.NCE.{key} must be"):
        check_cfg(cfg)


def test_every_parameter_learns_and_losses_are_scalars():
    distiller = build()
    _, losses = distiller(**batch())
    assert {name: loss.shape for name, loss in losses.items()} == {"loss_ce": (), "loss_kd": ()}
    sum(losses.values()).backward()
    learnable = distiller.get_learnable_parameters()
    assert len(learnable) == len(list(distiller.student.parameters())) + 4
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in learnable)
    assert distiller.get_extra_parameters() == (6 * 5 + 5) + (12 * 5 + 5) + 2 * 40 * 5 + 5


def test_autocast_keeps_scores_in_float32():
    distiller, plain = build(), build()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, losses = distiller(**batch())
    sum(losses.values()).backward()
    _, expected = plain(**batch())
    assert losses["loss_kd"].dtype == torch.float32
    # Three digits of bfloat16 in the embeddings, times 1/0.07 in the scores.
    torch.testing.assert_close(losses["loss_kd"], expected["loss_kd"], rtol=0.05, atol=0)
    assert distiller.contrast.memory_v1.dtype == torch.float32


def test_resumes_bitwise_from_the_state_dict():
    distiller, resumed = build(), build()
    distiller(**batch())
    resumed.load_state_dict(distiller.state_dict())
    (_, ours), (_, theirs) = distiller(**batch()), resumed(**batch())
    assert torch.equal(ours["loss_kd"], theirs["loss_kd"])
    assert torch.equal(distiller.contrast.memory_v1, resumed.contrast.memory_v1)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("num_data", [DENSE, GATHERED])
def test_the_gpu_agrees(num_data):
    embed, bank, index = draw(num_data)
    tensors = embed, bank, index, scalar(0.3), scalar(7.0)
    torch.testing.assert_close(nce_loss(*(t.cuda() for t in tensors)).cpu(), nce_loss(*tensors), rtol=1e-12, atol=0)


def test_a_step_that_is_skipped_leaves_the_memory_as_it_is():
    """Without `update`, the next step is the first one again: it computes Z once more, from its own batch."""
    v_s, _, contrastive = draw(DENSE)
    skipped, plain = memory(), memory()
    before = {k: x.clone() for k, x in skipped.state_dict().items()}
    skipped(v_s * math.nan, v_s, contrastive[:, 0], contrastive)
    assert all(torch.equal(x, before[k]) for k, x in skipped.state_dict().items())
    values = []
    for module in (skipped, plain):
        values.append(module(v_s, v_s.roll(1, 0), contrastive[:, 0], contrastive))
        module.update()
    assert torch.equal(*values) and torch.equal(skipped.params, plain.params) and skipped.params[2] > 0
    assert torch.equal(skipped.memory_v1, plain.memory_v1)


def test_a_step_s_memory_is_updated_after_it_by_the_engine_or_by_forward():
    """A loop that knows nothing of `after_step` has the banks of one that calls it."""
    engine, plain = build(), build()
    before = engine.contrast.memory_v1.clone()
    with engine.one_step():
        engine(**batch())
    assert torch.equal(engine.contrast.memory_v1, before) and not engine.contrast.z_known()
    engine.after_step()
    plain(**batch())
    for key, value in engine.contrast.state_dict().items():
        assert torch.equal(value, plain.contrast.state_dict()[key])
    assert not torch.equal(engine.contrast.memory_v1, before)
    updated = engine.contrast.memory_v1.clone()
    engine.after_step()  # once only
    assert torch.equal(engine.contrast.memory_v1, updated)
