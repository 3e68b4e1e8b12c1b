"""What a measure is: a plain function over what a finished run left. `measures.py` lists them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from lodeset.infra.gates.condition import Unit
from lodeset.pipeline.dag.manifests import Artifact, Run

if TYPE_CHECKING:
    from lodeset.infra.gates.config import Gate
    from lodeset.pipeline.config import CuratedSet, CurationConfig
    from lodeset.pipeline.dag.store import Store

Key = Literal["stage", "set", "reason", "network"]
Images = Callable[[], Iterator[Sequence[str]]]


class NotMade(Exception):
    """The run lacks what is measured; `reached` is False if that lies after the stage that the run was to stop after."""

    def __init__(self, why: str, reached: bool = True) -> None:
        super().__init__(why)
        self.reached = reached


class NotComparable(Exception):
    """There is nothing to compare with yet."""


@dataclass(frozen=True, kw_only=True)
class Finished:
    """A finished run; `curated` are the sets of the configuration, with what is expected of them."""

    store: Store
    run: Run
    artifacts: Mapping[str, Artifact]
    curated: Sequence[CuratedSet]

    def artifact(self, id_: str) -> Artifact:
        """Raises NotMade: the run has no such artifact."""
        found = self.artifacts.get(id_)
        if found is not None:
            return found
        number = self.run.number
        if id_ not in self.run.stages:
            raise NotMade(f"run {number} has no stage {id_}; its stages are {', '.join(self.run.stages)}")
        if self.run.stages[id_] is not None:
            raise NotMade(f"the artifact of {id_} that run {number} made is gone from the store")
        if self.run.until:
            raise NotMade(f"run {number} was to stop after {self.run.until}, before {id_}", reached=False)
        raise NotMade(f"run {number} did not make {id_}")


@dataclass(frozen=True)
class Measured:
    """A figure.

    Attributes:
        value: in the unit of its measure.
        about: what of, where the gate does not say it (the set that is worst).
        images: reads the images that it counts, by blocks of image_ids, where a table says which these are.
        see: the arguments of `lodeset table CONFIG` that show the rows behind it, where these are not images.
    """

    value: float
    about: str = ""
    images: Images | None = None
    see: str = ""


@dataclass(frozen=True, kw_only=True)
class Measure:
    """One measure.

    Attributes:
        name: what gates call it.
        unit: of its values; conditions may use multiples of it.
        function: measures a run. Its docstring says what it reads; `lodeset schema` shows it. It raises NotMade if the run lacks
            that, and NotComparable if it compares with an earlier run and there is none.
        takes: which keys of a gate it uses besides the conditions.
        needs: those without which it cannot be measured.
        reads: the ids of the stages that it needs, of those that the configuration has.
        sets: the sets that it can be about, if these are no sets of a stage; `kind` says what they are.
    """

    name: str
    unit: Unit
    function: Callable[[Finished, Gate], Measured]
    reads: Callable[[Gate, Sequence[str]], Sequence[str]]
    takes: tuple[Key, ...] = ()
    needs: tuple[Key, ...] = ()
    sets: Callable[[CurationConfig], Sequence[str]] | None = None
    kind: str = ""

    @property
    def told(self) -> str:
        """One line: its name, its unit, and what it reads."""
        said = " ".join((self.function.__doc__ or "").split())
        takes = f" [{', '.join(self.takes)}]" if self.takes else ""
        return f"`{self.name}` ({self.unit}){takes}: {said}"


def id_of(gate: Gate, ids: Sequence[str] | Mapping[str, Any], stage: str = "") -> str:
    """The id of the stage that a gate is about: of its set, or else of the pool, or of all."""
    name = gate.stage or stage
    if gate.set is not None:
        return f"{name}/{gate.set}"
    return f"{name}/pool" if f"{name}/pool" in ids else f"{name}/all"
