"""A data set of your own: a JSON object on each line, with columns of any name.

    .venv/bin/python deploy/examples/data_set.py products.jsonl
    .venv/bin/grpo-lambda train --config deploy/configs/tiny.yaml \
        data.path=products.jsonl data.answer_column=product \
        verifier.rules='[{name: math_answer, args: {extract: last_number}}]'

Parquet files and data sets of the hub are read in the same way. The last
`eval.prompts` rows are held out, unless `data.eval_path` names others.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path


def rows(seed: int = 0) -> Iterator[dict[str, str]]:
    """Every product of two numbers up to 30, once, in an order that `seed` gives."""
    pairs = [(a, b) for a in range(1, 31) for b in range(1, 31)]
    random.Random(seed).shuffle(pairs)
    for a, b in pairs:
        yield {"question": f"{a} * {b} =", "product": str(a * b)}


if __name__ == "__main__":
    Path(sys.argv[1]).write_text("".join(json.dumps(row) + "\n" for row in rows()))
