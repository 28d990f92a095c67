"""The claims of docs/gpu.md and how measured rows decide them; benchmarks/gpu.py measures the rows."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from kimi_lite.runtime.placement import gb
from kimi_lite.runtime.speeds import Speeds

PATCHES = 4096  # of the picture that is encoded
# By arithmetic: 1.7 trillion products of 8 bits, four an instruction, and 1.1 of 16 bits, one an instruction. A card of the
# smaller kind (28 multiprocessors at 1.8 GHz, 64 of either a clock) takes 0.5 s at its peak, 1.2 s at 40 %; eight cores that
# reach 600 GMAC/s, as two of a server's reached 215, take 4.7 s.
ENCODE_FASTER = 4


@dataclass
class Row:
    """One cap at one depth. Speeds are tokens a second; `why_not` says why there are none."""

    cap: int
    depth: int
    resident: int = 0
    experts: int = 0
    load_s: float = 0.0
    taken: int = 0  # bytes of the card's memory
    prefill: float | None = None
    prefill_by_eights: float | None = None  # with all on the card, and without its tensor cores
    predicted_prefill: float | None = None
    stream_from: int | None = None  # tokens of a prompt for which the plan streams experts
    streamed: float | None = None  # prefill of half as many again
    not_streamed: float | None = None
    decode: float | None = None
    decode_in_turn: float | None = None  # the CPU waiting for the card's experts before it runs its own
    predicted_decode: float | None = None
    ceiling: float | None = None  # the prediction without launches and hand-offs
    gb_per_s: float | None = None  # that the card reads while decoding
    bits: str = ""  # a digest of all logits
    gpu_dense: str | None = None
    proven: bool | None = None  # for gpu_dense: whether the card's products and bits are as they must be
    encode_s: float | None = None  # of the picture
    encode_bits: bool | None = None  # whether its rows are the CPU's
    why_not: str = ""

    @property
    def whole(self) -> bool:
        return self.resident == self.experts > 0


@dataclass
class Claim:
    """A sentence of docs/gpu.md and what became of it: holds, refuted or not measured."""

    says: str
    verdict: str = "not measured"
    evidence: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Setting:
    """What the rows were measured under."""

    card: str
    first_depth: int
    prompt: int
    speeds: Speeds
    known: bool  # whether the card's bandwidths are its own
    arithmetic: bool  # and its rate of products
    simulated: bool
    cpu_bits: str
    cpu_decode: float
    cpu_encode_s: float | None  # of a picture of PATCHES patches; None if the model takes none so large


def judge(s: Setting, rows: Sequence[Row], llama: Sequence[Row], others: Sequence[Row]) -> list[Claim]:
    """The claims of docs/gpu.md, in its order; `others` are rows with `--gpu-dense`."""
    done = [row for row in rows if row.decode is not None]
    none, first = [r for r in done if not r.resident], [r for r in done if r.depth == s.first_depth]
    theirs = {(row.cap, row.depth): row for row in llama}

    def claim(says: str, cases: Sequence[tuple[bool, str]]) -> Claim:
        verdict = "not measured" if not cases else "holds" if all(ok for ok, _ in cases) else "refuted"
        return Claim(says, verdict, [text for _, text in cases])

    def at(row: Row) -> str:
        return f"{gb(row.cap)} after {row.depth}"

    def within(predicted: float | None, measured: float | None, where: str) -> tuple[bool, str]:
        assert predicted
        assert measured
        return abs(predicted / measured - 1) <= 0.15, f"{where}: {predicted} predicted, {measured} measured"

    def beside_llama(what: str, times: float, *, whole: bool) -> list[tuple[bool, str]]:
        """Rows that have all experts on the card, or not, against llama.cpp's of the same cap and depth."""
        pairs = [
            (at(r), getattr(r, what), getattr(theirs[r.cap, r.depth], what))
            for r in done
            if r.whole == whole and (r.cap, r.depth) in theirs
        ]
        return [
            (ours >= times * other, f"{where}: {ours} to {other}")
            for where, ours, other in pairs
            if ours and other
        ]

    base = {row.depth: row.decode for row in none if row.decode}
    eight = [
        (r, r.decode / base[r.depth]) for r in first if r.decode and 7e9 < r.cap < 9e9 and r.depth in base
    ]
    return [
        claim(
            "Wherever experts lie, logits have the CPU's bits.",
            [(r.bits == s.cpu_bits, at(r)) for r in first],
        ),
        claim(
            "No more memory is taken than --vram allows.",
            [(r.taken <= r.cap, f"{at(r)}: {gb(r.taken)}") for r in done],
        ),
        claim(
            "The planner predicts decoding within 15 %.",
            [within(r.predicted_decode, r.decode, at(r)) for r in done if s.known],
        ),
        claim(
            "The planner predicts prefill within 15 %.",
            [within(r.predicted_prefill, r.prefill, at(r)) for r in first if s.known and s.arithmetic],
        ),
        claim(
            "With a card, decoding is faster than on the CPU alone.",
            [(r.decode > s.cpu_decode, f"{at(r)}: {r.decode} to {s.cpu_decode}") for r in first if r.decode],
        ),
        claim(
            "On 8 GB, experts on the card are worth 40 % over none.",
            [(ratio >= 1.4, f"{at(r)}: {ratio:.2f} times") for r, ratio in eight],
        ),
        claim(
            "With all on the card, decoding reads 55 % of the card's bandwidth.",
            [
                (
                    r.gb_per_s >= 0.55 * s.speeds.card_gb_s,
                    f"{at(r)}: {r.gb_per_s} of {s.speeds.card_gb_s} GB/s",
                )
                for r in first
                if r.whole and r.gb_per_s and s.known
            ],
        ),
        claim(
            "With experts on the CPU, decoding reaches 85 % of what bandwidths allow.",
            [
                (r.decode >= 0.85 * r.ceiling, f"{at(r)}: {r.decode} of {r.ceiling}")
                for r in first
                if not r.whole and r.decode and r.ceiling and s.known
            ],
        ),
        claim(
            "With experts on both, card and CPU work at the same time: decoding is faster than in turn.",
            [
                (r.decode > r.decode_in_turn, f"{at(r)}: {r.decode} to {r.decode_in_turn}")
                for r in done
                if r.decode and r.decode_in_turn
            ],
        ),
        claim(
            "With all on the card, an H100 decodes 350 tok/s.",
            [
                (r.decode >= 350, f"{at(r)}: {r.decode}")
                for r in first
                if r.whole and r.decode and "H100" in s.card and not s.simulated
            ],
        ),
        claim(
            "Prefill of 2048 tokens with experts streamed reaches 2500 tok/s.",
            [
                (r.prefill >= 2500, f"{at(r)}: {r.prefill}")
                for r in first
                if r.stream_from and r.prefill and s.prompt == 2048
            ],
        ),
        claim(
            "From half as many tokens again as the plan says, streaming is faster than the CPU.",
            [
                (
                    r.streamed > r.not_streamed,
                    f"{at(r)}, from {r.stream_from}: {r.streamed} to {r.not_streamed}",
                )
                for r in first
                if r.streamed and r.not_streamed
            ],
        ),
        claim(
            "With all on the card, its tensor cores make prefill 1.3 times as fast.",
            [
                (r.prefill >= 1.3 * r.prefill_by_eights, f"{at(r)}: {r.prefill} to {r.prefill_by_eights}")
                for r in first
                if r.prefill and r.prefill_by_eights and not s.simulated
            ],
        ),
        claim(
            "With all on the card, prefill is ahead of llama.cpp's CUDA build.",
            beside_llama("prefill", 1.0, whole=True),
        ),
        claim(
            "With experts on the CPU, prefill is ahead of llama.cpp's CUDA build with the same memory.",
            beside_llama("prefill", 1.0, whole=False),
        ),
        claim(
            "With all on the card, decoding is 1.5 times as fast as llama.cpp's CUDA build.",
            beside_llama("decode", 1.5, whole=True),
        ),
        claim(
            "With experts on the CPU, decoding is 1.3 times as fast as llama.cpp's CUDA build with the same memory.",
            beside_llama("decode", 1.3, whole=False),
        ),
        claim(
            "With --gpu-dense, products are within their bound and all else has the CPU's bits.",
            [(r.proven, f"{r.gpu_dense} {r.why_not}".strip()) for r in others if r.proven is not None],
        ),
        claim(
            "With --gpu-dense, no more memory is taken than --vram allows.",
            [(r.taken <= r.cap, f"{r.gpu_dense}: {gb(r.taken)} of {gb(r.cap)}") for r in others if r.decode],
        ),
        claim(
            "With --gpu-dense, decoding is no faster than with our own kernels.",
            [
                (r.decode <= own.decode, f"{r.gpu_dense}: {r.decode} to {own.decode}")
                for r in others
                for own in done
                if r.decode and own.decode and (own.cap, own.depth) == (r.cap, r.depth)
            ],
        ),
        claim(
            "A picture that is encoded on the card has the CPU's rows.",
            [(r.encode_bits, at(r)) for r in first if r.encode_bits is not None],
        ),
        claim(
            f"A picture of {PATCHES} patches is encoded {ENCODE_FASTER} times as fast as on the CPU.",
            [
                (ENCODE_FASTER * r.encode_s <= s.cpu_encode_s, f"{at(r)}: {r.encode_s} to {s.cpu_encode_s} s")
                for r in first
                if r.encode_s and s.cpu_encode_s
            ],
        ),
    ]
