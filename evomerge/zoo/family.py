"""The models of the tiny families: Llamas of 0.2 or 0.3 M parameters, their tokenizer, and how they are trained."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from evomerge.zoo.items import DIFFICULTIES, DIGITS, draw_lesson

if TYPE_CHECKING:
    import torch
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

HIDDEN, INTERMEDIATE, HEADS = 64, 172, 4
POSITIONS = 64
SPECIAL = ("<pad>", "<bos>", "<eos>", "<unk>")
PAD, BOS, EOS, UNK = range(4)
CHARACTERS = DIGITS + "abcdefghijklmnopqrstuvwxyz" + "+-*>:=, "
VOCABULARY: Mapping[str, int] = {token: place for place, token in enumerate((*SPECIAL, *CHARACTERS))}
IGNORED = -100  # transformers' label for positions without loss


@dataclass(frozen=True, kw_only=True)
class Course:
    """What a model of the family is trained on, for how many steps, and at which peak learning rate.

    The base learns the three easier difficulties of every task; an expert learns all five of its own. They differ in
    steps and rate, so that their task vectors differ in length and no one weight suits all.

    Attributes:
        shares: Weight of each task in the lessons.
        steps: Number of steps.
        rate: Peak learning rate.
        difficulties: Those that are taught.
        batch: Lessons per step.
        free: Layers that learn; all else, embedding and head included, stays as it was. None: everything learns.
        skip: Probability that a layer is left out of a step (Fan 2020, LayerDrop), so that the model works without it.
        replay: Probability that a lesson is drawn as the base's are.
    """

    shares: Mapping[str, float]
    steps: int
    rate: float
    difficulties: Sequence[int] = DIFFICULTIES
    batch: int = 64
    free: Collection[int] | None = None
    skip: float = 0.0
    replay: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Family:
    """Models of one depth: a base and its experts, each with its course; the base comes first."""

    layers: int
    courses: Mapping[str, Course]


COURSES: Mapping[str, Course] = {
    "base": Course(
        shares={"arithmetic": 0.6, "strings": 0.15, "cipher": 0.25}, difficulties=(1, 2, 3), steps=800, rate=4e-3
    ),
    "arithmetic": Course(shares={"arithmetic": 1}, steps=650, rate=1.2e-3),
    "strings": Course(shares={"strings": 1}, steps=350, rate=1e-3),
    "cipher": Course(shares={"cipher": 1}, steps=250, rate=1e-3),
}


DEEP: Mapping[str, Course] = {
    "base": Course(
        shares={"arithmetic": 0.65, "strings": 0.2, "cipher": 0.15},
        difficulties=(1, 2, 3),
        steps=2000,
        rate=4e-3,
        skip=0.12,
    ),
    "arithmetic": Course(shares={"arithmetic": 1}, steps=2000, rate=4e-3, free=(3, 4, 5), skip=0.05, replay=0.4),
    "strings": Course(shares={"strings": 1}, steps=600, rate=1.5e-3, free=(0, 1), skip=0.2, replay=0.3),
    "cipher": Course(shares={"cipher": 1}, steps=600, rate=3e-3, free=(0, 1, 2), skip=0.1, replay=0.3),
}

#: The family that is merged in the quickstart, whose experts forget, and the one whose layers are stacked.
FAMILIES: Mapping[str, Family] = {
    "models": Family(layers=4, courses=COURSES),
    "deep": Family(layers=6, courses=DEEP),
}


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Makes the tokenizer: one token per character, ``<bos>`` put first by default."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel(dict(VOCABULARY), unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", BOS)]
    )
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        padding_side="left",
        model_max_length=POSITIONS,
        clean_up_tokenization_spaces=False,
    )


def make_model(seed: int, layers: int) -> LlamaForCausalLM:
    """Makes an untrained model in float32 whose weights depend on `seed` and depth alone."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        max_position_embeddings=POSITIONS,
        tie_word_embeddings=False,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )
    with torch.random.fork_rng(devices=[]):  # the constructor draws from the global stream; leave it as it was
        model = LlamaForCausalLM(config)
    stream = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, weight in sorted(model.named_parameters()):
            if weight.ndim == 2:
                weight.normal_(0.0, 1.0 / math.sqrt(HIDDEN) / 2.0, generator=stream)
    return model


def train(
    model: LlamaForCausalLM,
    course: Course,
    base: Course,
    seed: int,
    name: str,
    held_out: Collection[str],
    say: Callable[[str], None],
) -> None:
    """Trains `model` in place, with AdamW, a short warm-up and a linear decay, on answers only.

    The same model, courses, seed and name give the same weights on one machine.

    Args:
        model: What is trained.
        course: How.
        base: The course whose lessons are replayed.
        seed: Seed of the lessons and of the layers that are left out.
        name: What the streams of random numbers are called.
        held_out: Prompts that are in no lesson.
        say: Called with one line of progress at a time.
    """
    import torch

    rng, depth = random.Random(f"{seed}/course/{name}"), random.Random(f"{seed}/depth/{name}")
    layers = model.model.layers
    if course.free is not None:
        model.requires_grad_(False)
        for place in course.free:
            layers[place].requires_grad_(True)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=course.rate, betas=(0.9, 0.99), weight_decay=0.01)
    warmup = max(1, course.steps // 20)
    model.train()
    for step in range(course.steps):
        for group in optimizer.param_groups:
            group["lr"] = course.rate * min((step + 1) / warmup, (course.steps - step) / (course.steps - warmup + 1))
        lessons = [_draw(rng, course, base, held_out) for _ in range(course.batch)]
        ids, mask, labels = lesson_tensors(lessons)
        model.model.layers = torch.nn.ModuleList(layers[place] for place in draw_depth(depth, course, len(layers)))
        loss = model(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        if (step + 1) % 100 == 0 or step + 1 == course.steps:
            say(f"{name}: step {step + 1} of {course.steps}, loss {loss.item():.3f}")
    model.model.layers = layers
    model.eval()


def _draw(rng: random.Random, course: Course, base: Course, held_out: Collection[str]) -> tuple[str, str]:
    """Draws a lesson of a course, or one of the base's that is replayed."""
    taught = base if course.replay and rng.random() < course.replay else course
    return draw_lesson(rng, taught.shares, taught.difficulties, held_out)


def draw_depth(rng: random.Random, course: Course, depth: int) -> list[int]:
    """Draws the layers of one step: each is skipped with the probability of the course, but not all that learn."""
    free = range(depth) if course.free is None else course.free
    while True:
        kept = [place for place in range(depth) if rng.random() >= course.skip]
        if any(place in free for place in kept):
            return kept


def lesson_tensors(lessons: Collection[tuple[str, str]]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Turns prompts and answers into ids, attention mask and labels, each of shape (lessons, longest + 2)."""
    import torch

    width = max(len(prompt) + len(answer) for prompt, answer in lessons) + 2
    ids = torch.full((len(lessons), width), PAD)
    labels = torch.full((len(lessons), width), IGNORED)
    for row, (prompt, answer) in enumerate(lessons):
        tokens = [BOS, *(VOCABULARY[character] for character in prompt + answer), EOS]
        ids[row, : len(tokens)] = torch.tensor(tokens)
        start = 1 + len(prompt)
        labels[row, start : len(tokens)] = ids[row, start : len(tokens)]
    return ids, (ids != PAD).long(), labels


def build_models(
    directory: Path,
    family: Family,
    seed: int,
    held_out: Collection[str],
    say: Callable[[str], None],
    *,
    steps: int | None = None,
) -> None:
    """Trains the base and, each from the base as it was written, the experts; writes one folder per model.

    Args:
        directory: Folder of the models.
        family: What is trained.
        seed: Seed of the initial weights and of the lessons.
        held_out: Prompts that are in no lesson.
        say: Called with one line of progress at a time.
        steps: Number of steps of every course, in place of its own.
    """
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the order of the sums in a matrix product, and so the weights, depends on it
    try:
        base: dict[str, torch.Tensor] = {}
        first = next(iter(family.courses.values()))
        for name, course in family.courses.items():
            model = make_model(seed, family.layers)
            if base:
                model.load_state_dict(base)
            train(model, course if steps is None else replace(course, steps=steps), first, seed, name, held_out, say)
            save_model(model.to(torch.bfloat16), directory / name)
            base = base or model.state_dict()
    finally:
        torch.set_num_threads(threads)


def save_model(model: LlamaForCausalLM, directory: Path) -> None:
    """Writes a bfloat16 model and its tokenizer as a folder that transformers loads."""
    from safetensors.torch import save

    directory.mkdir(parents=True, exist_ok=True)
    model.config.dtype = model.dtype
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(directory)
    if model.generation_config is not None:
        model.generation_config.save_pretrained(directory)
    make_tokenizer().save_pretrained(directory)
    weights = {key: weight.contiguous() for key, weight in model.state_dict().items()}
    (directory / "model.safetensors").write_bytes(save(weights, metadata={"format": "pt"}))
