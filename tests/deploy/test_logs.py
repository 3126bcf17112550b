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
