"""mdistiller.distiller: a method's loss in a loop of one's own."""

import pytest
import torch

import mdistiller
from mdistiller import UserError
from mdistiller.distillers.KD import kd_loss

from ._parts import CLASSES, Featured, data, net, same, weights


def batch(count=8, size=8):
    return data(count, size).tensors


def test_the_loss_of_a_batch_by_hand():
    student, teacher, (images, labels) = net(), net(8, seed=1), batch()
    distiller = mdistiller.distiller("kd", student, teacher, example=images, temperature=2, ce_weight=0.3)
    with torch.no_grad():
        loss, terms = distiller(images, labels)
        logits, taught = student.train()(images), teacher.eval()(images)
        ce = torch.nn.functional.cross_entropy(logits, labels)
    assert float(terms["loss_ce"]) == pytest.approx(0.3 * float(ce), 1e-4)
    assert float(terms["loss_kd"]) == pytest.approx(0.9 * float(kd_loss(logits, taught, 2)), 1e-4)
    assert loss.shape == () and float(loss) == pytest.approx(float(sum(terms.values())))
    assert distiller.student is student and distiller.teacher is teacher


def test_a_loop_of_ones_own_trains_the_student_and_leaves_the_teacher():
    student, teacher, (images, labels) = net(), net(8, seed=1), batch()
    distiller = mdistiller.distiller("DKD", student, teacher, example=images)
    optimizer = torch.optim.SGD(distiller.parameters(), lr=0.1, weight_decay=0.1)
    before, kept, losses = weights(student), weights(teacher), []
    for epoch in range(1, 6):
        loss, _ = distiller.train()(images, labels, epoch=epoch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] and not same(before, weights(student))
    assert same(kept, weights(teacher)) and not teacher.training
    assert set(map(id, distiller.parameters())) == set(map(id, student.parameters()))


def test_layers_that_a_method_adds_are_trained_too():
    student, teacher = mdistiller.create_model("resnet8", CLASSES), mdistiller.create_model("resnet14", CLASSES)
    images, labels = batch(4, 32)
    distiller = mdistiller.distiller("ReviewKD", student, teacher, example=images)
    trained, own = list(distiller.parameters()), set(map(id, student.parameters()))
    assert own < set(map(id, trained)) and not set(map(id, teacher.parameters())) & set(map(id, trained))
    distiller(images, labels)[0].backward()
    assert all(p.grad is not None for p in trained)
    with torch.no_grad():  # REVIEWKD.WARMUP_EPOCHS 20
        early, later = (distiller(images, labels, epoch=epoch)[0] for epoch in (1, 10))
    assert early < later


def test_in_eval_mode_it_gives_the_loss_and_changes_nothing():
    student, teacher, (images, labels) = net(), net(8, seed=1), batch()
    distiller = mdistiller.distiller("KD", student, teacher, example=images).eval()
    before = weights(distiller)
    with torch.no_grad():
        terms = distiller(images, labels)[1]
        ce = torch.nn.functional.cross_entropy(student(images), labels)
    assert float(terms["loss_ce"]) == pytest.approx(0.1 * float(ce), 1e-4) and same(before, weights(distiller))


def test_crd_draws_its_negatives_and_updates_its_memory():
    images, labels = batch()
    distiller = mdistiller.distiller("CRD", Featured(), Featured(8), example=images, targets=labels, k=4)
    memory = distiller.method.contrast.memory_v1.clone()
    loss, _ = distiller(images, labels, index=torch.arange(8))
    loss.backward()
    assert not torch.equal(memory, distiller.method.contrast.memory_v1)
    memory = distiller.method.contrast.memory_v1.clone()
    distiller.eval()(images, labels, index=torch.arange(8))
    assert torch.equal(memory, distiller.method.contrast.memory_v1)
    with pytest.raises(UserError, match="CRD needs index, contrastive_index of each image"):
        distiller(images, labels)


def test_facts_that_a_method_needs_are_keywords():
    images, labels = batch()
    with pytest.raises(UserError, match="num_data"):
        mdistiller.distiller("CRD", Featured(), Featured(8), example=images)
    distiller = mdistiller.distiller("CRD", Featured(), Featured(8), image_size=8, num_data=8, k=4)
    with pytest.raises(UserError, match="targets=LABELS"):
        distiller(images, labels, index=torch.arange(8))
    drawn = torch.arange(40).reshape(8, 5) % 8
    assert distiller(images, labels, index=torch.arange(8), contrastive_index=drawn)[0] > 0


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"method": "RevieKD"}, "unknown method 'RevieKD'; did you mean REVIEWKD"),
        ({"lr": 0.1}, "SOLVER.LR 0.1 would be ignored: it is of the training loop"),
        ({"example": None}, "example=images (B, 3, H, W), or their size"),
        ({"student": "resnet8", "teacher": "resnet14"}, "give num_classes=C"),
        ({"temperature": 0}, "KD.TEMPERATURE must be"),
        ({"teacher": None}, "no teacher is given"),
        ({"method": "DIST", "logit_stand": True}, "EXPERIMENT.LOGIT_STAND True does not go with DIST"),
        ({"pairs": [[1, 1]]}, "DISTILLER.PAIRS [[1, 1]] does not go with KD"),
    ],
)
def test_bad_input_is_a_user_error_of_one_line(settings, words):
    given = {"method": "KD", "student": net(), "teacher": net(8), "example": batch()[0], **settings}
    with pytest.raises(UserError) as refused:
        mdistiller.distiller(**given)
    assert words in str(refused.value) and "\n" not in str(refused.value)


def test_labels_are_checked():
    images, labels = batch()
    distiller = mdistiller.distiller("KD", net(), net(8), example=images)
    with pytest.raises(UserError, match=r"labels\.long\(\)"):
        distiller(images, labels.float())


def test_logits_may_be_standardised():
    images, labels = batch()
    student, teacher = net(), net(8)
    _, terms = mdistiller.distiller("KD", student, teacher, example=images, logit_stand=True)(images, labels)
    logits = student(images), teacher(images)
    scaled = [(z - z.mean(1, keepdim=True)) / (1e-7 + z.std(1, keepdim=True)) for z in logits]
    assert terms["loss_kd"].item() == pytest.approx(0.9 * kd_loss(*scaled, 4).item(), rel=1e-5)
