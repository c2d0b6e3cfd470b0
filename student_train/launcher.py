"""`python -m student_train.launcher …` is `torchrun …`, but it ends with its ranks' exit code and without a traceback.

torchrun makes 1 of every code, under a traceback of its own that hides what the ranks have said.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence


def main(arguments: Sequence[str]) -> int:
    """Runs ranks as torchrun's arguments say; returns the exit code of the first that failed, 128 + N for signal N."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    try:
        run(parse_args(list(arguments)))
    except SignalException as stop:  # its ranks have had it, and have ended
        return 128 + int(stop.sigval)
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        return failure.exitcode if failure.exitcode >= 0 else 128 - failure.exitcode
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
