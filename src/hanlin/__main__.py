"""`python -m hanlin` is `hanlin`."""

import sys

from hanlin.cli import main

if __name__ == "__main__":
    sys.exit(main())
