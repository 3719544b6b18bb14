"""A plan: which configs are run with which overrides and seeds, and the published results to compare them with.

    title: What the table is called
    about: What the reader should know.                  # optional
    seeds: [0, 1, 2]
    overrides: {SOLVER.EPOCHS: 6}                        # of every run; optional
    before:                                              # runs that the others need, such as a teacher's; optional
      - {config: configs/digits/teacher.yaml, overrides: {}}
    pairs:                                               # optional: the same methods for several teachers and students
      resnet56 -> resnet20:
        overrides: {DISTILLER.TEACHER: resnet56, DISTILLER.STUDENT: resnet20}
        teacher: 72.34                                   # the teacher's published top-1
        source: crd
    methods:
      KD:
        config: configs/cifar100/kd.yaml                 # or one for each pair; a pair without one is left out
        overrides: {KD.TEMPERATURE: 4}
        by_pair: {resnet56 -> resnet20: {KD.TEMPERATURE: 3}}
        published: {resnet56 -> resnet20: 70.66}         # or a number where there are no pairs
        source: crd
    over: [KD, student]                                  # gains are computed over these methods; this is the default
    sources: {crd: "Tian et al. 2020, arXiv 1910.10699"}

A later override wins: config, pair, method, by_pair, plan, command line. Files are searched for in the current folder,
then among the project's own. A run's folder is LOG.PREFIX/plan_<the plan's file name>/<method>,<pair>,<overrides>.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..engine.overrides import override_pairs
from ..errors import UserError
from ..paths import find_file
from ..registry import unknown_name
from ..user_files import read_yaml
from .jobs import Job, make_job

Overrides = dict[str, Any]


@dataclass(frozen=True)
class Pair:
    """A teacher and its student; `teacher` is the teacher's published top-1 in percent, None where none is known."""

    overrides: Overrides
    teacher: float | None
    source: str


@dataclass(frozen=True)
class Method:
    """A row of the table: for each pair its config, its overrides and its published top-1 in percent, where known."""

    configs: dict[str, Path]
    overrides: dict[str, Overrides]
    published: dict[str, float]
    source: str


@dataclass(frozen=True)
class Plan:
    """A plan, read and checked; the module's docstring explains the fields. Without pairs it has one pair, named ""."""

    name: str
    title: str
    about: str
    seeds: list[int]
    overrides: Overrides
    before: list[Job]
    pairs: dict[str, Pair]
    methods: dict[str, Method]
    over: list[str]
    sources: dict[str, str]

    def jobs(self, pair: str, method: str, opts: Sequence[str] = ()) -> list[Job]:
        """The runs of a method for a pair, one for each seed; none where the method has no config for the pair.

        Raises:
            UserError: an override or the config is invalid.
        """
        entry = self.methods[method]
        if pair not in entry.configs:
            return []
        overrides = self.pairs[pair].overrides | entry.overrides[pair] | self.overrides | dict(override_pairs(opts))
        name = "".join(f"{part}," for part in (method, pair.replace(" -> ", "-")) if part)
        place = {"EXPERIMENT.PROJECT": f"plan_{self.name}", "EXPERIMENT.NAME": name}
        label = ", ".join(filter(None, (method, pair)))
        return [
            make_job(f"{label}, seed {seed}", entry.configs[pair], {**overrides, **place, "EXPERIMENT.SEED": seed})
            for seed in self.seeds
        ]


def read_plan(path: str | Path) -> Plan:
    """Read and check a plan's YAML file; the module's docstring shows its form.

    Raises:
        UserError: the file cannot be read, or an entry is invalid; the message names the entry.
    """
    path = find_file(path) or Path(path)
    tree = read_yaml(path, "plan", "plans/ holds the published ones")
    where = f"plan {path}"
    top = _section(tree, where, {
        "title": str, "about": str, "seeds": list, "overrides": dict, "before": list, "pairs": dict, "methods": dict,
        "over": list, "sources": dict,
    }, required=("title", "seeds", "methods"))  # fmt: skip
    seeds = top["seeds"]
    if not seeds or len(set(map(str, seeds))) < len(seeds) or not all(type(s) is int and s >= 0 for s in seeds):
        raise UserError(f"{where}: seeds must be different whole numbers >= 0, not {seeds}")
    sources = top.get("sources", {})
    pairs = {str(k): _pair(v, f"{where}: pair {k!r}", sources) for k, v in top.get("pairs", {"": {}}).items()}
    methods = {str(k): _method(v, f"{where}: method {k!r}", pairs, sources) for k, v in top["methods"].items()}
    over = top.get("over", [name for name in ("KD", "student") if name in methods])
    for name in over:
        if name not in methods:
            raise UserError(f"{where}: over: {unknown_name('method', str(name), methods)}")
    return Plan(
        path.stem, top["title"], top.get("about", "").strip(), seeds, top.get("overrides", {}),
        [_before(b, f"{where}: before") for b in top.get("before", [])], pairs, methods, over, sources,
    )  # fmt: skip


def _pair(tree: Any, where: str, sources: Mapping[str, str]) -> Pair:
    pair = _section(tree, where, {"overrides": dict, "teacher": (int, float), "source": str})
    teacher = pair.get("teacher")
    return Pair(pair.get("overrides", {}), teacher, _source(pair, "teacher", where, sources))


def _method(tree: Any, where: str, pairs: Mapping[str, Pair], sources: Mapping[str, str]) -> Method:
    method = _section(
        tree, where,
        {"config": (str, dict), "overrides": dict, "by_pair": dict, "published": (int, float, dict), "source": str},
        required=("config",),
    )  # fmt: skip
    configs = {pair: _file(path, where) for pair, path in _by_pair(method["config"], where, pairs).items()}
    special = _by_pair(method.get("by_pair", {}), where, pairs)
    overrides = {pair: method.get("overrides", {}) | special.get(pair, {}) for pair in configs}
    published = _by_pair(method.get("published", {}), where, pairs)
    for pair, value in published.items():
        if type(value) not in (int, float):
            raise UserError(f"{where}: the published value of {pair!r} must be a number, not {value!r}")
    return Method(configs, overrides, published, _source(method, "published", where, sources))


def _before(tree: Any, where: str) -> Job:
    before = _section(tree, where, {"config": str, "overrides": dict}, required=("config",))
    return make_job(before["config"], _file(before["config"], where), before.get("overrides", {}))


def _section(tree: Any, where: str, kinds: Mapping[str, Any], required: Sequence[str] = ()) -> dict[str, Any]:
    """`tree`, checked to be a dict with known keys and values of the expected types."""
    if not isinstance(tree, dict):
        raise UserError(f"{where} must be a section with keys from {', '.join(kinds)}, not {tree!r}")
    for key, value in tree.items():
        if key not in kinds:
            raise UserError(f"{where}: {unknown_name('key', str(key), kinds)}")
        if not isinstance(value, kinds[key]) or isinstance(value, bool):
            kind = kinds[key] if isinstance(kinds[key], tuple) else (kinds[key],)
            raise UserError(f"{where}: {key} must be of type {' or '.join(k.__name__ for k in kind)}, not {value!r}")
    for key in required:
        if not tree.get(key):
            raise UserError(f"{where}: {key} is missing")
    return tree


def _by_pair(value: Any, where: str, pairs: Mapping[str, Pair]) -> dict[str, Any]:
    """A value for each pair: the same for all, or a section by pair."""
    if not isinstance(value, dict):
        return dict.fromkeys(pairs, value)
    for pair in value:
        if pair not in pairs:
            raise UserError(f"{where}: {unknown_name('pair', str(pair), pairs)}")
    return value


def _source(tree: Mapping[str, Any], key: str, where: str, sources: Mapping[str, str]) -> str:
    """The name of the source; it must be given if `tree` has the published value `key`."""
    source = tree.get("source", "")
    if source and source not in sources:
        raise UserError(f"{where}: {unknown_name('source', source, sources)}")
    if not source and tree.get(key) not in (None, {}):
        raise UserError(f"{where}: {key} needs a source, one of the plan's sources ({', '.join(sources) or 'none'})")
    return source


def _file(name: str, where: str) -> Path:
    """A config's path, from the current folder or among the project's own files."""
    path = find_file(name)
    if path is None:
        raise UserError(f"{where}: no config {name}")
    return path
