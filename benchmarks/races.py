"""Two runs started together on one store, twenty times, five of them in PID namespaces of their own: one works, the other is refused
with exit code 4, and the shards are those of a run that was alone.

python benchmarks/races.py [PAIRS]
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import yaml

from lodeset.infra.demo.world import make_world

IMAGES = 200
NAMESPACE = ("unshare", "--pid", "--fork", "--kill-child", "--mount-proc")


def shards(store: Path) -> dict[str, str]:
    return {
        f"{path.parent.name}/{path.name}": hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted((store / "shards").glob("*/*"))
    }


def run(config: Path, store: Path, apart: bool) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "lodeset", "run", str(config), "--set", f"store={store}"]
    return subprocess.Popen(
        [*(NAMESPACE if apart else ()), *command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )


def main() -> None:
    pairs = int(sys.argv[1]) if len(sys.argv) > 1 else 20
    outcomes: Counter[str] = Counter()
    with tempfile.TemporaryDirectory(prefix="lodeset-races-") as name:
        folder = Path(name)
        make_world(folder / "world", IMAGES, cpus=2)
        config = folder / "world/races.yaml"
        pool = [{"uri": "pool/*.tar"}, {"uri": "pool/loose/"}]
        config.write_text(yaml.safe_dump({"pool": pool, "dedup": {"calibration_images": 40}, "shards": {"size_mb": 1}}))
        alone = folder / "alone"
        assert run(config, alone, False).wait() == 0
        expected = shards(alone)
        began = time.monotonic()
        for pair in range(pairs):
            store, apart = folder / f"store-{pair}", pair % 4 == 0
            both = [run(config, store, apart) for _ in range(2)]
            codes = sorted(process.wait() for process in both)
            same = shards(store) == expected
            outcomes[
                f"{'two namespaces' if apart else 'one namespace'}: exit codes {codes}, shards {'the same' if same else 'DIFFERENT'}"
            ] += 1
            print(pair, codes, same, flush=True)
    told = {"benchmark": "races", "pairs": pairs, "seconds": round(time.monotonic() - began), "outcomes": outcomes}
    print(json.dumps(told, indent=1))


if __name__ == "__main__":
    main()
