"""The README's examples run as printed, and what it names exists."""

import contextlib
import io
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "recipes").glob("*/README.md"))]
BLOCKS = re.findall(r"```python\n(.*?)```\n(?:\n```text\n(.*?)```)?", README, re.DOTALL)


def test_examples_print_what_they_say():
    shown = [(code, output) for code, output in BLOCKS if output]
    assert len(shown) == 7
    names = {}
    for code, output in shown:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(code, "README.md", "exec"), names)
        assert printed.getvalue() == output


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_pictures_links_and_make_targets_exist(page):
    text = page.read_text(encoding="utf-8")
    for link in re.findall(r"\]\((?!https?://)([^)#]+)\)", text):
        assert (page.parent / link).exists(), link
        assert not link.endswith(".png") or (page.parent / link).read_bytes()[:4] == b"\x89PNG", link
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    for target in re.findall(r"(?:^|`)make ([a-z-]+)", text, re.MULTILINE):
        assert target in targets, target


TREE = re.search(r"```\n(csrc/.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("paths", re.findall(r"^(\S.*?)\s{2,}", TREE[1], re.MULTILINE))
def test_the_tree_is_true(paths):
    for path in paths.split(", "):
        assert list(ROOT.glob(path.replace("<op>", "*"))), path
