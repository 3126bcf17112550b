"""Files as people have them: quotes, marks, encodings, JSON of any shape, and what is told of torn ones."""

import codecs
import json

import pytest

from fedlora.data import notes
from fedlora.data.holding import hold_out
from fedlora.data.reading import Rows, read
from fedlora.errors import SettingError
from fedlora.scenario import Data, Files, Natural, load

SECRET = "Ann Lee has fever"


def rows_of(file, task="classification", **more):
    files = {key: more.pop(key) for key in ("text", "label", "columns") if key in more}
    data = Data(files=Files(train=str(file), test=str(file), **files), **more)
    return read(data, task)[0]


def wrong(file, **more) -> SettingError:
    with pytest.raises(SettingError) as caught:
        rows_of(file, **more)
    assert "\n" not in caught.value.message and SECRET not in caught.value.message
    return caught.value


def written(folder, name, text, encoding="utf-8"):
    (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode(encoding))
    return folder / name


AB = Rows(["one", "two"], ["a", "b"])


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("x.csv", "text,label\none,a\ntwo,b\n", AB),
        ("x.csv", "text;label\none;a\ntwo;b\n", AB),
        ("x.csv", "text|label\r\none|a\r\ntwo|b\r\n", AB),
        ("x.csv", "text\tlabel\none\ta\ntwo\tb\n", AB),
        ("x.tsv", "text,label\none,a\ntwo,b\n", AB),
        ("x.csv", "sep=;\ntext;label\none;a\ntwo;b\n", AB),
        ("x.csv", "text,label\rone,a\rtwo,b\r", AB),
        ("x.csv", "\ntext,label\n\none,a\n\ntwo,b\n\n", AB),
        ("x.csv", "text,label,\none,a,\ntwo,b,\n", AB),
        ("x.csv", "text;label\n1,5 and;a\n2,5;b\n", Rows(["1,5 and", "2,5"], ["a", "b"])),
        ("x.csv", 'text,label\n"o""n""e",a\n"two, or\nmore",b\n', Rows(['o"n"e', "two, or\nmore"], ["a", "b"])),
        ("x.csv", 'text,label\nhe said "hi",a\ntwo,b\n', Rows(['he said "hi"', "two"], ["a", "b"])),
        ("x.tsv", 'text\tlabel\n"one\ta\ntwo"\tb\n', Rows(['"one', 'two"'], ["a", "b"])),  # as GLUE's
        ("x.tsv", 'text\tlabel\n"one\ta\ntwo\tb\n', Rows(['"one', "two"], ["a", "b"])),
        ("x.tsv", 'text\tlabel\n"one"" ""\tand"\ta\ntwo\tb\n', Rows(['one" "\tand', "two"], ["a", "b"])),
        ("x.jsonl", '[{"text": "one", "label": "a"}, {"text": "two", "label": "b"}]', AB),
        ("x.jsonl", '[\n {"text": "one", "label": "a"},\n {"text": "two",\n "label": "b"}\n]\n', AB),
        ("x.json", '{"text": "one", "label": "a"}\r\n\r\n{"text": "two", "label": "b"}\r\n', AB),
        ("x.jsonl", '{"text": "one",\n "label": "a"}\n{"text": "two",\n "label": "b"}\n', AB),
        ("x.json", '{"text": {"0": "one", "1": "two"}, "label": {"0": "a", "1": "b"}}', AB),
        ("x.json", '{"text": ["one", "two"], "label": ["a", "b"]}', AB),
        ("x.json", '{"data": [{"text": "one", "label": "a"}, {"text": "two", "label": "b"}]}', AB),
        ("x.jsonl", '{"text": "\u2028", "label": "a"}\n{"label": 2, "text": ""}', Rows(["\u2028", ""], [*"a2"])),
        ("x.jsonl", '{"text": 1, "label": 0.0}\n{"text": 2.5, "label": 1.0}', Rows(["1", "2.5"], ["0", "1"])),
        ("x.csv", "text,label\none,0.0\ntwo,1.0\n", Rows(["one", "two"], ["0", "1"])),
        ("x.csv", "text,label\none,007\ntwo,1\n", Rows(["one", "two"], ["007", "1"])),
        ("x.jsonl", '{"text": "1", "label": true}\n{"text": "2", "label": 5}', Rows(["1", "2"], ["True", "5"])),
    ],
)  # fmt: skip
def test_what_people_have_is_read_right(name, text, expected, tmp_path):
    assert rows_of(written(tmp_path, name, text)) == expected


def test_completions_that_look_like_numbers_stay_as_they_are(tmp_path):
    file = written(tmp_path, "x.csv", "text,label\none,1.0\ntwo,2.0\n")
    assert rows_of(file, "causal_lm").labels == ["1.0", "2.0"]


WORDS = "text,label\nÄpfel naïve,gut\nMüll,schlecht\n"


@pytest.mark.parametrize(
    ("mark", "encoding", "told"),
    [
        (codecs.BOM_UTF8, "utf-8", None),
        (codecs.BOM_UTF16_LE, "utf-16-le", None),
        (codecs.BOM_UTF16_BE, "utf-16-be", None),
        (codecs.BOM_UTF32_LE, "utf-32-le", None),
        (codecs.BOM_UTF16_LE, "utf-16-le", "cp1252"),  # the mark is there to be believed
        (b"", "utf-8", None),
        (b"", "cp1252", "cp1252"),
        (b"", "utf-16-be", "utf-16-be"),
    ],
)
def test_encodings_are_told_apart_by_their_marks_or_named(mark, encoding, told, tmp_path):
    file = written(tmp_path, "x.csv", mark + WORDS.encode(encoding))
    assert rows_of(file, encoding=told) == Rows(["Äpfel naïve", "Müll"], ["gut", "schlecht"])
    lines = "\n".join(json.dumps({"text": t, "label": t}, ensure_ascii=False) for t in ("ä", "ö"))
    file = written(tmp_path, "x.jsonl", mark + lines.encode(encoding))
    assert rows_of(file, encoding=told).texts == ["ä", "ö"]
    conll = written(tmp_path, "x.conll", mark + "ä\tB-X\nö\tO\n\nü\tB-X\n".encode(encoding))
    assert rows_of(conll, "token_classification", text="tokens", label="tags", encoding=told).texts == [
        ("ä", "ö"),
        ("ü",),
    ]


@pytest.mark.parametrize(
    ("encoding", "told", "message"),
    [
        ("cp1252", None, r"is not written in utf-8 \(line 2\): say how it is, such as data.encoding: cp1252"),
        ("cp1252", "ascii", r"is not written in ascii \(line 2\): name another data.encoding"),
        ("utf-16-le", None, "is not written in utf-8|holds NUL characters.*: write data.encoding: utf-16-le"),
    ],
)
def test_another_encoding_is_a_line_that_names_the_key(encoding, told, message, tmp_path):
    error = wrong(written(tmp_path, "x.csv", WORDS, encoding), encoding=told)
    assert error.key == "data.encoding"
    with pytest.raises(SettingError, match=message):
        raise error


@pytest.mark.parametrize(
    ("content", "key", "message"),
    [
        (b"PK\x03\x04\x14\0", "data.files.train", "x.csv: is a zip archive, as a workbook of a spreadsheet is"),
        (b"\x1f\x8b\x08\0", "data.files.train", "x.csv: is compressed by gzip, whatever its name says: save its"),
        ("text,label\na,b\n".encode("utf-16-be"), "data.encoding", "write data.encoding: utf-16-be"),
        ("text,label\na,b\n".encode("utf-16-le"), "data.encoding", "write data.encoding: utf-16-le"),
        (b"text,label\na,b\nc\0d,b\n", "data.encoding", "x.csv:3: holds a NUL character"),
    ],
)
def test_what_is_no_text_is_called_what_it_is(content, key, message, tmp_path):
    (file := tmp_path / "x.csv").write_bytes(content)
    error = wrong(file)
    assert error.key == key and message in error.message


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("x.csv", "", "x.csv: is empty"),
        ("x.jsonl", " \n\n", "x.jsonl: is empty"),
        ("x.csv", f"text,label\none,a\n{SECRET}\n", "x.csv:3: has 1 cell, and the header has 2"),
        ("x.csv", f"text,label\none,a\n{SECRET}, or not,b\n", "x.csv:3: has 3 cells, and the header has 2; quote"),
        ("x.csv", f'text,label\n"a\nb",a\n"{SECRET}" is,b\n', "x.csv:4: a quote opens in this row"),
        ("x.csv", f'text,label\none,a\n"{SECRET},b\ntwo,a\n', "x.csv:3: a quote opens in this row"),
        ("x.csv", "text,label,text\n", "x.csv:1: the name of column 1 stands there twice"),
        ("x.jsonl", '{"text": "a", "label": "b"}\n{"text": "SECRET"\n{"text": "c"}', "x.jsonl:2: is no JSON"),
        ("x.jsonl", '{"text": "a", "label": "b"}\n["SECRET", "b"]', "x.jsonl:2: should be an object"),
        ("x.json", '[{"text": "a", "label": "b"},\n{"text": "SECRET"', "x.json:2: is no JSON: "),
        ("x.json", '[{"text": "a", "label": "b"}, "SECRET"]', "x.json:1: row 2 should be an object"),
        ("x.jsonl", '{"text": ["SECRET"], "label": "b"}', "row 1: 'text' is a list, and should be text"),
        ("x.jsonl", '{"text": "a", "label": "b"}\n{"text": {"a": "SECRET"}, "label": 1}', "'text' is an object"),
        ("x.jsonl", '{"text": true, "label": "b"}', "row 1: 'text' is no text"),
        ("x.jsonl", '{"text": "a", "label": ["SECRET"]}', "row 1: 'label' is a list, and should be text"),
        ("x.jsonl", '{"text": "a", "label": "b"}\n{"text": "c", "label": null}', "row 2 has no 'label'"),
        ("x.csv", "text,label\na,b\nc,  \n", "row 2 has no 'label'"),
    ],
)  # fmt: skip
def test_what_is_torn_is_told_by_line_or_row_and_never_by_text(name, text, message, tmp_path):
    assert message in wrong(written(tmp_path, name, text.replace("SECRET", SECRET))).message


@pytest.mark.parametrize("first", [f"{SECRET},good", f'"{SECRET}, badly",good', "fever,good", "3.5,1"])
def test_a_first_line_that_is_a_row_is_not_shown(first, tmp_path):
    file = written(tmp_path, "x.csv", f"{first}\nthe soup was cold,{first.rpartition(',')[2]}\n")
    error = wrong(file)
    assert error.key == "data.files.text" and "data.files.columns, in order, 2 of them" in error.message
    assert "fever" not in error.message and "good" not in error.message
    assert len(rows_of(file, columns=("text", "label")).texts) == 2
    headed = written(tmp_path, "y.csv", "text,label\none,a\ntwo,b\n")
    assert "is a header already" in wrong(headed, columns=("text", "label")).message


def test_names_in_a_line_are_cut(tmp_path):
    file = written(tmp_path, "x.jsonl", json.dumps({"x" * 500: 1, **{f"k{i:03}": 1 for i in range(300)}}))
    assert len(wrong(file).message) < 700 + len(str(file))


def test_relative_paths_are_read_from_the_scenarios_folder(tmp_path, monkeypatch):
    (study := tmp_path / "my study").mkdir()
    (study / "s.yaml").write_text(
        "name: s\ndata: {files: {train: rows.csv}}\nclients: {total: 2}\nprivacy: {epsilon: 8}\n"
    )
    written(study, "rows.csv", "text,label\none,a\ntwo,b\n")
    monkeypatch.chdir(tmp_path)
    found = load("my study/s.yaml")
    assert found.data.files.train == "my study/rows.csv" and len(rows_of(found.data.files.train).texts) == 2
    written(tmp_path, "other.csv", "text,label\n")
    assert load("my study/s.yaml", ["data.files.train=other.csv"]).data.files.train == "other.csv"
    (study / "rows.csv").unlink()
    error = wrong(load("my study/s.yaml").data.files.train)
    assert error.message == f"no such file: my study/rows.csv (read from the folder {tmp_path})"


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([f"{i / 7:.3f}" for i in range(30)], "holds 30 different numbers with fractions, as scores are"),
        (["0.5", "1.5", "0.5", "1.5"], "holds 2 different numbers with fractions"),
        ([f"{SECRET} {i}" for i in range(40)], "has 40 different values in 40 rows"),
    ],
)
def test_scores_and_texts_are_not_taken_for_labels(labels, message, tmp_path):
    from fedlora.data.reading import label_names

    file = written(tmp_path, "x.csv", "text,label\n" + "".join(f"text {i},{v}\n" for i, v in enumerate(labels)))
    data = Data(files=Files(train=str(file), test=str(file)))
    with pytest.raises(SettingError, match=message) as caught:
        read(data, "classification")
    assert SECRET not in caught.value.message
    names = tuple(sorted(set(labels)))
    assert (
        label_names(data.model_copy(update={"labels": names}), Rows([], list(labels)), "classification") == names
    )


def held(texts, share, kinds=None):
    return hold_out([t.encode() for t in texts], share, kinds or [()] * len(texts), False, "data.test_share")


@pytest.mark.parametrize(
    ("counts", "share", "most"), [((40, 3), 0.2, 3), ((10,) * 12, 0.25, 30), ((60, 20, 10, 10), 0.3, 30)]
)
def test_equal_texts_stay_together_and_the_share_is_met_or_told(counts, share, most, caplog):
    texts = [f"t{i}" for i, count in enumerate(counts) for _ in range(count)]
    chosen = held(texts, share)
    assert (
        len(
            {t for t, h in zip(texts, chosen, strict=True) if h}
            & {t for t, h in zip(texts, chosen, strict=True) if not h}
        )
        == 0
    )
    assert 0 < sum(chosen) <= max(most, share * len(texts) + 4 * (len(texts) * share * (1 - share)) ** 0.5)
    if counts == (40, 3):
        assert sum(chosen) == 3 and "asks for 9 of 43 rows, and 3 are held out" in caplog.text


def test_fewer_rows_than_are_asked_for_are_told(caplog):
    """Of rows that stand alone too; within a tenth nothing is said."""
    for salt in range(30):
        for texts in ([f"{salt} {i // 5}" for i in range(400)], [f"{salt} {i}" for i in range(100)]):
            caplog.clear()
            found = sum(held(texts, 0.2))
            asked = len(texts) // 5
            assert bool(caplog.messages) is (asked - found >= asked / 10), (found, caplog.messages)
            assert not caplog.messages or f"of {len(texts)} rows, and {found} are held out" in caplog.text


@pytest.mark.parametrize("rare", [1, 2, 3])
def test_neither_a_label_nor_an_owner_is_held_out_whole(rare):
    for salt in range(60):
        texts = [f"{salt} {i}" for i in range(40)]
        kinds = [("rare" if i < rare else "common", ("owner", i % 20)) for i in range(40)]
        chosen = held(texts, 0.45, kinds)
        left = {kind for kind_of, h in zip(kinds, chosen, strict=True) if not h for kind in kind_of}
        assert left >= {kind for kind_of in kinds for kind in kind_of}
        assert any(chosen)


def test_few_rows_still_have_a_row_to_test_by():
    for salt in range(40):
        assert 1 <= sum(held([f"{salt} {i}" for i in range(5)], 0.2)) <= 4


def test_every_value_of_a_natural_column_keeps_rows(tmp_path):
    lines = [f"note {i},{'ab'[i % 2]},ward {i // 2}" for i in range(40)]
    file = written(tmp_path, "x.csv", "text,label,site\n" + "\n".join(lines))
    data = Data(files=Files(train=str(file)), partition=Natural(kind="natural", column="site"), test_share=0.4)
    train, test = read(data, "classification")
    assert len(set(train.owners)) == 20 and test.texts
    table = written(
        tmp_path, "y.jsonl", '{"text": "a", "label": "x", "site": 1.0}\n{"text": "b", "label": "y", "site": 2}'
    )
    held_by = data.model_copy(update={"files": Files(train=str(table), test=str(table))})
    assert read(held_by, "classification")[0].owners == ["1", "2"]


def test_slips_are_counted_and_no_text_is_told():
    train = Rows([SECRET, SECRET, "b", "c"], ["bad", "Bad", "good", "good "])
    test = Rows([f"{SECRET} ", "new"], ["bad", "good"])
    found = notes.slips(train, test, Rows([], []), ("Bad", "bad", "good", "good "), "class")
    assert found == [
        "labels 'Bad', 'bad' differ by blanks, case or hidden signs alone, and are 2 classes: write them alike",
        "labels 'good', 'good ' differ by blanks, case or hidden signs alone, and are 2 classes: write them alike",
        "1 of 2 test rows have a text that stands in the training set too: a figure of them says little of new "
        "texts; leave them out of one",
        "1 text of the training set stands there with more than one label",
        "2 of 4 labels have no test row: 'Bad', 'good '",
    ]
    assert notes.repeated(train) == 1 and notes.empty(Rows(["", " \n", "a", ("", "b")], None)) == 2
    assert notes.slips(train, test, Rows([], []), ("a", "b"), "start") == found[2:3]
