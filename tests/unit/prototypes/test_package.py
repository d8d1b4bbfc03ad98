"""What another program imports of the prototypes, and what it costs him."""

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import prototypes

ROOT = Path(__file__).resolve().parents[3]


def test_every_folder_is_in_the_package():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {path.parent.relative_to(ROOT).parts for path in (ROOT / "prototypes").rglob("*.py")}
    assert {tuple(name.split(".")[1:]) for name in settings["packages"]} == {parts[1:] for parts in folders}
    assert settings["package-dir"] == {"decoupled_prototypes": "prototypes"}


def test_public_names_are_what_a_type_checker_sees():
    tree = ast.parse(Path(prototypes.__file__).read_text())
    seen = [
        (alias.name, node.module)
        for guarded in ast.walk(tree)
        if isinstance(guarded, ast.If) and ast.unparse(guarded.test) == "TYPE_CHECKING"
        for node in guarded.body
        for alias in node.names
    ]
    assert dict(seen) == prototypes._HOME
    for name in prototypes.__all__:
        assert getattr(prototypes, name).__module__.startswith("prototypes.")
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = prototypes.no_such_name


def test_options_need_no_torch():
    code = "import sys\nfrom prototypes import PrototypesConfig\nassert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)


def test_the_readme_shows_the_heart_of_the_example():
    blocks = (ROOT / "README.md").read_text().split("```python\n")[1:]
    shown = [block.split("```")[0] for block in blocks if "estimator.observe" in block]
    assert len(shown) == 1
    source = [line.strip() for line in (ROOT / "examples" / "decoupled.py").read_text().splitlines()]
    assert [line for line in shown[0].splitlines() if line.strip() and line.strip() not in source] == []
