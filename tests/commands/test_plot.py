"""tools/plot.py on hand-made runs."""

import pytest

from tests.experiments.hand_made import write_run

ROWS = [{"test_acc": 10, "train_loss": 3, "loss/loss_kd": 2}, {"test_acc": 20, "train_loss": 2, "loss/loss_kd": 1}]


def test_one_run_is_drawn_into_its_folder_and_several_into_the_given_file(tool, tmp_path, capsys):
    folders = [write_run(tmp_path / name, ROWS) for name in ("kd,seed0", "dkd,seed0")]
    tool("plot.py", folders[0])
    assert {"curves.png", "curves.svg"} <= {p.name for p in folders[0].iterdir()}
    tool("plot.py", *folders, "-o", tmp_path / "pictures" / "both")
    svg = (tmp_path / "pictures" / "both.svg").read_text()
    assert all(f"<!-- {text} -->" in svg for text in ("kd", "dkd", "epoch", "test top-1 (%)"))
    assert svg.count("stroke: #0072b2") >= 3 and svg.count("stroke: #d55e00") >= 3, "a line in each of three panels"
    tool("plot.py", f"mine={folders[0]}", "-o", tmp_path / "only.png")
    assert not (tmp_path / "only.svg").exists() and (tmp_path / "only.png").exists()
    assert f"wrote {tmp_path / 'only.png'}\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda run: (run / "metrics.csv").unlink(), "is no run's folder: it has no metrics.csv"),
        (lambda run: (run / "metrics.csv").write_text(""), "holds no finished epoch"),
        (lambda run: (run / "metrics.csv").write_bytes(b"\xff\xfe"), "holds something that is not a number"),
        (lambda run: (run / "config.yaml").write_text("SOLVER: {EPO"), "is not valid YAML"),
        (lambda run: (run / "config.yaml").unlink(), "cannot read config"),
    ],
)
@pytest.mark.parametrize("name", ["plot.py", "report.py"])
def test_what_is_no_run_gets_a_one_line_error(name, tool, tmp_path, capsys, damage, message):
    run = write_run(tmp_path / "run", ROWS)
    damage(run)
    with pytest.raises(SystemExit) as stopped:
        tool(name, run, "-o", tmp_path / "out.png")
    captured = capsys.readouterr()
    assert stopped.value.code == 2 and captured.out == ""
    assert message in captured.err and captured.err.startswith("error: ") and captured.err.count("\n") == 1
    assert not (tmp_path / "out.png").exists()
