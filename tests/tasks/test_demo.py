"""The page, driven by a real browser: an image, its classes, another head, a bad file."""

import os
import shutil
import time
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


def test_without_gradio_the_command_is_named(monkeypatch):
    def missing(name):
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(task.importlib, "import_module", missing)
    with pytest.raises(MissingExtra, match=r"pip install 'fcvit\[demo\]'"):
        task.build()


def test_two_checkpoints_are_the_most(monkeypatch):
    monkeypatch.setattr(task, "_gradio", lambda: None)
    with pytest.raises(UsageError, match="3 checkpoints: expected one, or two"):
        task.build(["a", "b", "c"])


def test_a_file_name_is_no_markup():
    assert task._plain("<b>[x](y)*") == r"\<b\>\[x\]\(y\)\*"


@pytest.fixture(scope="module")
def address():
    """Of the page with the package's network twice, to compare."""
    pytest.importorskip("gradio", reason="gradio is not installed")
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    import_framework("paddle")
    import warnings
    from importlib import resources

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of gradio's own libraries
        shipped = resources.files("fcvit").joinpath("assets/digits.pth.tar")
        page = task.build([shipped, shipped], device="cpu")
        _, found, shared = task.serve(page)
        assert shared is None and found.startswith(f"http://{task.HOST}:")
        yield found
        page.close()


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
