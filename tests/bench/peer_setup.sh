#!/usr/bin/env bash
# TRL's own environment, .venv-trl, made once: for the benchmark rows against it and for the tests
# that compare losses with it. TRL_PYTHON names another interpreter instead.
set -euo pipefail
cd "$(dirname "$0")/../.."
[ -n "${TRL_PYTHON:-}" ] && exit 0
wanted="$(cksum < tests/bench/peer_setup.sh)"
[ "$(cat .venv-trl/.ready 2>/dev/null || true)" = "$wanted" ] && exit 0
torch="$(.venv/bin/python -c 'import torch; print(torch.__version__.split("+")[0])')"
transformers="$(.venv/bin/python -c 'import transformers; print(transformers.__version__)')"
[ -x .venv-trl/bin/python ] || "${PYTHON:-python3}" -m venv .venv-trl
.venv-trl/bin/python -m pip install --quiet \
    "trl==1.16.0" "torch==$torch" "transformers==$transformers" datasets accelerate jinja2 \
    pytest pytest-timeout hypothesis omegaconf pyarrow
echo "$wanted" > .venv-trl/.ready
