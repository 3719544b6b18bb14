"""The command `mdistiller`: it finds its commands, and they are those of tools/."""

import subprocess
import sys
from pathlib import Path

import pytest

import mdistiller
from mdistiller.commands.main import COMMANDS, main

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("arguments", [[], ["-h"], ["--help"]])
def test_help_lists_every_command(arguments, capsys):
    main(arguments)
    lines = capsys.readouterr().out.splitlines()
    assert all(any(line.startswith(f"  {name} ") for line in lines) for name in COMMANDS)


def test_version(capsys):
    main(["--version"])
    assert capsys.readouterr().out == f"{mdistiller.__version__}\n"


@pytest.mark.parametrize("name", COMMANDS)
def test_help_uses_the_name_that_the_command_was_called_by(name, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([name, "--help"])
    text = capsys.readouterr().out
    assert stopped.value.code == 0
    assert text.startswith(f"usage: mdistiller {name} ") and f"    mdistiller {name}" in text


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_is_a_tool_too(name, tool, capsys):
    """tools/NAME.py exists for every command, and tools/ has no other."""
    with pytest.raises(SystemExit) as stopped:
        tool(f"{name.replace('-', '_')}.py", "--help")
    assert stopped.value.code == 0 and "usage: " in capsys.readouterr().out
    tools = {path.stem.replace("_", "-") for path in (REPOSITORY / "tools").glob("*.py")}
    assert tools == set(COMMANDS)


def test_an_unknown_command_gets_a_one_line_error(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["trian"])
    assert stopped.value.code == 2
    assert capsys.readouterr().err == "error: unknown command 'trian'; did you mean train?\n"


def test_python_runs_it_as_a_module_without_importing_torch():
    code = "import runpy, sys; sys.argv = ['mdistiller', '--help']; runpy.run_module('mdistiller', run_name='__main__')"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}; assert 'torch' not in sys.modules"], cwd=REPOSITORY, capture_output=True,
        text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0 and done.stdout.startswith("usage: mdistiller COMMAND"), done.stderr
