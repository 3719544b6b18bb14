"""The proposal logits, fusion, context loss and DKD on proposals against naive oracles and by hand."""

import math

import pytest
import torch
from torch import nn

pytest.importorskip("detectron2", reason="detectron2 is not installed: make detection")

from detectron2.layers import ShapeSpec
from detectron2.modeling import build_model
from detectron2.structures import Boxes

from detection.model.losses import DKDLoss, ReviewKDLoss, Seen, kd_types, proposal_logits
from mdistiller.errors import UserError
from tests.detection import _small
from tests.distillers.oracles.dkd import naive_dkd_loss
from tests.distillers.oracles.reviewkd import naive_hcl_loss

STRIDES = {"p2": 4, "p3": 8, "p4": 16, "p5": 32, "p6": 64}


def random_maps(channels=16, seed=0, images=2, height=64, width=96):
    torch.manual_seed(seed)
    size = {name: (images, channels, math.ceil(height / s), math.ceil(width / s)) for name, s in STRIDES.items()}
    return {name: torch.randn(size[name], dtype=torch.float64) for name in size}


def seen(**parts):
    whole = dict.fromkeys(("maps_student", "maps_teacher", "boxes", "classes", "logits_student", "heads_teacher"))
    return Seen(**whole | parts)


# --- proposal logits -------------------------------------------------------------------------------------------------


def bilinear(channel, y, x):
    """A channel (H, W) interpolated at a point; 0 more than one pixel outside, as in ROIAlign."""
    height, width = channel.shape
    if y < -1 or y > height or x < -1 or x > width:
        return 0.0
    y, x = max(y, 0.0), max(x, 0.0)
    y0, x0 = min(int(y), height - 1), min(int(x), width - 1)
    y1, x1 = min(y0 + 1, height - 1), min(x0 + 1, width - 1)
    fy, fx = (0.0 if y0 == height - 1 else y - y0), (0.0 if x0 == width - 1 else x - x0)
    top = channel[y0, x0] * (1 - fx) + channel[y0, x1] * fx
    bottom = channel[y1, x0] * (1 - fx) + channel[y1, x1] * fx
    return float(top * (1 - fy) + bottom * fy)


def naive_pool(fmap, box, stride, bins=7):
    """ROIAlign of one box (x1, y1, x2, y2): the mean of evenly spread points in each bin. -> (C, bins, bins)."""
    x1, y1, x2, y2 = (v / stride - 0.5 for v in box)
    bin_h, bin_w = (y2 - y1) / bins, (x2 - x1) / bins
    points_y, points_x = math.ceil(bin_h), math.ceil(bin_w)
    out = torch.zeros(len(fmap), bins, bins, dtype=torch.float64)
    for c, channel in enumerate(fmap.numpy()):
        for i in range(bins):
            for j in range(bins):
                values = [
                    bilinear(channel, y1 + bin_h * (i + (a + 0.5) / points_y), x1 + bin_w * (j + (b + 0.5) / points_x))
                    for a in range(points_y)
                    for b in range(points_x)
                ]
                out[c, i, j] = sum(values) / len(values)
    return out


def naive_logits(heads, maps, boxes):
    """Box by box: its level by the FPN paper's equation 1, ROIAlign, two layers with ReLU, the classifier."""
    rows = []
    for image, image_boxes in enumerate(boxes):
        for box in image_boxes.tensor.tolist():
            size = math.sqrt((box[2] - box[0]) * (box[3] - box[1]))
            level = min(max(math.floor(4 + math.log2(size / 224)), 2), 5)
            x = naive_pool(maps[f"p{level}"][image], box, 2**level).flatten()
            for fc in (heads.box_head.fc1, heads.box_head.fc2):
                x = (fc.weight @ x + fc.bias).clamp(min=0)
            rows.append(heads.box_predictor.cls_score.weight @ x + heads.box_predictor.cls_score.bias)
    return torch.stack(rows)


def test_proposal_logits_are_those_of_each_box_by_itself():
    torch.manual_seed(0)
    heads = build_model(_small.load("DKD/DKD-R18-R101", "MODEL.FPN.OUT_CHANNELS", "4")).double().roi_heads
    nn.init.normal_(heads.box_predictor.cls_score.weight)  # usually so near 0 that all logits are too
    maps = random_maps(channels=4, height=256, width=256)
    corners = [
        [[4.0, 4.0, 40.0, 50.0], [0.0, 0.0, 256.0, 250.0], [9.3, 20.1, 140.7, 170.9]],
        [[30.0, 10.0, 90.5, 60.25]],
    ]
    boxes = [Boxes(torch.tensor(image)) for image in corners]
    boxes = [Boxes(b.tensor.double()) for b in boxes]
    logits = proposal_logits(heads, maps, boxes)
    assert logits.shape == (4, 81) and not logits.requires_grad
    with torch.no_grad():
        torch.testing.assert_close(logits, naive_logits(heads, maps, boxes), rtol=1e-9, atol=1e-9)


# --- DKD on proposals ------------------------------------------------------------------------------------------------


def test_dkd_counts_the_background_as_a_class():
    model = build_model(_small.load("DKD/DKD-R18-R101", "KD.DKD.BETA", "0.5", "KD.DKD.T", "2.0")).double()
    maps = random_maps()
    corners = [[[4.0, 4.0, 40.0, 50.0], [8.0, 8.0, 60.0, 60.0]], [[30.0, 10.0, 90.0, 60.0]]]
    boxes = [Boxes(torch.tensor(image, dtype=torch.float64)) for image in corners]
    logits = torch.randn(3, 81, dtype=torch.float64, requires_grad=True)
    classes = torch.tensor([3, 80, 17])  # 80 is the background
    heads = model.teacher.roi_heads
    losses = model.kd_logits(
        seen(maps_teacher=maps, boxes=boxes, classes=classes, logits_student=logits, heads_teacher=heads)
    )
    expected = naive_dkd_loss(logits, proposal_logits(heads, maps, boxes), classes, 1.0, 0.5, 2.0)
    assert losses.keys() == {"loss_dkd"}
    torch.testing.assert_close(losses["loss_dkd"], expected, rtol=1e-10, atol=0)


def test_dkd_loss_of_no_proposals_is_zero():
    logits = torch.zeros(0, 81, requires_grad=True)
    loss = DKDLoss(_small.load("DKD/DKD-R18-R101"))(seen(logits_student=logits))["loss_dkd"]
    loss.backward()
    assert loss.item() == 0.0


@pytest.mark.parametrize(
    "opts, line",
    [
        (["KD.DKD.T", "0.0"], r"^KD\.DKD\.T is 0\.0; the temperature must be above 0"),
        (["KD.DKD.T", "-1.0"], r"^KD\.DKD\.T is -1\.0; the temperature must be above 0"),
        (["KD.DKD.T", "1e999"], r"^KD\.DKD\.T is inf; the temperature must be above 0 and finite"),
        (
            ["MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE", "True"],
            r"^MODEL\.ROI_BOX_HEAD\.USE_SIGMOID_CE is True, which trains no",
        ),
        (
            ["TEACHER.MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE", "True"],
            r"^TEACHER\.MODEL\.ROI_BOX_HEAD\.USE_SIGMOID_CE is True",
        ),
    ],
)
def test_logits_that_dkd_cannot_compare_are_refused(opts, line):
    with pytest.raises(UserError, match=line):
        build_model(_small.load("DKD/ReviewDKD-R18-R101", *opts))
    build_model(_small.load("ReviewKD/ReviewKD-R18-R101", *opts))  # which reads no logits


# --- ReviewKD on pyramids --------------------------------------------------------------------------------------------


def review_loss(channels=16, weight="1.0", dtype=torch.float64):
    cfg = _small.load("ReviewKD/ReviewKD-R18-R101", "KD.REVIEWKD.LOSS_WEIGHT", weight)
    shapes = {name: ShapeSpec(channels=channels, stride=stride) for name, stride in STRIDES.items()}
    torch.manual_seed(0)
    return ReviewKDLoss(cfg, shapes, shapes).to(dtype)


def nearest(x, height, width):
    """Nearest-neighbour resizing of (B, C, H, W), pixel by pixel."""
    rows = [min(int(i * x.shape[2] / height), x.shape[2] - 1) for i in range(height)]
    columns = [min(int(j * x.shape[3] / width), x.shape[3] - 1) for j in range(width)]
    return x[:, :, rows][:, :, :, columns]


def naive_fusion(abfs, maps):
    """From p6 to p2: compress, fuse with the previous level's result by attention, pass it on, expand."""
    results, below = [], None
    for abf, x in zip(abfs, maps[::-1]):
        x = abf.conv1(x)
        if below is not None:
            below = nearest(below, *x.shape[2:])
            conv = abf.att_conv[0]
            both = torch.cat([x, below], dim=1)
            z = torch.einsum("oc,bchw->bohw", conv.weight[:, :, 0, 0], both) + conv.bias.view(1, 2, 1, 1)
            z = 1 / (1 + torch.exp(-z))
            x = x * z[:, 0:1] + below * z[:, 1:2]
        below = x
        results.append(abf.conv2(x))
    return results[::-1]


def test_fusion_and_context_loss_of_rectangular_pyramids():
    loss = review_loss(weight="1.5").train()
    student, teacher = random_maps(seed=1), random_maps(seed=2)
    levels = list(STRIDES)
    value = loss(seen(maps_student=student, maps_teacher=teacher))
    expected = naive_hcl_loss(naive_fusion(loss.abfs, [student[n] for n in levels]), [teacher[n] for n in levels])
    assert value.keys() == {"loss_reviewkd"}
    torch.testing.assert_close(value["loss_reviewkd"], 1.5 * expected, rtol=1e-9, atol=0)


def test_context_loss_by_hand():
    """A difference of 2 everywhere gives 4 at every pooled size, so 4 per level: 20 for 5 levels, times the weight."""
    loss = review_loss(weight="0.5").eval()
    teacher = {name: torch.zeros_like(m) for name, m in random_maps().items()}
    for abf in loss.abfs:  # the output is 2 for any input
        nn.init.zeros_(abf.conv2[1].weight)
        nn.init.constant_(abf.conv2[1].bias, 2.0)
    value = loss(seen(maps_student=random_maps(), maps_teacher=teacher))["loss_reviewkd"]
    assert value.item() == pytest.approx(0.5 * 20, rel=1e-12)


def test_the_order_of_the_maps_does_not_matter():
    loss = review_loss().eval()
    student, teacher = random_maps(seed=1), random_maps(seed=2)
    turned = seen(maps_student=dict(reversed(student.items())), maps_teacher=teacher)
    assert torch.equal(
        loss(turned)["loss_reviewkd"], loss(seen(maps_student=student, maps_teacher=teacher))["loss_reviewkd"]
    )


def test_pyramids_of_other_levels_are_refused():
    shapes = {name: ShapeSpec(channels=8, stride=stride) for name, stride in STRIDES.items()}
    fewer = {name: shapes[name] for name in ("p2", "p3")}
    with pytest.raises(UserError, match="the teacher's p2, p3"):
        ReviewKDLoss(_small.load("ReviewKD/ReviewKD-R18-R101"), shapes, fewer)


def test_the_losses_of_each_kd_type():
    cfg = _small.load("DKD/ReviewDKD-R18-R101")
    shapes = {name: ShapeSpec(channels=8, stride=stride) for name, stride in STRIDES.items()}
    parts = {name: sorted(build(cfg, shapes, shapes)) for name, build in kd_types.items()}
    assert parts == {"DKD": ["kd_logits"], "ReviewKD": ["kd_trans"], "ReviewDKD": ["kd_logits", "kd_trans"]}
