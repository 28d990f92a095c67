"""benchmarks/gpu.py in a tiny form on a simulated card, so that it works on the day when there is a real one."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import gpu
import pytest
from gpu_claims import Row, Setting, judge

from kimi_lite.api import nano_path
from kimi_lite.runtime.cuda.simulated import SimulatedDevice
from kimi_lite.runtime.kernels import Float
from kimi_lite.runtime.placement import Plan, make_plan
from kimi_lite.runtime.speeds import Speeds

TINY = (
    "--caps",
    "9.65M,9.85M,50M,1G",
    "--depths",
    "40,300,9000",
    "--prompt",
    "290",
    "--tokens",
    "24",
    "--threads",
    "2",
)


@pytest.fixture(autouse=True)
def card(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("KIMI_LITE_DEVICE", "simulated:64M")
    monkeypatch.setenv("KIMI_LITE_EXPERT_USAGE", "off")
    monkeypatch.setattr(gpu, "RESULTS", tmp_path)
    return tmp_path


AHEAD = (
    "With experts on the CPU, prefill is ahead of llama.cpp's CUDA build with the same memory.",
    "With all on the card, decoding is 1.5 times as fast as llama.cpp's CUDA build.",
    "With experts on the CPU, decoding is 1.3 times as fast as llama.cpp's CUDA build with the same memory.",
)


def verdicts(result: dict[str, object]) -> dict[str, str]:
    return {claim["says"]: claim["verdict"] for claim in result["claims"]}  # type: ignore[attr-defined]


def fake_llama_bench(folder: Path, speed: float) -> Path:
    """Prints what llama-bench prints, as far as it is read; each test of a run is an object."""
    script = folder / "llama-bench"
    script.write_text(
        "#!/usr/bin/env python3\n"
        "import json, sys\n"
        "o = dict(zip(sys.argv[1::2], sys.argv[2::2]))\n"
        "tests = [(int(o['-p']), 0), (0, int(o['-n']))]\n"
        "build = {'build_commit': '0ad4a86', 'build_number': 7}\n"
        f"print(json.dumps([{{**build, 'n_prompt': p, 'n_gen': n, 'n_depth': int(o['-d']), 'avg_ts': {speed}}} for p, n in tests if p or n]))\n"
    )
    script.chmod(0o755)
    return script


def test_streaming_is_measured_beside_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    # Nano's own plans never stream: its buffers would take the place of all that is missing.
    def streaming(*arguments: Any, **options: Any) -> Plan:
        plan = make_plan(*arguments, **options)
        return plan if plan.whole else replace(plan, stream_from=60)

    monkeypatch.setattr("kimi_lite.runtime.hybrid.make_plan", streaming)
    tiny = [{"40,300,9000": "40", "9.65M,9.85M,50M,1G": "9.65M,50M"}.get(word, word) for word in TINY]
    result = gpu.main([str(nano_path()), *tiny])
    rows = [row for row in result["rows"] if row["stream_from"]]
    assert len(rows) == 2
    assert all(row["streamed"] > 0 and row["not_streamed"] > 0 for row in rows)
    assert verdicts(result)["Wherever experts lie, logits have the CPU's bits."] == "holds"
    assert verdicts(result)["The planner predicts prefill within 15 %."] == "holds"
    faster = [row["streamed"] > row["not_streamed"] for row in rows]
    says = "From half as many tokens again as the plan says, streaming is faster than the CPU."
    assert verdicts(result)[says] == ("holds" if all(faster) else "refuted")


def test_what_was_measured_before_an_interruption_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    measure, done = gpu.Bench.measure, list[Row]()

    def until_interrupted(self: gpu.Bench, *arguments: Any) -> Row:
        if len(done) == 1:
            raise KeyboardInterrupt
        done.append(measure(self, *arguments))
        return done[-1]

    monkeypatch.setattr(gpu.Bench, "measure", until_interrupted)
    result = gpu.main([str(nano_path()), *TINY])
    assert result["cut_off"]
    assert [row["decode"] for row in result["rows"]] == [done[0].decode] != [None]
    assert verdicts(result)["Wherever experts lie, logits have the CPU's bits."] == "holds"


def test_every_claim_is_judged_on_a_simulated_card(card: Path, capsys: pytest.CaptureFixture[str]) -> None:
    llama = ("--llama-bench", str(fake_llama_bench(card, 1.0)), "--gguf", str(nano_path()))
    result = gpu.main([str(nano_path()), *TINY, *llama])
    assert result["versions"]["llama.cpp"] == "0ad4a86, build 7"
    found = verdicts(result)
    page = (Path(__file__).parents[2] / "docs" / "gpu.md").read_text(encoding="utf-8")
    assert [line[2:] for line in page.splitlines() if line[:2] == "- "] == list(
        found
    )  # the claims of the document
    for says in (
        "Wherever experts lie, logits have the CPU's bits.",
        "No more memory is taken than --vram allows.",
        "The planner predicts prefill within 15 %.",
        "With all on the card, prefill is ahead of llama.cpp's CUDA build.",
        *AHEAD,
        "With experts on both, card and CPU work at the same time: decoding is faster than in turn.",
        "A picture that is encoded on the card has the CPU's rows.",
    ):
        assert found[says] == "holds", says
    # Those that speak of cards, sizes, speeds or tensor cores that a toy on a virtual clock does not have.
    assert found["With all on the card, an H100 decodes 350 tok/s."] == "not measured"
    assert found["With all on the card, its tensor cores make prefill 1.3 times as fast."] == "not measured"
    assert found["A picture of 4096 patches is encoded 4 times as fast as on the CPU."] == "not measured"
    assert found["On 8 GB, experts on the card are worth 40 % over none."] == "not measured"
    assert found["With all on the card, decoding reads 55 % of the card's bandwidth."] == "refuted"
    rows = result["rows"]
    assert all(
        (row["prefill_by_eights"] is None) == (row["prefill"] is None or row["resident"] < 24) for row in rows
    )
    assert {row["cap"] for row in rows} >= {9_650_000, 9_850_000, 50_000_000}
    assert 10**9 not in {row["cap"] for row in rows}  # more than the card has
    for depth in (40, 300):
        resident = [row["resident"] for row in rows if row["depth"] == depth]
        assert (resident[0], resident[-1]) == (0, 24)
        assert 0 < resident[1] < 24
    assert all("context ends at 8192" in row["why_not"] for row in rows if row["depth"] == 9000)
    assert all(row["decode"] > 0 for row in rows if not row["why_not"])
    assert result["simulated"] is True
    assert list(card.glob("*.jsonl")) == []  # no speed is kept without a card
    out = capsys.readouterr().out
    assert "says nothing of any real one" in out
    assert json.loads(out.splitlines()[-1]) == json.loads(json.dumps(result))


def test_other_bits_and_a_faster_peer_refute(card: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logits = SimulatedDevice.logits

    def wrong(self: SimulatedDevice) -> Float:
        out_V = logits(self)
        out_V[7] += 1e-6
        return out_V

    monkeypatch.setattr(SimulatedDevice, "logits", wrong)
    monkeypatch.setattr(SimulatedDevice, "free_bytes", lambda self: 64_000_000 - 3 * self._used)
    llama = ("--llama-bench", str(fake_llama_bench(card, 1e9)), "--gguf", str(nano_path()))
    found = verdicts(gpu.main([str(nano_path()), *TINY, "--depths", "40", *llama]))
    assert found["Wherever experts lie, logits have the CPU's bits."] == "refuted"
    assert found["No more memory is taken than --vram allows."] == "refuted"
    assert [found[says] for says in AHEAD] == ["refuted"] * 3


def test_a_card_that_does_nothing_beside_the_cpu_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    queue = SimulatedDevice._queue

    def in_turn(self: SimulatedDevice, seconds: float) -> None:
        queue(self, seconds)
        self.wait()

    monkeypatch.setattr(SimulatedDevice, "_queue", in_turn)
    found = verdicts(gpu.main([str(nano_path()), *TINY, "--depths", "40"]))
    says = "With experts on both, card and CPU work at the same time: decoding is faster than in turn."
    assert found[says] == "refuted"


def test_claims_beside_others_are_judged_by_their_factors() -> None:
    setting = Setting("an H100", 10, 2048, Speeds(), False, False, False, "bits", 20.0, None)

    def judged(whole: float, some: float) -> dict[str, str]:
        rows = [Row(24, 10, 9, 9, prefill=100.0, decode=whole), Row(8, 10, 3, 9, prefill=100.0, decode=some)]
        peers = [Row(24, 10, prefill=100.0, decode=234.0), Row(8, 10, prefill=101.0, decode=100.0)]
        return {claim.says: claim.verdict for claim in judge(setting, rows, peers, [])}

    h100 = "With all on the card, an H100 decodes 350 tok/s."
    prefill = "With all on the card, prefill is ahead of llama.cpp's CUDA build."
    reached, missed = judged(351.0, 130.0), judged(349.9, 129.9)
    assert [reached[says] for says in (h100, prefill, *AHEAD)] == [
        "holds",
        "holds",
        "refuted",
        "holds",
        "holds",
    ]
    assert [missed[says] for says in (h100, prefill, *AHEAD)] == [
        "refuted",
        "holds",
        "refuted",
        "refuted",
        "refuted",
    ]


@pytest.mark.parametrize(("gmac_s", "seen"), [(3.0, True), (1e6, False)])
def test_the_rate_of_products_is_found_where_they_are_what_takes_long(
    monkeypatch: pytest.MonkeyPatch, gmac_s: float, seen: bool
) -> None:
    monkeypatch.setattr(SimulatedDevice, "speeds", lambda self: Speeds(card_gmac_s=gmac_s))
    monkeypatch.setattr(gpu.Bench, "find_speeds", lambda self, device: (Speeds(), True))
    started, init = list[gpu.Bench](), gpu.Bench.__init__

    def and_look(self: gpu.Bench, *arguments: Any) -> None:
        init(self, *arguments)
        self.simulated = False  # the clock is, the rest goes as on a card
        started.append(self)

    monkeypatch.setattr(gpu.Bench, "__init__", and_look)
    result = gpu.main([str(nano_path()), *TINY, "--depths", "40", "--prompt", "600", "--caps", "15.94M,50M"])
    (bench,) = started
    assert bench.measured_arithmetic is seen
    assert bench.speeds.card_gmac_s == (pytest.approx(gmac_s, rel=0.01) if seen else Speeds().card_gmac_s)
    verdict = verdicts(result)["The planner predicts prefill within 15 %."]
    assert verdict == ("holds" if seen else "not measured")


def test_llama_cpp_gets_another_try_with_one_more_layer_on_the_cpu(
    card: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "LLAMA_SPARE", 0)
    script = fake_llama_bench(card, 5.0)
    full = 'if o["-ncmoe"] == "0":\n    sys.exit("out of memory")\nprint('
    script.write_text(script.read_text().replace("print(", full, 1))
    arguments = [str(nano_path()), *TINY, "--depths", "40", "--caps", "50M"]
    result = gpu.main([*arguments, "--llama-bench", str(script), "--gguf", str(nano_path())])
    assert [(row["cap"] == 50_000_000, row["decode"], row["why_not"]) for row in result["llama"]] == [
        (False, 5.0, ""),
        (True, 5.0, ""),
    ]
    script.write_text(script.read_text().replace('o["-ncmoe"] == "0"', "True"))
    result = gpu.main([*arguments, "--llama-bench", str(script), "--gguf", str(nano_path())])
    assert {(row["decode"], row["why_not"]) for row in result["llama"]} == {(None, "out of memory")}


DENSE = (
    "With --gpu-dense, products are within their bound and all else has the CPU's bits.",
    "With --gpu-dense, no more memory is taken than --vram allows.",
    "With --gpu-dense, decoding is no faster than with our own kernels.",
)


def test_other_formats_of_dense_weights_are_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = [str(nano_path()), *TINY, "--depths", "40", "--tokens", "4", "--caps"]
    found = verdicts(gpu.main([*arguments, "50M"]))
    assert [found[says] for says in DENSE] == ["not measured"] * 3  # PyTorch alone takes more
    monkeypatch.setenv("KIMI_LITE_DEVICE", "simulated:1G")
    result = gpu.main([*arguments, "900M"])
    found = verdicts(result)
    assert [row["gpu_dense"] for row in result["gpu_dense"]] == ["nf4", "int8", "bf16"]
    assert [found[says] for says in DENSE[:2]] == ["holds", "holds"]
    assert found[DENSE[2]] == "refuted"  # on a clock that counts bytes alone, fewer of them are faster
    assert found["Wherever experts lie, logits have the CPU's bits."] == "holds"  # not asked of these

    multiply = SimulatedDevice.run_dense

    def wrong(self: SimulatedDevice, index: int | None, name: str, x_TI: Float) -> Float:
        return multiply(self, index, name, x_TI) * (1.5 if (index, name) == (1, "up") else 1)

    monkeypatch.setattr(SimulatedDevice, "run_dense", wrong)
    found = verdicts(gpu.main([*arguments, "900M"]))
    assert [found[says] for says in DENSE] == ["refuted", "not measured", "not measured"]


def test_what_time_does_not_reach_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    result = gpu.main([str(nano_path()), *TINY, "--depths", "40,300", "--minutes", "0"])
    assert {row["why_not"] for row in result["rows"] if row["depth"] == 300} == {"no time was left"}
    assert all(row["decode"] for row in result["rows"] if row["depth"] == 40)  # the first are always measured
