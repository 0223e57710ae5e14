"""Signals one after the other, sent to this process itself."""

import os
import signal

import pytest

from ranksearch.cli.stopping import SIGNALS, StopSignals


def test_each_signal_waits_for_less(capfd: pytest.CaptureFixture[str]) -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    with StopSignals(grace_s=1000.0) as stop:
        assert not stop.requested() and not stop.overdue()
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested() and not stop.overdue()
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.overdue()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert [signal.getsignal(number) for number in SIGNALS] == before
    assert "a second signal ends it now" in capfd.readouterr().err


def test_the_grace_ends() -> None:
    with StopSignals(grace_s=0.0) as stop:
        os.kill(os.getpid(), signal.SIGUSR1)
        assert stop.overdue()
