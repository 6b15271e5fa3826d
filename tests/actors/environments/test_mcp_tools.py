"""The tools of an MCP server, a real one in a process of its own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from environment_hosts import Played, playing

from actors.environments.base import Reply, ToolCall
from actors.environments.host import Observation
from common.errors import UserError
from common.supervision.processes import descendants

NOTEBOOK = ["python", "-m", "deploy.examples.environments.mcp_server"]


@pytest.fixture(scope="module")
def notebook() -> Iterator[Played]:
    with playing("mcp", {"command": NOTEBOOK}, step_timeout_s=60.0) as played:
        yield played


def called(played: Played, key: str, name: str, **arguments: Any) -> tuple[str, bool]:
    answer = played.step(key, Reply("", [ToolCall(name, arguments)]))
    assert isinstance(answer, Observation), answer
    (result,) = answer.results
    return result.text, result.failed


def test_a_servers_tools_are_the_policys(notebook: Played) -> None:
    tools = {tool["function"]["name"]: tool["function"] for tool in notebook.host.tools}
    assert set(tools) == {"write", "read", "titles"}
    assert tools["read"]["description"] == "Read a note."
    assert tools["write"]["parameters"]["required"] == ["title", "text"]


def test_every_episode_has_a_server_of_its_own(notebook: Played) -> None:
    one, other = notebook.begin()[0], notebook.begin()[0]
    assert called(notebook, one, "write", title="list", text="tea") == ("1 notes", False)
    assert called(notebook, one, "read", title="list") == ("tea", False)
    text, failed = called(notebook, other, "read", title="list")
    assert ("there is no note 'list'" in text, failed) == (True, True)
    assert called(notebook, other, "titles") == ("", False)
    assert called(notebook, one, "read", title=3)[1]
    end = notebook.step(one, "tea")
    assert isinstance(end, Observation)
    assert (end.done, end.reward) == (True, None)
    for key in (one, other):
        notebook.close(key)
    notebook.rest(3.0)
    assert not descendants(notebook.host.pids[0])[3:]


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        ([], "command is empty"),
        (["no-such-server"], "No such file or directory: 'no-such-server'"),
        (["python", "-c", "exit(3)"], "cannot be used: describe: "),
    ],
)
def test_a_server_that_does_not_come_up_is_refused(command: list[str], reason: str) -> None:
    with pytest.raises(UserError) as refused, playing("mcp", {"command": command}):
        pass
    assert reason in str(refused.value)
