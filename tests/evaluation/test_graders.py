"""Graders: what texts and choices are worth, by hand-made cases and laws."""

import doctest
import math
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evomerge.errors import TaskError
from evomerge.evaluation import entrypoint, graders, language
from evomerge.evaluation.entrypoint import find_entry
from evomerge.evaluation.graders import Grader, chosen, last_number, read_grader
from evomerge.evaluation.items import Item
from evomerge.evaluation.language import find_language, pieces

finite = st.floats(-50.0, 0.0)


def item(*answers: str, **row: object) -> Item:
    """Return an item with these answers and row."""
    return Item(id="a", prompt="?", answers=answers, row=row)


def grader(data: object, near: Path = Path()) -> Grader:
    """Return the grader that a task file would describe so."""
    return read_grader(data, near, "task.yaml.grade")


@pytest.mark.parametrize(
    ("data", "text", "answers", "expected"),
    [
        ("exact", "4", ["4"], 1.0),
        ("exact", "4", [" 4\n"], 1.0),
        ("exact", "44", ["4"], 0.0),
        ("exact", "", ["4"], 0.0),
        ("exact", "four", ["4", "four"], 1.0),
        ("exact", "Four", ["four"], 0.0),
        ({"regex": r"#### (\d+)"}, "so #### 4 it is", ["4"], 1.0),
        ({"regex": r"#### (\d+)"}, "so 4 it is", ["4"], 0.0),
        ({"regex": r"\d+"}, "it is 4", ["5", "4"], 1.0),
        ({"regex": r"\d+"}, "it is 5, not 4", ["4"], 0.0),
        ({"regex": r"x(\d)?"}, "x", ["4"], 0.0),
        ("last_number", "7 + 8 = 15.", ["15"], 1.0),
        ("last_number", "15, or 16", ["15"], 0.0),
        ("last_number", "15, or 16", ["15", "16.00"], 1.0),
        ("last_number", "about 1,234.50 $", ["#### 1234.5"], 1.0),
        ("last_number", "none", ["0"], 0.0),
        ("contains", "It is  PARIS,\nof course", ["paris"], 1.0),
        ("contains", "New\n york", ["Boston", "new York"], 1.0),
        ("contains", "Pari", ["paris"], 0.0),
        ("contains", "STRASSE", ["straße"], 1.0),
        ({"all": ["contains", {"regex": "^(Paris)"}]}, "Paris", ["Paris"], 1.0),
        ({"all": ["contains", {"regex": "^(Paris)"}]}, "In Paris", ["Paris"], 0.0),
        ({"any": ["contains", {"regex": "^(Paris)"}]}, "In Paris", ["Paris"], 1.0),
        ({"mean": ["contains", "exact"]}, "In Paris", ["Paris"], 0.5),
        ({"mean": ["contains", "exact"], "weights": [3, 1]}, "In Paris", ["Paris"], 0.75),
        ({"mean": ["exact", {"all": ["exact", "contains"]}]}, "Paris", ["Paris"], 1.0),
    ],
)
def test_texts_are_graded_as_by_hand(data, text, answers, expected):
    """Whole texts, patterns, numbers, parts, several answers, and graders joined."""
    asked = item(*answers)
    made = grader(data)
    made.check(asked)

    assert made.compares
    assert expected == made.grade(text, asked)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1,000 = 1000.0", 1000),
        ("-5", -5),
        ("x=-5", -5),
        ("x = - 5", 5),
        ("it fell by \u22123.5 degrees", Fraction(-7, 2)),
        ("8-5", 5),
        ("(8)-5", 5),
        ("+5", 5),
        ("3/4", Fraction(3, 4)),
        ("-3 / 4", Fraction(-3, 4)),
        (r"\frac{3}{4}", Fraction(3, 4)),
        ("$-\\dfrac{3}{4}$", Fraction(-3, 4)),
        ("1.5/2", Fraction(3, 4)),
        ("on 3/4/2020", 2020),
        ("1/0", None),
        (".5", Fraction(1, 2)),
        ("version 1.2.3", 3),
        ("1.", 1),
        ("2.50 %", Fraction(5, 2)),
        ("6.02e23", 602 * 10**21),
        ("1E-3", Fraction(1, 1000)),
        ("1e99999999", 99999999),
        ("1,2,3", 3),
        ("12,34", 34),
        ("1,234,567", 1234567),
        ("\uff11\uff12", 12),
        ("word", None),
        ("", None),
        ("9" * 5000, None),
    ],
)
def test_numbers_are_read_as_people_write_them(text, expected):
    """Signs, thousands, decimals, fractions, exponents; what cannot be read is no number, and takes no time."""
    assert last_number(text) == expected


@given(
    st.integers(-(10**12), 10**12), st.integers(0, 6), st.sampled_from(["{}", "so {}.", "7 of 8 are ({})", "= {} €"])
)
def test_a_number_is_found_however_it_is_written(units, places, sentence):
    """With and without commas, in any sentence, the number is exactly what was written."""
    number = Decimal(units).scaleb(-places)

    for written in (f"{number:f}", f"{number:,f}"):
        assert last_number(sentence.format(written)) == Fraction(number)


@given(st.lists(finite, min_size=2, max_size=6), st.data())
def test_a_choice_is_right_when_no_other_is_as_likely(scores, data):
    """The value is 1 exactly for the one greatest, the margin is the gap to the best other, and order is nothing."""
    right = data.draw(st.integers(0, len(scores) - 1))
    lengths = data.draw(st.lists(st.integers(1, 9), min_size=len(scores), max_size=len(scores)))
    others = [score / n for k, (score, n) in enumerate(zip(scores, lengths, strict=True)) if k != right]

    found = chosen(scores, right, lengths)

    assert found.margin == scores[right] / lengths[right] - max(others)
    assert found.value == float(all(scores[right] / lengths[right] > other for other in others))
    assert found == chosen(scores[::-1], len(scores) - 1 - right, lengths[::-1])
    assert chosen(scores, right) == chosen(scores, right, [1] * len(scores))


def test_the_length_of_a_choice_can_turn_the_grade():
    """A long right choice that is less likely in all, but likelier by character, is right by length only."""
    assert chosen([-4.0, -3.0], 0).value == 0.0
    assert chosen([-4.0, -3.0], 0, [4, 2]) == graders.Response(value=1.0, margin=0.5)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("exakt", "did you mean 'exact'?"),
        ({"regexp": "x"}, "did you mean 'regex'?"),
        ({}, "known: exact, last_number"),
        (3, "known: exact, last_number"),
        ({"regex": "("}, "not a regular expression"),
        ({"regex": 3}, "expected str"),
        ({"regex": "x", "then": "exact"}, "grade.then: unknown key beside 'regex'"),
        ({"all": []}, "expected a list of graders"),
        ({"all": ["exact", "contain"]}, "grade.all[1]: 'contain' is not known; did you mean 'contains'?"),
        ({"any": "exact"}, "expected a list of graders"),
        ({"all": ["exact"], "weights": [1]}, "unknown key beside 'all'"),
        ({"mean": ["exact"], "weights": [1, 2]}, "one weight for each of 1 graders"),
        ({"mean": ["exact", "contains"], "weights": [1, -1]}, "not negative"),
        ({"mean": ["exact"], "weights": [0]}, "needs one weight"),
        ({"python": "grader.py"}, "expected FILE.py:FUNCTION"),
        ({"python": 3}, "expected FILE.py:FUNCTION"),
        ({"python": "none.py:f"}, "none.py: cannot be read"),
        ({"python": "evomerge.none:f"}, "module 'evomerge.none' cannot be found"),
        ({"python": "evomerge.none.none:f"}, "cannot be found"),
        ({"python": "sys:exit"}, "cannot be found as a file of Python"),
        ({"python": "evomerge.value:digesd"}, "did you mean 'digest'?"),
    ],
)
def test_a_grader_that_is_none_is_one_line(data, message, tmp_path):
    """Each mistake names its place and the nearest that is known."""
    with pytest.raises(TaskError) as problem:
        grader(data, tmp_path)

    assert message in str(problem.value)
    assert str(problem.value).startswith("task.yaml.grade")
    assert "\n" not in str(problem.value)


PYTHON = """
import math
print("read" if __name__ == "evomerge_grader" else "", end="")
HALF: float = 0.5
TWICE = 2 * HALF

def near(text, row):
    return 1 - abs(len(text) - row["wanted"]) / 10

def fails(text, row):
    raise KeyError("a\\nb")

class Sized(float):
    pass
"""


@pytest.fixture
def code(tmp_path) -> Path:
    """Return the file of a user's graders."""
    (tmp_path / "grader.py").write_text(PYTHON, encoding="utf-8")
    return tmp_path / "grader.py"


def test_a_function_grades_text_and_row(code):
    """Its number is the value, it needs no answers, and the item's row is kept for it."""
    made = grader({"python": "grader.py:near"}, code.parent)
    made.check(item())

    assert (made.compares, made.wants_row) == (False, True)
    assert made.grade("abcd", item(wanted=7)) == pytest.approx(0.7)


def test_a_function_may_be_that_of_a_module(code, monkeypatch):
    """A module that Python can import is named without its file."""
    monkeypatch.syspath_prepend(code.parent)

    assert grader({"python": "grader:near"}).grade("abcd", item(wanted=4)) == 1.0


@pytest.mark.parametrize(
    ("result", "expected"),
    [("True", 1.0), ("False", 0.0), ("0.25", 0.25), ("1", 1.0), ("__import__('numpy').float32(0.5)", 0.5)],
)
def test_a_function_may_return_any_number_in_bounds(tmp_path, result, expected):
    """Bools, whole numbers and numpy's count as numbers."""
    (tmp_path / "g.py").write_text(f"def f(text, row):\n    return {result}\n")

    assert expected == grader({"python": "g.py:f"}, tmp_path).grade("", item())


@pytest.mark.parametrize("result", ["1.01", "-0.1", "float('nan')", "float('inf')", "None", "'1'", "[1]", "10**400"])
def test_a_function_that_returns_anything_else_is_one_line(tmp_path, result):
    """What is no number in [0, 1] is refused with file, function and what it was."""
    (tmp_path / "g.py").write_text(f"def f(text, row):\n    return {result}\n")

    with pytest.raises(TaskError, match=r"function 'f' of .*g\.py returned .*a number in \[0, 1\]") as problem:
        grader({"python": "g.py:f"}, tmp_path).grade("", item())
    assert "\n" not in str(problem.value)


def test_what_a_function_raises_is_one_line(code):
    """A user's mistake names the file, the function and the exception."""
    with pytest.raises(TaskError, match=r"function 'fails' of .*grader\.py failed \(KeyError: ") as problem:
        grader({"python": "grader.py:fails"}, code.parent).grade("", item())
    assert "\n" not in str(problem.value)


def test_a_users_file_is_not_run_before_it_grades(tmp_path):
    """Reading a task finds the function in the file's text; a file that cannot be loaded says so when it grades."""
    (tmp_path / "g.py").write_text("from math import sqrt as f\nraise OSError('no disk')\n")

    made = grader({"python": "g.py:f"}, tmp_path)

    with pytest.raises(TaskError, match=r"g\.py: cannot be loaded \(OSError: no disk\)"):
        made.grade("", item())


def test_a_file_that_is_not_python_is_one_line(tmp_path):
    """A syntax error names the file."""
    (tmp_path / "g.py").write_text("def f(:\n")

    with pytest.raises(TaskError, match=r"g\.py: not Python"):
        grader({"python": "g.py:f"}, tmp_path)


def test_a_grader_is_its_files_content_wherever_it_lies(code, tmp_path):
    """A copy elsewhere is the same grader, a changed file another one."""
    other = tmp_path / "other"
    other.mkdir()
    (other / "grader.py").write_text(PYTHON, encoding="utf-8")
    made, copied = grader({"python": "grader.py:near"}, tmp_path), grader({"python": "grader.py:near"}, other)
    (other / "grader.py").write_text(PYTHON + "\n", encoding="utf-8")

    assert made == copied
    assert made != grader({"python": "grader.py:near"}, other)
    with pytest.raises(TaskError, match="has changed since the task was read"):
        copied.grade("abcd", item(wanted=4))


def test_all_that_a_file_defines_at_its_top_can_be_named(code):
    """Functions, classes, imports and assigned names, which may be made by other functions."""
    for name in ("near", "Sized", "math", "HALF", "TWICE"):
        assert find_entry(f"grader.py:{name}", code.parent).function == name


class Kana:
    """Tells Japanese, which has kana, from English, which has not."""

    labels = ("en", "ja")

    def classify(self, text: str) -> tuple[str, float]:
        """Return language and confidence."""
        return ("ja" if any("\u3040" <= letter <= "\u30ff" for letter in text) else "en"), 1.0


@pytest.fixture
def kana(monkeypatch) -> None:
    """Tell languages by their letters, without the library."""
    monkeypatch.setattr(language, "_identifier", Kana)
    monkeypatch.setattr(language.importlib.metadata, "version", lambda name: "1")


JAPANESE, ENGLISH = "これはにほんごのぶんしょうです。", "This is a sentence in the English language. "


@pytest.mark.usefixtures("kana")
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (JAPANESE, 1.0),
        (ENGLISH, 0.0),
        (ENGLISH + JAPANESE, 15 / 50),
        (f"{JAPANESE}\n{ENGLISH}\n{JAPANESE}", 30 / 65),
        (JAPANESE + ENGLISH + ENGLISH, 15 / 85),
        ("", 0.0),
        ("12 + 30 = 42", 0.0),
    ],
)
def test_the_share_of_a_language_is_that_of_its_letters(text, expected):
    """Each sentence counts by its letters (15 of the Japanese one, 35 of the other); no letters are no language."""
    made = grader({"language": "ja"})
    made.check(item())

    assert made.grade(text, item()) == pytest.approx(expected)
    assert (made.compares, made.wants_row) == (False, False)


@pytest.mark.usefixtures("kana")
def test_right_and_in_a_language():
    """Joined by `all`, a right answer in the wrong language is worth nothing, and so is a wrong one in the right."""
    made = grader({"all": ["last_number", {"language": "ja"}]})

    assert [made.grade(text, item("4")) for text in (f"{JAPANESE} 4", f"{JAPANESE} 5", f"{ENGLISH} 4")] == [1, 0, 0]


@pytest.mark.usefixtures("kana")
def test_an_unknown_language_is_one_line():
    """What a code looks like is said."""
    with pytest.raises(TaskError, match=r"grade\.language: language 'jp' is not known; give an ISO 639-1 code"):
        grader({"language": "jp"})


def test_without_the_library_the_way_out_is_named(monkeypatch):
    """A missing optional dependency says how to install it."""
    language._identifier.cache_clear()
    monkeypatch.setitem(__import__("sys").modules, "py3langid.langid", None)

    with pytest.raises(TaskError, match=r"grade\.language: .*pip install 'evomerge\[language\]'"):
        grader({"language": "de"})


def test_languages_are_told():
    """The library knows sentences of several languages, and half of a mixed text."""
    pytest.importorskip("py3langid")
    texts = {
        "de": "Der Zug nach Hamburg fährt heute leider nicht, weil es in der Nacht geschneit hat.",
        "en": "The train to the coast does not run today because it has been snowing all night.",
        "fr": "Le train pour la côte ne roule pas aujourd'hui, parce qu'il a neigé toute la nuit.",
        "ja": "昨夜から雪が降っているので、今日は電車が動きません。",
    }

    for code, own in texts.items():
        made = find_language(code)
        assert [made.grade(text, item()) for text in texts.values()] == [float(text == own) for text in texts.values()]
    assert find_language("de").grade(f"{texts['de']} {texts['en']}", item()) == pytest.approx(0.5, abs=0.05)


@given(st.text(alphabet="ab .!?\n。é", max_size=200))
def test_pieces_are_the_text(text):
    """Put together the pieces are the text, and all are long enough, or it is one piece."""
    found = list(pieces(text))

    assert "".join(found) == text
    assert len(found) == 1 or all(len(piece.encode()) >= language.PIECE for piece in found)


def test_the_examples_in_docstrings_are_true():
    """What the modules show is what they do."""
    for module in (graders, entrypoint, language):
        assert doctest.testmod(module).failed == 0


def test_no_grade_is_out_of_bounds():
    """A mean of values in [0, 1] by any weights stays there."""
    made = grader({"mean": ["exact", "contains"], "weights": [0.1, 0.2]})

    assert made.grade("a", item("a")) <= 1.0
    assert math.isclose(made.grade("ab", item("a")), 2 / 3)
