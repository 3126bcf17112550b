"""What a site's log says of an error: where it came from and of which kind it is."""

import io
import json
import logging
from pathlib import Path

import pytest

from fedlora.deploy import logs
from fedlora.deploy.logs import Lines


def test_an_error_is_told_by_its_place_and_kind_and_never_by_its_words(caplog):
    try:
        try:
            {}["secret"]
        except KeyError as error:
            raise ValueError("B-secret") from error
    except ValueError:
        logging.getLogger("fedlora.test").exception("a request failed")
    told = json.loads(Lines("st-mary").format(caplog.records[0]))
    assert told["message"] == "a request failed" and told["part"] == "st-mary"
    assert told["traceback"].endswith("ValueError") and "test_logs.py" in told["traceback"]
    assert "B-secret" not in told["traceback"].replace('raise ValueError("B-secret")', "")


@pytest.fixture
def loggers():
    """Loggers as they were."""
    held = {name: logging.getLogger(name) for name in ("fedlora", "flwr")}
    before = {name: (logger.level, logger.propagate, logger.handlers) for name, logger in held.items()}
    yield
    for name, (level, propagate, handlers) in before.items():
        held[name].setLevel(level)
        held[name].propagate, held[name].handlers = propagate, handlers


def test_a_part_has_one_log_and_flower_s_lines_in_it_are_like_its_own(loggers, capfd):
    import flwr.common.logger  # its handler writes colours

    assert flwr.common.logger.FLOWER_LOGGER.handlers
    logs.start("server", logging.StreamHandler(shown := io.StringIO()))
    logging.getLogger("fedlora.deploy").info("round %d", 1, extra={"round": 1})
    flwr.common.logger.log(logging.WARNING, "a node is %s", "away")
    lines = [json.loads(line) for line in shown.getvalue().splitlines()]
    assert [(one["level"], one["part"], one["message"]) for one in lines] == [
        ("info", "server", "round 1"),
        ("warning", "server", "a node is away"),
    ]
    assert "\x1b" not in shown.getvalue() and capfd.readouterr() == ("", "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_disk_is_one_line_and_other_handlers_go_on(capsys):
    shown = io.StringIO()
    record = logging.makeLogRecord({"name": "fedlora.x", "levelno": logging.INFO, "msg": "joined"})
    handlers = [logs.File("/dev/full"), logging.StreamHandler(shown)]
    for _ in range(3):
        for handler in handlers:
            handler.handle(record)
    assert capsys.readouterr().err == "/dev/full: cannot be written: No space left on device\n"
    assert shown.getvalue() == 3 * "joined\n"
    with pytest.raises(OSError, match="No space"):
        handlers[0].close()
