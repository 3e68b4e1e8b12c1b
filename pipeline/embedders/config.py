"""Every knob of the embedders, with its unit: the values of `embed.semantic` and `embed.dedup`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from lodeset.pipeline.strict import Strict

Positive = Annotated[float, Field(gt=0)]
SIZE = "side of the square input, pixels; absent: what the file is fixed to, or says in its metadata (`image_size`), or {default}"
MEAN = "RGB mean on the 0..1 scale; absent: what the file says in its metadata (`image_mean`), or ImageNet's"
STD = (
    "RGB standard deviation on the 0..1 scale; absent: what the file says in its metadata (`image_std`), or ImageNet's"
)
BATCH = "images per call; speed only. A network of a fixed batch gets as many as it takes"


class OnnxEmbedder(Strict):
    """A network run by onnxruntime: one input of images, [B, 3, size, size] or [B, size, size, 3], as floats or bytes (uint8: 0..255, not
    normalised); [B, D] out.
    """

    kind: Literal["onnx"]
    path: str = Field(description="the .onnx file")
    size: int | None = Field(None, ge=8, description=SIZE.format(default=224))
    mean: tuple[float, float, float] | None = Field(None, description=MEAN)
    std: tuple[Positive, Positive, Positive] | None = Field(None, description=STD)
    output: str | None = Field(
        None, description="name of the output that holds the vectors; absent: the first of the form [B, D]"
    )
    batch: int = Field(32, ge=1, description=BATCH)


Dtype = Literal["auto", "fp32", "bf16", "fp16"]
_DTYPE = (
    "arithmetic of the network. auto: fp16 on a GPU, fp32 on a CPU (the vectors then depend on the hardware by about "
    "1e-3, and the fingerprint does not); a named one is used everywhere and is part of the fingerprint. bf16 pays on "
    "CPUs that have instructions for it"
)


class TorchScriptEmbedder(Strict):
    """A TorchScript network: float32 [B, 3, height, width] in, [B, D] out.

    SSCD (Pizzi et al., CVPR 2022), whose thresholds 0.6 and 0.45 are those of DINOv2, as its authors publish it:
    `{kind: torchscript, path: sscd_disc_mixup.torchscript.pt, size: 288, resize: short_side, interpolation: bilinear}`, or
    `size: 320, resize: square`, which runs in whole batches.
    """

    kind: Literal["torchscript"]
    path: str = Field(description="the TorchScript file")
    size: int = Field(224, ge=8, description="side of the square input, or its short side, pixels")
    resize: Literal["square", "crop", "short_side"] = Field(
        "square",
        description="square: squeezed to size x size; crop: short side to size, then the centre square; short_side: the "
        "short side to size and nothing cut, the long side up to 4 times as long (one call per shape)",
    )
    interpolation: Literal["bicubic", "bilinear"] = Field("bicubic", description="filter of the resize (antialiased)")
    mean: tuple[float, float, float] = Field((0.485, 0.456, 0.406), description="RGB mean on the 0..1 scale")
    std: tuple[Positive, Positive, Positive] = Field(
        (0.229, 0.224, 0.225), description="RGB standard deviation on the 0..1 scale"
    )
    dtype: Dtype = Field("auto", description=_DTYPE)
    batch: int = Field(32, ge=1, description="images per call; speed only")


class HuggingFaceEmbedder(Strict):
    """A vision model of Hugging Face transformers (`AutoModel`), or a folder that `training` exported."""

    kind: Literal["huggingface"]
    model: str = Field(
        min_length=1, description="a folder with config.json and model.safetensors, or a model's name on the hub"
    )
    revision: str | None = Field(
        None, description="hub only: branch, tag or commit; absent: what the cache has, else the main branch"
    )
    pooling: Literal["cls", "mean", "pooler"] = Field(
        "cls", description="the class token, the mean of the patch tokens, or the model's own pooler_output"
    )
    size: int | None = Field(
        None,
        ge=8,
        description="side of the input, pixels, position embeddings interpolated; absent: as preprocessor_config.json says, "
        "or image_size of config.json",
    )
    dtype: Dtype = Field("auto", description=_DTYPE)
    batch: int = Field(32, ge=1, description="images per call; speed only")


class PrecomputedEmbedder(Strict):
    """Vectors made elsewhere: Parquet with the columns `image_id` or `uri` (and `member`), and `vector`.

    Images without a usable vector (none, a null, zeros, several different ones, numbers that are not finite) are dropped and counted.
    """

    kind: Literal["precomputed"]
    path: str = Field(description="a Parquet file, a folder of them, or a glob")
    column: str = Field("vector", description="the column that holds the vectors (lists of D numbers)")
    folder: str | None = Field(
        None, description="folder that relative uris in the files start from; absent: uris are those of the images"
    )


class PatchDictionary(Strict):
    """Whitened patches, k-means, pooled activations (Coates, Ng and Lee, AISTATS 2011); fitted on the pool, no download."""

    kind: Literal["patch_dictionary"] = "patch_dictionary"
    size: int = Field(64, ge=16, description="side that images are resized to, pixels")
    patch: int = Field(8, ge=2, description="side of a patch, pixels")
    stride: int = Field(4, ge=1, description="distance between patches, pixels")
    words: int = Field(256, ge=2, description="centroids of the dictionary")
    dimensions: int = Field(
        256, ge=2, description="length of the vector, after a whitening projection of the pooled activations"
    )
    fit_images: int = Field(
        2_000, ge=10, description="pool images in the seeded sample that the dictionary is fitted on"
    )
    seed: int = Field(0, ge=0)

    @model_validator(mode="after")
    def _patches_fit(self) -> PatchDictionary:
        if self.patch > self.size:
            raise ValueError(f"patch {self.patch} is larger than size {self.size}: make it at most {self.size}")
        return self


AnyEmbedder = PatchDictionary | OnnxEmbedder | TorchScriptEmbedder | HuggingFaceEmbedder | PrecomputedEmbedder
Embedder = Annotated[AnyEmbedder, Field(discriminator="kind")]
