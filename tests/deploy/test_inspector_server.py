"""The inspector's server and verb: what it answers, what it refuses, and to whom."""

from __future__ import annotations

import socket
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from inspector_runs import SyntheticRun, sums_run
from starlette.testclient import TestClient

from deploy.cli import main
from deploy.inspector.run_data import RunData
from deploy.inspector.server import build_app

ROOT = Path(__file__).resolve().parents[2]
HOST = "http://127.0.0.1:8471"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> SyntheticRun:
    return sums_run(tmp_path_factory.mktemp("runs") / "sums", steps=5, per_step=3, size=4)


@pytest.fixture(scope="module")
def client(run: SyntheticRun) -> TestClient:
    return TestClient(build_app(RunData(run.path)), base_url=HOST)


def test_pages_follow_each_other(client: TestClient) -> None:
    pages = [client.get(f"/api/groups?sort=reward&size=5&page={page}").json() for page in (1, 2, 5)]
    assert [page["total"] for page in pages] == [16] * 3
    assert [len(page["rows"]) for page in pages] == [5, 5, 0]
    rewards = [row["reward"] for page in pages for row in page["rows"]]
    assert rewards == sorted(rewards)
    groups = [row["group"] for page in pages for row in page["rows"]]
    assert len(set(groups)) == 10


def test_filters_hold_together(client: TestClient) -> None:
    answer = client.get("/api/groups?step_min=2&step_max=3&reward_max=0.5&text=answer").json()
    assert answer["rows"]
    for row in answer["rows"]:
        assert 2 <= row["step"] <= 3
        assert row["reward"] <= 0.5
    everything = client.get("/api/groups?size=500").json()["rows"]
    expected = [r for r in everything if r["step"] in (2, 3) and r["reward"] <= 0.5]
    texts = {r["group"]: client.get(f"/api/groups/{r['group']}").json() for r in expected}
    holding = [
        group
        for group, data in texts.items()
        if any("answer" in c["text"] for c in data["completions"])
    ]
    assert [row["group"] for row in answer["rows"]] == holding


def test_curves_have_the_metrics_own_numbers(client: TestClient, run: SyntheticRun) -> None:
    assert "loss/kl" in client.get("/api/run").json()["metrics"]
    series = client.get("/api/metrics?key=loss/kl&key=eval/accuracy&key=nothing").json()
    assert [step for step, _ in series["loss/kl"]] == [1, 2, 3, 4, 5]
    assert series["loss/kl"][2][1] is None  # NaN in the run
    assert series["eval/accuracy"] == [[0, 0.41]]
    assert series["nothing"] == []


def test_a_poll_is_answered_only_when_something_changed(tmp_path: Path) -> None:
    run = sums_run(tmp_path / "run", 1, 1, 2)
    client = TestClient(build_app(RunData(run.path)), base_url=HOST)
    first = client.get("/api/run")
    etag = first.headers["ETag"]
    again = client.get("/api/run", headers={"If-None-Match": etag})
    assert (again.status_code, again.content) == (304, b"")
    run.metrics.write(2, {"reward/mean": 0.5})
    later = client.get("/api/run", headers={"If-None-Match": etag})
    assert later.status_code == 200
    assert later.headers["ETag"] != etag
    assert client.get("/api/metrics?key=reward/mean").json()["reward/mean"][-1] == [2, 0.5]


@pytest.mark.parametrize(
    ("path", "status", "message"),
    [
        ("/api/groups?sort=colour", 422, "sort=colour"),
        ("/api/groups?page=0", 422, "page=0"),
        ("/api/groups?page=x", 422, "page=x"),
        ("/api/groups?size=100000", 422, "size=100000"),
        ("/api/groups?reward_min=high", 422, "reward_min=high"),
        ("/api/groups?reward_min=nan", 422, "reward_min"),
        ("/api/groups?rewards_min=1", 422, "rewards_min"),
        (f"/api/groups?text={'x' * 201}", 422, "at most 200"),
        ("/api/groups/seven", 422, "group_id=seven"),
        ("/api/groups/99", 404, "no group 99"),
        ("/api/groups/-1", 404, "no group -1"),
        (f"/api/groups/{10**30}", 404, "no group 1"),
        ("/api/metrics", 422, "key"),
    ],
)
def test_wrong_input_is_named(client: TestClient, path: str, status: int, message: str) -> None:
    response = client.get(path)
    assert response.status_code == status
    assert message in response.json()["error"]


@pytest.mark.parametrize("path", ["/static/../server.py", "/static/%2e%2e/server.py", "/docs"])
def test_nothing_but_the_page_is_served(client: TestClient, path: str) -> None:
    assert client.get(path).status_code == 404


@pytest.mark.parametrize("method", ["post", "put", "delete"])
def test_nothing_can_be_changed(client: TestClient, method: str) -> None:
    assert getattr(client, method)("/api/groups").status_code == 405


@pytest.mark.parametrize(
    ("host", "status"),
    [("127.0.0.1:8471", 200), ("localhost:1", 200), ("evil.example", 400), ("127.0.0.1.evil", 400)],
)
def test_only_names_of_loopback_are_answered(client: TestClient, host: str, status: int) -> None:
    for path in ("/", "/api/run", "/static/main.js"):
        assert client.get(path, headers={"Host": host}).status_code == status


def test_the_policy_allows_no_foreign_and_no_inline_code(client: TestClient) -> None:
    for path in ("/", "/api/run", "/static/main.js", "/nowhere"):
        headers = client.get(path).headers
        policy = dict(
            part.strip().split(" ", 1) for part in headers["Content-Security-Policy"].split(";")
        )
        assert policy["default-src"] == "'none'"
        assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
        assert headers["X-Content-Type-Options"] == "nosniff"
    assert client.get("/").text.count("<script") == 1


def test_a_log_that_cannot_be_read_is_an_answer(tmp_path: Path) -> None:
    run = sums_run(tmp_path / "run", 1, 1, 2)
    client = TestClient(build_app(RunData(run.path)), base_url=HOST)
    (run.path / "ledger.sqlite").write_bytes(b"no data base" * 500)
    (run.path / "ledger.sqlite-wal").unlink()
    response = client.get("/api/groups/0")
    assert response.status_code == 500
    assert "ledger.sqlite cannot be read" in response.json()["error"]


def test_the_verb_serves_until_it_is_stopped(run: SyntheticRun) -> None:
    command = [sys.executable, "-m", "deploy.cli", "inspect", str(run.path), "--port", "0"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        url = process.stdout.readline().split()[0]
        assert url.startswith("http://127.0.0.1:")
        with urllib.request.urlopen(f"{url}api/run", timeout=30) as response:
            assert b'"name":"sums"' in response.read()
    finally:
        process.terminate()
        process.wait(30)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "there is no run in nowhere"),
        (["{run}", "--ledger", "--html", "x.html"], "--html: no option of --ledger"),
        (["{run}", "--html", "x.html", "--port", "1"], "--port: no option of --html"),
        (["{run}", "--steps", "3"], "--steps: no option of the page"),
        (["{run}", "--html", "x.html", "--steps", "0"], "both must be at least 1"),
        (["{run}", "--html", "/nowhere/x.html"], "/nowhere/x.html cannot be written"),
        (["{run}", "--port", "{port}"], "--port 0 takes a free one"),
        (["{run}", "--port", "70000"], "--port 70000: a port is from 0 to 65535"),
    ],
)
def test_mistakes_on_the_command_line(
    run: SyntheticRun, arguments: list[str], message: str, capsys: Any
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        said = [part.format(run=run.path, port=port) for part in arguments]
        assert main(["inspect", *said]) == 2
    assert message in capsys.readouterr().err
