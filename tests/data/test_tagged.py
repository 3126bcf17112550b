"""Words and their tags, from lists, CoNLL files and spans; what is wrong is told by row and column alone."""

import json
from dataclasses import replace

import pandas as pd
import pytest

from fedlora.data import tagged
from fedlora.data.cells import Taught
from fedlora.data.overview import overview
from fedlora.data.reading import Rows, as_bytes, label_names, read, read_site, read_test, set_aside
from fedlora.errors import SettingError
from fedlora.scenario import Data, Files, Hub, Natural

TASK = "token_classification"
TAUGHT = Taught.of(Data(dataset="tweets"), TASK)
TOKENS = [["Angelman", "syndrome", "of", "Bob"], ["#", "nothing"], ["Bob"], ["mild", "fever"]]
TAGS = [["B-Illness", "I-Illness", "O", "B-Name"], ["O", "O"], ["B-Name"], ["O", "B-Illness"]]
ROWS = Rows([*map(tuple, TOKENS)], [*map(tuple, TAGS)])
WRITTEN = ("text", "label")
CONLL = """-DOCSTART- -X- O

# id = 1 O
Angelman\tB-Illness
syndrome\tI-Illness
of\tO
Bob\tB-Name

# a comment
#\tO
nothing\tO


Bob\tB-Name

mild\tO
fever\tB-Illness
"""


def source(path, **more):
    return Data(files=Files(**{"train": str(path), "test": str(path), "text": "tokens", "label": "tags", **more}))


WRITERS = {
    "a.jsonl": lambda path: pd.DataFrame({"tokens": TOKENS, "tags": TAGS}).to_json(
        path, orient="records", lines=True
    ),
    "a.json": lambda path: pd.DataFrame({"tokens": TOKENS, "tags": TAGS}).to_json(path, orient="records"),
    "a.parquet": lambda path: pd.DataFrame({"tokens": TOKENS, "tags": TAGS}).to_parquet(path),
    "a.conll": lambda path: path.write_text(CONLL),
    "a.iob2": lambda path: path.write_text(CONLL.replace("\t", " ").rstrip()),
    "bom.conll": lambda path: path.write_bytes(b"\xef\xbb\xbf" + CONLL.replace("\n", "\r\n").encode()),
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_source_reads_the_same_rows(name, tmp_path):
    WRITERS[name](tmp_path / name)
    train, test = read(source(tmp_path / name), TASK)
    assert train == test == ROWS


def test_the_hub_names_tags_that_are_numbers(tmp_path):
    from datasets import ClassLabel, Dataset, DatasetDict, Features, List, Value

    names = ["O", "B-Illness", "I-Illness", "B-Name", "I-Name"]
    features = Features({"words": List(Value("string")), "ner": List(ClassLabel(names=names))})
    held = {"words": TOKENS, "ner": [[names.index(tag) for tag in tags] for tags in TAGS]}
    split = Dataset.from_dict(held, features=features)
    DatasetDict({"train": split, "test": split}).save_to_disk(str(tmp_path / "saved"))
    data = Data(hub=Hub(path=str(tmp_path / "saved"), text="words", label="ner"))
    assert read(data, TASK) == (ROWS, ROWS)
    held["words"] = [["one"], *TOKENS[1:]]
    split = Dataset.from_dict(held, features=features)
    DatasetDict({"train": split, "test": split}).save_to_disk(str(tmp_path / "wrong"))
    with pytest.raises(
        SettingError, match=r"data\.hub\.label: .*wrong, split 'train': row 1, column 'ner': 4 tags of 1"
    ):
        read(data.model_copy(update={"hub": data.hub.model_copy(update={"path": str(tmp_path / "wrong")})}), TASK)


def test_more_fields_than_two_have_names(tmp_path):
    (tmp_path / "a.conll").write_text("1\tBob\tNNP\tB-Name\t-\n2\truns\tVBZ\tO\t-\n")
    columns = ("at", "tokens", "pos", "tags", "by")
    assert read(source(tmp_path / "a.conll", columns=columns), TASK)[0] == Rows(
        [("Bob", "runs")], [("B-Name", "O")]
    )
    with pytest.raises(SettingError, match=r"a\.conll:1: 5 fields, and there should be 2, as in columns"):
        read(source(tmp_path / "a.conll", columns=columns[1:4:2]), TASK)
    (tmp_path / "b.conll").write_text("Bob NNP B-Name\n\nruns\n")
    with pytest.raises(SettingError, match=r"files\.train: .*b\.conll:3: 1 fields, and .* a word and its tag"):
        read(source(tmp_path / "b.conll"), TASK)


TEXT = "Angelman syndrome, of (Bob)."


def spans(*told):
    return [dict(zip(("start", "end", "label"), one, strict=False)) for one in told]


def test_spans_are_tags_of_the_words_they_hold(tmp_path):
    table = [
        {"text": TEXT, "spans": spans((23, 26, "Name"), (0, 17, "Illness")), "person": "a"},
        {"text": "none here", "spans": [], "person": "b"},
        {"text": "in the end ", "spans": spans((6, 11, "Name")), "person": "b"},  # spaces are of no word
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, table)))
    pd.DataFrame(table).to_parquet(tmp_path / "a.parquet")
    tags = [
        ("B-Illness", "I-Illness", "O", "O", "O", "B-Name", "O", "O"),
        ("O", "O"),
        ("O", "O", "B-Name"),
    ]
    for name in ("a.jsonl", "a.parquet"):
        data = source(tmp_path / name, text="text", label="spans")
        owned = data.model_copy(update={"partition": Natural(kind="natural", column="person")})
        assert read(owned, TASK)[0] == Rows([row["text"] for row in table], tags, ["a", "b", "b"])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", []),
        ("naïve αβ_3, (x)", ["naïve", "αβ_3", ",", "(", "x", ")"]),
        ("北京is東京", ["北", "京", "is", "東", "京"]),
        (("p < 0.5", "", "of"), ["p < 0.5", "", "of"]),
    ],
)
def test_words_lie_where_they_say(text, words):
    whole, places = tagged.places(text)
    assert [whole[start:end] for start, end in places] == words
    assert whole == (text if isinstance(text, str) else " ".join(text))


def test_a_word_is_judged_by_the_first_piece_in_it():
    text = "ab cd, e"
    words = [(0, 2), (3, 5), (5, 6), (7, 8)]
    pieces = [
        (0, 0),
        (0, 1),
        (1, 2),
        (2, 5),
        (5, 6),
        (6, 7),
        (0, 0),
    ]  # cut before `e`
    assert list(tagged.first_pieces(text, words, pieces)) == [1, 3, 4, None]
    assert list(tagged.first_pieces("", [], [(0, 0)])) == []


@pytest.mark.parametrize(
    ("tags", "lenient", "strict"),
    [
        ("O B-x I-x O", [(1, 3, "x")], [(1, 3, "x")]),
        ("B-x B-x I-x", [(0, 1, "x"), (1, 3, "x")], [(0, 1, "x"), (1, 3, "x")]),
        ("I-x I-x B-y", [(0, 2, "x"), (2, 3, "y")], [(2, 3, "y")]),
        ("B-x I-y I-y I-x", [(0, 1, "x"), (1, 3, "y"), (3, 4, "x")], [(0, 1, "x")]),
        ("B-x O I-x", [(0, 1, "x"), (2, 3, "x")], [(0, 1, "x")]),
        ("B-a-b I-a-b", [(0, 2, "a-b")], [(0, 2, "a-b")]),
        ("", [], []),
    ],
)
def test_entities_by_hand(tags, lenient, strict):
    assert tagged.entities(tags.split()) == lenient
    assert tagged.entities(tags.split(), strict=True) == strict


LISTS, SPANS = ("tokens", "tags"), ("text", "spans")


@pytest.mark.parametrize(
    ("row", "key", "message"),
    [
        (
            {"tokens": ["secret"], "tags": ["O", "O"]},
            "label",
            "column 'tags': 2 tags of 1 words: write one",
        ),
        (
            {"tokens": ["secret"], "tags": ["I-x"]},
            "label",
            "tag 1 begins with I- and follows none of its type: in IOB2",
        ),
        ({"tokens": ["secret"] * 2, "tags": ["B-x", "I-y"]}, "label", "tag 2 begins with I- and follows none"),
        ({"tokens": ["a"] * 3, "tags": ["B-x", "O", "I-x"]}, "label", "tag 3 begins with I- and follows none"),
        ({"tokens": ["a"], "tags": ["secret"]}, "label", "column 'tags': tag 1 is none of O, B-TYPE and I-TYPE"),
        ({"tokens": ["a"], "tags": ["B-"]}, "label", "tag 1 is none of O, B-TYPE and I-TYPE"),
        ({"tokens": ["a"], "tags": [3]}, "label", "tag 1 is none of O, B-TYPE and I-TYPE"),
        ({"tokens": ["a"], "tags": ["B-z"]}, "label", "'B-z' is none of data.labels"),
        (
            {"tokens": ["secret"], "tags": "O"},
            "label",
            "column 'tags': should be a list, of a tag for each",
        ),
        (
            {"tokens": [7], "tags": ["O"]},
            "text",
            "column 'tokens': should be a list of words, or a text where the",
        ),
        ({"tokens": 5, "tags": ["O"]}, "text", "column 'tokens': should be a list of words, or a text where the"),
        ({"tokens": None, "tags": ["O"]}, "text", "row 2 has no 'tokens'"),
        ({"tokens": ["a"], "tags": None}, "label", "row 2 has no 'tags'"),
        (
            {"text": "secret", "spans": spans((0, 3, "x"))},
            "label",
            "span 1 begins or ends within a word: move",
        ),
        ({"text": "my secret", "spans": spans((4, 9, "x"))}, "label", "span 1 begins or ends within a word"),
        ({"text": "my secret", "spans": spans((3, 9, "x"), (0, 4, "x"))}, "label", "spans 1 and 2 overlap"),
        ({"text": "secret", "spans": spans((0, 6, "x"), (0, 6, "y"))}, "label", "spans 1 and 2 overlap"),
        (
            {"text": "secret", "spans": spans((0, 7, "x"))},
            "label",
            "span 1 lies outside of its text, or is empty: ",
        ),
        ({"text": "secret", "spans": spans((-1, 6, "x"))}, "label", "span 1 lies outside of its text"),
        ({"text": "secret", "spans": spans((3, 3, "x"))}, "label", "span 1 lies outside of its text, or is empty"),
        ({"text": "a  b", "spans": spans((1, 2, "x"))}, "label", "span 1 holds no word"),
        (
            {"text": "secret", "spans": spans((0, "6", "x"))},
            "label",
            "span 1 should be {start, end, label}, in",
        ),
        ({"text": "secret", "spans": spans((0, 6.5, "x"))}, "label", "span 1 should be {start, end, label}"),
        ({"text": "secret", "spans": spans((True, 6, "x"))}, "label", "span 1 should be {start, end, label}"),
        ({"text": "secret", "spans": [[0, 6, "x"]]}, "label", "span 1 should be {start, end, label}"),
        ({"text": "secret", "spans": spans((0, 6))}, "label", "span 1 has no label: write a word"),
        ({"text": "secret", "spans": spans((0, 6, "z"))}, "label", "'B-z' is none of data.labels"),
    ],
)
def test_a_row_that_does_not_fit_is_told_by_its_number_and_column(row, key, message, tmp_path):
    named = LISTS if "tokens" in row else SPANS
    right = {"tokens": ["a", "b"], "tags": ["B-x", "B-y"]} if named == LISTS else {"text": "a", "spans": []}
    (file := tmp_path / "a.jsonl").write_text(f"{json.dumps(right)}\n{json.dumps(row)}\n")
    data = source(file, text=named[0], label=named[1])
    data = data.model_copy(update={"labels": ("O", "B-x", "I-x", "B-y", "I-y")})
    with pytest.raises(SettingError) as caught:
        read(data, TASK)
    said = caught.value.message
    assert caught.value.key == f"data.files.{key}" and f"{file}: row 2" in said and message in said
    assert "secret" not in said.replace(str(file), "")


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ((), "the list is empty: name O, and B-TYPE and I-TYPE of each type"),
        (("B-x", "I-x"), "O is missing"),
        (("O", "x"), "'x' is none of O, B-TYPE and I-TYPE"),
        (("O", "I-x"), "'I-x' has no 'B-x' beside it"),
        (("O",), "there is no type of entities among them"),
        (("O", "B-x"), ""),
        (("B-x", "I-x", "O"), ""),
    ],
)
def test_a_list_of_tags_that_is_none(labels, message):
    assert message in tagged.wrong_names(labels) and bool(message) == bool(tagged.wrong_names(labels))


def test_labels_are_all_tags_of_all_types_with_o_first(tmp_path):
    WRITERS["a.jsonl"](file := tmp_path / "a.jsonl")
    data = source(file)
    expected = ("O", "B-Illness", "B-Name", "I-Illness", "I-Name")
    assert label_names(data, ROWS, TASK) == read_test(data, TASK)[1] == expected
    with pytest.raises(SettingError, match=r"token_classification needs two labels or more.*\['O'\]"):
        label_names(data, Rows([("a",)], [("O",)]), TASK)
    with pytest.raises(SettingError, match=r"that it does not name: \['B-Illness', 'B-Name', 'I-Illness'\]"):
        label_names(data.model_copy(update={"labels": ("O", "B-x")}), ROWS, TASK)


def test_validation_rows_are_read_alike(tmp_path):
    WRITERS["a.jsonl"](file := tmp_path / "a.jsonl")
    (own := tmp_path / "own.iob2").write_text("Ann B-Name\n")
    data = source(file, validation=str(own))
    assert set_aside(data, TASK, ROWS) == (ROWS, Rows([("Ann",)], [("B-Name",)]))
    overview(data, TASK, 2, 0)


def test_a_site_needs_to_name_no_columns_and_leaves_out_rows_of_other_tags(tmp_path):
    WRITERS["a.conll"](file := tmp_path / "a.conll")
    known = ("O", "B-Name", "I-Name")
    for taught in (TAUGHT, replace(TAUGHT, labels=known)):  # whatever the run's own labels are
        rows, left_out = read_site(Files(train=str(file)), known, taught)
        assert rows == Rows([("#", "nothing"), ("Bob",)], [("O", "O"), ("B-Name",)]) and left_out == 2
    WRITERS["a.jsonl"](file := tmp_path / "a.jsonl")
    told = Files(train=str(file), text="tokens", label="tags")
    assert read_site(told, None, TAUGHT) == (ROWS, 0)
    with pytest.raises(SettingError, match="has no column 'words'"):
        read_site(told.model_copy(update={"text": "words"}), None, TAUGHT)


def test_words_of_other_rows_are_other_bytes():
    rows = [("a", "b", "c"), ("ab", "", "c"), ("a", "bc"), ("abc",), ("a b", "c"), ()]
    assert len({as_bytes(row) for row in rows}) == len(rows)
    assert as_bytes(("a", "b")) == b"\0\0\0\0\0\0\0\x01ab"  # as ever: who is held out stays the same
