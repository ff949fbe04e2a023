"""Tasks of lm-eval by name: the same numbers as lm-eval itself, item by item, and what is refused."""

import functools
import inspect
import itertools
import json
import math
import pickle
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from evomerge.errors import CandidateError, TaskError
from evomerge.evaluation import harness_loading
from evomerge.evaluation.asking import asked
from evomerge.evaluation.engine import Engine
from evomerge.evaluation.harness import harness_task
from evomerge.evaluation.harness_documents import Document
from evomerge.evaluation.harness_grading import margin
from evomerge.evaluation.request import Outcome, Request
from evomerge.evaluation.task import Response
from tests.evaluation.catalogue import CHAT, GROUP, make_model, make_tokenizer, save, write_catalogue, write_yaml

pytest.importorskip("lm_eval")
pytest.importorskip("accelerate")

# lm-eval, and the libraries that it loads, are not this project's to mend
pytestmark = pytest.mark.filterwarnings("ignore")

ROOT = Path(__file__).parents[2]
#: What is compared: a task of the catalogue, what an experiment says of it, and lm-eval's number as ours.
CASES: dict[str, tuple[str, dict[str, Any], Any]] = {
    "arc": ("tiny_arc", {}, lambda sample: sample["acc"]),
    "arc, acc_norm": ("tiny_arc", {"metric": "acc_norm"}, lambda sample: sample["acc_norm"]),
    "hellaswag": ("tiny_hellaswag", {"metric": "acc_norm"}, lambda sample: sample["acc_norm"]),
    "boolq": ("tiny_boolq", {}, lambda sample: sample["acc"]),
    "winogrande": ("tiny_winogrande", {}, lambda sample: sample["acc"]),
    "lambada": ("tiny_lambada", {}, lambda sample: -sample["perplexity"]),
    "lambada, acc": ("tiny_lambada", {"metric": "acc"}, lambda sample: sample["acc"]),
    "wikitext": ("tiny_wikitext", {}, lambda sample: -sample["word_perplexity"][0] / sample["word_perplexity"][1]),
    "wikitext, bits": (
        "tiny_wikitext",
        {"metric": "bits_per_byte"},
        lambda sample: -sample["bits_per_byte"][0] / sample["bits_per_byte"][1] / math.log(2),
    ),
    "completion": ("tiny_completion", {"bounded": True}, lambda sample: sample["contains"]),
    "gsm8k": ("tiny_gsm8k", {}, lambda sample: sample["exact_match"]),
    "gsm8k, flexible": ("tiny_gsm8k", {"filter": "flexible-extract"}, lambda sample: sample["exact_match"]),
    "mmlu": ("tiny_mmlu", {}, lambda sample: sample["acc"]),
}
NAMES = sorted({name for name, _, _ in CASES.values()})


@pytest.fixture(scope="module")
def catalogue(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder of tasks shaped as lm-eval's, and a cache of data sets that goes away with it."""
    import datasets

    folder = tmp_path_factory.mktemp("catalogue")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("datasets")))
        yield write_catalogue(folder)


@pytest.fixture(scope="module")
def lm() -> Any:
    """lm-eval's own model class around a tiny random model."""
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=make_model(), tokenizer=make_tokenizer(), batch_size=16, device="cpu")


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    """The engine of a search around the same model."""
    return Engine(save(tmp_path_factory.mktemp("model")), "float32", pretrained=True)


@pytest.fixture(scope="module")
def judged(catalogue: Path, lm: Any) -> dict[tuple[str, int, str], dict[str, Any]]:
    """What `lm_eval.evaluator.evaluate` says of each document: by task, place and filter."""
    return evaluate(catalogue, lm, NAMES)


def run(folder: Path, lm: Any, names: list[str], **options: Any) -> Any:
    """Return what lm-eval says of all documents of tasks, set up as `simple_evaluate` does."""
    from lm_eval.evaluator import evaluate, simple_evaluate
    from lm_eval.tasks import TaskManager

    seed = inspect.signature(simple_evaluate).parameters["fewshot_random_seed"].default
    with harness_loading.quiet():
        loaded = TaskManager(include_path=str(folder), include_defaults=False).load(names)
        for task in loaded["tasks"].values():
            task.set_fewshot_seed(seed=seed)
        return evaluate(lm=lm, task_dict=loaded, bootstrap_iters=0, log_samples=True, **options)


def evaluate(folder: Path, lm: Any, names: list[str], **options: Any) -> dict[tuple[str, int, str], dict[str, Any]]:
    """Return lm-eval's sample of each document: by task, place and filter."""
    found = run(folder, lm, names, **options)
    return {
        (leaf, sample["doc_id"], sample["filter"]): sample
        for leaf, samples in found["samples"].items()
        for sample in samples
    }


def answer(lm: Any, requests: Sequence[Request]) -> list[Outcome]:
    """Answer requests with lm-eval's own model class."""
    from lm_eval.api.instance import Instance

    found: dict[int, Outcome] = {}
    by_kind: dict[str, list[int]] = {}
    for place, request in enumerate(requests):
        by_kind.setdefault(request.kind, []).append(place)
    with harness_loading.quiet():
        for kind, places in by_kind.items():
            asked = [requests[place] for place in places]
            if kind == "loglikelihood":
                pairs: list[Any] = [Instance(kind, {}, (r.context, r.continuation), 0) for r in asked]
                said = [Outcome(tokens=1, loglikelihood=level, greedy=best) for level, best in lm.loglikelihood(pairs)]
            elif kind == "rolling":
                texts: list[Any] = [Instance(kind, {}, (r.continuation,), 0) for r in asked]
                said = [Outcome(tokens=1, loglikelihood=level) for level in lm.loglikelihood_rolling(texts)]
            else:
                prompts: list[Any] = [
                    Instance(kind, {}, (r.context, {"until": list(r.stop), "max_gen_toks": r.most}), 0) for r in asked
                ]
                said = [Outcome(tokens=1, text=text) for text in lm.generate_until(prompts)]
            found.update(zip(places, said, strict=True))
    return [found[place] for place in range(len(requests))]


def responses(task: Any, ask: Callable[[Sequence[Request]], Sequence[Outcome]]) -> dict[tuple[str, int], Response]:
    """Ask all items of all splits at once and grade them."""
    places = [(split, place) for split in task.splits for place in range(task.count(split))]
    asked = [task.requests(split, place) for split, place in places]
    said = iter(ask([request for requests in asked for request in requests]))
    return {
        where: task.grade(*where, tuple(itertools.islice(said, len(requests))))
        for where, requests in zip(places, asked, strict=True)
    }


def build(folder: Path, name: str, **given: Any) -> Any:
    """Return a task of a folder, as an experiment would name it."""
    return harness_task({"lm_eval": name, "include_path": folder.name, **given}, "mine", folder.parent, "e.yaml.task")


def altered(catalogue: Path, folder: Path, name: str, **changes: Any) -> Path:
    """Write a task of the catalogue with other settings (None removes one) into a folder, and return that."""
    folder.mkdir(exist_ok=True)
    shutil.copy(catalogue / "functions.py", folder)
    settings = {key: found for key, found in {**settings_of(catalogue, name), **changes}.items() if found is not None}
    write_yaml(folder / f"{settings['task']}.yaml", settings)
    return folder


def settings_of(catalogue: Path, name: str) -> dict[str, Any]:
    """Return what a task's YAML says, functions as texts."""
    text = re.sub(r"!function '(\S+)'", r'"!function \1"', (catalogue / f"{name}.yaml").read_text())
    found: dict[str, Any] = yaml.safe_load(text)
    return found


def with_rows(catalogue: Path, name: str, split: str, file: Path, rows: list[Any]) -> dict[str, Any]:
    """Write other rows for a split, and return the settings that take it from there."""
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = settings_of(catalogue, name)["dataset_kwargs"]["data_files"]
    return {"dataset_kwargs": {"data_files": {**files, split: str(file)}}}


def lines(path: Path) -> list[Any]:
    """Return the rows of a file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("case", CASES)
def test_every_item_has_the_value_that_lm_eval_gives_it(case, catalogue, lm, judged):
    """Asked the same model, each item of each split has lm-eval's number, and all documents are there once."""
    name, given, ours = CASES[case]
    task = build(catalogue, name, **given)

    found = {}
    for (split, place), response in responses(task, functools.partial(answer, lm)).items():
        item = task.splits[split][place]
        sample = judged[item.leaf, item.place, task.measure.filter]
        assert [r.context or r.continuation for r in item.requests] == [a[0] for a in sample["arguments"]]
        assert response.value == pytest.approx(ours(sample), rel=1e-5)
        if response.margin is not None:
            assert (response.margin > 0) == (response.value == 1)
        found[item.leaf, item.place] = response.value

    assert set(found) == {key[:2] for key in judged if key[0].startswith(name)}
    assert len(set(found.values())) > 1  # a model that gets all right or all wrong would show nothing


@pytest.mark.parametrize("case", CASES)
def test_the_engine_answers_as_lm_evals_own_model_class(case, catalogue, engine, judged):
    """Asked by the engine of a search, each item has the number that lm-eval gets from HFLM."""
    name, given, ours = CASES[case]
    task = build(catalogue, name, **given)

    for split in task.splits:
        found = asked(engine, task, split, range(task.count(split)))
        wanted = [ours(judged[item.leaf, item.place, task.measure.filter]) for item in task.splits[split]]
        assert [response.value for response in found] == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("name", ["tiny_arc", "tiny_gsm8k"])
def test_prompts_in_a_chat_template_are_those_of_lm_eval(name, catalogue, lm, tmp_path):
    """With chat template and system instruction, prompts and values are lm-eval's too."""
    make_tokenizer().save_pretrained(tmp_path)
    samples = evaluate(catalogue, lm, [name], apply_chat_template=True, system_instruction="fol ba")
    given = {"chat_template": True, "tokenizer": str(tmp_path), "system_instruction": "fol ba"}

    task = build(catalogue, name, **given)

    for (split, place), response in responses(task, functools.partial(answer, lm)).items():
        item = task.splits[split][place]
        sample = samples[name, item.place, task.measure.filter]
        assert item.requests[0].context.startswith("|system|fol ba\n|user|Question:")
        assert [r.context for r in item.requests] == [a[0] for a in sample["arguments"]]
        metric = task.measure.metric
        assert response.value == sample[metric]


def test_a_template_without_system_messages_gets_the_rest(catalogue, tmp_path):
    """Where a chat template refuses the system message, it is left out, as HFLM does."""
    tokenizer = make_tokenizer()
    refusing = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    tokenizer.chat_template = refusing + CHAT
    tokenizer.save_pretrained(tmp_path)
    entry = {"lm_eval": "tiny_boolq", "include_path": catalogue.name, "chat_template": True, "system_instruction": "ba"}

    task = harness_task(entry, "mine", catalogue.parent, "e.yaml.task", tokenizer=tmp_path)

    assert task.requests("search", 0)[0].context.startswith("|user|")


@pytest.mark.parametrize(
    ("name", "metric", "whole"),
    [
        ("tiny_lambada", "perplexity", math.exp),
        ("tiny_brier", "brier_score", float),
        ("tiny_vote", "exact_match", float),
    ],
)
def test_the_mean_of_the_values_is_what_lm_eval_reports(name, metric, whole, catalogue, lm, tmp_path):
    """Perplexity is exp of the mean surprise, the Brier score and votes over repeats are means of the items' own."""
    brier = [{"metric": "brier_score", "aggregation": "brier_score", "higher_is_better": False}]
    vote = [
        {
            "name": "vote",
            "filter": [{"function": "take_first_k", "k": 3}, {"function": "majority_vote"}, {"function": "take_first"}],
        }
    ]
    folder = altered(catalogue, tmp_path / "more", "tiny_lambada")
    altered(catalogue, folder, "tiny_boolq", task="tiny_brier", metric_list=brier)
    altered(
        catalogue, folder, "tiny_gsm8k", task="tiny_vote", repeats=3, filter_list=vote, doc_to_target="{{answer[-1]}}"
    )
    reported = run(folder, lm, [name])["results"][name]

    task = build(folder, name, splits={"search": 1.0})
    values = [response.value for response in responses(task, functools.partial(answer, lm)).values()]

    (wanted,) = (found for key, found in reported.items() if key.startswith(f"{metric},"))
    assert whole(sum(values) / len(values)) == pytest.approx(wanted, rel=1e-5)
    assert task.direction == ("maximize" if metric == "exact_match" else "minimize")
    assert task.bounded == (metric == "exact_match")


def test_margins_are_differences_in_the_unit_that_the_metric_compares(catalogue):
    """The right choice's log-likelihood minus the best other's: whole, by character, by byte, by mutual information."""
    document = Document(
        leaf="t", part="", place=0, content="", question="", requests=(), choices=("abcd", "ä", "xy"), gold=(0,)
    )
    said = [Outcome(tokens=1, loglikelihood=level) for level in (-4.0, -3.0, -8.0)]
    alone = [Outcome(tokens=1, loglikelihood=level) for level in (-9.0, -4.0, -8.0)]

    assert margin(document, said, "acc") == -4 + 3
    assert margin(document, said, "acc_norm") == -4 / 4 + 3 / 1
    assert margin(document, said, "acc_bytes") == -4 / 4 + 3 / 2
    assert margin(document, [*said, *alone], "acc_mutual_info") == 5 - 1
    assert margin(document, said, "exact_match") is None
    assert margin(replace(document, gold=()), said, "acc") is None
    assert margin(replace(document, gold=(0, 1, 2)), said, "acc") is None
    assert margin(replace(document, gold=(0, 2)), said, "acc") == -4 + 3


def test_a_question_that_stands_twice_is_dealt_to_one_split(catalogue, tmp_path):
    """Copies of a question, its choices in another order too, share a split though their examples differ."""
    rows = lines(catalogue / "tiny_arc-test.jsonl")
    turned = [{**row, "choices": {**row["choices"], "text": row["choices"]["text"][::-1]}} for row in rows]
    folder = altered(
        catalogue,
        tmp_path / "twice",
        "tiny_arc",
        **with_rows(catalogue, "tiny_arc", "test", tmp_path / "rows", rows + rows + turned),
    )

    task = build(folder, "tiny_arc")

    homes: dict[str, set[str]] = {}
    for split in task.splits:
        for item in task.splits[split]:
            homes.setdefault(item.question, set()).add(split)
    assert len(homes) == len(rows)
    assert sum(task.count(split) for split in task.splits) == 3 * len(rows)
    assert {len(found) for found in homes.values()} == {1}
    assert len({item.requests for split in task.splits for item in task.splits[split]}) == 3 * len(rows)


def test_more_rows_move_no_question_to_another_split(catalogue, tmp_path):
    """The split of a question depends on itself alone."""
    rows = lines(catalogue / "tiny_lambada-test.jsonl")
    folder = altered(
        catalogue,
        tmp_path / "few",
        "tiny_lambada",
        **with_rows(catalogue, "tiny_lambada", "test", tmp_path / "rows", rows[5:]),
    )

    few, all_ = (
        {item.question: split for split in task.splits for item in task.splits[split]}
        for task in (build(folder, "tiny_lambada"), build(catalogue, "tiny_lambada"))
    )

    assert len(few) == len(rows) - 5
    assert few.items() <= all_.items()


def test_splits_may_be_the_tasks_own(catalogue, lm, tmp_path):
    """Documents of the named splits, with lm-eval's values; a question of the test split is not searched."""
    names = {"search": "validation", "test": "test"}
    task = build(catalogue, "tiny_arc", splits=names)
    folder = altered(catalogue, tmp_path / "own", "tiny_arc", test_split="validation")
    samples = evaluate(folder, lm, ["tiny_arc"])

    assert (task.count("search"), task.count("validation"), task.count("test")) == (24, 0, 24)
    assert task.ids("search")[3].startswith("tiny_arc/validation/3-")
    for (split, place), response in responses(task, functools.partial(answer, lm)).items():
        if split == "search":
            assert response.value == samples["tiny_arc", place, "none"]["acc"]

    shared = lines(catalogue / "tiny_arc-test.jsonl")[:4] + lines(catalogue / "tiny_arc-validation.jsonl")[4:]
    rows = with_rows(catalogue, "tiny_arc", "validation", tmp_path / "rows", shared)
    mixed = altered(catalogue, tmp_path / "mixed", "tiny_arc", **rows)
    mine = build(mixed, "tiny_arc", splits=names)
    assert (mine.count("search"), mine.count("test")) == (20, 24)
    with pytest.raises(TaskError, match="no split 'tests'; did you mean 'test'"):
        build(catalogue, "tiny_arc", splits={"search": "tests"})
    altered(catalogue, folder, "tiny_completion", **{"class": "!function functions.Chooser"})
    with pytest.raises(TaskError, match="chooses its documents by code; give splits as shares"):
        build(folder, "tiny_completion", splits={"search": "test"})


def test_a_groups_tasks_are_strata_and_every_first_part_holds_each(catalogue):
    """Items of a group alternate in proportion, so that `cut` leaves all of its tasks."""
    task = build(catalogue, "tiny_mmlu", splits={"search": 1.0})

    first = task.cut({"search": 9})

    assert task.count("search") == 36
    assert (first.count("search"), first.strata("search").count("tiny_mmlu_beta")) == (9, 3)
    assert first.ids("search") == task.ids("search")[:9]
    assert task.cut({}).fingerprint == task.fingerprint != first.fingerprint
    assert len(set(task.ids("search"))) == 36


def test_a_group_that_weighs_its_tasks_alike_is_refused_unless_told(catalogue, tmp_path):
    """Equal weights of unequal tasks are no mean over items; the user may take that mean, equal sizes need no word."""
    folder = tmp_path / "alike"
    shutil.copytree(catalogue, folder)
    aggregate = [{"metric": "acc", "weight_by_size": False, "filter_list": "none"}]
    write_yaml(folder / "tiny_mmlu.yaml", {**GROUP, "aggregate_metric_list": aggregate})

    with pytest.raises(TaskError, match=r"gives its tasks equal weights.*12 to 24 items.*mean_over_items"):
        build(folder, "tiny_mmlu")
    assert build(folder, "tiny_mmlu", mean_over_items=True).measure.filter == "none"
    write_yaml(folder / "tiny_mmlu.yaml", {**GROUP, "task": ["tiny_mmlu_alpha"], "aggregate_metric_list": aggregate})
    assert build(folder, "tiny_mmlu").count("search") > 0


def test_the_fingerprint_is_of_content_and_grading_alone(catalogue, tmp_path):
    """Neither name nor folder change it; prompts, metric, filter, a setting or a function's file do."""
    copy = tmp_path / "copy"
    shutil.copytree(catalogue, copy)
    task = build(catalogue, "tiny_wikitext")
    elsewhere = build(copy, "tiny_wikitext")
    renamed = harness_task({"lm_eval": "tiny_wikitext", "include_path": "copy"}, "other", tmp_path, "x")

    assert task.fingerprint == elsewhere.fingerprint == renamed.fingerprint
    arc = [
        build(catalogue, "tiny_arc", **given)
        for given in ({}, {"num_fewshot": 1}, {"metric": "acc_norm"}, {"system_instruction": "ba"}, {"bounded": False})
    ]
    gsm = [build(catalogue, "tiny_gsm8k", **given) for given in ({}, {"filter": "flexible-extract"})]
    gsm.append(build(catalogue, "tiny_gsm8k", gen_kwargs={"max_gen_toks": 5}))
    assert gsm[-1].requests("search", 0)[0].most == 5
    with (copy / "functions.py").open("a") as file:
        file.write("# changed\n")
    changed = build(copy, "tiny_wikitext")
    assert len({one.fingerprint for one in [task, *arc, *gsm, changed]}) == 10
    assert task.contents("search") == elsewhere.contents("search") == renamed.contents("search")
    assert len({one.contents("search")[0] for one in [task, *arc, *gsm, changed]}) == 10
    assert task.cut({"search": 1}).contents("search") == task.contents("search")[:1]


def test_another_process_grades_the_same(catalogue, tmp_path):
    """A task that was sent to a worker loads lm-eval's there, and refuses other data or code than its prompts'."""
    folder = tmp_path / "sent"
    shutil.copytree(catalogue, folder)
    rows = lines(catalogue / "tiny_wikitext-test.jsonl")
    altered(
        catalogue, folder, "tiny_wikitext", **with_rows(catalogue, "tiny_wikitext", "test", tmp_path / "rows", rows)
    )
    task = build(folder, "tiny_wikitext", metric="bits_per_byte")
    said = (Outcome(tokens=3, loglikelihood=-12.5),)
    sent = pickle.dumps((task, said))
    program = "import pickle, sys; task, said = pickle.load(sys.stdin.buffer); print(task.grade('search', 1, said))"

    found = subprocess.run(
        [sys.executable, "-c", program], input=sent, cwd=ROOT, capture_output=True, check=True, timeout=120
    )

    assert found.stdout.decode().strip() == str(task.grade("search", 1, said))
    held = {}
    threads = [threading.Thread(target=lambda k=k: held.update({k: task.grade("search", 1, said)})) for k in range(2)]
    for thread in threads:
        thread.start()
        thread.join()
    assert set(held.values()) == {task.grade("search", 1, said)}

    harness_loading._kept().clear()
    with_rows(catalogue, "tiny_wikitext", "test", tmp_path / "rows", [{"page": row["page"] + " ba"} for row in rows])
    with pytest.raises(TaskError, match=r"document \d+ is not what it was when the prompts were made"):
        task.grade("search", 1, said)
    (folder / "functions.py").write_text((folder / "functions.py").read_text() + "# changed\n")
    harness_loading._kept().clear()
    with pytest.raises(TaskError, match=r"its settings, its code or lm-eval's version \(.*\) are not those"):
        task.grade("search", 1, said)


REFUSED: dict[str, tuple[str, dict[str, Any], dict[str, Any], str]] = {
    "no folder": ("tiny_arc", {}, {"include_path": "nowhere"}, r"e\.yaml\.task\.include_path: no folder .*nowhere"),
    "unknown key": ("tiny_arc", {}, {"metrics": "acc"}, r"task\.metrics: unknown key; did you mean 'metric'"),
    "unknown metric": ("tiny_arc", {}, {"metric": "acc_nrm"}, r"no metric 'acc_nrm'; did you mean 'acc_norm'"),
    "unknown filter": ("tiny_gsm8k", {}, {"filter": "strict"}, r"no filter 'strict'; did you mean 'strict-match'"),
    "negative shots": ("tiny_arc", {}, {"num_fewshot": -1}, r"num_fewshot: must not be negative, got -1"),
    "fixed shots": ("tiny_boolq", {"num_fewshot": 0}, {"num_fewshot": 2}, r"sets num_fewshot: 0, which lm-eval never"),
    "no tokenizer": ("tiny_arc", {}, {"chat_template": True}, r"chat_template: needs the folder of a tokenizer"),
    "unknown split": (
        "tiny_arc",
        {},
        {"splits": {"serch": 1.0}},
        r"splits\.serch: unknown split; did you mean 'search'",
    ),
    "shares": ("tiny_arc", {}, {"splits": {"search": 0.5}}, r"splits: shares must add up to 1, got 0\.5"),
    "mixed": (
        "tiny_arc",
        {},
        {"splits": {"search": 0.5, "test": "test"}},
        r"splits: expected a share for each split, or",
    ),
    "one split twice": ("tiny_arc", {}, {"splits": {"search": "test", "test": "test"}}, r"two splits are the same"),
    "leak": (
        "tiny_boolq",
        {"training_split": None},
        {"num_fewshot": 1},
        r"few-shot examples from 'validation', the doc",
    ),
    "leak of test": (
        "tiny_lambada",
        {},
        {"num_fewshot": 1},
        r"few-shot examples from 'test', the documents that it asks",
    ),
    "leak first_n": (
        "tiny_arc",
        {"fewshot_split": "test", "fewshot_config": {"sampler": "first_n"}},
        {},
        r"few-shot examples from 'test'.*set num_fewshot: 0, or fewshot_split",
    ),
    "sampling": (
        "tiny_gsm8k",
        {"generation_kwargs": {"until": [], "do_sample": True, "temperature": 0.8}},
        {},
        r"samples its answers \(do_sample: True, temperature: 0\.8\); .* set gen_kwargs: \{do_sample: false",
    ),
    "heat alone": ("tiny_gsm8k", {"generation_kwargs": {"until": "x", "temperature": 1}}, {}, r"samples its answers"),
    "beams": ("tiny_gsm8k", {}, {"gen_kwargs": {"num_beams": 4}}, r"sets num_beams: 4 for generation, which greedy"),
    "images": ("tiny_gsm8k", {"doc_to_image": ["question"]}, {}, r"asks about images or sound"),
    "unsafe": ("tiny_gsm8k", {"unsafe_code": True}, {}, r"allow it with confirm_run_unsafe_code: true"),
    "corpus metric": (
        "tiny_boolq",
        {"metric_list": [{"metric": "f1"}, {"metric": "acc"}]},
        {"metric": "f1"},
        r"'f1' is made of all documents together \(f1\), so that one item has no value; choose metric: acc",
    ),
    "nan means": (
        "tiny_boolq",
        {"metric_list": [{"metric": "acc", "aggregation": "nanmean", "higher_is_better": True}]},
        {},
        r"made of all documents together \(nanmean\).*no metric of this task has one",
    ),
    "own function": (
        "tiny_wikitext",
        {"metric_list": [{"metric": "odd", "aggregation": "mean", "higher_is_better": True}]},
        {},
        r"no metric 'odd'; known: word_perplexity",
    ),
    "own grading fails": (
        "tiny_wikitext",
        {
            "process_results": "!function functions.picky",
            "metric_list": [{"metric": "odd", "aggregation": "mean", "higher_is_better": True}],
        },
        {},
        r"its own grading fails on the answer \(RuntimeError: cannot read this\)",
    ),
    "empty text": ("tiny_lambada", {"doc_to_target": ""}, {}, r"document 0: has an empty text to score"),
    "empty page": (
        "tiny_wikitext",
        {"doc_to_target": ""},
        {},
        r"document 0: is an empty text, which has no likelihood",
    ),
    "no text": ("tiny_lambada", {"doc_to_target": "[1, 2]"}, {}, r"asks with list '\[1, 2\]' where a text belongs"),
    "broken template": (
        "tiny_arc",
        {"doc_to_text": "{{nowhere.gone}}"},
        {},
        r"cannot load 'tiny_arc' \(UndefinedError",
    ),
    "broken data": ("tiny_arc", {"dataset_kwargs": {"data_files": "/no"}}, {}, r"lm-eval cannot load 'tiny_arc' \("),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_has_no_one_answer_or_number_is_refused_with_the_way_out(case, catalogue, tmp_path):
    """One line that names the entry and says what to do, before any model is asked."""
    name, changes, given, message = REFUSED[case]
    folder = altered(catalogue, tmp_path / "refused", name, **changes)

    with pytest.raises(TaskError, match=message) as caught:
        build(folder, name, **given)

    assert str(caught.value).startswith("e.yaml.task")
    assert "\n" not in str(caught.value)


def test_unsafe_tasks_run_when_allowed(catalogue, tmp_path):
    """What lm-eval calls its switch is this entry's switch."""
    folder = altered(catalogue, tmp_path / "unsafe", "tiny_gsm8k", unsafe_code=True)

    assert build(folder, "tiny_gsm8k", confirm_run_unsafe_code=True).count("search") > 0


def test_an_answer_that_the_tasks_own_code_cannot_grade_fails_the_candidate(catalogue, tmp_path):
    """The search goes on; a number out of bounds, or none, is the task's fault and found before the search."""

    def grading(metric: str, **given: Any) -> Any:
        kept = [{"metric": metric, "aggregation": "mean", "higher_is_better": True}]
        changes = {"process_results": "!function functions.picky", "metric_list": kept, "filter_list": None}
        folder = altered(catalogue, tmp_path / "picky", "tiny_gsm8k", **changes)
        return build(folder, "tiny_gsm8k", **given)

    task = grading("odd")
    assert not task.bounded
    assert task.grade("search", 0, (Outcome(tokens=0),)) == Response(value=2.0)
    with pytest.raises(CandidateError, match=r"its own grading fails on the answer \(RuntimeError: cannot read this\)"):
        task.grade("search", 0, (Outcome(tokens=1, text="a"),))
    with pytest.raises(TaskError, match=r"'odd' is 2, not in \[0, 1\]; say bounded: false"):
        grading("odd", bounded=True)
    with pytest.raises(TaskError, match=r"'text' is 'x', which is no number of one item; choose another metric: odd"):
        grading("text")
    with pytest.raises(TaskError, match=r"'gone' is 'nan', which is no number of one item"):
        grading("gone")
    with pytest.raises(TaskError, match=r"document 0: no metric 'missing'"):
        grading("missing")


def test_a_group_must_agree_on_what_counts(catalogue, tmp_path):
    """A metric that one task maximizes and another minimizes has no mean."""
    folder = tmp_path / "group"
    shutil.copytree(catalogue, folder)
    down = [{"metric": "acc", "aggregation": "mean", "higher_is_better": False}]
    altered(catalogue, folder, "tiny_mmlu_beta", metric_list=down)

    with pytest.raises(TaskError, match="'tiny_mmlu_beta' of lm-eval has another 'acc' than the rest of its group"):
        build(folder, "tiny_mmlu")


def test_an_unknown_name_is_answered_with_the_nearest(catalogue, monkeypatch, tmp_path):
    """Where one's own folder lacks a task, or a member of a group, lm-eval's catalogue is searched too."""
    import lm_eval.tasks

    real, asked_for = lm_eval.tasks.TaskManager, []

    def manager(include_path: str, include_defaults: bool = True) -> Any:
        asked_for.append(include_defaults)
        return real(include_path=include_path, include_defaults=False)  # the catalogue itself takes half a minute

    monkeypatch.setattr(lm_eval.tasks, "TaskManager", manager)

    with pytest.raises(TaskError, match=r"e\.yaml\.task\.lm_eval: unknown task 'tiny_ark'; did you mean 'tiny_arc'"):
        build(catalogue, "tiny_ark")
    with pytest.raises(TaskError, match=r"unknown task 'qqqqq'; `lm-eval ls tasks` lists"):
        build(catalogue, "qqqqq")
    assert asked_for == [False, True] * 2

    assert build(catalogue, "tiny_mmlu").source.catalogue is False
    assert asked_for == [False, True] * 2 + [False]
    write_yaml(tmp_path / "mine.yaml", {"group": "mine", "task": ["arc_easy"]})
    with pytest.raises(TaskError, match="cannot load 'mine'"):
        build(tmp_path, "mine")
    assert asked_for[-1]
    lost = replace(build(catalogue, "tiny_mmlu").source, task="gone")
    with pytest.raises(TaskError, match="no task 'gone' of lm-eval in"):
        harness_loading.load(lost, "x")
