"""Following a run from another terminal."""

import io
import threading

from rich.console import Console

from fedlora.cli import main
from fedlora.reports.console import Live, follow
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


def test_the_command_shows_a_run_that_has_ended(ten, capsys):
    assert main(["watch", str(ten.folder)]) == 0
    told = capsys.readouterr().out
    assert "1/3" in told and "3/3" in told and "tiny: accuracy" in told
