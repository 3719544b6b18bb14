"""The optional modes of a step: each against the plain step, and what each refuses."""

import contextlib
import csv
import io
import json
import shutil
import statistics

import pytest
import torch
import torch.nn as nn

from mdistiller.distillers import distiller_dict
from mdistiller.engine.build import build_trainer
from mdistiller.engine.cfg import load_cfg
from mdistiller.engine.files.checkpoint import load_checkpoint
from mdistiller.engine.meters import Meters
from mdistiller.engine.nan_watch import NonFiniteLossError
from mdistiller.errors import UserError
from mdistiller.models import build_model, cifar_model_dict

from .._networks import write_untrained


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("modes")
    write_untrained(folder / "resnet14", "resnet14", seed=1)
    (folder / "groups.json").write_text(json.dumps([[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]))
    return folder


def trainer_of(files, overrides="", seed=0, prefix=None):
    cfg = load_cfg(
        "configs/digits/kd.yaml",
        f"""LOG.WANDB False LOG.PREFIX {prefix or files} EXPERIMENT.DEVICE cpu EXPERIMENT.SEED {seed} CRD.NCE.K 32
        DISTILLER.TEACHER resnet14 DISTILLER.TEACHER_CKPT {files / "resnet14"} SOLVER.BATCH_SIZE 16
        DATASET.TRAIN_FRACTION 0.1 {overrides}""".split(),
    )
    return build_trainer(cfg)


def steps(trainer, count=2):
    """The student's parameters after some steps, and the mean losses of the last step."""
    trainer.distiller.train()
    meters = Meters()
    for number, batch in zip(range(count), trainer.train_loader):
        meters.reset()
        trainer.train_iter(trainer.prepare_batch(batch, 1), 1, meters, step=number + 1)
    return {n: p.detach().clone() for n, p in trainer.distiller.student.named_parameters()}, meters.means()


def distance(one, other):
    """The largest difference between the parameters of two networks."""
    return max((one[n] - other[n]).abs().max().item() for n in one)


@pytest.mark.parametrize("method", list(distiller_dict))
def test_bfloat16_is_near_float32_under_every_method(method, files):
    overrides = f"DISTILLER.TYPE {method} DCGD.GROUPS {files / 'groups.json'}"
    _, plain = steps(trainer_of(files, overrides), 1)
    for mode in ("bf16", "bf16-teacher"):
        parameters, means = steps(trainer_of(files, f"{overrides} SOLVER.AMP {mode}"), 1)
        assert all(p.dtype == torch.float32 and p.isfinite().all() for p in parameters.values())
        # In sums of squared differences of feature maps (OFD, NST, KDSVD) the rounding errors of all elements add up.
        assert means["train_loss"] == pytest.approx(plain["train_loss"], rel=0.05), mode


def test_float16_scales_the_loss_and_keeps_the_scale(files):
    trainer = trainer_of(files, "SOLVER.AMP fp16")
    parameters, _ = steps(trainer, 3)
    plain, _ = steps(trainer_of(files), 3)
    assert trainer.update.scaler.get_scale() > 1 and distance(plain, parameters) < 2e-3
    other = trainer_of(files, "SOLVER.AMP fp16")
    trainer.update.scaler.update(new_scale=512.0)
    other.update.load_state_dict(trainer.update.state_dict())
    assert other.update.scaler.get_scale() == 512.0


@pytest.mark.parametrize("method", ["KD", "DKD", "FITNET", "VID", "REVIEWKD"])
def test_the_gradients_of_micro_batches_add_up_to_that_of_the_batch(method, files):
    """BatchNorm is in eval mode, because its statistics differ by micro-batch. 16 images in 3: 6, 6 and 4."""
    found = {}
    for micro_batches in (1, 3):
        trainer = trainer_of(files, f"DISTILLER.TYPE {method} SOLVER.ACCUMULATE {micro_batches}")
        trainer.distiller.double()
        batch = trainer.prepare_batch(next(iter(trainer.train_loader)), 1)
        batch["image"] = batch["image"].double()
        trainer.distiller.train()
        for module in trainer.distiller.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        grads = found[micro_batches] = {}
        trainer.update.step = lambda norm, grads=grads, trainer=trainer: grads.update(
            {n: p.grad.clone() for n, p in trainer.distiller.named_parameters() if p.requires_grad}
        )
        meters = Meters()
        trainer.train_iter(batch, 1, meters)
        grads["loss"] = torch.tensor(meters.means()["train_loss"])
    assert found[1].keys() == found[3].keys()
    for name, grad in found[1].items():
        torch.testing.assert_close(found[3][name], grad, rtol=1e-9, atol=1e-9, msg=lambda m, name=name: f"{name}: {m}")


def test_gradients_are_clipped_to_the_norm(files):
    """With plain SGD the first step is LR times the gradient, so its length is LR times the norm."""
    lengths = {}
    for norm in (0.0, 0.1):
        plain = "SOLVER.MOMENTUM 0.0 SOLVER.WEIGHT_DECAY 0.0 SOLVER.LR 0.5"
        trainer = trainer_of(files, f"{plain} SOLVER.CLIP_GRAD_NORM {norm}")
        before = {n: p.detach().clone() for n, p in trainer.distiller.student.named_parameters()}
        after, _ = steps(trainer, 1)
        lengths[norm] = torch.stack([(after[n] - before[n]).norm() for n in before]).norm().item()
    assert lengths[0.1] == pytest.approx(0.05, rel=1e-4) and lengths[0.0] > 0.06


def test_the_memory_layout_changes_nothing_but_rounding(files):
    one, _ = steps(trainer_of(files), 3)
    trainer = trainer_of(files, "SOLVER.CHANNELS_LAST False")
    other, _ = steps(trainer, 3)
    conv = trainer.distiller.student.layer1[0].conv1.weight
    assert conv.is_contiguous() and distance(one, other) < 1e-4


def test_the_ema_is_validated_saved_and_resumed(files, tmp_path):
    trainer = trainer_of(files, "SOLVER.EMA 0.9 SOLVER.EPOCHS 1", prefix=tmp_path)
    trainer.train()
    assert set(trainer.state.last_acc) == {"student", "ema"}
    saved = load_checkpoint(trainer.log_path / "student_latest_ema")["model"]
    own = trainer.ema.network.state_dict()
    assert all(torch.equal(saved[k], own[k]) for k in own)
    last = load_checkpoint(trainer.log_path / "student_latest")["model"]
    assert not torch.equal(saved["fc.weight"], last["fc.weight"])

    again = trainer_of(files, "SOLVER.EMA 0.9 SOLVER.EPOCHS 2", prefix=tmp_path)
    assert again.begin(resume=True) == 2
    assert all(torch.equal(v, own[k]) for k, v in again.ema.network.state_dict().items())
    assert again.ema.updates == trainer.ema.updates == len(trainer.train_loader)


@pytest.mark.parametrize(
    "overrides, message",
    [
        ("DISTILLER.TYPE RKD SOLVER.ACCUMULATE 2", "RKD, which compares the images of a batch"),
        ("SOLVER.ACCUMULATE 17", "more than the 16 images"),
        ("SOLVER.TRAINER dot SOLVER.ACCUMULATE 2", r"SOLVER\.ACCUMULATE 2 .*DOT .*it keeps the gradients"),
        ("SOLVER.TRAINER dot SOLVER.CLIP_GRAD_NORM 1.0", r"SOLVER\.CLIP_GRAD_NORM 1.0 .*DOT .*it has several"),
        ("SOLVER.TRAINER dot SOLVER.AMP fp16", r"SOLVER\.AMP fp16 .*DOT .*it has several"),
        ("SOLVER.TRAINER dot SOLVER.TYPE AdamW", r"SOLVER\.TYPE AdamW .*set SOLVER\.TYPE SGD"),
        ("SOLVER.AMP fp8", "one of none, bf16"),
        ("SOLVER.EMA 1.0", r"in \[0, 1\)"),
        ("SOLVER.BETAS [0.9]", "two numbers"),
    ],
)
def test_an_unsupported_setting_is_refused_with_the_reason(overrides, message, files):
    with pytest.raises(UserError, match=message):
        trainer_of(files, overrides)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile builds its kernels with a C++ compiler")
def test_a_compiled_step_is_the_plain_step(files):
    """After five steps of DKD, whose loss depends on the epoch, one on a short batch: equal up to rounding.

    The learning rate is 0.001, because large steps from a fresh student magnify rounding errors.
    """
    dkd = f"SOLVER.LR 0.001 DISTILLER.TYPE DKD DISTILLER.TEACHER resnet8 DISTILLER.TEACHER_CKPT {files}/resnet8"
    torch.manual_seed(1)
    torch.save({"model": build_model(cifar_model_dict, "resnet8", 10).state_dict()}, files / "resnet8")
    found = []
    for mode in ("", "SOLVER.COMPILE True"):
        trainer = trainer_of(files, f"{dkd} {mode}")
        trainer.distiller.train()
        meters = Meters()
        batches = [trainer.prepare_batch(batch, 1) for batch in trainer.train_loader][-3:]
        assert len({len(batch["target"]) for batch in batches}) == 2
        for epoch in (1, 2):
            for batch in batches[: 3 if epoch == 1 else 2]:
                trainer.train_iter(batch, epoch, meters)
        found.append(dict(trainer.distiller.student.named_parameters()))
    assert hasattr(trainer.distiller._compiled.function, "_torchdynamo_orig_callable")
    assert 0 < distance(*found) < 1e-4


def test_modes_can_be_combined(files):
    modes = """SOLVER.AMP bf16 SOLVER.ACCUMULATE 2 SOLVER.CLIP_GRAD_NORM 1.0 SOLVER.EMA 0.99 SOLVER.TYPE AdamW
    SOLVER.LR 0.001 SOLVER.LR_SCHEDULE cosine SOLVER.WARMUP_EPOCHS 1 SOLVER.NAN_POLICY skip"""
    parameters, means = steps(trainer_of(files, modes), 3)
    assert all(p.isfinite().all() for p in parameters.values()) and means["train_loss"] > 0


def spoil(trainer, bad):
    """Put NaN into the loss at the steps `bad`, and into a BatchNorm's statistics, as a bad batch does."""
    forward = trainer.distiller.forward_train
    seen = []

    def forward_train(**batch):
        seen.append(1)
        logits, losses = forward(**batch)
        if len(seen) in bad:
            trainer.distiller.student.bn1.running_mean.data.fill_(float("nan"))
            losses["loss_kd"] = losses["loss_kd"] * float("nan")
        return logits, losses

    trainer.distiller.forward_train = forward_train


def test_a_bad_step_is_skipped_without_effect_and_counted(files, tmp_path, capsys):
    trainer = trainer_of(files, "SOLVER.NAN_POLICY skip SOLVER.EPOCHS 1", prefix=tmp_path)
    spoil(trainer, {2, 3, 5})
    trainer.train()
    assert "iteration 2 is skipped" in capsys.readouterr().err
    header, row = (trainer.log_path / "metrics.csv").read_text().splitlines()
    assert dict(zip(header.split(","), row.split(",")))["skipped_steps"] == "3"
    assert all(v.isfinite().all() for v in trainer.distiller.state_dict().values())


def test_too_many_bad_steps_in_a_row_stop_the_run(files, tmp_path):
    trainer = trainer_of(files, "SOLVER.NAN_POLICY skip SOLVER.NAN_LIMIT 2 SOLVER.EPOCHS 1", prefix=tmp_path)
    spoil(trainer, {2, 3, 4})
    with pytest.raises(NonFiniteLossError, match=r"epoch 1, iteration 4: .*loss_kd = nan"):
        trainer.train()


def test_weights_that_are_not_finite_are_never_written(files, tmp_path):
    trainer = trainer_of(files, "SOLVER.EPOCHS 2", prefix=tmp_path)
    finish = trainer.validate

    def validate(at):
        if at.epoch == 2:
            trainer.distiller.student.fc.weight.data[0, 0] = float("inf")
        return finish(at)

    trainer.validate = validate
    with pytest.raises(NonFiniteLossError, match="weights are not finite"):
        trainer.train()
    assert load_checkpoint(trainer.log_path / "latest")["epoch"] == 1


# Modes of the student. On CPUs fp16 is emulated, far slower than float32.
MODES = {
    "bf16": "SOLVER.AMP bf16",
    "fp16": "SOLVER.AMP fp16",
    "contiguous": "SOLVER.CHANNELS_LAST False",
    "clipped": "SOLVER.CLIP_GRAD_NORM 5.0",
    "EMA": "SOLVER.EMA 0.97",
    "two micro-batches": "SOLVER.ACCUMULATE 2",
    "cosine": "SOLVER.LR_SCHEDULE cosine SOLVER.WARMUP_EPOCHS 1",
    "AdamW": "SOLVER.TYPE AdamW SOLVER.LR 0.003",
}
if shutil.which("c++"):
    MODES["compiled"] = "SOLVER.COMPILE True"
# Modes of the teacher.
TEACHER_MODES = {
    "bf16-teacher": "SOLVER.AMP bf16-teacher",
    "fp16-teacher": "SOLVER.AMP fp16-teacher",
    "teacher cache": "DISTILLER.TEACHER_CACHE {folder}/cache",
    "teacher cache, second run": "DISTILLER.TEACHER_CACHE {folder}/cache LOG.PREFIX {folder}/second",
}
WHOLE = """DATASET.TRAIN_FRACTION 1.0 SOLVER.EPOCHS 3 SOLVER.LR_DECAY_STAGES [2] DISTILLER.STUDENT resnet8
DISTILLER.TEACHER resnet8 DISTILLER.TEACHER_CKPT {folder}/resnet8"""


def trained(folder, overrides, seed=0):
    """A trainer after three epochs on all digits, and the lowest accuracy of its heads."""
    prefix = folder / f"{seed}{abs(hash(overrides))}"
    trainer = trainer_of(folder, f"{WHOLE} {overrides}".format(folder=folder), seed, prefix)
    with contextlib.redirect_stdout(io.StringIO()):
        trainer.run(1)
    return trainer, min(trainer.state.last_acc.values())


def too_low(reached, seeds):
    """The modes whose accuracy is more than three standard deviations of the seeds below their mean.

    The standard deviation counts as 1.5 points at least, because three seeds and 359 test images estimate it badly.
    """
    low = statistics.mean(seeds) - 3 * max(statistics.stdev(seeds), 1.5)
    return {name: accuracy for name, accuracy in reached.items() if accuracy < low}


@pytest.mark.slow
def test_every_mode_of_the_student_reaches_the_accuracy_of_the_default(tmp_path):
    seeds = [trained(tmp_path, "DISTILLER.TYPE NONE", seed)[1] for seed in range(3)]
    reached = {name: trained(tmp_path, f"DISTILLER.TYPE NONE {mode}")[1] for name, mode in MODES.items()}
    assert min(seeds) > 88 and not too_low(reached, seeds), (seeds, reached)


@pytest.mark.slow
def test_every_mode_of_the_teacher_reaches_the_accuracy_of_the_default(tmp_path):
    """Student and teacher are the same network; the second run with the cache never runs the teacher."""
    teacher, own = trained(tmp_path, "DISTILLER.TYPE NONE")
    (tmp_path / "resnet8").write_bytes((teacher.log_path / "student_latest").read_bytes())
    seeds = [own, *(trained(tmp_path, "DISTILLER.TYPE KD", seed)[1] for seed in range(2))]
    reached = {}
    for name, mode in TEACHER_MODES.items():
        trainer, reached[name] = trained(tmp_path, f"DISTILLER.TYPE KD {mode}")
    assert min(seeds) > 88 and not too_low(reached, seeds), (seeds, reached)
    assert reached["teacher cache, second run"] == reached["teacher cache"]
    with (trainer.log_path / "metrics.csv").open() as file:
        assert [float(row["teacher_cache_hits"]) for row in csv.DictReader(file)] == [100.0] * 3
