"""Stop signals as requests."""

import os
import signal

import pytest

from officina.trainer.signals import STOP_SIGNALS, StopRequest


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_signal_becomes_a_request(number: signal.Signals):
    before = signal.getsignal(number)
    with StopRequest() as stop:
        assert (stop.wanted, stop.reason) == (False, None)
        os.kill(os.getpid(), number)
        assert (stop.wanted, stop.reason) == (True, number.name)
    assert signal.getsignal(number) is before


def test_inner_block_sees_what_came_before_it():
    with StopRequest():
        os.kill(os.getpid(), signal.SIGTERM)
        with StopRequest() as inner:
            assert inner.reason == "SIGTERM"
        os.kill(os.getpid(), signal.SIGUSR1)  # the outer block still holds the handlers


def test_first_signal_names_the_reason_and_a_second_ctrl_c_interrupts():
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.reason == "SIGUSR1"
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            signal.pause()
