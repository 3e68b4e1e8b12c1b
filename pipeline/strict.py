"""What every section of the configuration is."""

from pydantic import BaseModel, ConfigDict


class Strict(BaseModel):
    """A section of the configuration: immutable, and no key goes unread."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)
