"""Links of the documents lead somewhere."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "benchmarks").glob("*.md")])


def anchors(document: Path) -> set[str]:
    """Returns the anchors that GitHub gives a document's headings."""
    headings = re.findall(r"^#+ (.*)", document.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_to_files_and_headings(document: Path) -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]*))?\)", document.read_text())
    for name, anchor in links:
        target = document.parent / name if name else document
        assert target.exists(), f"{name} is not there"
        assert not anchor or anchor in anchors(target), f"{name or document.name} has no heading #{anchor}"


@pytest.mark.parametrize("document", sorted((ROOT / "docs").glob("*.md")), ids=lambda path: path.name)
def test_a_reader_of_the_readme_finds_every_document(document: Path) -> None:
    found = {ROOT / "README.md"}
    unread = list(found)
    while unread:
        source = unread.pop()
        for name in re.findall(r"\]\((?!https?:)([^)#]+\.md)", source.read_text()):
            target = (source.parent / name).resolve()
            if target not in found:
                found.add(target)
                unread.append(target)
    assert document in found
