"""The README of a model folder: what it is made of, how to load it, and where its sources came from."""

from collections.abc import Sequence
from pathlib import Path

from evomerge.hops import described, stack_of
from evomerge.models.locate import called
from evomerge.recipe import Recipe, models_of


def model_card(title: str, made: str, more: Sequence[str], recipe: Recipe) -> str:
    """Return the text of a README with the metadata that the hub reads.

    Args:
        title: its heading.
        made: who made it of what, a sentence without its end.
        more: lines that stand before the part on use.
        recipe: what the model is built from.
    """
    sources = models_of(recipe).values()
    return "\n".join(
        [
            "---",
            "library_name: transformers",
            "tags: [merge, evomerge]",
            "---",
            "",
            f"# {title}",
            "",
            f"{made}. `recipe.yaml` says exactly how; digest `{recipe.digest}`.",
            "",
            *more,
            "## Use",
            "",
            "```python",
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            "",
            'model = AutoModelForCausalLM.from_pretrained(".")  # this folder',
            'tokenizer = AutoTokenizer.from_pretrained(".")',
            "```",
            "",
            "## Sources",
            "",
            "| name | model | fingerprint |",
            "|---|---|---|",
            *(f"| {source.name} | {called(Path(source.path))} | `{source.fingerprint}` |" for source in sources),
            "",
        ]
    )


def blended(recipe: Recipe) -> str:
    """Return what a recipe stacks, or what it blends and how, as the noun of a sentence."""
    stack = stack_of(recipe)
    if stack is not None:
        return f"stack of {len(stack.hops)} layers ({described(stack)})"
    methods = dict.fromkeys(_worded(blend.method) for blend in recipe.blends())
    base = f", with task vectors taken from {recipe.base.name}" if recipe.base else ""
    return f"merge of {', '.join(source.name for source in recipe.sources)} by {', '.join(methods)}{base}"


def _worded(method: str) -> str:
    """Return a method as a sentence names it."""
    return f"the stages `{method}`" if "|" in method else method
