"""kimi-vl-nano: the sizes and the vocabulary of the small model that the project ships.

The architecture is Kimi-VL's, every part of it; only the sizes are small. They are chosen so that a test on nano means
something for the real model: the hidden size is 256, so 256-wide block formats apply as they do at full size; the
expert width (96) and the no-rope width (96) are multiples of 32 but not of 256, so their fallbacks apply too; the
four head sizes N, R, V and C all differ, so that no transposition can hide.

The vocabulary keeps payload words spelled in letters. Merges exist only inside chains that begin with a space or a
capital ("▁the": "▁t", "▁th", "▁the"), for the words that questions and thinking are made of; no two small letters
merge on their own. Quoted words, numbers and capitals therefore reach the model letter by letter, and spelling,
reversing and counting are tasks on what it sees. A few fixed pieces of the template are tokens as a whole, which
tiktoken looks up before it merges anything.
"""

from kimi_lite.formats.config import TextConfig, VisionConfig

TEMPLATE_TEXT = """
What is the sum of and plus minus How much Add to Subtract from Compute Work out Calculate Tell me please
Reverse Spell Write the word in capital letters upper case backwards count Count How many letters are there does
have times appear letter by Read this picture image What text word number does it show say shown can you read see
colour color shape Which Name and the of a is in are do I am write carry borrow then so with one word answer
There red green blue yellow black orange purple circle square triangle diamond circles squares triangles diamonds
You Who are you Hello Hi kimi-vl-nano a small model Kimi helpful assistant system user image My name made for tests
can add subtract two-digit numbers reverse spell count letters read short words and tell colours shapes pictures
The larger answer takes minus letters: Thanks you're welcome Goodbye your Introduce yourself help
"""

WHOLE_PIECES = (
    "system",
    "user",
    "assistant",
    "image",
    "◁think",
    "think",
    "▷letters",
    "▷Count",
    "▷The",
    "letters",
)


def build_ranks() -> list[bytes]:
    """All single bytes, then the chains of every template word, in a fixed order."""
    ranks = [bytes([b]) for b in range(256)]
    known = set(ranks)

    def chain(word: bytes) -> None:
        for end in range(2, len(word) + 1):
            if word[:end] not in known:
                known.add(word[:end])
                ranks.append(word[:end])

    for mark in ("◁", "▷"):  # three bytes each
        chain(mark.encode())
    for word in dict.fromkeys(TEMPLATE_TEXT.split()):
        plain = "".join(c for c in word if c.isalpha())
        chain(f" {plain}".encode())
        if plain[0].isupper() and len(plain) > 1:
            chain(plain.encode())
    for text in (" =", " +", " -", ". ", ", ", "; ", ": ", "  "):
        chain(text.encode())
    return ranks + [piece.encode() for piece in WHOLE_PIECES]


RANKS = build_ranks()
FIRST_SPECIAL = len(RANKS)

NANO_TEXT = TextConfig(
    vocab_size=FIRST_SPECIAL + 256,
    hidden_size=256,
    n_layers=4,
    n_heads=4,
    kv_rank=128,
    nope_dim=96,
    rope_dim=32,
    value_dim=64,
    dense_hidden_size=512,
    n_dense_layers=1,
    n_experts=8,
    n_active=3,
    n_shared=2,
    expert_hidden_size=96,
    routed_scale=2.446,
    rms_eps=1e-5,
    rope_theta=800000.0,
    context_length=8192,
    bos_id=FIRST_SPECIAL,
    eos_id=FIRST_SPECIAL + 2,
    pad_id=FIRST_SPECIAL + 255,
)
NANO_VISION = VisionConfig(
    patch_size=14,
    grid_height=16,
    grid_width=16,
    n_heads=4,
    n_layers=5,
    hidden_size=192,
    ffn_size=576,
    merge=2,
)
TOKEN_LIMIT = 1024  # patches of a picture: the largest in training are far smaller
