"""An agent of the OpenAI Agents SDK with a calculator. It knows nothing of training.

    environment.command='[.venv-agents/bin/python, deploy/examples/agents/openai_agent.py]'

The SDK is in an environment of its own: `python -m venv .venv-agents`, then
`.venv-agents/bin/pip install openai-agents`. The SDK itself reads OPENAI_BASE_URL and
OPENAI_API_KEY. The task is a row of the data set; the last line printed is the reward.
"""

import json
import sys

from agents import (
    Agent,
    MaxTurnsExceeded,
    Runner,
    function_tool,
    set_default_openai_api,
    set_tracing_disabled,
)

set_default_openai_api("chat_completions")  # the SDK asks for responses otherwise
set_tracing_disabled(True)


def calculate(a: int, operator: str, b: int) -> str:
    """Work out a sum, a difference or a product of two whole numbers.

    Args:
        a: the first number
        operator: one of + - *
        b: the second number
    """
    results = {"+": a + b, "-": a - b, "*": a * b}
    return str(results.get(operator, "the operator must be one of + - *"))


def main() -> None:
    """Answer one question."""
    task = json.loads(sys.stdin.readline())
    agent = Agent(
        name="calculator",
        instructions="Answer with the number alone. The tool calculates.",
        tools=[function_tool(calculate)],
        model="policy",
    )
    try:
        answer = str(Runner.run_sync(agent, task["prompt"], max_turns=4).final_output)
    except MaxTurnsExceeded:
        answer = ""  # its own limit is no failure
    print(json.dumps({"reward": float(answer.strip() == str(task["answer"]))}))


if __name__ == "__main__":
    main()
