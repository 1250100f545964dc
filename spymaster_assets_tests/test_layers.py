"""Only the thin layers import Dagster."""

from __future__ import annotations

import ast
from pathlib import Path

import spymaster_assets

ROOT = Path(spymaster_assets.__file__).parent
ALLOWED = ("assets", "resources", "automation")
ALLOWED_FILES = {"definitions.py"}


def test_pure_packages_do_not_import_dagster() -> None:
    offenders = []
    for path in sorted(ROOT.rglob("*.py")):
        relative = path.relative_to(ROOT)
        if relative.parts[0] in ALLOWED or relative.name in ALLOWED_FILES:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            if any(n.split(".")[0].startswith("dagster") for n in names):
                offenders.append(str(relative))
    assert offenders == []
