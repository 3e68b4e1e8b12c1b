"""What a configuration promises and a later stage would be the first to miss, looked at before the first expensive stage.

Making the graph (`infra.dag.build`) has looked at what costs nothing: sources that are not there, models and weights that are not there or of
another architecture, lists that cannot be read. Here models are loaded and shown an image, and target sets, which are small, are ingested
and read as evaluation will read them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from lodeset.infra.apart import apart
from lodeset.pipeline.dag.decisions import decide
from lodeset.pipeline.dag.stage import Stage
from lodeset.pipeline.dag.store import Artifact, Store

if TYPE_CHECKING:
    from lodeset.pipeline.config import TargetSet
    from lodeset.pipeline.dag.runner import Event
    from lodeset.pipeline.embedders.config import AnyEmbedder
    from lodeset.pipeline.filters.config import Classifier, Faces

# Stages that read labels, and stages that run models of others on images.
LABELS = ("evaluate/all", "prune/all")


def before(
    store: Store,
    stages: Mapping[str, Stage],
    run: Callable[[Mapping[str, Stage], Callable[[Event], None]], Mapping[str, Artifact]],
    watch: Callable[[Event], None],
) -> Callable[[Event], None]:
    """Checks what the stages that are not finished need; `run` runs stages. Returns `watch` without what it was told here.

    Raises:
        LodesetError: something cannot be used as it is configured.
    """
    left = [d.stage for d in decide(store, stages).values() if d.artifact is None]
    models = _models(left)
    if models:
        apart(try_models, store, *models)
    targets: Sequence[TargetSet] = next((s.spec.targets for s in left if s.id in LABELS), ())
    if not targets:
        return watch
    told: set[tuple[str, str]] = set()

    def first(event: Event) -> None:
        told.add((event.stage.id, event.kind))
        watch(event)

    names = [f"ingest/{one.name}" for one in targets]
    ingested = run({id_: stages[id_] for id_ in names}, first)
    read_targets(store, ingested, targets)

    def then(event: Event) -> None:
        """A stage that was done here is finished for the run that follows."""
        if (
            event.kind not in ("finished", "taken over")
            or not {(event.stage.id, k) for k in ("done", event.kind)} & told
        ):
            watch(event)

    return then


def read_targets(store: Store, ingested: Mapping[str, Artifact], targets: Iterable[TargetSet]) -> None:
    """Raises what `evaluate` would raise of labels and splits."""
    from lodeset.training.labelled import read_target

    for one in targets:
        read_target(store, ingested[f"ingest/{one.name}"], one.name, one.label, one.split)


def _models(left: Iterable[Stage]) -> tuple[tuple[AnyEmbedder, ...], tuple[Classifier, ...], Faces | None] | None:
    """What the stages that are left will run on images, each once."""
    from lodeset.pipeline.embedders.config import PatchDictionary
    from lodeset.pipeline.specs import BlurFacesRuntime, EmbedderRuntime, ScoreRuntime

    embedders: dict[str, AnyEmbedder] = {}
    classifiers: tuple[Classifier, ...] = ()
    faces: Faces | None = None
    for stage in left:
        match stage.runtime:
            case EmbedderRuntime(embedder=embedder) if not isinstance(embedder, PatchDictionary):
                embedders[repr(embedder)] = embedder
            case ScoreRuntime(classifiers=classifiers):
                pass
            case BlurFacesRuntime(faces=faces):
                pass
    if not embedders and not classifiers and faces is None:
        return None
    return tuple(embedders.values()), classifiers, faces


def try_models(
    store: Store, embedders: Iterable[AnyEmbedder], classifiers: Iterable[Classifier], faces: Faces | None
) -> None:
    """Loads each model and shows it an image; of precomputed vectors the schemas are read.

    Raises:
        LodesetError: a model cannot be loaded, or does not take images, or does not give what is wanted of it.
    """
    from PIL import Image

    from lodeset.pipeline.embedders.config import PrecomputedEmbedder
    from lodeset.pipeline.embedders.make import load
    from lodeset.pipeline.embedders.precomputed import vector_files
    from lodeset.pipeline.filters.classifiers import classifier
    from lodeset.pipeline.filters.faces import detector

    image = Image.linear_gradient("L").convert("RGB")
    for config in embedders:
        if isinstance(config, PrecomputedEmbedder):
            vector_files(config)
        else:
            load(config, None, store, threads=1)([image])
    for one in classifiers:
        measure = classifier(one, threads=1)
        measure.scores([measure.prepare(image)])
    if faces is not None:
        detector(faces, threads=1)(image)
