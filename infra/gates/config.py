"""The section `gates` of the configuration."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Self

from pydantic import AfterValidator, Field, WithJsonSchema, model_validator

from lodeset.infra.gates.condition import EXAMPLES, FORM, Condition, misfit, parsed
from lodeset.infra.gates.measure import Measure
from lodeset.infra.gates.measures import BY_NAME, MEASURES
from lodeset.pipeline.config import CurationConfig, Name, Strict
from lodeset.pipeline.problems import nearest

KEYS = ("stage", "set", "reason", "network")


def _condition(text: str) -> str:
    parsed(text)
    return text


def _known(name: str) -> str:
    if name not in BY_NAME:
        near = nearest(name, list(BY_NAME))
        hint = f"did you mean `{near}`?" if near else f"expected one of {', '.join(BY_NAME)}"
        raise ValueError(f"unknown measure; {hint}")
    return name


def _schema(description: str, **more: Any) -> WithJsonSchema:
    return WithJsonSchema({"type": "string", "description": description, **more})


Limit = Annotated[str, AfterValidator(_condition), _schema(f"a condition, e.g. {EXAMPLES}", pattern=f"^{FORM}$")]
MeasureName = Annotated[
    str,
    AfterValidator(_known),
    _schema(
        "what is measured, with its unit and the keys that it takes. " + "; ".join(one.told for one in MEASURES),
        enum=list(BY_NAME),
    ),
]


class Gate(Strict):
    """What a finished run must fulfill. It changes nothing that a run makes.

    `warn` and `error` say what is wrong, in quotes: `"> 10"`, `"> 5 %"`, `"< 0.9 of accepted"` (of what the last run has that
    `lodeset accept` marked).
    """

    name: Name
    measure: MeasureName
    stage: str | None = Field(None, description="the stage that is measured, e.g. dedup")
    set: str | None = Field(
        None,
        description="the set that is measured: of the stage, curated, reference or target [default: see `measure`]",
    )
    reason: str | None = Field(None, description="only what was dropped or rejected for this reason [default: any]")
    network: str | None = Field(None, description="the network whose accuracy counts, e.g. trained or embedder")
    warn: Limit | None = Field(None, description="when to warn")
    error: Limit | None = Field(None, description="when to fail, with exit status 3")

    @property
    def measured(self) -> Measure:
        return BY_NAME[self.measure]

    @property
    def conditions(self) -> dict[str, Condition]:
        """The conditions that are given, by severity, the severest first."""
        given = {"error": self.error, "warn": self.warn}
        return {severity: parsed(text) for severity, text in given.items() if text is not None}

    @property
    def about(self) -> str:
        """What is measured, e.g. `dropped of ingest/pool (corrupt)`."""
        where = "/".join(one for one in (self.stage, self.set) if one is not None)
        more = ", ".join(one for one in (self.reason, self.network) if one is not None)
        return f"{self.measure}{f' of {where}' if where else ''}{f' ({more})' if more else ''}"

    @model_validator(mode="after")
    def _says_what_it_needs(self) -> Self:
        measure = self.measured
        takes = f"it takes {', '.join(measure.takes)}" if measure.takes else "it takes none"
        for key in KEYS:
            if getattr(self, key) is not None and key not in measure.takes:
                raise ValueError(f"the measure `{measure.name}` has no use for `{key}`: {takes}")
            if getattr(self, key) is None and key in measure.needs:
                raise ValueError(f"the measure `{measure.name}` needs `{key}`")
        if "stage" in measure.takes and self.set is not None and self.stage is None and "stage" not in measure.needs:
            raise ValueError(f"the measure `{measure.name}` of a `set` needs the `stage`, too")
        if not self.conditions:
            raise ValueError(f"give `warn`, `error` or both, e.g. {EXAMPLES}")
        for severity, condition in self.conditions.items():
            why = misfit(condition, measure.unit)
            if why is not None:
                raise ValueError(f"{severity}: {why}")
        return self


def problem(gates: Sequence[Gate], config: CurationConfig) -> str | None:
    """What is wrong between gates, or with the sets that they name; None if nothing is."""
    names = [gate.name for gate in gates]
    for number, gate in enumerate(gates):
        if gate.name in names[:number]:
            return f"gates.{number}.name {gate.name}: gates.{names.index(gate.name)} has this name already"
        measure = gate.measured
        if measure.sets is None:
            continue
        known = measure.sets(config)
        if not known:
            return f"gates.{number}.measure {gate.measure}: there is no {measure.kind}, so it would measure nothing"
        if gate.set is not None and gate.set not in known:
            return f"gates.{number}.set {gate.set}: expected a {measure.kind}: {', '.join(known)}"
    return None


def unknown_stages(gates: Sequence[Gate], ids: Sequence[str]) -> list[str]:
    """One message a gate that measures a stage which the configuration does not have."""
    found = []
    for number, gate in enumerate(gates):
        lacking = [id_ for id_ in gate.measured.reads(gate, ids) if id_ not in ids]
        if lacking:
            near = nearest(lacking[0], ids)
            hint = f"did you mean {near}?" if near else f"it has {', '.join(ids)}"
            found.append(
                f"gates.{number} ({gate.name}): measures {lacking[0]}, which this configuration does not have: {hint}"
            )
    return found
