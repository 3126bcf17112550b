"""What an officer reads is right for the unit, the masks and what leaves."""

import html
import re

import pytest

from fedlora import scenario as scenarios
from fedlora.cli import main
from fedlora.errors import UserError
from fedlora.reports import dossier
from fedlora.simulation import simulate

DATA = ("data.files={train: a.csv}",)
SGD = "clients.use=sgd"
PLAIN, ROW, PERSON = "privacy=null", "privacy={epsilon: 3, delta: 1.0e-5}", "privacy={epsilon: 3, person: patient}"
CLIENT = "privacy={epsilon: 3, unit: client}"
BOTH = "privacy={epsilon: 3, unit: client, example: {epsilon: 8}}"
MASKS, SHARED = "secure_aggregation={}", "secure_aggregation={noise: shared}"


@pytest.fixture
def words(tiny_yaml):
    def make(*overrides):
        told = scenarios.parse(tiny_yaml, "tiny.yaml", overrides).model_dump(mode="json")
        text = re.sub(r"<style>.*?</style>|<script.*?</script>", "", dossier.html(told), flags=re.DOTALL)
        return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", text)).split())

    return make


@pytest.mark.parametrize(
    ("overrides", "there", "absent"),
    [
        (
            (PLAIN, SGD),
            ["has no differential privacy", "nothing bounds what it can learn"],
            ["exp(", "before epsilon"],
        ),
        (
            (ROW,),
            ["The run ends before epsilon passes 3.", "exp(3.00) = 20", "The unit is one example"],
            ["masks:"],
        ),
        ((PERSON,), ["The unit is one person", "same patient", "how many persons it holds"], ["several rows"]),
        ((CLIENT, SGD), ["A single row is not protected", "The unit is one client"], ["how many persons"]),
        ((BOTH,), ["bounded by an epsilon for each row"], ["A single row is not protected"]),
        (
            (BOTH, "privacy.example.person=patient"),
            ["each person's part is clipped", "an epsilon for each person", "how many persons it holds"],
            ["each row's part"],
        ),
        (("strategy.use=fedavg_lora",), ["An adapter of kind lora and rank 4"], ["kind auto"]),
        ((ROW, MASKS), ["masks: the server learns the sum"], ["every update by itself"]),
        ((CLIENT, SGD, SHARED), ["bounded by server_epsilon"], ["every update by itself"]),
        (("privacy={noise_multiplier: 2}",), ["noise_multiplier 2) and no limit"], ["before epsilon passes"]),
        (
            ("privacy={epsilon: 3, share_metrics: true}", "data.client_test_share=0.2"),
            ["its training loss", "figures of rows that it holds out"],
            ["has no differential privacy"],
        ),
    ],
)
def test_it_says_what_holds_and_nothing_that_does_not(words, overrides, there, absent):
    said = words(*overrides)
    assert [one for one in there if one not in said] == [one for one in absent if one in said] == []


def test_a_finished_run_has_its_figures_beside_the_commonest_label(tiny, tmp_path):
    run = simulate(tiny("rounds=1"), out=tmp_path / "run")
    file = dossier.dossier(run.folder, tmp_path / "d.html")
    text = html.unescape(file.read_text())
    assert f"its accuracy is {run.summary['accuracy']:.3f}; always saying the commonest label has" in text
    assert "These are the figures of the run, from its ledger." in text


def test_it_is_written_by_name_and_refused_in_a_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert (
        main(["dossier", "smoke"]) == 0
        and "<h2>Before a site joins</h2>" in (tmp_path / "dossier.html").read_text()
    )
    with pytest.raises(UserError, match="holds no run"):
        dossier.dossier(tmp_path)
    capsys.readouterr()
    assert main(["dossier", "absent.yaml"]) == 2 and capsys.readouterr().err.count("\n") == 1
