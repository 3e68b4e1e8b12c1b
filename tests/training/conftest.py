"""A few hundred drawn images in real shards, and a configuration that trains on them in seconds."""

import io
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import numpy as np
import pytest
import torch
from builders import write_shards
from PIL import Image

from lodeset.training.config import TrainingConfig
from lodeset.training.index import Shards
from lodeset.training.metrics import MetricsLog


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def encode(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="session")
def payloads() -> list[bytes]:
    rng = np.random.default_rng(0)
    return [encode(rng.integers(0, 256, (20 + i % 3, 24, 3), dtype=np.uint8)) for i in range(22)]


@pytest.fixture(scope="session")
def index_url(tmp_path_factory: pytest.TempPathFactory, payloads: list[bytes]) -> str:
    return write_shards(tmp_path_factory.mktemp("shards"), payloads)


@pytest.fixture
def shards(index_url: str) -> Shards:
    return Shards(index=(index_url,))


@pytest.fixture
def small() -> TrainingConfig:
    return TrainingConfig.model_validate(
        {
            "steps": 6,
            "batch": 8,
            "log_every": 1,
            "checkpoint_every": 3,
            "model": {"dim": 16, "depth": 2, "heads": 2, "drop_path": 0.25, "registers": 1},
            "crops": {"global_size": 32, "local_size": 16, "local_count": 2},
            "heads": {"prototypes": 12, "hidden": 16, "dino_bottleneck": 8, "ibot_bottleneck": 8},
        }
    )


class Interrupted(Exception):
    """Stands in for a kill."""


@pytest.fixture
def interrupted(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], AbstractContextManager[None]]:
    """Within `interrupted(step)` a run ends right after it has logged that step."""

    @contextmanager
    def at(step: int) -> Iterator[None]:
        append = MetricsLog.append

        def stop(log: MetricsLog, line: dict[str, float]) -> None:
            append(log, line)
            if line["step"] == step:
                raise Interrupted

        with monkeypatch.context() as patched, pytest.raises(Interrupted):
            patched.setattr(MetricsLog, "append", stop)
            yield

    return at
