"""Test that SIGINT and SIGTERM are delayed where their exception would be lost, and raised again if it was lost."""

import signal
import subprocess
import sys
import threading

import pytest

from fcvit import interrupts
from fcvit.interrupts import check, held_back, kept, remembered

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@pytest.fixture(autouse=True)
def both_interrupt():
    before = {number: signal.signal(number, signal.default_int_handler) for number in SIGNALS}
    yield
    handlers = {number: signal.signal(number, handler) for number, handler in before.items()}
    assert set(handlers.values()) == {signal.default_int_handler} and not interrupts._raised


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_delayed_until_the_end_of_the_block(number):
    done = []
    with pytest.raises(KeyboardInterrupt), held_back():
        signal.raise_signal(number)
        signal.raise_signal(number)
        done.append(1)
    assert done


def test_blocks_can_be_nested():
    done = []
    with pytest.raises(KeyboardInterrupt), held_back():
        with held_back():
            signal.raise_signal(signal.SIGTERM)
        done.append(1)
    assert done


def test_an_error_in_the_block_does_not_hide_the_signal():
    with pytest.raises(KeyboardInterrupt) as raised, held_back():
        signal.raise_signal(signal.SIGINT)
        raise OSError("lost connection")
    assert isinstance(raised.value.__context__, OSError)


def test_a_handler_that_does_not_raise_is_called_after_the_block():
    calls = []
    signal.signal(signal.SIGTERM, lambda *given: calls.append(given))
    with held_back():
        signal.raise_signal(signal.SIGTERM)
        assert not calls
    assert len(calls) == 1
    signal.signal(signal.SIGTERM, signal.default_int_handler)


def test_ignored_and_default_signals_keep_their_effect():
    code = (
        "import signal\nfrom fcvit.interrupts import held_back\n"
        "signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "with held_back():\n"
        "    signal.raise_signal(signal.SIGINT); print('here', flush=True)\n"
        "    signal.raise_signal(signal.SIGTERM); print('not here')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "here\n" and done.returncode == -signal.SIGTERM


def test_the_third_ctrl_c_ends_a_hanging_block():
    code = (
        "import signal, time\nfrom fcvit.interrupts import held_back\n"
        "with held_back():\n"
        "    for _ in range(3):\n"
        "        signal.raise_signal(signal.SIGINT)\n"
        "    time.sleep(60)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
    assert done.returncode == -signal.SIGINT
    assert done.stderr.count("Ctrl-C") == 1


def test_signals_are_not_delayed_in_other_threads():
    errors = []

    def work():
        try:
            with held_back(), kept():
                assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert not errors


def test_an_interrupt_that_was_replaced_by_another_error_is_raised_again():
    """For example, before Python 3.12 class creation replaces errors in `__set_name__` by a RuntimeError."""
    with pytest.raises(KeyboardInterrupt), kept():
        try:
            signal.raise_signal(signal.SIGTERM)
        except KeyboardInterrupt as error:
            raise ImportError("paddle") from error


def test_a_swallowed_interrupt_is_raised_at_the_next_check():
    class Swallows:
        def __del__(self):
            signal.raise_signal(signal.SIGTERM)

    sys.unraisablehook, hook = lambda _: None, sys.unraisablehook
    try:
        with pytest.raises(KeyboardInterrupt), kept():
            check()
            Swallows()
            with held_back():
                pass
            check()
    finally:
        sys.unraisablehook = hook


def test_other_errors_are_not_changed():
    with pytest.raises(OSError, match="disk"), kept():
        raise OSError("disk")
    check()


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_remembered_until_the_end_of_the_block(number):
    steps = []
    with pytest.raises(KeyboardInterrupt), remembered() as interrupted:
        for _ in range(2):
            steps.append(interrupted())
            signal.raise_signal(number)
            signal.raise_signal(number)  # within a second, so it counts as the same
        steps.append(interrupted())
    assert steps == [False, True, True]


def test_the_second_ctrl_c_stops_a_block_at_once(monkeypatch):
    """Repeated SIGTERM does not, because Paddle's launcher sends it several times."""
    clock, steps = [0.0], []
    monkeypatch.setattr(interrupts.time, "monotonic", lambda: clock[0])
    with pytest.raises(KeyboardInterrupt), remembered():
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
            clock[0] += 2
            signal.raise_signal(number)
            steps.append(number)
    assert steps == [signal.SIGTERM, signal.SIGTERM]


def test_remembering_replaces_default_handlers_but_not_ignored_signals():
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with pytest.raises(KeyboardInterrupt), remembered() as interrupted:
            signal.raise_signal(signal.SIGINT)
            assert not interrupted()
            signal.raise_signal(signal.SIGTERM)
            assert interrupted()
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    finally:
        for number in SIGNALS:
            signal.signal(number, signal.default_int_handler)
