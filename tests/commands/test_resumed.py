"""`--resume` with other overrides than those that the run was started with: real runs on a few digits."""

import csv
from pathlib import Path

import pytest

from mdistiller.engine.cfg import load_cfg
from mdistiller.engine.files.checkpoint import load_checkpoint

from .test_train import run

REPOSITORY = Path(__file__).resolve().parents[2]
CONFIG = """
EXPERIMENT: {PROJECT: p, TAG: run}
DATASET: {TYPE: digits, TRAIN_FRACTION: 0.03}
DISTILLER: {TYPE: NONE, STUDENT: resnet8}
SOLVER: {BATCH_SIZE: 16, EPOCHS: 1, LR: 0.05, LR_DECAY_STAGES: [50]}
LOG: {WANDB: false}
"""


@pytest.fixture
def train(tool, tmp_path, monkeypatch, capsys):
    """train(arguments): tools/train.py in `tmp_path`; returns its exit status and the text of stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text(CONFIG)

    def call(arguments=""):
        try:
            tool("train.py", "--cfg", "run.yaml", *arguments.split())
            status = 0
        except SystemExit as stopped:
            status = stopped.code
        said = capsys.readouterr()
        return status, said.out, said.err

    return call


def runs():
    return sorted(path.name for path in Path("output/p").iterdir())


def rows(name="run"):
    with Path("output/p", name, "metrics.csv").open() as file:
        return [(row["epoch"], row["lr"]) for row in csv.DictReader(file)]


def test_a_run_goes_on_in_its_folder_under_other_settings_and_back(train):
    assert train()[0] == 0
    status, _, said = train("--resume SOLVER.EPOCHS 2 SOLVER.LR 0.1 SOLVER.SYNC_BN True DATASET.NUM_WORKERS 1")
    changed = "DATASET.NUM_WORKERS 1 (was 2), SOLVER.EPOCHS 2 (was 1), SOLVER.LR 0.1 (was 0.05), SOLVER.SYNC_BN True"
    assert status == 0 and f"note: resuming output/p/run with {changed} (was False)\n" in said
    assert runs() == ["run"] and rows() == [("1", "0.05"), ("2", "0.1")]
    assert load_cfg("output/p/run/config.yaml").SOLVER.SYNC_BN is True

    status, _, said = train("--resume SOLVER.EPOCHS 3 SOLVER.LR 0.1 SOLVER.SYNC_BN True")
    assert status == 0 and "SOLVER.EPOCHS 3 (was 2)\n" in said and "SOLVER.LR" not in said.splitlines()[1]
    status, out, said = train("--resume")
    assert status == 0 and "SOLVER.EPOCHS 1 (was 3), SOLVER.LR 0.05 (was 0.1), SOLVER.SYNC_BN False (was True)" in said
    assert out.count("output/p/run is trained already, to epoch 3, and SOLVER.EPOCHS is 1\n") == 1
    assert runs() == ["run"] and len(rows()) == 3 and load_cfg("output/p/run/config.yaml").SOLVER.EPOCHS == 3


def test_an_override_that_the_run_was_started_with_may_be_changed(train):
    assert train("SOLVER.EPOCHS 1")[0] == 0
    assert train("--resume SOLVER.EPOCHS 2")[0] == 0
    status, out, _ = train("--resume SOLVER.EPOCHS 2")
    assert status == 0 and "is trained already, to epoch 2 of 2" in out
    assert runs() == ["runSOLVER.EPOCHS:1"] and len(rows("runSOLVER.EPOCHS:1")) == 2


@pytest.mark.parametrize(
    ("changed", "both"),
    [
        ("DISTILLER.TYPE KD", "DISTILLER.TYPE was 'NONE' and is now 'KD'"),
        ("DISTILLER.STUDENT resnet14", "DISTILLER.STUDENT was 'resnet8' and is now 'resnet14'"),
        ("DATASET.TYPE imagenet", "DATASET.TYPE was 'digits' and is now 'imagenet'"),  # whose images are not here
        ("SOLVER.TYPE AdamW", "SOLVER.TYPE was 'SGD' and is now 'AdamW'"),
    ],
)
def test_what_makes_another_run_is_refused_with_both_values(train, changed, both):
    assert train()[0] == 0
    before = {path: path.read_bytes() for path in Path("output/p/run").rglob("*") if path.is_file()}
    status, out, said = train(f"--resume SOLVER.EPOCHS 2 {changed}")
    assert (status, out) == (2, "") and said.count("\n") == 1
    assert said.startswith(f"error: output/p/run: this is another run: {both}; set it back")
    assert before == {path: path.read_bytes() for path in Path("output/p/run").rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("kind", "own"),
    [
        ("SOLVER.TYPE SGD", {"momentum": 0.5, "weight_decay": 0.25}),
        ("SOLVER.TYPE AdamW", {"betas": (0.5, 0.75), "weight_decay": 0.25}),
        ("SOLVER.TRAINER dot", {"momentum": 0.25, "momentum_kd": 0.75, "weight_decay": 0.25}),
    ],
)
def test_the_optimizers_settings_are_those_of_the_configuration(train, kind, own):
    """After the resumed epoch, as `latest` records them; the learning rate follows the new stages."""
    more = "DISTILLER.TYPE KD DISTILLER.TEACHER resnet8 DISTILLER.TEACHER_CKPT output/p/run/student_latest"
    start = f"{kind} {more}" if "dot" in kind else kind
    assert train()[0] == 0 and train(f"{start} EXPERIMENT.NAME two")[0] == 0
    (name,) = (name for name in runs() if name != "run")
    status, _, said = train(
        f"--resume {start} EXPERIMENT.NAME two SOLVER.EPOCHS 2 SOLVER.WEIGHT_DECAY 0.25 SOLVER.MOMENTUM 0.5 "
        "SOLVER.BETAS [0.5,0.75] SOLVER.DOT.DELTA 0.25 SOLVER.LR_DECAY_STAGES [1] SOLVER.LR_DECAY_RATE 0.5"
    )
    assert status == 0 and "SOLVER.WEIGHT_DECAY 0.25 (was 0.0001)" in said and runs() == ["run", name]
    assert rows(name) == [("1", "0.05"), ("2", "0.025")]
    (group,) = load_checkpoint(f"output/p/{name}/latest")["optimizer"]["param_groups"]
    assert {key: group[key] for key in own} == own and group["lr"] == 0.025


def test_a_setting_that_is_given_twice_is_said(train):
    status, _, said = train("SOLVER.LR 0.1 SOLVER.LR 0.2 DATASET.TYPE digits")
    assert status == 0 and said.startswith("note: SOLVER.LR is given 2 times; the last value counts, 0.2\n")
    assert runs() == ["runSOLVER.LR:0.1,SOLVER.LR:0.2,DATASET.TYPE:digits"]  # as the original names it


def test_a_section_that_stands_twice_is_refused_with_both_lines(train):
    Path("run.yaml").write_text(CONFIG + "SOLVER: {TYPE: SGD}\n")
    assert train() == (
        2, "", "error: config run.yaml: SOLVER stands there twice, in lines 5 and 7, and only the last would count; "
        "keep one, or join the two\n",
    )  # fmt: skip
    assert not Path("output").exists()


@pytest.mark.slow
def test_two_ranks_resume_the_run_that_the_first_one_finds(tmp_path):
    """The two lines of README with torchrun."""
    (tmp_path / "run.yaml").write_text(CONFIG)
    line = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", REPOSITORY / "tools/train.py"]
    first = run(*line, "--cfg", "run.yaml", cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    second = run(*line, "--cfg", "run.yaml", "--resume", "SOLVER.SYNC_BN", "True", "SOLVER.EPOCHS", "2", cwd=tmp_path)
    assert second.returncode == 0, second.stderr
    said = "note: resuming output/p/run with SOLVER.EPOCHS 2 (was 1), SOLVER.SYNC_BN True (was False)"
    assert second.stderr.count(said) == 1 and second.stdout.count("epoch 2/2") == 1
    third = run(*line, "--cfg", "run.yaml", "--resume", "DISTILLER.STUDENT", "resnet14", cwd=tmp_path)
    assert third.returncode != 0 and "DISTILLER.STUDENT was 'resnet8' and is now 'resnet14'" in third.stderr
    assert [path.name for path in (tmp_path / "output/p").iterdir()] == ["run"]
