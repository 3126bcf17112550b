"""Following a run from another terminal."""

import io
import threading
from types import SimpleNamespace

import pytest
from rich.console import Console

from fedlora.cli import main
from fedlora.reports.console import Live, _privacy_lines, follow
from fedlora.run import Run


def test_rounds_are_shown_as_they_are_written_and_the_end_ends_it(copy):
    run = copy()
    metrics, summary = run.folder / "metrics.jsonl", run.folder / "summary.json"
    lines, ended = metrics.read_text().splitlines(keepends=True), summary.read_text()
    summary.unlink()
    metrics.write_text(lines[0] + lines[1][:9])  # the second is being written
    seen, first = [], threading.Event()

    class Heard(Live):
        def round(self, line):
            seen.append(line["round"])
            first.set()

    def goes_on():
        first.wait(10)
        metrics.write_text("".join(lines))
        summary.write_text(ended)

    writer = threading.Thread(target=goes_on)
    writer.start()
    with Heard(Console(file=io.StringIO())) as display:
        last = follow(Run.open(run.folder), display, pause=0.01)
    writer.join()
    assert seen == [1, 2, 3] and last.summary["rounds"] == 3


@pytest.mark.parametrize(("honest", "said"), [(1.0, "all"), (0.7, "70%")])
def test_shared_noise_has_both_its_epsilons_and_says_from_whom(honest, said):
    """The run's end is the screen that everybody reads."""
    scenario = {
        "privacy": {"unit": "example", "delta": 1e-5},
        "secure_aggregation": {"noise": "shared", "honest": honest},
    }
    run = SimpleNamespace(scenario=scenario, summary={"epsilon": 5.99, "own_epsilon": 23.4}, rounds=())
    head, _, seen, own = _privacy_lines(run)
    assert "epsilon 5.99 at delta 1e-05 for each example" in head
    assert f"from all who see sums, the server too, if {said} of those who send keep their noise" in seen
    assert "a client's own part alone: epsilon 23.4" in own
    del run.scenario["secure_aggregation"]
    assert len(_privacy_lines(run)) == 2


def test_the_command_shows_a_run_that_has_ended(ten, capsys):
    assert main(["watch", str(ten.folder)]) == 0
    told = capsys.readouterr().out
    assert "1/3" in told and "3/3" in told and "tiny: accuracy" in told
