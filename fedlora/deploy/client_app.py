"""The Flower ClientApp: hands each message to the node's resident worker. It imports no torch."""

import os
import sys
from pathlib import Path

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedlora import wire, wire_base
from fedlora.deploy import resident
from fedlora.privacy import secure

SITE = "FEDLORA_SITE"  # names the site file of a node; so does `site` in the SuperNode's configuration

app = ClientApp()


def _answer(message: Message, context: Context) -> Message:
    partition = int(context.node_config.get("partition-id", 0))
    words = {"kind": message.metadata.message_type, "partition": partition}
    try:
        told, reply = resident.ask(_place(context), _app(), words, wire.to_bytes(message.content))
    except resident.Unreachable as error:
        return wire.error_reply(message, str(error))
    if "error" in told:
        return wire.error_reply(message, str(told["error"]))
    return Message(wire.from_bytes(reply), reply_to=message)


def _place(context: Context) -> Path:
    """The site file; in Flower's own simulation, where there is none, a folder for the run."""
    if site := os.environ.get(SITE) or context.node_config.get("site"):
        return Path(str(site))
    folder = resident.home() / f"run-{context.run_id}"
    folder.mkdir(exist_ok=True)
    return folder


def _app() -> Path:
    """The folder of the Flower app, which Flower puts on the path."""
    return next((Path(p) for p in sys.path if p and (Path(p) / "pyproject.toml").is_file()), Path.cwd())


for kind in (app.query, app.train, app.evaluate):
    kind()(_answer)
for exchange in (
    secure.KEYS,
    secure.SHARES,
    secure.REVEAL,
    wire.END,
    wire.SURVEY,
    wire_base.STATISTIC,
):  # `MASKED` comes with a training
    app.query(exchange)(_answer)
