"""Which run `--resume` continues."""

import pytest
import torch

from mdistiller.distributed.ranks import Ranks
from mdistiller.engine.cfg import load_cfg
from mdistiller.engine.resumed_run import run_to_resume
from mdistiller.engine.run_name import experiment_name, named_overrides, override_text, overrides_in
from mdistiller.errors import UserError

CONFIG = "configs/digits/vanilla.yaml"
TAG = "vanilla,resnet8"


@pytest.fixture
def runs(tmp_path):
    """runs(overrides, ...): begun with them; `epoch`: the last one done, None for a run without a checkpoint."""

    def make(*starts, epoch=1, config=True):
        for start in starts:
            overrides = [*start.split(), "LOG.PREFIX", str(tmp_path)]
            cfg = load_cfg(CONFIG, overrides)
            folder = tmp_path / experiment_name(cfg, overrides)
            folder.mkdir(parents=True)
            if config:
                (folder / "config.yaml").write_text(cfg.dump())
            if epoch is not None:
                content = {"epoch": epoch, "model": {"w": torch.zeros(1)}, "optimizer": {}, "best_acc": 0.0}
                torch.save(content, folder / "latest")

    return make


@pytest.fixture
def found(tmp_path):
    """found(overrides): the name, without the project, of the run that these overrides resume."""

    def find(overrides="", ranks=None):
        given = [*overrides.split(), "LOG.PREFIX", str(tmp_path)]
        project, name = run_to_resume(load_cfg(CONFIG, given), given, ranks or Ranks()).split("/")
        assert project == "digits"
        return name.removeprefix(TAG)

    return find


# (the runs, the overrides given with --resume, those in the name of the run that goes on)
FOUND = [
    ([""], "", ""),
    ([""], "SOLVER.SYNC_BN True", ""),
    ([""], "SOLVER.BATCH_SIZE 32", ""),
    ([""], "EXPERIMENT.SEED 0 SOLVER.LR 1", ""),  # the default seed, said
    ([""], "LOG.WANDB False DATASET.NUM_WORKERS 3", ""),
    (["", "SOLVER.SYNC_BN True"], "SOLVER.SYNC_BN True", "SOLVER.SYNC_BN:True"),
    (["SOLVER.LR 0.1"], "SOLVER.LR 0.1 SOLVER.EPOCHS 300", "SOLVER.LR:0.1"),
    (["", "SOLVER.LR 0.1"], "SOLVER.LR 0.1 SOLVER.EPOCHS 300", "SOLVER.LR:0.1"),
    (["", "SOLVER.LR 0.1"], "SOLVER.EPOCHS 300", ""),
    (["SOLVER.LR 0.1 SOLVER.EPOCHS 9"], "SOLVER.EPOCHS 9 SOLVER.LR 0.1", "SOLVER.LR:0.1,SOLVER.EPOCHS:9"),
    (["SOLVER.LR 1e-1"], "SOLVER.LR 0.1 SOLVER.EPOCHS 9", "SOLVER.LR:1e-1"),
    (["SOLVER.LR_DECAY_STAGES [1,2]"], "SOLVER.LR_DECAY_STAGES [1,2] SOLVER.LR 1", "SOLVER.LR_DECAY_STAGES:[1,2]"),
    (["DISTILLER.TEACHER_CKPT a/b"], "DISTILLER.TEACHER_CKPT a/b SOLVER.LR 1", "DISTILLER.TEACHER_CKPT:a_b"),
    # Another value of an override that the run was started with:
    (["SOLVER.EPOCHS 2"], "SOLVER.EPOCHS 3", "SOLVER.EPOCHS:2"),
    (["", "SOLVER.EPOCHS 2"], "SOLVER.EPOCHS 3", ""),
    (["", "SOLVER.EPOCHS 2"], "SOLVER.EPOCHS 2 SOLVER.EPOCHS 3", "SOLVER.EPOCHS:2"),
    (["SOLVER.LR 0.1 SOLVER.EPOCHS 2", ""], "SOLVER.LR 0.1 SOLVER.EPOCHS 3", "SOLVER.LR:0.1,SOLVER.EPOCHS:2"),
    (["SOLVER.LR 0.1 SOLVER.EPOCHS 2", "SOLVER.LR 0.1"], "SOLVER.LR 0.1 SOLVER.EPOCHS 3", "SOLVER.LR:0.1"),
    # A run by its name:
    (["SOLVER.LR 0.1", "SOLVER.LR 0.2"], f"EXPERIMENT.NAME {TAG}SOLVER.LR:0.1 SOLVER.EPOCHS 3", "SOLVER.LR:0.1"),
    # Other runs are left alone:
    (["", "EXPERIMENT.TAG vanilla,resnet8,long", "EXPERIMENT.NAME other"], "SOLVER.SYNC_BN True", ""),
]  # fmt: skip


@pytest.mark.parametrize(("begun", "given", "name"), FOUND)
def test_the_run_of_most_of_the_overrides_goes_on(runs, found, capsys, begun, given, name):
    runs(*begun)
    assert found(given) == name == found(given)
    said = capsys.readouterr().err
    assert said == "" or (said.startswith("note: no run was started as ") and said.count("; resuming ") == 2)


REFUSED = [
    ([], "", "no checkpoint at .*/latest; leave out --resume to start this run"),
    (["SOLVER.LR 0.1"], "", "no checkpoint at .*; .* holds vanilla.*: to resume one of them, give its overrides"),
    (["SOLVER.LR 0.1"], "SOLVER.EPOCHS 3", f"or its name, such as EXPERIMENT.NAME '{TAG}SOLVER.LR:0.1'$"),
    (["EXPERIMENT.SEED 1"], "EXPERIMENT.SEED 2", "no checkpoint at .*EXPERIMENT.SEED:2/latest"),  # not seed 1's
    ([""], "EXPERIMENT.SEED 2 SOLVER.EPOCHS 20", "no checkpoint at .*EXPERIMENT.SEED:2"),  # nor the default seed's
    (
        ["SOLVER.LR 0.1", "SOLVER.EPOCHS 3"], "SOLVER.LR 0.1 SOLVER.EPOCHS 3",
        r"may mean .*SOLVER.EPOCHS:3 or .*SOLVER.LR:0.1; name one of them, such as EXPERIMENT.NAME 'van.*EPOCHS:3'$",
    ),
    ([""], "DISTILLER.STUDENT resnet14", "DISTILLER.STUDENT was 'resnet8' and is now 'resnet14'; set it back"),
    ([""], "DISTILLER.TYPE KD", "DISTILLER.TYPE was 'NONE' and is now 'KD'; set it back"),
    ([""], "DATASET.TYPE cifar100 SOLVER.LR 1", "DATASET.TYPE was 'digits' and is now 'cifar100'; set it back"),
    (["SOLVER.TYPE AdamW"], "SOLVER.TYPE SGD", "SOLVER.TYPE was 'AdamW' and is now 'SGD'; set it back"),
]  # fmt: skip


@pytest.mark.parametrize(("begun", "given", "message"), REFUSED)
def test_no_run_several_runs_and_another_run_are_refused(runs, found, begun, given, message):
    runs(*begun)
    with pytest.raises(UserError, match=message):
        found(given)


def test_a_teacher_that_is_not_used_may_be_another(runs, found):
    runs("")
    assert found("DISTILLER.TEACHER resnet56") == ""


def test_a_run_that_ended_before_its_first_checkpoint_is_not_mistaken_for_another(runs, found):
    runs("")
    runs("SOLVER.LR 0.1", epoch=None)
    with pytest.raises(UserError, match=r"SOLVER.LR:0.1/latest; this run ended before its first one, so leave out"):
        found("SOLVER.LR 0.1")
    assert found("SOLVER.LR 0.1 SOLVER.EPOCHS 3") == ""


def test_a_trained_run_of_another_value_is_not_taken_for_a_new_one(runs, found):
    """As in a script that resumes or starts each run of a series."""
    runs("SOLVER.LR 0.1", epoch=15)
    with pytest.raises(UserError, match=r"no checkpoint at .*LR:0.2/latest, and .*LR:0.1 is trained already, to epo"):
        found("SOLVER.LR 0.2")
    assert found("SOLVER.LR 0.2 SOLVER.EPOCHS 16") == "SOLVER.LR:0.1"


def test_a_trained_run_without_the_override_is_not_taken_for_a_new_one(runs, found):
    runs("", epoch=15)
    with pytest.raises(UserError, match=r"no checkpoint at .*LR:0.2/latest, and .*resnet8 is trained already, to epo"):
        found("SOLVER.LR 0.2")
    with pytest.raises(UserError, match="STUDENT was 'resnet8' and is now 'resnet14'"):
        found("DISTILLER.STUDENT resnet14")
    assert found("SOLVER.LR 0.2 SOLVER.EPOCHS 16") == found("SOLVER.EPOCHS 16") == ""



def test_runs_without_a_readable_configuration_are_found_by_their_names(runs, found, tmp_path):
    """As those of the original."""
    runs("", "SOLVER.LR 0.1", config=False)
    assert found("SOLVER.SYNC_BN True") == "" and found("SOLVER.LR 0.1 SOLVER.EPOCHS 3") == "SOLVER.LR:0.1"
    (tmp_path / "digits" / f"{TAG}SOLVER.LR:0.1" / "config.yaml").write_text("NO: 1")
    assert found("SOLVER.LR 0.1 SOLVER.EPOCHS 3") == "SOLVER.LR:0.1"


def test_a_value_that_was_changed_by_resuming_is_that_of_the_run(runs, found, tmp_path):
    runs("SOLVER.EPOCHS 2", "SOLVER.EPOCHS 3")
    place = tmp_path / "digits" / f"{TAG}SOLVER.EPOCHS:2"
    (place / "config.yaml").write_text(load_cfg(CONFIG, ["SOLVER.EPOCHS", "4"]).dump())
    assert found("SOLVER.EPOCHS 4") == "SOLVER.EPOCHS:2"


def test_a_name_that_was_cut_is_found_by_fewer_overrides(runs, found):
    keys = ["LR", "LR_MIN", "WEIGHT_DECAY", "EPOCHS", "WARMUP_EPOCHS", "CLIP_GRAD_NORM", "NAN_LIMIT", "BATCH_SIZE"]
    start = " ".join(f"SOLVER.{key} {'1' * 9}" for key in [*keys, "ACCUMULATE"])
    runs("", start)
    assert "~" in found(start)
    assert found(f"{start} SOLVER.SYNC_BN True SOLVER.EMA 0.5") == found(start)


def test_the_first_rank_decides(runs, found, monkeypatch):
    runs("")
    answers = []
    gather = lambda ranks, value: answers if answers.append(value) or ranks.first else answers[:1]  # noqa: E731
    monkeypatch.setattr(Ranks, "gather", gather)
    assert found("SOLVER.LR 1", Ranks(0, 2)) == found("SOLVER.LR 1", Ranks(1, 2)) == ""
    answers.clear()
    for rank in (0, 1):
        with pytest.raises(UserError, match="now 'resnet14'"):
            found("DISTILLER.STUDENT resnet14", Ranks(rank, 2))


def test_a_folder_that_cannot_be_listed(found, tmp_path):
    (tmp_path / "digits").write_text("")
    with pytest.raises(UserError, match="no checkpoint at"):
        found()


@pytest.mark.parametrize(
    "overrides",
    ["", "SOLVER.LR 0.1", "SOLVER.LR_DECAY_STAGES [1,2] EXPERIMENT.SEED 3", "DISTILLER.TEACHER_CKPT ../a:b,SOLVER.X"],
)
def test_the_overrides_in_a_name_are_those_that_made_it(overrides):
    given = overrides.split()
    cfg = load_cfg(CONFIG, given)
    folder = experiment_name(cfg, given).split("/")[1]
    pairs = named_overrides(cfg, given)
    assert overrides_in(folder, cfg) == [(key, override_text(cfg, key, value)) for key, value in pairs]
    assert overrides_in(f"{folder}~", cfg) != overrides_in(folder, cfg) and overrides_in("other", cfg) is None
