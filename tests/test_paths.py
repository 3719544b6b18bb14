"""Where the project's own files are found."""

from mdistiller import paths


def test_a_file_is_searched_for_in_the_current_folder_then_in_the_project(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = "configs/digits/kd.yaml"
    assert paths.find_file(name) == paths.SHIPPED / name
    (tmp_path / "configs/digits").mkdir(parents=True)
    (tmp_path / name).touch()
    assert paths.find_file(name).resolve() == tmp_path / name
    assert paths.find_file("configs/none.yaml") is None and paths.find_file("configs") is None
    assert paths.find_file("x" * 5000) is None and paths.find_file("a\0b") is None
