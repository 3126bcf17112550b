import numpy as np
import pytest
from safetensors.numpy import load_file

from fedlora.simulation import simulate

ASKED = ("model.adapter.kind=auto", "data.client_test_share=0.2")


@pytest.mark.parametrize("own_head", [False, True])
def test_the_own_adapter_stays_and_moves_and_the_other_is_all_that_is_sent(own_head, tiny, tmp_path):
    told = f"strategy={{use: dual_lora, own_head: {str(own_head).lower()}}}"
    run = simulate(tiny(told, *ASKED), out=tmp_path / "run")
    kept = [load_file(run.folder / "personal" / f"{client}.2.safetensors") for client in (0, 1)]
    heads = {name for name in kept[0] if ".own_B." not in name}
    assert len(kept[0]) - len(heads) == 4 and len(heads) == 2 * own_head  # four layers; weight and bias
    assert all(not np.array_equal(kept[0][name], kept[1][name]) for name in kept[0])  # each its own
    sent = 4 * 32 * 4 + (0 if own_head else 2 * 32 + 2)  # B of four layers of 32 at r = 4
    for line in run.clients:
        assert 4 * sent <= line["bytes_up"] < 4 * (sent + 4 * 32 * 4)  # and words, but no other B
    assert run.summary["accuracy"] == run.rounds[-1]["local_accuracy"] and run.summary["epsilon"] <= 8
