"""HTML reports: the content of the page."""

import re

import pytest
from PIL import Image

from mdistiller.analysis.html_report import report
from mdistiller.errors import UserError
from mdistiller.experiments.summary import Row, Table, save_table

ROWS = [{"lr": 0.1, "test_acc": 40.5, "train_loss": 2.5, "epoch_seconds": 3}, {"lr": 0.1, "test_acc": 38.25}]


def text_of(page):
    return " ".join(re.sub(r"<style.*?</style>|<[^>]+>", " ", page, flags=re.S).split())


def test_a_runs_page_holds_metrics_curves_plots_configuration_and_environment(make_run):
    folder = make_run("kd", ROWS, "SOLVER.EPOCHS", "3")
    (folder / "inspect").mkdir()
    Image.new("RGB", (2, 2)).save(folder / "inspect" / "cka.png")
    page = report(folder)
    text = text_of(page)
    for expected in ("top-1 last 38.25 %", "top-1 best 40.50 %", "epochs 2 of 3", "student resnet8", "teacher wrn_16_2",
                 "TEMPERATURE: 4", "processor a slide rule", "CKA between the stages", "40.5", "2.5"):  # fmt: skip
        assert expected in text, expected
    assert page.count('src="data:image/png;base64,') == 2, "the curves and the only plot in inspect/"
    assert not re.search(r'(src|href)="(?!data:)', page) and "@import" not in page and "url(" not in page


def test_names_are_escaped(make_run, tmp_path):
    folder = make_run("<script>alert(1)</script>".replace("/", "_"), ROWS)
    assert "<script>" not in report(folder) and "&lt;script&gt;" in report(folder)


def test_a_tables_page_holds_its_rows_notes_and_runs(make_run, tmp_path):
    folder = make_run("kd,0", ROWS)
    rows = [Row("", "KD", 1, 3, 38.25, None, 40.5, None, 70.66, "crd", {"student": 1.5}, folders=(str(folder),)),
            Row("", "lost", 1, 3, 30.0, folders=("gone",))]  # fmt: skip
    table = Table("By hand", "About it.", rows, ["student"], {"crd": "Tian 2020"}, {}, ["1 run(s) on a slide rule"])
    save_table(table, tmp_path / "table.json")
    page = report(tmp_path)
    text = text_of(page)
    for expected in ("By hand", "About it.", "70.66 (crd)", "+1.50", "1 of 3", "(crd) Tian 2020", "on a slide rule",
                 "TEMPERATURE: 4"):  # fmt: skip
        assert expected in text, expected
    assert page.count("data:image/png;base64,") == 2, "the curves of the run that exists, and the bars"
    assert '<td data-column="published">70.66 (crd)</td>' in page
    assert report(tmp_path / "table.json") == page


def test_another_folder_gets_a_one_line_error(tmp_path):
    with pytest.raises(UserError, match=r"is no run's folder: it has no metrics.csv"):
        report(tmp_path)
    (tmp_path / "table.json").write_text("{}")
    with pytest.raises(UserError, match="holds no table"):
        report(tmp_path)
