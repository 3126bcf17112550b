"""What tests share: an offline world, a tiny real BERT, and scenarios small enough for a second."""

import json
import os
import resource
import shutil
from pathlib import Path

import pytest
from hypothesis import settings

settings.register_profile("untimed", deadline=None)  # how long a case takes is the machine's affair
settings.load_profile("untimed")
os.environ.update(
    HF_HUB_OFFLINE="1",
    OMP_NUM_THREADS="1",
    TOKENIZERS_PARALLELISM="false",
    RAY_USAGE_STATS_ENABLED="0",
    RAY_worker_niceness="0",  # Ray's workers would wait for the tests beside them
)


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory):
    """No test reads or writes the user's cache."""
    folder = tmp_path_factory.mktemp("cache")
    os.environ["FEDLORA_CACHE"] = str(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory) -> str:
    """A BERT of two layers of width 32 with MiniLM's tokenizer, as a folder."""
    import torch
    from transformers import BertConfig, BertModel

    from fedlora.tasks.located import find_base

    folder = tmp_path_factory.mktemp("tiny")
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "special_tokens_map.json"):
        shutil.copy(Path(find_base("minilm")) / name, folder / name)
    torch.manual_seed(0)
    config = BertConfig(
        initializer_range=0.3,  # wide, so that a random model tells texts apart
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
    )
    BertModel(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def tiny_lm(tmp_path_factory) -> str:
    """A Llama of two layers of width 32 with MiniLM's tokenizer, as a folder."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from fedlora.tasks.located import find_base

    folder = tmp_path_factory.mktemp("tiny-lm")
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "special_tokens_map.json"):
        shutil.copy(Path(find_base("minilm")) / name, folder / name)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=30522,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
        bos_token_id=101,
        eos_token_id=102,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def reviews(tmp_path_factory) -> Path:
    """A csv of 240 rows in which a word gives the label away."""
    file = tmp_path_factory.mktemp("data") / "reviews.csv"
    words = {"good": ("fine", "lovely", "great"), "bad": ("awful", "poor", "sad")}
    rows = ["text,label,site"]
    for i in range(240):
        label = ("good", "bad")[i % 2]
        word = words[label][i % 3]
        rows.append(f"note {i} says the film was {word} {'indeed ' * (i % 4)}here,{label},site{i % 4}")
    file.write_text("\n".join(rows) + "\n")
    return file


@pytest.fixture(scope="session")
def sentences(tmp_path_factory) -> Path:
    """A jsonl of 240 rows of words and tags, in which the words give the tags away."""
    file = tmp_path_factory.mktemp("data") / "sentences.jsonl"
    rows = []
    for i in range(240):
        ill = ((), ("fever",), ("kidney", "failure"))[i % 3]
        tokens = [
            "Report",
            str(i),
            "on",
            *(["Ann", "Li"] if i % 4 == 0 else []),
            "with",
            *ill,
            "and",
            "more"[: i % 5],
        ]
        tags = ["O"] * 3 + (["B-Name", "I-Name"] if i % 4 == 0 else []) + ["O"]
        tags += [f"{'I' if at else 'B'}-Illness" for at in range(len(ill))] + ["O", "O"]
        rows.append(json.dumps({"tokens": tokens, "tags": tags, "ward": f"w{i % 4}"}))
    file.write_text("\n".join(rows))
    return file


@pytest.fixture(scope="session")
def choices(tmp_path_factory) -> Path:
    """A jsonl of 240 rows of a prompt and two completions, of which the friendly one was chosen."""
    file = tmp_path_factory.mktemp("data") / "choices.jsonl"
    kind, rude = ("gladly", "of course", "with joy"), ("no", "go away", "never ever")
    rows = [
        {
            "prompt": f"note {i}: please help {'me ' * (i % 4)}",
            "chosen": f"{kind[i % 3]} {'indeed ' * (i % 5)}",
            "rejected": f"{rude[i % 3]} {'indeed ' * (i % 3)}",
            "who": f"w{i % 4}",
        }
        for i in range(240)
    ]
    file.write_text("\n".join(map(json.dumps, rows)))
    return file


@pytest.fixture(scope="session")
def tiny_yaml(tiny_base, reviews) -> str:
    """A private scenario on the tiny base: 4 clients, 2 rounds."""
    return f"""
name: tiny
seed: 3
model: {{base: "{tiny_base}", adapter: {{kind: lora, r: 4, alpha: 8, targets: [query, value]}}}}
data:
  files: {{train: "{reviews}", text: text, label: label}}
  partition: {{kind: iid}}
  max_length: 16
  test_share: 0.2
clients: {{total: 4, use: dp_sgd, local_steps: 2, batch_size: 8, lr: 0.5}}
privacy: {{epsilon: 8, delta: 1.0e-3}}
strategy: {{use: ffa_lora}}
rounds: 2
engine: {{kind: inline, precision: fp32}}
"""


PLAIN = ("privacy=null", "clients.use=sgd")


@pytest.fixture(scope="session")
def tiny(tiny_yaml):
    """Makes tiny scenarios with overrides; `private=False` for plain SGD."""
    from fedlora.scenario import parse

    def make(*overrides: str, private: bool = True):
        return parse(tiny_yaml, "tiny.yaml", [*(() if private else PLAIN), *overrides])

    return make


@pytest.fixture
def small(tiny_yaml, tmp_path, monkeypatch):
    """An empty folder to work in, where the scenarios that ship are as small as tests are."""
    from fedlora import scenario

    (file := tmp_path / "small.yaml").write_text(tiny_yaml)
    real, shipped = scenario.load, scenario.shipped()
    monkeypatch.setattr(scenario, "load", lambda path, told=(): real(file if path in shipped else path, told))
    (here := tmp_path / "here").mkdir()
    monkeypatch.chdir(here)
    return here


@pytest.fixture(scope="session")
def build(tiny):
    """Makes the worker of a tiny scenario."""
    from dataclasses import replace

    from fedlora.engine import Worker
    from fedlora.prepare import calibrate, prepare

    made = {}

    def worker(*overrides: str, private: bool = True):
        key = (overrides, private)
        if key not in made:
            ready = prepare(tiny(*overrides, private=private))
            made[key] = Worker(replace(ready.setup, noise=calibrate(ready.scenario, ready.data), kept=None))
        return made[key]

    return worker


@pytest.fixture
def largest_file():
    """Sets how large a file may grow, which the kernel refuses as it does a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size=soft: resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
