from pathlib import Path

import pytest

from lodeset.pipeline.config import Cluster, CurationConfig, Sample, load
from lodeset.pipeline.embedders.config import PatchDictionary
from lodeset.pipeline.errors import ConfigError


def read(tmp_path: Path, text: str, *overrides: str) -> CurationConfig:
    path = tmp_path / "lodeset.yaml"
    path.write_text(text)
    return load(CurationConfig, path, overrides)


def test_pool_is_all_that_is_needed_and_paths_start_from_the_file(tmp_path: Path) -> None:
    config = read(tmp_path, "pool: images/*.tar")
    assert config.pool[0].uri == str(tmp_path / "images/*.tar")
    assert config.store == str(tmp_path / "runs")
    assert isinstance(config.embed.semantic, PatchDictionary)


def test_urls_are_left_alone(tmp_path: Path) -> None:
    config = read(tmp_path, "store: s3://bucket/runs\npool: [{uri: 'gs://crawl/*.tar'}]")
    assert (config.store, config.pool[0].uri) == ("s3://bucket/runs", "gs://crawl/*.tar")


def test_retrieval_modes(tmp_path: Path) -> None:
    config = read(
        tmp_path,
        "pool: p\ncurated:\n- {name: a, uri: a, retrieve: {mode: sample}}\n- {name: b, uri: b, retrieve: {mode: cluster}}",
    )
    assert config.curated[0].retrieve == Sample(mode="sample", k=4)
    assert config.curated[1].retrieve == Cluster(mode="cluster", per_cluster=10_000, min_matches=4, limit=1_000_000)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("pool: p\ndedupe: {}", "dedupe: unknown key; did you mean `dedup`?"),
        ("pool: p\ndedup: {treshold: 0.5}", "dedup.treshold: unknown key; did you mean `threshold`?"),
        ("pool: p\nembed: {semantic: {kind: onnx, paht: x}}", "did you mean `path`?"),
        ("pool: p\ncurated: [{name: a, uri: a, retrieve: {mode: sample, kk: 3}}]", "did you mean `k`?"),
        ("pool: p\ndedup: {k: many}", "dedup.k = 'many'"),
        ("pool: p\ndedup: {threshold: 2}", "dedup.threshold"),
        ("pool: p\ncluster: {k: [10, 20]}", "cluster.k = [10, 20]: each level must have fewer clusters"),
        ("pool: p\ncluster: {k: [10, 0]}", "cluster.k.1 = 0: expected a number of 1 or more"),
        ("pool: p\nbalance: {image: 5}", "balance.image: unknown key; did you mean `images`?"),
        ("store: x", "pool: required, but missing"),
        ("pool: []", "pool"),
        ("pool: p\ncurated: [{name: a, uri: a}]", "this set has no effect"),
        ("pool: p\nreference: [{name: a, uri: x}]\ntargets: [{name: a, uri: y}]", "used twice: a"),
        ("pool: p\nreference: [{name: ../up, uri: x}]", "reference.0.name = '../up'"),
        ("- pool", "must hold a mapping"),
        ("pool: [", "not valid YAML"),
        ("pool: !!python/object/apply:os.system ['true']", "not valid YAML"),
    ],
)
def test_mistakes_name_the_key_and_the_way_out(tmp_path: Path, text: str, told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, text)
    assert told in str(caught.value)
    assert caught.value.exit_code == 2


def test_overrides(tmp_path: Path) -> None:
    text = "pool: p\ncurated: [{name: a, uri: a, retrieve: {mode: sample, k: 2}}]"
    config = read(tmp_path, text, "dedup.threshold=0.55", "curated.0.retrieve.k=9", "shards.seed=3")
    assert config.dedup.threshold == 0.55
    assert config.curated[0].retrieve == Sample(mode="sample", k=9)
    assert config.shards.seed == 3
    for wrong in ("dedup.threshold", "=3", "pool.x.y=1"):
        with pytest.raises(ConfigError):
            read(tmp_path, text, wrong)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="lodeset init"):
        load(CurationConfig, tmp_path / "none.yaml")
