"""What would go where, why, and how fast that should be: the report of `kimi-lite plan`.

A card that is here is asked for its free memory and given back. Without one, `--vram` assumes a card of that size, and
every line that depends on it says so: a prediction is no measurement, and an assumed bandwidth is nobody's card. What can
be measured is measured if asked: the CPU's part on real layers for half a second, the way to a card that is here, and the
whole where it runs here. The plan is made from what was measured.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import groupby
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kimi_lite.api import mmproj_beside
from kimi_lite.bench import decode_speed, prefill_speed, warm_up
from kimi_lite.errors import KimiLiteError
from kimi_lite.runtime import dense, kernels
from kimi_lite.runtime.cost import encode_cpu_s, encode_s, sizes_of
from kimi_lite.runtime.cuda.device import MOST_STREAMED, MOST_TOKENS
from kimi_lite.runtime.cuda.find import find_device
from kimi_lite.runtime.cuda.simulated import SimulatedDevice
from kimi_lite.runtime.cuda.tower import TowerShape, room_for
from kimi_lite.runtime.engine import Engine, choose_context
from kimi_lite.runtime.hybrid import longest
from kimi_lite.runtime.kernels import Mlp
from kimi_lite.runtime.placement import (
    Plan,
    StepTime,
    TowerPlan,
    gb,
    make_plan,
    plan_tower,
    predict,
    predict_cpu,
    ranges,
)
from kimi_lite.runtime.speeds import Speeds
from kimi_lite.runtime.usage import default_directory, load_usage
from kimi_lite.runtime.vision import tower_facts
from kimi_lite.runtime.weights import Weights, open_weights

MEASURE_S = 0.25  # for each of two: one token, and many
COPY_S = 0.05
MEASURED_LAYERS = 2  # for many tokens, which read a whole layer
DECODED = 32
PATCHES = 4096  # of the picture whose time is predicted, if the model takes one as large


def plan_report(
    path: Path,
    *,
    vram: int | None,
    context: int | None,
    speeds: Speeds,
    measure: bool,
    gpu_dense: str | None = None,
) -> Iterator[str]:
    """Lines for people. `speeds` are assumed, but for what `measure` finds out about the CPU, and PCIe if a card is here.

    Raises:
        ModelFileError, UsageError: as loading the file raises them.
        DoesNotFitError: the card, or `vram`, is too small.
    """
    weights = open_weights(path, pack=measure)  # only to be measured must a standard GGUF be packed
    dense.check(gpu_dense, installed=measure)
    context = choose_context(weights.config, path, context)
    sizes = sizes_of(weights if vram == 0 else dense.outline(weights, gpu_dense))
    yield (
        f"{path.name}: {len(sizes.layers)} layers, {gb(sizes.fixed_bytes)} that every token reads, "
        f"{sum(layer.n_experts for layer in sizes.layers)} routed experts of {gb(sizes.routed_bytes)} in all"
    )
    assumed, measured, all_assumed = True, "", "all assumed"
    plan, why_cpu = None, "--vram 0 asks for it"
    if measure:
        speeds, measured = measure_cpu(weights, speeds), f"; measured on {kernels.threads()} threads here"
    if vram != 0:
        name, free = None, vram
        try:
            device = find_device()
            name, free, assumed = device.name, device.free_bytes(), isinstance(device, SimulatedDevice)
            if measure and not assumed:
                speeds = replace(speeds, pcie_gb_s=device.speeds().pcie_gb_s)
                all_assumed = "all assumed but PCIe, which was measured"
            device.close()
        except KimiLiteError as error:
            why_cpu = str(error)
        if free is not None:
            yield _card_line(name, free, vram, why_cpu)
            plan = make_plan(
                sizes,
                device=name or f"an assumed card of {gb(free)}",
                free=free,
                context=context,
                speeds=speeds,
                cap=vram,
                usage=load_usage(weights, default_directory()),
            )
            if gpu_dense:
                yield f"          dense weights in {gpu_dense} by bitsandbytes; predicted as if our kernels read so many bytes"
    if plan is None:
        yield f"card      none is used: {why_cpu}"
        if vram is None:
            yield "          kimi-lite plan --vram 8G says what a card of 8 GB would hold"
        yield f"CPU       everything, with the cache of {context} tokens ({gb(sizes.cache_bytes(context))})"
    else:
        yield from _places(plan)
    tower, limit = _tower_of(weights)
    pictures = plan_tower(tower, plan.left_bytes, longest(limit)) if plan and tower else None
    if tower and pictures:
        yield _pictures_line(tower, pictures, limit)
    yield (
        f"speeds    CPU {speeds.cpu_gb_s:.3g} GB/s, {speeds.cpu_gmac_s:.3g} GMAC/s, copies "
        f"{speeds.copy_gb_s:.3g} GB/s{measured or '; assumed'}"
    )
    if plan is not None:
        yield (
            f"          card {speeds.card_gb_s:g} GB/s, {speeds.card_gmac_s:g} GMAC/s, PCIe {speeds.pcie_gb_s:.3g} GB/s, "
            f"{speeds.launch_us:g} µs a kernel, {speeds.hand_off_us:g} µs a hand-off; {all_assumed}"
        )
    mark = "" if plan is None else " for an assumed card" if assumed else " with the card's speeds assumed"
    yield f"predicted{mark}, not measured:"
    deep = context - MOST_TOKENS
    steps = [(1, 0), (1, deep), (MOST_TOKENS, 0)] if deep > 0 else [(1, 0)]
    if plan is not None and plan.streams(context) and context > MOST_TOKENS:
        steps.append((plan.step(context), 0))
    for T, start in steps:
        step = (
            predict_cpu(sizes, speeds, T=T, start=start)
            if plan is None
            else predict(plan, speeds, T=T, start=start)
        )
        yield _step_line(step, start, cpu_only=plan is None)
    if tower:
        P = min(PATCHES, limit)
        on_card = pictures is not None and pictures.most_patches >= P
        seconds = (
            sum(encode_s(tower, speeds, [P], resident=pictures.resident))
            if pictures and on_card
            else encode_cpu_s(tower, speeds, [P])
        )
        yield f"  {f'a picture of {P} patches':30} {seconds:8.3g} s, on {'the card' if on_card else 'the CPU'}"
    if measure and (plan is None or not assumed):
        yield from _measured(path, context, 0 if plan is None else vram, None if plan is None else gpu_dense)
    elif measure:
        yield "measured  nothing of the card: it is not here"


def measure_cpu(weights: Weights, speeds: Speeds) -> Speeds:
    """Speeds with those of the CPU measured on routed experts of real layers, for one token, for many, and for copies.

    A round goes through layers in turn, so that experts come from memory as in decoding; one round goes before, so that
    none comes from disk.
    """
    layers = [layer.feed_forward for layer in weights.layers if layer.feed_forward.routed is not None]
    sizes = [layer for layer in sizes_of(weights).layers if layer.n_experts]
    rng, found = np.random.default_rng(0), []
    for T, n_layers in ((1, len(layers)), (MOST_TOKENS, MEASURED_LAYERS)):
        x_TD = rng.standard_normal((T, weights.config.hidden_size), np.float32)
        calls, work = list[Callable[[], object]](), 0
        for f, size in zip(layers[:n_layers], sizes, strict=False):
            assert f.routed is not None
            chosen_TA = np.stack([rng.permutation(size.n_experts)[: size.n_active] for _ in range(T)])
            experts_M, tokens_M = chosen_TA.reshape(-1), np.repeat(np.arange(T), size.n_active)
            calls.append(
                partial(
                    kernels.expert_outputs,
                    f.routed,
                    x_TD,
                    experts_M.astype(np.int32),
                    tokens_M.astype(np.int32),
                )
            )
            work += size.n_active * (size.expert_bytes if T == 1 else T * size.expert_macs)
        found.append(work / _seconds_of_a_round(calls, MEASURE_S) / 1e9)
    pinned = np.empty(max(size.expert_bytes for size in sizes), np.uint8)
    stored = [source[: pinned.size] for f in layers for source in _stored(f.routed)]
    copies = [partial(kernels.copy, pinned[: source.size], source) for source in stored]
    copied = sum(source.size for source in stored)
    return replace(
        speeds,
        cpu_gb_s=found[0],
        cpu_gmac_s=found[1],
        copy_gb_s=copied / _seconds_of_a_round(copies, COPY_S) / 1e9,
    )


def _seconds_of_a_round(calls: Sequence[Callable[[], object]], least_s: float) -> float:
    """The mean over as many rounds as last so long, after one that finds pages and starts threads."""
    for call in calls:
        call()
    start, n = time.perf_counter(), 0
    while (spent := time.perf_counter() - start) < least_s or not n:
        for call in calls:
            call()
        n += 1
    return spent / n


def _stored(mlp: Mlp | None) -> list[NDArray[np.uint8]]:
    """An MLP's bytes as they lie."""
    assert mlp is not None
    if mlp.matrices is not None:
        return [matrix.data for matrix in mlp.matrices]
    assert mlp.data is not None
    return [mlp.data]


def _card_line(name: str | None, free: int, vram: int | None, why_not: str) -> str:
    if name is None:
        return f"card      assumed, of {gb(free)}: {why_not}"
    cap = f"; --vram takes {gb(vram)} of it at most" if vram is not None and vram < free else ""
    return f"card      {name}, {gb(free)} free{cap}"


def _places(plan: Plan) -> Iterator[str]:
    """What lies where, and why."""
    sizes = plan.sizes
    yield f"on it     {gb(sizes.fixed_bytes):>9}  attention, norms, routers, shared experts, head: every token reads them"
    yield f"          {gb(plan.cache_bytes):>9}  the cache of {plan.context} tokens"
    yield f"          {gb(plan.reserve_bytes):>9}  activations, and a margin"
    if plan.stream_from is not None:
        yield f"          {gb(plan.stream_bytes):>9}  two buffers for experts on their way, and activations of longer steps"
    share = f"{gb(plan.experts_bytes):>9}  {plan.n_resident} of {plan.n_experts} routed experts"
    if plan.whole:
        yield f"          {share}: all"
    else:
        by = (
            "those used most, by the profile"
            if plan.profiled
            else "the lowest index of each layer, without a profile"
        )
        hits = [hit for layer, hit in zip(sizes.layers, plan.hit, strict=True) if layer.n_experts]
        yield f"          {share}: {by}; they should get {sum(hits) / len(hits):.0%} of the choices"
        moe = [i for i, layer in enumerate(sizes.layers) if layer.n_experts]
        for experts, group in groupby(moe, key=lambda i: plan.resident[i]):
            yield f"          layers {ranges(list(group)):7} experts {ranges(experts) or 'none'}"
        yield f"on CPU    {gb(sizes.routed_bytes - plan.experts_bytes):>9}  the other routed experts, where they lie"
        if plan.stream_from is None:
            yield f"          they are not streamed to the card for prompts: {plan.why_not_streamed}"
        else:
            yield (
                f"          from {plan.stream_from} tokens of a prompt on they are streamed to the card, which then takes less "
                "time than the CPU"
            )
    yield "          embedding rows"


def _tower_of(weights: Weights) -> tuple[TowerShape | None, int]:
    """The image tower beside the model or in its file, if there is one, and how many patches its pictures may have."""
    beside = mmproj_beside(weights.path)
    side = beside if beside.exists() else weights.image_side
    if side is None:
        return None, 0
    config, image, text_width = tower_facts(side)
    return TowerShape.of(config, text_width), image.token_limit


def _pictures_line(tower: TowerShape, plan: TowerPlan, limit: int) -> str:
    if plan.resident:
        return f"pictures  encoded on the card, where the image tower ({gb(tower.bytes)}) stays: all else left it room"
    if plan.most_patches >= limit:
        return f"pictures  encoded on the card; the image tower ({gb(tower.bytes)}) passes through the {gb(plan.room)} that are left"
    if plan.most_patches >= 4:
        return (
            f"pictures  encoded on the card up to {plan.most_patches} patches, the image tower ({gb(tower.bytes)}) passing through "
            f"the {gb(plan.room)} that are left; larger ones on the CPU"
        )
    return (
        f"pictures  encoded on the CPU: {gb(plan.room)} are left on the card, and the smallest takes "
        f"{gb(room_for(tower, [4], resident=False))}"
    )


def _step_line(step: StepTime, start: int, *, cpu_only: bool) -> str:
    what = f"decoding after {start} tokens" if step.T == 1 else f"a prompt of {step.T} tokens"
    line = f"  {what:30} {step.tok_per_s:8.1f} tok/s"
    if cpu_only:
        return line
    on_their_way = f"experts on their way {step.streamed * 1e3:.2f} + " if step.streamed else ""
    return (
        f"{line} = {step.seconds * 1e3:.2f} ms: card {step.card * 1e3:.2f} + its experts {step.card_experts * 1e3:.2f} + "
        f"CPU's experts {step.cpu_experts * 1e3:.2f} + {on_their_way}hand-offs {step.hand_off * 1e3:.2f} − at the same time "
        f"{step.hidden * 1e3:.2f}"
    )


def _measured(path: Path, context: int, vram: int | None, gpu_dense: str | None) -> Iterator[str]:
    """The whole model, where it runs."""
    engine = Engine(path, context=context, vram=vram, gpu_dense=gpu_dense)
    yield f"measured on {engine.placement}:"
    n = min(MOST_TOKENS, context - DECODED - 1)
    if n < 1:
        yield f"  nothing: a context of {context} tokens is too short for it"
        return
    warm_up(engine)
    yield f"  {'decoding after 0 tokens':30} {decode_speed(engine, 0, DECODED).tok_per_s:8.1f} tok/s"
    longest = min(MOST_STREAMED, context - 1)
    for T in (n, longest) if engine.step(longest) > n else (n,):
        yield f"  {f'a prompt of {T} tokens':30} {prefill_speed(engine, T).tok_per_s:8.1f} tok/s"
