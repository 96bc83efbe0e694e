"""Citations: every rule that code and documents cite exists, and nothing is cited that the repository does not have."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "treepo_mcore"
FOLDERS = ("treepo_mcore", "tests", "tools", "benchmarks", "examples", "docs")
FILES = [f for folder in FOLDERS for kind in ("py", "md", "yaml") for f in (ROOT / folder).rglob(f"*.{kind}")]
CITED = re.compile(r"algorithm\.md\)?,? ((?:\d+(?:\.\d+)?(?:, | to | and )?)+)")


def rules():
    """Sections ("2") and rules ("2.3") of docs/algorithm.md."""
    text = (ROOT / "docs" / "algorithm.md").read_text()
    return set(re.findall(r"^## (\d+) ", text, flags=re.M)) | set(re.findall(r"^\*\*(\d+\.\d+) ", text, flags=re.M))


def test_every_cited_rule_exists():
    cited = {
        (str(file.relative_to(ROOT)), number)
        for file in FILES
        for group in CITED.findall(file.read_text())
        for number in re.findall(r"\d+(?:\.\d+)?", group)
    }
    assert len(cited) > 20
    assert not [found for found in cited if found[1] not in rules()]


def test_nothing_cites_a_document_that_is_not_here():
    ghosts = re.compile(r"\bspec (?:section )?\d|\bidentity I\d|\(D\d+\)|# D\d+\b|\bacceptance (?:test )?\d")
    found = [f"{f.relative_to(ROOT)}: {g}" for f in FILES if f != Path(__file__) for g in ghosts.findall(f.read_text())]
    assert not found, found
    links = [
        f"{file.relative_to(ROOT)}: {target}"
        for file in [*(ROOT / "docs").glob("*.md"), *ROOT.glob("*.md")]
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", file.read_text())
        if not (file.parent / target).exists()
    ]
    assert not links, links


def test_every_anchor_that_is_linked_exists():
    """As GitHub and mkdocs make them of headings."""
    missing = []
    for file in [*(ROOT / "docs").glob("*.md"), *ROOT.glob("*.md")]:
        for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#([^)]+)\)", file.read_text()):
            text = (file.parent / target if target else file).read_text()
            headings = re.findall(r"^#+ (.*)$", text, flags=re.M)
            known = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
            if anchor not in known:
                missing.append(f"{file.relative_to(ROOT)}: {target}#{anchor}")
    assert not missing, missing


def test_every_file_that_is_named_exists():
    """In documents, comments and docstrings: `learn/loss.py` is a path of the repository or of the package."""
    named = re.compile(r"(?<![\w/.{}-])((?:[a-z_]+/)+[a-z_]+\.py)\b")
    missing = [
        f"{file.relative_to(ROOT)}: {path}"
        for file in [*FILES, *ROOT.glob("*.md")]
        for path in named.findall(file.read_text())
        if not path.startswith("vllm/") and not any((base / path).is_file() for base in (ROOT, PACKAGE, ROOT / "tests"))
    ]
    assert not missing, missing
