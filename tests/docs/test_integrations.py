"""The scripts of docs/integrations.md run as they stand; those of TRL in `make test-extra`."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "docs/integrations.md"
SCRIPTS = dict(
    re.findall(r"^## ([^\n]+)\n.*?```python\n(.*?)```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
)
TIERS = [
    pytest.param(name, marks=pytest.mark.extra if "from trl" in script else pytest.mark.slow, id=name)
    for name, script in SCRIPTS.items()
]


def test_the_page_has_its_six_scripts() -> None:
    assert len(SCRIPTS) == 6 and sum("from trl" in script for script in SCRIPTS.values()) == 3


@pytest.mark.parametrize("name", TIERS)
def test_a_script_runs(name: str, tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPTS[name])
    run = subprocess.run(
        [sys.executable, "script.py"], cwd=tmp_path, capture_output=True, text=True, timeout=600
    )
    assert run.returncode == 0, run.stderr[-3000:]
