"""Answer requests with an image for `fcvit serve`. LitServe collects requests and passes them in batches."""

import dataclasses
import io
import logging
import signal
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Any, NamedTuple

import litserve
from fastapi import Depends, HTTPException, Request
from fastapi.responses import JSONResponse
from litserve.loops import BatchedLoop
from PIL import Image
from starlette.datastructures import UploadFile
from starlette.requests import ClientDisconnect

import fcvit
from fcvit.commands.options import task_options
from fcvit.data.transforms.preprocess import opened
from fcvit.errors import BadImages, FcvitError
from fcvit.machine import available_threads
from fcvit.tasks.base import task_of

logger = logging.getLogger("fcvit")

BATCH_HEADER = "x-batch-size"
_LONGEST_NAME = 100


class Upload(NamedTuple):
    """An image file from a request: its name in messages, and its content."""

    name: str
    content: bytes


async def uploaded(request: Request) -> Upload:
    """Return the image of a request: the only file of a form, or the whole body.

    Raises:
        HTTPException: The form does not contain exactly one file, or the body is empty.
    """
    try:
        if request.headers.get("content-type", "").startswith("multipart/form-data"):
            async with request.form() as form:
                files = [value for _, value in form.multi_items() if isinstance(value, UploadFile)]
                if len(files) != 1:
                    raise HTTPException(400, f"expected a form with one file, not {len(files)}")
                upload = Upload((files[0].filename or "image")[:_LONGEST_NAME], await files[0].read())
        else:
            upload = Upload("image", await request.body())
    except ClientDisconnect:
        raise HTTPException(400, "the connection was closed") from None  # only for the log
    if not upload.content:
        raise HTTPException(400, f"{upload.name}: the file is empty; send an image")
    return upload


class ImageAPI(litserve.LitAPI):
    """A predictor of any task behind LitServe's queue. Every worker process loads its own network."""

    def __init__(self, load: Mapping[str, Any], options: dict[str, Any], errors: Any, **batching: Any):
        """Prepare the service, without loading the network.

        Args:
            load: Arguments of `fcvit.load`.
            options: Options of the prediction that differ from their defaults.
            errors: Queue for the error if a worker cannot load the network.
            batching: `max_batch_size`, and `batch_timeout` in seconds.
        """
        super().__init__(loop=BatchedLoop(), **batching)
        self.load, self.options, self.errors = load, options, errors
        self.level = logger.getEffectiveLevel()

    def setup(self, device: object) -> None:
        """Load the network in a worker process."""
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process stops the workers after the last request
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("fcvit: note: %(message)s"))
        logger.addHandler(handler)
        logger.setLevel(self.level)
        try:
            self.predictor = fcvit.load(**self.load)
            options = task_options("serve", task_of([self.predictor.weights]), self.options)
            self.arguments = {field.name: getattr(options, field.name) for field in dataclasses.fields(options)}
            list(self.predictor.stream((), **self.arguments))  # checks the options
        except FcvitError as error:
            logging.getLogger("litserve").setLevel(logging.CRITICAL)  # it would print a traceback
            self.errors.put(error)
            raise
        logger.info("the network is loaded")
        self.pool = ThreadPoolExecutor(available_threads())

    def decode_request(self, request: Annotated[Upload, Depends(uploaded)], **_: Any) -> Upload:
        """Return the image file of a request, which is decoded with the others of its batch."""
        return request

    def predict(self, x: list[Upload], **_: Any) -> list[tuple[int, dict[str, Any], int]]:
        """Return status code, JSON and batch size for each image of a batch. A bad image does not affect the others."""
        images = list(self.pool.map(_decoded, x))
        results = self.predictor.stream([i for i in images if not isinstance(i, BadImages)], **self.arguments)
        answers = []
        for upload, image in zip(x, images, strict=True):
            result = image if isinstance(image, BadImages) else next(results)
            if isinstance(result, BadImages):
                reason = str(result).partition(": ")[2]
                answers.append((400, {"detail": f"{upload.name}: {reason}"}, len(x)))
            else:
                answers.append((200, {"predictions": self.predictor.rows(result)}, len(x)))
        return answers

    def encode_response(self, output: tuple[int, dict[str, Any], int], **_: Any) -> JSONResponse:
        """Return the answer to a request."""
        status, content, batch_size = output
        return JSONResponse(content, status, {BATCH_HEADER: str(batch_size)})


def _decoded(upload: Upload) -> Image.Image | BadImages:
    try:
        with opened(io.BytesIO(upload.content), upload.name) as image:
            image.load()
            return image
    except BadImages as error:
        return error
