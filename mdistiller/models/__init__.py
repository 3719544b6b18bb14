"""The networks, by data set and name."""

from .build import build_model, teacher_checkpoint
from .cifar import cifar_model_dict, tiny_imagenet_model_dict
from .grouped import GroupedStudent, published_students
from .imagenet import imagenet_model_dict

cifar_model_dict.update(published_students)

__all__ = [
    "GroupedStudent",
    "build_model",
    "cifar_model_dict",
    "imagenet_model_dict",
    "teacher_checkpoint",
    "tiny_imagenet_model_dict",
]
