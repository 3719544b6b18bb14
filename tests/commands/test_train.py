"""The commands as a user types them, in real processes, on the embedded digits."""

import csv
import re
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]


def run(*command, cwd=REPOSITORY):
    return subprocess.run([sys.executable, *map(str, command)], cwd=cwd, capture_output=True, text=True, timeout=300)


QUICK = ["LOG.WANDB", "False", "DATASET.TRAIN_FRACTION", "0.2", "SOLVER.LR_DECAY_STAGES", "[1]"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Two epochs on digits, the second one resumed, from a folder that is not the repository's."""
    folder = tmp_path_factory.mktemp("elsewhere")
    config = REPOSITORY / "configs/digits/vanilla.yaml"
    train = [REPOSITORY / "tools/train.py", "--cfg", config, *QUICK]
    first = run(*train, "SOLVER.EPOCHS", "1", "EXPERIMENT.NAME", "run", cwd=folder)
    assert first.returncode == 0, first.stderr
    # The folder is named by the overrides: rename it, as if SOLVER.EPOCHS had been 2 from the start.
    (name,) = (folder / "output/digits").iterdir()
    name.rename(name.with_name(name.name.replace("EPOCHS:1", "EPOCHS:2")))
    second = run(*train, "SOLVER.EPOCHS", "2", "EXPERIMENT.NAME", "run", "--resume", cwd=folder)
    assert second.returncode == 0, second.stderr
    (name,) = (folder / "output/digits").iterdir()
    return folder, name, first, second


def test_a_run_is_named_by_its_name_and_its_overrides(trained):
    _, name, _, _ = trained
    assert name.name == "runDATASET.TRAIN_FRACTION:0.2,SOLVER.LR_DECAY_STAGES:[1],SOLVER.EPOCHS:2"


def test_training_and_resuming_write_the_metrics_of_two_epochs(trained):
    _, name, first, second = trained
    with (name / "metrics.csv").open() as file:
        assert [row["epoch"] for row in csv.DictReader(file)] == ["1", "2"]
    assert "epoch 1/1: lr 0.05" in first.stdout and "epoch 2/2: lr 0.005" in second.stdout
    assert re.search(r"Best accuracy: [\d.]+, last epoch: [\d.]+", second.stdout)
    assert first.stderr == "", "no progress bars when the output is no terminal"


def test_eval_reports_the_accuracy_that_training_logged(trained):
    folder, name, _, _ = trained
    done = run(REPOSITORY / "tools/eval.py", "-m", "resnet8", "-d", "digits", "-c", name / "student_latest", cwd=folder)
    assert done.returncode == 0, done.stderr
    with (name / "metrics.csv").open() as file:
        last = list(csv.DictReader(file))[-1]
    top1, top5, loss = re.search(r"top-1 ([\d.]+), top-5 ([\d.]+), loss ([\d.]+)", done.stdout).groups()
    assert float(top1) == pytest.approx(float(last["test_acc"]), abs=0.01)
    assert float(top5) == pytest.approx(float(last["test_acc_top5"]), abs=0.01)
    assert float(loss) == pytest.approx(float(last["test_loss"]), abs=1e-3)
    assert "images/s" in done.stdout and "0.08 M parameters, 12.5 M MACs" in done.stdout


def test_eval_reads_the_whole_distillers_best_checkpoint_too(trained):
    folder, name, _, _ = trained
    done = run(REPOSITORY / "tools/eval.py", "-m", "resnet8", "-d", "digits", "-c", name / "best", cwd=folder)
    assert done.returncode == 0 and "top-1" in done.stdout


@pytest.mark.parametrize("tool", ["train.py", "eval.py"])
def test_help_shows_two_examples(tool):
    done = run(f"tools/{tool}", "--help")
    assert done.returncode == 0 and done.stdout.count(f"\n    python tools/{tool} ") == 2


BAD_TRAIN = {
    "no such config": (["--cfg", "configs/digits/none.yaml"], "cannot read config configs/digits/none.yaml"),
    "unknown key": (["SOLVER.BATCHSIZE", "3"], "did you mean SOLVER.BATCH_SIZE"),
    "unknown student": (["DISTILLER.STUDENT", "resnet81"], "unknown CIFAR model 'resnet81'; did you mean resnet8"),
    "unknown method": (["DISTILLER.TYPE", "KDD"], "unknown distiller 'KDD'; did you mean"),
    "unknown trainer": (["SOLVER.TRAINER", "bse"], "unknown trainer 'bse'; did you mean base"),
    "unknown data set": (["DATASET.TYPE", "cifar10"], "unknown data set 'cifar10'; did you mean cifar100"),
    "unknown optimizer": (["SOLVER.TYPE", "SGDD"], "'SGDD'"),
    "unknown device": (["EXPERIMENT.DEVICE", "gpu"], "device 'gpu' is not available"),
    "no data": (["DATASET.TYPE", "imagenet", "DATASET.ROOT", "nowhere"], "nowhere/imagenet"),
    "no teacher": (
        ["DISTILLER.TYPE", "KD", "DISTILLER.TEACHER", "resnet56", "DISTILLER.TEACHER_CKPT", "no/file"],
        "no checkpoint of resnet56 at no/file",
    ),
    "unpublished teacher": (
        ["DISTILLER.TYPE", "KD", "DISTILLER.TEACHER", "resnet20"],
        "set DISTILLER.TEACHER_CKPT (tools/eval.py: -c) to a file",
    ),
    "batch of none": (["SOLVER.BATCH_SIZE", "0"], "SOLVER.BATCH_SIZE must be a whole number >= 1, not 0"),
    "negative LR": (["SOLVER.LR", "-1"], "SOLVER.LR must be positive and finite, not -1.0"),
    "pairs of no maps": (["DISTILLER.PAIRS", "[[1, 1]]"], "Vanilla, which compares no pairs of feature maps"),
    "DOT without distillation": (["SOLVER.TRAINER", "dot"], "DOT (SOLVER.TRAINER) does not go with Vanilla"),
    "no pairs": (["DISTILLER.PAIRS", "[1, 2]"], "DISTILLER.PAIRS must be a list of values, each a list of 2 values"),
    "half a size": (["FITNET.INPUT_SIZE", "[32]"], "FITNET.INPUT_SIZE must be a list of 0 or 2 values"),
    "temperature of 0": (["KD.TEMPERATURE", "0"], "KD.TEMPERATURE must be positive and finite, not 0"),
    "reversed warm-up": (["REVIEWKD.WARMUP_EPOCHS", "-1"], "WARMUP_EPOCHS must be a whole number >= 0, not -1"),
    "nothing to resume": (["--resume"], "no checkpoint at"),
    "both": (["--resume", "--overwrite", "--cfg", "none.yaml"], "--overwrite replaces it; give one of them"),
    "no value": (["SOLVER.LR"], "override 'SOLVER.LR' has no value"),
}  # fmt: skip


@pytest.fixture
def refused(tool, capsys):
    """Run the tool; it must exit with 2 and one line; returns that line."""

    def run(name, *arguments):
        with pytest.raises(SystemExit) as stopped:
            tool(name, *arguments)
        captured = capsys.readouterr()
        assert stopped.value.code == 2 and captured.out == ""
        assert captured.err.startswith("error: ") and captured.err.count("\n") == 1, captured.err
        return captured.err

    return run


@pytest.mark.parametrize("case", BAD_TRAIN)
def test_bad_input_to_train_gets_a_one_line_error_and_writes_nothing(case, tmp_path, refused):
    arguments, message = BAD_TRAIN[case]
    output = ["LOG.PREFIX", str(tmp_path / "output")]
    config = [] if "--cfg" in arguments else ["--cfg", str(REPOSITORY / "configs/digits/vanilla.yaml")]
    assert message in refused("train.py", *config, *output, *arguments)
    assert not (tmp_path / "output").exists()


def test_bad_input_in_a_real_process_exits_with_2_and_a_one_line_error():
    done = run("tools/train.py", "--cfg", "configs/digits/vanilla.yaml", "SOLVER.LR", "nan")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: SOLVER.LR must be a number such as 0.05, not 'nan'\n"


def test_a_finished_run_is_not_trained_over(trained):
    folder, name, _, _ = trained
    before = {p: p.stat().st_mtime_ns for p in name.rglob("*")}
    config = REPOSITORY / "configs/digits/vanilla.yaml"
    done = run(REPOSITORY / "tools/train.py", "--cfg", config, *QUICK, "SOLVER.EPOCHS", "2", "EXPERIMENT.NAME", "run",
               cwd=folder)  # fmt: skip
    assert done.returncode == 2 and "--resume to continue it" in done.stderr
    assert {p: p.stat().st_mtime_ns for p in name.rglob("*")} == before


BAD_EVAL = {
    "unknown model": (["-m", "resnet2O"], "unknown CIFAR model 'resnet2O'; did you mean"),
    "unknown data set": (["-m", "resnet8", "-d", "digit"], "unknown data set 'digit'; did you mean digits"),
    "no checkpoint": (["-m", "resnet8", "-d", "digits", "-c", "none"], "no checkpoint of resnet8 at none"),
    "none published": (["-m", "resnet8", "-d", "digits"], "resnet8 has no published checkpoint"),
    "batch of none": (["-m", "resnet8", "-d", "digits", "-bs", "0"], "--batch-size must be a whole number >= 1, not 0"),
    "truncated": (["-m", "resnet8", "-d", "digits", "-c", "TRUNCATED"], "is not a readable checkpoint"),
    "another network's": (["-m", "resnet14", "-d", "digits", "-c", "STUDENT"], "30 missing (layer1.1.conv1.weight"),
    "other classes": (["-m", "resnet8", "-d", "cifar100", "-c", "STUDENT"], "fc.weight (10, 64) instead of (100, 64)"),
    "a head that is not": (["-m", "resnet8", "-d", "digits", "-c", "STUDENT", "--head", "x"], "has one head"),
}


@pytest.mark.parametrize("case", BAD_EVAL)
def test_bad_input_to_eval_gets_a_one_line_error(case, trained, tmp_path, refused):
    arguments, message = BAD_EVAL[case]
    student = trained[1] / "student_best"
    (tmp_path / "truncated").write_bytes(student.read_bytes()[:1000])
    places = {"STUDENT": student, "TRUNCATED": tmp_path / "truncated"}
    assert message in refused("eval.py", *(places.get(a, a) for a in arguments))
