"""Two regions of three sites: a regional server is a site of the one above, by the same contract of a strategy."""

from dataclasses import replace
from importlib.metadata import version

import numpy as np
import pytest
from safetensors.numpy import load_file

from fedlora import prepare, wire
from fedlora.engine.flower import FlowerEngine
from tests.deploy.federation import LocalGrid

SITES = 6


class Region:
    """To the server above a node that trains; to its own sites a server, which asks and sums them."""

    def __init__(self, scenario, client, nodes):
        self.scenario, self.client, self.cohort = scenario, client, sorted(n - 1 for n in nodes)
        self.engine = FlowerEngine(LocalGrid(nodes), SITES, run=f"region-{client}", deadline=60.0, join=0.0)

    def answer(self, kind, content, partition):
        if kind == "query":
            self.engine.start(prepare.prepare_server(self.scenario).setup)
            held = sum(site.num_examples for site in self.engine.roster.sites.values())
            told = {"client": self.client, "name": f"region-{self.client}", "version": version("fedlora")}
            return wire.pack_words({**told, "num_examples": held, "event": None})
        if kind != "train":
            return wire.pack_words({})
        instruction = wire.unpack_instruction(content, self.engine.description.layout)
        replies = self.engine.train(instruction, self.cohort, partial_sums=True)
        (mean,) = replies.updates  # of its sites, whose weights it has the sum of
        return wire.pack_update(replace(mean, clients=(self.client,)))


def adapter(run):
    return load_file(run.folder / "adapter" / "adapter_model.safetensors")


@pytest.mark.parametrize("use", ["fedavg_lora", "ffa_lora"])
def test_regions_of_sites_give_the_adapter_of_all_sites(sites, nodes, deployed, tiny, tmp_path, use):
    more = (f"strategy.use={use}", "data.partition={kind: dirichlet, alpha: 1.0}")
    scenario, files = sites(f"clients.total={SITES}", *more, private=False)
    made = nodes(files)
    flat, _ = deployed(scenario, LocalGrid(made), tmp_path / "runs" / "flat")
    above = tiny(f"data.files.test={tmp_path / 'sites' / 'test.csv'}", "clients.total=2", *more, private=False)
    regions = {
        number: Region(scenario, number - 1, {n: made[n] for n in part})
        for number, part in ((1, (1, 2, 3)), (2, (4, 5, 6)))
    }
    run, _ = deployed(above, LocalGrid(regions), tmp_path / "runs" / "above")
    assert [(line["clients"], line["failures"]) for line in run.rounds] == [(2, 0), (2, 0)]
    assert (
        len({region.engine.roster.sites[c].num_examples for region in regions.values() for c in region.cohort}) > 1
    )
    one, other = adapter(run), adapter(flat)
    assert one.keys() == other.keys() and all(np.allclose(one[n], other[n], atol=1e-6) for n in one)
    assert any(not np.array_equal(one[n], np.zeros_like(one[n])) for n in one)
    for region in regions.values():
        region.engine.close()
