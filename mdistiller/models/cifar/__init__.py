"""Networks for 32x32 and 64x64 images: {name: (constructor, file of the published teacher or None)}."""

from ...registry import Registry
from ..build import default_checkpoint
from .mobilenetv2 import mobile_half
from .mv2_tinyimagenet import mobilenetv2_tinyimagenet
from .resnet import resnet8, resnet8x4, resnet14, resnet20, resnet32, resnet32x4, resnet44, resnet56, resnet110
from .resnetv2 import ResNet18, ResNet50
from .ShuffleNetv1 import ShuffleV1
from .ShuffleNetv2 import ShuffleV2
from .vgg import vgg8, vgg11, vgg13, vgg16, vgg19
from .wrn import wrn_16_1, wrn_16_2, wrn_40_1, wrn_40_2


def _teacher(name: str) -> str:
    return default_checkpoint(f"cifar_teachers/{name}_vanilla/ckpt_epoch_240.pth")


cifar_model_dict = Registry(
    "CIFAR model",
    {
        "resnet56": (resnet56, _teacher("resnet56")),
        "resnet110": (resnet110, _teacher("resnet110")),
        "resnet32x4": (resnet32x4, _teacher("resnet32x4")),
        "ResNet50": (ResNet50, _teacher("ResNet50")),
        "wrn_40_2": (wrn_40_2, _teacher("wrn_40_2")),
        "vgg13": (vgg13, _teacher("vgg13")),
        "resnet8": (resnet8, None),
        "resnet14": (resnet14, None),
        "resnet20": (resnet20, None),
        "resnet32": (resnet32, None),
        "resnet44": (resnet44, None),
        "resnet8x4": (resnet8x4, None),
        "ResNet18": (ResNet18, None),
        "wrn_16_1": (wrn_16_1, None),
        "wrn_16_2": (wrn_16_2, None),
        "wrn_40_1": (wrn_40_1, None),
        "vgg8": (vgg8, None),
        "vgg11": (vgg11, None),
        "vgg16": (vgg16, None),
        "vgg19": (vgg19, None),
        "MobileNetV2": (mobile_half, None),
        "ShuffleV1": (ShuffleV1, None),
        "ShuffleV2": (ShuffleV2, None),
    },
)

tiny_imagenet_model_dict = Registry(
    "Tiny-ImageNet model",
    {
        "ResNet18": (ResNet18, default_checkpoint("tiny_imagenet_teachers/ResNet18_vanilla/ti_res18")),
        "MobileNetV2": (mobilenetv2_tinyimagenet, None),
        "ShuffleV2": (ShuffleV2, None),
    },
)
