"""What several rooms' tests share."""

from pathlib import Path

import pytest
from hypothesis import settings

ROOT = Path(__file__).parent.parent

settings.register_profile("hanlin", deadline=None)  # no test here is about the seconds of one example
settings.load_profile("hanlin")


@pytest.fixture(scope="session")
def own_words() -> str:
    """Some hundred kilobytes of real text that is always here: this repository's pages and a part of its sources."""
    pages = [*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("docs/*.md")), *sorted(ROOT.glob("src/hanlin/[a-d]*/*.py"))]
    return "\n\n".join(page.read_text(encoding="utf-8") for page in pages)
