"""The report of gpu.py as Markdown, and what the machine can do, from the results of its stages."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from typing import Any

import step_table
from kernels import table as kernel_table

# Steps of an epoch of CIFAR-100 at batch 64, and epochs of the published schedule.
STEPS, EPOCHS = math.ceil(50_000 / 64), 240
# Bytes of the teacher's logits for all images and their 162 crops and flips: 100 in fp16, and a mark.
CACHE_BYTES = 50_000 * 162 * (100 * 2 + 1)
# Of the published accuracy, which another seed and machine move; in points.
WITHIN = 0.5

Content = dict[str, Any]


def markdown(content: Content) -> str:
    """The whole report; a section for each stage that has left something."""
    sections = [_title(content), _stages(content), _machine(content), _tests(content)]
    for name, title in (("step", "One step"), ("modes", "One step, other modes"), ("compiled", "One step, compiled")):
        if content[name]:
            sections.append([f"## {title}", "", step_table.table(content[name])])
    sections += [_profile(content), _train(content), can_do(content)]
    return "\n\n".join("\n".join(lines) for lines in sections if lines)


def _title(content: Content) -> list[str]:
    machine = content["machine"] or {}
    if content["rehearsal"]:
        size = ", of tiny sizes" if content["quick"] else ""
        title = f"# A rehearsal without a GPU{size}: no number in it says anything about a GPU"
    else:
        title = f"# {machine.get('gpu') or 'A GPU'}"
    return [title, "", f"`{content['command']}`, {content['begun']}, {content['seconds']:.0f} s"]


def _stages(content: Content) -> list[str]:
    lines = ["| stage | | seconds | of | |", "|---|---|---:|---:|---|"]
    for s in content["stages"]:
        lines.append(f"| {s['name']} | {s['status']} | {s['seconds']:.0f} | {s['limit']:.0f} | {_cell(s['note'])} |")
    return lines


def _machine(content: Content) -> list[str]:
    facts = content["machine"]
    if not facts:
        return []
    return ["## Machine", "", *(f"- {name}: {value}" for name, value in facts.items() if value not in (None, ""))]


def _tests(content: Content) -> list[str]:
    tests = content["tests"]
    if not tests:
        return []
    counted = Counter(test["outcome"] for test in tests)
    lines = ["## Tests", "", ", ".join(f"{count} {outcome}" for outcome, count in counted.items()), ""]
    lines += [f"- {test['outcome']}: `{test['test']}`: {test['why']}" for test in tests if test["why"]]
    return lines


def _profile(content: Content) -> list[str]:
    profile = content["profile"]
    if not profile:
        return []
    lines = [f"## Profile of a step of {profile['method']}, {profile['pair']}, batch {profile['batch']}"]
    for mode, result in profile["modes"].items():
        lines += ["", kernel_table(mode, result)]
    for word in ("refused", "failed"):
        lines += [line for mode, why in profile[word].items() for line in ("", f"{mode}: {word}: {why}")]
    return lines


def _train(content: Content) -> list[str]:
    if not content["train"]:
        return []
    lines = ["## Trainings, side by side", ""]
    lines += ["| run | epochs | top-1 last | best | published | difference | seconds | images/s | |", f"|{'---|' * 9}"]
    for name, run in content["train"].items():
        if not run["epochs"]:
            lines.append(f"| {name} | 0 | | | | | | | {_cell(run['said'])} |")
            continue
        whole = run["epochs"] == run["of"] and "published" in run
        published = f"{run['published']:.2f}" if "published" in run else ""
        difference = f"{run['top1_last'] - run['published']:+.2f}" if whole else ""
        note = "" if run["epochs"] == run["of"] else f"cut off; {run['of']} epochs take {_whole(run)} at this speed"
        if whole and run["top1_last"] < run["published"] - WITHIN:
            note = f"more than {WITHIN} below"
        lines.append(
            f"| {name} | {run['epochs']} of {run['of']} | {run['top1_last']:.2f} | {run['top1_best']:.2f} "
            f"| {published} | {difference} | {run['seconds']:.0f} | {run['images_per_second']:.0f} | {note} |"
        )
    return lines


def _whole(run: dict[str, Any]) -> str:
    """How long a training that was cut off would have taken."""
    return _duration(run["seconds"] / run["epochs"] * run["of"] / 3600)


def steps_measured(content: Content) -> dict[str, dict[str, dict[str, Any]]]:
    """Method -> mode -> the step's measurements on the first pair, over all stages."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for race in _races(content):
        found.setdefault(race["method"], {}).update(race["modes"])
    return found


def _races(content: Content) -> Iterator[dict[str, Any]]:
    results = [content[name] for name in ("step", "modes", "compiled") if content[name]]
    pair = results[0]["races"][0]["pair"] if results and results[0]["races"] else ""
    for result in results:
        yield from (race for race in result["races"] if race["pair"] == pair)


def fastest(modes: dict[str, dict[str, Any]]) -> str:
    """The mode of the fewest milliseconds a step, without those of the teacher cache, which measure hits alone."""
    return min((m for m in modes if "cache" not in m), key=lambda m: modes[m]["milliseconds"]["median"], default="")


def hours(milliseconds: float) -> float:
    """How long 240 epochs of CIFAR-100 take at these milliseconds a step, without validation."""
    return milliseconds * STEPS * EPOCHS / 3_600_000


def can_do(content: Content) -> list[str]:
    """In plain words: how long a training takes here, in which mode, and what the machine has for it."""
    facts, measured = content["machine"] or {}, steps_measured(content)
    lines = ["## What this machine can do", ""]
    if content["rehearsal"]:
        lines += ["This was a rehearsal on a CPU, which shows that the command works, and nothing more.", ""]
    if content["quick"]:
        return lines[:-1]
    pair = next((race["pair"] for race in _races(content)), "")
    for method, modes in measured.items():
        best = fastest(modes)
        if best:
            lines.append(f"- {method}, {pair}, batch {_batch(content)}: {_said(best, modes)}")
    if not measured:
        lines.append("- No step was measured, so that no time can be told.")
    lines += _modes_to_choose(measured.get("KD", {}), facts)
    lines += _cache(measured.get("KD", {}), facts)
    if facts.get("compiler") is None and facts:
        lines.append("- SOLVER.COMPILE needs a C compiler, and there is none (`apt install gcc`).")
    return lines


def _batch(content: Content) -> int:
    return next(content[name]["batch"] for name in ("step", "modes", "compiled") if content[name])


def _said(best: str, modes: dict[str, dict[str, Any]]) -> str:
    """The fastest mode and the eager one, with the length of a whole training."""
    names = dict.fromkeys([best, *(["eager"] if "eager" in modes else [])])
    each = [(name, modes[name]["milliseconds"]["median"]) for name in names]
    return "; ".join(
        f"{ms:.2f} ms a step {name if name == 'eager' else f'in the mode {name!r}'}, {_duration(hours(ms))} for "
        f"{EPOCHS} epochs of CIFAR-100 without validation" for name, ms in each
    )  # fmt: skip


def _duration(hours_: float) -> str:
    return f"{hours_:.1f} hours" if hours_ >= 2 else f"{hours_ * 60:.1f} minutes"


def _modes_to_choose(kd: dict[str, dict[str, Any]], facts: Content) -> list[str]:
    """Which settings to take, and whether bfloat16 is worth it."""
    lines, best = [], fastest(kd)
    if best:
        from step import MODES

        settings = " ".join(MODES[best]) or "none beyond the defaults"
        lines.append(f"- The fastest settings measured, KD: {settings}.")
    if facts.get("bfloat16_units") is not None:
        has = "has" if facts["bfloat16_units"] else "has no"
        lines.append(f"- It {has} bfloat16 units{_gain(kd)}.")
    return lines


def _gain(kd: dict[str, dict[str, Any]]) -> str:
    """bf16 against float32 (TF32), in the same mode."""
    for mode in ("graph", "eager", "compile, graph"):
        if {mode, f"bf16, {mode}"} <= kd.keys():
            ms = [kd[name]["milliseconds"]["median"] for name in (mode, f"bf16, {mode}")]
            return f": KD takes {ms[1]:.2f} ms a step in bf16, {ms[0]:.2f} without ({mode})"
    return ""


def _cache(kd: dict[str, dict[str, Any]], facts: Content) -> list[str]:
    """Whether the teacher's outputs fit into memory, and what a step takes that only reads them."""
    lines, free = [], facts.get("gpu_free_gib")
    size = CACHE_BYTES / 2**30
    if free is not None:
        fits = "fits" if size < free else "does not fit"
        lines.append(f"- A teacher cache of CIFAR-100 (logits in fp16) of {size:.1f} GiB {fits}: {free:.1f} are free.")
    hit = next((mode for mode in kd if "teacher cache" in mode), "")
    if hit:
        ms = kd[hit]["milliseconds"]["median"]
        lines.append(f"- With all of the teacher's outputs cached, KD takes {ms:.2f} ms a step ({hit}).")
    return lines


def _cell(text: str) -> str:
    """A text as a cell of a table."""
    return " ".join(text.split()).replace("|", "\\|")
