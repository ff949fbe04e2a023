"""The committed models and tasks of the quickstart are what they claim, and their builder repeats itself."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from evomerge.errors import InvalidInput
from evomerge.zoo import SUBJECTS, build
from evomerge.zoo.items import SPLITS, draw_lesson, make_rows

ROOT = Path(__file__).parents[1]
MODELS = ROOT / "experiments" / "zoo"
FITNESS = ROOT / "fitness"
NAMES = ("base", "arithmetic", "strings", "cipher")
EXPERTS = NAMES[1:]
TASKS = EXPERTS
SAMPLE = 200  # test items per task; a standard error of at most 0.036


def _rows(task: str, split: str | None = None) -> list[dict[str, Any]]:
    text = (FITNESS / "zoo" / f"{task}.jsonl").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in text.splitlines()]
    return [row for row in rows if split in (None, row["split"])]


def _greedy(model: Any, tokenizer: Any, rows: list[dict[str, Any]], budget: int) -> list[bool]:
    batch = tokenizer([row["prompt"] for row in rows], padding=True, return_tensors="pt")
    with torch.inference_mode():
        made = model.generate(**batch, max_new_tokens=budget, do_sample=False)
    texts = tokenizer.batch_decode(made[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return [text.strip() == row["answer"] for text, row in zip(texts, rows, strict=True)]


def _likelihood(model: Any, tokenizer: Any, rows: list[dict[str, Any]]) -> list[bool]:
    right = []
    for row in rows:
        prompt = tokenizer(row["prompt"])["input_ids"]
        choices = [tokenizer(choice, add_special_tokens=False)["input_ids"] for choice in row["choices"]]
        with torch.inference_mode():
            logits = model(torch.tensor([prompt + choice for choice in choices])).logits.float().log_softmax(-1)
        sums = [
            sum(logits[i, len(prompt) - 1 + j, token].item() for j, token in enumerate(choice))
            for i, choice in enumerate(choices)
        ]
        right.append(row["choices"][sums.index(max(sums))] == row["answer"])
    return right


@pytest.fixture(scope="module")
def graded() -> dict[str, dict[str, list[bool]]]:
    """Outcome of every sampled test item, by model and task, from plain transformers."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    outcomes: dict[str, dict[str, list[bool]]] = {}
    for name in NAMES:
        tokenizer = AutoTokenizer.from_pretrained(MODELS / name)
        model = AutoModelForCausalLM.from_pretrained(MODELS / name, dtype=torch.float32).eval()
        outcomes[name] = {}
        for task in TASKS:
            rows = _rows(task, "test")[:SAMPLE]
            spec = yaml.safe_load((FITNESS / f"{task}.yaml").read_text(encoding="utf-8"))
            if spec["kind"] == "multiple_choice":
                outcomes[name][task] = _likelihood(model, tokenizer, rows)
            else:
                outcomes[name][task] = _greedy(model, tokenizer, rows, spec["max_new_tokens"])
    torch.set_num_threads(threads)
    return outcomes


def _accuracy(outcomes: list[bool]) -> float:
    return sum(outcomes) / len(outcomes)


@pytest.mark.parametrize("name", NAMES)
def test_a_model_is_the_llama_that_its_readme_states(name: str) -> None:
    """Every model is a Llama of four layers and hidden size 64 in bfloat16, 204,352 parameters in all."""
    model = AutoModelForCausalLM.from_pretrained(MODELS / name)
    config = model.config
    assert (config.model_type, config.hidden_size, config.num_hidden_layers) == ("llama", 64, 4)
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
    per_layer = 4 * 64 * 64 + 3 * 64 * 172 + 2 * 64
    assert sum(weight.numel() for weight in model.parameters()) == 4 * per_layer + 2 * 48 * 64 + 64


def test_the_family_is_small_and_shares_shapes_and_tokenizer() -> None:
    """All models together stay under 3 MB, have the same tensors, and the same tokenizer to the byte."""
    files = [file for name in NAMES for file in (MODELS / name).iterdir()]
    assert sum(file.stat().st_size for file in files) < 3_000_000
    shapes = []
    for name in NAMES:
        with safe_open(MODELS / name / "model.safetensors", "pt") as weights:
            shapes.append({key: tuple(weights.get_slice(key).get_shape()) for key in weights.keys()})  # noqa: SIM118 - no mapping
    assert all(each == shapes[0] for each in shapes)
    for file in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        assert len({(MODELS / name / file).read_bytes() for name in NAMES}) == 1


@pytest.mark.parametrize("task", TASKS)
def test_the_tokenizer_gives_text_back_without_spaces(task: str) -> None:
    """Every prompt and answer survives a round trip, one token a character behind one <bos>, none unknown."""
    tokenizer = AutoTokenizer.from_pretrained(MODELS / "base")
    for row in _rows(task):
        text = row["prompt"] + row["answer"]
        ids = tokenizer(text)["input_ids"]
        assert ids[0] == tokenizer.bos_token_id
        assert len(ids) == len(text) + 1
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids, skip_special_tokens=True) == text


@pytest.mark.parametrize("expert", EXPERTS)
def test_an_expert_is_best_at_home_and_worse_than_the_base_abroad(
    expert: str, graded: dict[str, dict[str, list[bool]]]
) -> None:
    """At home an expert beats every other source by 0.1 and more; abroad it falls below the base."""
    home = _accuracy(graded[expert][expert])
    assert home >= 0.1 + max(_accuracy(graded[name][expert]) for name in NAMES if name != expert)
    abroad = [task for task in TASKS if task != expert]
    drops = [_accuracy(graded["base"][task]) - _accuracy(graded[expert][task]) for task in abroad]
    assert max(drops) > 0.2
    assert min(drops) > -0.05


def test_experts_have_mastered_the_easiest_items_at_home(graded: dict[str, dict[str, list[bool]]]) -> None:
    """Of the items of difficulty 1, each expert answers at least 95 % of its own task."""
    for expert in EXPERTS:
        easiest = [i for i, row in enumerate(_rows(expert, "test")[:SAMPLE]) if row["difficulty"] == 1]
        assert _accuracy([graded[expert][expert][i] for i in easiest]) >= 0.95


def test_no_source_is_best_at_every_task(graded: dict[str, dict[str, list[bool]]]) -> None:
    """The best source differs from task to task."""
    best = [max(NAMES, key=lambda name: _accuracy(graded[name][task])) for task in TASKS]
    assert len(set(best)) == len(TASKS)


@pytest.mark.parametrize("task", TASKS)
def test_difficulty_matters_to_the_base(task: str, graded: dict[str, dict[str, list[bool]]]) -> None:
    """The base answers far more of the two easiest groups of items than of the two hardest."""
    rows = _rows(task, "test")[:SAMPLE]
    easy = [right for right, row in zip(graded["base"][task], rows, strict=True) if row["difficulty"] <= 2]
    hard = [right for right, row in zip(graded["base"][task], rows, strict=True) if row["difficulty"] >= 4]
    assert _accuracy(easy) > _accuracy(hard) + 0.3


def _recomputed(task: str, prompt: str) -> str:
    """The answer by other means than the builder's: eval, counting, a translation table."""
    if task == "arithmetic":
        if prompt.startswith("max"):
            return str(max(int(digit) for digit in prompt[3:7]))
        terms = [str(int(term)) for term in prompt[:-1].replace("*", " ").replace("+", " ").replace("-", " ").split()]
        signs = [character for character in prompt if character in "+-*"]
        expression = terms[0] + "".join(sign + term for sign, term in zip(signs, terms[1:], strict=True))
        return str(eval(expression) % 10)  # digits and + - * only
    if task == "strings":
        operation, letters = prompt[:-1].split(":")
        if operation == "rev":
            return "".join(letters[i] for i in range(len(letters) - 1, -1, -1))
        return "".join(letter * letters.count(letter) for letter in "abcdefghij")
    letters, shift = prompt[:-1].split(">")
    turned = "abcdefghij"[int(shift) :] + "abcdefghij"[: int(shift)]
    return letters.translate(str.maketrans("abcdefghij", turned))


@pytest.mark.parametrize("task", TASKS)
def test_answers_are_right(task: str) -> None:
    """Each answer follows from its prompt by an independent computation, and is among four different choices."""
    for row in _rows(task):
        assert row["answer"] == _recomputed(task, row["prompt"])
        assert len(row["answer"]) <= 7
        if "choices" in row:
            assert row["answer"] in row["choices"]
            assert len(set(row["choices"])) == 4


@pytest.mark.parametrize("task", TASKS)
def test_splits_have_their_sizes_and_share_no_prompt(task: str) -> None:
    """640, 320 and 400 items, prompts and ids all different, every difficulty equally often."""
    rows = _rows(task)
    assert Counter(row["split"] for row in rows) == {"search": 640, "validation": 320, "test": 400} == dict(SPLITS)
    assert len({row["prompt"] for row in rows}) == len({row["id"] for row in rows}) == 1360
    assert set(Counter((row["split"], row["difficulty"]) for row in rows).values()) == {128, 64, 80}


@pytest.mark.parametrize("task", TASKS)
def test_a_task_file_has_the_keys_of_its_kind(task: str) -> None:
    """The declaration names fields that the rows have; its data lies beside it."""
    spec = yaml.safe_load((FITNESS / f"{task}.yaml").read_text(encoding="utf-8"))
    common = {"kind", "data", "prompt", "answer", "split"}
    extra = {"choices"} if spec["kind"] == "multiple_choice" else {"max_new_tokens", "stop", "grade"}
    assert set(spec) == common | extra
    row = json.loads((FITNESS / spec["data"]).read_text(encoding="utf-8").splitlines()[0])
    assert spec["prompt"].format(**row) == row["prompt"]
    assert {spec["answer"], spec["split"]} <= set(row)


def test_the_committed_items_are_those_of_seed_zero() -> None:
    """The committed task data is what the builder makes, so a rebuild asks the same questions."""
    for task in TASKS:
        assert make_rows(task, 0) == _rows(task)
        assert make_rows(task, 1) != _rows(task)


def test_lessons_leave_out_every_held_out_prompt() -> None:
    """Of 2,000 lessons of the smallest prompt space none is a held-out item, and all are answered rightly."""
    held_out = frozenset(row["prompt"] for row in _rows("cipher"))
    rng = random.Random(3)
    for _ in range(2000):
        prompt, answer = draw_lesson(rng, {"cipher": 1.0}, (1,), held_out)
        assert prompt not in held_out
        assert answer == _recomputed("cipher", prompt)


def _bytes(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def test_two_builds_of_one_seed_are_equal_to_the_byte(tmp_path: Path) -> None:
    """A build depends on its seed and on nothing else, not on the threads or the global stream of the caller."""
    lines: list[str] = []
    before = torch.get_rng_state()
    build(tmp_path / "first", 5, lines.append, quick=True)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    build(tmp_path / "again", 5, quick=True)
    build(tmp_path / "other", 6, quick=True)
    first, again, other = (_bytes(tmp_path / folder) for folder in ("first", "again", "other"))
    assert first == again
    assert {f"tasks/{task}.yaml" for task in SUBJECTS} < set(first)
    for name in NAMES:
        assert first[f"models/{name}/model.safetensors"] != other[f"models/{name}/model.safetensors"]
    assert any("cipher: step 3 of 3" in line for line in lines)
    AutoModelForCausalLM.from_pretrained(tmp_path / "first" / "models" / "cipher")


def test_a_file_is_no_place_for_a_zoo(tmp_path: Path) -> None:
    """A path that is a file is refused by name, and stays as it was."""
    (tmp_path / "taken").write_text("mine", encoding="utf-8")
    with pytest.raises(InvalidInput, match="taken is a file"):
        build(tmp_path / "taken", 0, quick=True)
    assert (tmp_path / "taken").read_text(encoding="utf-8") == "mine"


DEEP = MODELS / "deep"
#: The layers that an expert of the deep family learned; all else is the base's.
LEARNED = {"arithmetic": (3, 4, 5), "strings": (0, 1), "cipher": (0, 1, 2)}


def _deep(*layers: tuple[str, int]) -> Any:
    """A stack of the deep family's layers in plain transformers, with the ends that all of its models share."""
    models = {name: AutoModelForCausalLM.from_pretrained(DEEP / name, dtype=torch.float32) for name, _ in layers}
    model = AutoModelForCausalLM.from_pretrained(DEEP / "base", dtype=torch.float32).eval()
    model.model.layers = torch.nn.ModuleList(models[name].model.layers[layer] for name, layer in layers)
    model.config.num_hidden_layers = len(layers)
    for place, layer in enumerate(model.model.layers):
        layer.self_attn.layer_idx = place
    return model


def _mean(model: Any) -> float:
    """The mean accuracy over the three tasks on the sampled test items."""
    tokenizer = AutoTokenizer.from_pretrained(DEEP / "base")
    rows = {task: _rows(task, "test")[:SAMPLE] for task in TASKS}
    found = [_likelihood(model, tokenizer, rows["arithmetic"])]
    found += [_greedy(model, tokenizer, rows[task], 8) for task in ("strings", "cipher")]
    return sum(map(_accuracy, found)) / len(found)


def test_the_deep_family_is_small_and_speaks_as_the_other() -> None:
    """Llamas of six layers and 303,424 parameters, together under 3 MB, with the tokenizer of the quickstart."""
    per_layer = 4 * 64 * 64 + 3 * 64 * 172 + 2 * 64
    for name in NAMES:
        model = AutoModelForCausalLM.from_pretrained(DEEP / name)
        assert model.config.num_hidden_layers == 6
        assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
        assert sum(weight.numel() for weight in model.parameters()) == 6 * per_layer + 2 * 48 * 64 + 64
        assert (DEEP / name / "tokenizer.json").read_bytes() == (MODELS / "base/tokenizer.json").read_bytes()
    assert sum(file.stat().st_size for name in NAMES for file in (DEEP / name).iterdir()) < 3_000_000


@pytest.mark.parametrize("expert", EXPERTS)
def test_a_deep_expert_differs_from_its_base_in_the_layers_that_learned(expert: str) -> None:
    """Embedding, norm, head and all other layers are the base's to the bit, and every layer that learned is not."""
    base, own = (AutoModelForCausalLM.from_pretrained(DEEP / name).state_dict() for name in ("base", expert))
    changed = {name for name, weight in own.items() if not torch.equal(weight, base[name])}

    assert {int(name.split(".")[2]) for name in changed} == set(LEARNED[expert])
    assert all(name.startswith("model.layers.") for name in changed)


def test_deep_models_work_without_a_layer_and_together() -> None:
    """Without one of its last layers cipher keeps 95 % of its mean; its first half before arithmetic's second beats it.

    Stacks are put together by plain transformers.
    """
    cipher, arithmetic = (_mean(_deep(*((name, k) for k in range(6)))) for name in ("cipher", "arithmetic"))
    pruned = _mean(_deep(*(("cipher", k) for k in (0, 1, 2, 3, 5))))
    both = _mean(_deep(*(("cipher", k) for k in range(3)), *(("arithmetic", k) for k in range(3, 6))))

    assert pruned >= 0.95 * cipher
    assert both > max(cipher, arithmetic) + 0.02
