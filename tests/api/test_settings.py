"""Keyword arguments are settings."""

import pytest
import torch

from mdistiller.api.settings import method_name, settings_given
from mdistiller.errors import UserError


@pytest.mark.parametrize(
    ("method", "keywords", "meant"),
    [
        ("KD", {"lr": 0.1, "epochs": 3}, {"SOLVER.LR": 0.1, "SOLVER.EPOCHS": 3}),
        ("KD", {"seed": 1, "amp": "bf16", "ema": 0.9}, {"EXPERIMENT.SEED": 1, "SOLVER.AMP": "bf16", "SOLVER.EMA": 0.9}),
        ("KD", {"temperature": 2, "kd_weight": 1.0}, {"KD.TEMPERATURE": 2, "KD.LOSS.KD_WEIGHT": 1.0}),
        ("DKD", {"t": 2, "dkd_alpha": 1.0}, {"DKD.T": 2, "DKD.ALPHA": 1.0}),
        ("DKD", {"DKD": {"T": 2}}, {"DKD.T": 2}),
        ("KD", {"KD": {"LOSS": {"CE_WEIGHT": 1.0}}}, {"KD.LOSS.CE_WEIGHT": 1.0}),
        ("KD", {"SOLVER.LR": 0.2}, {"SOLVER.LR": 0.2}),
        ("KD", {"settings": {"SOLVER.EMA": 0.9, "SOLVER": {"DOT": {"DELTA": 0.1}}}},
         {"SOLVER.EMA": 0.9, "SOLVER.DOT.DELTA": 0.1}),
        ("KD", {"dot_delta": 0.1}, {"SOLVER.DOT.DELTA": 0.1}),
        ("KD", {"optimizer": "AdamW"}, {"SOLVER.TYPE": "AdamW"}),
        ("KD", {"device": torch.device("cpu")}, {"EXPERIMENT.DEVICE": "cpu"}),
        ("CRD", {"k": 5, "mode": "relax"}, {"CRD.NCE.K": 5, "CRD.MODE": "relax"}),
    ],
)  # fmt: skip
def test_a_keyword_is_a_setting(method, keywords, meant):
    assert settings_given(method, keywords) == meant


@pytest.mark.parametrize(
    ("keywords", "words"),
    [
        ({"learningrate": 1}, "unknown setting 'learningrate'"),
        ({"epoch": 1}, "unknown setting 'epoch'; did you mean epochs"),
        ({"SOLVER.LRR": 1}, "unknown setting 'SOLVER.LRR'; did you mean SOLVER.LR"),
        ({"KD": {"TEMPERATUR": 1}}, "did you mean KD.TEMPERATURE"),
        ({"type": "SGD"}, "type could be DATASET.TYPE or DISTILLER.TYPE or SOLVER.TYPE"),
        ({"batch_size": 3}, "SOLVER.BATCH_SIZE 3 would be ignored: the training loader decides it"),
        ({"augment": "randaugment"}, "DATASET.AUGMENT 'randaugment' would be ignored"),
        ({"DKD": {"T": 4}}, "DKD.T is a setting of another method than KD"),
        ({"DISTILLER.STUDENT": "resnet8"}, "the student is the argument `student`"),
        ({"lr": 1, "SOLVER.LR": 2}, "SOLVER.LR is given twice, as 1 and 2"),
    ],
)
def test_a_wrong_keyword_is_refused_in_one_line(keywords, words):
    with pytest.raises(UserError) as refused:
        settings_given("KD", keywords)
    assert words in str(refused.value) and "\n" not in str(refused.value)


def test_a_loss_has_no_settings_of_a_loop():
    assert settings_given("KD", {"temperature": 2, "pairs": [[1, 1]], "epochs": 3}, loss_only=True)
    with pytest.raises(UserError, match=r"SOLVER\.LR 0\.1 would be ignored: it is of the training loop"):
        settings_given("KD", {"lr": 0.1}, loss_only=True)


def test_a_methods_name_in_any_case():
    assert [method_name(name) for name in ("ReviewKD", "dkd", "NONE")] == ["REVIEWKD", "DKD", "NONE"]
    with pytest.raises(UserError, match="unknown method 'RevieKD'; did you mean REVIEWKD"):
        method_name("RevieKD")
