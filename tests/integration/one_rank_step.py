"""Print the metrics of a run's first step, replayed by a learner of one rank, as JSON.

python tests/integration/one_rank_step.py RUN
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from deploy.inspector.replay import replay

print(json.dumps(replay(Path(sys.argv[1]), 1).metrics))
