"""What ties a process of ours to the API process that started it."""

import ctypes
import os
import signal
import socket
import struct
import sys

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_CREDENTIALS = struct.Struct("iII")  # struct ucred: process, user and group id


def end_with_parent(sock: socket.socket) -> None:
    """Have the kernel kill this process as soon as its parent dies, in whatever way, even while native code runs here.

    `sock` is this process's end of a pair that the parent has made, and tells who that is: a parent that died before the
    kernel was asked is noticed too. Without Linux, the process notices when it next reads its socket.
    """
    if sys.platform != "linux":
        return
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    parent, _, _ = _CREDENTIALS.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
    if os.getppid() != parent:
        os._exit(1)
