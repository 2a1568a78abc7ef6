import threading
import time

import pytest

from data_modules.prepared.read_ahead import ReadAhead


def test_items_come_in_order_and_then_none():
    with ReadAhead(iter(range(1, 50)), lambda item: 1, 3) as ahead:
        for expected in range(1, 50):
            item = ahead.take(wait=True)
            assert item == expected
            ahead.release(item)
        assert ahead.take(wait=True) is None
        assert ahead.take(wait=True) is None


@pytest.mark.parametrize(("size", "most"), [(1, 7), (3, 3), (100, 1)])
def test_no_more_is_held_than_the_limit_and_one_item(size, most):
    made = []

    def items():
        for number in range(1, 20):
            made.append(number)
            yield number

    with ReadAhead(items(), lambda item: size, 7) as ahead:
        taken = []
        for _ in range(19):
            taken.append(ahead.take(wait=True))
            time.sleep(0.002)
            assert len(made) <= len(taken) - 1 + most
            ahead.release(taken[-1])
        assert taken == list(range(1, 20))


def test_a_reader_that_waits_for_a_release_is_not_waited_for():
    with ReadAhead(iter([1, 2]), lambda item: 10, 5) as ahead:
        assert ahead.take(wait=True) == 1
        assert ahead.take(wait=False) is None
        ahead.release(1)
        assert ahead.take(wait=True) == 2


def test_an_error_comes_after_the_items_before_it():
    def items():
        yield 1
        raise ValueError("broken")

    with ReadAhead(items(), lambda item: 1, 9) as ahead:
        assert ahead.take(wait=True) == 1
        with pytest.raises(ValueError, match="broken"):
            ahead.take(wait=True)


def test_leaving_ends_a_thread_that_waits():
    before = threading.active_count()
    with ReadAhead(iter([1, 2, 3]), lambda item: 1, 1) as ahead:
        ahead.take(wait=True)
    assert threading.active_count() == before
