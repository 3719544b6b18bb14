"""A Python process that has imported torch and the library, and forks runs of a tool: each a real process, started
in a twentieth of the time. Reads one JSON command a line, answers one JSON value a line.

    {"start": {"tool": path, "arguments": [...], "folder": cwd, "output": file, "environment": {...}}} -> its pid
    {"poll": pid}, {"wait": pid} -> its exit status, minus the signal's number, or null while it lives
"""

import json
import os
import runpy
import sys

import matplotlib.backends.backend_agg  # noqa: F401
import sklearn.datasets  # noqa: F401

import mdistiller.analysis.plots.curves
import mdistiller.engine.build  # noqa: F401


def start(tool: str, arguments: list[str], folder: str, output: str, environment: dict[str, str]) -> int:
    child = os.fork()
    if child:
        return child
    os.setsid()
    target = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(target, stream)
    os.chdir(folder)
    os.environ.update(environment)
    sys.argv = [tool, *arguments]
    status = 1
    try:
        runpy.run_path(tool, run_name="__main__")
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def poll(pid: int, flags: int = os.WNOHANG) -> int | None:
    found, status = os.waitpid(pid, flags)
    return os.waitstatus_to_exitcode(status) if found else None


for line in sys.stdin:
    ((command, argument),) = json.loads(line).items()
    answer = start(**argument) if command == "start" else poll(argument, os.WNOHANG if command == "poll" else 0)
    print(json.dumps(answer), flush=True)
