"""What several rooms' tests share."""

from pathlib import Path

import pytest
from hypothesis import settings

ROOT = Path(__file__).parent.parent
TESTS = ROOT / "tests"
# Their processes share the cores, and a module's fixture serves many tests: one worker runs them, one after the other.
PROCESSES = {
    *TESTS.glob("parallel/test_*.py"), *TESTS.glob("train/test_layout*.py"), TESTS / "plan/test_communication.py",
    TESTS / "train/test_two_trainers.py", TESTS / "train/test_launch.py", TESTS / "engine/test_ranks.py",
}  # fmt: skip
TOGETHER = {TESTS / "plan/test_memory.py": "memory"}

settings.register_profile("hanlin", deadline=None)  # no test here is about the seconds of one example
settings.load_profile("hanlin")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        group = "processes" if item.path in PROCESSES else TOGETHER.get(item.path)
        if group is not None:
            item.add_marker(pytest.mark.xdist_group(group))


@pytest.fixture(scope="session")
def own_words() -> str:
    """Some hundred kilobytes of real text that is always here: this repository's pages and a part of its sources."""
    pages = [*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("docs/*.md")), *sorted(ROOT.glob("src/hanlin/[a-d]*/*.py"))]
    return "\n\n".join(page.read_text(encoding="utf-8") for page in pages)
