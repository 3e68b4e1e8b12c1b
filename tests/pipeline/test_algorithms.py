import numpy as np
import pytest
from builders import pixels
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from lodeset.pipeline.algorithms import sampling
from lodeset.pipeline.algorithms.clusters import kmeans
from lodeset.pipeline.algorithms.copies import kinds as copies
from lodeset.pipeline.algorithms.copies import thresholds, verify
from lodeset.pipeline.algorithms.copies.components import components, size_limit
from lodeset.pipeline.algorithms.copies.hashes import hamming_pairs

RNG = np.random.default_rng(0)


def unit(rows: int, width: int, seed: int = 0) -> np.ndarray:
    x = np.random.default_rng(seed).normal(size=(rows, width)).astype(np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


# -- hashes


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 2**64 - 1), max_size=40), st.integers(0, 8), st.integers(0, 2**32))
def test_hamming_pairs_are_those_of_a_double_loop(hashes: list[int], distance: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    near = [h ^ int(1 << int(b)) for h in hashes for b in rng.integers(0, 64, 2)]
    everything = np.array(hashes + near, dtype=np.uint64)
    a, b, bits = hamming_pairs(everything, distance)
    expected = [
        (i, j, d)
        for i in range(len(everything))
        for j in range(i + 1, len(everything))
        if (d := int(everything[i] ^ everything[j]).bit_count()) <= distance
    ]
    assert list(zip(a.tolist(), b.tolist(), bits.tolist(), strict=True)) == expected


def test_many_images_of_one_hash_stay_together_in_few_pairs() -> None:
    hashes = np.array([7] * 5_000 + [7 ^ 1] * 3_000 + [2**40 - 1], dtype=np.uint64)
    hashes = hashes[np.random.default_rng(0).permutation(len(hashes))]
    a, b, bits = hamming_pairs(hashes, 4)
    assert len(a) <= 33 * len(hashes) and (np.bitwise_count(hashes[a] ^ hashes[b]) == bits).all() and bits.max() == 1
    groups = components(len(hashes), a, b)
    assert len(set(groups[hashes <= 7].tolist())) == 1 and len(set(groups.tolist())) == 2


# -- components


@settings(max_examples=50, deadline=None)
@given(
    st.integers(1, 30).flatmap(
        lambda n: st.tuples(st.just(n), st.lists(st.tuples(st.integers(0, n - 1), st.integers(0, n - 1))))
    )
)
def test_components_are_those_of_flooding(graph: tuple[int, list[tuple[int, int]]]) -> None:
    count, edges = graph
    label = list(range(count))
    changed = True
    while changed:
        changed = False
        for a, b in edges:
            low = min(label[a], label[b])
            changed |= (label[a], label[b]) != (low, low)
            label[a] = label[b] = low
    a, b = (np.array([e[i] for e in edges], np.int64) for i in (0, 1))
    assert components(count, a, b).tolist() == label


def test_size_limit() -> None:
    assert (size_limit(1_000), size_limit(1_000_000)) == (100, 1_000)


# -- verification


def thumbnail(image: np.ndarray) -> np.ndarray:
    return np.asarray(Image.fromarray(image).convert("L").resize((32, 32), Image.Resampling.LANCZOS)).reshape(-1)


def test_copies_agree_and_strangers_do_not() -> None:
    originals = [pixels(seed, width=96, height=80) for seed in range(12)]
    rng = np.random.default_rng(0)
    for kind in ("jpeg", "half_size", "mirror", "grey", "blurred"):
        copied = [np.asarray(copies.copy_of(Image.fromarray(o), kind, rng)) for o in originals]
        rows = np.stack([thumbnail(x) for x in originals + copied])
        same, mirrored = verify.agreement(rows, np.arange(12), np.arange(12, 24))
        assert (same > verify.AGREE).all(), kind
        assert mirrored.all() == (kind == "mirror")
        others, _ = verify.agreement(rows, np.arange(12), np.roll(np.arange(12, 24), 1))
        assert (others < verify.AGREE).all(), kind


def test_agreement_is_symmetric_and_flat_images_agree_with_nothing() -> None:
    rows = RNG.integers(0, 255, (6, 1024)).astype(np.uint8)
    rows[0] = 7
    a, b = np.array([0, 1, 2]), np.array([3, 4, 5])
    np.testing.assert_allclose(verify.agreement(rows, a, b)[0], verify.agreement(rows, b, a)[0], atol=1e-6)
    assert verify.agreement(rows, np.array([0]), np.array([0]))[0][0] == 0


def test_every_kind_of_copy_works_on_tiny_images() -> None:
    for kind in copies.KINDS:
        assert copies.copy_of(Image.new("RGB", (3, 2)), kind, np.random.default_rng(0)).mode == "RGB"
    with pytest.raises(ValueError, match="jpeg"):
        copies.copy_of(Image.new("RGB", (9, 9)), "none", np.random.default_rng(0))


def test_thresholds() -> None:
    values = np.linspace(0, 1, 1001, dtype=np.float32)
    low, high = thresholds.candidates(values), thresholds.unverified(values)
    assert (low.pool, low.reference, high.pool, high.reference) == (0.1, 0.05, 0.995, 0.97)


# -- k-means and sampling


def test_assignment_and_update_are_a_fixed_point_of_lloyd() -> None:
    vectors = np.concatenate([unit(50, 8, seed) * 0.1 + unit(1, 8, 100 + seed) for seed in range(4)]).astype(np.float32)
    fit = kmeans.fit(vectors, 4, 30, seed=0)
    centroids, distance = fit.centroids, fit.distances[-1]
    nearest, squared = kmeans.assign(vectors, centroids)
    expected = ((vectors[:, None] - centroids[None]) ** 2).sum(-1)
    assert (nearest == expected.argmin(1)).all()
    np.testing.assert_allclose(squared, expected.min(1), atol=1e-4)
    assert distance == pytest.approx(expected.min(1).mean(), rel=0.02)
    for cluster in range(4):
        np.testing.assert_allclose(vectors[nearest == cluster].mean(0), centroids[cluster], atol=1e-3)


def test_choose_k() -> None:
    assert [kmeans.choose_k(n) for n in (1, 100, 5_000, 14_000, 10_000_000)] == [1, 2, 100, 256, 1344]


def test_seeded_order_is_a_permutation_that_follows_the_ids() -> None:
    ids = [f"{i:032x}" for i in range(100)]
    order = sampling.seeded_order(ids, 1)
    assert sorted(order) == list(range(100))
    shuffled = list(reversed(ids))
    assert [shuffled[i] for i in sampling.seeded_order(shuffled, 1)] == [ids[i] for i in order]
    assert order != sampling.seeded_order(ids, 2)


def members(*sizes: tuple[int, int], seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Clusters [N] and image_ids [N] of (cluster, size), shuffled."""
    clusters = np.repeat([c for c, _ in sizes], [n for _, n in sizes]).astype(np.int32)
    ids = np.array([f"{c:016x}{n:016x}".encode() for c, size in sizes for n in range(size)], "S32")
    order = np.random.default_rng(seed).permutation(len(ids))
    return clusters[order], ids[order]


def test_draw_takes_what_there_is_and_shares_a_limit() -> None:
    clusters, ids = members((1, 5), (2, 100), (3, 40))
    drawn = sampling.draw(clusters, ids, per_cluster=20, limit=1_000, seed=0)
    assert np.bincount(clusters[drawn.rows]).tolist() == [0, 5, 20, 20] and drawn.offered == 45
    limited = sampling.draw(clusters, ids, per_cluster=20, limit=9, seed=0)
    assert np.bincount(clusters[limited.rows]).tolist() == [0, 1, 4, 4] and limited.offered == 45
    assert set(limited.rows.tolist()) <= set(drawn.rows.tolist())
    nothing = sampling.draw(clusters[:0], ids[:0], 20, 9, seed=0)
    assert (len(nothing.rows), nothing.offered) == (0, 0)


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.integers(1, 30), min_size=1, max_size=8), st.integers(1, 40), st.integers(1, 120), st.integers(0, 2**63)
)
def test_draw_is_that_of_plain_loops_in_any_order_of_the_rows(
    sizes: list[int], each: int, limit: int, seed: int
) -> None:
    plain: dict[int, list[bytes]] = {}
    clusters, ids = members(*enumerate(sizes))
    keys = dict(zip(ids.tolist(), sampling.seeded_keys(ids, seed).tolist(), strict=True))
    assert len(set(keys.values())) == len(ids)
    for c in range(len(sizes)):
        plain[c] = sorted(ids[clusters == c].tolist(), key=keys.__getitem__)[:each]
    total = sum(map(len, plain.values()))
    if total > limit:
        share = {c: len(p) * limit // total for c, p in plain.items()}
        by_rest = sorted(plain, key=lambda c: (-(len(plain[c]) * limit % total), c))
        for c in by_rest[: limit - sum(share.values())]:
            share[c] += 1
        plain = {c: p[: share[c]] for c, p in plain.items()}
    for shuffle in range(2):
        clusters, ids = members(*enumerate(sizes), seed=shuffle)
        drawn = sampling.draw(clusters, ids, each, limit, seed)
        assert ids[drawn.rows].tolist() == [i for c in sorted(plain) for i in plain[c]]
        assert drawn.offered == total


def test_seeded_keys_are_spread_and_follow_seed_and_id_alone() -> None:
    _, ids = members((0, 4_000))
    keys = sampling.seeded_keys(ids, 0)
    assert (sampling.seeded_keys(ids[::-1], 0)[::-1] == keys).all() and (sampling.seeded_keys(ids, 1) != keys).all()
    assert np.bincount((keys >> np.uint64(60)).astype(int), minlength=16) == pytest.approx(250, abs=80)


def test_matched_clusters() -> None:
    assert sampling.matched_clusters(np.array([1, 1, 1, 1, 2, 2, 2, 3], np.int32), 4).tolist() == [1]
    assert sampling.matched_clusters(np.array([1, 1, 2], np.int32), 1).tolist() == [1, 2]
