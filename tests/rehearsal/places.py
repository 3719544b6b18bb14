"""Every place of the package where the host waits for the GPU, and why it may. A place is a file and a function.

A wait stops the host until the GPU has done all its work, so a step has none, but for those in `STEP`.
"""

_ENGINE, _TEACHER = "mdistiller/engine", "mdistiller/engine/teacher"
_POLICIES = "mdistiller/dataset/policies.py _changed"

# At the start of an epoch, where the teacher's outputs are kept in the device's memory.
_ROWS = {
    f"{_TEACHER}/row_table.py missing": "learns which rows of the epoch are not known",
    f"{_TEACHER}/device_cache.py _read": "looks whether the files have them",
    f"{_TEACHER}/device_cache.py _write": "writes those that were computed to the files",
}

# Once a run, up to the end of its second step.
START = {
    f"{_ENGINE}/runtime/device.py pick_device": "tries the device",
    f"{_ENGINE}/placing.py placed": "moves the networks",
    "mdistiller/dataset/in_memory.py to": "moves the images and their normalisation",
    "mdistiller/dataset/in_memory.py fingerprint": "digests the images, for the teacher cache",
    f"{_TEACHER}/fast_teacher.py _example": "makes an image to try the teacher's copy with",
    f"{_TEACHER}/original.py _sums": "sums the frozen weights, to see changes of them",
    f"{_TEACHER}/fold_batchnorm.py _same_function": "compares the teacher's copy with the teacher on the CPU",
    f"{_ENGINE}/files/checksum.py tensors_digest": "digests the teacher's weights",
    "mdistiller/distillers/contract.py check_scores": "makes an image to compare them with",
    "mdistiller/distillers/contract.py check_scored": "compares scored and deployed logits",
    "mdistiller/dataset/labels.py check_labels": "checks the labels of the first batch",
    f"{_ENGINE}/parts.py _check_images": "looks for images that are not normalised",
    f"{_ENGINE}/parts.py _check_index": "checks the indices of the first batch",
    "mdistiller/models/returned.py check_output": "looks for NaN in the networks' logits",
    "mdistiller/distillers/CRD.py z_known": "reads whether a batch has set the normalising constants",
    f"{_ENGINE}/kept_buffers.py learn": "sees which buffers the first step has changed",
    f"{_ENGINE}/scores.py evaluate": "scores the teacher (DISTILLER.SCORE_TEACHER)",
    **_ROWS,
}

# As often in every epoch, however many steps it has.
EPOCH = {
    f"{_TEACHER}/original.py _sums": "in the first two steps: sums the frozen weights, to see changes of them",
    f"{_ENGINE}/nan_watch.py check": "reads the losses of the steps since the last reading",
    f"{_ENGINE}/meters.py over": "reads the number of images of all ranks",
    f"{_ENGINE}/meters.py means": "reads the epoch's means",
    f"{_ENGINE}/scores.py evaluate": "reads each head's score",
    f"{_ENGINE}/trainer.py _own_metrics": "reads what the method logs, such as CTKD's temperature",
    "mdistiller/models/tensor_groups.py all_finite": "looks for NaN in what is saved",
    f"{_ENGINE}/files/checkpoint.py save_checkpoint": "saves",
    f"{_ENGINE}/update.py state_dict": "reads fp16's scale, to save it",
    f"{_ENGINE}/ema.py updates": "reads the number of updates, to save it",
    **_ROWS,
}

# In every step, by the mode or method that needs it.
STEP = {
    "steps skipped at NaN": {f"{_ENGINE}/nan_watch.py drops": "decides whether the step counts"},
    "steps skipped in fp16": {f"{_ENGINE}/update.py skip": "reads the scale of a step that is skipped"},
    "fp16": {f"{_ENGINE}/update.py step": "SGD is not fused, and the host sees whether the step may be taken"},
    "teacher cache in files": {
        f"{_TEACHER}/file_cache.py look_up": "the host looks the rows up in a file",
        f"{_TEACHER}/file_cache.py __call__": "the host reads the rows from a file, and writes them to it",
    },
    "RandAugment": {_POLICIES: "torchvision copies the constants of its operations to the device"},
    "TrivialAugment": {_POLICIES: "torchvision copies the constants of its operations to the device"},
    "KDSVD": {"mdistiller/distillers/KDSVD.py _eigenvectors": "torch.linalg.eigh waits, to check its solver's result"},
    # Every so many steps, as the settings say.
    "losses read": {f"{_ENGINE}/nan_watch.py check": "NAN_POLICY stop reads them every 50 steps"},
    "steps logged": {
        f"{_ENGINE}/meters.py over": "every LOG.TENSORBOARD_FREQ steps",
        f"{_ENGINE}/meters.py means": "every LOG.TENSORBOARD_FREQ steps",
    },
    "progress bar": {f"{_ENGINE}/meters.py means": "every second, on a terminal"},
    "saving within epochs": {
        f"{_ENGINE}/nan_watch.py check": "before what is saved, every LOG.SAVE_CHECKPOINT_ITERS steps",
        f"{_ENGINE}/meters.py over": "sums over the ranks what is saved",
        "mdistiller/models/tensor_groups.py all_finite": "looks for NaN in what is saved",
        f"{_ENGINE}/files/checkpoint.py save_checkpoint": "saves every LOG.SAVE_CHECKPOINT_ITERS steps",
    },
}
