"""The ten lines in a notebook, as Jupyter runs them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]

CELLS = """
import torch, mdistiller
from tests.api._parts import loaders, net
student, teacher, (train, val) = net(), net(8), loaders()
images, labels = next(iter(train))
---
result = mdistiller.distill(student, teacher, train, val, method="DKD", epochs=2, lr=0.05)
assert result.student is student and len(result.history) == 2
---
distiller = mdistiller.distiller("KD", student, teacher, example=images)
loss, terms = distiller(images, labels)
loss.backward()
print(sorted(terms))
---
try:
    mdistiller.distill(student, teacher, train, val, method="DKDD")
except mdistiller.UserError as error:
    print(error)
"""

EXECUTE = """
import sys, nbformat
from nbclient import NotebookClient
book = nbformat.v4.new_notebook()
book.cells = [nbformat.v4.new_code_cell(cell) for cell in sys.stdin.read().split("---")]
NotebookClient(book, timeout=300, kernel_name="python3").execute()
print("".join("".join(o.get("text", "")) for cell in book.cells for o in cell["outputs"]))
"""


@pytest.mark.slow
def test_it_trains_in_a_notebook():
    pytest.importorskip("nbclient", reason="the extra `dev` is not installed")
    pytest.importorskip("ipykernel", reason="the extra `dev` is not installed")
    done = subprocess.run(
        [sys.executable, "-c", EXECUTE], input=CELLS, capture_output=True, text=True, cwd=REPOSITORY, timeout=300,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "epoch 2/2: lr" in done.stdout and "['loss_ce', 'loss_kd']" in done.stdout
    assert "unknown method 'DKDD'; did you mean DKD" in done.stdout
