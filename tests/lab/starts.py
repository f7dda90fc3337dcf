"""Which processes become another program, told by the kernel as it happens: netlink's process connector.

Source of the messages' shape: the kernel's ``uapi/linux/cn_proc.h`` and ``connector.h``.
"""

from __future__ import annotations

import contextlib
import errno
import select
import socket
import struct
import time
from collections.abc import Iterator
from types import TracebackType
from typing import Final, Self

_NETLINK_CONNECTOR: Final = 11
_PROCESSES: Final = 1  # CN_IDX_PROC, and CN_VAL_PROC too
_LISTEN, _IGNORE = 1, 2
_DONE: Final = 3  # NLMSG_DONE, the type that a connector's messages have
_EXEC: Final = 2
_HEADER: Final = struct.Struct("=IHHII")
_CONNECTOR: Final = struct.Struct("=IIIIHH")
_EVENT: Final = struct.Struct("=IIQII")
_CONFIRMED: Final = 2.0
_SO_RCVBUFFORCE: Final = 33  # asm-generic/socket.h
_BUFFER: Final = 4 * 1024 * 1024


class ProgramStarts:
    """Listens from its making to its end.

    :raises OSError: not root, or a kernel that does not tell.
    """

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_DGRAM, _NETLINK_CONNECTOR)
        try:
            # Past the bound that the machine has for others: we are root.
            self._socket.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _BUFFER)
            self._socket.bind((0, _PROCESSES))
            self._ask(_LISTEN)
            # The kernel confirms it at once; to a process in a container it says nothing, now or later.
            if not select.select([self._socket], [], [], _CONFIRMED)[0]:
                raise OSError(errno.EOPNOTSUPP, "the kernel does not tell here which programs start")
        except BaseException:
            self._socket.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        with contextlib.suppress(OSError):
            self._ask(_IGNORE)
        self._socket.close()

    def within(self, seconds: float) -> Iterator[int]:
        """The numbers of the processes that become another program in so many seconds, each as soon as it is told.

        :raises OSError: more were told than could be kept (``ENOBUFS``), so some are not known.
        """
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            if select.select([self._socket], [], [], left)[0]:
                told = self._socket.recv(65536)
                what, _, _, _, process = _EVENT.unpack_from(told, _HEADER.size + _CONNECTOR.size)
                if what == _EXEC:
                    yield process

    def _ask(self, what: int) -> None:
        body = _CONNECTOR.pack(_PROCESSES, _PROCESSES, 0, 0, 4, 0) + struct.pack("=I", what)
        self._socket.send(_HEADER.pack(_HEADER.size + len(body), _DONE, 0, 0, 0) + body)
