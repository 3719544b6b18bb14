"""Networks of other sources in a run: their weights, their heads, and the images that they see."""

import re
import shlex
import shutil

import pytest
import torch
import torch.nn as nn
from torchvision.transforms.v2.functional import normalize

import mdistiller
from mdistiller.dataset import dataset_info
from mdistiller.distillers import RunFacts
from mdistiller.engine.build import build_distiller, build_trainer, facts_without_data, load_trained
from mdistiller.engine.cfg import load_cfg
from mdistiller.engine.files.checkpoint import described, save_checkpoint
from mdistiller.engine.files.safetensors_file import write_safetensors
from mdistiller.engine.networks import teacher_classes
from mdistiller.errors import UserError
from mdistiller.models.own_input import OwnInput
from mdistiller.models.sources import build_network

from .._networks import write_untrained

CODE = """
import torch.nn as nn
INPUT = {"size": 32, "mean": [0.4, 0.5, 0.6], "std": [0.2, 0.25, 0.3], "interpolation": "bicubic"}
class Tiny(nn.Module):
    def __init__(self, num_classes=7, pretrained=False, width=8):
        super().__init__()
        self.stem, self.body = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, width, 3, 2, 1)
        self.last = nn.Conv2d(width, width, 3, 2, 1)
        self.bn, self.act, self.fc = nn.BatchNorm2d(width), nn.ReLU(), nn.Linear(width, num_classes)
        if pretrained:
            nn.init.constant_(self.stem.bias, 0.5)
    def forward(self, image):
        return self.fc(self.act(self.bn(self.last(self.body(self.act(self.stem(image)))))).mean((2, 3)))
"""


@pytest.fixture
def tiny(tmp_path):
    """The name of a network of the user's own file, made for images of another normalisation."""
    (tmp_path / "mine.py").write_text(CODE)
    return f"{tmp_path}/mine.py:Tiny"


@pytest.fixture
def weights(tmp_path, tiny):
    """weights(classes, ...) writes the network's state dict, with the description that `described` gets."""

    def write(classes=10, *description, change=None):
        torch.manual_seed(classes)
        state = build_network(tiny, classes, 32).state_dict()
        (change or (lambda _: None))(state)
        path = tmp_path / f"weights_{classes}"
        save_checkpoint(described({"model": state}, *description), path)
        return str(path)

    return write


def config(*overrides, method="KD"):
    quiet = ["EXPERIMENT.DEVICE", "cpu", "LOG.WANDB", "False", "DATASET.TRAIN_FRACTION", "0.1"]
    return load_cfg("configs/digits/kd.yaml", ["DISTILLER.TYPE", method, *quiet, *map(str, overrides)])


def built(*overrides, method="KD"):
    cfg = config(*overrides, method=method)
    torch.manual_seed(0)
    return build_distiller(cfg, facts_without_data(cfg)).eval()


def teacher(tiny, path="", *overrides, method="KD"):
    names = ["DISTILLER.TEACHER", tiny, "DISTILLER.TEACHER_CKPT", path, "DISTILLER.STUDENT", "resnet8"]
    return built(*names, *overrides, method=method).teacher


def own_logits(network, pixels, mean, std):
    return network(normalize(pixels, list(mean), list(std)))[0]


def data(pixels):
    return normalize(pixels, [0.3050] * 3, [0.3234] * 3)


def test_a_teacher_of_another_source_sees_its_own_normalisation_and_size(tiny, weights):
    pixels = torch.rand(2, 3, 32, 32)
    resized = nn.functional.interpolate(pixels, (48, 48), mode="bicubic", antialias=True)
    for size, shown in ((0, pixels), (48, resized)):
        own = teacher(tiny, weights(), "DISTILLER.TEACHER_SIZE", size)
        expected = own_logits(own.network, shown, (0.4, 0.5, 0.6), (0.2, 0.25, 0.3))
        assert torch.allclose(own(data(pixels))[0], expected, rtol=1e-5, atol=1e-6)


def test_a_checkpoint_tells_the_normalisation_that_its_network_was_trained_with(tiny, weights):
    path = weights(10, (), (0.1, 0.2, 0.3), (0.5, 0.6, 0.7), 32)
    pixels, own = torch.rand(2, 3, 32, 32), teacher(tiny, path)
    expected = own_logits(own.network, pixels, (0.1, 0.2, 0.3), (0.5, 0.6, 0.7))
    assert torch.allclose(own(data(pixels))[0], expected, rtol=1e-5, atol=1e-6)


def test_one_of_the_datas_own_normalisation_runs_as_it_is(tiny, weights):
    path = weights(10, (), (0.3050,) * 3, (0.3234,) * 3, 32)
    assert not isinstance(teacher(tiny, path), OwnInput)


def test_a_network_of_the_data_sets_registry_sees_the_data_as_it_is(tmp_path):
    path = write_untrained(tmp_path / "wrn", "wrn_16_2", seed=0)
    names = ["DISTILLER.TEACHER", "wrn_16_2", "DISTILLER.STUDENT", "resnet8", "DISTILLER.TEACHER_CKPT", path]
    assert not isinstance(built(*names).teacher, OwnInput)
    assert built(*names, "DISTILLER.TEACHER_SIZE", 64).teacher.size == 64


def test_a_runs_student_is_the_next_runs_teacher(tiny, tmp_path):
    """Its checkpoint tells mean and std, whatever else the network was made for."""
    names = ["DISTILLER.STUDENT", tiny, "LOG.PREFIX", tmp_path, "SOLVER.EPOCHS", 1, "EXPERIMENT.NAME", "first"]
    trainer = build_trainer(config(*names, method="NONE"))
    trainer.train()
    student = trainer.distiller.student.eval()
    own = teacher(tiny, str(trainer.log_path / "student_latest"))
    image = torch.randn(2, 3, 32, 32)
    assert not isinstance(own, OwnInput)
    assert torch.allclose(own(image)[0], student(image)[0], rtol=1e-4, atol=1e-6)


def test_a_head_of_other_classes_is_refused_with_the_command_that_fine_tunes_it(tiny, weights):
    path = weights(7)
    words = (
        f"the teacher {tiny} has a head of 7 classes, the data has 10, and KD may read its logits; fine-tune it first, "
        f"by python tools/train.py --cfg configs/digits/teacher.yaml DISTILLER.STUDENT {tiny} "
        f"DISTILLER.STUDENT_CKPT {path} DATASET.TYPE digits, and set DISTILLER.TEACHER_CKPT to its student_best"
    )
    with pytest.raises(UserError, match=re.escape(words)):
        teacher(tiny, path)
    with pytest.raises(UserError, match=r"DISTILLER.STUDENT_PRETRAINED True"):
        teacher(tiny)


def test_the_command_that_fine_tunes_a_teacher_names_the_same_data_to_a_shell(tiny, weights, tmp_path):
    path = str(shutil.move(weights(7), tmp_path / "my weights"))
    folder = {"ROOT": f"{tmp_path}/my images", "VAL_FRACTION": 0.25, "NUM_CLASSES": 4, "IMAGE_SIZE": 32}
    data = [word for key, value in folder.items() for word in (f"DATASET.{key}", str(value))]
    names = ["DISTILLER.TEACHER", tiny, "DISTILLER.TEACHER_CKPT", path, "DISTILLER.STUDENT", "resnet8"]
    cfg = load_cfg("configs/folder/kd.yaml", [*names, "DISTILLER.STUDENT_PRETRAINED", "False", *map(str, data)])
    with pytest.raises(UserError) as refused:
        build_distiller(cfg, facts_without_data(cfg))
    command = str(refused.value).partition("python tools/train.py --cfg ")[2].partition(", and set")[0]
    config_file, *overrides = shlex.split(command)
    advised = load_cfg(config_file, overrides)
    assert [advised.DATASET[key] for key in ("TYPE", "ROOT", "VAL_FRACTION")] == ["folder", folder["ROOT"], 0.25]
    assert [advised.DISTILLER[key] for key in ("STUDENT", "STUDENT_CKPT")] == [tiny, path]
    cfg.defrost()
    cfg.DATASET.TYPE, cfg.DATASET.ROOT = "hf/mnist", "./data"
    with pytest.raises(UserError, match=r"teacher.yaml .* DATASET.TYPE hf/mnist DATASET.ROOT ./data "):
        build_distiller(cfg, facts_without_data(cfg))


def test_in_python_a_call_fine_tunes_a_teacher_of_other_classes(tiny, weights):
    images = torch.utils.data.TensorDataset(torch.randn(4, 3, 32, 32), torch.arange(4) % 2)
    train = torch.utils.data.DataLoader(images, 2)
    words = f"by mdistiller.distill('{tiny}', None, train_loader, val_loader, method='NONE', num_classes=2, "
    with pytest.raises(UserError, match=re.escape(words)) as no:
        mdistiller.distill("resnet8", tiny, train, train, num_classes=2, teacher_ckpt=weights(7), verbose=False)
    advised = str(no.value).partition("first, by ")[2].partition(", and give")[0].replace("_loader", "")
    result = eval(advised[:-1] + ", epochs=1, verbose=False)", {"mdistiller": mdistiller, "train": train, "val": train})
    assert result.student.fc.out_features == 2


@pytest.mark.parametrize("method", ["KD", "DKD", "DCGD_KD"])
def test_every_method_that_reads_logits_refuses_it(method, tiny, weights):
    with pytest.raises(UserError, match="has a head of 7 classes, the data has 10"):
        teacher(tiny, weights(7), method=method)


@pytest.mark.parametrize("method", ["FITNET", "AT", "RKD", "SP", "NST", "VID", "PKT", "KDSVD", "REVIEWKD"])
def test_a_method_that_reads_features_takes_a_teacher_with_its_own_head(method, tiny, weights):
    """The head is the file's, not a random one of the data's classes."""
    path = weights(7)
    own = teacher(tiny, path, method=method)
    assert own.network.bare.fc.weight.equal(torch.load(path)["model"]["fc.weight"])
    assert teacher(tiny, method=method).network.bare.stem.bias.unique().tolist() == [0.5]  # the published ones
    with pytest.raises(UserError, match=r"SCORE_TEACHER compares .* has 7 classes and the data 10"):
        teacher(tiny, path, "DISTILLER.SCORE_TEACHER", True, method=method)


def test_the_classes_of_a_teachers_weights(tiny, weights, tmp_path):
    """Of data without labels, the teacher says how many classes there are."""
    info, path = dataset_info["digits"], write_untrained(tmp_path / "net", "resnet8", seed=0)
    for name, file, classes in ((tiny, weights(3), 3), (tiny, weights(2), 2), (tiny, "", 7), ("resnet8", path, 10)):
        cfg = config("DISTILLER.TEACHER", name, "DISTILLER.TEACHER_CKPT", file)
        assert teacher_classes(cfg, info) == classes


def test_a_teacher_without_weights_is_refused(tiny, weights):
    off = ("DISTILLER.TEACHER_PRETRAINED", False)
    with pytest.raises(UserError, match=r"would have random weights: set DISTILLER.TEACHER_CKPT to a file, or "):
        teacher(tiny, "", *off)
    with pytest.raises(UserError, match="resnet8 would have random weights"):
        teacher("resnet8", "", *off)
    teacher(tiny, weights(), *off)  # a file is enough


def test_other_class_names_are_refused_where_logits_are_read(tiny, weights):
    path = weights(10, [f"other {label}" for label in range(10)])
    cfg = config("DISTILLER.TEACHER", tiny, "DISTILLER.TEACHER_CKPT", path, "DISTILLER.STUDENT", "resnet8")
    with pytest.raises(UserError, match="was trained on other classes than the data has: label 0 is 'other 0'"):
        build_distiller(cfg, facts_without_data(cfg))
    teacher(tiny, path, method="RKD")
    with pytest.raises(UserError, match="was trained on other classes than the data has"):
        teacher(tiny, path, "DISTILLER.SCORE_TEACHER", True, method="RKD")


def student(*overrides):
    return built(*overrides, method="NONE").student


def test_a_student_without_published_weights_is_told_what_to_set():
    with pytest.raises(UserError, match=r"^resnet8 has no published .*; set DISTILLER.STUDENT_PRETRAINED False, or"):
        student("DISTILLER.STUDENT", "resnet8", "DISTILLER.STUDENT_PRETRAINED", True)


def test_a_student_starts_from_a_file(tiny, weights):
    path = weights()
    state = student("DISTILLER.STUDENT", tiny, "DISTILLER.STUDENT_CKPT", path).state_dict()
    assert all(tensor.equal(state[name]) for name, tensor in torch.load(path)["model"].items())


def test_a_student_starts_from_a_safetensors_file(tiny, weights, tmp_path):
    state = torch.load(weights())["model"]
    write_safetensors(state, tmp_path / "bare.safetensors")
    own = student("DISTILLER.STUDENT", tiny, "DISTILLER.STUDENT_CKPT", tmp_path / "bare.safetensors").state_dict()
    assert all(tensor.equal(own[name]) for name, tensor in state.items())


@pytest.mark.parametrize("published", [False, True])
def test_a_student_of_other_classes_gets_a_fresh_head_and_a_line_says_so(published, tiny, weights, capsys):
    path = weights(7)
    source = ["DISTILLER.STUDENT_PRETRAINED", True] if published else ["DISTILLER.STUDENT_CKPT", path]
    own = student("DISTILLER.STUDENT", tiny, *source).bare
    assert own.fc.weight.equal(student("DISTILLER.STUDENT", tiny).bare.fc.weight)  # as with the seed alone
    body = torch.full((8,), 0.5) if published else torch.load(path)["model"]["stem.bias"]
    assert own.stem.bias.equal(body)
    said = capsys.readouterr().err
    assert "the head of 7 classes (fc.weight, fc.bias) is left out" in said and "begins with a fresh one of 10" in said


def test_what_else_does_not_fit_a_student_is_refused(tiny, weights):
    def lose(state):
        del state["body.bias"]

    with pytest.raises(UserError, match=r"does not fit .*: 1 missing \(body.bias\)"):
        student("DISTILLER.STUDENT", tiny, "DISTILLER.STUDENT_CKPT", weights(7, change=lose))
    with pytest.raises(UserError, match=r"no checkpoint of .* at nowhere.*set DISTILLER.STUDENT_CKPT"):
        student("DISTILLER.STUDENT", tiny, "DISTILLER.STUDENT_CKPT", "nowhere")


def test_a_registered_student_starts_from_a_file_too(tmp_path):
    path = write_untrained(tmp_path / "net", "resnet8", seed=3)
    own = student("DISTILLER.STUDENT", "resnet8", "DISTILLER.STUDENT_CKPT", path).state_dict()
    assert own["fc.weight"].equal(torch.load(path)["model"]["fc.weight"])


def test_the_students_draws_do_not_depend_on_the_teacher(tiny, weights):
    names = ["DISTILLER.STUDENT", "resnet8", "DISTILLER.TEACHER", tiny, "DISTILLER.TEACHER_CKPT", weights()]
    alone, taught = student("DISTILLER.STUDENT", "resnet8"), built(*names).student
    assert all(map(torch.equal, alone.state_dict().values(), taught.state_dict().values()))


def test_layers_are_named_by_settings(tiny, weights):
    own = teacher(tiny, weights(), "DISTILLER.TEACHER_FEATS", "[body]")
    assert own.feat_names == ["body"]
    two = student("DISTILLER.STUDENT", tiny, "DISTILLER.STUDENT_FEATS", "[stem, last]")
    assert two.feat_names == ["stem", "last"]
    with pytest.raises(UserError, match=r"DISTILLER.STUDENT_FEATS names modules .* resnet8 are fixed"):
        student("DISTILLER.STUDENT", "resnet8", "DISTILLER.STUDENT_FEATS", "[layer1]")


@pytest.mark.parametrize(
    "name, near", [("timm/test_resnett", "timm/test_resnet"), ("torchvision/resnet81", "torchvision/resnet18")]
)
def test_a_wrong_name_gets_the_near_ones(name, near):
    with pytest.raises(UserError, match=f"unknown network '{name}'; did you mean .*{near}"):
        student("DISTILLER.STUDENT", name)


def test_without_files_no_weights_are_read(tiny):
    names = ["DISTILLER.STUDENT", tiny, "DISTILLER.STUDENT_CKPT", "gone", "DISTILLER.TEACHER", tiny]
    cfg = config(*names, "DISTILLER.TEACHER_CKPT", "gone", "DISTILLER.TEACHER_SIZE", 48)
    distiller = build_distiller(cfg, facts_without_data(cfg), trained=False)
    assert distiller.teacher.size == 48 and distiller.teacher.network.bare.fc.out_features == 10


def test_data_of_unknown_normalisation_is_shown_as_it_is(tiny, weights, capsys):
    cfg = config("DISTILLER.TEACHER", tiny, "DISTILLER.TEACHER_CKPT", weights(), "DISTILLER.STUDENT", "resnet8")
    facts = RunFacts(8, 10, None, 32, 1, None, None)
    assert not isinstance(build_distiller(cfg, facts).teacher, OwnInput)
    assert "sees images normalised as the data is, which does not tell its mean and std" in capsys.readouterr().err


def test_a_trained_network_named_on_a_command_line_sees_its_own_normalisation(tiny, weights):
    net, pixels = load_trained("digits", tiny, weights(), device="cpu"), torch.rand(2, 3, 32, 32)
    expected = own_logits(net.network, pixels, (0.4, 0.5, 0.6), (0.2, 0.25, 0.3))
    assert torch.allclose(net(data(pixels))[0], expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(UserError, match=r"has 7 classes, .* has 10"):
        load_trained("digits", tiny, weights(7), device="cpu")


@pytest.mark.parametrize(
    "mode",
    [
        ("SOLVER.AMP", "bf16"), ("SOLVER.AMP", "bf16-teacher"), ("SOLVER.ACCUMULATE", 2), ("SOLVER.EMA", 0.9),
        ("SOLVER.TRAINER", "dot"), ("SOLVER.CHANNELS_LAST", False), ("DISTILLER.TEACHER_CACHE_DEVICE", "device"),
    ],
)  # fmt: skip
def test_a_teacher_with_its_own_input_goes_with_the_mode(mode, tiny, weights, tmp_path):
    """Each step computes the teacher's outputs as its own pipeline would."""
    names = ["DISTILLER.STUDENT", tiny, "DISTILLER.TEACHER", tiny, "DISTILLER.TEACHER_CKPT", weights()]
    short = ["LOG.PREFIX", tmp_path, "SOLVER.EPOCHS", 1, "DATASET.TRAIN_FRACTION", 0.05, "SOLVER.BATCH_SIZE", 32]
    trainer = build_trainer(config(*names, "DISTILLER.TEACHER_SIZE", 48, *short, *mode))
    trainer.train()
    distiller, image = trainer.distiller.eval(), torch.rand(2, 3, 32, 32)
    assert isinstance(distiller.teacher, OwnInput) and "teacher.fc.weight" in distiller.state_dict()
    within = 0.1 if "AMP" in mode[0] else 1e-4
    if "CACHE" not in mode[0]:  # which only knows the training images
        shown, expected = distiller.teacher_forward(image)[0], distiller.teacher(image)[0]
        assert (shown - expected).abs().max() <= within * expected.abs().max()


def test_a_message_calls_a_network_by_the_name_that_the_user_gave(tiny, weights):
    other = weights(change=lambda state: state.pop("fc.weight"))
    with pytest.raises(UserError, match=rf"does not fit {re.escape(tiny)}: 1 missing \(fc.weight\)"):
        teacher(tiny, other)
