"""Methods that are not fit for a GPU: the rehearsal names the file and the line of what they do."""

import inspect

import pytest
import torch
import torch.nn.functional as F

from mdistiller.distillers import Distiller, distiller_dict

from ..distillers.test_registry import batch, net
from ._fake_gpu import FakeGPU, WrongDevice
from ._runs import step_waits, trainer_for

FILE = "tests/rehearsal/test_wrong_methods.py"


class Method(Distiller):
    """KD by a weight, which the classes below compute in ways that are wrong."""

    teacher_outputs = ("logits",)

    def __init__(self, student, teacher, cfg):
        super().__init__(student, teacher)

    def forward_train(self, image, target, **kwargs):
        logits, _ = self.student(image)
        weight = self.weight(self.teacher_forward(image)[0], target)
        return logits, {"loss_ce": F.cross_entropy(logits, target), "loss_kd": weight * logits.square().mean()}


class ByItem(Method):
    def weight(self, teacher, target):
        return teacher.std().item()  # wrong


class ByBranch(Method):
    def weight(self, teacher, target):
        return 1.0 if teacher.std() > 0 else 0.5  # wrong


class ByMask(Method):
    def weight(self, teacher, target):
        return teacher[teacher.argmax(dim=1) == target].sum() + 1  # wrong


class ByNonzero(Method):
    def weight(self, teacher, target):
        return len((teacher > 0).nonzero())  # wrong


class ByNumpy(Method):
    def weight(self, teacher, target):
        return float(teacher.cpu().numpy().mean())  # wrong


class ByList(Method):
    def weight(self, teacher, target):
        return teacher.new_tensor([0.5, 1.0]).sum()  # wrong


class ByHostNumber(Method):
    def __init__(self, student, teacher, cfg):
        super().__init__(student, teacher, cfg)
        self.factor = student.conv1.weight.new_tensor(2.0)  # not a buffer: it stays behind

    def weight(self, teacher, target):
        return self.factor * teacher.std()  # wrong


class ByHostTensor(ByHostNumber):
    def weight(self, teacher, target):
        return (self.factor.expand(10) * teacher).mean()  # wrong


class ByHostGenerator(Method):
    def weight(self, teacher, target):
        return torch.rand(10, device=teacher.device, generator=torch.Generator()).mean()  # wrong


def one_step(method):
    """The waits of a step by itself."""
    distiller = method(net("resnet8", 0), net("resnet8", 1), None).train()
    with FakeGPU() as gpu:
        distiller.to("cuda")
        fields = {name: field.to("cuda") for name, field in batch().items() if isinstance(field, torch.Tensor)}
        gpu.waits.clear()
        _, losses = distiller(**fields, epoch=1)
        sum(losses.values()).backward()
    return gpu.waits


def marked_line(method):
    lines, first = inspect.getsourcelines(method)
    return first + next(i for i, line in enumerate(lines) if line.endswith("# wrong\n"))


@pytest.mark.parametrize(
    "method", [ByItem, ByBranch, ByMask, ByNonzero, ByNumpy, ByList, ByHostNumber], ids=lambda method: method.__name__
)
def test_a_method_that_waits_is_named_by_file_and_line(method):
    places = {str(wait).partition(": ")[0] for wait in one_step(method)}
    assert places == {f"{FILE}:{marked_line(method)} (weight)"}


def test_it_is_found_in_the_steps_of_a_run_as_soon_as_the_method_is_registered(tmp_path, monkeypatch):
    monkeypatch.setitem(distiller_dict, "NEW", ByItem)
    with FakeGPU() as gpu:
        (wait,) = step_waits(gpu, trainer_for(tmp_path, "NEW", "resnet8", "resnet8"))
    assert str(wait) == f"{FILE}:{marked_line(ByItem)} (weight): aten._local_scalar_dense.default waits for the GPU"


def test_a_tensor_on_the_cpu_fails_by_file_and_line():
    with pytest.raises(WrongDevice) as caught:
        one_step(ByHostTensor)
    where, _, what = str(caught.value).partition(": ")
    assert where == f"{FILE}:{marked_line(ByHostTensor)}"
    assert what == "aten.mul.Tensor on tensors of the GPU and on (10,) of the CPU"


def test_a_draw_on_the_gpu_from_a_generator_of_the_cpu_fails_by_file_and_line():
    with pytest.raises(WrongDevice) as caught:
        one_step(ByHostGenerator)
    assert str(caught.value).startswith(f"{FILE}:{marked_line(ByHostGenerator)}: ")
