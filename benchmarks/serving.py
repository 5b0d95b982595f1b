"""Measure `fcvit serve` with and without batching: latency (p50, p99) and requests per second at 1, 8 and 64 clients.

Run:  .venv/bin/python benchmarks/serving.py [--weights FILE | --variant NAME] [--clients N ...] [--max-batch-size N]
          [--rounds N] [--seconds N] [--json FILE]

Both services run at the same time on this machine and are measured in turns, so that other programs disturb both. The
clients are threads with one connection each, which send the next photograph when they have the answer to the last one.
Each measurement ends after `--seconds`. The figures are medians over the rounds. "images per batch" is the mean over
the batches. Every answer must have status 200.
"""

import argparse
import contextlib
import http.client
import json
import socket
import statistics
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from importlib import resources
from pathlib import Path

import numpy as np

from fcvit.machine import available_threads, processor_name
from fcvit.models.spec import ModelSpec
from fcvit.models.variants import VARIANTS
from fcvit.report.tables import console, table
from fcvit.weights.checkpoint import MEMORY, Checkpoint
from fcvit.weights.reading import Weights
from fcvit.weights.synthetic import synthetic_tensors
from fcvit.weights.writing import write_weights

ASSETS = resources.files("fcvit") / "assets"
STARTING = 300  # seconds until a service must be ready
ANSWER = 60  # seconds until a request must be answered


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    chosen = parser.add_mutually_exclusive_group()
    chosen.add_argument("--weights", type=Path, help="a checkpoint (default: the included digits network)")
    chosen.add_argument("--variant", choices=VARIANTS, help="measure synthetic weights of a variant")
    parser.add_argument("--clients", nargs="+", type=int, default=[1, 8, 64])
    parser.add_argument("--max-batch-size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=5, help="time of each measurement (default 5)")
    parser.add_argument("--json", type=Path, help="also write the results to this JSON file")
    arguments = parser.parse_args()
    with tarfile.open(str(ASSETS / "nuclei.tar")) as archive:
        photographs = [
            archive.extractfile(member).read() for member in archive if member.name.startswith("images/val/")
        ]
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        weights = arguments.weights or Path(str(ASSETS / "digits.pth.tar"))
        if arguments.variant:
            weights = Path(name) / f"{arguments.variant}.safetensors"
            spec = ModelSpec(VARIANTS[arguments.variant], 1000)
            source = Checkpoint(weights, MEMORY, {}, None, b"")
            write_weights(weights, Weights(spec, synthetic_tensors(spec), source, "torch", None, None, (), ()))
        sizes = {f"up to {arguments.max_batch_size}": arguments.max_batch_size, "1": 1}
        ports = {label: stack.enter_context(service(weights, size)) for label, size in sizes.items()}
        measured: dict[tuple[int, str], list[dict[str, float]]] = {}
        for _ in range(arguments.rounds):
            for clients in arguments.clients:
                for label, port in ports.items():
                    row = load_test(port, clients, arguments.seconds, photographs)
                    measured.setdefault((clients, label), []).append(row)
    results = [
        {"clients": clients, "batch": label} | {key: statistics.median(row[key] for row in rows) for key in rows[0]}
        for (clients, label), rows in measured.items()
    ]
    columns = ("clients", "batch", "requests/s", "p50 (ms)", "p99 (ms)", "images per batch", "requests")
    cells = [
        [f"{row[name]:.1f}" if isinstance(row[name], float) else str(row[name]) for name in columns] for row in results
    ]
    title = f"{weights.stem}; {processor_name()}, {available_threads()} threads; {arguments.rounds} rounds"
    console().print(table(*columns, rows=cells, title=title, right=columns))
    if arguments.json:
        arguments.json.write_text(json.dumps({"title": title, "results": results}, indent=1) + "\n", "utf-8")


@contextlib.contextmanager
def service(weights: Path, max_batch_size: int):
    """Run a service, and yield its port when it is ready."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = [sys.executable, "-m", "fcvit", "serve", "-q", "--weights", str(weights), "--port", str(port)]
    process = subprocess.Popen([*words, "--max-batch-size", str(max_batch_size)])
    try:
        end = time.monotonic() + STARTING
        while True:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=ANSWER)
            with contextlib.suppress(OSError), contextlib.closing(connection):
                connection.request("GET", "/health")
                if connection.getresponse().status == 200:
                    break
            if process.poll() is not None or time.monotonic() > end:
                sys.exit("the service did not start")
            time.sleep(0.1)
        yield port
    finally:
        process.terminate()
        process.wait()


def load_test(port: int, clients: int, seconds: float, photographs: list[bytes]) -> dict[str, float]:
    """Send requests from several threads, and return the rate, latencies and batch size."""
    latencies: list[float] = []
    batches: list[float] = []
    start = threading.Barrier(clients + 1)

    def client(number: int) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=ANSWER)
        with contextlib.closing(connection):
            connection.connect()
            start.wait(ANSWER)
            end, sent = time.perf_counter() + seconds, number
            while (began := time.perf_counter()) < end:
                connection.request("POST", "/predict", photographs[sent % len(photographs)])
                answer = connection.getresponse()
                content = answer.read()
                assert answer.status == 200, content
                latencies.append(time.perf_counter() - began)
                batches.append(1 / int(answer.headers["x-batch-size"]))
                sent += 1

    with ThreadPoolExecutor(clients) as pool:
        running = [pool.submit(client, number) for number in range(clients)]
        start.wait(ANSWER)
        began = time.perf_counter()
        for future in running:
            future.result()
    taken = time.perf_counter() - began
    p50, p99 = np.percentile(latencies, [50, 99]) * 1000
    return {
        "requests/s": len(latencies) / taken,
        "p50 (ms)": float(p50),
        "p99 (ms)": float(p99),
        "images per batch": len(batches) / sum(batches),
        "requests": len(latencies),
    }


if __name__ == "__main__":
    main()
