#!/usr/bin/env bash
# The peer's own environment, .venv-trl, made once; TRL_PYTHON names another interpreter instead.
set -euo pipefail
cd "$(dirname "$0")/../.."
[ -n "${TRL_PYTHON:-}" ] && exit 0
[ -f .venv-trl/.ready ] && exit 0
torch="$(.venv/bin/python -c 'import torch; print(torch.__version__.split("+")[0])')"
transformers="$(.venv/bin/python -c 'import transformers; print(transformers.__version__)')"
"${PYTHON:-python3}" -m venv .venv-trl
.venv-trl/bin/python -m pip install --quiet \
    "trl==1.16.0" "torch==$torch" "transformers==$transformers" datasets accelerate jinja2
touch .venv-trl/.ready
