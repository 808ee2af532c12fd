"""Batches that are read while the one before is learned from."""
import threading
import time

import pytest

from ppap_core.experts.read_ahead import ReadAhead


def test_reads_each_step_once_and_none_past_the_last():
    read = []

    def note(step: int) -> int:
        read.append(step)
        return step * step

    with ReadAhead(note, 4) as batches:
        assert [batches(step) for step in range(4)] == [0, 1, 4, 9]
    assert read == [0, 1, 2, 3]


def test_the_next_step_is_read_while_one_is_learned_from():
    was_read = threading.Event()

    def note(step: int) -> None:
        if step == 6:
            was_read.set()

    with ReadAhead(note, 9) as batches:
        batches(5)
        assert was_read.wait(5)


def test_the_same_step_again_and_any_other_order():
    with ReadAhead(str, 9) as batches:
        assert [batches(step) for step in (3, 3, 7, 2)] == ["3", "3", "7", "2"]


def test_what_reading_raises_is_raised_at_its_step():
    def fail(step: int) -> int:
        if step == 1:
            raise ValueError("a damaged file")
        return step

    with ReadAhead(fail, 3) as batches:
        assert batches(0) == 0
        with pytest.raises(ValueError, match="a damaged file"):
            batches(1)


def test_no_thread_and_no_reading_is_left():
    before = threading.active_count()

    def slowly(step: int) -> int:
        time.sleep(0.05)
        return step

    with pytest.raises(KeyboardInterrupt), ReadAhead(slowly, 100) as batches:
        batches(0)
        raise KeyboardInterrupt
    assert threading.active_count() == before
