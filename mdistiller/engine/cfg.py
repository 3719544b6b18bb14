"""The configuration tree `CFG`: every setting with its default, and how YAML files and overrides change it.

This file defines the engine's settings. Each method defines its hyper-parameters in its own file under `distillers/`;
`method_defaults` adds them to the tree, `method_ranges` their allowed values. A method that defines none there may add
its section here: `CFG.MYKD = CN()`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from yacs.config import CfgNode as CN

from ..distillers import distiller_dict, method_defaults, method_ranges
from ..errors import UserError
from ..paths import expanded, find_file
from ..ranges import NOT_NEGATIVE, PATH, POSITIVE, TEXT, WHOLE, Range, interval, list_of, one_of, whole
from ..user_files import read_yaml
from .overrides import merge, override_pairs, setting, shown
from .utils import log_msg


class Settings(CN):
    """The whole tree. Scripts of the original read their YAML files into it by `merge_from_file`."""

    def merge_from_file(self, cfg_filename: str) -> None:
        """As in yacs, but a key that stands twice is refused."""
        if not str(cfg_filename).endswith(".py"):  # which yacs runs
            read_config(cfg_filename)
        super().merge_from_file(cfg_filename)

    @classmethod
    def _decode_cfg_value(cls, value: Any) -> Any:
        return CN._decode_cfg_value(value)  # the sections are plain nodes, and yacs merges one class into the same


CFG = Settings()

CFG.EXPERIMENT = CN()
# The run's folder is LOG.PREFIX/PROJECT/NAME (TAG if NAME is empty), with `KEY:VALUE` of the overrides that can change
# the result appended to the name. PROJECT is also the wandb project; TAG, split at commas, gives the wandb tags.
CFG.EXPERIMENT.PROJECT = "distill"
CFG.EXPERIMENT.NAME = ""
CFG.EXPERIMENT.TAG = "default"
# Seed of every random draw of a run: initialisation, data order, augmentation, CRD's negatives.
CFG.EXPERIMENT.SEED = 0
# "auto": CUDA if available, else the CPU. Otherwise a torch device, such as "cpu" or "cuda:1".
CFG.EXPERIMENT.DEVICE = "auto"
# On a GPU, use only deterministic kernels, which are slower. The CPU's kernels are always deterministic. In a table,
# the run keeps the number of CPU threads that it has alone.
CFG.EXPERIMENT.DETERMINISTIC = False
# Standardise the logits of both networks before they are softened, as in arXiv 2403.01427; for the methods with soft
# labels.
CFG.EXPERIMENT.LOGIT_STAND = False

CFG.DATASET = CN()
# "digits", "cifar100", "tiny_imagenet" or "imagenet"; "folder" (class folders of your own), "images" (images without
# labels), "torchvision/NAME", "hf" or "hf/NAME" (Hugging Face datasets).
CFG.DATASET.TYPE = "cifar100"
# The folder that contains the folders cifar-100-python, tiny-imagenet-200 and imagenet; for "folder" and "images", that
# of the images, for "hf" the saved data set.
CFG.DATASET.ROOT = "./data"
# For "folder": the folders of the training and of the validation images, relative to ROOT. Empty: train, and val or
# test. For "hf" and "torchvision/NAME": their splits, such as "train+validation". Empty: the usual ones.
CFG.DATASET.TRAIN = ""
CFG.DATASET.VAL = ""
# For "hf": the columns of images and labels. Empty: found by their types.
CFG.DATASET.IMAGE_COLUMN = ""
CFG.DATASET.LABEL_COLUMN = ""
# For data of any size and any classes. The number of classes; 0: as the data tells.
CFG.DATASET.NUM_CLASSES = 0
# Height and width of the images that the student sees; 0: those that it was made for.
CFG.DATASET.IMAGE_SIZE = 0
# By which the images are normalised, one number a channel, of values in [0, 1]; empty: the student's own.
CFG.DATASET.MEAN = []
CFG.DATASET.STD = []
# Decode the images once and keep them in memory if they take at most this much, in GiB; else workers read them.
CFG.DATASET.MEMORY_GIB = 4.0
# Augmentation of the training images: "crop_flip", "resized_crop", "randaugment", "trivialaugment", "fixmatch"; empty:
# the data set's own.
CFG.DATASET.AUGMENT = ""
# Parameter of the Beta distribution from which the share of a mixed image is drawn; 0: no mixing.
CFG.DATASET.MIXUP = 0.0
CFG.DATASET.CUTMIX = 0.0
# Probability with which a rectangle of an image is erased.
CFG.DATASET.ERASING = 0.0
# Processes that read training images, for all ranks on a machine together; 0: the training processes read them. A rank
# starts NUM_WORKERS / (ranks on its machine), at least one and at most the CPUs that it may use, and a quarter as many,
# at least one, for validation. Data sets held in memory ignore this.
CFG.DATASET.NUM_WORKERS = 2
# Train on this fraction of the training images of every class; the choice does not depend on the seed.
CFG.DATASET.TRAIN_FRACTION = 1.0
# Hold out this fraction of the training images of every class and validate on them instead of on the test set.
CFG.DATASET.VAL_FRACTION = 0.0
# Skip image files that cannot be read, and warn with their number, instead of stopping at the first one.
CFG.DATASET.SKIP_BROKEN = False
CFG.DATASET.TEST = CN()
# Images of one validation batch.
CFG.DATASET.TEST.BATCH_SIZE = 64

CFG.DISTILLER = CN()
# The method, such as "KD"; "NONE" trains the student without a teacher.
CFG.DISTILLER.TYPE = "NONE"
# The teacher network: the name of one in mdistiller/models for the data set; or timm/NAME, torchvision/NAME,
# hf-hub:USER/REPO or path/to/file.py:FUNCTION.
CFG.DISTILLER.TEACHER = "ResNet50"
# The teacher's checkpoint file; empty: the published one under download_ckpts, for ImageNet torchvision's weights.
CFG.DISTILLER.TEACHER_CKPT = ""
# Without TEACHER_CKPT: the teacher has the weights that its source publishes.
CFG.DISTILLER.TEACHER_PRETRAINED = True
# The modules of a teacher of another library whose outputs are its feature maps, from shallow to deep, such as
# [layer1, layer2]. Empty: found.
CFG.DISTILLER.TEACHER_FEATS = []
# Height and width to which images are resized for the teacher; 0: it sees them as the student does.
CFG.DISTILLER.TEACHER_SIZE = 0
# Score the teacher on the validation images at the start of a new run, and warn if it is no better than chance.
CFG.DISTILLER.SCORE_TEACHER = False
# The student network, likewise.
CFG.DISTILLER.STUDENT = "resnet32"
# The checkpoint from which the student starts, with a new head where that of the file has another number of classes;
# empty: random weights.
CFG.DISTILLER.STUDENT_CKPT = ""
# Without STUDENT_CKPT: the student starts from the weights that its source publishes.
CFG.DISTILLER.STUDENT_PRETRAINED = False
CFG.DISTILLER.STUDENT_FEATS = []
# For methods that compare feature maps: which, as [[student's map, teacher's map], ...], counted from 0 (the stem's),
# from shallow to deep, such as [[1, 1], [2, 3]]. Empty: the teacher's stages, paired from the deepest up.
CFG.DISTILLER.PAIRS = []
# Folder in which the teacher's outputs are stored, to be reused within the run and by later runs; empty: no cache.
CFG.DISTILLER.TEACHER_CACHE = ""
# Precision of the stored outputs: "fp16" or "fp32".
CFG.DISTILLER.TEACHER_CACHE_DTYPE = "fp16"
# Largest size of one teacher's outputs on one data set, in GiB; outputs that do not fit on disk are recomputed.
CFG.DISTILLER.TEACHER_CACHE_GIB = 8.0
# Where steps read the stored outputs: "host", from the files; "device", from the memory of the training device, or
# refuse to start where they do not fit; "auto", on a GPU from its memory if half of what is free is enough, else from
# the files. With "device" and no TEACHER_CACHE, they are kept for this run alone.
CFG.DISTILLER.TEACHER_CACHE_DEVICE = "auto"

CFG.SOLVER = CN()
# "base"; "dot": distillation-oriented training (DOT); "deepkd": DeepKD, over KD and DKD; "aligned": the distillation
# gradient loses what points against the task gradient. "crd" and "crd_dot", the original's names, are base and dot.
CFG.SOLVER.TRAINER = "base"
# Images of one optimizer step, over all devices and all micro-batches (ACCUMULATE) together.
CFG.SOLVER.BATCH_SIZE = 64
CFG.SOLVER.EPOCHS = 240
CFG.SOLVER.LR = 0.05
# LR_SCHEDULE "step": after each of these epochs the learning rate is multiplied by LR_DECAY_RATE.
CFG.SOLVER.LR_DECAY_STAGES = [150, 180, 210]
CFG.SOLVER.LR_DECAY_RATE = 0.1
CFG.SOLVER.WEIGHT_DECAY = 0.0001
CFG.SOLVER.MOMENTUM = 0.9
# The optimizer: "SGD", which uses MOMENTUM, or "AdamW", which uses BETAS. The trainers "dot" and "deepkd" support
# SGD only.
CFG.SOLVER.TYPE = "SGD"
CFG.SOLVER.BETAS = [0.9, 0.999]
CFG.SOLVER.DOT = CN()
# DOT's momentum is MOMENTUM - DELTA for the task gradient and MOMENTUM + DELTA for the distillation gradient.
CFG.SOLVER.DOT.DELTA = 0.075
CFG.SOLVER.DEEPKD = CN()
# DeepKD's momentum is MOMENTUM plus DELTA_TOG for the task gradient, plus DELTA_TCG for that of the target part of the
# distillation loss, and plus DELTA_NCG for that of its non-target part. The paper's: 0.05 for DELTA_NCG over DKD.
CFG.SOLVER.DEEPKD.DELTA_TOG = 0.075
CFG.SOLVER.DEEPKD.DELTA_TCG = -0.075
CFG.SOLVER.DEEPKD.DELTA_NCG = 0.075
# The non-target part is over the teacher's TOPK largest classes alone; 0: over all.
CFG.SOLVER.DEEPKD.TOPK = 0
# As the released code: the task gradient has the momentum of the target part's, and DELTA_TOG no effect.
CFG.SOLVER.DEEPKD.RELEASED = False
# "step" (see LR_DECAY_STAGES), or "cosine": from LR after the warm-up to LR_MIN at the end of the last epoch.
CFG.SOLVER.LR_SCHEDULE = "step"
CFG.SOLVER.LR_MIN = 0.0
# In the first WARMUP_EPOCHS epochs the schedule's learning rate is multiplied by a factor that rises step by step from
# near 0 to 1.
CFG.SOLVER.WARMUP_EPOCHS = 0
# Half precision: "none"; "bf16" or "fp16" (with loss scaling); for the teacher only: "bf16-teacher", "fp16-teacher".
CFG.SOLVER.AMP = "none"
# Share of the label that is spread over all classes, in the cross-entropy with the labels.
CFG.SOLVER.LABEL_SMOOTHING = 0.0
# Compile student, teacher and loss with torch.compile.
CFG.SOLVER.COMPILE = False
# On a GPU, record the whole step of a full batch as one CUDA graph, and replay it: "auto", where method and settings
# allow it; "always", or refuse the run; "never".
CFG.SOLVER.CUDA_GRAPH = "auto"
# Keep images and weights in PyTorch's memory format channels_last (NHWC).
CFG.SOLVER.CHANNELS_LAST = True
# Clip the gradients to this L2 norm, taken over all parameters together; 0: no clipping.
CFG.SOLVER.CLIP_GRAD_NORM = 0.0
# Decay of the exponential moving average (EMA) of the student's weights, such as 0.999; the averaged student is
# validated and saved in addition to the student. 0: no EMA.
CFG.SOLVER.EMA = 0.0
# Split each batch into this many micro-batches and sum their gradients: less memory, the same step.
CFG.SOLVER.ACCUMULATE = 1
# Compute BatchNorm's statistics over the images of all devices.
CFG.SOLVER.SYNC_BN = False
# If a loss is NaN or infinite: "stop" the run, or "skip" the step, at most NAN_LIMIT times in a row.
CFG.SOLVER.NAN_POLICY = "stop"
CFG.SOLVER.NAN_LIMIT = 10

CFG.LOG = CN()
# Log metrics to TensorBoard and wandb every this many steps of an epoch.
CFG.LOG.TENSORBOARD_FREQ = 500
# Save the checkpoints `epoch_N` and `student_N` every this many epochs.
CFG.LOG.SAVE_CHECKPOINT_FREQ = 40
# Write `latest` also every this many steps of an epoch; 0: only at the end of each epoch.
CFG.LOG.SAVE_CHECKPOINT_ITERS = 0
# Keep only this many of the newest `epoch_N` and `student_N`; 0: keep all of them.
CFG.LOG.KEEP_CHECKPOINTS = 0
# If a checkpoint cannot be written: "stop" the run, or "continue" training to the next save.
CFG.LOG.SAVE_ERROR = "stop"
# The folder of all runs.
CFG.LOG.PREFIX = "./output"
# Log to wandb: online if you are logged in, else offline into the run's folder.
CFG.LOG.WANDB = True

for section, defaults in method_defaults.items():
    CFG[section] = defaults.clone()


def load_cfg(path: str | Path, overrides: Sequence[str] = ()) -> CN:
    """The configuration of a run: `CFG`, changed by the YAML file at `path`, then by `KEY VALUE` overrides.

    An int is accepted where the default is a float, and a float where the default happens to be an int. Where the
    default is None, any plain value is accepted, see `overrides.merge`.

    Args:
        path: relative to the current folder, or the name of a shipped file, such as configs/digits/kd.yaml.
        overrides: ["SOLVER.LR", "0.1", ...].

    Raises:
        UserError: no such file, not a YAML mapping, an unknown key, a value of the wrong type or range.
    """
    trees = [read_config(path)]
    for key, value in override_pairs(overrides):
        trees.append(nested(key, value))
    return cfg_of(trees)


def nested(key: str, value: Any) -> dict[str, Any]:
    """The setting `key`, such as "SOLVER.LR", as a tree: {"SOLVER": {"LR": value}}."""
    for part in reversed(key.split(".")):
        value = {part: value}
    return value  # type: ignore[no-any-return]


def cfg_of(trees: Iterable[dict[str, Any]]) -> CN:
    """`CFG`, changed by the settings of each of `trees` in turn; see `load_cfg`."""
    cfg = CFG.clone()
    for tree in trees:
        merge(cfg, tree, CFG)
    _expand_paths(cfg)
    check_cfg(cfg)
    cfg.freeze()
    return cfg


def settings_for(dataset: str, data_root: str | None = None, model: str | None = None) -> CN:
    """The settings of a command that names data set, folder and network, but has no configuration; see `info_of`.

    Args:
        dataset: as DATASET.TYPE.
        data_root: as DATASET.ROOT; None: the default.
        model: the network that sees the images, as DISTILLER.STUDENT; None: the default.
    """
    cfg = CFG.clone()
    cfg.DATASET.TYPE = dataset
    cfg.DATASET.ROOT = expanded(data_root or cfg.DATASET.ROOT)
    cfg.DISTILLER.STUDENT = model or cfg.DISTILLER.STUDENT
    cfg.freeze()
    return cfg


def elsewhere(cfg: CN, data_root: str) -> CN:
    """The configuration of a run with its data in another folder, laid out as usual."""
    own = cfg.clone()
    own.defrost()
    own.DATASET.ROOT, own.DATASET.TRAIN, own.DATASET.VAL = expanded(data_root), "", ""
    own.freeze()
    return own


def show_cfg(cfg: CN) -> None:
    """Print `cfg_text` in the original's form."""
    print(log_msg(f"CONFIG:\n{cfg_text(cfg)}", "INFO"))


def cfg_text(cfg: CN) -> str:
    """The configuration as YAML, without the sections of the methods that this run does not use."""
    used = cfg.clone()
    used.defrost()
    for section in method_defaults.keys() - distiller_dict[cfg.DISTILLER.TYPE].config_sections(cfg):
        del used[section]
    return used.dump()


def read_config(path: str | Path) -> dict[str, Any]:
    """The settings in the YAML file at `path`, which is searched for as `load_cfg` does.

    Raises:
        UserError: no such file, not a YAML mapping, or a key stands twice.
    """
    path = find_file(path) or Path(path)
    tree = read_yaml(path, "config", "configs/ holds the published ones")
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise UserError(f"config {path} holds a {type(tree).__name__}, not sections such as SOLVER: and DISTILLER:")
    return tree


def _expand_paths(node: CN, above: str = "") -> None:
    """Expand `~` in every setting that is text, of the engine and of the methods, but for the names in EXPERIMENT.

    Raises:
        UserError: names the setting; see `expanded`.
    """
    for key, value in node.items():
        name = f"{above}{key}"
        if isinstance(value, CN) and name != "EXPERIMENT":
            _expand_paths(value, f"{name}.")
        elif isinstance(value, str):
            try:
                node[key] = expanded(value)
            except UserError as error:
                raise UserError(f"{name}: {error}") from None


# Of a method's setting without another limit: its square must fit into a float32.
_LARGEST = 1e18
_PATHS = (
    "DATASET.ROOT", "DATASET.TRAIN", "DATASET.VAL", "DISTILLER.TEACHER_CKPT", "DISTILLER.STUDENT_CKPT",
    "DISTILLER.TEACHER_CACHE", "LOG.PREFIX",
)  # fmt: skip
_CHANNELS = list_of(NOT_NEGATIVE)
# The engine's settings and their allowed values; `method_ranges` has those of the methods.
_RANGES: dict[str, Range] = {
    "EXPERIMENT.SEED": Range("a whole number from 0 to 2**63 - 1", lambda v: whole(0).holds(v) and v < 2**63, 2**63),
    **dict.fromkeys(_PATHS, PATH),
    "DATASET.NUM_CLASSES": whole(0),
    "DATASET.IMAGE_SIZE": whole(0),
    "DATASET.MEAN": _CHANNELS,
    "DATASET.STD": _CHANNELS,
    "DATASET.MEMORY_GIB": NOT_NEGATIVE,
    "DATASET.AUGMENT": one_of("", "crop_flip", "resized_crop", "randaugment", "trivialaugment", "fixmatch"),
    "DATASET.MIXUP": NOT_NEGATIVE,
    "DATASET.CUTMIX": NOT_NEGATIVE,
    "DATASET.ERASING": interval(0, 1, "[]"),
    "DATASET.NUM_WORKERS": whole(0),
    "DATASET.TRAIN_FRACTION": interval(0, 1, "(]"),
    "DATASET.VAL_FRACTION": interval(0, 1, "[)"),
    "DATASET.TEST.BATCH_SIZE": whole(1),
    "SOLVER.BATCH_SIZE": whole(1),
    "SOLVER.EPOCHS": whole(1),
    "DISTILLER.PAIRS": list_of(list_of(WHOLE, 2)),
    "DISTILLER.TEACHER_FEATS": list_of(TEXT),
    "DISTILLER.STUDENT_FEATS": list_of(TEXT),
    "DISTILLER.TEACHER_SIZE": whole(0),
    "SOLVER.LABEL_SMOOTHING": interval(0, 1, "[)"),
    "DISTILLER.TEACHER_CACHE_DTYPE": one_of("fp16", "fp32"),
    "DISTILLER.TEACHER_CACHE_GIB": POSITIVE,
    "DISTILLER.TEACHER_CACHE_DEVICE": one_of("auto", "device", "host"),
    "SOLVER.LR": POSITIVE,
    "SOLVER.LR_DECAY_STAGES": list_of(NOT_NEGATIVE),
    "SOLVER.LR_DECAY_RATE": POSITIVE,
    "SOLVER.LR_SCHEDULE": one_of("step", "cosine"),
    "SOLVER.LR_MIN": NOT_NEGATIVE,
    "SOLVER.WARMUP_EPOCHS": whole(0),
    "SOLVER.AMP": one_of("none", "bf16", "fp16", "bf16-teacher", "fp16-teacher"),
    "SOLVER.CUDA_GRAPH": one_of("auto", "always", "never"),
    "SOLVER.CLIP_GRAD_NORM": NOT_NEGATIVE,
    "SOLVER.EMA": interval(0, 1, "[)"),
    "SOLVER.ACCUMULATE": whole(1),
    "SOLVER.NAN_POLICY": one_of("stop", "skip"),
    "SOLVER.NAN_LIMIT": whole(1),
    "SOLVER.BETAS": replace(list_of(interval(0, 1, "[)"), 2), words="two numbers in [0, 1)"),
    "SOLVER.WEIGHT_DECAY": NOT_NEGATIVE,
    "SOLVER.MOMENTUM": interval(0, 1, "[)"),
    "SOLVER.DOT.DELTA": interval(-1, 1, "()"),
    "SOLVER.DEEPKD.DELTA_TOG": interval(-1, 1, "()"),
    "SOLVER.DEEPKD.DELTA_TCG": interval(-1, 1, "()"),
    "SOLVER.DEEPKD.DELTA_NCG": interval(-1, 1, "()"),
    "SOLVER.DEEPKD.TOPK": whole(0),
    "LOG.TENSORBOARD_FREQ": whole(1),
    "LOG.SAVE_CHECKPOINT_FREQ": whole(1),
    "LOG.SAVE_CHECKPOINT_ITERS": whole(0),
    "LOG.KEEP_CHECKPOINTS": whole(0),
    "LOG.SAVE_ERROR": one_of("stop", "continue"),
}


def check_cfg(cfg: CN) -> None:
    """Refuse values out of range, of the engine's settings and of the methods'.

    Raises:
        UserError: naming the key, the value and the allowed values.
    """
    # A method may be registered after the tree was built; its section is then not in it.
    of_methods = {section: ranges for section, ranges in method_ranges.items() if section in cfg}
    ranges = _RANGES | {f"{section}.{key}": of[key] for section, of in of_methods.items() for key in of}
    for key, allowed in ranges.items():
        value = setting(cfg, key)
        expected = allowed.refused(value) if key in _RANGES else allowed.refused(value, _LARGEST)
        if expected:
            raise UserError(f"{key} must be {expected}, not {shown(value)}")
