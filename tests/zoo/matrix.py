"""The matrix of architectures: what each can, found by trying, and the table of docs/models.md.

python -m tests.zoo.matrix    writes the table
"""

import logging
import re
import tempfile
import warnings
from pathlib import Path

import numpy as np
import torch
import transformers as hf

from fedlora import scenario, simulate
from fedlora.errors import SettingError
from fedlora.tasks.base_model import pads_as, quietly
from tests.zoo import homes, images, models

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
LENGTHS = (31, 5, 17, 2, 8)
HEAD = ("architecture, task", "factors in", "packed", "prefix", "private", "checkpoints", "remarks")
NAMES = (*models.MODELS, *images.MODELS)

REMARKS = {
    "deberta-v1": "a table of positions that all examples share",
    "deberta-v2": "a table of positions that all examples share",
    "deberta-v3": "a table of positions that all examples share, projected by the layers of the tokens",
    "albert": "one layer, applied several times",
    "modernbert": "a norm in its head",
    "gpt-neo": "attends in windows",
    "mistral": "attends in windows shorter than the texts",
    "mistral-long": "windows off",
    "llama-tied": "factors on an output that is tied to the embeddings",
    "llama-unpadded": "no token to pad with",
    "llama-last-pad": "padding token -1",
    "gemma3-vision": "`exclude: [vision_tower]`",
    "falcon-alibi": "positions by ALiBi",
    "mixtral": "experts",
    "qwen-moe": "experts, one of them for all tokens",
    "gpt-oss": "experts, and attention with sinks",
    "lfm2": "convolutions between layers of attention",
    "mamba": "no attention",
    "t5": "encoder-decoder; its tokenizer ends each text",
    "bart": "encoder-decoder; its tokenizer ends each text",
    "clip": "its image tower",
    "siglip": "its image tower",
    "flattened": "layers that run on all tokens at once",
    "expert": "layers that run on all tokens at once",
    "sideways": "attends in windows, which it takes for examples",
    "left": "needs padding on the left",
    "convolves": "convolves over padding",
    "unmasked": "mixes tokens with padding",
    "switches": "attends in another way beyond a length",
}

# What is said of an architecture, in words without numbers.
SAID = (
    (r"runs on|gives \d+ and", "layers do not see examples one by one"),
    (r"depends on its padding|logits of examples together", "examples are not what they are alone"),
    (r"in a way of its own", "attends in a way of its own"),
    (r"attends within a window", "attends in windows"),
    (r"what all examples share", "shares a table"),
    (r"over the whole row", "counts positions over the row"),
    (r"reads an example twice", "an encoder-decoder"),
    (r"takes no rows", "takes no rows"),
    (r"normalises over the batch", "normalises over the batch"),
    (r"second time", "draws random numbers"),
)


class _Heard(logging.Handler):
    def __init__(self):
        super().__init__()
        self.lines = []

    def emit(self, record):
        self.lines.append(record.getMessage())


def why(said):
    """A reason in few words."""
    return next(words for pattern, words in SAID if re.search(pattern, said))


def look(name, folder):
    """Try all that the table has of one architecture, and hold it to plain transformers and peft.

    Returns:
        The cells of its row.

    Raises:
        AssertionError: a loss, a gradient or an export is another one.
    """
    told = images.MODELS if name in images.MODELS else models.MODELS
    build, (kind, _, targets, *_) = (images if name in images.MODELS else models).make, told[name]
    heard, logger = _Heard(), logging.getLogger("fedlora.passes.alone")
    logger.addHandler(heard)
    try:
        try:
            task, alone = build(name, private=True)
            private = "yes"
        except SettingError as error:
            private, (task, alone) = f"no: {why(str(error))}", build(name)
        packed = "yes" if task.packing else "-" if not task.tokens else "no"
        for line in heard.lines:
            if "not packed" in line and packed == "no":
                packed = f"no: {why(line)}"
        right = private == "yes" or not any("not to be relied on" in line for line in heard.lines)
        _hold(name, task, alone, private == "yes", right)
        prefix = _prefix(name, build) if packed == "yes" else "-"
        checkpoints = _checkpoints(name, build, task, private == "yes")
    finally:
        logger.removeHandler(heard)
    _run(name, kind, targets, folder, private == "yes", right)
    called = re.sub(r"For(Sequence|Causal|Image)\w+|LMHead\w+", "", kind)
    what = "images" if name in images.MODELS else "generation" if models.decodes(name) else "classification"
    cells = (f"{called}, {what}", ", ".join(f"`{t}`" for t in targets), packed, prefix, private, checkpoints)
    return [*cells, REMARKS.get(name, "")]


def _hold(name, task, alone, private, right):
    """Losses alone, padded and packed, and the gradients of single examples."""
    if name in images.MODELS:
        data, adapter = images.some(), models.away(task)
    else:
        data, adapter = models.texts(LENGTHS, ends=name in ("t5", "bart")), models.away(task)
    losses, gradients = models.singles(task, alone, data, adapter)
    every = np.arange(len(data))

    def together():
        task.begin(adapter, ())
        with torch.no_grad():
            return task.losses(task.batch(data, every))

    off = [float((together() - losses).abs().max() / losses.max())]
    if task.packing is not None:
        packing, task.packing = task.packing, None
        with packing.away():
            off.append(float((together() - losses).abs().max() / losses.max()))
        task.packing = packing
    assert not right or max(off) < 1e-5, f"losses are {off} away from those alone"
    if private:
        found = models.privately(task, adapter, data)
        off = float(((found - gradients).norm(dim=1) / gradients.norm(dim=1)).max())
        assert off < 1e-4 and float(gradients.norm(dim=1).min()) > 1e-3, f"gradients are {off} away"


def _prefix(name, build):
    """Whether what lies below the lowest factors is known after one pass, and the same from there."""
    try:
        task, _ = build(name, layers=(1,))
    except SettingError:
        return "-"
    if task.prefix is None:
        return "no"
    data, every = models.texts(LENGTHS), np.arange(len(LENGTHS))
    task.begin(task.initial, ())
    with torch.no_grad():
        whole = task.losses(task.batch(data, every))
        kept = np.concatenate([task.below(data, every[i : i + 1], False)[0].numpy() for i in every])
        task.prefix.kept = lambda _: kept
        torch.testing.assert_close(task.losses(task.batch(data, every)), whole, rtol=1e-5, atol=1e-5)
    return "yes"


def _checkpoints(name, build, task, private):
    """Whether blocks can be made again on the way back, with the same gradients."""
    try:
        again, _ = build(name, private=private, checkpointing=True)
    except SettingError as error:
        assert error.key == "model.checkpointing", error
        return "no"
    data, adapter = images.some() if name in images.MODELS else None, models.away(task)
    data = models.texts(LENGTHS, ends=name in ("t5", "bart")) if data is None else data
    if private:
        one, two = (models.privately(t, adapter, data) for t in (task, again))
        assert float((one - two).norm() / one.norm()) < 1e-5
    return "yes"


SCENARIO = """
name: zoo
task: {task}
model: {{base: "{base}", adapter: {{r: 4, alpha: 8, targets: {targets}, exclude: {exclude}}}}}
data: {{{data}, max_length: 16, partition: {{kind: iid}}}}
clients: {{total: 2, use: dp_sgd, local_steps: 1, batch_size: 4, lr: 0.5}}
privacy: {{epsilon: 8, delta: 1.0e-3}}
strategy: {{use: fedavg_lora}}
rounds: 1
engine: {{kind: inline, precision: fp32, threads: 1}}
"""


def _run(name, kind, targets, folder, private, right):
    """A private and a plain run, each to an adapter that plain peft loads with the same loss on the test rows."""
    pictures = name in images.MODELS
    if pictures:
        base = homes.home(images.plain(name), folder / "base", images.reader())
        data, task = (
            f'hub: {{path: "{images.rows(folder / "rows")}", text: image, label: label}}',
            "image_classification",
        )
    else:
        writes = models.decodes(name)
        base = homes.home(
            models.plain(name),
            folder / "base",
            homes.letters() if name == "qwen2" else homes.tokenizer(ends=not writes),
        )
        files = [homes.rows(folder / f"{half}.csv", n) for half, n in (("train", 24), ("test", 12))]
        label = ", label: null" if writes else ", label: label"
        data = f'files: {{train: "{files[0]}", test: "{files[1]}", text: text{label}}}'
        task = "causal_lm" if writes else "classification"
    exclude = list(models.EXCLUDED.get(name, ()))
    text = SCENARIO.format(task=task, base=base, targets=list(targets), exclude=exclude, data=data)
    plainly = ["privacy=null", "clients.use=sgd"]
    for told in ([], plainly) if private else (plainly,):
        run = simulate(scenario.parse(text, "zoo.yaml", told), out=folder / f"run{len(told)}")
        assert run.state == "finished" and not run.summary["failures"]
        if right:
            found = _exported(kind, base, run, folder, task)
            assert abs(found - run.summary["loss"]) < 1e-4 * abs(found), (found, run.summary["loss"])


def _exported(kind, base, run, folder, task):
    """The loss of a run's adapter in plain peft, an example of the test rows at a time."""
    from peft import PeftModel

    with quietly():
        model = PeftModel.from_pretrained(getattr(hf, kind).from_pretrained(base), run.folder / "adapter").eval()
    entropy = torch.nn.functional.cross_entropy
    losses = []
    if task == "image_classification":
        for pixels, label in images.pixels(folder / "rows"):
            with torch.no_grad():
                losses.append(float(entropy(model(pixel_values=pixels).logits, torch.tensor([label]))))
        return float(np.mean(losses))
    read = hf.AutoTokenizer.from_pretrained(base)
    pads_as(model.get_base_model(), read)
    lines = [row.rsplit(",", 1) for row in (folder / "test.csv").read_text().splitlines()[1:]]
    counts = []
    for words, label in lines:
        ids = read(words, return_tensors="pt", truncation=True, max_length=16)["input_ids"]
        if task == "causal_lm":
            ids = torch.cat([ids[:, :15], torch.tensor([[homes.END]])], 1)
        with torch.no_grad():
            out = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        if task == "causal_lm":
            losses.append(float(entropy(out[0, :-1], ids[0, 1:], reduction="sum")))
            counts.append(ids.shape[1] - 1)
        else:
            losses.append(float(entropy(out, torch.tensor(["abc".index(label)]))))
            counts.append(1)
    return sum(losses) / sum(counts)


def table(rows):
    """Rows of cells as the page has them."""
    lines = [HEAD, ["---"] * len(HEAD), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def shown():
    """The rows of the page's table."""
    lines = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    first = next(i for i, line in enumerate(lines) if line.startswith(f"| {HEAD[0]}"))
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[first + 2 :]]


def write():
    """Write the table into the page."""
    made = []
    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder:
        warnings.simplefilter("ignore")
        for name in NAMES:
            (place := Path(folder) / name).mkdir()
            made.append(look(name, place))
            print(table([made[-1]]).splitlines()[-1], flush=True)
    text = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(
        re.sub(rf"\| {HEAD[0]} .*?(\n\n|\Z)", lambda _: table(made) + "\n\n", text, flags=re.S).rstrip() + "\n"
    )


if __name__ == "__main__":
    write()
