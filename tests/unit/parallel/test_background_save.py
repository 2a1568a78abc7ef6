"""Saving while training goes on: what follows a save comes after it, and failures are not lost."""

import threading

import pytest

from memlm.parallel.background_save import BackgroundSave


def test_what_follows_waits_for_the_save():
    may_end, events = threading.Event(), []

    def write():
        assert may_end.wait(10)
        events.append("written")

    save = BackgroundSave(write)
    save.then(lambda: events.append("first"))
    save.then(lambda: events.append("second"))
    save.wait(0.01)
    assert events == []
    may_end.set()
    save.wait()
    save.then(lambda: events.append("late"))
    assert events == ["written", "first", "second", "late"]


def test_a_failure_is_raised_by_who_waits_and_nothing_follows():
    may_end, events = threading.Event(), []

    def write():
        assert may_end.wait(10)
        raise OSError("no space left")

    save = BackgroundSave(write)
    save.then(lambda: events.append("followed"))
    may_end.set()
    with pytest.raises(OSError, match="no space left"):
        save.wait()
    assert events == []


def test_what_follows_may_fail():
    def fail():
        raise ValueError("no link")

    may_end = threading.Event()
    save = BackgroundSave(lambda: may_end.wait(10) and None)
    save.then(fail)
    may_end.set()
    with pytest.raises(ValueError, match="no link"):
        save.wait()
