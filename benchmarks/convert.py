"""Measure the time and peak memory of converting an fcvit_b48 checkpoint without verification.

Run:  .venv/bin/python benchmarks/convert.py [--repeat N] [--json FILE]

The script writes the checkpoint (synthetic weights, 206 MB) to a temporary folder. Each conversion runs in its own
process, so the start, the imports and the peak memory are included. For comparison, another process copies the same
file and flushes the copy to disk. Memory is relative to the file size, and time is also relative to the copy.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from fcvit.machine import processor_name
from fcvit.models.spec import ModelSpec
from fcvit.models.variants import VARIANTS
from fcvit.weights.synthetic import synthetic_tensors
from fcvit.weights.torch_file import write_zip

CONVERT = """
import resource, sys
from fcvit.cli import main
code = main(["convert", sys.argv[1], "-o", sys.argv[2], "--no-verify", "--overwrite"])
print("loaded", *[m for m in ("torch", "paddle") if m in sys.modules], file=sys.stderr)
scale = 1 if sys.platform == "darwin" else 1024
print("peak", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale, file=sys.stderr)
sys.exit(code)
"""
COPY = """
import os, shutil, sys
shutil.copyfile(sys.argv[1], sys.argv[2])
with open(sys.argv[2], "rb+") as file:
    os.fsync(file.fileno())
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeat", type=int, default=5, help="number of repetitions (default 5)")
    parser.add_argument("--json", type=Path, help="also write the results to this JSON file")
    arguments = parser.parse_args()
    results: dict = {"machine": f"{processor_name()}, {os.cpu_count()} cores, Python {platform.python_version()}"}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = folder / "fcvit_b48.pth"
        with source.open("wb") as file:
            write_zip(file, synthetic_tensors(ModelSpec(VARIANTS["fcvit_b48"], 1000)))
        size = source.stat().st_size
        results["file_mb"] = size / 1e6
        times: dict[str, list[float]] = {}
        peaks: dict[str, float] = {}
        for _ in range(arguments.repeat):
            for ending in (".safetensors", ".pdparams", ".pth"):
                seconds, report = run(CONVERT, source, folder / f"out{ending}")
                lines = dict(line.partition(" ")[::2] for line in report.splitlines())
                assert lines["loaded"] == "", f"a framework was imported: {lines['loaded']}"
                times.setdefault(ending, []).append(seconds)
                peaks[ending] = max(peaks.get(ending, 0), float(lines["peak"]) / size)
            times.setdefault("copy", []).append(run(COPY, source, folder / "copy")[0])
    for ending in peaks:
        results[ending] = {"seconds": statistics.median(times[ending]), "peak_over_file": peaks[ending]}
    results["copy"] = {"seconds": statistics.median(times["copy"])}
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n")
    print(f"{results['machine']}; file size {results['file_mb']:.0f} MB; median of {arguments.repeat} runs")
    for ending in peaks:
        row = results[ending]
        print(
            f"{ending}: {row['seconds']:.2f} s, peak memory {row['peak_over_file']:.2f} times the file size, "
            f"{row['seconds'] / results['copy']['seconds']:.1f} times the time of a copy"
        )


def run(code: str, source: Path, target: Path) -> tuple[float, str]:
    began = time.perf_counter()
    words = [sys.executable, "-c", code, str(source), str(target)]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    return time.perf_counter() - began, done.stderr


if __name__ == "__main__":
    main()
