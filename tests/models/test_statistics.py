"""Statistics of tiny models against other ways to compute them: captured rows, torch.func, finite differences, laws."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2LMHeadModel, PreTrainedTokenizerFast
from transformers.pytorch_utils import Conv1D

from evomerge.errors import InvalidInput, ModelError
from evomerge.models import statistics
from evomerge.models.checkpoint import Checkpoint
from evomerge.models.statistics import KINDS, Statistics, digest_of
from tests.models.folders import edit_config, make_gpt2, make_llama

TEXTS = ("abcdefghij", "kl", "mnopqrabcabdd", "hgfedcba", "aabbccddeeffgghh", "qponm")
LETTERS = "abcdefghijklmnopqr"
FAMILY = ("llama", "tied", "gpt2")
LAYER = "model.layers.1"


def speak(folder: Path) -> Path:
    """Give a folder a tokenizer with one token per letter."""
    tokenizer = Tokenizer(
        models.WordLevel({"<pad>": 0, "<eos>": 1} | {c: i + 2 for i, c in enumerate(LETTERS)}, "<pad>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return the folders of a Llama, a tied Llama and a GPT-2 (tied, linear modules transposed)."""
    root = tmp_path_factory.mktemp("live")
    make_llama(root / "llama", 1, layers=2)
    make_llama(root / "tied", 2, tied=True, layers=2)
    make_gpt2(root / "gpt2", 3)
    return {name: speak(root / name) for name in FAMILY}


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a file of a few texts of different lengths."""
    return write(tmp_path_factory.mktemp("texts") / "texts.txt", *TEXTS)


@pytest.fixture(scope="module")
def made(folders: dict[str, Path], texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Statistics:
    """Return statistics of the three models, which the tests that only read share."""
    return Statistics(folders, texts, tmp_path_factory.mktemp("cache"))


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Return a list to which every load of a live model adds its folder."""
    seen: list[Path] = []
    load = AutoModelForCausalLM.from_pretrained

    def counted(folder: Path, **options: Any) -> Any:
        seen.append(folder)
        return load(folder, **options)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", counted)
    return seen


def write(file: Path, *lines: str) -> Path:
    """Write lines and return the file."""
    file.write_text("".join(line + "\n" for line in lines))
    return file


def live(folder: Path, dtype: torch.dtype = torch.float64) -> tuple[Any, list[Tensor]]:
    """Return a model in double precision and the tokens of each text, as a user would load them."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    return model, [torch.tensor([tokenizer(text)["input_ids"]]) for text in TEXTS]


def modules(model: nn.Module, checkpoint: Checkpoint) -> dict[str, nn.Module]:
    """Return the modules that have a matrix and inputs, by the name of the matrix in the folder."""
    return {
        f"{path}.weight": module
        for path, module in model.named_modules()
        if type(module) in (nn.Linear, Conv1D) and f"{path}.weight" in checkpoint.names
    }


def rows(model: nn.Module, ids: list[Tensor], chosen: dict[str, nn.Module]) -> dict[str, tuple[Tensor, Tensor]]:
    """Return all input and output rows of modules over all texts."""
    caught: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in chosen}
    handles = [
        module.register_forward_hook(lambda _, x, y, name=name: caught[name].append((x[0][0], y[0])))
        for name, module in chosen.items()
    ]
    with torch.no_grad():
        for one in ids:
            model(one)
    for handle in handles:
        handle.remove()
    return {
        name: (torch.cat([x for x, _ in pairs]), torch.cat([y for _, y in pairs])) for name, pairs in caught.items()
    }


def got(made: Statistics, source: str, kind: str, name: str) -> Tensor:
    """Return a statistic that must be there, in double precision."""
    found = made.tensor(source, kind, name)
    assert found is not None
    assert found.dtype == torch.float32
    return found.double()


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-5) -> bool:
    """Tell whether two tensors are of one shape and nearly equal, relative to the greatest value."""
    alike = found.shape == expected.shape
    return alike and float((found - expected).abs().max()) <= tolerance * float(expected.abs().max())


# --- inputs of modules


@pytest.mark.parametrize("source", FAMILY)
def test_inputs_are_those_that_the_modules_see(source: str, folders: dict[str, Path], made: Statistics) -> None:
    """Gram matrix, squares and magnitudes are those of all input rows captured in one heap in float64."""
    model, ids = live(folders[source])
    checkpoint = Checkpoint(folders[source])
    linears = modules(model, checkpoint)
    assert len(linears) == {"llama": 15, "tied": 14, "gpt2": 8}[source]

    for name, (x, _) in rows(model, ids, linears).items():
        assert close(got(made, source, "gram", name), x.T @ x / len(x))
        assert close(got(made, source, "square", name), x.square().mean(0))
        assert close(got(made, source, "activation", name), x.abs().mean(0))
        assert close(got(made, source, "gram", name).diagonal(), got(made, source, "square", name))


@pytest.mark.parametrize("source", FAMILY)
def test_norms_have_input_channels_and_embeddings_have_none(
    source: str, folders: dict[str, Path], made: Statistics
) -> None:
    """A norm's weight has the magnitudes of its input but no matrix; embeddings, biases and tied heads have neither."""
    model, ids = live(folders[source])
    checkpoint = Checkpoint(folders[source])
    norms = {f"{path}.weight": module for path, module in model.named_modules() if "Norm" in type(module).__name__}
    assert len(norms) == 5

    for name, (x, _) in rows(model, ids, norms).items():
        assert close(got(made, source, "activation", name), x.abs().mean(0))
        assert made.tensor(source, "gram", name) is None
    for name in set(checkpoint.names) - set(norms) - set(modules(model, checkpoint)):
        assert [made.tensor(source, kind, name) for kind in ("activation", "square", "gram", "gram_out")] == [None] * 4


@pytest.mark.parametrize("source", FAMILY)
def test_gram_matrices_reproduce_the_least_squares_fit(source: str, folders: dict[str, Path], made: Statistics) -> None:
    """A module's weights solve the normal equations of its inputs and outputs (RegMean of one model is that model)."""
    model, ids = live(folders[source])
    solved = 0
    for name, (x, y) in rows(model, ids, modules(model, Checkpoint(folders[source]))).items():
        bias = getattr(model.get_submodule(name.removesuffix(".weight")), "bias", None)
        product = x.T @ (y if bias is None else y - bias.detach()) / len(x)
        weight = model.get_parameter(name).detach()
        weight = weight if source == "gpt2" else weight.T
        gram = got(made, source, "gram", name)
        assert close(gram @ weight, product)
        if torch.linalg.cond(gram) < 1e3:
            assert close(torch.linalg.solve(gram, product), weight, tolerance=1e-3)
            solved += 1
    assert solved >= (0 if source == "gpt2" else 3)  # what a LayerNorm gives out has one direction less


def test_modules_with_one_input_share_one_matrix(made: Statistics) -> None:
    """Of a layer's seven matrices four Gram matrices are stored: q, k, v share one, and so do gate and up."""
    with safe_open(made.ensure("llama", "gram"), framework="pt") as file:
        assert len(file.keys()) == 2 * 4 + 1
    q, k, v = (made.tensor("llama", "gram", f"{LAYER}.self_attn.{part}_proj.weight") for part in "qkv")
    assert q is not None
    assert k is not None
    assert v is not None
    assert torch.equal(q, k)
    assert torch.equal(q, v)


def test_texts_count_by_their_tokens(folders: dict[str, Path], tmp_path: Path, made: Statistics) -> None:
    """The matrix over all texts is the mean of each text's own, weighted by tokens: nothing is padded."""
    name = f"{LAYER}.mlp.down_proj.weight"
    total = torch.zeros(24, 24, dtype=torch.float64)
    for text in TEXTS:
        alone = Statistics(folders, write(tmp_path / f"{text}.txt", text), tmp_path / "cache")
        total += len(text) * got(alone, "llama", "gram", name)

    assert close(got(made, "llama", "gram", name), total / sum(map(len, TEXTS)))


@pytest.mark.parametrize("kind", ["activation", "fisher"])
def test_long_texts_are_cut(kind: str, folders: dict[str, Path], texts: Path, tmp_path: Path) -> None:
    """Taking four tokens of each text is taking texts cut to four; a model's positions are a limit of their own."""
    cut = write(tmp_path / "cut.txt", *(text[:4] for text in TEXTS))
    short = Statistics(folders, texts, tmp_path / "cache", tokens=4)
    long = Statistics(folders, write(tmp_path / "long.txt", "abcd" * 50), tmp_path / "cache", say=(said := []).append)

    name = "transformer.h.1.mlp.c_fc.weight"
    expected = Statistics(folders, cut, tmp_path / "other").tensor("gpt2", kind, name)
    found = short.tensor("gpt2", kind, name)
    assert found is not None
    assert expected is not None
    assert torch.equal(found, expected)
    long.ensure("gpt2", kind)
    assert "1 texts, 32 tokens" in said[0]


# --- losses and gradients


def nll(model: Any, parameters: dict[str, Tensor], ids: Tensor, labels: Tensor | None = None) -> Tensor:
    """Return the negative log-likelihood of a text as a function of the parameters."""
    logits = torch.func.functional_call(model, parameters, (ids,)).logits[0, :-1]
    labels = ids[0, 1:] if labels is None else labels
    return -logits.log_softmax(1)[torch.arange(len(labels)), labels].sum()


def free(model: Any) -> dict[str, Tensor]:
    """Return a model's parameters as plain tensors; a tied one once."""
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("source", FAMILY)
def test_loss_is_that_of_transformers(source: str, folders: dict[str, Path], made: Statistics) -> None:
    """The loss is the mean over tokens of what the model says given labels; it is asked for under any name."""
    model, ids = live(folders[source])
    with torch.no_grad():
        each = [(float(model(one, labels=one).loss), one.shape[1] - 1) for one in ids]

    found = got(made, source, "loss", "")

    assert found.shape == ()
    assert float(found) == pytest.approx(sum(loss * n for loss, n in each) / sum(n for _, n in each), rel=1e-6)
    assert made.tensor(source, "loss", "model.norm.weight") == made.tensor(source, "loss", "")


@pytest.mark.parametrize("source", FAMILY)
def test_fisher_is_the_mean_squared_gradient_of_each_text(
    source: str, folders: dict[str, Path], made: Statistics
) -> None:
    """Every tensor of the folder, a tied one with both its uses, agrees with torch.func in float64."""
    model, ids = live(folders[source])
    gradients = [torch.func.grad(lambda p, one=one: nll(model, p, one))(free(model)) for one in ids]

    assert set(gradients[0]) == set(Checkpoint(folders[source]).names)
    for name in gradients[0]:
        expected = torch.stack([gradient[name].square() for gradient in gradients]).mean(0)
        assert close(got(made, source, "fisher", name), expected, tolerance=1e-4)


def test_labels_of_the_model_give_the_true_fisher(folders: dict[str, Path], tmp_path: Path) -> None:
    """Drawn labels average to the expectation over the model's own distribution, within six standard errors."""
    n, name = 150, f"{LAYER}.self_attn.o_proj.weight"
    texts = write(tmp_path / "texts.txt", *(["ab"] * n))
    drawn = Statistics({"a": folders["llama"]}, texts, tmp_path / "cache", labels="model", seed=1)
    model, _ = live(folders["llama"])
    ids = torch.tensor([[2, 3]])
    chances = model(ids).logits[0, 0].detach().softmax(0)
    squares = torch.stack(
        [
            torch.func.grad(lambda p, y=y: nll(model, p, ids, torch.tensor([y])))(free(model))[name].square()
            for y in range(20)
        ]
    )
    mean = torch.einsum("y,yij->ij", chances, squares)
    error = ((torch.einsum("y,yij->ij", chances, squares.square()) - mean.square()) / n).sqrt()

    found = got(drawn, "a", "fisher", name)

    assert bool(((found - mean).abs() <= 6 * error).all())
    again = Statistics({"a": folders["llama"]}, texts, tmp_path / "again", labels="model", seed=1)
    assert torch.equal(got(again, "a", "fisher", name), found)
    other = Statistics({"a": folders["llama"]}, texts, tmp_path / "cache", labels="model", seed=2)
    assert not torch.equal(got(other, "a", "fisher", name), found)


@pytest.mark.parametrize("source", FAMILY)
def test_sensitivity_is_the_slope_of_the_loss(source: str, folders: dict[str, Path], made: Statistics) -> None:
    """Scaling one tensor by 1 ± h changes the loss by 2h times its sensitivity (central difference)."""
    model, ids = live(folders[source])
    parameters, h = free(model), 1e-2  # an RMSNorm rounds to float32, which a smaller step would show
    count = sum(one.shape[1] - 1 for one in ids)

    for name in sorted(parameters)[::3]:
        up, down = (
            sum(float(nll(model, parameters | {name: parameters[name] * scale}, one)) for one in ids) / count
            for scale in (1 + h, 1 - h)
        )
        found = got(made, source, "sensitivity", name)
        assert found.shape == ()
        assert float(found) == pytest.approx(abs(up - down) / (2 * h), rel=1e-3, abs=1e-6)


def test_sensitivity_is_equal_along_a_linear_path(made: Statistics) -> None:
    """Tensors that scale the same product are equally sensitive: up and down, values and outputs, norm and head."""
    for one, other in (
        (f"{LAYER}.mlp.up_proj.weight", f"{LAYER}.mlp.down_proj.weight"),
        (f"{LAYER}.self_attn.v_proj.weight", f"{LAYER}.self_attn.o_proj.weight"),
        ("model.norm.weight", "lm_head.weight"),
    ):
        assert float(got(made, "llama", "sensitivity", one)) == pytest.approx(
            float(got(made, "llama", "sensitivity", other)), rel=1e-4
        )


@pytest.mark.parametrize("source", ["llama", "gpt2"])
def test_output_gradients_are_those_of_an_offset(source: str, folders: dict[str, Path], made: Statistics) -> None:
    """The gradient with respect to an output is that of a zero added to it; the head has no such matrix."""
    model, ids = live(folders[source])
    for name, module in modules(model, Checkpoint(folders[source])).items():
        if name == "lm_head.weight":
            assert made.tensor(source, "gram_out", name) is None
            continue
        caught = []
        for one in ids:
            outputs = module.weight.shape[1 if source == "gpt2" else 0]
            offset = torch.zeros(1, one.shape[1], outputs, dtype=torch.float64, requires_grad=True)
            handle = module.register_forward_hook(lambda _, __, y, offset=offset: y + offset)
            caught.append(torch.autograd.grad(nll(model, free(model), one), offset)[0][0])
            handle.remove()
        g = torch.cat(caught)
        assert close(got(made, source, "gram_out", name), g.T @ g / len(g), tolerance=1e-4)


# --- memory, cache and keys


@pytest.mark.parametrize(("kind", "memory", "passes"), [("gram", 5000, 7), ("gram_out", 9000, 5), ("fisher", 6000, 9)])
def test_passes_do_not_change_a_bit(
    kind: str, memory: int, passes: int, folders: dict[str, Path], texts: Path, tmp_path: Path, made: Statistics
) -> None:
    """With memory for a few sums only, each group has a shard, and every value is the same to the last bit."""
    said: list[str] = []
    tight = Statistics(folders, texts, tmp_path, memory=memory, say=said.append)

    for name in Checkpoint(folders["llama"]).names:
        found, expected = tight.tensor("llama", kind, name), made.tensor("llama", kind, name)
        assert (found is None) == (expected is None)
        assert found is None or expected is None or torch.equal(found, expected)

    shards = [file for file in sorted(tmp_path.iterdir()) if f"-of-{passes}." in file.name]
    assert len(said) == 1
    assert f"{passes} passes for {kind}" in said[0]
    assert len(shards) == passes
    assert all(2 * sum(tensor.nbytes for tensor in load_file(file).values()) <= memory for file in shards)


def test_one_sum_beyond_the_memory_is_refused(folders: dict[str, Path], texts: Path, tmp_path: Path) -> None:
    """A matrix that alone is too large is named with its bytes: 24 x 24 of float64."""
    tight = Statistics(folders, texts, tmp_path, memory=4000)

    with pytest.raises(
        InvalidInput, match=r"'llama'.*'gram' of 'model.*down_proj.weight' needs 4608 .* memory is 4000"
    ):
        tight.ensure("llama", "gram")


def test_the_cache_saves_the_work(folders: dict[str, Path], texts: Path, tmp_path: Path, loads: list[Path]) -> None:
    """A model is loaded once for all kinds of one pass, and never for what is there, in this process or the next."""
    first = Statistics(folders, texts, tmp_path)
    files = [first.ensure("llama", kind) for kind in ("activation", "square", "loss", "activation")]
    assert len(loads) == 1
    first.ensure("gpt2", "loss")
    assert loads == [folders["llama"], folders["gpt2"]]

    second = Statistics(folders, texts, tmp_path)

    assert [second.ensure("llama", kind) for kind in ("activation", "square", "loss", "activation")] == files
    assert torch.equal(
        got(second, "llama", "square", "model.norm.weight"), got(first, "llama", "square", "model.norm.weight")
    )
    assert len(loads) == 2
    with safe_open(files[0], framework="pt") as file:
        assert file.metadata()["key"] == files[0].stem
    assert Checkpoint(folders["llama"]).fingerprint in files[0].stem


def test_what_matters_is_in_the_key(folders: dict[str, Path], texts: Path, tmp_path: Path) -> None:
    """Other texts, tokens, examples or drawn labels are another key and provenance; what is not read is not."""
    other = write(tmp_path / "other.txt", *TEXTS[:-1], "aaaa")

    def key(kind: str, file: Path = texts, **settings: Any) -> tuple[str, str]:
        made = Statistics(folders, file, tmp_path, **settings)
        made._compute = lambda *_: None  # type: ignore[method-assign]  # only the name is asked for
        assert made.provenance == digest_of(file, **settings)
        return made.ensure("llama", kind).name, made.provenance

    plain = key("fisher")
    changed = [
        key("fisher", other), key("fisher", tokens=9), key("fisher", examples=3), key("fisher", labels="model"),
        key("fisher", labels="model", seed=7),
    ]  # fmt: skip
    assert len({plain, *changed}) == len({name for name, _ in changed} | {plain[0]}) == 6
    assert key("fisher", seed=7) == plain
    assert key("gram", labels="model")[0] == key("gram")[0]
    assert key("fisher", other, examples=5)[0] == key("fisher", examples=5)[0]
    rows = write(tmp_path / "texts.jsonl", *(json.dumps({"text": text, "id": 1}) for text in TEXTS), "")
    assert key("fisher", rows) == plain


def test_another_tokenizer_is_another_key(folders: dict[str, Path], texts: Path, tmp_path: Path) -> None:
    """The tokenizer is no part of a model's fingerprint, but it decides what the model reads."""
    make_llama(tmp_path / "a", 1, layers=2)
    files = [
        Statistics({"a": folder}, texts, tmp_path)._file("a", "loss") for folder in (folders["llama"], tmp_path / "a")
    ]

    assert files[0].name[:16] == files[1].name[:16]
    assert files[0] != files[1]


def test_an_interruption_leaves_nothing_that_looks_complete(
    folders: dict[str, Path], texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, made: Statistics
) -> None:
    """Stopped while the third shard is written, or killed with a partial file left, a kind is computed again."""
    tight = Statistics({"llama": folders["llama"]}, texts, tmp_path, memory=5000)
    written = 0

    def stop(tensors: dict[str, Tensor], file: Path, **options: Any) -> None:
        nonlocal written
        written += 1
        save_file(tensors, file, **options)
        if written == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(statistics, "save_file", stop)
    with pytest.raises(KeyboardInterrupt):
        tight.ensure("llama", "gram")
    final = tight._file("llama", "gram")
    assert len(list(tmp_path.iterdir())) == 2
    assert not final.exists()
    final.with_name(f".{final.name}.partial-1").write_bytes(b"cut off")

    name = f"{LAYER}.mlp.down_proj.weight"
    assert torch.equal(got(tight, "llama", "gram", name), got(made, "llama", "gram", name))
    assert final.exists()


def test_nothing_global_changes(folders: dict[str, Path], texts: Path, tmp_path: Path) -> None:
    """Drawn labels leave the global random stream where it was."""
    before = torch.get_rng_state()
    Statistics(folders, texts, tmp_path, labels="model").ensure("llama", "fisher")
    assert torch.equal(torch.get_rng_state(), before)


# --- names


def test_names_are_those_of_the_folder(texts: Path, tmp_path: Path) -> None:
    """A folder saved from the bare model has names without prefix, and its statistics have them too."""
    make_gpt2(tmp_path / "whole", 0)
    GPT2LMHeadModel.from_pretrained(tmp_path / "whole").transformer.save_pretrained(tmp_path / "bare")
    speak(tmp_path / "whole"), speak(tmp_path / "bare")
    edit_config(tmp_path / "bare", architectures=["GPT2LMHeadModel"])
    made = Statistics({name: tmp_path / name for name in ("whole", "bare")}, texts, tmp_path / "cache")

    assert "h.0.mlp.c_fc.weight" in Checkpoint(tmp_path / "bare").names
    for kind in ("activation", "gram", "fisher"):
        found = got(made, "bare", kind, "h.0.mlp.c_fc.weight")
        assert torch.equal(found, got(made, "whole", kind, "transformer.h.0.mlp.c_fc.weight"))


def test_a_head_stored_beside_its_embedding_has_the_same_fisher(texts: Path, tmp_path: Path) -> None:
    """Where the config is silent and head and embedding are equal, the live model ties them: both get all of it."""
    make_gpt2(tmp_path / "a", 0)
    tensors = load_file(tmp_path / "a" / "model.safetensors")
    twice = tensors | {"lm_head.weight": tensors["transformer.wte.weight"].clone()}
    save_file(twice, tmp_path / "a" / "model.safetensors", metadata={"format": "pt"})
    edit_config(speak(tmp_path / "a"), tie_word_embeddings=None)
    made = Statistics({"a": tmp_path / "a"}, texts, tmp_path / "cache")

    head, embedding = (got(made, "a", "fisher", f"{name}.weight") for name in ("lm_head", "transformer.wte"))
    assert torch.equal(head, embedding)
    assert float(head.sum()) > 0


def test_tensors_without_a_parameter_are_said(texts: Path, tmp_path: Path) -> None:
    """A floating point tensor that the live model has no parameter for is named, and has no statistic."""
    make_llama(tmp_path / "a", 0, layers=1)
    file = speak(tmp_path / "a") / "model.safetensors"
    save_file(load_file(file) | {"model.extra.weight": torch.ones(3)}, file, metadata={"format": "pt"})
    said: list[str] = []
    made = Statistics({"a": tmp_path / "a"}, texts, tmp_path / "cache", say=said.append)

    assert made.tensor("a", "fisher", "model.extra.weight") is None
    assert "source 'a': 1 tensors, the first is 'model.extra.weight', have no statistics" in said[0]


# --- what is refused


def damage(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Change the tensors of a folder."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture
def fragile(tmp_path: Path) -> Path:
    """Return the folder of a Llama that a test may damage."""
    make_llama(tmp_path / "a", 0, layers=1)
    return speak(tmp_path / "a")


def test_unknown_names_are_answered_with_the_nearest(made: Statistics) -> None:
    """A kind, source or tensor that there is not is refused with the nearest that there is."""
    with pytest.raises(InvalidInput, match="no kind 'grams'; did you mean 'gram'"):
        made.ensure("llama", "grams")
    with pytest.raises(InvalidInput, match="no source 'lama'; did you mean 'llama'"):
        made.ensure("lama", "gram")
    with pytest.raises(ModelError, match=r"no tensor 'model.norm.weigh'; did you mean 'model.norm.weight'"):
        made.tensor("llama", "gram", "model.norm.weigh")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"labels": "mode"}, "labels must be 'text' or 'model', got 'mode'"),
        ({"tokens": 1}, "tokens must be at least 2, got 1"),
        ({"examples": 0}, "examples must be at least 1, got 0"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, Any], message: str, texts: Path, tmp_path: Path) -> None:
    """Settings are checked before anything is read or computed."""
    with pytest.raises(InvalidInput, match=message):
        Statistics({}, texts, tmp_path, **settings)
    with pytest.raises(InvalidInput, match=message):
        digest_of(texts, **settings)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.txt", None, "none.txt: texts cannot be read"),
        ("empty.txt", b"\n  \n", "empty.txt: has no texts"),
        ("latin.txt", b"\xe9t\xe9\n", "latin.txt: texts cannot be read"),
        ("odd.jsonl", b'{"text": "a"}\n{"txt": "b"}\n', "odd.jsonl: object 2 is no JSON object with a field 'text'"),
        ("broken.jsonl", b'{"text": \n', "broken.jsonl: object 1 is no JSON object"),
        ("list.jsonl", b"[1]\n", "list.jsonl: object 1 is no JSON object"),
    ],
)
def test_texts_that_cannot_be_used_are_refused(name: str, content: bytes | None, message: str, tmp_path: Path) -> None:
    """A missing, empty or broken file of texts is one line that names it."""
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InvalidInput, match=message):
        Statistics({}, tmp_path / name, tmp_path)


def test_texts_must_have_something_to_predict(folders: dict[str, Path], tmp_path: Path) -> None:
    """Texts of one token are left out, and refused if there are no others."""
    name = f"{LAYER}.mlp.up_proj.weight"
    found, expected = (
        Statistics(folders, write(tmp_path / f"{i}.txt", *some), tmp_path).tensor("llama", "gram", name)
        for i, some in enumerate((("a", "bcd"), ("bcd",)))
    )
    assert found is not None
    assert expected is not None
    assert torch.equal(found, expected)
    with pytest.raises(InvalidInput, match="no text has two tokens"):
        Statistics(folders, write(tmp_path / "one.txt", "a", "b"), tmp_path).ensure("llama", "gram")


def test_folders_without_what_is_needed_are_refused(fragile: Path, texts: Path, tmp_path: Path) -> None:
    """A tensor that the live model needs, a vocabulary that fits and a tokenizer are each missed in one line."""
    made = Statistics({"a": fragile}, texts, tmp_path / "cache")
    edit_config(fragile, vocab_size=9)
    with pytest.raises(ModelError, match="transformers cannot load it"):
        made.ensure("a", "gram")
    edit_config(fragile, vocab_size=20)
    whole = (fragile / "model.safetensors").read_bytes()
    damage(fragile, lambda tensors: tensors.pop("model.norm.weight"))
    with pytest.raises(ModelError, match=r"lacks tensor 'model.norm.weight'"):
        Statistics({"a": fragile}, texts, tmp_path / "cache").ensure("a", "gram")
    (fragile / "model.safetensors").write_bytes(whole)
    tokenizer = json.loads((fragile / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["a"] = 33
    (fragile / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ModelError, match="its tokenizer has token 33, but vocab_size is 20"):
        Statistics({"a": fragile}, texts, tmp_path / "cache").ensure("a", "gram")
    (fragile / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match="has no tokenizer"):
        Statistics({"a": fragile}, texts, tmp_path / "cache").ensure("a", "gram")


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_values_that_are_not_finite_are_refused(kind: str, fragile: Path, texts: Path, tmp_path: Path) -> None:
    """A model whose weights overflow is refused with source, kind and tensor, and no file is left."""
    damage(fragile, lambda tensors: tensors["model.layers.0.self_attn.q_proj.weight"].fill_(float("nan")))
    made = Statistics({"a": fragile}, texts, tmp_path / "cache")

    said = "activation" if kind in ("square", "loss") else kind  # of one pass, the first
    with pytest.raises(ModelError, match=rf"source 'a': statistic '{said}' of '.*' is not finite"):
        made.ensure("a", kind)
    assert not made._file("a", kind).exists()


def test_a_broken_file_is_named(folders: dict[str, Path], texts: Path, tmp_path: Path) -> None:
    """A file that cannot be read, or whose shard is gone, is named with the way out."""
    made = Statistics(folders, texts, tmp_path, memory=5000)
    file = made.ensure("llama", "gram")
    for shard in tmp_path.glob("*.1-of-*"):
        shard.unlink()
    with pytest.raises(ModelError, match=r"cannot be read .*; remove it to compute it again"):
        made.tensor("llama", "gram", "model.layers.0.self_attn.q_proj.weight")
    file.write_bytes(b"nothing")
    with pytest.raises(ModelError, match=file.name):
        Statistics(folders, texts, tmp_path).tensor("llama", "gram", "model.norm.weight")
