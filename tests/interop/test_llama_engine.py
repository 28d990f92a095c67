"""`--engine llama.cpp` against the PyTorch reference, against our CPU engine on the same file, and against itself.

Runs on whichever bindings are installed: llama-cpp-python, which has to be built, on nano as it is, and
ik-llama-cpp-python, a ready wheel of a fork that takes the published head sizes only, on nano widened to them.
"""

import importlib.util
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from tolerance import U_BF16
from wide_nano import write_wide_nano

import kimi_lite
from kimi_lite import doctor
from kimi_lite.__main__ import main
from kimi_lite.api import Model
from kimi_lite.errors import DoesNotFitError, KimiLiteError, ModelFileError, UsageError
from kimi_lite.formats.gguf_file import mmproj_beside
from kimi_lite.quantize.convert import quantize
from kimi_lite.runtime.engine import BaseEngine, Engine
from kimi_lite.runtime.image_cache import ImageCache
from kimi_lite.runtime.llama_bindings import IK_LLAMA, LLAMA, Bindings, bindings
from kimi_lite.runtime.llama_engine import LlamaEngine
from kimi_lite.runtime.reference.evaluate import held_out
from kimi_lite.runtime.reference.model import KimiVL, load
from kimi_lite.runtime.reference.pictures import scene
from kimi_lite.runtime.reference.tasks import Draw, text_sample
from kimi_lite.runtime.sampling import SamplingOptions
from kimi_lite.runtime.template import Message, render
from kimi_lite.runtime.vision import ImageEncoder

NANO = Path(kimi_lite.__file__).parent / "nano"
PACKED = NANO / "kimi-vl-nano-int4.gguf"
PACKAGES = [name for name in (LLAMA, IK_LLAMA) if importlib.util.find_spec(name)]
GREEDY = SamplingOptions()
LONG = 'Reverse "planet".'
COLOUR = "What colour is it?"
# How far llama.cpp's logits of a bf16 file may be from exact arithmetic, of their rms. Products round their activations,
# to bf16 or to something finer, and the cache is float16: four layers that count (those that widening adds give zeros)
# of eight products, and the head, each with an independent relative error of at most 2^-8, walk sqrt(33) of them far.
BOUND = 33**0.5 * U_BF16


@dataclass(frozen=True)
class Served:
    """A package and what it runs."""

    package: str
    checkpoint: Path
    files: dict[str, Path]

    def engine(self, to: str = "q8_0", **options: Any) -> LlamaEngine:
        return LlamaEngine(
            self.files[to], **{"context": 1024, "threads": 1, "bindings": self.package, **options}
        )

    def model(self, to: str = "q8_0") -> Model:
        return Model(self.engine(to), self.encoder())

    def encoder(self) -> ImageEncoder:
        return ImageEncoder(mmproj_beside(self.files["q8_0"]), 256, ImageCache(None))


@pytest.fixture(scope="module", params=PACKAGES)
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp(request.param)
    wide = request.param == IK_LLAMA
    checkpoint = write_wide_nano(NANO, folder / "checkpoint") if wide else NANO
    files = {to: folder / f"{to}.gguf" for to in ("q8_0", "bf16")}
    for to, path in files.items():
        quantize(checkpoint, path, to=to)  # type: ignore[arg-type]
    yield Served(request.param, checkpoint, files)
    for path in folder.rglob("*"):  # widened files are large
        if path.is_file():
            path.unlink()


@pytest.fixture(scope="module")
def reference(served: Served) -> KimiVL:
    return load(served.checkpoint)[0]


@pytest.fixture(scope="module")
def talker(served: Served) -> Model:
    return served.model()


def reference_logits(model: KimiVL, ids: list[int]) -> NDArray[np.float32]:
    with torch.inference_mode():
        return np.asarray(model(torch.tensor(ids)[None])[0, -1].numpy())


def questions(n: int) -> list[str]:
    draw = Draw(np.random.default_rng(2027), held_out=True)
    return [text_sample(draw).turns[0].question for _ in range(n)]


def prompt(engine: BaseEngine, question: str) -> list[int]:
    return render([Message("user", question)], engine.tokenizer)


def rms(x: NDArray[Any]) -> float:
    return float(np.sqrt((x.astype(np.float64) ** 2).mean()))


def disc(colour: str, seed: int) -> Image.Image:
    return scene(colour, "circle", 1, (3, 3), np.random.default_rng(seed))[0]


def test_the_tests_have_something_to_run_on() -> None:
    assert PACKAGES


def test_the_checkpoint_computes_what_nano_does(reference: KimiVL, talker: Model) -> None:
    # Widened queries are rounded to bf16 once more, by at most 2^-8 in each of four layers; all else is exact.
    nano = load(NANO)[0]
    for question in questions(4):
        ids = prompt(talker.engine, question)
        expected = reference_logits(nano, ids)
        assert rms(reference_logits(reference, ids) - expected) <= 4**0.5 * U_BF16 * rms(expected)


def test_an_answer_keeps_to_a_schema_here_too(talker: Model) -> None:
    answer = talker.ask(
        "What is 38 + 47?",
        schema={"properties": {"sum": {"type": "integer"}}, "required": ["sum"], "type": "object"},
    )
    assert answer.thinking
    assert list(answer.data) == ["sum"]


def test_bf16_logits_are_the_references(served: Served, reference: KimiVL) -> None:
    # Inside an answer, one token less moves the logits further than rounding may.
    engine = served.engine("bf16")
    for question in questions(4):
        ids = prompt(engine, question)
        ids += engine.generate(ids, GREEDY, max_tokens=12)
        theirs, exact = engine.prefill(ids), reference_logits(reference, ids)
        assert (
            0 < rms(theirs - exact) < BOUND * rms(exact) < rms(reference_logits(reference, ids[:-1]) - exact)
        )


@pytest.mark.parametrize(("to", "n"), [("q8_0", 8), ("bf16", 2)])
def test_greedy_tokens_are_those_of_our_own_engine(
    served: Served, reference: KimiVL, to: str, n: int
) -> None:
    # Both round activations to int8 (ours always, llama.cpp in front of Q8_0), each in its own way. That may decide a
    # token only where, by exact arithmetic, the two are closer than four times what our engine's rounding costs there.
    theirs, ours = served.engine(to), Engine(served.files[to], context=1024)
    n_equal = 0
    for question in questions(n):
        ids = prompt(ours, question)
        a, b = (list(engine.generate(ids, GREEDY, max_tokens=48)) for engine in (theirs, ours))
        if a == b:
            n_equal += 1
            continue
        at = next(i for i, (x, y) in enumerate(zip([*a, -1], [*b, -1], strict=False)) if x != y)
        exact = reference_logits(reference, ids + b[:at])
        stop = max(exact[i] for i in ours.stop_ids)
        scores = [exact[tokens[at]] if at < len(tokens) else stop for tokens in (a, b)]
        cost = rms(ours.prefill(ids + b[:at]) - exact)
        assert abs(scores[0] - scores[1]) < 4 * cost, f"{question}: {a[at:][:1]} and {b[at:][:1]}"
    assert n_equal >= n - 1


def test_a_conversation_reuses_its_prefix_and_answers_as_from_scratch(served: Served, talker: Model) -> None:
    talker.clear()
    turns = ["What is 12 + 34?", LONG, "Who are you?"]
    for question in turns[:2]:
        list(talker.chat(question))
    events = list(talker.chat(turns[2]))
    assert events[-1].stats is not None
    assert events[-1].stats.reused > 40
    fresh = served.model()
    fresh.conversation.messages = talker.conversation.messages[:4]
    again = list(fresh.chat(turns[2]))
    assert [e.text for e in again] == [e.text for e in events]
    assert again[-1].stats is not None
    assert again[-1].stats.reused == 0


def test_an_edited_or_interrupted_prompt_leaves_nothing_behind(served: Served, reference: KimiVL) -> None:
    engine = served.engine("bf16")
    whole = prompt(engine, "What is 38 + 47?")
    whole += engine.generate(whole, GREEDY, max_tokens=12)
    changed = [*whole[:-6], *prompt(engine, "Spell: planet")[-5:], whole[-1]]
    for ids, n_shared in ((whole, len(whole) - 1), (changed, len(whole) - 6), (whole, len(whole) - 6)):
        engine.forward(whole[:20], [None] * 20, print)  # a step that Ctrl-C left unnoted
        logits, exact = engine.prefill(ids), reference_logits(reference, ids)
        assert engine.n_reused == n_shared
        assert rms(logits - exact) < BOUND * rms(exact)
    assert rms(exact - reference_logits(reference, changed)) > BOUND * rms(exact)


def test_thinking_budget_stop_texts_limits_and_seeds_are_kept(talker: Model) -> None:
    talker.clear()
    whole = talker.ask(LONG)
    assert whole.reason == "stop"
    assert whole.text.strip() == "tenalp"
    assert "letters" in whole.thinking
    talker.clear()
    events = list(talker.chat(LONG))
    assert "".join(e.text for e in events if e.kind == "answer") == whole.text
    short = talker.ask(LONG, thinking_budget=6)
    assert short.text
    assert len(short.thinking) < len(whole.thinking)
    assert talker.ask(LONG, stop=["al"]).text == "ten"
    assert talker.ask(LONG, max_tokens=6).reason == "length"

    def hot(seed: int) -> str:
        return talker.ask(LONG, options=SamplingOptions(temperature=3, seed=seed), max_tokens=30).thinking

    assert hot(1) == hot(1)
    assert len({hot(seed) for seed in range(5)}) > 1


def test_a_full_context_is_said(served: Served) -> None:
    model = Model(served.engine(context=30))
    assert model.ask(LONG).reason == "context"
    with pytest.raises(UsageError, match="the context holds 30"):
        model.ask("word " * 30)


def test_nano_sees_colours_and_shapes(served: Served, talker: Model) -> None:
    tasks = held_out(11, 10)
    samples = [*tasks["colour"][:6], *tasks["shape"][:6]]
    right = [
        talker.ask(s.turns[-1].question, images=s.pictures).text.strip() == s.turns[-1].answer
        for s in samples
    ]
    assert sum(right) >= 11  # the reference answers 99 %


def test_pictures_stand_where_they_were_put(served: Served, reference: KimiVL, talker: Model) -> None:
    # Three pictures in both orders, in steps that cut through them, against the reference with the same rows.
    assert talker.encoder is not None
    pictures = talker.encoder.encode([disc("red", 0), disc("blue", 1), disc("green", 2)])
    engine, seen = served.engine("bf16"), []
    engine.chunk = 7
    for images in (pictures, pictures[::-1]):
        ids = render([Message("user", (*images, COLOUR))], engine.tokenizer)
        rows = np.concatenate([image.rows_MD for image in images]).astype(np.float32)
        with torch.inference_mode():
            exact = reference(torch.tensor(ids)[None], torch.from_numpy(rows))[0, -1].numpy()
        assert rms(engine.prefill(ids, pictures=images) - exact) < BOUND * rms(exact)
        seen.append(exact)
    assert rms(seen[0] - seen[1]) > BOUND * rms(seen[0])


def test_a_later_turn_keeps_the_picture(talker: Model) -> None:
    talker.clear()

    def said(text: str, *images: object) -> tuple[str, kimi_lite.Stats]:
        events = list(talker.chat(text, images=images))
        assert events[-1].stats is not None
        return "".join(e.text for e in events if e.kind == "answer").strip(), events[-1].stats

    answer, stats = said(COLOUR, disc("green", 2))
    assert (answer, stats.image_tokens) == ("green", 9)
    assert said("What shape is it?")[1].reused > 9
    answer, stats = said(COLOUR, disc("red", 0))
    assert stats.reused > 2 * 9  # the first picture and its two questions


def test_the_command_prints_the_answer_alone(
    served: Served, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    defaults = LlamaEngine.__init__.__kwdefaults__
    assert defaults is not None
    monkeypatch.setitem(defaults, "bindings", served.package)  # the commands know llama-cpp-python alone
    disc("red", 0).save(tmp_path / "red.png")
    model = ["--engine", "llama.cpp", "-m", str(served.files["q8_0"]), "--context", "512"]
    monkeypatch.setattr("sys.stdin", SimpleNamespace(isatty=lambda: True))
    for arguments, answer in (([LONG], "tenalp"), (["--image", str(tmp_path / "red.png"), COLOUR], "red")):
        with pytest.raises(SystemExit) as end:
            main(["ask", "-q", *model, *arguments])
        out, err = capfd.readouterr()
        lines = out.splitlines()
        if served.package == IK_LLAMA:  # the fork reports a rearrangement of weights past its log
            lines = [line for line in lines if not line.startswith(("Computed", "====")) and line]
        assert (end.value.code, lines, err) == (0, [answer], "")


def test_what_llama_cpp_refuses_is_one_sentence_with_its_reason(served: Served, tmp_path: Path) -> None:
    path, data = tmp_path / "lost.gguf", served.files["q8_0"].read_bytes()
    assert data.count(b"blk.1.attn_norm.weight") == 1
    path.write_bytes(data.replace(b"blk.1.attn_norm.weight", b"blk.x.attn_norm.weight"))
    with pytest.raises(ModelFileError, match=r"llama\.cpp cannot load it .*blk\.1\.attn_norm\.weight"):
        LlamaEngine(path, bindings=served.package)


def test_a_step_that_fails_is_one_sentence(served: Served) -> None:
    engine = served.engine(context=64)
    engine.chunk = 50
    with pytest.raises(KimiLiteError, match=r"llama\.cpp stopped at token \d+ with code -?\d"):
        engine.append([5] * 1000)  # `prefill` would refuse it; llama.cpp rounds its cache up to 256 tokens
    assert engine.prefill(prompt(engine, "Hi")).shape == (engine.config.vocab_size,)


def test_a_context_that_memory_cannot_hold_is_refused_with_numbers(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))
    with pytest.raises(DoesNotFitError, match=r"1024 tokens \(its cache takes 0\.0 GB.*with --context"):
        served.engine()


def test_layers_for_a_card_need_a_build_with_a_backend(served: Served) -> None:
    assert not bindings(served.package).offloads()  # these tests run on processors
    with pytest.raises(UsageError, match=r"3 layers .* without a graphics backend"):
        served.engine(gpu_layers=3)
    with pytest.raises(UsageError, match="-1 layers"):
        served.engine(gpu_layers=-1)
    assert served.engine(gpu_layers=0).prefill([1, 2, 3]).shape == (1062,)


def test_a_card_takes_all_layers_or_as_many_as_are_asked_for(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A card that has no room for anything, as a build for one would report it.
    llama, asked = bindings(served.package), []

    def load(path: bytes, params: Any) -> None:
        asked.append(params.n_gpu_layers)
        llama.errors.append(
            "alloc_buffer: allocating 9216.00 MiB on device 0: cudaMalloc failed: out of memory\n"
        )

    monkeypatch.setattr(llama, "offloads", lambda: True)
    monkeypatch.setattr(llama.api, "llama_model_load_from_file", load)
    layers = 28 if served.package == IK_LLAMA else 5  # the output is one
    says = rf"no room for it \(allocating 9216.*it has {layers} layers .* fewer with --gpu-layers"
    for gpu_layers in (None, 5):
        with pytest.raises(DoesNotFitError, match=says):
            served.engine(gpu_layers=gpu_layers)
    with pytest.raises(ModelFileError, match="cannot load it"):
        served.engine(gpu_layers=0)
    assert asked[0] >= layers
    assert asked[1:] == [5, 0]


def test_doctor_names_the_bindings_or_how_to_get_them(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "LLAMA", served.package)
    lines = list(doctor.llama_report())
    assert bindings(served.package).version in lines[0]
    assert "no graphics card" in lines[1]
    assert "own image tower" in lines[2]

    def missing(package: str) -> Bindings:
        raise UsageError("it needs a package: pip install it")

    monkeypatch.setattr(doctor, "bindings", missing)
    assert list(doctor.llama_report()) == ["llama.cpp not in use: it needs a package: pip install it"]


@pytest.mark.parametrize(
    ("package", "says"),
    [
        (None, "needs the package llama-cpp-python, which is not installed: pip install 'kimi-lite"),
        ({"__init__": "__version__ = '0.2.90'"}, "0.2.90 is too old .* needs 0.3.16 or later: pip install"),
        (
            {"__init__": "__version__ = '0.9.0'", "llama_cpp": "import ctypes\n_lib = ctypes.CDLL(None)"},
            "0.9.0 lacks a function",
        ),
        (
            {"__init__": "raise OSError('libcudart.so.12: cannot open shared object file')"},
            "installed but cannot be opened .libcudart",
        ),
        ({"__init__": "import a_package_that_is_nowhere"}, "installed but cannot be opened .No module named"),
    ],
)
def test_bindings_that_do_not_serve_say_what_to_install(
    package: dict[str, str] | None, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == LLAMA]:
        monkeypatch.delitem(sys.modules, name)
    if package is None:
        monkeypatch.setitem(sys.modules, LLAMA, None)
    else:
        (tmp_path / LLAMA).mkdir()
        for module, text in package.items():
            (tmp_path / LLAMA / f"{module}.py").write_text(text)
        monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(UsageError, match=says):
        Bindings(LLAMA)


def test_files_that_llama_cpp_would_die_of_are_refused(tmp_path: Path) -> None:
    package = PACKAGES[0]
    with pytest.raises(ModelFileError, match="a packed file, which only kimi-lite's own engine reads"):
        LlamaEngine(PACKED, bindings=package)
    good = tmp_path / "good.gguf"
    quantize(NANO, good, to="q8_0")
    for key, value, says in (
        (b"attention.key_length", 96, r"attention\.key_length is 96; llama\.cpp needs 160"),
        (b"attention.head_count_kv", 4, r"head_count_kv is 4; llama\.cpp needs 1"),
        (b"expert_count", 5000, "with 5000 experts; llama.cpp takes at most 512"),
    ):
        data = bytearray(good.read_bytes())
        at = data.index(b"deepseek2." + key) + len(b"deepseek2." + key) + 4  # behind the name, its type
        data[at : at + 4] = value.to_bytes(4, "little")
        (tmp_path / "bad.gguf").write_bytes(data)
        with pytest.raises(ModelFileError, match=says):
            LlamaEngine(tmp_path / "bad.gguf", bindings=package)
    if IK_LLAMA in PACKAGES:
        with pytest.raises(ModelFileError, match=r"ik_llama\.cpp runs this architecture with 27 layers"):
            LlamaEngine(good, bindings=IK_LLAMA)


def test_engines_by_name(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.stdin", SimpleNamespace(isatty=lambda: True))
    with pytest.raises(UsageError, match=r"the engine is 'llama'; expected kimi-lite or llama\.cpp"):
        kimi_lite.load(engine="llama")
    with pytest.raises(UsageError, match=r"--gpu-layers is for --engine llama\.cpp"):
        kimi_lite.load(gpu_layers=3)
    for arguments, says in (
        (["--engine", "llama"], "kimi-lite: the engine is 'llama'; expected kimi-lite or llama.cpp\n"),
        (["--engine", "llama.cpp"], "kimi-lite: --engine llama.cpp needs a standard GGUF file; name one: "),
    ):
        with pytest.raises(SystemExit) as end:
            main(["ask", "-q", *arguments, "x"])
        out, err = capfd.readouterr()
        assert (end.value.code, out, err.count("\n")) == (2, "", 1)
        assert err.startswith(says)
