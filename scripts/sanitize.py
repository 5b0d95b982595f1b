"""Run the native code with the sanitizers of the compiler: `python scripts/sanitize.py`, or one of its two checks.

- `address`: addresses and undefined behavior of all kernels and of the engine, at ragged sizes. Runs the fast tests of
  the kernels and the networks of `thread`. It needs Paddle.
- `thread`: data races of the engine. Several threads share an image, and several networks compute at once.

The exit code is 1 if a sanitizer reports an error or the networks depend on the number of threads. Needs GCC on Linux.
"""

import argparse
import dataclasses
import importlib.util
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from fcvit.inference.native_network import NativeNetwork
from fcvit.models.spec import ModelSpec
from fcvit.models.variants import VARIANTS
from fcvit.native.build import EXTRA_FLAGS, find_compiler, levels
from fcvit.weights.reading import Weights
from fcvit.weights.synthetic import synthetic_tensors

ROOT = Path(__file__).parents[1]
# Optimized code of sanitizers for the widest vectors takes minutes to compile.
FLAGS = f"-march={levels()[-1]} -O1 -ftree-vectorize -g1 -fno-sanitize-recover=undefined"
CHECKS = {
    "address": ("-fsanitize=address,undefined", ("libasan.so", "libubsan.so")),
    "thread": ("-fsanitize=thread", ("libtsan.so",)),
}
FOUND = 66  # exit code of a process in which a sanitizer found an error
OPTIONS = {
    "ASAN_OPTIONS": f"exitcode={FOUND}:detect_leaks=0:alloc_dealloc_mismatch=0",  # Python and Paddle have both
    "UBSAN_OPTIONS": f"exitcode={FOUND}:print_stacktrace=1",
    "TSAN_OPTIONS": f"exitcode={FOUND}:halt_on_error=1:ignore_noninstrumented_modules=1",
}
SIZES = ((32, 32), (33, 47), (1, 1), (97, 65))
SMALL = dataclasses.replace(VARIANTS["fcvit_digits"], depths=(1, 2, 1, 1))
# Channels that do not fill the vectors, and networks without parts of the published ones.
RAGGED = dataclasses.replace(SMALL, widths=(10, 20, 30, 40), heads=5)
WIDE = dataclasses.replace(SMALL, widths=(64, 72, 136, 264), global_context=False)
TESTS = ("tests/native", "--ignore=tests/native/test_build.py", "-m", "not slow and not ci")


def run_networks() -> None:
    """Run networks with threads that share an image, with one image for each thread, and with several at once."""
    for variant in (SMALL, RAGGED, WIDE):
        spec = ModelSpec(variant, 10)
        weights = Weights(spec, synthetic_tensors(spec), None, "torch", None, None, (), ())
        one, other = (NativeNetwork(weights, variant.preprocessing, threads) for threads in (1, 3))
        for size in SIZES:
            images = np.random.default_rng(0).integers(0, 256, (4, 3, *size), np.uint8)
            with ThreadPoolExecutor(4) as pool:
                batches = [images[:1], images, images[:2], images[:1]]
                for network in (other, one):
                    for batch, (logits,) in zip(batches, pool.map(network, batches), strict=True):
                        difference = np.abs(logits - one(images)[0][: len(batch)]).max()
                        assert difference == 0, (network.threads, len(batch), size, variant.widths, difference)
    print("networks: no error")


def check(name: str) -> int:
    """Run one check in processes with the sanitizer, and return the exit code."""
    flag, runtimes = CHECKS[name]
    compiler = find_compiler()
    paths = [subprocess.check_output([compiler, f"-print-file-name={name}"], text=True).strip() for name in runtimes]
    environment = os.environ | OPTIONS | {"LD_PRELOAD": ":".join(paths), EXTRA_FLAGS: f"{FLAGS} {flag}"}
    paddle = importlib.util.find_spec("paddle")
    if paddle is not None and paddle.submodule_search_locations:
        # The sanitizer replaces the function that finds Paddle's own libraries.
        environment["LD_LIBRARY_PATH"] = str(Path(paddle.submodule_search_locations[0]) / "libs")
    print(f"{name}: {flag} {FLAGS}", flush=True)
    failed = subprocess.run([sys.executable, __file__, "networks"], env=environment, cwd=ROOT, check=False).returncode
    if name == "address":
        tests = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=line", *TESTS]
        code = subprocess.run(tests, env=environment, cwd=ROOT, check=False).returncode
        failed = failed or code not in (0, 1)  # with other flags, rounding errors may exceed the limit of a test
    return int(bool(failed))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("check", nargs="?", choices=(*CHECKS, "networks"), help="default: all checks")
    chosen = parser.parse_args().check
    if chosen == "networks":  # in a process with a sanitizer
        run_networks()
        return 0
    return max(check(name) for name in ([chosen] if chosen else CHECKS))


if __name__ == "__main__":
    sys.exit(main())
