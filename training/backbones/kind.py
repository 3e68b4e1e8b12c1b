"""What a kind of backbone says of itself before one is built. A plan reads this without torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from pydantic import ConfigDict, Field

from lodeset.pipeline.references import resolved
from lodeset.pipeline.strict import Strict
from lodeset.training.backbones import BACKBONES, DEFAULT

if TYPE_CHECKING:
    from lodeset.training.backbone import Backbone


class Architecture(Protocol):
    """What the rest of training reads of a backbone's configuration."""

    @property
    def patch_size(self) -> int: ...

    @property
    def dim(self) -> int: ...

    @property
    def depth(self) -> int: ...


class BackboneConfig(Strict):
    """The keys that every backbone has; each kind adds its own."""

    model_config = ConfigDict(json_schema_extra={"additionalProperties": True})
    kind: str
    patch_size: int = Field(8, ge=1, description="side of a patch, pixels")
    dim: int = Field(128, ge=1, description="width of the features, channels")
    depth: int = Field(4, ge=1, description="number of blocks")


@dataclass(frozen=True, kw_only=True)
class BackboneKind:
    """A kind of backbone.

    Attributes:
        config: its settings, with a `kind` that is its name in `BACKBONES`.
        build: a network of these settings for images of this side, in pixels, drawn from torch's generator as it stands.
        any_size: it takes images of other sides as well, multiples of `patch_size`. If not, local crops are as large as global ones.
        parameters: how many weights it has, by settings and side; about.
        macs: multiply-accumulates of a forward pass over one image, by settings and side; about.
    """

    config: type[Strict]
    build: Callable[[Any, int], Backbone]
    any_size: bool
    parameters: Callable[[Any, int], int]
    macs: Callable[[Any, int], int]


def kind_of(config: Architecture) -> BackboneKind:
    """`ModelConfig`, which has no kind, is that of the Vision Transformer."""
    found: BackboneKind = resolved(BACKBONES[getattr(config, "kind", DEFAULT)])
    return found
