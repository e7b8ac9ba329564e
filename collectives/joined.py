"""The end of a thread, as the system sees it."""

import os
import threading
import time


def join(thread: threading.Thread, timeout_seconds: float | None = None) -> None:
    """Wait for the thread, and for the system's as well; at most ``timeout_seconds`` for one that goes on.

    Before Python 3.13 ``join`` returns while what torch keeps for each thread is still being taken down in it, which
    must not happen beside the end of the interpreter. (Where there is no ``/proc`` nobody can tell.)
    """
    thread.join(timeout_seconds)
    while not thread.is_alive() and os.path.exists(f"/proc/self/task/{thread.native_id}"):
        time.sleep(0.0001)
