"""Parts of a user's own that do not fit: refused by name before the first step, and before anything is written."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset, IterableDataset

from mdistiller.distillers import CRD, KD, RKD, Distiller, FitNet, Vanilla
from mdistiller.engine.cfg import CFG
from mdistiller.engine.trainer import BaseTrainer
from mdistiller.errors import UserError

from .._networks import CLASSES, Net
from ._runs import trainer_of

REPOSITORY = Path(__file__).resolve().parents[2]


class Images(Dataset):
    """24 images, of which `image` and `target` make those of an index."""

    def __init__(self, image=lambda i: torch.full((3, 8, 8), i / 24), target=lambda i: i % CLASSES):
        self.image, self.target = image, target

    def __len__(self):
        return 24

    def __getitem__(self, i):
        return self.image(i), self.target(i), i


def loader(targets=None, **options):
    made = DataLoader(Images(**options), batch_size=8)
    if targets is not None:
        made.targets = targets
    return made


class Maps(Net):
    """A network with all features and a BatchNorm."""

    def __init__(self, classes=CLASSES):
        super().__init__()
        self.bn, self.fc = nn.BatchNorm2d(4), nn.Linear(4, classes)

    def forward(self, image):
        maps = self.bn(self.conv(image))
        pooled = maps.relu().mean((2, 3))
        return self.fc(pooled), {"feats": [maps.relu()] * 3, "preact_feats": [maps] * 3, "pooled_feat": pooled}


def returning(change, in_training=True):
    """A network that returns `change(logits, features)`; with `in_training` False, in eval mode only."""

    class Changed(Maps):
        def forward(self, image):
            logits, features = super().forward(image)
            return change(logits, features) if in_training or not self.training else (logits, features)

    return Changed()


def run(folder, make, train=None, val=None, *overrides):
    """Train an epoch; `make(cfg)` makes the distiller."""
    cfg = trainer_of(folder, "SOLVER.EPOCHS", "1", "FITNET.HINT_LAYER", "1", "CRD.NCE.K", "4", *overrides).cfg
    trainer = BaseTrainer("run", make(cfg), loader() if train is None else train, loader() if val is None else val, cfg)
    trainer.train()
    return trainer


def refused(folder, message, *args):
    """The run is refused with the `message`, in one line, and has written nothing."""
    with pytest.raises(UserError, match=message) as error:
        run(folder, *args)
    assert "\n" not in str(error.value)
    assert not list(folder.glob("run/*"))


def plain(cfg):
    return KD(Maps(), Maps(), cfg)


def of(method, role, network, *args):
    """Makes a `method` with `network` as its student or teacher."""
    pair = (network, Maps()) if role == "student" else (Maps(), network)
    return lambda cfg: method(*pair, cfg, *args)


NETWORKS = {
    "bare logits": (lambda logits, features: logits, r" Changed returns a tensor \(2, 3\).*`return logits, features`"),
    "wrong order": (lambda logits, features: (features, logits), r" Changed returns a tuple \(a dictionary \{feats"),
    "a dictionary": (lambda logits, features: {"logits": logits}, r" Changed returns a dictionary \{logits\}"),
    "three items": (lambda logits, features: (logits, features, logits), r" Changed returns a tuple"),
    "maps of logits": (lambda logits, features: (logits[..., None, None], features), r"(2|logits \(8), 3, 1, 1\)"),
    "NaN": (lambda logits, features: (logits * torch.nan, features), r" Changed returns logits that are NaN"),
}


@pytest.mark.parametrize("role", ["student", "teacher"])
@pytest.mark.parametrize("case", NETWORKS)
def test_a_network_that_returns_something_else(case, role, tmp_path):
    change, message = NETWORKS[case]
    refused(tmp_path, f"{role}.*{message}", of(KD, role, returning(change)))


@pytest.mark.parametrize(
    "student",
    [
        returning(lambda *output: list(output)),
        returning(lambda logits, features: (logits, {})),
        returning(lambda logits, features: logits, in_training=False),
    ],
    ids=["a list", "no features", "bare logits in eval mode"],
)
def test_a_student_that_a_method_of_logits_can_train(student, tmp_path):
    run(tmp_path, of(KD, "student", student))


@pytest.mark.parametrize("role", ["student", "teacher"])
@pytest.mark.parametrize(
    "method, args, feature", [(RKD, (), "pooled_feat"), (CRD, (24,), "pooled_feat"), (FitNet, (), "feats")]
)
def test_a_feature_that_a_method_reads_and_a_network_lacks(method, args, feature, role, tmp_path):
    make = of(method, role, returning(lambda logits, features: (logits, {})), *args)
    message = rf"{role} Changed returns no feature '{feature}'|of RKD's teacher"
    refused(tmp_path, message, make, loader(torch.arange(24) % 3))


def test_maps_that_are_no_list(tmp_path):
    student = returning(lambda logits, features: (logits, features | {"feats": features["feats"][0]}))
    message = r"Changed returns a tensor \(1, 4, .*\) as 'feats'; feats and preact_feats are lists"
    refused(tmp_path, message, of(FitNet, "student", student))


def test_a_key_error_of_the_methods_own_stays_one(tmp_path):
    class Own(KD):
        def forward_train(self, image, target, **kwargs):
            return {}["mine"]

    with pytest.raises(KeyError, match="mine"):
        run(tmp_path, lambda cfg: Own(Maps(), Maps(), cfg))


def test_a_method_of_ones_own_may_use_unusual_networks(tmp_path):
    """Bare logits, and a teacher that takes larger images than the student."""

    class Own(Distiller):
        def forward_train(self, image, target, **kwargs):
            logits, maps = self.student(image), self.teacher(F.interpolate(image, (32, 32)))
            return logits, {"loss_ce": F.cross_entropy(logits, target), "loss_kd": maps.mean() + logits.square().mean()}

    student = returning(lambda logits, features: logits)
    run(tmp_path, lambda cfg: Own(student, nn.Sequential(nn.Conv2d(3, 2, 20), nn.Flatten())))


def test_networks_of_other_classes(tmp_path):
    refused(tmp_path, r"\(8, 3\) and teacher logits \(8, 5\) differ", of(KD, "teacher", Maps(5)))


LABELS = {
    "1 to C": (lambda i: i % CLASSES + 1, r"go from 1 to 3, but a label is 0 to 2: .*first is 3 at 2; .*subtract 1"),
    "-1": (lambda i: i % CLASSES - 1, r"go from -1 to 1.*the first is -1 at 0; leave out the images without a label"),
    "-100": (lambda i: -100, r"go from -100 to -100"),
    "floats": (lambda i: float(i % CLASSES), r"are float64 \(8,\); .*labels.long\(\)"),
    "one-hot": (lambda i: F.one_hot(torch.tensor(i % CLASSES), CLASSES), r"are int64 \(8, 3\); .*argmax"),
    "(B, 1)": (lambda i: torch.tensor([i % CLASSES]), r"are int64 \(8, 1\); .*flatten"),
    "strings": (lambda i: str(i), r"'target' is a tuple of str, not a tensor"),
}


@pytest.mark.parametrize("of_validation", [False, True])
@pytest.mark.parametrize("case", LABELS)
def test_labels_that_are_no_classes(case, of_validation, tmp_path):
    target, message = LABELS[case]
    loaders = (None, loader(target=target)) if of_validation else (loader(target=target), None)
    refused(tmp_path, message, plain, *loaders)


@pytest.mark.parametrize("kind", [torch.int32, torch.uint8, torch.bool])
def test_labels_of_any_whole_type_are_taken(kind, tmp_path):
    own = loader(target=lambda i: torch.tensor(i % 2, dtype=kind))
    run(tmp_path, plain, own, own)


@pytest.mark.parametrize("targets", [torch.arange(24) % 4, np.arange(24) % 4, [i % 4 for i in range(24)]])
def test_all_labels_are_checked_where_a_loader_tells_them(targets, tmp_path):
    refused(tmp_path, "the training loader's targets go from 0 to 3, but a label is 0 to 2", plain, loader(targets))


def test_a_wrong_label_in_a_later_batch_is_named_too(tmp_path):
    late = loader(target=lambda i: 7 if i == 20 else 0)
    with pytest.raises(UserError, match=r"labels of a training batch go from 0 to 7.*the first is 7 at 4"):
        run(tmp_path, plain, late)
    with pytest.raises(UserError, match=r"labels of a validation batch go from 0 to 7.*the first is 7 at 4"):
        run(tmp_path, plain, None, late, "EXPERIMENT.SEED", "1")


IMAGES = {
    "uint8": (lambda i: torch.zeros(3, 8, 8, dtype=torch.uint8), r"images \(B, 3, 8, 8\) uint8 .*; give it floats"),
    "float64": (lambda i: torch.zeros(3, 8, 8).double(), r"images \(B, 3, 8, 8\) float64 .*; give it floats"),
    "one channel": (lambda i: torch.zeros(1, 8, 8), r"images \(B, 1, 8, 8\).*; give it three channels"),
    "no channel": (lambda i: torch.zeros(8, 8), r"images \(B, 8, 8\).*; give it images \(3, H, W\)"),
    "four channels": (lambda i: torch.zeros(4, 8, 8), r"images \(B, 4, 8, 8\).*; give it three of the channels"),
    "channels last": (lambda i: torch.zeros(8, 8, 3), r"images \(B, 8, 8, 3\).*; put the channels first"),
    "too small": (lambda i: torch.zeros(3, 2, 2), r"images \(B, 3, 2, 2\).*; it takes 32x32"),
    "lists": (lambda i: [1.0, 2.0], r"'image' is a list of Tensor, not a tensor"),
}


@pytest.mark.parametrize("of_validation", [False, True])
@pytest.mark.parametrize("case", IMAGES)
def test_images_that_the_network_does_not_take(case, of_validation, tmp_path):
    image, message = IMAGES[case]
    loaders = (None, loader(image=image)) if of_validation else (loader(image=image), None)
    refused(tmp_path, message, plain, *loaders)


def test_images_that_are_nan_or_not_normalised(tmp_path, capsys):
    broken = loader(image=lambda i: torch.full((3, 8, 8), torch.nan if i == 1 else 0.0))
    refused(tmp_path, "1 of the first 8 training images have values that are NaN or infinite", plain, broken)
    run(tmp_path, plain, broken, None, "SOLVER.NAN_POLICY", "skip")
    assert "normalised" not in capsys.readouterr().err
    folder = tmp_path / "other"
    folder.mkdir()
    run(folder, plain, loader(image=lambda i: torch.full((3, 8, 8), 255.0)))
    assert "warning: the training images have values up to 255; " in capsys.readouterr().err


def test_a_fault_in_the_users_own_forward_keeps_its_traceback(tmp_path):
    class Faulty(Maps):
        def forward(self, image):
            return super().forward(image)[0] @ torch.zeros(7, 7)

    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        run(tmp_path, of(KD, "student", Faulty()))


class Batches:
    """A loader of any batches."""

    def __init__(self, *batches):
        self.batches = batches

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        return iter(self.batches)


IMAGE, TARGET = torch.zeros(8, 3, 8, 8), torch.zeros(8, dtype=torch.int64)


@pytest.mark.parametrize(
    "train, val, message",
    [
        (Batches((TARGET, IMAGE)), None, r"labels of the first training batch are float32 \(8, 3, 8, 8\).*`fields`"),
        (Batches((IMAGE, TARGET[:4])), None, r"images \(8, 3, 8, 8\) and labels \(4,\)"),
        (Batches((IMAGE[:0], TARGET[:0])), None, r"images \(0, 3, 8, 8\) and labels \(0,\)"),
        (Batches(), None, "epoch 1: the training loader yields no batch"),
        (iter([]), None, r"the training loader, a list_iterator, has no len\(\)"),
        (None, Batches(), "the validation loader is empty"),
        (None, 5, "a loader is a int; give the trainer loaders"),
    ],
)
def test_loaders_that_yield_something_else(train, val, message, tmp_path):
    refused(tmp_path, message, plain, train, val)


def test_an_index_that_is_no_image_of_the_training_set(tmp_path):
    def make(cfg):
        return CRD(Maps(), Maps(), cfg, 24)

    refused(tmp_path, "index goes from 0 to 7, but .* labels of 5 images", make, loader(torch.arange(5) % 3))
    floats = Batches((IMAGE, TARGET, torch.arange(8.0)))
    floats.targets = torch.arange(8) % 3
    refused(tmp_path, r"a batch's index is float32 \(8,\)", make, floats)


def test_swapped_loaders(tmp_path):
    trainer = trainer_of(tmp_path)
    swapped = BaseTrainer("run", trainer.distiller, trainer.val_loader, trainer.train_loader, trainer.cfg)
    with pytest.raises(UserError, match=r"they are swapped; the trainer takes \(\.\.\., train_loader, val_loader"):
        swapped.train()


@pytest.mark.parametrize(
    "student, teacher, role", [(Maps(), None, "teacher"), (None, Maps(), "student"), (Maps, Maps(), "student")]
)
def test_what_is_no_network(student, teacher, role):
    with pytest.raises(UserError, match=rf"KD\(student, teacher, ...\) takes two networks .* its {role} is "):
        KD(student, teacher, CFG)


def test_what_is_no_method_and_one_network_twice(tmp_path):
    refused(tmp_path, "the trainer's distiller is a Maps; give it a method", lambda cfg: Maps())
    one = Maps()
    refused(tmp_path, "student and teacher are the same Maps.*deepcopy", lambda cfg: KD(one, one, cfg))


def test_the_check_changes_neither_networks_nor_random_numbers(tmp_path, monkeypatch):
    finals = []
    for check in (None, lambda self, batch: None):
        folder = tmp_path / str(len(finals))
        folder.mkdir()
        if check is not None:
            monkeypatch.setattr("mdistiller.engine.parts.Parts.check", check)
        torch.manual_seed(0)
        net = returning(lambda logits, features: (F.dropout(logits), features))  # it draws in eval mode too
        finals.append(run(folder, of(KD, "student", net)).distiller.state_dict())
    assert all(torch.equal(value, finals[1][name]) for name, value in finals[0].items())


def test_a_former_run_stands_until_the_parts_fit(tmp_path):
    first = trainer_of(tmp_path)
    first.train()
    kept = (tmp_path / "run/latest").read_bytes()
    again = BaseTrainer("run", Vanilla(Net()), loader(target=lambda i: 9), loader(), first.cfg)
    again.overwrite = True
    with pytest.raises(UserError, match="a label is 0 to 2"):
        again.train()
    assert (tmp_path / "run/latest").read_bytes() == kept


class Method(Distiller):
    """Cross-entropy, and a loss that `hint` gives."""

    def __init__(self, cfg):
        super().__init__(Maps(), Maps())

    def hint(self, pooled):
        return pooled.square().mean()

    def forward_train(self, image, target, **kwargs):
        logits, features = self.student(image)
        return logits, {"loss_ce": F.cross_entropy(logits, target), "loss_kd": self.hint(features["pooled_feat"])}


class InAList(Method):
    def __init__(self, cfg):
        super().__init__(cfg)
        self.projectors = [nn.Linear(4, 4)]

    def hint(self, pooled):
        return self.projectors[0](pooled).square().mean()


class InAListAndTrained(InAList):
    def get_learnable_parameters(self):
        return [*super().get_learnable_parameters(), *self.projectors[0].parameters()]


class PlainTensor(Method):
    def __init__(self, cfg):
        super().__init__(cfg)
        self.scale = torch.ones(4, requires_grad=True)


class FrozenStudent(Method):
    def __init__(self, cfg):
        super().__init__(cfg)
        self.student.requires_grad_(False)


class Detached(Method):
    def forward_train(self, image, target, **kwargs):
        logits, losses = super().forward_train(image, target, **kwargs)
        return logits, {name: loss.detach() for name, loss in losses.items()}


class NoList(Method):
    def get_learnable_parameters(self):
        super().get_learnable_parameters()


@pytest.mark.parametrize(
    "method, message",
    [
        (InAList, r"a loss depends on projectors\[0\].(weight|bias), .* neither trained nor saved.*nn.ModuleList"),
        (InAListAndTrained, r"is to train projectors\[0\].weight, projectors\[0\].bias, .* neither saved nor moved"),
        (PlainTensor, r"is to train scale, which no module of the method has"),
        (FrozenStudent, "none of the 6 learnable parameters requires a gradient"),
        (Detached, "no loss depends on a parameter that requires a gradient"),
        (NoList, r"get_learnable_parameters\(\) returns NoneType"),
    ],
)
def test_what_would_never_train_or_be_saved(method, message, tmp_path):
    refused(tmp_path, message, method)


def test_a_part_of_the_student_that_is_frozen_on_purpose_is_no_fault(tmp_path, capsys):
    def make(cfg):
        method = Method(cfg)
        method.student.conv.requires_grad_(False)
        return method

    run(tmp_path, make)
    assert "no gradient" not in capsys.readouterr().err


RANKS = """
import sys, torch
from mdistiller.distributed.ranks import current_ranks, joined_ranks
from mdistiller.console import one_line_errors
from pathlib import Path
from tests.engine.test_parts import Method, trainer_of

class Late(Method):
    steps = 0
    def forward_train(self, image, target, **kwargs):
        logits, losses = super().forward_train(image, target, **kwargs)
        self.steps += 1
        if self.steps >= int(sys.argv[2]):
            del losses["loss_ce"]  # nothing else reads the classifier
        return logits, losses

with one_line_errors(), joined_ranks("cpu") as ranks:
    folder = Path(sys.argv[1]) / str(ranks.rank)
    folder.mkdir()
    trainer = trainer_of(folder, distiller=Late(None))
    if sys.argv[3] == "labels" and ranks.rank == 1:
        trainer.train_loader._labels = trainer.train_loader._labels + 3
    trainer.train()
"""


def two_ranks(folder, *arguments):
    """What two ranks print, and rank 0's files."""
    (folder / "worker.py").write_text(RANKS)
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(folder / "worker.py"),
         str(folder), *arguments],
        cwd=REPOSITORY, env={**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}, text=True,
        timeout=240, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert done.returncode, done.stdout
    return done.stdout, [path.name for path in folder.glob("0/run/*")]


def test_a_part_of_the_student_that_is_not_used_is_named_on_several_ranks(tmp_path):
    printed, files = two_ranks(tmp_path, "1", "")
    assert printed.count("error: Late: 2 parameters get no gradient (student.fc.weight, student.fc.bias), and") == 2
    assert not files


@pytest.mark.slow
def test_also_if_it_is_used_at_first(tmp_path):
    printed, _ = two_ranks(tmp_path, "3", "")
    assert "error: Late: 2 parameters get no gradient (student.fc.weight, student.fc.bias)" in printed


@pytest.mark.slow
def test_what_one_rank_refuses_all_do(tmp_path):
    printed, files = two_ranks(tmp_path, "99", "labels")
    assert printed.count("error: the labels of the first training batch go from 3 to ") == 2
    assert not files


class TakesTwo(Maps):
    def forward(self, image, epoch):
        return super().forward(image)


class CallsItself(Distiller):
    """A method that calls its teacher as no other method does."""

    def forward_train(self, image, target, epoch=1, **kwargs):
        logits, _ = self.student(image)
        with torch.no_grad():
            taught, _ = self.teacher(image, epoch)
        return logits, {"loss_ce": F.cross_entropy(logits, target), "loss_kd": (logits - taught).square().mean()}


def test_a_network_that_its_method_calls_in_another_way_is_the_methods_own(tmp_path):
    run(tmp_path, lambda cfg: CallsItself(Maps(), TakesTwo()))


def test_a_network_that_its_method_calls_wrongly_keeps_its_traceback(tmp_path):
    with pytest.raises(TypeError, match="positional argument"):
        run(tmp_path, lambda cfg: CallsItself(Maps(), Maps()))


def test_reading_a_validation_batch_draws_nothing_from_a_generator_that_training_shares(tmp_path):
    states = []
    for val_is_read in (True, False):
        shared = torch.Generator().manual_seed(0)
        val = DataLoader(Images(), batch_size=8, shuffle=True, generator=shared)
        cfg = trainer_of(tmp_path).cfg
        trainer = BaseTrainer("run", plain(cfg), loader(), val if val_is_read else loader(), cfg)
        trainer.first_step._parts.check(trainer.prepare_batch(next(iter(loader())), 1))
        states.append(shared.get_state())
    assert torch.equal(*states)


class Stream(IterableDataset):
    """Images that are gone once they are read."""

    def __init__(self):
        self.rest = iter([Images()[i] for i in range(24)])

    def __iter__(self):
        return self.rest


def test_no_batch_of_a_stream_is_read_ahead(tmp_path):
    stream = Stream()
    cfg = trainer_of(tmp_path).cfg
    trainer = BaseTrainer("run", plain(cfg), loader(), DataLoader(stream, batch_size=8), cfg)
    trainer.first_step._parts.check(trainer.prepare_batch(next(iter(loader())), 1))
    assert len(list(stream.rest)) == 24
