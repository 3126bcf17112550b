"""Be the first process of a container where nothing else takes in orphans: `python reap.py COMMAND ...`.

A site's worker outlives the process that started it. Docker and Podman have an init for that, Kubernetes has none.
"""

import os
import signal
import sys


def main(command: list[str]) -> int:
    """Run a command, reap whatever ends, and give the command's exit code."""
    child = os.fork()
    if not child:
        os.execvp(command[0], command)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: os.kill(child, number))
    while True:
        ended, status = os.wait()
        if ended == child:
            code = os.waitstatus_to_exitcode(status)
            return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
