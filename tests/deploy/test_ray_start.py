"""Starting a cluster of our own: what cannot pass by waiting ends the run, what may is retried."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from ray._private import parameter
from ray._private.utils import validate_socket_filepath

from common.errors import StartError, UserError
from deploy.run import actors


def longest_folder() -> Path:
    """A temporary folder whose sockets have the longest path that Ray takes."""
    name = "x"
    while True:
        try:
            validate_socket_filepath(str(Path("/tmp", name + "x") / actors._SOCKET))
        except OSError:
            return Path("/tmp", name)
        name += "x"


def test_a_temporary_folder_too_long_for_sockets_is_a_user_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = longest_folder()
    actors._check_socket_paths(folder)
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    with pytest.raises(UserError, match=r"1 byte\(s\) longer than the 107.*set TMPDIR to a"):
        actors._check_socket_paths(folder.with_name(folder.name + "x"))
    monkeypatch.setenv("RAY_TMPDIR", "/tmp")
    with pytest.raises(UserError, match="set RAY_TMPDIR to a shorter folder"):
        actors._check_socket_paths(folder / "more")


def test_ray_is_not_started_where_its_sockets_have_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's own error would name folders that are not there, and be tried again."""
    monkeypatch.setenv("RAY_TMPDIR", f"{longest_folder()}x")
    monkeypatch.setattr(actors.ray, "init", lambda **_: pytest.fail("started"))
    anything: Any = None
    with pytest.raises(UserError, match="set RAY_TMPDIR to a shorter folder"):
        actors._start_ray(anything, anything, {})


def test_a_session_of_ray_is_no_longer_than_the_one_that_is_checked() -> None:
    process = f"{os.getpid():07d}"
    name = f"session_2026-12-31_23-59-59_123456_{process}/sockets/plasma_store"
    assert len(name) == len(actors._SOCKET)


def test_a_node_of_ray_asks_for_no_certain_port(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its agent's is taken where another run is on the machine, and Ray waits for it in vain."""
    ports = []

    def init(**_: Any) -> None:
        ports.append(parameter.RayParams().dashboard_agent_listen_port)
        raise ValueError("enough")

    monkeypatch.setattr(actors.ray, "init", init)
    monkeypatch.setattr(actors, "cpus_needed", lambda *_: 2)
    monkeypatch.setattr(actors, "object_store_bytes", lambda _: 2**30)
    anything: Any = None
    with pytest.raises(UserError, match="enough"):
        actors._start_ray(anything, anything, {})
    assert ports == [0]
    assert parameter.RayParams().dashboard_agent_listen_port > 0


@pytest.mark.parametrize(
    ("raised", "expected"),
    [
        (Exception("The node has not registered within 30 s"), StartError),
        (RuntimeError("Failed to start GCS"), StartError),
        (ConnectionError("no answer"), StartError),
        (TimeoutError("no answer"), StartError),
        (ValueError("the object store is smaller than the minimum"), UserError),
        (PermissionError("/tmp/ray"), UserError),
    ],
)
def test_what_waiting_may_mend_is_told_from_what_it_does_not(
    raised: Exception, expected: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    def init(**_: Any) -> None:
        raise raised

    monkeypatch.setattr(actors.ray, "init", init)
    monkeypatch.setattr(actors, "_kill_servers", lambda: 0)
    for name in ("cpus_needed", "object_store_bytes"):
        monkeypatch.setattr(actors, name, lambda *_: 1)
    monkeypatch.setenv("RAY_TMPDIR", "/tmp/mine")
    anything: Any = None
    with pytest.raises(expected, match=str(raised)) as caught:
        actors._start_ray(anything, anything, {})
    assert type(caught.value) is expected
    assert "/tmp/mine/" in str(caught.value)
