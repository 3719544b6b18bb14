"""DISTILLER.SCORE_TEACHER: one line at the start of a run, which changes nothing of what the run computes."""

import torch
import torch.nn as nn

from mdistiller.distillers import Distiller
from mdistiller.engine.run_name import experiment_name

from .._networks import CLASSES, Net
from ._runs import loaders, student_of, trainer_of


class Copying(Distiller):
    """Dropout, so that the random draws count, and a loss of the teacher's logits."""

    def forward_train(self, image, target, **kwargs):
        logits = nn.functional.dropout(self.student(image)[0], 0.5)
        known, _ = self.teacher_forward(image)
        losses = {"loss_ce": nn.functional.cross_entropy(logits, target), "loss_kd": (logits - known).square().mean()}
        return logits, losses


class Knowing(nn.Module):
    """A teacher that knows the 44 images by their first pixels."""

    def __init__(self):
        super().__init__()
        (batches, (images, targets)) = list(loaders()[1]), ([], [])
        for image, target in batches:
            images.append(image.flatten(1)), targets.append(target)
        self.register_buffer("images", torch.cat(images))
        self.register_buffer("targets", torch.cat(targets))

    def forward(self, image):
        nearest = torch.cdist(image.flatten(1), self.images).argmin(1)
        return nn.functional.one_hot(self.targets[nearest], CLASSES).float(), {}


def run(folder, *overrides, teacher=None):
    folder.mkdir()
    torch.manual_seed(1)
    distiller = Copying(Net(), teacher or Net())
    trainer = trainer_of(folder, *overrides, distiller=distiller)
    trainer.train()
    return trainer


def test_the_line_the_warning_and_the_same_bits(tmp_path, capfd):
    plain = run(tmp_path / "plain")
    assert "teacher" not in "".join(capfd.readouterr())
    scored = run(tmp_path / "scored", "DISTILLER.SCORE_TEACHER", "True")
    out, err = capfd.readouterr()
    assert out.splitlines()[0].startswith("teacher: top-1 ") and out.count("teacher:") == 1
    assert "warning: the teacher is no better than chance: check DISTILLER.TEACHER_CKPT" in err
    assert all(torch.equal(a, b) for a, b in zip(student_of(plain).values(), student_of(scored).values()))


def test_a_teacher_that_knows_gives_no_warning(tmp_path, capfd):
    run(tmp_path / "run", "DISTILLER.SCORE_TEACHER", "True", teacher=Knowing())
    out, err = capfd.readouterr()
    assert out.startswith("teacher: top-1 100.00, top-5 100.00, loss ") and "chance" not in err


def test_a_resumed_run_does_not_score_it_again(tmp_path, capfd):
    trainer = run(tmp_path / "run", "DISTILLER.SCORE_TEACHER", "True", "SOLVER.EPOCHS", "1")
    capfd.readouterr()
    torch.manual_seed(1)
    resumed = trainer_of(tmp_path / "run", "DISTILLER.SCORE_TEACHER", "True", distiller=Copying(Net(), Net()))
    resumed.train(resume=True)
    assert "teacher:" not in capfd.readouterr().out and resumed.log_path == trainer.log_path


def test_it_does_not_enter_the_name_of_the_run(tmp_path):
    trainer = trainer_of(tmp_path, "DISTILLER.SCORE_TEACHER", "True")
    assert experiment_name(trainer.cfg, ["DISTILLER.SCORE_TEACHER", "True"]) == "distill/default"
