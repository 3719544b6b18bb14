"""mdistiller.distill: a user's networks and loaders through the library's trainer."""

import os
import signal

import pytest
import torch
import torch.nn as nn
from safetensors.torch import load_file
from torch.utils.data import DataLoader

import mdistiller
from mdistiller import UserError
from mdistiller.engine.files.checkpoint import load_checkpoint

from ._parts import Featured, Listed, data, loaders, net, same, weights

QUICK = {"epochs": 2, "lr": 0.05, "verbose": False, "device": "cpu"}


def distill(method="KD", student=None, teacher=None, train=None, **settings):
    own, val = loaders()
    train = own if train is None else train
    student, teacher = student or net(), teacher or net(8, seed=1)
    return mdistiller.distill(student, teacher, train, val, method=method, **{**QUICK, **settings})


def test_the_ten_lines_of_the_documentation(tmp_path):
    student, teacher, (train, val) = net(), net(8, seed=1), loaders()
    before = weights(teacher)
    result = mdistiller.distill(student, teacher, train, val, method="dkd", **QUICK)
    assert result.student is student and not student.training
    assert [epoch["epoch"] for epoch in result.history] == [1, 2]
    assert {"train_loss", "test_acc", "lr", "loss/loss_kd"} <= result.history[0].keys()
    assert result.accuracy == pytest.approx(max(epoch["test_acc"] for epoch in result.history), abs=1e-3)
    assert result.history[-1]["lr"] < result.history[0]["lr"] < 0.05  # a cosine
    assert result.folder is None and result.ema is None
    assert same(before, weights(teacher)) and teacher.training and all(p.requires_grad for p in teacher.parameters())
    for name in ("student.safetensors", "student.pth"):
        path, fresh = result.save(tmp_path / name), net(seed=5)
        state = load_file(path) if name.endswith("safetensors") else torch.load(path, weights_only=True)
        fresh.load_state_dict(state, strict=True)
        assert same(weights(fresh), weights(student))


def test_the_result_is_the_best_epoch_and_nothing_is_left_on_disk(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    student, (train, val) = net(), loaders()
    result = mdistiller.distill(student, None, train, val, "NONE", epochs=4, lr=0.5, verbose=False, device="cpu")
    images, targets = data().tensors
    with torch.no_grad():
        top1 = 100 * float((student(images).argmax(1) == targets).float().mean())
    assert top1 == pytest.approx(result.accuracy) and not list(tmp_path.iterdir())
    assert "loss/ce" in result.history[0]


def test_no_hook_stays_in_the_callers_networks(tmp_path):
    """Run again in a notebook, a cell would add more each time; and torch.jit.script takes no such layers."""
    (tmp_path / "mine.py").write_text("from tests.api._parts import net\ndef build(num_classes):\n    return net()")
    student, teacher = net(), net(8)
    results = [
        distill("RKD", student, teacher, epochs=1, ema=0.5),
        distill(student=f"{tmp_path}/mine.py:build", epochs=1, num_classes=5),
    ]
    with pytest.raises(UserError, match="KDSVD"):
        distill("KDSVD", student, teacher)
    networks = [student, teacher, results[0].ema, results[1].student]
    for layer in (layer for network in networks for layer in network.modules()):
        assert not layer._forward_hooks and not layer._forward_pre_hooks


def test_it_trains_as_the_trainer_itself_does():
    """The same seed gives the same weights; another one does not."""
    one, other, third = (distill(student=net(), seed=seed).student for seed in (3, 3, 4))
    assert same(weights(one), weights(other)) and not same(weights(one), weights(third))


def test_the_callers_random_generators_are_left_alone():
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    train, val = loaders()
    student, teacher = Featured(), Featured(8)
    torch.manual_seed(7)
    mdistiller.distill(student, teacher, train, val, **QUICK)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("kind", ["pairs", "lists", "dictionaries", "with an index"])
def test_loaders_of_every_kind_train_the_same(kind):
    def dictionary(image, target):
        return {"image": image, "target": int(target)}

    makes = {"pairs": lambda *item: item, "lists": lambda *item: [*item], "dictionaries": dictionary}
    if kind == "with an index":
        images, targets = data().tensors
        own = torch.utils.data.TensorDataset(images, targets, torch.arange(len(targets)))
    else:
        own = Listed(makes[kind])
    train = DataLoader(own, batch_size=8, shuffle=True)
    assert same(weights(distill(train=train).student), weights(distill().student))


def test_any_iterable_with_a_length_is_a_loader():
    images, targets = data().tensors
    train = [(images[:8], targets[:8]), (images[8:16], targets[8:16])]
    assert distill(train=train).accuracy >= 0


def test_a_network_that_returns_features_is_trained_as_it_is():
    student = Featured()
    result = distill("AT", student=student, teacher=Featured(8))
    assert result.student is student and result.history[0]["loss/loss_kd"] > 0


@pytest.mark.parametrize("make", [lambda *item: item, lambda image, target: {"image": image, "target": int(target)}])
def test_crd_gets_the_index_and_the_labels_of_all_images(make):
    train = DataLoader(Listed(make), batch_size=8, shuffle=True)
    result = distill("CRD", student=Featured(), teacher=Featured(8), train=train, k=4)
    assert result.history[0]["loss/loss_kd"] > 0


def test_networks_by_name():
    images, targets = data(8, size=32).tensors
    train = DataLoader(torch.utils.data.TensorDataset(images, targets), batch_size=4)
    student = mdistiller.create_model("resnet8", 5)
    result = mdistiller.distill(student, net(), train, train, epochs=1, verbose=False, device="cpu")
    assert result.student is student
    result = mdistiller.distill("resnet8", net(), train, train, epochs=1, verbose=False, device="cpu")
    assert type(result.student) is type(student) and result.student.fc.out_features == 5
    with pytest.raises(UserError, match="give num_classes=C"):
        mdistiller.distill("resnet8", None, train, train, "NONE", epochs=1, verbose=False)


def test_logs_ema_and_checkpoints_are_in_the_folder(tmp_path):
    result = distill(output=tmp_path / "runs/dkd", method="DKD", ema=0.5, accumulate=2, clip_grad_norm=1.0)
    folder = tmp_path / "runs/dkd"
    assert result.folder == folder
    assert {"config.yaml", "metrics.csv", "worklog.txt", "latest", "student_best", "student_best_ema"} <= {
        path.name for path in folder.iterdir()
    }
    assert same(load_checkpoint(folder / "student_best")["model"], weights(result.student))
    assert same(load_checkpoint(folder / "student_best_ema")["model"], weights(result.ema))
    assert 0 <= result.ema_accuracy <= 100 and isinstance(result.ema, nn.Sequential)
    assert not (folder / "wandb").exists()
    net().load_state_dict(load_file(result.save(tmp_path / "ema.safetensors", ema=True)), strict=True)


def test_a_run_in_a_folder_is_neither_overwritten_nor_confused(tmp_path):
    first = distill(output=tmp_path / "run")
    with pytest.raises(UserError, match="run"):
        distill(output=tmp_path / "run")
    again = distill(output=tmp_path / "run", overwrite=True)
    assert same(weights(first.student), weights(again.student))
    with pytest.raises(UserError, match="resume=True goes on with the run in a folder; name it"):
        distill(resume=True)


class Interrupting(Listed):
    """Sends Ctrl-C to this process when its images have been read so many times."""

    def __init__(self, after):
        super().__init__(lambda *item: item)
        self.left = after

    def __getitem__(self, index):
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGINT)
        return super().__getitem__(index)


def test_after_ctrl_c_it_goes_on_to_the_same_weights(tmp_path):
    settings = {"ema": 0.5, "output": tmp_path / "run", "method": "DKD"}
    whole = distill(**{**settings, "output": tmp_path / "whole"})
    train = DataLoader(Interrupting(after=8 + 24 + 12), batch_size=8, shuffle=True)
    with pytest.raises(KeyboardInterrupt, match="resume=True"):
        distill(**settings, train=train)
    resumed = distill(**settings, student=net(seed=9), teacher=net(8, seed=1), resume=True)
    assert same(weights(whole.student), weights(resumed.student)) and same(weights(whole.ema), weights(resumed.ema))
    assert [row["test_acc"] for row in whole.history] == [row["test_acc"] for row in resumed.history]


def test_verbose_prints_a_line_for_each_epoch(capsys):
    distill()
    assert capsys.readouterr().out == ""
    distill(verbose=True)
    said = capsys.readouterr().out
    assert "epoch 1/2: lr" in said and "epoch 2/2: lr" in said


class Wide(nn.Module):
    def forward(self, image):
        return image


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"student": "resnet81", "num_classes": 5}, "resnet81"),
        ({"student": Featured}, "the student is the class Featured; give it a network: Featured()"),
        ({"teacher": 3}, "the teacher is 3; give it a network (torch.nn.Module) or a name"),
        ({"method": "KDD"}, "unknown method 'KDD'; did you mean KD"),
        ({"lr": -1}, "SOLVER.LR must be positive"),
        ({"num_classes": 7}, "5 classes"),
        ({"image_size": 16}, "image_size is 16, but the images are 8x8"),
        ({"student_pretrained": True}, "DISTILLER.STUDENT_PRETRAINED True would be ignored: the student is a module"),
        ({"teacher_ckpt": "x.pth"}, "DISTILLER.TEACHER_CKPT x.pth would be ignored: the teacher is a module"),
        ({"teacher": nn.Sequential(*net()[:-1], nn.Linear(4, 6))}, "6 classes"),
        ({"student": nn.Sequential(nn.Conv2d(3, 2, 3))}, "it must return logits (B, C)"),
        ({"trainer": "dot", "optimizer": "AdamW"}, "DOT"),
        ({"train": []}, "yields no batch"),
    ],
)
def test_bad_input_is_a_user_error_of_one_line(settings, words, tmp_path):
    with pytest.raises(UserError) as refused:
        distill(**settings, output=tmp_path / "run")
    assert words in str(refused.value) and "\n" not in str(refused.value)
    assert not (tmp_path / "run").exists()


def test_student_and_teacher_are_two(tmp_path):
    one = net()
    with pytest.raises(UserError, match=r"the same network.*copy\.deepcopy"):
        distill(student=one, teacher=one)
    with pytest.raises(UserError, match="no teacher is given"):
        mdistiller.distill(net(), None, *loaders(), **QUICK)


def test_labels_beyond_the_students_logits_are_refused():
    images, targets = data().tensors
    train = DataLoader(torch.utils.data.TensorDataset(images, targets + 3), batch_size=8)
    with pytest.raises(UserError, match=r"go from 3 to 7, but a label is 0 to 4"):
        distill(train=train)


def test_class_names_of_both_data_sets_are_compared():
    train, val = loaders()
    train.dataset.classes, val = list("abcde"), DataLoader(data(), 12)
    val.dataset.classes = list("abced")
    with pytest.raises(UserError, match="name 5 and 5 classes, 2 labels differently"):
        mdistiller.distill(net(), net(8), train, val, **QUICK)


def test_one_process_alone(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="trains in one process, and 2 were started"):
        distill()


def test_the_teacher_may_see_larger_images():
    seen = []
    teacher = net(8, seed=1)
    teacher[0].register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].shape[-1]))
    distill(teacher=teacher, teacher_size=16)
    assert set(seen) <= {8, 16} and 16 in seen


def test_mixed_images_need_no_index_of_the_loader():
    pytest.importorskip("mdistiller.dataset.mixing", reason="augmentation of whole batches is not there")
    assert not same(weights(distill().student), weights(distill(mixup=0.5).student))
    assert not same(weights(distill().student), weights(distill(erasing=0.5).student))


def test_the_plots_of_a_run_can_be_drawn(tmp_path, capsys):
    from mdistiller.commands.main import main

    distill(output=tmp_path / "run")
    main(["plot", str(tmp_path / "run"), "-o", str(tmp_path / "curves.png")])
    assert (tmp_path / "curves.png").is_file()
