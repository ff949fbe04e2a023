"""The straight line on real models: run, kill, resume, several workers, faults, export, report."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from evomerge.cli import app
from evomerge.drivers import DRIVERS
from evomerge.errors import ExportError
from evomerge.evaluation.labelled import Choose
from evomerge.experiment import Experiment, load
from evomerge.export import export_models
from evomerge.ledger import Answered, Event, Told, read, settled
from evomerge.models.checkpoint import Checkpoint
from evomerge.models.materialize import materialize
from evomerge.models.mergekit import read as read_mergekit
from evomerge.models.resident import OnDisk
from evomerge.pool import Answer, InlinePool, Job, RayPool
from evomerge.recipe import Route, models_of
from evomerge.recipe import read as read_recipe
from evomerge.run import Run, open_run
from evomerge.search import Search, open_pool, prepare
from evomerge.worker import ModelWorker, WorkerSetup

ROOT = Path(__file__).resolve().parent.parent
SMALL: dict[str, Any] = {
    "name": "small",
    "driver": {"name": "nsga2", "population": 8},
    "budget": {"candidates": 16},
    "estimator": {"name": "auto"},
    "schedule": {
        "name": "warmup", "random": 6, "items": 10, "promote": 1, "honest": 1, "every": 1, "elites": 0, "final": 2,
    },
    "baselines": {"lambdas": [0.3]},
    "finalists": 4,
    "splits": {"search": 60, "validation": 60, "test": 40},
    "ray": None,
    "workers": {"time_limit": 60.0},
}


def small(folder: Path, **changes: Any) -> Path:
    """Write the quickstart at a small budget and return its path."""
    data = yaml.safe_load((ROOT / "experiments/quickstart.yaml").read_text(encoding="utf-8")) | SMALL | changes
    models = data["models"]
    models["base"] = str(ROOT / "experiments" / models["base"])
    models["sources"] = {name: str(ROOT / "experiments" / path) for name, path in models["sources"].items()}
    path = folder / "small.yaml"
    path.write_text(yaml.safe_dump(data, sort_keys=False), encoding="utf-8")
    return path


def cli(*arguments: str | Path) -> str:
    """Run a command that must succeed, and return what it printed."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of a small run that went through, and what was printed."""
    folder = tmp_path_factory.mktemp("whole")
    printed = cli("run", small(folder), "--runs", folder)
    return folder / "small", printed


def events_of(run: Path) -> list[Event]:
    """Return the ledger of a run."""
    return list(read(run / "ledger.jsonl"))


def setup_of(experiment: Experiment) -> WorkerSetup:
    """Return what a worker of this experiment needs."""
    return WorkerSetup(
        template=experiment.folders["base"],
        sources=experiment.folders,
        tasks=experiment.tasks,
        dtype=experiment.file.dtype,
        batch=experiment.file.workers.batch,
    )


def test_a_run_says_what_it_will_do_and_what_came_out(whole: tuple[Path, str]) -> None:
    """The printed text holds the plan, an estimate of the time, the table, the cost and the folder of the models."""
    run, printed = whole

    for part in (
        "arithmetic, strings, cipher over base",
        "12 genes",
        "maximize arithmetic, maximize strings, maximize cipher",
        "nsga2, 16 candidates",
        "estimate: ",
        "Scores on the test split",
        "Hypervolume on the test split",
        "Items asked of a candidate after the warm-up: 30 of 180 (6.0 times fewer)",
    ):
        assert part in printed
    assert (run / "experiment.yaml").is_file()
    assert json.loads((run / "environment.json").read_text())["sessions"]


def test_the_other_verbs_read_a_finished_run(whole: tuple[Path, str]) -> None:
    """`status` and `report` show it; `run` and `resume` find it finished and change nothing."""
    run, _ = whole
    before = (run / "ledger.jsonl").read_bytes()

    assert "finished" in cli("status", run)
    report = cli("report", run)
    assert report in cli("resume", run)
    assert report in cli("run", run.parent / "small.yaml", "--runs", run.parent)
    assert (run / "ledger.jsonl").read_bytes() == before


def test_exported_models_load_with_plain_transformers_and_answer_as_scored(whole: tuple[Path, str]) -> None:
    """`generate` and plain log-likelihoods, one prompt at a time, give the responses in the ledger."""
    run, _ = whole
    experiment = load(run / "experiment.yaml")
    index = json.loads((run / "pareto/index.json").read_text())["models"]
    assert [entry["candidate"] for entry in index] == open_run(run).models()
    recorded = {e.candidate: e for e in events_of(run) if isinstance(e, Answered) and e.split == "test"}

    for entry in index[:2]:
        folder = run / "pareto" / entry["folder"]
        model = AutoModelForCausalLM.from_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        answers = recorded[entry["candidate"]].responses
        for name, task in experiment.tasks.items():
            scorer = _choose if isinstance(task.measure, Choose) else _generate
            for item, response in list(zip(task.splits["test"], answers[name], strict=True))[:15]:
                assert scorer(model, tokenizer, task, item) == response


def _generate(model: Any, tokenizer: Any, task: Any, item: Any) -> float:
    prompt = tokenizer(item.prompt, return_tensors="pt")
    with torch.no_grad():
        out = model.generate(**prompt, max_new_tokens=task.measure.max_new_tokens, do_sample=False)
    text = tokenizer.decode(out[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    for stop in task.measure.stop:
        text = text.split(stop)[0]
    return float(text.strip() in item.answers)


def _choose(model: Any, tokenizer: Any, task: Any, item: Any) -> float:
    del task
    prompt = tokenizer(item.prompt)["input_ids"]
    totals = []
    for choice in item.choices:
        ids = tokenizer(choice, add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            logits = model(torch.tensor([prompt + ids])).logits[0].log_softmax(-1)
        totals.append(sum(float(logits[len(prompt) + i - 1, token]) for i, token in enumerate(ids)))
    return float(item.choices[max(range(len(totals)), key=totals.__getitem__)] in item.answers)


def test_exported_folders_hold_all_that_their_users_need(whole: tuple[Path, str]) -> None:
    """Recipe, model card, tokenizer and tensors of the declared dtype are there, and nothing unfinished."""
    run, _ = whole
    folders = [path for path in (run / "pareto").iterdir() if path.is_dir()]
    assert folders
    assert not [path for path in (run / "pareto").iterdir() if path.name.startswith(".")]

    for folder in folders:
        recipe = read_recipe(folder / "recipe.yaml")
        checkpoint = Checkpoint(folder)
        assert {checkpoint.dtype(name) for name in checkpoint.names} == {torch.float32}
        assert len({path.stat().st_mode for path in folder.iterdir()}) == 1
        assert checkpoint.vocabulary == Checkpoint(ROOT / "experiments/zoo/base").vocabulary
        card = (folder / "README.md").read_text()
        assert recipe.digest in card
        assert "from_pretrained" in card
        assert "good" in cli("check", folder / "recipe.yaml")
    assert all(folder.name in (run / "pareto/README.md").read_text() for folder in folders)


def test_mergekits_file_beside_a_recipe_says_the_same_model(whole: tuple[Path, str]) -> None:
    """Read back and built, it gives the exported tensors up to the rounding of float32; the README names it."""
    run, _ = whole
    for folder in (path for path in (run / "pareto").iterdir() if path.is_dir()):
        theirs = read_mergekit(folder / "mergekit_config.yml")
        models = {source.name: Path(source.path) for source in models_of(theirs).values()}
        exported = Checkpoint(folder)
        built = dict(materialize(theirs, OnDisk(models)))

        assert built.keys() == set(exported.names)
        for name, tensor in built.items():
            torch.testing.assert_close(tensor, exported.tensor(name), rtol=1e-6, atol=1e-7)
        assert "`mergekit_config.yml` makes the same model" in (folder / "README.md").read_text()


def test_a_model_beyond_mergekit_is_exported_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A line of one's own that takes statistics: no file for mergekit, the README has the line and says why."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "texts.txt").write_text("3+4\n5-2\nabc\n")
    line = "base | trim(0.8) | sum | relax(0.5)"
    few = {"schedule": {"name": "fixed", "items": 5}, "budget": {"candidates": 2}, "finalists": 1}
    path = small(tmp_path, space={"methods": [line]}, calibration=str(tmp_path / "texts.txt"), **few)
    cli("run", path, "--runs", tmp_path)
    searched = open_run(tmp_path / "small").searched[0].candidate
    cli("export", tmp_path / "small", "--front", str(searched), "--to", tmp_path / "out")

    folder = tmp_path / "out" / f"candidate-{searched}"
    card = (folder / "README.md").read_text()
    assert not (folder / "mergekit_config.yml").exists()
    assert f"by the stages `{line}`, with task vectors" in card
    assert "mergekit cannot make it: " in card
    assert "takes statistics (activation)" in card
    assert read_recipe(folder / "recipe.yaml").calibration is not None


def test_export_writes_what_is_chosen(whole: tuple[Path, str], tmp_path: Path) -> None:
    """`--front knee` writes one model, a number writes that candidate, also one that is not in the front."""
    run, _ = whole
    state = open_run(run)
    outside = next(event.candidate for event in state.searched if event.candidate not in state.front())

    cli("export", run, "--front", "knee", "--to", tmp_path / "knee")
    cli("export", run, "--front", str(outside), "--to", tmp_path / "one")

    assert len([path for path in (tmp_path / "knee").iterdir() if path.is_dir()]) == 1
    assert (tmp_path / "one" / f"candidate-{outside}" / "model.safetensors").is_file()
    result = CliRunner().invoke(app, ["export", str(run), "--front", "999"])
    assert result.exit_code == 2
    assert "999" in result.stderr


def test_a_model_that_does_not_answer_as_scored_is_not_exported(whole: tuple[Path, str], tmp_path: Path) -> None:
    """If the recorded answers are others than the reloaded model's, the export fails and leaves no model."""
    run, _ = whole
    number = open_run(run).models()[0]
    events = [
        replace(event, responses={task: tuple(1 - r for r in own) for task, own in event.responses.items()})
        if isinstance(event, Answered)
        else event
        for event in events_of(run)
    ]

    with pytest.raises(ExportError, match=f"candidate {number}: 180 of 180 answers differ"):
        export_models(load(run / "experiment.yaml"), Run(events), events, [number], tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_ctrl_c_ends_a_run_cleanly_and_the_same_command_goes_on(whole: tuple[Path, str], tmp_path: Path) -> None:
    """SIGINT in the middle: exit code 130, a word on how to go on, and the ledger grows to that of the whole run."""
    command = [sys.executable, "-m", "evomerge", "run", str(small(tmp_path)), "--runs", str(tmp_path)]
    ledger = tmp_path / "small/ledger.jsonl"
    child = subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a background job is born deaf to Ctrl-C
    )
    deadline = time.monotonic() + 120
    while (not ledger.is_file() or ledger.read_bytes().count(b"\n") < 5) and time.monotonic() < deadline:
        time.sleep(0.01)
    child.send_signal(signal.SIGINT)
    printed, _ = child.communicate(timeout=60)

    assert child.returncode == 130, printed
    assert f"evomerge resume {tmp_path / 'small'}" in printed.replace("\n", "")
    assert "Traceback" not in printed
    assert len(events_of(tmp_path / "small")) < len(events_of(whole[0]))
    assert "going on with" in cli("run", tmp_path / "small.yaml", "--runs", tmp_path)
    assert settled(events_of(tmp_path / "small")) == settled(events_of(whole[0]))


@pytest.mark.ray
def test_one_and_two_ray_workers_leave_the_ledger_of_the_inline_pool(whole: tuple[Path, str], tmp_path: Path) -> None:
    """Up to timing, the ledger does not tell who answered; a killed worker is replaced and changes nothing."""
    expected = settled(events_of(whole[0]))

    for count in (1, 2):
        (tmp_path / str(count)).mkdir()
        experiment = load(small(tmp_path / str(count), ray={"actors": count}))
        with prepare(experiment, tmp_path / f"run{count}") as record, open_pool(experiment) as pool:
            assert isinstance(pool, RayPool)
            killed: list[int] = []

            def kill_once(event: Event, replayed: bool, pool: RayPool = pool, killed: list[int] = killed) -> None:
                if isinstance(event, Told) and event.candidate == 14 and not killed:
                    killed.append(pool.pids[0])
                    os.kill(pool.pids[0], signal.SIGKILL)

            Search(experiment, record, pool, kill_once).run()
        assert killed
        assert settled(events_of(tmp_path / f"run{count}")) == expected


class Faulty(ModelWorker):
    """A worker whose candidates 13, 14 and 15 raise, produce NaN, and hang."""

    def ask(self, job: Job) -> Answer:
        """Answer, or fail in a way of the candidate's own."""
        if job.candidate == 13:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        if job.candidate == 15:
            time.sleep(60)
        if job.candidate == 14:
            blend = job.recipe.routes[0].blend
            huge = Route(blend=replace(blend, weights=dict.fromkeys(blend.weights, 1e38)), groups=("mlp",))
            job = replace(job, recipe=replace(job.recipe, routes=(huge, *job.recipe.routes)))
        return super().ask(job)


def test_candidates_that_raise_give_nan_or_hang_are_recorded_and_the_run_completes(tmp_path: Path) -> None:
    """Each failure is in the ledger with its reason, and the search goes on to its end."""
    experiment = load(small(tmp_path))
    with (
        prepare(experiment, tmp_path / "run") as record,
        InlinePool(lambda: Faulty(setup_of(experiment)), time_limit=3.0) as pool,
    ):
        Search(experiment, record, pool).run()

    run = open_run(tmp_path / "run")
    assert run.finished is not None
    assert run.errors.keys() == {13, 14, 15}
    assert "illegal memory access" in run.errors[13]
    assert "not finite" in run.errors[14]
    assert "time limit" in run.errors[15]
    assert "failed" in cli("status", tmp_path / "run")
    assert len(run.searched) == 16


def test_properties_of_the_model_are_objectives_too(tmp_path: Path) -> None:
    """`parameters` is minimised beside a task; it is the number of parameters that transformers counts."""
    objectives = [{"task": "arithmetic"}, {"property": "parameters"}]
    path = small(tmp_path, objectives=objectives, schedule={"name": "fixed", "items": 10}, budget={"candidates": 4})
    printed = cli("run", path, "--runs", tmp_path)

    base = AutoModelForCausalLM.from_pretrained(ROOT / "experiments/zoo/base")
    assert open_run(tmp_path / "small").told[0].losses[1] == base.num_parameters()  # type: ignore[index]  # it was scored
    assert f"{base.num_parameters():,}" in printed


def test_a_task_may_be_a_name_a_path_or_the_thing_itself(tmp_path: Path) -> None:
    """All three mean the same items, and a run made of them can be resumed from its own folder."""
    given = yaml.safe_load((ROOT / "fitness/cipher.yaml").read_text(encoding="utf-8"))
    (tmp_path / "cipher.jsonl").write_bytes((ROOT / "fitness/zoo/cipher.jsonl").read_bytes())
    (tmp_path / "by_path.yaml").write_text(yaml.safe_dump(given | {"data": "cipher.jsonl"}), encoding="utf-8")
    objectives = [
        {"task": "cipher"},
        {"task": "by_path.yaml", "name": "path"},
        {"task": given | {"data": "cipher.jsonl"}, "name": "itself"},
    ]
    path = small(tmp_path, objectives=objectives, schedule={"name": "fixed", "items": 5}, budget={"candidates": 2})
    cli("run", path, "--runs", tmp_path)

    tasks = load(tmp_path / "small/experiment.yaml").tasks
    assert [task.splits for task in tasks.values()] == [tasks["cipher"].splits] * 3
    assert list(tasks) == ["cipher", "path", "itself"]
    assert "itself" in cli("resume", tmp_path / "small")


def test_help_ls_and_report_start_without_torch(whole: tuple[Path, str]) -> None:
    """The commands that only read text do not wait for torch."""
    for arguments in (["--help"], ["ls"], ["report", str(whole[0])], ["status", str(whole[0])]):
        code = f"""
import sys
from evomerge.cli import app
try:
    app({arguments!r})
finally:
    print("torch" in sys.modules)
"""
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.stdout.strip().endswith("False"), done.stdout + done.stderr


def test_ls_show_and_schema() -> None:
    """`ls` names what ships, `show` prints it, `schema` is a JSON schema that knows every key."""
    assert "task_vectors" in cli("ls")
    assert cli("show", "experiments/quickstart") == (ROOT / "experiments/quickstart.yaml").read_text()
    assert cli("show", "quickstart") == (ROOT / "experiments/quickstart.yaml").read_text()
    schema = json.loads(cli("schema"))
    assert {"models", "space", "objectives", "driver", "budget"} <= schema["properties"].keys()
    named = {option["properties"]["name"]["const"] for option in schema["properties"]["driver"]["oneOf"]}
    assert named == set(DRIVERS)


def test_every_search_space_that_ships_is_good(tmp_path: Path) -> None:
    """Each file of `search_spaces/` makes a space on the quickstart models."""
    for path in sorted((ROOT / "search_spaces").glob("*.yaml")):
        experiment = load(small(tmp_path, space=path.stem))
        assert experiment.space.axes
