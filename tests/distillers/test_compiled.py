"""Every registered method compiled: the gradients are those of the plain step, and one graph serves all epochs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from yacs.config import CfgNode as CN

from mdistiller.dataset.batch import VIEWS
from mdistiller.distillers import DCGD, Distiller, RunFacts, distiller_dict, method_defaults
from mdistiller.models import cifar_model_dict

# Without code generation, but with everything that moves operations: autograd's graphs, in which nothing is in place.
BACKEND = "aot_eager"
IMAGES, NEGATIVES = 4, 16
# Fewer and more entries than FEAT.DIM (128), and more than 32 (K + 1), where CRD gathers rows of its bank.
BANKS = (64, 300, 600)
# (method, DCGD's base method, number of images); a few seconds each.
CASES = [
    *((name, "KD", 64) for name in sorted(distiller_dict) if name != "CRD"),
    *(("CRD", "KD", num_data) for num_data in BANKS),
    ("DCGD", "CRD", 64),
]
QUICK = ("CRD", "KD", 64)


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def build(name: str, base: str = "KD", num_data: int = 64) -> Distiller:
    cfg = CN({section: defaults.clone() for section, defaults in method_defaults.items()})
    cfg.merge_from_list(["CRD.NCE.K", NEGATIVES, "DCGD.GROUPS", "res56", "DCGD.BASE", base])
    torch.manual_seed(0)
    student, teacher = (cifar_model_dict["resnet8"][0](num_classes=100) for _ in range(2))
    facts = RunFacts(num_data, 100, None, 32, 240, None, None)
    return distiller_dict[name].from_run(student, teacher, cfg, facts).train()


def batch(step: int, num_data: int, images: int = IMAGES) -> dict:
    g = torch.Generator().manual_seed(step)
    index = torch.randperm(num_data, generator=g)[:images]
    negatives = torch.randint(num_data, (images, NEGATIVES), generator=g)
    return {
        **{name: torch.randn(images, 3, 32, 32, generator=g) for name in ("image", *VIEWS)},
        "target": torch.randint(100, (images,), generator=g),
        "index": index,
        "contrastive_index": torch.cat([index[:, None], negatives], dim=1),
    }


def gradients(distiller: Distiller, num_data: int, steps: int = 3) -> list[dict[str, torch.Tensor]]:
    """Of every step, by parameter; an update follows each. Epoch 2 begins with the last one."""
    optimizer = torch.optim.SGD(distiller.get_learnable_parameters(), lr=1e-3)
    found = []
    for step in range(steps):
        with distiller.one_step():
            _, losses = distiller(**batch(step, num_data), epoch=1 + step // 2)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        found.append({name: p.grad.clone() for name, p in distiller.named_parameters() if p.grad is not None})
        optimizer.step()
        distiller.after_step()
    return found


# DCGD's forward is several graphs, because it notes outputs by a hook; torch looks at `.grad` of what passes between.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
@pytest.mark.parametrize(
    ("name", "base", "num_data"),
    [pytest.param(*case, marks=() if case == QUICK else pytest.mark.slow) for case in CASES],
)
def test_compiled_gradients_are_the_plain_ones(name, base, num_data):
    """In three steps; CRD's first one, which sets its constants, is not compiled."""
    plain = gradients(build(name, base, num_data), num_data)
    compiled, backend = build(name, base, num_data), CompileCounterWithBackend(BACKEND)
    compiled.compile_training([IMAGES], backend=backend)
    found = gradients(compiled, num_data)
    assert backend.frame_count == 1 or (backend.frame_count and issubclass(distiller_dict[name], DCGD))
    for step, (one, other) in enumerate(zip(plain, found, strict=True)):
        assert one.keys() == other.keys()
        whole = torch.stack([grad.norm() for grad in one.values()]).norm()
        for key, grad in one.items():
            error = (other[key] - grad).norm() / max(grad.norm(), 1e-4 * whole)
            assert error < 1e-3, (step, key, error)


def test_a_batch_of_another_size_is_not_compiled():
    compiled, backend = build("KD"), CompileCounterWithBackend(BACKEND)
    compiled.compile_training([IMAGES], backend=backend)
    plain = build("KD")
    for step, images in enumerate((IMAGES, 3, IMAGES, 2, 3)):
        fields = batch(step, 64, images)
        torch.testing.assert_close(compiled(**fields, epoch=step)[1], plain(**fields, epoch=step)[1])
    assert backend.frame_count == 1
