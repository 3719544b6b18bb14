"""Cleaning up after an error must not raise: the error of a clean-up would hide the first one, or be the only one."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from mdistiller.user_files import discard

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("mdistiller", "tools", "detection", "benchmarks")
# Calls that change files, by the name behind the dot. `replace` and `remove` are also methods of texts and of hooks.
CALLS = {
    "unlink", "rmdir", "mkdir", "makedirs", "rename", "rmtree", "truncate", "touch", "close", "write_text",
    "write_bytes",
}  # fmt: skip
OF_OS = {"os.replace", "os.remove", "os.write", "os.close"}
# A process's own pipe: nothing of a disk.
ALLOWED = {"mdistiller/engine/runtime/signals.py"}


def suppresses(node: ast.AST) -> bool:
    return isinstance(node, ast.With) and any(ast.unparse(i.context_expr).startswith("suppress(") for i in node.items)


def unguarded(node: ast.AST) -> Iterator[int]:
    """The lines below `node` that change files outside of `with suppress(...)` and of a `try` of their own."""
    if suppresses(node) or isinstance(node, (ast.FunctionDef, ast.Lambda, ast.Try)):
        return
    method = node.func if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) else None
    if method is not None and (method.attr in CALLS or ast.unparse(method) in OF_OS):
        yield method.lineno
    for inner in ast.iter_child_nodes(node):
        yield from unguarded(inner)


def handlers(node: ast.AST) -> Iterator[ast.stmt]:
    """The statements of all `except` and `finally` blocks that no `with suppress(...)` surrounds."""
    if suppresses(node):
        return
    if isinstance(node, ast.Try):
        yield from node.finalbody
        for handler in node.handlers:
            yield from handler.body
    for inner in ast.iter_child_nodes(node):
        yield from handlers(inner)


def faults(code: str) -> list[int]:
    return [line for statement in handlers(ast.parse(code)) for line in unguarded(statement)]


def test_no_handler_changes_files_unguarded() -> None:
    paths = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
    assert len(paths) > 150
    found = {str(path.relative_to(ROOT)): faults(path.read_text()) for path in paths}
    found = {path: lines for path, lines in found.items() if lines and path not in ALLOWED}
    assert not found, "use user_files.discard, or contextlib.suppress"


def test_a_handler_that_does_would_be_found() -> None:
    code = "try:\n    work()\nexcept OSError:\n    {}(file)\nfinally:\n    with suppress(OSError):\n        x.close()"
    for call in ("Path.unlink", "os.remove", "os.replace", "shutil.rmtree"):
        assert faults(code.format(call)) == [4]
    for call in ("discard", "handle.remove", "text.replace"):
        assert faults(code.format(call)) == []


def test_discard_removes_a_file_and_never_fails(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    for name in ("file", "file", "folder", "no/such/folder/file", "file" * 100):
        discard(tmp_path / name)
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]
