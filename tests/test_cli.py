"""The command line as a person meets it: in a process of its own."""

import json
import re
import signal
import subprocess
import sys
import time

import pytest

from fedlora import plugins
from fedlora.cli import main


def fedlora(*arguments, cwd=None):
    return subprocess.run(
        [sys.executable, "-m", "fedlora", *arguments], capture_output=True, text=True, cwd=cwd, timeout=120
    )


@pytest.fixture
def scenario(tiny_yaml, tmp_path):
    file = tmp_path / "tiny.yaml"
    file.write_text(tiny_yaml)
    return file


@pytest.mark.parametrize(
    "code",
    [
        "from fedlora.cli import main; main(['--help'])",
        "from fedlora.cli import main; main(['check', 'smoke'])",
        "from fedlora.cli import main; main(['list'])",
        "from fedlora.cli import main; main(['explain', 'clients.lr'])",
    ],
)
def test_what_should_be_quick_imports_neither_torch_nor_ray(code):
    report = f"""
import sys
try:
    {code}
except SystemExit:
    pass
print("heavy:", sorted({{"torch", "ray", "transformers", "opacus"}} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", report], capture_output=True, text=True, timeout=60)
    assert "heavy: []" in done.stdout, done.stderr


def test_help_imports_next_to_nothing():
    code = "import sys\nfrom fedlora.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
    code += "print('modules:', {'numpy', 'pydantic', 'yaml', 'rich', 'flwr'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert "modules: set()" in done.stdout


def test_a_run_from_the_shell(scenario, tmp_path):
    done = fedlora("simulate", str(scenario), "--out", str(tmp_path / "run"), "--set", "rounds=1")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("tiny: accuracy 0.") and str(tmp_path / "run" / "adapter") in done.stdout
    assert (
        "  privacy  epsilon " in done.stdout and " for each example, by the client that spent most" in done.stdout
    )
    assert [line.split()[0] for line in done.stderr.splitlines()] == ["tiny", "epsilon:", "round", "1/1"]
    again = fedlora("simulate", str(scenario), "--out", str(tmp_path / "run"), "--set", "rounds=1")
    assert (again.returncode, again.stdout) == (2, "") and again.stderr.count("\n") == 1
    assert "already holds a run" in again.stderr


def test_the_default_folder_is_named_after_the_scenario(scenario, tmp_path):
    done = fedlora("simulate", str(scenario), "--set", "rounds=1", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (run,) = (tmp_path / "runs").iterdir()
    assert run.name.startswith("tiny-") and len(run.name) == len("tiny-") + 8


def test_ctrl_c_leaves_a_usable_folder_and_resume_finishes_it(scenario, tmp_path):
    out = tmp_path / "run"
    settings = ("--set", "rounds=400", "--set", "eval_every=400")
    process = subprocess.Popen(
        [sys.executable, "-m", "fedlora", "simulate", str(scenario), "--out", str(out), *settings],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 90
    while not (out / "metrics.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    printed, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert re.search(r"stopped  interrupted after round \d+; continue with --resume", printed)
    assert "Traceback" not in errors
    assert (out / "adapter" / "adapter_model.safetensors").exists() and (out / "summary.json").exists()


def test_killed_in_a_round_and_resumed_reports_no_less(scenario, tmp_path):
    """SIGKILL as soon as the ledger grows past the last checkpoint; the same run uninterrupted beside it."""
    settings = ("--set", "rounds=12", "--set", "eval_every=12", "--set", "privacy.epsilon=30")
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert fedlora("simulate", str(scenario), "--out", str(whole), *settings).returncode == 0
    command = [sys.executable, "-m", "fedlora", "simulate", str(scenario), "--out", str(cut), *settings]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline, file = time.monotonic() + 90, cut / "privacy.jsonl"
    while (not file.exists() or file.read_bytes().count(b"\n") < 9) and time.monotonic() < deadline:
        time.sleep(0.001)
    process.kill()
    process.wait(timeout=60)
    with file.open("ab") as stream:
        stream.write(b'{"round": 12, "cli')  # and in mid-write
    done = fedlora("simulate", str(scenario), "--out", str(cut), *settings, "--resume")
    assert done.returncode == 0, done.stderr
    one, other = (json.loads((folder / "summary.json").read_text()) for folder in (whole, cut))
    assert other["epsilon"] >= one["epsilon"] > 0 and other["accuracy"] == one["accuracy"]
    assert file.read_bytes() == (whole / "privacy.jsonl").read_bytes()


def test_a_ledger_is_verified_and_told_by_every_accountant(scenario, tmp_path, capsys):
    out = tmp_path / "run"
    assert main(["simulate", str(scenario), "--out", str(out), "--set", "rounds=1"]) == 0
    capsys.readouterr()
    assert main(["ledger", str(out)]) == 0
    head, *lines = capsys.readouterr().out.splitlines()
    assert head == f"{out}/privacy.jsonl: whole, 4 events"
    assert [line.split()[0] for line in lines] == ["pld", "prv", "rdp"]
    assert all("0.001)-differential privacy for each example" in line for line in lines)
    (out / "privacy.jsonl").write_text((out / "privacy.jsonl").read_text().replace('"steps": 2', '"steps": 1', 1))
    for command in (["ledger", str(out)], ["simulate", str(scenario), "--out", str(out), "--resume"]):
        assert main([*command, "--set", "rounds=2"] if command[0] == "simulate" else command) == 2
        told = capsys.readouterr().err
        assert told.startswith(f"{out}/privacy.jsonl:1: does not follow") and told.count("\n") == 1


@pytest.mark.parametrize(
    "lines, words",
    [
        (["nope: 1"], "unknown key 'nope'"),
        (["rounds: ten"], "rounds"),
        (["  - : ["], "not YAML"),
    ],
)
def test_bad_files_are_one_line_each_with_exit_code_2(tmp_path, capsys, lines, words):
    file = tmp_path / "bad.yaml"
    file.write_text("\n".join(["name: x", *lines]))
    assert main(["check", str(file)]) == 2
    told = capsys.readouterr()
    assert told.out == "" and words in told.err and "Traceback" not in told.err
    assert all(line.startswith(f"{file}") for line in told.err.splitlines())


@pytest.mark.parametrize(
    ("told", "others"),
    [
        ([], []),
        (["strategy.server={kind: adam, lr: 0.1}"], ["strategy.server: adam"]),
        (["clients.optimizer=adamw"], ["clients.optimizer: adamw"]),
    ],
)
def test_check_says_where_bands_are_not_what_cancels_best(scenario, capsys, told, others):
    assert main(["check", str(scenario), *(f"--set={one}" for one in ["privacy.bands=2", *told])]) == 0
    fine, *lines = capsys.readouterr().out.splitlines()
    notes = [line for line in lines if line.startswith("privacy.bands")]
    assert fine.endswith(": fine") and len(notes) == len(others)
    assert all(f"under {other} it protects as much, and may help less" in notes[0] for other in others)
    assert main(["check", str(scenario), *(f"--set={one}" for one in told)]) == 0
    assert "privacy.bands" not in capsys.readouterr().out


def test_check_finds_options_that_the_strategy_lacks(scenario, capsys):
    assert main(["check", str(scenario)]) == 0
    assert main(["check", str(scenario), "--set", "strategy.trim=1"]) == 2
    assert "ffa_lora has no option 'trim'" in capsys.readouterr().err


def test_check_reads_the_data_and_says_all_that_is_wrong(scenario, capsys):
    wrong = ("data.files.text=texts", "model.base=/no/such/folder", "strategy.trim=1")
    assert main(["check", str(scenario), *(f"--set={w}" for w in wrong)]) == 2
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 3 and "did you mean 'text'" in told[2] and "no such folder" in told[1]


def test_list_names_everything_once(capsys):
    assert main(["list"]) == 0
    told = capsys.readouterr().out
    for name in [*plugins.names("strategies"), *plugins.names("clients"), "tweets", "noniid", "smoke"]:
        (line,) = [one for one in told.splitlines() if one.split()[:1] == [name]]
        assert len(line.split()) > 3


def test_list_what(capsys):
    assert main(["list", "clients"]) == 0
    assert "dp_sgd" in (told := capsys.readouterr().out) and "ffa_lora" not in told


def test_version(capsys):
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out.startswith("fedlora 0.")


def test_an_unknown_scenario_names_those_there_are(capsys):
    assert main(["simulate", "nonid"]) == 2
    assert "did you mean 'noniid'" in capsys.readouterr().err


def test_on_a_terminal_there_is_a_line_for_each_round(tiny, tmp_path):
    import io

    from rich.console import Console

    from fedlora.reports.console import Live
    from fedlora.simulation import simulate

    screen = Console(file=io.StringIO(), force_terminal=True, width=110)
    with Live(screen) as display:
        simulate(tiny(), out=tmp_path / "run", display=display)
    shown = screen.file.getvalue()
    assert "1/2" in shown and "2/2" in shown and "epsilon" in shown and "kB" in shown


def test_without_a_terminal_too_and_rows_fit_80_columns(tiny, tmp_path):
    import io
    import re

    from rich.console import Console

    from fedlora.reports.console import Live
    from fedlora.simulation import simulate

    with Live(Console(file=(told := io.StringIO()), width=80)) as display:
        simulate(tiny(), out=tmp_path / "run", display=display)
    lines = told.getvalue().splitlines()
    head = next(n for n, line in enumerate(lines) if line.split()[:2] == ["round", "clients"])
    rows = lines[head:]
    assert [row.split()[0] for row in rows] == ["round", "1/2", "2/2"] and max(map(len, rows)) <= 80
    assert re.fullmatch(
        r"  time     \d+:\d\d in all: start \d+:\d\d \(rows, noise, model\), rounds \d+:\d\d, "
        r"end \d+:\d\d \(adapter, card\)",
        display.time_line(),
    )


def test_a_command_that_there_is_not_is_one_line(capsys):
    for words, told in (
        (["plann"], "fedlora: unknown command 'plann': did you mean 'plan'?\n"),
        (["site", "chek"], None),
    ):
        with pytest.raises(SystemExit) as raised:
            main(words)
        said = capsys.readouterr().err
        assert raised.value.code == 2 and said.count("\n") == 1 and "did you mean" in said and told in (None, said)
