"""Measure images per second of prediction with Ray Data.

python benchmarks/predict.py PHOTOS --weights fcvit_tiny.safetensors
"""

import argparse
import time
from pathlib import Path


def ray_rate(folder: Path, weights: Path, actors: int = 2, batch_size: int = 32) -> float:
    """Return images per second of Ray Data on this machine, from the first finished batch to the last.

    The start of Ray and of the actors, which takes seconds, is not included. Each actor has one CPU, and reading
    another one.
    """
    import ray
    import ray.data

    import fcvit

    ray.init(num_cpus=actors + 1, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    ray.data.DataContext.get_current().enable_progress_bars = False
    files = sorted(str(path) for path in folder.iterdir())
    blocks = -(-len(files) // batch_size)
    batches = ray.data.read_binary_files(files, include_paths=True, override_num_blocks=blocks).map_batches(
        fcvit.Predictor,
        fn_constructor_args=(str(weights.absolute()),),
        fn_constructor_kwargs={"engine": "onnxruntime"},
        batch_size=batch_size,
        compute=ray.data.ActorPoolStrategy(size=actors),
    )
    done, began = 0, 0.0
    for batch in batches.iter_batches(batch_size=None, prefetch_batches=0):
        if began:
            done += len(batch["path"])
        began = began or time.perf_counter()
    seconds = time.perf_counter() - began
    ray.shutdown()
    return done / seconds


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--weights", type=Path, required=True)
    given = parser.parse_args()
    print(f"Ray Data, 2 actors: {ray_rate(given.folder, given.weights):.1f} images/s")
