"""Groups of classes from a teacher's confusion, against plain loops in exact fractions."""

from __future__ import annotations

import json
import pickle
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mdistiller.errors import UserError
from mdistiller.grouping import (
    check_groups,
    count_confusions,
    draw_confusion,
    expand,
    group_by_confusion,
    load_groups,
    merge_classes,
    published_groups,
    save_groups,
    similarity,
)
from mdistiller.grouping.cifar100 import SUPERCLASS, SUPERCLASS_NAMES

from .._golden import FOLDER, load

RESNET = [[9, 18, 19], [10, 17], [2, 4, 7, 13, 15], [3, 5, 6], [0, 1, 8, 11, 12, 14, 16]]
WRN = [[9, 18, 19], [2, 4, 7, 10, 13, 17], [3, 5, 6], [0, 1, 15], [8, 11, 12, 14, 16]]
CIFAR = Path(__file__).parents[2] / "data" / "cifar-100-python"


def oracle(counts: list[list[int]], num_groups: int) -> list[list[int]]:
    """The rule of `group_by_confusion` in exact fractions, where ties are exact."""
    size = range(len(counts))
    errors = [sum(counts[i][j] for j in size if j != i) for i in size]
    x = [[Fraction(counts[i][j], errors[i]) if i != j and errors[i] else Fraction(0) for j in size] for i in size]
    s = [[x[i][j] + x[j][i] for j in size] for i in size]
    groups: list[list[int]] = []
    while len(groups) < num_groups:
        best = None
        for i in size:
            for j in range(i + 1, len(counts)):
                free = not any(i in g or j in g for g in groups)
                if free and (best is None or s[i][j] > s[best[0]][best[1]]):
                    best = [i, j]
        groups.append(best)
    for i in size:
        if not any(i in g for g in groups):
            means = [sum(s[i][m] for m in g) / len(g) for g in groups]
            groups[means.index(max(means))].append(i)
    return [sorted(g) for g in groups]


@pytest.mark.parametrize(("teacher", "groups"), [("resnet56", RESNET), ("resnet110", RESNET), ("wrn_40_2", WRN)])
def test_published_confusions_give_the_published_groups(teacher, groups):
    confusion = np.load(FOLDER / "teacher_confusion.npz")[teacher]
    assert group_by_confusion(merge_classes(confusion, SUPERCLASS), 5) == groups


@pytest.mark.parametrize("row", load("dcgd"), ids=lambda row: row["student"])
def test_published_groups_list_their_classes_as_the_pinned_heads_do(row):
    name = {"resnet56": "res56", "wrn_40_2": "wrn_40_2"}[row["teacher"]]
    assert published_groups(name) == list(row["groups"].values())


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_agrees_with_the_exact_oracle(data):
    size = data.draw(st.integers(2, 9))
    row = st.lists(st.integers(0, 4), min_size=size, max_size=size)
    counts = data.draw(st.lists(row, min_size=size, max_size=size))
    counts[0][1] += 1  # one error at least
    num_groups = data.draw(st.integers(1, size // 2))
    assert group_by_confusion(np.array(counts), num_groups) == oracle(counts, num_groups)


def test_equal_means_tie_though_their_terms_are_no_decimals():
    """Class 6 has the same exact mean similarity to [1, 2] and to [3, 4], of 9ths and 18ths: the earlier group wins."""
    counts = [
        [0, 0, 0, 0, 0, 1, 0],
        [0, 0, 2, 0, 0, 4, 3],
        [0, 1, 0, 0, 0, 0, 0],
        [0, 0, 0, 0, 1, 0, 0],
        [0, 2, 4, 4, 0, 4, 4],
        [0, 0, 0, 0, 0, 0, 0],
        [3, 1, 4, 3, 4, 3, 0],
    ]
    assert oracle(counts, 3) == [[1, 2, 6], [3, 4], [0, 5]]
    assert group_by_confusion(np.array(counts), 3) == oracle(counts, 3)


def test_similarity_by_hand():
    # Class 0: 4 errors, 3 to class 1; class 1: 2 errors, both to class 2; class 2: none.
    counts = np.array([[90, 3, 1], [0, 98, 2], [0, 0, 100]])
    expected = [[0, 0.75, 0.25], [0.75, 0, 1.0], [0.25, 1.0, 0]]
    assert similarity(counts).tolist() == expected


def test_grouping_by_hand():
    # s: (0,1) 2.0; (2,3) 1.0 + 0.5; 4 sends half its errors to 0, half to 2, and 3 sends half to 4:
    # mean of 4 to {0,1}: (0.5 + 0) / 2 = 0.25; to {2,3}: (0.5 + 0.5) / 2 = 0.5.
    counts = np.zeros((5, 5), int)
    counts[0, 1] = counts[1, 0] = 7
    counts[2, 3] = 4
    counts[3, 2] = counts[3, 4] = 5
    counts[4, 0] = counts[4, 2] = 1
    assert group_by_confusion(counts, 2) == [[0, 1], [2, 3, 4]]
    assert group_by_confusion(counts, 1) == [[0, 1, 2, 3, 4]]


def test_later_classes_are_compared_with_the_members_that_a_group_has_by_then():
    # 0-1 and 2-3 seed. 4 joins {0, 1}; 5, confused with 4 alone, follows it.
    counts = np.zeros((6, 6), int)
    counts[0, 1] = counts[1, 0] = counts[2, 3] = counts[3, 2] = 9
    counts[4, 0] = 1
    counts[5, 4] = 1
    assert group_by_confusion(counts, 2) == [[0, 1, 4, 5], [2, 3]]


def test_ties_go_to_the_lower_index():
    everything_equal = np.ones((7, 7), int)
    assert group_by_confusion(everything_equal, 3) == [[0, 1, 6], [2, 3], [4, 5]]


def test_shares_that_are_mathematically_equal_tie():
    # s(0,1) = 1/3 + 1/3 by two roundings, s(2,3) = 2/3 by one: a tie, so that (0,1) seeds first.
    counts = np.zeros((8, 8), int)
    counts[0, [1, 4, 5]] = counts[1, [0, 6, 7]] = 1
    counts[2, [3, 4]] = 2, 1
    assert group_by_confusion(counts, 2)[0][:2] == [0, 1]


def test_classes_without_errors_join_by_the_errors_of_others():
    counts = np.zeros((5, 5), int)
    counts[0, 1] = counts[2, 3] = 5
    counts[2, 4] = 1  # 4 makes no error; an image of 2 is predicted as 4
    assert group_by_confusion(counts, 2) == [[0, 1], [2, 3, 4]]


@pytest.mark.parametrize(
    ("counts", "num_groups", "words"),
    [
        (np.ones((4, 4)), 3, "at most 2 groups"),
        (np.ones((4, 4)), 0, "at least 1"),
        (np.ones((4, 3)), 1, "square"),
        (-np.ones((4, 4)), 1, "square matrix of numbers >= 0"),
        (np.eye(4), 2, "--split heldout"),
    ],
)
def test_what_cannot_be_grouped_is_refused(counts, num_groups, words):
    with pytest.raises(UserError, match=words):
        group_by_confusion(counts, num_groups)


def test_counts_and_merging_by_hand():
    confusion = count_confusions(np.array([0, 0, 1, 2]), np.array([0, 2, 1, 1]), 3)
    assert confusion.tolist() == [[1, 0, 1], [0, 1, 0], [0, 1, 0]]
    assert merge_classes(confusion, [0, 1, 1]).tolist() == [[1, 1], [0, 2]]
    assert expand([[1], [0]], [0, 1, 1]) == [[1, 2], [0]]


def test_superclasses_are_the_data_sets_own():
    assert len(SUPERCLASS) == 100
    assert all(SUPERCLASS.count(s) == 5 for s in range(20))
    if not (CIFAR / "train").exists():
        pytest.skip("needs CIFAR-100")
    train, meta = (pickle.loads((CIFAR / name).read_bytes(), encoding="latin1") for name in ("train", "meta"))
    for fine, coarse in zip(train["fine_labels"], train["coarse_labels"]):
        assert SUPERCLASS[fine] == coarse
    for ours, name in zip(SUPERCLASS_NAMES, meta["coarse_label_names"]):
        assert ours.replace("-sized", "").replace(" ", "_") == name


def test_groups_file_round_trip(tmp_path):
    path = tmp_path / "new" / "groups.json"
    save_groups(path, {"groups": [[0, 2], [1]], "teacher": "resnet56"})
    assert load_groups(str(path)) == [[0, 2], [1]]
    assert json.loads(path.read_text())["teacher"] == "resnet56"
    path.write_text("[[1], [0]]")
    assert load_groups(str(path)) == [[1], [0]]


@pytest.mark.parametrize("text", ["{", "{}", "3", '[["a"]]', "[0, 1]", "[[true]]"])
def test_other_files_are_refused(tmp_path, text):
    path = tmp_path / "groups.json"
    path.write_text(text)
    with pytest.raises(UserError, match=r"groups\.json"):
        load_groups(str(path))


def test_unknown_names_and_files_are_refused(tmp_path):
    with pytest.raises(UserError, match="res56"):
        load_groups("resnet56")
    with pytest.raises(UserError, match="group_classes"):
        load_groups(str(tmp_path / "absent.json"))


@pytest.mark.parametrize(
    ("groups", "words"),
    [
        ([[0, 1]], r"missing \[2\]"),
        ([[0, 1], [2, 3]], r"unknown \[3\]"),
        ([[0, 1], [1, 2]], r"twice \[1\]"),
        ([[0, 1, 2], []], "empty"),
        ([], "empty"),
    ],
)
def test_groups_that_are_not_a_partition_are_refused(groups, words):
    with pytest.raises(UserError, match=words):
        check_groups(groups, 3)


def test_plot_is_a_png(tmp_path):
    path = tmp_path / "new" / "confusion.png"
    draw_confusion(path, np.arange(16).reshape(4, 4), [[0, 3], [1, 2]], ["a", "b", "c", "d"], "four classes")
    assert path.read_bytes().startswith(b"\x89PNG")
