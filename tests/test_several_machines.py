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
from fcvit.errors import PeerLost, UnreadableFile
from fcvit.frameworks import installed
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
        environment = {**os.environ, **hidden(self.folder), **variables}
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

    def launch(self, program, words, **options):
        """Start a program with Paddle's launcher on both machines, and return the launchers."""
        options = {"master": f"{ADDRESSES[0]}:{free_port()}", "nnodes": 2, "nproc_per_node": 1} | options
        launchers = []
        for machine, address in enumerate(ADDRESSES):
            given = {**options, "host": address, "rank": machine, "log_dir": self.folder / f"log-{machine}"}
            flags = [f"--{name}={value}" for name, value in given.items()]
            launcher = [sys.executable, "-m", "paddle.distributed.launch", *flags]
            launchers.append(self.start(machine, [*launcher, program, *words]))
        return launchers

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


def hidden(folder):
    """Return variables that hide Matplotlib, because drawing is slow, and let Paddle use the package etcd3."""
    path = os.pathsep.join([str(folder / "hidden"), *sys.path[1:]])
    return {"PYTHONPATH": path, "PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION": "python"}


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
            emulated = Machines(folder, stack)
        except subprocess.CalledProcessError as error:
            pytest.skip(f"network namespaces are not permitted: {error.stderr.decode().strip()}")
        write_squares(folder / "images" / "train", {"left": 10, "right": 10})
        write_squares(folder / "images" / "val", {"left": 2, "right": 2})
        fields = {**SMALL, "epochs": 2, "warmup_epochs": 0, "ema_decay": 0.9, "operators": "plain", "data": "images"}
        (folder / "recipe.toml").write_text(ClassificationRecipe(**fields).to_toml())
        write_squares(folder / "many", {str(digit): 40 for digit in range(10)})
        write_squares(folder / "few", {str(digit): 1 for digit in range(10)})
        yield emulated


@pytest.fixture(autouse=True)
def joined_again(machines):
    yield
    machines.link(machines.names[0], "cable-a", "up")


@pytest.fixture(scope="module")
def weights(machines, digits_tensors):
    return write_pth(machines.folder / "digits.pth", digits_tensors)


def one_machine(machines, words, log):
    """Run a command in two processes on one machine, without namespaces."""
    launcher = [sys.executable, "-m", "paddle.distributed.launch", "--nproc_per_node=2", f"--log_dir={log}"]
    environment = {**os.environ, **hidden(machines.folder)}
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
    results = [finish(launcher, 120) for launcher in machines.launch(PROGRAM, [*words, tmp_path / "two"])]
    assert [code for code, _ in results] == [0, 0], results
    one_machine(machines, [*words, tmp_path / "one"], tmp_path / "log")
    for name in ("last.safetensors", "last-ema.safetensors"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name


def test_evaluation_on_two_machines_gives_the_same_bytes_as_on_one(machines, weights, tmp_path):
    words = ["eval", "--weights", weights, "--data", "few", *EVALUATION, "-o"]
    results = [finish(launcher, 120) for launcher in machines.launch(PROGRAM, [*words, tmp_path / "two"])]
    assert [code for code, _ in results] == [0, 0], results
    one_machine(machines, [*words, tmp_path / "one"], tmp_path / "log")
    (one,), (two,) = (list((tmp_path / name).glob("*/predictions.csv")) for name in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()


def test_prediction_on_two_machines_gives_the_same_bytes_as_on_one(machines, weights, tmp_path):
    words = ["predict", "few", "--weights", weights, "--device", "cpu", "--engine", "paddle", "--batch-size", 1, "-o"]
    results = [finish(launcher, 120) for launcher in machines.launch(PROGRAM, [*words, tmp_path / "two.csv"])]
    assert [code for code, _ in results] == [0, 0], results
    one_machine(machines, [*words, tmp_path / "one.csv"], tmp_path / "log")
    assert (tmp_path / "one.csv").read_bytes() == (tmp_path / "two.csv").read_bytes()
    assert not [*tmp_path.glob("*.run")]


def working(folder):
    """Return whether a run has finished an epoch, or has records of both processes."""
    journals = list(folder.glob("journals/*"))
    return (folder / "log.jsonl").exists() or len({path.name[0] for path in journals}) == 2


def killed(machines, rank):
    os.kill(machines.processes[rank].pid, signal.SIGKILL)


def stopped(machines, rank):
    os.kill(machines.processes[rank].pid, signal.SIGSTOP)


def cut_off(machines, rank):
    machines.link(machines.names[0], "cable-a", "down")


SILENT = r"process 1 on node-b \(10.77.0.2\): no heartbeat for 5 s; it was killed, is stopped or cannot be reached"
UNREACHABLE = r"process 0 on node-a \(10.77.0.1\) cannot be reached"


@pytest.mark.parametrize(
    ("command", "fault", "rank", "message"),
    [
        ("train", stopped, 1, SILENT),
        ("train", killed, 0, UNREACHABLE),
        ("train", cut_off, 1, SILENT),
        ("predict", killed, 1, SILENT),
        ("eval", stopped, 0, UNREACHABLE),
    ],
)
def test_a_lost_process_ends_the_other_one_within_the_limit(machines, weights, tmp_path, command, fault, rank, message):
    output = tmp_path / ("run.csv" if command == "predict" else "run")
    run_folder = tmp_path / "run.csv.run" if command == "predict" else output
    words = {
        "train": ["train", "recipe.toml", "--device", "cpu", "--epochs", "1000"],
        "eval": ["eval", "--weights", weights, "--data", "many", *EVALUATION],
        "predict": [
            "predict",
            "many",
            "--weights",
            weights,
            "--device",
            "cpu",
            "--engine",
            "paddle",
            "--batch-size",
            1,
        ],
    }[command]
    processes = machines.job([*words, "--peer-timeout", LIMIT, "-o", output])
    deadline = time.monotonic() + 60
    while not working(run_folder):
        assert processes[rank].poll() is None and time.monotonic() < deadline, finish(processes[rank], 1)
        time.sleep(0.05)
    fault(machines, rank)
    began = time.monotonic()
    assert_lost(processes[1 - rank], message, f"resume with: fcvit resume {run_folder}")
    assert time.monotonic() - began < LIMIT + 2
    if rank:
        assert json.loads((run_folder / "run.json").read_text())["status"] == "failed"
    if fault is cut_off:
        assert_lost(processes[rank], UNREACHABLE, f"resume with: fcvit resume {run_folder}")


def assert_lost(process, *messages):
    code, output = finish(process, 60)
    assert code == PeerLost.exit_code, output
    for message in messages:
        assert re.search(message, output), output


@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_is_refused_at_the_start_leaves_its_message(machines, weights, tmp_path, rank):
    """The data is missing on one of the machines."""
    words, refused = (
        ["eval", "--weights", weights, *EVALUATION, "-o", tmp_path / "run", "--data", data] for data in ("few", "none")
    )
    processes = machines.job(*([words, refused] if rank else [refused, words]))
    code, output = finish(processes[rank], 60)
    assert code == UnreadableFile.exit_code and "none" in output
    name = ("node-a", "node-b")[rank]
    line = output.removeprefix("fcvit: ")
    message = rf"process {rank} on {name} \({ADDRESSES[rank]}\) failed: {re.escape(line)} \(exit code 3\)"
    assert_lost(processes[1 - rank], message, "start the command again")


def test_a_run_continues_after_a_failure_with_etcd(machines, tmp_path):
    """Paddle's launcher starts the processes again on both machines after one was killed."""
    if not (shutil.which("etcd") and installed("etcd3")):
        pytest.skip("etcd or the package etcd3 is not installed")
    server, run_folder = f"http://{ADDRESSES[0]}:2379", tmp_path / "run"
    words = ["train", "recipe.toml", "--epochs", 8, "--device", "cpu", "-o", run_folder, "--resume-if-exists"]
    urls = ["--listen-client-urls", server, "--advertise-client-urls", server]
    machines.start(0, ["etcd", "--data-dir", tmp_path / "etcd", *urls, "--listen-peer-urls", "http://127.0.0.1:2380"])
    options = {"nnodes": 2, "nproc_per_node": 1, "elastic_level": 1, "job_id": "test"}
    launchers = machines.launch(
        PROGRAM, [*words, "--peer-timeout", LIMIT], master=f"etcd://{ADDRESSES[0]}:2379", **options
    )
    deadline = time.monotonic() + 90
    while not working(run_folder):
        assert launchers[1].poll() is None and time.monotonic() < deadline, finish(launchers[1], 1)
        time.sleep(0.05)
    (trainer,) = children(launchers[1].pid)
    os.kill(trainer, signal.SIGKILL)
    results = [finish(launcher, 90) for launcher in launchers]
    assert [code for code, _ in results] == [0, 0], results
    assert json.loads((run_folder / "run.json").read_text())["status"] == "finished"
    rows = [json.loads(line)["epoch"] for line in (run_folder / "log.jsonl").read_text().splitlines()]
    assert rows == list(range(1, 9))


def children(pid):
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
