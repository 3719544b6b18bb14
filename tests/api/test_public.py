"""What `import mdistiller` offers: every public name has a docstring, whose example runs; importing takes nothing."""

import doctest
import inspect
import subprocess
import sys

import pytest
import torch

import mdistiller
from mdistiller.dataset import dataset_dict
from mdistiller.distillers import distiller_dict

# An error is its own documentation.
DOCUMENTED = [name for name in mdistiller.__all__ if name != "UserError"]


@pytest.mark.parametrize("name", DOCUMENTED)
def test_every_example_runs(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    found = doctest.DocTestFinder().find(getattr(mdistiller, name), name)
    examples = [test for test in found if test.examples]
    assert any(test.name == name for test in examples), f"{name} has no example"
    for test in examples:
        test.globs.setdefault("torch", torch)
        result = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(test)
        assert result.attempted and not result.failed, test.name


@pytest.mark.parametrize("name", DOCUMENTED)
def test_every_argument_is_described(name):
    public = getattr(mdistiller, name)
    text = inspect.getdoc(public) or ""
    if inspect.isfunction(public):
        arguments = [argument for argument in inspect.signature(public).parameters if argument != "kwargs"]
        assert all(argument in text for argument in arguments), name


def test_importing_the_package_imports_no_torch():
    code = "import sys, mdistiller; mdistiller.__version__; dir(mdistiller); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_names():
    assert set(mdistiller.__all__) <= set(dir(mdistiller))
    with pytest.raises(AttributeError, match="no attribute 'distil'"):
        mdistiller.distil  # noqa: B018
    assert issubclass(mdistiller.UserError, ValueError)


def test_the_lists_are_those_of_the_registries():
    assert sorted(mdistiller.list_methods()) == sorted(distiller_dict)
    assert mdistiller.list_methods("dkd") == ["DKD"] and mdistiller.list_methods("nothing") == []
    assert set(mdistiller.list_datasets()) >= set(dataset_dict) and "loader" not in mdistiller.list_datasets()
    assert "resnet8" in mdistiller.list_models("resnet*")
