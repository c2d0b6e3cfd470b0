"""`torchrun student_train/main.py FILE --stage NAME [--evaluate] [section.field=value …]` trains one stage.

Without torchrun, `python student_train/main.py …` does the same in one process. Exit codes: 0 done,
2 the user's mistake, 1 a failure, 130 and 143 after SIGINT and SIGTERM; torchrun itself turns all but 0 into 1.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

if __name__ == "__main__":
    started = time.monotonic()
    # Python puts this folder first on sys.path, where our modules would shadow packages of the same name.
    # With PYTHONSAFEPATH set it does not.
    sys.path[: 0 if sys.flags.safe_path else 1] = [str(Path(__file__).resolve().parent.parent)]
    from storage.processes.standard_streams import open_closed_streams
    from storage.processes.stop_signals import end_process
    from student_train.command import main

    open_closed_streams()
    end_process(main(sys.argv[1:], started=started))
