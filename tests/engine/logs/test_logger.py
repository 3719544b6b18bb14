"""What the writers write, and that a failing writer never stops training."""

import csv
import http.server
import os
import re
import struct
import subprocess
import threading

import pytest
from tensorboardX.proto.event_pb2 import Event

from mdistiller.engine.cfg import load_cfg
from mdistiller.engine.logs.logger import Logger, MetricsCsv, TensorBoard, Wandb, Worklog, build_logger

from ..._processes import in_mount, light

METRICS = {"lr": 0.0005, "train_acc": 1.0, "train_loss": 2.0, "test_acc": 3.0, "test_acc_top5": 4.0, "test_loss": 5.0}


def test_resuming_drops_the_rows_that_will_be_run_again(tmp_path):
    csv = MetricsCsv(tmp_path, 1)
    for epoch in (1, 2, 3):
        csv.epoch(epoch, METRICS)
    MetricsCsv(tmp_path, 3).epoch(3, {**METRICS, "train_acc": 9.0})
    lines = (tmp_path / "metrics.csv").read_text().splitlines()
    assert lines == [
        "epoch,lr,train_acc,train_loss,test_acc,test_acc_top5,test_loss",
        "1,0.0005,1,2,3,4,5", "2,0.0005,1,2,3,4,5", "3,0.0005,9,2,3,4,5",
    ]  # fmt: skip


def test_the_worklog_continues_when_resumed_and_is_new_otherwise(tmp_path):
    Worklog(tmp_path, 1).epoch(1, METRICS)
    Worklog(tmp_path, 2).epoch(2, METRICS)
    assert (tmp_path / "worklog.txt").read_text().count("lr: 0.0005") == 2
    Worklog(tmp_path, 1)
    assert not (tmp_path / "worklog.txt").exists()


class Failing:
    def __init__(self):
        self.calls = 0

    def epoch(self, epoch, metrics):
        self.calls += 1
        raise ConnectionError("no route\nto host")


def test_a_failing_writer_is_dropped_with_one_line_and_the_others_continue(tmp_path, capsys):
    failing = Failing()
    logger = Logger({"cloud": lambda: failing, "metrics.csv": lambda: MetricsCsv(tmp_path, 1)})
    logger.epoch(1, METRICS)
    logger.epoch(2, METRICS)
    assert failing.calls == 1 and len((tmp_path / "metrics.csv").read_text().splitlines()) == 3
    assert capsys.readouterr().err == (
        "warning: cloud is off from here on (ConnectionError: no route to host)\n"
    )


def test_a_writer_that_cannot_be_created_is_dropped_too(capsys):
    def make():
        raise ImportError("No module named 'cloud'")

    assert Logger({"cloud": make}).writers == {}
    assert "warning: cloud is off from here on (ImportError: No module named 'cloud')" in capsys.readouterr().err


def test_wandb_is_on_by_default_and_left_out_when_off(tmp_path):
    names = [
        list(build_logger_names(tmp_path, *overrides)) for overrides in (["LOG.WANDB", "False"],)
    ]
    assert names == [["worklog.txt", "metrics.csv", "TensorBoard"]]
    assert load_cfg("configs/cifar100/kd.yaml").LOG.WANDB is True


def build_logger_names(folder, *overrides):
    logger = build_logger(folder, "p/n", load_cfg("configs/cifar100/kd.yaml", list(overrides)), 1)
    logger.finish({})
    return logger.writers


def test_wandb_without_a_key_runs_offline_without_prompting(tmp_path, monkeypatch, capfd):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))  # no ~/.netrc
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    wandb = Wandb(tmp_path, "project", "name", ["kd", "x" * 100, ""], {"a": 1})
    wandb.epoch(1, METRICS)
    wandb.finish({"best_acc": 3.0})
    assert any(name.startswith("offline-run-") for name in os.listdir(tmp_path / "wandb"))
    assert capfd.readouterr() == ("", "")


def logged(folder, epochs, start=1, **changed):
    """The two files after a run that begins with epoch `start` has logged `epochs`."""
    worklog, metrics = Worklog(folder, start), MetricsCsv(folder, start)
    for epoch in epochs:
        worklog.epoch(epoch, {**METRICS, "test_acc": float(epoch), **changed})
        metrics.epoch(epoch, {**METRICS, "test_acc": float(epoch), **changed})
    return both(folder)


def both(folder):
    paths = [folder / "worklog.txt", folder / "metrics.csv"]
    return [path.read_bytes() if path.exists() else b"" for path in paths]


def test_cut_at_any_byte_by_a_kill_the_files_of_a_resumed_run_equal_those_of_one_never_stopped(tmp_path):
    whole, start = tmp_path / "whole", tmp_path / "three"
    whole.mkdir(), start.mkdir()
    uninterrupted = logged(whole, (1, 2, 3, 4))
    written = logged(start, (1, 2, 3))
    for resume_at in (2, 3):
        # The kill came at some byte while epoch `resume_at` or a later one was written.
        done = [len(content) for content in logged_to(tmp_path / f"to{resume_at}", resume_at)]
        for cut in range(0, 240, 7):
            folder = tmp_path / f"cut{resume_at}_{cut}"
            folder.mkdir()
            for name, content, kept in zip(("worklog.txt", "metrics.csv"), written, done):
                (folder / name).write_bytes(content[: kept + cut])
            assert logged(folder, range(resume_at, 5), start=resume_at) == uninterrupted


def logged_to(folder, epoch):
    folder.mkdir()
    return logged(folder, range(1, epoch))


@pytest.mark.parametrize("garbage", [b"\0" * 500, b"\xff\xfe broken \r\r\n\"", b"3,0.1\r\n", b"9" * 5000])
def test_garbage_is_dropped_and_the_rows_are_kept(tmp_path, garbage):
    good = logged(tmp_path, (1, 2))
    for name in ("worklog.txt", "metrics.csv"):
        with (tmp_path / name).open("ab") as file:
            file.write(garbage)
    assert logged(tmp_path, (), start=3) == good


def test_a_finished_run_that_is_trained_further_has_one_summary(tmp_path):
    logged(tmp_path, (1, 2))
    Worklog(tmp_path, 3).finish({"best_acc": 2.0, "last_acc": 2.0})
    logged(tmp_path, (3,), start=3)
    Worklog(tmp_path, 4).finish({"best_acc": 3.0, "last_acc": 3.0})
    text = (tmp_path / "worklog.txt").read_text()
    assert text.endswith("-" * 25 + "\nbest_acc\t3.00\nlast_acc\t3.00\n") and text.count("best_acc") == 1
    assert re.findall(r"epoch: (\d)", text) == ["1", "2", "3"]


def test_a_metric_that_first_appears_later_gets_a_column(tmp_path):
    logged(tmp_path, (1,))
    logged(tmp_path, (2,), start=2, ema_acc=7.0)
    logged(tmp_path, (3,), start=3)
    rows = list(csv.DictReader((tmp_path / "metrics.csv").read_text().splitlines()))
    assert [(row["epoch"], row["ema_acc"]) for row in rows] == [("1", ""), ("2", "7"), ("3", "")]


def events(folder):
    """(step, tag or 'start', value) of each record in a folder of event files, parsed without TensorBoard."""
    for path in sorted(folder.glob("events.out.tfevents.*")):
        data, at = path.read_bytes(), 0
        while at < len(data):
            (length,) = struct.unpack_from("<Q", data, at)
            event = Event.FromString(data[at + 12 : at + 12 + length])
            at += 12 + length + 4
            if event.HasField("session_log"):
                yield event.step, "start", event.session_log.status
            for value in event.summary.value:
                yield event.step, value.tag, value.simple_value


def test_resuming_hides_later_epochs_and_steps_in_tensorboard(tmp_path):
    board = TensorBoard(tmp_path, 1)
    board.step(500, {"lr": 0.5})
    board.epoch(1, {"test_acc": 3.0})
    board.step(1000, {"lr": 0.25})
    del board  # killed
    again = TensorBoard(tmp_path, 2, start_step=700)
    again.step(1000, {"lr": 0.25})
    again.epoch(2, {"test_acc": 4.0})
    again.finish({})
    folder = tmp_path / "train.events"
    assert list(events(folder)) == [(1, "start", 1), (1, "test_acc", 3.0), (2, "start", 1), (2, "test_acc", 4.0)]
    assert list(events(folder / "steps")) == [
        (1, "start", 1), (500, "step/lr", 0.5), (1000, "step/lr", 0.25), (701, "start", 1), (1000, "step/lr", 0.25),
    ]  # fmt: skip


LIGHT = """
import os, sys
from pathlib import Path
from types import SimpleNamespace
from mdistiller.engine.logs.logger import Wandb, build_logger
METRICS = {"lr": 0.0005, "train_acc": 1.0, "train_loss": 2.0, "test_acc": 3.0, "test_acc_top5": 4.0, "test_loss": 5.0}
METRICS |= {f"loss/{i}": 1.23456 for i in range(20)}
"""

FULL_DISK = """
logger = build_logger(Path("."), "p/n", SimpleNamespace(LOG=SimpleNamespace(WANDB=False)), 1)
logger.epoch(1, METRICS)
with open("filler", "wb", buffering=0) as filler:
    try:
        while True:
            filler.write(b"0" * 1000)
    except OSError:
        pass
for epoch in range(2, 42):
    for step in range(20):
        logger.step(20 * epoch + step, {f"metric{i}": 1.0 for i in range(20)})
    logger.epoch(epoch, METRICS)
print("trained on with", *logger.writers)
os.remove("filler")
logger.epoch(42, METRICS)
logger.finish({})
print(Path("metrics.csv").read_text(), Path("worklog.txt").read_text())
"""


def test_a_full_disk_gives_one_warning_per_writer_and_the_lost_epochs_are_written_later(tmp_path):
    done = in_mount("60k", LIGHT + FULL_DISK, tmp_path)
    if done is None:
        pytest.skip("file systems cannot be mounted here")
    assert sorted(re.sub(r" \(.*", "", line) for line in done.stderr.splitlines()) == [
        "warning: TensorBoard is off from here on",
        "warning: metrics.csv cannot be written now, and is tried again each epoch",
        "warning: worklog.txt cannot be written now, and is tried again each epoch",
    ]
    first, *rest = done.stdout.splitlines()
    assert first == "trained on with worklog.txt metrics.csv"
    epochs = [str(epoch) for epoch in range(1, 43)]
    assert re.findall(r"^(\d+),", "\n".join(rest), re.MULTILINE) == epochs
    assert re.findall(r"^epoch: (\d+)$", "\n".join(rest), re.MULTILINE) == epochs


class Refusing(http.server.BaseHTTPRequestHandler):
    """A service that refuses every key."""

    def do_POST(self):
        self.rfile.read(int(self.headers.get("content-length", 0)))
        answer = b'{"errors":[{"message":"user is not logged in"}]}'
        self.send_response(401 if self.path == "/graphql" else 200)
        self.send_header("content-length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    do_GET = do_POST

    def log_message(self, *args):
        pass


@pytest.fixture
def refusing_service():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refusing) as server:
        threading.Thread(target=server.serve_forever).start()
        yield server.server_port
        server.shutdown()


def offline_runs(folder):
    return sorted(name for name in os.listdir(folder / "wandb") if name.startswith("offline-run-"))


WANDB = """
wandb = Wandb(Path(sys.argv[1]), "project", "name", ["kd"], {"a": 1})
wandb.step(500, {"lr": 0.1})
wandb.epoch(1, METRICS)
wandb.finish({"best_acc": 3.0})
print("trained")
"""


@pytest.mark.parametrize("service, reason", [("gone", "refused"), ("refusing", "user is not logged in")])
def test_wandb_without_network_or_with_a_wrong_key_runs_offline_with_one_warning(
    tmp_path, refusing_service, service, reason
):
    url = f"http://127.0.0.1:{refusing_service if service == 'refusing' else 9}"
    env = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_")} | {"HOME": str(tmp_path)}
    env |= {"WANDB_API_KEY": "a" * 40, "WANDB_BASE_URL": url, "WANDB_INIT_TIMEOUT": "2"}
    process = light(LIGHT + WANDB, tmp_path, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (0, "trained\n")
    assert len(err.splitlines()) == 1
    assert err.startswith(f"warning: wandb is offline, under {tmp_path}/wandb (CommError: ") and reason in err
    assert len(offline_runs(tmp_path)) == 1


def test_a_resumed_run_continues_the_same_wandb_run_and_a_new_one_does_not(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    ids = []
    for resume in (False, True, False):
        wandb = Wandb(tmp_path, "project", "name", [], {}, resume)
        ids.append(wandb.run.id)
        wandb.finish({})
    assert ids[0] == ids[1] != ids[2]


def test_wandb_gets_the_configuration_the_steps_and_a_summary(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    logger = build_logger(tmp_path, "p/n", load_cfg("configs/cifar100/kd.yaml"), 1)
    run = logger.writers["wandb"].run
    logger.step(500, {"lr": 0.1})
    logger.epoch(1, METRICS)
    monkeypatch.setattr(type(run), "finish", lambda run: None)
    logger.finish({"best_acc": 3.0, "last_acc": 2.0})
    monkeypatch.undo()
    config, summary = dict(run.config), dict(run.summary)
    run.finish()
    assert config["KD"]["TEMPERATURE"] == 4 and config["SOLVER"]["LR_DECAY_STAGES"] == [150, 180, 210]
    assert summary["best_acc"] == 3.0 and summary["last_acc"] == 2.0
    assert summary["step/lr"] == 0.1 and summary["step/number"] == 500 and summary["epoch"] == 1
