"""The shape of the house, read from the files without running them: who imports whom, and how long each one is."""

import ast
import graphlib
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SUPPORT = [f"support.{path.stem}" for path in sorted((ROOT / "support").glob("*.py"))]

# What each file may import of ours.
RULES = {
    "ortholora": [],
    "lora": [],
    "lori": ["lora"],
    "model": SUPPORT,
    "glue": SUPPORT,
    "evaluate": ["glue", "lora", "lori", "model", *SUPPORT],
    "train": ["evaluate", "glue", "lora", "lori", "model", "ortholora", *SUPPORT],
    **{name: ["lora", *SUPPORT] for name in SUPPORT},
    "support.toy": ["lora", "model", *SUPPORT],
}
OTHERS = {"torch", "numpy", "datasets", "tokenizers", "huggingface_hub", "tqdm"}
PASTED = ["ortholora", "lora", "lori"]  # into other people's code: they need torch alone

LIMITS = {"ortholora": 310, "lora": 230, "lori": 310, "model": 320, "glue": 460, "train": 580}


def text_of(name):
    return (ROOT / f"{name.replace('.', '/')}.py").read_text(encoding="utf-8")


def ours():
    """All modules of the project but its tests."""
    files = [p for folder in (".", "support", "experiments") for p in sorted((ROOT / folder).glob("*.py"))]
    return [str(p.relative_to(ROOT).with_suffix("")).replace("/", ".") for p in files if not p.name.startswith("test_")]


def imports(text):
    """Every module that a text imports, wherever: a name imported from a folder of ours is a module of it."""
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"a relative import of {node.module}"
            folder = (ROOT / node.module.replace(".", "/")).is_dir()
            found |= {f"{node.module}.{alias.name}" for alias in node.names} if folder else {node.module}
    return found


def test_imports_are_found_wherever_they_stand():
    text = "import a.b, c as d\nfrom support import runs as r, table\ndef f():\n    from e.f import g\n    import train"
    assert imports(text) == {"a.b", "c", "support.runs", "support.table", "e.f", "train"}


def test_every_file_has_its_place():
    assert {name for name in ours() if not name.startswith("experiments.")} == RULES.keys()


@pytest.mark.parametrize("name", RULES)
def test_no_import_runs_upwards(name):
    found = imports(text_of(name))
    mine = {m for m in found if m in RULES or m.split(".")[0] in ("support", "experiments", "tests", "test_ortholora")}
    assert mine <= set(RULES[name]) - {name}
    packages = {m.split(".")[0] for m in found - mine} - sys.stdlib_module_names
    assert packages <= ({"torch"} if name in PASTED else OTHERS)
    assert "importlib" not in found and "__import__" not in text_of(name)  # which would not be seen here


def test_no_import_runs_in_a_circle():
    graph = {name: imports(text_of(name)) & RULES.keys() for name in RULES}
    assert len(list(graphlib.TopologicalSorter(graph).static_order())) == len(RULES)


def test_only_experiments_and_tests_import_train():
    assert {name.split(".")[0] for name in ours() if "train" in imports(text_of(name))} <= {"experiments"}


@pytest.mark.parametrize("name", LIMITS)
def test_size_is_a_feature(name):
    lines = text_of(name).count("\n")
    assert lines <= LIMITS[name]


def test_the_training_loop_is_read_at_once():
    (loop,) = [f for f in ast.parse(text_of("train")).body if isinstance(f, ast.FunctionDef) and f.name == "train"]
    assert loop.end_lineno - loop.lineno + 1 <= 60
    inner = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda, ast.ClassDef)
    assert not [node.lineno for node in ast.walk(loop) if isinstance(node, inner) and node is not loop]


@pytest.mark.parametrize("name", ours())
def test_only_tables_are_laid_out_by_hand(name):
    """The formatter is off around the tables of data in model.py and in glue.py, once each, and nowhere else."""
    marks = [(number, line) for number, line in enumerate(text_of(name).splitlines(), 1) if "# fmt" in line]
    if name not in ("model", "glue"):
        assert not marks
        return
    (first, off), (last, on) = marks
    assert off == "# fmt: off" and on == "# fmt: on"
    inside = [node for node in ast.parse(text_of(name)).body if first < node.lineno < last]
    assert inside and all(isinstance(node, ast.Assign) and node.targets[0].id.isupper() for node in inside)
