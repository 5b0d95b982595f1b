"""A local page: drop an image, see what it is taken for and the similarity maps, slide through blocks and heads.

The page is Gradio's, the library that the field demonstrates models with. It is bound to this machine, answers only
itself (see `_Guard`), shares and reports nothing, takes files up to `LIMIT`, keeps at most `KEPT_BYTES` of them and
none longer than it is served, and computes with `fcvit.analysis.similarity`, as the command line does.
"""

import contextlib
import importlib
import io
import logging
import os
import socket
import tempfile
import threading
import webbrowser
from collections.abc import Awaitable, Callable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, get_args
from urllib.parse import urlsplit

import numpy as np
from cyclopts import Parameter
from PIL import Image

from fcvit.analysis.similarity import FIRST, MapChoice, Scale, Seen, Viewer, Which, picture
from fcvit.commands.options import Device, Ema, File
from fcvit.data.classes import digits
from fcvit.data.transforms.preprocess import decode
from fcvit.errors import BadImages, MissingExtra, NumbersDisagree, UsageError
from fcvit.models.maps import Place, choose, places
from fcvit.weights.reading import read_weights

logger = logging.getLogger("fcvit")

HOST = "127.0.0.1"
LIMIT = "20 MB"
MOST_BYTES = 21 * 1024**2  # of a request: a file of `LIMIT`, with what a form adds
KEPT_BYTES, KEPT_FILES = 200 * 1024**2, 500  # of all that is uploaded and drawn
UPLOADS = 4  # requests with a body at the same time
_SHIPPED = "assets/digits.pth.tar"
_SHIPPED_NAME = "handwritten digits"
_EXAMPLES = 6


def demo(
    *,
    weights: list[File] | None = None,
    port: int | None = None,
    device: Device = "auto",
    ema: Ema = None,
    open_browser: Annotated[bool, Parameter(name="--open", negative=())] = False,
) -> None:
    """Serve a local page: drop an image, see its classes and similarity maps, slide through blocks and heads.

    Args:
        weights: A checkpoint of any format, or two, each with its own --weights (default: the package's digits).
        port: Of the page, on this machine only (default: the first free one from 7860).
        open_browser: Show the page at once.

    Raises:
        UsageError: more than two files, a network without maps, or no free port.
        MissingExtra: Gradio, Matplotlib or Paddle is not installed.
        UnreadableFile, DoesNotFit: a file.
    """
    if port is not None:
        _require_free(port)
    chosen = os.environ.get("GRADIO_TEMP_DIR") or tempfile.gettempdir()
    Path(chosen).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="fcvit-demo-", dir=chosen) as folder:
        page = build(weights or (), Path(folder), device, ema)
        address = serve(page, Path(folder), port, open_browser)
        logger.info(f"the page is at {address} (Ctrl-C ends it)")
        try:
            threading.Event().wait()
        except KeyboardInterrupt:  # the way to end it
            logger.info("the page is closed")
        finally:
            page.close(verbose=False)


def build(
    weights: Sequence[str | os.PathLike[str]], folder: Path, device: str = "auto", ema: bool | None = None
) -> Any:
    """Build the page, as `gradio.Blocks`, not yet served.

    Args:
        weights, device, ema: as for `demo`.
        folder: for what is uploaded and drawn.
    """
    os.environ["GRADIO_TEMP_DIR"] = str(folder)  # read when it is imported
    gradio = _gradio()
    from fcvit.report.page import require_report

    require_report()
    if len(weights) > 2:
        raise UsageError(f"{len(weights)} checkpoints: expected one, or two to compare")
    if weights:
        viewers = [Viewer(read_weights(path, ema), device=device) for path in weights]
        return _page(gradio, viewers, titles(weights), [])
    with resources.as_file(resources.files("fcvit").joinpath(_SHIPPED)) as path:
        viewers = [Viewer(read_weights(path), digits(), device=device)]
    return _page(gradio, viewers, [_SHIPPED_NAME], _examples(folder))


def serve(page: Any, folder: Path, port: int | None = None, open_browser: bool = False) -> str:
    """Begin to serve on this machine only; return the address. `folder` is the one that the page was built with.

    Raises:
        UsageError: no free port.
    """
    # The page asks itself whether it is there: not by way of a proxy.
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
        raise UsageError(f"no free port ({str(error).splitlines()[0]}); choose one with --port") from error
    assert shared is None
    # Before all that Gradio puts there itself, so that nothing answers a stranger.
    app.middleware_stack = _Guard(app.middleware_stack, urlsplit(address).port, folder)
    if open_browser:
        webbrowser.open(address)
    return address


class _Guard:
    """Let only the page itself through, and bound what it uploads; an ASGI application around another.

    A page of somebody else can send requests here: with its own name in Host, where that name was made to mean this
    machine, or with its own address in Origin.
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
            return await _refuse(scope, send, 403, _STRANGER)
        if any(origin.lower().removeprefix("http://") not in self.hosts for origin in origins):
            return await _refuse(scope, send, 403, "this page takes no requests of other pages")
        if scope["type"] != "http" or scope["method"] in ("GET", "HEAD", "OPTIONS"):
            return await self.app(scope, receive, send)
        if len(lengths) != 1 or not lengths[0].isdecimal() or _header(scope, b"transfer-encoding"):
            return await _refuse(scope, send, 411, "expected a request that says its length")
        if len(lengths[0]) > 12 or int(lengths[0]) > MOST_BYTES:
            return await _refuse(scope, send, 413, f"expected an image of at most {LIMIT}")
        if self.active >= UPLOADS:
            return await _refuse(scope, send, 429, f"{UPLOADS} files are on their way already; try again")
        self.active += 1
        try:
            self._make_room(int(lengths[0]))
            await self.app(scope, receive, send)
        finally:
            self.active -= 1
            self._make_room(0)

    def _make_room(self, coming: int) -> None:
        """Delete the oldest files where there are too many; the newest are those that are shown."""
        files = []
        for path in self.folder.rglob("*"):
            with contextlib.suppress(OSError):
                if path not in self.own and path.is_file():
                    status = path.stat()
                    files.append((status.st_mtime_ns, status.st_size, path))
        for count, (_, size, path) in enumerate(sorted(files, reverse=True), 1):
            coming += size
            if coming > KEPT_BYTES or count > KEPT_FILES:
                with contextlib.suppress(OSError):
                    path.unlink()


_STRANGER = "this page answers only to the address that fcvit demo printed; forward it under the same port"


def _header(scope: Mapping[str, Any], name: bytes) -> list[str]:
    return [value.decode("latin-1") for key, value in scope["headers"] if key == name]


async def _refuse(scope: Mapping[str, Any], send: Any, status: int, reason: str) -> None:
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1008})
        return
    headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": f"fcvit demo: {reason}\n".encode()})


def _require_free(port: int) -> None:
    if not 1 <= port <= 65535:
        raise UsageError(f"--port {port}: expected 1 to 65535")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            remedy = "leave it out, or choose another"
            raise UsageError(f"--port {port}: {error.strerror or error}; {remedy}") from error


def _gradio() -> Any:
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when it is imported
    try:
        return importlib.import_module("gradio")
    except ImportError as error:
        raise MissingExtra(f"gradio cannot be had ({error}); install it with: pip install 'fcvit[demo]'") from error


def titles(weights: Sequence[str | os.PathLike[str]]) -> list[str]:
    """Return the names of the files, with as many folders as it takes to tell them apart."""
    parts = [Path(path).absolute().parts for path in weights]
    for count in range(1, max(map(len, parts)) + 1):
        names = [str(Path(*one[-count:])) for one in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{letter}: {Path(*one).name}" for letter, one in zip("AB", parts, strict=False)]  # one file twice


def _page(gradio: Any, viewers: Sequence[Viewer], titles: Sequence[str], examples: Sequence[str]) -> Any:
    contexts = max(len(places(viewer.variant)) for viewer in viewers)
    heads = min(viewer.variant.heads for viewer in viewers)
    known = places(viewers[0].variant)
    first = known.index(choose(known, viewers[0].stage, -1, FIRST)) + 1

    def look(path: str | None, depth: float | None, head: str, values: Which, scale: Scale) -> list[Any]:
        """Take a new image: the state, a message, the classes of each network, and what `show` gives."""
        seen, message = None, ""
        if path is not None:
            try:
                image = decode(path, Path(path).name)
                seen = Path(path).name, [viewer.see(image) for viewer in viewers]
            except (BadImages, NumbersDisagree) as error:
                message = f"**No maps:** {_plain(error)}"
        rows = [one.predictions for one in seen[1]] if seen else [()] * len(viewers)
        classes = [{row.name: row.probability for row in best} or None for best in rows]
        return [seen, message, *classes, *show(seen, depth, head, values, scale)]

    def show(
        seen: tuple[str, list[Seen]] | None, depth: float | None, head: str, values: Which, scale: Scale
    ) -> list[Any]:
        """Return which context it is, and the picture of each network."""
        places_of = [_place(viewer, depth) for viewer in viewers]
        texts = dict.fromkeys("stage {}, block {}, context {}".format(*place) for place in places_of)
        pictures: list[Image.Image | None] = [None] * len(viewers)
        if seen is not None:
            name, choice = seen[0], MapChoice(head, values, scale)
            drawn = (picture(*one[:2], name, one[2], choice) for one in zip(viewers, seen[1], places_of, strict=True))
            pictures = [Image.open(io.BytesIO(content)) for content in drawn]
        return [" · ".join(texts), *pictures]

    with gradio.Blocks(title="FCViT: what the model sees", analytics_enabled=False) as page:
        gradio.Markdown(
            "# What the model sees\nHow similar each place of the image is to the mean of all places, head by head: "
            "yellow is like it, purple unlike it. Whether that marks what the answer rests on is another question, "
            "which `fcvit faithfulness` measures."
        )
        state = gradio.State()
        with gradio.Row():
            with gradio.Column(scale=1, min_width=260):
                file = gradio.File(label=f"Drop an image (up to {LIMIT})", type="filepath", elem_id="image")
                message = gradio.Markdown(elem_id="message")
                if examples:
                    _gallery(gradio, examples, file)
                depth = gradio.Slider(1, contexts, first, step=1, label="Depth", elem_id="depth")
                place_of = gradio.Markdown("stage {}, block {}, context {}".format(*known[first - 1]), elem_id="place")
                names = ["each", "mean", *map(str, range(1, heads + 1))]
                head = gradio.Radio(names, value="each", label="Head", elem_id="head")
                values = gradio.Radio(list(get_args(Which)), value="standardised", label="Values", elem_id="values")
                scales = [("one for all", "picture"), ("each head its own", "head")]
                scale = gradio.Radio(scales, value="picture", label="Scale of the colors", elem_id="scale")
            classes, pictures = [], []
            for number, name in enumerate(titles):
                with gradio.Column(scale=2):
                    gradio.Markdown(f"### {_plain(name)}")
                    classes.append(gradio.Label(label="Prediction", num_top_classes=5, elem_id=f"prediction-{number}"))
                    # Without the button that would send it to somebody else's server.
                    buttons = ["download", "fullscreen"]
                    still: dict[str, Any] = {"show_label": False, "interactive": False, "elem_id": f"maps-{number}"}
                    pictures.append(gradio.Image(type="pil", format="png", buttons=buttons, **still))
        settings = [depth, head, values, scale]
        # One after the other: neither Matplotlib's settings nor Paddle's device belong to a thread.
        alone: dict[str, Any] = {"concurrency_id": "drawing", "concurrency_limit": 1, "api_name": False}
        file.change(look, [file, *settings], [state, message, *classes, place_of, *pictures], **alone)
        for one in settings:
            one.change(show, [state, *settings], [place_of, *pictures], show_progress="hidden", **alone)
    return page


def _gallery(gradio: Any, examples: Sequence[str], file: Any) -> None:
    """Show images to click on instead of one's own."""
    label = "Or one of these, which the network has not been trained on"
    look: dict[str, Any] = {"columns": 3, "rows": 2, "height": 300, "object_fit": "contain", "elem_id": "examples"}
    still: dict[str, Any] = {"allow_preview": False, "interactive": False, "buttons": []}
    gallery = gradio.Gallery(list(examples), label=label, **look, **still)

    def pick(event: Any) -> str:
        return examples[event.index]

    pick.__annotations__["event"] = gradio.SelectData  # by which Gradio knows what to hand over
    gallery.select(pick, None, file, api_name=False)


def _place(viewer: Viewer, depth: float | None) -> Place:
    """Return the context at that depth, from 1; the last where there are fewer or the field was emptied."""
    known = places(viewer.variant)
    return known[min(max(int(depth or len(known)), 1), len(known)) - 1]


def _plain(text: object) -> str:
    """Escape what Markdown would read as markup."""
    return "".join(f"\\{letter}" if letter in "\\`*_{}[]()#+!|<>" else letter for letter in str(text))


def _examples(folder: Path) -> list[str]:
    """Write held-out digits of the package as files."""
    with resources.files("fcvit").joinpath("assets/digits_held_out.npz").open("rb") as file:
        digits = np.load(file, allow_pickle=False)["images"][:_EXAMPLES]
    paths = []
    for number, digit in enumerate(digits, 1):
        path = folder / f"digit-{number}.png"
        Image.fromarray(digit).save(path)
        paths.append(str(path))
    return paths
