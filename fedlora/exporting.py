"""A run's adapter where people use it: as peft reads it, merged into its base, on the Hub, or asked a question."""

import json
import math
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import TypeAdapter

from fedlora.errors import SettingError, UserError
from fedlora.passes import pooled
from fedlora.record import Record
from fedlora.rounds.folder import write_json
from fedlora.scenario import Scenario
from fedlora.tasks import base_model, located, smaller
from fedlora.tasks.contract import Prompt, Task, find

ABOUT = "fedlora.json"  # beside an adapter: what peft's own files do not say

_MERGED = """```python
from transformers import {auto}, AutoTokenizer

model = {auto}.from_pretrained("{folder}")
tokenizer = AutoTokenizer.from_pretrained("{folder}")
```
"""


@dataclass(frozen=True)
class Answer:
    """What a model makes of a text.

    Attributes:
        text: that it was given.
        answer: the label, the completion, or the entities that are in it.
        probability: of the label; None of others.
    """

    text: str
    answer: str
    probability: float | None


@dataclass(frozen=True)
class About:
    """What an adapter was trained on, as `fedlora.json` beside it says.

    Attributes:
        task: of the scenario.
        base: of the scenario's model.
        revision: of the base; None: its main branch.
        labels: in order; empty where the task has none.
        max_length: tokens that an example was cut to.
        pairs: whether it judges pairs of texts.
        threshold: from which probability on a label is given, where a text may have several; None elsewhere.
        scale: from where to where scores go; None where there are none.
        messages: the column of chats in its rows; None where they hold prompts or texts.
        scored: which turns of the assistant it learnt.
        prompt: the template of prompts by columns of its rows; None where one column has them.
        beta: what log probabilities count where completions are preferred; None elsewhere.
        pooling: what its head reads of a text: `cls`, `mean`, or None, as the base does.
    """

    task: str
    base: str
    revision: str | None
    labels: tuple[str, ...]
    max_length: int
    pairs: bool
    threshold: float | None = None
    scale: tuple[float, float] | None = None
    messages: str | None = None
    scored: Literal["all", "last"] = "all"
    prompt: str | None = None
    beta: float | None = None
    pooling: pooled.Pooling | None = None

    @classmethod
    def of(cls, scenario: Scenario, labels: Sequence[str], figures: Mapping[str, Any]) -> Self:
        """Of a run's scenario, and of the figures of the round that is exported."""
        model, data = scenario.model, scenario.data
        named = data.hub or data.files
        pairs = named is not None and not isinstance(named.text, str)
        told = (scenario.task, model.base, model.revision, tuple(labels), data.max_length, pairs)
        scale = (data.score.low, data.score.high) if data.score is not None else None
        beta = scenario.preference.beta if scenario.preference is not None else None
        rows = (data.messages, data.scored, data.prompt)
        return cls(*told, figures.get("threshold"), scale, *rows, beta=beta, pooling=model.pooling)

    @classmethod
    def read(cls, folder: Path) -> Self:
        """What stands beside an adapter.

        Raises:
            UserError: nothing does, or it is damaged.
        """
        file = folder / ABOUT
        try:
            found = TypeAdapter(cls).validate_python(json.loads(file.read_bytes()))
            made = folder.resolve().parent / "base"  # by the run, which may have been moved
            here = (made / located.MANIFEST).is_file() and not Path(found.base).is_dir()
            return replace(found, base=str(made)) if here else found
        except FileNotFoundError:
            if (folder.parent / "scenario.yaml").is_file():
                return cls._of_an_older(Record.open(folder.parent))
            raise UserError(f"{file}: is not there; name the folder that fedlora wrote the adapter to") from None
        except (OSError, ValueError, TypeError, RecursionError) as error:
            raise UserError(f"{file}: does not say what the adapter is for; it is damaged") from error

    @classmethod
    def _of_an_older(cls, run: Record) -> Self:
        """Of a run of a version that wrote nothing beside its adapter."""
        model, data = run.scenario.get("model") or {}, run.scenario.get("data") or {}
        labels = run.partitions.get("labels")
        if not isinstance(labels, list):
            raise UserError(f"{run.folder / 'partitions.json'}: does not name the labels; the run is damaged")
        pairs = any(isinstance((data.get(key) or {}).get("text"), list) for key in ("hub", "files"))
        told = (str(run.scenario.get("task", "classification")), str(model.get("base")), model.get("revision"))
        return cls(*told, tuple(labels), data.get("max_length") or 128, pairs)


def describe(folder: Path, about: About) -> None:
    """Write what an adapter is for beside it.

    That is `fedlora.json`; the base in `adapter_config.json`, by the name that it has elsewhere; and, where there
    are labels, `config.json`: the base's own configuration with them, as `transformers.AutoConfig` reads it.

    Args:
        folder: of the adapter, as peft wrote it.
        about: the run that it comes from.
    """
    from transformers import AutoConfig

    write_json(folder / ABOUT, asdict(about))
    file = folder / "adapter_config.json"
    base = {"base_model_name_or_path": located.named_elsewhere(about.base), "revision": about.revision}
    write_json(file, _in_order(json.loads(file.read_bytes())) | base)
    if told := _names(about, find(about.task)):
        path, revision = located.find_base(about.base), about.revision or "main"
        config = AutoConfig.from_pretrained(path, revision=revision, **told)
        pooled.tell(config, about.pooling)
        config.save_pretrained(str(folder))


def _in_order(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration of peft with its names in one order, each once: it has targets in a set, and heads twice."""
    found = dict(config)
    if isinstance(targets := found.get("target_modules"), list):
        found["target_modules"] = sorted(targets)
    if isinstance(heads := found.get("modules_to_save"), list):
        found["modules_to_save"] = list(dict.fromkeys(heads))
    return found


def replaced(folder: Path, write: Callable[[Path], None]) -> None:
    """Write a folder, whole or not at all; one that is there goes when the new one is whole."""
    new = folder.with_name(f".{folder.name}")
    shutil.rmtree(new, ignore_errors=True)
    write(new)
    shutil.rmtree(folder, ignore_errors=True)
    new.rename(folder)


def _names(about: About, task: type[Task]) -> dict[str, Any]:
    """What a model's configuration says of the labels; nothing where there are none."""
    named: dict[str, Any] = {}
    if about.labels:
        named = {"id2label": dict(enumerate(about.labels)), "label2id": {n: i for i, n in enumerate(about.labels)}}
    if task.problem is not None:
        named["problem_type"] = task.problem
    return named


def adapter_of(run: Record | str | Path) -> Path:
    """The adapter's folder of a run, or the folder itself where it is one.

    Raises:
        UserError: the run has none yet, or the folder holds neither.
    """
    folder = run.folder if isinstance(run, Record) else Path(run)
    if not isinstance(run, Record) and (folder / "adapter_config.json").is_file():
        return folder
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    if (folder / "config.json").is_file():
        raise UserError(f"{folder}: holds a whole model; load it with transformers")
    if not (folder / "adapter" / "adapter_config.json").is_file() and not (folder / "scenario.yaml").is_file():
        raise UserError(f"{folder}: holds no run and no adapter")
    if not (folder / "adapter" / "adapter_config.json").is_file():
        raise UserError(f"{folder}: has no adapter yet; it is written when the run ends, or on Ctrl-C")
    return folder / "adapter"


def export(run: Record | str | Path, out: str | Path, merge: bool = False, *, own_code: bool = False) -> Path:
    """Copy a run's adapter, or merge it into its base, with the model card.

    Args:
        run: that has ended, or its folder.
        out: a folder to make.
        merge: write the whole model, as safetensors with its tokenizer, instead of the adapter.
        own_code: as `load_adapter` takes it.

    Returns:
        The folder.

    Raises:
        UserError: the run has no adapter, or the folder is there already.
    """
    source, out = adapter_of(run), Path(out)
    if out.exists():
        raise UserError(f"{out}: is there already; name another folder with --out")
    if not merge:
        shutil.copytree(source, out)
        card = (out / "README.md").read_text(encoding="utf-8")
        (out / "README.md").write_text(card.replace('"adapter")', f"{json.dumps(out.name)})"), encoding="utf-8")
        return out
    model, reader = load_adapter(source, own_code=own_code)
    about = About.read(source)
    if about.pooling == "mean" and not pooled.known(model.config):
        raise UserError(
            f"{source}: its head reads the mean over tokens (model.pooling: mean), and transformers cannot save "
            f"that in a {model.config.model_type}: export it without --merge; its card says how to load it"
        )
    card = (source / "README.md").read_text(encoding="utf-8")
    how = _MERGED.format(auto=task_of(about, source, own_code).auto, folder=out.name)
    card = re.sub(r"```python\n.*?```\n", lambda _: how, card, flags=re.S)
    card = card.replace("library_name: peft\n", "library_name: transformers\nbase_model_relation: merge\n")
    for layer in [m.get_base_layer() for m in model.modules() if hasattr(m, "get_base_layer")]:
        base_model.untie(model, layer)
    with base_model.quietly():
        model.merge_and_unload().save_pretrained(str(out))
        reader.save_pretrained(str(out))
    (out / "README.md").write_text(card, encoding="utf-8")
    return out


def push(folder: Path, repository: str) -> str:
    """Upload an exported folder to the Hub; gives its address.

    Raises:
        UserError: the Hub refuses, or cannot be reached.
    """
    from huggingface_hub import HfApi

    try:
        hub = HfApi()
        address = hub.create_repo(repository, exist_ok=True)
        hub.upload_folder(repo_id=repository, folder_path=str(folder))
    except Exception as error:  # of the network, of the Hub, or of a name that it does not take
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise UserError(f"{repository}: not pushed: {reason}") from error
    return str(address)


def predict(
    run: Record | str | Path, texts: Sequence[Prompt], max_new_tokens: int = 64, *, own_code: bool = False
) -> list[Answer]:
    """What a run's model makes of texts: a label, labels, scores, entities, or a completion.

    Args:
        run: that has ended, its folder, or the folder of an exported adapter.
        texts: to ask about; a pair of texts with a tab between them, an image by its file, a chat by its turns.
        max_new_tokens: the most that a completion has.
        own_code: as `load_adapter` takes it.

    Returns:
        One answer for each text, in order.

    Raises:
        UserError: there is no adapter, its base model cannot be loaded, or it judges pairs and is given none.
    """
    import torch

    about = About.read(folder := adapter_of(run))
    texts = [texts] if isinstance(texts, str) else texts
    if task_of(about, folder, own_code).completes:
        return generate(run, texts, max_new_tokens, own_code=own_code)
    plain = [text for text in texts if isinstance(text, str)]
    if about.pairs and not all(text.count("\t") == 1 for text in plain):
        raise UserError(f"{folder}: its model judges pairs of texts: write both with a tab between them")
    task = task_of(about, folder, own_code)
    model, reader = load_adapter(folder, own_code=own_code)
    given = (lambda text, **told: reader(*text.split("\t"), **told)) if about.pairs else reader
    answers = []
    for text in plain:
        with torch.inference_mode():
            said, probability = task.answer(model, given, text, about.labels, about.max_length, max_new_tokens)
        answers.append(Answer(text, said, probability))
    return answers


def generate(
    run: Record | str | Path,
    prompts: Sequence[Prompt],
    max_new_tokens: int = 64,
    *,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    own_code: bool = False,
) -> list[Answer]:
    """What a run's model goes on with after prompts, several at once.

    Args:
        run: that has ended, its folder, or the folder of an exported adapter.
        prompts: texts, or chats by their turns.
        max_new_tokens: the most that a completion has.
        temperature: 0 takes the likeliest token each time; else one is drawn, from logits that it divides.
        top_p: the share that the tokens together have of which one is drawn, in (0, 1].
        seed: of what is drawn: the same prompts have the same completions.
        own_code: as `load_adapter` takes it.

    Returns:
        One answer for each prompt, in order; of a chat `text` is the last turn.

    Raises:
        UserError: there is no adapter, its base model cannot be loaded, it writes nothing, or a number is out of
            its range.
    """
    import torch

    about = About.read(folder := adapter_of(run))
    for name, fine, asked in (
        ("max_new_tokens", max_new_tokens >= 1, "1 or more"),
        ("temperature", 0 <= temperature < math.inf, "0 or more"),
        ("top_p", 0 < top_p <= 1, "above 0 and at most 1"),
        ("seed", seed >= 0, "0 or more"),
    ):
        if not fine:
            raise UserError(f"{name}: should be {asked}")
    task = task_of(about, folder, own_code)
    if not task.completes:
        raise UserError(f"{folder}: its task is {about.task}, which writes no text: ask it with fedlora predict")
    model, reader = load_adapter(folder, own_code=own_code)
    how = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p, "seed": seed}
    try:
        with torch.inference_mode():
            said = task.complete(model, reader, prompts, about.max_length, **how)
    except SettingError as error:
        raise UserError(f"{folder}: {error.message}") from error
    texts = [prompt if isinstance(prompt, str) else prompt[-1].content for prompt in prompts]
    return [Answer(text, one, None) for text, one in zip(texts, said, strict=True)]


def load_adapter(run: Record | str | Path, *, own_code: bool = False) -> tuple[Any, Any]:
    """The base model with a run's adapter in it, in float32 and evaluation, and what makes its inputs.

    Args:
        run: that has ended, its folder, or the folder of an exported adapter.
        own_code: import a custom task where the run had one; a folder may name any module.

    Returns:
        A `peft.PeftModel`, and the tokenizer or image processor.

    Raises:
        UserError: there is no adapter, or its base model cannot be loaded.
    """
    import transformers
    from peft import PeftModel

    about = About.read(folder := adapter_of(run))
    task, revision = task_of(about, folder, own_code), about.revision
    path, told = located.find_base(about.base), {"revision": revision or "main"}
    try:
        reader = task.reader(about.base, revision)
        with base_model.quietly():
            config = transformers.AutoConfig.from_pretrained(path, **told, **_names(about, task))
            pooled.tell(config, about.pooling)
            model = smaller.pretrained(
                getattr(transformers, task.auto),
                path,
                config=config,
                dtype="float32",
                ignore_mismatched_sizes=bool(about.labels),  # of a head for others; the adapter brings its own
                **told,
            )
            pooled.pool(model, about.pooling)
            base_model.tell(model, threshold=about.threshold, scale=about.scale)
            if task.tokens:
                base_model.pads_as(model, reader)
            return PeftModel.from_pretrained(model, str(folder)).eval(), reader
    except SettingError as error:
        raise UserError(f"{folder}: {error.message}") from error
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{folder}: its model {about.base!r} cannot be loaded: {reason}") from error


def task_of(about: About, folder: Path, own_code: bool) -> type[Task]:
    """The task of an adapter; a custom one only where that is asked for: it is a program.

    Raises:
        UserError: it is not there, or not asked for.
    """
    if ":" in about.task and not own_code:
        raise UserError(
            f"{folder}: its task {about.task!r} is custom code: where you trust it, write own_code=True "
            "(--own-code)"
        )
    try:
        return find(about.task)
    except SettingError as error:
        raise UserError(f"{folder}: {error.message}") from error
