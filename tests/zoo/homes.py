"""Models of the zoo as folders, with a tokenizer of few words or an image processor, and rows to train on."""

import csv

import numpy as np

VOCABULARY, PAD, END = 99, 1, 2


def tokenizer(words=VOCABULARY, ends=True, pad="<pad>"):
    """Of whole words `w4` and so on; by default it ends a text as an encoder-decoder wants."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    known = {"<s>": 0, "<pad>": PAD, "</s>": END, "<unk>": 3, **{f"w{i}": i for i in range(4, words)}}
    made = Tokenizer(models.WordLevel(known, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if ends:
        made.post_processor = processors.TemplateProcessing(
            single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", END)]
        )
    told = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token=pad, **told)


def letters():
    """Of single letters and digits, for Qwen2, whose tokenizer transformers takes whatever a folder says."""
    from transformers import Qwen2Tokenizer

    known = {"<s>": 0, "<pad>": PAD, "</s>": END, "<unk>": 3}
    known |= {letter: 4 + i for i, letter in enumerate("wĠ0123456789fedlora")}
    return Qwen2Tokenizer(vocab=known, merges=[], eos_token="</s>", pad_token="<pad>", unk_token="<unk>")


def home(model, folder, reader=None):
    """Save a model and what makes its inputs; the folder's name."""
    from fedlora.tasks.base_model import quietly

    with quietly():
        model.save_pretrained(folder)
    (reader or tokenizer()).save_pretrained(folder)
    return str(folder)


def rows(file, count=24, labels=("a", "b", "c")):
    """A csv of texts of two to twelve words, and of labels."""
    rng = np.random.default_rng(0)
    with open(file, "w", newline="") as out:
        writer = csv.writer(out)
        writer.writerow(["text", "label"])
        for i in range(count):
            words = rng.integers(4, VOCABULARY, 2 + i % 11)
            writer.writerow([" ".join(f"w{n}" for n in words), labels[i % len(labels)]])
    return file
