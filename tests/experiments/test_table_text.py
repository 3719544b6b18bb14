"""Reading runs, tables and curves, with a run written by hand."""

import pytest
from PIL import Image

from mdistiller.analysis.plots.curves import draw_curves
from mdistiller.engine.cfg import load_cfg
from mdistiller.errors import UserError
from mdistiller.experiments.runs import read_run
from mdistiller.experiments.table_text import COLUMNS, markdown_table, run_row, runs_table

HEADER = "epoch,lr,train_loss,test_acc,epoch_seconds\n"


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "config.yaml").write_text(load_cfg("configs/digits/kd.yaml").dump())
    (tmp_path / "metrics.csv").write_text(HEADER + "1,0.1,2.5,40,3\n2,0.1,2,61.25,4\n3,0.01,1.5,60.5,4.5\n")
    return tmp_path


def test_a_run_has_a_last_and_a_best_epoch(folder):
    run = read_run(folder)
    assert (run.last, run.best, run.seconds) == (60.5, 61.25, 11.5)
    assert run.column("train_loss") == [2.5, 2.0, 1.5] and run.cfg.DISTILLER.TYPE == "KD"


def test_its_row_has_the_cost_of_its_student(folder):
    # resnet8 with 10 classes, counted by hand: a stem, three stages of one block, two 1x1 shortcuts, BatchNorms, fc.
    stem, stages = 3 * 16 * 9, 2 * 16 * 16 * 9 + (16 + 32) * 32 * 9 + (32 + 64) * 64 * 9
    shortcuts, norms, fc = 16 * 32 + 32 * 64, 2 * (3 * 16 + 3 * 32 + 3 * 64), 64 * 10 + 10
    assert run_row("KD", read_run(folder)) == (
        "KD (resnet8)", "60.50", "61.25", f"{stem + stages + shortcuts + norms + fc:,}", "12.5 M", "12"
    )  # fmt: skip


def test_the_tables_columns_are_aligned(folder):
    lines = runs_table({"KD": read_run(folder), "the plain one": read_run(folder)}).splitlines()
    assert len(lines) == 4 and len({len(line) for line in lines}) == 1
    assert [cell.strip() for cell in lines[0].strip("|").split("|")] == list(COLUMNS)


def test_a_markdown_table_by_hand():
    assert markdown_table(("a", "bb"), [("xyz", "1"), ("x", "22")]).splitlines() == [
        "| a   | bb |",
        "|-----|---:|",
        "| xyz |  1 |",
        "| x   | 22 |",
    ]


def test_curves_have_a_line_for_each_run(folder, tmp_path):
    runs = {"one": read_run(folder), "two": read_run(folder)}
    draw_curves(runs, tmp_path / "curves.png")
    draw_curves(runs, tmp_path / "curves.svg")
    with Image.open(tmp_path / "curves.png") as plot:
        assert plot.size == (1500, 630)
    svg = (tmp_path / "curves.svg").read_text()
    for colour in ("#0072b2", "#d55e00"):
        assert svg.count(f"stroke: {colour}") >= 2, "a line in each panel"
    for text in ("one", "two", "epoch"):
        assert f"<!-- {text} -->" in svg


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("metrics.csv", None, "is no run's folder: it has no metrics.csv"),
        ("metrics.csv", HEADER, "holds no finished epoch"),
        ("metrics.csv", "", "holds no finished epoch"),
        ("metrics.csv", "a,b\n1,2\n", "holds no finished epoch"),
        ("metrics.csv", HEADER + "1,0.1,x,40,3\n", "holds something that is not a number"),
        ("metrics.csv", HEADER + "1,0.1\n", "holds something that is not a number"),
        ("config.yaml", None, "cannot read config"),
    ],
)
def test_a_folder_that_is_no_run_gets_a_one_line_error(folder, name, content, message):
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_text(content)
    with pytest.raises(UserError, match=message):
        read_run(folder)
