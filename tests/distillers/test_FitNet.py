"""FitNet: the hint, its regressor and the first stage."""

import pytest
import torch
from yacs.config import CfgNode as CN

from mdistiller.distillers import FitNet, method_defaults
from mdistiller.models import cifar_model_dict


def net(name):
    return cifar_model_dict[name][0](num_classes=10)


def build(student="resnet8", teacher="resnet14", nets=None, **options):
    cfg = CN({"FITNET": method_defaults["FITNET"].clone()})
    cfg.FITNET.merge_from_list([x for pair in options.items() for x in pair])
    torch.manual_seed(0)
    return FitNet(*(nets or (net(student), net(teacher))), cfg)


class Changed(torch.nn.Module):
    """resnet8 with `change` applied to its feature maps."""

    def __init__(self, change):
        super().__init__()
        self.net, self.change = net("resnet8"), change

    def forward(self, x):
        logits, features = self.net(x)
        return logits, {"feats": [self.change(f) for f in features["feats"]]}


def batch(epoch=1, size=32):
    generator = torch.Generator().manual_seed(1)
    image = torch.randn(4, 3, size, size, generator=generator)
    return {"image": image, "target": torch.arange(4), "epoch": epoch}


@pytest.mark.parametrize("hint", [0, 1, 3, -1])
def test_loss_is_the_squared_error_of_the_hint(hint):
    method = build("resnet8x4", HINT_LAYER=hint).double().eval()
    fields = batch()
    image = fields["image"].double()
    _, losses = method.forward_train(image, fields["target"], epoch=1)
    guided = method.conv_reg(method.student(image)[1]["feats"][hint])
    error, count = 0.0, 0
    for s, t in zip(guided.flatten().tolist(), method.teacher(image)[1]["feats"][hint].flatten().tolist()):
        error, count = error + (s - t) ** 2, count + 1
    assert losses["loss_kd"].item() == pytest.approx(100 * error / count, rel=1e-9)


def test_maps_of_other_sizes_get_a_regressor():
    method = build("ShuffleV1", "resnet14").train()  # 8x8 against 16x16
    _, losses = method(**batch())
    losses["loss_kd"].backward()
    assert method.conv_reg.conv.weight.grad.isfinite().all()


@pytest.mark.parametrize("student, teacher", [(5, 16), (16, 5), (2, 13)])
def test_maps_of_any_sizes_are_resized_to_the_hint(student, teacher):
    method = build(nets=[Changed(lambda f, n=n: f[..., :n, :n]) for n in (student, teacher)]).train()
    _, losses = method(**batch())
    losses["loss_kd"].backward()
    assert losses["loss_kd"].isfinite() and method.conv_reg.conv.weight.grad.ne(0).any()


def test_first_stage_trains_the_hint_alone():
    method = build(INIT_EPOCHS=3).train()
    (stage,) = method.stages()
    assert (stage.name, stage.epochs, stage.lr) == ("hint", 3, 0)
    method.turn_to(stage)
    method.train()
    _, losses = method(**batch(1))
    assert set(losses) == {"loss_kd"}
    losses["loss_kd"].backward()
    above = [p for k, p in method.student.named_parameters() if k.startswith(("layer3", "fc"))]
    assert above and all(p.grad is None and not p.requires_grad for p in above)
    assert method.student.layer2.training and not method.student.layer3.training
    assert method.student.conv1.weight.grad.ne(0).any() and method.conv_reg.conv.weight.grad.ne(0).any()
    method.turn_to(None)
    _, losses = method.train()(**batch(1))
    assert set(losses) == {"loss_ce", "loss_kd"} and losses["loss_ce"].item() > 0 and above[0].requires_grad
    assert method_defaults["FITNET"].INIT_EPOCHS == 0 and build().stages() == ()


def test_the_teacher_never_changes():
    nets = net("resnet8").train(), net("resnet14").train()
    before = [{k: v.clone() for k, v in m.state_dict().items()} for m in nets]
    method = build(nets=nets)
    for m, state in zip(nets, before):
        assert all(v.equal(state[k]) for k, v in m.state_dict().items())
        assert m.training
    method.train()
    optimizer = torch.optim.SGD(method.get_learnable_parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    for _ in range(2):
        optimizer.zero_grad()
        sum(method(**batch())[1].values()).backward()
        optimizer.step()
    assert all(v.equal(before[1][k]) for k, v in nets[1].state_dict().items())
    assert not any(v.equal(before[0][k]) for k, v in nets[0].state_dict().items())


def test_extra_parameters():
    method = build(HINT_LAYER=1)
    assert method.get_extra_parameters() == 16 * 16 + 16 + 2 * 16
    assert {id(p) for p in method.get_learnable_parameters()} == {
        id(p) for m in (method.student, method.conv_reg) for p in m.parameters()
    }


def test_refusals():
    with pytest.raises(ValueError, match="HINT_LAYER is 4, the networks have feature maps 0 to 3"):
        build(HINT_LAYER=4)
    with pytest.raises(ValueError, match=r"FITNET .* student's \(1, 32\), the teacher's \(1, 32, 16, 16\)"):
        build(nets=(Changed(lambda f: f.mean(dim=(2, 3))), net("resnet14")))


def test_a_pair_of_maps_replaces_the_hint_layer():
    cfg = CN({"FITNET": method_defaults["FITNET"].clone(), "DISTILLER": CN({"PAIRS": [[1, 3]]})})
    method = FitNet(net("resnet8"), net("resnet14"), cfg)
    assert (method.guided, method.hint) == (1, 3)
    cfg.DISTILLER.PAIRS = [[1, 1], [2, 2]]
    with pytest.raises(ValueError, match=r"FITNET compares one pair of maps, DISTILLER\.PAIRS names 2"):
        FitNet(net("resnet8"), net("resnet14"), cfg)
