"""The import rules: who may import whom, and what is imported only where it is needed."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "v05"
FILES = sorted(PACKAGE.rglob("*.py"))
# What each room may import of the others. `value` and `rollout` never meet: the prior travels as a tensor.
ROOMS: dict[str, set[str]] = {
    "kernels": set(),  # bare tensors: they know nothing above them
    "value": {"kernels"},
    "rollout": {"kernels"},
    "tasks": set(),
    "integrations": {"kernels", "rollout", "value"},
    "training": {"kernels", "rollout", "value", "tasks", "plots"},
    "studies": {"kernels", "rollout", "value", "tasks", "training"},
}
# The files beside the rooms that all of these but `kernels` may stand on.
FLOOR = {"batch", "checkpoint", "checks", "errors", "estimates", "files", "fingerprint", "packing", "policy"}
FLOOR |= {"quiet", "records", "results_folder", "scored", "seeds", "small_policy", "stop"}
HEAVY = {"transformers", "vllm", "trl", "verl", "tabpfn", "matplotlib", "ray", "math_verify", "datasets"}


def imports(path: Path, top_level_only: bool = False) -> set[str]:
    """Full names of the modules a file imports."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = set()
    for node in tree.body if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_keeps_the_rules(path):
    names = imports(path)
    ours = {name.split(".")[1] for name in names if name.startswith("v05.")}
    assert not {name.split(".")[0] for name in names} & {"tests", "benchmarks"}
    room = path.relative_to(PACKAGE).parts[0]
    if room in ROOMS:
        allowed = ROOMS[room] | {room}
        assert ours <= (allowed if room == "kernels" else allowed | FLOOR), f"{path.name} imports {sorted(ours)}"
    if room not in ("cli", "__main__.py"):
        assert "cli" not in ours
    own_host = {host for host in ("trl", "verl") if path.is_relative_to(PACKAGE / "integrations" / host)}
    own_host |= {"ray"} if "verl" in own_host else set()  # for bases of classes
    assert not {name.split(".")[0] for name in imports(path, top_level_only=True)} & HEAVY - own_host


def test_nothing_heavy_is_imported_before_it_is_needed():
    script = f"import sys, v05.kernels, v05.cli; print(sorted({HEAVY!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_files_and_functions_stay_small():
    for path in FILES:
        text = path.read_text(encoding="utf-8")
        assert text.count("\n") <= 300, f"{path.relative_to(ROOT)} has {text.count(chr(10))} lines; split it by noun"
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                first = node.body[0].end_lineno if ast.get_docstring(node) else node.lineno
                lines = node.end_lineno - first
                assert lines <= 60, f"{path.relative_to(ROOT)}:{node.lineno} {node.name} has {lines} lines"


def test_setup_stays_small():
    assert (ROOT / "setup.py").read_text(encoding="utf-8").count("\n") < 100
