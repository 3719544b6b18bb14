"""What goes with what: every rule refuses its pair by name, before data are loaded where it can, and nothing else."""

import pytest
import torch

from mdistiller.dataset import get_dataset
from mdistiller.distillers import AT, CRD, DCGD, DKD, KD, OFD, RKD, Distiller, ReviewKD, Vanilla, distiller_dict
from mdistiller.engine import build
from mdistiller.engine.cfg import load_cfg
from mdistiller.engine.modes import MODES, RULES, SIDES, TRAITS, Setup, broken_rule, check_modes
from mdistiller.engine.split_update import AlignedUpdate, DeepKDUpdate, DotUpdate
from mdistiller.engine.trainer import BaseTrainer
from mdistiller.engine.update import SumUpdate
from mdistiller.errors import UserError
from mdistiller.models import build_model, cifar_model_dict

from .._networks import Net

FINITE, ENDLESS = type("Finite", (), {"variants": 81})(), type("Endless", (), {"variants": None})()
UNLABELLED, NO_CE = type("Unlabelled", (), {"labelled": False})(), "KD.LOSS.CE_WEIGHT 0"
NO_LABELS = "DATASET.TYPE digits, which has no labels,"
IN_MEMORY = "DISTILLER.TEACHER_CACHE_DEVICE device"

MIXUP, CUTMIX, SMOOTHING = "DATASET.MIXUP 0.8", "DATASET.CUTMIX 1.0", "SOLVER.LABEL_SMOOTHING 0.1"


class Views(KD):
    """Needs two views."""

    teacher_outputs = ("logits",)
    needs_batch = ("image_weak", "image_strong")


IN_FILES = "DISTILLER.TEACHER_CACHE c DISTILLER.TEACHER_CACHE_DEVICE host"

# Overrides, method, update rule, ranks, loader: what is refused, and the two sides that the line names.
ALIGNED = "aligned gradients (SOLVER.TRAINER)"
REFUSED = [
    ("EXPERIMENT.LOGIT_STAND True", RKD, SumUpdate, 1, None, "EXPERIMENT.LOGIT_STAND True", "RKD, which softens no"),
    ("SOLVER.BATCH_SIZE 63", KD, SumUpdate, 2, None, "SOLVER.BATCH_SIZE 63", "2 processes"),
    ("SOLVER.ACCUMULATE 33", KD, SumUpdate, 2, None, "SOLVER.ACCUMULATE 33", "more than the 32 images"),
    ("SOLVER.ACCUMULATE 2", RKD, SumUpdate, 1, None, "SOLVER.ACCUMULATE 2", "RKD, which compares the images"),
    ("SOLVER.ACCUMULATE 2", KD, DotUpdate, 1, None, "SOLVER.ACCUMULATE 2", "DOT (SOLVER.TRAINER)"),
    ("SOLVER.CLIP_GRAD_NORM 0.5", KD, DotUpdate, 1, None, "SOLVER.CLIP_GRAD_NORM 0.5", "DOT (SOLVER.TRAINER)"),
    ("SOLVER.AMP fp16", KD, DotUpdate, 1, None, "SOLVER.AMP fp16", "DOT (SOLVER.TRAINER)"),
    ("SOLVER.TYPE AdamW", KD, DotUpdate, 1, None, "SOLVER.TYPE AdamW", "DOT (SOLVER.TRAINER)"),
    ("SOLVER.DOT.DELTA 0.1", KD, DotUpdate, 1, None, "SOLVER.DOT.DELTA 0.1", "take a smaller SOLVER.DOT.DELTA"),
    ("SOLVER.DOT.DELTA 0.95", KD, DotUpdate, 1, None, "SOLVER.DOT.DELTA 0.95", "SOLVER.MOMENTUM 0.9"),
    ("SOLVER.DOT.DELTA -0.2", KD, DotUpdate, 1, None, "SOLVER.DOT.DELTA -0.2", "SOLVER.MOMENTUM 0.9"),
    ("", Vanilla, DotUpdate, 1, None, "DOT (SOLVER.TRAINER)", "Vanilla, which has not both kinds of loss"),
    ("SOLVER.ACCUMULATE 2", KD, DeepKDUpdate, 1, None, "SOLVER.ACCUMULATE 2", "DeepKD (SOLVER.TRAINER)"),
    ("SOLVER.TYPE AdamW", DKD, DeepKDUpdate, 1, None, "SOLVER.TYPE AdamW", "DeepKD (SOLVER.TRAINER)"),
    ("SOLVER.DEEPKD.DELTA_TOG 0.1", KD, DeepKDUpdate, 1, None, "SOLVER.DEEPKD.DELTA_TOG 0.1", "MOMENTUM 0.9"),
    ("SOLVER.DEEPKD.DELTA_NCG -0.95", KD, DeepKDUpdate, 1, None, "SOLVER.DEEPKD.DELTA_NCG -0.95", "must be in [0, 1)"),
    ("", RKD, DeepKDUpdate, 1, None, "DeepKD (SOLVER.TRAINER)", "RKD, which cannot be decoupled"),
    ("", DCGD, DeepKDUpdate, 1, None, "DeepKD (SOLVER.TRAINER)", "DCGD, which cannot be decoupled"),
    ("", Vanilla, DeepKDUpdate, 1, None, "DeepKD (SOLVER.TRAINER)", "Vanilla, which has not both kinds of loss"),
    (MIXUP, KD, DeepKDUpdate, 1, None, MIXUP, "DeepKD (SOLVER.TRAINER)"),
    (CUTMIX, KD, DeepKDUpdate, 1, None, CUTMIX, "DeepKD (SOLVER.TRAINER)"),
    (NO_CE, KD, DeepKDUpdate, 1, UNLABELLED, NO_LABELS, "DeepKD (SOLVER.TRAINER)"),
    ("", Vanilla, AlignedUpdate, 1, None, ALIGNED, "Vanilla, which has not both kinds of loss"),
    ("DISTILLER.TEACHER_CACHE c", Vanilla, SumUpdate, 1, FINITE, "DISTILLER.TEACHER_CACHE c", "Vanilla, which has no"),
    ("DISTILLER.TEACHER_CACHE c", OFD, SumUpdate, 1, FINITE, "DISTILLER.TEACHER_CACHE c", "OFD, which runs its"),
    ("DISTILLER.TEACHER_CACHE c", ReviewKD, SumUpdate, 1, FINITE, "DISTILLER.TEACHER_CACHE c", "reads preact_feats of"),
    ("DISTILLER.TEACHER_CACHE c", KD, SumUpdate, 1, ENDLESS, "DISTILLER.TEACHER_CACHE c", "DATASET.TYPE digits"),
    (IN_MEMORY, Vanilla, SumUpdate, 1, FINITE, IN_MEMORY, "Vanilla, which has no teacher"),
    (IN_MEMORY, OFD, SumUpdate, 1, FINITE, IN_MEMORY, "OFD, which runs its teacher in training mode"),
    (IN_MEMORY, ReviewKD, SumUpdate, 1, FINITE, IN_MEMORY, "ReviewKD, which reads preact_feats of"),
    (IN_MEMORY, KD, SumUpdate, 1, ENDLESS, IN_MEMORY, "DATASET.TYPE digits"),
    ("DISTILLER.TEACHER_CACHE c", Views, SumUpdate, 1, FINITE, "DISTILLER.TEACHER_CACHE c", "Views, which needs two"),
    (IN_MEMORY, Views, SumUpdate, 1, FINITE, IN_MEMORY, "Views, which needs two views of each image"),
    (MIXUP, Distiller, SumUpdate, 1, None, MIXUP, "Distiller, which does not take its cross-entropy from"),
    (MIXUP, CRD, SumUpdate, 1, None, MIXUP, "CRD, whose loss reads the label or the index"),
    (MIXUP, Views, SumUpdate, 1, None, MIXUP, "Views, which needs two views"),
    (CUTMIX, Distiller, SumUpdate, 1, None, CUTMIX, "Distiller, which does not take its cross-entropy from"),
    (CUTMIX, DKD, SumUpdate, 1, None, CUTMIX, "DKD, whose loss reads the label or the index"),
    (CUTMIX, Views, SumUpdate, 1, None, CUTMIX, "Views, which needs two views"),
    (SMOOTHING, Distiller, SumUpdate, 1, None, SMOOTHING, "Distiller, which does not take its cross-entropy from"),
    *(
        (f"{setting} {cache}", KD, SumUpdate, 1, FINITE, cache, f"{setting}, whose images have no finite number of")
        for cache in ("DISTILLER.TEACHER_CACHE c", IN_MEMORY)
        for setting in (
            MIXUP, CUTMIX, "DATASET.ERASING 0.25", "DATASET.AUGMENT resized_crop", "DATASET.AUGMENT randaugment",
            "DATASET.AUGMENT trivialaugment",
        )
    ),
    ("DISTILLER.PAIRS [[1,1]]", KD, SumUpdate, 1, None, "DISTILLER.PAIRS [[1, 1]]", "KD, which compares no pairs"),
    ("SOLVER.CUDA_GRAPH always", KD, SumUpdate, 2, None, "SOLVER.CUDA_GRAPH always", "2 processes"),
    ("SOLVER.CUDA_GRAPH always SOLVER.NAN_POLICY skip", KD, SumUpdate, 1, None, "SOLVER.CUDA_GRAPH", "NAN_POLICY skip"),
    (f"SOLVER.CUDA_GRAPH always {IN_FILES}", KD, SumUpdate, 1, None, "SOLVER.CUDA_GRAPH", "TEACHER_CACHE_DEVICE"),
    ("", KD, SumUpdate, 1, UNLABELLED, NO_LABELS, "KD, whose loss reads labels"),
    ("DCGD.BASE KD", DCGD, SumUpdate, 1, UNLABELLED, NO_LABELS, "set KD.LOSS.CE_WEIGHT 0 and DCGD.LOSS.CE"),
    ("", DKD, SumUpdate, 1, UNLABELLED, NO_LABELS, "DKD, whose loss reads labels"),
    (f"{NO_CE} DISTILLER.SCORE_TEACHER True", KD, SumUpdate, 1, UNLABELLED, NO_LABELS, "SCORE_TEACHER True"),
    (f"{NO_CE} {SMOOTHING}", KD, SumUpdate, 1, UNLABELLED, NO_LABELS, SMOOTHING),
    ("SOLVER.CUDA_GRAPH always EXPERIMENT.DEVICE cpu", KD, SumUpdate, 1, None, "SOLVER.CUDA_GRAPH", "DEVICE cpu"),
]  # fmt: skip
ACCEPTED = [
    (NO_CE, KD, SumUpdate, 1, UNLABELLED),
    ("AT.LOSS.CE_WEIGHT 0", AT, SumUpdate, 1, UNLABELLED),
    ("", KD, DotUpdate, 2, FINITE),
    ("EXPERIMENT.LOGIT_STAND True SOLVER.DEEPKD.DELTA_NCG 0.095", KD, DeepKDUpdate, 2, FINITE),
    (f"SOLVER.DEEPKD.RELEASED True SOLVER.AMP bf16 {SMOOTHING}", DKD, DeepKDUpdate, 1, FINITE),
    ("SOLVER.AMP fp16 SOLVER.ACCUMULATE 2 SOLVER.CLIP_GRAD_NORM 1.0 SOLVER.TYPE AdamW", KD, AlignedUpdate, 2, FINITE),
    (f"{MIXUP} {CUTMIX}", RKD, AlignedUpdate, 1, ENDLESS),
    ("SOLVER.ACCUMULATE 32", KD, SumUpdate, 2, ENDLESS),
    ("SOLVER.DOT.DELTA 0.95 SOLVER.ACCUMULATE 2", KD, SumUpdate, 1, FINITE),
    ("SOLVER.AMP bf16 SOLVER.DOT.DELTA 0.09", KD, DotUpdate, 1, FINITE),
    ("DISTILLER.TEACHER_CACHE c", RKD, SumUpdate, 2, FINITE),
    ("DISTILLER.TEACHER_CACHE c", KD, SumUpdate, 1, None),
    (IN_MEMORY, RKD, DotUpdate, 2, FINITE),
    ("DISTILLER.TEACHER_CACHE_DEVICE host", OFD, SumUpdate, 1, ENDLESS),
    ("DISTILLER.PAIRS [[1,1]]", ReviewKD, SumUpdate, 1, None),
    (f"{MIXUP} {CUTMIX} {SMOOTHING} DATASET.ERASING 0.25 DATASET.AUGMENT randaugment", RKD, DotUpdate, 2, ENDLESS),
    (f"{SMOOTHING} DATASET.AUGMENT crop_flip DISTILLER.TEACHER_CACHE c", KD, SumUpdate, 1, FINITE),
    (f"{SMOOTHING} DATASET.ERASING 0.25", CRD, SumUpdate, 1, FINITE),
    ("SOLVER.AMP fp16 SOLVER.TYPE AdamW SOLVER.CLIP_GRAD_NORM 1.0", Vanilla, SumUpdate, 1, ENDLESS),
]


def configured(overrides):
    return load_cfg("configs/digits/kd.yaml", overrides.split())


def broken(overrides, method, update, world, loader):
    return broken_rule(Setup(configured(overrides), method, update, world, loader))


@pytest.mark.parametrize("overrides, method, update, world, loader, this, that", REFUSED)
def test_a_bad_pair_is_refused_in_one_line_that_names_both_sides(overrides, method, update, world, loader, this, that):
    with pytest.raises(UserError) as error:
        check_modes(configured(overrides), method, update, world, loader)
    line = str(error.value)
    assert line.startswith(f"{this} ") and " does not go with " in line and that in line and "\n" not in line, line
    remedy = line.rpartition("; ")[2]
    assert remedy.startswith(("set ", "take ", "use ", "leave ")) and "{" not in line, line


@pytest.mark.parametrize("overrides, method, update, world, loader", ACCEPTED)
def test_a_good_pair_is_not(overrides, method, update, world, loader):
    assert broken(overrides, method, update, world, loader) is None


def test_every_rule_is_tested_and_names_sides_that_exist():
    assert {broken(*case[:5]) for case in REFUSED} == set(RULES)
    assert len({side.name for side in (*MODES, *TRAITS)}) == len(MODES) + len(TRAITS) == len(SIDES)
    named = {name for rule in RULES for name in (rule.this, rule.that)}
    assert {trait.name for trait in TRAITS} <= named <= set(SIDES)


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode.settings], ids=lambda mode: mode.name)
def test_the_settings_of_a_mode_switch_it_on(mode):
    def holds(settings):
        words = [str(word) for pair in settings.items() for word in pair]
        cfg = load_cfg("configs/digits/kd.yaml", words)
        return mode.holds(Setup(cfg, KD, build.trainer_dict[cfg.SOLVER.TRAINER].update_rule, 1))

    assert holds(mode.settings)
    off = {"DATASET.NUM_WORKERS": 0} if "DATASET.NUM_WORKERS" in mode.settings else {}
    assert not holds(off)


def test_a_built_method_is_judged_by_what_it_declared_when_it_was_built():
    """DCGD takes over its base method's needs; a class may declare the outputs as it is built."""

    class Late(Distiller):
        def __init__(self, outputs):
            self.teacher_outputs = outputs
            super().__init__(Net(), Net())

    cached = "DISTILLER.TEACHER_CACHE c"
    assert broken(cached, Late, SumUpdate, 1, None) is None
    assert broken(cached, Late(("logits",)), SumUpdate, 1, FINITE) is None
    assert broken(cached, Late(("feats",)), SumUpdate, 1, FINITE).that == "methods with other `teacher_outputs`"
    assert broken(cached, Late(None), SumUpdate, 1, FINITE).that == "methods with other `teacher_outputs`"


def test_dcgd_is_judged_by_its_base_method(tmp_path):
    torch.manual_seed(0)
    teacher = build_model(cifar_model_dict, "resnet8", 10)
    torch.save({"model": teacher.state_dict()}, tmp_path / "teacher")
    run = f"""LOG.PREFIX {tmp_path} LOG.WANDB False EXPERIMENT.DEVICE cpu DISTILLER.TYPE DCGD DISTILLER.STUDENT resnet8
    DISTILLER.TEACHER resnet8 DISTILLER.TEACHER_CKPT {tmp_path}/teacher DCGD.GROUPS configs/digits/groups.json
    SOLVER.ACCUMULATE 2"""
    for base, pairs in (("AT", "[[1,1]]"), ("KD", "[]")):
        build.build_trainer(configured(f"{run} DCGD.BASE {base} DISTILLER.PAIRS {pairs}"))
    refused = {
        "DCGD.BASE RKD": "ACCUMULATE 2 does not go with DCGD, which compares the images of a batch",
        "DISTILLER.PAIRS [[1,1]]": "does not go with DCGD, which compares no pairs",
        "DCGD.BASE AT DISTILLER.TEACHER_CACHE c": "does not go with DCGD, which reads feats of",
        "DCGD.BASE OFD DISTILLER.TEACHER_CACHE c": "does not go with DCGD, which runs its teacher in training mode",
    }
    for overrides, message in refused.items():
        with pytest.raises(UserError, match=message):
            build.build_trainer(configured(f"{run} {overrides}"))


def test_a_bad_pair_is_refused_before_data_are_loaded(monkeypatch):
    monkeypatch.setattr(build, "get_dataset", lambda cfg: pytest.fail("data were loaded"))
    with pytest.raises(UserError, match="does not go with RKD"):
        build.build_trainer(configured("DISTILLER.TYPE RKD SOLVER.ACCUMULATE 2"))


def test_a_trainer_built_by_hand_refuses_it_too(tmp_path):
    class Compares(KD):
        compares_images = True

    cfg = configured(f"LOG.PREFIX {tmp_path} EXPERIMENT.DEVICE cpu SOLVER.ACCUMULATE 2")
    loaders = get_dataset(cfg)[:2]
    with pytest.raises(UserError, match=r"SOLVER\.ACCUMULATE 2 does not go with Compares, which compares the images"):
        BaseTrainer("run", Compares(Net(), Net(), cfg), *loaders, cfg)


def test_every_method_declares_what_the_rules_read():
    for method in distiller_dict.values():
        loss = "compares_images", "compares_maps", "distills", "soft_labels", "reads_labels"
        for declaration in (*loss, "needs_teacher", "teacher_in_train_mode"):
            assert isinstance(getattr(method, declaration), bool), (method, declaration)
