"""A process that stands for one of `warm_server`: `python -I -S warm_client.py NAME WORDS…`.

It hands its standard streams, the launcher's connection, environment and folder over, waits, and
ends as that process ends. Where this one is killed, that one is. It imports next to nothing.
"""

import json
import os
import socket
import sys


def main() -> None:
    """Hand over, wait, end."""
    name, *words = sys.argv[1:]
    numbers = [0, 1, 2]
    if "PMI_FD" in os.environ:  # MPICH's connection of this rank with its launcher
        numbers.append(int(os.environ["PMI_FD"]))
    request = {
        "words": words,
        "numbers": numbers,
        "environ": dict(os.environ),
        "folder": os.getcwd(),
        "cores": sorted(os.sched_getaffinity(0)),
    }
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as server:
        server.connect(f"\0{name}")
        socket.send_fds(server, [json.dumps(request).encode()], numbers)
        for number in numbers:  # else who reads from the other ends sees no end
            os.close(number)
        answer = server.recv(16)
    code = int(answer or b"1")
    if code < 0:
        os.kill(os.getpid(), -code)
    os._exit(code)


main()
