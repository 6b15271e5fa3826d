"""Messages as clients send them, in one form, so that they can be compared and rendered.

One thing has many forms: a content may be a text or a list of parts, an empty one may be missing,
arguments are a text of JSON that a client may have written anew. `plain_messages` keeps what
counts.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from actors.endpoint.refusal import RefusedError

Message = dict[str, Any]
_ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
}


def plain_messages(messages: Any) -> list[Message]:
    """Messages of a request: role, text, and of calls and results their ids.

    Raises: `RefusedError` where they are no conversation.
    """
    if not isinstance(messages, list) or not messages:
        raise _wrong("messages", "messages must be a list, and not empty")
    return [_plain(message, f"messages[{i}]") for i, message in enumerate(messages)]


def same_message(one: Message, other: Message) -> bool:
    """Whether two plain messages say the same; of an assistant white space around it may differ."""
    if one["role"] == other["role"] == "assistant":
        return bool(_stripped(one) == _stripped(other))
    return one == other


def _stripped(message: Message) -> Message:
    return message | {"content": message["content"].strip()}


def _plain(message: Any, place: str) -> Message:
    if not isinstance(message, Mapping) or message.get("role") not in _ROLES:
        raise _wrong(place, f"{place} must be a message of the role {', '.join(_ROLES)}")
    role = _ROLES[str(message["role"])]
    plain: Message = {"role": role, "content": _text(message.get("content"), place)}
    if role == "tool":
        plain["tool_call_id"] = _word(message.get("tool_call_id"), f"{place}.tool_call_id")
        if message.get("name") is not None:
            plain["name"] = _word(message["name"], f"{place}.name")
    if role == "assistant" and message.get("tool_calls"):
        plain["tool_calls"] = _calls(message["tool_calls"], f"{place}.tool_calls")
    return plain


def _text(content: Any, place: str) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, Sequence):
        parts = [part.get("text") if isinstance(part, Mapping) else None for part in content]
        if all(isinstance(part, str) for part in parts):
            return "".join(str(part) for part in parts)
    raise _wrong(f"{place}.content", f"{place}.content must be text: the model reads nothing else")


def _calls(calls: Any, place: str) -> list[dict[str, Any]]:
    if not isinstance(calls, list):
        raise _wrong(place, f"{place} must be a list of calls")
    plain = []
    for i, call in enumerate(calls):
        function = call.get("function") if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping):
            raise _wrong(f"{place}[{i}]", f"{place}[{i}] must be a call of a function")
        plain.append(
            {
                "id": _word(call.get("id"), f"{place}[{i}].id"),
                "type": "function",
                "function": {
                    "name": _word(function.get("name"), f"{place}[{i}].function.name"),
                    "arguments": _arguments(function.get("arguments"), f"{place}[{i}].function"),
                },
            }
        )
    return plain


def _arguments(text: Any, place: str) -> dict[str, Any]:
    try:
        read = json.loads(text) if isinstance(text, str) else text
    except (ValueError, RecursionError):
        read = None
    if not isinstance(read, dict):
        raise _wrong(f"{place}.arguments", f"{place}.arguments must be an object of JSON")
    return read


def _word(value: Any, place: str) -> str:
    if not isinstance(value, str):
        raise _wrong(place, f"{place} must be text")
    return value


def _wrong(param: str, message: str) -> RefusedError:
    return RefusedError(400, "invalid_value", message, param)
