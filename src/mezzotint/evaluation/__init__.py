"""How good samples are: distances between feature sets, and an independent judge of their class."""

from mezzotint.evaluation.classifier import Classifier
from mezzotint.evaluation.frechet import frechet_distance, frechet_distance_from_statistics
from mezzotint.evaluation.manifold import precision_recall

__all__ = ["Classifier", "frechet_distance", "frechet_distance_from_statistics", "precision_recall"]
