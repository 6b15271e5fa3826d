"""The sources load no code from data, listen on no outside address, and run no shell."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from source_tree import PACKAGES, ROOT, sources

from common.config.sections import Config

SOURCES = [path for package in PACKAGES for path in sources(package)]
MODULES = {"pickle", "cloudpickle", "dill", "shelve", "marshal", "runpy"}
RUN_PROGRAMS = {
    "actors/verifiers/code_child.py": {"exec"},
    "actors/verifiers/script.py": {"exec"},
    "actors/environments/python_program.py": {"exec", "eval"},
    # Of a tree in which it has looked at every node: literals, and names of mathematics.
    "actors/verifiers/expressions.py": {"eval"},
}
"""Their one purpose: programs of models behind walls, and the scripts that test them."""
CALLS = {"eval", "exec", "torch.load", "yaml.load", "os.system", "os.popen"}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_is_unpickled_evaluated_or_given_to_a_shell(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = {alias.name for alias in node.names} | {getattr(node, "module", None) or ""}
            assert not MODULES & {name.partition(".")[0] for name in names}, node.lineno
        if isinstance(node, ast.Call):
            allowed = RUN_PROGRAMS.get(str(path.relative_to(ROOT)), set())
            assert ast.unparse(node.func) not in CALLS - allowed, node.lineno
            keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            assert keywords.get("shell") != "True", node.lineno
            assert keywords.get("allow_pickle") != "True", node.lineno
            # Ray's dashboard and job server listen only where a person has started the cluster.
            assert keywords.get("include_dashboard", "False") == "False", node.lineno


def test_code_from_models_and_the_network_for_rules_are_off_unless_asked_for() -> None:
    config = Config()
    assert not config.model.trust_remote_code
    assert not config.verifier.network
