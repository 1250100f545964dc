"""Run every `bench_*.py`, or those named: `python -m benchmarks bars signals`."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

found = sorted(p.stem.removeprefix("bench_") for p in Path(__file__).parent.glob("bench_*.py"))
for name in sys.argv[1:] or found:
    print(f"\n== {name}")
    importlib.import_module(f"benchmarks.bench_{name}").main()
