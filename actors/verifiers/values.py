"""Values on their way between a program and the tests that call it, as JSON.

Only plain values of Python's own types arrive: what a program returns cannot bring a comparison of
its own along. An object of another type stays where it is, and the other side gets a handle to it.

    [kind, content]     none, bool, int (hexadecimal), float (hexadecimal), str, bytes, list, tuple,
                        set, frozenset, dict, class (a name of builtins), handle (a number)
"""

from __future__ import annotations

import base64
import builtins
import json
import os
import struct
from collections.abc import Callable
from typing import Any

_LENGTH = struct.Struct(">I")
MAX_MESSAGE_BYTES = 16 * 2**20
_CLASSES = [found for found in vars(builtins).values() if isinstance(found, type)]
_MANY: dict[str, type] = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}


class Handles:
    """Encodes and decodes; keeps the objects that stay, by their numbers.

    Args:
        stand_in: what the other side's handle `number` becomes here. None: this side's object.
        number_of: the number of a value that is such a stand-in; None for others.
    """

    def __init__(
        self,
        stand_in: Callable[[int], Any] | None = None,
        number_of: Callable[[Any], int | None] = lambda value: None,
    ) -> None:
        self._objects: list[Any] = []
        self._stand_in = stand_in
        self._number_of = number_of

    def find(self, number: int) -> Any:
        """The object of a handle; None for a number that is none."""
        return self._objects[number] if 0 <= number < len(self._objects) else None

    def encode(self, value: Any) -> list[Any]:  # noqa: PLR0911
        """`value` as JSON."""
        if value is None or isinstance(value, bool):
            return ["bool" if value is not None else "none", value]
        if isinstance(value, int):
            return ["int", int.__format__(value, "x")]
        if isinstance(value, float):
            return ["float", float.hex(value)]
        if isinstance(value, str):
            return ["str", str.__str__(value)]
        if isinstance(value, (bytes, bytearray)):
            return ["bytes", base64.b64encode(value).decode()]
        if isinstance(value, (list, tuple, set, frozenset)):
            kind = next(kind for kind, plain in _MANY.items() if isinstance(value, plain))
            return [kind, [self.encode(item) for item in value]]
        if isinstance(value, dict):
            return ["dict", [[self.encode(k), self.encode(v)] for k, v in dict.items(value)]]
        if any(value is found for found in _CLASSES):
            return ["class", str(value.__name__)]
        if type(value).__module__ == "numpy" and hasattr(value, "tolist"):
            return self.encode(value.tolist())
        number = self._number_of(value)
        if number is None:
            if self._stand_in is not None:
                raise TypeError(
                    f"they hand a {type(value).__name__} to the program, which takes plain values"
                )
            self._objects.append(value)
            number = len(self._objects) - 1
        return ["handle", number]

    def decode(self, encoded: Any) -> Any:  # noqa: PLR0911
        """The inverse. Raises: `ValueError` for anything else than what `encode` gives."""
        try:
            kind, content = encoded
            match kind:
                case "none":
                    return None
                case "bool":
                    return content is True
                case "int":
                    return int(content, 16)
                case "float":
                    return float.fromhex(content)
                case "str":
                    return str(content)
                case "bytes":
                    return base64.b64decode(content)
                case "dict":
                    return {self.decode(key): self.decode(value) for key, value in content}
                case "class":
                    return _class(content)
                case "handle":
                    number = int(content)
                    return self.find(number) if self._stand_in is None else self._stand_in(number)
            return _MANY[kind](self.decode(item) for item in content)
        except (TypeError, KeyError, AttributeError, OverflowError) as error:
            raise ValueError(f"{str(encoded)[:80]} is no value") from error


def _class(name: str) -> type:
    found = getattr(builtins, name)
    if not isinstance(found, type):
        raise TypeError(name)
    return found


def write_message(descriptor: int, message: Any) -> None:
    """Write one JSON message. Raises: `OSError` when nobody reads."""
    body = json.dumps(message).encode()
    left = memoryview(_LENGTH.pack(len(body)) + body)
    while left:
        left = left[os.write(descriptor, left) :]


def read_message(descriptor: int) -> Any:
    """The next message; None at the end, and for one that is too long to be one.

    Raises: `ValueError` or `RecursionError` when it is no JSON.
    """
    header = _read(descriptor, _LENGTH.size)
    size = _LENGTH.unpack(header)[0] if len(header) == _LENGTH.size else MAX_MESSAGE_BYTES + 1
    if size > MAX_MESSAGE_BYTES:
        return None
    body = _read(descriptor, size)
    return json.loads(body) if len(body) == size else None


def _read(descriptor: int, size: int) -> bytes:
    parts: list[bytes] = []
    while size > 0 and (part := os.read(descriptor, min(size, 2**20))):
        parts.append(part)
        size -= len(part)
    return b"".join(parts)
