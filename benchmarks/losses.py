"""How much faster the losses are than their usual forms (naive_losses.py), and how much memory CRD saves.

    python benchmarks/losses.py [--json] [--repeats 7] [--threads 2]
    python benchmarks/losses.py --share [METHOD ...]      what each method's loss takes of a training step

Batch 64, resnet32x4 -> resnet8x4, K = 16384, 50,000 samples, float32. Measured with `python benchmarks/losses.py` on
two cores of an AMD EPYC (Zen 4, AVX-512) with torch 2.15, 2026-11-23, nothing else running. Wall time, medians of 7.

    method    naive ms   ours ms   ratio  target  processor time ratio
    NST         9001.6     114.8    78.4      30                  70.2
    CRD         1046.6      52.6    19.9      10                  19.3
    OFD          148.7      30.5     4.9       4                   5.4
    KDSVD        178.3      37.9     4.7     2.5                   4.5
    RKD           11.9       3.7     3.2       3                   3.1
    AT            16.4       9.5     1.7     1.1                   1.7
    ReviewKD    2039.2    1257.5     1.6     1.1                   1.6
    CRD peak memory: naive 1068 MiB, ours 20.2 MiB, ratio 53 (target 20)
    RKD float32 relative error against float64: value 1.4e-9 in both, gradient 4.2e-7 naive, 2.6e-8 ours
    CRD sampling, 64 x 16384: 17 ms in this process, 14 ms in a separate one at 50,000 samples (target 15), 25 ms and
    20 ms at 1,281,167

`--share`, resnet56 -> resnet20, batch 64, one thread, torch 2.14.1, 2026-11-28, on a machine busy with other work
(`--repeats 3`; NORM and SIMKD with 2): of the newer methods every loss is below 6 % of the networks' step, layers of
its own left out. SEMCKD takes 81 % (its layers 77), NORM 8 % (7), FT 6 % (all of it), SIMKD 2 % (2); SDD_NKD 6 %,
SDD_DKD 3 %, ICKD 2 %, WKD 0.8 %, LDRLD 0.4 %. Of the original's, REVIEWKD takes 52 % (its layers 48), CRD 16 %
(16,384 negatives). On two idle threads it was not run.

On a machine busy with other work, where the two threads do not run in parallel, NST reached 15, CRD 8.6 and ReviewKD
1.0; on one thread NST 66.7, CRD 18.1, OFD 9.9, KDSVD 3.0, RKD 5.2, AT 2.2, ReviewKD 1.2.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # to run from a clone, not installed
os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # no message of the profiler that there is no GPU

import naive_losses as naive
import torch
import torch.nn.functional as F
from loss_share import methods, share, share_table
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from mdistiller.dataset.contrastive import ContrastiveSampler
from mdistiller.distillers.AT import at_loss
from mdistiller.distillers.CRD import nce_loss
from mdistiller.distillers.KDSVD import kdsvd_loss
from mdistiller.distillers.NST import nst_loss
from mdistiller.distillers.OFD import feat_loss, feature_margin
from mdistiller.distillers.ReviewKD import build_abfs, hcl_loss, review
from mdistiller.distillers.RKD import rkd_loss
from mdistiller.models import cifar_model_dict

Loss = Callable[[], Tensor]


@dataclass
class Case:
    """One loss in both forms, on the same tensors, of which `leaves` get gradients."""

    name: str
    target: float
    leaves: list[Tensor]
    naive: Loss
    ours: Loss


def cases(batch: int = 64, negatives: int = 16384, num_data: int = 50_000) -> Iterator[Case]:
    """Every loss with a speed target, on features of untrained resnet32x4 -> resnet8x4 for random images."""
    torch.manual_seed(0)
    teacher, student = (cifar_model_dict[name][0](num_classes=100) for name in ("resnet32x4", "resnet8x4"))
    image = torch.randn(batch, 3, 32, 32)
    with torch.no_grad():
        feats_t, feats_s = teacher(image)[1], student(image)[1]
    maps_s, maps_t = [f.requires_grad_() for f in feats_s["feats"][1:]], feats_t["feats"][1:]
    pooled_s, pooled_t = feats_s["pooled_feat"].requires_grad_(), feats_t["pooled_feat"]
    before_s = [f.requires_grad_() for f in feats_s["preact_feats"][1:]]
    before_t = feats_t["preact_feats"][1:]

    maps = maps_s, maps_t
    yield Case("NST", 30, maps_s, lambda: naive.naive_nst(*maps), lambda: nst_loss(*maps))
    yield crd(batch, negatives, num_data)
    preact = before_s, before_t, [feature_margin(bn) for bn in teacher.get_bn_before_relu()]
    yield Case("OFD", 4, before_s, lambda: naive.naive_ofd(*preact), lambda: ofd(*preact))
    yield Case("KDSVD", 2.5, maps_s, lambda: naive.naive_kdsvd(*maps, 1), lambda: kdsvd_loss(*maps, 1))
    yield Case("RKD", 3, [pooled_s], lambda: naive.naive_rkd(pooled_s, pooled_t), lambda: rkd_loss(pooled_s, pooled_t))
    yield Case("AT", 1.1, maps_s, lambda: naive.naive_at(*maps), lambda: at_loss(*maps, 2))
    levels_s = [*maps_s, pooled_s[..., None, None].detach().requires_grad_()]
    levels_t = [*before_t, pooled_t[..., None, None]]
    abfs, sizes = build_abfs([f.shape[1] for f in levels_s], [f.shape[1] for f in levels_t]), [32, 16, 8, 1]
    yield Case(
        "ReviewKD",
        1.1,
        [*levels_s, *abfs.parameters()],
        lambda: naive.naive_reviewkd(abfs, levels_s, levels_t),
        lambda: hcl_loss(review(abfs, levels_s, sizes), levels_t),
    )


def crd(batch: int, negatives: int, num_data: int) -> Case:
    """Both networks' embeddings against each other's bank."""
    bank_s, bank_t = (F.normalize(torch.randn(num_data, 128), dim=1) for _ in range(2))
    embeds = [F.normalize(torch.randn(batch, 128), dim=1).requires_grad_() for _ in range(2)]
    index = ContrastiveSampler(torch.arange(num_data) % 100, negatives)(torch.randperm(num_data)[:batch], epoch=1)
    temperature, z = torch.tensor(0.07), torch.tensor(float(num_data))

    def both(loss: Callable[..., Tensor]) -> Loss:
        return lambda: loss(embeds[0], bank_t, index, temperature, z) + loss(embeds[1], bank_s, index, temperature, z)

    return Case("CRD", 10, embeds, both(naive.naive_crd), both(nce_loss))


def ofd(g_s: list[Tensor], g_t: list[Tensor], margins: list[Tensor]) -> Tensor:
    loss = torch.zeros(())
    for f_s, f_t, margin in zip(g_s, g_t, margins):
        loss = loss / 2 + feat_loss(f_s, f_t, margin)
    return loss


def gradients(loss: Loss, leaves: list[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(loss(), leaves))


def milliseconds(work: Callable[[], object]) -> tuple[float, float]:
    """(wall time, processor time of all threads) in ms."""
    wall, processor = time.perf_counter(), time.process_time()
    work()
    return 1e3 * (time.perf_counter() - wall), 1e3 * (time.process_time() - processor)


def check_agreement(case: Case, rtol: float = 1e-3) -> None:
    """Assert that both forms have the same value and gradients up to float32's rounding: else times mean nothing."""
    torch.testing.assert_close(case.ours(), case.naive(), rtol=rtol, atol=1e-6)
    pairs = zip(gradients(case.ours, case.leaves), gradients(case.naive, case.leaves))
    for place, (ours, theirs) in enumerate(pairs):
        error = (ours - theirs).norm() / theirs.norm().clamp(min=1e-12)
        assert error < 10 * rtol, f"{case.name}: gradient {place} differs by {error:.1e}"


def race(case: Case, repeats: int) -> dict[str, float]:
    """Median times of forward + backward of both forms, which alternate."""
    times: dict[str, list[tuple[float, float]]] = {"naive": [], "ours": []}
    for _ in range(repeats):
        for name, loss in (("naive", case.naive), ("ours", case.ours)):
            times[name].append(milliseconds(partial(gradients, loss, case.leaves)))
    naive_ms, ours_ms = (list(map(statistics.median, zip(*times[name]))) for name in ("naive", "ours"))
    return {
        "naive_ms": naive_ms[0],
        "ours_ms": ours_ms[0],
        "ratio": naive_ms[0] / ours_ms[0],
        "processor_ratio": naive_ms[1] / ours_ms[1],
        "target": case.target,
    }


def peak_mebibytes(loss: Loss, leaves: list[Tensor]) -> float:
    """Peak memory of forward + backward, from the allocator's record of every tensor."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        gradients(loss, leaves)
    events = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak / 2**20


def rkd_errors(batch: int = 64) -> dict[str, float]:
    """Relative error in float32, of value and gradient, against the naive form in float64, on clustered embeddings.

    They are clustered like a trained network's: 8 samples per class, which differ by 1 % of their norm.
    """
    torch.manual_seed(0)
    e_s, e_t = (
        (torch.randn(batch // 8, 1, 256) + 0.01 * torch.randn(batch // 8, 8, 256)).flatten(0, 1) for _ in range(2)
    )

    def both(loss: Callable[..., Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        leaf = e_s.to(dtype).requires_grad_()
        value = loss(leaf, e_t.to(dtype))
        return value.detach().double(), torch.autograd.grad(value, leaf)[0].double()

    exact = both(naive.naive_rkd, torch.float64)
    errors = {}
    for name, loss in (("naive", naive.naive_rkd), ("ours", rkd_loss)):
        found = both(loss, torch.float32)
        for what, a, b in zip(("value", "gradient"), found, exact):
            errors[f"{name}_{what}"] = float((a - b).norm() / b.norm())
    return errors


def sampler_milliseconds(repeats: int, num_data: int, classes: int) -> dict[str, float]:
    """Time to sample for a batch of 64 at K = 16384: medians of wall time and of the processor time of all threads."""
    sampler = ContrastiveSampler(torch.arange(num_data) % classes, 16384)
    index = torch.randperm(num_data)[:64]
    times = [milliseconds(partial(sampler, index, epoch)) for epoch in range(repeats)]
    wall, processor = map(statistics.median, zip(*times))
    return {"wall": wall, "processor": processor}


def measure(repeats: int) -> dict[str, Any]:
    """All measurements, as --json prints them."""
    results: dict[str, Any] = {"threads": torch.get_num_threads(), "torch": torch.__version__, "losses": {}}
    for case in cases():
        check_agreement(case)
        results["losses"][case.name] = race(case, repeats)
        if case.name == "CRD":
            naive_mib, ours_mib = (peak_mebibytes(loss, case.leaves) for loss in (case.naive, case.ours))
            results["crd_memory"] = {"naive_mib": naive_mib, "ours_mib": ours_mib, "ratio": naive_mib / ours_mib}
    results["rkd_float32_error"] = rkd_errors()
    results["sampler_ms"] = {
        "50,000": sampler_milliseconds(4 * repeats, 50_000, 100),
        "1,281,167": sampler_milliseconds(4 * repeats, 1_281_167, 1000),
    }
    return results


def table(results: dict[str, Any]) -> str:
    """The measurements as text. On a busy machine, the ratio of processor times is the steadier one."""
    lines = [f"{'method':<10}{'naive ms':>10}{'ours ms':>10}{'ratio':>8}{'target':>8}{'processor time ratio':>22}"]
    for name, r in results["losses"].items():
        lines.append(
            f"{name:<10}{r['naive_ms']:>10.1f}{r['ours_ms']:>10.1f}{r['ratio']:>8.1f}{r['target']:>8g}"
            f"{r['processor_ratio']:>22.1f}"
        )
    memory, errors = results["crd_memory"], results["rkd_float32_error"]
    lines.append(
        f"CRD peak memory: naive {memory['naive_mib']:.0f} MiB, ours {memory['ours_mib']:.1f} MiB, "
        f"ratio {memory['ratio']:.0f}, target 20"
    )
    shown = ", ".join(f"{name.replace('_', ' ')} {error:.1e}" for name, error in errors.items())
    lines.append(f"RKD float32 relative error against float64: {shown}")
    for size, ms in results["sampler_ms"].items():
        times = f"{ms['wall']:.1f} ms, {ms['processor']:.1f} ms of processor time"
        lines.append(f"CRD sampling, 64 x 16384 of {size}: {times}; target 15 ms at 50,000")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Times every loss against its usual form.")
    parser.add_argument("--json", action="store_true", help="print JSON in place of the table")
    parser.add_argument("--repeats", type=int, default=7, help="runs of each form, alternating (default 7)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default 2)")
    parser.add_argument("--share", nargs="*", metavar="METHOD", help="shares of a step, of these methods or of all")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.share is None:
        results = measure(arguments.repeats)
        text = table(results)
    else:
        results = {name: share(name, arguments.repeats) for name in arguments.share or methods()}
        text = share_table(results)
    print(json.dumps(results, indent=2) if arguments.json else text)


if __name__ == "__main__":
    main()
