"""The documents of lm-eval's tasks, and the requests that lm-eval makes of them.

What lm-eval would do with every document of a task is done once, in one order and with one seed, so that the
few-shot examples of a document do not depend on which other documents are asked. lm-eval's own cache of
requests stays off: its key names neither the data nor the subset.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from evomerge.errors import TaskError
from evomerge.evaluation.harness_loading import Loaded, Source, content, evaluating, quiet, reason
from evomerge.evaluation.request import Request
from evomerge.value import digest, value

#: The seed of the few-shot examples: lm-eval's default (`simple_evaluate`, `fewshot_random_seed`).
SEED = 1234
#: The longest answer where a task names none: what lm-eval's HFLM takes.
LONGEST = 256
#: What lm-eval calls the longest answer, in its order of precedence (`normalize_gen_kwargs`).
LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
#: Arguments of generation that change nothing under greedy decoding; those with a value only at that value.
IDLE: Mapping[str, float | None] = {"top_p": None, "top_k": None, "num_beams": 1, "repetition_penalty": 1}


@value
class Document:
    """One document of a task, as it is asked.

    Attributes:
        leaf: the name of the task that it belongs to, which for a group is one of its tasks.
        part: the task's own split that it stands in; "" for the one that lm-eval evaluates.
        place: its number there.
        content: the content address of all its fields.
        question: the content address of what it asks without few-shot examples, the choices in any order.
        requests: what to ask, in the order of lm-eval's instances.
        choices: for multiple choice that the task grades in the usual way, the texts whose lengths normalise.
        gold: the places of the right ones among `choices`.
    """

    leaf: str
    part: str
    place: int
    content: str
    question: str
    requests: tuple[Request, ...]
    choices: tuple[str, ...] = ()
    gold: tuple[int, ...] = ()


def documents(loaded: Loaded, leaf: str, part: str, place: str) -> list[Document]:
    """Return all documents of a leaf's part, with the requests that lm-eval makes of them.

    Raises:
        TaskError: if lm-eval cannot make them, or makes what greedy decoding cannot answer.
    """
    task = loaded.tasks[leaf]
    shots = task.get_config("num_fewshot")
    where = f"{place}: task {leaf!r} of lm-eval"
    docs = loaded.part(leaf, part)
    with quiet(), evaluating(task, part):
        _check_examples(task, shots, where)
        try:
            made = _instances(task, shots, loaded.source)
            plain = _instances(task, 0, loaded.source) if shots else made
        except Exception as problem:  # the task's own templates and functions may raise anything
            raise TaskError(f"{where}: its prompts cannot be made ({reason(problem)})") from None
        finally:
            task.set_config("num_fewshot", shots)
        return [
            _document(task, leaf, part, doc_id, docs[doc_id], made[doc_id], plain[doc_id], where) for doc_id in made
        ]


def _check_examples(task: Any, shots: int, where: str) -> None:
    """Refuse few-shot examples out of the documents that are asked: they show the answers of other items."""
    config = task.config
    asked = (config.test_split or "test") if task.has_test_docs() else (config.validation_split or "validation")
    if shots and _examples_split(task) == asked:
        raise TaskError(
            f"{where}: takes its few-shot examples from {asked!r}, the documents that it asks, so that prompts show "
            "the answers of other items; set num_fewshot: 0, or fewshot_split in a YAML of your own (include_path)"
        )


def _examples_split(task: Any) -> str | None:
    """Return the split that few-shot examples come from, by lm-eval's rule; None if they are written out."""
    config, shots = task.config, task.config.fewshot_config
    if shots is not None and shots.split is not None:
        return str(shots.split)
    if shots is not None and shots.samples is not None:
        return None
    if task.has_training_docs():
        return config.training_split or "training"
    if task.has_validation_docs():
        return config.validation_split or "validation"
    return config.test_split or "test"


def _instances(task: Any, shots: int, source: Source) -> dict[int, list[Any]]:
    """Return lm-eval's instances of all documents, by document, with `shots` examples each."""
    task.set_config("num_fewshot", shots)
    task.set_fewshot_seed(seed=SEED)
    render = _renderer(source.tokenizer) if source.tokenizer is not None else None
    task.build_all_requests(
        rank=0,
        world_size=1,
        system_instruction=source.system_instruction,
        apply_chat_template=render is not None,
        chat_template=render,
    )
    found: dict[int, list[Any]] = {}
    for instance in task.instances:
        found.setdefault(instance.doc_id, []).append(instance)
    return {doc_id: sorted(group, key=lambda instance: instance.idx) for doc_id, group in found.items()}


def _renderer(folder: str) -> Callable[..., str]:
    """Return the function that sets messages in a tokenizer's chat template, as HFLM does."""
    from jinja2.exceptions import TemplateError
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)

    def render(messages: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        settings = {
            "tokenize": False,
            "add_generation_prompt": add_generation_prompt,
            "continue_final_message": not add_generation_prompt,
        }
        try:
            return str(tokenizer.apply_chat_template(messages, **settings))
        except TemplateError:  # some templates know no system message
            rest = [message for message in messages if message["role"] != "system"]
            return str(tokenizer.apply_chat_template(rest, **settings))

    return render


def _document(
    task: Any, leaf: str, part: str, doc_id: int, doc: Any, made: list[Any], plain: list[Any], where: str
) -> Document:
    where = f"{where}, document {doc_id}"
    choices, gold = _choices(task, doc)
    asked = tuple(_request(instance, where) for instance in made)
    bare = asked if made is plain else tuple(_request(instance, where) for instance in plain)
    return Document(
        leaf=leaf,
        part=part,
        place=doc_id,
        content=content(doc),
        question=_question(bare, task.OUTPUT_TYPE == "multiple_choice"),
        requests=asked,
        choices=choices,
        gold=gold,
    )


def _question(requests: Sequence[Request], choices: bool) -> str:
    """Return the content address of a question: its answer does not belong to it, if it has a prompt."""
    asked = {(r.context, r.continuation if choices or not r.context else "") for r in requests}
    return digest(sorted(asked))


def _choices(task: Any, doc: Any) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Return a document's choices and the right ones, as lm-eval's `process_results` finds them."""
    usual = hasattr(task, "multiple_input") and not callable(task.config.process_results)
    if not usual or task.OUTPUT_TYPE != "multiple_choice":
        return (), ()
    choices = tuple(task.doc_to_choice(doc))
    gold = task.doc_to_text(doc) if task.multiple_input else task.doc_to_target(doc)
    places = [choices.index(one) if one in choices else -1 if isinstance(one, str) else one for one in _listed(gold)]
    return choices, tuple(place for place in places if isinstance(place, int) and 0 <= place < len(choices))


def _listed(gold: Any) -> list[Any]:
    return list(gold) if isinstance(gold, list) else [gold]


def _request(instance: Any, where: str) -> Request:
    """Return the request that asks what an instance of lm-eval asks; too long a text loses its beginning, as there."""
    kind, arguments = instance.request_type, instance.args
    texts = arguments[:1] if kind == "generate_until" else arguments
    odd = next((text for text in texts if not isinstance(text, str)), None)
    if odd is not None:
        raise TaskError(
            f"{where}: asks with {type(odd).__name__} {str(odd)[:40]!r} where a text belongs; mend the task"
        )
    if kind == "loglikelihood":
        context, continuation = arguments
        if not continuation:
            raise TaskError(f"{where}: has an empty text to score, which has no likelihood; mend the task or its data")
        return Request(kind="loglikelihood", context=context, continuation=continuation, cut=True)
    if kind == "loglikelihood_rolling":
        if not arguments[0]:
            raise TaskError(f"{where}: is an empty text, which has no likelihood; mend the task or its data")
        return Request(kind="rolling", continuation=arguments[0])
    if kind == "generate_until":
        stop, most = _greedy(arguments[1], where)
        return Request(kind="generate", context=arguments[0], stop=stop, most=most, cut=True)
    raise TaskError(f"{where}: asks by {kind!r}, which the engine does not know; choose another task")


def _greedy(given: Mapping[str, Any], where: str) -> tuple[tuple[str, ...], int]:
    """Return stop texts and longest answer of greedy decoding, or refuse: what samples has no one answer."""
    sample, heat = given.get("do_sample"), float(given.get("temperature") or 0.0)
    if sample or (sample is None and heat > 0):
        raise TaskError(
            f"{where}: samples its answers (do_sample: {sample}, temperature: {heat:g}); a score needs one answer: "
            "set gen_kwargs: {do_sample: false, temperature: 0}"
        )
    for key, found in given.items():
        if key in ("until", "do_sample", "temperature", *LENGTHS):
            continue
        if key not in IDLE or (IDLE[key] is not None and found != IDLE[key]):
            raise TaskError(f"{where}: sets {key}: {found!r} for generation, which greedy decoding does not know")
    stops = given.get("until") or []
    lengths = [given[key] for key in LENGTHS if given.get(key) is not None]
    return tuple(text for text in ([stops] if isinstance(stops, str) else stops) if text), int([*lengths, LONGEST][0])
