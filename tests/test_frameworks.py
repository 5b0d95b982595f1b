"""Test that importing Paddle or PyTorch has no side effects, and test device names."""

import signal
import subprocess
import sys

import pytest

from conftest import needs_paddle
from fcvit import frameworks
from fcvit.errors import UsageError

IN_THREAD = "thread = threading.Thread(target=import_framework, args=('paddle',)); thread.start(); thread.join()"
IN_MAIN = "import_framework('paddle')"
IMPORTED_BEFORE = f"import paddle; {IN_MAIN}"


def run(code):
    code = "import faulthandler, os, signal, sys, threading\nfrom fcvit.frameworks import import_framework\n" + code
    return subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=60)


@needs_paddle
@pytest.mark.parametrize(
    "how", [IN_MAIN, *(pytest.param(how, marks=pytest.mark.slow) for how in (IN_THREAD, IMPORTED_BEFORE))]
)
@pytest.mark.slow
def test_importing_paddle_keeps_python_signal_handlers(how):
    """Handlers are kept also in a thread, where Python cannot set them. Paddle's handlers would end the process."""
    done = run(
        f"signal.signal(signal.SIGTERM, lambda *_: print('handled'))\n{how}\n{IN_MAIN}\n"
        "signal.raise_signal(signal.SIGTERM); print('alive')\n"
    )
    assert (done.returncode, done.stdout) == (0, "handled\nalive\n"), done.stderr


@pytest.mark.slow
@needs_paddle
def test_importing_paddle_keeps_default_handlers_and_handlers_of_other_libraries(how=IN_THREAD):
    done = run(f"faulthandler.enable()\n{how}\nsignal.raise_signal(signal.SIGSEGV)")
    assert done.returncode == -signal.SIGSEGV and "Fatal Python error: Segmentation fault" in done.stderr
    assert not done.stdout
    done = run(f"{how}\nsignal.raise_signal(signal.SIGTERM)")
    assert (done.returncode, done.stdout) == (-signal.SIGTERM, "")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_during_an_import_is_not_reported_as_a_missing_framework(tmp_path, number):
    """The fake framework turns an interrupt into an ImportError, as imports in C code do."""
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
def test_cpu_builds_and_missing_gpus_have_different_messages(framework):
    with pytest.raises(UsageError, match=rf"CPU build of {framework}.*GPU build.*\.org.*--device cpu"):
        frameworks._place("gpu", "gpu", 0, None, "gpu", framework)
    with pytest.raises(UsageError, match=r"no GPU.*driver.*nvidia-smi.*--device cpu"):
        frameworks._place("gpu", "gpu", 0, 0, "gpu", framework)
    with pytest.raises(UsageError, match=r"2 GPU\(s\).*gpu:0 to gpu:1"):
        frameworks._place("gpu:2", "gpu", 2, 2, "gpu", framework)
    assert frameworks._place("gpu:1", "gpu", 1, 2, "cuda", framework) == "cuda:1"
    assert [frameworks._place("auto", "auto", 0, gpus, "gpu", framework) for gpus in (None, 0, 1)] == [
        "cpu",
        "cpu",
        "gpu:0",
    ]
