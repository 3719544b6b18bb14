"""mdistiller.distill and mdistiller.distiller on the fake GPU: everything is on it, and a step does not wait for it."""

import pytest
import torch

import mdistiller

from ..api._parts import Featured, data, loaders, net
from ._fake_gpu import FakeGPU


@pytest.mark.parametrize("method", ["DKD", "CRD"])
def test_a_users_networks_and_loaders_on_a_gpu(method, tmp_path):
    with FakeGPU():
        train, val = loaders()
        student, teacher = (net(), net(8)) if method == "DKD" else (Featured(), Featured(8))
        settings = {"ema": 0.5} if method == "DKD" else {"k": 4}
        result = mdistiller.distill(
            student, teacher, train, val, method, epochs=2, device="cuda", cuda_graph="never", verbose=False, **settings
        )
        assert all(tensor.is_cuda for tensor in [*student.state_dict().values(), *teacher.state_dict().values()])
        path = result.save(tmp_path / "student.pth")
    assert all(tensor.device.type == "cpu" for tensor in torch.load(path, weights_only=True).values())


def test_a_loop_of_ones_own_does_not_wait_for_the_gpu():
    with FakeGPU() as gpu:
        student, teacher = net().to("cuda"), net(8).to("cuda")
        images, labels = (tensor.to("cuda") for tensor in data(8).tensors)
        distiller = mdistiller.distiller("KD", student, teacher, example=images)
        optimizer = torch.optim.SGD(distiller.parameters(), lr=0.1)
        for step in range(2):
            if step:  # the first one checks what the method returns
                gpu.waits.clear()
            loss, _ = distiller(images, labels)
            loss.backward()
            optimizer.step()
        assert gpu.waits == []


def test_the_layers_that_a_method_adds_are_where_the_student_is():
    with FakeGPU():
        student, teacher = (mdistiller.create_model(name, 5).to("cuda") for name in ("resnet8", "resnet14"))
        distiller = mdistiller.distiller("ReviewKD", student, teacher, image_size=32)
        assert all(p.is_cuda for p in distiller.parameters())
