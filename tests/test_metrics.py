"""Evaluation: Fréchet distance against closed forms, precision and recall against brute force, the classifier."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import scipy.linalg
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor

from mezzotint.errors import MezzotintError
from mezzotint.evaluation import Classifier, frechet_distance, frechet_distance_from_statistics, precision_recall

Halves = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]

# ---- Fréchet distance ------------------------------------------------------------------------------------------------


def gaussian(d: int, seed: int, rank: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """A mean (d,) and a random covariance (d, d) of the given rank."""
    rng = np.random.default_rng(seed)
    factor = rng.normal(size=(d, rank or d))
    return rng.normal(size=d), factor @ factor.T / d


def test_frechet_of_diagonal_covariances_is_the_closed_form() -> None:
    rng = np.random.default_rng(0)
    mean1, mean2 = rng.normal(size=(2, 30))
    std1, std2 = rng.uniform(0.1, 3, size=(2, 30))
    expected = ((mean1 - mean2) ** 2).sum() + ((std1 - std2) ** 2).sum()
    actual = frechet_distance_from_statistics(mean1, np.diag(std1**2), mean2, np.diag(std2**2))
    assert actual == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("d", [1, 2, 17, 64])
def test_frechet_of_full_covariances_matches_scipy(d: int) -> None:
    (mean1, cov1), (mean2, cov2) = gaussian(d, seed=1), gaussian(d, seed=2)
    cross = np.trace(scipy.linalg.sqrtm(cov1 @ cov2).real)
    expected = ((mean1 - mean2) ** 2).sum() + np.trace(cov1) + np.trace(cov2) - 2 * cross
    assert frechet_distance_from_statistics(mean1, cov1, mean2, cov2) == pytest.approx(expected, rel=1e-8)


def test_frechet_of_rank_deficient_covariances() -> None:
    # One shared basis, so the roots commute and the closed form is that of standard deviations along its axes.
    basis = scipy.linalg.qr(np.random.default_rng(3).normal(size=(40, 40)))[0]
    std1, std2 = np.zeros(40), np.zeros(40)
    std1[:6], std2[3:12] = 1.5, 0.5
    cov1, cov2 = (basis * std1**2) @ basis.T, (basis * std2**2) @ basis.T
    mean = np.zeros(40)
    expected = ((std1 - std2) ** 2).sum()
    assert frechet_distance_from_statistics(mean, cov1, mean, cov2) == pytest.approx(expected, rel=1e-8)
    assert frechet_distance_from_statistics(mean, cov1, mean, cov1) == pytest.approx(0, abs=1e-10)


@pytest.mark.parametrize(("n", "d"), [(200, 8), (10, 50), (2, 3), (5, 1)])
def test_frechet_of_a_set_with_itself_is_zero(n: int, d: int) -> None:
    features = torch.randn(n, d, generator=torch.Generator().manual_seed(0)) * 10 + 100
    assert 0 <= frechet_distance(features, features.flip(0)) < 1e-8


def test_frechet_of_a_shift_is_its_squared_length() -> None:
    features = np.random.default_rng(0).normal(size=(100, 12))
    shift = np.arange(12.0)
    assert frechet_distance(features, features + shift) == pytest.approx(shift @ shift, rel=1e-10)


def test_frechet_uses_unbiased_covariances() -> None:
    real, fake = torch.tensor([[0.0], [2.0]]), torch.tensor([[0.0], [4.0]])
    assert frechet_distance(real, fake) == pytest.approx(1 + (8**0.5 - 2**0.5) ** 2, rel=1e-12)


def test_frechet_is_symmetric_and_blind_to_rotation() -> None:
    rng = np.random.default_rng(4)
    real, fake = rng.normal(size=(80, 20)), rng.normal(size=(60, 20)) * np.linspace(0.5, 2, 20)
    rotation = scipy.linalg.qr(rng.normal(size=(20, 20)))[0]
    expected = frechet_distance(real, fake)
    assert frechet_distance(fake, real) == pytest.approx(expected, rel=1e-10)
    assert frechet_distance(real @ rotation, fake @ rotation) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("metric", [frechet_distance, precision_recall])
@pytest.mark.parametrize(
    ("real", "fake", "message"),
    [
        (torch.zeros(1, 3), torch.zeros(9, 3), "real features hold 1 samples"),
        (torch.zeros(9, 3), torch.zeros(0, 3), "fake features hold 0 samples"),
        (torch.zeros(9, 3), torch.zeros(9, 4), "3 wide and fake ones 4"),
        (torch.zeros(9, 3), torch.full((9, 3), torch.nan), "fake features contain NaN"),
        (torch.full((9, 3), torch.inf), torch.zeros(9, 3), "real features contain NaN or infinite"),
        (torch.zeros(9), torch.zeros(9, 3), "2-D"),
    ],
)
def test_unusable_features_are_refused(metric: Callable[..., object], real: Tensor, fake: Tensor, message: str) -> None:
    with pytest.raises(MezzotintError, match=message):
        metric(real, fake)


def test_unusable_statistics_are_refused() -> None:
    mean, cov = np.zeros(3), np.eye(3)
    with pytest.raises(MezzotintError, match="one D"):
        frechet_distance_from_statistics(mean, cov, np.zeros(4), np.eye(4))
    with pytest.raises(MezzotintError, match="NaN"):
        frechet_distance_from_statistics(mean, cov * np.nan, mean, cov)


# ---- Precision and recall --------------------------------------------------------------------------------------------


def brute_force(real: np.ndarray, fake: np.ndarray, k: int) -> tuple[float, float]:
    """Precision and recall from the paper's definition, one pair of samples at a time."""

    def inside(points: np.ndarray, manifold: np.ndarray) -> float:
        def radius(i: int) -> float:
            others = np.delete(manifold, i, axis=0)
            return sorted(float(np.linalg.norm(other - manifold[i])) for other in others)[k - 1]

        radii = [radius(i) for i in range(len(manifold))]
        covered = [any(np.linalg.norm(p - m) <= r for m, r in zip(manifold, radii, strict=True)) for p in points]
        return sum(covered) / len(covered)

    return inside(fake, real), inside(real, fake)


@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize("block", [1, 7, 1024])
def test_precision_recall_matches_brute_force_at_any_block_size(k: int, block: int) -> None:
    rng = np.random.default_rng(k)
    real, fake = rng.normal(size=(41, 3)), rng.normal(size=(29, 3)) * 1.3 + 1.2
    expected = brute_force(real, fake, k)
    assert 0 < min(expected) <= max(expected) < 1  # the case can tell right from wrong
    assert precision_recall(real, fake, k, block=block) == expected


def test_identical_sets_cover_each_other() -> None:
    features = torch.randn(50, 32, generator=torch.Generator().manual_seed(0))
    assert precision_recall(features, features.flip(0), block=16) == (1.0, 1.0)


def test_copies_cover_themselves_and_nothing_else() -> None:
    # The k nearest of five copies are copies: radii are 0, which distances of limited accuracy would miss.
    points = torch.randn(50, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 100
    features = points.repeat(5, 1)
    assert precision_recall(features, features.flip(0), block=16) == (1.0, 1.0)
    assert precision_recall(features, features + 1e-8, block=16) == (0.0, 0.0)


def test_disjoint_sets_do_not() -> None:
    features = torch.rand(20, 4, generator=torch.Generator().manual_seed(0))
    assert precision_recall(features, features + 100) == (0.0, 0.0)


def test_mode_collapse_keeps_precision_and_loses_recall() -> None:
    rng = np.random.default_rng(0)
    real, fake = rng.normal(size=(300, 2)), rng.normal(size=(300, 2)) * 0.05
    precision, recall = precision_recall(real, fake)
    assert precision == 1.0
    assert recall < 0.05


def test_too_few_neighbours_are_refused() -> None:
    with pytest.raises(MezzotintError, match="real features hold 3 samples; at least 4"):
        precision_recall(torch.rand(3, 2), torch.rand(9, 2), k=3)
    with pytest.raises(MezzotintError, match="k = 0"):
        precision_recall(torch.rand(9, 2), torch.rand(9, 2), k=0)


# ---- The classifier --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits() -> Halves:
    """Images uint8 (N, 1, 8, 8) and labels of a training half, then of the held-out half."""
    data = load_digits()
    images = np.round(data.images * (255 / 16)).astype(np.uint8)[:, None]
    train, heldout, train_labels, heldout_labels = train_test_split(
        images, data.target, test_size=0.5, stratify=data.target, random_state=0
    )
    return train, train_labels, heldout, heldout_labels


@pytest.fixture(scope="module")
def classifier(digits: Halves) -> Classifier:
    return Classifier.fit(*digits[2:])


def test_classifier_reads_digits_it_never_saw(classifier: Classifier, digits: Halves) -> None:
    train, labels, _, _ = digits
    assert classifier.accuracy(train, labels) >= 0.97
    assert classifier.agreement(train, (labels + 1) % 10) < 0.03
    assert classifier.accuracy(train, labels) == np.mean(classifier.predict(train) == labels)


def test_classifier_takes_tensors(classifier: Classifier, digits: Halves) -> None:
    train, labels, _, _ = digits
    expected = classifier.accuracy(train, labels)
    assert classifier.accuracy(torch.from_numpy(train), torch.from_numpy(labels)) == expected


def test_classifier_caps_its_examples_reproducibly(digits: Halves) -> None:
    train, labels, heldout, heldout_labels = digits
    first, second = (Classifier.fit(heldout, heldout_labels, max_examples=300) for _ in range(2))
    assert first.svc.shape_fit_ == (300, 64)
    np.testing.assert_array_equal(first.predict(train), second.predict(train))
    assert first.accuracy(train, labels) > 0.9


def test_features_are_pixels_in_the_unit_interval() -> None:
    features = Classifier.features(np.array([0, 51, 255, 0, 0, 255], np.uint8).reshape(1, 3, 1, 2))
    assert features.dtype == np.float64
    np.testing.assert_array_equal(features, [[0, 0.2, 1, 0, 0, 1]])


def test_feature_space_tells_real_halves_from_degraded_ones(classifier: Classifier, digits: Halves) -> None:
    train, labels, heldout, _ = digits
    real, other_half = classifier.features(heldout), classifier.features(train)
    rng = np.random.default_rng(0)
    noisy = np.clip(other_half + rng.normal(scale=0.2, size=other_half.shape), 0, 1)
    baseline = frechet_distance(real, other_half)
    assert baseline < 0.1
    assert min(precision_recall(real, other_half)) > 0.85
    assert frechet_distance(real, noisy) > 3 * baseline
    assert precision_recall(real, noisy)[0] < 0.5  # poor images
    assert precision_recall(real, other_half[labels > 4])[1] < 0.6  # missing classes


def test_unusable_images_and_labels_are_refused(classifier: Classifier, digits: Halves) -> None:
    train, labels, _, _ = digits
    with pytest.raises(MezzotintError, match="uint8"):
        classifier.predict(train / 255.0)
    with pytest.raises(MezzotintError, match="uint8"):
        classifier.predict(train[:, 0])
    with pytest.raises(MezzotintError, match="labels must be 898 integers"):
        classifier.accuracy(train, labels[:-1])
    with pytest.raises(MezzotintError, match="at least 2 classes"):
        Classifier.fit(train, np.zeros_like(labels))
