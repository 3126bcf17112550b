"""Tell a SuperLink which nodes may join: the public keys of a folder, each under its file's name, and no others.

    python register.py FOLDER SUPERLINK RECORD

RECORD is a file of what was registered, so that a key that is no longer in the folder is taken away.
"""

import json
import subprocess
import sys
from pathlib import Path


def main(folder: Path, superlink: str, record: Path) -> int:
    """Unregister keys that went, register those that came; a key that is already there is no error."""
    keys = {file.stem: file.read_text().strip() for file in sorted(folder.glob("*.pub"))}
    nodes = json.loads(record.read_text()) if record.exists() else []
    failed = 0
    for node in list(nodes):
        if keys.get(node["name"]) == node["key"]:
            continue
        told = flwr("unregister", node["id"], superlink)
        if told.get("success") or "not found" in why(told).lower():
            nodes.remove(node)
            print(f"{node['name']}: a key that went is unregistered")
        else:
            print(f"{node['name']}: {why(told)}", file=sys.stderr)
            failed = 1
    for name, key in keys.items():
        told = flwr("register", str(folder / f"{name}.pub"), superlink, "--name", name)
        if told.get("success"):
            nodes = [node for node in nodes if node["name"] != name]  # those of a SuperLink that was lost
            nodes.append({"name": name, "key": key, "id": str(told["node-id"])})
            print(f"{name}: registered")
        elif "already" in why(told):
            print(f"{name}: is registered")
        else:
            print(f"{name}: {why(told)}", file=sys.stderr)
            failed = 1
    record.write_text(json.dumps(nodes))
    return failed


def flwr(what: str, *arguments: str) -> dict[str, object]:
    """What `flwr supernode` answers."""
    command = ["flwr", "supernode", what, *arguments, "--format", "json"]
    done = subprocess.run(command, capture_output=True, text=True)
    try:
        return json.loads(done.stdout[done.stdout.index("{") :])
    except ValueError:
        return {"error-message": done.stderr or done.stdout}


def why(told: dict[str, object]) -> str:
    """The reason of an answer."""
    return str(told.get("error-message", "")).strip()


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3])))
