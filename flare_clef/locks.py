"""The advisory lock of an open file or folder, between processes."""

from __future__ import annotations

try:
    import fcntl
except ImportError:  # Windows: trust the user
    fcntl = None  # type: ignore[assignment]


def take_lock(descriptor: int, *, wait: bool) -> bool:
    """Takes the lock, which goes when ``descriptor`` is closed or the process is killed.

    False where another process has it and ``wait`` is not asked for. True, without any lock, on a
    system or file system that has none.
    """
    if fcntl is None:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True
