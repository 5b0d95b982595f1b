"""Tests of the journal: only complete and undamaged frames are read."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fcvit.errors import DoesNotFit
from fcvit.evaluation.journal import Frame, Journal, encode, frames

DTYPE = np.dtype([("index", "<i4"), ("loss", "<f8")])


RUN = bytes(range(32))


def frame(number, count=3):
    records = np.zeros(count, DTYPE)
    records["index"] = np.arange(count) + 10 * number
    records["loss"] = np.sqrt(records["index"])
    return Frame(number, records, {"bad": [[number, "not an image"]]})


def same(one, other):
    return one.number == other.number and one.records.tobytes() == other.records.tobytes() and one.extra == other.extra


def test_frames_can_be_read_back(tmp_path):
    journal = Journal(DTYPE, RUN, tmp_path / "j")
    for number in (4, 0, 2):
        journal.append(frame(number))
    journal.append(frame(7, count=0))
    again = Journal(DTYPE, RUN, tmp_path / "j")  # the file was not closed, as after a killed process
    assert list(again) == [0, 2, 4, 7]
    assert all(same(again[number], journal[number]) for number in again)
    for opened in (journal, again):
        opened.close()


def test_frames_written_after_an_incomplete_frame_are_read(tmp_path):
    journal = Journal(DTYPE, RUN, tmp_path / "j")
    journal.append(frame(0))
    journal.append(frame(1))
    journal.close()
    path = tmp_path / "j" / "0-0.journal"
    path.write_bytes(path.read_bytes()[:-5])
    again = Journal(DTYPE, RUN, tmp_path / "j")
    assert list(again) == [0]
    again.append(frame(2))
    again.close()
    assert list(Journal(DTYPE, RUN, tmp_path / "j")) == [0, 2]


def test_writers_use_separate_files(tmp_path):
    one, other = (Journal(DTYPE, RUN, tmp_path / "j", writer=rank) for rank in (0, 1))
    one.append(frame(0))
    other.append(frame(1))
    again = Journal(DTYPE, RUN, tmp_path / "j", writer=1)
    again.append(frame(2))
    assert sorted(path.name for path in (tmp_path / "j").iterdir()) == ["0-0.journal", "1-0.journal", "1-1.journal"]
    one.merge(again.encoded(), keep=False)
    assert list(one) == [0, 1, 2] and same(one[2], frame(2))
    one.read_folder()
    assert list(one) == [0, 1, 2]
    for journal in (one, other, again):
        journal.close()


def test_without_a_folder_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    journal = Journal(DTYPE, RUN, None)
    journal.append(frame(3))
    journal.close()
    assert list(journal) == [3] and not list(tmp_path.iterdir())


def test_records_of_another_run_are_rejected(tmp_path):
    journal = Journal(DTYPE, RUN, tmp_path / "j")
    journal.append(frame(0))
    journal.close()
    with pytest.raises(DoesNotFit, match=r"0-0\.journal: .*start a new run"):
        Journal(DTYPE, bytes(32), tmp_path / "j")
    (tmp_path / "j" / "0-0.journal").write_bytes((tmp_path / "j" / "0-0.journal").read_bytes()[:20])
    assert not list(Journal(DTYPE, RUN, tmp_path / "j"))  # killed while writing the file header


JOURNAL = b"".join(encode(frame(number)) for number in range(4))


@given(st.integers(0, len(JOURNAL)))
@settings(derandomize=True, max_examples=150, deadline=None)
def test_a_truncated_journal_gives_its_complete_frames(length):
    complete = list(frames(JOURNAL[:length], DTYPE))
    assert len(complete) == length * 4 // len(JOURNAL)
    assert all(same(one, frame(number)) for number, one in enumerate(complete))


@given(st.integers(0, len(JOURNAL) - 1), st.integers(1, 255))
@settings(derandomize=True, max_examples=200, deadline=None)
def test_a_damaged_frame_is_not_read(position, change):
    broken = bytearray(JOURNAL)
    broken[position] ^= change
    intact = list(frames(bytes(broken), DTYPE))
    damaged = position * 4 // len(JOURNAL)
    assert all(same(one, frame(number)) for number, one in enumerate(intact[:damaged]))
    assert len(intact) <= damaged


def test_records_with_another_dtype_are_not_read():
    assert not list(frames(JOURNAL, np.dtype([("index", "<i4"), ("x", "u1", (3,))])))
    with pytest.raises(TypeError):
        json.dumps(frame(0).records)  # additional data must be JSON
