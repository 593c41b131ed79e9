"""An independent classifier for small images: is a sample the class that was asked for?"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from sklearn.svm import SVC
from torch import Tensor

from mezzotint.errors import MezzotintError


@dataclass(frozen=True)
class Classifier:
    """A support-vector machine on pixels, fitted on real images that the generative model never saw.

    Images are uint8 (N, C, H, W), labels integers (N,), both tensors or arrays; every method raises `MezzotintError`
    on anything else. Agreement is bounded by the classifier's own accuracy, so report both, the latter on images that
    neither fitting nor selection touched: the generative model's training half.
    """

    svc: SVC

    @classmethod
    def fit(cls, images: Tensor | np.ndarray, labels: Tensor | np.ndarray, *, max_examples: int = 10_000) -> Classifier:
        """Fits on the images, or on `max_examples` of them drawn with a fixed seed; raises with fewer than 2 classes.

        900 digits take 0.1 s. 10,000 images of Fashion-MNIST take about 15 s and reach 87 %; predicting then takes
        5 ms an image, so judge a few thousand there.
        """
        x, y = cls.features(images), _labels(labels, len(images))
        chosen = np.random.default_rng(0).permutation(len(x))[:max_examples]
        if len(np.unique(y[chosen])) < 2:
            raise MezzotintError("a classifier needs examples of at least 2 classes; the labels given hold fewer")
        # Fixed for every data set ("scale" is 1 / (D · variance)): 5-fold cross-validation within fitted halves of
        # digits, over C in {1, 10} and gamma in {1/2, 1, 2} × scale, finds no pair more than 0.6 points better.
        return cls(SVC(C=10, gamma="scale").fit(x[chosen], y[chosen]))

    def predict(self, images: Tensor | np.ndarray) -> np.ndarray:
        """Predicted classes (N,)."""
        return self.svc.predict(self.features(images))

    def accuracy(self, images: Tensor | np.ndarray, labels: Tensor | np.ndarray) -> float:
        """Share of real images whose predicted class is their label, in [0, 1]."""
        return float(np.mean(self.predict(images) == _labels(labels, len(images))))

    def agreement(self, images: Tensor | np.ndarray, labels: Tensor | np.ndarray) -> float:
        """Share of generated images whose predicted class is the one asked for, in [0, 1]."""
        return self.accuracy(images, labels)

    # Distances are taken between plain pixels, not between the machine's decision values. One-vs-rest values place a
    # third of uniform noise inside the manifold of digits. One-vs-one values separate classes better, which agreement
    # measures already, but depend on the fit: its own examples look unlike new ones, and real-to-real distances vary by
    # 30 % with the split (pixels: 10 %), which hides pixel noise of 0.1. Fréchet distance in pixels sees two moments
    # only: one Gaussian over all classes is just 4 times as far as real digits are, but its precision falls below 0.3.
    @staticmethod
    def features(images: Tensor | np.ndarray) -> np.ndarray:
        """Pixels in [0, 1], float64 (N, C·H·W): the space for `frechet_distance` and `precision_recall`."""
        array = _numpy(images)
        if array.ndim != 4 or array.dtype != np.uint8:
            raise MezzotintError(f"images must be uint8 (N, C, H, W), got {array.dtype} of shape {array.shape}")
        return array.reshape(len(array), -1) / 255.0


def _labels(labels: Tensor | np.ndarray, count: int) -> np.ndarray:
    array = _numpy(labels)
    if array.shape != (count,) or not np.issubdtype(array.dtype, np.integer):
        raise MezzotintError(f"labels must be {count} integers, one an image, got {array.dtype} of shape {array.shape}")
    return array


def _numpy(values: Tensor | np.ndarray) -> np.ndarray:
    return values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)
