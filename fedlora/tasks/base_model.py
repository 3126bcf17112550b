"""The base model: how it, its tokenizer or its image processor are loaded."""

import contextlib
import hashlib
import inspect
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fedlora.data.reading import quiet_hub
from fedlora.errors import SettingError
from fedlora.kinds.contract import under
from fedlora.tasks.located import find_base


def other_labels(base: str, revision: str | None, labels: Sequence[str]) -> tuple[str, ...]:
    """The labels of a base model that is a classifier already, where these are others or in another order.

    Empty too where it does not say: transformers then calls them LABEL_0 and so on.
    """
    from transformers import AutoConfig

    path = find_base(base)
    with loading(base, path, "model"):
        config = AutoConfig.from_pretrained(path, revision=revision or "main")
    named = tuple(str(config.id2label[i]) for i in sorted(config.id2label or ()))
    unsaid = named == tuple(f"LABEL_{i}" for i in range(len(labels)))
    classifies = any("Classification" in name for name in config.architectures or ())
    same = [n.casefold() for n in named] == [label.casefold() for label in labels]
    return () if unsaid or same or not classifies else named


def load_tokenizer(base: str, revision: str | None = None) -> Any:
    """The tokenizer of a base model.

    Raises:
        SettingError: there is none, or its files are broken.
    """
    from transformers import AutoTokenizer

    path = find_base(base)
    with loading(base, path, "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(path, revision=revision or "main")
        if not len(tokenizer("fedlora")["input_ids"]):
            raise ValueError("it turns a word into no tokens")
    return tokenizer


def encoding_fingerprint(reader: Any) -> str:
    """Differs where a tokenizer would cut a text, or an image processor an image, in another way."""
    if not hasattr(reader, "get_vocab"):
        text = reader.to_json_string()
    else:
        backend = getattr(reader, "backend_tokenizer", None)
        text = backend.to_str() if backend else repr(sorted(reader.get_vocab().items()))
        text += str(reader.chat_template or "")
        ends = (getattr(reader, "eos_token_id", None), getattr(reader, "truncation_side", None))
        text += repr(ends)  # of no tokenizer.json: an instructed model may end with another token than its base
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def load_processor(base: str, revision: str | None = None) -> Any:
    """What cuts images to the size that a base model sees, on PIL.

    Raises:
        SettingError: there is none, or its files are broken.
    """
    from transformers import AutoImageProcessor

    path = find_base(base)
    with loading(base, path, "image processor"):
        return AutoImageProcessor.from_pretrained(path, revision=revision or "main", backend="pil")


def quiet_config(config: Any) -> None:
    """No dropout, so that an update does not depend on how its batch was cut, and no cache, in each part."""
    for key, value in config.to_dict().items():
        if "drop" in key and isinstance(value, float):
            setattr(config, key, 0.0)
    config.use_cache = False
    for name in config.sub_configs:
        if (part := getattr(config, name, None)) is not None:
            quiet_config(part)


def tell(
    model: Any,
    *,
    threshold: float | None = None,
    scale: Sequence[float] | None = None,
    beta: float | None = None,
) -> None:
    """Have a model's configuration say what transformers keeps and does nothing by.

    Args:
        model: of transformers.
        threshold: from which probability on a label is given.
        scale: from where to where scores go.
        beta: of preferences, how much a reward grows with a log probability.
    """
    if threshold is not None:
        model.config.threshold = threshold
    if scale is not None:
        model.config.score_scale = [float(end) for end in scale]
    if beta is not None:
        model.config.preference_beta = float(beta)


def positions(model: Any) -> int | None:
    """For how many tokens of an example a model has positions; None where it has no table of them."""
    import torch

    found = []
    towers = [n for n, m in model.named_modules() if getattr(m, "main_input_name", "") == "pixel_values"]
    for name, module in model.named_modules():
        if any(under(name, tower) for tower in towers):
            continue
        if isinstance(module, torch.nn.Embedding) and _is_of_positions(name.rsplit(".", 1)[-1]):
            before = 0 if module.padding_idx is None else module.padding_idx + 1  # as RoBERTa counts
            found.append(int(module.num_embeddings) - int(getattr(module, "offset", 0) or before))
    return min(found, default=None)


def _is_of_positions(name: str) -> bool:
    """Whether a table has a place for each token; those of transformers are called so, and `rel_` are others."""
    return name == "wpe" or ("pos" in name and "embed" in name and not name.startswith("rel"))


def check_room(model: Any, tokenizer: Any, max_length: int, private: bool) -> None:
    """Make sure that a model has a place for every token that examples may hold; they are not looked at.

    Under privacy for each of the tokenizer's: a pass that fails reveals a word. Without it `check_tokens` looks.

    Raises:
        SettingError: it has fewer positions, or fewer tokens than its tokenizer.
    """
    if (room := positions(model)) is not None and room < max_length:
        raise SettingError("data.max_length", f"{max_length} tokens, and the model has {room} positions: lower it")
    known, used = model.get_input_embeddings().num_embeddings, max(tokenizer.get_vocab().values())
    if private and used >= known:
        raise SettingError("model.base", f"its tokenizer has tokens up to number {used}, {_without(known)}")


def check_tokens(model: Any, used: int) -> None:
    """Make sure that a model has a place for the highest number of a token that data hold.

    Raises:
        SettingError: it has not.
    """
    if used >= (known := model.get_input_embeddings().num_embeddings):
        raise SettingError("model.base", f"the data hold token number {used}, {_without(known)}")


def check_writing(model: Any, longest: int, new: int) -> None:
    """Make sure that a model has positions for prompts and what it is to write after them.

    Args:
        model: of transformers or peft.
        longest: tokens of the longest prompt.
        new: the most tokens that are written.

    Raises:
        SettingError: it has not.
    """
    if (room := positions(model)) is not None and longest + new > room:
        raise SettingError(
            "exact_match.max_new_tokens",
            f"{new} tokens after a prompt of {longest}, and the model has {room} positions: lower it",
        )


def _without(known: int) -> str:
    return (
        f"and it has embeddings of {known}: the tokenizer was given more, such as one to pad with; take the one "
        "that the model was trained with, or save the model after resize_token_embeddings(len(tokenizer))"
    )


def check_end(model: Any, tokenizer: Any) -> None:
    """Make sure that texts end with the token that an encoder-decoder classifies by.

    Raises:
        SettingError: its tokenizer ends them with none, or another.
    """
    end = model.config.eos_token_id
    if end is None or tokenizer("fedlora")["input_ids"][-1] != end:
        raise SettingError(
            "model.base",
            f"{type(model).__name__} reads what a text is at the token that ends it, number {end}, and its "
            "tokenizer ends texts otherwise: take the tokenizer that it was trained with, or an encoder, such as "
            "minilm",
        )


def attention_of(config: Any, auto: Any) -> str | None:
    """Plain products, which are quick on short texts; None, transformers' own choice, where there is no other.

    Models that do not follow its interface may compute something else by them, as Falcon does with ALiBi.
    """
    kind = auto._model_mapping[type(config)] if type(config) in auto._model_mapping else None
    follows = getattr(kind, "_can_set_attn_implementation", None)
    return "eager" if follows is not None and follows() else None


def check_known(base: str, config: Any, task: str, auto: Any, others: Mapping[str, Any]) -> None:
    """Make sure that transformers has a model of an architecture for a task.

    Args:
        base: as it is named.
        config: of the base model.
        task: of the scenario.
        auto: the class of transformers that is asked.
        others: those of other tasks, by the names of these.

    Raises:
        SettingError: it has not; with the tasks for which there is one.
    """
    if type(config) in auto._model_mapping or hasattr(config, "auto_map"):
        return
    can = [name for name, other in others.items() if type(config) in other._model_mapping]
    instead = f"with it goes task: {' or '.join(can)}" if can else "no task goes with it"
    raise SettingError("model.base", f"transformers has no {config.model_type} for task: {task}; {instead}")


def pads_as(model: Any, tokenizer: Any) -> int:
    """Let a model take for padding what is padded with: classifiers of decoders read the last token before it.

    Returns:
        The id of that token.
    """
    pad = pad_of(tokenizer, model.get_input_embeddings().num_embeddings)
    for told in (model.config, model.config.get_text_config()):
        told.pad_token_id = pad
    return pad


def filler(tokenizer: Any) -> int:
    """The id of the token that stands for a text of which a tokenizer makes none: of the end, else of any sign."""
    told = (getattr(tokenizer, f"{what}_token_id", None) for what in ("eos", "bos", "unk", "pad"))
    return next((i for i in told if i is not None), 0)


def pad_of(tokenizer: Any, tokens: int) -> int:
    """The id to pad with, of so many that a model knows: the tokenizer's own, else that of the end, else 0."""
    told = (tokenizer.pad_token_id, tokenizer.eos_token_id)
    return next((i for i in told if i is not None and 0 <= i < tokens), 0)


def untie(model: Any, layer: Any) -> Any:
    """Give a layer that shares its weight with the embeddings one of its own: a change is the layer's alone.

    Returns:
        The new parameter; None where nothing was shared.
    """
    import torch

    base = model.get_base_model()
    tables = (module for module in base.modules() if isinstance(module, torch.nn.Embedding))
    if all(layer.weight is not table.weight for table in tables):  # of images there are none
        return None
    layer.weight = torch.nn.Parameter(layer.weight.detach().clone(), requires_grad=False)
    for told in (base.config, base.config.get_text_config()):
        told.tie_word_embeddings = False
    return layer.weight


def quantization(quantize: str, device: str, model: Any, pooler: str) -> dict[str, Any]:
    """What `from_pretrained` needs to hold frozen linear layers of such a model in 8 or 4 bits."""
    from transformers import BitsAndBytesConfig

    told = BitsAndBytesConfig(
        load_in_8bit=quantize == "8bit",
        load_in_4bit=quantize == "4bit",
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        llm_int8_skip_modules=in_full(model, pooler),  # of both kinds
    )
    return {"quantization_config": told, "device_map": {"": device}}


def in_full(model: Any, pooler: str) -> list[str]:
    """What of a model federates whole, and is held so: its heads, and a pooler that trains."""
    federate = [*heads_of(model), *(["pooler"] if pooler == "trained" else [])]
    return [name for name, _ in model.named_modules() if any(under(f"{name}.", head) for head in federate)]


@contextlib.contextmanager
def loading(base: str, path: str, what: str) -> Iterator[None]:
    """Quiet loading; whatever goes wrong becomes one line about `model.base`."""
    try:
        with quietly(), quiet_hub():
            yield
    except Exception as error:  # the libraries raise whatever their files made them trip over
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise SettingError("model.base", f"cannot load the {what} of {base!r}: {reason}") from error


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """No progress bars and no hints of transformers, and none of peft 0.21's on an old name or tied weights."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
            warnings.filterwarnings("ignore", "Model has `tie_word_embeddings", UserWarning)
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def body_of(model: Any) -> tuple[str, Any]:
    """What of a model lies below its head, by name: where no part has the usual name, the largest one."""
    parts = dict(model.named_children())
    name = model.base_model_prefix
    if name not in parts:
        name = max(parts, key=lambda part: sum(p.numel() for p in parts[part].parameters()))
    return name, parts[name]


def heads_of(model: Any) -> list[str]:
    """What a model has beside its body, by name."""
    body, _ = body_of(model)
    beside = [(name, part) for name, part in model.named_children() if name != body]
    return [name for name, part in beside if any(True for _ in part.parameters())]


def text_kinds(model: Any) -> int:
    """How many texts of an example a model tells apart by `token_type_ids`; 0 where it knows none."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if "token_type_ids" not in inspect.signature(base.forward).parameters or hasattr(base.config, "vision_config"):
        return 0  # beside images they tell which tokens stand for one
    return int(getattr(base.config, "type_vocab_size", 2))
