"""Conditions: what a sample is asked to be."""

from mezzotint.conditions.classes import class_labels, parse_classes

__all__ = ["class_labels", "parse_classes"]
