"""Why a request is not answered, in the words of OpenAI's errors, which clients know."""

from __future__ import annotations

from typing import Any


class RefusedError(Exception):
    """A request that gets an error for an answer.

    Clients of OpenAI's try again at 408, 409, 429 and from 500 on, and at no other status.
    """

    def __init__(self, status: int, code: str, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.param = param

    def body(self) -> dict[str, Any]:
        """The body of the answer."""
        kinds = {401: "authentication_error", 429: "rate_limit_error"}
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return {
            "error": {
                "message": str(self),
                "type": kinds.get(self.status, kind),
                "param": self.param,
                "code": self.code,
            }
        }


def unknown_key() -> RefusedError:
    """The key names no session, or one that is over: a client must not learn which."""
    return RefusedError(401, "invalid_api_key", "this key names no open session")
