"""Exact nearest neighbors by inner product (cosine for L2-normalized rows). N rows, Q queries, D dimensions.

If the processor multiplies bfloat16 in hardware, products are computed in it, several times faster than in fp32, but
only to choose candidates, which are ranked by fp32 products of the vectors themselves. The candidates of a query are
all rows that the rounding of bfloat16 could have moved below its k-th, by a proven bound; so the result is that of
fp32, whatever the processor, the block sizes and the number of threads.

The bound: with q' and b' the rounded vectors, <q, b> - <q', b'> = <q - q', b> + <q', b - b'>, which Cauchy and Schwarz
limit by |q - q'| max|b| + |q'| max|b - b'|; the product is rounded once more, by half a unit in its last place.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Literal

import faiss
import numpy as np
import torch
from numpy.typing import NDArray

from lodeset.pipeline.algorithms.hardware import has_bf16
from lodeset.pipeline.errors import LodesetError

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]
Vectors = NDArray[np.float16] | Floats
Keys = NDArray[Any]  # int16 (bf16) or int32 (fp32)
Arithmetic = Literal["bf16", "fp32"]

QUERIES = 16_384  # queries whose candidates are held at once: about 2 KiB each
BLOCK = 512  # queries per product; 1,024 and 2,048 were no faster
CHUNK_BYTES = 128 * 2**20  # of the base in fp32 that are converted and multiplied at once
RANKED_BYTES = 16 * 2**20  # of the candidates likewise: fits the cache of one or two cores
ROWS = 1_024  # rows of one pass over vectors, which then stay in the cache
GROUPS = (
    4  # groups of columns per requested neighbor: the k-th largest of their maxima is a lower bound of the k-th product
)
WIDE = 2_048  # a query with more candidates has near-ties that bf16 cannot separate
BF16_HALF_ULP = -9  # of a number in [1/2, 1), as a power of two: 8 significant bits


def arithmetic() -> Arithmetic:
    """The arithmetic that chooses candidates here."""
    return "bf16" if has_bf16() else "fp32"


def gpus() -> int:
    """Number of GPUs that FAISS can use here; its CPU build has none."""
    return int(faiss.get_num_gpus()) if hasattr(faiss, "get_num_gpus") else 0


@dataclass
class _Block:
    """The state of up to `BLOCK` queries [Q, D] while the base passes by.

    `whole` are their vectors, `queries` these in the arithmetic of the products; `error` [Q] is the maximum error of a
    product apart from its own rounding. `maxima` [Q, k] are the largest maxima of column groups so far, as `_ordered`
    keys: the least of them is a lower bound of the k-th product. `pairs`: (query, row, product) of the candidates found
    in each chunk.
    """

    whole: Floats
    queries: torch.Tensor
    error: Floats
    maxima: Keys | None = None
    pairs: list[tuple[Ints, Ints, Floats]] = field(default_factory=list)


class ExactIndex:
    """Rows [N, D] in fp16 or fp32, in memory or memory-mapped.

    A search holds at most `CHUNK_BYTES` of the base as fp32 (half of that as bf16), a product of `BLOCK` x chunk for
    each thread, and the candidates of `QUERIES` queries, however many rows there are.
    """

    def __init__(self, vectors: Vectors, threads: int = 1, products: Arithmetic | None = None) -> None:
        """`products`: the arithmetic that chooses candidates; None: chosen by the processor's capabilities.

        Raises:
            LodesetError: a vector is not finite.
        """
        self.vectors = vectors
        self.threads = threads
        self.products = products or arithmetic()
        self._chunk = max(1, CHUNK_BYTES // (4 * vectors.shape[1]))
        self._converted: tuple[int, torch.Tensor] | None = None
        with one_thread_each(threads) as pool:
            measured = list(pool.map(_measured, (vectors[s : s + ROWS] for s in range(0, len(vectors), ROWS))))
        lengths, away = (np.concatenate([m[i] for m in measured] or [np.zeros(0, np.float32)]) for i in (0, 1))
        _finite(lengths, "vectors")
        self._longest, self._rounded = (float(x.max(initial=0)) for x in (lengths, away))

    def search(self, queries: Vectors, k: int) -> tuple[Floats, Ints]:
        """Products [Q, k] in fp32 in descending order, and row numbers [Q, k]; equal products are ordered by row
        number.

        If the base has fewer than k rows, the rest is -inf and row -1.

        Raises:
            LodesetError: queries have another width than the base, or are not finite.
        """
        same_width(queries, self.vectors)
        products, rows = padding(len(queries), k)
        wanted = min(k, len(self.vectors))
        with one_thread_each(self.threads) as pool:
            for start in range(0, len(queries) if wanted else 0, QUERIES):
                chunk = slice(start, min(start + QUERIES, len(queries)))
                products[chunk, :wanted], rows[chunk, :wanted] = self._search(pool, queries[chunk], wanted)
        return products, rows

    def _chunks(self, pool: ThreadPoolExecutor, dtype: torch.dtype) -> Iterator[tuple[int, torch.Tensor]]:
        """The base, converted chunk by chunk; the last one is kept, so that a small base is converted once."""
        for start in range(0, len(self.vectors), self._chunk):
            held = self._converted
            if held is None or held[0] != start or held[1].dtype != dtype:
                self._converted = None  # first, so that two are never held
                rows = self.vectors[start : start + self._chunk]
                held = start, converted(pool, rows, torch.empty(rows.shape, dtype=dtype))
                self._converted = held
            yield held

    def _search(self, pool: ThreadPoolExecutor, queries: Vectors, k: int) -> tuple[Floats, Ints]:
        dtype = torch.bfloat16 if self.products == "bf16" and not gpus() else torch.float32
        starts = range(0, len(queries), BLOCK)
        blocks = list(pool.map(lambda start: self._block(queries[start : start + BLOCK], dtype), starts))
        candidates, wide = self._on_gpu(pool, blocks, k) if gpus() else self._candidates(pool, blocks, k)
        whole = [block.whole for block in blocks]
        products, rows = ranked(pool, whole, self.vectors, candidates, k)
        at_once = max(1, 2**24 // len(self.vectors))
        for start in range(0, len(wide), at_once):
            again = wide[start : start + at_once]
            asking = np.stack([whole[n // BLOCK][n % BLOCK] for n in again])
            products[again], rows[again] = self._search_again(pool, asking, k)
        return products, rows

    def _block(self, queries: Vectors, dtype: torch.dtype) -> _Block:
        whole = _tensor(queries).float().contiguous()
        lengths, away = _measured(whole.numpy())
        _finite(lengths, "queries")
        # Maximum loss of sums in fp32, here and in the ranking: D x 2^-24 of the lengths, each.
        error = whole.shape[1] * 2.0**-23 * lengths * self._longest
        if dtype == torch.bfloat16:
            error = error + away * self._longest + (lengths + away) * self._rounded
        return _Block(whole.numpy(), whole.to(dtype), error)

    def _candidates(self, pool: ThreadPoolExecutor, blocks: Sequence[_Block], k: int) -> tuple[list[Ints], Ints]:
        """Rows that may be among the k best, [Q, M] per block (-1: none); and the queries that have more than `WIDE` of
        them.
        """
        dtype = blocks[0].queries.dtype
        scratch = threading.local()

        def collect(block: _Block, base: torch.Tensor, start: int) -> None:
            if not hasattr(scratch, "room"):  # allocating 16 MiB for every product took a sixth of its time
                scratch.room = torch.empty(BLOCK * min(self._chunk, len(self.vectors)), dtype=dtype)
            room = scratch.room[: len(block.queries) * len(base)].view(len(block.queries), len(base))
            _collect(block, base, start, k, room)

        for start, base in self._chunks(pool, dtype):
            list(pool.map(functools.partial(collect, base=base, start=start), blocks))
        padded = list(pool.map(functools.partial(_padded, k=k), blocks))
        wide = np.concatenate([wide + number * BLOCK for number, (_, wide) in enumerate(padded)])
        return [candidates for candidates, _ in padded], wide

    def _on_gpu(self, pool: ThreadPoolExecutor, blocks: Sequence[_Block], k: int) -> tuple[list[Ints], Ints]:
        """The same by FAISS on the first GPU that this process sees: fp32 products, chunk by chunk."""
        queries = np.concatenate([block.whole for block in blocks])
        error = np.concatenate([block.error for block in blocks])
        resources = faiss.StandardGpuResources()
        count = min(2 * k, len(self.vectors))
        values, rows = padding(len(queries), count)
        for start, chunk in self._chunks(pool, torch.float32):
            inner = faiss.METRIC_INNER_PRODUCT
            more, found_rows = faiss.knn_gpu(resources, queries, chunk.numpy(), min(count, len(chunk)), metric=inner)
            values, rows = np.concatenate([values, more], axis=1), np.concatenate([rows, found_rows + start], axis=1)
            order = np.argsort(-values, axis=1, kind="stable")[:, :count]
            values, rows = np.take_along_axis(values, order, 1), np.take_along_axis(rows, order, 1)
        beyond = values[:, -1] >= values[:, k - 1] - 2 * error
        wide = np.flatnonzero(beyond) if count < len(self.vectors) else np.zeros(0, np.int64)
        rows.sort(axis=1)
        return [rows[start : start + BLOCK] for start in range(0, len(rows), BLOCK)], wide

    def _search_again(self, pool: ThreadPoolExecutor, queries: Floats, k: int) -> tuple[Floats, Ints]:
        """All products of a few queries in fp32, for those with very many near-ties."""
        whole = np.empty((len(queries), len(self.vectors)), np.float32)
        for start, chunk in self._chunks(pool, torch.float32):
            whole[:, start : start + len(chunk)] = queries @ chunk.numpy().T
        kth = np.partition(whole, -k, axis=1)[:, -k]
        error = len(queries[0]) * 2.0**-23 * np.linalg.norm(queries, axis=1) * self._longest
        products, rows = padding(len(queries), k)
        for n, row in enumerate(whole):
            near = np.flatnonzero(row >= kth[n] - 2 * error[n])
            if len(near) > WIDE:
                # Many equal vectors (mostly blank images): within fp32's rounding only row numbers distinguish them.
                order = np.lexsort((near, -np.round(row[near], 5)))
                near = np.sort(near[order[: max(k, WIDE)]])
            products[n], rows[n] = (x[0] for x in ranked(pool, [queries[n : n + 1]], self.vectors, [near[None]], k))
        return products, rows


def _collect(block: _Block, base: torch.Tensor, start: int, k: int, products: torch.Tensor) -> None:
    """Add the candidates among a chunk's rows [C, D] to a block, and raise its bound; `products` [Q, C] is a buffer."""
    if base.dtype == torch.bfloat16:
        torch.mm(block.queries, base.T, out=products)
    else:
        # NumPy's BLAS took .17 s where torch's took .24 s (512 x 15,747 x 1,280, one thread, AMD).
        np.matmul(block.queries.numpy(), base.numpy().T, out=products.numpy())
    keys = _bits(products)
    # For negative numbers the largest integer is the smallest number; so the largest integer of a group is at most that
    # of its largest product, and bounds need no order among the negative ones.
    groups = GROUPS * k
    size = products.shape[1] // groups
    maxima = _ordered(keys[:, : size * groups].reshape(len(keys), size, groups).max(axis=1) if size > 1 else keys)
    if block.maxima is not None:
        maxima = np.concatenate([block.maxima, maxima], axis=1)
    block.maxima = np.partition(maxima, -k, axis=1)[:, -k:] if maxima.shape[1] > k else maxima
    low = np.full(len(keys), -np.inf, np.float32)
    if block.maxima.shape[1] == k:
        low = _lowest(_numbers(block.maxima.min(axis=1)), block)
    limit = _ordered(_bits(torch.from_numpy(low).to(base.dtype)))
    # One less, because bf16 may have rounded it up.
    limit = np.maximum(limit, np.iinfo(limit.dtype).min + 1) - limit.dtype.type(1)
    near = (keys if (limit > 0).all() else _ordered(keys)) >= limit[:, None]
    positions = np.flatnonzero(near)
    query, row = np.divmod(positions, products.shape[1])
    block.pairs.append((query, row + start, _numbers(_ordered(keys.reshape(-1)[positions]))))


def _lowest(kth: Floats, block: _Block) -> Floats:
    """The approximate products [Q] below which no row can be among the k best, given (at most) the k-th product."""
    half_ulp = np.zeros_like(kth)
    if block.queries.dtype == torch.bfloat16:
        largest = 1.01 * (np.abs(kth) + 2 * block.error)
        half_ulp = np.ldexp(np.float32(1), np.frexp(largest)[1] + BF16_HALF_ULP)
    # The k-th true product is at least kth - half_ulp - error; products that may reach it are at most that much lower.
    return np.asarray(kth - 2 * (half_ulp + block.error), dtype=np.float32)


def _bits(products: torch.Tensor) -> Keys:
    """bf16 or fp32 numbers as integers of the same bits: maxima and comparisons of integers are several times
    faster.
    """
    return np.asarray(products.view(torch.int16 if products.dtype == torch.bfloat16 else torch.int32).numpy())


def _ordered(keys: Keys) -> Keys:
    """The bits of numbers as integers in the order of the numbers, and the inverse."""
    kind = np.iinfo(keys.dtype)
    return np.asarray(keys ^ ((keys >> (kind.bits - 1)) & keys.dtype.type(kind.max)))


def _numbers(keys: Keys) -> Floats:
    """The numbers of `_ordered` keys, in fp32."""
    bits = torch.from_numpy(np.ascontiguousarray(_ordered(keys)))
    return np.asarray(bits.view(torch.bfloat16 if keys.dtype == np.int16 else torch.float32).float().numpy())


def _padded(block: _Block, k: int) -> tuple[Ints, Ints]:
    """A block's candidates [Q, M] (-1: none), and the queries that have more than `WIDE`."""
    query, row, value = (np.concatenate(column) for column in zip(*block.pairs, strict=True))
    counts = np.bincount(query, minlength=len(block.error))
    wide = np.flatnonzero(counts > WIDE)
    few = counts[query] <= WIDE
    query, row, value = query[few], row[few], value[few]
    counts[wide] = 0
    # Sorted by query within a chunk; a stable sort puts the chunks of a query one after the other.
    order = np.argsort(query, kind="stable") if len(block.pairs) > 1 else slice(None)
    query, row, value = query[order], row[order], value[order]
    place = query, np.arange(len(query)) - np.repeat(np.cumsum(counts) - counts, counts)
    width = max(k, int(counts.max(initial=0)))
    rows = np.full((len(counts), width), -1, np.int64)
    values = np.full((len(counts), width), -np.inf, np.float32)
    rows[place], values[place] = row, value
    # The k-th product is known now, a higher bound than the one at collection time.
    kth = np.partition(values, -k, axis=1)[:, -k]
    rows[values < _lowest(kth, block)[:, None]] = -1
    return rows, wide


def ranked(
    pool: ThreadPoolExecutor, queries: Sequence[Floats], vectors: Vectors, candidates: Sequence[Ints], k: int
) -> tuple[Floats, Ints]:
    """The k best [Q, k] of each query's candidate rows, by fp32 products; equal ones are ordered by row number.

    Queries [Q, D] and candidates [Q, M] (ascending rows; -1: none) come in blocks of up to `BLOCK`. Each candidate row
    is read once, in the order of the rows; `RANKED_BYTES` of them are held as fp32.
    """
    wanted = np.zeros(len(vectors) + 1, bool)  # the last one takes the -1
    for block in candidates:
        wanted[block] = True
    used = np.flatnonzero(wanted[:-1])
    place = np.full(len(vectors) + 1, -1, np.int64)
    place[used] = np.arange(len(used))
    products = [np.full(block.shape, -np.inf, np.float32) for block in candidates]
    size = max(1, RANKED_BYTES // (4 * vectors.shape[1]))

    room = torch.empty((min(size, len(used)), vectors.shape[1]), dtype=torch.float32)
    for start in range(0, len(used), size):
        rows_used = used[start : start + size]
        whole = rows_used[-1] - rows_used[0] + 1 == len(rows_used)
        base = converted(pool, vectors[rows_used[0] : rows_used[-1] + 1] if whole else vectors[rows_used], room).numpy()

        def multiply(number: int, start: int = start, base: Floats = base) -> None:
            ids = place[candidates[number]] - start
            inside = (ids >= 0) & (ids < len(base))
            ids[~inside] = -1
            out, x = np.empty(ids.shape, np.float32), queries[number]
            y, into, numbers = (faiss.swig_ptr(array) for array in (base, out, ids))
            faiss.fvec_inner_products_by_idx(  # type: ignore[attr-defined]  # FAISS's types leave it out
                into, faiss.swig_ptr(x), y, numbers, x.shape[1], *ids.shape
            )
            np.copyto(products[number], out, where=inside)

        list(pool.map(multiply, range(len(candidates))))

    best, rows = padding(sum(map(len, queries)), k)

    def sort(number: int) -> None:
        order = np.argsort(-products[number], axis=1, kind="stable")[:, :k]
        block = slice(number * BLOCK, number * BLOCK + len(order))
        best[block, : order.shape[1]] = np.take_along_axis(products[number], order, 1)
        rows[block, : order.shape[1]] = np.take_along_axis(candidates[number], order, 1)

    list(pool.map(sort, range(len(candidates))))
    return best, rows


def converted(pool: ThreadPoolExecutor, vectors: Vectors, out: torch.Tensor) -> torch.Tensor:
    """The rows [N, D] in the arithmetic of the buffer `out`."""
    out = out[: len(vectors)]
    slices = [slice(start, start + ROWS) for start in range(0, len(vectors), ROWS)]
    list(pool.map(lambda rows: out[rows].copy_(_tensor(vectors[rows])), slices))
    return out


def padding(queries: int, k: int) -> tuple[Floats, Ints]:
    """An empty result: -inf [Q, k] and row -1 [Q, k]."""
    return np.full((queries, k), -np.inf, np.float32), np.full((queries, k), -1, np.int64)


def same_width(queries: Vectors, vectors: Vectors) -> None:
    """Raise LodesetError if queries and vectors cannot be multiplied."""
    if len(vectors) and len(queries) and queries.shape[1] != vectors.shape[1]:
        raise LodesetError(
            f"queries of {queries.shape[1]} dimensions cannot be compared with vectors of {vectors.shape[1]}: "
            "embed both with one embedder"
        )


@contextlib.contextmanager
def one_thread_each(threads: int) -> Iterator[ThreadPoolExecutor]:
    """Threads that compute with one thread each: whole blocks side by side wait less than parts of one block."""

    def alone() -> None:
        torch.set_num_threads(1)
        faiss.omp_set_num_threads(1)

    before = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(threads, initializer=alone) as pool:
            yield pool
    finally:
        torch.set_num_threads(before)


def _finite(lengths: Floats, what: str) -> None:
    """Raise LodesetError if a row's length is not finite."""
    bad = np.flatnonzero(~np.isfinite(lengths))
    if len(bad):
        raise LodesetError(
            f"{len(bad)} of {len(lengths)} {what} hold a NaN or an infinity (the first is row {bad[0]}): embed drops "
            "such images as `not_finite`; drop these rows from the vectors that you bring"
        )


def _measured(vectors: Vectors) -> tuple[Floats, Floats]:
    """L2 lengths [N], and L2 distances [N] between the vectors and themselves in bf16."""
    whole = _tensor(vectors).float()
    away = whole.bfloat16().float()
    away.sub_(whole)
    lengths, rounded = (np.sqrt(np.einsum("nd,nd->n", x, x)) for x in (whole.numpy(), away.numpy()))
    return lengths, rounded


def _tensor(vectors: Vectors) -> torch.Tensor:
    """The same memory as a tensor; read-only arrays (memory maps), about which torch warns, are copied."""
    return torch.from_numpy(vectors if vectors.flags.writeable else vectors.copy())
