"""What only Ray can get wrong, each with a Ray of its own."""

import gc
from dataclasses import replace

import pytest

from fedlora.engine.ray import RayEngine
from fedlora.errors import SettingError
from fedlora.simulation import prepare

pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")


def test_a_worker_that_cannot_load_says_why(tiny, tmp_path):
    setup = prepare(tiny()).setup
    broken = {**setup.scenario, "model": {**setup.scenario["model"], "base": str(tmp_path)}}
    engine = RayEngine(4, workers=1)
    try:
        with pytest.raises(SettingError, match=r"model\.base") as caught:
            engine.start(replace(setup, scenario=broken))
        assert caught.value.key == "model.base"
    finally:
        engine.close()
        gc.collect()  # while its warnings are still let pass
