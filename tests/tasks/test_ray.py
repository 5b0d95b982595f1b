"""Test predictors on a Ray cluster of two nodes, one of which is killed. The cluster runs in a process of its own."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

IMAGES, FEW = 40, 8
LIMIT = 240  # seconds, of which a quiet machine needs a small part
OPTIONS = {"classification": {"top_k": 2}, "segmentation": {}, "detection": {"score_threshold": 0.0}}


@pytest.mark.ci
def test_a_killed_node_of_a_ray_cluster_loses_no_image(tmp_path, capsys):
    for package in ("ray", "pyarrow", "onnxruntime", "cv2", "pycocotools"):
        pytest.importorskip(package, reason=f"{package} is not installed")
    from conftest import DIGITS, write_detector, write_synthetic
    from fcvit.inference.detector import parts
    from fcvit.inference.export import part_path, write_export
    from fcvit.inference.interface import Interface
    from fcvit.models.spec import ModelSpec, SemanticFPNOptions
    from fcvit.weights.reading import read_weights

    fpn = ModelSpec(DIGITS.variant, 5, "semantic_fpn", SemanticFPNOptions(16, 8, 128, 64, 32))
    files = {
        "classification": write_synthetic(tmp_path / "classification.safetensors", DIGITS),
        "segmentation": write_synthetic(tmp_path / "segmentation.safetensors", fpn),
        "detection": write_detector(tmp_path / "detection.safetensors"),
    }
    for task, path in files.items():  # workers load exports faster than checkpoints
        weights, size = read_weights(path), (32, 32) if task == "classification" else None
        for part in parts(weights.spec):
            interface = Interface(size, False, False, DIGITS.variant.preprocessing, part)
            write_export(weights, interface, "onnx", part_path(tmp_path / f"{task}.onnx", part))
    (tmp_path / "images").mkdir()
    generator = np.random.default_rng(0)
    for index in range(IMAGES - 1):
        pixels = generator.integers(0, 256, (40 + index, 50, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{index:02d}.png")
    (tmp_path / "images" / "no image.png").write_bytes(b"no image")
    environment = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, __file__, str(tmp_path)]
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, start_new_session=True)
    try:
        _, messages = process.communicate(timeout=LIMIT)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    assert process.returncode == 0, messages.decode()[-4000:]
    done = json.loads((tmp_path / "done.json").read_text())
    assert done["actors"] == 2 and done["lost"] >= 1 and done["before"] < IMAGES, "the killed node had work"
    for task, options in OPTIONS.items():
        expected = predicted(tmp_path, task, options, capsys)
        rows = {row["path"]: row for row in done[task]}
        assert len(rows) == len(done[task]) == (IMAGES if task == "classification" else FEW)
        bad = [path for path, row in rows.items() if row["error"]]
        assert [Path(path).name for path in bad] == ["no image.png"] and rows[bad[0]]["predictions"] is None
        for path, row in rows.items():
            if path not in bad:
                assert len(row["predictions"]) == len(expected[path])
                for found, other in zip(row["predictions"], expected[path], strict=True):
                    assert {name: found[name] for name in other} == pytest.approx(other, abs=1e-6)


def predicted(folder, task, options, capsys):
    """Return the output of `fcvit predict`."""
    from fcvit.cli import main

    words = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    main(["predict", str(folder / "images"), "--weights", str(folder / f"{task}.onnx"), "--json", "-q", *words])
    return json.loads(capsys.readouterr().out)["predictions"]


def job(folder):
    """Predict on two nodes, and kill one of them when half of the images are done."""
    import tempfile

    import ray
    import ray._private.state
    import ray.data
    from ray.cluster_utils import Cluster

    import fcvit

    def wait(batch):
        """Delay each batch until a node was killed."""
        time.sleep(0 if (folder / "killed").exists() else 0.5)
        return batch

    def plain(row):
        return {name: value for name, value in row.items() if not isinstance(value, bytes)}

    with tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as place:  # short: it contains sockets
        settings = {"num_cpus": 3, "object_store_memory": 80 << 20}
        checks = {"initial_delay": 1000, "period": 1000, "timeout": 5000}  # a dead node is noticed after 25 s otherwise
        quick = {f"health_check_{name}_ms": value for name, value in checks.items()}
        head = {**settings, "include_dashboard": False, "temp_dir": place, "_system_config": quick}
        cluster = Cluster(initialize_head=True, head_node_args=head)
        second = cluster.add_node(**settings)
        ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
        ray.data.DataContext.get_current().enable_progress_bars = False
        paths = sorted(str(path) for path in (folder / "images").iterdir())
        done = {}
        for task in ("segmentation", "detection"):
            data = ray.data.read_binary_files([*paths[: FEW - 1], paths[-1]], include_paths=True)
            given = {
                "fn_constructor_args": (str(folder / f"{task}.onnx"),),
                "fn_kwargs": OPTIONS[task],
                "compute": ray.data.ActorPoolStrategy(size=1),
            }
            done[task] = [plain(row) for row in data.map_batches(fcvit.Predictor, **given).take_all()]
        data = ray.data.read_binary_files(paths, include_paths=True, override_num_blocks=IMAGES // 2)
        given = {"fn_constructor_args": (str(folder / "classification.onnx"),), "fn_kwargs": {"top_k": 2}}
        given["compute"] = ray.data.ActorPoolStrategy(size=2)
        predicted = data.map_batches(wait, batch_size=2).map_batches(fcvit.Predictor, batch_size=2, **given)
        rows = []
        for batch in predicted.iter_batches(batch_size=None, prefetch_batches=0, batch_format="pyarrow"):
            rows += map(plain, batch.to_pylist())
            if len(rows) >= IMAGES // 2 and not (folder / "killed").exists():
                alive = [each for each in ray._private.state.actors().values() if each["State"] == "ALIVE"]
                done["actors"] = sum("MapWorker" in each["ActorClassName"] for each in alive)
                done["lost"] = sum(each["Address"]["NodeID"] == second.node_id for each in alive)
                done["before"] = len(rows)
                cluster.remove_node(second, allow_graceful=False)
                (folder / "killed").touch()
        done["classification"] = rows
        (folder / "done.json").write_text(json.dumps(done))
        ray.shutdown()
        cluster.shutdown()


if __name__ == "__main__":
    job(Path(sys.argv[1]))
