"""`grpo-lambda completion SHELL`: a script that completes verbs, options, keys and their values.

The words are written into the script, so that completing starts no Python process. They come from
the parser, the configuration's dataclasses and the folders of presets and recipes. Libraries for
argparse (shtab, argcomplete) know nothing of `key=value`, which is nearly all there is to type.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Iterator
from typing import Any, Literal, get_args, get_origin

from common.config.keys import hints_of_keys
from common.config.names import names_in
from deploy.command.presets import CONFIGS, RECIPES, config_files

_FILES = ("data.path", "data.eval_path", "model.path", "resume", "runs_dir")
"""Keys whose value is a path."""


def script(shell: str, parser: argparse.ArgumentParser) -> str:
    """Make the script for `shell`: bash, zsh or fish."""
    return {"bash": _bash, "zsh": _zsh, "fish": _fish}[shell](_Words(parser))


class _Words:
    """All words that can be completed, by kind."""

    def __init__(self, parser: argparse.ArgumentParser) -> None:
        (actions,) = (a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
        self.verbs = {name: sub.description or "" for name, sub in actions.choices.items()}
        self.options = {name: list(_options(sub)) for name, sub in actions.choices.items()}
        self.shells = ["bash", "zsh", "fish"]
        self.presets = [str(entry.path) for entry in config_files(CONFIGS)]
        self.keys = {key: values_of(hint) for key, hint in hints_of_keys()}
        self.keys["recipe"] = [entry.name for entry in config_files(RECIPES)]


def _options(parser: argparse.ArgumentParser) -> Iterator[str]:
    for action in parser._actions:
        yield from (option for option in action.option_strings if option.startswith("--"))


def values_of(hint: Any) -> list[str]:
    """The values that a type lists: those of a Literal, names of rules, true and false.

    A key that may also be left out takes `null`.
    """
    if names := names_in(hint):
        return list(names)
    if get_origin(hint) is Literal:
        return list(get_args(hint))
    if hint is bool:
        return ["true", "false"]
    members = get_args(hint)
    if type(None) not in members:
        return []
    return [value for member in members for value in values_of(member)] + ["null"]


def _cases(words: _Words, row: str) -> str:
    """Lines for a shell's `case`, one for every key that has values."""
    return "\n".join(
        row.format(key=key, values=" ".join(values)) for key, values in words.keys.items() if values
    )


def _bash(words: _Words) -> str:
    return f"""# bash completion of grpo-lambda: source <(grpo-lambda completion bash)
_grpo_lambda() {{
    # Bash cuts words at = and :, which our words contain: take the line apart ourselves.
    local line="${{COMP_LINE:0:COMP_POINT}}" cur prev verb choices
    cur="${{line##*[[:space:]]}}"
    local -a before
    read -ra before <<<"${{line%"$cur"}}"
    verb="${{before[1]-}}" prev="${{before[${{#before[@]}}-1]}}"
    COMPREPLY=()
    if [[ -z $verb ]]; then
        choices="{" ".join(words.verbs)} --help"
    elif [[ $prev == --config ]]; then
        compopt -o filenames 2>/dev/null
        COMPREPLY=($(compgen -W {shlex.quote(" ".join(words.presets))} -- "$cur")
                   $(compgen -f -- "$cur"))
    elif [[ $prev == --* || $verb == inspect && $cur != --* ]]; then
        compopt -o filenames 2>/dev/null
        COMPREPLY=($(compgen -f -- "$cur"))
    elif [[ $cur == --* ]]; then
        case $verb in
{_verbs(words, "            {verb}) choices='{options}' ;;")}
        esac
    elif [[ $verb == completion ]]; then
        choices="{" ".join(words.shells)}"
    elif [[ $verb != train && $verb != plan ]]; then
        return
    elif [[ $cur == *=* ]]; then
        local key="${{cur%%=*}}" value="${{cur#*=}}"
        case $key in
            {"|".join(_FILES)})
                compopt -o filenames 2>/dev/null
                COMPREPLY=($(compgen -f -- "$value")) ;;
{_cases(words, "            {key}) choices='{values}' ;;")}
        esac
        [[ -n $choices ]] && COMPREPLY=($(compgen -W "$choices" -- "$value"))
        # Where = cuts words, bash replaces what is behind it; elsewhere the whole word.
        [[ $COMP_WORDBREAKS == *=* ]] || COMPREPLY=("${{COMPREPLY[@]/#/$key=}}")
        return
    else
        compopt -o nospace 2>/dev/null
        choices="{" ".join(f"{key}=" for key in words.keys)}"
    fi
    [[ -n $choices ]] && COMPREPLY=($(compgen -W "$choices" -- "$cur"))
}}
complete -F _grpo_lambda grpo-lambda
"""


def _zsh(words: _Words) -> str:
    return f"""#compdef grpo-lambda
# zsh completion of grpo-lambda: source <(grpo-lambda completion zsh), after compinit
_grpo_lambda() {{
    local verb="${{words[2]}}" prev="${{words[CURRENT-1]}}" key
    local -a verbs
    verbs=({" ".join(shlex.quote(f"{verb}:{text}") for verb, text in words.verbs.items())})
    if (( CURRENT == 2 )); then
        _describe verb verbs
    elif [[ $prev == --config ]]; then
        compadd -- {" ".join(map(shlex.quote, words.presets))}
        _files
    elif [[ $prev == --* || ( $verb == inspect && $PREFIX != --* ) ]]; then
        _files
    elif [[ $PREFIX == --* ]]; then
        case $verb in
{_verbs(words, "            {verb}) compadd -- {options} ;;")}
        esac
    elif [[ $verb == completion ]]; then
        compadd -- {" ".join(words.shells)}
    elif [[ $verb != train && $verb != plan ]]; then
        return
    elif [[ $PREFIX == *=* ]]; then
        key="${{PREFIX%%=*}}"
        compset -P '*='
        case $key in
            {"|".join(_FILES)}) _files ;;
{_cases(words, "            {key}) compadd -- {values} ;;")}
        esac
    else
        compadd -S '' -- {" ".join(f"{key}=" for key in words.keys)}
    fi
}}
compdef _grpo_lambda grpo-lambda
"""


def _fish(words: _Words) -> str:
    one_of = "__fish_seen_subcommand_from"
    lines = [
        "# fish completion of grpo-lambda: grpo-lambda completion fish | source",
        "complete -c grpo-lambda -f",
        *(
            f"complete -c grpo-lambda -n __fish_use_subcommand -a {verb} -d {shlex.quote(text)}"
            for verb, text in words.verbs.items()
        ),
        *(
            f"complete -c grpo-lambda -n '{one_of} {verb}' -l {option[2:]}"
            + (f" -r -F -a {shlex.quote(' '.join(words.presets))}" if option == "--config" else "")
            for verb, options in words.options.items()
            for option in options
        ),
        f"complete -c grpo-lambda -n '{one_of} completion' -a '{' '.join(words.shells)}'",
        f"complete -c grpo-lambda -n '{one_of} inspect' -F",
        "function __grpo_lambda_words",
        "    switch (commandline -ct)",
        *(
            f"        case '{key}=*'; printf '%s\\n' {' '.join(f'{key}={v}' for v in values)}"
            for key, values in words.keys.items()
            if values
        ),
        f"        case '*'; printf '%s\\n' {' '.join(f'{key}=' for key in words.keys)}",
        "    end",
        "end",
        f"complete -c grpo-lambda -n '{one_of} train plan' -a '(__grpo_lambda_words)'",
    ]
    return "\n".join(lines) + "\n"


def _verbs(words: _Words, row: str) -> str:
    return "\n".join(
        row.format(verb=verb, options=" ".join(options)) for verb, options in words.options.items()
    )
