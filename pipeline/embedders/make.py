"""Turn the configuration of an embedder into the embedding function."""

from __future__ import annotations

import numpy as np

from lodeset.pipeline.dag.store import File, Store
from lodeset.pipeline.embedders import Embed, Knobs, patches
from lodeset.pipeline.embedders.config import PatchDictionary
from lodeset.pipeline.embedders.kinds import kind_of


def runs_on_gpu(config: Knobs) -> bool:
    """Whether the installed libraries would run this embedder on a GPU, if its worker has one."""
    return kind_of(config).on_gpu()


def load(config: Knobs, fitted: File | None, store: Store, threads: int) -> Embed:
    """The embedding function of one worker."""
    if isinstance(config, PatchDictionary) and fitted is not None:
        with store.opened(fitted) as file, np.load(file, allow_pickle=False) as arrays:
            return patches.embedder(patches.Dictionary.from_arrays(dict(arrays)), config)
    return kind_of(config).load(config, threads)
