"""Settings of things that come in several kinds: `{kind: NAME, ...}`, where the kind says which other keys there are.

The lists of kinds (`OBJECTIVES`, `BACKBONES`) name what stands for a kind as "package.module:name". Its module is imported when a
configuration asks for that kind, so configurations without it load no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BeforeValidator
from pydantic_core import PydanticCustomError

from lodeset.pipeline.references import resolved


def by_kind(listed: Mapping[str, str], default: str) -> BeforeValidator:
    """Reads settings by the `config` of their kind, one of `listed`; the default kind, which has no settings here, is read as None."""

    def read(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        reference = listed.get(value.get("kind", ""))
        if reference is None:
            raise PydanticCustomError("unknown_kind", f"`kind` must be one of {', '.join(listed)}")
        settings = resolved(reference).config.model_validate(value)
        return None if settings.kind == default else settings

    return BeforeValidator(read)
