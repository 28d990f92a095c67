"""What goes on the card: a plan made from sizes alone, before anything is uploaded.

A byte earns its place on the card by how often a token reads it. Every token reads attention, norms, routers, shared
experts, the head and the cache of the whole context: they go first, and where they do not fit, nothing does. A routed
expert is read by A of E tokens on average, the popular ones more often; what room is left takes experts in order of their
share of all choices (usage.py), and without a profile the lowest index of each layer in turn. Embedding rows are looked up
on the CPU.

An image tower is read once for each picture, so no expert makes room for it. It stays on the card if all that is there
leaves room; else it passes through what is left, the margin included, for as long as a picture is encoded, part by part:
0.47 GB over PCIe, a small share of the time that the picture takes. Pictures that need more than is left are the CPU's.

An expert that is not on the card runs on the CPU, where it lies: at full size it is 4.87 MB, which PCIe 4.0 moves in
0.2 ms and two channels of DDR5 read in 0.07 ms. While the CPU computes, the card runs the shared experts and its own.

A long prompt is another matter: each of its tokens costs the CPU six experts, while an expert crosses once for all of them.
So missing experts are streamed to the card for steps of `stream_from` tokens and more. That takes two buffers there, and the
experts that would lie in their place: it is planned for if a long prompt gains more than the answer after it loses.

The prediction is arithmetic over the same sizes (cost.py), in expectation over what the router may choose.

Dimension key:  L layers with routed experts   E routed experts   A active   T tokens
"""

import math
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from kimi_lite.errors import DoesNotFitError, UsageError
from kimi_lite.runtime.cost import LayerSize, Sizes
from kimi_lite.runtime.cuda.device import MOST_STREAMED, MOST_TOKENS
from kimi_lite.runtime.cuda.tower import TowerShape, room_for
from kimi_lite.runtime.speeds import Speeds
from kimi_lite.runtime.usage import Counts

ANSWER = 256  # tokens that follow a long prompt, where one is weighed against the other
MARGIN = 0.02  # of the budget: what allocation wastes, and what other programs take meanwhile
UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


@dataclass(frozen=True)
class Plan:
    """What goes on one card. Sizes are in bytes."""

    device: str
    budget: int  # what may be taken: what is free, or less if it was capped
    context: int
    sizes: Sizes
    resident: tuple[tuple[int, ...], ...]  # routed experts on the card, layer by layer
    hit: tuple[float, ...]  # of a layer's choices, the share that those experts get
    profiled: bool  # whether a profile chose them
    cache_bytes: int
    reserve_bytes: int  # activations, and a margin
    stream_bytes: int = 0  # buffers for experts on their way, and the activations of longer steps
    stream_from: int | None = None  # tokens of a step for which they are streamed; None for no step
    why_not_streamed: str = ""

    @property
    def experts_bytes(self) -> int:
        layers = zip(self.sizes.layers, self.resident, strict=True)
        return sum(layer.expert_bytes * len(experts) for layer, experts in layers)

    @property
    def left_bytes(self) -> int:
        """Of the budget, what nothing stands for: the margin, and what holds no expert any more."""
        taken = self.sizes.fixed_bytes + self.cache_bytes + self.experts_bytes + self.stream_bytes
        return self.budget - taken - self.sizes.workspace_bytes(self.context)

    @property
    def n_resident(self) -> int:
        return sum(map(len, self.resident))

    @property
    def n_experts(self) -> int:
        return sum(layer.n_experts for layer in self.sizes.layers)

    @property
    def whole(self) -> bool:
        """Nothing is left for the CPU."""
        return self.n_resident == self.n_experts

    def experts(self, index: int) -> tuple[int, ...] | None:
        """Those of one layer; None for all."""
        everything = len(self.resident[index]) == self.sizes.layers[index].n_experts
        return None if everything else self.resident[index]

    def streams(self, T: int) -> bool:
        """Whether missing experts are streamed to the card for a step of T tokens."""
        return self.stream_from is not None and self.stream_from <= T

    def step(self, n_left: int) -> int:
        """Tokens of the next step, of so many that are left."""
        return min(n_left, MOST_STREAMED if self.streams(n_left) else MOST_TOKENS)


def make_plan(
    sizes: Sizes,
    *,
    device: str,
    free: int,
    context: int,
    speeds: Speeds,
    cap: int | None = None,
    usage: Counts | None = None,
) -> Plan:
    """The plan for a card with `free` bytes, of which no more than `cap` may be taken.

    Args:
        speeds: what decides whether experts are streamed, and from how many tokens on.
        usage: how often each expert was chosen, [L, E].

    Raises:
        DoesNotFitError: what every token reads, and the cache of the context, do not fit.
    """
    budget = free if cap is None else min(free, cap)
    room = budget - _least(sizes, budget, context)
    if room < 0:
        raise DoesNotFitError(_too_small(sizes, device, free, cap, context))
    shares = _shares(sizes, usage)
    # Where experts are alike, the lowest index of every layer comes first.
    ranked = sorted(
        (-share / layer.expert_bytes, expert, index)
        for index, (layer, row) in enumerate(zip(sizes.layers, shares, strict=True))
        for expert, share in enumerate(row)
    )
    profiled = usage is not None and bool(usage.any())

    def filled(room: int) -> Plan:
        resident: list[list[int]] = [[] for _ in sizes.layers]
        for _, expert, index in ranked:
            if (n_bytes := sizes.layers[index].expert_bytes) <= room:
                resident[index].append(expert)
                room -= n_bytes
        return Plan(
            device,
            budget,
            context,
            sizes,
            tuple(tuple(sorted(experts)) for experts in resident),
            tuple(float(row[experts].sum()) for row, experts in zip(shares, resident, strict=True)),
            profiled,
            sizes.cache_bytes(context),
            _reserve(sizes, budget, context),
        )

    return _streaming(filled, room, speeds)


def _streaming(filled: Callable[[int], Plan], room: int, speeds: Speeds) -> Plan:
    """The plan that streams experts for long prompts, or the one that keeps more of them, whichever is worth more.

    `filled` makes the plan for so many bytes of routed experts.
    """
    kept = filled(room)
    if kept.whole:
        return kept
    sizes, context = kept.sizes, kept.context
    longer = sizes.workspace_bytes(context, streams=True) - sizes.workspace_bytes(context)
    room -= longer
    # The smaller the buffers, the more experts lie beside them, and the fewer must find place in the buffers.
    largest = max(layer.expert_bytes for layer in sizes.layers)
    for n in range(1, 1 + max(layer.n_experts for layer in sizes.layers)):
        plan = filled(max(0, room - 2 * n * largest))
        buffers = sizes.stream_bytes(plan.resident)
        if buffers <= min(room, 2 * n * largest):
            break
    else:
        return replace(kept, why_not_streamed="their two buffers do not fit beside what every token reads")
    plan = replace(plan, stream_bytes=buffers + longer)
    longest = min(MOST_STREAMED, context)
    # Streaming costs the same for few tokens and many, so the first count at which it is faster divides them.
    tokens = range(2, longest + 1)
    every = replace(plan, stream_from=1)
    first = bisect_left(
        tokens,
        True,
        key=lambda T: predict(every, speeds, T=T).seconds < predict_prompt(plan, speeds, T),
    )
    if first == len(tokens):
        return replace(
            kept, why_not_streamed=f"at these speeds they cost {longest} tokens more than the CPU does"
        )
    plan = replace(plan, stream_from=tokens[first])

    def seconds(plan: Plan) -> float:
        return predict_prompt(plan, speeds, longest) + ANSWER * predict(plan, speeds, start=longest).seconds

    if seconds(plan) >= seconds(kept):
        why_not = f"a prompt of {longest} tokens would gain less than the {ANSWER} of an answer lose by their buffers"
        return replace(kept, why_not_streamed=why_not)
    return plan


def _reserve(sizes: Sizes, budget: int, context: int) -> int:
    return sizes.workspace_bytes(context) + math.ceil(MARGIN * budget)


def _least(sizes: Sizes, budget: int, context: int) -> int:
    """Bytes without a single routed expert."""
    return sizes.fixed_bytes + sizes.cache_bytes(context) + _reserve(sizes, budget, context)


def _shares(sizes: Sizes, usage: Counts | None) -> list[np.ndarray]:
    """For each layer, each expert's share of all choices. One more use of each keeps a short profile from deciding."""
    rows, out = iter(usage if usage is not None else ()), []
    for layer in sizes.layers:
        row = next(rows, None) if layer.n_experts else None
        counts_E = np.ones(layer.n_experts) if row is None else row + 1.0
        out.append(counts_E / max(1.0, counts_E.sum()))
    return out


def _too_small(sizes: Sizes, device: str, free: int, cap: int | None, context: int) -> str:
    budget = free if cap is None else min(free, cap)
    limit = f"{gb(free)} are free" if cap is None or cap >= free else f"--vram allows {gb(cap)}"
    fits = bisect_right(range(1, context), budget, key=lambda n: _least(sizes, budget, n))
    shorter = f"a context of {fits} tokens would fit (--context {fits}); " if fits >= 1 else ""
    return (
        f"{device}: {gb(_least(sizes, budget, context))} are needed at least, for the weights that every token reads "
        f"({gb(sizes.fixed_bytes)}), the cache of {context} tokens ({gb(sizes.cache_bytes(context))}) and working memory "
        f"({gb(_reserve(sizes, budget, context))}), but {limit}; {shorter}--vram 0 runs on the CPU"
    )


@dataclass(frozen=True)
class TowerPlan:
    """How pictures are encoded, with so much room on the card."""

    room: int
    resident: bool  # the tower stays on the card
    most_patches: int  # of a picture, or of pictures together, that the card encodes; 0: none


def plan_tower(shape: TowerShape, room: int, longest: int) -> TowerPlan:
    """The plan for pictures of up to `longest` patches."""
    if shape.bytes + room_for(shape, [longest], resident=True) <= room:
        return TowerPlan(room, True, longest)
    fits = bisect_right(range(1, longest + 1), room, key=lambda P: room_for(shape, [P], resident=False))
    return TowerPlan(room, False, fits)


@dataclass(frozen=True)
class StepTime:
    """What one step of T tokens is predicted to take, in seconds, and where the time goes."""

    T: int
    card: float  # attention, cache, routers and head
    card_experts: float  # shared experts, and those on the card
    cpu_experts: float
    hand_off: float
    hidden: float  # what card and CPU do at the same time
    streamed: float = 0.0  # experts on their way to the card

    @property
    def seconds(self) -> float:
        work = self.card + self.card_experts + self.cpu_experts + self.hand_off + self.streamed
        return work - self.hidden

    @property
    def tok_per_s(self) -> float:
        return self.T / self.seconds


def predict(plan: Plan, speeds: Speeds, *, T: int = 1, start: int = 0) -> StepTime:
    """What a step of T tokens from position `start` on should take with a plan."""
    if plan.streams(T):
        return _predict_streamed(plan, speeds, T, start)
    sizes = plan.sizes
    card, card_experts, cpu_experts, hidden = sizes.head_s(speeds), 0.0, 0.0, 0.0
    hand_off = sizes.layers[0].up_s(speeds, T) + sizes.logits_s(speeds)  # embedding rows up, logits down
    for layer, experts, hit in zip(sizes.layers, plan.resident, plan.hit, strict=True):
        card += layer.attend_s(speeds, T, start) + layer.route_s(speeds) + layer.add_s(speeds)
        if len(experts) < layer.n_experts:
            hand_off += layer.down_s(speeds, T)
        for chance, missing in _missing(layer, hit, T):
            n_here, n_there = _distinct(layer, len(experts), hit, T, missing)
            on_card = layer.experts_s(speeds, T, n_here, T * layer.n_active - missing)
            card_experts += chance * on_card
            if missing:
                on_cpu, back = layer.cpu_experts_s(speeds, n_there, missing), layer.up_s(speeds, missing)
                cpu_experts += chance * on_cpu
                hand_off += chance * back
                hidden += chance * min(on_card, on_cpu + back)
    return StepTime(T, card, card_experts, cpu_experts, hand_off, hidden)


def _predict_streamed(plan: Plan, speeds: Speeds, T: int, start: int) -> StepTime:
    """`predict` for a step whose missing experts are streamed: each layer's while the one before runs."""
    sizes = plan.sizes
    parts = [(min(MOST_TOKENS, T - first), start + first) for first in range(0, T, MOST_TOKENS)]
    hand_off = sizes.layers[0].up_s(speeds, T) + sizes.logits_s(speeds)
    card, card_experts, streamed, now = sizes.head_s(speeds), 0.0, 0.0, 0.0
    running = 0.0  # what the card still has to do when the next layer's experts set out
    for layer, experts in zip(sizes.layers, plan.resident, strict=True):
        if missing := layer.n_experts - len(experts):
            streamed += (coming := layer.stream_s(speeds, missing))
            now, running = now + max(running, coming), 0.0
        for n, at in parts:
            others = layer.attend_s(speeds, n, at) + layer.route_s(speeds) + layer.add_s(speeds)
            acting = sum(_distinct(layer, layer.n_experts, 1.0, n, 0))
            own = layer.experts_s(speeds, n, acting, n * layer.n_active)
            card, card_experts, running = card + others, card_experts + own, running + others + own
    now += running + sizes.head_s(speeds)
    return StepTime(T, card, card_experts, 0.0, hand_off, card + card_experts + streamed - now, streamed)


def predict_prompt(plan: Plan, speeds: Speeds, n: int, *, start: int = 0) -> float:
    """Seconds that n tokens from position `start` on should take, step by step."""
    seconds, end = 0.0, start + n
    while start < end:
        T = plan.step(end - start)
        seconds += predict(plan, speeds, T=T, start=start).seconds
        start += T
    return seconds


def predict_cpu(sizes: Sizes, speeds: Speeds, *, T: int = 1, start: int = 0) -> StepTime:
    """What a step takes without a card."""
    seconds = speeds.cpu_s(sizes.head_bytes, sizes.head_macs)
    for layer in sizes.layers:
        n_bytes = layer.attention_bytes + layer.router_bytes + layer.shared_bytes
        n_bytes += round((start + T) * layer.cache_bytes)
        macs = layer.cpu_attend_macs(T, start) + T * layer.shared_macs
        n_experts = (
            layer.n_experts * (1 - (1 - layer.n_active / layer.n_experts) ** T) if layer.n_experts else 0
        )
        n_bytes += round(n_experts * layer.expert_bytes)
        seconds += speeds.cpu_s(n_bytes, macs + T * layer.n_active * layer.expert_macs)
    return StepTime(T, 0, 0, seconds, 0, 0)


def _missing(layer: LayerSize, hit: float, T: int) -> Iterator[tuple[float, float]]:
    """How many choices of T tokens may fall on the CPU: (probability, number)."""
    n, miss = layer.n_active, max(0.0, 1 - hit) if layer.n_experts else 0.0
    if T > 1:  # many choices: close to their mean
        yield 1.0, T * n * miss
        return
    for k in range(n + 1):
        chance = math.comb(n, k) * miss**k * (1 - miss) ** (n - k)
        if chance:
            yield chance, k


def _distinct(layer: LayerSize, n_resident: int, hit: float, T: int, missing: float) -> tuple[float, float]:
    """How many different experts act, on the card and on the CPU: on each side they count as equally popular."""
    if T == 1:
        return layer.n_active - missing, missing

    def touched(n: int, share: float) -> float:
        return n * (1 - (1 - min(1.0, layer.n_active * share / n)) ** T) if n else 0.0

    return touched(n_resident, hit), touched(layer.n_experts - n_resident, 1 - hit)


def parse_size(text: str, said_by: str = "--vram") -> int:
    """Bytes of a size as a person writes it: 8G, 800M, 1.5GB, 0. Units are decimal."""
    number = text.strip().upper().removesuffix("B")
    unit = number[-1:] if number[-1:] in "KMGT" else ""
    try:
        value = float(number.removesuffix(unit))
    except ValueError:
        value = -1.0
    if not 0 <= value < math.inf:
        none = "0 for the CPU alone" if said_by == "--vram" else "0 for none"
        raise UsageError(f"{said_by} is {text!r}; give a size such as 8G, 1.5G or 800M, or {none}")
    return round(value * UNITS[unit])


def gb(n_bytes: float) -> str:
    """Bytes for people."""
    return f"{n_bytes / 1e9:.2f} GB" if n_bytes >= 1e8 else f"{n_bytes / 1e6:.2f} MB"


def ranges(numbers: Sequence[int]) -> str:
    """Ascending numbers, runs as a-b."""
    out: list[list[int]] = []
    for number in numbers:
        if out and number == out[-1][1] + 1:
            out[-1][1] = number
        else:
            out.append([number, number])
    return ", ".join(f"{a}-{b}" if a < b else f"{a}" for a, b in out)
