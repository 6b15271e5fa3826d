#!/usr/bin/env bash
# What can be known to fail is refused here, before gigabytes are installed. Sourced by setup.sh.
#
# `choose_engine` answers which build of vLLM this machine takes; `check_machine` refuses one on
# which that build cannot work. An error is one line that says what to do, and exit status 2.

DRIVER_NEEDED=580    # torch 2.13 and 2.14 bring CUDA 13.0, whose oldest driver this is
CAPABILITY_NEEDED=75 # CUDA 13.0 compiles for no device older than Turing
GPU_GIB=16           # 4 of wheels, 10 unpacked, room for a small model
CPU_GIB=6            # the environment itself takes 3.6

refuse() { echo "error: $*" >&2; exit 2; }
note() { echo "note: $*" >&2; }

have_nvidia() { command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L >/dev/null 2>&1; }

choose_engine() { # prints cpu or gpu
    if [ -n "${ENGINE:-}" ]; then
        case "$ENGINE" in
            cpu | gpu) echo "$ENGINE" ;;
            *) refuse "ENGINE=$ENGINE: use cpu or gpu" ;;
        esac
    elif have_nvidia; then
        echo gpu
    else
        echo cpu
    fi
}

check_machine() { # ENGINE PYTHON VENV
    local engine="$1" python="$2" venv="$3"
    [ "$(uname -s)" = Linux ] ||
        refuse "vLLM has builds for Linux alone: use WSL 2 on Windows, or a container (deploy/docker)"
    case "$(uname -m)" in
        x86_64 | aarch64) ;;
        *) refuse "vLLM has builds for x86_64 and aarch64, and this machine is $(uname -m)" ;;
    esac
    check_python "$python" "$venv"
    if [ "$engine" = gpu ]; then
        check_gpu "$python"
        check_disk "$venv" "$GPU_GIB"
    else
        check_other_devices
        check_disk "$venv" "$CPU_GIB"
    fi
}

check_python() { # PYTHON VENV
    command -v "$1" >/dev/null 2>&1 || refuse "there is no $1: set PYTHON=/path/to/python3.11"
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
        refuse "$1 is older than Python 3.11: set PYTHON=/path/to/python3.11"
    "$1" -c 'import sys; sys.exit(sys.version_info >= (3, 15))' ||
        refuse "torch has no build for $("$1" --version) yet: set PYTHON=/path/to/python3.13 or older"
    if [ ! -x "$2/bin/python" ]; then
        "$1" -c 'import ensurepip, venv' 2>/dev/null ||
            refuse "$1 cannot make a virtual environment: install its venv package (Debian and Ubuntu:" \
                "apt-get install python3-venv), or set PYTHON to another interpreter"
    fi
}

check_gpu() { # PYTHON
    if ! command -v gcc >/dev/null 2>&1 && ! command -v cc >/dev/null 2>&1; then
        refuse "no C compiler: Triton compiles kernels as a run starts. Install gcc (apt-get install gcc)"
    fi
    if ! have_nvidia; then
        note "nvidia-smi lists no device here: the gpu build is installed for another machine"
        return
    fi
    local driver capability
    driver="$(nvidia-smi --query-gpu=driver_version --format=csv,noheader | head -n 1)"
    if [[ "${driver%%.*}" =~ ^[0-9]+$ ]] && [ "${driver%%.*}" -lt "$DRIVER_NEEDED" ]; then
        refuse "the NVIDIA driver is $driver, and CUDA 13.0 needs $DRIVER_NEEDED or newer: update the" \
            "driver, or train on the CPU (ENGINE=cpu)"
    fi
    capability="$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | sort -n | head -n 1)"
    capability="${capability//./}"
    if [[ "$capability" =~ ^[0-9]+$ ]] && [ "$capability" -lt "$CAPABILITY_NEEDED" ]; then
        refuse "a device here has compute capability ${capability:0:-1}.${capability: -1}, and CUDA 13.0" \
            "begins at 7.5 (Turing): hide it (CUDA_VISIBLE_DEVICES), or train on the CPU (ENGINE=cpu)"
    fi
    check_arm_libc "$1"
}

check_arm_libc() { # PYTHON: wheels that vLLM needs on aarch64 with Python 3.13 want glibc 2.34
    [ "$(uname -m)" = aarch64 ] || return 0
    "$1" -c 'import sys; sys.exit(sys.version_info >= (3, 13))' && return 0
    local libc minor
    libc="$(getconf GNU_LIBC_VERSION 2>/dev/null || true)"
    minor="${libc##*.}"
    if [[ "$minor" =~ ^[0-9]+$ ]] && [ "$minor" -lt 34 ]; then
        refuse "on aarch64 the gpu build for Python 3.13 and newer needs glibc 2.34, and this is $libc:" \
            "set PYTHON=/path/to/python3.12"
    fi
}

check_other_devices() {
    if have_nvidia; then
        note "ENGINE=cpu: the NVIDIA device here is not used"
    elif command -v rocminfo >/dev/null 2>&1 || [ -e "${KFD:-/dev/kfd}" ]; then
        note "an AMD device is here, and ROCm is not supported: the CPU build is installed"
    fi
}

check_disk() { # VENV GIB: where the environment is still to be made
    [ -x "$1/bin/python" ] && return 0
    local folder free
    folder="$(dirname "$1")"
    while [ ! -d "$folder" ]; do folder="$(dirname "$folder")"; done
    free="$(df -Pk "$folder" | awk 'NR == 2 {print int($4 / 1048576)}')"
    if [[ "$free" =~ ^[0-9]+$ ]] && [ "$free" -lt "$2" ]; then
        refuse "$folder has $free GiB free and the environment takes $2: make room, or set VENV to a" \
            "folder on another disk"
    fi
}

check_installed() { # ENGINE VENV: the torch that came fits the engine and sees the device
    [ "$1" = gpu ] || return 0
    "$2/bin/python" -c 'import sys, torch; sys.exit(torch.version.cuda is None)' ||
        refuse "a CPU build of torch was installed for the gpu build of vLLM (a folder of wheels named" \
            "in pip's find-links holds one): take it away and run this again"
    have_nvidia || return 0
    "$2/bin/python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' ||
        refuse "torch sees no CUDA device although nvidia-smi lists one: compare the driver that" \
            "nvidia-smi shows with CUDA 13.0, and CUDA_VISIBLE_DEVICES"
}
