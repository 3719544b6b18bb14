"""CIFAR-100's 20 super-classes, and the groups of them that were published with DCGD."""

from __future__ import annotations

# Super-class of each of the 100 classes, both numbered as in the data set (its "coarse_labels").
# fmt: off
SUPERCLASS = [
    4, 1, 14, 8, 0, 6, 7, 7, 18, 3, 3, 14, 9, 18, 7, 11, 3, 9, 7, 11, 6, 11, 5, 10, 7,
    6, 13, 15, 3, 15, 0, 11, 1, 10, 12, 14, 16, 9, 11, 5, 5, 19, 8, 8, 15, 13, 14, 17, 18, 10,
    16, 4, 17, 4, 2, 0, 17, 4, 18, 17, 10, 3, 2, 12, 12, 16, 12, 1, 9, 19, 2, 10, 0, 1, 16,
    12, 9, 13, 15, 13, 16, 19, 2, 4, 6, 19, 5, 5, 8, 19, 18, 1, 2, 15, 6, 0, 17, 8, 14, 13,
]
# fmt: on
SUPERCLASS_NAMES = [
    "aquatic mammals",
    "fish",
    "flowers",
    "food containers",
    "fruit and vegetables",
    "household electrical devices",
    "household furniture",
    "insects",
    "large carnivores",
    "large man-made outdoor things",
    "large natural outdoor scenes",
    "large omnivores and herbivores",
    "medium-sized mammals",
    "non-insect invertebrates",
    "people",
    "reptiles",
    "small mammals",
    "trees",
    "vehicles 1",
    "vehicles 2",
]

_RESNET = [[9, 18, 19], [10, 17], [2, 4, 7, 13, 15], [3, 5, 6], [0, 1, 8, 11, 12, 14, 16]]
# Groups of super-classes by teacher, as published: they come from the teachers' mistakes on the test images.
PUBLISHED = {
    "res56": _RESNET,
    "res110": _RESNET,
    "wrn_40_2": [[9, 18, 19], [2, 4, 7, 10, 13, 17], [3, 5, 6], [0, 1, 15], [8, 11, 12, 14, 16]],
}
