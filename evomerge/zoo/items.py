"""The questions of the tiny model family: three tasks of graded difficulty whose answers are known exactly.

Every skill is a pair of pure functions, one that draws a prompt and one that answers it; a task is a list of
such skills by difficulty, 1 (easiest) to 5.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

LETTERS = "abcdefghij"
DIGITS = "0123456789"
CHOICES = 4
DIFFICULTIES = (1, 2, 3, 4, 5)
SPLITS: Mapping[str, int] = {"search": 640, "validation": 320, "test": 400}

Draw = Callable[[random.Random, int], str]
Solve = Callable[[str], str]


def _digits(rng: random.Random, length: int) -> str:
    return "".join(rng.choice(DIGITS) for _ in range(length))


def _letters(rng: random.Random, length: int) -> str:
    return "".join(rng.choice(LETTERS) for _ in range(length))


def draw_arithmetic(rng: random.Random, difficulty: int) -> str:
    """Draws a question whose answer is one digit: ``max4729=``, ``23*58=``, ``81-46=``, ``37+52=``, ``6*7+15=``.

    The five forms are the five difficulties; all but the first ask for the last digit of the result.
    """
    if difficulty == 1:
        return f"max{_digits(rng, 4)}="
    if difficulty == 5:
        return f"{_digits(rng, 1)}*{_digits(rng, 1)}+{_digits(rng, 2)}="
    operation = {2: "*", 3: "-", 4: "+"}[difficulty]
    return f"{_digits(rng, 2)}{operation}{_digits(rng, 2)}="


def solve_arithmetic(prompt: str) -> str:
    """Answers a question of `draw_arithmetic`: the largest digit, or the result modulo 10."""
    body = prompt.removesuffix("=")
    if body.startswith("max"):
        return max(body.removeprefix("max"))
    if "*" in body:
        left, _, rest = body.partition("*")
        factor, _, summand = rest.partition("+")
        return str((int(left) * int(factor) + int(summand or "0")) % 10)
    if "+" in body:
        left, _, right = body.partition("+")
        return str((int(left) + int(right)) % 10)
    left, _, right = body.partition("-")
    return str((int(left) - int(right)) % 10)


def draw_strings(rng: random.Random, difficulty: int) -> str:
    """Draws ``rev:bead=`` or ``sort:bead=`` with difficulty + 2 letters."""
    return f"{rng.choice(('rev', 'sort'))}:{_letters(rng, difficulty + 2)}="


def solve_strings(prompt: str) -> str:
    """Answers a question of `draw_strings`: the letters backwards, or in the order of the alphabet."""
    operation, _, letters = prompt.removesuffix("=").partition(":")
    return letters[::-1] if operation == "rev" else "".join(sorted(letters))


def draw_cipher(rng: random.Random, difficulty: int) -> str:
    """Draws ``bead>3=``, difficulty + 1 letters and a shift of 1 to 5."""
    return f"{_letters(rng, difficulty + 1)}>{rng.randint(1, 5)}="


def solve_cipher(prompt: str) -> str:
    """Answers a question of `draw_cipher`: every letter that many places on, round the ten letters."""
    letters, _, shift = prompt.removesuffix("=").partition(">")
    return "".join(LETTERS[(LETTERS.index(letter) + int(shift)) % len(LETTERS)] for letter in letters)


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What a task asks: how a question is drawn, how it is answered, and how an answer is graded."""

    headline: str
    draw: Draw
    solve: Solve
    kind: str
    max_new_tokens: int = 0


SUBJECTS: Mapping[str, Subject] = {
    "arithmetic": Subject(
        headline="The last digit of sums, differences and products, and the greatest of four digits; four choices.",
        draw=draw_arithmetic,
        solve=solve_arithmetic,
        kind="multiple_choice",
    ),
    "strings": Subject(
        headline="Reverse or sort three to seven letters.",
        draw=draw_strings,
        solve=solve_strings,
        kind="generate",
        max_new_tokens=8,
    ),
    "cipher": Subject(
        headline="Shift two to six letters along the alphabet by one to five places.",
        draw=draw_cipher,
        solve=solve_cipher,
        kind="generate",
        max_new_tokens=8,
    ),
}

Row = dict[str, str | int | list[str]]


def make_rows(task: str, seed: int) -> list[Row]:
    """Makes the items of a task: unique prompts, every difficulty equally often in every split.

    Args:
        task: A name of `SUBJECTS`.
        seed: Seed of the family; each task draws from its own stream of it.

    Returns:
        One row per item, 1,360 in all, split by split in the order of `SPLITS`.
    """
    rng = random.Random(f"{seed}/items/{task}")
    subject = SUBJECTS[task]
    seen: set[str] = set()
    rows: list[Row] = []
    for split, size in SPLITS.items():
        for place in range(size):
            difficulty = DIFFICULTIES[place % len(DIFFICULTIES)]
            prompt = subject.draw(rng, difficulty)
            while prompt in seen:
                prompt = subject.draw(rng, difficulty)
            seen.add(prompt)
            answer = subject.solve(prompt)
            row: Row = {"id": f"{task}-{len(rows):04d}", "split": split, "prompt": prompt, "answer": answer}
            if subject.kind == "multiple_choice":
                row["choices"] = _choices(rng, answer)
            row["difficulty"] = difficulty
            rows.append(row)
    return rows


def _choices(rng: random.Random, answer: str) -> list[str]:
    choices = [answer, *rng.sample([digit for digit in DIGITS if digit != answer], CHOICES - 1)]
    rng.shuffle(choices)
    return choices


def draw_lesson(
    rng: random.Random, shares: Mapping[str, float], difficulties: Sequence[int], held_out: Collection[str]
) -> tuple[str, str]:
    """Draws one training example, prompt and answer, that is no item of any task.

    Args:
        rng: Stream of the course.
        shares: Weight of each task in the course.
        difficulties: Those that the course teaches.
        held_out: Prompts of all items.
    """
    subject = SUBJECTS[rng.choices(list(shares), weights=list(shares.values()))[0]]
    while True:
        prompt = subject.draw(rng, rng.choice(difficulties))
        if prompt not in held_out:
            return prompt, subject.solve(prompt)


def write_task(directory: Path, task: str, rows: list[Row], data: str) -> None:
    """Writes the declaration ``<task>.yaml`` of a task and its items.

    Args:
        directory: Folder of the declaration.
        task: A name of `SUBJECTS`.
        rows: The items.
        data: Path of the items' file, relative to `directory`.
    """
    subject = SUBJECTS[task]
    lines = [f"# {subject.headline}", f"kind: {subject.kind}", f"data: {data}", 'prompt: "{prompt}"', "answer: answer"]
    if subject.kind == "multiple_choice":
        lines.append("choices: choices")
    lines.append("split: split")
    if subject.kind == "generate":
        lines += [f"max_new_tokens: {subject.max_new_tokens}", 'stop: ["\\n"]', "grade: exact"]
    path = directory / data
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (directory / f"{task}.yaml").write_text("\n".join(lines) + "\n", encoding="utf-8")
