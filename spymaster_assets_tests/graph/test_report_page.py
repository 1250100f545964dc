"""The HTML report in a real browser: self-contained, labelled as simulated, every picture decoded."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from spymaster_assets_tests.graph.conftest import Demo

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")


@pytest.fixture(scope="module")
def browser() -> str:
    found = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip(f"no browser on this machine: install one of {', '.join(BROWSERS)}")
    return found


def chrome(browser: str, *arguments: str) -> str:
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=5000", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


def test_the_report_asks_for_nothing_from_outside(demo: Demo) -> None:
    html = demo.report.read_text()
    assert not re.findall(r"""(?:src|href)=["'](?!data:|#)[^"']+""", html)
    assert "@import" not in html
    assert not re.findall(r"url\((?!['\"]?data:)", html)


def test_the_page_shows_what_it_must(demo: Demo, browser: str, tmp_path: Path) -> None:
    probe = tmp_path / "probe.html"
    script = (
        "<script>addEventListener('load', () => { const bad = [...document.images].filter(i => !i.naturalWidth).length;"
        "const p = document.createElement('p'); p.id = 'probe';"
        "p.textContent = `images ${document.images.length} broken ${bad} wide ${document.body.scrollWidth > innerWidth}`;"
        "document.body.append(p); });</script>"
    )
    probe.write_text(demo.report.read_text().replace("</body>", script + "</body>"))
    dom = chrome(browser, "--window-size=1280,900", "--dump-dom", probe.as_uri())
    said = re.search(r'id="probe">images (\d+) broken (\d+) wide (\w+)<', dom)
    assert said, "the page's script did not run"
    assert int(said[1]) >= 4
    assert (said[2], said[3]) == ("0", "false")
    assert "SIMULATED MARKET" in dom
    for asof in demo.store.keys("calibration_report"):
        assert asof in dom
    for word in ("Brier", "base rate", "trials", "95"):
        assert word.lower() in dom.lower()


def test_the_demo_prints_a_table_and_the_path(demo: Demo) -> None:
    assert "SIMULATED MARKET" in demo.printed
    assert "tradeable_2 4min A" in demo.printed
    assert str(demo.report) in demo.printed.replace("\n", "")
    assert max(len(line) for line in demo.printed.splitlines() if "/" not in line) <= 80
