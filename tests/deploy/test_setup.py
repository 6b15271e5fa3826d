"""`deploy/setup.sh --check` on machines that are not here: their tools are scripts that say so."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
REAL = ("bash", "awk", "sed", "sort", "head", "cat", "cksum", "dirname", "xargs")


@dataclass(frozen=True)
class Machine:
    """What its tools print. None: the tool is not installed."""

    driver: str | None = None
    capability: str = "9.0"
    system: str = "Linux"
    processor: str = "x86_64"
    compiler: bool = True
    free_gib: int = 100
    libc: str = "glibc 2.35"
    python: tuple[int, int] = (3, 11)
    ensurepip: bool = True
    rocm: bool = False
    environment: dict[str, str] = field(default_factory=dict)

    def tools(self) -> dict[str, str]:
        kib = self.free_gib * 1048576
        found = {
            "uname": f'case "$1" in -s) echo {self.system};; *) echo {self.processor};; esac',
            "df": f'echo header; echo "disk 1 1 {kib} 1% /"',
            "getconf": f"echo {self.libc}",
            "python3": self._python(),
        }
        if self.compiler:
            found["gcc"] = "exit 0"
        if self.rocm:
            found["rocminfo"] = "exit 0"
        if self.driver is not None:
            found["nvidia-smi"] = (
                f'case "$*" in *driver*) echo {self.driver};; *cap*) echo {self.capability};; esac'
            )
        return found

    def _python(self) -> str:
        """The real interpreter, told that it has another version and other modules."""
        hidden = "" if self.ensurepip else "sys.modules['ensurepip'] = None;"
        version = f"import sys; sys.version_info = {(*self.python, 0)}; {hidden}"
        return f"""
if [ "$1" = -c ]; then exec {sys.executable} -c "{version}$2"; fi
echo Python {self.python[0]}.{self.python[1]}.0"""


def check(machine: Machine, folder: Path) -> subprocess.CompletedProcess[str]:
    tools = folder / "bin"
    tools.mkdir()
    for name in REAL:
        (tools / name).symlink_to(shutil.which(name) or name)
    for name, script in machine.tools().items():
        (tools / name).write_text(f"#!{shutil.which('bash')}\n{script}\n")
        (tools / name).chmod(0o755)
    environment = {"PATH": str(tools), "VENV": str(folder / "new" / ".venv"), "KFD": "/nowhere"}
    inherited = {key: os.environ[key] for key in ("LD_LIBRARY_PATH", "HOME") if key in os.environ}
    return subprocess.run(
        [str(tools / "bash"), "deploy/setup.sh", "--check"],
        cwd=ROOT,
        env=inherited | environment | machine.environment,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


@pytest.mark.parametrize(
    ("machine", "engine"),
    [
        (Machine(), "cpu"),
        (Machine(driver="580.65.06"), "gpu"),
        (Machine(driver="590.12", capability="7.5"), "gpu"),
        (Machine(driver="580.65.06", environment={"ENGINE": "cpu"}), "cpu"),
        (Machine(environment={"ENGINE": "gpu"}), "gpu"),
        (Machine(processor="aarch64"), "cpu"),
        (Machine(driver="580.65.06", processor="aarch64", python=(3, 13)), "gpu"),
        (Machine(free_gib=7), "cpu"),
    ],
)
def test_a_machine_gets_the_build_it_can_run(machine: Machine, engine: str, tmp_path: Path) -> None:
    done = check(machine, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"this machine takes the {engine} build\n"
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("machine", "message"),
    [
        (Machine(driver="550.54.14"), "the NVIDIA driver is 550.54.14, and CUDA 13.0 needs 580"),
        (Machine(driver="580.1", capability="7.0"), "compute capability 7.0, and CUDA 13.0"),
        (Machine(driver="580.1", compiler=False), "no C compiler: Triton"),
        (Machine(driver="580.1", free_gib=15), "has 15 GiB free and the environment takes 16"),
        (Machine(free_gib=5), "has 5 GiB free and the environment takes 6"),
        (
            Machine(driver="580.1", processor="aarch64", python=(3, 13), libc="glibc 2.31"),
            "needs glibc 2.34, and this is glibc 2.31: set PYTHON=/path/to/python3.12",
        ),
        (Machine(system="Darwin"), "use WSL 2 on Windows, or a container"),
        (Machine(processor="ppc64le"), "this machine is ppc64le"),
        (Machine(python=(3, 10)), "python3 is older than Python 3.11"),
        (Machine(python=(3, 15)), "torch has no build for Python 3.15.0 yet"),
        (Machine(ensurepip=False), "apt-get install python3-venv"),
        (Machine(environment={"ENGINE": "tpu"}), "ENGINE=tpu: use cpu or gpu"),
        (Machine(environment={"PYTHON": "/no/python"}), "there is no /no/python"),
    ],
)
def test_a_machine_on_which_it_cannot_work_is_told_why(
    machine: Machine, message: str, tmp_path: Path
) -> None:
    done = check(machine, tmp_path)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("machine", "message"),
    [
        (Machine(rocm=True), "an AMD device is here, and ROCm is not supported"),
        (Machine(driver="400.1", environment={"ENGINE": "cpu"}), "NVIDIA device here is not used"),
        (Machine(environment={"ENGINE": "gpu"}), "installed for another machine"),
    ],
)
def test_what_is_left_unused_is_said(machine: Machine, message: str, tmp_path: Path) -> None:
    done = check(machine, tmp_path)
    assert done.returncode == 0
    assert message in done.stderr
