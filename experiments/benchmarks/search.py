"""Compares drivers: how much of the best known hypervolume they reach, and in how many evaluations.

Every contender searches every space with every seed on stand-ins for real evaluations (`surrogate.py`), beginning, as a
real run does, with the baselines' scores. Those with published settings begin as published: in the middle, or at
random. Courses are kept in runs/search, so a comparison that was broken off goes on. With --write the tables go into
docs/search.md and the picture into docs/search.png. With --real some contenders build and ask real models, and what
they reach is set beside what they reach on the stand-in.

    python experiments/benchmarks/search.py [--spaces ps layers mixed] [--drivers NAME ...] [--seeds 10] [--budget 600]
        [--processes 2] [--json] [--write] [--real 200]
"""

# ruff: noqa: I001  courses sets numpy's threads, and so comes first
import argparse
import json
import math
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from courses import Answer, Contender, Course, courses, detail_of, follow, kept, problem_of, run, stand_in, undominated
from ranking import Volume, at, critical_difference, friedman, quartiles, ranks, to_target

import numpy as np
from surrogate import DATA, ITEMS, SPACES, Reality

from evomerge.drivers import DRIVERS
from evomerge.genome import Genome

ROOT = Path(__file__).resolve().parents[2]
RUNS = ROOT / "runs/search"
PAGE, PICTURE = ROOT / "docs/search.md", ROOT / "docs/search.png"

#: The share of the best known hypervolume that counts as reached.
SHARE = 0.95

#: How long rivals go on, which are cheap and slow to arrive; the others have 3,000 evaluations, or fewer where each
#: takes long.
LONG = 10_000

#: Ranks are given after so few evaluations too.
EARLY = 200

#: Akiba 2024, "Evolutionary optimization of model merging recipes": optuna's CMA-ES with its defaults, on one number.
_SAKANA = {"name": "cma", "scalarise": "sum", "sigma": 1 / 6, "damping": 1.0, "diagonal": False, "restart_below": 0.0}
#: Deb 2002, "A fast and elitist multiobjective genetic algorithm: NSGA-II", section V.
_DEB = {"name": "nsga2", "population": 100, "crossover_rate": 0.9, "crossover_eta": 20.0, "mutation_eta": 20.0}
#: The drivers that gain early, and one that gains late.
_LATE = {"name": "nsga2", "crossover_eta": 5.0}
_TEAM = {"name": "portfolio", "drivers": [{"name": "m2n2"}, {"name": "map_elites"}, _LATE]}

#: All that is compared. The default of a space is chosen among those that are no rivals.
CONTENDERS = (
    Contender("random", {"name": "random"}, budget=LONG),
    Contender("sobol", {"name": "sobol"}),
    Contender("grid", {"name": "grid"}),
    Contender("nsga2-published", _DEB, budget=LONG, told=False),
    Contender("cma-published", _SAKANA, budget=LONG, told=False, seconds=0.002),
    Contender("nsga2", {"name": "nsga2"}),
    Contender("nsga3", {"name": "nsga3"}),
    Contender("cma", {"name": "cma"}, seconds=0.002),
    Contender("tpe", {"name": "tpe"}, budget=400, seconds=0.05, seeds=3),
    Contender("gp", {"name": "gp"}, budget=120, seconds=2.0, seeds=2),
    Contender("map_elites", {"name": "map_elites"}, seconds=0.002),
    Contender("m2n2", {"name": "m2n2"}, seconds=0.002),
    Contender("greedy", {"name": "greedy"}),
    Contender("portfolio", {"name": "portfolio"}, seconds=0.006),
    Contender("portfolio-team", _TEAM, seconds=0.006),
    Contender("screened", {"name": "screened"}, budget=1000, seconds=0.008),
    Contender("screened-team", {"name": "screened", "driver": _TEAM}, budget=1500, seconds=0.01),
)
RIVALS = ("random", "nsga2-published", "cma-published")

Table = dict[str, list[Course]]


def main() -> int:
    """Run what is missing, and print and write what came of it."""
    options = _options()
    chosen = [c for c in CONTENDERS if c.driver["name"] in DRIVERS and c.name in options.drivers]
    if options.real:
        print(json.dumps(_real(chosen, options), indent=None if options.json else 2))
        return 0
    found: dict[str, Table] = {space: defaultdict(list) for space in options.spaces}
    folder, seeds = RUNS / "courses", range(options.seeds)
    if options.kept:
        runs = kept(folder, chosen, options.spaces)
    else:
        runs = courses(chosen, options.spaces, seeds, folder, options.processes, options.most)
    for course in runs:
        found[course.space][course.contender].append(course)
        if course.error:
            print(f"{course.contender}, {course.space}, seed {course.seed}: {course.error}", file=sys.stderr)
        if options.verbose:
            print(f"{course.contender} {course.space} {course.seed} {course.curve[-1][1]:.4f}", flush=True)
    report = summary(found, best_known(found), options.budget)
    if options.json:
        print(json.dumps(report))
    else:
        print(pages(report))
    if options.write:
        _write(report, found, options.budget)
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    names = [contender.name for contender in CONTENDERS]
    parser.add_argument("--spaces", nargs="+", default=list(SPACES), choices=list(SPACES))
    parser.add_argument("--drivers", nargs="+", default=names, choices=names)
    parser.add_argument("--seeds", type=int, default=10, help="how many, from 0")
    parser.add_argument("--budget", type=int, default=600, help="evaluations after which contenders are compared")
    parser.add_argument("--most", type=int, help="end every run after so many evaluations")
    parser.add_argument("--kept", action="store_true", help="run nothing; report the latest courses that are kept")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.add_argument("--verbose", action="store_true", help="print each run as it ends")
    parser.add_argument("--write", action="store_true", help="write tables and picture into docs/")
    parser.add_argument("--real", type=int, metavar="N", help="build and ask so many real models a run instead")
    return parser.parse_args()


def best_known(found: Mapping[str, Table]) -> dict[str, float]:
    """Return the hypervolume of all that was ever evaluated on each stand-in, and keep it where it is a new best."""
    path = DATA / "best.json"
    there: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    best = {}
    for space, table in found.items():
        # Of another stand-in these would be scores that nobody can reach.
        mark = stand_in(space).digest
        old = there.get(space, {})
        known = old["front"] if old.get("digest") == mark else []
        scores = {tuple(own) for own in known}
        scores |= {own for courses_ in table.values() for course in courses_ for own in course.front}
        volume = Volume(ITEMS)
        for own in scores:
            volume.add([-count / ITEMS for count in own])
        before = old.get("hypervolume", 0.0) if known else 0.0
        if volume.value > before:
            print(f"{space}: best known hypervolume {before:.6f} -> {volume.value:.6f}", file=sys.stderr)
            front = [list(own) for own in undominated(scores)]
            there[space] = {"digest": mark, "hypervolume": volume.value, "front": front}
        best[space] = volume.value
    path.write_text(json.dumps(there) + "\n", encoding="utf-8")
    return best


def summary(found: Mapping[str, Table], best: Mapping[str, float], budget: int) -> dict[str, Any]:
    """Return all figures: by space and contender, mean ranks, and how the best compare with their rivals."""
    spaces = {}
    for space, table in found.items():
        rows = {name: _row(own, best[space], budget) for name, own in table.items()}
        spaces[space] = {
            "genes": len(stand_in(space).axes),
            "best": best[space],
            "baselines": at(next(iter(table.values()))[0].curve, len(stand_in(space).baselines)) / best[space],
            "quality": stand_in(space).quality,
            "contenders": rows,
            "default": _default(rows),
        }
    ranked = [_ranks(found, n) for n in (EARLY, budget)]
    return {"budget": budget, "spaces": spaces, "ranks": ranked, "claims": _claims(spaces)}


def _row(own: Sequence[Course], best: float, budget: int) -> dict[str, Any]:
    """Return the figures of a contender in a space."""
    counts = {share: [to_target(c.curve, share * best) for c in own] for share in (0.9, SHARE, 0.99)}
    return {
        "seeds": len(own),
        "budget": min(c.budget for c in own),
        "failed": sum(c.error is not None for c in own),
        "to": {str(share): [_plain(q) for q in quartiles(each)] for share, each in counts.items()},
        "reached": sum(count is not None for count in counts[SHARE]),
        "volume": {str(n): _middle([at(c.curve, n) / best for c in own]) for n in (100, EARLY, budget)},
        "seconds": sum(c.seconds for c in own) / max(1, sum(c.done for c in own)),
    }


def _middle(values: Sequence[float]) -> list[float]:
    return [round(float(q), 4) for q in np.quantile(values, (0.25, 0.5, 0.75))]


def _plain(count: float) -> int | None:
    return None if math.isinf(count) else int(count)


def _default(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """Return who needs the fewest evaluations (median), of all but the rivals; if none arrives, who has most."""

    def merit(name: str) -> tuple[float, float]:
        middle, volumes = rows[name]["to"][str(SHARE)][1], rows[name]["volume"]
        return (math.inf if middle is None else middle), -list(volumes.values())[-1][1]

    return min((name for name in rows if name not in RIVALS), key=merit)


def _ranks(found: Mapping[str, Table], budget: int) -> dict[str, Any]:
    """Return mean ranks by hypervolume after so many evaluations, over spaces and seeds, of those that went so far."""
    tables = list(found.values())
    most = max(len(own) for table in tables for own in table.values())
    names = [
        name
        for name in tables[0]
        if all(len(table[name]) == most and table[name][0].budget >= budget for table in tables)
    ]
    blocks = np.array(
        [
            [at(next(c for c in table[name] if c.seed == seed).curve, budget) for name in names]
            for table in tables
            for seed in sorted(course.seed for course in table[names[0]])
        ]
    )
    few = len(names) < 3 or len(blocks) < 2
    return {
        "evaluations": budget,
        "mean": dict(sorted(zip(names, ranks(blocks).tolist(), strict=True), key=lambda pair: pair[1])),
        "difference": critical_difference(len(names), len(blocks)),
        "blocks": len(blocks),
        "friedman": None if few else friedman(blocks),
    }


def _claims(spaces: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return, of each space's default, what share of its rivals' evaluations it needs, by medians."""
    found = []
    for space, facts in spaces.items():
        rows = facts["contenders"]
        own = rows[facts["default"]]["to"][str(SHARE)][1]
        for rival in (each for each in RIVALS if each in rows):
            theirs, limit = rows[rival]["to"][str(SHARE)][1], rows[rival]["budget"]
            # A rival that never arrived needs more than its budget, so the ratio is at most this.
            ratio = None if own is None else own / (theirs or limit)
            holds = ratio is not None and (ratio <= 0.5 if rival == "random" else ratio < 1.0)
            row = {"space": space, "default": facts["default"], "rival": rival}
            row |= {"evaluations": own, "theirs": theirs, "limit": limit, "ratio": ratio, "holds": holds}
            found.append(row)
    return found


def pages(report: Mapping[str, Any]) -> str:
    """Return all tables as Markdown."""
    parts = [_space_table(space, facts, report["budget"]) for space, facts in report["spaces"].items()]
    parts += [_rank_table(report), _claim_table(report), _quality_table(report)]
    return "\n\n".join(parts)


def _space_table(space: str, facts: Mapping[str, Any], budget: int) -> str:
    rows = facts["contenders"]
    names = sorted(rows, key=lambda name: (rows[name]["to"][str(SHARE)][1] or math.inf, -_end(rows[name])))
    head = (
        f"**{space}**: {SPACES[space][0]}; {facts['genes']} genes. Best known hypervolume {facts['best']:.4f}; the "
        f"baselines have {facts['baselines']:.0%} of it.\n\n"
        f"| driver | to 95 % (quartiles) | reached | to 90 % | to 99 % | at 100 | at {EARLY} | at {budget} | ms |\n"
        f"|{'---|' * 9}\n"
    )
    lines = []
    for name in names:
        row = rows[name]
        low, middle, high = (_count(q, row["budget"]) for q in row["to"][str(SHARE)])
        mean = "**" if name == facts["default"] else ""
        cells = [
            f"{mean}{name}{mean}",
            f"{middle} ({low}–{high})" if row["to"][str(SHARE)][0] else middle,
            f"{row['reached']} of {row['seeds']}",
            *(_count(row["to"][share][1], row["budget"]) for share in ("0.9", "0.99")),
            *(_volume(row, n) for n in (100, EARLY, budget)),
            f"{1000 * row['seconds']:.1f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return head + "\n".join(lines)


def _end(row: Mapping[str, Any]) -> float:
    return float(list(row["volume"].values())[-1][1])


def _count(count: int | None, budget: int) -> str:
    return f"> {budget:,}" if count is None else f"{count:,}"


def _volume(row: Mapping[str, Any], evaluations: int) -> str:
    if evaluations > row["budget"]:
        return ""
    return f"{row['volume'][str(evaluations)][1]:.1%}"


def _rank_table(report: Mapping[str, Any]) -> str:
    early, late = report["ranks"]
    says = "; ".join(
        f"at {own['evaluations']}: {own['difference']:.2f}"
        + ("" if own["friedman"] is None else f" (Friedman's test p = {own['friedman']:.1e})")
        for own in report["ranks"]
    )
    head = (
        f"Mean ranks by hypervolume, over {late['blocks']} pairs of space and seed; 1 is best. Critical difference "
        f"(Nemenyi, 5 %) {says}.\n\n"
        f"| driver | rank at {early['evaluations']} | rank at {late['evaluations']} |\n|---|---|---|\n"
    )
    names = [*late["mean"], *(name for name in early["mean"] if name not in late["mean"])]
    means = early["mean"], late["mean"]
    cells = [[name, *(f"{mean[name]:.2f}" if name in mean else "" for mean in means)] for name in names]
    return head + "\n".join(f"| {' | '.join(row)} |" for row in cells)


def _claim_table(report: Mapping[str, Any]) -> str:
    head = f"| space | default | evaluations | rival | its evaluations | ratio | holds |\n|{'---|' * 7}\n"
    lines = []
    for own in report["claims"]:
        limit = "≤ " if own["theirs"] is None else ""
        ratio = "" if own["ratio"] is None else f"{limit}{own['ratio']:.2f}"
        theirs = _count(own["theirs"], own["limit"])
        mine = "never" if own["evaluations"] is None else f"{own['evaluations']:,}"
        cells = [own["space"], own["default"], mine, own["rival"], theirs, ratio, "yes" if own["holds"] else "no"]
        lines.append("| " + " | ".join(cells) + " |")
    return head + "\n".join(lines)


def _quality_table(report: Mapping[str, Any]) -> str:
    head = f"| space | held out | task | error | bias | variance explained | rank correlation |\n|{'---|' * 7}\n"
    lines = []
    for space, facts in report["spaces"].items():
        for part, tasks in facts["quality"].items():
            for task, own in tasks.items():
                figures = f"{own['error']:.3f} | {own['bias']:+.3f} | {own['explained']:.3f} | {own['rank']:.3f}"
                lines.append(f"| {space} | {part} | {task} | {figures} |")
    return head + "\n".join(lines)


def _write(report: Mapping[str, Any], found: Mapping[str, Table], budget: int) -> None:
    """Put the tables between the marks of the page, and draw the picture."""
    from drawing import draw

    begin, end = "<!-- tables: written by experiments/benchmarks/search.py --write -->", "<!-- end of tables -->"
    text = PAGE.read_text(encoding="utf-8")
    before, _, rest = text.partition(begin)
    _, _, after = rest.partition(end)
    PAGE.write_text(f"{before}{begin}\n\n{pages(report)}\n\n{end}{after}", encoding="utf-8")
    draw(
        curves={s: {name: [c.curve for c in own] for name, own in table.items()} for s, table in found.items()},
        best={space: facts["best"] for space, facts in report["spaces"].items()},
        titles={s: f"{s}: {facts['genes']} genes" for s, facts in report["spaces"].items()},
        order=report["ranks"][-1]["mean"],
        difference=report["ranks"][-1]["difference"],
        path=PICTURE,
        budget=budget,
    )


def _real(chosen: Sequence[Contender], options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return what contenders reach on real models, and what they reach in as many evaluations on the stand-in."""
    rows = []
    for space in options.spaces:
        RUNS.mkdir(parents=True, exist_ok=True)
        reality = Reality(space, RUNS / f"real-{space}.jsonl")
        asked = reality.baselines()
        known = [(genome, answer) for genome, answer in asked if genome is not None]

        def answer(genomes: Sequence[Genome], reality: Reality = reality) -> list[Answer | None]:
            found = [reality.ask("real", genome) for genome in genomes]
            return [None if each is None else (each[0], detail_of(*each)) for each in found]

        for contender in chosen:
            for seed in range(options.seeds):
                problem = problem_of(stand_in(space), seed, contender.told)
                if contender.told:
                    details = tuple(detail_of(*found) for _, found in known)
                    problem = replace(problem, known=tuple((g, found[0]) for g, found in known), details=details)
                place = space, seed, options.real
                course = follow(contender, problem, [found[0] for _, found in asked], answer, place)
                there = run(contender, space, seed, options.real)
                rows.append({"space": space, "driver": contender.name, "seed": seed, "evaluations": course.done})
                rows[-1] |= {"real": course.curve[-1][1], "stand-in": there.curve[-1][1], "error": course.error}
                print(rows[-1], file=sys.stderr, flush=True)
    return rows


if __name__ == "__main__":
    sys.exit(main())
