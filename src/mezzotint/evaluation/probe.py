"""Probes: how well the classes of images can be read off fixed features.

>>> linear_probe(train, test, num_classes=10)                      # each a Labelled(features, labels)
{'top1': 0.97}
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mezzotint.data import BatchOrder
from mezzotint.errors import MezzotintError
from mezzotint.evaluation.lars import LARS
from mezzotint.randomness import check_seed

#: of MAE's protocol
BATCH_SIZE, BASE_LR, WARMUP = 16384, 0.1, 10 / 90
#: updates of a linear probe at least: a small data set fits into one batch, so that an epoch is one update
MIN_STEPS = 300
OPTIMIZERS = ("sgd", "lars")
#: candidates of a ridge probe's regularisation, over the number of examples
RIDGES = tuple(10.0**power for power in range(-6, 3))


class Labelled(NamedTuple):
    """Features float (N, D), and labels int64 (N,) on the same device."""

    features: Tensor
    labels: Tensor

    def rows(self, which: Tensor) -> Labelled:
        return Labelled(self.features[which], self.labels[which])

    def to(self, device: torch.device | str) -> Labelled:
        return Labelled(self.features.to(device), self.labels.to(device))


def accuracy(
    classify: Callable[[Tensor], Tensor], test: Labelled, num_classes: int, rows: int = 4096
) -> dict[str, float]:
    """Shares in [0, 1] of examples whose label has the highest score ("top1"), or one of the five highest ("top5").

    classify: features (B, D) → scores (B, num_classes), asked for `rows` at a time. top5 with more than ten classes.
    """
    tops = {"top1": 1} | ({"top5": 5} if num_classes > 10 else {})
    right = dict.fromkeys(tops, 0)
    for features, labels in zip(test.features.split(rows), test.labels.split(rows), strict=True):
        hits = classify(features).topk(max(tops.values()), dim=1).indices == labels.unsqueeze(1)
        for name, count in tops.items():
            right[name] += int(hits[:, :count].sum())
    return {name: count / len(test.labels) for name, count in right.items()}


# ---- Linear ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LinearProtocol:
    """How a linear probe is trained: MAE's protocol (He et al. 2022, appendix A.1), for sets of any size.

    Batches of 16,384, or of all examples where there are fewer; the learning rate rises linearly over the first ninth
    of the updates and falls to zero by a cosine; momentum 0.9, no weight decay. Raises MezzotintError for an unknown
    optimizer and for less than 1 epoch.
    """

    epochs: int = 90
    """At least; more, where that makes fewer than 300 updates."""
    optimizer: str = "sgd"
    """sgd, learning rate 0.1; or MAE's lars, 0.1 · batch / 256, which needs the thousands of updates of a large set."""
    seed: int = 0
    """Of the initial weights and of the order of the examples."""

    def __post_init__(self) -> None:
        if self.optimizer not in OPTIMIZERS:
            raise MezzotintError(f"optimizer {self.optimizer!r} is unknown; known: {', '.join(OPTIMIZERS)}")
        if self.epochs < 1:
            raise MezzotintError(f"a linear probe needs at least 1 epoch, got {self.epochs}")

    def order(self, count: int) -> BatchOrder:
        return BatchOrder(count, min(count, BATCH_SIZE), self.seed)

    def steps(self, count: int) -> int:
        return max(MIN_STEPS, math.ceil(self.epochs * count / min(count, BATCH_SIZE)))


class LinearProbe:
    """A BatchNorm without parameters and a linear layer, trained a batch at a time by `LinearProtocol`."""

    def __init__(
        self, dim: int, num_classes: int, count: int, protocol: LinearProtocol, device: torch.device | str = "cpu"
    ) -> None:
        """count: how many examples there are to train on."""
        self.head = nn.Linear(dim, num_classes)
        nn.init.trunc_normal_(
            self.head.weight, std=0.01, generator=torch.Generator().manual_seed(check_seed(protocol.seed))
        )
        nn.init.zeros_(self.head.bias)
        self.model = nn.Sequential(nn.BatchNorm1d(dim, affine=False, eps=1e-6), self.head).to(device)
        self.optimizer: torch.optim.Optimizer
        if protocol.optimizer == "lars":
            lr = BASE_LR * protocol.order(count).batch_size / 256
            self.optimizer = LARS(self.head.parameters(), lr, momentum=0.9)
        else:
            self.optimizer = torch.optim.SGD(self.head.parameters(), BASE_LR, momentum=0.9)
        steps = protocol.steps(count)
        warmup = WARMUP * steps

        def factor(step: int) -> float:
            if step < warmup:
                return step / warmup
            return (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2

        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, factor)

    @torch.enable_grad()
    def step(self, features: Tensor, labels: Tensor) -> None:
        """One update."""
        self.model.train()
        loss = F.cross_entropy(self.model(features), labels)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.schedule.step()

    @torch.no_grad()
    def __call__(self, features: Tensor) -> Tensor:
        """Features (B, D) → logits (B, num_classes)."""
        self.model.eval()
        logits: Tensor = self.model(features)
        return logits


def linear_probe(
    train: Labelled, test: Labelled, num_classes: int, protocol: LinearProtocol | None = None
) -> dict[str, float]:
    """The `accuracy` on `test` of a `LinearProbe` trained on `train`. Raises MezzotintError as `ridge_probe`."""
    protocol, count = protocol or LinearProtocol(), len(train.labels)
    _check(train)
    probe = LinearProbe(train.features.shape[1], num_classes, count, protocol, train.features.device)
    order = protocol.order(count)
    for step in range(protocol.steps(count)):
        probe.step(*train.rows(order.indices(step).to(train.labels.device)))
    return accuracy(probe, test, num_classes)


# ---- Nearest neighbours ----------------------------------------------------------------------------------------------


def knn_probe(
    train: Labelled, test: Labelled, num_classes: int, *, k: int = 20, temperature: float = 0.07
) -> dict[str, float]:
    """The `accuracy` on `test` of a vote of the k nearest examples of `train` by cosine similarity s.

    Votes weigh exp(s / temperature) (Wu et al. 2018, arXiv 1805.01978, section 3.4). Raises MezzotintError for a k
    outside of 1 to the number of examples, and for a temperature that is not positive.
    """
    check_neighbours(k, len(train.labels))
    if not temperature > 0:
        raise MezzotintError(f"the temperature of a k-NN probe must be positive, got {temperature:g}")
    keys = F.normalize(train.features, dim=1)

    def votes(features: Tensor) -> Tensor:
        similarity, nearest = (F.normalize(features, dim=1) @ keys.T).topk(k, dim=1)
        # Relative to the nearest one: exp(1 / 0.01) is beyond float32.
        weights = ((similarity - similarity[:, :1]) / temperature).exp()
        return weights.new_zeros(len(features), num_classes).scatter_add_(1, train.labels[nearest], weights)

    rows = max(1, 2**26 // len(keys))  # at a time, so that the similarities take 256 MiB at most
    return accuracy(votes, test, num_classes, rows)


def check_neighbours(k: int, count: int) -> None:
    """Raises `MezzotintError` unless k is 1 to the number of training images."""
    if not 1 <= k <= count:
        raise MezzotintError(f"k = {k} neighbours cannot be had of {count} training images; choose 1 to {count}")


# ---- Ridge regression ------------------------------------------------------------------------------------------------


def ridge_probe(train: Labelled, test: Labelled, num_classes: int, *, seed: int = 0) -> dict[str, float]:
    """The `accuracy` on `test` of the least-squares fit of one-hot targets to standardised features, with a penalty.

    Minimises ‖Y − XW − b‖² + N·ridge·‖W‖² in closed form, in float64. "ridge", given with the accuracy, is that of
    `RIDGES` that is best on a fifth of the training examples, drawn by `seed`, when fitted on the others, of equals the
    largest; then all are fitted. Raises MezzotintError for fewer than 2 examples.
    """
    _check(train)
    order = torch.randperm(len(train.labels), generator=torch.Generator().manual_seed(check_seed(seed))).to(
        train.labels.device
    )
    held_out, rest = order[: max(1, len(order) // 5)], order[max(1, len(order) // 5) :]
    path = _RidgePath(train.rows(rest), num_classes)
    validation = train.rows(held_out)
    found = {ridge: accuracy(path.at(ridge), validation, num_classes)["top1"] for ridge in RIDGES}
    best = max(RIDGES, key=lambda ridge: (found[ridge], ridge))
    return accuracy(_RidgePath(train, num_classes).at(best), test, num_classes) | {"ridge": best}


class _RidgePath:
    """Ridge regressions for every penalty from one eigendecomposition, of the smaller one of XᵀX and XXᵀ."""

    def __init__(self, train: Labelled, num_classes: int) -> None:
        x = train.features.double()
        self.mean, std = x.mean(0), x.std(0, correction=0)
        # A constant feature varies by rounding alone, which must not be blown up.
        self.std = torch.where(std > 1e-6 * self.mean.abs(), std, torch.ones_like(std))
        self.std[std == 0] = 1
        x = (x - self.mean) / self.std
        y = F.one_hot(train.labels, num_classes).double()
        self.bias = y.mean(0)
        if x.shape[1] <= len(x):
            values, self.basis = torch.linalg.eigh(x.T @ x)
        else:
            values, vectors = torch.linalg.eigh(x @ x.T)
            there = values > values[-1] * 1e-12  # centred, the examples are linearly dependent
            values, self.basis = values[there], x.T @ (vectors[:, there] / values[there].sqrt())
        self.values, self.moments, self.count = values.clamp(min=0), self.basis.T @ (x.T @ y), len(x)

    def at(self, ridge: float) -> Callable[[Tensor], Tensor]:
        """Features → scores."""
        weights = self.basis @ (self.moments / (self.values + self.count * ridge).unsqueeze(1))
        return lambda features: (features.double() - self.mean) / self.std @ weights + self.bias


def _check(train: Labelled) -> None:
    if len(train.labels) < 2:
        raise MezzotintError(f"a probe needs at least 2 training images, got {len(train.labels)}")
