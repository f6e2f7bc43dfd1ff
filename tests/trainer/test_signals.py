"""Stop signals as requests."""

import os
import pty
import signal
import subprocess
import sys

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


def test_a_run_under_nohup_outlives_its_terminal():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop.wanted
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_terminal_that_is_closed_is_a_stop_and_what_is_printed_later_no_error(tmp_path):
    program = (f"import fcntl, termios, time; fcntl.ioctl(0, termios.TIOCSCTTY, 0)\n"
               "from officina.trainer.signals import StopRequest\n"
               "with StopRequest() as stop:\n    print('ready', flush=True)\n    while not stop.wanted: time.sleep(0.01)\n"
               f"print('words', flush=True)\nopen('{tmp_path}/reason', 'w').write(stop.reason)")
    terminal, inside = pty.openpty()
    process = subprocess.Popen([sys.executable, "-c", program], stdin=inside, stdout=inside, stderr=inside,
                               start_new_session=True)
    os.close(inside)
    with open(terminal, "rb", buffering=0) as lines:
        assert lines.readline() == b"ready\r\n"  # it may come in two pieces
    assert process.wait(30) == 0 and (tmp_path / "reason").read_text() == "SIGHUP"


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
