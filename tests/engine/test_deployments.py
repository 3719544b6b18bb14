"""`deployments()` is the one truth for what is scored, saved, averaged, costed and named: a SimKD-like method."""

import copy
import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

from mdistiller.commands.convert import convert
from mdistiller.commands.eval import evaluate_checkpoint
from mdistiller.distillers import Distiller, RunFacts, distiller_dict
from mdistiller.distributed.data_parallel import data_parallel
from mdistiller.engine.build import build_distiller, build_trainer, deployment_lines
from mdistiller.engine.cfg import load_cfg
from mdistiller.engine.files.checkpoint import load_checkpoint
from mdistiller.engine.trainer import BaseTrainer
from mdistiller.errors import UserError
from mdistiller.experiments.method_cost import method_costs
from mdistiller.models import cifar_model_dict

from .._networks import Deployed


class SimKDLike(Distiller):
    """The projected feature approaches the teacher's; the student's own classifier stays untrained."""

    untrained = ("student.fc",)
    teacher_outputs = ("pooled_feat",)

    def __init__(self, student, teacher, cfg):
        super().__init__(student, teacher)
        self.deployed = Deployed(student, teacher, width=64)

    def get_learnable_parameters(self):
        own = [p for name, p in self.student.named_parameters() if not name.startswith("fc.")]
        return [*own, *self.deployed.projector.parameters()]

    def forward_train(self, image, target, **kwargs):
        _, features = self.student(image)
        projected = self.deployed.projector(features["pooled_feat"])
        taught = self.teacher_forward(image)[1]["pooled_feat"]
        return self.deployed.classifier(projected), {"loss_kd": F.mse_loss(projected, taught)}

    def deployments(self):
        return {"simkd": self.deployed}


@pytest.fixture
def trained(tmp_path):
    """The folder of a short run, with an EMA, and the accuracies that it logged."""
    distiller_dict["SIMKD_LIKE"] = SimKDLike
    torch.manual_seed(0)
    torch.save({"model": cifar_model_dict["resnet14"][0](num_classes=10).state_dict()}, tmp_path / "teacher")
    overrides = {
        "DISTILLER.TYPE": "SIMKD_LIKE", "DISTILLER.TEACHER": "resnet14", "DISTILLER.TEACHER_CKPT": tmp_path / "teacher",
        "DATASET.TRAIN_FRACTION": 0.1, "SOLVER.EPOCHS": 2, "SOLVER.EMA": 0.9, "LOG.PREFIX": tmp_path,
        "LOG.WANDB": False, "EXPERIMENT.DEVICE": "cpu", "EXPERIMENT.NAME": "run",
    }  # fmt: skip
    cfg = load_cfg("configs/digits/vanilla.yaml", [str(x) for pair in overrides.items() for x in pair])
    trainer = build_trainer(cfg)
    trainer.train()
    yield trainer, cfg
    del distiller_dict["SIMKD_LIKE"]


def top1(text):
    return [float(value) for value in re.findall(r"top-1 ([\d.]+)", text)]


def test_one_network_is_scored_saved_averaged_costed_and_named(trained, tmp_path):
    trainer, cfg = trained
    folder = trainer.log_path
    last = trainer.state.last_acc
    assert set(last) == {"student", "ema"}

    # Saved and scored again, from a network's file, from a whole run's, and the average of its weights.
    own = trainer.distiller.deployed.state_dict()
    saved = load_checkpoint(folder / "student_latest")
    assert saved["deployed"] == "Deployed" and all(torch.equal(saved["model"][k], own[k]) for k in own)
    for file, head in (("student_latest", "student"), ("latest", "student"), ("student_latest_ema", "ema")):
        scored = top1(evaluate_checkpoint(None, str(folder / file), None, 64, device="cpu"))
        assert scored == [pytest.approx(last[head], abs=0.005)]

    # Costed and named: the student's 78,042 parameters, 64 x 65 of the projector, 65 x 10 of the classifier.
    parameters = 78_042 + 64 * 65 + 65 * 10
    assert method_costs(cfg)[0]["simkd"].parameters == parameters
    assert deployment_lines(trainer)[0].startswith(f"simkd: {parameters / 1e6:.2f} M parameters")
    assert f"simkd: {parameters / 1e6:.2f} M" in evaluate_checkpoint(
        None, str(folder / "student_best"), None, 64, device="cpu"
    )

    # Exported: the whole network, not the student within it, and still named.
    (tmp_path / "config.yaml").write_text((folder / "config.yaml").read_text())
    for name in ("out.safetensors", "out.pth"):
        convert(folder / "student_latest", tmp_path / name)
        content = load_checkpoint(tmp_path / name)
        assert content["model"].keys() == own.keys() and content["deployed"] == "Deployed"
        assert top1(evaluate_checkpoint(None, str(tmp_path / name), None, 64, device="cpu"))[0] == pytest.approx(
            last["student"], abs=0.005
        )
        with pytest.raises(UserError, match="it holds the Deployed"):
            evaluate_checkpoint("resnet8", str(tmp_path / name), "digits", 64, device="cpu")


def test_the_student_within_it_is_never_scored_in_its_place(trained):
    folder = trained[0].log_path
    with pytest.raises(UserError, match=r"does not fit ResNet.*; it holds the Deployed .* without -m scores"):
        evaluate_checkpoint("resnet8", str(folder / "student_best"), "digits", 64, device="cpu")
    for file in ("best", "latest"):
        with pytest.raises(UserError, match=rf"{file} belongs to a run that deploys a Deployed.* without -m"):
            evaluate_checkpoint("resnet8", str(folder / file), "digits", 64, device="cpu")
        with pytest.raises(UserError, match="deploys a Deployed"):
            convert(folder / file, Path("never.pth"))


def test_the_run_resumes(trained, tmp_path):
    trainer, cfg = trained
    longer = cfg.clone()
    longer.defrost()
    longer.SOLVER.EPOCHS = 3
    again = build_trainer(longer)
    again.log_path = again.state.folder = trainer.log_path
    assert again.begin(resume=True) == 3
    own, average = trainer.distiller.state_dict(), trainer.ema.network.state_dict()
    assert all(torch.equal(v, own[k]) for k, v in again.distiller.state_dict().items())
    assert all(torch.equal(v, average[k]) for k, v in again.ema.network.state_dict().items())


class Peers(Distiller):
    """Two networks that are trained and deployed."""

    needs_teacher = False

    def __init__(self, student, teacher=None, cfg=None):
        super().__init__(student, nn.Identity())
        self.peer = copy.deepcopy(student)
        nn.init.normal_(self.peer.fc.weight)

    def get_learnable_parameters(self):
        return [*self.student.parameters(), *self.peer.parameters()]

    def forward_train(self, image, target, **kwargs):
        logits, peer = self.student(image)[0], self.peer(image)[0]
        return logits, {"ce": F.cross_entropy(logits, target), "loss_peer": F.cross_entropy(peer, target)}

    def deployments(self):
        return {"student": self.student, "peer": self.peer}


def test_each_file_scores_the_networks_that_it_holds(tmp_path):
    distiller_dict["PEERS"] = Peers
    try:
        overrides = ["DISTILLER.TYPE", "PEERS", "DATASET.TRAIN_FRACTION", "0.1", "SOLVER.EPOCHS", "2"]
        quiet = ["LOG.PREFIX", str(tmp_path), "LOG.WANDB", "False", "EXPERIMENT.DEVICE", "cpu"]
        trainer = build_trainer(load_cfg("configs/digits/vanilla.yaml", [*overrides, *quiet]))
        trainer.train()
        folder, last, best = trainer.log_path, trainer.state.last_acc, trainer.state.best_acc
        expected = {
            "latest": [last["student"], last["peer"]],
            "student_latest": [last["student"]],
            "student_best_peer": [best["peer"]],
        }
        for file, scores in expected.items():
            scored = top1(evaluate_checkpoint(None, str(folder / file), None, 64, device="cpu"))
            assert scored == pytest.approx(scores, abs=0.005), file
        with pytest.raises(UserError, match=r"unknown head of .*student_latest 'peer'; known: student"):
            evaluate_checkpoint(None, str(folder / "student_latest"), None, 64, "peer", device="cpu")
    finally:
        del distiller_dict["PEERS"]


class Unused(Distiller):
    """A student with parameters that no loss reaches."""

    needs_teacher = False

    def __init__(self, student, teacher=None, cfg=None):
        super().__init__(student, nn.Identity())
        self.student.extra = nn.Linear(2, 3)

    def forward_train(self, image, target, **kwargs):
        logits, _ = self.student(image)
        return logits, {"ce": F.cross_entropy(logits, target)}


class Declared(Unused):
    untrained = ("student.extra",)


@pytest.mark.parametrize(
    "method, warning",
    [(Unused, "Unused: 2 parameters get no gradient (student.extra.weight, student.extra.bias)"), (Declared, "")],
)
def test_parameters_without_a_gradient_are_named_in_the_first_step(method, warning, tmp_path, capsys):
    distiller_dict["UNUSED"] = method
    try:
        overrides = ["DISTILLER.TYPE", "UNUSED", "DATASET.TRAIN_FRACTION", "0.1", "SOLVER.EPOCHS", "1"]
        quiet = ["LOG.PREFIX", str(tmp_path), "LOG.WANDB", "False", "EXPERIMENT.DEVICE", "cpu"]
        trainer = build_trainer(load_cfg("configs/digits/vanilla.yaml", [*overrides, *quiet]))
    finally:
        del distiller_dict["UNUSED"]
    trainer.train()
    said = capsys.readouterr().err
    assert said.count("get no gradient") == bool(warning) and warning in said


def test_several_processes_refuse_parameters_without_a_gradient():
    """One process of a real group: DistributedDataParallel is the same, with nobody to average with."""
    cfg = load_cfg("configs/digits/vanilla.yaml", ["EXPERIMENT.DEVICE", "cpu", "LOG.WANDB", "False"])
    images = [(torch.rand(4, 3, 32, 32), torch.arange(4))]
    trainer = BaseTrainer("run", Unused(cifar_model_dict["resnet8"][0](num_classes=10)), images, images, cfg)
    trainer.distiller.train()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        trainer.step.module = data_parallel(trainer.distiller, [])
        before = trainer.distiller.student.fc.weight.clone()
        with pytest.raises(UserError, match=r"Unused: 2 parameters get no gradient .* several processes"):
            trainer.step(trainer.prepare_batch(images[0], 1), 1, 1)
        assert torch.equal(trainer.distiller.student.fc.weight, before)
    finally:
        dist.destroy_process_group()


class Curious(Distiller):
    """Needs every fact of the run."""

    needs_run = ("num_classes", "class_names", "image_size", "epochs", "mean", "std")

    def __init__(self, student, teacher, cfg, class_names, **facts):
        super().__init__(student, teacher)
        self.names = nn.Embedding(len(class_names), 2)

    def get_extra_parameters(self):
        return self.names.weight.numel()


def test_the_cost_of_a_method_that_needs_what_only_data_tell():
    distiller_dict["CURIOUS"] = Curious
    try:
        overrides = ["DISTILLER.TYPE", "CURIOUS", "DISTILLER.TEACHER", "resnet14"]
        costs, extra = method_costs(load_cfg("configs/digits/vanilla.yaml", overrides))
    finally:
        del distiller_dict["CURIOUS"]
    assert costs["student"].parameters == 78_042 and extra == 20


def test_a_grouped_student_under_a_plain_method_names_what_it_does_not_train(tmp_path, capsys):
    """KD trains the grouped logits; the plain head of res56_M_r20 gets no gradient."""
    torch.save({"model": cifar_model_dict["resnet8"][0](num_classes=100).state_dict()}, tmp_path / "teacher")
    overrides = {
        "DISTILLER.TEACHER": "resnet8", "DISTILLER.TEACHER_CKPT": tmp_path / "teacher",
        "DISTILLER.STUDENT": "res56_M_r20", "LOG.WANDB": False, "EXPERIMENT.DEVICE": "cpu",
    }  # fmt: skip
    cfg = load_cfg("configs/cifar100/kd.yaml", [str(x) for pair in overrides.items() for x in pair])
    images = [(torch.rand(4, 3, 32, 32), torch.arange(4), torch.arange(4))]
    trainer = BaseTrainer("run", build_distiller(cfg, RunFacts.of(cfg)), images, images, cfg)
    trainer.distiller.train()
    assert trainer.step(trainer.prepare_batch(images[0], 1), 1, 1) is not None
    assert "KD: 23 parameters get no gradient (student.base.layer3" in capsys.readouterr().err
