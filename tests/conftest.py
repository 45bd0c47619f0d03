"""What several rooms' tests share."""

from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def own_words() -> str:
    """Some hundred kilobytes of real text that is always here: this repository's pages and a part of its sources."""
    pages = [*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("docs/*.md")), *sorted(ROOT.glob("src/hanlin/[a-d]*/*.py"))]
    return "\n\n".join(page.read_text(encoding="utf-8") for page in pages)
