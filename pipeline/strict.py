"""The base class of every section of the configuration."""

from pydantic import BaseModel, ConfigDict


class Strict(BaseModel):
    """A section of the configuration: immutable, and unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)
