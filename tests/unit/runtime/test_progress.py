import pytest

from runtime.progress import Pace, describe_progress, describe_seconds


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.2, "1 s"),
        (59, "59 s"),
        (59.5, "1 min 00 s"),
        (185, "3 min 05 s"),
        (3599.5, "1 h 00 min"),
        (7500, "2 h 05 min"),
        (100_800, "1 d 04 h"),
    ],
)
def test_a_duration_has_its_two_largest_units(seconds, words):
    assert describe_seconds(seconds) == words


def test_progress_says_share_and_what_is_left():
    assert describe_progress(25, 100, 2.0) == "25.0 %, 2 min 30 s left"
    assert describe_progress(25, 100, 0.0) == "25.0 %"
    assert describe_progress(100, 100, 2.0) == "100.0 %"


def test_pace_is_that_of_this_start_and_begins_at_its_first_line(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("runtime.progress.time.monotonic", lambda: now[0])
    pace = Pace(1000, done=400)
    now[0] = 190.0  # the first step waited for compilation
    assert pace.describe(401) == "40.1 %"
    now[0] = 200.0
    assert pace.describe(411) == "41.1 %, 9 min 49 s left"
    assert pace.describe(1000) == "100.0 %"
