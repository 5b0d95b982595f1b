"""Check that the compiler keeps three optimizations of the native engine, for each level of instruction sets.

Run:  .venv/bin/python benchmarks/native_kernels.py [--rounds 60] [--plant FAULT] [--json FILE]

Each kernel takes turns with a loop of nothing but fused multiply-adds (FMA). Its time for a vector is given in times of
an FMA of that loop:

- depthwise: a multiply-add of a depthwise convolution with kernel 11. The compiler may keep so many inputs in registers
  that none are left for the sums.
- GELU: an output of a depthwise convolution with kernel 3 and GELU, as in the channel mixer. The compiler may serialize
  the calls of GELU.
- minimum: the smaller of |x| and a limit. The compiler may compile `a < b ? a : b` into several instructions.

Lower quartiles of all rounds are compared. The exit code is 1 if a time exceeds its bound, or 2 if the kernels cannot
be compiled. `--plant` undoes an optimization in a copy of the headers, to see that the check fails.
"""

import argparse
import ctypes
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from fcvit.machine import processor_name
from fcvit.native import build

SOURCES = Path(build.__file__).parent
CALLS = {"depthwise": ("depthwise", 1500), "GELU": ("mixer_row", 2500), "minimum": ("minimum", 200_000)}
"""Kernel -> function in native_kernels.cc, and rounds of a call that takes about 1 ms."""
PEAK_ROUNDS, PEAK_VECTORS = 200_000, 12
BOUNDS = {
    "x86-64-v4": {"depthwise": 1.25, "GELU": 32.0, "minimum": 1.5},
    "x86-64-v3": {"depthwise": 1.55, "GELU": 56.0, "minimum": 1.3},
}
"""Level -> largest time of each kernel, in times of an FMA. Set on AMD EPYC (Zen 4) with GCC 12."""
PLANTS = {
    "depthwise": [("depthwise.h", 'asm volatile("" : "+r"(at));', "")],
    "GELU": [
        (
            "layers.h",
            "store(out + at, gelu(load(out + at)));",
            "{ static thread_local Floats last; store(out + at, last = gelu(load(out + at) + 0.0f * last)); }",
        )
    ],
    "minimum": [
        ("gemm.h", "return (Floats)_mm512_min_ps((__m512)a, (__m512)b);", "return a < b ? a : b;"),
        ("gemm.h", "return (Floats)_mm256_min_ps((__m256)a, (__m256)b);", "return a < b ? a : b;"),
    ],
}
"""Fault -> header, its text and the text that undoes an optimization."""


def compiled(level: str, plant: str | None, folder: Path) -> ctypes.CDLL:
    """Compile the kernels with the flags of the native library."""
    for path in (*SOURCES.glob("*.h"), SOURCES / "peak.cc"):
        text = path.read_text("utf-8")
        for name, known, planted in PLANTS.get(plant or "", ()):
            if name == path.name:
                if known not in text:
                    sys.exit(f"{path}: {known!r} not found; adapt PLANTS")
                text = text.replace(known, planted)
        (folder / path.name).write_text(text, "utf-8")
    library = folder / "kernels.so"
    files = [str(Path(__file__).with_suffix(".cc")), str(folder / "peak.cc"), "-o", str(library)]
    command = [build.find_compiler(), *build.flags(level), "-shared", "-I", str(folder), *files]
    if subprocess.run(command, check=False).returncode:
        sys.exit(2)
    return ctypes.CDLL(str(library))


def measure(library: ctypes.CDLL, rounds: int) -> dict[str, float]:
    """Return the time of each kernel for a vector, in times of an FMA."""
    result = (ctypes.c_double * 2)()
    fma: list[float] = []
    seconds: dict[str, list[float]] = {name: [] for name in CALLS}
    for _ in range(rounds):
        for name, (function, calls) in CALLS.items():
            library.fcvit_fma_peak(ctypes.c_int64(PEAK_ROUNDS), result)
            fma.append(result[0] / PEAK_ROUNDS / PEAK_VECTORS)
            library[function](ctypes.c_int64(calls), result)
            seconds[name].append(result[0] / result[1])
    limit = sorted(fma)[len(fma) // 4]
    return {name: sorted(times)[rounds // 4] / limit for name, times in seconds.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=60, help="number of measurement rounds")
    parser.add_argument("--plant", choices=PLANTS, help="optimization to undo")
    parser.add_argument("--json", type=Path, help="file for the ratios")
    options = parser.parse_args()
    print(f"{processor_name()}: time for a vector in times of an FMA")
    ratios = {}
    for level in build.levels():
        with tempfile.TemporaryDirectory() as folder:
            ratios[level] = measure(compiled(level, options.plant, Path(folder)), options.rounds)
    failed = False
    for level, kernels in ratios.items():
        for name, ratio in kernels.items():
            bound = BOUNDS.get(level, {}).get(name, float("inf"))
            failed = failed or ratio > bound
            print(f"{level:10} {name:10} {ratio:6.2f}  bound {bound:5.2f}{'  TOO SLOW' if ratio > bound else ''}")
    if options.json:
        options.json.write_text(json.dumps(ratios, indent=2) + "\n", "utf-8")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
