"""Check before the first expensive stage what a configuration refers to and only a later stage would miss.

Building the graph (`infra.dag.build`) has already checked what costs nothing: missing sources, missing models and
weights or weights of another architecture, unreadable lists. Here models are loaded and shown an image, and target
sets, which are small, are ingested and read as evaluation will read them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lodeset.infra.apart import apart
from lodeset.pipeline.dag.decisions import decide
from lodeset.pipeline.dag.stage import Stage
from lodeset.pipeline.dag.store import Artifact, Store

if TYPE_CHECKING:
    from lodeset.pipeline.config import TargetSet
    from lodeset.pipeline.dag.runner import Event
    from lodeset.pipeline.embedders import Knobs
    from lodeset.pipeline.filters.config import Faces

# Stages that read labels, and stages that run users' models on images.
LABELS = ("evaluate/all", "prune/all")


def before(
    store: Store,
    stages: Mapping[str, Stage],
    run: Callable[[Mapping[str, Stage], Callable[[Event], None]], Mapping[str, Artifact]],
    watch: Callable[[Event], None],
    given: Mapping[str, Artifact],
) -> Callable[[Event], None]:
    """Check what the unfinished stages need; `run` runs stages. Returns `watch` without the events that were reported
    here.

    Raises:
        LodesetError: something cannot be used as it is configured.
    """
    unfinished = [d.stage for d in decide(store, stages, given=given).values() if d.artifact is None]
    models = _models(unfinished)
    if models:
        apart(try_models, store, *models)
    targets: Sequence[TargetSet] = next((s.spec.targets for s in unfinished if s.id in LABELS), ())
    if not targets:
        return watch
    reported: set[tuple[str, str]] = set()

    def first(event: Event) -> None:
        reported.add((event.stage.id, event.kind))
        watch(event)

    names = [f"ingest/{target.name}" for target in targets]
    ingested = run({id_: stages[id_] for id_ in names}, first)
    read_targets(store, ingested, targets)

    def then(event: Event) -> None:
        """Forward an event; a stage that was done here is finished for the run that follows."""
        if (
            event.kind not in ("finished", "taken over")
            or not {(event.stage.id, k) for k in ("done", event.kind)} & reported
        ):
            watch(event)

    return then


def read_targets(store: Store, ingested: Mapping[str, Artifact], targets: Iterable[TargetSet]) -> None:
    """Raise what `evaluate` would raise about labels and splits."""
    from lodeset.training.labelled import read_target

    for target in targets:
        read_target(store, ingested[f"ingest/{target.name}"], target.name, target.label, target.split)


def _models(unfinished: Iterable[Stage]) -> tuple[tuple[Knobs, ...], Mapping[str, Any], Faces | None] | None:
    """The models that the unfinished stages run on images, each once."""
    from lodeset.pipeline.embedders.config import PatchDictionary
    from lodeset.pipeline.filters.masks import scorers
    from lodeset.pipeline.specs import BlurFacesRuntime, EmbedderRuntime, ScoreRuntime

    embedders: dict[str, Knobs] = {}
    masks: Mapping[str, Any] = {}
    faces: Faces | None = None
    for stage in unfinished:
        match stage.runtime:
            case EmbedderRuntime(embedder=embedder) if not isinstance(embedder, PatchDictionary):
                embedders[repr(embedder)] = embedder
            case ScoreRuntime(masks=masks):
                pass
            case BlurFacesRuntime(faces=faces):
                pass
    if not embedders and not any(scorer.model for scorer in scorers(masks).values()) and faces is None:
        return None
    return tuple(embedders.values()), masks, faces


def try_models(store: Store, embedders: Iterable[Knobs], masks: Mapping[str, Any], faces: Faces | None) -> None:
    """Load each model and show it an image; for precomputed vectors, read the schemas.

    Raises:
        LodesetError: a model cannot be loaded, does not take images, or does not return what is needed.
    """
    from PIL import Image

    from lodeset.pipeline.embedders.config import PrecomputedEmbedder
    from lodeset.pipeline.embedders.make import load
    from lodeset.pipeline.embedders.precomputed import vector_files
    from lodeset.pipeline.filters.faces import detector
    from lodeset.pipeline.filters.masks import scorers

    image = Image.linear_gradient("L").convert("RGB")
    for config in embedders:
        if isinstance(config, PrecomputedEmbedder):
            vector_files(config)
        else:
            load(config, None, store, threads=1)([image])
    for scorer in scorers(masks).values():
        if scorer.model:
            measure = scorer.measure()
            measure.scores([measure.prepare(image)])
    if faces is not None:
        detector(faces, threads=1)(image)
