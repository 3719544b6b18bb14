"""What each method's loss takes of a training step, for `losses.py --share`.

A method runs as it is, but between networks whose outputs are kept: so its forward and backward pass is its loss and
its own layers. The step to which it is compared is that of the networks alone: both forward passes, the student's
backward pass from the cross-entropy, SGD.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mdistiller.distillers import Distiller, RunFacts, distiller_dict
from mdistiller.engine.cfg import load_cfg
from mdistiller.models import cifar_model_dict
from mdistiller.models.parameters import flat_parameters

PAIR = ("resnet56", "resnet20")
# The share of a step that no loss may exceed by itself.
TARGET = 0.1
_FACTS = RunFacts(50_000, 100, None, 32, 240, (0.5,) * 3, (0.25,) * 3)
_SETTINGS = ["SOLVER.BATCH_SIZE", "64", "CRD.NCE.K", "16384", "WKD.LOSS.WKD_LOGIT_WEIGHT", "200", "LOG.WANDB", "False"]


def methods() -> list[str]:
    """All but those without a teacher, and DCGD, whose loss is a base method's and its own branches'."""
    return [name for name, cls in distiller_dict.items() if cls.needs_teacher and not name.startswith("DCGD")]


def share(name: str, repeats: int, batch: int = 64) -> dict[str, float]:
    """Medians in ms of the step and of the loss, which alternate; of the method's own layers alone; and the shares."""
    torch.manual_seed(0)
    teacher, student = (cifar_model_dict[network][0](num_classes=100) for network in PAIR)
    cfg = load_cfg("configs/cifar100/kd.yaml", _SETTINGS)
    distiller = distiller_dict[name].from_run(copy.deepcopy(student), copy.deepcopy(teacher), cfg, _FACTS).train()
    fields = _batch(batch)
    step = _step(student, teacher.eval(), fields)
    loss = _loss(distiller, fields)
    loss()  # makes what the first step makes
    layers = list(_layers(distiller, loss))

    def of_layers() -> None:
        for layer, image in layers:
            layer(image.detach().requires_grad_(image.is_floating_point())).sum().backward()

    times: dict[str, list[float]] = {"step": [], "loss": [], "layers": []}
    for _ in range(repeats):
        for part, work in (("step", step), ("loss", loss), ("layers", of_layers)):
            start = time.perf_counter()
            work()
            times[part].append(1e3 * (time.perf_counter() - start))
    medians = {f"{part}_ms": statistics.median(own) for part, own in times.items()}
    whole = medians["step_ms"]
    return {**medians, "share": medians["loss_ms"] / whole, "layers_share": medians["layers_ms"] / whole}


def share_table(results: dict[str, dict[str, float]]) -> str:
    """The shares as text."""
    lines = [f"{'method':<10}{'step ms':>9}{'loss ms':>9}{'share':>8}{'own layers':>12}"]
    for name, r in results.items():
        more = "" if r["share"] - r["layers_share"] <= TARGET else "  above a tenth"
        lines.append(
            f"{name:<10}{r['step_ms']:>9.1f}{r['loss_ms']:>9.2f}{r['share']:>8.1%}{r['layers_share']:>12.1%}{more}"
        )
    return "\n".join(lines)


def _batch(count: int) -> dict[str, Any]:
    image, index = torch.randn(count, 3, 32, 32), torch.randperm(50_000)[:count]
    negatives = torch.randint(50_000, (count, 16384))
    return {
        "image": image, "image_weak": image, "image_strong": image.flip(0), "target": torch.randint(100, (count,)),
        "index": index, "contrastive_index": torch.cat([index[:, None], negatives], dim=1), "epoch": 30,
    }  # fmt: skip


def _step(student: nn.Module, teacher: nn.Module, fields: dict[str, Any]) -> Callable[[], None]:
    optimizer = torch.optim.SGD(student.parameters(), lr=0.01, momentum=0.9)
    student.train()

    def run() -> None:
        with torch.no_grad():
            teacher(fields["image"])
        F.cross_entropy(student(fields["image"])[0], fields["target"]).backward()
        optimizer.step()
        optimizer.zero_grad()

    return run


def _loss(distiller: Distiller, fields: dict[str, Any]) -> Callable[[], None]:
    """The method's forward and backward pass, down to the outputs of the networks."""
    for network, differentiable in ((distiller.student, True), (distiller.teacher, False)):
        kept = {}
        for name in ("image", "image_strong"):
            with torch.no_grad():
                kept[id(fields[name])] = _leaves(network(fields[name]), differentiable)
        # Also of the network that shares the student's layers, where a method deploys it with more behind it.
        deployed = (m for own in distiller.deployments().values() for m in own.modules() if type(m) is type(network))
        for own in {network, *(deployed if differentiable else ())}:
            own.forward = lambda image, kept=kept: kept[id(image)]  # type: ignore[method-assign]
    learnable = flat_parameters(distiller.get_learnable_parameters())

    def run() -> None:
        _, losses = distiller(**fields)
        torch.stack([loss.mean() for loss in losses.values()]).sum().backward()
        for p in learnable:
            p.grad = None

    return run


def _leaves(output: Any, differentiable: bool) -> Any:
    """`output` of new tensors."""
    if isinstance(output, Tensor):
        return output.detach().clone().requires_grad_(differentiable)
    if isinstance(output, dict):
        return {key: _leaves(value, differentiable) for key, value in output.items()}
    return type(output)(_leaves(value, differentiable) for value in output)


def _layers(distiller: Distiller, loss: Callable[[], None]) -> Iterator[tuple[nn.Module, Tensor]]:
    """The method's own layers, convolutions, linear layers and normalisations, with their inputs in `loss`."""
    found: list[tuple[nn.Module, Tensor]] = []
    networks = {id(m) for name in ("student", *distiller.frozen) for m in distiller.get_submodule(name).modules()}
    own = [m for m in distiller.modules() if id(m) not in networks and any(True for _ in m.parameters(recurse=False))]
    hooks = [m.register_forward_pre_hook(lambda m, args: found.append((m, args[0]))) for m in own if not _is_top(m)]
    loss()
    for hook in hooks:
        hook.remove()
    yield from found


def _is_top(module: nn.Module) -> bool:
    """Whether it is the distiller itself, whose own parameters are no layer's."""
    return isinstance(module, Distiller)
