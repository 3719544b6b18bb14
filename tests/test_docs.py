"""The pages: every file that one of them names is there."""

import re
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
PAGES = sorted(
    str(path.relative_to(REPOSITORY))
    for path in (*REPOSITORY.glob("*.md"), *REPOSITORY.glob("docs/*.md"), *REPOSITORY.glob("[!.]*/README.md"))
)
LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)")
# Paths below the repository's own folders, as far as they hold no placeholder such as N or *.
CODE = re.compile(r"(?<![\w./])((?:mdistiller|tests|tools|configs|plans|benchmarks|detection|docs)/[\w./-]+\.\w+)")


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files(page):
    links = [link for link in LINK.findall((REPOSITORY / page).read_text()) if "://" not in link]
    missing = [link for link in links if not (REPOSITORY / page).parent.joinpath(link).exists()]
    assert not missing


@pytest.mark.parametrize("page", PAGES)
def test_named_files_are_there(page):
    names = set(CODE.findall((REPOSITORY / page).read_text()))
    places = (REPOSITORY, REPOSITORY / "detection")  # whose commands run there
    missing = [name for name in sorted(names) if not any((place / name).exists() for place in places)]
    assert not [name for name in missing if not name.startswith("detection/pretrained/")]


def test_pages_were_found():
    assert {"README.md", "CONTRIBUTING.md", "docs/performance.md", "data/README.md"} <= set(PAGES)
