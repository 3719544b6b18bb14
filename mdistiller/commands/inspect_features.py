"""What tools/inspect_features.py does: pictures and figures of a trained network and of its teacher."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from ..analysis.measures import (
    Calibration,
    accuracy,
    agreement,
    calibration,
    correlation_difference,
    linear_cka,
    mean_logit_difference,
)
from ..analysis.outputs import Outputs, collect, tsne
from ..analysis.plots.networks import cka_figure, matrices_figure, reliability_figure, tsne_figure
from ..dataset import dataset_info, get_val_loader
from ..distillers import distiller_dict
from ..engine.build import build_pretrained
from ..engine.runtime.device import pick_device
from ..errors import UserError
from ..experiments.runs import read_run
from ..grouping import count_confusions


def run_networks(folder: Path) -> dict[str, str]:
    """A run's networks as arguments of `inspect_network`: its student after the last epoch, its teacher if it has one.

    Raises:
        UserError: it is no run's folder.
    """
    run = read_run(folder)
    cfg = run.cfg
    networks = {
        "model": cfg.DISTILLER.STUDENT,
        "ckpt": str(folder / "student_latest"),
        "dataset": cfg.DATASET.TYPE,
        "data_root": cfg.DATASET.ROOT,
        "out": str(folder / "inspect"),
    }
    if distiller_dict[cfg.DISTILLER.TYPE].needs_teacher:
        networks |= {"teacher": cfg.DISTILLER.TEACHER, "teacher_ckpt": cfg.DISTILLER.TEACHER_CKPT or "pretrain"}
    if len(run.heads) > 1 and cfg.DCGD.GROUPS:
        networks["groups"] = cfg.DCGD.GROUPS
    return networks


def network_outputs(
    model: str,
    ckpt: str,
    dataset: str,
    batch_size: int = 256,
    data_root: str = "./data",
    num_workers: int = 2,
    device: str = "auto",
    head: str | None = None,
    groups: str = "",
) -> Outputs:
    """The outputs of a trained network on a data set's test images.

    Args:
        ckpt: its checkpoint, or "pretrain" for the published one.
        groups: of a plain network that DCGD grouped: what DCGD.GROUPS was.

    Raises:
        UserError: an unknown name, missing data, an unfit checkpoint.
    """
    if batch_size < 1:
        raise UserError(f"--batch-size must be a whole number >= 1, not {batch_size}")
    where = pick_device(device)
    path = "" if ckpt == "pretrain" else ckpt
    net = build_pretrained(dataset, model, dataset_info[dataset].num_classes, path, groups).to(where).eval()
    loader = get_val_loader(dataset, data_root, batch_size, num_workers)
    return collect(net, loader.to(where) if hasattr(loader, "to") else loader, head)


def cka_matrix(teacher: Outputs, student: Outputs) -> np.ndarray:
    """(teacher's stages, student's stages): linear CKA of the stages' spatial means."""
    return np.array([[linear_cka(t, s) for s in student.stages] for t in teacher.stages])


def inspect_network(
    model: str,
    ckpt: str,
    dataset: str,
    out: Path,
    teacher: str | None = None,
    teacher_ckpt: str = "pretrain",
    head: str | None = None,
    groups: str = "",
    tsne_images: int = 1000,
    bins: int = 15,
    seed: int = 0,
    **loading: Any,
) -> str:
    """Write pictures of a network, and of how it differs from its teacher, into the folder `out`, with their figures.

    Always: tsne.png and .csv, confusion.png and .csv, reliability.png and .csv, figures.json. With a teacher:
    correlation.png and .csv, cka.png and .csv, and both networks in tsne and reliability.

    Args:
        teacher: its name; None for none.
        tsne_images: how many of the first test images are laid out; 0 for no t-SNE.
        bins: of the reliability diagram.
        seed: of t-SNE.
        loading: batch_size, data_root, num_workers, device.

    Returns:
        What was found, for the terminal.

    Raises:
        UserError: an unknown name, missing data, an unfit checkpoint.
    """
    nets = {model: network_outputs(model, ckpt, dataset, head=head, groups=groups, **loading)}
    if teacher:
        name = teacher if teacher != model else f"{teacher} (teacher)"
        nets[name] = network_outputs(teacher, teacher_ckpt, dataset, **loading)
    out.mkdir(parents=True, exist_ok=True)
    targets = nets[model].targets
    calibrations = {name: calibration(o.logits, targets, bins) for name, o in nets.items()}
    figures: dict[str, Any] = {
        "dataset": dataset,
        "images": len(targets),
        "networks": {
            name: {"top1": accuracy(o.logits, targets), "ece": calibrations[name].ece} for name, o in nets.items()
        },
    }
    reliability_figure(calibrations).savefig(out / "reliability.png", dpi=110)
    _write_calibrations(out / "reliability.csv", calibrations)
    _draw_confusion(out, nets[model])
    if tsne_images:
        _draw_tsne(out, nets, tsne_images, seed)
    if teacher:
        figures |= _compare(out, *nets.items())
    (out / "figures.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    lines = [f"{name}: top-1 {f['top1']:.2f}, ECE {f['ece']:.2f} %" for name, f in figures["networks"].items()]
    lines += [f"agreement with the teacher: {figures['agreement']:.2f} %"] if teacher else []
    return "\n".join([*lines, f"{len(targets)} images; pictures and figures are in {out}"])


def _compare(out: Path, student: tuple[str, Outputs], teacher: tuple[str, Outputs]) -> dict[str, Any]:
    """Draw the differences between student and teacher; returns their figures."""
    (name_s, s), (name_t, t) = student, teacher
    logits = mean_logit_difference(s.logits, t.logits, s.targets)
    correlations = correlation_difference(s.logits, t.logits)
    titles = "mean logits, |student - teacher|", "correlation of logits, student - teacher"
    figure = matrices_figure(dict(zip(titles, (logits, correlations))), "class", "class", signed=titles[1:])
    figure.savefig(out / "correlation.png", dpi=110)
    np.savetxt(out / "mean_logits.csv", logits, delimiter=",", fmt="%.6g")
    np.savetxt(out / "correlation.csv", correlations, delimiter=",", fmt="%.6g")
    cka = cka_matrix(t, s)
    cka_figure(cka, name_s, name_t).savefig(out / "cka.png", dpi=110)
    np.savetxt(out / "cka.csv", cka, delimiter=",", fmt="%.6g")
    return {
        "agreement": agreement(s.logits, t.logits),
        "mean_logit_difference": {"mean": float(np.nanmean(logits)), "max": float(np.nanmax(logits))},
        "correlation_difference": {
            "mean_absolute": float(np.nanmean(np.abs(correlations))),
            "max_absolute": float(np.nanmax(np.abs(correlations))),
        },
        "cka_teacher_rows_student_columns": cka.tolist(),
    }


def _draw_confusion(out: Path, net: Outputs) -> None:
    confusion = count_confusions(net.targets, net.logits.argmax(axis=1), net.logits.shape[1])
    share = 100 * confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    title = "predictions of each true class (%)"
    matrices_figure({title: share}, "predicted class", "true class").savefig(out / "confusion.png", dpi=110)
    np.savetxt(out / "confusion.csv", confusion, delimiter=",", fmt="%d")


def _draw_tsne(out: Path, nets: dict[str, Outputs], images: int, seed: int) -> None:
    points = {name: tsne(o.pooled[:images], seed) for name, o in nets.items()}
    targets = next(iter(nets.values())).targets[:images]
    tsne_figure(points, targets).savefig(out / "tsne.png", dpi=110)
    columns = np.column_stack([targets, *points.values()])
    header = ",".join(["target", *(f"{name} {axis}" for name in points for axis in "xy")])
    np.savetxt(out / "tsne.csv", columns, delimiter=",", fmt="%.6g", header=header, comments="")


def _write_calibrations(path: Path, calibrations: dict[str, Calibration]) -> None:
    lines = ["network,bin,count,confidence,accuracy"]
    for name, c in calibrations.items():
        rows = enumerate(zip(c.count, c.confidence, c.accuracy), start=1)
        lines += [f"{name},{k},{n},{p:.6g},{a:.6g}" for k, (n, p, a) in rows if n]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
