"""Conditions: what a sample is asked to be."""

from torch import Tensor

from mezzotint.conditions.classes import class_labels, parse_classes, split_classes
from mezzotint.conditions.imagenet import imagenet_class_names
from mezzotint.conditions.text import Text

Condition = Tensor | Text
"""Of a batch: class labels int64 (B,), or captions."""

__all__ = ["Condition", "Text", "class_labels", "imagenet_class_names", "parse_classes", "split_classes"]
