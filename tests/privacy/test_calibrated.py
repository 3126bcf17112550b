"""Calibrations on disk: found once, exact, and worth nothing where they are damaged."""

import json

import pytest

from fedlora.errors import SettingError
from fedlora.privacy import accounting, calibrated

TOLD = (6.0, 1e-5, [0.01, 0.1], 20, "rdp")


@pytest.fixture
def searched(monkeypatch):
    """The arguments of every search that was made."""
    made, search = [], accounting.calibrations

    def counted(*told):
        made.append(told)
        return search(*told)

    monkeypatch.setattr(accounting, "calibrations", counted)
    return made


def test_a_search_is_made_once_and_its_floats_come_back_as_they_were(tmp_path, searched, monkeypatch):
    monkeypatch.setattr(accounting, "calibrations", lambda *told: searched.append(told) or [0.1 + 0.2, 1 / 3])
    folder = tmp_path / "a" / "noise"
    first, second = calibrated.calibrations(folder, *TOLD), calibrated.calibrations(folder, *TOLD)
    assert first == second == [0.30000000000000004, 1 / 3] and len(searched) == 1
    assert [file.suffix for file in folder.iterdir()] == [".json"]


@pytest.mark.parametrize(
    "place, other", [(0, 5.0), (1, 1e-6), (2, [0.01, 0.2]), (2, [0.1, 0.01]), (3, 21), (4, "pld")]
)
def test_another_argument_is_another_search(tmp_path, searched, place, other):
    told = [*TOLD[:place], other, *TOLD[place + 1 :]]
    for arguments in (TOLD, told):
        assert calibrated.calibrations(tmp_path, *arguments) == accounting.calibrations(*arguments)
    assert len(searched) == 4 and len([*tmp_path.iterdir()]) == 2


@pytest.mark.parametrize("place", ["_FORMAT", "version"])
def test_another_format_or_version_is_another_search(tmp_path, searched, monkeypatch, place):
    calibrated.calibrations(tmp_path, *TOLD)
    monkeypatch.setattr(calibrated, place, 0 if place == "_FORMAT" else lambda name: f"{name} of tomorrow")
    calibrated.calibrations(tmp_path, *TOLD)
    assert len(searched) == 2


def less_noise(text):
    told = json.loads(text)
    return json.dumps({**told, "noise": [z / 2 for z in told["noise"]]})


def of_another(text):
    told = json.loads(text)
    key = told["key"].replace("6.0", "60.0")
    return json.dumps({**told, "key": key, "checksum": calibrated._checksum(key, told["noise"])})


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: "",
        lambda text: text[: len(text) // 2],
        lambda text: "[1, 2]",
        lambda text: "\x00" + text,
        less_noise,
        of_another,
    ],
)
def test_a_damaged_file_is_passed_over_and_made_again(tmp_path, searched, damage):
    right = calibrated.calibrations(tmp_path, *TOLD)
    (file,) = tmp_path.iterdir()
    whole = file.read_text()
    file.write_text(damage(whole))
    assert calibrated.calibrations(tmp_path, *TOLD) == right and len(searched) == 2
    assert file.read_text() == whole


def test_where_nothing_can_be_written_the_noise_is_there_all_the_same(tmp_path, searched):
    (tmp_path / "noise").write_text("a file in the folder's place")
    assert calibrated.calibrations(tmp_path / "noise", *TOLD) == accounting.calibrations(*TOLD)


def test_what_no_noise_reaches_is_refused_each_time(tmp_path):
    for _ in range(2):
        with pytest.raises(SettingError, match="no noise reaches epsilon"):
            calibrated.calibrations(tmp_path, 1e-6, 1e-5, [1.0], 10_000, "rdp")
    assert not [*tmp_path.iterdir()]
