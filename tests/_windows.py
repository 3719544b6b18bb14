"""Runs a tool as on Windows, as far as that can be imitated: `python tests/_windows.py tools/train.py ...`.

The modules and functions that Python lacks there are gone, and no folder can have a `:` in its name.
"""

import errno
import importlib
import os
import runpy
import signal
import sys
import types
from pathlib import Path

MODULES = ("fcntl", "resource", "termios", "tty", "pwd", "grp", "syslog")
OF_OS = (
    "fork", "forkpty", "getegid", "geteuid", "getgid", "getpgid", "getuid", "killpg", "posix_fallocate",
    "register_at_fork", "setsid", "sched_getaffinity", "set_blocking", "statvfs", "uname", "wait4",
)  # fmt: skip
OF_SIGNAL = (
    "SIGHUP", "SIGKILL", "SIGUSR1", "SIGUSR2", "SIGALRM", "SIGCHLD", "pthread_sigmask", "pthread_kill", "sigtimedwait",
    "sigwait", "setitimer", "alarm", "pause",
)  # fmt: skip


def lose_what_windows_lacks() -> None:
    lockf, test_lock = os.lockf, os.F_TLOCK
    sys.modules.update(dict.fromkeys(MODULES))  # importing one of them raises an ImportError
    for module, names in ((os, OF_OS), (signal, OF_SIGNAL)):
        for name in names:
            vars(module).pop(name, None)

    def locking(file: int, mode: int, count: int) -> None:
        try:
            lockf(file, test_lock, count)
        except BlockingIOError:
            raise PermissionError(errno.EACCES, "Permission denied") from None

    sys.modules["msvcrt"] = msvcrt = types.ModuleType("msvcrt")
    msvcrt.locking, msvcrt.LK_NBLCK = locking, 2
    mkdir = os.mkdir

    def mkdir_without_colons(path, *args, **kwargs):
        if ":" in os.fspath(path):
            raise OSError(errno.EINVAL, "The directory name is invalid", path)
        mkdir(path, *args, **kwargs)

    os.mkdir = mkdir_without_colons


if __name__ == "__main__":
    for name in ("matplotlib.figure", "psutil", "sklearn.datasets", "subprocess", "tensorboardX", "torchvision"):
        importlib.import_module(name)  # these are built for Linux here, and need its modules
    lose_what_windows_lacks()
    sys.argv = sys.argv[1:]
    sys.path[0] = str(Path(sys.argv[0]).resolve().parent)
    runpy.run_path(sys.argv[0], run_name="__main__")
