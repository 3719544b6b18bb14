"""tools/inspect_features.py and the notebooks, on untrained networks."""

import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mdistiller.analysis.measures import accuracy, agreement
from mdistiller.commands.inspect_features import network_outputs
from mdistiller.models import cifar_model_dict
from tests.experiments.hand_made import write_run

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run's folder with a student (resnet8) and its teacher (resnet14), random."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("runs")
    teacher = folder / "teacher"
    torch.save({"model": cifar_model_dict["resnet14"][0](num_classes=10).state_dict()}, teacher)
    overrides = ["DISTILLER.TEACHER", "resnet14", "DISTILLER.TEACHER_CKPT", str(teacher)]
    write_run(folder / "run", [{"test_acc": 10}], *overrides)
    torch.save({"model": cifar_model_dict["resnet8"][0](num_classes=10).state_dict()}, folder / "run/student_latest")
    return folder / "run"


@pytest.fixture(scope="module")
def outputs(run):
    student = network_outputs("resnet8", str(run / "student_latest"), "digits", device="cpu")
    return student, network_outputs("resnet14", str(run.parent / "teacher"), "digits", device="cpu")


def test_a_run_names_its_networks_and_gets_its_plots(run, outputs, tool, capsys):
    tool("inspect_features.py", "--run", run, "--tsne-images", "40", "--device", "cpu")
    student, teacher = outputs
    said = capsys.readouterr().out
    assert f"resnet8: top-1 {accuracy(student.logits, student.targets):.2f}, ECE " in said
    assert f"agreement with the teacher: {agreement(student.logits, teacher.logits):.2f} %" in said
    out = run / "inspect"
    plots = {"tsne", "confusion", "reliability", "correlation", "cka"}
    assert {p.stem for p in out.glob("*.png")} == plots
    values = json.loads((out / "figures.json").read_text())
    assert values["networks"].keys() == {"resnet8", "resnet14"} and values["images"] == 359
    assert values["agreement"] == pytest.approx(agreement(student.logits, teacher.logits))
    cka = values["cka_teacher_rows_student_columns"]
    assert len(cka) == len(cka[0]) == 4 and all(0 <= value <= 1 for row in cka for value in row)
    confusion = [[int(n) for n in line.split(",")] for line in (out / "confusion.csv").read_text().splitlines()]
    right = sum(confusion[c][c] for c in range(10))
    assert 100 * right / 359 == pytest.approx(accuracy(student.logits, student.targets))
    assert [sum(row) for row in confusion] == torch.tensor(student.targets).bincount().tolist()
    header, *points = (out / "tsne.csv").read_text().splitlines()
    assert header == "target,resnet8 x,resnet8 y,resnet14 x,resnet14 y" and len(points) == 40
    with (out / "reliability.csv").open() as file:
        bins = [row for row in csv.DictReader(file) if row["network"] == "resnet8"]
    gaps = [int(b["count"]) * abs(float(b["confidence"]) - float(b["accuracy"])) for b in bins]
    assert sum(int(b["count"]) for b in bins) == 359
    assert 100 * sum(gaps) / 359 == pytest.approx(values["networks"]["resnet8"]["ece"], abs=1e-3)


def test_a_network_alone_needs_no_teacher(run, tool, tmp_path):
    tool("inspect_features.py", "-m", "resnet8", "-c", run / "student_latest", "-d", "digits", "--tsne-images", "0",
         "--device", "cpu", "-o", tmp_path)  # fmt: skip
    assert {p.stem for p in tmp_path.glob("*.png")} == {"confusion", "reliability"}
    assert "agreement" not in json.loads((tmp_path / "figures.json").read_text())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--run", "nowhere"], "nowhere is no run's folder"),
        (["-m", "resnet8", "-d", "digits", "-c", "none"], "no checkpoint of resnet8 at none"),
        (["-m", "resnet8", "-d", "digits", "-c", "STUDENT", "--bins", "0"], "number of bins must be at least 1"),
        (["-m", "resnet8", "-d", "digits", "-c", "STUDENT", "-bs", "0"], "--batch-size must be a whole number >= 1"),
        (["-m", "resnet8", "-d", "digits", "-c", "STUDENT", "--head", "single"], "has one head"),
    ],
)
def test_bad_input_gets_a_one_line_error(run, tool, tmp_path, capsys, arguments, message):
    arguments = [str(run / "student_latest") if a == "STUDENT" else a for a in arguments]
    with pytest.raises(SystemExit) as stopped:
        tool("inspect_features.py", *arguments, "-o", tmp_path / "out")
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and message in said and said.count("\n") == 1


EXECUTE = """
import sys, nbformat
from nbclient import NotebookClient
book = nbformat.read(sys.argv[1], as_version=4)
NotebookClient(book, timeout=300, kernel_name="python3").execute()
nbformat.write(book, sys.argv[2])
"""


@pytest.mark.slow
@pytest.mark.parametrize(("name", "plots"), [("tsne", 1), ("correlation", 2)])
def test_a_notebook_runs_and_shows_its_plots(name, plots, run, outputs, tmp_path):
    pytest.importorskip("nbclient", reason="the extra `dev` is not installed")
    pytest.importorskip("ipykernel", reason="the extra `dev` is not installed")
    path, done = REPOSITORY / f"tools/visualizations/{name}.ipynb", tmp_path / "done.ipynb"
    source = json.loads(path.read_text())
    assert not any(cell.get("outputs") for cell in source["cells"]), "a notebook is kept without its outputs"
    subprocess.run(
        [sys.executable, "-c", EXECUTE, str(path), str(done)], cwd=path.parent, check=True, timeout=300,
        env=os.environ | {"RUN": str(run), "IMAGES": "40", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    shown = [o for cell in json.loads(done.read_text())["cells"] for o in cell.get("outputs", [])]
    assert sum("image/png" in o.get("data", {}) for o in shown) == plots
    text = "".join("".join(o.get("text", [])) for o in shown)
    if name == "correlation":
        student, teacher = outputs
        (agree,) = re.findall(r"agree on ([\d.]+) %", text)
        assert float(agree) == pytest.approx(agreement(student.logits, teacher.logits), abs=0.005)
