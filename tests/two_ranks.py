"""One rank of :mod:`conformance.test_engines`: every strategy in turn under one engine, in one process.

``python two_ranks.py FOLDER``: reads ``FOLDER/jobs.json`` (``[{"key", "links", "stream", "sections"}]``); rank 0 writes each
job's score matrix to ``FOLDER/matrices.json``, what its strategies measured after each experience to
``FOLDER/measures.json`` and the final weights to ``FOLDER/<key>.safetensors``.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path

import toys
from safetensors.torch import save_file


def main(folder: Path) -> None:
    matrices, measures = {}, {}
    for job in json.loads((folder / "jobs.json").read_text()):
        trainer = toys.trainer(job["links"], toys.stream(**job["stream"]), **job["sections"])
        record = trainer.run()
        weights = trainer.learner.weights()  # every rank takes part
        trainer.learner.state_dict()  # gathers the optimiser's state, too
        trainer.learner.close()
        if trainer.learner.rank == 0:
            matrices[job["key"]], measures[job["key"]] = [record.initial, *record.matrix], record.measures
            save_file({k: v.contiguous() for k, v in weights.items()}, folder / f"{job['key']}.safetensors")
    if os.environ["RANK"] == "0":
        (folder / "matrices.json").write_text(json.dumps(matrices))
        (folder / "measures.json").write_text(json.dumps(measures))


if __name__ == "__main__":
    code = 0
    try:
        main(Path(sys.argv[1]))
    except BaseException:  # noqa: BLE001
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # gloo's threads sometimes abort at interpreter exit
