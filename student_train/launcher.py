"""`python -m student_train.launcher …` runs `torchrun …`, but returns its ranks' exit code without a traceback.

torchrun itself exits with 1 for every failure, and its traceback hides the messages of the ranks.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence


def main(arguments: Sequence[str]) -> int:
    """Run the ranks that torchrun's arguments describe; return the exit code of the first that failed.

    Returns 128 + N where a rank or torchrun itself was ended by signal N, and 0 if no rank failed.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    try:
        run(parse_args(list(arguments)))
    except SignalException as stop:  # torchrun passed the signal on, and its ranks have ended
        return 128 + int(stop.sigval)
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        return failure.exitcode if failure.exitcode >= 0 else 128 - failure.exitcode
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
