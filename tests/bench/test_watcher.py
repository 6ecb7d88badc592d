"""What a person reads of a run that is under way."""

import pytest

from bench import watcher
from bench.watcher import STATE, Watcher, duration
from bench.work import Finished


def part(trials: int, failures: int = 0) -> Finished:
    return Finished(("t",) * trials, ("l",) * trials, failures, "idlg | fcn | none", (), 1.0)


@pytest.fixture
def clock(monkeypatch):
    """The time that a run thinks it is."""
    now = [0.0]
    monkeypatch.setattr(watcher.time, "monotonic", lambda: now[0])
    return now


def test_a_line_says_how_far_how_fast_how_long_by_whom_and_what_failed(tmp_path, capsys, clock):
    with Watcher(tmp_path, quiet=False) as watching:
        watching.started(100, 1000)
        clock[0] = 10.0
        watching.advanced(part(200, failures=3), workers=2)
    said = capsys.readouterr().err.splitlines()
    assert said[0] == "100 of 1000 trials are there already"
    assert said[1] == (" 30 %  300 of 1000 trials  20/s  35 s left  2 workers  3 failed  idlg | fcn | none")


def test_without_a_terminal_there_is_a_line_a_tenth_or_a_minute(tmp_path, capsys, clock):
    with Watcher(tmp_path, quiet=False) as watching:
        watching.started(0, 1000)
        for _ in range(100):
            clock[0] += 1
            watching.advanced(part(10), workers=1)
        assert len(capsys.readouterr().err.splitlines()) == 10
        watching.started(0, 10**6)
        for _ in range(10):
            clock[0] += 30
            watching.advanced(part(1), workers=1)
        assert len(capsys.readouterr().err.splitlines()) == 3


def test_quiet_is_quiet_but_another_terminal_can_look(tmp_path, capsys, clock):
    with Watcher(tmp_path, quiet=True) as watching:
        watching.started(0, 10)
        clock[0] = 2.0
        watching.advanced(part(5), workers=0)
        assert (tmp_path / STATE).read_text() == " 50 %  5 of 10 trials  2.5/s  2 s left  idlg | fcn | none"
    assert capsys.readouterr().err == ""
    assert not (tmp_path / STATE).exists()


def test_no_time_is_foretold_before_anything_is_known(tmp_path, capsys, clock):
    with Watcher(tmp_path, quiet=False) as watching:
        watching.started(0, 1000)
        clock[0] = 61.0
        watching.advanced(part(1), workers=1)
    assert "left" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0.4, "0 s"), (99, "99 s"), (100, "2 min"), (7200, "2.0 h"), (200_000, "2.3 days")],
)
def test_a_time_is_said_in_the_unit_that_people_use(seconds, said):
    assert duration(seconds) == said
