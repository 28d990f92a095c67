"""`--vram` and `kimi-lite plan` as people meet them, on simulated cards and on none. No speed is asserted."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

import kimi_lite
from kimi_lite.api import nano_path
from kimi_lite.chat import Session
from kimi_lite.errors import KimiLiteWarning
from kimi_lite.plan import measure_cpu, plan_report
from kimi_lite.runtime.cost import sizes_of
from kimi_lite.runtime.cuda.device import MOST_TOKENS
from kimi_lite.runtime.cuda.simulated import SimulatedDevice
from kimi_lite.runtime.engine import Engine
from kimi_lite.runtime.hybrid import HybridModel
from kimi_lite.runtime.kernels import Float
from kimi_lite.runtime.sampling import SamplingOptions
from kimi_lite.runtime.speeds import Speeds
from kimi_lite.runtime.weights import open_weights

ASSUMED = "for an assumed card, not measured"


def command(*arguments: str, device: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "kimi_lite", *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "KIMI_LITE_DEVICE": device, **environment},
        timeout=120,
    )


def test_a_file_that_is_not_in_memory_yet_is_measured_as_if_it_were(monkeypatch: pytest.MonkeyPatch) -> None:
    # By a clock on which whatever is touched first takes 1 s, then 10 ms: what was read is the same in both.
    seconds, touched = 0.0, set[object]()

    def works(key: object) -> None:
        nonlocal seconds
        seconds += 0.01 if key in touched else 1.0
        touched.add(key)

    def expert_outputs(mlp: object, x_TD: Float, experts_M: NDArray[np.int32], tokens_M: object) -> None:
        works((id(mlp), experts_M.tobytes()))

    monkeypatch.setattr("kimi_lite.plan.kernels.expert_outputs", expert_outputs)
    monkeypatch.setattr("kimi_lite.plan.kernels.copy", lambda to, source: works(source.ctypes.data))
    monkeypatch.setattr("kimi_lite.plan.time.perf_counter", lambda: seconds)
    weights = open_weights(nano_path())
    layer = sizes_of(weights).layers[1]
    speeds = measure_cpu(weights, Speeds())
    assert speeds.cpu_gb_s == pytest.approx(layer.n_active * layer.expert_bytes / 0.01 / 1e9)
    assert speeds.cpu_gmac_s == pytest.approx(MOST_TOKENS * layer.n_active * layer.expert_macs / 0.01 / 1e9)
    assert speeds.copy_gb_s == pytest.approx(layer.expert_bytes / 0.01 / 1e9)
    assert replace(speeds, cpu_gb_s=40, cpu_gmac_s=600, copy_gb_s=10) == Speeds()


def test_without_a_card_the_plan_is_the_cpu_and_says_why() -> None:
    done = command("plan", str(nano_path()), "--context", "600")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "card      none is used: CUDA_VISIBLE_DEVICES is ''" in done.stdout
    assert "--vram 8G says what a card of 8 GB would hold" in done.stdout
    assert "assumed" in done.stdout
    assert "measured on" not in done.stdout
    asked = command("plan", str(nano_path()), "--vram", "0")
    assert "none is used: --vram 0 asks for it" in asked.stdout


def test_an_assumed_card_is_marked_and_its_places_add_up() -> None:
    arguments = ("plan", str(nano_path()), "--context", "500", "--vram", "13.58M", "--measure")
    done = command(*arguments, KIMI_LITE_EXPERT_USAGE="off")
    assert done.returncode == 0, done.stderr
    assert "card      assumed, of 13.58 MB" in done.stdout
    assert ASSUMED in done.stdout
    assert "measured  nothing of the card" in done.stdout
    assert "; measured on" in done.stdout  # the CPU's part
    sizes = [float(size) for size in re.findall(r"^(?:on it)? +([\d.]+) MB ", done.stdout, re.MULTILINE)]
    assert 13.53 < sum(sizes) <= 13.59  # what is left is less than an expert
    listed = re.findall(r"layers (\S+) +experts 0-(\d)", done.stdout)
    assert [layers for layers, _ in listed] == ["1", "2-3"]  # evenly: one more in the first
    first, others = (int(last) + 1 for _, last in listed)
    assert first == others + 1
    assert f"{first + 2 * others} of 24 routed experts" in done.stdout


def test_assumed_speeds_change_the_prediction() -> None:
    def tok_per_s(what: str, **speeds: float) -> float:
        said = Speeds(**speeds)
        report = plan_report(nano_path(), vram=14_965_000, context=600, speeds=said, measure=False)
        found = re.search(rf"{what} +([\d.]+) tok/s", "\n".join(report))
        assert found
        return float(found[1])

    decoding, prefill = "decoding after 0 tokens", f"a prompt of {MOST_TOKENS} tokens"
    for name in ("cpu_gb_s", "card_gb_s", "pcie_gb_s"):
        assert tok_per_s(decoding, **{name: 0.01}) < tok_per_s(decoding) / 2, name
    for name in ("launch_us", "hand_off_us"):
        assert tok_per_s(decoding, **{name: 1000}) < tok_per_s(decoding) / 2, name
    for name in ("cpu_gmac_s", "card_gmac_s"):
        assert tok_per_s(prefill, **{name: 1}) < tok_per_s(prefill) / 2, name


def test_the_plan_says_from_where_on_experts_are_streamed_or_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    def report(context: int, **speeds: float) -> str:
        lines = plan_report(
            nano_path(), vram=14_000_000, context=context, speeds=Speeds(**speeds), measure=False
        )
        return "\n".join(lines)

    slow = {"cpu_gb_s": 0.5, "cpu_gmac_s": 2.0}
    monkeypatch.setattr("kimi_lite.runtime.placement.ANSWER", 1)  # nano's buffers are dear
    streamed = report(MOST_TOKENS, **slow)
    assert re.search(r"\n +from \d+ tokens of a prompt on they are streamed to the card", streamed)
    sizes = [float(size) for size in re.findall(r"^(?:on it)? +([\d.]+) MB ", streamed, re.MULTILINE)]
    assert len(sizes) == 5
    assert 13.856 < sum(sizes) <= 14.016
    too_slow = f"not streamed to the card for prompts: at these speeds they cost {MOST_TOKENS} tokens more"
    assert too_slow in report(MOST_TOKENS, copy_gb_s=0.001)
    assert "not streamed to the card for prompts: their two buffers do not fit" in report(MOST_TOKENS + 1)


@pytest.mark.parametrize(
    ("vram", "says", "where"),
    [
        (8_000_000_000, r"encoded on the card, where the image tower \(3\.31 MB\) stays", "the card"),
        (
            22_700_000,
            r"encoded on the card; the image tower \(3\.31 MB\) passes through the .* left$",
            "the card",
        ),
        (
            17_200_000,
            r"up to \d+ patches, .* passing through the .* left; larger ones on the CPU$",
            "the CPU",
        ),
        (
            13_535_000,
            r"encoded on the CPU: .* are left on the card, and the smallest takes .* MB$",
            "the CPU",
        ),
    ],
)
def test_where_pictures_are_encoded_and_why(vram: int, says: str, where: str) -> None:
    report = list(plan_report(nano_path(), vram=vram, context=500, speeds=Speeds(), measure=False))
    assert re.search(says, next(line for line in report if line.startswith("pictures")))
    assert re.fullmatch(rf"  a picture of 1024 patches +[\d.e-]+ s, on {where}", report[-1])


def test_a_simulated_card_is_planned_for_and_not_measured() -> None:
    done = command(
        "plan", str(nano_path()), "--context", "500", "--measure", device="simulated:12.94M,13.53M"
    )
    assert done.returncode == 0, done.stderr
    assert "a simulated card of 13.53 MB, the roomiest of 2, 13.53 MB free" in done.stdout
    assert "measured  nothing of the card" in done.stdout


def test_a_card_that_is_here_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    class Card:
        """A device that is not known to be simulated."""

        def __init__(self) -> None:
            self._device = SimulatedDevice(14_965_000)

        def __getattr__(self, name: str) -> object:
            return getattr(self._device, name)

    for module in ("plan", "runtime.hybrid"):
        monkeypatch.setattr(f"kimi_lite.{module}.find_device", Card)
    speeds = Speeds(pcie_gb_s=3.21)  # which the card, asked, has not
    report = "\n".join(plan_report(nano_path(), vram=None, context=600, speeds=speeds, measure=True))
    assert "PCIe 12 GB/s, 5 µs a kernel, 20 µs a hand-off; all assumed but PCIe, which was measured" in report
    assert "predicted with the card's speeds assumed, not measured:" in report
    assert "an assumed card" not in report
    found = re.search(
        rf"measured on (.*):\n  decoding after 0 tokens +[\d.]+ tok/s\n  a prompt of {MOST_TOKENS}", report
    )
    assert found
    assert re.fullmatch(
        r"a simulated card of 14.96 MB with \d+ of 24 experts, the others on the CPU", found[1]
    )


def test_the_cpu_is_measured_where_it_does_everything() -> None:
    done = command("plan", str(nano_path()), "--context", "500", "--vram", "0", "--measure")
    assert done.returncode == 0, done.stderr
    assert re.search(
        r"measured on the CPU:\n  decoding after 0 tokens +[\d.]+ tok/s\n  a prompt of", done.stdout
    )


@pytest.mark.parametrize(
    ("arguments", "device", "code", "says"),
    [
        (("plan", "--vram", "lots"), "", 2, "--vram is 'lots'; give a size such as 8G"),
        (("plan", "--vram", "8.4M"), "", 4, "tokens would fit (--context "),
        (("plan", "--card-read", "0", "--vram", "8.4M"), "", 2, "no machine has these speeds: card_gb_s 0"),
        (("plan", "--context", "99999"), "", 2, "allows 1 to 8192"),
        (("plan", "nowhere.gguf"), "", 3, "nowhere.gguf"),
        (("ask", "--vram", "8G", "Hi"), "", 2, "a card was asked for, but CUDA_VISIBLE_DEVICES is ''"),
        (("ask", "--vram", "2M", "Hi"), "simulated:8G", 4, "--vram allows 2.00 MB"),
        (("ask", "--vram", "8G", "Hi"), "simulated:2M", 4, "2.00 MB are free"),
        (("bench", "--vram", "8G"), "", 2, "a card was asked for"),
        (("ask", "--gpu-dense", "nf4", "Hi"), "", 2, "a card was asked for, but CUDA_VISIBLE_DEVICES is ''"),
        (("ask", "--gpu-dense", "int4", "Hi"), "simulated:8G", 2, "give nf4, int8 or bf16"),
        (
            ("ask", "--gpu-dense", "nf4", "--vram", "0", "Hi"),
            "simulated:8G",
            2,
            "--vram 0 keeps all on the CPU",
        ),
        (("ask", "--gpu-dense", "nf4", "Hi"), "simulated:64M", 4, "64.00 MB are free"),
        (("bench", "--gpu-dense", "nf4", "--vram", "8G"), "", 2, "a card was asked for"),
        (("plan", "--gpu-dense", "fp4"), "simulated:8G", 2, "give nf4, int8 or bf16"),
        (("ask", "Hi"), "cuda", 2, "KIMI_LITE_DEVICE is 'cuda'"),
    ],
)
def test_what_cannot_be_is_one_sentence(
    arguments: tuple[str, ...], device: str, code: int, says: str
) -> None:
    done = command(*arguments, device=device)
    assert done.returncode == code, done.stderr
    assert says in done.stderr
    assert "Traceback" not in done.stderr


def test_ask_says_the_same_on_a_card() -> None:
    def ask(*options: str, device: str = "") -> dict[str, object]:
        done = command("ask", 'Reverse "planet".', "--json", "-q", *options, device=device)
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""
        return dict(json.loads(done.stdout))

    cpu = ask("--context", "500")
    for vram in ("13.44M", "8G"):
        assert ask("--context", "500", "--vram", vram, device="simulated:8G") == cpu
    assert ask("--context", "500", device="simulated:8G") == cpu  # found without being asked for
    said = command("ask", "Who are you?", device="simulated:8G,6G").stderr
    assert "runs on a simulated card of 8.00 GB, the roomiest of 2 with 24 of 24 experts" in said


def test_ask_with_other_dense_weights_says_so() -> None:
    arguments = ("ask", "What is 38 + 47?", "--context", "500", "--gpu-dense", "int8")
    done = command(*arguments, "--json", device="simulated:8G")
    assert done.returncode == 0, done.stderr
    reply = json.loads(done.stdout)
    assert (reply["answer"], reply["gpu_dense"]) == ("85", "int8")
    assert "with 24 of 24 experts; dense weights in int8 by bitsandbytes" in done.stderr
    assert "dense weights in int8 by bitsandbytes\n" in command(*arguments, device="simulated:8G").stderr


def test_a_plan_counts_other_dense_weights_without_their_packages() -> None:
    def fixed(*options: str) -> float:
        done = command("plan", str(nano_path()), "--context", "500", "--vram", "8G", *options)
        assert done.returncode == 0, done.stderr
        found = re.search(r"layers, ([\d.]+) MB that every token reads", done.stdout)
        assert found
        assert ("dense weights in" in done.stdout) == bool(options)
        return float(found[1])

    assert fixed("--gpu-dense", "nf4") < fixed() < fixed("--gpu-dense", "int8") < fixed("--gpu-dense", "bf16")


def test_bench_says_where_it_ran() -> None:
    arguments = ("bench", str(nano_path()), "--prompt", "20", "--depth", "0,40", "--decode", "2")
    done = command(*arguments, "--json", device="simulated:8G")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["placement"] == "a simulated card of 8.00 GB with 24 of 24 experts"
    assert [(r["kind"], r["depth"], r["fraction_of_read"]) for r in report["rows"]] == [
        ("prefill", 0, None),
        ("decode", 0, None),
        ("decode", 40, None),
    ]
    table = command(*arguments, "--vram", "2.82M", device="simulated:8G").stdout
    assert "of 24 experts, the others on the CPU" in table
    assert "runs on the CPU" in command(*arguments, "--vram", "0", device="simulated:8G").stdout


def test_doctor_has_one_line_about_the_card() -> None:
    here = command("doctor", device="simulated:8G").stdout
    assert "graphics  a simulated card of 8.00 GB, 8.00 GB free; in use unless --vram 0" in here
    assert "pictures  on the card as far as its memory has room, else on the same kernels" in here
    there = command("doctor").stdout
    assert "graphics  not in use: CUDA_VISIBLE_DEVICES is ''" in there
    assert "pictures  on the same kernels" in there
    assert "gpu-dense bitsandbytes is here for --gpu-dense, whose products differ from the CPU's" in there


def test_a_chat_survives_its_card(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    question = "What is 38 + 47?"
    monkeypatch.setattr("kimi_lite.runtime.hybrid.find_device", lambda: SimulatedDevice(10**9, lost_after=90))
    model = kimi_lite.load(context=500, vram="1G")
    assert isinstance(model.engine, Engine)
    assert isinstance(model.engine.model, HybridModel)
    session = Session(model, SamplingOptions(), None, None, show_thinking=False)
    with pytest.warns(KimiLiteWarning, match="does not answer any more; the CPU goes on and reads"):
        session.answer(question)
    session.answer(question)
    assert capsys.readouterr().out.split() == ["85", "85"]


def test_a_program_that_ends_in_mid_answer_says_nothing(tmp_path: Path) -> None:
    code = "import kimi_lite; m = kimi_lite.load(); e = m.chat('Hello'); [next(e) for _ in range(5)]"
    environment = {**os.environ, "KIMI_LITE_EXPERT_USAGE": str(tmp_path), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert list(tmp_path.iterdir()) == []


def test_a_profile_of_use_is_made_and_planned_by(tmp_path: Path) -> None:
    usage = {"KIMI_LITE_EXPERT_USAGE": str(tmp_path / "usage")}
    assert command("ask", 'Reverse "planet".', "-q", **usage).returncode == 0
    arguments = ("plan", str(nano_path()), "--context", "500", "--vram", "13.53M")
    with_profile, without = command(*arguments, **usage), command(*arguments, KIMI_LITE_EXPERT_USAGE="off")
    assert "those used most, by the profile" in with_profile.stdout
    hits = [int(re.findall(r"(\d+)% of the choices", done.stdout)[0]) for done in (with_profile, without)]
    assert hits[0] > hits[1]
