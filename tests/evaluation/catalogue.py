"""Tasks of the shapes of lm-eval's catalogue, with local rows of made-up words, and a tiny model that reads them."""

import json
import random
from pathlib import Path
from typing import Any

import torch
import yaml
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WORDS = [f"{head}{tail}" for head in "bdfgklmnprst" for tail in ("a", "e", "ib", "ol", "us")]
SIGNS = [
    "Question",
    "Answer",
    "yes",
    "no",
    "A",
    "B",
    "C",
    "D",
    "user",
    "assistant",
    *"0123456789",
    *":?.,#-$|<>[]'",
    " ",
    "\n",
]
VOCABULARY = {token: i for i, token in enumerate(["<unk>", "<s>", "</s>", "<pad>", *SIGNS, *WORDS])}
CHAT = (
    "{% for m in messages %}|{{ m['role'] }}|{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}|assistant|{% endif %}"
)

#: The settings of each task, shaped as in lm-eval's catalogue (arc_easy, hellaswag, boolq, lambada_openai, wikitext,
#: gsm8k, mmlu). Some texts of boolq, wikitext and gsm8k are too long for the model.
TASKS: dict[str, dict[str, Any]] = {
    "tiny_arc": {
        "output_type": "multiple_choice",
        "training_split": "train",
        "validation_split": "validation",
        "test_split": "test",
        "doc_to_text": "Question: {{question}}\nAnswer:",
        "doc_to_target": "{{choices.label.index(answerKey)}}",
        "doc_to_choice": "{{choices.text}}",
        "metric_list": [
            {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
            {"metric": "acc_norm", "aggregation": "mean", "higher_is_better": True},
        ],
        "num_fewshot": 2,
    },
    "tiny_hellaswag": {
        "output_type": "multiple_choice",
        "training_split": "train",
        "validation_split": "validation",
        "test_split": None,
        "process_docs": "!function functions.process_docs",
        "doc_to_text": "{{query}}",
        "doc_to_target": "{{label}}",
        "doc_to_choice": "choices",
        "metric_list": [
            {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
            {"metric": "acc_norm", "aggregation": "mean", "higher_is_better": True},
        ],
    },
    "tiny_boolq": {
        "output_type": "multiple_choice",
        "training_split": "train",
        "validation_split": "validation",
        "doc_to_text": "{{passage}}\nQuestion: {{question}}?\nAnswer:",
        "doc_to_target": "label",
        "doc_to_choice": ["no", "yes"],
        "should_decontaminate": True,
        "doc_to_decontamination_query": "passage",
        "metric_list": [{"metric": "acc"}],
        "num_fewshot": 5,
    },
    "tiny_winogrande": {
        "output_type": "multiple_choice",
        "validation_split": "validation",
        "doc_to_text": "!function functions.which_option",
        "doc_to_target": "!function functions.after_gap",
        "doc_to_choice": "!function functions.options",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    },
    "tiny_lambada": {
        "output_type": "loglikelihood",
        "test_split": "test",
        "doc_to_text": "{{text.split(' ')[:-1]|join(' ')}}",
        "doc_to_target": "{{' '+text.split(' ')[-1]}}",
        "metric_list": [
            {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False},
            {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
        ],
    },
    "tiny_wikitext": {
        "output_type": "loglikelihood_rolling",
        "test_split": "test",
        "doc_to_text": "",
        "doc_to_target": "!function functions.detokenized",
        "process_results": "!function functions.per_length",
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "byte_perplexity"}, {"metric": "bits_per_byte"}],
    },
    "tiny_completion": {
        "class": "!function functions.Completion",
        "output_type": "generate_until",
        "test_split": "test",
        "generation_kwargs": {"until": "Question:", "do_sample": False, "max_new_tokens": 12},
    },
    "tiny_gsm8k": {
        "output_type": "generate_until",
        "training_split": "train",
        "fewshot_split": "train",
        "test_split": "test",
        "doc_to_text": "Question: {{question}}\nAnswer:",
        "doc_to_target": "{{answer}}",
        "metric_list": [
            {
                "metric": "exact_match",
                "aggregation": "mean",
                "higher_is_better": True,
                "ignore_case": True,
                "ignore_punctuation": False,
                "regexes_to_ignore": [",", "\\$", "(?s).*#### ", "\\.$"],
            }
        ],
        "generation_kwargs": {
            "until": ["Question:", "</s>", "\n\n"],
            "do_sample": False,
            "temperature": 0.0,
            "max_gen_toks": 12,
        },
        "repeats": 1,
        "num_fewshot": 9,
        "filter_list": [
            {
                "name": "strict-match",
                "filter": [{"function": "regex", "regex_pattern": "#*(\\-?[0-9])"}, {"function": "take_first"}],
            },
            {
                "name": "flexible-extract",
                "filter": [
                    {"function": "regex", "group_select": -1, "regex_pattern": "(-?[$0-9.,]{2,})|(-?[0-9]+)"},
                    {"function": "take_first"},
                ],
            },
        ],
    },
}
#: What the leaves of the group share, as mmlu's template says it.
SUBJECT: dict[str, Any] = {
    "tag": "tiny_mmlu_tasks",
    "test_split": "test",
    "fewshot_split": "dev",
    "fewshot_config": {"sampler": "first_n"},
    "num_fewshot": 2,
    "output_type": "multiple_choice",
    "doc_to_text": "{{question.strip()}}\n"
    "A. {{choices[0]}}\nB. {{choices[1]}}\nC. {{choices[2]}}\nD. {{choices[3]}}\nAnswer:",
    "doc_to_choice": ["A", "B", "C", "D"],
    "doc_to_target": "answer",
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
}
GROUP: dict[str, Any] = {
    "group": "tiny_mmlu",
    "task": ["tiny_mmlu_tasks"],
    "aggregate_metric_list": [{"metric": "acc", "weight_by_size": True}],
}
FUNCTIONS = '''
import re

import numpy as np
from lm_eval.api.task import ConfigurableTask


def process_docs(dataset):
    def process(doc):
        return {"query": doc["activity"] + ": " + doc["ctx"], "choices": [e.strip() for e in doc["endings"]]}

    return dataset.map(process)


def which_option(doc):
    return {"1": 0, "2": 1}[doc["answer"]]


def after_gap(doc):
    return doc["sentence"][doc["sentence"].index("_") + 1 :].strip()


def options(doc):
    start = doc["sentence"][: doc["sentence"].index("_")]
    return [start + doc["option1"], start + doc["option2"]]


def detokenized(doc):
    return doc["page"].replace(" . ", ". ")


def per_length(doc, results):
    (loglikelihood,) = results
    words = len(re.split(r"\\s+", doc["page"]))
    size = len(doc["page"].encode("utf-8"))
    return {
        "word_perplexity": (loglikelihood, words),
        "byte_perplexity": (loglikelihood, size),
        "bits_per_byte": (loglikelihood, size),
    }


class Completion(ConfigurableTask):
    """Shaped as squad_completion, a task in Python."""

    def __init__(self, config):
        super().__init__(config={key: found for key, found in config.items() if key != "class"})

    def doc_to_text(self, doc):
        return doc["question"]

    def doc_to_target(self, doc):
        return doc["answer"][-1]

    def process_results(self, doc, results):
        return {"contains": int(self.doc_to_target(doc) in results[0])}

    def aggregation(self):
        return {"contains": np.mean}

    def higher_is_better(self):
        return {"contains": True}


class Chooser(Completion):
    """A task whose code says which documents it asks."""

    def has_test_docs(self):
        return True


def picky(doc, results):
    if results[0]:
        raise RuntimeError("cannot read this")
    return {"odd": 2.0, "text": "x", "gone": float("nan")}
'''


class _Function(str):
    """A name that YAML writes behind lm-eval's tag for functions."""


class _Dumper(yaml.SafeDumper):
    pass


_Dumper.add_representer(_Function, lambda dumper, name: dumper.represent_scalar("!function", str(name)))


def write_task(folder: Path, name: str, settings: dict[str, Any], rows: dict[str, list[dict[str, Any]]]) -> None:
    """Write a task's YAML and the rows of its splits."""
    files = {}
    for split, found in rows.items():
        path = folder / f"{name}-{split}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in found), encoding="utf-8")
        files[split] = str(path)
    write_yaml(
        folder / f"{name}.yaml",
        {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": files},
            **settings,
            "metadata": {"version": 1.0},
        },
    )


def write_yaml(path: Path, settings: dict[str, Any]) -> None:
    """Write YAML in which `!function NAME` is lm-eval's tag."""
    tagged = {
        key: _Function(found.removeprefix("!function "))
        if isinstance(found, str) and found.startswith("!function ")
        else found
        for key, found in settings.items()
    }
    path.write_text(yaml.dump(tagged, Dumper=_Dumper, sort_keys=False), encoding="utf-8")


def write_catalogue(folder: Path, count: int = 24) -> Path:
    """Write all tasks, each with `count` documents to ask, and the group; return the folder."""
    random_ = random.Random(7)
    (folder / "functions.py").write_text(FUNCTIONS, encoding="utf-8")
    for name, settings in TASKS.items():
        splits = [settings.get(f"{split}_split") for split in ("training", "validation", "test")]
        rows = {split: [row_of(name, random_) for _ in range(count)] for split in splits if split}
        write_task(folder, name, settings, rows)
    for subject, size in (("alpha", count), ("beta", count // 2)):
        rows = {"dev": [row_of("tiny_mmlu", random_) for _ in range(4)]}
        rows["test"] = [row_of("tiny_mmlu", random_) for _ in range(size)]
        about = {"description": f"{subject[:1]} . \n\n", **SUBJECT}
        write_task(folder, f"tiny_mmlu_{subject}", about, rows)
    write_yaml(folder / "tiny_mmlu.yaml", GROUP)
    return folder


def row_of(name: str, random_: random.Random) -> dict[str, Any]:
    """Return a made-up row with the fields of the catalogue's data."""

    def words(least: int, most: int) -> str:
        return " ".join(random_.choices(WORDS, k=random_.randint(least, most)))

    if name == "tiny_arc":
        choices = {"text": [words(1, 3) for _ in range(4)], "label": list("ABCD")}
        return {"question": words(4, 9), "choices": choices, "answerKey": random_.choice("ABCD")}
    if name == "tiny_hellaswag":
        endings = [words(2, 6) + " " for _ in range(4)]
        return {"activity": words(1, 2), "ctx": words(4, 8), "endings": endings, "label": str(random_.randrange(4))}
    if name == "tiny_boolq":
        return {"passage": words(10, 20), "question": words(3, 6), "label": random_.randrange(2)}
    if name == "tiny_winogrande":
        sentence = f"{words(3, 6)} _ {words(2, 4)}"
        return {"sentence": sentence, "option1": words(1, 2), "option2": words(1, 2), "answer": random_.choice("12")}
    if name == "tiny_lambada":
        return {"text": f"{words(6, 14)} {random_.choice(WORDS[:2])}"}
    if name == "tiny_wikitext":
        return {"page": " . ".join(words(3, 9) for _ in range(random_.randint(1, 30)))}
    if name in ("tiny_gsm8k", "tiny_completion"):
        return {"question": words(4, 8), "answer": f"{words(2, 4)} #### {random_.choice('124')}"}
    return {"question": f" {words(4, 8)} ", "choices": [words(1, 2) for _ in range(4)], "answer": random_.randrange(4)}


def make_tokenizer() -> Any:
    """Return a tokenizer of words, digits, signs and single blanks, with <s> first and a chat template."""
    tokenizer = Tokenizer(models.WordLevel(VOCABULARY, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[A-Za-z]+|[\s\S]"), "isolated")
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.decoder = decoders.Fuse()
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        clean_up_tokenization_spaces=False,
    )
    made.chat_template = CHAT
    return made


def make_model(seed: int = 0) -> Any:
    """Return a random model whose greedy answers vary with the prompt, digits among them."""
    config = LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=3,
    )
    model: Any = LlamaForCausalLM(config)
    stream = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, weight in sorted(model.named_parameters()):
            if weight.ndim == 2:
                weight.normal_(0.0, 0.35, generator=stream)
        # a random model says every word alike; the tasks' metrics need some digits, and words after blanks
        model.lm_head.weight[[VOCABULARY[digit] for digit in "0123456789#"]] *= 1.5
        for before, after in ((WORDS, " "), ([" "], WORDS[0])):
            towards = torch.empty(32).normal_(0.0, 0.5, generator=stream)
            model.model.embed_tokens.weight[[VOCABULARY[token] for token in before]] += towards
            model.lm_head.weight[VOCABULARY[after]] += 2.5 * towards
    return model.eval()


def save(folder: Path) -> Path:
    """Write model and tokenizer as a model folder."""
    make_model().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder
