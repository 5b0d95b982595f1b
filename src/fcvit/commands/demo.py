"""Serve a local web page that shows predictions and similarity maps, label maps, or objects, in uploaded images.

The page uses Gradio. It is reachable only from this machine, and only requests from the page itself are answered (see
`_Guard`). Nothing is shared or reported to others. Uploads are limited to `LIMIT` per file and `KEPT_BYTES` in total,
and are deleted when the server stops. The maps are computed with `fcvit.analysis.similarity`, as on the command line.
"""

import contextlib
import html
import importlib
import io
import itertools
import logging
import os
import tempfile
import threading
import webbrowser
from collections.abc import Awaitable, Callable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, NamedTuple, get_args
from urllib.parse import urlsplit

import numpy as np
from cyclopts import Parameter
from PIL import Image

from fcvit.analysis.similarity import FIRST, MapChoice, Scale, Seen, Viewer, Which, picture
from fcvit.commands.options import Device, Ema, File, require_free_port
from fcvit.data.classes import digits
from fcvit.data.transforms.preprocess import decode
from fcvit.errors import BadImages, MissingExtra, NumbersDisagree, UsageError
from fcvit.models.maps import Place, choose, places
from fcvit.report.instances import enlarged
from fcvit.tasks.detection.prediction import DetectedImage
from fcvit.tasks.predictor import load
from fcvit.tasks.segmentation.prediction import SegmentedImage
from fcvit.text import printable
from fcvit.weights.reading import read_weights

logger = logging.getLogger("fcvit")

HOST = "127.0.0.1"
LIMIT = "20 MB"
MOST_BYTES = 21 * 1024**2  # limit of a request: a file of size `LIMIT` and the other form fields
KEPT_BYTES, KEPT_FILES = 200 * 1024**2, 500  # limits of all uploaded and drawn files together
UPLOADS = 4  # maximum number of simultaneous requests with a body
_SHIPPED = "assets/digits.pth.tar"
_SHIPPED_NAME = "handwritten digits"
_EXAMPLES = 6
_BUTTONS = ["download", "fullscreen"]  # the default includes one that sends the image to an external server


def demo(
    *,
    weights: Annotated[list[File] | None, Parameter(negative=())] = None,
    port: int | None = None,
    device: Device = "auto",
    ema: Ema = None,
    open_browser: Annotated[bool, Parameter(name="--open", negative=())] = False,
) -> None:
    """Serve a local page that shows predictions and similarity maps of uploaded images, label maps, or objects.

    Args:
        weights: A checkpoint of any format, for classification, segmentation or detection. Repeat the option to compare
            two (default: the included digits model).
        port: Port of the page, which is reachable only from this machine (default: the first free one from 7860).
        open_browser: Open the page in the browser.

    Raises:
        UsageError: More than two checkpoints or checkpoints for different tasks are given, a network has no maps, or no
            port is free.
        MissingExtra: Gradio, Matplotlib, Paddle, OpenCV or pycocotools is not installed.
        UnreadableFile, DoesNotFit: A checkpoint cannot be read.
    """
    if port is not None:
        require_free_port(HOST, port)
    chosen = os.environ.get("GRADIO_TEMP_DIR") or tempfile.gettempdir()
    Path(chosen).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="fcvit-demo-", dir=chosen) as folder:
        page = build(weights or (), Path(folder), device, ema)
        address = serve(page, Path(folder), port, open_browser)
        logger.info(f"open {address} in a browser (Ctrl-C stops the server)")
        try:
            threading.Event().wait()
        except KeyboardInterrupt:  # the normal way to stop the server
            logger.info("the server has stopped")
        finally:
            page.close(verbose=False)


def build(
    weights: Sequence[str | os.PathLike[str]], folder: Path, device: str = "auto", ema: bool | None = None
) -> Any:
    """Build the page as `gradio.Blocks`, without serving it.

    Args:
        weights, device, ema: See `demo`.
        folder: Folder for uploaded and drawn files.
    """
    os.environ["GRADIO_TEMP_DIR"] = str(folder)  # Gradio reads this when it is imported
    gradio = _gradio()
    from fcvit.report.page import require_report

    require_report()
    if len(weights) > 2:
        raise UsageError(f"--weights: expected one checkpoint, or two to compare, not {len(weights)}")
    if weights:
        read = [read_weights(path, ema) for path in weights]
        if len(tasks := {one.spec.task for one in read}) == 2:
            raise UsageError(f"--weights: networks for {' and '.join(sorted(tasks))}; show them separately")
        if overlay := _OVERLAYS.get(read[0].spec.task):
            predictors = [load(one, device=device) for one in read]
            return _overlay_page(gradio, overlay, predictors, titles(weights), folder)
        return _page(gradio, [Viewer(one, device=device) for one in read], titles(weights), [])
    with resources.as_file(resources.files("fcvit").joinpath(_SHIPPED)) as path:
        viewers = [Viewer(read_weights(path), digits(), device=device)]
    return _page(gradio, viewers, [_SHIPPED_NAME], _examples(folder))


def serve(page: Any, folder: Path, port: int | None = None, open_browser: bool = False) -> str:
    """Start to serve a page on this machine only, and return its address.

    Args:
        page: The page from `build`.
        folder: The folder that was passed to `build`.
        port: Port of the page, or None for the first free port from 7860.
        open_browser: Whether to open the page in the browser.

    Raises:
        UsageError: No port is free.
    """
    # Gradio sends a request to its own server to check that it runs. This request must not go through a proxy.
    os.environ["no_proxy"] = os.environ["NO_PROXY"] = ",".join(filter(None, (os.environ.get("no_proxy"), HOST)))
    try:
        app, address, shared = page.launch(
            server_name=HOST,
            server_port=port,
            share=False,
            quiet=True,
            prevent_thread_lock=True,
            max_file_size=LIMIT.replace(" ", "").lower(),
            footer_links=["settings"],
        )
    except OSError as error:
        raise UsageError(f"no port is free ({str(error).splitlines()[0]}); choose one with --port") from error
    assert shared is None
    # The guard must be the outermost layer, so that Gradio answers no request from outside.
    app.middleware_stack = _Guard(app.middleware_stack, urlsplit(address).port, folder)
    if open_browser:
        webbrowser.open(address)
    return address


class _Guard:
    """An ASGI application around another one, which accepts only requests from the page itself and limits uploads.

    Another web page can send requests to this server: with its own name in the Host header, if that name resolves to
    this machine (DNS rebinding), or with its own address in the Origin header.
    """

    def __init__(self, app: Callable[..., Awaitable[None]], port: int | None, folder: Path):
        self.app, self.folder = app, folder
        self.hosts = {f"{name}:{port}" for name in (HOST, "localhost", "[::1]")}
        self.own = {path for path in folder.rglob("*") if path.is_file()}  # examples
        self.active = 0

    async def __call__(self, scope: Mapping[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        hosts, origins, lengths = (_header(scope, name) for name in (b"host", b"origin", b"content-length"))
        if len(hosts) != 1 or hosts[0].lower() not in self.hosts:
            return await _reject(scope, send, 403, _WRONG_HOST)
        if any(origin.lower().removeprefix("http://") not in self.hosts for origin in origins):
            return await _reject(scope, send, 403, "requests from other web pages are not allowed")
        if scope["type"] != "http" or scope["method"] in ("GET", "HEAD", "OPTIONS"):
            return await self.app(scope, receive, send)
        if len(lengths) != 1 or not lengths[0].isdecimal() or _header(scope, b"transfer-encoding"):
            return await _reject(scope, send, 411, "expected a request with a Content-Length header")
        if len(lengths[0]) > 12 or int(lengths[0]) > MOST_BYTES:
            return await _reject(scope, send, 413, f"expected an image of at most {LIMIT}")
        if self.active >= UPLOADS:
            return await _reject(scope, send, 429, f"{UPLOADS} uploads are already in progress; try again")
        self.active += 1
        try:
            self._free_space(int(lengths[0]))
            await self.app(scope, receive, send)
        finally:
            self.active -= 1
            self._free_space(0)

    def _free_space(self, size: int) -> None:
        """Delete the oldest files until a new file of `size` bytes fits. The page shows the newest files."""
        files = []
        for path in self.folder.rglob("*"):
            with contextlib.suppress(OSError):
                if path not in self.own and path.is_file():
                    status = path.stat()
                    files.append((status.st_mtime_ns, status.st_size, path))
        total = size
        for count, (_, file_size, path) in enumerate(sorted(files, reverse=True), 1):
            total += file_size
            if total > KEPT_BYTES or count > KEPT_FILES:
                with contextlib.suppress(OSError):
                    path.unlink()


_WRONG_HOST = "open the address that fcvit demo printed; if you forward the port, use the same port number"


def _header(scope: Mapping[str, Any], name: bytes) -> list[str]:
    return [value.decode("latin-1") for key, value in scope["headers"] if key == name]


async def _reject(scope: Mapping[str, Any], send: Any, status: int, reason: str) -> None:
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1008})
        return
    headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": f"fcvit demo: {reason}\n".encode()})


def _gradio() -> Any:
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # Gradio reads this when it is imported
    try:
        return importlib.import_module("gradio")
    except ImportError as error:
        raise MissingExtra(f"gradio is not available ({error}); install it with: pip install 'fcvit[demo]'") from error


def titles(weights: Sequence[str | os.PathLike[str]]) -> list[str]:
    """Return the names of the files, with parent folders as needed to make them distinct."""
    parts = [Path(path).absolute().parts for path in weights]
    for count in range(1, max(map(len, parts)) + 1):
        names = [str(Path(*path[-count:])) for path in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{letter}: {Path(*path).name}" for letter, path in zip("AB", parts, strict=False)]  # the same file twice


def _page(gradio: Any, viewers: Sequence[Viewer], titles: Sequence[str], examples: Sequence[str]) -> Any:
    contexts = max(len(places(viewer.variant)) for viewer in viewers)
    heads = min(viewer.variant.heads for viewer in viewers)
    known = places(viewers[0].variant)
    first = known.index(choose(known, viewers[0].stage, -1, FIRST)) + 1

    def see(path: str | None, depth: float | None, head: str, values: Which, scale: Scale) -> list[Any]:
        """Process a new image. Return the state, a message, the image, the classes and the output of `show`."""
        seen, message, image = None, "", None
        if path is not None:
            try:
                image = decode(path, Path(path).name)
                seen = Path(path).name, [viewer.see(image) for viewer in viewers]
            except (BadImages, NumbersDisagree) as error:
                image = None
                message = f"**No maps:** {_plain(error)}"
        rows = [one.predictions for one in seen[1]] if seen else [()] * len(viewers)
        classes = [{row.name: row.probability for row in best} or None for best in rows]
        shown = gradio.Image(value=enlarged(image) if image else None, visible=bool(image))
        return [seen, message, shown, *classes, *show(seen, depth, head, values, scale)]

    def show(
        seen: tuple[str, list[Seen]] | None, depth: float | None, head: str, values: Which, scale: Scale
    ) -> list[Any]:
        """Return the name of the selected context, and the picture of each network."""
        selected = [_context(viewer, depth) for viewer in viewers]
        texts = dict.fromkeys("stage {}, block {}, context {}".format(*context) for context in selected)
        pictures: list[Image.Image | None] = [None] * len(viewers)
        if seen is not None:
            name, choice = seen[0], MapChoice(head, values, scale)
            drawn = (picture(*one[:2], name, one[2], choice) for one in zip(viewers, seen[1], selected, strict=True))
            pictures = [Image.open(io.BytesIO(content)) for content in drawn]
        return [" · ".join(texts), *pictures]

    with gradio.Blocks(title="FCViT: what the model sees", analytics_enabled=False) as page:
        gradio.Markdown(
            "# What the model sees\nEach map shows how similar every position of the image is to the mean of all "
            "positions, for one head: yellow is similar, purple is dissimilar. The maps do not always mark the pixels "
            "that the prediction depends on. `fcvit faithfulness` measures this."
        )
        state = gradio.State()
        with gradio.Row():
            with gradio.Column(scale=1, min_width=260):
                file = gradio.File(label=f"Drop an image (up to {LIMIT})", type="filepath", elem_id="image")
                message = gradio.Markdown(elem_id="message")
                shown = _picture(gradio, "shown", visible=False)
                if examples:
                    _gallery(gradio, examples, file)
                depth = gradio.Slider(1, contexts, first, step=1, label="Depth", elem_id="depth")
                position = gradio.Markdown("stage {}, block {}, context {}".format(*known[first - 1]), elem_id="place")
                names = ["each", "mean", *map(str, range(1, heads + 1))]
                head = gradio.Radio(names, value="each", label="Head", elem_id="head")
                values = gradio.Radio(list(get_args(Which)), value="standardized", label="Values", elem_id="values")
                scales = [("same for all heads", "picture"), ("one per head", "head")]
                scale = gradio.Radio(scales, value="picture", label="Color scale", elem_id="scale")
            classes, pictures = [], []
            for number, name in enumerate(titles):
                with gradio.Column(scale=2):
                    gradio.Markdown(f"### {_plain(name)}")
                    classes.append(gradio.Label(label="Prediction", num_top_classes=5, elem_id=f"prediction-{number}"))
                    pictures.append(_picture(gradio, f"maps-{number}"))
        settings = [depth, head, values, scale]
        # Matplotlib's settings and Paddle's device are global, so only one picture may be drawn at a time.
        serial: dict[str, Any] = {"concurrency_id": "drawing", "concurrency_limit": 1, "api_name": False}
        file.change(see, [file, *settings], [state, message, shown, *classes, position, *pictures], **serial)
        for setting in settings:
            setting.change(show, [state, *settings], [position, *pictures], show_progress="hidden", **serial)
    return page


class _Overlay(NamedTuple):
    """The parts of the page that only one task has.

    Attributes:
        title, text: Heading of the page and the sentence below it.
        slider: Label and default of the slider, which goes from 0 to 1.
        column: Title of the numbers in the legend.
        suffix: End of the name of the file to download.
        show: Function from a result and the value of the slider to the picture, the rows of the legend (color or None,
            name, number) and the result to download.
        options: Options of the prediction.
    """

    title: str
    text: str
    slider: tuple[str, float]
    column: str
    suffix: str
    show: Callable[[Any, float], tuple[Image.Image, list[tuple[Sequence[int] | None, str, str]], Any]]
    options: dict[str, Any]


def _segmented(result: SegmentedImage, opacity: float) -> Any:
    legend = [(result.palette[area.index], area.name, f"{100 * area.share:.1f}%") for area in result.areas]
    return enlarged(result.overlay(opacity)), legend, result


def _detected(result: DetectedImage, threshold: float) -> Any:
    chosen = result.take(result.scores >= threshold)
    colors = result.palette if len(result.palette) > 1 else [None]  # the objects of a single class have several colors
    legend = [(colors[label], result.classes[label].name, str(count)) for label, count in chosen.counts.items()]
    return chosen.draw(), legend, chosen


_OVERLAYS = {
    "segmentation": _Overlay(
        "Segmentation", "The color of each pixel is that of its class.",
        ("Opacity", 0.5), "area", ".png", _segmented, {},
    ),
    "detection": _Overlay(
        "Detection", "Each object has a box with its class and its score.",
        ("Score threshold", 0.3), "objects", ".json", _detected, {"score_threshold": 0},
    ),
}  # fmt: skip


def _overlay_page(gradio: Any, task: _Overlay, predictors: Sequence[Any], titles: Sequence[str], folder: Path) -> Any:
    """Build the page of a task that draws its results over the image."""

    def predict(path: str | None, value: float) -> list[Any]:
        """Process a new image. Return the results, a message, and the output of `show`."""
        results = [predictor.predict(path, **task.options)[0] for predictor in predictors] if path is not None else []
        bad = [result for result in results if isinstance(result, BadImages)]
        message = f"**No result:** {_plain(bad[0])}" if bad else ""
        state = None if bad or not results else results
        return [state, message, *show(state, value)]

    def show(results: list[Any] | None, value: float) -> list[Any]:
        """Return the picture, the legend and the button with the file to download of each network."""
        outputs: list[Any] = []
        for result in results or ():
            picture, legend, chosen = task.show(result, value)
            file = Path(tempfile.mkdtemp(dir=folder)) / f"{Path(result.image).stem}{task.suffix}"
            chosen.save(file)
            outputs += [picture, _legend(legend, task.column), gradio.DownloadButton(value=str(file), visible=True)]
        return outputs or [None, None, gradio.DownloadButton(visible=False)] * len(predictors)

    with gradio.Blocks(title=f"FCViT: {task.title.lower()}", analytics_enabled=False) as page:
        gradio.Markdown(f"# {task.title}\n{task.text}")
        state = gradio.State()
        with gradio.Row():
            with gradio.Column(scale=1, min_width=260):
                file = gradio.File(label=f"Drop an image (up to {LIMIT})", type="filepath", elem_id="image")
                message = gradio.Markdown(elem_id="message")
                label, default = task.slider
                slider = gradio.Slider(0, 1, default, step=0.05, label=label, elem_id="slider")
                legends, buttons = [], []
                for number, name in enumerate(titles):
                    if len(titles) > 1:
                        gradio.Markdown(f"### {_plain(name)}")
                    legends.append(gradio.HTML(elem_id=f"prediction-{number}"))
                    text = f"Download {task.suffix[1:].upper()}"
                    buttons.append(gradio.DownloadButton(text, visible=False, elem_id=f"download-{number}"))
            pictures = []
            for number, name in enumerate(titles):
                with gradio.Column(scale=3):
                    gradio.Markdown(f"### {_plain(name)}")
                    pictures.append(_picture(gradio, f"maps-{number}"))
        outputs = [*itertools.chain(*zip(pictures, legends, buttons, strict=True))]
        serial: dict[str, Any] = {"concurrency_id": "drawing", "concurrency_limit": 1, "api_name": False}
        file.change(predict, [file, slider], [state, message, *outputs], **serial)
        last: dict[str, Any] = {"show_progress": "hidden", "trigger_mode": "always_last", **serial}
        slider.change(show, [state, slider], outputs, **last)
    return page


def _picture(gradio: Any, name: str, visible: bool = True) -> Any:
    """Return an empty place for a picture."""
    static: dict[str, Any] = {"show_label": False, "interactive": False, "elem_id": name}
    return gradio.Image(type="pil", format="png", buttons=_BUTTONS, visible=visible, **static)


def _legend(rows: Sequence[tuple[Sequence[int] | None, str, str]], column: str) -> str:
    """Return the color, the name and the number of each class as HTML."""
    swatch = "display: inline-block; width: 1em; height: 1em; margin-right: 0.5em; border: 1px solid #888"
    lines = [f"<tr><th>class</th><th>{column}</th></tr>"]
    for color, name, number in rows:
        mark = f'<span style="{swatch}; background: rgb{tuple(map(int, color))}"></span>' if color else ""
        lines.append(f"<tr><td>{mark}{_escaped(name)}</td><td style='text-align: right'>{number}</td></tr>")
    return f"<table>{''.join(lines)}</table>"


def _escaped(text: str) -> str:
    """Escape the characters that HTML or Gradio's templates interpret."""
    return html.escape(printable(text)).replace("$", "&#36;").replace("{", "&#123;")


def _gallery(gradio: Any, examples: Sequence[str], file: Any) -> None:
    """Show example images that load when they are clicked."""
    label = "Or click an example (not used for training)"
    style: dict[str, Any] = {"columns": 3, "rows": 2, "height": 300, "object_fit": "contain", "elem_id": "examples"}
    static: dict[str, Any] = {"allow_preview": False, "interactive": False, "buttons": []}
    gallery = gradio.Gallery(list(examples), label=label, **style, **static)

    def pick(event: Any) -> str:
        return examples[event.index]

    pick.__annotations__["event"] = gradio.SelectData  # Gradio uses the annotation to pass the event
    gallery.select(pick, None, file, api_name=False)


def _context(viewer: Viewer, depth: float | None) -> Place:
    """Return the global context at a depth, counted from 1, or the last one if the depth is too large or empty."""
    known = places(viewer.variant)
    return known[min(max(int(depth or len(known)), 1), len(known)) - 1]


def _plain(text: object) -> str:
    """Escape the characters that Markdown interprets as markup."""
    return "".join(f"\\{letter}" if letter in "\\`*_{}[]()#+!|<>" else letter for letter in str(text))


def _examples(folder: Path) -> list[str]:
    """Write the first held-out digits of the package as image files, and return their paths."""
    with resources.files("fcvit").joinpath("assets/digits_held_out.npz").open("rb") as file:
        digits = np.load(file, allow_pickle=False)["images"][:_EXAMPLES]
    paths = []
    for number, digit in enumerate(digits, 1):
        path = folder / f"digit-{number}.png"
        Image.fromarray(digit).save(path)
        paths.append(str(path))
    return paths
