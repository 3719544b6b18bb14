"""The late maximum: the same number on all ranks in the same call, without waiting for their present call."""

import os
import socket
import subprocess
import sys
from pathlib import Path

from mdistiller.distributed.ranks import Ranks

REPOSITORY = Path(__file__).resolve().parents[2]

# Rank 1 makes its first call after rank 0 has made its own.
CODE = """
import json, sys, time
from pathlib import Path
from mdistiller.distributed.ranks import joined_ranks

made = Path(sys.argv[1])
with joined_ranks("cpu", timeout=60) as ranks:
    late = ranks.late_maximum()
    while ranks.rank == 1 and not made.exists():
        time.sleep(0.01)
    found = [late(0)]
    made.touch()
    found += [late(15 if ranks.rank == 1 and call == 2 else 0) for call in range(2, 5)]
    found.append(ranks.maximum(ranks.rank))  # others may come between
    found += [late(ranks.rank), late.settle(), late.settle()]
    print(json.dumps(found))
"""


def test_two_ranks(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as found:
        port = found.getsockname()[1]
    common = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "WORLD_SIZE": "2"}
    common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", CODE, str(tmp_path / "made")], env=common | {"RANK": rank, "LOCAL_RANK": rank},
            stdout=subprocess.PIPE, text=True,
        )
        for rank in "01"
    ]  # fmt: skip
    #        calls 1 to 4, a maximum, call 5, what is left of it, nothing
    wanted = "[0, 0, 15, 0, 1, 0, 1, 0]\n"
    assert [process.communicate(timeout=120)[0] for process in started] == [wanted, wanted]


def test_a_single_rank_has_its_own_number_at_once():
    late = Ranks().late_maximum()
    assert [late(0), late(15), late.settle()] == [0, 15, 0]
