"""The site's pages: every command parses, every snippet runs, every setting is real."""

import re
import shlex
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
import yaml

from fedlora import scenario, sweep
from fedlora.cli import _parser, main
from fedlora.deploy.site import Site
from fedlora.scenario.schema import within

ROOT = Path(__file__).parents[2]
PAGES = {file.stem: file.read_text() for file in sorted((ROOT / "docs").glob("*.md"))}


def anchors(page):
    return re.findall(r"^### .* \{#([a-z]+)\}$", page, re.M)


def blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```", PAGES[page], re.S | re.M)


def test_every_page_is_on_the_site():
    told = (ROOT / "mkdocs.yml").read_text()
    assert {f"{name}.md" for name in PAGES} == set(re.findall(r"[a-z]+\.md", told))


def headings(page):
    """The anchors of a page: of each heading outside of code its own, or what is made of its words."""
    text = re.sub(r"^```.*?^```", "", PAGES[page], flags=re.S | re.M)
    for title in re.findall(r"^#+ (.*)$", text, re.M):
        own = re.search(r"\{#([\w-]+)\}$", title)
        words = re.sub(r"[^\w\s-]", "", re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title)).strip().lower()
        yield own[1] if own else re.sub(r"[-\s]+", "-", words)
    yield from re.findall(r'id="([\w-]+)"', text)


@pytest.mark.parametrize("page", PAGES)
def test_every_link_to_a_heading_finds_one(page):
    found = re.findall(r"\]\(((?:[a-z]+\.md)?)#([\w-]+)\)", PAGES[page])
    assert [(to, anchor) for to, anchor in found if anchor not in headings(to.removesuffix(".md") or page)] == []


@pytest.mark.parametrize("page", PAGES)
def test_every_command_parses_and_names_real_settings(page):
    """In blocks, as `$ fedlora ...`, and between backticks."""
    found = re.findall(r"^\$ (fedlora .*)$|`(fedlora [a-z]+ [^`]+)`", PAGES[page], re.M)
    for command in ("".join(pair) for pair in found):
        told = _parser().parse_args(shlex.split(command)[1:])
        if getattr(told, "scenario", None) in scenario.shipped():
            scenario.load(told.scenario, told.overrides)
        if getattr(told, "sweep", None):
            sweep.load(told.sweep)


def test_the_quickstart_runs_from_top_to_bottom(small, tmp_path, capsys):
    commands = re.findall(r"^\$ fedlora (.*)$", PAGES["index"], re.M)
    assert len(commands) == 9
    for command in commands:
        assert main(shlex.split(command)) == 0, f"{command}: {capsys.readouterr()}"
    assert (tmp_path / "here" / "runs" / "first" / "report.html").exists()
    assert (tmp_path / "here" / "adapter" / "adapter_config.json").exists()
    (code,) = blocks("index", "python")
    exec(code, {})
    assert "num_examples" in capsys.readouterr().out


ELSEWHERE = ("audit", "compress", "sweep", "tune", "split", "submit", "survey", "site")


def test_every_command_on_the_other_pages_runs(small, reviews, capsys):
    """But for those of minutes and of deployments: they have tests of their own."""
    (small / "my.csv").write_text(reviews.read_text())
    assert main(["simulate", "smoke", "--out", "runs/first"]) == 0
    (small / "sweeps" / "epsilon" / "runs").mkdir(parents=True)
    (small / "sweeps" / "epsilon" / "runs" / "one").symlink_to(small / "runs" / "first")
    ran = set()
    for page in PAGES.keys() - {"index", "strategies"}:
        for pair in re.findall(r"^\$ fedlora (.*)$|`fedlora ([a-z]+ [^`]+)`", PAGES[page], re.M):
            command = "".join(pair).replace("RUN", "runs/first").replace("runs/*", "runs/one")
            if command not in ran and command.split()[0] not in ELSEWHERE:
                assert main(shlex.split(command)) == 0, f"{command}: {capsys.readouterr()}"
                ran.add(command)
    assert {"ledger runs/first", "compare sweeps/epsilon/runs/one", "check gsm8k", "simulate sites"} < ran


def test_the_python_of_the_concepts_runs(small):
    names: dict = {}
    for code in blocks("concepts", "python"):
        exec(code, names)
    assert names["run"].summary["rounds"] == 1


def test_the_python_of_the_interface_runs(small, monkeypatch):
    """The first block as it is; the others as `mine.py`, by the settings that the page names them with."""
    first, *own = blocks("api", "python")
    own += blocks("kinds", "python")
    exec(first, names := {})
    assert (names["folder"] / "adapter_config.json").exists() and names["answers"][0].text == "what a lovely day"
    monkeypatch.syspath_prepend(str(small))
    monkeypatch.delitem(sys.modules, "mine", raising=False)  # another page has one too
    (small / "mine.py").write_text("\n\n".join(own))
    plain = ["privacy=null", "rounds=1", "clients.use=mine:Momentum", "clients.momentum=0.5"]
    more = ["task=mine:Mistakes", "model.adapter.kind=mine:RsLora", "engine.fused=2"]
    run = names["fedlora"].simulate(names["fedlora"].load("smoke", [*plain, *more]), out="own")
    assert 0 <= run.summary["mistakes"] <= 1 and run.metric == "mistakes"
    named = re.findall(r"^::: fedlora\.(\w+)$", PAGES["api"], re.M)
    assert sorted(named) == sorted({*names["fedlora"].__all__} - {"Adapter"})


@pytest.mark.parametrize("page", ["concepts", "scenarios", "reference", "privacy", "devices"])
def test_the_settings_on_a_page_are_real(page):
    whole = {"name": "x", "data": {"dataset": "tweets"}, "clients": {"total": 20}, "rounds": 1}
    for block in blocks(page, "yaml"):
        scenario.parse(yaml.safe_dump({**whole, "strategy": {"use": "ffa_lora"}, **yaml.safe_load(block)}))


def test_the_sweep_on_its_page_is_sound(tmp_path):
    (file := tmp_path / "rates.yaml").write_text(blocks("sweeps", "yaml")[0])
    assert sweep.load(file).parallel == 2


def test_the_reference_has_every_key_with_its_default():
    made = spec_from_file_location("hooks", ROOT / "docs" / "hooks.py")
    made.loader.exec_module(hooks := module_from_spec(made))
    page = hooks.on_page_markdown(PAGES["reference"])
    assert hooks.MARK not in page and page.count("\n### ") == page.count("{#") == len(set(anchors(page)))
    rows = page.splitlines()
    for row in (
        "| `per_round` | whole number (at least 1) or `null` | `null` | Clients that train in each round. null: "
        "all of them. Fewer cost less time, and each of them spends less epsilon. Example: `5`. |",
        "| `adapter` | [mapping](#adapter) | see there | Which layers are trained, and how. |",
        "### `strategy.server`, kind adam or yogi {#serveradam}",
    ):
        assert row in rows
    for root in (scenario.Scenario, Site):
        for section in within(root):
            own = page.partition(f" {{#{section.__name__.lower()}}}\n")[2].partition("\n###")[0]
            assert all(f"| `{key}` |" in own for key in section.model_fields), section
    assert set(re.findall(r"\]\(#([a-z]+)\)", page)) <= set(anchors(page))
