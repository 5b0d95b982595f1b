"""Test that batches contain the right images in order for any number of workers, with bounded prefetching."""

import contextlib
import dataclasses
import hashlib
import multiprocessing
import os
from functools import partial
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image

from fcvit.data import loader
from fcvit.data.class_folders import read_dataset
from fcvit.data.loader import batches
from fcvit.data.transforms.preprocess import CenterCrop, preprocess
from fcvit.errors import FcvitError
from fcvit.models.variants import Preprocessing

CROPS = (
    CenterCrop(Preprocessing(input_size=32, crop_fraction=1.0)),
    CenterCrop(Preprocessing(input_size=24, interpolation="bilinear")),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """41 images of different sizes, of which two cannot be read."""
    root = tmp_path_factory.mktemp("data")
    generator = np.random.default_rng(0)
    for index in range(41):
        path = root / "ab"[index % 2] / f"{index:02d}.png"
        path.parent.mkdir(exist_ok=True)
        pixels = generator.integers(0, 256, (40 + index, 30, 3), np.uint8)
        Image.fromarray(pixels).save(path)
    (root / "a" / "04.png").write_bytes(b"")
    (root / "b" / "33.png").write_bytes((root / "b" / "33.png").read_bytes()[:200])
    return root


@pytest.fixture(scope="module")
def images(folder):
    return read_dataset(folder, None, None, 2)


def test_batches_contain_their_images_in_order(images, folder):
    loaded = list(batches(images, range(5), 9, CROPS, 0))
    assert [batch.number for batch in loaded] == list(range(5))
    reasons = []
    for batch in loaded:
        positions = [*batch.indices, *(index for index, _ in batch.bad)]
        assert sorted(positions) == list(range(9 * batch.number, min(9 * batch.number + 9, 41)))
        assert [stack.shape[0] for stack in batch.pixels] == [len(batch.indices)] * 2
        for row, index in enumerate(batch.indices):
            path = folder / images.names[index]
            assert batch.digests[row] == hashlib.sha256(path.read_bytes()).digest()[:8]
            for stack, crop in zip(batch.pixels, CROPS, strict=True):
                assert (stack[row] == preprocess(path, crop.preprocessing)).all()
        reasons += [reason for _, reason in batch.bad]
    assert [reason.split(":")[0] for reason in reasons] == ["a/04.png", "b/33.png"]


def contents(loaded):
    return [(b.number, b.indices.tolist(), b.digests, [stack.tobytes() for stack in b.pixels], b.bad) for b in loaded]


@pytest.mark.slow
@pytest.mark.parametrize("size", [9, 40])
def test_batches_are_equal_with_and_without_workers(images, size):
    numbers = [0, 1] if size == 40 else [3, 0, 4]
    expected = contents(batches(images, numbers, size, CROPS, 0))
    assert contents(batches(images, numbers, size, CROPS, 2)) == expected


def sized(image, target, index):
    """Return large pixels whose size differs between the images, and a target with an array."""
    pixels = np.asarray(image.resize((100 + index, 120))).transpose(2, 0, 1).copy()
    return pixels, {"target": target, "mask": pixels[0] > 80}


def sized_contents(loaded):
    samples = [zip(batch.pixels[0], batch.targets[0], strict=True) for batch in loaded]
    return [[(p.shape, p.tobytes(), t["target"], t["mask"].tobytes()) for p, t in one] for one in samples]


@pytest.mark.slow
def test_batches_that_are_kept_do_not_change(images, monkeypatch):
    """The arrays are in memory that is used again. Without shared memory, they are copied through a pipe."""
    numbers = [*range(5)] * 6
    expected = sized_contents(batches(images, numbers, 9, [sized], 0))
    with contextlib.closing(loader.Workers(2)) as workers:
        for _ in range(2):
            early = batches(images, numbers, 9, [sized], workers)
            next(early)
            early.close()
            assert sum(len(batch.indices) for batch in batches(images, numbers, 9, [sized], workers)) == 6 * 39
        used = workers.memory._end if workers.memory else 1
        assert 0 < used <= 12 << 20, "batches of 1 MB that are not kept use the same memory"
        assert sized_contents(list(batches(images, numbers, 9, [sized], workers))) == expected
        assert workers.memory is None or workers.memory._end >= 20 << 20
    monkeypatch.setattr(loader, "SUPPORTED", False)
    assert sized_contents(batches(images, numbers[:6], 9, [sized], 1)) == expected[:6]


def test_a_batch_of_unreadable_images_is_empty(tmp_path):
    for name in ("a/1.png", "b/2.png"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).touch()
    (batch,) = batches(read_dataset(tmp_path, None, None, 2), [0], 4, CROPS, 0)
    assert len(batch.indices) == 0 and not len(batch.pixels[1]) and len(batch.bad) == 2


def test_a_deleted_image_is_reported_as_unreadable(images, monkeypatch):
    def read_deleted(location):
        raise FileNotFoundError(2, "No such file or directory")

    monkeypatch.setattr(loader.Location, "read", read_deleted)
    (batch,) = batches(images, [0], 1, CROPS, 0)
    assert batch.bad == ((0, "a/00.png: No such file or directory"),)


def test_prefetching_is_bounded(images, monkeypatch):
    """Memory use must not grow with the number of images."""
    submitted = []

    class Pool:
        def submit(self, jobs, work):
            submitted.append(len(jobs))
            return SimpleNamespace(result=lambda: loader._work(jobs, work), cancel=lambda: None)

    jobs = ([job] for job in zip(range(41), images.names, images.locations, images.targets, strict=True))
    running = loader._run_ahead(Pool(), jobs, partial(loader.decode_file, transforms=CROPS), 4)
    for taken in range(1, 10):
        next(running)
        assert len(submitted) == taken + 3


@pytest.mark.slow
def test_killed_workers_are_replaced(images):
    """The system can kill workers when memory is low. No image may be missing or repeated."""
    running = batches(images, range(41), 1, CROPS, 1)
    loaded = [next(running)]
    for child in multiprocessing.active_children():
        child.kill()
    assert contents([*loaded, *running]) == contents(batches(images, range(41), 1, CROPS, 0))


class CrashingLocation(NamedTuple):
    """The location of an image that crashes its decoder."""

    def read(self):
        os._exit(9)


@pytest.mark.slow
def test_an_image_that_crashes_its_process_is_reported_as_unreadable(images):
    locations = (*images.locations[:10], CrashingLocation(), *images.locations[11:])
    loaded = list(batches(dataclasses.replace(images, locations=locations), range(3), 16, CROPS, 2))
    bad = dict(bad for batch in loaded for bad in batch.bad)
    assert bad[10] == f"{images.names[10]}: the process that decodes it ends unexpectedly" and len(bad) == 3
    read = [index for batch in loaded for index in batch.indices]
    assert read == [index for index in range(41) if index not in bad]
    expected = next(iter(batches(images, [0], 16, CROPS, 0)))
    # Image 10 is in row 9, because an earlier image is unreadable.
    assert (np.delete(expected.pixels[0], 9, axis=0) == loaded[0].pixels[0]).all()


@pytest.mark.slow
def test_workers_that_cannot_start_are_an_error(images, monkeypatch):
    monkeypatch.setattr(loader, "_begin_worker", exit_immediately)
    with pytest.raises(FcvitError, match=r"end immediately .*__main__.*--workers 0"):
        list(batches(images, [0], 4, CROPS, 1))


def count_opencv_threads(image, target, index):
    import cv2

    return np.zeros((3, 1, 1), np.uint8), cv2.getNumThreads()


@pytest.mark.slow
def test_opencv_uses_one_thread_in_a_worker(images):
    """The workers already use all cores."""
    (batch,) = batches(images, [0], 4, [count_opencv_threads], 1)
    assert set(batch.targets[0]) == {1}


def exit_immediately(_):
    os._exit(1)


def test_sizes_can_differ_and_transforms_can_change_targets(tmp_path):
    """Segmentation and detection need batches as lists of images, and targets that a transform changes."""
    for name, side in (("a/1.png", 10), ("a/2.png", 14), ("b/3.png", 10)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (side, 10)).save(tmp_path / name)

    def uncropped(image, target, index):
        return np.asarray(image).transpose(2, 0, 1), {"class": target, "width": image.width, "at": index}

    dataset = read_dataset(tmp_path, None, None, 2)
    (batch,) = batches(dataset, [0], 3, [uncropped], 0)
    assert [pixels.shape for pixels in batch.pixels[0]] == [(3, 10, 10), (3, 10, 14), (3, 10, 10)]
    widths = [(target["class"], target["width"], target["at"]) for target in batch.targets[0]]
    assert widths == [(0, 10, 0), (0, 14, 1), (1, 10, 2)]
    (batch,) = batches(dataset.take([0, 2]), [0], 2, [uncropped], 0)
    assert batch.pixels[0].shape == (2, 3, 10, 10)
