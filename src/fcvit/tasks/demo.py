"""A local page: drop an image, see what it is taken for and the similarity maps, slide through blocks and heads.

The page is Gradio's, the library that the field demonstrates models with. It is bound to this machine, shares and
reports nothing, takes files up to `LIMIT`, keeps them no longer than it is served, and computes with
`fcvit.tasks.similarity`, as the command line does.
"""

import importlib
import io
import os
import socket
import tempfile
import threading
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fcvit.classes import digits
from fcvit.errors import BadImages, MissingExtra, UsageError
from fcvit.images.preprocess import decode
from fcvit.maps import places
from fcvit.tasks.similarity import Seen, Viewer, picture
from fcvit.weights.reading import read_weights

HOST = "127.0.0.1"
LIMIT = "20mb"
_SHIPPED = "assets/digits.pth.tar"
_SHIPPED_NAME = "handwritten digits"
_EXAMPLES = 6


def demo(
    weights: Sequence[str | os.PathLike[str]] = (),
    *,
    port: int | None = None,
    device: str = "auto",
    ema: bool | None = None,
    open_browser: bool = False,
    announce: Callable[[str], None] = lambda _: None,
) -> None:
    """Serve the page until interrupted.

    Args:
        weights: one file, or two to compare; none: the digits checkpoint of the package.
        port: None: the first free one from 7860.
        device: auto, cpu, gpu or gpu:N.
        ema: choose the averaged or raw weights of files that have both.
        open_browser: show the page at once.
        announce: is told the address.

    Raises:
        UsageError: more than two files, a network without maps, or no free port.
        MissingExtra: Gradio, Matplotlib or Paddle is not installed.
        UnreadableFile, DoesNotFit: a file.
    """
    if port is not None:
        _require_free(port)
    with tempfile.TemporaryDirectory(prefix="fcvit-demo-") as folder:
        page = build(weights, Path(folder), device, ema)
        address = serve(page, port, open_browser)
        announce(f"the page is at {address} (Ctrl-C ends it)")
        try:
            threading.Event().wait()
        except KeyboardInterrupt:  # the way to end it
            announce("the page is closed")
        finally:
            page.close(verbose=False)


def build(
    weights: Sequence[str | os.PathLike[str]], folder: Path, device: str = "auto", ema: bool | None = None
) -> Any:
    """The page, as `gradio.Blocks`, not yet served.

    Args:
        weights, device, ema: as for `demo`.
        folder: for what is uploaded and drawn, unless the environment's GRADIO_TEMP_DIR names another.
    """
    os.environ.setdefault("GRADIO_TEMP_DIR", str(folder))  # read when it is imported
    gradio = _gradio()
    from fcvit.report.page import require_report

    require_report()
    if len(weights) > 2:
        raise UsageError(f"{len(weights)} checkpoints: expected one, or two to compare")
    if weights:
        viewers = [Viewer(read_weights(path, ema), device=device) for path in weights]
    else:
        with resources.as_file(resources.files("fcvit").joinpath(_SHIPPED)) as path:
            viewers = [Viewer(read_weights(path), digits(), device=device)]
    if not weights:
        return _page(gradio, viewers, [_SHIPPED_NAME], _examples(folder))
    return _page(gradio, viewers, titles(weights), [])


def serve(page: Any, port: int | None = None, open_browser: bool = False) -> str:
    """Begin to serve on this machine only: the address.

    Raises:
        UsageError: no free port.
    """
    gradio = _gradio()
    # The page asks itself whether it is there: not by way of a proxy.
    os.environ["no_proxy"] = os.environ["NO_PROXY"] = ",".join(filter(None, (os.environ.get("no_proxy"), HOST)))
    try:
        _, address, shared = page.launch(
            server_name=HOST,
            server_port=port,
            share=False,
            quiet=True,
            inbrowser=open_browser,
            prevent_thread_lock=True,
            max_file_size=LIMIT,
            footer_links=["settings"],
            # Fonts of the system: the usual themes fetch theirs from elsewhere.
            theme=gradio.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"]),
        )
    except OSError as error:
        raise UsageError(f"no free port ({str(error).splitlines()[0]}); choose one with --port") from error
    assert shared is None
    return address


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
    """Of the files: their names, with as many folders as it takes to tell them apart."""
    parts = [Path(path).absolute().parts for path in weights]
    for count in range(1, max(map(len, parts)) + 1):
        found = [str(Path(*one[-count:])) for one in parts]
        if len(set(found)) == len(found):
            return found
    return [f"{letter}: {Path(*one).name}" for letter, one in zip("AB", parts, strict=False)]  # one file twice


def _page(gradio: Any, viewers: Sequence[Viewer], titles: Sequence[str], examples: Sequence[str]) -> Any:
    contexts = max(len(places(viewer.variant)) for viewer in viewers)
    heads = min(viewer.variant.heads for viewer in viewers)

    def look(path: str | None, depth: float | None, head: str, values: str) -> list[Any]:
        """A new image: the state, a message, and for each network its classes and its picture."""
        if path is None:
            return [None, "", *[None] * (2 * len(viewers))]
        try:
            image = decode(path, Path(path).name)
            seen = [viewer.see(image) for viewer in viewers]
        except BadImages as error:
            return [None, f"**Not an image that can be read:** {_plain(error)}", *[None] * (2 * len(viewers))]
        labels = [{row.name: row.probability for row in one.predictions} or None for one in seen]
        pictures = show((Path(path).name, seen), depth, head, values)
        return [(Path(path).name, seen), "", *[value for pair in zip(labels, pictures, strict=True) for value in pair]]

    def show(
        state: tuple[str, list[Seen]] | None, depth: float | None, head: str, values: str
    ) -> list[Image.Image | None]:
        """The same image, other maps."""
        if state is None:
            return [None] * len(viewers)
        name, seen = state
        return [_picture(viewer, one, name, depth, head, values) for viewer, one in zip(viewers, seen, strict=True)]

    with gradio.Blocks(title="FCViT: what the model sees", analytics_enabled=False) as page:
        gradio.Markdown(
            "# What the model sees\nToken-global similarity: how similar each position is to the mean of all, by head."
        )
        state = gradio.State()
        with gradio.Row():
            with gradio.Column(scale=1, min_width=260):
                file = gradio.File(label="Drop an image", type="filepath", elem_id="image")
                if examples:
                    gradio.Examples(list(examples), file, label="Digits that the network has not been trained on")
                message = gradio.Markdown(elem_id="message")
                depth = gradio.Slider(1, contexts, contexts, step=1, label="Depth (global context)", elem_id="depth")
                names = ["each", "mean", *map(str, range(1, heads + 1))]
                head = gradio.Radio(names, value="each", label="Head", elem_id="head")
                values = gradio.Radio(["standardised", "rescaled"], value="standardised", label="Values")
            labels, pictures = [], []
            for number, name in enumerate(titles):
                with gradio.Column(scale=2):
                    gradio.Markdown(f"### {_plain(name)}")
                    labels.append(gradio.Label(label="Prediction", num_top_classes=5, elem_id=f"prediction-{number}"))
                    pictures.append(_image(gradio, f"maps-{number}"))
        settings = [depth, head, values]
        outputs = [component for pair in zip(labels, pictures, strict=True) for component in pair]
        # One after the other: neither Matplotlib's settings nor Paddle's device belong to a thread.
        alone: dict[str, Any] = {"concurrency_id": "drawing", "concurrency_limit": 1, "api_name": False}
        file.change(look, [file, *settings], [state, message, *outputs], **alone)
        for one in settings:
            one.change(show, [state, *settings], pictures, show_progress="hidden", **alone)
    return page


def _image(gradio: Any, name: str) -> Any:
    """A picture without the button that would send it to somebody else's server."""
    return gradio.Image(
        show_label=False, type="pil", format="png", interactive=False, elem_id=name, buttons=["download", "fullscreen"]
    )


def _picture(viewer: Viewer, seen: Seen, name: str, depth: float | None, head: str, values: str) -> Image.Image:
    known = places(viewer.variant)
    where = known[min(max(int(depth or len(known)), 1), len(known)) - 1]  # a field that was emptied: the last
    return Image.open(
        io.BytesIO(picture(viewer, seen, name, where, head, "rescaled" if values == "rescaled" else "standardised"))
    )


def _plain(text: object) -> str:
    """Without what Markdown would read as markup."""
    return "".join(f"\\{letter}" if letter in "\\`*_{}[]()#+!|<>" else letter for letter in str(text))


def _examples(folder: Path) -> list[str]:
    """Held-out digits of the package, as files."""
    with resources.files("fcvit").joinpath("assets/digits_held_out.npz").open("rb") as file:
        digits = np.load(file, allow_pickle=False)["images"][:_EXAMPLES]
    paths = []
    for number, digit in enumerate(digits, 1):
        path = folder / f"digit-{number}.png"
        Image.fromarray(digit).save(path)
        paths.append(str(path))
    return paths
