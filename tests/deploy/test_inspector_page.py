"""The inspector's page in a real browser: Debian's Chromium, driven by Playwright."""

from __future__ import annotations

import re
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import uvicorn
from inspector_runs import TEMPLATE, Sample, SyntheticRun, sums_run
from measured_runs import write_measured
from playwright.sync_api import Browser, Locator, Page, expect, sync_playwright

from common.record.credit_log import credit_schema, read_credit, read_group_credit, write_credit
from common.record.trajectory_log import read_log
from deploy.credit.measured import standard_error
from deploy.inspector.run_data import RunData
from deploy.inspector.server import build_app
from deploy.inspector.single_file import write_html

CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no `chromium` on PATH")
ARGUMENTS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
]
HOSTILE = [
    "<script>document.title = 'taken'</script>",
    "</script><img src=x onerror=\"document.title='taken'\">",
    "</span></article><h1>taken</h1><!--",
]
MEASURED = {
    0: {0: [1.0, 0.0, 0.0, 0.0], 3: [1.0, 1.0, 0.0, 0.0], 7: [1.0] * 4},
    3: {0: [0.0] * 4, 2: [], 5: [1.0, 0.0, 0.0]},
}
"""Of completions of group 9: rewards of continuations by the tokens before them."""
AA = 4.5
"""The contrast that WCAG 2 asks of text (level AA)."""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> SyntheticRun:
    """Fourteen steps of four groups, and a last group of texts that would like to be markup."""
    made = sums_run(tmp_path_factory.mktemp("runs") / "shown", steps=14, tokens=HOSTILE[1:])
    samples = [
        Sample(HOSTILE[0], 1.0, guidance=5),
        Sample(HOSTILE[1], 0.0),
        Sample(HOSTILE[2], None, verdict="timeout"),
        Sample("", 0.5, ids=[195, 40, 255, 230, 151], finish="length"),
        Sample("sept fois huit égale 56 €\n\tなるほど", 0.5, versions=(12, 13)),
    ]
    group_id = max(made.groups) + 1
    made.group(group_id, '<b>Prompt</b> & "more"', samples, 13)
    made.step(15, [group_id])
    judge_evenly(made.path, 3)
    write_measured(made.path, 3, made.groups[9], MEASURED)
    return made


def judge_evenly(run: Path, step: int) -> None:
    """The credit of `step` under a rule that gives every token the same."""
    rows = read_credit(run, step).to_pylist()
    for row in rows:
        if row["trained"]:
            row["trace_weights"] = [1.0] * len(row["logprobs"])
            row["advantages"] = [row["advantage"]] * len(row["logprobs"])
    write_credit(run, step, pa.RecordBatch.from_pylist(rows, schema=credit_schema()), "grpo")


@pytest.fixture(scope="module")
def served(run: SyntheticRun) -> Iterator[str]:
    with serving(run.path) as url:
        yield url


class serving:
    """The inspector's server of a run, in a thread."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket()
        self._socket.bind(("127.0.0.1", 0))
        config = uvicorn.Config(build_app(RunData(path)), log_level="error", lifespan="off")
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, args=([self._socket],))

    def __enter__(self) -> str:
        self._thread.start()
        return f"http://127.0.0.1:{self._socket.getsockname()[1]}/"

    def __exit__(self, *_: object) -> None:
        self._server.should_exit = True
        self._thread.join(30)
        self._socket.close()


@pytest.fixture(scope="module")
def file(run: SyntheticRun, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("files") / "sample.html"
    write_html(run.path, path, steps=100)
    return path.as_uri()


@pytest.fixture
def open_page(browser: Browser) -> Iterator[Callable[..., Page]]:
    """Opens pages; an error in any of them, the console's included, fails the test."""
    contexts, errors = [], []

    def opened(url: str, width: int = 1400, scheme: Any = "light") -> Page:
        context = browser.new_context(
            viewport={"width": width, "height": 900}, color_scheme=scheme, reduced_motion="reduce"
        )
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(20_000)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda said: said.type == "error" and errors.append(said.text))
        page.on(
            "request",
            lambda request: errors.append(request.url) if foreign(request.url, url) else None,
        )
        page.goto(url)
        return page

    yield opened
    for context in contexts:
        context.close()
    assert not errors


def foreign(asked: str, of: str) -> bool:
    return not asked.startswith(re.sub(r"[#?].*", "", of))


@pytest.fixture(params=["served", "file"])
def url(request: pytest.FixtureRequest) -> str:
    """The page from the server and the page from the disk: they show the same."""
    found: str = request.getfixturevalue(request.param)
    return found


def column(page: Page, name: str) -> list[str]:
    """The cells of a column, once the rows that its heading asks for are there."""
    expect(page.locator("#table")).to_have_attribute("aria-busy", "false")
    names = page.locator("#columns th").all_inner_texts()
    place = next(i for i, shown in enumerate(names) if shown.startswith(name))
    return page.locator(f"#rows tr td:nth-child({place + 1})").all_inner_texts()


def numbers(texts: list[str]) -> list[float]:
    return [float(text) for text in texts if text != "–"]


def test_the_first_look_shows_curves_and_the_groups_of_the_newest_steps(
    url: str, open_page: Callable[..., Page]
) -> None:
    page = open_page(url)
    expect(page.locator("#rows tr")).to_have_count(50)
    assert page.locator("h1").inner_text() == "shown"
    assert numbers(column(page, "Group"))[:9] == [57, *range(52, 56), *range(48, 52)]
    assert column(page, "Step")[:9] == ["15", *["14"] * 4, *["13"] * 4]
    expect(page.locator("#charts figure")).to_have_count(4)
    page.locator("summary", has_text="Choose curves").click()
    page.get_by_role("checkbox", name="lambda_grpo/preference").check()
    expect(page.locator("#charts figure")).to_have_count(5)
    assert "curves=" in page.url


def test_a_row_shows_the_question_without_its_template(
    url: str, run: SyntheticRun, open_page: Callable[..., Page]
) -> None:
    page = open_page(url)
    shown = dict(zip(column(page, "Group"), column(page, "Question"), strict=True))
    assert len(shown) == 50
    for group, question in shown.items():
        assert question == run.groups[int(group)]["question"][0].as_py()
        assert "<|im_start|>" not in question


def test_a_group_that_no_step_trained_on_comes_last(
    url: str, run: SyntheticRun, open_page: Callable[..., Page]
) -> None:
    """The run's end cut it off: as the newest group it would be all that one sees."""
    page = open_page(f"{url}#page=2")
    expect(page.locator("#rows tr")).to_have_count(8)
    assert (column(page, "Group")[-1], column(page, "Step")[-1]) == ("56", "–")


def test_a_column_sorts_both_ways_and_pages_follow(
    url: str, open_page: Callable[..., Page]
) -> None:
    page = open_page(url)
    page.get_by_role("button", name="Mean length").click()
    expect(page.locator("th[aria-sort=descending]")).to_contain_text("Mean length")
    first = numbers(column(page, "Mean length"))
    page.get_by_role("button", name="Next").click()
    expect(page.locator("#rows tr")).not_to_have_count(50)
    whole = first + numbers(column(page, "Mean length"))
    assert whole == sorted(whole, reverse=True)
    page.get_by_role("button", name="Mean length").click()
    expect(page.locator("th[aria-sort=ascending]")).to_contain_text("Mean length")
    expect(page.locator("#page-number")).to_have_text("Page 1 of 2")
    assert numbers(column(page, "Mean length")) == sorted(whole)[:50]


def test_filters_narrow_the_table(
    url: str, run: SyntheticRun, open_page: Callable[..., Page]
) -> None:
    page = open_page(url)
    page.get_by_label("step, at least").fill("3")
    page.get_by_label("step, at most").fill("5")
    page.get_by_label("step, at most").press("Enter")
    expect(page.locator("#count")).to_have_text("12 groups")
    assert set(column(page, "Step")) == {"3", "4", "5"}
    page.get_by_label("reward, at least").fill("0.6")
    page.get_by_label("reward, at least").press("Enter")
    expect(page.locator("#count")).not_to_have_text("12 groups")
    assert all(reward >= 0.6 for reward in numbers(column(page, "Mean reward")))
    page.get_by_role("button", name="Clear").click()
    expect(page.locator("#rows tr")).to_have_count(50)
    page.get_by_label("Text in prompt or completion").fill("ÉGALE 56")
    page.get_by_label("Text in prompt or completion").press("Enter")
    expect(page.locator("#count")).to_have_text("1 group")
    assert column(page, "Group") == [str(max(run.groups))]


def test_a_click_on_a_step_shows_its_groups(url: str, open_page: Callable[..., Page]) -> None:
    page = open_page(url)
    area = page.locator("[data-metric='reward/mean']")
    box = area.bounding_box()
    assert box is not None
    # Steps 1 to 15 lie between the axis, 44 px in, and the edge, 10 px before the end.
    where = {"x": 44 + (box["width"] - 54) * 6 / 14, "y": 60}
    area.hover(position=where)  # type: ignore[arg-type]
    expect(page.locator("figure", has=area).locator(".readout")).to_contain_text("step 7: ")
    area.click(position=where)  # type: ignore[arg-type]
    expect(page.locator("#count")).to_have_text("4 groups")
    assert set(column(page, "Step")) == {"7"}


def details(page: Page) -> dict[str, str]:
    return {
        item.get_attribute("data-value") or "": item.inner_text()
        for item in page.locator("#token-details dd").all()
    }


def test_hovering_tells_the_credit_logs_own_numbers(
    url: str, run: SyntheticRun, open_page: Callable[..., Page]
) -> None:
    page = open_page(f"{url}#group=9")
    credit = read_group_credit(run.path, 3, 9).to_pylist()
    logged = next(b for b in read_log(run.path / "trajectories") if b["group_id"][0].as_py() == 9)
    for index in (0, 3, 7):
        ids = logged["token_ids"][index].as_py()
        for place in (0, len(ids) // 2, len(ids) - 1):
            card = page.locator(f"article[aria-label='Completion {index}']")
            card.locator(".token").nth(place).hover()
            shown, row = details(page), credit[index]
            assert shown["token"] == f"{place + 1} of {len(ids)}"
            assert shown["id"] == str(ids[place])
            for name, column_name in (
                ("λ-advantage", "advantages"),
                ("trace weight", "trace_weights"),
                ("log π learner", "logprobs"),
                ("log π scorer", "scores"),
                ("critic's value", "values"),
            ):
                assert np.float32(shown[name]) == np.float32(row[column_name][place]), name
            sampler = logged["behaviour_logprobs"][index].as_py()[place]
            assert np.float32(shown["log π sampler"]) == np.float32(sampler)
            ratio = row["logprobs"][place] - sampler
            assert float(shown["log ratio"]) == pytest.approx(ratio, abs=1e-6)
            assert float(shown["ratio"]) == pytest.approx(np.exp(ratio), abs=1e-6)


def test_a_group_offers_what_it_has_numbers_of(url: str, open_page: Callable[..., Page]) -> None:
    page = open_page(f"{url}#group=9")
    for label in ("scorer's log-ratio", "critic's value"):
        page.get_by_label(label).check()
        field = page.locator("article[aria-label='Completion 0'] .tokens")
        assert background(field, 0) != background(field, field.locator(".token").count() - 1)
    page.goto(f"{url}#group=40")  # of another step
    expect(page.locator("#group-title")).to_have_text("Group 40")
    expect(page.get_by_label("critic's value")).to_have_count(0)


def test_the_value_curve_stands_above_the_tokens(
    url: str, run: SyntheticRun, open_page: Callable[..., Page]
) -> None:
    page = open_page(f"{url}#group=9")
    rows = run.groups[9].to_pylist()
    expect(page.locator("figure.values")).to_have_count(len(MEASURED))
    for index, branches in MEASURED.items():
        card = page.locator(f"article[aria-label='Completion {index}']")
        curve, length = card.locator("figure.values"), len(rows[index]["token_ids"])
        known = {at: np.mean(rewards) for at, rewards in branches.items() if rewards}
        known[length] = rows[index]["reward"]
        y_of = levels(curve)
        circles = curve.locator("circle").all()
        places = [(number(c, "cx"), y_of(number(c, "cy"))) for c in circles]
        assert [value for _, value in places] == pytest.approx(list(known.values()), abs=0.01)
        first, last = places[0][0], places[-1][0]
        at = [(x - first) / (last - first) * length for x, _ in places]
        assert at == pytest.approx(list(known), abs=0.05)
        # The first value's band reaches two of its standard errors to both sides.
        error = standard_error(branches[0], (0.0, 1.0))
        band = re.findall(r"[ML]([\d.-]+),([\d.-]+)", path_of(curve.locator(".band").first))
        ends = [y_of(float(y)) for x, y in band if float(x) == pytest.approx(first, abs=0.06)]
        expected = [known[0] + 2 * error, known[0] - 2 * error]
        assert ends == pytest.approx(expected, abs=0.01)
        box, tokens = curve.bounding_box(), card.locator(".tokens").bounding_box()
        assert box and tokens and box["y"] + box["height"] <= tokens["y"]
    gap = page.locator("article[aria-label='Completion 3'] figure.values")
    expect(gap.locator(".band")).to_have_count(2)  # no line over what was not measured
    label = gap.locator("svg").get_attribute("aria-label") or ""
    assert "before token 3 not known" in label and "the reward" in label
    page.locator("article[aria-label='Completion 0'] .token").nth(4).hover()
    assert details(page)["measured"].startswith("0.5 ± ")
    page.locator("article[aria-label='Completion 1'] .token").nth(4).hover()
    assert "measured" not in details(page)


def levels(curve: Locator) -> Callable[[float], float]:
    """The value that a height in the picture stands for, by its grid."""
    heights = [number(line, "y1") for line in curve.locator("line.grid").all()]
    values = [float(text) for text in curve.locator("text[text-anchor=end]").all_text_contents()]
    (low, high), (bottom, top) = (values[0], values[len(heights) - 1]), (heights[0], heights[-1])
    return lambda y: low + (bottom - y) / (bottom - top) * (high - low)


def number(element: Locator, name: str) -> float:
    return float(element.get_attribute(name) or "nan")


def path_of(element: Locator) -> str:
    return element.get_attribute("d") or ""


def test_another_rule_stands_beside_the_runs(
    url: str, run: SyntheticRun, open_page: Callable[..., Page]
) -> None:
    page = open_page(f"{url}#group=9")
    fields = page.locator("article[aria-label='Completion 0'] .tokens")
    expect(fields).to_have_count(1)
    page.get_by_label("grpo").check()
    expect(fields).to_have_count(2)
    assert "rule=grpo" in page.url
    mine = read_group_credit(run.path, 3, 9).to_pylist()[0]
    theirs = read_group_credit(run.path, 3, 9, "grpo").to_pylist()[0]
    for place, (field, row) in enumerate([(fields.nth(0), mine), (fields.nth(1), theirs)]):
        last = len(row["advantages"]) - 1
        field.locator(".token").nth(0).hover()
        shown = details(page)
        assert shown["credit of"] == ("the run", "grpo")[place]
        assert np.float32(shown["λ-advantage"]) == np.float32(row["advantages"][0])
        assert np.float32(shown["trace weight"]) == np.float32(row["trace_weights"][0])
        colours = [background(field, index) for index in (0, last)]
        assert (colours[0] == colours[1]) == (place == 1)  # one scale for both
    page.reload()
    expect(fields).to_have_count(2)
    page.get_by_label("none").check()
    expect(fields).to_have_count(1)
    page.goto(f"{url}#group=1")
    expect(page.get_by_text("Beside the run")).to_have_count(0)  # nobody asked about its step


def background(field: Any, index: int) -> str:
    shown = field.locator(".token").nth(index)
    found: str = shown.evaluate("element => getComputedStyle(element).backgroundColor")
    return found


def test_colours_follow_the_chosen_quantity(url: str, open_page: Callable[..., Page]) -> None:
    page = open_page(f"{url}#group=40")
    token = page.locator("article .token").first
    seen = {}
    for label in (
        "λ-advantage",
        "trace weight",
        "log-probability ratio",
        "weight version",
        "loss mask",
    ):
        page.get_by_label(label).check()
        expect(page.locator("#legend")).not_to_be_empty()
        seen[label] = (
            token.evaluate("e => e.style.backgroundColor"),
            page.locator("#legend").inner_text(),
        )
    assert len({legend for _, legend in seen.values()}) == 5
    assert "colour=in_loss" in page.url
    assert "in the loss" in seen["loss mask"][1]


def test_the_sign_and_the_size_of_credit_are_in_the_colour(
    served: str, run: SyntheticRun, open_page: Callable[..., Page]
) -> None:
    page = open_page(f"{served}#group=9")
    expect(page.locator("article")).to_have_count(8)
    credit = read_group_credit(run.path, 3, 9).to_pylist()
    strengths = []
    for index, row in enumerate(credit):
        spans = page.locator(f"article[aria-label='Completion {index}'] .token")
        colours = spans.evaluate_all("all => all.map(e => e.style.backgroundColor)")
        for colour, advantage in zip(colours, row["advantages"], strict=True):
            red, _, blue = map(int, re.findall(r"\d+", colour))
            assert (blue - red > 0) == (advantage > 0) or red == blue
            strengths.append((abs(advantage), 255 - min(red, blue), advantage > 0))
    for positive in (True, False):
        sizes = sorted((a, c) for a, c, sign in strengths if sign == positive)
        assert [c for _, c in sizes] == sorted(c for _, c in sizes)


def test_texts_of_the_model_are_never_markup(
    url: str, run: SyntheticRun, open_page: Callable[..., Page]
) -> None:
    page = open_page(f"{url}#group={max(run.groups)}")
    expect(page.locator("article")).to_have_count(5)
    assert page.locator("article[aria-label='Completion 1'] .token").count() == 2  # and the end
    for index, text in enumerate(HOSTILE):
        tokens = page.locator(
            f"article[aria-label='Completion {index}'] .token"
        ).all_text_contents()
        assert "".join(tokens) == f"{text}<|end|>"
    prompt = page.locator("pre.prompt").first.inner_text()
    assert prompt == TEMPLATE.format('<b>Prompt</b> & "more"')
    assert page.locator("main img, main script, main h1, pre b").count() == 0
    assert page.title() == "shown · grpo-lambda inspect"
    broken = page.locator("article[aria-label='Completion 3'] .token")
    assert broken.count() == 5
    whole = page.locator("article[aria-label='Completion 4'] .token").all_text_contents()
    assert "".join(whole).replace("·", "") == "sept fois huit égale 56 €↵\n→\tなるほど<|end|>"
    guided = page.locator("article[aria-label='Completion 0'] .guided")
    assert "".join(guided.all_text_contents()) == HOSTILE[0][:5]
    assert page.locator("article", has_text="not trained on").count() == 1


def test_the_keyboard_is_enough(served: str, open_page: Callable[..., Page]) -> None:
    page = open_page(served)
    expect(page.locator("#rows tr")).to_have_count(50)
    reach(page, "document.activeElement.dataset.metric === 'reward/mean'")
    for key in ("Home", "ArrowRight", "ArrowRight", "Enter"):
        page.keyboard.press(key)
    expect(page.locator("#count")).to_have_text("4 groups")
    assert set(column(page, "Step")) == {"3"}
    reach(page, "document.activeElement.dataset.column === 'reward'")
    page.keyboard.press("Enter")
    expect(page.locator("th[aria-sort=descending]")).to_contain_text("Mean reward")
    reach(page, "document.activeElement.closest('#rows')")
    page.keyboard.press("Enter")
    expect(page.locator("article")).to_have_count(8)
    reach(page, "document.activeElement.name === 'colour'")
    page.keyboard.press("ArrowRight")
    expect(page.get_by_label("trace weight")).to_be_checked()
    reach(page, "document.activeElement.classList.contains('token')")
    assert details(page)["token"].startswith("1 of ")
    page.keyboard.press("ArrowRight")
    assert details(page)["token"].startswith("2 of ")
    outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid"
    page.keyboard.press("End")
    shown = details(page)["token"].split(" of ")
    assert shown[0] == shown[1]
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.closest('article').ariaLabel") == "Completion 1"


def reach(page: Page, condition: str) -> None:
    for _ in range(120):
        if page.evaluate(f"Boolean({condition})"):
            return
        page.keyboard.press("Tab")
    raise AssertionError(f"Tab does not lead to {condition}")


def test_the_address_brings_everything_back(url: str, open_page: Callable[..., Page]) -> None:
    page = open_page(url)
    page.get_by_role("button", name="Reward spread").click()
    page.get_by_label("staleness, at most").fill("0")
    page.get_by_label("staleness, at most").press("Enter")
    expect(page.locator("#count")).not_to_have_text("58 groups")
    before = page.locator("#rows").inner_text()
    page.locator("#rows a").nth(2).click()
    expect(page.locator("article")).to_have_count(8)
    page.get_by_label("weight version").check()
    title = page.locator("#group-title").inner_text()
    page.reload()
    expect(page.locator("#group-title")).to_have_text(title)
    expect(page.get_by_label("weight version")).to_be_checked()
    page.go_back()
    expect(page.get_by_label("λ-advantage")).to_be_checked()
    page.go_back()
    expect(page.locator("#overview")).to_be_visible()
    assert page.locator("#rows").inner_text() == before
    expect(page.get_by_label("staleness, at most")).to_have_value("0")
    expect(page.locator("th[aria-sort=descending]")).to_contain_text("Reward spread")
    page.go_forward()
    expect(page.locator("#group-title")).to_have_text(title)


def test_a_narrow_window_is_enough(
    url: str, run: SyntheticRun, open_page: Callable[..., Page]
) -> None:
    page = open_page(url, width=400)
    expect(page.locator("#rows tr")).to_have_count(50)
    for view in ("", f"group={max(run.groups)}"):
        page.evaluate(f"location.hash = '{view}'")
        expect(page.locator("#group" if view else "#overview")).to_be_visible()
        assert page.evaluate("document.documentElement.scrollWidth") <= 400
        cards = page.locator("article" if view else "figure")
        widths = cards.evaluate_all("all => all.map(e => e.clientWidth)")
        assert len(widths) >= 4
        assert all(width > 330 for width in widths)


def test_a_live_run_is_followed_until_it_is_paused(
    tmp_path: Path, open_page: Callable[..., Page]
) -> None:
    run = sums_run(tmp_path / "live", steps=2, per_step=2, size=2)
    with serving(run.path) as url:
        page = open_page(f"{url}#sort=group&text=What")
        expect(page.locator("#count")).to_have_text("5 groups")
        page.locator("#rows a").first.focus()
        run.group(77, "What is new?", [Sample("this", 1.0), Sample("that")], 2)
        run.step(3, [77])
        expect(page.locator("#count")).to_have_text("6 groups", timeout=15_000)
        expect(page.locator("figure").first.locator(".readout")).to_contain_text("step 3: 0.5")
        assert page.evaluate("document.activeElement.dataset.group") == "0"
        assert "text=What" in page.url
        page.get_by_role("button", name="Pause").click()
        expect(page.locator("#status")).to_have_text("Paused")
        run.group(78, "What is newer?", [Sample("this", 1.0)], 3)
        time.sleep(4.5)  # longer than between two looks
        assert page.locator("#count").inner_text() == "6 groups"
        page.get_by_role("button", name="Go on").click()
        expect(page.locator("#count")).to_have_text("7 groups", timeout=15_000)


def luminance(colour: str) -> float:
    """WCAG 2.2's relative luminance of `rgb(r, g, b)`."""
    shares = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
    linear = [s / 12.92 if s <= 0.04045 else ((s + 0.055) / 1.055) ** 2.4 for s in shares]
    return float(np.dot([0.2126, 0.7152, 0.0722], linear))


def contrast(a: str, b: str) -> float:
    high, low = sorted((luminance(a), luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


TEXTS = """() => {
  const solid = (e) => {
    for (; e; e = e.parentElement) {
      const colour = getComputedStyle(e).backgroundColor;
      if (!colour.endsWith(', 0)') && colour !== 'transparent') return colour;
    }
  };
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  const found = [];
  while (walker.nextNode()) {
    const e = walker.currentNode.parentElement;
    if (!walker.currentNode.data.trim() || !e.checkVisibility()) continue;
    const style = getComputedStyle(e);
    const colour = e.closest('svg') ? style.fill : style.color;
    found.push([walker.currentNode.data.trim().slice(0, 40), colour, solid(e)]);
  }
  return found;
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_an_episode_is_shown_turn_by_turn(
    tmp_path: Path, open_page: Callable[..., Page], scheme: str
) -> None:
    made = SyntheticRun(tmp_path / "episodes")
    said = "2*3?" + "[is 6]" + "It is 6."
    turns: list[tuple[int, int, float | None]] = [(0, 4, None), (10, 19, 0.5)]
    played = Sample(said, 1.0, turns=turns, calls=(2, 1))  # the end is a token too
    failed = Sample("2*3?", None, failure="timeout", turns=[(0, 5, None)], verdict="timeout")
    made.group(0, "What is 2 * 3?", [played, failed])
    made.step(1, [0])
    made.close()
    with serving(made.path) as url:
        page = open_page(f"{url}#group=0", scheme=scheme)
        first, second = (page.locator(f"article[aria-label='Completion {i}']") for i in range(2))
        expect(first.locator(".given")).to_have_count(6)
        assert "".join(first.locator(".given").all_text_contents()) == "[is 6]"
        marks = first.locator(".mark").all_text_contents()
        advantages = read_group_credit(made.path, 1, 0)["advantages"][0].as_py()
        credit = [sum(advantages[begin:end]) for begin, end, _ in turns]
        facts = [re.sub(r" · credit (\S+)$", "", mark) for mark in marks]
        assert facts == ["turn 1 · 2 tool calls · 1 failed", "given", "turn 2 · reward 0.5"]
        shown = [float(mark.split(" · credit ")[1]) for mark in (marks[0], marks[2])]
        assert shown == pytest.approx(credit, rel=1e-3)
        assert [part.inner_text() for part in first.locator(".said > div:not(.mark)").all()] == [
            "2*3?",
            said[10:] + "<|end|>",
        ]
        assert first.locator(".told").inner_text().endswith("[is 6]")
        assert "2 turns · 0.5 s in the environment" in first.locator("header").inner_text()
        assert "environment: timeout" in second.locator("header").inner_text()
        assert second.locator(".mark").count() == 0
        seen = set(map(tuple, page.evaluate(TEXTS)))
    assert not {found for found in seen if contrast(found[1], found[2]) < AA}


def test_the_value_curve_of_an_episode_knows_its_turns(
    tmp_path: Path, open_page: Callable[..., Page]
) -> None:
    made = SyntheticRun(tmp_path / "episodes")
    turns: list[tuple[int, int, float | None]] = [(2, 4, None), (10, 14, None), (16, 19, None)]
    made.group(0, "What is 2 * 3?", [Sample("..2*[is 6]It is 6..6", 1.0, turns=turns)])
    made.step(1, [0])
    branches = {2: [0.0, 0.0, 1.0, 0.0], 3: [1.0, 0.0, 0.0, 0.0], 10: [1.0, 1.0, 0.0, 1.0], 16: []}
    write_measured(made.path, 1, made.groups[0], {0: branches})
    made.close()
    with serving(made.path) as url:
        card = open_page(f"{url}#group=0").locator("article[aria-label='Completion 0']")
        curve = card.locator("figure.values")
        expect(curve).to_be_visible()  # `all` does not wait
        points = curve.locator("circle").all()
        first, last = number(points[0], "cx"), number(points[-1], "cx")
        length = len(made.groups[0]["token_ids"][0])
        scale = (last - first) / (length - 2)
        given = [
            (number(box, "x"), number(box, "x") + number(box, "width"))
            for box in curve.locator("rect.observed").all()
        ]
        at = [tuple(2 + (x - first) / scale for x in pair) for pair in given]
        expected = [(0, 2), (4, 10), (14, 16), (19, length)]
        assert at == [pytest.approx(each, abs=0.05) for each in expected]
        marks = [mark for mark in card.locator(".mark").all_text_contents() if "turn" in mark]
        errors = [standard_error(branches[t], (0.0, 1.0)) for t in (2, 10)]
        worth = [re.search(r" · measured (\S+) ± (\S+)$", mark) for mark in marks]
        assert worth[0] and worth[1:] == [None, None]  # the third turn's branch has no value
        assert float(worth[0][1]) == 0.5
        assert float(worth[0][2]) == pytest.approx(np.hypot(*errors), rel=1e-3)


def test_the_conversations_of_an_episode_are_marked_with_their_prompts(
    tmp_path: Path, open_page: Callable[..., Page]
) -> None:
    made = SyntheticRun(tmp_path / "episodes")
    parts = [(0, 6, "user: main<s>"), (6, 13, "user: a sub-task<s>")]
    turns = [(0, 6, None), (6, 13, None)]
    made.group(0, "Q?", [Sample("I ask.It is 6", 1.0, segments=parts, turns=turns, finish="turns")])
    made.close()
    with serving(made.path) as url:
        card = open_page(f"{url}#group=0").locator("article[aria-label='Completion 0']")
        marks = card.locator(".conversation summary")
        expect(marks).to_have_text(["conversation 1 of 2", "conversation 2 of 2"])
        marks.nth(1).click()
        expect(card.locator(".conversation .prompt").nth(1)).to_have_text(parts[1][2])
        expect(card.locator(".conversation .prompt").nth(1)).to_be_visible()
        assert "2 conversations" in card.locator("header").inner_text()
        texts = card.locator(".tokens").inner_text()
        assert texts.index("I") < texts.index("conversation 2") < texts.index("t i")


@pytest.mark.parametrize("single", [False, True])
def test_groups_are_found_by_turns_tool_errors_and_end(
    tmp_path: Path, open_page: Callable[..., Page], single: bool
) -> None:
    made = SyntheticRun(tmp_path / "episodes")
    two: list[tuple[int, int, float | None]] = [(0, 2, None), (4, 7, 0.5)]
    for group_id in range(6):
        cut = Sample("one two", 0.0, turns=two, finish="turns", calls=(2, group_id % 3))
        failed = Sample("one", None, failure="timeout", verdict="timeout")
        samples = [Sample("once", 1.0), cut if group_id % 2 else Sample("again", 0.0)]
        made.group(group_id, f"Q{group_id}", [*samples, failed] if group_id == 4 else samples)
    made.step(1, list(range(6)))
    made.close()
    file = tmp_path / "sample.html"
    write_html(made.path, file)

    def groups(page: Page) -> list[str]:
        expect(page.locator("#table")).to_have_attribute("aria-busy", "false")
        return page.locator("#rows a").all_inner_texts()

    with serving(made.path) as url:
        page = open_page(f"{file.as_uri() if single else url}#sort=group")
        expect(page.locator("#columns")).to_contain_text("Tool errors")
        page.get_by_label("turns, at least").fill("1.5")
        page.get_by_label("turns, at least").blur()
        expect(page.locator("#count")).to_contain_text("3 groups")
        assert groups(page) == ["1", "3", "5"]
        page.get_by_label("tool errors, at least").fill("1")
        page.get_by_label("tool errors, at least").blur()
        expect(page.locator("#count")).to_contain_text("2 groups")
        assert groups(page) == ["1", "5"]
        page.locator("#clear").click()
        page.get_by_label("An episode").select_option("timeout")
        expect(page.locator("#count")).to_contain_text("1 group")
        assert groups(page) == ["4"]
        page.reload()  # the address has it
        expect(page.get_by_label("An episode")).to_have_value("timeout")


def test_what_episodes_have_is_not_shown_of_answers(
    tmp_path: Path, open_page: Callable[..., Page]
) -> None:
    made = SyntheticRun(tmp_path / "answers")
    made.group(0, "Q", [Sample("once", 1.0), Sample("again", 0.0)])
    made.step(1, [0])
    made.close()
    with serving(made.path) as url:
        page = open_page(url)
        expect(page.locator("#rows tr")).to_have_count(1)
        assert "Tool errors" not in page.locator("#columns").inner_text()
        expect(page.get_by_label("An episode")).to_be_hidden()
        expect(page.get_by_label("turns, at least")).to_be_hidden()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_text_can_be_read(
    served: str, run: SyntheticRun, open_page: Callable[..., Page], scheme: str
) -> None:
    page = open_page(served, scheme=scheme)
    expect(page.locator("#rows tr")).to_have_count(50)
    page.locator("summary", has_text="Choose curves").click()
    seen = set(map(tuple, page.evaluate(TEXTS)))
    for quantity in ("advantage", "trace_weight", "log_ratio", "version", "in_loss"):
        for group in (9, 40, max(run.groups)):
            page.evaluate(f"location.hash = 'group={group}&colour={quantity}'")
            expect(page.locator("#group-title")).to_have_text(f"Group {group}")
            expect(page.locator(f"input[value={quantity}]")).to_be_checked()
            page.locator(".token").first.hover()
            seen |= set(map(tuple, page.evaluate(TEXTS)))
    assert len(seen) > 200
    unreadable = {found for found in seen if contrast(found[1], found[2]) < AA}
    assert not unreadable


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_one_function_of_colours_keeps_its_contrast_everywhere(
    served: str, open_page: Callable[..., Page], scheme: str
) -> None:
    page = open_page(served)
    found = page.evaluate(
        """async (scheme) => {
          const { shade, category } = await import('/static/colour.js');
          const shares = Array.from({ length: 401 }, (_, i) => (i - 200) / 160);
          return [...shares.map((share) => shade(share, scheme)),
            ...Array.from({ length: 12 }, (_, i) => category(i, scheme))];
        }""",
        scheme,
    )
    assert len(found) == 413
    text = [
        f"rgb({int(c['text'][1:3], 16)}, {int(c['text'][3:5], 16)}, {int(c['text'][5:7], 16)})"
        for c in found
    ]
    assert min(contrast(c["background"], t) for c, t in zip(found, text, strict=True)) >= AA


def test_the_file_says_what_it_leaves_out(
    run: SyntheticRun, tmp_path: Path, open_page: Callable[..., Page]
) -> None:
    path = tmp_path / "few.html"
    write_html(run.path, path, steps=3, groups=5)
    page = open_page(path.as_uri())
    expect(page.locator("#notes")).to_contain_text("5 of 58 groups")
    expect(page.locator("#count")).to_have_text("5 groups")
    expect(page.locator("#status")).to_have_text("A sample in one file")
    assert not page.locator("#pause").is_visible()
    html = path.read_text()
    assert html.count("</script>") == html.count("<script") == 2
    assert "http://" not in html.replace("http://www.w3.org/2000/svg", "")
