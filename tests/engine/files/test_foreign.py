"""Checkpoints as other trainers write them: found, stripped and loaded, or refused in one line; none runs code."""

import argparse
import codecs
import collections
import datetime
import enum
import functools
import gzip
import os
import pathlib
import pickle
import re
import subprocess
import sys
import tarfile
import types
import zipfile

import numpy as np
import pytest
import torch
import torch.nn as nn
from safetensors.torch import save, save_file

from mdistiller.engine.files import inert_pickle
from mdistiller.engine.files.checkpoint import (
    found_weights,
    load_checkpoint,
    load_model_weights,
    load_state,
    model_state,
    save_checkpoint,
)
from mdistiller.errors import UserError
from mdistiller.models import build_model, cifar_model_dict, imagenet_model_dict, tiny_imagenet_model_dict

REPOSITORY = pathlib.Path(__file__).resolve().parents[3]


def net(seed: int = 0, classes: int = 3) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(collections.OrderedDict(
        conv=nn.Conv2d(3, 2, 3), layer=nn.Sequential(nn.BatchNorm2d(2), nn.Flatten()), fc=nn.Linear(8, classes)
    ))  # fmt: skip


def state_of(seed: int = 0, prefix: str = "") -> dict:
    return {f"{prefix}{name}": tensor for name, tensor in net(seed).state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


class Split(enum.Enum):
    TRAIN = "train"


class AttributeDict(dict):
    """As Lightning's and many configurations'."""

    __getattr__ = dict.__getitem__


class Callback:
    def __init__(self) -> None:
        self.best, self.again = torch.tensor(0.5), self


class Record(tuple):
    __slots__ = ()


def optimizer_state() -> dict:
    network = net()
    optimizer = torch.optim.AdamW(network.parameters())
    network(torch.ones(2, 3, 4, 4)).sum().backward()
    optimizer.step()
    return optimizer.state_dict()


def scheduler() -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.MultiStepLR(torch.optim.SGD(net().parameters(), lr=0.1), [3, 5])


def hyper_parameters() -> dict:
    return {
        "lr": 0.1, "root": pathlib.PurePosixPath("/data"), "windows": pathlib.PureWindowsPath("C:/data"),
        "when": datetime.datetime(2026, 1, 1), "split": Split.TRAIN, "own": AttributeDict(a=AttributeDict(b=1)),
        "name": types.SimpleNamespace(a=1), "loss": functools.partial(nn.functional.cross_entropy, label_smoothing=0.1),
        Split.TRAIN: {1, 2}, "record": Record((1, 2)), "count": collections.Counter("ab"), "pattern": re.compile("a"),
        "function": nn.functional.relu, "array": np.ones(3), "type": np.float32,
        "groups": collections.defaultdict(list, a=[1]), "set": frozenset({1}), "bytes": b"abc",
        "device": torch.device("cpu"),
    }  # fmt: skip


def compiled(prefix: str = "") -> dict:
    return {f"{prefix}{name}": tensor for name, tensor in torch.compile(net()).state_dict().items()}


def of_others() -> dict:
    """name: (what the trainer saves, the part of the line that is noted)."""
    return {
        "RepDistiller": {"opt": argparse.Namespace(model="a", lr=np.float64(0.1)), "model": state_of(),
                         "accuracy": np.float32(70.1), "epoch": 240},
        "timm": {"epoch": 3, "arch": "a", "state_dict": state_of(), "optimizer": optimizer_state(), "version": 2,
                 "args": argparse.Namespace(lr=0.1), "metric": np.float64(70)},
        "Lightning": {"epoch": 3, "global_step": 5, "pytorch-lightning_version": "2.0", "hyper_parameters":
                      AttributeDict(hyper_parameters()), "callbacks": {Callback: {"best": torch.tensor(1.0)}},
                      "state_dict": collections.OrderedDict(state_of(prefix="model.")), "loops": {"a": {"b": [1]}},
                      "optimizer_states": [optimizer_state()], "lr_schedulers": [scheduler()]},
        "torch.compile": {"model": compiled()},
        "DistributedDataParallel of torch.compile": {"model": compiled("module.")},
        "torch.compile of DataParallel": {"model": compiled("module.")},
        "compiled within": {"model": {name.replace("layer.", "layer._orig_mod."): t for name, t in state_of().items()}},
        "DataParallel within": {"net": {name.replace("layer.", "layer.module."): t for name, t in state_of().items()}},
        "module.model.": {"state_dict": state_of(prefix="module.model.")},
        "model.net.module.": {"state_dict": state_of(prefix="model.net.module.")},
        **{prefix: {"weights": state_of(prefix=prefix)}
           for prefix in ("model.", "student.", "net.", "network.", "backbone.", "encoder.", "my_own_attribute.a.")},
        "pytorch-cifar": {"net": state_of(), "acc": 93.1, "epoch": 5},
        "torchvision's references": {"model": state_of(), "optimizer": optimizer_state(), "lr_scheduler":
                                     scheduler().state_dict(), "args": argparse.Namespace(root=pathlib.Path("/data"))},
        "DeiT": {"model": state_of(), "args": argparse.Namespace(out=pathlib.Path("out")), "scaler": {"scale": 1.0}},
        "Hugging Face": collections.OrderedDict(state_of()),
        "fastai": {"model": state_of(), "opt": optimizer_state()},
        "a pair": (state_of(), optimizer_state()),
        "deep inside": {"checkpoint": {"best": {"weights": state_of()}}},
        "beside the weights": {**state_of(), "epoch": 3},
        "an object": types.SimpleNamespace(weights=state_of(), optimizer=optimizer_state()),
        "every kind of object": {"model": state_of(), "hyper_parameters": hyper_parameters(), "itself": Callback()},
        "arrays": {"params": {name: tensor.numpy() for name, tensor in state_of().items()}},
        "thop": {"model": {**state_of(), "total_ops": torch.zeros(1), "conv.total_ops": torch.zeros(1),
                           "conv.total_params": torch.zeros(1)}},
        "AveragedModel": torch.optim.swa_utils.AveragedModel(net()).state_dict(),
        "without num_batches_tracked": {"model": {k: v for k, v in state_of().items() if "tracked" not in k}},
        "the network itself": net(), "DataParallel itself": {"model": nn.DataParallel(net()), "epoch": 1},
        "float64": {"model": {k: v.double() if v.is_floating_point() else v for k, v in state_of().items()}},
        "parameters": {"model": dict(net().named_parameters()) | dict(net().named_buffers())},
    }  # fmt: skip


OLD, PROTOCOL_4 = {"_use_new_zipfile_serialization": False}, {"pickle_protocol": 4}
IN_ALL_FORMATS = ("Lightning", "every kind of object", "the network itself", "DataParallel itself", "arrays")


@pytest.mark.parametrize(
    "form, options",
    [*((form, {}) for form in of_others()), *((form, how) for form in IN_ALL_FORMATS for how in (OLD, PROTOCOL_4))],
)
@pytest.mark.filterwarnings("ignore")  # of torch, about saving the source of modules
def test_what_another_trainer_saved_loads(tmp_path, capfd, form, options):
    if sys.version_info < (3, 11) and form == "every kind of object":
        pytest.skip("some of them have other pickles there")
    torch.save(of_others()[form], tmp_path / "file", **options)
    target = net(seed=1)
    load_model_weights(target, tmp_path / "file")
    assert same(target.state_dict(), state_of()) or "tracked" in form
    assert torch.equal(target.fc.weight, net().fc.weight)
    assert all(tensor.dtype == own.dtype for tensor, own in zip(target.state_dict().values(), state_of().values()))
    state, _ = found_weights(tmp_path / "file")
    save_checkpoint({"model": state}, tmp_path / "converted")
    load_model_weights(converted := net(seed=2), tmp_path / "converted")
    assert same(converted.state_dict(), target.state_dict()) or "tracked" in form
    assert not any(name.startswith("model.") for name in state)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_loaded_into_float32(tmp_path, dtype):
    torch.save({"model": net().to(dtype).state_dict()}, tmp_path / "file")
    load_model_weights(target := net(1), tmp_path / "file")
    assert target.fc.weight.dtype == torch.float32
    assert torch.equal(target.fc.weight, net().fc.weight.to(dtype).float())


def test_a_big_endian_file_loads(tmp_path):
    torch.save({"model": state_of()}, tmp_path / "little")
    with zipfile.ZipFile(tmp_path / "little") as little, zipfile.ZipFile(tmp_path / "big", "w") as big:
        for name in little.namelist():
            data = little.read(name)
            if name.endswith("byteorder"):
                data = b"big"
            elif "/data/" in name:
                data = np.frombuffer(data, "<f4" if len(data) % 8 or len(data) > 8 else "<i8").byteswap().tobytes()
            big.writestr(name, data)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mdistiller.engine.files.checkpoint.check_seal", lambda path: False)
        state = load_checkpoint(tmp_path / "big")["model"]
    assert torch.equal(state["fc.weight"], net().fc.weight)


@pytest.mark.parametrize("name", ["file.pth", "file.safetensors", "file"])
@pytest.mark.parametrize("safetensors", [True, False])
def test_the_content_decides_between_safetensors_and_torch(tmp_path, name, safetensors):
    if safetensors:
        save_file(state_of(), tmp_path / name)
    else:
        torch.save({"model": state_of()}, tmp_path / name)
    load_model_weights(target := net(1), tmp_path / name)
    assert same(target.state_dict(), state_of())


AMBIGUOUS = {
    "two networks": ({"net_a": state_of(0), "net_b": state_of(1)}, ["net_a", "net_b"]),
    "two prefixes": ({"state_dict": state_of(0, "model.") | state_of(1, "model_ema.module.")},
                     ["state_dict.model", "state_dict.model_ema"]),
    "student and teacher": ({"student": state_of(0), "teacher": state_of(1)}, ["student", "teacher"]),
    "encoders": (state_of(0, "encoder_q.") | state_of(1, "encoder_k."), ["encoder_q", "encoder_k"]),
}  # fmt: skip


@pytest.mark.parametrize("case", AMBIGUOUS)
def test_several_that_fit_are_listed_and_a_key_takes_each(tmp_path, case):
    content, names = AMBIGUOUS[case]
    torch.save(content, tmp_path / "file")
    with pytest.raises(UserError, match=r"several state dicts that fit \w+: .*tools/convert\.py .* --key") as told:
        load_model_weights(net(), tmp_path / "file")
    listed = re.search(r"fit \w+: (.*?);", str(told.value))[1].split(", ")
    assert len(listed) == 2 and all(a.startswith(b) for a, b in zip(listed, names))
    for seed, name in enumerate(listed):
        assert same(found_weights(tmp_path / "file", name)[0], state_of(seed)), name


def test_an_unknown_key_is_refused_with_those_that_there_are(tmp_path):
    torch.save({"net_a": state_of(), "net_b": state_of(1), "optimizer": optimizer_state()}, tmp_path / "file")
    with pytest.raises(UserError, match=r"no weights under 'net_c'; it holds net_a, net_b$"):
        found_weights(tmp_path / "file", "net_c")
    with pytest.raises(UserError, match=r"holds several state dicts: net_a, net_b; .*--key"):
        found_weights(tmp_path / "file")


def test_the_usual_key_is_taken_and_the_other_is_noted(tmp_path, capfd, caplog):
    caplog.set_level("INFO", "mdistiller")
    for usual, other in (("model", "model_ema"), ("state_dict", "state_dict_ema")):
        torch.save({other: state_of(1, "module."), usual: state_of()}, tmp_path / "file")
        load_model_weights(target := net(1), tmp_path / "file")
        assert same(target.state_dict(), state_of())
        assert f"also holds {other}" in caplog.text and "--key" in caplog.text
        assert same(found_weights(tmp_path / "file", other)[0], state_of(1))
        caplog.clear()


def test_what_lies_beside_the_network_is_noted(tmp_path, caplog):
    caplog.set_level("INFO", "mdistiller")
    beside = {"criterion.weight": torch.ones(3), "teacher.fc.weight": torch.ones(3), "model.total_ops": torch.ones(1)}
    torch.save({"state_dict": state_of(prefix="model.") | beside}, tmp_path / "file")
    load_model_weights(target := net(1), tmp_path / "file")
    assert same(target.state_dict(), state_of())
    assert "under model. are taken; criterion.weight, teacher.fc.weight left out" in caplog.text


def test_two_copies_of_the_same_weights_are_no_choice(tmp_path):
    torch.save({"best": state_of(), "last": state_of()}, tmp_path / "file")
    load_model_weights(target := net(1), tmp_path / "file")
    assert same(target.state_dict(), state_of())


def test_the_rules_for_our_own_files_stand(tmp_path, caplog):
    caplog.set_level("INFO", "mdistiller")
    whole = state_of(0, "student.") | state_of(1, "teacher.")
    save_checkpoint({"epoch": 1, "model": whole, "optimizer": {}, "ema": {"model": state_of(2)}}, tmp_path / "best")
    load_model_weights(target := net(3), tmp_path / "best")
    assert same(target.state_dict(), state_of()) and not caplog.text
    assert same(found_weights(tmp_path / "best", "teacher")[0], state_of(1))
    with pytest.raises(UserError, match="does not fit Linear: 2 missing"):
        load_model_weights(nn.Linear(8, 3), tmp_path / "best")


def test_a_network_whose_own_names_begin_alike_keeps_them(tmp_path):
    class Wrapped(nn.Module):
        def __init__(self, seed):
            super().__init__()
            self.model = net(seed)

    save_checkpoint({"model": Wrapped(0).state_dict()}, tmp_path / "ours")
    torch.save({"model": Wrapped(0).state_dict()}, tmp_path / "others")
    for name in ("ours", "others"):
        state, _ = found_weights(tmp_path / name)
        assert all(key.startswith("model.") for key in state) == (name == "ours")
        save_checkpoint({"model": state}, tmp_path / "converted")
        load_model_weights(target := Wrapped(1), tmp_path / "converted")
        assert same(target.state_dict(), Wrapped(0).state_dict())


@pytest.mark.parametrize("models", [cifar_model_dict, tiny_imagenet_model_dict, imagenet_model_dict])
def test_no_network_has_names_that_would_be_stripped(models):
    from mdistiller.engine.files.state_names import strip_module, without_attribute, without_counters

    with torch.device("meta"):
        for name in models:
            state = build_model(models, name, 100).state_dict()
            assert list(without_attribute(without_counters(strip_module(state)))) == list(state), name


def test_other_networks_are_still_refused(tmp_path):
    names = {"backbone.conv1.weight": torch.ones(1), "head.fc.weight": torch.ones(1)}
    cases = {
        "mmclassification": ({"meta": {}, "state_dict": names}, r"missing \(.*unknown \(backbone\.conv1\.weight"),
        "one more": (state_of(prefix="model.") | {"model.extra.weight": torch.ones(1)}, "1 unknown .extra.weight.$"),
        "one less": ({k: v for k, v in state_of(prefix="net.").items() if k != "net.fc.bias"}, "1 missing .fc.bias.$"),
        "classes": (({f"model.{k}": v for k, v in net(0, 5).state_dict().items()}), "has 5 classes, Sequential has 3"),
    }
    for name, (content, message) in cases.items():
        torch.save(content, tmp_path / name)
        with pytest.raises(UserError, match=f"{name} (does not fit Sequential: .*)?{message}"):
            load_model_weights(net(), tmp_path / name)


def program(path):
    torch.jit.trace(net().eval(), torch.ones(1, 3, 4, 4)).save(path)


def archive(path):
    torch.save(state_of(), path.with_name("resnet.pth"))
    with zipfile.ZipFile(path, "w") as packed:
        packed.write(path.with_name("resnet.pth"), "resnet.pth")


def tar(path):
    path.with_name("resnet.pth").write_bytes(b"0" * 100)
    with tarfile.open(path, "w") as packed:
        packed.add(path.with_name("resnet.pth"), "resnet.pth")


BAD = {
    "web page": (lambda path: path.write_text("\n<!DOCTYPE html><html><title>A warning</title></html>"), "a web page"),
    "git lfs": (lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\noid 0\n"), "git lfs pull"),
    "gzip": (lambda path: path.write_bytes(gzip.compress(b"0" * 1000)), "gzip; unpack it"),
    "zip": (archive, r"a zip archive of resnet\.pth; unpack"),
    "tar": (tar, "a tar archive; unpack"),
    "TorchScript": (program, r"TorchScript program.*state_dict\(\)"),
    "pickle": (lambda path: path.write_bytes(pickle.dumps({"a": np.ones(2)})), "a pickle that torch.save did not"),
    "NumPy": (lambda path: path.write_bytes(b"\x93NUMPY" + bytes(99)), "a NumPy array"),
    "JSON": (lambda path: path.write_text('{"a": 1}'), "a JSON text"),
    "text": (lambda path: path.write_text("404: Not Found"), "a text file"),
    "empty": (lambda path: path.write_bytes(b""), "an empty file"),
    "cut": (lambda path: path.write_bytes(save(state_of())[:-3]), r"is not a readable checkpoint \(damaged"),
    "noise": (lambda path: path.write_bytes(bytes(range(256)) * 9), r"is not a readable checkpoint \(damaged"),
    "arguments": (lambda path: torch.save(argparse.Namespace(a=1), path), "a saved argparse.Namespace"),
    "no weights": (lambda path: torch.save({"args": argparse.Namespace(a=1)}, path), "holds no network weights"),
    "folder": (lambda path: path.mkdir(), "which is a folder"),
}


@pytest.mark.parametrize("name", ["file.pth", "file.safetensors"])
@pytest.mark.parametrize("kind", BAD)
@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_a_file_of_another_kind_is_named_in_one_line(tmp_path, kind, name):
    write, message = BAD[kind]
    write(tmp_path / name)
    with pytest.raises(UserError, match=message) as told:
        load_model_weights(net(), tmp_path / name)
    assert name in str(told.value) and "\n" not in str(told.value)
    assert not re.search("weights_only|trust the source|safe_globals|torch.load", str(told.value))


class Runs:
    """Runs `function(*arguments)` where it is unpickled without care."""

    def __init__(self, function, *arguments):
        self.reduced = (function, arguments)

    def __reduce__(self):
        return self.reduced


def attacks() -> dict:
    return {
        "os.system": Runs(os.system, "touch executed"), "eval": Runs(eval, "open('executed', 'x')"),
        "exec": Runs(exec, "open('executed', 'x')"), "open": Runs(open, "executed", "x"),
        "Path": Runs(pathlib.Path.touch, pathlib.Path("executed")), "run": Runs(subprocess.run, ["touch", "executed"]),
        "Popen": Runs(subprocess.Popen, ["touch", "executed"]), "hub": Runs(torch.hub.load, "a/b", "c"),
        "NumPy": Runs(np.savetxt, "executed", [1.0]), "torch": Runs(torch.save, 1, "executed"),
        "tensor's method": Runs(getattr, torch.ones(1), "numpy"),
        "partial": functools.partial(os.system, "touch executed"),
        "our own": Runs(save_checkpoint, {}, "executed"), "map": Runs(list, Runs(map, os.system, ["touch executed"])),
    }  # fmt: skip


@pytest.mark.parametrize("options", [{}, OLD, PROTOCOL_4], ids=["zip", "old", "protocol 4"])
@pytest.mark.parametrize("attack", attacks())
def test_nothing_in_a_file_runs(tmp_path, monkeypatch, attack, options):
    monkeypatch.chdir(tmp_path)
    content = {"model": state_of(), "args": argparse.Namespace(a=attacks()[attack]), "b": argparse.Namespace()}
    torch.save(content, "file", **options)
    try:
        load_model_weights(net(), "file")
    except UserError as error:
        assert re.search("only tensors, arrays and plain values are read", str(error)), error
    assert os.listdir() == ["file"]


@pytest.mark.parametrize(
    "code",
    [
        b"ctorch._utils\n_rebuild_tensor_v2\n}V__defaults__\nI1\nsb.",  # sets an attribute of a function of torch
        b"ccollections\nOrderedDict\n(N}Vpop\nI1\nstb.",  # of a class
        b"cmine\nA\n)R}V_modules\n}V0\ncmine\nA\n)Rss\x62.",  # a module with a part that is none
    ],
)
def test_a_file_changes_nothing_that_outlives_it(tmp_path, code):
    before = torch._utils._rebuild_tensor_v2.__defaults__
    torch.save({"args": argparse.Namespace()}, tmp_path / "plain")
    with zipfile.ZipFile(tmp_path / "plain") as plain, zipfile.ZipFile(tmp_path / "file", "w") as evil:
        for name in plain.namelist():
            evil.writestr(name, code if name.endswith("data.pkl") else plain.read(name))
    with pytest.raises(UserError, match=r"file is not a readable checkpoint|holds no network weights|does not fit"):
        load_model_weights(net(), tmp_path / "file")
    assert torch._utils._rebuild_tensor_v2.__defaults__ == before and "pop" in vars(collections.OrderedDict)


def test_torch_may_be_told_to_read_nothing_but_weights(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "1")
    torch.save({"model": state_of()}, tmp_path / "file")
    load_model_weights(net(), tmp_path / "file")
    torch.save({"model": state_of(), "args": argparse.Namespace()}, tmp_path / "file")
    with pytest.raises(UserError, match="TORCH_FORCE_WEIGHTS_ONLY_LOAD forbids"):
        load_model_weights(net(), tmp_path / "file")


def test_a_stand_in_imports_no_module(tmp_path):
    (tmp_path / "sideeffect.py").write_text("open('executed', 'x')\nclass A: pass\n")
    write = (
        "import sys, torch; sys.path.insert(0, '.')\n"
        "import os, sideeffect; os.remove('executed')\n"
        "torch.save({'a': sideeffect.A(), 'net': {'fc.weight': torch.ones(1)}}, 'file')\n"
    )
    read = (
        "import sys; sys.path.insert(0, '.')\n"
        "from mdistiller.engine.files.checkpoint import load_checkpoint, model_state\n"
        "print(model_state(load_checkpoint('file'), 'file')); assert 'sideeffect' not in sys.modules\n"
    )
    for text in (write, read):
        subprocess.run([sys.executable, "-c", text], cwd=tmp_path, check=True, timeout=100,
                       env=os.environ | {"PYTHONPATH": str(REPOSITORY)})  # fmt: skip
    assert not (tmp_path / "executed").exists()


def test_model_state_and_load_state_go_together_as_before(tmp_path):
    torch.save({"epoch": 3, "model": state_of(prefix="module.student.")}, tmp_path / "file")
    load_state(target := net(1), model_state(load_checkpoint(tmp_path / "file"), "file"), "file")
    assert same(target.state_dict(), state_of())


class Made:
    """Unpickles as `function(*arguments)`, of which `state` is then set."""

    def __init__(self, function, *arguments, state=None):
        self.reduced = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self):
        return self.reduced


def nested(levels: int) -> list:
    """Lists of two lists each, which are the same one: short as a file, endless as text."""
    inner: list = []
    for _ in range(levels):
        inner = [inner, inner]
    return inner


def traps() -> dict:
    """What would crash, hang or fill the memory of a reader that makes it."""
    reconstruct = np.zeros(0).__reduce__()[0]
    pointers = Made(np.dtype, "O", False, True, state=(3, "|", None, None, None, -1, -1, 0))
    hexed: object = "a" * 64
    for _ in range(28):
        hexed = Made(codecs.encode, Made(codecs.encode, hexed, "hex"), "latin1")
    return {
        "addresses": Made(set, Made(reconstruct, np.ndarray, (0,), b"b", state=(1, (4,), pointers, False, b"A" * 32))),
        "endless text": Made(getattr, nested(60), "x"), "doubled text": hexed,
        "zeros": Made(bytearray, 6_000_000_000), "a large array": Made(np.ndarray, (6_000_000_000,)),
    }  # fmt: skip


LOADED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_AS, (6 * 2**30, 6 * 2**30))
from mdistiller.engine.files.checkpoint import load_checkpoint
from mdistiller.errors import UserError
for path in sys.argv[1:]:
    try:
        load_checkpoint(path)
    except UserError as error:
        assert "not a readable checkpoint" in str(error), error
print("all read")
"""


def test_no_file_crashes_hangs_or_fills_the_memory_of_its_reader(tmp_path):
    paths = []
    for name, trap in traps().items():
        paths.append(str(tmp_path / name))
        torch.save({"args": argparse.Namespace(), "trap": trap}, paths[-1], pickle_protocol=4)
    command = [sys.executable, "-c", LOADED, *paths]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "all read\n"), done.stderr


class PicklesAsPython2(pickle._Pickler):
    """Writes bytes as Python 2 wrote its text."""

    dispatch = dict(pickle._Pickler.dispatch)

    def save_bytes(self, value):
        self.write(pickle.BINSTRING + len(value).to_bytes(4, "little") + value)
        self.memoize(value)

    dispatch[bytes] = save_bytes


def test_arrays_of_numbers_are_read_and_those_of_objects_left_out(tmp_path):
    content = {
        "numbers": np.arange(6, dtype=np.float32).reshape(2, 3).T, "scalar": np.int64(3), "text": np.array(["ab", "c"]),
        "objects": np.array([{}, None]), "defaults": collections.defaultdict(functools.partial(list, ()), {"a": 1}),
        "none": argparse.Namespace(),
    }  # fmt: skip
    torch.save(content, tmp_path / "new")
    with (tmp_path / "old").open("wb") as file:
        PicklesAsPython2(file, protocol=2).dump({"numbers": content["numbers"]})
    with (tmp_path / "old").open("rb") as file:
        old = inert_pickle.load(file, encoding="latin1")
    read = load_checkpoint(tmp_path / "new")
    for found in (old["numbers"], read["numbers"]):
        np.testing.assert_array_equal(found, content["numbers"])
    assert read["scalar"] == 3 and read["text"].tolist() == ["ab", "c"] and read["defaults"] == {"a": 1}
    assert read["objects"].size == 0
