"""What every server program of the lab needs when it is started: a free port, and an end when we are killed."""

from __future__ import annotations

import shutil
import signal
import socket
import subprocess
import threading


def free_port(bind: str) -> int:
    """A TCP port that nobody listens on at ``bind`` at this moment."""
    with socket.socket() as probe:
        probe.bind((bind, 0))
        port: int = probe.getsockname()[1]
        return port


def die_with_parent() -> list[str]:
    """A prefix that ends the server when this process is killed and cannot end it itself, where there is one.

    The kernel means the thread that starts the server: from another thread than the main one, which lives as long
    as the process, the server would end with that thread.
    """
    if threading.current_thread() is not threading.main_thread():
        return []
    setpriv = shutil.which("setpriv")
    return [setpriv, "--pdeathsig", signal.SIGKILL.name.removeprefix("SIG"), "--"] if setpriv else []


def end(process: subprocess.Popen[bytes], grace: float = 5.0) -> None:
    """Stop ``process``: TERM, and KILL after ``grace`` seconds. It is reaped."""
    process.terminate()
    try:
        process.wait(grace)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
