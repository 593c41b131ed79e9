"""Conditions: what a sample is asked to be."""

from mezzotint.conditions.classes import class_labels, parse_classes
from mezzotint.conditions.imagenet import imagenet_class_names

__all__ = ["class_labels", "imagenet_class_names", "parse_classes"]
