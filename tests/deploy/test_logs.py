"""What a site's log says of an error: where it came from and of which kind it is."""

import json
import logging

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
