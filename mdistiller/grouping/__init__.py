"""Which classes belong together: DCGD's grouping of the classes that a teacher confuses."""

from .algorithm import count_confusions, expand, group_by_confusion, merge_classes, similarity
from .class_distances import class_distances, load_distances, save_distances
from .cross_predict import cross_predict
from .files import check_groups, load_groups, published_groups, save_groups
from .picture import draw_confusion

__all__ = [
    "check_groups",
    "class_distances",
    "count_confusions",
    "cross_predict",
    "draw_confusion",
    "expand",
    "group_by_confusion",
    "load_distances",
    "load_groups",
    "merge_classes",
    "published_groups",
    "save_distances",
    "save_groups",
    "similarity",
]
