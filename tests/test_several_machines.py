"""Two machines, emulated in network namespaces: the same results as on one machine, and lost processes.

The name of each machine resolves to 127.0.0.1 and is no help to find its address. The fault tests set the variables of
Paddle's launcher themselves, because the launcher takes seconds to start.
"""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from conftest import SMALL, needs_paddle, write_pth, write_squares
from fcvit.errors import INTERRUPTED, PeerLost, UnreadableFile
from fcvit.tasks.classification.recipe import ClassificationRecipe

pytestmark = [pytest.mark.ci, needs_paddle]
ADDRESSES = ("10.77.0.1", "10.77.0.2")
LIMIT = 8  # seconds; the value of --peer-timeout
PROGRAM = Path(sys.executable).with_name("fcvit")
EVALUATION = ["--device", "cpu", "--engine", "paddle", "--input-size", "96", "--batch-size", "1", "--workers", "0"]


class Machines:
    """Two network namespaces that are joined by a cable."""

    def __init__(self, folder, stack):
        self.folder, self.stack = folder, stack
        self.names = [f"fcvit-{os.getpid()}-{side}" for side in "ab"]
        self.processes = []
        for name in self.names:
            run("ip", "netns", "add", name)
            stack.callback(run, "ip", "netns", "del", name)
        a, b = self.names
        run("ip", "link", "add", "cable-a", "netns", a, "type", "veth", "peer", "name", "cable-b", "netns", b)
        for name, side, address in zip(self.names, "ab", ADDRESSES, strict=True):
            run("ip", "-n", name, "addr", "add", f"{address}/24", "dev", f"cable-{side}")
            self.link(name, "lo", "up")
            self.link(name, f"cable-{side}", "up")
        (folder / "hosts").write_text("127.0.0.1 localhost node-a node-b\n")
        (folder / "hidden").mkdir()
        (folder / "hidden" / "matplotlib.py").write_text("raise ModuleNotFoundError('hidden', name=__name__)")

    def link(self, name, device, state):
        run("ip", "-n", name, "link", "set", device, state)

    def start(self, machine, words, **variables):
        """Start a program on a machine. It ends with this test."""
        script = f'hostname node-{"ab"[machine]} && mount --bind {self.folder / "hosts"} /etc/hosts && exec "$@"'
        inside = ["ip", "netns", "exec", self.names[machine], "unshare", "--mount", "--uts", "sh", "-c", script, "sh"]
        environment = {**os.environ, "PYTHONPATH": str(self.folder / "hidden"), **variables}
        process = subprocess.Popen(
            [*inside, *map(str, words)],
            cwd=self.folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self.stack.callback(end, process)
        return process

    def launch(self, words, **options):
        """Start a command with Paddle's launcher on both machines, and return their outputs."""
        options = {"master": f"{ADDRESSES[0]}:{free_port()}", "nnodes": 2, "nproc_per_node": 1} | options
        launchers = []
        for machine, address in enumerate(ADDRESSES):
            given = {**options, "host": address, "rank": machine, "log_dir": self.folder / f"log-{machine}"}
            flags = [f"--{name}={value}" for name, value in given.items()]
            program = [sys.executable, "-m", "paddle.distributed.launch", *flags, PROGRAM]
            launchers.append(self.start(machine, [*program, *words]))
        return [finish(launcher, 120) for launcher in launchers]

    def job(self, words, second=None):
        """Start a command with one process on each machine, as the launcher does."""
        port = free_port()
        endpoints = [f"{address}:{port + 1}" for address in ADDRESSES]
        variables = {
            "PADDLE_MASTER": f"{ADDRESSES[0]}:{port}",
            "PADDLE_TRAINERS_NUM": "2",
            "PADDLE_NNODES": "2",
            "PADDLE_LOCAL_SIZE": "1",
            "PADDLE_TRAINER_ENDPOINTS": ",".join(endpoints),
            "PADDLE_DISTRI_BACKEND": "gloo",
        }
        self.processes = []
        for rank, command in enumerate((words, second or words)):
            own = {"PADDLE_TRAINER_ID": str(rank), "PADDLE_CURRENT_ENDPOINT": endpoints[rank]}
            self.processes.append(self.start(rank, [PROGRAM, *command], **variables, **own))
        return self.processes


def run(*words):
    subprocess.run(words, check=True, capture_output=True, timeout=20)


def end(process):
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate(timeout=20)


def finish(process, timeout):
    out, _ = process.communicate(timeout=timeout)
    return process.returncode, " ".join(out.split())


def free_port():
    """Return a port that is free in new namespaces, where nothing else runs."""
    return 40_000 + time.monotonic_ns() // 1000 % 20_000


@pytest.fixture(scope="module")
def machines(tmp_path_factory):
    """Two machines, with images, weights and a recipe."""
    folder = tmp_path_factory.mktemp("machines")
    if not (shutil.which("ip") and shutil.which("unshare") and os.geteuid() == 0):
        pytest.skip("network namespaces need root, ip and unshare")
    with contextlib.ExitStack() as stack:
        try:
            yield_value = Machines(folder, stack)
        except subprocess.CalledProcessError as error:
            pytest.skip(f"network namespaces are not permitted: {error.stderr.decode().strip()}")
        write_squares(folder / "images" / "train", {"left": 10, "right": 10})
        write_squares(folder / "images" / "val", {"left": 2, "right": 2})
        fields = {**SMALL, "epochs": 2, "warmup_epochs": 0, "ema_decay": 0.9, "operators": "plain", "data": "images"}
        (folder / "recipe.toml").write_text(ClassificationRecipe(**fields).to_toml())
        write_squares(folder / "many", {"0": 200, "1": 200})
        write_squares(folder / "few", {"0": 3, "1": 4})
        yield yield_value


@pytest.fixture(scope="module")
def weights(machines, digits_tensors):
    return write_pth(machines.folder / "digits.pth", digits_tensors)


def one_machine(machines, words, log):
    """Run a command in two processes on one machine, without namespaces."""
    launcher = [sys.executable, "-m", "paddle.distributed.launch", "--nproc_per_node=2", f"--log_dir={log}"]
    environment = {**os.environ, "PYTHONPATH": str(machines.folder / "hidden")}
    done = subprocess.run(
        [*launcher, str(PROGRAM), *map(str, words)],
        cwd=machines.folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_training_on_two_machines_gives_the_same_bytes_as_on_one(machines, tmp_path):
    words = ["train", "recipe.toml", "--device", "cpu", "-o"]
    results = machines.launch([*words, tmp_path / "two"])
    assert [code for code, _ in results] == [0, 0], results
    one_machine(machines, [*words, tmp_path / "one"], tmp_path / "log")
    for name in ("last.safetensors", "last-ema.safetensors"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name


def test_evaluation_on_two_machines_gives_the_same_bytes_as_on_one(machines, weights, tmp_path):
    words = ["eval", "--weights", weights, "--data", "few", *EVALUATION, "-o"]
    results = machines.launch([*words, tmp_path / "two"])
    assert [code for code, _ in results] == [0, 0], results
    one_machine(machines, [*words, tmp_path / "one"], tmp_path / "log")
    (one,), (two,) = (list((tmp_path / name).glob("*/predictions.csv")) for name in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()


def working(folder):
    """Return whether a run has finished an epoch, or has records of both processes."""
    journals = list(folder.glob("journals/*"))
    return (folder / "log.jsonl").exists() or len({path.name[0] for path in journals}) == 2


def wait_for(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def killed(machines, rank):
    os.kill(machines.processes[rank].pid, signal.SIGKILL)


def stopped(machines, rank):
    os.kill(machines.processes[rank].pid, signal.SIGSTOP)


def cut_off(machines, rank):
    machines.link(machines.names[0], "cable-a", "down")
    machines.stack.callback(machines.link, machines.names[0], "cable-a", "up")


@pytest.mark.parametrize("command", ["train", "eval"])
@pytest.mark.parametrize(
    ("fault", "rank", "message"),
    [
        (killed, 1, r"process 1 on node-b \(10.77.0.2\): no heartbeat for 6 s"),
        (stopped, 1, r"process 1 on node-b \(10.77.0.2\): no heartbeat for 6 s"),
        (killed, 0, r"process 0 on node-a \(10.77.0.1\) cannot be reached"),
        (stopped, 0, r"process 0 on node-a \(10.77.0.1\) cannot be reached for 6 s"),
        (cut_off, 1, r"process 1 on node-b \(10.77.0.2\): no heartbeat for 6 s"),
    ],
)
def test_a_lost_process_ends_the_other_one_within_the_limit(
    machines, weights, tmp_path, command, fault, rank, message
):
    run_folder = tmp_path / "run"
    words = {
        "train": ["train", "recipe.toml", "--device", "cpu", "--epochs", "1000"],
        "eval": ["eval", "--weights", weights, "--data", "many", *EVALUATION],
    }[command]
    processes = machines.job([*words, "--peer-timeout", LIMIT, "-o", run_folder])
    wait_for(lambda: working(run_folder) or processes[0].poll() is not None)
    fault(machines, rank)
    began = time.monotonic()
    code, output = finish(processes[1 - rank], LIMIT + 20)
    seconds = time.monotonic() - began
    assert code == PeerLost.exit_code, output
    assert re.search(message, output) and f"resume with: fcvit resume {run_folder}" in output, output
    assert seconds < LIMIT + 2
