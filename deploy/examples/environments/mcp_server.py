"""A notebook behind MCP, for any client of the protocol; here its tools are the policy's.

    environment.name=mcp
    environment.args='{command: [python, -m, deploy.examples.environments.mcp_server]}'

Every episode starts the server anew, so every episode has an empty notebook.
"""

from __future__ import annotations

from mcp.server import MCPServer
from mcp.server.mcpserver.exceptions import ToolError

server = MCPServer("notebook")
notes: dict[str, str] = {}


@server.tool()
def write(title: str, text: str) -> str:
    """Write a note, over one of the same title."""
    notes[title] = text
    return f"{len(notes)} notes"


@server.tool()
def read(title: str) -> str:
    """Read a note."""
    if title not in notes:
        raise ToolError(f"there is no note {title!r}")
    return notes[title]


@server.tool()
def titles() -> list[str]:
    """Say which notes there are."""
    return sorted(notes)


if __name__ == "__main__":
    server.run()
