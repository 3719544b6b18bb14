"""Mixed, erased and smoothed training: every method's losses, the batches, every mode of the step, what is refused."""

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.data import DataLoader

from mdistiller.dataset import ImageArray
from mdistiller.dataset.mixing import Erasing, Mixing
from mdistiller.distillers import DKD, KD, Distiller, Vanilla, distiller_dict
from mdistiller.engine.batches import BatchReader
from mdistiller.engine.cfg import CFG, load_cfg
from mdistiller.engine.modes import check_modes
from mdistiller.engine.scores import evaluate_distiller
from mdistiller.engine.trainer import DOT, BaseTrainer
from mdistiller.engine.update import SumUpdate
from mdistiller.errors import UserError

from .._networks import CLASSES, Net
from ..distillers.checks import normal
from ..distillers.test_registry import batch, build
from ._recorder import recording  # noqa: F401
from ._runs import Interrupted, loaders, student_of, trainer_of
from .test_compile import graphs  # noqa: F401

MIXED = ("DATASET.MIXUP", "0.8", "DATASET.CUTMIX", "1.0")
ALL = (*MIXED, "DATASET.ERASING", "0.3", "SOLVER.LABEL_SMOOTHING", "0.1")
READ_LABELS = {"CRD", "DKD", "DCGD_DKD", "NKD", "RLD", "SDD_DKD", "SDD_KD", "SDD_NKD", "WKD"}
TWO_VIEWS = {name for name, method in distiller_dict.items() if "image_weak" in method.needs_batch}
TASK = ("ce", "loss_ce", "loss_CE", "loss_multi_ce")


def configured(*overrides):
    return load_cfg("configs/digits/kd.yaml", [*overrides])


def soft(target, other, share, classes):
    return share[:, None] * F.one_hot(target, classes) + (1 - share)[:, None] * F.one_hot(other, classes)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_cross_entropy_is_torchs_with_soft_labels(smoothing):
    method = Vanilla(Net())
    method.smooth_labels(smoothing)
    logits, generator = normal(6, 5), torch.Generator().manual_seed(0)
    target, other = torch.randint(5, (2, 6), generator=generator)
    share = torch.rand(6, generator=generator, dtype=torch.float64)
    ours = method.cross_entropy(logits, target, mixed_target=other, target_share=share, epoch=3)
    theirs = F.cross_entropy(logits, soft(target, other, share, 5), label_smoothing=smoothing)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    plain = method.cross_entropy(logits, target, index=target)
    assert torch.equal(plain, F.cross_entropy(logits, target, label_smoothing=smoothing))


def test_the_cross_entropy_by_hand():
    """Two classes, p = (0.9, 0.1), labels 0 and 1 with the share 0.75: -(0.75 ln 0.9 + 0.25 ln 0.1) = 0.6547."""
    logits = torch.tensor([[0.9, 0.1]], dtype=torch.float64).log()
    zero, one = torch.tensor([0]), torch.tensor([1])
    loss = Vanilla(Net()).cross_entropy(logits, zero, mixed_target=one, target_share=torch.tensor([0.75]))
    assert float(loss) == pytest.approx(0.65466666, abs=1e-8)


def losses_of(name, smoothing=0.0, **fields):
    method = build(name).eval()  # BatchNorm's statistics then stay the same
    method.smooth_labels(smoothing)
    with torch.no_grad():
        logits, losses = method.forward_train(**batch() | fields)
    return logits, losses


@pytest.mark.parametrize("name", sorted(set(distiller_dict) - READ_LABELS))
def test_every_method_learns_both_labels_of_a_mixed_image_and_distils_as_before(name):
    first, share = batch()["target"], 0.7
    second = (first + 1) % 100
    mixed = {"mixed_target": second, "target_share": torch.full((4,), share)}
    (_, one), (_, two) = losses_of(name), losses_of(name, target=second)
    _, both = losses_of(name, **mixed)
    for key, loss in both.items():
        expected = share * one[key] + (1 - share) * two[key] if key in TASK else one[key]
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6, msg=key)
    assert set(TASK).intersection(both) or distiller_dict[name].label_weights(CFG) == ()  # it reads no labels


@pytest.mark.parametrize("name", sorted(distiller_dict))
def test_every_method_smooths_its_labels_and_distils_as_before(name):
    logits, plain = losses_of(name)
    _, smoothed = losses_of(name, smoothing=0.3)
    shown = [logits]
    if name in TWO_VIEWS:
        strong, _ = losses_of(name, image_weak=batch()["image_strong"])
        shown.append(strong)
    for key in plain.keys() - set(TASK):
        torch.testing.assert_close(smoothed[key], plain[key], rtol=1e-6, atol=0, msg=key)
    for key in plain.keys() & {"ce", "loss_ce"}:
        target = batch()["target"]
        weight = plain[key] / sum(F.cross_entropy(own, target) for own in shown)
        expected = weight * sum(F.cross_entropy(own, target, label_smoothing=0.3) for own in shown)
        torch.testing.assert_close(smoothed[key], expected, rtol=1e-5, atol=1e-6)
    assert all(smoothed[key] != plain[key] for key in plain.keys() & set(TASK))


@pytest.mark.parametrize("name", sorted(distiller_dict))
@pytest.mark.parametrize("key", ["DATASET.MIXUP", "DATASET.CUTMIX"])
def test_methods_that_read_labels_are_refused_by_name(name, key):
    cfg = configured(key, "0.5", "DCGD.BASE", "KD")
    method = distiller_dict[name]
    if name not in READ_LABELS | TWO_VIEWS:
        check_modes(cfg, method, SumUpdate, 1)
        return
    why = "which needs two views of each image: " if name in TWO_VIEWS else "whose loss reads "
    names = rf"{key} 0.5 does not go with {method.__name__}, {why}.*set {key} 0"
    with pytest.raises(UserError, match=names):
        check_modes(cfg, method, SumUpdate, 1)


def test_dcgd_is_judged_by_its_base_method():
    check_modes(configured(*MIXED), distiller_dict["DCGD"], SumUpdate, 1)
    with pytest.raises(UserError, match=r"DATASET\.MIXUP 0.8 does not go with DCGD, whose loss reads the label"):
        check_modes(configured(*MIXED, "DCGD.BASE", "DKD"), distiller_dict["DCGD"], SumUpdate, 1)
    assert build("DCGD_DKD").reads_labels and not build("DCGD_KD").reads_labels and build("DCGD_KD").soft_labels


def test_a_method_with_a_forward_train_of_its_own_declares_anew():
    class Own(KD):
        def forward_train(self, image, target, **kwargs):
            return super().forward_train(image, target)

    class Declared(KD):
        soft_labels = True

        def forward_train(self, image, target, **kwargs):
            return super().forward_train(image, target, **kwargs)

    class Tuned(DKD):
        pass

    assert (Own.soft_labels, Declared.soft_labels, Tuned.soft_labels, Tuned.reads_labels) == (False, True, True, True)
    for overrides in (MIXED, ("SOLVER.LABEL_SMOOTHING", "0.1")):
        with pytest.raises(UserError, match="does not go with Own, which does not take its cross-entropy from self"):
            check_modes(configured(*overrides), Own, SumUpdate, 1)
        check_modes(configured(*overrides), Declared, SumUpdate, 1)


class Needs:
    """Stands for a distiller: all that is read of it is what it needs."""

    def __init__(self, *names):
        self.needs_batch = names


CPU = torch.device("cpu")


def read(cfg, made, *needs):
    return BatchReader(Needs(*needs), made, CPU, cfg)(next(iter(made)), 1)


def test_images_are_erased_and_then_mixed():
    cfg = configured(*ALL)
    image, target, index = next(iter(loaders()[0]))
    plain = {"image": image, "target": target, "index": index}
    expected = Mixing(0.8, 1.0, cfg.EXPERIMENT.SEED)(Erasing(0.3, cfg.EXPERIMENT.SEED)(plain, 1), 1)
    fields = read(cfg, loaders()[0])
    assert fields.keys() == {"image", "target", "index", "mixed_target", "target_share"}
    assert all(torch.equal(fields[name], expected[name]) for name in fields)
    assert not torch.equal(fields["image"], image)


def test_without_the_settings_a_batch_is_what_the_loader_yields():
    fields = read(CFG, loaders()[0])
    assert all(torch.equal(a, b) for a, b in zip(fields.values(), next(iter(loaders()[0])), strict=True))


@pytest.mark.parametrize("keys", [("DATASET.MIXUP", "1.0"), ("DATASET.ERASING", "0.5")])
def test_a_batch_without_index_cannot_be_mixed_or_erased(keys):
    made = DataLoader([(torch.zeros(3, 8, 8), i % 3) for i in range(8)], batch_size=4)
    with pytest.raises(UserError, match="drawn for each image's index, but a batch has only image, target; let"):
        read(configured(*keys), made)


def test_a_dataloader_of_the_users_own_is_mixed_by_its_index():
    made = DataLoader([(torch.full((3, 8, 8), float(i)), i % 3, i) for i in range(8)], batch_size=4)
    assert read(configured(*MIXED), made)["target_share"].shape == (4,)
    with pytest.raises(UserError, match=r"DATASET.AUGMENT randaugment is for .* come from a DataLoader of your own"):
        read(configured("DATASET.AUGMENT", "randaugment"), made)


def own(seed=0):
    images = torch.randint(0, 256, (12, 8, 8, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return ImageArray(images, torch.arange(12) % 3, (0.5,) * 3, (0.25,) * 3).loader(4, 0, train=True)


def test_two_views_come_where_a_method_asks_for_one():
    fields = read(CFG, own(), "image_strong", "index")
    assert list(fields) == ["image", "target", "index", "image_weak", "image_strong"]
    assert torch.equal(fields["image_weak"], fields["image"])
    assert list(read(CFG, own(), "index")) == ["image", "target", "index"]
    cfg = configured("SOLVER.CHANNELS_LAST", "False")
    assert read(cfg, own(), "image_weak")["image_strong"].is_contiguous()


def test_views_of_a_loader_that_has_none_are_refused_by_name():
    made = DataLoader([(torch.zeros(3, 8, 8), i % 3, i) for i in range(8)], batch_size=4)
    with pytest.raises(UserError, match=r"unknown field of the batch \(Needs.needs_batch\) 'image_weak'"):
        read(CFG, made, "image_weak")


def test_validation_is_not_smoothed(tmp_path):
    plain = trainer_of(tmp_path, distiller=Vanilla(Net()))
    smoothed = trainer_of(tmp_path, "SOLVER.LABEL_SMOOTHING", "0.9", distiller=Vanilla(Net()))
    smoothed.distiller.load_state_dict(plain.distiller.state_dict())
    scores = [evaluate_distiller(t.val_loader, t.distiller) for t in (plain, smoothed)]
    assert scores[0] == scores[1] and smoothed.distiller.label_smoothing == 0.9


class Views(Distiller):
    """Cross-entropy on the weak view, consistency with the strong one."""

    needs_teacher, needs_batch, soft_labels = False, ("image_weak", "image_strong"), True

    def __init__(self):
        torch.manual_seed(0)
        super().__init__(Net(), nn.Identity())

    def forward_train(self, image, target, image_weak, image_strong, **kwargs):
        logits, strong = self.student(image_weak)[0], self.student(image_strong)[0]
        loss = F.kl_div(strong.log_softmax(1), logits.detach().softmax(1), reduction="batchmean")
        return logits, {"loss_ce": self.cross_entropy(logits, target, **kwargs), "loss_kd": loss}


CASES = {
    "mixed": (lambda: Vanilla(Net()), ALL),
    "mixed, in micro-batches, skipping NaN": (
        lambda: Vanilla(Net()), (*ALL, "SOLVER.ACCUMULATE", "3", "SOLVER.NAN_POLICY", "skip"),
    ),
    "two views": (Views, ("DATASET.ERASING", "0.3")),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_run_stopped_within_an_epoch_and_resumed_ends_with_the_same_bits(case, tmp_path):
    make, overrides = CASES[case]
    overrides = (*overrides, "LOG.SAVE_CHECKPOINT_ITERS", "1")
    for name in ("whole", "parts"):
        torch.manual_seed(0)
        trainer = trainer_of(tmp_path, *overrides, name=name, distiller=make())
        if name == "parts":
            trainer.step.update.step = Interrupted(trainer.step.update.step, calls=9)  # in the second epoch
            with pytest.raises(KeyboardInterrupt):
                trainer.train()
            torch.manual_seed(0)
            trainer = trainer_of(tmp_path, *overrides, name=name, distiller=make())
            trainer.train(resume=True)
        else:
            trainer.train()
            whole = student_of(trainer)
    assert whole.keys() and all(torch.equal(value, whole[key]) for key, value in student_of(trainer).items())


def gradients(tmp_path, *overrides):
    torch.manual_seed(0)
    trainer = trainer_of(tmp_path, *overrides, distiller=Vanilla(Net()).double())
    fields = trainer.prepare_batch(next(iter(trainer.train_loader)), 1)
    fields["image"] = fields["image"].double()
    found = {}
    trainer.update.step = lambda norm: found.update(
        {name: p.grad.clone() for name, p in trainer.distiller.named_parameters()}
    )
    trainer.distiller.train()
    trainer.step(fields, 1, 1)
    return found


def test_micro_batches_add_up_to_the_mixed_batch(tmp_path):
    whole, parts = gradients(tmp_path, *ALL), gradients(tmp_path, *ALL, "SOLVER.ACCUMULATE", "3")
    assert whole
    for name, grad in whole.items():
        torch.testing.assert_close(parts[name], grad, rtol=1e-6, atol=1e-9)
    plain = gradients(tmp_path)
    assert any(not torch.allclose(plain[name], grad) for name, grad in whole.items())


@pytest.mark.slow
def test_a_compiled_step_of_mixed_images_is_one_graph_and_the_plain_step(tmp_path, graphs):  # noqa: F811
    found = []
    for mode in ((), ("SOLVER.COMPILE", "True")):
        torch.manual_seed(0)
        trainer = trainer_of(tmp_path, *ALL, *mode, name="_".join(mode) or "plain", distiller=Vanilla(Net()))
        trainer.train()
        found.append(student_of(trainer))
    assert graphs.frame_count == 1
    for key, value in found[0].items():
        torch.testing.assert_close(found[1][key], value, rtol=1e-5, atol=1e-6)


def test_a_recorded_step_follows_the_mixed_batches(tmp_path, recording):  # noqa: F811
    found = []
    for mode in ("never", "auto"):
        torch.manual_seed(0)
        trainer = trainer_of(tmp_path, *ALL, "SOLVER.CUDA_GRAPH", mode, name=mode, distiller=Vanilla(Net()))
        trainer.train()
        found.append(student_of(trainer))
    assert recording.recorded == 1 and trainer.take_step.recording.replays > 3
    for key, value in found[0].items():
        torch.testing.assert_close(found[1][key], value, rtol=1e-5, atol=1e-6)


def test_dot_trains_on_mixed_labels(tmp_path):
    class Both(Vanilla):
        distills = True
        soft_labels = True

        def forward_train(self, image, target, **kwargs):
            logits, losses = super().forward_train(image, target, **kwargs)
            return logits, losses | {"loss_kd": logits.square().mean()}

    trainer = trainer_of(tmp_path, *ALL, cls=DOT, distiller=Both(Net()))
    trainer.train()
    assert trainer.state.scores.last


def test_a_train_iter_of_the_users_own_would_learn_one_label(tmp_path):
    class Original(BaseTrainer):
        def train_iter(self, data, epoch, train_meters):
            raise AssertionError

    with pytest.raises(UserError, match=r"takes the whole step itself, so that DATASET.MIXUP 0.8 would have no effect"):
        trainer_of(tmp_path, *MIXED, cls=Original)


def test_the_training_accuracy_counts_the_label_of_the_larger_share(tmp_path):
    trainer = trainer_of(tmp_path, *MIXED, distiller=Vanilla(Net()))
    fields = trainer.prepare_batch(next(iter(trainer.train_loader)), 1)
    trainer.distiller.train()
    hits = trainer.distiller.student(fields["image"])[0].argmax(1) == fields["target"]
    result = trainer.step(fields, 1, 1)
    assert result.sums[0] == 100 * hits.sum() and CLASSES == 3
