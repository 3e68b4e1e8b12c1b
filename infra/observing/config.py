"""Settings of what is told about runs."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from lodeset.pipeline.strict import Strict

When = Literal["done", "failed", "gate", "stalled"]


class Hook(Strict):
    """Somebody to tell about a run: a command, or a web hook."""

    when: Annotated[tuple[When, ...], Field(min_length=1)] = Field(
        ("failed", "gate", "stalled"),
        description="what to tell: the run is done, has failed, has breached a gate (exit code 3), or makes no progress",
    )
    command: tuple[str, ...] = Field((), description="program and arguments; it reads one JSON object")
    webhook: str | None = Field(None, description="http or https URL to which the JSON object is posted")
    webhook_env: str | None = Field(
        None, description="name of the environment variable that holds the URL, where the URL itself is a secret"
    )
    stalled_after: float = Field(1_800, ge=1, description="seconds without any progress after which a run has stalled")

    @model_validator(mode="after")
    def _one_way(self) -> Hook:
        given = [name for name in ("command", "webhook", "webhook_env") if getattr(self, name)]
        if len(given) != 1:
            raise ValueError(f"give one of command, webhook and webhook_env; given: {', '.join(given) or 'none'}")
        if self.webhook is not None and not self.webhook.startswith(("https://", "http://")):
            raise ValueError("webhook: give an http or https URL")
        return self
