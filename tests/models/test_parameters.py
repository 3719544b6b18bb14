"""Parameters and parameter groups in one list."""

import pytest
import torch
import torch.nn as nn

from mdistiller.models.parameters import flat_parameters, parameter_groups


def parameters(count):
    return [nn.Parameter(torch.full((1,), float(i))) for i in range(count)]


def test_a_mixed_list():
    a, b, c, d, e = parameters(5)
    learnable = [a, {"params": [b, c], "lr": 0.5}, d, {"params": e, "weight_decay": 0.0}]
    given = [dict(entry) if isinstance(entry, dict) else entry for entry in learnable]
    assert [p.item() for p in flat_parameters(learnable)] == [0, 1, 2, 3, 4]
    groups = parameter_groups(learnable)
    assert [[p.item() for p in group.pop("params")] for group in groups] == [[0, 3], [1, 2], [4]]
    assert groups == [{}, {"lr": 0.5}, {"weight_decay": 0.0}]
    assert all(x is y or x.keys() == y.keys() for x, y in zip(learnable, given)), "the given groups are unchanged"


def test_plain_parameters_are_one_group_and_generators_are_read_once():
    net = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    (group,) = parameter_groups(net.parameters())
    assert group.keys() == {"params"} and all(map(lambda p, q: p is q, group["params"], net.parameters()))
    (group,) = parameter_groups([{"params": net.parameters(), "lr": 1.0}])
    assert len(group["params"]) == 4 and len(flat_parameters([group])) == 4
    assert parameter_groups([]) == flat_parameters([]) == []


a, b = parameters(2)


@pytest.mark.parametrize(
    ("learnable", "message"),
    [
        ([a, b, a], "entry 2 is entry 0 again"),
        ([a, {"params": [b, a]}], "parameter 1 of group 1 is entry 0 again"),
        ([{"params": [b, b]}], "parameter 1 of group 0 is parameter 0 of group 0 again"),
        ([a, 3.0], "entry 1 is a float, neither a parameter nor a group"),
        ([{"weight_decay": 0.0}], "entry 0 is a dict, neither a parameter nor a group"),
        ([{"params": [a, ("b", b)]}], "parameter 1 of group 0 is a tuple, neither a parameter nor a group"),
    ],
)
def test_a_wrong_list_is_refused_by_position(learnable, message):
    for function in (flat_parameters, parameter_groups):
        with pytest.raises(ValueError, match=f"^learnable parameters: {message}"):
            function(learnable)
