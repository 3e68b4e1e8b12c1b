"""The settings of the embedders that come with lodeset, with their units: the values of `embed.semantic` and `embed.dedup`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from lodeset.pipeline.embedders import Knobs

Positive = Annotated[float, Field(gt=0)]
SIZE = (
    "side of the square input, pixels [default: the fixed size of the file, its metadata (`image_size`), or {default}]"
)
MEAN = "RGB mean on the 0..1 scale [default: the file's metadata (`image_mean`), or ImageNet's mean]"
STD = "RGB standard deviation on the 0..1 scale [default: the file's metadata (`image_std`), or ImageNet's deviation]"
BATCH = "images per call; speed only. A network with a fixed batch size gets that many"


class OnnxEmbedder(Knobs):
    """A network run by onnxruntime. One input of images, [B, 3, size, size] or [B, size, size, 3], as floats or bytes
    (uint8: 0..255, not normalized); output [B, D].
    """

    kind: Literal["onnx"]
    path: str = Field(description="the .onnx file")
    size: int | None = Field(None, ge=8, description=SIZE.format(default=224))
    mean: tuple[float, float, float] | None = Field(None, description=MEAN)
    std: tuple[Positive, Positive, Positive] | None = Field(None, description=STD)
    output: str | None = Field(
        None, description="name of the output that holds the vectors [default: the first one of shape [B, D]]"
    )
    batch: int = Field(32, ge=1, description=BATCH)


Dtype = Literal["auto", "fp32", "bf16", "fp16"]
_DTYPE = (
    "arithmetic of the network. auto: fp16 on a GPU, fp32 on a CPU (the vectors then differ between them by about "
    "1e-3, and the fingerprint does not); other values are used everywhere and are part of the fingerprint. bf16 is "
    "faster on CPUs that have instructions for it"
)


class TorchScriptEmbedder(Knobs):
    """A TorchScript network: float32 [B, 3, height, width] to [B, D].

    SSCD (Pizzi et al., CVPR 2022), for which DINOv2's thresholds 0.6 and 0.45 were chosen, as its authors publish it:
    `{kind: torchscript, path: sscd_disc_mixup.torchscript.pt, size: 288, resize: short_side, interpolation: bilinear}`,
    or `size: 320, resize: square`, which runs in full batches.
    """

    kind: Literal["torchscript"]
    path: str = Field(description="the TorchScript file")
    size: int = Field(224, ge=8, description="side of the square input, or its short side, pixels")
    resize: Literal["square", "crop", "short_side"] = Field(
        "square",
        description="square: squeezed to size x size; crop: short side to size, then the center square; short_side: "
        "the short side to size without cropping, the long side at most 4 times as long (one call per shape)",
    )
    interpolation: Literal["bicubic", "bilinear"] = Field("bicubic", description="filter of the resize (antialiased)")
    mean: tuple[float, float, float] = Field((0.485, 0.456, 0.406), description="RGB mean on the 0..1 scale")
    std: tuple[Positive, Positive, Positive] = Field(
        (0.229, 0.224, 0.225), description="RGB standard deviation on the 0..1 scale"
    )
    dtype: Dtype = Field("auto", description=_DTYPE)
    batch: int = Field(32, ge=1, description="images per call; speed only")


class HuggingFaceEmbedder(Knobs):
    """A vision model of Hugging Face transformers (`AutoModel`), or a folder that `training` exported."""

    kind: Literal["huggingface"]
    model: str = Field(
        min_length=1, description="a folder with config.json and model.safetensors, or the name of a model on the hub"
    )
    revision: str | None = Field(
        None, description="hub only: branch, tag or commit [default: the cached revision, otherwise the main branch]"
    )
    pooling: Literal["cls", "mean", "pooler"] = Field(
        "cls", description="the class token, the mean of the patch tokens, or the model's own pooler_output"
    )
    size: int | None = Field(
        None,
        ge=8,
        description="side of the input, pixels; position embeddings are interpolated [default: from "
        "preprocessor_config.json, or image_size of config.json]",
    )
    dtype: Dtype = Field("auto", description=_DTYPE)
    batch: int = Field(32, ge=1, description="images per call; speed only")


class PrecomputedEmbedder(Knobs):
    """Vectors made elsewhere: Parquet with the columns `image_id` or `uri` (and `member`), and `vector`.

    Images without a usable vector (missing, null, zeros, several different ones, numbers that are not finite) are
    dropped and counted.
    """

    kind: Literal["precomputed"]
    path: str = Field(description="a Parquet file, a folder of them, or a glob")
    column: str = Field("vector", description="the column that holds the vectors (lists of D numbers)")
    folder: str | None = Field(
        None, description="folder that relative uris in the files start from [default: uris are those of the images]"
    )


class PatchDictionary(Knobs):
    """Whitened patches, k-means, pooled activations (Coates, Ng and Lee, AISTATS 2011); fitted on the pool, no
    download.
    """

    kind: Literal["patch_dictionary"] = "patch_dictionary"
    size: int = Field(64, ge=16, description="side that images are resized to, pixels")
    patch: int = Field(8, ge=2, description="side of a patch, pixels")
    stride: int = Field(4, ge=1, description="distance between patches, pixels")
    words: int = Field(256, ge=2, description="centroids of the dictionary")
    dimensions: int = Field(
        256, ge=2, description="length of the vector, after a whitening projection of the pooled activations"
    )
    fit_images: int = Field(
        2_000, ge=10, description="size of the seeded sample of pool images that the dictionary is fitted on"
    )
    seed: int = Field(0, ge=0)

    @model_validator(mode="after")
    def _patches_fit(self) -> PatchDictionary:
        if self.patch > self.size:
            raise ValueError(f"patch {self.patch} is larger than size {self.size}: make it at most {self.size}")
        return self
