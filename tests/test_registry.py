"""Registries: known, unknown and repeated names."""

import pytest

from mdistiller.errors import UserError
from mdistiller.registry import Registry, near_names


def test_an_entry_is_found_by_its_name():
    registry = Registry("fruit")

    @registry.register("Apple")
    class Apple: ...

    assert registry["Apple"] is Apple


def test_an_unknown_name_gets_the_similar_ones_in_any_case():
    registry = Registry("model", {"resnet20": 1, "resnet32": 2, "vgg8": 3})
    with pytest.raises(UserError, match=r"^unknown model 'ResNet2O'; did you mean .*resnet20"):
        registry["ResNet2O"]


def test_an_unknown_name_without_a_similar_one_gets_all_names():
    with pytest.raises(KeyError, match="unknown model 'zzzz'; known: resnet20, vgg8"):
        Registry("model", {"vgg8": 3, "resnet20": 1})["zzzz"]


def test_a_name_is_registered_only_once():
    registry = Registry("fruit", {"Apple": 1})
    with pytest.raises(ValueError, match="fruit 'Apple' is registered already"):
        registry.register("Apple")(object)


def test_near_names_are_similar_few_and_best_first():
    known = ["vgg8", "resnet20", "resnet32", "resnet56", "resnet110", "wrn_16_2"]
    near = near_names("RESNET2OO", known)
    assert "resnet20" in near and len(near) <= 3 and "vgg8" not in near
    assert near_names("resnet110x", known)[0] == "resnet110"
