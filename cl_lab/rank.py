"""``python -m cl_lab.rank JOB``: one rank of a run that starts its own processes."""

from __future__ import annotations

import os
import sys

from cl_lab.experiment import main_rank

if __name__ == "__main__":
    code = main_rank(sys.argv[1])
    sys.stdout.flush()
    sys.stderr.flush()
    # Everything is on disk. Tearing gloo's threads down at interpreter exit sometimes aborts ("terminate called without
    # an active exception"), which would turn a finished rank into a failed one.
    os._exit(code)
