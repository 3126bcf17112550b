"""The cache and what is in it; sources are in test_reading.py, partitions in test_partitions.py."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fedlora.data.cache import cache_folder
from fedlora.data.reading import Rows, read
from fedlora.data.store import Dataset, Encoded, prepare
from fedlora.errors import SettingError, UserError
from fedlora.rounds.folder import partitions
from fedlora.scenario import Data, Files, LabelShares, Natural, Sampled


def source(path: Path, **more) -> Data:
    return Data(files=Files(**{"train": str(path), "test": str(path), **more}))


def error_of(config: Data, task: str = "classification") -> SettingError:
    with pytest.raises(SettingError) as caught:
        prepare(config, task, 1, 0, Encoder(), "e")
    return caught.value


class Encoder:
    """A token for each character; counts its calls."""

    def __init__(self, break_at: int = 0) -> None:
        self.calls, self.break_at = 0, break_at

    def __call__(self, rows: Rows) -> Encoded:
        self.calls += 1
        if self.calls == self.break_at:
            raise RuntimeError("out of memory")
        names = sorted(set(rows.labels or ()))
        return Encoded(
            [[ord(c) for c in text] for text in rows.texts], [names.index(x) for x in rows.labels or ()]
        )


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("FEDLORA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def table(tmp_path) -> Path:
    """400 texts of 6 characters, two labels."""
    file = tmp_path / "table.csv"
    file.write_text("text,label\n" + "".join(f"row{i:03},{'ab'[i % 2]}\n" for i in range(400)))
    return file


def test_what_is_prepared_is_what_was_read(table, cache):
    made = prepare(source(table), "classification", 4, 0, Encoder(), "e")
    rows = read(source(table), "classification")[0]
    assert made.labels == ("a", "b") and (len(made.train), len(made.test), made.num_clients) == (400, 400, 4)
    assert ["".join(map(chr, made.train.row(i))) for i in range(400)] == rows.texts
    assert [made.labels[t] for t in made.train.targets] == rows.labels
    np.testing.assert_array_equal(made.train.lengths(np.array([0, 399])), [6, 6])
    parts = [made.partition(k) for k in range(4)]
    assert [len(p) for p in parts] == [made.num_examples(k) for k in range(4)] == [100] * 4
    assert sorted(np.concatenate([p.rows for p in parts]).tolist()) == list(range(400))
    again = Dataset.open(made.folder, made.partition_folder)
    np.testing.assert_array_equal(again.holdings.rows, made.holdings.rows)


def test_a_histogram_by_hand(tmp_path, cache):
    (tmp_path / "a.csv").write_text("text,label,site\na,x,0\nb,y,0\nc,y,0\nd,z,1\ne,y,1\n")
    how = Natural(kind="natural", column="site")
    config = source(tmp_path / "a.csv").model_copy(update={"partition": how})
    made = prepare(config, "classification", 2, 0, Encoder(), "e")
    np.testing.assert_array_equal([made.histogram(0), made.histogram(1)], [[1, 2, 0], [0, 1, 1]])
    assert made.sizes() == {2: 1, 3: 1}
    assert made.majority == 0.6  # three y of five test rows
    bare = config.model_copy(update={"files": config.files.model_copy(update={"label": None})})
    unlabelled = prepare(bare, "causal_lm", 2, 0, lambda rows: Encoded([[1]] * 5, [0] * 5), "e")
    np.testing.assert_array_equal([unlabelled.histogram(0), unlabelled.histogram(1)], [[3], [2]])
    assert unlabelled.majority is None


def test_tokens_are_mapped_from_disk_and_not_read_into_memory(table, cache):
    made = prepare(source(table), "classification", 4, 0, Encoder(), "e")
    for array in (made.train.tokens, made.train.targets, made.train.offsets, made.holdings.rows):
        assert isinstance(array.base, np.memmap) and not array.flags.writeable
    assert made.folder.is_relative_to(cache) and made.partition_folder.is_relative_to(cache)


def test_rows_are_encoded_once(table, cache):
    encode = Encoder()
    first = prepare(source(table), "classification", 4, 0, encode, "e")
    assert encode.calls == 2  # train and test
    again = prepare(source(table), "classification", 4, 0, encode, "e")
    other = prepare(source(table), "classification", 5, 1, encode, "e")  # another split of the same tokens
    assert encode.calls == 2
    assert (first.folder, first.partition_folder) == (again.folder, again.partition_folder)
    assert other.folder == first.folder and other.partition_folder != first.partition_folder


@pytest.mark.parametrize("what", ["text", "label", "max_length", "encoding", "task"])
def test_rows_are_encoded_again_when_what_goes_in_differs(what, table, cache):
    encode, config, task, encoding = Encoder(), source(table), "classification", "e"
    first = prepare(config, task, 4, 0, encode, encoding)
    if what == "text":
        table.write_text(table.read_text().replace("row399", "row39X"))
    elif what == "label":
        table.write_text(table.read_text().replace("row399,b", "row399,a"))
    elif what == "max_length":
        config = config.model_copy(update={"max_length": 64})
    elif what == "encoding":
        encoding = "f"
    else:
        task = "causal_lm"
    second = prepare(config, task, 4, 0, encode, encoding)
    assert encode.calls == 4 and second.folder != first.folder


@pytest.mark.parametrize("call", [1, 2])
def test_an_encoder_that_fails_leaves_nothing_behind(call, table, cache):
    with pytest.raises(RuntimeError, match="out of memory"):
        prepare(source(table), "classification", 4, 0, Encoder(break_at=call), "e")
    assert [p for p in cache.rglob("*") if p.name != "tokens"] == []
    assert len(prepare(source(table), "classification", 4, 0, Encoder(), "e").train) == 400


def test_a_split_that_fails_leaves_no_partition_behind(table, cache):
    assert error_of(source(table).model_copy(update={"partition": Natural(kind="natural", column="label")})).key
    assert not list((cache / "tokens").glob(".making-*")) and len(list((cache / "tokens").iterdir())) == 1


def test_two_runs_at_once_end_with_one_cache_entry(table, cache):
    def encode(rows: Rows) -> Encoded:  # another run finishes while this one encodes
        if not (cache / "done").exists():
            (cache / "done").touch()
            prepare(source(table), "classification", 4, 0, Encoder(), "e")
        return Encoder()(rows)

    made = prepare(source(table), "classification", 4, 0, encode, "e")
    assert len(made.train) == 400 and len(list((cache / "tokens").iterdir())) == 2  # tokens, partitions


def test_the_cache_folder_follows_the_environment(monkeypatch):
    monkeypatch.setenv("FEDLORA_CACHE", "/a")
    monkeypatch.setenv("XDG_CACHE_HOME", "/b")
    monkeypatch.setenv("HOME", "/c")
    assert str(cache_folder()) == "/a"
    monkeypatch.delenv("FEDLORA_CACHE")
    assert str(cache_folder()) == "/b/fedlora"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert str(cache_folder()) == "/c/.cache/fedlora"


def test_rows_that_make_no_token_are_counted_each_time(table, cache, caplog):
    class Some(Encoder):
        def __call__(self, rows):
            return replace(super().__call__(rows), empty=1)

    for _ in range(2):
        caplog.clear()
        assert prepare(source(table), "classification", 4, 0, Some(), "e").empty == 2  # of each part one
        assert "the tokenizer makes nothing of 2 rows" in caplog.text


def test_the_cache_says_nothing_that_is_not_text_or_numbers(table, cache):
    made = prepare(source(table), "classification", 4, 0, Encoder(), "e")
    assert json.loads((made.folder / "meta.json").read_text()) == {"labels": ["a", "b"]}
    for file in [*made.folder.glob("*.npy"), *made.partition_folder.glob("*.npy")]:
        assert np.load(file, allow_pickle=False).dtype in (np.int32, np.int64)


def test_a_client_without_rows_is_refused(tmp_path, cache):
    (tmp_path / "a.csv").write_text("text,label\na,x\nb,x\nc,x\nd,y\n")
    how = LabelShares(kind="label_shares", shares=((0.5, 0.5),))  # half of one y for each of two clients
    config = source(tmp_path / "a.csv").model_copy(update={"partition": how})
    with pytest.raises(SettingError, match="client 0 is left without examples; use fewer clients or less skew"):
        prepare(config, "classification", 2, 0, Encoder(), "e")


def drawn(table, clients, examples, seed=0, **more):
    how = {"partition": Sampled(kind="sampled", examples=examples), **more}
    return prepare(source(table).model_copy(update=how), "classification", clients, seed, Encoder(), "e")


def test_a_million_clients_draw_their_examples_and_nothing_is_kept_for_them(table, cache):
    made = drawn(table, 1_000_000, 5)
    assert made.num_clients == 1_000_000 and made.sizes() == {5: 1_000_000} and made.num_examples(999_999) == 5
    assert [file.name for file in made.partition_folder.iterdir()] == ["drawn.json"]
    rows = made.partition(999_999).rows
    assert len(set(rows.tolist())) == 5 and rows.max() < len(made.train) and sorted(rows) == list(rows)
    assert np.array_equal(rows, drawn(table, 1_000_000, 5).partition(999_999).rows)
    assert not np.array_equal(rows, made.partition(0).rows)
    assert not np.array_equal(rows, drawn(table, 1_000_000, 5, seed=1).partition(999_999).rows)


def test_drawn_examples_that_a_client_holds_out_are_not_trained_on(table, cache):
    """A fifth of 10 is 2."""
    made = drawn(table, 3, 10, client_test_share=0.2)
    for client in range(3):
        trained, held = set(made.partition(client).rows.tolist()), set(made.held_out(client).rows.tolist())
        assert (len(trained), len(held)) == (8, 2) and not trained & held and made.num_examples(client) == 8


def test_no_client_draws_more_examples_than_there_are(table, cache):
    with pytest.raises(
        SettingError, match=r"different ones for each client, and there are \d+; lower it"
    ) as caught:
        drawn(table, 3, 1000)
    assert caught.value.key == "data.partition.examples"


def test_natural_clients_keep_their_names(tmp_path, cache):
    (tmp_path / "a.csv").write_text("text,label,site\na,x,ward 10\nb,y,ward 9\nc,y,ward 2\nd,x,ward 9\n")
    config = source(tmp_path / "a.csv").model_copy(update={"partition": Natural(kind="natural", column="site")})
    made = prepare(config, "classification", 3, 0, Encoder(), "e")
    assert made.names == ("ward 10", "ward 2", "ward 9") and made.sizes() == {1: 2, 2: 1}
    assert [c["name"] for c in partitions(made)["clients"]] == list(made.names)
    plain = prepare(source(tmp_path / "a.csv"), "classification", 2, 0, Encoder(), "e")
    assert plain.names == () and "name" not in partitions(plain)["clients"][0]


@pytest.mark.parametrize(
    "kind", [{"kind": "iid"}, {"kind": "dirichlet", "alpha": 1.0}, {"kind": "sampled", "examples": 20}]
)
def test_who_holds_what_may_have_a_seed_of_its_own(kind, table, cache):
    def rows(seed, own=None):
        data = Data.model_validate({**source(table).model_dump(), "partition": {**kind, "seed": own}})
        made = prepare(data, "classification", 3, seed, Encoder(), "e")
        return [made.partition(client).rows.tolist() for client in range(3)], made.fingerprint

    assert rows(1, 7) == rows(2, 7) == rows(7) != rows(1)
    assert rows(1) != rows(2)


def test_a_cache_that_cannot_be_written_is_one_line(table, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file" / "deeper"):
        monkeypatch.setenv("FEDLORA_CACHE", str(place))
        with pytest.raises(UserError, match=r"tokenised data cannot be kept there: .*FEDLORA_CACHE=/some/folder"):
            prepare(source(table), "classification", 2, 0, Encoder(), "e")


def test_without_a_home_the_cache_is_asked_for(monkeypatch):
    def home():
        raise RuntimeError("Could not determine home directory.")

    for name in ("FEDLORA_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", home)
    with pytest.raises(UserError, match="there is no home folder"):
        cache_folder()
