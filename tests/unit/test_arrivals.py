"""When a batch of requests has come whole, by their names."""

from __future__ import annotations

from megarl.server.arrivals import Arrivals, name_of


def in_the_engine(batch: int, size: int, number: int) -> str:
    """As vLLM names a child of a request."""
    return f"{number}_{name_of(batch, size, number)}-1f2e3d4c"


def test_a_batch_is_whole_once_all_of_it_came() -> None:
    arrivals = Arrivals()
    for number in range(3):
        arrivals.came(in_the_engine(7, 3, number))
        assert arrivals.whole == (number == 2)
    arrivals.came(in_the_engine(17, 2, 0))
    assert not arrivals.whole
    arrivals.came(in_the_engine(17, 2, 1))
    assert arrivals.whole


def test_requests_of_others_are_not_waited_for() -> None:
    arrivals = Arrivals()
    arrivals.came("chatcmpl-9of9-0")
    assert arrivals.whole
