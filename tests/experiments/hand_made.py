"""A run written by hand: a config and metrics, without training."""

import csv
import json

from mdistiller.engine.cfg import load_cfg

ENVIRONMENT = {"processor": "a slide rule", "threads": 1, "torch": "0.1", "git_commit": "0123456789abcdef-dirty"}


def write_run(folder, rows, *overrides, config="configs/digits/kd.yaml"):
    """Write a run's folder; each row is a dict of metrics, to which the epoch is added."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(load_cfg(config, overrides).dump())
    rows = [{"epoch": epoch, **row} for epoch, row in enumerate(rows, start=1)]
    with (folder / "metrics.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(k for row in rows for k in row)))
        writer.writeheader()
        writer.writerows(rows)
    (folder / "environment.json").write_text(json.dumps(ENVIRONMENT))
    return folder
