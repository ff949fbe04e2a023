"""The worker: recipe and items in, responses or a reason out."""

import inspect
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from evomerge.errors import ModelError, TaskError
from evomerge.evaluation.gates import Gates
from evomerge.evaluation.items import Item
from evomerge.evaluation.jsonl import JsonlTask
from evomerge.evaluation.labelled import Choose, Generate
from evomerge.evaluation.texts import Divergence
from evomerge.evaluation.unlabelled import Agreement
from evomerge.pool import InlinePool, Job, RayPool
from evomerge.recipe import Blend, Recipe, Route, Source, copy_of
from evomerge.worker import WorkerSetup
from tests.evaluation.tiny import make_model, save

DEPTH = 3
NAMES = ("base", "left", "right")
SUMS = JsonlTask(
    name="sums",
    measure=Choose(),
    splits={
        split: tuple(
            Item(id=f"{split}{i}", prompt=f"{start + i}+1=", answers=(str(i % 4),), choices=("0", "1", "2", "3"))
            for i in range(20)
        )
        for start, split in ((10, "search"), (50, "validation"))
    },
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Return the folders of a base and two sources."""
    root = tmp_path_factory.mktemp("models")
    return {name: save(root / name, make_model(seed=seed)) for seed, name in enumerate(NAMES)}


@pytest.fixture(scope="module")
def words(folders) -> JsonlTask:
    """Return a task of greedy generation that the source `left` answers rightly, by transformers' own account."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folders["left"]).eval()
    tokenizer = AutoTokenizer.from_pretrained(folders["left"])
    items = []
    for i in range(12):
        ids = tokenizer(f"word {i * 37}", return_tensors="pt")["input_ids"]
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False)
        text = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
        items.append(Item(id=f"w{i}", prompt=f"word {i * 37}", answers=(text,)))
    return JsonlTask(name="words", measure=Generate(max_new_tokens=5), splits={"search": tuple(items)})


@pytest.fixture(scope="module")
def setup(folders, words) -> WorkerSetup:
    """Return what a worker for these models and tasks needs to know."""
    return WorkerSetup(template=folders["base"], sources=folders, tasks={"sums": SUMS, "words": words}, batch=8)


@pytest.fixture(scope="module")
def worker(setup):
    """Return one worker for the tests that leave no trace in it."""
    return setup.make()


def source(name: str) -> Source:
    """Return a source as a recipe names it."""
    return Source(name=name, path=f"anywhere/{name}")


def blended(left: float, right: float) -> Recipe:
    """Return the recipe base + left * (left - base) + right * (right - base)."""
    blend = Blend(method="task_arithmetic", weights={"left": left, "right": right}, parameters={})
    return Recipe(
        sources=(source("left"), source("right")),
        base=source("base"),
        routes=(Route(blend=blend),),
        layers=tuple(range(DEPTH)),
        dtype="float32",
    )


def job(recipe: Recipe, candidate: int = 0, split: str = "search", **items: tuple[int, ...]) -> Job:
    """Return a job; all items of `sums` by default."""
    return Job(candidate=candidate, recipe=recipe, split=split, items=items or {"sums": tuple(range(20))})


def test_a_copy_of_a_source_gives_that_sources_answers(worker):
    """The recipe that rebuilds `left` answers all that `left` answers under plain transformers; others do not."""
    right = worker.answer(job(copy_of(source("left"), DEPTH, "float32"), words=tuple(range(12))))
    wrong = worker.answer(job(copy_of(source("right"), DEPTH, "float32"), words=tuple(range(12))))

    assert right.error is None
    assert right.responses == {"words": (1.0,) * 12}
    assert right.margins == {}
    assert sum(wrong.responses["words"]) < 6


def test_margins_are_those_of_the_merged_model(worker, folders):
    """Margins equal those of a plain model whose weights were merged by hand from the files."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tensors = {name: load_file(folders[name] / "model.safetensors") for name in NAMES}
    model = AutoModelForCausalLM.from_pretrained(folders["base"]).eval()
    merged = {
        key: base + 0.3 * (tensors["left"][key] - base) + 0.5 * (tensors["right"][key] - base)
        for key, base in tensors["base"].items()
    }
    model.load_state_dict(merged)
    tokenizer = AutoTokenizer.from_pretrained(folders["base"])

    answer = worker.answer(job(blended(0.3, 0.5), split="validation", sums=(3, 0, 17)))

    for place, margin, value in zip((3, 0, 17), answer.margins["sums"], answer.responses["sums"], strict=True):
        item = SUMS.splits["validation"][place]
        with torch.no_grad():
            log_p = model(**tokenizer(item.prompt, return_tensors="pt")).logits[0, -1].log_softmax(-1)
        of = {choice: float(log_p[tokenizer.convert_tokens_to_ids(choice)]) for choice in item.choices}
        assert margin == pytest.approx(of.pop(item.answers[0]) - max(of.values()), abs=1e-3)
        assert value == float(margin > 0)


def test_the_answer_says_whose_it_is(worker):
    """Candidate, split, order of items and tasks come back as they were asked, with the time it took."""
    answer = worker.answer(job(blended(1.0, 0.0), 7, sums=(5, 2), words=(1, 3, 0)))
    swapped = worker.answer(job(blended(1.0, 0.0), 8, sums=(2, 5)))

    assert (answer.candidate, answer.split, answer.error) == (7, "search", None)
    assert {name: len(own) for name, own in answer.responses.items()} == {"sums": 2, "words": 3}
    assert swapped.margins["sums"] == pytest.approx(answer.margins["sums"][::-1], abs=1e-4)
    assert answer.seconds > 0


def test_a_candidate_leaves_nothing_to_the_next(setup):
    """Answers do not depend on what the worker did before, failures on the way included."""
    first = setup.make().answer(job(blended(0.4, 0.4)))
    worker = setup.make()
    worker.answer(job(blended(-0.2, 1.5)))
    assert worker.answer(job(blended(1e39, 0.4))).error is not None

    again = worker.answer(job(blended(0.4, 0.4)))

    assert (again.responses, again.margins) == (first.responses, first.margins)


def test_a_recipe_that_is_live_is_not_built_again(setup, monkeypatch):
    """Climbing a rung asks the model that is there; another recipe is built, and after a failure so is the same."""
    worker = setup.make()
    loads = []
    load = worker._engine.load
    monkeypatch.setattr(worker._engine, "load", lambda stream: loads.append(1) or load(stream))

    worker.answer(job(blended(0.4, 0.4), sums=(0, 1)))
    worker.answer(job(blended(0.4, 0.4), sums=(2, 3)))
    assert len(loads) == 2  # the template before the first, for the gates
    worker.answer(job(blended(1e39, 0.4)))
    worker.answer(job(blended(0.4, 0.4), sums=(0, 1)))
    assert len(loads) == 4


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (job(blended(1e39, 0.0)), "not finite"),
        (job(blended(1e30, 0.0)), "CandidateError: gate: "),
        (job(replace(blended(0.4, 0.4), layers=blended(0.4, 0.4).layers[:2])), "ModelError: "),
        (job(copy_of(source("lefd"), DEPTH, "float32")), "did you mean 'left'?"),
        (job(blended(0.4, 0.4), sumz=(0,)), "TaskError: task 'sumz' is not among the worker's; did you mean 'sums'?"),
        (job(blended(0.4, 0.4), sums=(20,)), "TaskError: task 'sums': split 'search' has 20 items, none at place 20"),
        (job(blended(0.4, 0.4), split="test", sums=(0,)), "TaskError: task 'sums': split 'test' has 0 items"),
    ],
)
def test_what_goes_wrong_is_in_the_answer(worker, asked, message):
    """Candidates and jobs that cannot be answered are answered with the reason, on one line."""
    answer = worker.answer(asked)

    assert answer.responses is None
    assert answer.margins == {}
    assert message in answer.error
    assert "\n" not in answer.error


def test_running_out_of_memory_is_in_the_answer(worker, monkeypatch):
    """A RuntimeError from the depths of torch is the candidate's failure."""

    def hungry(plan):
        raise torch.OutOfMemoryError("out of memory.\nTried to allocate 1 TiB")

    monkeypatch.setattr(worker._engine, "answer", hungry)

    assert worker.answer(job(blended(0.4, 0.4))).error == "OutOfMemoryError: out of memory. Tried to allocate 1 TiB"


def test_a_batch_that_does_not_fit_is_halved_before_the_candidate_fails(setup, monkeypatch, capfd):
    """The candidate's answers are those that it gives with memory for everything, and stderr says once what to set."""
    worker = setup.make()
    asked = job(blended(0.4, 0.4), sums=tuple(range(12)))
    expected = worker.answer(asked)
    forward, fed = worker._engine.model.forward, []

    def tight(*arguments, **given):
        fed.append(len(given["input_ids"]))
        if fed[-1] > 3:
            torch.empty(1 << 60, dtype=torch.uint8)
        return forward(*arguments, **given)

    tight.__signature__ = inspect.signature(forward)
    monkeypatch.setattr(worker._engine.model, "forward", tight)
    worker.answer(job(blended(0.1, 0.1)))  # so that the next one is built anew
    answers = [worker.answer(asked), worker.answer(asked)]

    assert max(fed) > 3
    assert fed[-1] <= 3
    for answer in answers:
        assert answer.error is None
        assert answer.responses == expected.responses
    assert capfd.readouterr().err.count("not enough memory on cpu for a batch of") == 1


def test_an_interrupt_is_not_an_answer(worker, monkeypatch):
    """Ctrl-C goes through the worker."""

    def interrupted(plan):
        raise KeyboardInterrupt

    monkeypatch.setattr(worker._engine, "answer", interrupted)

    with pytest.raises(KeyboardInterrupt):
        worker.answer(job(blended(0.4, 0.4)))


def test_a_worker_sets_its_threads(setup):
    """The number of torch threads is the one in the setup."""
    before = torch.get_num_threads()
    try:
        replace(setup, threads=2).make()
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_tasks_may_be_files(setup, tmp_path):
    """A path in place of a task is read as a task file."""
    (tmp_path / "rows.jsonl").write_text('{"q": "1+1=", "a": "2", "c": ["1", "2"], "s": "search"}\n')
    path = tmp_path / "few.yaml"
    path.write_text("{kind: multiple_choice, data: rows.jsonl, prompt: '{q}', answer: a, choices: c, split: s}")

    answer = replace(setup, tasks={"other": path}).make().answer(job(blended(0.4, 0.4), other=(0,)))

    assert len(answer.responses["other"]) == 1


def test_what_a_worker_cannot_start_with_is_an_error(setup, folders, tmp_path):
    """A missing task file, a missing folder and a source that does not fit stop the making of a worker."""
    with pytest.raises(TaskError, match="cannot be read"):
        replace(setup, tasks={"gone": tmp_path / "gone.yaml"}).make()
    with pytest.raises(ModelError):
        replace(setup, sources={**folders, "gone": tmp_path / "gone"}).make()
    odd = save(tmp_path / "odd", make_model(seed=9))
    tensors = load_file(odd / "model.safetensors")
    tensors["lm_head.weight"] = tensors["lm_head.weight"][:-1].clone()
    save_file(tensors, odd / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lm_head\.weight"):
        replace(setup, sources={**folders, "odd": odd}).make()


def test_a_setup_is_made_without_torch():
    """The module imports no heavy library: `--help` and the driver's process stay light."""
    heavy = ("torch", "transformers", "datasets", "ray")
    code = f"import sys, evomerge.worker; print([name for name in {heavy} if name in sys.modules])"

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path.cwd())

    assert done.stdout.strip() == "[]"


@pytest.mark.ray
@pytest.mark.usefixtures("ray_session")
def test_inline_and_ray_give_the_same_answers(setup):
    """The same jobs get the same bits in this process, and from one or two others."""
    recipes = [blended(i / 5, 1 - i / 7) for i in range(5)]
    jobs = [job(recipe, i, sums=tuple(range(20)), words=(3, 1, 2)) for i, recipe in enumerate(recipes)]
    jobs.append(job(blended(1e39, 0.0), 5))
    found = []
    for make in (lambda: InlinePool(setup.make), lambda: RayPool(setup.make, 1), lambda: RayPool(setup.make, 2)):
        with make() as pool:
            for asked in jobs:
                pool.submit(asked)
            answers = sorted((pool.wait() for _ in jobs), key=lambda answer: answer.candidate)
        found.append([replace(answer, seconds=0.0) for answer in answers])

    assert found[0] == found[1] == found[2]
    assert [answer.error is None for answer in found[0]] == [True] * 5 + [False]


def merged(method: str, weights: dict[str, float], **parameters: float | str) -> Recipe:
    """Return a recipe of a method with masks or a scope of its own, as the live model's dtype has it."""
    blend = Blend(method=method, weights=weights, parameters=parameters)
    return replace(blended(0.0, 0.0), routes=(Route(blend=blend),), seed=5)


#: Candidates that share tensors with others and those that do not.
CANDIDATES = (
    blended(0.3, 0.5),
    merged("ties", {"left": 0.8, "right": 0.4}, density=0.3),
    merged("dare_ties", {"left": 0.8, "right": 0.4}, density=0.6),
    replace(
        blended(0.3, 0.5),
        routes=(
            Route(blend=Blend(method="slerp", weights={"left": 1.0, "right": 0.5}, parameters={}), layers=(1, 2)),
            *blended(0.3, 0.5).routes,
        ),
    ),
    merged("ties", {"left": 0.8, "right": 0.4}, density=0.31),
    replace(blended(0.3, 0.5), dtype="bfloat16"),
)


def held(worker) -> dict[str, torch.Tensor]:
    """Return a copy of the live model's parameters."""
    return {name: parameter.detach().clone() for name, parameter in worker._engine.model.named_parameters()}


def same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    """Tell whether two models have the same bits."""
    return one.keys() == two.keys() and all(
        torch.equal(tensor.view(torch.int32), two[name].view(torch.int32)) for name, tensor in one.items()
    )


def test_live_tensors_do_not_depend_on_the_order_of_jobs(setup):
    """Two workers that got the same jobs in other orders hold the same bits after each; so does a third, fresh one."""
    asked = [job(recipe, i, sums=(0,)) for i, recipe in enumerate(CANDIDATES)]
    found: list[dict[int, dict[str, torch.Tensor]]] = []
    for order in (range(6), (5, 0, 4, 1, 3, 2)):
        worker, mine = setup.make(), {}
        for i in order:
            assert worker.answer(asked[i]).error is None
            mine[i] = held(worker)
        found.append(mine)

    assert all(same(found[0][i], found[1][i]) for i in range(6))
    assert not any(same(found[0][i], found[0][j]) for i in range(6) for j in range(i))
    fresh = setup.make()
    fresh.answer(asked[3])
    assert same(held(fresh), found[0][3])


def test_nothing_is_taken_for_written_after_a_failure(setup):
    """A candidate that fails half way leaves tensors of its own; the next is written whole, even if it came before."""
    worker, ends = setup.make(), blended(0.3, 0.5)
    worker.answer(job(ends, sums=(0,)))
    expected = held(worker)
    impossible = replace(
        ends,
        routes=(
            Route(blend=Blend(method="linear", weights={"left": 1.0}, parameters={}), layers=(0, 1)),
            Route(blend=Blend(method="task_arithmetic", weights={"left": 1e39}, parameters={}), layers=(2, 3)),
            *ends.routes,
        ),
    )

    assert "not finite" in worker.answer(job(impossible, sums=(0,))).error
    assert not same(held(worker), expected)
    assert worker.answer(job(ends, sums=(0,))).error is None
    assert same(held(worker), expected)


def test_compiled_lines_write_what_the_plain_ones_write(setup, monkeypatch, tmp_path):
    """A worker whose sources are great enough compiles its lines, and holds the same bits as one that does not."""
    from evomerge import worker as module
    from evomerge.operators import fused

    if fused.unavailable() is not None:
        pytest.skip(f"nothing can be compiled here: {fused.unavailable()}")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    plain = setup.make()
    monkeypatch.setattr(module, "LARGE", 0)
    compiled = setup.make()
    assert plain._lines is None
    for i in (0, 1, 5, 0):
        for worker in (plain, compiled):
            assert worker.answer(job(CANDIDATES[i], i, sums=(0,))).error is None
        assert same(held(plain), held(compiled)), i

    assert len(compiled._lines._compiled) >= 2
    assert compiled._lines.problem is None


def test_without_a_compiler_a_worker_merges_plainly(setup, monkeypatch, tmp_path):
    """Where nothing can be compiled a worker of great sources works all the same."""
    from evomerge import worker as module
    from evomerge.operators import fused

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(module, "LARGE", 0)
    monkeypatch.setattr(fused, "unavailable", lambda: "no working C++ compiler (none)")
    worker = setup.make()

    assert worker._lines is None
    assert worker.answer(job(CANDIDATES[1], sums=(0,))).error is None


def plain_items(count: int) -> tuple[Item, ...]:
    """Return prompts without labels."""
    return tuple(Item(id=f"p{i}", prompt=f"word {i * 37} of a text") for i in range(count))


def log_probabilities(folder: Path, text: str) -> torch.Tensor:
    """Return what a model in a folder says before each token of a text, by plain transformers."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        return model(ids).logits[0, :-1].double().log_softmax(-1)


def test_a_reference_is_asked_with_its_own_weights(setup, folders, monkeypatch):
    """Divergence from a source is 0 for it and the formula's for others; it is asked once, whatever jobs come."""
    splits = {"search": plain_items(6), "validation": plain_items(7)[6:]}
    task = JsonlTask(name="near", measure=Divergence(reference="left", top=48), splits=splits)
    worker = replace(setup, tasks={"near": task, "sums": SUMS}).make()
    loads = []
    load = worker._engine.load
    monkeypatch.setattr(worker._engine, "load", lambda stream: loads.append(1) or load(stream))

    same = worker.answer(job(copy_of(source("left"), DEPTH, "float32"), near=(0, 3)))
    worker.answer(job(blended(0.3, 0.4), sums=(0,)))
    before = len(loads)
    other = worker.answer(job(copy_of(source("right"), DEPTH, "float32"), near=(3, 5)))

    assert len(loads) == before + 1
    assert same.responses["near"] == pytest.approx((0.0, 0.0), abs=1e-6)
    for place, response in zip((3, 5), other.responses["near"], strict=True):
        p, q = (log_probabilities(folders[name], splits["search"][place].prompt) for name in ("left", "right"))
        assert response == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-3)
    fresh = replace(setup, tasks={"near": task, "sums": SUMS}).make()
    assert fresh.answer(job(copy_of(source("right"), DEPTH, "float32"), near=(5,))).responses["near"] == (
        pytest.approx(other.responses["near"][1:], abs=1e-6)
    )
    assert worker.answer(job(blended(0.3, 0.4), split="validation", near=(0,))).error is None


@pytest.mark.parametrize(
    ("reference", "asked", "message"),
    [
        ("lefd", "near", "TaskError: task 'near': its reference 'lefd' is not among the sources; did you mean 'left'?"),
        ("broken", "near", "TaskError: the reference 'broken' cannot answer: task 'near': "),
        ("left", "far", "TaskError: task 'far' is not among"),
    ],
)
def test_a_reference_that_cannot_answer_is_bad_input(setup, folders, tmp_path, reference, asked, message):
    """A reference that is no source, or a broken one, is no fault of the candidate."""
    broken = save(tmp_path / "broken", make_model(seed=1))
    tensors = load_file(broken / "model.safetensors")
    tensors["model.norm.weight"] *= 1e38
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    task = JsonlTask(name="near", measure=Agreement(reference=reference), splits={"search": plain_items(6)})
    tasks, sources = {"near": task}, {**folders, "broken": broken}

    answer = replace(setup, tasks=tasks, sources=sources).make().answer(job(blended(0.4, 0.4), **{asked: (0,)}))

    assert answer.error.startswith(message)


def looping(folder: Path) -> Path:
    """Write a model that says one letter for ever: its last layers add nothing, and the head knows one row."""
    model = make_model(seed=1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "o_proj" in name or "down_proj" in name:
                weight.zero_()
        model.lm_head.weight.zero_()
        model.lm_head.weight[20] = model.model.norm.weight
        model.model.embed_tokens.weight.abs_()
    return save(folder, model)


def test_a_merge_that_repeats_itself_fails_unless_the_template_does(setup, folders, tmp_path, capsys):
    """Endless repetition fails merges; of a source it is a warning, and of the template it takes the gate away."""
    left = Recipe(
        sources=(source("left"), source("right")),
        base=None,
        routes=(Route(blend=Blend(method="linear", weights={"left": 1.0, "right": 0.0}, parameters={})),),
        layers=tuple(range(DEPTH)),
        dtype="float32",
    )
    sources = {**folders, "left": looping(tmp_path / "left")}
    worker = replace(setup, sources=sources).make()

    merge = worker.answer(job(left))
    again = worker.answer(job(left))
    alone = worker.answer(job(copy_of(source("left"), DEPTH, "float32"), words=(0,)))
    sound = worker.answer(job(blended(0.0, 1.0)))
    said = capsys.readouterr().err
    open_ = replace(setup, sources=sources, gates=Gates(repetition=0)).make().answer(job(left, words=(0,)))
    excused = replace(setup, sources=sources, template=sources["left"]).make().answer(job(left, words=(0,)))

    assert merge.error.startswith("CandidateError: gate: all 4 answers to prompts are endless repetition, like 'gggg")
    assert again.error == merge.error
    assert (alone.error, sound.error) == (None, None)
    assert "the source left does not pass the gates for merges: all 4 answers" in said
    assert (open_.error, excused.error) == (None, None)
    assert "no gate for repetition: of left itself, all 4 answers" in capsys.readouterr().err
