"""An environment of the library `verifiers`, its tools and its rubric, trained as it is.

    environment.command='[.venv-verifiers/bin/python, deploy/examples/agents/with_verifiers.py]'

The library is in an environment of its own, for it wants other versions of openai and mcp:
`python -m venv .venv-verifiers`, then `.venv-verifiers/bin/pip install verifiers==0.1.14`. What
`vf.load_environment` gives is used in the same way.
"""

import json
import os
import sys

import verifiers as vf
from datasets import Dataset


def multiply(a: int, b: int) -> int:
    """Multiply two whole numbers.

    Args:
        a: the first number
        b: the second number
    """
    return a * b


async def right(completion: vf.Messages, answer: str) -> float:
    """Whether the last message is the answer."""
    return float(str(completion[-1].content).strip() == answer)


def main() -> None:
    """Play one task."""
    task = json.loads(sys.stdin.readline())
    row = {"question": task["prompt"], "answer": str(task["answer"])}
    environment = vf.ToolEnv(
        dataset=Dataset.from_list([row]),
        tools=[multiply],
        rubric=vf.Rubric(funcs=[right]),
        system_prompt="Answer with the number alone. The tool multiplies.",
        max_turns=4,
    )
    client = vf.ClientConfig(
        api_key_var="OPENAI_API_KEY", api_base_url=os.environ["OPENAI_BASE_URL"]
    )
    results = environment.evaluate_sync(
        client, "policy", num_examples=1, rollouts_per_example=1, save_results=False
    )
    (played,) = results["outputs"]
    if played["error"]:
        raise SystemExit(f"the environment failed: {played['error']}")
    print(json.dumps({"reward": float(played["reward"])}))


if __name__ == "__main__":
    main()
