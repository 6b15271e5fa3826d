#!/usr/bin/env bash
# Environments of their own for harnesses that nobody here wrote, each made once: their versions of
# openai and mcp are not ours. `harness_setup.sh NAME PACKAGE...` makes .venv-NAME.
set -euo pipefail
cd "$(dirname "$0")/../.."
venv=".venv-$1"
shift
wanted="$* $(cksum < tests/agents/harness_setup.sh)"
[ "$(cat "$venv/.ready" 2>/dev/null || true)" = "$wanted" ] && exit 0
[ -x "$venv/bin/python" ] || .venv/bin/python -m venv "$venv"
"$venv/bin/python" -m pip install --quiet "$@"
echo "$wanted" > "$venv/.ready"
