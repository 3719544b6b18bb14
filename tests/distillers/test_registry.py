"""What every registered method must do; a method is tested here as soon as it is registered."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from yacs.config import CfgNode as CN

from mdistiller.dataset.batch import VIEWS
from mdistiller.distillers import Distiller, distiller_dict, method_defaults
from mdistiller.engine.split_update import TASK_LOSSES
from mdistiller.models import cifar_model_dict
from mdistiller.models.parameters import flat_parameters

# Settings that have no default for every network, or whose default is too large for a test.
SETTINGS = ["CRD.NCE.K", 16, "DCGD.GROUPS", "res56", "CRLD.TAU_W", 0.0, "CRLD.TAU_S", 0.0]
RUN = {"num_data": 64, "image_size": 32, "epochs": 240, "num_classes": 100}
EVERY_METHOD = pytest.mark.parametrize("name", sorted(distiller_dict))


def net(name: str, seed: int) -> torch.nn.Module:
    torch.manual_seed(seed)
    return cifar_model_dict[name][0](num_classes=100)


def build(name: str, teacher_seed: int = 1, student_seed: int = 0) -> Distiller:
    """resnet14 -> resnet8 with the method's defaults, in training mode."""
    cfg = CN({section: defaults.clone() for section, defaults in method_defaults.items()})
    cfg.merge_from_list(SETTINGS)
    method = distiller_dict[name]
    student, teacher = net("resnet8", student_seed), net("resnet14", teacher_seed)
    torch.manual_seed(student_seed + 2)
    return method(student, teacher, cfg, **{fact: RUN[fact] for fact in method.needs_run}).train()


def batch(step: int = 0) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(step)
    index = torch.randperm(RUN["num_data"], generator=generator)[:4]
    negatives = torch.randint(RUN["num_data"], (4, 16), generator=generator)
    return {
        "image": torch.randn(4, 3, 32, 32, generator=generator),
        **{name: torch.randn(4, 3, 32, 32, generator=generator) for name in VIEWS},
        "target": torch.randint(100, (4,), generator=generator),
        "epoch": 5,
        "index": index,
        "contrastive_index": torch.cat([index[:, None], negatives], dim=1),
    }


def sgd(distiller: Distiller) -> torch.optim.SGD:
    return torch.optim.SGD(distiller.get_learnable_parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)


def train_step(distiller: Distiller, optimizer: torch.optim.Optimizer, step: int = 0) -> dict[str, torch.Tensor]:
    _, losses = distiller(**batch(step))
    optimizer.zero_grad()
    sum(losses.values()).backward()
    optimizer.step()
    return {k: v.detach() for k, v in losses.items()}


def copies(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in module.state_dict().items()}


def changed(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> list[str]:
    assert before.keys() == after.keys()
    return [k for k, v in after.items() if not v.equal(before[k])]


@EVERY_METHOD
def test_losses_and_gradients(name):
    distiller = build(name)
    fields = batch()
    assert set(distiller.needs_batch) <= set(fields)
    logits, losses = distiller(**fields)
    assert logits.shape == (4, 100)
    assert losses and all(v.shape == () and v.isfinite() for v in losses.values())

    sum(losses.values()).backward()
    learnable = flat_parameters(distiller.get_learnable_parameters())
    trainable = {k: p for k, p in distiller.named_parameters() if p.requires_grad}
    assert not any(k.startswith("teacher.") for k in trainable)
    assert sorted(map(id, learnable)) == sorted(map(id, trainable.values())), "each of them, once"
    assert [k for k, p in trainable.items() if p.grad is None or not p.grad.isfinite().all()] == []
    assert distiller.get_extra_parameters() >= 0


@EVERY_METHOD
def test_the_teacher_does_not_change(name):
    distiller = build(name)
    built = copies(net("resnet14", seed=1))
    assert changed(built, distiller.teacher.state_dict()) == []
    train_step(distiller, sgd(distiller))
    moved = changed(built, distiller.teacher.state_dict())
    if distiller.teacher_in_train_mode:
        moved = [k for k in moved if not k.endswith(("running_mean", "running_var", "num_batches_tracked"))]
    assert moved == []
    assert distiller.teacher.training == distiller.teacher_in_train_mode
    assert not distiller.eval().teacher.training


def tensors(value: Any, path: str) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor in `value`: a tensor, or a list, tuple or dict that holds some."""
    if isinstance(value, torch.Tensor):
        yield path, value
    elif isinstance(value, (list, tuple)):
        for i, item in enumerate(value):
            yield from tensors(item, f"{path}[{i}]")
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from tensors(item, f"{path}.{key}")


def all_tensors(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Every tensor that a submodule holds, registered or not."""
    return {k: v for prefix, m in module.named_modules() for k, v in tensors(vars(m), prefix)}


@EVERY_METHOD
def test_the_state_dict_holds_what_training_changes(name):
    distiller = build(name)
    before = {k: v.clone() for k, v in all_tensors(distiller).items()}
    train_step(distiller, sgd(distiller))
    saved = {v.data_ptr() for v in distiller.state_dict().values()}
    after = all_tensors(distiller)
    moved = [k for k, v in after.items() if k not in before or not v.equal(before[k])]
    assert moved and [k for k in moved if after[k].data_ptr() not in saved] == []


@EVERY_METHOD
def test_the_losses_depend_on_the_teacher(name):
    first, second = ({k: v.item() for k, v in build(name, seed)(**batch())[1].items()} for seed in (1, 5))
    for key in first:
        if key in TASK_LOSSES:
            assert first[key] == second[key]
        else:
            assert first[key] != second[key], key
    both = {key in TASK_LOSSES for key in first} == {True, False}
    assert both == distiller_dict[name].distills  # AB and FSP distil in a stage alone; SIMKD has no task loss


@EVERY_METHOD
def test_save_load_step_is_bitwise_equal(name):
    distiller = build(name)
    optimizer = sgd(distiller)
    train_step(distiller, optimizer)
    file = io.BytesIO()
    torch.save({"model": distiller.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    state = torch.load(file, weights_only=True)

    copy = build(name, teacher_seed=7, student_seed=9)
    copy.load_state_dict(state["model"])
    copy_optimizer = sgd(copy)
    copy_optimizer.load_state_dict(state["optimizer"])
    assert train_step(distiller, optimizer, step=1) == train_step(copy, copy_optimizer, step=1)
    assert changed(distiller.state_dict(), copy.state_dict()) == []


@EVERY_METHOD
@pytest.mark.parametrize("precision", ["float64", "bfloat16"])
def test_precisions(name, precision):
    distiller, fields = build(name), batch()
    _, exact = build(name)(**batch())
    if precision == "float64":
        distiller.double()
        fields |= {name: fields[name].double() for name in ("image", *VIEWS)}
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
        _, losses = distiller(**fields)
        total = sum(losses.values())
    total.backward()
    assert all(p.grad.isfinite().all() for p in flat_parameters(distiller.get_learnable_parameters()))
    tolerance = {"rtol": 1e-3, "atol": 1e-5} if precision == "float64" else {"rtol": 0.5, "atol": 0.5}
    for key, value in losses.items():
        assert value.isfinite() and value.dtype != torch.bfloat16, key
        torch.testing.assert_close(value.float(), exact[key], **tolerance, msg=lambda m, key=key: f"{key}: {m}")


@EVERY_METHOD
def test_eval_mode_returns_logits(name):
    distiller = build(name).eval()
    with torch.no_grad():
        logits = distiller(image=batch()["image"])
    assert logits.shape == (4, 100) and logits.isfinite().all()


@EVERY_METHOD
def test_a_stage_trains_what_it_says_and_its_losses_depend_on_the_teacher(name):
    """In its stages before training, if a method has some; they leave nothing behind but what they have trained."""
    distiller, other = build(name), build(name, teacher_seed=5)
    required = {key: p.requires_grad for key, p in distiller.named_parameters()}
    for stage, of_other in zip(distiller.stages(), other.stages(), strict=True):
        distiller.turn_to(stage)
        before = copies(distiller.train())
        optimizer = torch.optim.SGD(stage.learnable, lr=0.01)
        losses = train_step(distiller, optimizer)
        assert losses and all(v.shape == () and v.isfinite() for v in losses.values())
        assert all(v != of_other.losses(**batch())[key] for key, v in losses.items())
        trained = {key for key, p in distiller.named_parameters() if id(p) in set(map(id, stage.parameters))}
        moved = set(changed(before, distiller.state_dict()))
        assert trained <= moved and all(p.grad.isfinite().all() for p in stage.parameters)
        assert all(key in trained or key.endswith(("running_mean", "running_var", "tracked")) for key in moved)
        assert not any(key.startswith("teacher.") for key in moved)
    distiller.turn_to(None)
    assert {key: p.requires_grad for key, p in distiller.named_parameters()} == required
