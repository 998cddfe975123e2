"""The documentation is true where a machine can tell: its Python runs, its links lead somewhere."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PATTERNS = ("*.md", "docs/**/*.md", "examples/*.md", "benchmarks/*.md")
PAGES = sorted(page for pattern in PATTERNS for page in ROOT.glob(pattern))
BLOCKS = {page: re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.S) for page in PAGES}
FOLDERS = "csrc|myconv|tests|benchmarks|examples|docs"
MADE = ("myconv/_build.py", "examples/output/")  # by the build and by examples


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("page", [page for page in PAGES if BLOCKS[page]], ids=name_of)
def test_python_runs(page):
    for block in BLOCKS[page]:  # each by itself, as a reader would try it
        done = subprocess.run([sys.executable, "-W", "ignore", "-c", block], capture_output=True, text=True)
        assert done.returncode == 0, f"{block}\n{done.stderr}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)
    targets = re.findall(r"\]\(([^)#\s]+)[^)]*\)", text)
    missing = [target for target in targets if "://" not in target and not (page.parent / target).exists()]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_named_files_exist(page):
    names = re.findall(rf"`((?:{FOLDERS})/[\w./-]+\.\w+)`", page.read_text(encoding="utf-8"))
    assert not [name for name in names if not (ROOT / name).exists() and not name.startswith(MADE)]
