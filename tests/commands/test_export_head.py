"""The plain head of a grouped student, as an ordinary checkpoint."""

from __future__ import annotations

import pytest
import torch

from mdistiller.commands.export_head import export_head
from mdistiller.engine.files.checkpoint import load_model_weights, save_checkpoint
from mdistiller.errors import UserError
from mdistiller.models import GroupedStudent, build_model, cifar_model_dict

GROUPS = [[0, 2, 4, 6, 8], [1, 3, 5, 7, 9]]


@pytest.fixture
def student(tmp_path):
    torch.manual_seed(0)
    grouped = GroupedStudent(build_model(cifar_model_dict, "resnet8", 10), GROUPS).eval()
    save_checkpoint({"model": grouped.state_dict()}, tmp_path / "student_best")
    whole = {f"student.{k}": v for k, v in grouped.state_dict().items()}
    save_checkpoint({"epoch": 1, "model": whole}, tmp_path / "latest")
    return grouped


def configure(folder, name):
    (folder / "config.yaml").write_text(f"DISTILLER: {{STUDENT: {name}}}\nDATASET: {{TYPE: digits}}\n")


@pytest.mark.parametrize("file", ["student_best", "latest"])
def test_the_exported_network_returns_the_single_heads_logits(tmp_path, student, file):
    out = tmp_path / "new" / "resnet8.pth"
    text = export_head(tmp_path / file, out, "resnet8", "digits")
    plain = build_model(cifar_model_dict, "resnet8", 10).eval()
    load_model_weights(plain, out)
    image = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(plain(image)[0], student.forward_heads(image)["single"])
    assert "-m resnet8 -d digits" in text


def test_the_network_is_read_from_the_runs_config(tmp_path, student):
    with pytest.raises(UserError, match="-m resnet20"):
        export_head(tmp_path / "student_best", tmp_path / "out")
    configure(tmp_path, "resnet8")
    assert "-m resnet8 -d digits" in export_head(tmp_path / "student_best", tmp_path / "out")


@pytest.mark.parametrize("named", [None, "resnet20"])
def test_published_students_have_no_ordinary_plain_head(tmp_path, student, named):
    configure(tmp_path, "wrn_M_r20")
    with pytest.raises(UserError, match=r"wrn_M_r20 --head single.*resnet20 and DCGD\.GROUPS"):
        export_head(tmp_path / "student_best", tmp_path / "out", named)
    assert not (tmp_path / "out").exists()


def test_other_checkpoints_are_refused(tmp_path, student):
    with pytest.raises(UserError, match="does not fit"):
        export_head(tmp_path / "student_best", tmp_path / "out", "resnet14", "digits")
    save_checkpoint({"model": student.base.state_dict()}, tmp_path / "plain")
    with pytest.raises(UserError, match="no grouped student"):
        export_head(tmp_path / "plain", tmp_path / "out", "resnet8", "digits")
    with pytest.raises(UserError, match="no checkpoint"):
        export_head(tmp_path / "absent", tmp_path / "out", "resnet8", "digits")
    assert not (tmp_path / "out").exists()
