"""`make test-gpu` itself, on a machine without a device: what it says, and what it writes down."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from source_tree import ROOT

PLAYED = """
import torch
torch.cuda.is_available = lambda: True
torch.cuda.device_count = lambda: 1
"""
TESTS = """
import pytest

@pytest.mark.gpu
def test_right(record_property):
    record_property("mfu", 0.5)

@pytest.mark.gpu
def test_wrong(record_property):
    record_property("mfu", 0.25)
    assert 0.25 >= 0.45, "below the aim"

@pytest.mark.gpu(devices=2)
def test_two():
    raise AssertionError("there is one device")
"""


def pytest_in(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-m", "gpu", *words]
    return subprocess.run(
        command, cwd=folder, capture_output=True, text=True, timeout=120, check=False
    )


def test_without_a_device_it_says_so_and_tries_nothing() -> None:
    done = pytest_in(ROOT, "tests/gpu/test_learner.py")
    assert done.returncode == 2
    assert "make test-gpu runs on a machine with CUDA devices" in done.stdout
    assert "passed" not in done.stdout


def test_the_report_has_a_line_for_every_test(tmp_path: Path) -> None:
    shutil.copy(ROOT / "tests" / "gpu" / "conftest.py", tmp_path)
    (tmp_path / "played.py").write_text(PLAYED)
    (tmp_path / "test_three.py").write_text(TESTS)
    (tmp_path / "pytest.ini").write_text("[pytest]\npythonpath = .\nmarkers = gpu: devices\n")
    done = pytest_in(tmp_path, "-p", "played", "test_three.py")
    assert done.returncode == 1, done.stdout
    report = (tmp_path / "gpu-report.txt").read_text().splitlines()
    assert report[-3] == "PASS  test_right  0 s  mfu=0.5"
    assert report[-2].startswith("FAIL  test_wrong  0 s  mfu=0.25  AssertionError: below the aim")
    assert report[-1].startswith("SKIP  test_two  0 s  ")
    assert "wants 2 CUDA devices, 1 are here" in report[-1]
    assert any(line.startswith("Python 3.") and "torch " in line for line in report)
