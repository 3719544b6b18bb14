"""The results of step.py as Markdown."""

from __future__ import annotations

from typing import Any

ON_EVERY_PAIR = ("KD", "DKD")
# Goals on two cores, as ratios to the classic path.
GOALS = {("resnet56-resnet20", "default"): 1.4, ("resnet32x4-resnet8x4", "default"): 1.25}
GOALS |= {(pair, "bf16"): 2.0 for pair in ("resnet56-resnet20", "resnet32x4-resnet8x4")}
# Goals on an H100-class GPU, in milliseconds a step of 64 images.
GPU_GOALS = {
    ("resnet56-resnet20", "eager"): 2.5, ("resnet56-resnet20", "compile, graph"): 0.75,
    ("resnet56-resnet20", "bf16, compile, graph"): 0.75,
}  # fmt: skip
COUNTS = ("launches", "kernels", "synchronisations", "operations")
COLUMNS = (
    "method", "mode", "images/s", "ms a step", "times the first", "goal", "launches a step", "kernels", "waits",
    "peak MiB", "held MiB", "times floor",
)  # fmt: skip


def table(result: dict[str, Any]) -> str:
    """The measurements as Markdown, one table per pair."""
    lines, pair = head(result), ""
    for race in result["races"]:
        if race["pair"] != pair:
            lines += pair_head(race)
            pair = race["pair"]
        lines += rows(race, result["device"])
    return "\n".join(lines)


def head(result: dict[str, Any]) -> list[str]:
    """Where and how it was measured."""
    rates, machine = result["best_gmacs_per_second"], result["machine"]
    return [
        f"{machine['gpu'] if result['device'] != 'cpu' else machine['processor']}, {machine['threads']} threads, torch "
        f"{machine['torch']}; {result['data']}; batch {result['batch']}; {result['rounds']} turns of "
        f"{result['steps']} steps",
        f"best convolution: {rates['float32']:.0f} GMAC/s in float32, {rates['bfloat16']:.0f} in bfloat16"
        + ("" if result["bfloat16_units"] else " (no bfloat16 units: bfloat16 is emulated)"),
    ]


def pair_head(race: dict[str, Any]) -> list[str]:
    """The title of a pair, and the head of its table."""
    return ["", f"### {race['pair']}", "", f"| {' | '.join(COLUMNS)} |", f"|{'---|' * len(COLUMNS)}"]


def rows(race: dict[str, Any], device: str) -> list[str]:
    """The rows of a race: its paths, then the modes that were refused, and those that failed."""
    found = [
        _row(
            race["method"], mode, show(r["images_per_second"], 0), show(r["milliseconds"], 2), show(r["ratio"], 2),
            goal(race, mode, device), *_counts(r), f"{r['peak_mib']:.0f}",
            "" if r["held_mib"] is None else f"{r['held_mib']:.0f}", f"{r['times_floor']:.2f}",
        )
        for mode, r in race["modes"].items()
    ]  # fmt: skip
    for word in ("refused", "failed"):
        found += [_row(race["method"], mode, f"{word}: {why}") for mode, why in race[word].items()]
    return found


def goal(race: dict[str, Any], mode: str, device: str) -> str:
    """The goal of KD and DKD, in words; empty if there is none for this mode."""
    key = race["pair"], mode
    if race["method"] not in ON_EVERY_PAIR:
        return ""
    if device == "cpu":
        return f"{GOALS[key]} times" if key in GOALS else ""
    return f"< {GPU_GOALS[key]} ms" if key in GPU_GOALS and race["method"] == "KD" else ""


def show(spread: dict[str, float], digits: int) -> str:
    """Median (lowest-highest)."""
    return f"{spread['median']:.{digits}f} ({spread['low']:.{digits}f}-{spread['high']:.{digits}f})"


def _counts(result: dict[str, Any]) -> list[str]:
    launches, kernels, waits, operations = (result.get(name) for name in COUNTS)
    if operations is not None:
        return [f"{operations:.0f} operations", "", ""]
    return [f"{launches:.0f}", f"{kernels:.0f}", f"{waits:.1f}"]


def _row(*cells: str) -> str:
    """A line of the table; cells that are left out are empty."""
    words = [" ".join(cell.split()).replace("|", "\\|") for cell in cells]
    return f"| {' | '.join([*words, *[''] * (len(COLUMNS) - len(cells))])} |"
