"""Tell a SuperLink which nodes may join: the public keys of a folder, each under its file's name."""

import json
import subprocess
import sys
from pathlib import Path


def main(folder: Path, superlink: str) -> int:
    """Register what is not yet registered; a key that is already there is no error."""
    failed = 0
    for key in sorted(folder.glob("*.pub")):
        command = ["flwr", "supernode", "register", str(key), superlink, "--name", key.stem, "--format", "json"]
        done = subprocess.run(command, capture_output=True, text=True)
        try:
            told = json.loads(done.stdout[done.stdout.index("{") :])
        except ValueError:
            told = {"error-message": done.stderr or done.stdout}
        why = str(told.get("error-message", "")).strip()
        if told.get("success"):
            print(f"{key.stem}: registered")
        elif "already" in why:
            print(f"{key.stem}: is registered")
        else:
            print(f"{key.stem}: {why}", file=sys.stderr)
            failed = 1
    return failed


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2]))
