"""Serve predictions over HTTP. Images of several requests are computed together in a batch."""

import contextlib
import functools
import importlib
import logging
import multiprocessing
import os
import signal
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from fcvit.commands.options import Classes, Device, Ema, File, all_tasks, given_options, require_free_port
from fcvit.errors import FcvitError, MissingExtra, UsageError
from fcvit.inference.engines import AUTO, CHOICES
from fcvit.machine import available_threads

ServiceOptions: Any = all_tasks("prediction")
logger = logging.getLogger("fcvit")


def serve(
    *,
    weights: File,
    options: Annotated[ServiceOptions | None, Parameter(name="*")] = None,
    host: Literal["127.0.0.1", "0.0.0.0"] = "127.0.0.1",
    port: int = 8000,
    max_batch_size: int = 8,
    max_wait_ms: float = 5.0,
    max_upload_mb: float = 20.0,
    workers: int = 1,
    threads: Annotated[int | None, Parameter(help="CPU threads of each worker (default: all cores / workers).")] = None,
    engine: Annotated[str, Parameter(help=f"{CHOICES}.")] = AUTO,
    classes: Classes = None,
    device: Device = "auto",
    ema: Ema = None,
) -> None:
    """Serve predictions over HTTP: POST an image to /predict, get JSON. GET /health answers 200 when it is ready.

    Args:
        weights: A checkpoint of any format, or an exported file.
        options: Options of the task of the weights.
        host: Address to listen on: 127.0.0.1 is this machine only, 0.0.0.0 the whole network.
        port: Port to listen on.
        max_batch_size: Largest number of images that are computed together. 1 turns batching off.
        max_wait_ms: Longest time in milliseconds to wait for more images of a batch.
        max_upload_mb: Largest request in megabytes.
        workers: Number of processes that compute, each with its own network.

    Raises:
        UsageError: A number is out of range, the port is in use, or an option does not fit the task of the weights.
        MissingExtra: LitServe or the engine is not installed.
        UnreadableFile, DoesNotFit: The weights cannot be used.
        FcvitError: A worker process ended unexpectedly.
    """
    for name, value, low, high in (
        ("port", port, 1024, 65535),
        ("max-batch-size", max_batch_size, 1, 1024),
        ("max-wait-ms", max_wait_ms, 0.1, 1000),
        ("max-upload-mb", max_upload_mb, 0.01, 1000),
        ("workers", workers, 1, 256),
    ):
        if not low <= value <= high:
            raise UsageError(f"--{name} {value:g}: expected {low} to {high}")
    litserve = _litserve()
    require_free_port(host, port)
    from fcvit.commands.image_api import ImageAPI

    errors = multiprocessing.get_context("spawn").SimpleQueue()
    load = {"path": weights, "ema": ema, "classes": classes, "device": device, "engine": engine}
    load["threads"] = threads or max(1, available_threads() // workers)
    batching = {"max_batch_size": max_batch_size, "batch_timeout": max_wait_ms / 1000}
    server = litserve.LitServer(
        ImageAPI(load, given_options(options), errors, **batching),
        accelerator="cpu",  # the workers choose their device themselves
        workers_per_device=workers,
        max_payload_size=int(max_upload_mb * 1e6),
        disable_openapi_url=True,  # its page loads scripts from another server
    )
    logger.info(f"POST images to http://{host}:{port}/predict when the network is loaded (Ctrl-C stops the service)")
    try:
        with _only_in_this_process():
            server.run(host, port, log_level="warning", generate_client_file=False)
    except Exception as error:
        if not errors.empty():
            raise errors.get() from None
        raise FcvitError("serve: a worker process ended; see the messages above") from error
    logger.info("the service has stopped")


@contextlib.contextmanager
def _only_in_this_process() -> Iterator[None]:
    """Ignore signals in processes that are forked in this block, after the HTTP server has handled them itself."""
    own = os.getpid()
    with contextlib.ExitStack() as stack:
        for number in (signal.SIGINT, signal.SIGTERM):
            if callable(before := signal.getsignal(number)):
                handler = functools.partial(
                    lambda before, *given: before(*given) if os.getpid() == own else None, before
                )
                stack.callback(signal.signal, *(number, signal.signal(number, handler)))
        yield


def _litserve() -> Any:
    try:
        importlib.import_module("python_multipart")  # FastAPI reads forms with it
        return importlib.import_module("litserve")
    except ImportError as error:
        raise MissingExtra(
            f"litserve is not available ({error}); install it with: pip install 'fcvit[serve]'"
        ) from error
