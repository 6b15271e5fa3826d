"""Completion scripts in the shells they are for: what Tab gives, and how fast."""

from __future__ import annotations

import os
import pty
import select
import shutil
import subprocess
import time
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from common.config.keys import hints_of_keys
from common.config.sections import Config
from deploy.command.arguments import parser
from deploy.command.completion import script, values_of
from deploy.command.presets import CONFIGS, RECIPES, config_files

FUNCTION = r"""
source "$1"; shift
COMP_LINE="$*" COMP_POINT=${#COMP_LINE} COMP_TYPE=9
[[ $BREAKS ]] && COMP_WORDBREAKS=$BREAKS
_grpo_lambda 2>&1
printf '%s\n' "${COMPREPLY[@]}"
"""


@pytest.fixture(scope="module")
def scripts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("completion")
    for shell in ("bash", "zsh", "fish"):
        (folder / shell).write_text(script(shell, parser()))
    return folder


def shell(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed here")
    return found


def in_bash(scripts: Path, line: str, folder: Path | None = None, breaks: str = "") -> list[str]:
    done = subprocess.run(
        [shell("bash"), "--norc", "-c", FUNCTION, "bash", str(scripts / "bash"), line],
        cwd=folder,
        env={"PATH": os.environ["PATH"], "BREAKS": breaks},
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )
    return done.stdout.split()


CASES = {
    "grpo-lambda tr": ["train"],
    "grpo-lambda train batch.": [
        "batch.prompts_per_step=",
        "batch.group_size=",
        "batch.tokens_per_microbatch=",
    ],
    "grpo-lambda plan steps=3 algorithm.credit.tra": ["algorithm.credit.trace="],
    "grpo-lambda inspect runs/x --le": ["--ledger"],
    "grpo-lambda train --conf": ["--config"],
    "grpo-lambda completion f": ["fish"],
    "grpo-lambda recipes batch": [],
    "grpo-lambda train nonsense.": [],
}
VALUES = {
    "recipe=grpo_lambda_re": ["grpo_lambda_recent", "grpo_lambda_recent_weight"],
    "algorithm.advantage.kind=tu": ["turn_return", "turn_anchor", "turn_outcome"],
    "learner.compile=t": ["true"],
    "steps=1": [],
    "generator.group_cap_s=": ["null"],
}


@pytest.mark.parametrize("line", CASES)
def test_bash_completes_verbs_options_and_keys(scripts: Path, line: str) -> None:
    assert in_bash(scripts, line) == CASES[line]


@pytest.mark.parametrize("word", VALUES)
def test_bash_completes_values_whether_or_not_it_cuts_words_there(scripts: Path, word: str) -> None:
    line, key = f"grpo-lambda train {word}", word.partition("=")[0]
    assert in_bash(scripts, line) == VALUES[word]
    whole = [f"{key}={value}" for value in VALUES[word]]
    assert in_bash(scripts, line, breaks=" \t") == whole


def test_bash_completes_presets_and_files(scripts: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("")
    (tmp_path / "runs").mkdir()
    found = in_bash(scripts, "grpo-lambda train --config ", tmp_path)
    presets = [str(entry.path) for entry in config_files(CONFIGS)]
    assert sorted(found) == sorted([*presets, "mine.yaml", "runs"])
    assert in_bash(scripts, "grpo-lambda train resume=ru", tmp_path) == ["runs"]


def test_a_person_at_a_bash_gets_an_answer_at_once(scripts: Path) -> None:
    """Tab on a real terminal; no Python runs, so the answer takes a few milliseconds."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.execve(shell("bash"), ["bash", "--norc", "-i"], {"PS1": "$ ", "PATH": ""})
    try:
        read_until(terminal, "$ ")
        os.write(terminal, f"source {scripts / 'bash'}\n".encode())
        read_until(terminal, "$ ", behind=f"source {scripts / 'bash'}")
        took = []
        for typed, shown in (
            ("grpo-lambda tr\t", "grpo-lambda train "),
            ("batch.gr\t", "batch.group_size="),
            ("8 recipe=kr\t", "8 recipe=krpo "),
        ):
            started = time.monotonic()
            os.write(terminal, typed.encode())
            read_until(terminal, shown)
            took.append(time.monotonic() - started)
        assert min(took) < 0.3
    finally:
        os.close(terminal)
        os.waitpid(pid, 0)


def read_until(terminal: int, wanted: str, behind: str = "") -> None:
    """Read until `wanted` is the last thing shown, somewhere behind `behind`."""
    seen, deadline = "", time.monotonic() + 20
    while not (behind in seen and seen[seen.find(behind) :].endswith(wanted)):
        ready, _, _ = select.select([terminal], [], [], max(0, deadline - time.monotonic()))
        assert ready, f"{wanted!r} was not shown, but {seen!r}"
        seen += os.read(terminal, 4096).decode(errors="replace").replace("\x1b[?2004h", "")


ZSH = r"""
compdef() { : }
compadd() { local words=("${(@)@[$@[(i)--]+1,-1]}"); print -l -- ${(M)words:#$PREFIX*} }
compset() { PREFIX="${PREFIX#*=}" }
_describe() {
    local found=("${(@P)2}")
    found=("${(@)found%%:*}")
    print -l -- ${(M)found:#$PREFIX*}
}
_files() { print FILES }
source $1; shift
words=(${=*}) CURRENT=${#words}; PREFIX=$words[CURRENT]
_grpo_lambda
"""


@pytest.mark.parametrize("line", [*CASES, *(f"grpo-lambda train {word}" for word in VALUES)])
def test_zsh_offers_the_same(scripts: Path, line: str) -> None:
    """zsh's own builtins print what they are given instead of completing with it."""
    done = subprocess.run(
        [shell("zsh"), "-f", "-c", ZSH, "zsh", str(scripts / "zsh"), line],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    expected = CASES.get(line, VALUES.get(line.rsplit(maxsplit=1)[-1]))
    assert (done.stdout.split(), done.stderr) == (expected, "")


@pytest.mark.parametrize("line", [*CASES, *(f"grpo-lambda train {word}" for word in VALUES)])
def test_fish_offers_the_same(scripts: Path, line: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [shell("fish"), "--no-config", "-c", f"source {scripts / 'fish'}; complete -C '{line}'"],
        cwd=tmp_path,
        env={**os.environ, "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )
    found = [row.partition("\t")[0] for row in done.stdout.splitlines()]
    expected = CASES.get(line)
    if expected is None:
        word = line.rsplit(maxsplit=1)[-1]
        expected = [f"{word.partition('=')[0]}={value}" for value in VALUES[word]]
    assert sorted(found) == sorted(expected)


def test_every_key_and_value_is_one_that_the_configuration_takes() -> None:
    known = {key: values_of(hint) for key, hint in hints_of_keys()}
    schema = OmegaConf.structured(Config)
    assert "batch.group_size" in known
    for turn in range(max(map(len, known.values()))):
        chosen = [f"{key}={of[turn % len(of)]}" for key, of in known.items() if of]
        OmegaConf.merge(schema, OmegaConf.from_dotlist(chosen))  # raises for any that is wrong
    assert {entry.name for entry in config_files(RECIPES)} >= {"grpo", "dapo"}
