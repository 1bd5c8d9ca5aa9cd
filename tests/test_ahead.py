"""Reading ahead in threads."""

import time
from itertools import islice

import pytest

from goal_ray.ahead import read_ahead


@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("ahead", [1, 3, 100])
def test_reading_ahead_keeps_the_order_and_takes_no_more_items_than_it_may(ahead, threads):
    taken = []

    def items():
        for number in range(20):
            taken.append(number)
            yield number

    for count, result in enumerate(read_ahead(lambda number: number * 10, items(), ahead, threads)):
        assert result == count * 10
        assert len(taken) <= count + ahead + 1


def test_an_error_comes_when_the_results_before_it_are_taken():
    def work(number):
        if number == 3:
            raise ValueError("three")
        return number

    results = read_ahead(work, range(9), 5)
    assert list(islice(results, 3)) == [0, 1, 2]
    with pytest.raises(ValueError, match="three"):
        next(results)


def test_who_stops_reading_does_not_wait_for_what_was_to_be_read_ahead():
    done = []

    def work(number):
        time.sleep(0.02)
        done.append(number)

    results = read_ahead(work, range(1000), 500, threads=1)
    next(results)
    results.close()
    assert len(done) < 100
