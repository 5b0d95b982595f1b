"""The order and augmentation of training images."""

import threading
import time

import numpy as np
import pytest
from PIL import Image

from fcvit.data.loader import Batch
from fcvit.data.transforms.augment import draw_erasing, pixel_generator
from fcvit.errors import UsageError
from fcvit.tasks.classification.training import ClassificationTraining
from fcvit.training import batches
from fcvit.training.batches import MicroBatches, epoch_batches, epoch_order, grouped, prepared, steps_in_pass


def test_the_batch_size_must_be_divisible_by_the_micro_batches():
    assert MicroBatches(12, 2, 1, 3).images == 2 and MicroBatches(12, 2, 1, 3).numbers(2) == [3, 4, 5, 9, 10, 11]
    with pytest.raises(UsageError, match=r"batch_size 8 .*divisible by 3"):
        MicroBatches(8, 3)
    with pytest.raises(UsageError, match=r"batch_size 8 .* 1 image .*BatchNorm"):
        MicroBatches(8, 2, 0, 4)
    assert steps_in_pass(20, 8) == 2
    with pytest.raises(UsageError, match=r"batch_size 8.* 7 training images"):
        steps_in_pass(7, 8)


def test_epochs_of_a_number_of_steps_use_all_images_equally_often():
    orders = [epoch_order(10, 3, number, 4, steps=3) for number in range(5)]
    assert [len(order) for order in orders] == [12] * 5
    everything = np.concatenate(orders).reshape(6, 10)
    assert (np.sort(everything, axis=1) == np.arange(10)).all(), "each pass uses every image once"
    assert len({tuple(order) for order in everything}) == 6
    short = np.concatenate([epoch_order(10, 3, number, 5, steps=1) for number in range(12)])
    assert (short == np.concatenate(orders)).all()
    one_pass = np.random.default_rng([3, 2]).permutation(10)
    assert epoch_order(10, 3, 2, 4).tolist() == one_pass[:8].tolist()


def epoch(recipe, number, micro_batches=None, workers=0):
    """Return number, pixels and targets of each micro-batch of an epoch."""
    task = ClassificationTraining(recipe, None)
    transform, micro_batches = task.transform(number), micro_batches or MicroBatches(8)
    batches = epoch_batches(task.train, recipe.seed, number, transform, micro_batches, workers)
    return [(batch.number, batch.pixels[0], np.array([label for label, _ in batch.targets[0]])) for batch in batches]


def equal(one, other):
    return all((a[1] == b[1]).all() and (a[2] == b[2]).all() for a, b in zip(one, other, strict=True))


def test_order_and_augmentation_depend_only_on_seed_and_epoch(small):
    first = epoch(small(), 0)
    assert [(number, pixels.shape, len(labels)) for number, pixels, labels in first] == [
        (0, (8, 3, 32, 32), 8),
        (1, (8, 3, 32, 32), 8),
    ]
    assert equal(epoch(small(), 0), first)
    assert not equal(epoch(small(), 1), first) and not equal(epoch(small(seed=1), 0), first)


@pytest.mark.slow
def test_the_number_of_workers_does_not_change_the_images(small):
    assert equal(epoch(small(), 3, workers=2), epoch(small(), 3))


def test_the_number_of_processes_does_not_change_the_micro_batches(small):
    """Four micro-batches per step have the same images and augmentation in one process and in two."""
    alone = epoch(small(), 0, MicroBatches(8, accumulate=4))
    shared = [batch for rank in range(2) for batch in epoch(small(), 0, MicroBatches(8, 2, rank, 2))]
    assert equal(alone, sorted(shared, key=lambda batch: batch[0]))
    assert (
        np.concatenate([labels for _, _, labels in alone]) == np.concatenate([batch[2] for batch in epoch(small(), 0)])
    ).all()


def test_the_networks_input_is_mixed_normalized_and_erased(small):
    pixels = np.full((4, 3, 32, 32), 51, np.uint8)
    off = {"mixup": 0.0, "cutmix": 0.0, "erasing": 0.0, "label_smoothing": 0.0}
    colors = {"input_size": 32, "mean": (0.2, 0.2, 0.1), "std": (1.0, 1.0, 0.5)}

    def network_input(labels, epoch=0, **fields):
        task = ClassificationTraining(small(**{**off, **colors, **fields}), None)
        transform, image = task.transform(epoch), Image.new("RGB", (32, 32))
        drawn = [transform(image, label, index)[1] for index, label in enumerate(labels)]
        images, targets = task.inputs(Batch(0, np.arange(4), (), (pixels,), (drawn,), ()), epoch)
        return images.normalized(), targets

    images, targets = network_input([0, 1, 1, 0])
    assert images == pytest.approx(np.broadcast_to(np.array([0, 0, 0.2])[:, None, None], images.shape), abs=1e-7)
    assert targets.tolist() == [[1, 0], [0, 1], [0, 1], [1, 0]]
    erased, _ = network_input([0] * 4, erasing=1.0)
    assert all((image != clean).any() for image, clean in zip(erased, images, strict=True))
    again, _ = network_input([0] * 4, 1, erasing=1.0)
    for index, image in enumerate(again):
        rectangle = draw_erasing((32, 32), 1.0, pixel_generator(0, 1, index, "erase"))
        assert (image[rectangle.window] == rectangle.noise).all()
    assert (again != erased).any(), "each epoch erases a different rectangle"
    assert len({network_input([0, 0, 1, 1], e, mixup=1.0)[1][0, 0] for e in range(5)}) == 5, (
        "each epoch mixes with a different weight"
    )
    _, mixed = network_input([0, 0, 1, 1], mixup=1.0)
    assert mixed.sum(1) == pytest.approx(1) and 0 < mixed[0, 0] < 1


def test_a_micro_batch_has_samples_of_one_group():
    order, groups = [5, 0, 3, 1, 4, 2, 7, 6], [0, 0, 1, 1, 0, 1, 0, 1]
    assert grouped(order, groups, 2) == [5, 3, 0, 1, 2, 7, 4, 6]
    assert grouped([5, 0, 3, 1, 4, 2], [0, 0, 0, 1, 1, 1], 2) == [5, 3, 0, 1, 4, 2], "only the last one is mixed"


class Source:
    """A generator of numbers that counts how many were taken and whether it was closed."""

    def __init__(self, count, fail_at=None):
        self.taken, self.closed, self.count, self.fail_at = 0, threading.Event(), count, fail_at

    def __iter__(self):
        try:
            for number in range(self.count):
                self.taken += 1
                if number == self.fail_at:
                    raise UsageError("no more")
                yield number
        finally:
            self.closed.set()


@pytest.mark.parametrize("in_thread", [False, True])
def test_batches_are_prepared_in_order_and_at_most_two_ahead(in_thread):
    source, own = Source(20), threading.get_ident()
    ready = prepared(iter(source), lambda number: (10 * number, threading.get_ident()), in_thread)
    for number in range(20):
        batch, (value, thread) = next(ready)
        assert (batch, value) == (number, 10 * number) and (thread == own) is not in_thread
        if number == 5:
            time.sleep(0.05)  # the thread does not load more than two
            assert source.taken == (8 if in_thread else 6)
    assert next(ready, None) is None and source.closed.is_set()


@pytest.mark.parametrize("in_thread", [False, True])
def test_an_error_while_loading_is_raised_after_the_batches_before_it(in_thread):
    source = Source(9, fail_at=4)
    ready = prepared(iter(source), str, in_thread)
    assert [next(ready) for _ in range(4)] == [(number, str(number)) for number in range(4)]
    with pytest.raises(UsageError, match="no more"):
        next(ready)
    assert source.taken == 5 and source.closed.is_set()


def test_closing_prepared_batches_ends_their_thread():
    source, threads = Source(1000), threading.active_count()
    loaded = iter(source)
    ready = prepared(loaded, str, True)
    next(ready)
    ready.close()
    assert source.closed.is_set() and source.taken <= 4 and threading.active_count() == threads


@pytest.mark.parametrize(
    ("workers", "waited", "note"),
    [
        (4, 0.05, None),
        (4, 0.35, "the network waits for images 35% of the time; store smaller images"),
        (
            1,
            0.2,
            "the network waits for images 20% of the time; pass --workers 4, which is the number of cores, instead",
        ),
        (0, 0.2, None),
        (0, 0.5, "pass --workers 4"),
    ],
)
def test_a_note_reports_once_that_the_network_waits_for_images(notes, monkeypatch, workers, waited, note):
    clock = iter(range(1000))
    monkeypatch.setattr(batches.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(batches, "own_threads", lambda: 4)
    waiting = batches.WaitingTime(workers)
    for _ in range(4):  # epochs of 16 steps of a second; the first step waits for the start of the processes
        for step in range(16):
            waiting.after_step(step == 0, 15 + waited * step)
        assert not notes or waiting.elapsed >= 30
    assert len(notes) == bool(note) and (note is None or note in notes[0])
