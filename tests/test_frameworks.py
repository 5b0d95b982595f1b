"""Paddle and PyTorch are imported without a trace in the process that imports them."""

import signal
import subprocess
import sys

import pytest

from conftest import needs_paddle
from fcvit import frameworks
from fcvit.errors import UsageError

THREAD = "thread = threading.Thread(target=import_framework, args=('paddle',)); thread.start(); thread.join()"
HERE = "import_framework('paddle')"
BEFORE = f"import paddle; {HERE}"


def run(code):
    code = "import faulthandler, os, signal, sys, threading\nfrom fcvit.frameworks import import_framework\n" + code
    return subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=60)


@needs_paddle
@pytest.mark.parametrize("how", [HERE, *(pytest.param(how, marks=pytest.mark.slow) for how in (THREAD, BEFORE))])
@pytest.mark.slow
def test_importing_paddle_leaves_the_handlers_that_were_there(how):
    """Also in a thread, where Python cannot set any: Paddle's own end the process."""
    done = run(
        f"signal.signal(signal.SIGTERM, lambda *_: print('handled'))\n{how}\n{HERE}\n"
        "signal.raise_signal(signal.SIGTERM); print('alive')\n"
    )
    assert (done.returncode, done.stdout) == (0, "handled\nalive\n"), done.stderr


@pytest.mark.slow
@needs_paddle
def test_importing_paddle_leaves_the_default_and_the_handlers_of_others(how=THREAD):
    done = run(f"faulthandler.enable()\n{how}\nsignal.raise_signal(signal.SIGSEGV)")
    assert done.returncode == -signal.SIGSEGV and "Fatal Python error: Segmentation fault" in done.stderr
    assert not done.stdout
    done = run(f"{how}\nsignal.raise_signal(signal.SIGTERM)")
    assert (done.returncode, done.stdout) == (-signal.SIGTERM, "")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_while_a_framework_is_imported_is_no_missing_framework(tmp_path, number):
    """The framework here is one that an interrupt damages, as an import in C code does."""
    (tmp_path / "torch.py").write_text(
        "import signal\n"
        "try:\n"
        f"    signal.raise_signal({int(number)})\n"
        "except KeyboardInterrupt as error:\n"
        "    raise ImportError('libpaddle cannot be loaded') from error\n"
    )
    done = run(
        f"sys.path.insert(0, {str(tmp_path)!r})\n"
        "signal.signal(signal.SIGTERM, signal.default_int_handler)\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "try:\n"
        "    import_framework('torch')\n"
        "except KeyboardInterrupt:\n"
        "    print('interrupted')\n"
    )
    assert done.stdout == "interrupted\n", done.stderr


@pytest.mark.parametrize("framework", ["Paddle", "PyTorch"])
def test_a_build_without_gpus_is_told_from_a_machine_without(framework):
    with pytest.raises(
        UsageError, match=rf"CPU build of {framework} is installed.*install the GPU build.*https?|www|org"
    ):
        frameworks._place("gpu", "gpu", 0, None, "gpu", framework)
    with pytest.raises(UsageError, match="sees no GPU or no driver"):
        frameworks._place("gpu", "gpu", 0, 0, "gpu", framework)
    with pytest.raises(UsageError, match=r"sees 2 GPU\(s\) here; use gpu:0 to gpu:1"):
        frameworks._place("gpu:2", "gpu", 2, 2, "gpu", framework)
    assert frameworks._place("gpu:1", "gpu", 1, 2, "cuda", framework) == "cuda:1"
    assert [frameworks._place("auto", "auto", 0, gpus, "gpu", framework) for gpus in (None, 0, 1)] == [
        "cpu",
        "cpu",
        "gpu:0",
    ]
