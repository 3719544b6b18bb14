"""Files that a user names: every error of reading and writing them is one UserError that names the file."""


import pytest
import yaml

from mdistiller.errors import UserError
from mdistiller.user_files import read_json, read_text, read_yaml, reading, writing


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "bytes").write_bytes(b"a\xff")
    (tmp_path / "yaml").write_text("a: [")
    (tmp_path / "odd").write_text("!!timestamp x")
    (tmp_path / "text").write_text("ä: 1", encoding="utf-8")


REFUSED = {
    "missing": "cannot read plan missing: No such file or directory; make one",
    "folder": "cannot read plan folder: Is a directory; make one",
    "text/below": "cannot read plan text/below: Not a directory; make one",
    "bytes": "plan bytes is not a text file (invalid start byte at byte 1); make one",
    "nu\0ll": "cannot read plan nu\0ll: embedded null byte; make one",
    "x" * 300: f"cannot read plan {'x' * 300}: File name too long; make one",
}


@pytest.mark.parametrize("path", REFUSED, ids=["missing", "folder", "below a file", "bytes", "null", "long"])
@pytest.mark.parametrize("read", [read_text, read_yaml])
def test_a_file_that_cannot_be_read(files, read, path):
    with pytest.raises(UserError) as refused:
        read(path, "plan", "make one")
    assert str(refused.value) == REFUSED[path]


@pytest.mark.parametrize("path", ["yaml", "odd"])
def test_a_file_that_is_not_yaml(files, path):
    with pytest.raises(UserError, match=f"^plan {path} is not valid YAML: "):
        read_yaml(path, "plan", "make one")


def test_what_is_read(files):
    assert read_text("text", "plan", "") == "ä: 1" and read_yaml("text", "plan", "") == {"ä": 1}


def test_an_error_within_a_block(files, tmp_path):
    with pytest.raises(UserError, match=r"^cannot read the plots: Is a directory; draw them$"), reading(
        "the plots", "draw them"
    ):
        (tmp_path / "folder").read_bytes()
    for path in ("folder", "text/below"):
        with pytest.raises(UserError, match=f"^cannot write {path}: "), writing(path):
            (tmp_path / path).write_text("")
    with pytest.raises(UserError, match=r"^cannot write new/copy: No such file or directory \(missing\); "), writing(
        "new/copy"
    ), open("missing"):
        pass
    assert (tmp_path / "new").is_dir()


def test_a_fault_is_no_error_of_a_file(files):
    for block in (reading("x", "y"), writing("new/file")):
        with pytest.raises(ValueError, match="a fault") as caught, block:
            raise ValueError("a fault")
        assert type(caught.value) is ValueError


TEXT = "name: café\r\nlist: [1]\r\n"


def test_a_byte_order_mark_and_windows_line_ends_are_taken(files, tmp_path):
    (tmp_path / "marked").write_bytes(TEXT.encode("utf-8-sig"))
    assert read_text("marked", "plan", "") == "name: café\nlist: [1]\n"
    assert read_yaml("marked", "plan", "") == {"name": "café", "list": [1]}


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "latin-1", "cp1252", "gbk"])
@pytest.mark.parametrize("read", [read_text, read_yaml])
def test_text_in_another_encoding_is_named(files, tmp_path, read, encoding):
    text = TEXT.replace("é", "中" if encoding == "gbk" else "e" if encoding[-3:] in ("-le", "-be") else "é")
    (tmp_path / "other").write_bytes(text.encode(encoding))
    with pytest.raises(UserError) as refused:
        read("other", "plan", "make one")
    message = str(refused.value)
    assert message.startswith("plan other is not in UTF-8 (") and message.endswith("; save it in UTF-8, or make one")
    assert (encoding[:6].upper() in message) == encoding.startswith("utf") and "\n" not in message


def test_bytes_that_are_no_text(files, tmp_path):
    for content, why in ((b"PK\x03\x04\xff\x00", "invalid start byte at byte 4"), (b"ab\0c", "a null byte at byte 2")):
        (tmp_path / "other").write_bytes(content)
        with pytest.raises(UserError) as refused:
            read_text("other", "plan", "make one")
        assert str(refused.value) == f"plan other is not a text file ({why}); make one"


# A key that stands twice

TWICE = {
    "SOLVER:\n  LR: 1\nLOG:\n  A: 1\nSOLVER:\n  TYPE: x\n": "SOLVER stands there twice, in lines 1 and 5",
    "A:\n  B:\n    C: 1\n    D: 2\n    C: 1\n": "A.B.C stands there twice, in lines 3 and 5",
    "A: [{B: 1}, {B: 1,\n C: 2, B: 3}]": "A.1.B stands there twice, in lines 1 and 2",
    "{A: 1, A: 2}": "A stands there twice, in line 1,",
    "1: a\ntrue: b\n": "true stands there twice, in lines 1 and 2",
    "1: a\n'1': b\n": "1 stands there twice, in lines 1 and 2",
    "1: a\n0x1: b\n": "0x1 stands there twice",
    "null: a\n~: b\n": "~ stands there twice",
    "'A': 1\n\"A\": 2\n": "A stands there twice",
    "a: &k x\n*k : 1\n? x\n: 2\n": "x stands there twice, in lines 2 and 3",
    "=: 1\n=: 2\n": "= stands there twice",
    "base: &b {A: 1, A: 2}\n<<: *b\n": "base.A stands there twice, in line 1",
}


@pytest.mark.parametrize("text", TWICE)
def test_a_key_that_stands_twice_in_yaml_is_refused_with_both_lines(tmp_path, text):
    path = tmp_path / "twice.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=f"^plan {path}: ") as refused:
        read_yaml(path, "plan", "make one")
    assert TWICE[text] in str(refused.value) and "only the last would count; keep one" in str(refused.value)


@pytest.mark.parametrize(
    "text",
    [
        "a: &a {x: 1, y: 2}\nb:\n  <<: *a\n  x: 3\n",
        "a: &a {x: 1}\nb: &b {<<: *a, x: 2}\nc: {<<: *b, x: 3}\nd: [*a, *a, *b]\n",
        "a: &a {x: 1}\nb: &b {x: 2}\nc:\n  <<: [*a, *b]\n",
        "a: {x: 1}\nb: {x: 1}\nc: [{x: 1}, {x: 1}]\n",
        "1: a\n2: b\n'01': c\n",
        "=: 1\n'==': 2\n",
        "a: !!set {x, y}\n",
        "",
    ],
)
def test_merge_keys_and_the_same_key_elsewhere_are_read_as_before(tmp_path, text):
    path = tmp_path / "once.yaml"
    path.write_text(text)
    assert read_yaml(path, "plan", "make one") == yaml.safe_load(text)


def test_keys_that_only_aliases_make_long_are_not_written_out(tmp_path):
    path = tmp_path / "bomb.yaml"
    lines = ["a0: &a0 [x, x]", *(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, 40)), "? *a39\n: {b: 1, b: 2}"]
    path.write_text("\n".join(lines))
    with pytest.raises(UserError, match=r": \?\.b stands there twice, in line 42"):
        read_yaml(path, "plan", "make one")


def test_a_key_that_stands_twice_in_json_is_refused(tmp_path):
    path = tmp_path / "groups.json"
    path.write_text('{"groups": [[0, 1]], "more": {"groups": 1}}')
    assert read_json(path, "groups file", "make one")["groups"] == [[0, 1]]
    path.write_text('{"groups": [[0, 1]], "groups": [[0], [1]]}')
    with pytest.raises(UserError, match=f"^groups file {path}: groups stands there twice, and only the last would"):
        read_json(path, "groups file", "make one")
    path.write_text("{")
    with pytest.raises(UserError, match="is not a JSON file"):
        read_json(path, "groups file", "make one")
