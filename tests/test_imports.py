"""The direction of imports: what each subpackage may import, and what only one of them may import."""

import ast
from pathlib import Path

import pytest

import mdistiller

PACKAGE = Path(mdistiller.__file__).parent
GROUND = {"errors", "registry", "paths", "console", "ranges", "user_files", "system", "figures", "arguments"}
MODELS = {"models", "grouping", *GROUND}
ENGINE = {"engine", "engine.files", "engine.graph", "engine.logs", "engine.runtime", "engine.teacher"}
BELOW_ENGINE = {"distillers", "dataset", "distributed", *MODELS}
# Subpackage (or module at the top) -> the others that it may import.
ALLOWED = {
    "errors": set(),
    "registry": {"errors"},
    "paths": {"errors"},
    "console": {"errors", "system"},
    "system": set(),
    "figures": set(),
    "ranges": set(),
    "user_files": {"console", "errors"},
    "arguments": {"paths"},
    "distributed": GROUND,
    "grouping": GROUND,
    "models": MODELS,
    "dataset": {"distributed", "models", *GROUND},
    "distillers": {"dataset", "distributed", *MODELS},
    "engine.files": GROUND,
    "engine.runtime": {"engine.files", "", *GROUND},
    "engine.graph": {"engine.runtime", "models", *GROUND},
    "engine.logs": {"engine.files", *GROUND},
    "engine.teacher": {"engine.files", *BELOW_ENGINE},
    "engine": {*ENGINE, *BELOW_ENGINE},
    "experiments": {*ENGINE, *BELOW_ENGINE},
    "analysis": {"experiments", *ENGINE, *BELOW_ENGINE},
    "api": {"experiments", *ENGINE, *BELOW_ENGINE},
    "commands": {"analysis", "api", "experiments", "", *ENGINE, *BELOW_ENGINE},
    "": {"api", "errors"},  # mdistiller/__init__.py, which imports them when they are used
    "__main__": {"commands"},
}


def subpackage_of(module: str) -> str:
    """The subpackage of `mdistiller.a.b.c`: "a", or "engine.b" for those inside the engine."""
    parts = module.split(".")[1:]
    inner = ".".join(parts[:2])
    return inner if inner in ALLOWED else (parts or [""])[0]


def module_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(path: Path):
    """(line, absolute module) of every import in a file, those inside functions too; a submodule counts as such."""
    here = module_of(path).split(".") + (["__init__"] if path.name == "__init__.py" else [])
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, name.name) for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = here[: len(here) - node.level] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            for name in node.names:
                below = PACKAGE.parent / f"{module}.{name.name}".replace(".", "/")
                is_module = below.is_dir() or below.with_suffix(".py").is_file()
                yield node.lineno, f"{module}.{name.name}" if is_module else module


FILES = sorted(PACKAGE.rglob("*.py"))


def test_every_file_is_in_a_known_subpackage():
    assert {subpackage_of(module_of(path)) for path in FILES} == set(ALLOWED)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_one_way(path):
    own = subpackage_of(module_of(path))
    for line, module in imports_of(path):
        if module.split(".")[0] == "mdistiller" and (other := subpackage_of(module)) != own:
            assert other in ALLOWED[own], f"{path}:{line}: {own or 'mdistiller'} may not import {module}"
            private = [part for part in module.split(".") if part.startswith("_")]
            assert not private, f"{path}:{line}: {module} is private to its subpackage"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_only_distributed_imports_torch_distributed(path):
    if subpackage_of(module_of(path)) != "distributed":
        others = [m for _, m in imports_of(path) if m.startswith(("torch.distributed", "torch.nn.parallel"))]
        assert not others, f"{path} imports {others}; mdistiller/distributed/ has what it needs"


def test_a_wrong_import_would_be_found(tmp_path, monkeypatch):
    """The two forms of import that are easy to overlook."""
    monkeypatch.setitem(globals(), "PACKAGE", tmp_path / "mdistiller")
    (tmp_path / "mdistiller/engine").mkdir(parents=True)
    (tmp_path / "mdistiller/engine/trainer.py").touch()
    file = tmp_path / "mdistiller/distillers/KD.py"
    file.parent.mkdir()
    file.write_text("from ..engine import trainer\n\ndef f():\n    import mdistiller.commands.main\n")
    assert [m for _, m in imports_of(file)] == ["mdistiller.engine.trainer", "mdistiller.commands.main"]
