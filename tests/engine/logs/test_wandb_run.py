"""wandb: offline, refused, resumed."""

import http.server
import os
import subprocess
import threading

import pytest

from mdistiller.engine.cfg import load_cfg
from mdistiller.engine.logs.logger import build_logger
from mdistiller.engine.logs.wandb_run import Wandb

from ..._processes import light

METRICS = {"lr": 0.0005, "train_acc": 1.0, "train_loss": 2.0, "test_acc": 3.0, "test_acc_top5": 4.0, "test_loss": 5.0}


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

LIGHT = """
import os, sys
from pathlib import Path
from types import SimpleNamespace
from mdistiller.console import log_to_terminal
from mdistiller.engine.logs.logger import build_logger
from mdistiller.engine.logs.wandb_run import Wandb
from mdistiller.engine.logs.wandb_run import Wandb
METRICS = {"lr": 0.0005, "train_acc": 1.0, "train_loss": 2.0, "test_acc": 3.0, "test_acc_top5": 4.0, "test_loss": 5.0}
METRICS |= {f"loss/{i}": 1.23456 for i in range(20)}
log_to_terminal()
"""


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
    ids, cfg = [], load_cfg("configs/cifar100/kd.yaml")
    for epoch, step in ((1, 0), (1, 7), (2, 9), (1, 0)):
        wandb = build_logger(tmp_path, "p/n", cfg, epoch, step).writers["wandb"]
        ids.append(wandb.run.id)
        wandb.finish({})
    assert ids[0] == ids[1] == ids[2] != ids[3]


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
