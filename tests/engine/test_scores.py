"""Scores against values counted by hand."""

import math

import pytest
import torch

from mdistiller.distributed.ranks import Ranks
from mdistiller.engine.scores import Score, ScoreRecord, accuracy, correct_counts, evaluate, score_teacher

LOGITS = torch.tensor([[5.0, 1, 2, 3, 4, 0], [0, 1, 2, 3, 4, 5], [5, 4, 3, 2, 1, 0]])
TARGET = torch.tensor([0, 1, 5])  # first place; fifth place; sixth place


def test_top1_and_top5_hits_are_counted():
    assert correct_counts(LOGITS, TARGET).tolist() == [1, 2]


def test_accuracy_is_in_percent():
    assert [round(a.item(), 3) for a in accuracy(LOGITS, TARGET, topk=(1, 5))] == [33.333, 66.667]


def test_with_fewer_than_five_classes_top5_counts_all_of_them():
    assert correct_counts(LOGITS[:, :3], torch.tensor([2, 2, 2])).tolist() == [1, 3]


def test_every_image_counts_once_even_if_the_last_batch_is_short():
    loader = [(LOGITS[:2], TARGET[:2]), (LOGITS[2:], TARGET[2:], torch.tensor([9]))]
    scores = evaluate(loader, lambda image: {"a": image, "b": -image}, torch.device("cpu"))
    assert scores["a"].top1 == pytest.approx(100 / 3) and scores["a"].top5 == pytest.approx(200 / 3)
    assert scores["b"].top1 == pytest.approx(100 / 3)  # with the sign reversed, the sixth place is the first
    by_hand = sum(
        math.log(sum(math.exp(v) for v in row.tolist())) - row[t].item() for row, t in zip(LOGITS, TARGET)
    )
    assert scores["a"].loss == pytest.approx(by_hand / 3, rel=1e-6)


def test_an_empty_set_is_refused():
    with pytest.raises(ValueError, match="validation set is empty"):
        evaluate([], lambda image: {"": image}, torch.device("cpu"))


def test_the_best_is_that_of_each_head_however_low_it_is():
    """A thousand classes start below one percent."""
    record = ScoreRecord()
    heads = [{"student": 0.1, "ema": 0.0}, {"student": 0.3, "ema": 0.2}, {"student": 0.2, "ema": 0.2}]
    improved = [record.note({name: Score(top1, 0, 0) for name, top1 in scores.items()}) for scores in heads]
    assert improved == [["student", "ema"], ["student", "ema"], ["ema"]]
    assert record.best == {"student": 0.3, "ema": 0.2} and record.last == {"student": 0.2, "ema": 0.2}


@pytest.mark.parametrize("right, poor", [(100, True), (115, True), (135, False), (900, False), (0, True)])
def test_a_teacher_within_three_standard_deviations_of_chance_is_warned_of(right, poor, caplog):
    """Of 1000 images in 10 classes, 100 are right by chance, with a standard deviation of 9.5."""
    target = torch.arange(1000) % 10
    guess = torch.where(torch.arange(1000) < right, target, (target + 1) % 10)
    logits = torch.nn.functional.one_hot(guess, 10).float()
    loader = [(logits[:600], target[:600]), (logits[600:], target[600:])]
    line = score_teacher(loader, lambda image: (image, {}), torch.device("cpu"), Ranks())
    assert line.startswith(f"teacher: top-1 {right / 10:.2f}, top-5 ") and line.endswith(" on 1000 images")
    assert ("no better than chance" in caplog.text) == poor
