"""Generated parts of documents, each between two marks that name the script which made it.

<!-- NAME: made by tests/support/SCRIPT.py -->
...
<!-- end of NAME -->
"""

from __future__ import annotations

import re


def with_part(text: str, name: str, script: str, part: str) -> str:
    """`text` with `part` between the marks of `name`; raises ValueError when they are not there."""
    begin, end = f"<!-- {name}: made by tests/support/{script} -->\n", f"<!-- end of {name} -->\n"
    pattern = re.escape(begin) + ".*?" + re.escape(end)
    made, count = re.subn(pattern, lambda _: f"{begin}{part}{end}", text, flags=re.DOTALL)
    if count != 1:
        raise ValueError(f"{begin.strip()} and {end.strip()} stand {count} times in the document")
    return made
