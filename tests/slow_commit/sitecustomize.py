"""Makes parts take a while to commit, in every process of a run, so that a kill can hit the middle of a stage.

Python imports this module by itself where its folder is on PYTHONPATH.
"""

import os
import time

SECONDS = float(os.environ.get("SLOW_COMMIT_SECONDS", "0"))
STAGES = os.environ.get("SLOW_COMMIT_STAGES", "").split()

if SECONDS:
    from lodeset.pipeline.dag.store import Store

    _commit = Store.commit_part

    def commit_part(self, stage, *args, **kwargs):
        if not STAGES or stage in STAGES:
            time.sleep(SECONDS)
        return _commit(self, stage, *args, **kwargs)

    Store.commit_part = commit_part
