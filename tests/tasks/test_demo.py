"""The page, driven by a real browser: an image, its classes, another head, a bad file."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from conftest import needs_paddle
from fcvit.errors import MissingExtra, UsageError
from fcvit.frameworks import import_framework
from fcvit.tasks import demo as task

pytestmark = needs_paddle


def test_without_gradio_the_command_is_named(monkeypatch, tmp_path):
    def missing(name):
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(task.importlib, "import_module", missing)
    with pytest.raises(MissingExtra, match=r"pip install 'fcvit\[demo\]'"):
        task.build((), tmp_path)


def test_two_checkpoints_are_the_most(monkeypatch, tmp_path):
    monkeypatch.setattr(task, "_gradio", lambda: None)
    with pytest.raises(UsageError, match="3 checkpoints: expected one, or two"):
        task.build(["a", "b", "c"], tmp_path)


def test_a_file_name_is_no_markup():
    assert task._plain("<b>[x](y)*") == r"\<b\>\[x\]\(y\)\*"


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """Of the page with the package's network twice, to compare."""
    pytest.importorskip("gradio", reason="gradio is not installed")
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    import_framework("paddle")
    import warnings
    from importlib import resources

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of gradio's own libraries
        shipped = resources.files("fcvit").joinpath("assets/digits.pth.tar")
        page = task.build([shipped, shipped], tmp_path_factory.mktemp("demo"), device="cpu")
        found = task.serve(page)
        assert found.startswith(f"http://{task.HOST}:")
        yield found
        page.close(verbose=False)


@pytest.fixture
def browser(tmp_path):
    selenium = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    chromium, driver = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.skip("no Chromium with its driver is installed")
    options = selenium.ChromeOptions()
    options.binary_location = chromium
    for word in ("headless", "no-sandbox", "disable-gpu", "no-first-run", "disable-background-networking"):
        options.add_argument(f"--{word}")
    options.add_argument("--window-size=1500,1100")
    options.add_argument(f"--user-data-dir={tmp_path / 'profile'}")
    found = selenium.Chrome(options=options, service=selenium.ChromeService(driver))
    yield found
    found.quit()


def until(condition, what, seconds=40):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            if found := condition():
                return found
        except Exception:  # the page is being built
            pass
        time.sleep(0.2)
    raise AssertionError(f"waited {seconds} s for {what}")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_page_in_a_browser(address, browser, tmp_path):
    from selenium.webdriver.common.by import By

    def find(css):
        return browser.find_elements(By.CSS_SELECTOR, css)

    def pictures():
        return [image.get_attribute("src") for image in find("[id^=maps-] img")]

    browser.get(address)
    upload = until(lambda: find("#image input[type=file]"), "the page")[0]
    digits = np.load(task.resources.files("fcvit").joinpath("assets/digits_held_out.npz").open("rb"))
    number = int(np.flatnonzero(digits["labels"] == 3)[0])
    Image.fromarray(digits["images"][number]).save(tmp_path / "three.png")
    upload.send_keys(str(tmp_path / "three.png"))
    until(lambda: len(pictures()) == 2 and len(set(pictures())) >= 1, "two pictures")
    until(lambda: "class 3" in find("#prediction-0")[0].text or "3" in find("#prediction-0 h2")[0].text, "the class")
    assert "3" in find("#prediction-1")[0].text
    first = pictures()
    radio = until(lambda: [e for e in find("#head input[type=radio]") if e.get_attribute("value") == "mean"], "heads")
    browser.execute_script("arguments[0].click()", radio[0])
    until(lambda: len(pictures()) == 2 and pictures()[0] != first[0], "another picture after another head")
    second = pictures()
    slider = find("#depth input[type=number]")[0]
    browser.execute_script(
        "const s = Object.getOwnPropertyDescriptor(HTMLInputElement.prototype, 'value').set;"
        "s.call(arguments[0], '1'); arguments[0].dispatchEvent(new Event('input', {bubbles: true}));"
        "arguments[0].dispatchEvent(new Event('change', {bubbles: true}));"
        "arguments[0].dispatchEvent(new Event('blur', {bubbles: true}));",
        slider,
    )
    until(lambda: len(pictures()) == 2 and pictures()[0] != second[0], "another picture at another depth")
    if folder := os.environ.get("FCVIT_SCREENSHOTS"):
        browser.save_screenshot(str(Path(folder) / "demo.png"))
    (tmp_path / "bad.png").write_bytes(b"this is no image")
    browser.get(address)
    upload = until(lambda: find("#image input[type=file]"), "the page again")[0]
    upload.send_keys(str(tmp_path / "bad.png"))
    until(lambda: "Not an image that can be read" in find("#message")[0].text, "a message about the bad file")
    assert "bad.png" in find("#message")[0].text and not pictures()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_page_asks_nobody_else(address):
    """Fonts, scripts and reports come from nowhere but this machine."""
    with urllib.request.urlopen(address, timeout=20) as answer:
        text = answer.read().decode()
    assert '"analytics_enabled":false' in text.replace(" ", "")
    assert "fonts.googleapis.com" not in text


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_file_over_the_limit_is_refused(address):
    """By the server, whatever the page lets through; one just under it is taken."""
    for size, expected in ((20 * 2**20 + 1, 413), (2**20, 200)):
        content = b"x" * size
        body = (
            b'--edge\r\nContent-Disposition: form-data; name="files"; filename="big.png"\r\n'
            b"Content-Type: image/png\r\n\r\n" + content + b"\r\n--edge--\r\n"
        )
        form = {"Content-Type": "multipart/form-data; boundary=edge"}
        request = urllib.request.Request(f"{address}gradio_api/upload", body, form)
        try:
            with urllib.request.urlopen(request, timeout=20) as answer:
                status = answer.status
        except urllib.error.HTTPError as error:
            status = error.code
        assert status == expected


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_page_is_served_until_it_is_interrupted_and_leaves_nothing(tmp_path):
    pytest.importorskip("gradio", reason="gradio is not installed")
    environment = {**os.environ, "TMPDIR": str(tmp_path), "HOME": str(tmp_path), "PYTHONUNBUFFERED": "1"}
    environment.pop("GRADIO_TEMP_DIR", None)
    program = [sys.executable, "-m", "fcvit", "demo", "--device", "cpu"]
    with subprocess.Popen(
        program, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path
    ) as process:
        line = process.stderr.readline()
        found = re.search(r"the page is at http://127\.0\.0\.1:(\d+)/ \(Ctrl-C ends it\)", line)
        assert found, line + process.stderr.read()
        with urllib.request.urlopen(f"http://127.0.0.1:{found[1]}/", timeout=20) as answer:
            assert answer.status == 200
        with socket.socket() as other:  # not on this machine's other addresses
            assert other.connect_ex(("127.0.0.2", int(found[1]))) != 0
        taken = subprocess.run(
            [*program, "--port", found[1]], env=environment, capture_output=True, text=True, cwd=tmp_path
        )
        assert taken.returncode == 2 and f"--port {found[1]}" in taken.stderr and taken.stderr.count("\n") == 1
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    assert process.returncode == 0 and out == "" and err == "fcvit: note: the page is closed\n"
    assert not list(tmp_path.glob("fcvit-demo-*")) and not (tmp_path / "gradio").exists()
