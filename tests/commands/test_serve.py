"""Test `fcvit serve` as a subprocess on a free port of this machine. Each service is started once for all its tests."""

import contextlib
import http.client
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tarfile
import time
from concurrent.futures import ThreadPoolExecutor
from importlib import resources
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

import fcvit
from conftest import DIGITS, image_by_rule, needs_paddle, needs_torch, write_detector, write_synthetic
from fcvit.cli import main
from fcvit.errors import BadImages
from fcvit.models.spec import ModelSpec, SemanticFPNOptions

pytest.importorskip("litserve", reason="litserve is not installed")
ci = pytest.mark.ci

BATCH = 4
OPTIONS = {
    "classification": (["--top-k", "3"], {"top_k": 3}),
    "segmentation": (["--flip"], {"flip": True}),
    "detection": (["--score-threshold", "0"], {"score_threshold": 0}),
}


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def post(port, body, headers=(), method="POST", path="/predict"):
    """Return status, JSON (or text) and headers of the answer."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    with contextlib.closing(connection):
        connection.request(method, path, body, dict(headers))
        answer = connection.getresponse()
        content = answer.read()
        text = answer.headers.get_content_type() != "application/json"
        return answer.status, content.decode() if text else json.loads(content), answer.headers


def form(*files):
    """Return the body and the headers of a form with files, given as name and content."""
    lines = [
        f'--limit\r\nContent-Disposition: form-data; name="image"; filename="{name}"\r\n\r\n'.encode()
        + content
        + b"\r\n"
        for name, content in files
    ]
    return b"".join(lines) + b"--limit--\r\n", {"Content-Type": "multipart/form-data; boundary=limit"}


def same(content, expected):
    """Return whether two JSON values are equal. Numbers may differ as between batches of different sizes."""
    if isinstance(expected, dict):
        return content.keys() == expected.keys() and all(same(content[key], expected[key]) for key in expected)
    if isinstance(expected, list):
        return len(content) == len(expected) and all(map(same, content, expected))
    return content == (pytest.approx(expected, rel=1e-4, abs=1e-6) if isinstance(expected, float) else expected)


def encoded(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


@contextlib.contextmanager
def running(weights, *options):
    """Start a service, wait until it is ready, and stop it with SIGTERM. Yield the port and the process."""
    port = free_port()
    words = [sys.executable, "-m", "fcvit", "serve", "--weights", weights, "--port", str(port), "--device", "cpu"]
    process = subprocess.Popen([*words, *options], stderr=subprocess.PIPE, text=True, start_new_session=True)
    service = SimpleNamespace(port=port, process=process)
    try:
        for _ in range(600):
            with contextlib.suppress(OSError):
                if post(port, None, method="GET", path="/health")[:2] == (200, "ok"):
                    break
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.1)
        yield service
        process.terminate()
        service.messages = process.communicate(timeout=30)[1]
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Image files of several kinds, two files that are not images, and photographs."""
    folder, photo = tmp_path_factory.mktemp("images"), image_by_rule(60, 41)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    contents = {
        "turned.jpg": encoded(photo, "JPEG", exif=exif),
        "deep.png": encoded(Image.fromarray(np.arange(40 * 50, dtype=np.uint16).reshape(40, 50) * 30), "PNG"),
        "frames.gif": encoded(photo.quantize(), "GIF", save_all=True, append_images=[photo.rotate(90).quantize()]),
        "alpha.webp": encoded(photo.convert("RGBA"), "WEBP", lossless=True),
        "cut.jpg": encoded(photo, "JPEG")[:900],
        "text.png": b"not an image",
    }
    with (
        resources.as_file(resources.files("fcvit") / "assets" / "nuclei.tar") as name,
        tarfile.open(name) as archive,
    ):
        members = [member for member in archive.getmembers() if member.name.startswith("images/val/")]
        contents |= {f"{index}.png": archive.extractfile(member).read() for index, member in enumerate(members[:4])}
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    return [folder / name for name in contents]


@pytest.fixture(scope="module", params=OPTIONS)
def service(request, tmp_path_factory, files):
    """A running service for each task, with the status and the content that it must answer for each file."""
    weights = tmp_path_factory.mktemp("weights") / "weights.safetensors"
    if request.param == "classification":
        write_synthetic(weights, DIGITS)
    elif request.param == "segmentation":
        options = SemanticFPNOptions(neck=8, channels=8, short_side=32, long_side=64)
        write_synthetic(weights, ModelSpec(DIGITS.variant, 3, "semantic_fpn", options))
    else:
        write_detector(weights)
    words, arguments = OPTIONS[request.param]
    predictor = fcvit.load(weights, device="cpu")
    answers = []
    for path, result in zip(files, predictor.stream(files, **arguments), strict=True):
        if isinstance(result, BadImages):
            answers.append((400, {"detail": str(result).removeprefix(f"{path.parent}/")}))
        else:
            answers.append((200, {"predictions": predictor.rows(result)}))
    assert [status for status, _ in answers].count(400) == 2
    batching = ["--max-batch-size", str(BATCH), "--max-wait-ms", "500", "--max-upload-mb", "1"]
    with running(weights, *words, *batching) as running_service:
        running_service.answers = answers
        yield running_service
    assert running_service.process.returncode == 0, running_service.messages
    assert "Traceback" not in running_service.messages


@ci
@needs_torch
@needs_paddle
def test_concurrent_requests_get_the_rows_of_predict_in_batches(service, files):
    """Half of the requests are forms. Two files are not images, which does not change the other answers."""
    requests = [form((path.name, path.read_bytes())) for path in files]
    with ThreadPoolExecutor(len(requests)) as pool:
        answers = list(pool.map(lambda request: post(service.port, *request), requests))
    for path, (status, content, _), expected in zip(files, answers, service.answers, strict=True):
        assert status == expected[0] and same(content, expected[1]), path.name
    sizes = [int(headers["x-batch-size"]) for *_, headers in answers]
    assert max(sizes) <= BATCH
    assert sum(1 / size for size in sizes) <= len(files) / 2, "the requests were not computed together"


@ci
@needs_torch
@needs_paddle
@pytest.mark.parametrize("service", ["classification"], indirect=True)
def test_unusable_requests_get_one_line_and_the_service_goes_on(service, files):
    chunks = [bytes(999_999), bytes(2)]  # sent without a length
    cases = [
        ((b"", {}), 400, "image: the file is empty; send an image"),
        ((b"<html>", {}), 400, "image: not a readable image: "),
        (form(), 400, "expected a form with one file, not 0"),
        (form(("a.png", b"a"), ("b.png", b"b")), 400, "expected a form with one file, not 2"),
        ((b"--limit", {"Content-Type": "multipart/form-data"}), 400, ""),
        ((bytes(1_000_001), {}), 413, "Payload too large"),
        (form(("a.png", bytes(1_000_001))), 413, "Payload too large"),
        ((iter(chunks), {}), 413, "Payload too large"),
    ]
    for (body, headers), expected, message in cases:
        status, content, _ = post(service.port, body, headers)
        assert (status, message in content["detail"]) == (expected, True), (message, status, content)
        assert "\n" not in content["detail"]
    assert post(service.port, None, method="GET")[0] == 405
    assert same([*post(service.port, files[-1].read_bytes())[:2]], [*service.answers[-1]])
    assert post(service.port, None, method="GET", path="/health")[:2] == (200, "ok")


@ci
@needs_torch
@needs_paddle
def test_accepted_requests_are_answered_before_the_service_stops(tmp_path, files):
    path = write_synthetic(tmp_path / "weights.safetensors", DIGITS)
    with running(path, "--max-batch-size", "8", "--max-wait-ms", "1000", "--workers", "2") as service:
        with ThreadPoolExecutor(4) as pool:
            answers = [pool.submit(post, service.port, files[-1].read_bytes()) for _ in range(4)]
            time.sleep(0.3)
            os.killpg(service.process.pid, signal.SIGINT)  # Ctrl-C in a terminal reaches all processes
            assert [answer.result()[0] for answer in answers] == [200] * 4
        messages = service.process.communicate(timeout=30)[1]
    assert service.process.returncode == 0 and "Traceback" not in messages
    assert messages.splitlines()[-1] == "fcvit: note: the service has stopped"


@ci
@needs_torch
@needs_paddle
@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--weights", "missing.pth"], 3, "fcvit: missing.pth: cannot be opened"),
        (["--weights", "digits", "--flip"], 2, "fcvit: serve: --flip: not an option for classification; use --top-k"),
    ],
)
def test_an_error_of_a_worker_ends_the_service_with_its_message(options, code, message, tmp_path):
    words = [str(write_synthetic(tmp_path / "x.safetensors", DIGITS)) if word == "digits" else word for word in options]
    words = [sys.executable, "-m", "fcvit", "serve", "--port", str(free_port()), "--device", "cpu", *words]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60)
    assert done.returncode == code and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith(message)


@pytest.mark.slow
@pytest.mark.parametrize(
    "option", ["--port 80", "--max-batch-size 0", "--max-wait-ms 0", "--max-upload-mb 0", "--workers 0"]
)
def test_numbers_out_of_range_are_rejected(option, capsys):
    assert main(["serve", "--weights", "x.pth", *option.split()]) == 2
    assert re.fullmatch(rf"fcvit: {option}: expected [\d.]+ to \d+\n", capsys.readouterr().err)


@pytest.mark.slow
def test_a_used_port_and_a_missing_package_are_reported(monkeypatch, capsys):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        assert main(["serve", "--weights", "x.pth", "--port", port]) == 2
    assert f"--port {port}: Address already in use; choose another port" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "litserve", None)
    assert main(["serve", "--weights", "x.pth"]) == 7
    assert capsys.readouterr().err.endswith("install it with: pip install 'fcvit[serve]'\n")
