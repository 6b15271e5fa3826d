"""Step 1 of a finished synchronous run again, with one learner rank; prints its metrics.

python one_rank_step.py runs/NAME
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

from common.config_loader import load_config
from common.log_store import read_log
from deploy.cluster import learner_job
from deploy.models import resolve_model
from learner.worker import LearnerWorker


def main(run: Path) -> None:
    config = load_config([run / "config.yaml"], [], resolved=True)
    config = replace(
        config,
        model=replace(config.model, path=str(resolve_model(config.model.path))),
        learner=replace(config.learner, ranks=1, threads=1),
    )
    worker = LearnerWorker(learner_job(config), 0)
    worker.setup(*worker.rendezvous_address())
    groups = [
        b for b in read_log(run / "trajectories") if b.column("dispatch_version")[0].as_py() == 0
    ]
    groups.sort(key=lambda batch: batch.column("group_id")[0].as_py())
    print(json.dumps(worker.step(groups[: config.batch.prompts_per_step], 0, 0)))
    worker.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
