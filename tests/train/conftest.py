"""The room's tests share `tiny_training.py`, which their child processes run and import by its plain name."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
