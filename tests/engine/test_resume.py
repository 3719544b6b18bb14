"""What a run saves, restores, compares and refuses when it is resumed."""

import random

import numpy as np
import pytest
import torch
import torch.nn as nn

from mdistiller.dataset import ImageArray
from mdistiller.distillers import Distiller
from mdistiller.engine.build import build_trainer
from mdistiller.engine.cfg import load_cfg
from mdistiller.engine.files.checkpoint import load_checkpoint, save_checkpoint
from mdistiller.engine.resume_facts import CHANGES, Change, compare_facts, facts_of_run
from mdistiller.engine.runtime.seeds import random_state, set_random_state
from mdistiller.engine.runtime.signals import Stopped
from mdistiller.engine.trainer import BaseTrainer
from mdistiller.errors import UserError
from mdistiller.models import build_model, cifar_model_dict

from .._networks import CLASSES, Net

IMAGES, BATCH, STEPS = 44, 8, 6


class Dropping(Distiller):
    """Draws from every generator in training, has as many heads as asked for, and a NaN at one step if asked for."""

    needs_teacher = False

    def __init__(self, heads=1, nan_at=0):
        super().__init__(Net(), nn.Identity())
        self.heads, self.nan_at, self.steps = heads, nan_at, 0

    def forward_train(self, image, target, **kwargs):
        self.steps += 1
        logits = nn.functional.dropout(self.student(image)[0], 0.5) * (1 + random.random() + np.random.rand())
        loss = nn.functional.cross_entropy(logits, target)
        return logits, {"loss_ce": loss * float("nan") if self.steps == self.nan_at else loss}

    def forward_heads(self, image):
        logits = self.forward_test(image)
        return {"": logits} if self.heads == 1 else {"main": logits, "reversed": -logits}


class Plain:
    """A loader as others write them, which draws its order and its noise from torch's generator."""

    fields = ("image", "target", "index")

    def __init__(self, images, targets):
        self.images, self.targets = images.permute(0, 3, 1, 2) / 255, targets

    def __len__(self):
        return STEPS

    def __iter__(self):
        for index in torch.randperm(IMAGES).split(BATCH):
            yield self.images[index] + 0.1 * torch.randn(()), self.targets[index], index


def loaders(plain=False, count=IMAGES):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, 8, 8, 3), generator=generator, dtype=torch.uint8)
    targets = torch.arange(count) % CLASSES
    data = ImageArray(images, targets, (0.5,) * 3, (0.25,) * 3)
    train = Plain(images, targets) if plain else data.loader(BATCH, 0, train=True, seed=0)
    return train, data.loader(BATCH, 0, train=False)


@pytest.fixture
def make(tmp_path):
    """make(overrides, distiller=, ...): a trainer of the run `name`."""
    (tmp_path / "empty.yaml").touch()

    def trainer(overrides="", distiller=None, name="run", kind=BaseTrainer, **options):
        cfg = load_cfg(
            tmp_path / "empty.yaml",
            f"""LOG.WANDB False LOG.PREFIX {tmp_path}/output EXPERIMENT.DEVICE cpu SOLVER.EPOCHS 2
            SOLVER.LR_DECAY_STAGES [1] SOLVER.BATCH_SIZE {BATCH} {overrides}""".split(),
        )
        torch.manual_seed(0)
        return kind(name, distiller or Dropping(), *loaders(**options), cfg)

    return trainer


def stop_at(trainer, epoch, step):
    """Train, and stop as a signal does: after `step` of `epoch`; step 0: within the validation."""
    if step:
        iterate = trainer.train_iter

        def train_iter(batch, at_epoch, *args, **options):
            iterate(batch, at_epoch, *args, **options)
            if (at_epoch, trainer.state.position.step) == (epoch, step):
                trainer.stop.signal = 15

        trainer.train_iter = train_iter
    else:
        validate = trainer.validate

        def stopped_validation(at):
            trainer.stop.signal = 15 * (at.epoch == epoch)
            return validate(at)

        trainer.validate = stopped_validation
    with pytest.raises(Stopped):
        trainer.train()


def entries(content):
    """Every number and tensor in a checkpoint by its place, without times."""
    found = {}

    def walk(value, place):
        if isinstance(value, dict):
            for key, inner in value.items():
                walk(inner, f"{place}/{key}")
        elif isinstance(value, (list, tuple)):
            for i, inner in enumerate(value):
                walk(inner, f"{place}/{i}")
        else:
            found[place] = value.tolist() if isinstance(value, torch.Tensor) else value

    walk({key: value for key, value in content.items() if key != "clock"}, "")
    return found


MODES = "SOLVER.EMA 0.9 SOLVER.NAN_POLICY skip SOLVER.AMP fp16 SOLVER.LR 0.01"


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("at", [(1, 3), (2, 1), (1, STEPS), (2, 0)])
def test_a_resumed_run_ends_like_one_never_stopped(make, at, plain):
    """Also where the loader draws its order from the global generator."""
    whole = make(name="whole", plain=plain)
    whole.train()
    stopped = make(plain=plain)
    stop_at(stopped, *at)
    latest = load_checkpoint(stopped.log_path / "latest")
    assert (latest["epoch"] + 1, latest["within_epoch"]["step"]) == (at[0], at[1] or STEPS)
    resumed = make(plain=plain)
    random.seed(9)
    resumed.train(resume=True)
    latest = [entries(load_checkpoint(trainer.log_path / "latest")) for trainer in (whole, resumed)]
    assert latest[0] == latest[1]


def test_a_step_is_saved_once(make):
    """Where the last step of an epoch is due to be saved, it is not saved again before validation."""
    trainer = make("LOG.SAVE_CHECKPOINT_ITERS 1")
    stop_at(trainer, 1, 0)
    found = [load_checkpoint(trainer.log_path / name)["within_epoch"]["step"] for name in ("latest_previous", "latest")]
    assert found == [STEPS - 1, STEPS]


def state_of(part):
    return entries(part.state_dict())


def test_every_part_is_restored_from_the_checkpoint(make):
    """Of a run in which every part has changed: a step was skipped, and the scale of fp16 with it."""
    saved = make(MODES, Dropping(heads=2, nan_at=STEPS + 2))
    stop_at(saved, 2, 4)
    states = {name: state_of(part) for name, part in (saved.state.parts | saved.state.within).items()}
    assert list(states) == ["model", "optimizer", "scores", "nan_policy", "ema", "position", "generators"]
    resumed = make(MODES, Dropping(heads=2))
    parts = resumed.state.parts | resumed.state.within
    fresh = {name: state_of(part) for name, part in parts.items()}
    assert resumed.begin(resume=True) == 2
    resumed.state.take_up(2)
    resumed.state.take_up_draws()
    for name, part in parts.items():
        assert state_of(part) == states[name] != fresh[name], name


def objects_with_state(owner, seen):
    """Every object below `owner`, outside of torch, that can save and restore a state."""
    for value in vars(owner).values():
        for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else [value]:
            if id(inner) in seen or isinstance(inner, (torch.Tensor, type)):
                continue
            seen.add(id(inner))
            if callable(getattr(inner, "load_state_dict", None)):
                yield inner
            elif type(inner).__module__.startswith("mdistiller."):
                yield from objects_with_state(inner, seen)


def test_whatever_has_a_state_is_in_the_list(make):
    """An object of the trainer that can restore a state is a part of the list, or belongs to one."""
    trainer = make(MODES)
    trainer.run(trainer.begin())
    listed = [*trainer.state.parts.values(), *trainer.state.within.values()]
    known = {id(part) for part in listed} | {id(trainer.distiller), id(trainer.optimizer), id(trainer.update.scaler)}
    found = list(objects_with_state(trainer, set()))
    assert {id(part) for part in listed} <= {id(part) for part in found}
    unlisted = [part for part in found if id(part) not in known]
    assert unlisted == [], unlisted


def test_a_checkpoint_of_an_earlier_version_resumes(make):
    """Such a file has no facts, and the NaN policy's state is part of the progress within the epoch."""
    whole = make(MODES, Dropping(nan_at=2), name="whole")
    whole.train()
    stop_at(make(MODES, Dropping(nan_at=2)), 1, 3)
    resumed = make(MODES)
    latest = resumed.log_path / "latest"
    content = load_checkpoint(latest)
    del content["facts"]
    content["within_epoch"]["nan_policy"] = content.pop("nan_policy")
    save_checkpoint(content, latest)
    resumed.train(resume=True)
    found = [entries(load_checkpoint(trainer.log_path / "latest")) for trainer in (whole, resumed)]
    assert found[0] == found[1]
    header, first, _ = (resumed.log_path / "metrics.csv").read_text().splitlines()
    assert dict(zip(header.split(","), first.split(",")))["skipped_steps"] == "1"


# Facts


def test_every_fact_of_the_table_is_recorded(make):
    facts = make().state.facts
    absent = CHANGES.keys() - facts.keys()
    of_teachers = {"DISTILLER.TEACHER", "the digest of the teacher's weights"}
    assert absent == of_teachers | {"the student's groups", "the number of classes"}  # of other runs than this


def test_groups_classes_and_the_teacher_are_facts_of_the_runs_that_have_them(make):
    distiller = Dropping()
    distiller.student.groups, distiller.needs_teacher = [[0], [1, 2]], True
    trainer = make(distiller=distiller)
    trainer.train_loader.class_names = ("a", "b", "c")
    facts = facts_of_run(trainer.cfg, distiller, trainer.update, trainer.train_loader, trainer.ranks)
    assert facts["the student's groups"] == [[0], [1, 2]] and facts["the number of classes"] == 3
    assert facts["DISTILLER.TEACHER"] == "ResNet50" and facts.keys() >= CHANGES.keys()
    assert not [name for name in facts if name.startswith(("LOG.", "KD.")) or name == "DATASET.ROOT"]


@pytest.mark.parametrize("name", CHANGES)
def test_what_becomes_of_a_change(name):
    saved, own = {name: "old", "SOLVER.LR": 0.1}, {name: "new", "SOLVER.LR": 0.1}
    assert compare_facts(saved, saved, 3) == "" == compare_facts({}, own, 3) == compare_facts(saved, {}, 3)
    if CHANGES[name] is Change.REFUSED:
        with pytest.raises(UserError, match=f"{name} was 'old' and is now 'new'; set it back"):
            compare_facts(saved, own)
    else:
        assert compare_facts(saved, own) == f"{name} 'new' (was 'old')"
    if CHANGES[name] is Change.BETWEEN_EPOCHS:
        with pytest.raises(UserError, match=f"after step 3 of an epoch .*: {name} was 'old' and is now 'new'; set it"):
            compare_facts(saved, own, step=3)


def test_settings_that_change_are_said_in_one_line_and_config_yaml_follows(make, capsys):
    make("SOLVER.EPOCHS 1").train()
    resumed = make("SOLVER.LR 0.01 SOLVER.SYNC_BN True DATASET.NUM_WORKERS 3 LOG.TENSORBOARD_FREQ 7")
    resumed.train(resume=True)
    assert capsys.readouterr().err == (
        f"note: resuming {resumed.log_path} with DATASET.NUM_WORKERS 3 (was 2), SOLVER.EPOCHS 2 (was 1), "
        "SOLVER.LR 0.01 (was 0.05), SOLVER.SYNC_BN True (was False)\n"
    )
    assert load_cfg(resumed.log_path / "config.yaml") == resumed.cfg
    make("SOLVER.LR 0.01 SOLVER.SYNC_BN True DATASET.NUM_WORKERS 3").begin(resume=True)
    assert capsys.readouterr().err == ""  # what has not changed is not said


REFUSED = {
    "SOLVER.TYPE AdamW": "SOLVER.TYPE was 'SGD' and is now 'AdamW'",
    "DISTILLER.STUDENT resnet8": "DISTILLER.STUDENT was 'resnet32' and is now 'resnet8'",
    "DATASET.TYPE digits": "DATASET.TYPE was 'cifar100' and is now 'digits'",
    "DATASET.VAL_FRACTION 0.5": r"DATASET.VAL_FRACTION was 0.0 and is now 0.5",
    "SOLVER.BATCH_SIZE 16": "after step 3 of an epoch .*SOLVER.BATCH_SIZE was 8 and is now 16; set it back until",
    "EXPERIMENT.SEED 4": "EXPERIMENT.SEED was 0 and is now 4",
}


@pytest.mark.parametrize("change", REFUSED)
def test_what_cannot_go_on_is_refused_and_writes_nothing(make, change):
    stop_at(make(), 1, 3)
    resumed = make(change)
    before = {path: path.read_bytes() for path in resumed.log_path.iterdir() if path.is_file()}
    with pytest.raises(UserError, match=f"{resumed.log_path}/latest: .*{REFUSED[change]}"):
        resumed.train(resume=True)
    assert before == {path: path.read_bytes() for path in resumed.log_path.iterdir() if path.is_file()}


def test_other_images_are_refused_within_an_epoch_and_said_at_its_end(make, capsys):
    stop_at(make(), 1, 3)
    with pytest.raises(UserError, match="the number of training images was 44 and is now 52; the number of steps"):
        make(count=52).begin(resume=True)
    make("SOLVER.EPOCHS 1").train(resume=True)
    capsys.readouterr()
    assert make("SOLVER.EPOCHS 1 SOLVER.BATCH_SIZE 16", count=52).begin(resume=True) == 2
    said = capsys.readouterr().err
    assert "SOLVER.BATCH_SIZE 16 (was 8), the number of training images 52 (was 44)" in said and said.count("\n") == 1


def test_a_changed_number_of_processes_is_named_where_it_changes_the_steps_of_an_epoch():
    """The user cannot set the number of steps back, only what it follows from."""
    steps, processes = "the number of steps in an epoch", "the number of processes"
    saved, own = {steps: 28, processes: 1, "SOLVER.BATCH_SIZE": 8}, {steps: 27, processes: 2, "SOLVER.BATCH_SIZE": 8}
    said = f"{processes} was 1 and is now 2; {steps} was 28 and is now 27; set {processes} back until the epoch is done"
    with pytest.raises(UserError, match=f": {said}"):
        compare_facts(saved, own, step=3)
    with pytest.raises(UserError, match=f"set {processes} and SOLVER.BATCH_SIZE back until the epoch is done"):
        compare_facts(saved, own | {"SOLVER.BATCH_SIZE": 9}, step=3)
    assert compare_facts(saved, own | {steps: 28}, step=3) == f"{processes} 2 (was 1)"
    assert compare_facts(saved, own) == f"{steps} 27 (was 28), {processes} 2 (was 1)"


class OwnOptimizer(BaseTrainer):
    """Its optimizer is the class that it is given, under any SOLVER.TYPE."""

    kind = torch.optim.SGD

    def init_optimizer(self, cfg):
        return self.kind(self.distiller.student.parameters(), lr=cfg.SOLVER.LR)


class OwnAdam(OwnOptimizer):
    kind = torch.optim.Adam


def test_an_optimizer_of_another_class_is_refused(make):
    stop_at(make(kind=OwnOptimizer), 1, 3)
    with pytest.raises(UserError, match="another run: the optimizer was 'SGD' and is now 'Adam'; set it back"):
        make(kind=OwnAdam).begin(resume=True)
    with pytest.raises(UserError, match=r"another run: SOLVER\.TYPE was 'SGD' and is now 'AdamW'; set it back"):
        make("SOLVER.TYPE AdamW").begin(resume=True)


@pytest.mark.parametrize("saved, own", [(OwnOptimizer, OwnAdam), (OwnAdam, OwnOptimizer)])
def test_a_checkpoint_without_facts_is_of_the_optimizer_that_its_state_tells(make, saved, own):
    """Otherwise the first step would fail, with a KeyError."""
    stop_at(make(kind=saved), 1, 3)
    resumed = make(kind=own)
    latest = resumed.log_path / "latest"
    content = load_checkpoint(latest)
    del content["facts"]
    save_checkpoint(content, latest)
    with pytest.raises(UserError, match=f"latest: it was saved with .* another kind than {own.kind.__name__} .*set"):
        resumed.begin(resume=True)
    assert make(kind=saved).begin(resume=True) == 1


# The teacher


@pytest.fixture
def taught(tmp_path):
    """taught(teacher's checkpoint): a trainer of a run with that teacher; a, b and c exist, a and b are the same."""
    for seed, names in enumerate(("ab", "c")):
        torch.manual_seed(seed)
        content = {"model": build_model(cifar_model_dict, "resnet8", 10).state_dict()}
        for name in names:
            torch.save(content, tmp_path / name)

    def trainer(teacher):
        cfg = load_cfg(
            "configs/digits/kd.yaml",
            f"""LOG.WANDB False LOG.PREFIX {tmp_path} EXPERIMENT.NAME run EXPERIMENT.DEVICE cpu SOLVER.EPOCHS 2
            DISTILLER.TEACHER resnet8 DISTILLER.TEACHER_CKPT {tmp_path}/{teacher} DATASET.TRAIN_FRACTION 0.05
            SOLVER.BATCH_SIZE 16""".split(),
        )
        return build_trainer(cfg)

    return trainer


def test_a_teacher_with_other_weights_is_refused_and_one_with_the_same_is_said(taught, tmp_path, capsys):
    """What is compared are the weights of the file: the method may have changed its teacher since."""
    first = taught("a")
    next(first.distiller.teacher.buffers()).add_(1)
    stop_at(first, 1, 3)
    capsys.readouterr()
    taught("a").begin(resume=True)
    assert capsys.readouterr().err == ""
    taught("b").begin(resume=True)
    paths = {name: f"'{tmp_path}/{name}'" for name in "abc"}
    said = f"note: resuming {first.log_path} with DISTILLER.TEACHER_CKPT {paths['b']} (was {paths['a']}, of the same"
    assert capsys.readouterr().err.startswith(said)
    digest = "the digest of the teacher's weights was '[0-9a-f]+' and is now '[0-9a-f]+'; set it back"
    changed = f"DISTILLER.TEACHER_CKPT was {paths['a']} and is now {paths['c']}; "
    with pytest.raises(UserError, match=f"another run: {changed}{digest}"):
        taught("c").begin(resume=True)
    (tmp_path / "c").rename(tmp_path / "a")  # other weights under the same name
    with pytest.raises(UserError, match=f"another run: {digest}"):
        taught("a").begin(resume=True)


def test_a_checkpoint_without_the_teachers_digest_resumes_as_before(taught, capsys):
    first = taught("a")
    stop_at(first, 1, 3)
    content = load_checkpoint(first.log_path / "latest")
    del content["facts"]["the digest of the teacher's weights"]
    save_checkpoint(content, first.log_path / "latest")
    capsys.readouterr()
    assert taught("c").begin(resume=True) == 1
    assert "c' (was '" in capsys.readouterr().err


# Saving that fails


def fail_to_write(trainer):
    """From now on, what is written to the trainer's folder fails, as on a broken disk."""
    (trainer.log_path / ".latest.partial").mkdir(parents=True)


def stopping_line(caplog):
    return next(line for line in reversed(caplog.messages) if line.startswith("stopped by signal 15; "))


@pytest.mark.parametrize(
    "every, at, failing, said",
    [
        (0, (1, 3), (0, 0), "no checkpoint could be written, so there is none to resume from"),
        (2, (1, 3), (1, 3), r"resumes from the last saved checkpoint (epoch 1, step 2)"),
        (2, (2, 1), (2, 1), r"resumes from the last saved checkpoint (the end of epoch 1)"),
        (2, (2, 2), None, "the same command with --resume goes on from here"),
    ],
)
def test_a_stopped_run_says_where_it_goes_on_only_if_it_does(make, caplog, every, at, failing, said):
    caplog.set_level("INFO", "mdistiller")
    trainer = make(f"LOG.SAVE_ERROR continue LOG.SAVE_CHECKPOINT_ITERS {every}")
    iterate = trainer.train_iter

    def train_iter(batch, epoch, *args, **options):
        if (epoch, trainer.state.position.step) == failing:
            fail_to_write(trainer)
        return iterate(batch, epoch, *args, **options)

    if failing == (0, 0):
        fail_to_write(trainer)
    trainer.train_iter = train_iter
    stop_at(trainer, *at)
    assert stopping_line(caplog).endswith(said)


def test_a_save_that_failed_is_tried_again_at_the_same_step(make, caplog):
    """Before validation it fails; a signal within validation asks again."""
    caplog.set_level("INFO", "mdistiller")
    trainer = make("LOG.SAVE_ERROR continue")
    fail_to_write(trainer)
    validate = trainer.validate

    def mended(at):
        (trainer.log_path / ".latest.partial").rmdir()
        return validate(at)

    trainer.validate = mended
    stop_at(trainer, 1, 0)
    assert stopping_line(caplog).endswith("goes on from here")
    assert load_checkpoint(trainer.log_path / "latest")["within_epoch"]["step"] == STEPS


@pytest.mark.parametrize("name", ["latest", "latest_previous", "student_latest", "best"])
def test_a_directory_that_appears_in_place_of_a_checkpoint_is_a_save_that_fails(make, caplog, name):
    trainer = make("LOG.SAVE_ERROR continue")
    stop_at(trainer, 1, 3)
    (trainer.log_path / name).unlink(missing_ok=True)
    (trainer.log_path / name).mkdir()
    trainer.stop.signal = 0
    del trainer.train_iter
    trainer.run(1)
    assert any(line.endswith("training goes on to the next save") for line in caplog.messages)


def test_a_directory_in_place_of_a_checkpoint_is_named(make):
    trainer = make("LOG.SAVE_ERROR continue SOLVER.EPOCHS 1")
    (trainer.log_path / "latest").mkdir(parents=True)
    first = trainer.begin(overwrite=True)
    with pytest.raises(UserError, match=f"cannot remove {trainer.log_path}/latest .*Is a directory.*move it away"):
        trainer.run(first)


# Heads


def best_of(trainer):
    return load_checkpoint(trainer.log_path / "latest")["head_best_acc"]


def test_the_ema_may_be_switched_off_and_on_again(make, capsys):
    """The student keeps its best; an EMA that is switched on starts at the student's weights, without a best."""
    make("SOLVER.EMA 0.9 SOLVER.EPOCHS 1").train()
    off = make("SOLVER.EPOCHS 2")
    off.begin(resume=True)
    off.state.scores.best["student"] = 101.0
    off.run(2)
    assert off.state.best_acc == {"": 101.0} == best_of(off) and list(off.state.last_acc) == [""]
    assert "Best accuracy: 101.00" in capsys.readouterr().out
    on = make("SOLVER.EMA 0.9 SOLVER.EPOCHS 3")
    assert on.begin(resume=True) == 3 and on.ema.updates == 0
    assert "SOLVER.EMA 0.9 (was 0.0), an EMA that starts at the checkpoint's weights\n" in capsys.readouterr().err
    weights = on.distiller.student.state_dict()
    assert all(torch.equal(mean, weights[name]) for name, mean in on.ema.network.state_dict().items())
    on.run(3)
    assert on.state.best_acc == {"student": 101.0, "ema": on.state.last_acc["ema"]} == best_of(on)


def test_the_originals_best_is_the_main_heads(make):
    """The original's checkpoint has one number, whatever the number of heads."""
    trainer = make("SOLVER.EPOCHS 3", Dropping(heads=2))
    trainer.log_path.mkdir(parents=True)
    state = {f"module.{k}": v for k, v in trainer.distiller.state_dict().items()}
    original = {"epoch": 2, "model": state, "optimizer": trainer.optimizer.state_dict(), "best_acc": 101.0}
    torch.save(original, trainer.log_path / "latest")
    trainer.train(resume=True)
    assert trainer.state.best_acc == {"main": 101.0, "reversed": trainer.state.last_acc["reversed"]}
    assert not (trainer.log_path / "best").exists() and (trainer.log_path / "student_best_reversed").exists()


def test_dcgd_resumes_from_the_originals_checkpoint(tmp_path):
    """Which knows one head, where DCGD has two, and three with an EMA."""
    torch.manual_seed(0)
    torch.save({"model": build_model(cifar_model_dict, "resnet8", 10).state_dict()}, tmp_path / "teacher")
    (tmp_path / "groups.json").write_text("[[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]")
    for ema in ("0", "0.9"):
        cfg = load_cfg(
            "configs/digits/kd.yaml",
            f"""LOG.WANDB False LOG.PREFIX {tmp_path}/{ema} EXPERIMENT.DEVICE cpu DISTILLER.TYPE DCGD SOLVER.EPOCHS 2
            DCGD.GROUPS {tmp_path}/groups.json DISTILLER.TEACHER resnet8 DISTILLER.TEACHER_CKPT {tmp_path}/teacher
            DATASET.TRAIN_FRACTION 0.05 DATASET.VAL_FRACTION 0.05 SOLVER.EMA {ema}""".split(),
        )
        trainer = build_trainer(cfg)
        trainer.log_path.mkdir(parents=True)
        state = trainer.distiller.state_dict()
        original = {"epoch": 1, "model": state, "optimizer": trainer.optimizer.state_dict(), "best_acc": 101}
        torch.save(original, trainer.log_path / "latest")
        trainer.train(resume=True)
        first, *others = trainer.state.last_acc
        assert trainer.state.best_acc == {first: 101.0, **{name: trainer.state.last_acc[name] for name in others}}
        assert others == (["single"] if ema == "0" else ["single", "ema"])


# A folder that holds a run


@pytest.mark.parametrize(
    "name, proceed",
    [
        *((name, "add --resume to continue it, or --overwrite") for name in ("latest_previous", "best", "epoch_40")),
        *((name, "add --overwrite to replace it") for name in ("student_best", "student_40", "student_latest_ema")),
    ],
)
def test_a_new_run_leaves_every_checkpoint_alone(make, name, proceed):
    trainer = make()
    trainer.log_path.mkdir(parents=True)
    (trainer.log_path / name).write_text("precious")
    with pytest.raises(UserError, match=rf"already holds a run; .*{proceed}.*\({name} stands there\)"):
        trainer.train()
    assert [path.name for path in trainer.log_path.iterdir()] == [name]


def test_a_checkpoint_of_no_epoch_is_resumed_not_removed(make):
    trainer = make("SOLVER.EPOCHS 1")
    trainer.log_path.mkdir(parents=True)
    for name in ("latest", "epoch_40"):
        save_checkpoint(trainer.state._content(0), trainer.log_path / name)
    trainer.train(resume=True)
    assert (trainer.log_path / "epoch_40").exists()


# Generators


def test_the_generator_is_that_of_the_runs_own_gpu(monkeypatch):
    """There is no second GPU to test with."""
    asked = []
    state = torch.get_rng_state()
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device="cuda": asked.append(device) or state)
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda new_state, device="cuda": asked.append(device))
    second = torch.device("cuda:1")
    set_random_state(random_state(second), second)
    assert asked == [second, second]
    set_random_state(random_state(torch.device("cpu")), second)  # no state of a GPU to restore
    assert asked == [second, second] and random_state(torch.device("cpu"))["cuda"] is None
