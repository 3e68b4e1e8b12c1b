"""How far a run that is to be disturbed has come, by what it has committed."""

from __future__ import annotations

from pathlib import Path

from runs import WholeRun, part_manifests

# Where the parts of each stage lie, in the order in which a run comes to them. Stages that fit one thing have one part.
PARTS = {
    "ingest": "ingest",
    "embed": "embed",
    "calibrate": "calibrate",
    "score": "score",
    "filter": "filter",
    "dedup": "dedup_search",
    "retrieve": "retrieve_search",
    "cluster": "cluster",
    "write_shards": "write_shards",
    "evaluate": "evaluate_features",
    "prune": "prune_variant",
}
COMMIT_S = 0.4
PATIENCE_S = 900


def parts_of(store: Path, stage: str) -> int:
    """How many parts of a stage are committed, or checkpoints were made (of which only the newest are kept)."""
    if stage == "train":
        steps = [int(path.name.removeprefix("step-")) for path in (store / "training").glob("*/step-*")]
        return max(steps, default=0) // WholeRun.CHECKPOINT_EVERY
    return len(list((store / "parts" / PARTS[stage]).glob("*/manifest.json")))


def committed_parts(store: Path) -> dict[tuple[str, str], tuple[int, str]]:
    return {(stage, key): told for stage in PARTS for key, told in part_manifests(store, PARTS[stage]).items()}
