"""A run on Weights & Biases."""

from __future__ import annotations

import os
import secrets
from contextlib import suppress
from pathlib import Path
from typing import Any

from ...console import reason, warn
from .log_files import Metrics


class Wandb:
    """Weights & Biases: online if there is an API key and the service answers, else offline under the run's folder.

    It never prompts. It waits for the network for half a minute at the start and at the end, unless WANDB_INIT_TIMEOUT
    and WANDB_FINISH_TIMEOUT say otherwise. A resumed run continues the same wandb run.
    """

    def __init__(
        self, folder: Path, project: str, name: str, tags: list[str], config: dict[str, Any], resume: bool = False
    ) -> None:
        for key, value in {"SILENT": "true", "INIT_TIMEOUT": "30", "FINISH_TIMEOUT": "30"}.items():
            os.environ.setdefault(f"WANDB_{key}", value)
        if not _can_write(Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "wandb"):
            # Else wandb's service prints its own log on the terminal.
            os.environ.setdefault("WANDB_CACHE_DIR", str(folder / "wandb" / "cache"))
        import wandb

        self._id_file = folder / "wandb" / "run_id"
        settings: dict[str, Any] = {
            "project": project, "name": name, "tags": [t[:64] for t in tags if t], "config": config,
            "dir": str(folder), "id": self._id(resume), "resume": "allow",
        }  # fmt: skip
        mode: Any = os.environ.get("WANDB_MODE") or ("online" if _logged_in(wandb) else "offline")
        try:
            self.run = wandb.init(**settings, mode=mode)
        except Exception as error:
            if mode != "online":
                raise
            warn(f"wandb is offline, under {folder / 'wandb'} ({reason(error)})")
            wandb.teardown()  # its service keeps the run that failed to start
            self.run = wandb.init(**settings, mode="offline")
        # wandb's own step counts calls, which has no meaning in a resumed run.
        self.run.define_metric("*", step_metric="epoch")
        for score in ("test_acc", "test_agreement"):
            self.run.define_metric(score, step_metric="epoch", summary="last,max")
        self.run.define_metric("step/*", step_metric="step/number")

    def _id(self, resume: bool) -> str:
        """The id of the wandb run, kept in the run's folder."""
        with suppress(OSError):
            known = self._id_file.read_text(encoding="utf-8").strip()
            if resume and known.isalnum():
                return known
        new = secrets.token_hex(8)
        self._id_file.parent.mkdir(parents=True, exist_ok=True)
        self._id_file.write_text(new, encoding="utf-8")
        return new

    def epoch(self, epoch: int, metrics: Metrics) -> None:
        self.run.log({"epoch": epoch, **metrics})

    def step(self, step: int, scalars: Metrics) -> None:
        self.run.log({"step/number": step, **{f"step/{name}": value for name, value in scalars.items()}})

    def finish(self, summary: Metrics) -> None:
        self.run.summary.update(dict(summary))
        self.run.finish()


def _can_write(folder: Path) -> bool:
    """Whether this user can write in `folder`, or make it."""
    return os.access(next(path for path in (folder, *folder.parents) if os.path.exists(path)), os.W_OK)


def _logged_in(wandb: Any) -> bool:
    """Whether there is an API key for wandb; asks neither the user nor the network."""
    try:
        return wandb.login(prompt=False, verify=False)
    except TypeError:  # a wandb too old for the argument `prompt`
        return bool(wandb.api.api_key)
