"""The golden cache of format version 4: the contents of make_v2.py, in blocks of version 4.

The folder v4/ was written by `python -m tests.storage.golden.make_v4 FOLDER` and is never written again: every
later reader must give these numbers.
"""

from __future__ import annotations

import sys

from tests.storage.golden.make_v2 import main

if __name__ == "__main__":
    main(sys.argv[1])
