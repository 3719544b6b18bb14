"""Tensors in groups of one device and dtype."""

from __future__ import annotations

import torch

from mdistiller.models.tensor_groups import by_kind


def test_lists_are_split_by_the_kind_of_the_first() -> None:
    a, b, c = torch.zeros(1), torch.zeros(2, dtype=torch.int64), torch.zeros(3)
    assert by_kind([a, b, c], [1, 2, 3]) == [([a, c], [1, 3]), ([b], [2])]


def test_lists_of_one_kind_are_new_lists() -> None:
    one, other = [torch.zeros(1), torch.zeros(2)], [torch.ones(1), torch.ones(2)]
    (groups,) = by_kind(one, other)
    assert isinstance(groups, tuple) and [list(map(id, own)) for own in groups] == [
        list(map(id, own)) for own in (one, other)
    ]
    assert groups[0] is not one


def test_no_tensors_have_no_kind() -> None:
    assert by_kind([]) == by_kind([], []) == []
