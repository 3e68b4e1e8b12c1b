"""ONNX files as networks of images: what a file declares about its input decides how pixels are passed in. B images, D
dimensions.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lodeset.pipeline.embedders import Embed
from lodeset.pipeline.embedders.config import OnnxEmbedder
from lodeset.pipeline.embedders.networks import embedder, present
from lodeset.pipeline.embedders.preprocess import IMAGENET_MEAN, IMAGENET_STD, Recipe, Triple
from lodeset.pipeline.errors import LodesetError

if TYPE_CHECKING:
    import onnxruntime

Floats = NDArray[np.float32]

SIDE = 224  # pixels, if neither the configuration nor the file gives it
# Keys that `lodeset export` writes into a file's metadata; the values are JSON.
MEAN_KEY, STD_KEY, SIZE_KEY = "image_mean", "image_std", "image_size"
_TYPES: dict[str, type[np.generic]] = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(double)": np.float64,
    "tensor(uint8)": np.uint8,
}


@dataclass(frozen=True)
class Network:
    """An ONNX network that is ready to run on images.

    Attributes:
        name: name in messages: the file, and what it is used for.
        key: its place in the configuration, for messages.
        batch: number of images of every call; None: any number.
        recipe: how an image becomes the network's input; for uint8 inputs, bytes of 0..255.
    """

    session: onnxruntime.InferenceSession
    name: str
    key: str
    input: str
    shape: tuple[Any, ...]
    dtype: type[np.generic]
    channels_last: bool
    batch: int | None
    recipe: Recipe

    @property
    def outputs(self) -> list[str]:
        return [output.name for output in self.session.get_outputs()]

    def run(self, images: Floats, outputs: Sequence[str]) -> list[NDArray[Any]]:
        """The outputs for images [B, 3, height, width], in calls of the network's batch size; the last call is padded.

        Raises:
            LodesetError: the network fails, or does not return one row per image when it is called several times.
        """
        if self.batch is None or self.batch == len(images):
            return self._call(images, outputs)
        calls: list[list[NDArray[Any]]] = []
        for start in range(0, len(images), self.batch):
            chunk = images[start : start + self.batch]
            filled = np.concatenate([chunk, np.repeat(chunk[-1:], self.batch - len(chunk), axis=0)])
            call = self._call(filled, outputs)
            odd = next((out for out in call if out.ndim == 0 or len(out) != self.batch), None)
            if odd is not None:
                raise LodesetError(
                    f"{self.name} returns an output of shape {list(odd.shape)} for {self.batch} images instead of one "
                    "row per image: pool it first"
                )
            calls.append([out[: len(chunk)] for out in call])
        return [np.concatenate(parts) for parts in zip(*calls, strict=True)]

    def _call(self, images: Floats, outputs: Sequence[str]) -> list[NDArray[Any]]:
        array = images.transpose(0, 2, 3, 1) if self.channels_last else images
        if self.dtype is np.uint8:
            array = np.rint(array)
        try:
            results: list[NDArray[Any]] = self.session.run(
                list(outputs), {self.input: np.ascontiguousarray(array).astype(self.dtype, copy=False)}
            )
        except Exception as error:
            raise LodesetError(
                f"{self.name} takes {list(self.shape)} but got {list(array.shape)} (`{self.key}: size:` "
                f"{self.recipe.side}): {error}"
            ) from error
        for out in results:
            if not isinstance(out, np.ndarray) or out.dtype.kind not in "fiub":
                raise LodesetError(f"{self.name} returns a {type(out).__name__} instead of an array of numbers")
        return results


def opened(config: OnnxEmbedder, threads: int, key: str = "embed", name: str = "", side: int = SIDE) -> Network:
    """Open the network of a file on `threads` cores, or on a GPU that onnxruntime was built for.

    Args:
        config: the configuration; values that it leaves out (None) come from the file, or are defaults.
        key: the file's place in the configuration, for messages.
        name: what the file is used for, for messages; the file's path if absent.
        side: side of the input in pixels, if neither the configuration nor the file gives it.

    Raises:
        LodesetError: the file is missing or broken, or its input is not images, or not images of a supported form.
    """
    session, name = _session(config.path, threads, key), name or config.path
    inputs = session.get_inputs()
    if len(inputs) != 1:
        listed = ", ".join(f"{source.name} {source.shape}" for source in inputs) or "none"
        raise LodesetError(
            f"{name} takes {len(inputs)} inputs ({listed}), but a network of images takes one, the images"
        )
    (source,) = inputs
    shape = tuple(source.shape)
    dtype = _TYPES.get(source.type)
    if dtype is None:
        raise LodesetError(
            f"{name} takes {source.type}, but images can be given as {', '.join(sorted(_TYPES))}: export it with one "
            "of these types"
        )
    channels_last, sides = _layout(shape, name)
    metadata = session.get_modelmeta().custom_metadata_map
    pixels = _side(config, sides, metadata, name, key) or side
    recipe = Recipe("square", pixels, pixels, *_statistics(config, dtype, metadata, name, key))
    batch = shape[0] if isinstance(shape[0], int) and shape[0] > 0 else None
    return Network(session, name, key, source.name, shape, dtype, channels_last, batch, recipe)


def settled(network: Network, outputs: Sequence[str]) -> Network:
    """The network after a trial call. A network that declares a free batch size but was exported for one image gets one
    image at a time.

    Raises:
        LodesetError: it does not take images of the side that it would be given.
    """
    if network.batch is not None:
        return network
    pair = np.zeros((2, 3, network.recipe.side, network.recipe.side), np.float32)
    try:
        if all(out.ndim and len(out) == 2 for out in network.run(pair, outputs)):
            return network
    except LodesetError:
        network.run(pair[:1], outputs)  # raises if the problem is not the number of images
    alone = network.run(pair[:1], outputs)
    return replace(network, batch=1) if all(out.ndim and len(out) == 1 for out in alone) else network


def onnx(config: OnnxEmbedder, threads: int) -> Embed:
    """An ONNX network on one worker's `threads` cores.

    Raises:
        LodesetError: the file is missing, broken, or not a network from images to vectors.
    """
    network = opened(config, threads)
    output = _output_of(network, config)
    network = settled(network, [output])

    def forward(batch: Floats) -> Floats:
        (out,) = network.run(batch, [output])
        # [B, D, 1, 1], as pooling layers return vectors.
        return np.asarray(out.reshape(out.shape[:2]) if out.ndim > 2 and math.prod(out.shape[2:]) == 1 else out)

    return embedder(forward, network.recipe, config.path, threads)


def _output_of(network: Network, config: OnnxEmbedder) -> str:
    """The named output, or the first one that can be one vector per image, or the first one."""
    if config.output is not None:
        if config.output not in network.outputs:
            raise LodesetError(
                f"{config.path} has no output {config.output}; its outputs are: {', '.join(network.outputs)}: correct "
                "`embed: output:`"
            )
        return config.output
    vectors = [output.name for output in network.session.get_outputs() if len(output.shape) == 2]
    return (vectors or network.outputs)[0]


def _session(path: str, threads: int, key: str) -> onnxruntime.InferenceSession:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    present(path, key)
    available = onnxruntime.get_available_providers()
    providers = [p for p in ("CUDAExecutionProvider", "CPUExecutionProvider") if p in available]
    try:
        return onnxruntime.InferenceSession(path, options, providers=providers)
    except Exception as error:
        # onnxruntime has no public base class of "this file is not a model".
        raise LodesetError(f"{path} is not an ONNX model that can be loaded: {error}") from error


def _layout(shape: Sequence[Any], name: str) -> tuple[bool, tuple[Any, Any]]:
    """Whether the channels come last, and the height and width of the shape."""
    if len(shape) != 4:
        raise LodesetError(f"{name} takes {list(shape)}, but a network of images takes [batch, 3, height, width]")
    known = [isinstance(length, int) and length > 0 for length in shape]
    for last, channels, sides in ((False, 1, (2, 3)), (True, 3, (1, 2))):
        if shape[channels] == 3:
            return last, (shape[sides[0]], shape[sides[1]])
    if known[1] and (known[3] or shape[1] < 8):
        raise LodesetError(
            f"{name} takes {list(shape)}, but images have 3 channels: it must take [batch, 3, height, width] or "
            "[batch, height, width, 3]"
        )
    # If the shape does not tell: channels first, as PyTorch and most exporters do.
    return known[1], (shape[1], shape[2]) if known[1] else (shape[2], shape[3])


def _side(config: OnnxEmbedder, sides: tuple[Any, Any], metadata: dict[str, str], name: str, key: str) -> int | None:
    """The side of the input: the network's fixed side, otherwise the configuration's, otherwise that of the file's
    metadata.
    """
    fixed = sorted({side for side in sides if isinstance(side, int) and side > 0})
    if len(fixed) > 1:
        raise LodesetError(
            f"{name} takes images of {sides[0]} x {sides[1]} pixels (height x width), but only squares are supported: "
            "export it for a square"
        )
    if fixed:
        if config.size not in (None, fixed[0]):
            raise LodesetError(
                f"{name} only takes images of {fixed[0]} x {fixed[0]} pixels, and the configuration says "
                f"{config.size}: remove `{key}: size:`"
            )
        return int(fixed[0])
    side = None if config.size is not None else _metadata_value(metadata, SIZE_KEY, name, key)
    if side is None:
        return config.size
    if not isinstance(side, int) or isinstance(side, bool) or side < 8:
        raise LodesetError(
            f"{name}: its metadata contain {SIZE_KEY} = {side!r}, which is not a side in pixels: set `{key}: size:`"
        )
    return side


def _statistics(
    config: OnnxEmbedder, dtype: type[np.generic], metadata: dict[str, str], name: str, key: str
) -> tuple[Triple, Triple]:
    """Mean and deviation: of the configuration, otherwise of the file's metadata, otherwise ImageNet's; none for a
    network of bytes.
    """
    if dtype is np.uint8:
        if config.mean is not None or config.std is not None:
            raise LodesetError(
                f"{name} takes bytes (uint8), 0..255, and normalizes them itself: remove `{key}: mean:` and `std:`"
            )
        return (0.0, 0.0, 0.0), (1 / 255, 1 / 255, 1 / 255)
    mean = config.mean or _triple(metadata, MEAN_KEY, name, key, above=-math.inf) or IMAGENET_MEAN
    std = config.std or _triple(metadata, STD_KEY, name, key, above=0.0) or IMAGENET_STD
    return mean, std


def _triple(metadata: dict[str, str], what: str, name: str, key: str, above: float) -> Triple | None:
    stored = _metadata_value(metadata, what, name, key)
    if stored is None:
        return None
    numbers = stored if isinstance(stored, list) else []
    if len(numbers) != 3 or not all(isinstance(n, int | float) and math.isfinite(n) and n > above for n in numbers):
        raise LodesetError(
            f"{name}: its metadata contain {what} = {stored!r} instead of three numbers: set `{key}: mean:` and `std:`"
        )
    red, green, blue = map(float, numbers)
    return red, green, blue


def _metadata_value(metadata: dict[str, str], what: str, name: str, key: str) -> Any:
    if what not in metadata:
        return None
    try:
        return json.loads(metadata[what])
    except (ValueError, RecursionError):
        raise LodesetError(
            f"{name}: its metadata contain {what} = {metadata[what][:80]!r}, which is not JSON: set `{key}: size:`, "
            "`mean:` and `std:`"
        ) from None
