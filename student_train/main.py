"""`torchrun student_train/main.py FILE --stage NAME [--evaluate] [section.field=value …]` trains one stage.

Without torchrun, `python student_train/main.py …` does the same in one process. Exit codes: 0 done,
2 the user's mistake, 1 a failure; torchrun itself turns every code but 0 into 1.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

if __name__ == "__main__":
    started = time.monotonic()
    # This folder comes first on sys.path, where our modules would pass for packages of the same name.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    from student_train.command import main

    sys.exit(main(sys.argv[1:], started=started))
