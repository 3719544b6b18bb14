"""RCNNKD: the student is detectron2's own, the teacher sees what the student sees and never changes."""

import pytest
import torch

pytest.importorskip("detectron2", reason="detectron2 is not installed: make detection")

from detectron2.modeling import GeneralizedRCNN, GeneralizedRCNNWithTTA, build_model
from detectron2.solver import build_optimizer
from detectron2.utils.events import EventStorage

from detection.model.losses import proposal_logits
from detection.model.merge import student_cfg, student_part
from detection.model.rcnn import RCNNKD, last_call
from mdistiller.errors import UserError
from tests.detection import _small

STUDENT_LOSSES = {"loss_cls", "loss_box_reg", "loss_rpn_cls", "loss_rpn_loc"}
LOSSES = {"DKD": {"loss_dkd"}, "ReviewKD": {"loss_reviewkd"}, "ReviewDKD": {"loss_dkd", "loss_reviewkd"}}
# BatchNorm with running statistics in student and teacher would reveal a teacher in training mode.
MOVING = ("MODEL.RESNETS.NORM", "BN", "TEACHER.MODEL.RESNETS.NORM", "BN", "MODEL.BACKBONE.FREEZE_AT", "0")


def model_of(name="DKD/ReviewDKD-R18-R101", *opts):
    torch.manual_seed(0)
    return build_model(_small.load(name, *MOVING, *opts)).train()


def losses_of(model, seed=1, **batch):
    torch.manual_seed(seed)  # detectron2 samples anchors and proposals
    with EventStorage():
        return model(_small.batch(**batch))


@pytest.mark.parametrize("kind", LOSSES)
def test_losses_gradients_and_the_teacher(kind):
    model = model_of("DKD/ReviewDKD-R18-R101", "KD.TYPE", kind)
    teacher = {name: value.clone() for name, value in model.teacher.state_dict().items()}
    optimizer = build_optimizer(_small.load("DKD/DKD-R18-R101"), model)
    losses = losses_of(model)
    assert losses.keys() == STUDENT_LOSSES | LOSSES[kind]
    assert all(loss.shape == () and loss.isfinite() and loss > 0 for loss in losses.values()), losses
    sum(losses.values()).backward()
    without = {name for name, p in model.named_parameters() if p.grad is None}
    assert without == {name for name, _ in model.named_parameters() if name.startswith("teacher.")}
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert trained == {id(p) for name, p in model.named_parameters() if not name.startswith("teacher.")}
    optimizer.step()
    assert not model.teacher.training and model.training
    assert all(torch.equal(value, teacher[name]) for name, value in model.teacher.state_dict().items())


def test_the_student_equals_plain_detectron2():
    """Same weights, same random draws: the same losses in training, the same detections in inference."""
    model = model_of()
    cfg = student_cfg(_small.load("DKD/ReviewDKD-R18-R101", *MOVING), "none")
    plain = build_model(cfg).train()
    plain.load_state_dict(student_part(model.state_dict()))
    ours, theirs = losses_of(model), losses_of(plain)
    assert theirs.keys() == STUDENT_LOSSES
    assert {name: ours[name].item() for name in theirs} == {name: loss.item() for name, loss in theirs.items()}
    inputs = _small.batch()
    with torch.no_grad():
        for mine, his in zip(model.eval()(inputs), plain.eval()(inputs), strict=True):
            assert torch.equal(mine["instances"].pred_boxes.tensor, his["instances"].pred_boxes.tensor)
            assert torch.equal(mine["instances"].scores, his["instances"].scores)


def test_gradients_of_each_kd_loss_reach_the_right_modules():
    reach = {"loss_dkd": "roi_heads.box_predictor.cls_score.weight", "loss_reviewkd": "kd_trans.abfs.0.conv1.0.weight"}
    others = {"loss_dkd": "kd_trans.abfs.0.conv1.0.weight", "loss_reviewkd": "roi_heads.box_predictor.cls_score.weight"}
    for name in reach:
        model = model_of()
        losses_of(model)[name].backward()
        assert model.get_parameter(reach[name]).grad.abs().sum() > 0
        assert model.get_parameter("backbone.bottom_up.res2.0.conv1.weight").grad.abs().sum() > 0
        assert model.get_parameter(others[name]).grad is None


def test_another_teacher_gives_other_kd_losses_and_the_same_student_losses():
    model = model_of()
    first = losses_of(model)
    torch.manual_seed(7)
    for p in model.teacher.parameters():
        p.copy_(torch.randn_like(p) * 0.05)
    second = losses_of(model)
    assert {name for name in first if first[name] != second[name]} == LOSSES["ReviewDKD"]


@pytest.mark.parametrize("student, teacher, turned", [("RGB", "BGR", True), ("BGR", "BGR", False)])
def test_the_teacher_prepares_the_images_itself(student, teacher, turned):
    """With its own mean, standard deviation and channel order, independent of the student's."""
    own = ("TEACHER.MODEL.PIXEL_MEAN", "[1.0, 2.0, 3.0]", "TEACHER.MODEL.PIXEL_STD", "[4.0, 5.0, 6.0]")
    model = model_of("DKD/DKD-R18-R101", "INPUT.FORMAT", student, "TEACHER.INPUT.FORMAT", teacher, *own)
    inputs = _small.batch(1)
    image = inputs[0]["image"].double()
    order = [2, 1, 0] if turned else [0, 1, 2]
    seen = torch.stack([(image[c] - mean) / std for c, mean, std in zip(order, (1, 2, 3), (4, 5, 6))])[None].float()
    maps = model.teacher_maps(inputs)
    expected = model.teacher.backbone(seen)
    for name, value in maps.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-5)


def test_the_logits_are_of_the_sampled_proposals():
    """The distilled logits equal those of a second pass over the sampled proposals."""
    model = model_of("DKD/DKD-R18-R101")
    with last_call(model.kd_logits) as calls:
        losses_of(model)
    (seen,), _ = calls[0]
    assert len(seen.logits_student) == len(seen.classes) == sum(len(b) for b in seen.boxes) <= 2 * 16
    assert (seen.classes < 80).any() and (seen.classes == 80).any()
    again = proposal_logits(model.roi_heads, seen.maps_student, seen.boxes)
    torch.testing.assert_close(seen.logits_student.detach(), again, rtol=1e-5, atol=1e-6)


def test_hooks_are_gone_after_a_step_and_after_a_failure():
    model = model_of()
    losses_of(model)
    with pytest.raises(KeyError), EventStorage():
        model([{"nothing": 0}])
    assert not any(module._forward_hooks for module in model.modules())


def test_inference_does_not_run_the_teacher(monkeypatch):
    model = model_of().eval()
    monkeypatch.setattr(model.teacher.backbone, "forward", None)
    with torch.no_grad():
        assert len(model(_small.batch())) == 2


def test_test_time_augmentation_accepts_rcnnkd():
    model = model_of()
    assert isinstance(model, GeneralizedRCNN)
    GeneralizedRCNNWithTTA(_small.load("DKD/DKD-R18-R101"), model)


def test_other_heads_are_refused():
    with pytest.raises(UserError, match=r"^TEACHER\.MODEL\.ROI_HEADS\.NAME must be StandardROIHeads, it is Casc"):
        model_of(
            "DKD/DKD-R18-R101", "TEACHER.MODEL.ROI_HEADS.NAME", "CascadeROIHeads",
            "TEACHER.MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", "True",
        )  # fmt: skip


@pytest.mark.parametrize(
    "key, value, line",
    [
        ("META_ARCHITECTURE", "RetinaNet", r"META_ARCHITECTURE must be GeneralizedRCNN or PanopticFPN, .*'RetinaNet'$"),
        ("META_ARCHITECTURE", "RCNNKD", r"META_ARCHITECTURE must be GeneralizedRCNN or PanopticFPN, .*'RCNNKD'$"),
        ("ROI_HEADS.NAME", "Res5ROIHeads", r"ROI_HEADS\.NAME must be StandardROIHeads, it is Res5ROIHeads"),
    ],
)
def test_a_configuration_that_was_not_read_by_load_cfg_is_checked_too(key, value, line):
    cfg = _small.load("DKD/DKD-R18-R101").clone()
    cfg.defrost()
    cfg.TEACHER.MODEL.merge_from_list([key, value])
    with pytest.raises(UserError, match=r"^TEACHER\.MODEL\." + line):
        build_model(cfg)


def test_heads_of_another_class_are_refused():
    """A C4 detector has one box predictor, like a StandardROIHeads, but neither a box head nor its pooler."""
    model = model_of("DKD/DKD-R18-R101")
    c4 = ("MODEL.ROI_HEADS.NAME", "Res5ROIHeads", "MODEL.ROI_HEADS.IN_FEATURES", "['p4']")
    plain = build_model(_small.load("DKD/DKD-R18-R101", "MODEL.META_ARCHITECTURE", "GeneralizedRCNN", *c4))
    parts = {"backbone": model.backbone, "proposal_generator": model.proposal_generator, "kd_losses": {}}
    parts |= {"pixel_mean": (0.0, 0.0, 0.0), "pixel_std": (1.0, 1.0, 1.0)}
    with pytest.raises(UserError, match=r"^TEACHER\.MODEL\.ROI_HEADS\.NAME must be .* it is Res5ROIHeads"):
        RCNNKD(roi_heads=model.roi_heads, teacher=plain, **parts)
    with pytest.raises(UserError, match=r"^MODEL\.ROI_HEADS\.NAME must be .* it is Res5ROIHeads"):
        RCNNKD(roi_heads=plain.roi_heads, teacher=model.teacher, **parts)


@pytest.mark.parametrize("whose", ["MODEL", "TEACHER.MODEL"])
@pytest.mark.parametrize("part, feature", [("ROI_HEADS", "p7"), ("RPN", "p7"), ("FPN", "m5")])
def test_a_feature_that_the_backbone_lacks_is_named(whose, part, feature):
    with pytest.raises(UserError) as error:
        model_of("DKD/DKD-R18-R101", f"{whose}.{part}.IN_FEATURES", f"['{feature}']")
    network = "build_resnet_fpn_backbone" + ("_kd" if whose == "MODEL" else "")
    line = f"{whose}.{part}.IN_FEATURES: '{feature}' is not a feature of {whose}.BACKBONE.NAME {network}"
    assert str(error.value) == line


def test_a_teacher_for_panoptic_segmentation():
    model = model_of("DKD/ReviewDKD-R18-R101", "TEACHER.MODEL.META_ARCHITECTURE", "PanopticFPN")
    losses = losses_of(model)
    assert losses.keys() == STUDENT_LOSSES | LOSSES["ReviewDKD"]
    assert all(loss.isfinite() and loss > 0 for loss in losses.values()), losses


def test_a_teacher_with_other_levels():
    """DKD reads each pyramid through its own heads; ReviewKD compares level by level."""
    c4 = ("TEACHER.MODEL.BACKBONE.NAME", "build_resnet_backbone", "TEACHER.MODEL.RESNETS.OUT_FEATURES", "['res4']",
          "TEACHER.MODEL.RPN.IN_FEATURES", "['res4']", "TEACHER.MODEL.ROI_HEADS.IN_FEATURES", "['res4']",
          "TEACHER.MODEL.ANCHOR_GENERATOR.SIZES", "[[32]]")  # fmt: skip
    loss = losses_of(model_of("DKD/DKD-R18-R101", *c4))["loss_dkd"]
    assert loss.isfinite() and loss > 0
    line = r"levels: the student's p2, p3, p4, p5, p6, the teacher's res4; set MODEL\.BACKBONE and TEACHER"
    with pytest.raises(UserError, match=line):
        model_of("ReviewKD/ReviewKD-R18-R101", *c4)


@pytest.mark.parametrize("freeze_at, frozen", [(0, 0), (1, 1), (2, 4), (3, 7), (4, 14), (5, 18)])
def test_a_frozen_mobilenet(freeze_at, frozen):
    opts = ("MODEL.BACKBONE.FREEZE_AT", str(freeze_at), "MODEL.MOBILENETV2.NORM", "BN")
    features = build_model(_small.load("DKD/DKD-MV2-R50", *opts)).backbone.bottom_up.features
    still = [not any(p.requires_grad for p in block.parameters()) for block in features]
    assert still == [True] * frozen + [False] * (18 - frozen)
    assert [any(type(m).__name__ == "BatchNorm2d" for m in b.modules()) for b in features] == [not s for s in still]


def test_an_unknown_map_of_mobilenet_is_refused():
    with pytest.raises(UserError, match="accepts m2, m3, m4, m5, not 'm6'"):
        build_model(_small.load("DKD/DKD-MV2-R50", "MODEL.MOBILENETV2.OUT_FEATURES", "['m2', 'm6']"))


def test_rcnnkd_is_registered():
    assert type(model_of()) is RCNNKD
