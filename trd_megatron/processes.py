"""Child processes that never outlive the process that started them."""

import ctypes
import os
import signal
import sys

PARENT = "TRD_PARENT_PID"  # environment variable: the process id of who started a child
_PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """Asks Linux to kill this process when its parent dies, however it dies. Call it first thing in a child, before slow imports.

    The parent names itself in PARENT; this process does the same for its own children. Elsewhere than on Linux nothing can be
    asked for, and the parent's own clean-up has to do.
    """
    if not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(os.environ[PARENT]):  # it died before we asked
        os.kill(os.getpid(), signal.SIGKILL)
    os.environ[PARENT] = str(os.getpid())
