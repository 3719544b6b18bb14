"""Weight files of every format: each tensor is matched or listed, or the file is refused."""

import os
import pickle
import tarfile

import numpy as np
import pytest
import torch
import torchvision

pytest.importorskip("detectron2", reason="detectron2 is not installed: make detection")

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import get_cfg
from detectron2.modeling import build_model

from detection import HERE
from detection.model.merge import BACKBONE, config_for, export, merge, stride_note, student_cfg, student_part
from detection.model.weights import Checkpointer, place, read_checkpoint, read_weights
from mdistiller.errors import UserError
from tests.detection import _small

MV2, R18, R50 = "ReviewKD/ReviewKD-MV2-R50", "ReviewKD/ReviewKD-R18-R101", "ReviewKD/ReviewKD-R50-R101"
STRIDE_IN_3X3 = ("MODEL.RESNETS.STRIDE_IN_1X1", "False")
IMAGE = torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(0))


def build(name, *opts):
    torch.manual_seed(0)
    return build_model(_small.load(name, *opts)).eval()


def random_statistics(network):
    torch.manual_seed(1)
    for name, buffer in network.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_(0, 0.1)
        if name.endswith("running_var"):
            buffer.uniform_(0.5, 1.5)
    return network.eval()


def timm_mobilenet_names(network):
    """torchvision's MobileNetV2 under timm's names, written out block by block."""
    new, state = {}, network.state_dict()

    def move(old, name):
        for suffix in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
            if f"{old}.{suffix}" in state:
                new[f"{name}.{suffix}"] = state[f"{old}.{suffix}"]

    move("features.0.0", "conv_stem"), move("features.0.1", "bn1")
    move("features.1.conv.0.0", "blocks.0.0.conv_dw"), move("features.1.conv.0.1", "blocks.0.0.bn1")
    move("features.1.conv.1", "blocks.0.0.conv_pw"), move("features.1.conv.2", "blocks.0.0.bn2")
    place_in_features = 2
    for stage, repeats in enumerate([2, 3, 4, 3, 3, 1], start=1):
        for block in range(repeats):
            old, name = f"features.{place_in_features}.conv", f"blocks.{stage}.{block}"
            move(f"{old}.0.0", f"{name}.conv_pw"), move(f"{old}.0.1", f"{name}.bn1")
            move(f"{old}.1.0", f"{name}.conv_dw"), move(f"{old}.1.1", f"{name}.bn2")
            move(f"{old}.2", f"{name}.conv_pwl"), move(f"{old}.3", f"{name}.bn3")
            place_in_features += 1
    move("features.18.0", "conv_head"), move("features.18.1", "bn2"), move("classifier.1", "classifier")
    assert len(new) == len(state)
    return new


def resnet_trunk(r):
    return torch.nn.Sequential(r.conv1, r.bn1, r.relu, r.maxpool, r.layer1, r.layer2, r.layer3, r.layer4)


@pytest.mark.parametrize(
    "name, network, names, trunk, last, homeless, opts",
    [
        (R18, "resnet18", None, resnet_trunk, "res5", ["fc.bias", "fc.weight"], ()),
        (R50, "resnet50", None, resnet_trunk, "res5", ["fc.bias", "fc.weight"], STRIDE_IN_3X3),
        (MV2, "mobilenet_v2", None, lambda r: r.features[:18], "m5", ["classifier.1.bias", "classifier.1.weight",
         "features.18.0.weight", "features.18.1.bias", "features.18.1.running_mean", "features.18.1.running_var",
         "features.18.1.weight"], ()),
        (MV2, "mobilenet_v2", timm_mobilenet_names, lambda r: r.features[:18], "m5", ["bn2.bias", "bn2.running_mean",
         "bn2.running_var", "bn2.weight", "classifier.bias", "classifier.weight", "conv_head.weight"], ()),
    ],
    ids=["resnet18", "resnet50", "mobilenet_v2", "timm mobilenetv2"],
)  # fmt: skip
def test_imagenet_networks_give_the_same_maps(tmp_path, name, network, names, trunk, last, homeless, opts):
    network = random_statistics(getattr(torchvision.models, network)())
    torch.save(names(network) if names else network.state_dict(), tmp_path / "w.pth")
    model = build(name, *opts)
    placed = place(tmp_path / "w.pth", student_part(model.state_dict()))
    assert sorted(n for n in placed.homeless if "num_batches_tracked" not in n) == homeless
    assert not any(n.startswith(BACKBONE) for n in placed.missing)
    model.load_state_dict(placed.weights, strict=False)
    with torch.no_grad():
        torch.testing.assert_close(model.backbone.bottom_up(IMAGE)[last], trunk(network)(IMAGE), rtol=1e-5, atol=1e-5)


def caffe2_resnet18(state):
    """A ResNet-18's state by Caffe2's names, as detectron2's ImageNet files have them: no running statistics."""
    weights = {"fc1000_w": np.zeros((1000, 512), np.float32), "conv1_w_momentum": np.zeros(1)}
    layers = {"conv1": "branch2a", "conv2": "branch2b", "shortcut": "branch1"}
    parts = {"weight": "_w", "norm.weight": "_bn_s", "norm.bias": "_bn_b"}
    for name, value in state.items():
        name = name.removeprefix(BACKBONE)
        if name.startswith("stem."):
            new = {"stem.conv1.weight": "conv1_w", "stem.conv1.norm.weight": "res_conv1_bn_s",
                   "stem.conv1.norm.bias": "res_conv1_bn_b"}.get(name)  # fmt: skip
        else:
            stage, block, layer, part = name.split(".", 3)
            new = f"{stage}_{block}_{layers[layer]}{parts[part]}" if part in parts else None
        if new:
            weights[new] = value.numpy()
    return weights


def test_caffe2_networks(tmp_path):
    source, target = build(R18), build(R18)
    for name, value in source.state_dict().items():
        if name.startswith(BACKBONE) and "running" not in name:
            value.normal_()
    state = student_part(source.state_dict())
    with open(tmp_path / "R-18.pkl", "wb") as file:
        pickle.dump(caffe2_resnet18({n: v for n, v in state.items() if n.startswith(BACKBONE)}), file, protocol=2)
    placed = place(tmp_path / "R-18.pkl", student_part(target.state_dict()))
    assert placed.homeless == ["fc1000_w"] or placed.homeless == ["fc1000.weight"]
    assert placed.weights.keys() == {n for n in state if n.startswith(BACKBONE)}
    assert all(torch.equal(value, state[name]) for name, value in placed.weights.items())


def zoo_file(path, state):
    """A file as in detectron2's zoo: arrays, and an entry that old versions also saved."""
    model = {name: value.numpy() for name, value in state.items()}
    model |= {"proposal_generator.anchor_generator.cell_anchors.0": np.zeros((3, 4), np.float32)}
    with open(path, "wb") as file:
        pickle.dump({"model": model, "__author__": "Detectron2 Model Zoo"}, file)


def test_a_zoo_teacher_and_a_torchvision_student_become_one_file(tmp_path):
    cfg = _small.load(R18)
    torch.manual_seed(5)
    teacher = build_model(cfg.TEACHER).state_dict()
    zoo_file(tmp_path / "t.pkl", teacher)
    network = random_statistics(torchvision.models.resnet18())
    torch.save(network.state_dict(), tmp_path / "s.pth")
    in_teacher, in_student = merge(cfg, tmp_path / "t.pkl", tmp_path / "s.pth", tmp_path / "new" / "m.pth")
    assert in_teacher.homeless == ["proposal_generator.anchor_generator.cell_anchors.0"]
    assert in_teacher.missing == [] and len(in_teacher.weights) == len(teacher)
    model = build(R18)
    start = {name: value.clone() for name, value in model.state_dict().items()}
    DetectionCheckpointer(model).load(str(tmp_path / "new" / "m.pth"))
    for name, value in model.state_dict().items():
        if name.startswith("teacher."):
            assert torch.equal(value, teacher[name.removeprefix("teacher.")])
        elif name in in_student.missing or name.startswith("kd_"):
            assert torch.equal(value, start[name])
    conv1 = model.backbone.bottom_up.stem.conv1.weight
    assert torch.equal(conv1, network.conv1.weight)


def test_this_projects_own_checkpoint_as_a_teacher_and_as_a_student(tmp_path):
    """A trained student becomes the teacher; its own teacher and fusion modules are dropped."""
    model = build(R18)
    torch.save({"model": model.state_dict(), "iteration": 7}, tmp_path / "model_final.pth")
    in_teacher, in_student = merge(_small.load(R18), *[tmp_path / "model_final.pth"] * 2, tmp_path / "m.pth")
    merged = read_weights(tmp_path / "m.pth")[0]
    student = student_part(model.state_dict())
    assert set(in_teacher.homeless) == {n for n in model.state_dict() if n not in student}
    assert in_student.missing == []
    for name, value in student.items():
        assert torch.equal(merged[name], value) and torch.equal(merged[f"teacher.{name}"], value)


@pytest.mark.parametrize("arrays, zipped, wrapped", [(False, True, True), (True, True, False), (False, False, False)])
def test_files_of_the_published_layout_load_without_conversion(tmp_path, arrays, zipped, wrapped):
    source, target = build(R18), build(R18)
    state = {n: v.normal_() for n, v in source.state_dict().items() if v.is_floating_point()}
    state = {n: v for n, v in state.items() if n.startswith(("teacher.", BACKBONE))}
    weights = {n: v.numpy() for n, v in state.items()} if arrays else state
    torch.save({"model": weights} if wrapped else weights, tmp_path / "r18.pth", _use_new_zipfile_serialization=zipped)
    Checkpointer(target).load(str(tmp_path / "r18.pth"))
    loaded = target.state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in state.items())


@pytest.mark.parametrize("name", [R18, MV2])
def test_the_exported_student_loads_in_plain_detectron2(tmp_path, name):
    model = build(name)
    torch.save({"model": model.state_dict()}, tmp_path / "model_final.pth")
    assert export(tmp_path / "model_final.pth", tmp_path / "s.pth") == len(student_part(model.state_dict()))
    (tmp_path / "s.yaml").write_text(student_cfg(_small.load(name), tmp_path / "s.pth").dump())
    cfg = get_cfg()
    if name == MV2:  # a network that detectron2 does not know
        cfg.MODEL.MOBILENETV2 = _small.load(name).MODEL.MOBILENETV2
    cfg.merge_from_file(str(tmp_path / "s.yaml"))
    plain = build_model(cfg).eval()
    left = DetectionCheckpointer(plain)._load_model(DetectionCheckpointer(plain)._torch_load(cfg.MODEL.WEIGHTS))
    assert left.missing_keys == left.unexpected_keys == left.incorrect_shapes == []
    with torch.no_grad():
        mine, his = (m(_small.batch(1))[0]["instances"] for m in (model, plain))
    assert torch.equal(mine.scores, his.scores) and torch.equal(mine.pred_boxes.tensor, his.pred_boxes.tensor)


def test_training_refuses_weights_without_a_whole_teacher(tmp_path):
    """detectron2 would only warn, and train with an untrained teacher."""
    model = build(R18)

    def load(file, whole_teacher=True):
        checkpointer = Checkpointer(model)
        checkpointer.whole_teacher = whole_teacher
        checkpointer.load(str(tmp_path / file))

    torch.save(student_part(model.state_dict()), tmp_path / "s.pth")
    with pytest.raises(UserError, match=r"holds no teacher\..*; 90 tensors of the teacher are missing"):
        load("s.pth")
    classes = "teacher.roi_heads.box_predictor.cls_score.weight"
    torch.save(model.state_dict() | {classes: torch.zeros(21, 32)}, tmp_path / "c.pth")
    with pytest.raises(UserError, match=r"cls_score\.weight of shape \(81, 32\), but \(21, 32\); 1 tensors"):
        load("c.pth")
    load("s.pth", whole_teacher=False)  # evaluating the student needs no teacher


def test_training_refuses_an_imagenet_network_as_the_teacher(tmp_path):
    """detectron2 matches the names of such files by their ends, and each is a student's and a teacher's."""
    model = build(R18)
    backbone = {n: v for n, v in student_part(model.state_dict()).items() if n.startswith(BACKBONE)}
    with open(tmp_path / "R-18.pkl", "wb") as file:
        pickle.dump(caffe2_resnet18(backbone), file, protocol=2)
    with pytest.raises(UserError, match=r"holds no student and teacher .*detection/merge_weights\.py"):
        Checkpointer(model).load(str(tmp_path / "R-18.pkl"))


class Harm:
    def __reduce__(self):
        return os.mkdir, ("harm",)


@pytest.mark.parametrize("name", ["h.pkl", "h.pth", "old.pth"])
def test_a_file_that_would_run_code_is_refused(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    if name == "h.pkl":
        (tmp_path / name).write_bytes(pickle.dumps({"model": Harm(), "__author__": ""}))
    else:
        torch.save({"model": Harm()}, name, _use_new_zipfile_serialization=name == "h.pth")
    with pytest.raises(UserError, match=r"it refers to \w+\.mkdir; only tensors, arrays and plain values are read"):
        read_checkpoint(name)
    assert not (tmp_path / "harm").exists()


def test_files_that_are_no_weights(tmp_path):
    (tmp_path / "cut.pth").write_bytes(b"PK\x03\x04 cut")
    torch.save([1, 2], tmp_path / "list.pth")
    torch.save({"a": "text"}, tmp_path / "text.pth")
    for name, line in (("none.pth", "no weights at"), ("cut.pth", "not a readable"), ("list.pth", "holds a list")):
        with pytest.raises(UserError, match=line):
            read_checkpoint(tmp_path / name)
    with pytest.raises(UserError, match="entry 'a' is a str"):
        read_weights(tmp_path / "text.pth")


def test_an_archive_is_not_unpacked(tmp_path):
    """torch would unpack one of its first format, a tar with the members sys_info, storages, tensors and pickle."""
    with tarfile.open(tmp_path / "old.pth", "w") as tar:
        tar.addfile(tarfile.TarInfo("storages"))
    with pytest.raises(UserError, match=r"it is a tar archive; unpack it and name the file of weights in it"):
        read_checkpoint(tmp_path / "old.pth")


def test_merging_what_does_not_fit(tmp_path):
    cfg = _small.load(R18)
    teacher = build_model(cfg.TEACHER).state_dict()
    torch.save(teacher, tmp_path / "t.pth")
    torch.save(torchvision.models.resnet50().state_dict(), tmp_path / "r50.pth")
    part = {n: v for n, v in teacher.items() if "box_predictor" not in n}
    torch.save(part, tmp_path / "part.pth")
    with pytest.raises(UserError, match=r"part\.pth is not a complete teacher: it lacks .*cls_score.* and 1 more"):
        merge(cfg, tmp_path / "part.pth", None, tmp_path / "m.pth")
    with pytest.raises(UserError, match=r"layer\d|res\d.*has shape .*is it the network that the config names"):
        merge(cfg, tmp_path / "t.pth", tmp_path / "r50.pth", tmp_path / "m.pth")
    with pytest.raises(UserError, match="holds no student"):
        torch.save({"teacher.a": torch.zeros(1)}, tmp_path / "only.pth")
        export(tmp_path / "only.pth", tmp_path / "m.pth")
    assert not (tmp_path / "m.pth").exists()
    in_teacher, in_student = merge(cfg, tmp_path / "t.pth", None, tmp_path / "m.pth")
    assert in_teacher.missing == [] and in_student.weights == {}


def test_the_config_is_chosen_by_the_pair(tmp_path):
    def file(name, *names):
        torch.save({n: torch.zeros(1) for n in names}, tmp_path / name)
        return tmp_path / name

    def blocks(count, form):
        return [form.format(i) for i in range(count)]

    detector = "backbone.bottom_up.res4.{}.conv1.weight"
    r101 = file("r101.pth", *blocks(23, detector))
    r50_mask = file("r50.pth", *blocks(6, detector), "roi_heads.mask_head.deconv.weight")
    r18 = file("r18.pth", *blocks(2, "layer3.{}.conv1.weight"))
    r50 = file("r50s.pkl.pth", *blocks(6, "res4_{}_branch2a_w"))
    mv2 = file("mv2.pth", "features.1.conv.0.0.weight")
    for teacher, student, name in (
        (r101, r18, "ReviewKD-R18-R101"), (r101, r50, "ReviewKD-R50-R101"), (r50_mask, mv2, "ReviewKD-MV2-R50-Mask"),
    ):  # fmt: skip
        assert config_for(teacher, student) == HERE / "configs" / "ReviewKD" / f"{name}.yaml"
    with pytest.raises(UserError, match="no published config has the student and teacher R18-R50"):
        config_for(r50_mask, r18)
    with pytest.raises(UserError, match="is not a ResNet-18"):
        config_for(r101, file("other.pth", "a"))


def test_a_stride_in_another_convolution_is_noted(tmp_path):
    torch.save({"layer1.0.conv3.weight": torch.zeros(1)}, tmp_path / "r50.pth")
    torch.save({"layer1.0.conv2.weight": torch.zeros(1)}, tmp_path / "r18.pth")
    assert "STRIDE_IN_1X1 False" in stride_note(_small.load(R50), tmp_path / "r50.pth")
    assert stride_note(_small.load(R50, *STRIDE_IN_3X3), tmp_path / "r50.pth") == ""
    assert stride_note(_small.load(R18), tmp_path / "r18.pth") == ""
