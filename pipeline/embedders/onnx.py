"""ONNX files as networks of images: what a file says of its input decides how pixels go in. B images, D dimensions."""

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

SIDE = 224  # pixels, where neither the configuration nor the file says it
# What `lodeset export` writes into a file's metadata: JSON.
MEAN_KEY, STD_KEY, SIZE_KEY = "image_mean", "image_std", "image_size"
_TYPES: dict[str, type[np.generic]] = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(double)": np.float64,
    "tensor(uint8)": np.uint8,
}


@dataclass(frozen=True)
class Network:
    """An ONNX network that is ready to be run on images.

    Attributes:
        name: for messages: the file, and whose it is.
        key: its place in the configuration, for messages.
        batch: the images that every call takes; None: any number.
        recipe: how an image becomes the network's input; bytes of 0..255 for one of uint8.
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
        return [one.name for one in self.session.get_outputs()]

    def run(self, images: Floats, outputs: Sequence[str]) -> list[NDArray[Any]]:
        """The outputs for images [B, 3, height, width], in calls of as many images as the network takes; the last is filled up.

        Raises:
            LodesetError: the network fails, or gives other than one row an image where it is called several times.
        """
        if self.batch is None or self.batch == len(images):
            return self._call(images, outputs)
        found: list[list[NDArray[Any]]] = []
        for start in range(0, len(images), self.batch):
            some = images[start : start + self.batch]
            filled = np.concatenate([some, np.repeat(some[-1:], self.batch - len(some), axis=0)])
            call = self._call(filled, outputs)
            odd = next((out for out in call if out.ndim == 0 or len(out) != self.batch), None)
            if odd is not None:
                raise LodesetError(
                    f"{self.name} gives an output of shape {list(odd.shape)} for {self.batch} images; one row an image is "
                    "wanted: pool it first"
                )
            found.append([out[: len(some)] for out in call])
        return [np.concatenate(calls) for calls in zip(*found, strict=True)]

    def _call(self, images: Floats, outputs: Sequence[str]) -> list[NDArray[Any]]:
        given = images.transpose(0, 2, 3, 1) if self.channels_last else images
        if self.dtype is np.uint8:
            given = np.rint(given)
        try:
            found: list[NDArray[Any]] = self.session.run(
                list(outputs), {self.input: np.ascontiguousarray(given).astype(self.dtype, copy=False)}
            )
        except Exception as error:
            raise LodesetError(
                f"{self.name} takes {list(self.shape)}, given {list(given.shape)} (`{self.key}: size:` {self.recipe.side}): {error}"
            ) from error
        for out in found:
            if not isinstance(out, np.ndarray) or out.dtype.kind not in "fiub":
                raise LodesetError(f"{self.name} gives a {type(out).__name__}, where an array of numbers is wanted")
        return found


def opened(config: OnnxEmbedder, threads: int, key: str = "embed", name: str = "", side: int = SIDE) -> Network:
    """The network of a file on `threads` cores, or on a GPU that onnxruntime was built for.

    Args:
        config: what the configuration says; what it leaves out (None), the file says, or a default.
        key: the file's place in the configuration, for messages.
        name: whose file it is, for messages; the file's path if absent.
        side: of the input, in pixels, where neither the configuration nor the file says it.

    Raises:
        LodesetError: the file is missing or broken, or its input is no images, or none that can be made here.
    """
    session, name = _session(config.path, threads, key), name or config.path
    inputs = session.get_inputs()
    if len(inputs) != 1:
        told = ", ".join(f"{one.name} {one.shape}" for one in inputs) or "none"
        raise LodesetError(f"{name} takes {len(inputs)} inputs ({told}); a network of images takes one, the images")
    (source,) = inputs
    shape = tuple(source.shape)
    dtype = _TYPES.get(source.type)
    if dtype is None:
        raise LodesetError(
            f"{name} takes {source.type}; images can be given as {', '.join(sorted(_TYPES))}: export it with one of these"
        )
    channels_last, sides = _layout(shape, name)
    said = session.get_modelmeta().custom_metadata_map
    pixels = _side(config, sides, said, name, key) or side
    recipe = Recipe("square", pixels, pixels, *_statistics(config, dtype, said, name, key))
    batch = shape[0] if isinstance(shape[0], int) and shape[0] > 0 else None
    return Network(session, name, key, source.name, shape, dtype, channels_last, batch, recipe)


def settled(network: Network, outputs: Sequence[str]) -> Network:
    """The network after a trial. One that says it takes any number of images, and was exported for one, gets one at a time.

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
        network.run(pair[:1], outputs)  # says what is wrong if it is not the number of images
    alone = network.run(pair[:1], outputs)
    return replace(network, batch=1) if all(out.ndim and len(out) == 1 for out in alone) else network


def onnx(config: OnnxEmbedder, threads: int) -> Embed:
    """An ONNX network on one worker's `threads` cores.

    Raises:
        LodesetError: the file is missing, broken, or not a network of images to vectors.
    """
    network = opened(config, threads)
    output = _output_of(network, config)
    network = settled(network, [output])

    def forward(batch: Floats) -> Floats:
        (out,) = network.run(batch, [output])
        # [B, D, 1, 1], as pooling layers leave vectors.
        return np.asarray(out.reshape(out.shape[:2]) if out.ndim > 2 and math.prod(out.shape[2:]) == 1 else out)

    return embedder(forward, network.recipe, config.path, threads)


def _output_of(network: Network, config: OnnxEmbedder) -> str:
    """The output that is named, or the first that can be one vector an image, or the first."""
    if config.output is not None:
        if config.output not in network.outputs:
            raise LodesetError(
                f"{config.path} has no output {config.output}; there are: {', '.join(network.outputs)}: correct `embed: output:`"
            )
        return config.output
    vectors = [one.name for one in network.session.get_outputs() if len(one.shape) == 2]
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
        # onnxruntime has no public base class for "this file is not a model".
        raise LodesetError(f"{path} is not an ONNX model that can be loaded: {error}") from error


def _layout(shape: Sequence[Any], name: str) -> tuple[bool, tuple[Any, Any]]:
    """Whether the channels come last, and what the shape says of height and width."""
    if len(shape) != 4:
        raise LodesetError(f"{name} takes {list(shape)}; a network of images takes [batch, 3, height, width]")
    known = [isinstance(length, int) and length > 0 for length in shape]
    for last, channels, sides in ((False, 1, (2, 3)), (True, 3, (1, 2))):
        if shape[channels] == 3:
            return last, (shape[sides[0]], shape[sides[1]])
    if known[1] and (known[3] or shape[1] < 8):
        raise LodesetError(
            f"{name} takes {list(shape)}; images here have 3 channels, so it must be [batch, 3, height, width] or "
            "[batch, height, width, 3]"
        )
    # Nothing fixed says otherwise: as PyTorch and most exporters have it.
    return known[1], (shape[1], shape[2]) if known[1] else (shape[2], shape[3])


def _side(config: OnnxEmbedder, sides: tuple[Any, Any], said: dict[str, str], name: str, key: str) -> int | None:
    """The side of the input: what the network is fixed to, else what the configuration says, else the file's metadata."""
    fixed = sorted({side for side in sides if isinstance(side, int) and side > 0})
    if len(fixed) > 1:
        raise LodesetError(
            f"{name} takes images of {sides[0]} x {sides[1]} pixels (height x width); only squares can be made: export it for a square"
        )
    if fixed:
        if config.size not in (None, fixed[0]):
            raise LodesetError(
                f"{name} takes images of {fixed[0]} x {fixed[0]} pixels and no others, and the configuration says {config.size}: "
                f"remove `{key}: size:`"
            )
        return int(fixed[0])
    told = None if config.size is not None else _told(said, SIZE_KEY, name, key)
    if told is None:
        return config.size
    if not isinstance(told, int) or isinstance(told, bool) or told < 8:
        raise LodesetError(
            f"{name}: its metadata say {SIZE_KEY} = {told!r}, which is no side in pixels: set `{key}: size:`"
        )
    return told


def _statistics(
    config: OnnxEmbedder, dtype: type[np.generic], said: dict[str, str], name: str, key: str
) -> tuple[Triple, Triple]:
    """Mean and deviation: of the configuration, else of the file's metadata, else ImageNet's; none for a network of bytes."""
    if dtype is np.uint8:
        if config.mean is not None or config.std is not None:
            raise LodesetError(
                f"{name} takes bytes (uint8), 0..255, and normalises them itself: remove `{key}: mean:` and `std:`"
            )
        return (0.0, 0.0, 0.0), (1 / 255, 1 / 255, 1 / 255)
    mean = config.mean or _triple(said, MEAN_KEY, name, key, above=-math.inf) or IMAGENET_MEAN
    std = config.std or _triple(said, STD_KEY, name, key, above=0.0) or IMAGENET_STD
    return mean, std


def _triple(said: dict[str, str], what: str, name: str, key: str, above: float) -> Triple | None:
    told = _told(said, what, name, key)
    if told is None:
        return None
    numbers = told if isinstance(told, list) else []
    if len(numbers) != 3 or not all(isinstance(n, int | float) and math.isfinite(n) and n > above for n in numbers):
        raise LodesetError(
            f"{name}: its metadata say {what} = {told!r}, where three numbers are wanted: set `{key}: mean:` and `std:`"
        )
    red, green, blue = map(float, numbers)
    return red, green, blue


def _told(said: dict[str, str], what: str, name: str, key: str) -> Any:
    if what not in said:
        return None
    try:
        return json.loads(said[what])
    except (ValueError, RecursionError):
        raise LodesetError(
            f"{name}: its metadata say {what} = {said[what][:80]!r}, which is no JSON: set `{key}: size:`, `mean:` and `std:`"
        ) from None
