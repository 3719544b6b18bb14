"""Plot a trained network's features, errors and calibration, and how a student differs from its teacher.

    mdistiller inspect-features --run output/digits/kd,wrn_16_2,resnet8
    mdistiller inspect-features -m resnet20 -c student_best --teacher resnet56 -o output/inspect/resnet20
    mdistiller inspect-features -m resnet56                                   # a published teacher alone

Writes plots, each with its values in a file next to it: t-SNE of the pooled features, confusion matrix, reliability
diagram with the expected calibration error; with a teacher also the differences of mean logits and of class
correlations, and the CKA between the stages of both.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from yacs.config import CfgNode as CN

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
from ..arguments import PathArgument
from ..console import tool
from ..dataset import get_val_loader, info_of
from ..distillers import distiller_dict
from ..engine.build import load_trained, own_view
from ..engine.cfg import elsewhere, settings_for
from ..engine.files.checkpoint import check_file_classes
from ..errors import UserError
from ..experiments.runs import read_run
from ..grouping import count_confusions
from ..user_files import writing
from ._arguments import (
    check_batch_size,
    check_labelled,
    command_parser,
    options_for_settings,
    trained_network_arguments,
)


def run_networks(folder: Path) -> dict[str, str]:
    """A run's networks as arguments of `inspect_network`: its student after the last epoch, its teacher if it has one.

    Raises:
        UserError: it is not a run's folder.
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
    data_root: str | None = None,
    num_workers: int = 2,
    device: str = "auto",
    head: str | None = None,
    groups: str = "",
    skip_broken: bool = False,
    settings: CN | None = None,
    role: str | None = None,
) -> Outputs:
    """The outputs of a trained network on a data set's test images.

    Args:
        ckpt: its checkpoint, or "pretrain" for the published one.
        groups: for a plain network that DCGD trained with groups, DCGD.GROUPS of its run.
        settings: describe the images as the network is to see them; None: as it was made for.
        role: "STUDENT" or "TEACHER" of the run of `settings`; None: of no run.

    Raises:
        UserError: an unknown name, missing data, a checkpoint that does not fit.
    """
    check_batch_size(batch_size)
    cfg = settings or settings_for(dataset, data_root, model)
    info = info_of(cfg)
    check_labelled(info, dataset)
    info = own_view(info, model, ckpt) if role is None else info
    size = cfg.DISTILLER.TEACHER_SIZE if role == "TEACHER" else 0
    feats = cfg.DISTILLER[f"{role}_FEATS"] if role else ()
    net = load_trained(info, model, ckpt, groups, device, size, feats)
    loader = get_val_loader(info, cfg.DATASET.ROOT, batch_size, num_workers, skip_broken=skip_broken)
    if ckpt != "pretrain":
        check_file_classes(ckpt, loader.class_names)
    return collect(net, loader.to(next(net.parameters()).device), head)


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
    run: Path | None = None,
    **loading: Any,
) -> str:
    """Write plots of a network, and of how it differs from its teacher, with their values into the folder `out`.

    Always: confusion.png and .csv, reliability.png and .csv, figures.json; tsne.png and .csv unless `tsne_images` is 0.
    With a teacher: correlation.png and .csv, mean_logits.csv, cka.png and .csv, and both networks in tsne and
    reliability.

    Args:
        teacher: the teacher's name; None for a network without one.
        tsne_images: number of test images in the t-SNE, from the first one; 0 for no t-SNE.
        bins: number of bins of the reliability diagram.
        seed: random seed of t-SNE.
        run: the folder of the run whose settings describe the images; else both networks see them as `model` does.
        loading: arguments of `network_outputs`: batch_size, data_root, num_workers, device, skip_broken.

    Returns:
        The metrics, for the terminal.

    Raises:
        UserError: an unknown name, missing data, a checkpoint that does not fit, a number out of range.
    """
    if tsne_images < 0 or not 0 <= seed < 2**32:
        raise UserError(
            f"--tsne-images must be at least 0, and --seed from 0 to 2**32 - 1; they are {tsne_images} and {seed}"
        )
    loading["settings"] = _settings(run, dataset, loading.get("data_root"), model)
    student, frozen = ("STUDENT", "TEACHER") if run else (None, None)
    nets = {model: network_outputs(model, ckpt, dataset, head=head, groups=groups, role=student, **loading)}
    if teacher:
        name = teacher if teacher != model else f"{teacher} (teacher)"
        nets[name] = network_outputs(teacher, teacher_ckpt, dataset, role=frozen, **loading)
    targets = nets[model].targets
    calibrations = {name: calibration(o.logits, targets, bins) for name, o in nets.items()}
    values: dict[str, Any] = {
        "dataset": dataset,
        "images": len(targets),
        "networks": {
            name: {"top1": accuracy(o.logits, targets), "ece": calibrations[name].ece} for name, o in nets.items()
        },
    }
    with writing(out / "figures.json"):
        reliability_figure(calibrations).savefig(out / "reliability.png", dpi=110)
        _write_calibrations(out / "reliability.csv", calibrations)
        _draw_confusion(out, nets[model])
        if tsne_images:
            _draw_tsne(out, nets, tsne_images, seed)
        if teacher:
            values |= _compare(out, *nets.items())
        (out / "figures.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    lines = [f"{name}: top-1 {v['top1']:.2f}, ECE {v['ece']:.2f} %" for name, v in values["networks"].items()]
    lines += [f"agreement with the teacher: {values['agreement']:.2f} %"] if teacher else []
    return "\n".join([*lines, f"{len(targets)} images; plots and values are in {out}"])


def _settings(run: Path | None, dataset: str, data_root: str | None, model: str) -> CN:
    """The settings that describe the images."""
    if run is None:
        return settings_for(dataset, data_root, model)
    cfg = read_run(run).cfg
    return cfg if data_root in (None, cfg.DATASET.ROOT) else elsewhere(cfg, data_root)


def _compare(out: Path, student: tuple[str, Outputs], teacher: tuple[str, Outputs]) -> dict[str, Any]:
    """Plot the differences between student and teacher; returns their values."""
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


def parse_args(arguments: Sequence[str] | None, prog: str | None) -> argparse.Namespace:
    of_run = argparse.ArgumentParser(add_help=False)
    of_run.add_argument(
        "--run", action=PathArgument, type=Path, help="a run's folder; replaces -m, -c, -d and --teacher"
    )
    run, rest = of_run.parse_known_args(arguments)
    parser = command_parser(__doc__, prog, parents=[of_run])
    trained_network_arguments(parser, batch_size=256)
    parser.add_argument("--teacher", help="the teacher's name (default: none)")
    parser.add_argument(
        "--teacher-ckpt", action=PathArgument, default="pretrain",
        help="its checkpoint; `pretrain` (default): the published one",
    )  # fmt: skip
    parser.add_argument("--head", help="for a student with several heads: which one (default: the first)")
    parser.add_argument(
        "--groups", action=PathArgument, default="",
        help="for a plain student that DCGD trained with groups: DCGD.GROUPS of its run",
    )  # fmt: skip
    parser.add_argument("--tsne-images", type=int, default=1000, help="number of test images in the t-SNE; 0: no t-SNE")
    parser.add_argument("--bins", type=int, default=15, help="number of bins of the reliability diagram")
    parser.add_argument("--seed", type=int, default=0, help="random seed of t-SNE")
    parser.add_argument(
        "-o", "--out", action=PathArgument, type=Path, default=Path("output/inspect"),
        help="the plots' folder (default: inspect in the run's folder with --run, else output/inspect)",
    )  # fmt: skip
    networks = run_networks(run.run) if run.run else {}
    from_run = [f"--{name.replace('_', '-')}={value}" for name, value in networks.items()]
    return parser.parse_args([*from_run, *rest], run)


@tool()
@options_for_settings()
def main(arguments: Sequence[str] | None = None, prog: str | None = None) -> None:
    print(inspect_network(**vars(parse_args(arguments, prog))))
