"""Presets and recipes by name, and a `Config` from them: what the command line and Python share.

A YAML file begins with one line that says what it is; lists and menus show that line.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from common.errors import UserError

if TYPE_CHECKING:
    from common.config.load import Loaded
    from common.config.sections import Config

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
RECIPES = CONFIGS / "recipes"
DEFAULT = "smollm2"
FOR_DEVICES = "qwen2.5-1.5b-1x8"
"""The preset that a proposal for given devices begins from."""


@dataclass(frozen=True)
class ConfigFile:
    """A YAML file that says in its first line what it is."""

    name: str
    path: Path
    line: str


def config_files(folder: Path) -> list[ConfigFile]:
    """List the YAML files of `folder`, by name."""
    return [
        ConfigFile(path.stem, path, path.open(encoding="utf-8").readline().lstrip("# ").rstrip())
        for path in sorted(folder.glob("*.yaml"))
    ]


def listing() -> str:
    """List all recipes and presets as text, a line each."""
    lines = []
    for title, folder in (
        ("Recipes (recipe=NAME)", RECIPES),
        ("Presets (--config FILE)", CONFIGS),
    ):
        entries = config_files(folder)
        wide = max(len(entry.name) for entry in entries)
        lines += [title, *(f"  {e.name:<{wide}}  {e.line}" for e in entries), ""]
    return "\n".join(lines).rstrip()


def choose(ask: Callable[[str], str] = input, show: Callable[[str], None] = print) -> Path:
    """Ask a person for a preset by its number; Enter takes the default.

    Raises:
        UserError: the input ended.
    """
    entries = sorted(config_files(CONFIGS), key=lambda e: (e.name not in (DEFAULT, "tiny"), e.name))
    wide = max(len(entry.name) for entry in entries)
    show("No --config was given. Presets:")
    for number, entry in enumerate(entries, 1):
        show(f"  {number:>2}  {entry.name:<{wide}}  {entry.line}")
    while True:
        try:
            answer = ask(f"Number [1, {entries[0].name}]: ").strip() or "1"
        except EOFError as error:
            raise UserError("no preset was chosen: give --config FILE") from error
        if answer.isdecimal() and 1 <= int(answer) <= len(entries):
            return entries[int(answer) - 1].path
        show(f"{answer!r} is none of 1 to {len(entries)}")


def load(path: Path | None, overrides: Sequence[str], *, trust_code: bool = False) -> Config:
    """Read and check the configuration of a file, or of the run that `resume=` names.

    Args:
        path: a YAML file; None is the default preset, or the run's own file.
        overrides: `key=value`, as on the command line.
        trust_code: code that the run's own file names may run.

    Raises:
        UserError: wrong input, with the key and the remedy.
    """
    return load_with_origins(path, overrides, trust_code=trust_code).config


def load_with_origins(
    path: Path | None, overrides: Sequence[str], *, trust_code: bool = False
) -> Loaded:
    """Read and check as `load` does, and say which layer each value came from.

    Raises:
        UserError: wrong input, with the key and the remedy.
    """
    from common.config import load
    from deploy.command.trust import check_code
    from learner.algorithm.recipe_checks import check_recipe
    from learner.training.optimizer import check_optimizer

    resumed = [o.partition("=")[2] for o in overrides if o.startswith("resume=")]
    resumed = [run for run in resumed if run != "auto"]  # goes with --config
    resolved = path is None and bool(resumed)
    if path is None and resumed:
        path = Path(resumed[-1]) / "config.yaml"
        if not path.is_file():
            raise UserError(
                f"resume={resumed[-1]}: there is no run in this folder; give one that holds a "
                "config.yaml"
            )
    loaded = load.load_with_origins(
        [path or CONFIGS / f"{DEFAULT}.yaml"], overrides, RECIPES, resolved=resolved
    )
    config = loaded.config
    if resolved and not trust_code:
        check_code(config, Path(resumed[-1]), overrides)
    check_recipe(config.algorithm, config.correction_kind)
    check_optimizer(config.learner)
    return loaded
