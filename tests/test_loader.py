"""The order of the examples: the same after a resume, for any number of processes and for any number of workers."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mezzotint.data import Batch, BatchOrder, ImageDataset, ImageStream, digits, hugging_face, image_folder
from mezzotint.data import iterate_batches as iterate
from mezzotint.errors import MezzotintError

COUNT = 22


def pixels(i: int) -> np.ndarray:
    return np.random.default_rng(i).integers(0, 256, (8, 8, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pictures")
    for i in range(COUNT):
        (root / f"class{i % 2}").mkdir(exist_ok=True)
        Image.fromarray(pixels(i)).save(root / f"class{i % 2}" / f"{i:02}.png")
    return root


@pytest.fixture(params=["memory", "files", "stream"])
def dataset(request: pytest.FixtureRequest, folder: Path, tmp_path: Path) -> ImageDataset | ImageStream:
    if request.param == "memory":
        return digits()
    if request.param == "files":
        return image_folder(folder, 8)
    datasets = pytest.importorskip("datasets")
    rows = {"image": [Image.fromarray(pixels(i)) for i in range(COUNT)], "label": [i % 2 for i in range(COUNT)]}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(tmp_path)
    return hugging_face(tmp_path, 8, streaming=True, shuffle_buffer=7)


def assert_equal(left: list[Batch], right: list[Batch]) -> None:
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        assert a.labels is not None
        assert b.labels is not None
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.labels, b.labels)
        assert torch.equal(a.indices, b.indices)


# ----------------------------------------------------------------------------------------------- order


@pytest.mark.parametrize(("count", "size"), [(10, 3), (10, 5), (7, 20), (1, 4)])
def test_order_is_permutations_end_to_end(count: int, size: int) -> None:
    order = BatchOrder(count, size, seed=5)
    sequence = torch.cat([order.indices(step) for step in range(2 * count)])
    epochs = sequence.view(-1, count)
    assert torch.equal(epochs.sort(1).values, torch.arange(count).expand_as(epochs))
    if count > 1:
        assert len({tuple(epoch) for epoch in epochs.tolist()}) > 1


def test_order_has_no_state() -> None:
    order, again = BatchOrder(898, 64, seed=1), BatchOrder(898, 64, seed=1)
    forwards = [order.indices(step) for step in range(40)]
    for step in reversed(range(40)):
        assert torch.equal(again.indices(step), forwards[step])
    assert not torch.equal(BatchOrder(898, 64, seed=2).indices(0), forwards[0])
    forwards[0].zero_()  # a caller's own tensor
    assert torch.equal(order.indices(0), again.indices(0))
    assert order.indices(0).any()


def test_order_of_seeds_and_epochs_is_not_shared() -> None:
    """Epoch 1 of seed 0 is not epoch 0 of seed 1, as it would be if the two were added."""
    assert not torch.equal(BatchOrder(50, 50, seed=0).indices(1), BatchOrder(50, 50, seed=1).indices(0))


def test_order_explains_mistakes() -> None:
    for arguments, sentence in (((5, 0, 0), "batch size is 0"), ((0, 5, 0), "no examples"), ((5, 5, -1), "seed is -1")):
        with pytest.raises(MezzotintError, match=sentence):
            BatchOrder(*arguments)


# --------------------------------------------------------------------------------------------- batches


def test_batches_hold_the_examples_of_the_order(dataset: ImageDataset | ImageStream) -> None:
    order = BatchOrder.over(dataset, 8, seed=1)
    batches = list(iterate(dataset, order, start_step=0, stop_step=5))
    assert len(batches) == 5
    for step, batch in enumerate(batches):
        assert batch.images.dtype == torch.float32
        assert batch.images.shape == (8, *dataset.image_shape)
        assert (batch.images.min() >= -1) & (batch.images.max() <= 1)
        assert torch.equal(batch.indices, order.indices(step))
        if isinstance(dataset, ImageDataset):
            for image, label, index in zip(*batch[:3], strict=True):
                assert torch.equal(image, dataset[int(index)][0].float() / 127.5 - 1)
                assert label == dataset[int(index)][1]


@pytest.mark.parametrize("workers", [0, 2])
def test_resuming_gives_the_same_batches(dataset: ImageDataset | ImageStream, workers: int) -> None:
    order = BatchOrder.over(dataset, 8, seed=1)
    whole = list(iterate(dataset, order, start_step=0, stop_step=9))
    assert_equal(list(iterate(dataset, order, start_step=4, stop_step=9, workers=workers)), whole[4:])
    assert_equal(list(iterate(dataset, order, start_step=0, stop_step=9, workers=workers)), whole)


def test_processes_share_the_batches(dataset: ImageDataset | ImageStream) -> None:
    order = BatchOrder.over(dataset, 8, seed=1)
    whole = list(iterate(dataset, order, start_step=2, stop_step=6))
    ranks = [list(iterate(dataset, order, start_step=2, stop_step=6, rank=r, world_size=2)) for r in range(2)]
    assert all(len(batch.images) == 4 for rank in ranks for batch in rank)
    union = [
        Batch(*(torch.cat(parts) for parts in zip(*(share[:3] for share in shares), strict=True)))
        for shares in zip(*ranks, strict=True)
    ]
    assert_equal(union, whole)


def test_loading_leaves_the_global_generator_alone(folder: Path) -> None:
    dataset = image_folder(folder, 8)
    before = torch.get_rng_state()
    for workers in (0, 1):
        list(iterate(dataset, BatchOrder.over(dataset, 4), start_step=0, stop_step=2, workers=workers))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_stream_can_be_left_early(dataset: ImageDataset | ImageStream) -> None:
    order = BatchOrder.over(dataset, 4)
    batches = iterate(dataset, order, start_step=0, stop_step=10**9, workers=1)
    assert len(list(islice(batches, 3))) == 3


def test_unlabelled_batches_have_no_labels(folder: Path) -> None:
    for dataset in (digits(labels=False), image_folder(folder, 8, labels=False)):
        batch = next(iterate(dataset, BatchOrder.over(dataset, 4), start_step=0, stop_step=1))
        assert batch.labels is None


def test_a_batch_that_cannot_be_shared() -> None:
    dataset = digits()
    with pytest.raises(MezzotintError, match=r"batch of 8 cannot be shared equally by 3 processes; .* a multiple of 3"):
        iterate(dataset, BatchOrder.over(dataset, 8), start_step=0, stop_step=1, rank=0, world_size=3)


# --------------------------------------------------------------------------------------- unreadable images


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    (tmp_path / "a").mkdir()
    for i in range(24):
        Image.fromarray(pixels(i)).save(tmp_path / "a" / f"{i:02}.png")
        if i % 6 == 0:
            (tmp_path / "a" / f"{i:02}.png").write_bytes(b"broken")
    return tmp_path


def test_unreadable_images_are_replaced_alike_in_workers(damaged: Path) -> None:
    dataset = image_folder(damaged, 8, max_unreadable=4)
    order = BatchOrder.over(dataset, 8)
    alone = list(iterate(dataset, order, start_step=0, stop_step=3))
    assert_equal(list(iterate(image_folder(damaged, 8), order, start_step=0, stop_step=3, workers=2)), alone)


@pytest.mark.parametrize("workers", [0, 2])
def test_too_many_unreadable_images_are_one_sentence(damaged: Path, workers: int) -> None:
    """Also when they are spread over two workers, neither of which meets too many."""
    dataset = image_folder(damaged, 8, max_unreadable=3)
    order = BatchOrder.over(dataset, 8)
    with pytest.raises(MezzotintError) as caught:
        list(iterate(dataset, order, start_step=0, stop_step=4, workers=workers))
    assert str(caught.value).startswith("4 images cannot be read, and at most 3 may be skipped: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_images_of_a_stream(tmp_path: Path, damaged: Path, workers: int) -> None:
    datasets = pytest.importorskip("datasets")
    files = [{"bytes": file.read_bytes(), "path": None} for file in sorted((damaged / "a").iterdir())]
    rows = datasets.Dataset.from_dict({"image": files}, features=datasets.Features({"image": datasets.Image()}))
    rows.save_to_disk(tmp_path / "rows")

    def batches(limit: int, rank: int = 0, world_size: int = 1) -> list[Batch]:
        stream = hugging_face(tmp_path / "rows", 8, labels=False, streaming=True, max_unreadable=limit)
        order = BatchOrder.over(stream, 8)
        spread = {"rank": rank, "world_size": world_size, "workers": workers}
        return list(iterate(stream, order, start_step=0, stop_step=6, **spread))

    halves = [batches(4, rank, 2) for rank in range(2)]
    for whole, *parts in zip(batches(4), *halves, strict=True):
        assert torch.equal(whole.images, torch.cat([part.images for part in parts]))
    with pytest.raises(MezzotintError, match="4 images cannot be read, and at most 3 may be skipped"):
        batches(3)
