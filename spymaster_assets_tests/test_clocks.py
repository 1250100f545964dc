"""What a replay cannot see, since it is the same in both runs: formulas read no clock, no unseeded chance, no environment, no file time."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import spymaster_assets

ROOT = Path(spymaster_assets.__file__).parent
PURE = ("market", "signals", "datasets", "models", "retrieval", "evaluation")
ALLOWED = {
    (
        "market/calendar.py",
        "datetime.datetime.now",
    ): "how far ahead the calendar is built; a session's times do not depend on it",
    ("market/dbn.py", ".st_mtime_ns"): "a file that changes while it is read is refused",
    ("market/files.py", ".st_mtime_ns"): "tells a new delivery from the last one; kept outside every content hash",
    ("market/options.py", ".st_mtime_ns"): "key of a cache of definitions",
    ("models/registry.py", "importlib.import_module"): "finds the model families of this package",
    ("market/simulate_book.py", "uuid"): "name of a temporary file",
}
"""(file, what it reads): why no artifact can depend on it."""
MODULES = {"time", "random", "secrets", "uuid", "locale", "platform", "socket", "getpass"}
"""Modules of the standard library that tell of the machine, the moment or chance, and that no formula needs anything of."""
NAMES = {
    "os.environ",
    "os.environb",
    "os.getenv",
    "os.urandom",
    "os.getrandom",
    "os.getpid",
    "os.getlogin",
    "os.path.getmtime",
    "os.path.getctime",
    "os.path.getatime",
    "datetime.datetime.now",
    "datetime.datetime.today",
    "datetime.datetime.utcnow",
    "datetime.date.today",
    "builtins.hash",  # of text: another in each process
    "builtins.id",
    "builtins.eval",
    "builtins.exec",
    "builtins.__import__",
    "importlib.import_module",
    "spymaster_assets.store.provenance",
    "spymaster_assets.store.git_revision",
    "spymaster_assets.partitions.last_open_session",
}
ATTRIBUTES = {"now", "today", "utcnow", "environ", "getenv"} | {
    f"st_{of}time{unit}" for of in "mca" for unit in ("", "_ns")
}
"""Read of anything, since what stands before the dot may be a second name."""
SEEDED = {
    "numpy.random.default_rng",
    "numpy.random.SeedSequence",
    "numpy.random.PCG64",
    "numpy.random.Philox",
    "numpy.random.Generator",
}
"""May be called with a seed (or what was made of one), and named as types; nothing else of numpy.random is used."""
TORCH_DRAWS = {f"torch.{n}" for n in ("rand", "randn", "randint", "randperm", "normal", "bernoulli", "multinomial")}
"""Draw from a generator that is given; layers draw from the one that torch.manual_seed sets."""
_LOCAL_ZONE = {("fromtimestamp", 1), ("astimezone", 0)}
"""Methods that read the machine's time zone when called with so few arguments."""


def outside_reads(source: str) -> Iterator[str]:
    """What a module reads that is neither an argument nor a constant, by its full name."""
    tree = ast.parse(source)
    bound: dict[str, str] = {"hash": "builtins.hash", "id": "builtins.id", "eval": "builtins.eval"}
    bound |= {"exec": "builtins.exec", "__import__": "builtins.__import__"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for a in node.names:
                bound[a.asname or a.name.partition(".")[0]] = a.name if a.asname else a.name.partition(".")[0]
        elif isinstance(node, ast.ImportFrom):
            bound |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}

    def full_name(node: ast.AST) -> str:
        if isinstance(node, ast.Name):
            return bound.get(node.id, "")
        if isinstance(node, ast.Attribute):
            return f"{before}.{node.attr}" if (before := full_name(node.value)) else ""
        return ""

    for local in bound.values():
        if local.partition(".")[0] in MODULES or (local in NAMES and not local.startswith("builtins.")):
            yield local
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute | ast.Name):
            name = full_name(node)
            if name in NAMES:
                yield name
            elif isinstance(node, ast.Attribute) and node.attr in ATTRIBUTES:
                yield f".{node.attr}"
            elif name.startswith("numpy.random.") and name not in SEEDED:
                yield name
        if isinstance(node, ast.Call):
            name, given = full_name(node.func), [*node.args, *node.keywords]
            nothing = not given or all(_value(a) is None for a in given)
            if name in SEEDED and nothing:
                yield f"{name} without a seed"
            elif name in TORCH_DRAWS and not any(k.arg == "generator" for k in node.keywords):
                yield f"{name} without a generator"
            elif name.startswith("numpy.") and any(_value(a) in ("now", "today") for a in given):
                yield f"{name} of now"
            if isinstance(node.func, ast.Attribute) and (node.func.attr, len(given)) in _LOCAL_ZONE:
                yield f".{node.func.attr} without a zone"


def _value(argument: ast.expr | ast.keyword) -> object:
    value = argument.value if isinstance(argument, ast.keyword) else argument
    return value.value if isinstance(value, ast.Constant) else value


def test_formulas_read_nothing_that_a_replay_cannot_change() -> None:
    found = {
        (str(path.relative_to(ROOT)), what)
        for package in PURE
        for path in sorted((ROOT / package).rglob("*.py"))
        for what in outside_reads(path.read_text())
    }
    assert sorted(found - {*ALLOWED}) == []
    assert sorted({*ALLOWED} - found) == [], "an exception that nobody needs any more"


@pytest.mark.parametrize(
    "source",
    [
        "import time as t\nx = t.time()",
        "from time import perf_counter as p",
        "from datetime import date\nx = date.today().toordinal()",
        "from datetime import UTC, datetime as d\nx = d.now(UTC)",
        "import datetime\nclock = datetime.datetime\nx = clock.utcnow()",
        "from datetime import datetime\nx = datetime.fromtimestamp(5)",
        "x = when.astimezone()",
        "import random",
        "from random import gauss",
        "import numpy as np\nx = np.random.normal()",
        "import numpy as np\nx = np.random.default_rng()",
        "import numpy as np\nx = np.random.default_rng(None)",
        "from numpy.random import default_rng as rng\nx = rng(seed=None)",
        "import numpy as np\nx = np.random.Generator(np.random.PCG64())",
        "from numpy import random\nx = random.rand(3)",
        "import numpy as np\nx = np.datetime64('now')",
        "import os\nx = os.environ.get('A')",
        "from os import getenv\nx = getenv('A')",
        "from os import environ as e\nx = e['A']",
        "import os.path\nx = os.path.getmtime('a')",
        "x = path.stat().st_mtime",
        "x = hash(name) % 7",
        "import torch\nx = torch.randperm(5)",
        "from spymaster_assets.store import provenance",
        "def f():\n    import uuid\n    return uuid.uuid4()",
    ],
)
def test_such_reads_are_found(source: str) -> None:
    assert list(outside_reads(source))


@pytest.mark.parametrize(
    "source",
    [
        "import numpy as np\nx = np.random.default_rng(7).normal()",
        "import numpy as np\nx = np.random.Generator(np.random.PCG64([seed, 1]))",
        "import numpy as np\ndef f(rng: np.random.Generator) -> float:\n    return rng.normal()",
        "import torch\nx = torch.randperm(5, generator=order)",
        "from datetime import UTC, datetime, time\nx = datetime.fromtimestamp(5, UTC)\ny = time.fromisoformat('10:00')",
        "'time.time()  # random'",
        "class A:\n    def __hash__(self) -> int:\n        return self.id",
    ],
)
def test_what_is_given_is_no_such_read(source: str) -> None:
    assert list(outside_reads(source)) == []
