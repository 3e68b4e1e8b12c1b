"""What ingest refused: listed with its history, read again and nothing else, accepted."""

import os
from pathlib import Path

import pytest
import yaml
from builders import picture, write_tar
from commands import actions, entries, lodeset

from lodeset.infra import api
from lodeset.infra.upkeep.rejects import Chosen, Reject
from lodeset.pipeline.dag import store
from lodeset.pipeline.errors import ConfigError, LodesetError


def padded(data: bytes, size: int) -> bytes:
    return data + bytes(size - len(data))


@pytest.fixture
def config(tmp_path: Path, one_process: None) -> Path:
    """A pool of a tar in three slices, the second with a broken image, and a folder."""
    images = [(f"{i}.png", picture(i)) for i in range(9)]
    images[4] = ("4.png", padded(images[4][1][:100], 60_000))
    (tmp_path / "pool/loose").mkdir(parents=True)
    write_tar(tmp_path / "pool/a.tar", [(name, padded(data, 60_000)) for name, data in images])
    (tmp_path / "pool/loose/text.jpg").write_text("no image at all")
    (tmp_path / "pool/loose/good.png").write_bytes(picture(20))
    path = tmp_path / "lodeset.yaml"
    pool = ["pool/*.tar", "pool/loose/"]
    path.write_text(yaml.safe_dump({"pool": [{"uri": uri} for uri in pool], "ingest": {"slice_mb": 0.2}}))
    lodeset("run", path, "--until", "filter")
    return path


def found(config: Path, **conditions: object) -> list[Reject]:
    return api.rejects(api.open_store(config), Chosen(**conditions))  # type: ignore[arg-type]


def mended(config: Path) -> None:
    """The broken image is whole now, though its tar looks as before: what was read came from a failing disk."""
    path = config.parent / "pool/a.tar"
    before, data = path.stat(), path.read_bytes()
    good = padded(picture(4), 60_000)
    broken = padded(picture(4)[:100], 60_000)
    assert data.count(broken) == 1
    path.write_bytes(data.replace(broken, good))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_every_reject_tells_its_history(config: Path) -> None:
    one, other = found(config)
    assert (one.member, one.reason, one.transient, one.attempts) == ("4.png", "corrupt", False, 1)
    assert (other.reason, other.version, other.accepted) == ("not_an_image", store.code_version(), False)
    assert one.detail and one.first == one.last and one.first is not None
    assert [reject.reason for reject in found(config, reason="corrupt")] == ["corrupt"]
    assert found(config, transient=True) == []
    out, _ = lodeset("rejects", config, "show")
    assert "4.png" in out and "no image at all" not in out


def test_a_retry_reads_only_the_slices_that_hold_rejects(config: Path) -> None:
    runs = config.parent / "runs/parts/ingest"
    before = {path.name: path.stat().st_mtime_ns for path in runs.iterdir()}
    out, _ = lodeset("rejects", config, "retry", "--reason", "corrupt")
    assert out.startswith("1 rejects in 1 slices of ingest/pool")
    assert actions(config)["ingest/pool"] == "run"
    lodeset("run", config, "--until", "filter")
    after = {path.name: path.stat().st_mtime_ns for path in runs.iterdir()}
    assert set(after) == set(before) and len(before) >= 3
    assert sum(after[name] != before[name] for name in before) == 1
    # Nothing came in, so nothing downstream was made again; the reject was examined twice now.
    assert entries(config)["filter/pool"]["rows"]["kept"] == 9
    assert {r.reason: r.attempts for r in found(config)} == {"corrupt": 2, "not_an_image": 1}
    assert len(list((config.parent / "runs/parts/ingest_listing").iterdir())) == 1  # headers were not read again


def test_what_comes_in_after_all_goes_downstream(config: Path) -> None:
    first = next(reject.first for reject in found(config, reason="corrupt"))
    mended(config)
    lodeset("rejects", config, "retry", "--permanent")
    lodeset("run", config, "--until", "filter")
    told = entries(config)
    assert told["ingest/pool"]["rows"]["dropped"] == {"not_an_image": 1}
    assert told["filter/pool"]["rows"]["kept"] == 10
    (left,) = found(config)
    assert (left.attempts, left.first is not None and first is not None and left.first <= left.last) == (2, True)


def test_after_an_upgrade_only_what_older_versions_examined(config: Path) -> None:
    assert found(config, before=store.code_version()) == []
    assert len(found(config, before="99.0")) == 2
    with pytest.raises(ConfigError, match="'soon' is not a version"):
        found(config, before="soon")
    lodeset("rejects", config, "retry", "--reason", "corrupt", "--since-version", "99.0")
    with pytest.raises(LodesetError, match="or they are to be read again"):
        found(config)


def test_accepted_rejects_are_let_be(config: Path) -> None:
    _, err = lodeset("rejects", config, "accept", code=2)
    assert "nothing is accepted wholesale" in err
    assert lodeset("rejects", config, "accept", "--reason", "corrupt", "--why", "known")[0] == "accepted 1 rejects\n"
    assert [r.reason for r in found(config)] == ["not_an_image"]
    assert {r.reason: r.accepted for r in found(config, accepted=True)} == {"corrupt": True, "not_an_image": False}
    assert lodeset("rejects", config, "accept", "--reason", "corrupt")[0] == "accepted 0 rejects\n"
    assert (
        lodeset("rejects", config, "retry", "--reason", "corrupt")[0] == "no such reject: nothing is to be read again\n"
    )
