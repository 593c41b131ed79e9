"""Evaluation: every metric against closed forms, brute force, or other tools' figures; the classifier."""

from __future__ import annotations

import itertools
import logging
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import mpmath
import numpy as np
import pytest
import scipy.linalg
import scipy.stats
import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor

from mezzotint.errors import MezzotintError
from mezzotint.evaluation import frechet, manifold
from mezzotint.evaluation.clip_score import clip_score
from mezzotint.evaluation.confidence import bootstrap
from mezzotint.evaluation.frechet import (
    frechet_distance,
    frechet_distance_from_statistics,
    frechet_distance_infinity,
)
from mezzotint.evaluation.inception_score import inception_score
from mezzotint.evaluation.kernel import kernel_distance
from mezzotint.evaluation.manifold import density_coverage, precision_recall
from mezzotint.evaluation.statistics import FeatureStatistics

# ---- Other tools' figures --------------------------------------------------------------------------------------------


def formula(n: int, seed: int) -> np.ndarray:
    """Correlated features (n, 16) that any tool can be given."""
    i, j = np.mgrid[1 : n + 1, 1:17]
    uniform = np.modf(np.abs(np.sin(12.9898 * i + 78.233 * j + seed)) * 43758.5453)[0]
    return np.cumsum(uniform, 1) / np.sqrt(j) * (1 + 0.1 * seed)


def test_other_tools_agree() -> None:
    # torch-fidelity 0.4.0's *_features_to_metric on float64 tensors, cleanfid.fid 0.1.35's frechet_distance and
    # kernel_distance, and prdc 0.2's compute_prdc(real, fake, 5), each with real = formula(300, 0) and fake =
    # formula(260, 1). KID: one subset of all 260, against the first 260 real ones. Inception score: logits 5·fake,
    # 7 splits, not shuffled. prdc has no ties here, so its open balls are as good as the paper's closed ones.
    real, fake = formula(300, 0), formula(260, 1)
    assert frechet_distance(real, fake) == pytest.approx(0.65552796624, rel=1e-9)  # torch-fidelity, clean-fid
    assert kernel_distance(real[:260], fake, subsets=None)[0] == pytest.approx(3.2936032745, rel=1e-9)  # both
    assert inception_score(5 * fake, 7, logits=True) == pytest.approx((1.1015290470, 0.0155203310), rel=1e-8)
    assert precision_recall(real, fake) == pytest.approx((0.8461538462, 0.9333333333), rel=1e-9)  # torch-fidelity
    assert precision_recall(real, fake, 5) == pytest.approx((0.9538461538, 0.9966666667), rel=1e-9)  # prdc
    assert density_coverage(real, fake, 5) == pytest.approx((0.7023076923, 0.8333333333), rel=1e-9)  # prdc


# ---- Statistics ------------------------------------------------------------------------------------------------------


def check(statistics: FeatureStatistics, features: np.ndarray) -> None:
    """`statistics` are numpy's of the features."""
    assert statistics.n == len(features)
    np.testing.assert_allclose(statistics.mean, features.mean(0), rtol=1e-12)
    cov = np.cov(features, rowvar=False).reshape(features.shape[1], -1)
    np.testing.assert_allclose(statistics.covariance, cov, rtol=1e-10, atol=1e-12 * cov.max())
    assert torch.equal(statistics.covariance, statistics.covariance.T)


@pytest.mark.parametrize("sizes", [[200], [1, 1, 198], [64, 64, 64, 8], [199, 1]])
def test_statistics_in_batches_are_those_of_the_whole(sizes: list[int]) -> None:
    features = formula(200, 0)
    statistics = FeatureStatistics()
    for batch in np.split(features, np.cumsum(sizes)[:-1]):
        statistics.update(batch)
    check(statistics, features)
    assert statistics.width == 16


def test_statistics_far_from_the_origin_lose_nothing() -> None:
    # Sums of squares would lose 14 of 16 digits here.
    features = np.random.default_rng(0).normal(size=(300, 3)) + 1e7
    statistics = FeatureStatistics()
    for batch in np.split(features, 30):
        statistics.update(batch)
    np.testing.assert_allclose(statistics.covariance, np.cov(features - 1e7, rowvar=False), rtol=1e-6, atol=1e-8)


def test_statistics_merge() -> None:
    features = formula(200, 0)
    total, part = FeatureStatistics(), FeatureStatistics.of(features[:30])
    for other in (FeatureStatistics(), part, FeatureStatistics(), FeatureStatistics.of(features[30:31])):
        total.merge(other)
    total.merge(FeatureStatistics.of(features[31:]))
    check(total, features)
    check(part, features[:30])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.uint8])
def test_statistics_take_any_type(dtype: torch.dtype) -> None:
    features = torch.from_numpy(formula(50, 0) * 10).to(dtype)
    check(FeatureStatistics.of(features), features.double().numpy())


def test_statistics_of_one_column() -> None:
    features = formula(50, 0)[:, :1]
    check(FeatureStatistics.of(features), features)


def test_statistics_of_two_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    # Threads stand in for processes: starting those takes seconds.
    barrier, given = threading.Barrier(2, timeout=60), [torch.empty(0)] * 2
    rank = threading.local()

    def all_reduce(values: Tensor, op: object = dist.ReduceOp.SUM) -> None:
        given[rank.number] = values.clone()
        barrier.wait()
        both = torch.stack(given)
        barrier.wait()
        values.copy_(both.amax(0) if op == dist.ReduceOp.MAX else both.sum(0))

    joined = {"is_initialized": lambda: True, "get_backend": lambda: "gloo", "all_reduce": all_reduce}
    for name, function in joined.items():
        monkeypatch.setattr(dist, name, function)

    def both(*parts: FeatureStatistics) -> list[FeatureStatistics]:
        def run(number: int) -> FeatureStatistics:
            rank.number = number
            return parts[number].all_reduce()

        with ThreadPoolExecutor(2) as pool:
            return list(pool.map(run, range(2)))

    features = formula(200, 0)
    some, rest = FeatureStatistics.of(features[:60]), FeatureStatistics.of(features[60:])
    for total in (*both(some, rest), *both(FeatureStatistics(), FeatureStatistics.of(features))):
        check(total, features)
    check(some, features[:60])
    assert [total.n for total in both(FeatureStatistics(), FeatureStatistics())] == [0, 0]
    with pytest.raises(MezzotintError, match="features 15 to 16 wide"):
        both(some, FeatureStatistics.of(features[:, 1:]))
    with pytest.raises(MezzotintError, match="unknown sample number"):
        both(some, FeatureStatistics.from_arrays({"mu": features.mean(0), "sigma": np.cov(features.T)}))


def test_statistics_of_one_process() -> None:
    statistics = FeatureStatistics.of(formula(200, 0))
    assert statistics.all_reduce() is statistics
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        check(statistics.all_reduce(), formula(200, 0))
    finally:
        dist.destroy_process_group()


def test_statistics_survive_a_file(tmp_path: Path) -> None:
    features = formula(200, 0)
    path = tmp_path / "statistics.npz"
    FeatureStatistics.of(features).save(path)
    loaded = FeatureStatistics.load(path)
    check(loaded, features)
    loaded.update(formula(10, 1))
    check(loaded, np.concatenate([features, formula(10, 1)]))
    with np.load(path) as arrays:
        assert sorted(arrays) == ["mu", "n", "sigma"]
        np.testing.assert_allclose(arrays["sigma"], np.cov(features, rowvar=False), rtol=1e-10)


def test_statistics_of_other_tools(tmp_path: Path) -> None:
    pooled, spatial = formula(200, 0), formula(200, 1)
    path = tmp_path / "adm.npz"  # ADM's layout; pytorch-fid's and clean-fid's have mu and sigma alone
    names = {f"{key}{suffix}": f(x) for suffix, x in (("", pooled), ("_s", spatial)) for key, f in
             (("mu", lambda x: x.mean(0)), ("sigma", lambda x: np.cov(x, rowvar=False)))}  # fmt: skip
    np.savez(path, arr_0=np.zeros((4, 2, 2, 3), np.uint8), **names)
    real, spatial_real = FeatureStatistics.load(path), FeatureStatistics.load(path, "_s")
    assert real.n is None
    assert real.width == 16
    assert frechet_distance(real, pooled) == pytest.approx(0, abs=1e-12)
    assert frechet_distance(spatial_real, spatial) == pytest.approx(0, abs=1e-12)
    assert frechet_distance(real, spatial_real) == pytest.approx(frechet_distance(pooled, spatial), rel=1e-9)
    real.save(tmp_path / "again.npz")
    assert frechet_distance(FeatureStatistics.load(tmp_path / "again.npz"), real) == pytest.approx(0, abs=1e-12)
    for attempt in (lambda: real.update(pooled), lambda: FeatureStatistics.of(pooled).merge(real)):
        with pytest.raises(MezzotintError, match="unknown number"):
            attempt()


def test_unusable_statistics_are_refused(tmp_path: Path) -> None:
    mean, cov = np.zeros(3), np.eye(3)
    with pytest.raises(MezzotintError, match="one D"):
        frechet_distance_from_statistics(mean, cov, mean, np.eye(4))
    with pytest.raises(MezzotintError, match="3 wide and fake ones 4"):
        frechet_distance_from_statistics(mean, cov, np.zeros(4), np.eye(4))
    with pytest.raises(MezzotintError, match="fake statistics contain NaN"):
        frechet_distance_from_statistics(mean, cov, mean, cov * np.nan)
    with pytest.raises(MezzotintError, match=r"fake covariance has an eigenvalue of -0\.1 beside a largest of 1"):
        frechet_distance_from_statistics(mean, cov, mean, np.diag([1, 1, -0.1]))
    statistics = FeatureStatistics()
    with pytest.raises(MezzotintError, match="hold 0 samples; at least 1"):
        statistics.mean  # noqa: B018
    statistics.update(np.ones((1, 3)))
    with pytest.raises(MezzotintError, match="hold 1 samples; at least 2"):
        statistics.save(tmp_path / "few.npz")
    with pytest.raises(MezzotintError, match="fake statistics hold 1 samples; at least 2"):
        frechet_distance(np.eye(3), statistics)
    with pytest.raises(MezzotintError, match="3 wide and these 4"):
        statistics.update(np.ones((5, 4)))
    with pytest.raises(MezzotintError, match="in 2 of 5 rows"):
        statistics.update(np.where(np.arange(5)[:, None] < 2, np.inf, np.ones((5, 3))))
    assert statistics.n == 1
    assert not list(tmp_path.iterdir())


def test_unusable_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(MezzotintError, match="No such file"):
        FeatureStatistics.load(tmp_path / "missing.npz")
    np.savez(tmp_path / "images.npz", arr_0=np.zeros(3))
    with pytest.raises(MezzotintError, match=r"images\.npz: statistics need arrays mu and sigma, but .* arr_0"):
        FeatureStatistics.load(tmp_path / "images.npz")
    np.savez(tmp_path / "few.npz", mu=np.zeros(2), sigma=np.eye(2), n=1)
    with pytest.raises(MezzotintError, match="at least 2 samples, but n is 1"):
        FeatureStatistics.load(tmp_path / "few.npz")
    np.save(tmp_path / "array.npy", np.zeros(3))
    (tmp_path / "text.npz").write_text("mu")
    (tmp_path / "empty.npz").touch()
    (tmp_path / "cut.npz").write_bytes((tmp_path / "images.npz").read_bytes()[:100])
    for name in ("array.npy", "text.npz", "empty.npz", "cut.npz"):
        with pytest.raises(MezzotintError, match=f"{name} is no whole .npz"):
            FeatureStatistics.load(tmp_path / name)


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


@pytest.mark.parametrize("metric", [frechet_distance, precision_recall, density_coverage, kernel_distance])
@pytest.mark.parametrize(
    ("real", "fake", "message"),
    [
        (torch.zeros(1, 3), torch.zeros(9, 3), "real features hold 1 samples"),
        (torch.zeros(9, 3), torch.zeros(0, 3), "fake features hold 0 samples"),
        (torch.zeros(9, 3), torch.zeros(9, 4), "3 wide and fake ones 4"),
        (torch.zeros(9, 3), 1 / (torch.arange(27.0) - 4).view(9, 3), "fake features contain NaN .* in 1 of 9 rows"),
        (torch.eye(9, 3).log(), torch.zeros(9, 3), "real features contain NaN or infinite values in 9 of 9"),
        (torch.zeros(9, 0), torch.zeros(9, 0), "2-D"),
        (torch.zeros(9), torch.zeros(9, 3), "2-D"),
    ],
)
def test_unusable_features_are_refused(metric: Callable[..., object], real: Tensor, fake: Tensor, message: str) -> None:
    with pytest.raises(MezzotintError, match=message):
        metric(real, fake)


@pytest.mark.parametrize("spread", [0.0, 1.0, 3.0, 6.0])
@pytest.mark.parametrize("apart", [1.0, 1e-2, 1e-5])
def test_frechet_is_exact(spread: float, apart: float) -> None:
    """Against 60 digits: standard deviations over `spread` powers of ten, distributions near each other."""
    rng = np.random.default_rng(0)
    d = 8
    bases = [scipy.linalg.qr(start)[0] for start in np.cumsum([rng.normal(size=(d, d))] * 2, 0)]
    bases[1] = scipy.linalg.qr(bases[1] + apart * rng.normal(size=(d, d)))[0]
    scales = [10 ** rng.uniform(-spread, 0, size=d), 10 ** rng.uniform(-spread, 0, size=d)]
    scales[1] = scales[0] * (1 + apart * scales[1])
    covs = [(basis * scale**2) @ basis.T for basis, scale in zip(bases, scales, strict=True)]
    covs = [(cov + cov.T) / 2 for cov in covs]
    with mpmath.workdps(60):
        first, second = (mpmath.matrix(cov.tolist()) for cov in covs)
        eigenvalues = mpmath.eig(first * second, left=False, right=False)
        cross = sum(mpmath.sqrt(mpmath.re(value)) for value in eigenvalues if mpmath.re(value) > 0)
        expected = float(sum(first[i, i] + second[i, i] for i in range(d)) - 2 * cross)
    mean = np.zeros(d)
    # The distance of two near-equal sets is what is left of numbers 10¹⁰ as large.
    actual = frechet_distance_from_statistics(mean, covs[0], mean, covs[1])
    assert actual == pytest.approx(expected, rel=1e-6, abs=1e-14)


def test_frechet_by_eigenvalues_is_that_by_singular_values(monkeypatch: pytest.MonkeyPatch) -> None:
    values, svdvals, calls = [], torch.linalg.svdvals, itertools.count()
    monkeypatch.setattr(torch.linalg, "svdvals", lambda product: (next(calls), svdvals(product))[1])
    for tolerance in (0.0, frechet.TOLERANCE):
        monkeypatch.setattr(frechet, "TOLERANCE", tolerance)
        values.append(frechet_distance(formula(300, 0), formula(260, 1)))
    assert values[0] == pytest.approx(values[1], rel=1e-10)
    assert next(calls) == 1  # not for the usual tolerance
    frechet_distance(formula(300, 0), formula(300, 0))
    assert next(calls) == 3  # 0 is a difference that needs all digits


@pytest.mark.parametrize(("n", "m"), [(10, 200), (200, 10), (10, 16), (17, 9), (2, 2)])
def test_frechet_of_few_samples_is_exact_and_warned_of(n: int, m: int, caplog: pytest.LogCaptureFixture) -> None:
    real, fake = formula(n, 0), formula(m, 1)
    # Independently of the covariances: the cross term is the nuclear norm of the product of centred features.
    rows = [(x - x.mean(0)) / (len(x) - 1) ** 0.5 for x in (real, fake)]
    expected = ((real.mean(0) - fake.mean(0)) ** 2).sum() + sum((x**2).sum() for x in rows)
    expected -= 2 * np.linalg.svd(rows[0] @ rows[1].T, compute_uv=False).sum()
    with caplog.at_level(logging.WARNING, "mezzotint"):
        assert frechet_distance(real, fake) == pytest.approx(expected, rel=1e-12)
    singular = [(count, name) for count, name in ((n, "real"), (m, "fake")) if count <= 16]
    assert [record.getMessage()[:30].split()[:2] for record in caplog.records] == [[str(c), s] for c, s in singular]
    # Statistics have lost which directions were empty, up to rounding; n says how many.
    assert frechet_distance(FeatureStatistics.of(real), FeatureStatistics.of(fake)) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(FeatureStatistics.of(real), fake) == pytest.approx(expected, rel=1e-9)


def test_frechet_of_constant_features() -> None:
    real, fake = np.zeros((20, 4)), np.full((30, 4), 2.0)
    assert frechet_distance(real, fake) == 16
    assert frechet_distance(real, real + np.eye(20, 4)) == pytest.approx(np.eye(20, 4).var(0, ddof=1).sum() + 0.01)


def test_frechet_of_float32_statistics() -> None:
    # Rounding to float32 makes eigenvalues of a singular covariance negative, which is no mistake of the user's.
    features = formula(200, 0) @ np.random.default_rng(0).normal(size=(16, 40))
    statistics = FeatureStatistics.of(features)
    mean, cov = statistics.mean.float(), statistics.covariance.float()
    assert torch.linalg.eigvalsh(cov.double())[0] < 0
    scale = statistics.covariance.trace().item()
    assert frechet_distance_from_statistics(mean, cov, mean, cov) < 1e-12 * scale
    assert frechet_distance(statistics, FeatureStatistics.from_arrays({"mu": mean, "sigma": cov})) < 1e-6 * scale


def test_frechet_at_infinity() -> None:
    # Samples of the very distribution compared with: all that there is to measure is bias.
    d, n = 24, 1200
    real = FeatureStatistics.from_arrays({"mu": np.zeros(d), "sigma": np.eye(d)})
    fake = np.random.default_rng(0).normal(size=(n, d))
    result = frechet_distance_infinity(real, fake, smallest=150, points=10)
    assert result.distances[0] > 0.6
    assert result.distances[-1] == pytest.approx(frechet_distance(real, fake), rel=1e-9)
    assert result.distances[-1] > 0.07
    assert abs(result.value) < 0.01
    assert result.sizes == tuple(np.linspace(150, n, 10).astype(int))
    line = scipy.stats.linregress(1 / np.array(result.sizes), result.distances)
    assert (result.value, result.standard_error) == pytest.approx((line.intercept, line.intercept_stderr), rel=1e-9)
    assert frechet_distance_infinity(real, fake, smallest=150, points=10) == result
    assert frechet_distance_infinity(real, fake, smallest=150, points=10, seed=1).value != result.value


def test_unusable_extrapolations_are_refused() -> None:
    features = formula(100, 0)
    with pytest.raises(MezzotintError, match="below the 100 fake samples, got 5000"):
        frechet_distance_infinity(features, features)
    with pytest.raises(MezzotintError, match="at least 3 points"):
        frechet_distance_infinity(features, features, smallest=50, points=2)
    with pytest.raises(MezzotintError, match="16 wide and fake ones 3"):
        frechet_distance_infinity(features, features[:, :3], smallest=50)


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


def reference(real: Tensor, fake: Tensor, k: int) -> tuple[float, float, float, float]:
    """Precision, recall, density and coverage from whole matrices of float64 distances."""
    real, fake = real.double(), fake.double()
    within, across, others = (
        torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")
        for a, b in ((real, real), (fake, real), (fake, fake))
    )
    in_real = across <= within.kthvalue(k + 1, dim=1).values
    in_fake = across <= others.kthvalue(k + 1, dim=1).values[:, None]
    precision, recall, coverage = (
        hit.double().mean().item() for hit in (in_real.any(1), in_fake.any(0), in_real.any(0))
    )
    return precision, recall, in_real.sum().item() / (k * len(fake)), coverage


def manifold_cases() -> dict[str, tuple[Tensor, Tensor]]:
    """Sets whose distances products in float32 confuse."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(700, 96, generator=generator)
    mixed = (
        torch.randn(700, 6, generator=generator, dtype=torch.float64)
        @ torch.randn(6, 300, generator=generator).double()
    )
    pixels = torch.randint(0, 3, (600, 5), generator=generator).double() / 255
    outlier = noise.clone()
    outlier[0] *= 1e6
    return {
        "all alike": (noise[:400], noise[400:]),
        "few dimensions": (mixed[:400], mixed[350:]),
        "ties and copies": (pixels[:300], pixels[300:]),
        "far away": (noise[:400].double() * 1e-3 + 1e4, noise[400:].double() * 1e-3 + 1e4),
        "outlier": (outlier[:400], outlier[400:]),
        "outlier, other side": (outlier[400:], outlier[:400]),
        "tiny": (noise[:400] * 1e-30, noise[400:] * 1e-30),
        "collapsed": (noise[:400], noise[400:401].expand(300, -1) + 1e-9),
        "constant": (torch.ones(30, 3), torch.ones(20, 3)),
        "wide": (torch.rand(20, 9000, generator=generator), torch.rand(15, 9000, generator=generator)),
    }


@pytest.mark.parametrize("case", manifold_cases())
def test_manifolds_are_exact(case: str) -> None:
    real, fake = manifold_cases()[case]
    expected = reference(real, fake, 3)
    assert (*precision_recall(real, fake, block=128), *density_coverage(real, fake, 3, block=100)) == expected


def test_bounds_hold() -> None:
    real, fake = manifold_cases()["all alike"]
    points, others = manifold._points(real, fake, 3, 128)
    assert points.rounded.dtype == torch.float32
    exact = ((real.double()[:, None] - fake.double()) ** 2).sum(2) / points.scale**2
    ((_, lower),) = manifold._lower_bounds(points, others, 1000)
    assert (lower <= exact).all()
    assert (exact <= lower + 2 * (points.slack[:, None] + others.slack)).all()


def test_products_of_reduced_precision_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    product = Tensor.__matmul__
    half = lambda a, b: product(a.bfloat16(), b.bfloat16()).to(a.dtype) if a.dtype == torch.float32 else product(a, b)  # noqa: E731
    monkeypatch.setattr(Tensor, "__matmul__", half)
    assert manifold._points(*manifold_cases()["all alike"], 3, 128)[0].rounded.dtype == torch.float64


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


# ---- Kernel distance -------------------------------------------------------------------------------------------------


def double_loop(real: np.ndarray, fake: np.ndarray) -> float:
    """The estimator from its definition, one pair at a time."""

    def mean(a: np.ndarray, b: np.ndarray) -> float:
        pairs = [(x, y) for x in a for y in b if x is not y]
        return float(np.mean([(x @ y / len(x) + 1) ** 3 for x, y in pairs]))

    real_rows, fake_rows = list(real), list(fake)
    return mean(real_rows, real_rows) + mean(fake_rows, fake_rows) - 2 * mean(real_rows, fake_rows)


@pytest.mark.parametrize("block", [1, 7, 1024])
def test_kernel_distance_matches_the_double_loop(block: int) -> None:
    real, fake = formula(23, 0), formula(31, 1)
    expected = double_loop(real, fake)
    assert kernel_distance(real, fake, subsets=None, block=block)[0] == pytest.approx(expected, rel=1e-12)


def test_kernel_distance_of_subsets() -> None:
    real, fake = formula(300, 0), formula(260, 1)
    whole, _ = kernel_distance(real, fake, subsets=None)
    mean, error = kernel_distance(real, fake, subsets=150, subset_size=50)
    assert abs(mean - whole) < 4 * error < 0.2 * whole
    assert kernel_distance(real, fake, subsets=150, subset_size=50) == (mean, error)
    assert kernel_distance(real, fake, subsets=150, subset_size=50, seed=1)[0] != mean


def test_kernel_distance_error_is_that_of_new_samples() -> None:
    rng = np.random.default_rng(0)
    figures = [
        kernel_distance(rng.normal(size=(80, 4)), rng.normal(size=(60, 4)) + 0.7, subsets=None) for _ in range(300)
    ]
    values, errors = np.transpose(figures)
    assert values.std() == pytest.approx(errors.mean(), rel=0.15)


def test_unusable_subsets_are_refused() -> None:
    features = formula(30, 0)
    with pytest.raises(MezzotintError, match="subset_size 1000 is above the number of real samples, 30"):
        kernel_distance(features, features)
    with pytest.raises(MezzotintError, match="at least 2, got 1 and 30"):
        kernel_distance(features, features, subsets=1, subset_size=30)


# ---- Inception score, CLIP score, the bootstrap ----------------------------------------------------------------------


def test_inception_score_of_extremes() -> None:
    assert inception_score(np.full((40, 5), 0.2)) == pytest.approx((1, 0))
    assert inception_score(np.eye(5)[np.arange(50) % 5]) == pytest.approx((5, 0))
    assert inception_score(np.eye(5)[np.arange(50) // 10], splits=5) == pytest.approx((1, 0))  # sorted by class
    assert inception_score(1e4 * np.eye(5)[np.arange(50) % 5], logits=True) == pytest.approx((5, 0))


def test_inception_score_is_the_exponential_of_the_divergence() -> None:
    logits = torch.from_numpy(formula(103, 0)) * 3
    p = logits.softmax(1).numpy()
    parts = [p[:34], p[34:68], p[68:]]
    scores = [np.exp(np.mean([scipy.stats.entropy(row, part.mean(0)) for row in part])) for part in parts]
    expected = (np.mean(scores), np.std(scores))
    assert inception_score(p, 3) == pytest.approx(expected, rel=1e-10)
    assert inception_score(logits, 3, logits=True) == pytest.approx(expected, rel=1e-10)


def test_unusable_predictions_are_refused() -> None:
    with pytest.raises(MezzotintError, match="2 of 3 predictions are no probabilities"):
        inception_score(np.array([[0.5, 0.5], [2, -1], [0.5, 0.4]]), 1)
    with pytest.raises(MezzotintError, match="predictions hold 3 samples; at least 10"):
        inception_score(np.full((3, 2), 0.5))
    with pytest.raises(MezzotintError, match="splits must be at least 1"):
        inception_score(np.full((3, 2), 0.5), 0)


def test_clip_score_is_the_cosine_in_percent() -> None:
    images, texts = np.array([[3.0, 4], [1, 0], [2, 0]]), np.array([[4.0, 3], [-1, 0], [0.5, 0]])
    assert clip_score(images, texts) == pytest.approx(100 * (24 / 25 + 0 + 1) / 3)


def test_unusable_embeddings_are_refused() -> None:
    with pytest.raises(MezzotintError, match=r"\(2, 3\) and text embeddings \(4, 3\)"):
        clip_score(np.ones((2, 3)), np.ones((4, 3)))
    with pytest.raises(MezzotintError, match="1 of 3 pairs hold an embedding of length 0"):
        clip_score(np.ones((3, 3)), np.tri(3) - np.eye(3))
    with pytest.raises(MezzotintError, match="text embeddings contain NaN"):
        clip_score(np.ones((2, 3)), np.full((2, 3), np.nan))


def test_bootstrap_of_a_mean() -> None:
    values = np.random.default_rng(0).normal(size=400)
    interval = bootstrap(np.mean, values, samples=2000)
    half = 1.96 * values.std() / 20
    assert interval.value == values.mean()
    assert (interval.low, interval.high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.1 * half)
    narrow = bootstrap(np.mean, values, samples=2000, level=0.5)
    assert interval.low < narrow.low < narrow.high < interval.high
    assert bootstrap(np.mean, values, samples=2000) == interval
    assert bootstrap(np.mean, values, samples=2000, seed=1) != interval
    assert bootstrap(np.mean, values, samples=1000) != interval


def test_bootstrap_resamples_rows_of_each_array_or_of_pairs() -> None:
    a = torch.arange(50.0)[:, None]
    assert bootstrap(lambda a, b: (a - b).abs().max(), a, a.clone(), samples=50, paired=True).high == 0
    apart = bootstrap(lambda a, b: (a.mean() - b.mean()).item(), a, a[:20].numpy(), samples=200)
    assert apart.low < apart.value == 15 < apart.high
    assert isinstance(
        bootstrap(lambda x: float(kernel_distance(x, x, subsets=None)[0]), formula(9, 0), samples=3).low, float
    )


def test_unusable_bootstraps_are_refused() -> None:
    values = np.arange(5.0)
    with pytest.raises(MezzotintError, match="at least one row"):
        bootstrap(np.mean, values[:0])
    with pytest.raises(MezzotintError, match="at least one array"):
        bootstrap(np.mean)
    with pytest.raises(MezzotintError, match="equally long, got 5, 4 rows"):
        bootstrap(lambda a, b: 0.0, values, values[1:], paired=True)
    with pytest.raises(MezzotintError, match="level between 0 and 1, got 1000 and 95"):
        bootstrap(np.mean, values, level=95)
    with pytest.raises(MezzotintError, match="NaN"):
        bootstrap(lambda _: float("nan"), values)


# ---- Real images -----------------------------------------------------------------------------------------------------


def test_metrics_tell_real_halves_of_digits_from_degraded_ones() -> None:
    """On the pixels of two stratified halves: noise lowers precision, missing classes recall."""
    data = load_digits()
    other_half, real, labels, _ = train_test_split(
        data.images.reshape(-1, 64) / 16, data.target, test_size=0.5, stratify=data.target, random_state=0
    )
    noisy = np.clip(other_half + np.random.default_rng(0).normal(scale=0.2, size=other_half.shape), 0, 1)
    baseline = frechet_distance(real, other_half)
    assert baseline < 0.1
    assert min(precision_recall(real, other_half)) > 0.85
    assert frechet_distance(real, noisy) > 3 * baseline
    assert precision_recall(real, noisy)[0] < 0.5  # poor images
    assert precision_recall(real, other_half[labels > 4])[1] < 0.6  # missing classes
