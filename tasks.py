"""`invoke --list` shows what there is; the tasks themselves are in :mod:`nixops.tasks`."""

from nixops.tasks.collection import ns

__all__ = ["ns"]
