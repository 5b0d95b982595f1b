"""Test the demo page, its request guard and its server. Some tests control the page in a real browser."""

import asyncio
import contextlib
import dataclasses
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import time
import urllib.error
import urllib.request
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from conftest import DIGITS, needs_paddle, write_pth
from fcvit.analysis.similarity import MapChoice, Viewer, picture
from fcvit.commands import demo as task
from fcvit.commands import quickstart
from fcvit.data.classes import ClassName, digits
from fcvit.data.transforms.preprocess import decode
from fcvit.errors import MissingExtra, UsageError
from fcvit.models.spec import MaskRCNNOptions, ModelSpec
from fcvit.report.image_grid import png
from fcvit.report.instances import enlarged
from fcvit.tasks.detection.prediction import DetectedImage
from fcvit.tasks.predictor import load
from fcvit.tasks.segmentation.prediction import SegmentedImage
from fcvit.weights.reading import read_weights
from fcvit.weights.synthetic import synthetic_tensors
from fcvit.weights.writing import write_weights

pytestmark = needs_paddle


def test_the_message_names_the_command_that_installs_gradio(monkeypatch, tmp_path):
    def missing(name):
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(task.importlib, "import_module", missing)
    with pytest.raises(MissingExtra, match=r"pip install 'fcvit\[demo\]'"):
        task.build((), tmp_path)


def test_more_than_two_checkpoints_are_rejected(monkeypatch, tmp_path):
    monkeypatch.setattr(task, "_gradio", lambda: None)
    with pytest.raises(UsageError, match=r"two.* 3$"):
        task.build(["a", "b", "c"], tmp_path)


def test_markup_in_file_names_is_escaped():
    assert task._plain("<b>[x](y)*") == r"\<b\>\[x\]\(y\)\*"


def test_markup_in_class_names_is_escaped():
    classes = (ClassName("a", "<b>${x}{{y}}"),)
    result = SegmentedImage(np.zeros((2, 2), np.uint8), classes, ((1, 2, 3),), Image.new("RGB", (2, 2)))
    _, rows, _ = task._segmented(result, 0.5)
    shown = task._legend(rows, "area")
    assert "&lt;b&gt;&#36;&#123;x}&#123;&#123;y}}" in shown and "rgb(1, 2, 3)" in shown and "100.0%" in shown


def test_the_page_of_a_detector_shows_objects_above_the_threshold():
    classes, palette = (ClassName("a", "cat"), ClassName("b", "dog")), ((1, 2, 3), (4, 5, 6))
    boxes = np.array([[2, 2, 5, 5], [1, 1, 9, 9], [3, 3, 6, 6]], np.float32)
    found = boxes, np.array([0.9, 0.5, 0.2]), np.array([1, 0, 1]), None
    result = DetectedImage(*found, (10, 10), classes, palette, Image.new("RGB", (10, 10)))
    for threshold, expected in ((0.1, [("dog", "2"), ("cat", "1")]), (0.5, [("dog", "1"), ("cat", "1")]), (1, [])):
        picture, rows, chosen = task._detected(result, threshold)
        assert [row[1:] for row in rows] == expected and picture.size == (720, 720)
        assert [row[0] for row in rows] == [palette[row[1] == "dog"] for row in rows]
        assert (chosen.scores >= threshold).all() and len(chosen) == sum(int(row[2]) for row in rows)
    one = dataclasses.replace(result, classes=classes[:1], palette=palette[:1], labels=0 * result.labels)
    assert task._detected(one, 0)[1] == [(None, "cat", "3")], "no single color"


class Application:
    """The application behind the guard. It stores the body of each request as a file."""

    def __init__(self, folder):
        self.folder, self.calls = folder, 0

    async def __call__(self, scope, receive, send):
        self.calls += 1
        if scope["method"] == "POST":
            path = self.folder / f"{self.calls}.png"
            path.write_bytes(b"x" * int(dict(scope["headers"])[b"content-length"]))
            os.utime(path, (self.calls, self.calls))
        await send({"type": "http.response.start", "status": 200, "headers": []})


def ask(guard, method="GET", kind="http", **headers):
    """Send a request, and return the status of the response."""
    sent = []

    async def send(message):
        sent.append(message)

    listed = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    asyncio.run(guard({"type": kind, "method": method, "path": "/", "headers": listed}, None, send))
    return sent[0].get("status", sent[0]["type"])


OWN_HOSTS = ("127.0.0.1:7860", "localhost:7860", "[::1]:7860", "LocalHost:7860")
OTHER_HOSTS = (
    "evil.example:7860",
    "evil.example",
    "127.0.0.1",
    "127.0.0.1:7861",
    "localhost",
    "127.0.0.1:7860.evil.example",
)
OTHER_HOSTS += ("127.0.0.1:7860@evil.example", "0.0.0.0:7860", "", "null", "localhost:7860/", " localhost:7860")


@pytest.fixture
def guard(tmp_path):
    return task._Guard(Application(tmp_path), 7860, tmp_path)


def test_requests_with_another_host_or_origin_are_rejected(guard):
    for host in OWN_HOSTS:
        assert ask(guard, host=host) == 200
        for origin in OWN_HOSTS:
            assert ask(guard, "POST", host=host, origin=f"http://{origin}", content_length="1") == 200
    calls = guard.app.calls
    for other in OTHER_HOSTS:
        assert ask(guard, host=other) == ask(guard, "OPTIONS", host=other) == 403
        assert ask(guard, kind="websocket", host=other) == "websocket.close"
        for origin in (other, f"http://{other}", f"https://{OWN_HOSTS[0]}"):
            for method in ("GET", "POST", "OPTIONS", "PUT"):
                assert ask(guard, method, host=OWN_HOSTS[0], origin=origin, content_length="1") == 403
    assert ask(guard) == 403 and guard.app.calls == calls


def test_requests_without_length_or_too_large_are_rejected(guard):
    own = {"host": OWN_HOSTS[0]}
    assert ask(guard, "POST", **own) == ask(guard, "POST", **own, content_length="-1") == 411
    assert ask(guard, "POST", **own, content_length="5", transfer_encoding="chunked") == 411
    assert ask(guard, "POST", **own, content_length=str(task.MOST_BYTES + 1)) == 413
    assert ask(guard, "POST", **own, content_length="9" * 5000) == 413
    assert guard.app.calls == 0
    guard.active = task.UPLOADS
    assert ask(guard, "POST", **own, content_length="5") == 429 and ask(guard, **own) == 200


def test_the_oldest_uploads_are_deleted_at_the_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(task, "KEPT_BYTES", 1000)
    monkeypatch.setattr(task, "KEPT_FILES", 5)
    example = tmp_path / "examples" / "digit-1.png"
    example.parent.mkdir()
    example.write_bytes(b"x" * 5000)  # examples do not count
    guard = task._Guard(Application(tmp_path), 7860, tmp_path)
    for size, expected in ((300, {1}), (300, {1, 2}), (300, {1, 2, 3}), (300, {2, 3, 4}), (900, {5}), (10, {5, 6})):
        assert ask(guard, "POST", host=OWN_HOSTS[0], content_length=str(size)) == 200
        assert {int(path.stem) for path in tmp_path.glob("*.png")} == expected
    for _ in range(5):
        ask(guard, "POST", host=OWN_HOSTS[0], content_length="1")
    assert {int(path.stem) for path in tmp_path.glob("*.png")} == {7, 8, 9, 10, 11}
    assert example.exists() and guard.active == 0


@contextlib.contextmanager
def served(*words, **environment):
    """Run the command in a separate process, because Gradio leaves event loops open. Yield the process and address."""
    pytest.importorskip("gradio", reason="gradio is not installed")
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    program = [sys.executable, "-m", "fcvit", "demo", "--device", "cpu", *map(str, words)]
    with subprocess.Popen(
        program, env=os.environ | environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            lines, match = [], None
            while match is None:
                lines.append(process.stderr.readline())
                assert lines[-1], "".join(lines)
                match = re.search(r" (http://127\.0\.0\.1:\d+/) .*Ctrl-C", lines[-1])
            yield process, match[1]
        finally:
            process.kill()


@pytest.fixture(scope="module")
def address():
    """The address of the page without the option --weights."""
    with served() as (_, address):
        yield address


def shipped_file():
    """Return the path of the included checkpoint."""
    return Path(str(resources.files("fcvit").joinpath("assets/digits.pth.tar")))


@pytest.fixture(scope="module")
def shipped():
    return Viewer(read_weights(shipped_file()), digits(), device="cpu")


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """An image of a handwritten 3, from the held-out images."""
    with resources.files("fcvit").joinpath("assets/digits_held_out.npz").open("rb") as file:
        held_out = np.load(file, allow_pickle=False)
        image = held_out["images"][np.flatnonzero(held_out["labels"] == 3)[0]]
    path = tmp_path_factory.mktemp("three") / "three.png"
    Image.fromarray(image).save(path)
    return path


@pytest.fixture
def browser(tmp_path):
    selenium = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    chromium, driver = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.skip("Chromium or its driver is not installed")
    options = selenium.ChromeOptions()
    options.binary_location = chromium
    for word in ("headless", "no-sandbox", "disable-gpu", "no-first-run", "disable-background-networking"):
        options.add_argument(f"--{word}")
    options.add_argument("--window-size=1500,1100")
    options.add_argument(f"--user-data-dir={tmp_path / 'profile'}")
    options.add_experimental_option("prefs", {"download.default_directory": str(tmp_path / "downloads")})
    browser = selenium.Chrome(options=options, service=selenium.ChromeService(driver))
    yield browser
    browser.quit()


def until(condition, what, seconds=40):
    """Wait until a condition is true, and return its value."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            if value := condition():
                return value
        except Exception:  # the page is still loading
            pass
        time.sleep(0.2)
    raise AssertionError(f"waited {seconds} s for {what}")


class Page:
    """The page in a browser."""

    def __init__(self, browser, address):
        self.browser = browser
        browser.get(address)
        self.field = until(lambda: self.find("#image input[type=file]"), "the page")[0]

    def find(self, css):
        from selenium.webdriver.common.by import By

        return self.browser.find_elements(By.CSS_SELECTOR, css)

    def text(self, css):
        return self.find(css)[0].text

    def choose(self, group, value):
        buttons = [e for e in self.find(f"#{group} input[type=radio]") if e.get_attribute("value") == value]
        self.browser.execute_script("arguments[0].click()", buttons[0])

    def slide(self, name, number):
        self.browser.execute_script(
            "const s = Object.getOwnPropertyDescriptor(HTMLInputElement.prototype, 'value').set;"
            "s.call(arguments[0], arguments[1]);"
            "for (const n of ['input', 'change', 'blur']) arguments[0].dispatchEvent(new Event(n, {bubbles: true}));",
            self.find(f"#{name} input[type=number]")[0],
            str(number),
        )

    def pictures(self, css="[id^=maps-] img"):
        """Return the pixels of the displayed pictures."""
        sources = [image.get_attribute("src") for image in self.find(css)]
        pictures = []
        for source in sources:
            with urllib.request.urlopen(source, timeout=20) as answer:
                pictures.append(np.asarray(Image.open(io.BytesIO(answer.read())).convert("RGB")))
        return pictures

    def download(self, folder):
        """Click the download button, and return the content of the file."""
        self.find("#download-0")[0].click()
        file = until(lambda: [p for p in folder.iterdir() if p.suffix in (".png", ".json")], "the download")[0]
        return file.read_bytes()

    def shows(self, *expected, css="[id^=maps-] img"):
        """Wait until the page shows the expected pictures, PNG files."""
        pixels = [np.asarray(Image.open(io.BytesIO(content)).convert("RGB")) for content in expected]

        def same():
            shown = self.pictures(css)
            return len(shown) == len(pixels) and all(map(np.array_equal, shown, pixels))

        until(same, "the expected picture")


@pytest.mark.ci
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_page_in_a_browser(address, browser, shipped, three, tmp_path):
    page, seen = Page(browser, address), shipped.see(decode(three))

    def expected(context, heads, which, scale="picture"):
        return picture(shipped, seen, "three.png", context, MapChoice(heads, which, scale))

    until(lambda: page.text("#place") == "stage 3, block 2, context 1", "the last context with a map")
    page.field.send_keys(str(three))
    page.shows(expected((3, 2, 1), "each", "standardized"))
    page.shows(png(enlarged(decode(three))), css="#shown img")
    label = until(lambda: page.text("#prediction-0").split("\n")[1:], "the classes")
    assert label[0] == "digit 3" and sum(text.endswith("%") for text in label) == 5
    page.choose("head", "mean")
    page.shows(expected((3, 2, 1), "mean", "standardized"))
    page.choose("head", "8")
    page.shows(expected((3, 2, 1), "8", "standardized"))
    page.choose("values", "rescaled")
    page.shows(expected((3, 2, 1), "8", "rescaled"))
    page.slide("depth", 1)
    page.shows(expected((1, 1, 1), "8", "rescaled"))
    until(lambda: page.text("#place") == "stage 1, block 1, context 1", "the name of the context")
    page.choose("head", "each")
    page.choose("values", "standardized")
    page.choose("scale", "head")
    page.shows(expected((1, 1, 1), "each", "standardized", "head"))
    if folder := os.environ.get("FCVIT_SCREENSHOTS"):
        page.choose("scale", "picture")
        page.shows(expected((1, 1, 1), "each", "standardized"))
        browser.save_screenshot(str(Path(folder) / "demo-one.png"))
    urls = browser.execute_script("return performance.getEntriesByType('resource').map(e => e.name)")
    assert len(urls) > 10 and all(url.startswith((address, "data:", "blob:")) for url in urls), "no external requests"
    assert not page.find("[id^=maps-] [aria-label*=hare]"), "no share button"

    page = Page(browser, address)
    until(lambda: page.find("#examples button img"), "the examples")[0].click()
    with resources.files("fcvit").joinpath("assets/digits_held_out.npz").open("rb") as file:
        first = Image.fromarray(np.load(file, allow_pickle=False)["images"][0]).convert("RGB")
    page.shows(picture(shipped, shipped.see(first), "digit-1.png", (3, 2, 1), MapChoice()))

    (tmp_path / "bad.png").write_bytes(b"this is no image")
    page = Page(browser, address)
    page.field.send_keys(str(tmp_path / "bad.png"))
    until(lambda: "No maps: bad.png: " in page.text("#message"), "a message about the bad file")
    assert not page.pictures() and not page.find("#shown img")
    page.choose("head", "mean")
    page.slide("depth", 2)
    until(lambda: page.text("#place") == "stage 1, block 1, context 2", "settings work without an image")


@pytest.mark.ci
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_two_checkpoints_are_shown_side_by_side(browser, shipped, three, tmp_path):
    """The page shows the names, classes and maps of both, also if one has fewer contexts."""
    spec = ModelSpec(dataclasses.replace(DIGITS.variant, depths=(1, 1, 1, 1)), 10)
    other = tmp_path / "other" / "digits.pth.tar"
    other.parent.mkdir()
    write_pth(other, synthetic_tensors(spec))
    ours = shipped_file()
    viewers = [Viewer(read_weights(path), device="cpu") for path in (ours, other)]
    seen = [viewer.see(decode(three)) for viewer in viewers]

    def expected(*contexts):
        rows = zip(viewers, seen, contexts, strict=True)
        return [picture(viewer, one, "three.png", context, MapChoice()) for viewer, one, context in rows]

    with served("--weights", ours, "--weights", other) as (_, address):
        page = Page(browser, address)
        titles = ["assets/digits.pth.tar", "other/digits.pth.tar"]
        until(lambda: [title.text for title in page.find("h3")] == titles, "the names of both")
        page.field.send_keys(str(three))
        page.shows(*expected((3, 2, 1), (4, 1, 1)))
        both = "stage 3, block 2, context 1 · stage 4, block 1, context 1"
        until(lambda: page.text("#place") == both, "both contexts")
        page.slide("depth", 1)
        page.shows(*expected((1, 1, 1), (1, 1, 1)))
        for number, one in enumerate(seen):
            name = one.predictions[0].name
            until(lambda: page.text(f"#prediction-{number}").split("\n")[1] == name, name)  # noqa: B023
        if folder := os.environ.get("FCVIT_SCREENSHOTS"):
            browser.save_screenshot(str(Path(folder) / "demo.png"))


@pytest.mark.ci
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_segmentation_networks_show_overlays(browser, tmp_path):
    pytest.importorskip("cv2")
    assets = resources.files("fcvit") / "assets"
    weights = Path(str(assets / quickstart.SEGMENTER))
    with tarfile.open(str(assets / quickstart.NUCLEI)) as archive:
        member = next(name for name in archive.getnames() if name.startswith("images/"))
        archive.extract(member, tmp_path, filter="data")
    result = load(weights, device="cpu").predict(tmp_path / member)[0]
    with served("--weights", weights) as (_, address):
        page = Page(browser, address)
        page.field.send_keys(str(tmp_path / member))
        page.shows(png(enlarged(result.overlay())))
        names = [area.name for area in result.areas]
        until(lambda: all(name in page.text("#prediction-0") for name in names), "the areas of the classes")
        result.save(tmp_path / "labels.png")
        assert page.download(tmp_path / "downloads") == (tmp_path / "labels.png").read_bytes()
        page.slide("slider", 0)
        page.shows(png(enlarged(result.overlay(0))))
        page.slide("slider", 0.5)
        page.shows(png(enlarged(result.overlay())))
        if folder := os.environ.get("FCVIT_SCREENSHOTS"):
            browser.set_window_size(1100, 920)
            browser.save_screenshot(str(Path(folder) / "demo-segmentation.png"))


@pytest.mark.ci
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_detectors_show_objects(browser, tmp_path):
    pytest.importorskip("cv2")
    pytest.importorskip("pycocotools")
    options = MaskRCNNOptions(8, 8, 16, 8, proposals_before_nms=50, max_proposals=20, long_side=128, short_side=64)
    spec = ModelSpec(DIGITS.variant, 2, "mask_rcnn", options)
    read = read_weights(write_pth(tmp_path / "det.pth", synthetic_tensors(spec)))
    write_weights(tmp_path / "det.safetensors", dataclasses.replace(read, spec=spec))
    pixels = np.random.default_rng(0).integers(0, 256, (60, 80, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "noise.png")
    result = load(tmp_path / "det.safetensors", device="cpu").predict(tmp_path / "noise.png", score_threshold=0)[0]
    with served("--weights", tmp_path / "det.safetensors") as (_, address):
        page = Page(browser, address)
        page.field.send_keys(str(tmp_path / "noise.png"))
        for threshold in (0.3, 0):
            page.slide("slider", threshold)
            chosen = result.take(result.scores >= threshold)
            page.shows(png(chosen.draw()))
            count = sum(map(int, re.findall(r"[0-9]+$", page.text("#prediction-0"), re.MULTILINE)))
            assert count == len(chosen)
        content = json.loads(page.download(tmp_path / "downloads"))
        assert [a["score"] for a in content["annotations"]] == result.scores.tolist()
        (tmp_path / "bad.png").write_bytes(b"this is no image")
        page = Page(browser, address)
        page.field.send_keys(str(tmp_path / "bad.png"))
        until(lambda: "No result: " in page.text("#message"), "a message about the bad file")
        assert not page.pictures() and not page.text("#prediction-0")


def test_networks_for_different_tasks_are_not_mixed(tmp_path, monkeypatch):
    monkeypatch.setattr(task, "_gradio", lambda: None)
    with pytest.raises(UsageError, match="networks for classification and segmentation; show them separately"):
        task.build([shipped_file(), resources.files("fcvit") / "assets" / quickstart.SEGMENTER], tmp_path)


def test_titles_include_folders_if_file_names_are_equal(tmp_path):
    assert task.titles(["a/best.pth", "b/best.pth"]) == ["a/best.pth", "b/best.pth"]
    assert task.titles(["a/one.pth", "b/two.pth"]) == ["one.pth", "two.pth"]
    assert task.titles([tmp_path / "x.pth"]) == ["x.pth"]
    assert task.titles(["x.pth", "x.pth"]) == ["A: x.pth", "B: x.pth"]


def test_analytics_are_disabled_before_gradio_is_imported(monkeypatch):
    monkeypatch.setenv("GRADIO_ANALYTICS_ENABLED", "True")
    imports = []
    monkeypatch.setattr(
        task.importlib, "import_module", lambda name: imports.append((name, os.environ["GRADIO_ANALYTICS_ENABLED"]))
    )
    task._gradio()
    assert imports == [("gradio", "False")]


@pytest.mark.slow
def test_no_analytics_and_no_external_fonts(address):
    with urllib.request.urlopen(address, timeout=20) as answer:
        text = answer.read().decode()
    assert '"analytics_enabled":false' in text.replace(" ", "")
    with urllib.request.urlopen(f"{address}theme.css", timeout=20) as answer:
        theme = answer.read().decode()
    assert "font-face" in theme and "http" not in theme.replace("http://www.w3.org", "")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_server_rejects_files_over_the_limit(address):
    for size, expected in ((20 * 2**20 + 1, 413), (2**20, 200)):
        content = b"x" * size
        body = (
            b'--edge\r\nContent-Disposition: form-data; name="files"; filename="big.png"\r\n'
            b"Content-Type: image/png\r\n\r\n" + content + b"\r\n--edge--\r\n"
        )
        spec = {"Content-Type": "multipart/form-data; boundary=edge"}
        request = urllib.request.Request(f"{address}gradio_api/upload", body, spec)
        try:
            with urllib.request.urlopen(request, timeout=20) as answer:
                status = answer.status
        except urllib.error.HTTPError as error:
            status = error.code
        assert status == expected


@pytest.mark.slow
@pytest.mark.parametrize("path", ["", "config", "theme.css", "gradio_api/upload", "gradio_api/queue/join"])
def test_the_guard_protects_every_route(address, path):
    for headers in ({"Host": "evil.example:7860"}, {"Origin": "http://evil.example"}):
        for body in (None, b"{}"):
            request = urllib.request.Request(f"{address}{path}", body, headers)
            with pytest.raises(urllib.error.HTTPError) as error:
                urllib.request.urlopen(request, timeout=20)
            error.value.close()
            assert error.value.code == 403 and not error.value.headers.get("access-control-allow-origin")


@pytest.mark.slow
def test_the_page_is_served_until_interrupted_and_leaves_no_files(tmp_path):
    own = {"TMPDIR": str(tmp_path), "HOME": str(tmp_path), "GRADIO_TEMP_DIR": ""}
    with served(**own) as (process, address):
        with urllib.request.urlopen(address, timeout=20) as answer:
            assert answer.status == 200
        port = address.rstrip("/").rpartition(":")[2]
        with socket.socket() as other:  # not reachable at other addresses of this machine
            assert other.connect_ex(("127.0.0.2", int(port))) != 0
        taken = subprocess.run(
            [sys.executable, "-m", "fcvit", "demo", "--port", port], capture_output=True, text=True, timeout=60
        )
        assert taken.returncode == 2 and taken.stderr.startswith(f"fcvit: --port {port}: ")
        assert "another port" in taken.stderr and taken.stderr.count("\n") == 1
        process.send_signal(signal.SIGTERM)  # ends a command like Ctrl-C
        out, err = process.communicate(timeout=30)
    assert process.returncode == 0 and out == "" and err.startswith("fcvit: note: ") and err.count("\n") == 1
    assert not list(tmp_path.glob("fcvit-demo-*")) and not (tmp_path / "gradio").exists()
