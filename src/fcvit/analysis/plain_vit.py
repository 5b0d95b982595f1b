"""The attention of a plain ViT out of the user's own timm, to compare similarity maps with.

timm and its torchvision are never required, and nothing is fetched: timm makes the network, and its weights are a file
that is read as all files are here, so that nothing in it is executed.
"""

import contextlib
import os
from importlib import import_module as _import
from typing import Any

import numpy as np

from fcvit.data.transforms.preprocess import normalize
from fcvit.errors import DoesNotFit, MissingExtra, UsageError
from fcvit.frameworks import import_framework, torch_place
from fcvit.models.variants import Preprocessing
from fcvit.weights.checkpoint import read_checkpoint


class PlainViT:
    """A ViT that shows what its queries ask for.

    Args:
        name: of a `timm.models.vision_transformer.VisionTransformer` with ordinary attention.
        weights: a file of any format, with its weights under timm's names, neither fewer nor more.
        device: auto, cpu, gpu or gpu:N.

    Attributes:
        name: of timm.
        preprocessing: as timm evaluates it.

    Raises:
        UsageError: timm has no such network, or it is no plain ViT.
        UnreadableFile: the file.
        DoesNotFit: the file has other weights.
        MissingExtra: timm or PyTorch is not installed, or does not load.
    """

    def __init__(self, name: str, weights: str | os.PathLike[str], device: str = "auto"):
        self.name = name
        self.torch = import_framework("torch")
        self.device = torch_place(device)
        timm = _timm()
        if not timm.is_model(name):
            near = timm.list_models(f"{name}*")[:3]
            raise UsageError(f"--vit {name}: timm {timm.__version__} has no such network; {_or(near)}")
        try:
            model = timm.create_model(name)
        except Exception as error:  # what a network of timm asks for that is not there has no useful bound
            raise UsageError(f"--vit {name}: timm cannot make it ({_first_line(error)})") from error
        self.preprocessing = _preprocessing(name, timm.data.resolve_model_data_config(model))
        home = timm.models.vision_transformer
        if not (
            isinstance(model, home.VisionTransformer)
            and all(type(getattr(block, "attn", None)) is home.Attention for block in model.blocks)
        ):
            raise UsageError(
                f"--vit {name}: it is no plain ViT with ordinary attention; for example vit_small_patch16_224"
            )
        self._load(model, weights)
        self.model = model.eval().to(self.device)

    def logits(self, batch: np.ndarray) -> list[np.ndarray]:
        """Attention before its softmax, of every block, among the patches: no class token, no registers.

        Args:
            batch: uint8 (B, 3, S, S), S as in `preprocessing`.

        Returns:
            (B, heads, patches, patches) each, float32: queries, then keys.
        """
        found: list[np.ndarray] = []

        def look(attention: Any, arguments: tuple[Any, ...]) -> None:
            found.append(attention_logits(attention, arguments[0], self.model.num_prefix_tokens).cpu().numpy())

        x = self.torch.from_numpy(normalize(batch, self.preprocessing)).to(self.device)
        with contextlib.ExitStack() as hooks, self.torch.inference_mode():
            for block in self.model.blocks:
                hooks.callback(block.attn.register_forward_pre_hook(look).remove)
            self.model(x)
        return found

    def _load(self, model: Any, path: str | os.PathLike[str]) -> None:
        tensors = read_checkpoint(path).select().tensors
        wanted = {key: tuple(value.shape) for key, value in model.state_dict().items()}
        given = {key: tensor.shape for key, tensor in tensors.items()}
        wrong = sorted(key for key in wanted.keys() | given.keys() if wanted.get(key) != given.get(key))
        if wrong:
            what = f"{wrong[0]} is {_shape(given, wrong[0])}, expected {_shape(wanted, wrong[0])}"
            raise DoesNotFit(
                f"{path} has no weights of timm's {self.name}: {len(wrong)} tensor(s) differ, first: {what}"
            )
        exact = {key: self.torch.from_numpy(np.array(tensor, np.float64)) for key, tensor in tensors.items()}
        model.load_state_dict(exact, strict=True)


def attention_logits(attention: Any, x: Any, prefix: int) -> Any:
    """What timm's `Attention` takes the softmax of, without the first `prefix` tokens.

    Args:
        attention: the module.
        x: its input, (B, tokens, C).

    Returns:
        (B, heads, queries, keys).
    """
    batch, tokens, _ = x.shape
    query, key, _ = attention.qkv(x).reshape(batch, tokens, 3, attention.num_heads, -1).permute(2, 0, 3, 1, 4)
    query, key = attention.q_norm(query)[:, :, prefix:], attention.k_norm(key)[:, :, prefix:]
    return attention.scale * query @ key.transpose(-2, -1)


def _timm() -> Any:
    try:
        return _import("timm")
    except Exception as error:  # a torchvision that does not fit PyTorch raises RuntimeError
        remedy = "install it, with the torchvision of your PyTorch: pip install timm"
        raise MissingExtra(f"timm cannot be had ({_first_line(error)}); {remedy}") from error


def _preprocessing(name: str, config: dict[str, Any]) -> Preprocessing:
    _, height, width = config["input_size"]
    if height != width or config.get("crop_mode", "center") != "center":
        raise UsageError(f"--vit {name}: expected a network that sees the square center of an image")
    return Preprocessing(width, config["crop_pct"], config["interpolation"], config["mean"], config["std"])


def _shape(shapes: dict[str, tuple[int, ...]], name: str) -> str:
    return " x ".join(map(str, shapes[name])) or "one number" if name in shapes else "missing"


def _or(names: list[str]) -> str:
    return f"did you mean {' or '.join(names)}?" if names else "timm.list_models() has the names"


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:150]
