import sys
from dataclasses import dataclass, field

import pytest

from fedlora import plugins
from fedlora.errors import SettingError
from fedlora.strategies.ffa_lora import FFALoRA
from fedlora.strategies.florist import FLoRIST


@dataclass(kw_only=True)
class Trimmed:
    trim: float = 0.1
    made: int = field(default=3, init=False)

    def __post_init__(self) -> None:
        if not 0 <= self.trim < 0.5:
            raise ValueError(f"trim should be in [0, 0.5), not {self.trim}")


class Plain:
    def __init__(self, momentum: float = 0.0) -> None:
        self.momentum = momentum


class Open:
    def __init__(self, **options: int) -> None:
        self.options = options


class Bare:
    pass


@pytest.fixture
def lab(tmp_path, monkeypatch):
    """A researcher's folder on the path."""
    (tmp_path / "my_lab").mkdir()
    (tmp_path / "my_lab" / "mine.py").write_text("class Mine:\n    pass\n\ndef function():\n    pass\n")
    (tmp_path / "my_lab" / "broken.py").write_text("import a_package_that_is_not_there\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield
    for name in [n for n in sys.modules if n.split(".")[0] == "my_lab"]:
        del sys.modules[name]


def test_names_are_the_modules_of_the_folder():
    assert {"fedavg_lora", "ffa_lora"} <= set(plugins.names("strategies"))
    assert {"dp_sgd", "sgd"} <= set(plugins.names("clients"))
    assert "__init__" not in plugins.names("clients")


@pytest.mark.parametrize("kind", ["strategies", "clients"])
def test_every_built_in_is_found_and_says_in_a_line_what_it_is(kind):
    for name in plugins.names(kind):
        assert plugins.problem(kind, name) is None
        assert plugins.find(kind, name).__module__ == f"fedlora.{kind}.{name}"
        summary = plugins.summary(kind, name)
        assert summary == (plugins.find(kind, name).__doc__ or "").splitlines()[0] != ""


@pytest.mark.parametrize(
    ("kind", "use", "message"),
    [
        ("strategies", "ffa_lra", "unknown strategy 'ffa_lra': did you mean 'ffa_lora'?; or 'module:Class'"),
        ("clients", "dpsgd", "unknown client 'dpsgd': did you mean 'dp_sgd'?"),
        ("clients", "zzz", "unknown client 'zzz': known: dp_sgd, "),
        ("clients", "_private", "unknown client"),
        ("strategies", ":Mine", "':Mine' should read 'package.module:Class'"),
        ("strategies", "my_lab.mine:", "should read"),
        ("strategies", "my-lab:Mine", "should read"),
        ("strategies", "../lab:Mine", "should read"),
        ("strategies", "a:B:C", "should read"),
    ],
)
def test_a_wrong_name_is_told_with_what_to_write(kind, use, message):
    assert message in str(plugins.problem(kind, use))
    key = {"strategies": "strategy.use", "clients": "clients.use"}[kind]
    with pytest.raises(SettingError) as caught:
        plugins.find(kind, use)
    assert caught.value.key == key and message in caught.value.message


def test_problem_imports_nothing(lab):
    assert plugins.problem("strategies", "my_lab.broken:Mine") is None
    assert "my_lab" not in sys.modules


def test_a_class_of_ones_own_is_found_by_its_module(lab):
    assert plugins.find("strategies", "my_lab.mine:Mine").__name__ == "Mine"
    assert plugins.find("strategies", "fedlora.strategies.ffa_lora:FFALoRA") is FFALoRA


@pytest.mark.parametrize(
    ("use", "message"),
    [
        ("my_lab.mine:Min", "module 'my_lab.mine' has no class 'Min': did you mean 'Mine'?"),
        ("my_lab.mine:function", "has no class 'function': known: Mine"),
        ("my_lab.broken:Mine", "cannot import 'my_lab.broken' (No module named 'a_package_that_is_not_there')"),
        ("my_lab.absent:Mine", "cannot import 'my_lab.absent'"),
        ("no_lab:Mine", "is its folder on PYTHONPATH?"),
        ("strategies.ffa_lora:FFALoRA", "every class would exist twice"),
    ],
)
def test_what_cannot_be_found_is_an_error_of_the_setting(lab, use, message):
    with pytest.raises(SettingError) as caught:
        plugins.find("strategies", use)
    assert caught.value.key == "strategy.use" and message in caught.value.message


def test_build_passes_the_options():
    assert plugins.build(Trimmed, {"trim": 0.2}, "strategy").trim == 0.2
    assert plugins.build(Plain, {"momentum": 0.9}, "clients").momentum == 0.9
    assert plugins.build(Open, {"anything": 1}, "clients").options == {"anything": 1}
    assert isinstance(plugins.build(Bare, {}, "clients"), Bare)


@pytest.mark.parametrize(
    ("cls", "options", "key", "message"),
    [
        (
            Trimmed,
            {"trin": 0.2},
            "strategy.trin",
            ":Trimmed has no option 'trin': did you mean 'trim'?",
        ),
        (Trimmed, {"made": 4}, "strategy.made", ":Trimmed has no option 'made': known: trim"),
        (Plain, {"momentun": 1}, "strategy.momentun", "did you mean 'momentum'?"),
        (Bare, {"x": 1}, "strategy.x", ":Bare has no option 'x': it takes none"),
        (Trimmed, {"trim": 0.5}, "strategy.trim", "trim should be in [0, 0.5), not 0.5"),
        (Trimmed, {"trim": "a"}, "strategy.trim", "should be a number, not 'a'"),
        (Trimmed, {"trim": "0.2"}, "strategy.trim", "should be a number, not '0.2'"),
        (Trimmed, {"trim": True}, "strategy.trim", "should be a number, not true"),
        (Trimmed, {"trim": None}, "strategy.trim", "should be a number, not null"),
        (FLoRIST, {"tau": "0.5"}, "strategy.tau", "should be a number, not '0.5'"),
        (FFALoRA, {"tau": 0.5}, "strategy.tau", "ffa_lora has no option 'tau': fedmomentum and florist have it"),
    ],
)
def test_build_refuses_what_the_class_does_not_take(cls, options, key, message):
    with pytest.raises(SettingError) as caught:
        plugins.build(cls, options, "strategy")
    assert caught.value.key == key and message in caught.value.message
