"""docs/estimator.md points at functions: every one that it names exists where it says."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]


def defined_names(path):
    """Qualified names of every class, function and method of a module."""
    names = set()

    def walk(node, prefix):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ClassDef | ast.FunctionDef):
                names.add(prefix + child.name)
                walk(child, f"{prefix}{child.name}.")

    walk(ast.parse(path.read_text()), "")
    return names


def find_files(name):
    """Files of the room by their name, or by a path from the room or from the checkout."""
    return [*(ROOT / "prototypes").rglob(name), *ROOT.glob(name)]


def find_missing(text):
    missing, found = [], 0
    for module, name in re.findall(r"`([a-z_]+)\.([A-Za-z_][A-Za-z_.]*)`", text):
        paths = find_files(f"{module}.py")
        if name != "py" and paths:
            found += 1
            if not any(name in defined_names(path) for path in paths):
                missing.append(f"{module}.{name}")
    missing += [name for name in re.findall(r"`([a-z_]+(?:/[a-z_]+)?\.py)`", text) if not find_files(name)]
    return missing, found


def test_every_function_that_the_page_names_exists():
    missing, found = find_missing((ROOT / "docs" / "estimator.md").read_text())
    assert missing == []
    assert found >= 20


def test_a_name_that_is_not_there_is_found():
    assert find_missing("`online_em.no_such_function` and `nothing.py`")[0] == [
        "online_em.no_such_function",
        "nothing.py",
    ]
