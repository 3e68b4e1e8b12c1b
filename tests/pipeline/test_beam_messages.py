"""An error of a Beam worker reaches the user as its message, without a traceback."""

import subprocess
import sys

# In a process of its own: importing Beam warns, and tests treat warnings as errors.
SCRIPT = """
import apache_beam as beam
from lodeset.pipeline.engines.beam import pipeline
from lodeset.pipeline.errors import LodesetError

def refuses(_):
    raise LodesetError("the disk is full: free some space")

try:
    with pipeline(1, {}) as made:
        made | beam.Create([1]) | beam.Map(refuses)
except LodesetError as error:
    print(error, end="")
"""


def test_the_message_of_a_worker_is_shown_without_its_traceback() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout == "the disk is full: free some space", done.stderr[-1000:]
