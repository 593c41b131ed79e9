"""How good images are: distances between feature sets, the networks that make features, and an independent judge."""

from mezzotint.evaluation.classifier import ClassifierNetwork
from mezzotint.evaluation.clip_score import clip_score
from mezzotint.evaluation.confidence import Interval, bootstrap
from mezzotint.evaluation.frechet import (
    Extrapolation,
    frechet_distance,
    frechet_distance_from_statistics,
    frechet_distance_infinity,
)
from mezzotint.evaluation.inception_score import inception_score
from mezzotint.evaluation.kernel import kernel_distance
from mezzotint.evaluation.manifold import density_coverage, precision_recall
from mezzotint.evaluation.statistics import FeatureStatistics

__all__ = [
    "ClassifierNetwork",
    "Extrapolation",
    "FeatureStatistics",
    "Interval",
    "bootstrap",
    "clip_score",
    "density_coverage",
    "frechet_distance",
    "frechet_distance_from_statistics",
    "frechet_distance_infinity",
    "inception_score",
    "kernel_distance",
    "precision_recall",
]
