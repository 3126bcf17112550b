"""From a task's name and a base model to the resident task of a worker."""

import importlib.util
import logging
from collections.abc import Collection, Sequence
from typing import Any

from fedlora import plugins, seeding
from fedlora.data.store import Dataset
from fedlora.errors import SettingError
from fedlora.factors import Factors
from fedlora.kinds.contract import Kind, Saved, under
from fedlora.kinds.targets import choose, linear_layers
from fedlora.metrics.written import WRITTEN
from fedlora.passes import alone, bits, pooled
from fedlora.scenario import Scenario
from fedlora.scenario.bits import Bits, Quantize
from fedlora.scenario.head import NarrowHead
from fedlora.tasks import base_model, located, smaller
from fedlora.tasks.adapted import Precision
from fedlora.tasks.contract import Task, find
from fedlora.tasks.heads import narrow


def build(
    cls: type[Task],
    model: Any,
    kind: Kind,
    *,
    reader: Any = None,
    max_length: int = 128,
    special: Collection[int] = (),
    **told: Any,
) -> Task:
    """The task of a loaded base model, once it is seen how its examples can share a pass.

    Args:
        cls: of the task.
        model: a transformers model in float32.
        kind: of the adapter to build in.
        reader: of the base model, for tasks that ask it something.
        max_length: the most tokens of an example.
        special: ids of tokens that no text holds.
        told: as the task takes it.

    Raises:
        SettingError: the model does not fit the adapter, or cannot be private.
    """
    made = cls(model, kind, **told)
    if model.config.is_encoder_decoder and cls.headed and cls.pools and model.config.eos_token_id is not None:
        pooled.Ending(model)
    made.sees(reader)
    if made.weighs:
        alone.settle(made, max_length, {made.pad, *special})
    made.prefix = made.lower()
    return made


def load(
    task: str,
    base: str,
    kind: Kind,
    *,
    labels: Sequence[str],
    seed: int,
    head: str | NarrowHead = "trained",
    pooler: str = "frozen",
    pooling: pooled.Pooling | None = None,
    revision: str | None = None,
    quantize: Quantize | None = None,
    device: str = "cpu",
    precision: Precision = "fp32",
    max_length: int = 128,
    private: bool = False,
    start: Saved | None = None,
    scale: tuple[float, float] | None = None,
    threshold: float | None = None,
    beta: float | None = None,
    checkpointing: bool = False,
) -> Task:
    """Load a base model, switch its dropout off and build the adapter in.

    On the device `meta` it has shapes and no weights: its configuration is all that is loaded.

    Raises:
        SettingError: the model cannot be had, is broken, or does not fit the settings.
    """
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # peft imports it; it hints at kernels not used here
    cls = find(task)
    reader = cls.reader(base, revision)
    smaller.check_whole_bits(located.find_base(base), quantize)
    if quantize is not None and importlib.util.find_spec("bitsandbytes") is None:
        raise SettingError("model.quantize", "needs bitsandbytes: pip install 'fedlora[quantize]'")
    # On a CPU the backward pass of torch's fused attention takes nearly half of a step on short text.
    short = device == "cpu" and max_length <= 256
    held = (short, device, quantize, pooler, pooling)
    model, missing = _base(cls, task, base, revision, reader, labels, seed, *held)
    pooled.pool(model, pooling)
    missing = [n for n in missing if n in model.state_dict()]  # a pooler may be left out
    base_model.tell(model, scale=scale, threshold=threshold, beta=beta)
    heads: dict[str, bool] = {}
    if cls.headed:
        heads = {name: head != "frozen" for name in base_model.heads_of(model)}
        if isinstance(head, NarrowHead):
            missing = narrow(model, heads, len(labels), head.rank, seed, missing)
        bound = [n for n, p in model.named_parameters() if p.shape[:1] == (len(labels),) and _within(n, heads)]
        if head == "kept" and start is None and device != "meta" and set(bound) & set(missing):
            raise SettingError("model.head", f"{base} has no head for {len(labels)} labels to keep: take trained")
        if head != "kept" and cls.labelled and base_model.other_labels(base, revision, labels):
            missing = [*missing, *bound]
        first = {n: p for n, p in model.named_parameters() if n in {*bound} & {*missing} and p.ndim == 1}
        if begins := cls.begins(labels):
            for bias in first.values():
                bias.data.fill_(begins)
            missing = [n for n in missing if n not in first]  # else it were drawn
        if pooler == "trained":
            if getattr(base_model.body_of(model)[1], "pooler", None) is None:
                raise SettingError("model.pooler", f"{base} has no pooler to train; leave it frozen")
            heads["pooler"] = True
    lacking = [n for n in missing if not _within(n, heads)]
    if lacking:
        instead = "" if any(".pooler." not in f".{n}" for n in lacking) else ": write model.pooler: trained"
        raise SettingError(
            "model.base", f"{base} lacks weights that this task needs, such as {sorted(lacking)[0]}{instead}"
        )
    if cls.tokens:
        base_model.check_room(model, reader, max_length, private)
    if model.config.is_encoder_decoder and cls.headed and cls.pools:
        base_model.check_end(model, reader)
    lost: dict[str, Factors] = {}
    if isinstance(quantize, Bits) and device != "meta":
        lost = _in_bits(model, quantize, kind, pooler, device)
    if lost:
        start = bits.begun(lost)
    made = build(
        cls,
        model,
        kind,
        reader=reader,
        max_length=max_length,
        special=reader.all_special_ids if cls.tokens else (),
        heads=heads,
        seed=seed,
        device=device,
        precision=precision,
        pad=base_model.pads_as(model, reader) if cls.tokens else 0,
        private=private,
        fresh=missing,
        start=start,
        checkpointing=checkpointing,
    )
    made.lost = bits.change(lost)
    return made


def _in_bits(model: Any, told: Bits, kind: Kind, pooler: str, device: str) -> dict[str, Factors]:
    """Hold a base in 4 or 8 bits by layer; what the adapter's layers lost, where it is to begin with that."""
    whole, heads = base_model.in_full(model, pooler), base_model.heads_of(model)
    names = [name for name in linear_layers(model, heads) if name not in whole]
    mended = choose(model, heads, kind.targets, kind.exclude, kind.layers) if told.start is not None else []
    return bits.hold(model, names, mended, told.bits, kind.r, device)


def check(task: Task, scenario: Scenario, data: Dataset) -> None:
    """Make sure that a loaded model has a place for what a run's rows hold, and for the answers that it writes.

    Under privacy no private row is looked at.

    Raises:
        SettingError: it has not.
    """
    if task.tokens and scenario.privacy is None:
        base_model.check_tokens(task.model, data.largest_token)
    if (asked := scenario.exact_match) is not None and task.target == "start":
        halves = (data.test, data.validation) if scenario.chosen_by(task.metric) in WRITTEN else (data.test,)
        longest = max(int(half.targets[: asked.examples].max(initial=0)) for half in halves)
        base_model.check_writing(task.model, longest, asked.max_new_tokens)


def _within(name: str, heads: Collection[str]) -> bool:
    return any(under(name, head) for head in heads)


def _base(
    cls: type[Task],
    task: str,
    base: str,
    revision: str | None,
    reader: Any,
    labels: Sequence[str],
    seed: int,
    short: bool,
    device: str,
    quantize: Quantize | None,
    pooler: str,
    pooling: pooled.Pooling | None,
) -> tuple[Any, list[str]]:
    """The model of transformers, and which of its weights nobody trained yet."""
    import torch
    import transformers

    path, auto = located.find_base(base), getattr(transformers, cls.auto)
    with base_model.loading(base, path, "model"):
        config = transformers.AutoConfig.from_pretrained(path, revision=revision or "main")
    autos = {name: getattr(transformers, plugins.find("tasks", name).auto) for name in plugins.names("tasks")}
    base_model.check_known(base, config, task, auto, autos)
    attention = base_model.attention_of(config, auto) if short else None
    with base_model.loading(base, path, "model"):
        base_model.quiet_config(config)
        told = config.get_text_config()
        known, pad = getattr(told, "vocab_size", 1), getattr(told, "pad_token_id", None)
        if cls.tokens and (pad is None or pad >= known):
            told.pad_token_id = base_model.pad_of(reader, known)  # some need one; some were given a token too much
        if cls.problem is not None:
            config.problem_type = cls.problem
        if cls.labelled:
            config.id2label = dict(enumerate(labels))
            config.label2id = {label: i for i, label in enumerate(labels)}
        pooled.tell(config, pooling)
        if device == "meta" or quantize is not None:
            with torch.device("meta"):
                model = auto.from_config(config, dtype=torch.float32, attn_implementation=attention)
        if device == "meta":
            return smaller.thinned(model, path), []
        held = base_model.quantization(quantize, device, model, pooler) if isinstance(quantize, str) else {}
        with seeding.ambient(seed, "head"):  # transformers draws what the checkpoint lacks
            model, report = smaller.pretrained(
                auto,
                path,
                config=config,
                revision=revision or "main",
                dtype="float32",
                attn_implementation=attention,
                output_loading_info=True,
                ignore_mismatched_sizes=cls.headed,  # of a head for other labels; of a body it is an error below
                **held,
            )
    return smaller.thinned(model, path), [*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])]
