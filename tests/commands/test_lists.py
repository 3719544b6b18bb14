"""The commands that list networks, methods and data sets."""

import re

import pytest

from mdistiller import list_datasets, list_methods, list_models
from mdistiller.commands.main import main
from mdistiller.distillers import distiller_dict, method_defaults
from mdistiller.models import build_model, cifar_model_dict
from mdistiller.models.cost import network_cost


@pytest.fixture
def printed(capsys):
    """printed(arguments): the lines that a command prints."""

    def run(*arguments):
        main(arguments)
        return capsys.readouterr().out.splitlines()

    return run


def test_models_without_a_pattern_are_those_of_this_library(printed):
    names = printed("models")
    assert {"resnet8", "ResNet18", "wrn_16_2"} <= set(names) and not any("/" in name for name in names)
    assert set(names) <= set(list_models())


def test_a_pattern_chooses(printed):
    assert printed("models", "torchvision/resnet1*") == list_models("torchvision/resnet1*")


def test_the_cost_is_that_of_the_network(printed):
    lines = printed("models", "resnet8*", "--cost", "--classes", "10")
    own = {line.split()[0]: line for line in lines}
    assert f"{network_cost(build_model(cifar_model_dict, 'resnet8', 10), 32)} at 32x32" in own["resnet8"]
    larger = printed("models", "resnet8", "--cost", "--image-size", "64")
    assert larger[0].endswith("at 64x64") and len(larger) == 1


def test_a_network_that_cannot_be_built_does_not_end_the_list(printed):
    lines = printed("models", "torchvision/[ar]*net*18*", "--cost", "--image-size", "7")
    assert lines and all(re.search(r"MACs at 7x7|not known: ", line) for line in lines)


def test_methods_are_listed_with_their_papers(printed):
    lines = printed("methods")
    assert [line.split()[0] for line in lines] == list_methods() and len(lines) == len(distiller_dict)
    papers = {line.split()[0]: line for line in lines}
    assert "Zhao et al. 2022, arXiv 2203.08679" in papers["DKD"]
    assert "Park et al. 2019, arXiv 1904.05068" in papers["RKD"]
    assert "The student alone" in papers["NONE"]


def test_settings_are_those_of_the_method(printed):
    lines = printed("methods", "dkd", "--settings")
    assert lines[0].startswith("DKD  ")
    assert {line.split()[0] for line in lines[1:]} == {f"DKD.{key}" for key in method_defaults["DKD"]}
    assert any(line.strip() == "DKD.T 4.0 (positive and finite)" for line in lines)


def test_data_sets_are_listed_with_what_they_are(printed):
    lines = printed("datasets")
    assert [line.split()[0] for line in lines] == list_datasets()
    assert any(line.split() == ["cifar100", "100", "classes,", "32x32"] for line in lines)
    assert all(len(line.split()) > 1 for line in lines)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["models", "resnetx*"], "no network fits the pattern 'resnetx*'"),
        (["models", "resnet8", "--cost", "--classes", "0"], "--classes must be a whole number >= 1, not 0"),
        (["models", "resnet8", "--image-size", "3"], "--image-size 3 goes with --cost"),
        (["methods", "dkdd"], "unknown method 'dkdd'; did you mean DKD"),
        (["datasets", "cifar10"], "unknown data set 'cifar10'; did you mean cifar100"),
    ],
)
def test_bad_input_is_one_line(arguments, words, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and words in said and said.count("\n") == 1
