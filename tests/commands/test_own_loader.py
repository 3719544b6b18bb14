"""Data that only a Python program has, `DATASET.TYPE loader`, is refused by the commands in one line."""

import pytest

FACTS = {"NUM_CLASSES": 7, "IMAGE_SIZE": 48}


@pytest.mark.parametrize("facts", [{}, FACTS])
def test_no_command_can_train_on_it(facts, tool, capsys):
    settings = [text for key, value in facts.items() for text in (f"DATASET.{key}", str(value))]
    with pytest.raises(SystemExit) as stopped:
        tool("train.py", "--cfg", "configs/digits/vanilla.yaml", "DATASET.TYPE", "loader", *settings)
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and said.count("\n") == 1 and "run that program, or name a data set" in said
