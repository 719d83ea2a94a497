import gc

import pytest
from shared.timing import PairedTiming, time_pairs


class Machine:
    """A clock that only moves when `work` is called, and a diary of what happened."""

    def __init__(self):
        self.now = 0.0
        self.diary = []

    def clock(self):
        return self.now

    def work(self, name, *seconds):
        """Return a function that takes the given times, call by call, the last one for ever."""
        left = list(seconds)

        def call():
            self.diary.append(name)
            self.now += left.pop(0) if len(left) > 1 else left[0]

        return call

    def synchronize(self):
        self.diary.append("sync")


@pytest.fixture
def machine():
    return Machine()


def test_pairs_are_interleaved_and_change_their_order(machine):
    slow, fast = machine.work("A", 3.0), machine.work("B", 1.0)
    time_pairs(slow, fast, pairs=4, warmup=0, clock=machine.clock)
    assert "".join(machine.diary) == "ABBAABBA"


def test_warm_up_runs_first_and_does_not_count(machine):
    slow, fast = machine.work("A", 100.0, 100.0, 3.0), machine.work("B", 50.0, 50.0, 2.0)
    timing = time_pairs(slow, fast, pairs=2, warmup=2, clock=machine.clock)
    assert "".join(machine.diary) == "ABAB" + "ABBA"
    assert timing == PairedTiming(slow=(3.0, 3.0), fast=(2.0, 2.0))


def test_seconds_are_reported_in_the_order_of_the_pairs(machine):
    slow, fast = machine.work("A", 4.0, 8.0, 16.0), machine.work("B", 1.0, 2.0, 3.0)
    timing = time_pairs(slow, fast, pairs=3, warmup=0, clock=machine.clock)
    assert timing == PairedTiming(slow=(4.0, 8.0, 16.0), fast=(1.0, 2.0, 3.0))


def test_the_ratio_is_the_median_of_the_pairs_not_the_ratio_of_the_medians():
    # The ratios are 1, 5 and 3; the medians are 20 and 4.
    assert PairedTiming(slow=(1.0, 20.0, 30.0), fast=(1.0, 4.0, 10.0)).ratio == 3.0


def test_one_disturbed_pair_does_not_move_the_ratio():
    assert PairedTiming(slow=(4.0, 4.0, 900.0), fast=(2.0, 2.0, 2.0)).ratio == 2.0


def test_a_machine_that_slows_down_does_not_move_the_ratio():
    drift = (1.0, 2.0, 4.0, 8.0, 16.0)
    assert PairedTiming(slow=tuple(6.0 * d for d in drift), fast=drift).ratio == 6.0


def test_a_reading_of_zero_gives_a_large_ratio_and_no_error():
    assert PairedTiming(slow=(1.0,), fast=(0.0,)).ratio > 1e8
    assert PairedTiming(slow=(0.0,), fast=(0.0,)).ratio == 0.0


def test_each_reading_waits_for_the_device(machine):
    slow, fast = machine.work("A", 1.0), machine.work("B", 1.0)
    time_pairs(slow, fast, pairs=1, warmup=0, clock=machine.clock, synchronize=machine.synchronize)
    assert machine.diary == ["sync", "A", "sync", "sync", "B", "sync"]


def test_what_the_device_still_does_belongs_to_the_call_that_started_it(machine):
    pending = []

    def launch():
        pending.append(5.0)

    def synchronize():
        machine.now += sum(pending)
        pending.clear()

    timing = time_pairs(
        launch, machine.work("B", 1.0), pairs=2, warmup=1, clock=machine.clock, synchronize=synchronize
    )
    assert timing == PairedTiming(slow=(5.0, 5.0), fast=(1.0, 1.0))


def test_no_garbage_collection_while_timing_and_as_before_afterwards(machine):
    was_on = []
    time_pairs(lambda: was_on.append(gc.isenabled()), lambda: None, pairs=2, warmup=0, clock=machine.clock)
    assert was_on == [False, False]
    assert gc.isenabled()


def test_garbage_collection_comes_back_when_a_function_raises():
    def fail():
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        time_pairs(fail, fail, warmup=0)
    assert gc.isenabled()


def test_garbage_collection_that_was_off_stays_off():
    gc.disable()
    try:
        time_pairs(lambda: None, lambda: None, pairs=1)
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_no_pairs_is_an_error():
    with pytest.raises(ValueError, match="at least 1"):
        time_pairs(lambda: None, lambda: None, pairs=0)


def test_the_clock_cannot_be_replaced_by_the_code_under_test(monkeypatch):
    def no_clock():
        raise AssertionError("asked a clock that the code under test can replace")

    monkeypatch.setattr("time.perf_counter", no_clock)
    timing = time_pairs(lambda: None, lambda: None, pairs=1)
    assert len(timing.slow) == len(timing.fast) == 1
