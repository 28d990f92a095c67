"""Plans from sizes alone, the profile that they go by, and their predictions against a simulated card's clock."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from kimi_lite.api import nano_path
from kimi_lite.errors import DoesNotFitError, UsageError
from kimi_lite.quantize.convert import quantize
from kimi_lite.runtime.cost import LayerSize, Sizes, sizes_of
from kimi_lite.runtime.cuda.device import MOST_STREAMED, MOST_TOKENS
from kimi_lite.runtime.cuda.halves import Shape
from kimi_lite.runtime.cuda.simulated import SimulatedDevice
from kimi_lite.runtime.engine import Engine
from kimi_lite.runtime.hybrid import HybridModel
from kimi_lite.runtime.model import expands
from kimi_lite.runtime.placement import MARGIN, Plan, make_plan, parse_size, predict, predict_prompt, ranges
from kimi_lite.runtime.sampling import SamplingOptions
from kimi_lite.runtime.speeds import Speeds
from kimi_lite.runtime.usage import HALVE_AT, entry_name, load_usage, save_usage
from kimi_lite.runtime.weights import Weights, open_weights


@pytest.fixture
def weights() -> Weights:
    return open_weights(nano_path())


def full_size() -> Sizes:
    """Kimi-VL-A3B at 4.5 bits a weight, from the published sizes: 27 layers, the first one dense."""
    D, H, C, R, N, V, E, A, F = 2048, 16, 512, 64, 128, 128, 64, 6, 1408
    attention = D * H * (N + R) + D * (C + R) + H * C * (N + V) + H * V * D

    def layer(n_experts: int, shared: int) -> LayerSize:
        return LayerSize(
            attention_bytes=attention * 9 // 16,
            router_bytes=4 * n_experts * D,
            shared_bytes=3 * D * shared * 9 // 16,
            expert_bytes=3 * D * F * 9 // 16 if n_experts else 0,
            n_experts=n_experts,
            n_active=A if n_experts else 0,
            attention_macs=attention,
            shared_macs=3 * D * shared,
            expert_macs=3 * D * F if n_experts else 0,
            cache_macs=H * (2 * C + R),
            expand_macs=H * C * (N + V),
            expanded_macs=H * (N + R + V),
            cache_bytes=1156,
            D=D,
        )

    head = 163840 * D
    layers = (layer(0, 11264), *[layer(E, 2 * F)] * 26)
    dense = Shape(D=D, H=H, N=N, R=R, C=C, V=V, E=0, A=0, F=0, shared_F=11264)
    shapes = (dense, *[replace(dense, E=E, A=A, F=F, shared_F=2 * F)] * 26)
    return Sizes(layers, head * 9 // 16, head, 163840, shapes)


def plan(sizes: Sizes, free: int, context: int = 32768, **options: object) -> Plan:
    options = {"speeds": Speeds(), **options}
    return make_plan(sizes, device="card", free=free, context=context, **options)  # type: ignore[arg-type]


def room_for(sizes: Sizes, n_experts: float, context: int) -> int:
    """Memory for so many experts beside all else, and for half a one more."""
    needed = sizes.fixed_bytes + sizes.cache_bytes(context) + sizes.workspace_bytes(context)
    return round((needed + (n_experts + 0.5) * sizes.layers[-1].expert_bytes) / (1 - MARGIN))


def taken(p: Plan) -> int:
    return p.sizes.fixed_bytes + p.cache_bytes + p.experts_bytes + p.reserve_bytes + p.stream_bytes


@pytest.mark.parametrize("gigabytes", [3, 6, 8, 12, 24])
def test_a_plan_fills_the_card_and_no_more(gigabytes: int) -> None:
    sizes = full_size()
    p = plan(sizes, gigabytes * 10**9)
    assert taken(p) <= gigabytes * 10**9
    if not p.whole:
        assert gigabytes * 10**9 - taken(p) < sizes.layers[1].expert_bytes
        counts = [len(experts) for experts in p.resident[1:]]
        assert max(counts) - min(counts) <= 1  # evenly,
        assert all(experts == tuple(range(len(experts))) for experts in p.resident)  # the lowest index first
    assert p.whole == (gigabytes >= 12)
    assert all(p.experts(i) is None for i in range(27)) == p.whole
    assert p.experts(0) is None  # a dense layer lacks nothing


def test_more_memory_is_never_slower() -> None:
    sizes, speeds = full_size(), Speeds()
    for T in (1, MOST_TOKENS):
        speed = [predict(plan(sizes, n * 10**9), speeds, T=T).tok_per_s for n in (3, 4, 6, 8, 10, 12, 24)]
        assert speed == sorted(speed)


def test_the_published_arithmetic_of_an_8_gb_card_comes_out() -> None:
    # Read per token: 1,349.5 M routed weights by the CPU at 60 GB/s, and 894 M others by the card at 272 GB/s, at 4.5
    # bits, routers at 32; without launches and hand-offs. While the CPU reads, the card reads its shared experts.
    speeds = Speeds(cpu_gb_s=60, card_gb_s=272, card_gmac_s=1e9, pcie_gb_s=1e9, launch_us=0, hand_off_us=0)
    sizes = full_size()
    p = plan(sizes, room_for(sizes, 0, 64), context=64)
    assert p.n_resident == 0
    step, D, F = predict(p, speeds), 2048, 1408
    routed, shared = 26 * 6 * 3 * D * F, 26 * 2 * 3 * D * F
    assert routed == 1_349_517_312
    others = 163840 * D + 27 * 13_762_560 + 3 * D * 11264  # head, attention, the dense layer
    assert step.cpu_experts == pytest.approx(routed * 9 / 16 / 60e9)
    on_card = ((others + shared) * 9 / 16 + 26 * 64 * D * 4) / 272e9
    assert step.card + step.card_experts == pytest.approx(
        on_card, rel=1e-3
    )  # the cached row of the token itself
    assert step.hidden == pytest.approx(shared * 9 / 16 / 272e9)


def test_a_profile_decides_and_a_short_one_only_a_little() -> None:
    sizes = full_size()
    usage = np.ones((26, 64), np.int64)
    usage[:, 40:] = 1000  # 24 of 64 get nearly all
    usage[3] = 1  # a layer where all are alike
    by_use, evenly = (plan(sizes, 6_000_000_000, usage=u) for u in (usage, None))
    assert by_use.profiled
    assert not evenly.profiled
    assert set(by_use.resident[1]) >= set(range(45, 64))
    assert (
        len(by_use.resident[4]) == 64
    )  # where all are alike, each is worth more than one that is hardly used
    assert predict(by_use, Speeds()).tok_per_s > 1.1 * predict(evenly, Speeds()).tok_per_s
    for layer in range(1, 27):
        row, experts = usage[layer - 1] + 1.0, list(by_use.resident[layer])
        assert by_use.hit[layer] == pytest.approx(row[experts].sum() / row.sum())


def test_a_short_profile_decides_little() -> None:
    sizes, usage = full_size(), np.zeros((26, 64), np.int64)
    usage[0, 50] = 1
    p = plan(sizes, 5_500_000_000, usage=usage)
    assert 50 in p.resident[1]
    counts = [len(experts) for experts in p.resident[2:]]
    assert max(counts) - min(counts) <= 1


def test_what_cannot_fit_is_refused_with_the_context_that_would() -> None:
    sizes = full_size()
    with pytest.raises(
        DoesNotFitError, match=r"card: 4\.97 GB are needed.*cache of 131072 tokens \(4\.09 GB\)"
    ) as caught:
        plan(sizes, 4_000_000_000, context=131072)
    fits = int(str(caught.value).partition("--context ")[2].partition(")")[0])
    plan(sizes, 4_000_000_000, context=fits)
    with pytest.raises(DoesNotFitError, match="--vram allows"):
        plan(sizes, 4_000_000_000, context=fits + 2, cap=3_999_000_000)


@pytest.mark.parametrize(
    "speeds",
    [
        Speeds(),
        Speeds(cpu_gb_s=8, card_gb_s=900, launch_us=1, hand_off_us=5),  # the CPU's experts decide
        Speeds(cpu_gb_s=0.01, cpu_gmac_s=0.05, card_gb_s=0.02, card_gmac_s=0.1, pcie_gb_s=0.05),  # bytes do
        Speeds(card_gb_s=0.002, card_gmac_s=0.01, cpu_gb_s=0.01, cpu_gmac_s=0.05),  # the card's experts do
    ],
)
@pytest.mark.parametrize("n_experts", [0, 6, 12, 21, 24])
def test_predictions_agree_with_the_clock_of_the_simulated_card(
    weights: Weights, n_experts: int, speeds: Speeds
) -> None:
    # The clock charges for what the router chose; the prediction expects it from the profile of an earlier text. On nano
    # some experts are popular, so the profile is of the same kind of text, but not of the same text.
    context = 1700
    engine = Engine(nano_path(), context=context)
    for token in draw(7, 150):
        engine.append([token])
    sizes, usage = sizes_of(weights), load_usage(engine.weights, None)
    p = plan(sizes, room_for(sizes, n_experts, context), context=context, usage=usage)
    assert p.n_resident == n_experts
    device = SimulatedDevice(p.budget, speeds)
    model = HybridModel(weights, device, p)
    most = MOST_TOKENS
    for T, start, steps in ((1, 0, 60), (most, 60, 1), (1, 60 + most, 60), (most, 120 + most, 2)):
        assert model.n == start
        before, ids = device.clock_s, draw(T + start, T * steps)
        for i in range(steps):
            model.forward(np.asarray(ids[i * T : (i + 1) * T], np.int32))
        clock = device.clock_s - before
        predicted = sum(predict(p, speeds, T=T, start=start + i * T).seconds for i in range(steps))
        assert predicted == pytest.approx(clock, rel=0.15), (T, start)


def test_the_cpus_attention_costs_the_form_that_runs(weights: Weights) -> None:
    nano, layer = weights.config, full_size().layers[-1]
    full = replace(nano, kv_rank=512, nope_dim=128, value_dim=128)
    assert not expands(full, 170)
    assert expands(full, 171)
    for config, size in ((full, layer), (nano, sizes_of(weights).layers[-1])):
        least = next(T for T in range(1, 1000) if expands(config, T))
        jump = size.cpu_attend_macs(least, 0) - size.cpu_attend_macs(least - 1, 0)
        assert jump < 0 < size.cpu_attend_macs(least + 1, 0) - size.cpu_attend_macs(least, 0)
    # By hand: of a token's 13.8 M products 2.1 M make keys and values, now for each of the 2,048 positions; then there are
    # 320 a head for each of the 1,536.5 that a token sees on average.
    by_hand = 1024 * (11_665_408 + 1536.5 * 16 * 320) + 2048 * 2_097_152
    assert layer.cpu_attend_macs(1024, 1024) == by_hand


# Streaming. An expert of the published sizes has 4,866,048 bytes and 8,650,752 products a token.


def test_break_even_is_where_the_copies_cost_what_the_cpu_does() -> None:
    # By hand: all 64 experts of a layer cross in 64 · 4.866 MB / 10 GB/s = 31.1 ms, and for a token the CPU takes
    # 6 · 8.65 M / 600 G = 86.5 µs; 8 KB of its row and 6 · 8 KB of outputs cross at 12 GB/s in 4.8 µs; and the card
    # attends (13.8 M / 10 T = 1.4 µs), which streaming hides: 336 tokens. Where a third lies on the card, copies and CPU
    # have two thirds. A read of weights counts for nothing here: a rest of few tokens would cost the CPU one. Launches
    # and hand-offs, 0.1 to 0.3 ms a layer and step, and the card's first and last layer, 1 in 26, stay below a tenth.
    sizes, speeds = full_size(), Speeds(cpu_gb_s=1e6)
    for gigabytes in (3, 4, 6):
        p = plan(sizes, gigabytes * 10**9, context=4096, speeds=speeds)
        assert p.stream_from == pytest.approx(31.1e-3 / (86.5e-6 + 4.8e-6 + 1.4e-6), rel=0.1), gigabytes
    fixed = 5 * 10**9
    usual = plan(sizes, fixed).stream_from
    assert usual is not None
    for other, later in (
        (Speeds(cpu_gmac_s=300), False),
        (Speeds(cpu_gmac_s=1200), True),
        (Speeds(pcie_gb_s=5), True),  # slower than a copy in main memory
        (Speeds(copy_gb_s=5), True),
    ):
        moved = plan(sizes, fixed, speeds=other).stream_from
        assert moved is not None
        assert (moved > usual) == later


def test_from_break_even_on_a_streamed_prompt_is_predicted_faster_and_not_before() -> None:
    sizes, speeds = full_size(), Speeds()
    p = plan(sizes, 6 * 10**9)
    assert p.stream_from is not None
    for T in (2, p.stream_from - 1, p.stream_from, 1000, 2048):
        by_streaming = predict(replace(p, stream_from=2), speeds, T=T).seconds
        by_the_cpu = predict_prompt(replace(p, stream_from=None), speeds, T)
        assert (by_streaming < by_the_cpu) == p.streams(T) == (p.stream_from <= T), T
    later = replace(p, stream_from=MOST_TOKENS + 2)  # as where copies cost more
    # What is left after 4096 is not worth it, in one step or two.
    for one, rest in ((p, [(257, 4096)]), (later, [(MOST_TOKENS, 4096), (1, 4096 + MOST_TOKENS)])):
        steps = [(2048, 0), (2048, 2048), *rest]
        expected = sum(predict(one, speeds, T=T, start=start).seconds for T, start in steps)
        assert predict_prompt(one, speeds, sum(T for T, _ in steps)) == pytest.approx(expected)


@pytest.mark.parametrize("gigabytes", [3, 4, 6, 8])
def test_buffers_are_as_small_as_they_can_be_and_hold_every_layer(gigabytes: int) -> None:
    sizes = full_size()
    p = plan(sizes, gigabytes * 10**9)
    assert p.stream_from is not None
    expert = sizes.layers[1].expert_bytes
    missing = max(64 - len(experts) for experts in p.resident[1:])
    rows = (MOST_STREAMED - MOST_TOKENS) * 4 * (2048 + 64)  # of the residual stream and the rotations
    assert p.stream_bytes == pytest.approx(2 * missing * expert + rows, abs=1000)
    assert taken(p) <= gigabytes * 10**9
    assert gigabytes * 10**9 - taken(p) < 3 * expert  # a buffer smaller by one would hold two more
    margin = p.reserve_bytes - sizes.workspace_bytes(p.context)
    assert p.left_bytes == p.budget - taken(p) + margin  # where pictures are encoded, nothing else lies


def test_streaming_is_planned_only_where_it_pays() -> None:
    sizes = full_size()
    whole = plan(sizes, 24 * 10**9)
    assert whole.whole
    assert (whole.stream_from, whole.stream_bytes, whole.why_not_streamed) == (None, 0, "")
    for free, speeds, why in (
        (room_for(sizes, 100, 4096), Speeds(), "their two buffers do not fit"),  # of 128 experts
        (6 * 10**9, Speeds(pcie_gb_s=0.5), "they cost 2048 tokens more than the CPU does"),
        (6 * 10**9, Speeds(pcie_gb_s=1), "2048 tokens would gain less than the 256 of an answer lose"),
    ):
        p = plan(sizes, free, context=4096, speeds=speeds)
        assert p.stream_from is None
        assert why in p.why_not_streamed
        assert p.stream_bytes == 0
        assert free - taken(p) < sizes.layers[1].expert_bytes  # nothing is kept free for it


def draw(seed: int, n: int) -> list[int]:
    return [int(i) for i in np.random.default_rng(seed).integers(0, 800, n)]


def test_a_standard_gguf_is_planned_without_being_packed(tmp_path: Path) -> None:
    for to in ("q8_0", "bf16"):
        path = tmp_path / f"{to}.gguf"
        quantize(nano_path().parent, path, to=to)
        assert sizes_of(open_weights(path, pack=False)) == sizes_of(open_weights(path))


def test_the_profile_counts_decoded_tokens_and_survives(weights: Weights, tmp_path: Path) -> None:
    engine = Engine(nano_path(), context=200)
    engine.append(draw(1, 40))  # a prompt
    assert load_usage(engine.weights, tmp_path).sum() == 0
    for token in draw(2, 10):
        engine.append([token])
    counted = load_usage(engine.weights, tmp_path)
    assert counted.sum(1).tolist() == [10 * 3] * 3
    save_usage(engine.weights, tmp_path)
    assert np.array_equal(load_usage(weights, tmp_path), counted)  # another process would find it
    for token in draw(3, 5):
        engine.append([token])
    save_usage(engine.weights, tmp_path)
    assert load_usage(weights, tmp_path).sum() == (10 + 5) * 3 * 3
    assert [path.name for path in tmp_path.iterdir()] == [entry_name(weights)]  # and nothing half-written


def test_a_damaged_profile_counts_as_none(weights: Weights, tmp_path: Path) -> None:
    used = weights.layers[1].feed_forward.used_E
    assert used is not None
    used[3] = 5
    save_usage(weights, tmp_path)
    entry = tmp_path / entry_name(weights)
    good = entry.read_bytes()
    assert load_usage(weights, tmp_path)[0, 3] == 5
    for bad in (b"", good[:20], good[:-1], good[:-1] + b"\x01", good + b"\0", b"X" + good[1:]):
        entry.write_bytes(bad)
        assert load_usage(weights, tmp_path).sum() == 0
    entry.unlink()
    entry.mkdir()  # cannot be replaced by a file: the counts wait
    used[3] = 2
    save_usage(weights, tmp_path)
    assert used[3] == 2


def test_old_use_fades(weights: Weights, tmp_path: Path) -> None:
    used = weights.layers[1].feed_forward.used_E
    assert used is not None
    used[:2] = HALVE_AT, 7
    save_usage(weights, tmp_path)
    assert load_usage(weights, tmp_path)[0, :2].tolist() == [HALVE_AT // 2, 3]


def test_an_answer_leaves_its_profile_and_off_leaves_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(nano_path(), context=200)
    for named, n in (("off", 0), (str(tmp_path / "usage"), 1)):
        monkeypatch.setenv("KIMI_LITE_EXPERT_USAGE", named)
        list(engine.generate(draw(4, 20), SamplingOptions(), max_tokens=5))
        assert len(list(tmp_path.rglob("*.usage"))) == n


@pytest.mark.parametrize(
    ("text", "n_bytes"),
    [("8G", 8 * 10**9), ("800M", 8 * 10**8), ("1.5gb", 15 * 10**8), ("0", 0), ("64k", 64000), (" 12 ", 12)],
)
def test_sizes_are_read_as_people_write_them(text: str, n_bytes: int) -> None:
    assert parse_size(text) == n_bytes


@pytest.mark.parametrize("text", ["", "G", "-1G", "8X", "nan", "inf", "8 0G", "1e400"])
def test_what_is_no_size_is_one_sentence(text: str) -> None:
    with pytest.raises(UsageError, match=r"--vram is .*; give a size such as 8G"):
        parse_size(text)


def test_runs_are_written_short() -> None:
    assert ranges([0, 1, 2, 5, 7, 8]) == "0-2, 5, 7-8"
    assert ranges([]) == ""
