"""The documents: short, in plain sentences, and true where that can be checked."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator
from dataclasses import is_dataclass
from pathlib import Path
from typing import get_type_hints

import pytest
from docstrings import complaint, docstrings
from metric_table import PAGE, with_table
from source_tree import PACKAGES, ROOT, sources, tree

from common.config.sections import Config
from common.record.metric_names import METRICS, SUMMARY
from deploy.command.arguments import parse
from deploy.command.presets import load

READMES = sorted(
    path
    for path in ROOT.rglob("README.md")
    if not any(part.startswith(".") for part in path.relative_to(ROOT).parts)
)
DOCUMENTS = [*READMES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
FOLDERS = ("common", "actors", "learner", "deploy", "deploy/examples", "tests")
LIMITS = {"README.md": 900, "CONTRIBUTING.md": 700}
LINE = 160

documents = pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))


def code(text: str) -> list[str]:
    """Code spans and lines of code blocks; a line that ends with a backslash goes on."""
    fenced = re.findall(r"^```\w*\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    indented = re.findall(r"(?:^|\n)((?:    .*\n)+)", text)
    lines = "".join([*fenced, *indented]).replace("\\\n", " ").splitlines()
    return [line.strip() for line in lines] + re.findall(r"`([^`\n]+)`", text)


def headings(path: Path) -> set[str]:
    """Anchors of a document, as GitHub makes them."""
    found = re.findall(r"^#+ (.+)$", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-") for text in found}


@pytest.mark.parametrize(("name", "words"), LIMITS.items())
def test_a_short_document_stays_short(name: str, words: int) -> None:
    assert len((ROOT / name).read_text().split()) <= words


def test_every_folder_has_its_readme() -> None:
    assert all((ROOT / folder / "README.md").is_file() for folder in FOLDERS)
    linked = (ROOT / "README.md").read_text()
    assert all(f"]({folder}/README.md)" in linked for folder in FOLDERS)


@documents
def test_no_line_is_longer_than_a_screen(path: Path) -> None:
    lines = path.read_text().splitlines()
    assert not [line for line in lines if len(line) > LINE and not line.startswith("|")]


@documents
def test_every_link_leads_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text()):
        if target.startswith(("http://", "https://")):
            continue
        file, _, anchor = target.partition("#")
        there = (path.parent / file).resolve() if file else path
        assert there.exists(), f"{path.relative_to(ROOT)} links to {target}"
        assert not anchor or anchor in headings(there), f"{there} has no heading {anchor}"


def named_files(text: str) -> Iterator[str]:
    for span in code(text):
        yield from re.findall(r"(?<![\w./<{*])[\w.-]+(?:/[\w.-]+)*\.(?:py|sh|svg|png)\b", span)


@documents
def test_every_file_that_is_named_is_there(path: Path) -> None:
    """From the document's folder, from the top, or by its name alone somewhere below."""
    made_by_the_reader = {"agent.py", "rewards.py"}
    for name in set(named_files(path.read_text())) - made_by_the_reader:
        places = (path.parent / name, ROOT / name)
        below = list(path.parent.rglob(name)) if "/" not in name else []
        assert any(place.exists() for place in places) or below, f"{path}: {name}"


@documents
def test_every_method_that_is_named_is_there(path: Path) -> None:
    """`Class.method` of ours, as in CONTRIBUTING's way of a group."""
    methods = {
        f"{node.name}.{child.name}"
        for package in PACKAGES
        for source in sources(package)
        for node in ast.walk(tree(source))
        if isinstance(node, ast.ClassDef)
        for child in node.body
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    named = {
        name
        for span in code(path.read_text())
        for name in re.findall(r"\b[A-Z]\w*[a-z]\w*\.[a-z_]\w*\b(?!/)", span)
    }
    made_up = {"Class.method", "LLM.generate"}
    assert named - made_up <= methods


def test_the_picture_names_files_that_are_there() -> None:
    names = re.findall(r'class="file"[^>]*>([^<]+)<', (ROOT / "data-flow.svg").read_text())
    assert len(names) >= 5
    assert all((ROOT / name).is_file() for name in names)


@documents
def test_every_command_is_one(path: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for line in code(path.read_text()):
        if not re.match(r"(\$ )?(make|ray|python|\.venv/bin/grpo-lambda|source) ", line):
            continue
        words = shlex.split(line.removeprefix("$ "), comments=True)
        if words[0] == "make":
            assert {word for word in words[1:] if "=" not in word} <= targets, line
        elif "deploy.cli" in words:
            check_command(words[words.index("deploy.cli") + 1 :])
        elif words[0].endswith("bin/grpo-lambda"):
            check_command(words[1:])


def check_command(words: list[str]) -> None:
    """What `grpo-lambda` would make of the words, short of starting anything."""
    options = parse(words)
    if options.verb in ("train", "plan"):
        config = options.config and ROOT / options.config
        overrides = [w for w in options.overrides if not w.startswith("resume=runs/")]
        load(config, overrides)


def keys_of(node: type, prefix: str = "") -> Iterator[str]:
    """Dotted keys of a section of the configuration, those of sections too."""
    for name, kind in get_type_hints(node).items():
        yield f"{prefix}{name}"
        if is_dataclass(kind):
            yield from keys_of(kind, f"{prefix}{name}.")


@pytest.mark.parametrize("path", DOCUMENTS[:-1], ids=lambda path: str(path.relative_to(ROOT)))
def test_every_configuration_key_is_one(path: Path) -> None:
    """Not in the changelog, which names what was."""
    known = set(keys_of(Config))
    sections = "|".join(sorted({key.split(".")[0] for key in known if "." in key} - {"ray"}))
    for span in code(path.read_text()):
        for key in re.findall(rf"(?<![\w./-])((?:{sections}|ray)(?:\.\w+)+)(?![\w(/])", span):
            free = ".".join(key.split(".")[:2]).endswith((".labels", ".resources"))
            library = key.startswith("ray.") and f"{key}=" not in span and key not in known
            file = key.endswith((".jsonl", ".json", ".py", ".sqlite"))
            module = (ROOT / f"{key.replace('.', '/')}.py").is_file()
            free = free or re.search(r"^algorithm\.\w+\.args\.", key)  # a rule's arguments
            assert key in known or free or library or file or module, f"{key} in {span}"


def test_the_reference_of_metrics_is_up_to_date() -> None:
    text = PAGE.read_text()
    assert with_table(text) == text, "run `python tests/support/metric_table.py`"


def spoken_of() -> dict[str, set[str]]:
    """Texts in the sources that look like a metric's name, with the files that hold them."""
    families = {name.split("/")[0] for name in (*METRICS, *SUMMARY) if "/" in name}
    pattern = re.compile(rf'"((?:{"|".join(sorted(families))})/[a-z_]+)"')
    found: dict[str, set[str]] = {}
    for package in PACKAGES:
        for path in sources(package):
            if path.name != "metric_names.py":
                for name in pattern.findall(path.read_text()):
                    found.setdefault(name, set()).add(str(path.relative_to(ROOT)))
    return found


def test_every_metric_that_is_spoken_of_is_in_the_table() -> None:
    assert set(spoken_of()) - {"tokens/s"} <= {*METRICS, *SUMMARY}


@pytest.mark.parametrize("name", [*METRICS, *SUMMARY])
def test_every_metric_of_the_table_is_written_where_it_says(name: str) -> None:
    metric = {**METRICS, **SUMMARY}[name]
    assert f'"{name}"' in (ROOT / metric.writer).read_text()
    assert metric.meaning.endswith(".")


@pytest.mark.parametrize("package", PACKAGES)
def test_a_docstring_begins_with_a_sentence_that_stands_alone(package: str) -> None:
    offenders = [
        f"{path.relative_to(ROOT)}:{line} {name} {wrong}"
        for path in sources(package)
        for line, name, text in docstrings(path)
        if (wrong := complaint(text))
    ]
    assert not offenders, "\n".join(offenders)


def test_what_a_leaning_docstring_is() -> None:
    for text in (
        "Of each generator.",
        "As those of generators.",
        "There is.",
        "of no use.",
        "The same.",
    ):
        assert complaint(text)
    for text in (
        "vLLM's engine.",
        "`trace`: inside the ratio.",
        "As soon as it ends, say so.",
        "0 is off.",
    ):
        assert complaint(text) is None
