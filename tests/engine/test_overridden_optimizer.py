"""A trainer's own optimizer, from `init_optimizer` or set as `self.optimizer`: it takes the steps, or is refused."""

import pytest
import torch

from mdistiller.engine import DOT, BaseTrainer
from mdistiller.engine.files.checkpoint import load_checkpoint
from mdistiller.errors import UserError

from ._runs import stopped_and_resumed, student_of, trainer_of


def test_the_optimizer_of_init_optimizer_trains(tmp_path):
    class Adam(BaseTrainer):
        def init_optimizer(self, cfg):
            parameters = self.distiller.module.get_learnable_parameters()
            return torch.optim.Adam(parameters, lr=cfg.SOLVER.LR, weight_decay=cfg.SOLVER.WEIGHT_DECAY)

    trainer = trainer_of(tmp_path, cls=Adam)
    trainer.train()
    assert type(trainer.optimizer) is torch.optim.Adam
    assert trainer.optimizer.param_groups[0]["lr"] == pytest.approx(0.005)  # the schedule is SOLVER's
    state = load_checkpoint(trainer.log_path / "latest")["optimizer"]["state"]
    assert all("exp_avg_sq" in of and int(of["step"]) == 12 for of in state.values()) and state
    plain = trainer_of(tmp_path, cls=BaseTrainer, name="plain")
    plain.train()
    assert not torch.equal(student_of(trainer)["fc.weight"], student_of(plain)["fc.weight"])


def test_a_run_with_its_own_optimizer_resumes_exactly(tmp_path):
    class Adam(BaseTrainer):
        def init_optimizer(self, cfg):
            return torch.optim.Adam(self.distiller.module.get_learnable_parameters(), lr=0.001)

    whole = trainer_of(tmp_path, cls=Adam, name="whole")
    whole.train()
    resumed = stopped_and_resumed(tmp_path, Adam)
    assert all(torch.equal(student_of(resumed)[name], tensor) for name, tensor in student_of(whole).items())


@pytest.mark.parametrize("own", [0.01, 0.1])  # below SOLVER.LR, and above
def test_a_parameter_group_with_a_learning_rate_of_its_own_keeps_its_ratio_to_the_schedule(own, tmp_path):
    class Groups(BaseTrainer):
        def init_optimizer(self, cfg):
            student = self.distiller.module.student
            groups = [{"params": student.conv.parameters(), "lr": own}, {"params": student.fc.parameters()}]
            return torch.optim.SGD(groups, lr=cfg.SOLVER.LR)

    trainer = trainer_of(tmp_path, cls=Groups)
    trainer.train()
    assert [group["lr"] for group in trainer.optimizer.param_groups] == pytest.approx([own / 10, 0.005])


def test_an_optimizer_that_dot_cannot_use_is_refused(tmp_path):
    class Sgd(DOT):
        def init_optimizer(self, cfg):
            return torch.optim.SGD(self.distiller.module.get_learnable_parameters(), lr=0.1)

    with pytest.raises(UserError, match=r"Sgd\.init_optimizer must return a DistillationOrientedTrainer, not a SGD"):
        trainer_of(tmp_path, cls=Sgd)

    class Nothing(BaseTrainer):
        def init_optimizer(self, cfg):
            return None

    with pytest.raises(UserError, match=r"Nothing\.init_optimizer must return an? Optimizer, not a NoneType"):
        trainer_of(tmp_path, cls=Nothing)

    class SetsNothing(BaseTrainer):
        def init_optimizer(self, cfg):
            self.optimizer = None

    with pytest.raises(UserError, match=r"SetsNothing\.optimizer must be an? Optimizer, not a NoneType"):
        trainer_of(tmp_path, cls=SetsNothing)


class SetsAdam(BaseTrainer):
    """Sets its optimizer as trainers of the original do."""

    def __init__(self, *args):
        super().__init__(*args)
        self.optimizer = torch.optim.Adam(self.distiller.module.get_learnable_parameters(), lr=0.01)


def test_an_optimizer_that_is_set_in_init_takes_the_steps_follows_the_schedule_and_is_resumed(tmp_path):
    class Returns(BaseTrainer):
        def init_optimizer(self, cfg):
            return torch.optim.Adam(self.distiller.module.get_learnable_parameters(), lr=0.01)

    returned = trainer_of(tmp_path, cls=Returns, name="returned")
    returned.train()
    resumed = stopped_and_resumed(tmp_path, SetsAdam)
    assert type(resumed.optimizer) is torch.optim.Adam and resumed.optimizer.param_groups[0]["lr"] == 0.001
    state = load_checkpoint(resumed.log_path / "latest")["optimizer"]["state"]
    assert all(int(of["step"]) == 12 for of in state.values()) and state
    assert all(torch.equal(student_of(resumed)[name], tensor) for name, tensor in student_of(returned).items())


def test_an_optimizer_that_is_set_anew_keeps_the_ratio_of_its_groups(tmp_path):
    trainer = trainer_of(tmp_path, cls=SetsAdam)
    trainer.train()
    trainer.optimizer = torch.optim.Adam(trainer.optimizer.param_groups)  # a restart of its moments
    assert trainer.optimizer.param_groups[0]["lr_scale"] == pytest.approx(0.2)


def test_learnable_parameters_that_an_own_optimizer_lacks_are_named_and_stay(tmp_path, caplog):
    class Head(BaseTrainer):
        def init_optimizer(self, cfg):
            return torch.optim.SGD(self.distiller.student.fc.parameters(), lr=cfg.SOLVER.LR)

    trainer = trainer_of(tmp_path, cls=Head)
    before = {name: p.clone() for name, p in trainer.distiller.student.named_parameters()}
    (line,) = [record.getMessage() for record in caplog.records if "optimizer" in record.getMessage()]
    kept = [name for name in before if not name.startswith("fc.")]
    assert f"Head's own optimizer lacks {len(kept)} of {len(before)} learnable parameters (student.{kept[0]}" in line
    trainer.train()
    after = dict(trainer.distiller.student.named_parameters())
    assert [name for name in before if torch.equal(before[name], after[name])] == kept


def test_a_full_optimizer_of_ones_own_is_not_warned_of(tmp_path, caplog):
    trainer_of(tmp_path, cls=SetsAdam)
    assert "optimizer" not in caplog.text
