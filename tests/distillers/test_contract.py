"""What is refused when a method is built, by name and with the way to declare it."""

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from mdistiller.distillers import Distiller, distiller_dict
from mdistiller.distillers.contract import check_distiller, check_scores, learnable_parameters, not_averaged
from mdistiller.distillers.facts import RunFacts
from mdistiller.engine.cfg import CFG
from mdistiller.errors import UserError

from .._networks import CLASSES, Deployed, Net


class Method(Distiller):
    """Cross-entropy and the distance to the teacher's logits."""

    def __init__(self):
        torch.manual_seed(0)
        super().__init__(Net(), Net())

    def forward_train(self, image, target, **kwargs):
        logits, _ = self.student(image)
        return logits, {
            "loss_ce": F.cross_entropy(logits, target),
            "loss_kd": (logits - self.teacher_forward(image)[0]).square().mean(),
        }


class WithLayer(Method):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)


class DeclaredUntrained(WithLayer):
    untrained = ("layer",)


class WithGroups(WithLayer):
    def get_learnable_parameters(self):
        return [*super().get_learnable_parameters(), {"params": self.layer.parameters(), "weight_decay": 0.0}]


class MisspeltUntrained(Method):
    untrained = ("layre",)


class TrainsItsTeacher(Method):
    def get_learnable_parameters(self):
        return [*super().get_learnable_parameters(), *self.teacher.fc.parameters()]


class ThawsItsTeacher(Method):
    untrained = ("teacher",)

    def __init__(self):
        super().__init__()
        self.teacher.fc.requires_grad_(True)


class HasDeployed(Method):
    """Trains the projector of a network that could be deployed."""

    def __init__(self):
        super().__init__()
        self.deployed = Deployed(self.student, self.teacher, width=4)

    def get_learnable_parameters(self):
        return [*super().get_learnable_parameters(), *self.deployed.projector.parameters()]


class ScoresAnother(HasDeployed):
    def forward_test(self, image):
        return self.deployed(image)


class DeploysIt(ScoresAnother):
    """As ScoresAnother, with the deployment declared."""

    def deployments(self):
        return {"student": self.deployed}


class DeploysWithoutScoring(HasDeployed):
    """Inherits the scoring from its deployment."""

    def deployments(self):
        return {"student": self.deployed}


class ScoresTheStudent(Method):
    """As a method of the original may, without a need."""

    def forward_test(self, image):
        return self.student(image)[0]


class ScoresNeither(DeploysIt):
    """Declares one network and scores another."""

    def forward_test(self, image):
        return self.student(image)[0]


class HeadsOfAnother(DeploysWithoutScoring):
    def forward_heads(self, image):
        return {"main": self.student(image)[0]}


class NewEveryTime(Method):
    def deployments(self):
        return {"student": Deployed(self.student, self.teacher, width=4)}


class NoDeployment(Method):
    def deployments(self):
        return {}


class ListOfDeployments(Method):
    def deployments(self):
        return [self.student]


class NamedLikeAFolder(Method):
    def deployments(self):
        return {"a/b": self.student}


@pytest.mark.parametrize(
    "method", [Method, DeclaredUntrained, WithGroups, DeploysIt, DeploysWithoutScoring, ScoresTheStudent]
)
def test_methods_that_keep_the_contract(method):
    distiller = method()
    check_distiller(distiller)
    check_scores(distiller, 8)
    assert distiller.training, "the modes are as before"


@pytest.mark.parametrize(
    "method, message",
    [
        (
            WithLayer,
            r"WithLayer: layer.weight, layer.bias would not be trained; return them in get_learnable_parameters",
        ),
        (MisspeltUntrained, r"MisspeltUntrained.untrained names layre, but it has no such parameters"),
        (
            TrainsItsTeacher,
            r"TrainsItsTeacher: teacher.fc.weight, teacher.fc.bias would be trained, but teacher is frozen",
        ),
        (ThawsItsTeacher, r"ThawsItsTeacher: teacher.fc.weight, teacher.fc.bias would be trained"),
        (NewEveryTime, r"NewEveryTime.deployments\(\) must return the same networks at every call"),
        (ListOfDeployments, r"ListOfDeployments.deployments\(\) must return networks by name"),
        (NamedLikeAFolder, r"NamedLikeAFolder.deployments\(\): 'a/b' cannot be part of a file's name"),
        (NoDeployment, r"NoDeployment.deployments\(\) must return networks by name, it returns {}"),
    ],
)
def test_methods_that_break_it(method, message):
    with pytest.raises(UserError, match=message):
        check_distiller(method())


@pytest.mark.parametrize("method, scorer", [(ScoresNeither, "forward_test"), (HeadsOfAnother, "forward_heads")])
def test_a_method_that_scores_another_network_than_it_deploys(method, scorer):
    distiller = method()
    check_distiller(distiller)
    with pytest.raises(
        UserError, match=rf"{method.__name__}.{scorer} scores other logits than its deployment 'student'"
    ):
        check_scores(distiller, 8)


def test_a_method_that_only_scores_another_network_is_told_of_deployments():
    distiller = ScoresAnother()
    check_distiller(distiller)
    with pytest.raises(
        UserError, match=r"ScoresAnother overrides forward_test, but not deployments.* Define deployments\(\)"
    ):
        check_scores(distiller, 8)


def test_frozen_networks_evaluate_without_gradients():
    distiller = Method()
    distiller.add_frozen("assistant", Net().train(), ["logits"])
    assert distiller.frozen == {"teacher": None, "assistant": ("logits",)}
    assert not distiller.train().assistant.training and not distiller.teacher.training and distiller.student.training
    assert not any(p.requires_grad for p in distiller.assistant.parameters())
    logits, _ = distiller.frozen_forward("assistant", torch.randn(2, 3, 8, 8))
    assert logits.shape == (2, CLASSES) and not logits.requires_grad
    check_distiller(distiller)


def test_what_is_untrained_is_not_learnable():
    class Partly(Method):
        untrained = ("student.fc", "layer.bias")

        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def get_learnable_parameters(self):
            return [*super().get_learnable_parameters(), {"params": list(self.layer.parameters()), "lr": 0.1}]

    distiller = Partly()
    check_distiller(distiller)
    *plain, group = learnable_parameters(distiller)
    assert list(map(id, plain)) == list(map(id, distiller.student.conv.parameters()))
    assert group["params"] == [distiller.layer.weight] and group["lr"] == 0.1


def test_fields_that_forward_train_names_are_needed():
    class TwoViews(Method):
        def forward_train(self, image_weak, image_strong, target, epoch, gain=1.0, *, index, **kwargs):
            raise AssertionError

    class Inherits(TwoViews):
        needs_batch = ("image_weak", "contrastive_index")

        def forward_train(self, image_weak, target, **kwargs):
            raise AssertionError

    class Anything(Method):
        def forward_train(self, *args, **kwargs):
            raise AssertionError

    assert TwoViews.needs_batch == ("image_weak", "image_strong", "index")
    assert Inherits.needs_batch == ("image_weak", "contrastive_index") and Anything.needs_batch == ()


def test_a_method_that_reads_logit_stand_standardises_logits():
    class Reads(Method):
        def __init__(self, cfg):
            super().__init__()
            self.logit_stand = cfg.EXPERIMENT.LOGIT_STAND

    class Deeper(Reads):
        pass

    class SaysNo(Reads):
        standardizes_logits = False

    assert Reads.standardizes_logits and Deeper.standardizes_logits
    assert not SaysNo.standardizes_logits and not Method.standardizes_logits


def test_a_text_in_place_of_names_is_a_type_error():
    with pytest.raises(TypeError, match=r"Wrong\.needs_batch must be a tuple of names"):
        type("Wrong", (Distiller,), {"needs_batch": "index"})


def test_what_training_leaves_alone_is_outside_of_what_processes_average():
    distiller = DeclaredUntrained()
    distiller.add_frozen("assistant", nn.BatchNorm2d(2))
    names = set(not_averaged(distiller))
    assert {"teacher.conv.weight", "assistant.weight", "assistant.running_mean", "layer.weight", "layer.bias"} <= names
    assert not any(name.startswith("student.") for name in names)


FACTS = RunFacts(10, CLASSES, ("a", "b", "c"), 8, 5, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))


def test_a_method_gets_the_facts_that_it_names():
    class Curious(Method):
        needs_run = ("num_data", "num_classes", "class_names", "image_size", "epochs", "mean", "std")

        def __init__(self, student, teacher, cfg, **facts):
            super().__init__()
            self.facts = facts

    assert Curious.from_run(Net(), Net(), CFG, FACTS).facts == {
        name: getattr(FACTS, name) for name in Curious.needs_run
    }
    assert Curious.facts_needed(CFG) == set(Curious.needs_run)


def test_unknown_facts_are_refused_by_name():
    with pytest.raises(
        UserError, match=r"unknown fact of the run \(Mine.needs_run\) 'num_class'; did you mean num_classes"
    ):
        FACTS.named(["num_class"], "Mine")
    unread = RunFacts.of(CFG)
    assert (unread.num_data, unread.num_classes, unread.image_size, unread.epochs) == (None, 100, 32, 240)
    with pytest.raises(UserError, match="Mine needs the run's num_data, which its data set does not tell"):
        unread.named(["num_data"], "Mine")


@pytest.mark.parametrize("name", sorted(distiller_dict))
def test_every_method_declares_what_it_reads(name):
    """Only DCGD, which follows its base method, does not."""
    method = distiller_dict[name]
    assert (method.teacher_outputs is None) == name.startswith("DCGD")
