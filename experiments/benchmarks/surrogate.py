"""Stand-ins for real evaluations: what models of a space answer, learned from thousands that were built and asked.

    python experiments/benchmarks/surrogate.py collect layers --count 1500 --seed 1 --to runs/search/layers-1.jsonl
    python experiments/benchmarks/surrogate.py pack layers runs/search/layers-*.jsonl
    python experiments/benchmarks/surrogate.py fit layers
    python experiments/benchmarks/surrogate.py front layers --to runs/search/layers-front.jsonl

`collect` builds models of the quickstart's sources and asks each 100 search items of all three tasks. Which ones: the
baselines, random genomes, and the courses of NSGA-II and of CMA-ES on weighted sums, so that good regions are known
better than bad ones. `front` asks the best that searches on the stand-in find, which shows where it is too hopeful.
`pack` makes `search/NAME.npz` of what was collected, a part for each file. `fit` trains small networks from genome to
the chance of a right answer to each item, on all parts but two: one that was collected, and the last fronts. What the
stand-in is off on those is written beside the networks, in `search/NAME.safetensors`. From then on an evaluation takes
a tenth of a millisecond, and needs no model.
"""

import argparse
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import save_file

from evomerge.genome import Axis, Choice, Genome, Real, Whole, active, from_unit, to_unit
from evomerge.objective import Losses
from evomerge.value import parse, plain

HERE = Path(__file__).resolve().parent
DATA = HERE / "search"
TASKS = ("arithmetic", "strings", "cipher")
ITEMS = 100

#: The networks of a stand-in: so many, with so many layers between genome and items, of so many units.
MEMBERS, HIDDEN, WIDTH = 4, 3, 64

#: Parts of the collected evaluations, in the order of the files: five courses, then the fronts of two rounds. The
#: networks never see the last course, nor the last fronts.
COURSES, HELD = 5, {"courses": 4, "fronts": 6}

_MODULES = [["attention"], ["mlp"], ["other"]]
#: The spaces by name: what they are, and what an experiment file says of them.
SPACES: Mapping[str, tuple[str, str | dict[str, Any]]] = {
    "ps": (
        "DARE-TIES, a weight and a density per source (Akiba 2024)",
        {
            "methods": ["dare_ties"],
            "weight": {"low": 0.0, "high": 1.0},
            "parameters": {"density": {"low": 0.05, "high": 1.0, "per_source": True}},
        },
    ),
    "layers": (
        "task arithmetic, a weight per source, layer and module group",
        {"methods": ["task_arithmetic"], "knots": 4, "modules": _MODULES, "weight": {"low": 0.0, "high": 1.0}},
    ),
    "mixed": ("six methods with their parameters, weights by depth and module group", "any_method"),
}
_KINDS: Mapping[str, type[Real] | type[Whole] | type[Choice]] = {"Real": Real, "Whole": Whole, "Choice": Choice}

#: What comes of a model: losses, and responses by task and item.
Answer = tuple[Losses, dict[str, dict[int, float]]]

#: Which part, the genome in the unit cube, and right answers, one column an item: [M], [M, axes], [M, items].
Evaluations = tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.bool_]]


class Surrogate:
    """A space whose models answer at once.

    A score is the mean chance over a task's items, to the hundredth as a real one of 100 items; the likeliest items
    are those that are answered right.

    Attributes:
        name: of the space.
        axes: of its genomes.
        known: genomes of the baselines that lie in the space, with their losses.
        baselines: losses of all baselines, in their order; of those that no genome makes, the real ones.
        quality: how well it foretells real evaluations that it was not fitted to, by part and task.
        evaluations: to how many it was fitted.
        digest: of all that its answers depend on.

    Args:
        name: one of `SPACES`.
    """

    def __init__(self, name: str) -> None:
        with safe_open(str(DATA / f"{name}.safetensors"), "numpy") as file:
            facts = json.loads(file.metadata()["facts"])
            self._layers = [
                tuple(file.get_tensor(f"{word}{k}").astype(np.float64) for word in ("weight", "bias"))
                for k in range(HIDDEN + 1)
            ]
        self.name = name
        tensors = b"".join(tensor.tobytes() for layer in self._layers for tensor in layer)
        self.digest = hashlib.sha256(tensors).hexdigest()[:12]
        self.axes: tuple[Axis, ...] = tuple(parse(_KINDS[kind], data, name) for kind, data in facts["axes"])
        self.quality: dict[str, dict[str, dict[str, float]]] = facts["quality"]
        self.evaluations: int = facts["evaluations"]
        own = [(tuple(genome) if genome else None, tuple(losses)) for _, genome, losses in facts["baselines"]]
        made = [(genome, self.losses(genome) if genome else losses) for genome, losses in own]
        self.known: tuple[tuple[Genome, Losses], ...] = tuple((g, losses) for g, losses in made if g is not None)
        self.baselines: tuple[Losses, ...] = tuple(losses for _, losses in made)

    def losses(self, genome: Genome) -> Losses:
        """Return minus the share of right answers to each task."""
        return tuple(self.matrix([genome])[0].tolist())

    def matrix(self, genomes: Sequence[Genome]) -> NDArray[np.float64]:
        """Return the losses of many. Shape (genomes, tasks)."""
        return -_counts(self.chances(genomes)) / ITEMS

    def responses(self, genome: Genome) -> dict[str, dict[int, float]]:
        """Return a candidate's response to each item, 0 or 1, by task."""
        return self.answers([genome])[0][1]

    def answers(self, genomes: Sequence[Genome]) -> list[Answer]:
        """Return losses and responses of many."""
        chances_GTN = self.chances(genomes)
        counts_GT = _counts(chances_GTN)
        # Places by likelihood; of equal items the first, so that nothing is left to chance.
        places_GTN = np.argsort(np.argsort(-chances_GTN, axis=2, kind="stable"), axis=2)
        right_GTN = (places_GTN < counts_GT[:, :, None]).astype(float).tolist()
        return [
            (tuple(losses), {task: dict(enumerate(own)) for task, own in zip(TASKS, right_TN, strict=True)})
            for losses, right_TN in zip((-counts_GT / ITEMS).tolist(), right_GTN, strict=True)
        ]

    def chances(self, genomes: Sequence[Genome]) -> NDArray[np.float64]:
        """Return the chance of a right answer to each item. Shape (genomes, tasks, items)."""
        x_MGF = features(self.axes, genomes)[None]
        for k, (weight_MFH, bias_MH) in enumerate(self._layers):
            x_MGF = x_MGF @ weight_MFH + bias_MH[:, None]
            if k < HIDDEN:
                x_MGF = x_MGF * _sigmoid(x_MGF)
        return _sigmoid(x_MGF.mean(axis=0)).reshape(len(genomes), len(TASKS), ITEMS)


def _sigmoid(x: NDArray[np.float64]) -> NDArray[np.float64]:
    return 1.0 / (1.0 + np.exp(-np.clip(x, -60.0, 60.0)))


def _counts(chances_GTN: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return how many items of each task are answered right. Shape (genomes, tasks)."""
    return np.rint(chances_GTN.sum(axis=2))


def features(axes: Sequence[Axis], genomes: Sequence[Genome]) -> NDArray[np.float64]:
    """Return what the networks see: numbers about 0, options one by one, and 0 for genes that do not count."""
    rows = []
    for genome in genomes:
        row: list[float] = []
        for axis, gene, counts in zip(axes, genome, active(axes, genome), strict=True):
            if isinstance(axis, Choice):
                row += [2.0 * (gene == option) for option in axis.options]
            else:
                row.append(3.0 * (axis.to_unit(gene) - 0.5) if counts else 0.0)
        rows.append(row)
    return np.array(rows)


def experiment_of(name: str, folder: Path) -> Any:
    """Return the quickstart's experiment with another space, and everything asked of everybody."""
    import yaml

    from evomerge.experiment import load

    home = HERE.parent
    data = yaml.safe_load((home / "quickstart.yaml").read_text(encoding="utf-8"))
    models = data["models"]
    models["base"] = str(home / models["base"])
    models["sources"] = {source: str(home / path) for source, path in models["sources"].items()}
    data.pop("ray", None)
    space = SPACES[name][1]
    data |= {"space": space if isinstance(space, str) else {"kind": "blend", **space}, "schedule": {"name": "fixed"}}
    data |= {"splits": {"search": ITEMS, "validation": 20, "test": 20}}
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(data), encoding="utf-8")
    return load(path)


class Reality:
    """A worker that builds models of a space and asks them; what came of it is appended to a file.

    Args:
        name: of the space.
        to: a file of JSON, one evaluation a line.
    """

    def __init__(self, name: str, to: Path) -> None:
        from evomerge.worker import WorkerSetup

        self.experiment = experiment_of(name, to.parent)
        own = self.experiment
        # What repeats itself would fail and have no score; here it is to have its low one.
        gates = replace(own.gates, repetition=0)
        setup = WorkerSetup(template=own.template, sources=own.folders, tasks=own.tasks, gates=gates)
        self._worker, self._items = setup.make(), own.items("search")
        self._file = to.open("a", encoding="utf-8")
        self.done = 0

    def ask(self, origin: str, genome: Genome | None, recipe: Any = None) -> Answer | None:
        """Return what comes of a model: of a recipe, or of a genome's; None if it failed."""
        from evomerge.pool import Job

        recipe = self.experiment.space.decode(genome) if recipe is None else recipe
        answer = self._worker.answer(Job(candidate=self.done, recipe=recipe, split="search", items=self._items))
        bits = {task: "".join(str(int(v)) for v in own) for task, own in (answer.responses or {}).items()}
        row = {"origin": origin, "genome": genome, "bits": bits, "error": answer.error}
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        self.done += 1
        if not bits:
            return None
        responses = {task: dict(enumerate(map(float, bits[task]))) for task in TASKS}
        return tuple(-bits[task].count("1") / ITEMS for task in TASKS), responses

    def baselines(self) -> list[tuple[Genome | None, Answer]]:
        """Ask all baselines; return what came of them, with the genomes of those that lie in the space."""
        from evomerge.search.beginning import baselines_of

        found = [(own.genome, self.ask(own.label, own.genome, own.recipe)) for own in baselines_of(self.experiment)]
        return [(genome, answer) for genome, answer in found if answer is not None]


def collect(name: str, count: int, seed: int, to: Path) -> None:
    """Evaluate so many models of a space for real, and write what they answered, one a line."""
    from evomerge.drivers import Cma, Nsga2, Problem, Random

    reality = Reality(name, to)
    axes, known = reality.experiment.space.axes, tuple(
        (genome, losses) for genome, (losses, _) in reality.baselines() if genome is not None
    )
    rng, course = np.random.default_rng(seed), 0
    while reality.done < count:
        kind, length = [("random", 60), ("nsga2", 300), ("cma", 150), ("nsga2", 300), ("cma", 150)][course % 5]
        course += 1
        choice = {"random": Random(batch=60), "nsga2": Nsga2(population=30), "cma": Cma(sigma=0.25, scalarise="sum")}
        settings = choice[kind]
        weights = tuple(map(float, rng.dirichlet([1.0] * 3))) if kind == "cma" else None
        begun = known if kind == "nsga2" and course % 2 == 0 else ()
        drawn = int(rng.integers(1 << 30))
        driver = settings.start(Problem(axes=axes, objectives=3, seed=drawn, known=begun, weights=weights))
        for index in range(min(length, count - reality.done)):
            genome = driver.ask()
            if genome is None:
                break
            answer = reality.ask(f"{kind} {course}", genome)
            driver.tell(index, genome, answer[0] if answer else None)
        print(f"{name}: {reality.done} of {count}", flush=True)


def ask_fronts(name: str, count: int, seed: int, to: Path) -> None:
    """Evaluate for real the best that long searches on the stand-in find: its first fronts."""
    from evomerge.drivers import Nsga2, Problem
    from evomerge.pareto import ranks

    there = Surrogate(name)
    genomes: list[Genome] = []
    kinds = Nsga2(population=100), Nsga2(population=40), Nsga2(population=100, mutation_eta=5.0)
    for k, settings in enumerate(kinds):
        problem = Problem(axes=there.axes, objectives=3, seed=seed + k, known=there.known)
        driver = settings.start(problem)
        for index in range(4000):
            genome = driver.ask()
            if genome is None:
                break
            driver.tell(index, genome, there.losses(genome))
            genomes.append(genome)
    reality = Reality(name, to)
    losses, first = np.unique(there.matrix(genomes), axis=0, return_index=True)
    mixed = np.random.default_rng(seed).permutation(len(losses))
    for place in mixed[np.argsort(ranks(losses[mixed], deepest=4), kind="stable")][:count]:
        reality.ask("front", genomes[int(first[place])])
    print(f"{name}: {reality.done} of its front", flush=True)


def pack(name: str, files: Sequence[Path]) -> None:
    """Keep what was collected in one small file: genomes to 16 bits a gene, answers to one bit."""
    axes = experiment_of(name, files[0].parent).space.axes
    baselines: dict[str, list[Any]] = {}
    parts, points, bits = [], [], []
    for part, file in enumerate(files):
        for row in _rows(file):
            right = [bit == "1" for task in TASKS for bit in row["bits"][task]] if row["bits"] else []
            if row["origin"].split()[0] not in ("random", "nsga2", "cma", "front"):
                losses = -np.array(right).reshape(len(TASKS), -1).mean(axis=1)
                baselines.setdefault(row["origin"], [row["origin"], row["genome"], losses.tolist()])
                # Every search begins with these, so they are kept from each file; a held part is of searches only.
                right = right if row["genome"] and part not in HELD.values() else []
            if right:
                parts.append(part)
                points.append(np.rint(to_unit(axes, row["genome"]) * 65535))
                bits.append(right)
    DATA.mkdir(exist_ok=True)
    np.savez_compressed(
        DATA / f"{name}.npz",
        part=np.array(parts, dtype=np.uint8),
        point=np.array(points, dtype=np.uint16),
        bits=np.packbits(np.array(bits), axis=1),
        baselines=np.frombuffer(json.dumps(list(baselines.values())).encode(), dtype=np.uint8),
    )


def _rows(file: Path) -> Iterator[dict[str, Any]]:
    for line in file.read_text(encoding="utf-8").splitlines():
        yield json.loads(line)


def evaluations(name: str) -> Evaluations:
    """Return the real evaluations of a space."""
    with np.load(DATA / f"{name}.npz") as file:
        count = len(TASKS) * ITEMS
        bits = np.unpackbits(file["bits"], axis=1)[:, :count].astype(bool)
        return file["part"].astype(np.int64), file["point"] / 65535.0, bits


def fit(name: str, epochs: int = 80) -> None:
    """Train the networks of a space on all parts but two, and write them down with what they are off on those."""
    with np.load(DATA / f"{name}.npz") as file:
        baselines = json.loads(file["baselines"].tobytes())
    axes = experiment_of(name, HERE.parents[1] / "runs" / "search").space.axes
    part_M, point_MA, bits_MN = evaluations(name)
    seen = ~np.isin(part_M, list(HELD.values()))
    genomes = [from_unit(axes, point) for point in point_MA]
    x_MF = features(axes, genomes)
    members = [_train(x_MF[seen], bits_MN[seen], seed, epochs) for seed in range(MEMBERS)]
    tensors = {key: np.stack([member[key] for member in members]).astype(np.float16) for key in members[0]}
    facts = {
        "axes": [[type(axis).__name__, plain(axis)] for axis in axes],
        "baselines": baselines,
        "quality": {},
        "evaluations": int(seen.sum()),
    }
    path = DATA / f"{name}.safetensors"
    save_file(tensors, str(path), {"facts": json.dumps(facts)})
    facts["quality"] = quality(Surrogate(name))
    save_file(tensors, str(path), {"facts": json.dumps(facts)})
    path.chmod(0o644)
    print(name, facts["evaluations"], json.dumps(facts["quality"]), flush=True)


def _train(x_MF: NDArray[np.float64], bits_MN: NDArray[np.bool_], seed: int, epochs: int) -> dict[str, Any]:
    """Return the tensors of one network: weights [inputs, outputs] and biases of each layer."""
    import torch
    from torch import nn

    torch.manual_seed(seed)
    sizes = [x_MF.shape[1], *[WIDTH] * HIDDEN, bits_MN.shape[1]]
    layers = [nn.Linear(*pair) for pair in pairwise(sizes)]
    net = nn.Sequential(*[part for layer in layers for part in (layer, nn.SiLU())][:-1])
    x, y = torch.tensor(x_MF, dtype=torch.float32), torch.tensor(bits_MN, dtype=torch.float32)
    batch = 128
    steps = epochs * (len(x) // batch)
    adam = torch.optim.AdamW(net.parameters(), lr=4e-3, weight_decay=0.01)
    plan = torch.optim.lr_scheduler.OneCycleLR(adam, 4e-3, total_steps=steps)
    rng = np.random.default_rng(seed)
    for _ in range(steps):
        chosen = rng.choice(len(x), batch)
        loss = nn.functional.binary_cross_entropy_with_logits(net(x[chosen]), y[chosen])
        adam.zero_grad()
        loss.backward()
        adam.step()
        plan.step()
    found = {}
    for k, layer in enumerate(layers):
        found[f"weight{k}"] = np.ascontiguousarray(layer.weight.detach().numpy().T)
        found[f"bias{k}"] = layer.bias.detach().numpy()
    return found


def quality(there: Surrogate) -> dict[str, dict[str, dict[str, float]]]:
    """Return what it is off on real evaluations that it was not fitted to, by part and task.

    `error` is the mean absolute error of a score, `bias` the mean of predicted minus real ones, `explained` the share
    of the variance, and `rank` Spearman's correlation.
    """
    part_M, point_MA, bits_MN = evaluations(there.name)
    truth_MT = bits_MN.reshape(len(bits_MN), len(TASKS), ITEMS).mean(axis=2)
    found = {}
    for word, part in HELD.items():
        here = part_M == part
        if here.any():
            guess_MT = -there.matrix([from_unit(there.axes, point) for point in point_MA[here]])
            found[word] = {task: _off(guess_MT[:, k], truth_MT[here][:, k]) for k, task in enumerate(TASKS)}
    return found


def _off(guess: NDArray[np.float64], truth: NDArray[np.float64]) -> dict[str, float]:
    from scipy.stats import spearmanr

    error = guess - truth
    return {
        "error": round(float(np.abs(error).mean()), 4),
        "bias": round(float(error.mean()), 4),
        "explained": round(float(1 - (error**2).mean() / truth.var()), 4),
        "rank": round(float(spearmanr(guess, truth).statistic), 4),
    }


def main() -> None:
    """Collect, pack, fit, or ask the fronts."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    verbs = parser.add_subparsers(dest="verb", required=True)
    for verb, count in (("collect", 1500), ("front", 300), ("pack", None), ("fit", None)):
        own = verbs.add_parser(verb)
        own.add_argument("space", choices=SPACES)
        if count is not None:
            own.add_argument("--count", type=int, default=count)
            own.add_argument("--seed", type=int, default=0)
            own.add_argument("--to", type=Path, required=True)
        if verb == "pack":
            own.add_argument("files", nargs="+", type=Path)
    options = parser.parse_args()
    if options.verb == "collect":
        collect(options.space, options.count, options.seed, options.to)
    elif options.verb == "front":
        ask_fronts(options.space, options.count, options.seed, options.to)
    elif options.verb == "pack":
        pack(options.space, options.files)
    else:
        fit(options.space)


if __name__ == "__main__":
    main()
