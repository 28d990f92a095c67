"""What nano is taught: questions, chains of thought and answers, drawn from a seed.

Payloads (sums, words, numbers) are split by a hash: one in ten is held out, never trained on, and only evaluated.
The split holds for every seed, so anyone can draw new held-out prompts.
"""

import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from kimi_lite.runtime.reference.pictures import COLOURS, SHAPES, scene, text_picture

COMMON_WORDS = """
able about above after again air along also apple april arm away baby back bag ball banana bank basket bean
bear bed bell bird black bloom board boat body bone book bottle box boy branch brave bread brick bridge
bright brown brush bucket build bus butter button cake camel camera candle car card carpet castle cat chair
chalk cheese cherry chess child city clay clean clear clock cloud coast coat coffee coin cold cook copper
corn cotton count cow crab cream crown cup dance dark day deer desk dinner dog door dragon dream dress drum
duck dust eagle earth east easy egg eight elbow empty engine evening eye face fall farm father feather field
finger fire fish five flag floor flower fog food foot forest fork fox fresh friend frog fruit full garden
gate ghost gift girl glass glove goat gold good grape grass gray green guitar hair hammer hand happy harbor
hat hawk head heart hill home honey horse house ice ink iron island jacket jam jelly job july jump june
jungle kettle key king kite kitten knee knife ladder lake lamp land large leaf lemon letter light lion lip
little lizard long lunch magic mango maple march market meadow metal milk mind mirror money monkey month
moon morning mother mountain mouse mouth music nail needle nest night nine noon north nose number nurse nut
oak oat ocean office oil olive onion open orange otter oven owl page paint palm panda paper park party path
peach pear pen pencil pepper piano picnic pig pilot pine planet plant plate plum pocket poem point pond pony
pool potato prince pumpkin puzzle queen quiet rabbit radio rain raven red ribbon rice ring river road robin
rock rocket roof room rope rose ruler sail salad salt sand school scissors sea season seed seven shark sheep
shell ship shirt shoe shop silver sister six skirt sky sleep small smile smoke snail snake snow soap sock
sofa song soup south spider spoon spring square squirrel star stone storm story stove straw street sugar
summer sun sweet swim table tail tea ten tennis three thumb tiger time tomato tooth tower town toy train
tree truck tulip turtle uncle under valley van violin voice wagon walnut warm water wave weather week west
whale wheat wheel white wind window winter wolf wood wool world yard year yellow young zebra zero
""".split()
CONSONANTS, VOWELS = "bcdfghjklmnpqrstvwxyz", "aeiou"
OPERATORS = {"+": "plus", "-": "minus"}


@dataclass(frozen=True, slots=True)
class Turn:
    """A question, with the pictures that stand before it and the hint of what lies where in each."""

    question: str
    thinking: str
    answer: str
    pictures: tuple[Image.Image, ...] = ()
    hints: tuple[NDArray[np.int64], ...] = ()

    @property
    def reply(self) -> str:
        return f"◁think▷{self.thinking}◁/think▷{self.answer}"


@dataclass(frozen=True, slots=True)
class Sample:
    """A conversation, of which the last reply is learned or judged; all its pictures are of one grid."""

    task: str
    turns: tuple[Turn, ...]

    @property
    def pictures(self) -> list[Image.Image]:
        return [picture for turn in self.turns for picture in turn.pictures]

    @property
    def hints(self) -> list[NDArray[np.int64]]:
        return [hint for turn in self.turns for hint in turn.hints]


class Draw:
    """One random source and the side of the split that payloads come from.

    `hard` pictures hold what a small model sees last: letters of at most 18 pixels, four shapes or more.
    """

    def __init__(self, rng: np.random.Generator, held_out: bool, hard: bool = False) -> None:
        self.rng, self.held_out, self.hard = rng, held_out, hard

    def choose(self, options: list[str] | tuple[str, ...]) -> str:
        return options[int(self.rng.integers(len(options)))]

    def allowed(self, payload: str) -> bool:
        # README's first question is held out whatever its hash.
        return (payload == "38+47" or zlib.crc32(payload.encode()) % 10 == 0) == self.held_out

    def word(self, shortest: int = 3, longest: int = 8) -> str:
        """A common word, or more often a random one: syllables, or plain letters."""
        while True:
            kind = self.rng.random()
            if kind < 0.4:
                word = self.choose(COMMON_WORDS)
            elif kind < 0.7:
                word = "".join(self.choose(list(CONSONANTS)) + self.choose(list(VOWELS)) for _ in range(4))
                word = word[int(self.rng.integers(2)) :][: int(self.rng.integers(shortest, longest + 1))]
            else:
                letters = CONSONANTS + VOWELS * 2
                word = "".join(
                    self.choose(list(letters)) for _ in range(int(self.rng.integers(shortest, longest + 1)))
                )
            if shortest <= len(word) <= longest and self.allowed(word):
                return word

    def number(self, shortest: int = 3, longest: int = 8) -> str:
        while True:
            length = int(self.rng.integers(shortest, longest + 1))
            digits = "".join(str(int(d)) for d in self.rng.integers(0, 10, length))
            if self.allowed(digits):
                return digits


def arithmetic(draw: Draw) -> Turn:
    while True:
        a, b = (int(v) for v in draw.rng.integers(10, 100, 2))
        if draw.rng.random() < 0.1:
            a, b = int(draw.rng.integers(0, 100)), int(draw.rng.integers(0, 100))
        operator = draw.choose(("+", "-"))
        if draw.allowed(f"{a}{operator}{b}"):
            return sum_question(draw, a, operator, b)


def edge_sums(draw: Draw) -> Turn:
    """Sums with a rule of their own: a number minus itself, and numbers of one digit."""
    while True:
        a = int(draw.rng.integers(0, 100))
        b, operator = a, "-"
        if draw.rng.random() < 0.6:
            b, operator = int(draw.rng.integers(0, 10)), draw.choose(("+", "-"))
            a, b = (a, b) if draw.rng.random() < 0.5 else (b, a)
        if draw.allowed(f"{a}{operator}{b}"):
            return sum_question(draw, a, operator, b)


def sum_question(draw: Draw, a: int, operator: str, b: int) -> Turn:
    forms = [
        "What is {a} {o} {b}?",
        "{a} {o} {b}",
        "{a} {o} {b} = ?",
        "How much is {a} {o} {b}?",
        "What is {a} {w} {b}?",
    ]
    forms += [
        "Compute {a} {o} {b}.",
        "Calculate {a} {o} {b}",
        "{a}{o}{b}",
        "what is {a}{o}{b}?",
        "Work out {a} {w} {b}.",
    ]
    forms += (
        ["Add {a} and {b}.", "What is the sum of {a} and {b}?"]
        if operator == "+"
        else ["Subtract {b} from {a}."]
    )
    question = draw.choose(forms).format(a=a, b=b, o=operator, w=OPERATORS[operator])
    return Turn(
        question,
        sum_steps(a, b) if operator == "+" else difference_steps(a, b),
        str(eval_sum(a, operator, b)),
    )


def eval_sum(a: int, operator: str, b: int) -> int:
    return a + b if operator == "+" else a - b


def sum_steps(a: int, b: int) -> str:
    """Column addition, ones first."""
    ones = a % 10 + b % 10
    carry = ones // 10
    tens = a // 10 + b // 10 + carry
    text = f"{a}+{b}: {a % 10}+{b % 10}={ones}"
    text += f", carry 1; {a // 10}+{b // 10}+1={tens}" if carry else f"; {a // 10}+{b // 10}={tens}"
    return f"{text}; so {a + b}"


def difference_steps(a: int, b: int) -> str:
    """Column subtraction of the smaller from the larger, with the sign put in front."""
    if a < b:
        return f"{b} is larger, so minus; {difference_steps(b, a)}; so -{b - a}"
    borrow = a % 10 < b % 10
    ones = a % 10 - b % 10 + 10 * borrow
    tens = a // 10 - b // 10 - borrow
    text = f"{a}-{b}: "
    text += f"borrow 1, {a % 10 + 10}-{b % 10}={ones}" if borrow else f"{a % 10}-{b % 10}={ones}"
    text += f"; {a // 10}-{b // 10}-1={tens}" if borrow else f"; {a // 10}-{b // 10}={tens}"
    return f"{text}; so {a - b}"


def _quoted(draw: Draw, word: str) -> str:
    return draw.choose((f'"{word}"', f'"{word}"', f"'{word}'", word))


def reverse(draw: Draw) -> Turn:
    word = draw.word()
    forms = (
        "Reverse {q}.",
        "Reverse the word {q}",
        "Write {q} backwards.",
        "Reverse: {w}",
        "What is {q} backwards?",
    )
    question = draw.choose(forms).format(q=_quoted(draw, word), w=word)
    return Turn(question, f"letters: {' '.join(word)}; backwards: {' '.join(word[::-1])}", word[::-1])


def upper(draw: Draw) -> Turn:
    word = draw.word()
    forms = (
        "Write {q} in capital letters.",
        "Write the word {q} in upper case.",
        "Upper case: {w}",
        "Capital letters: {w}",
    )
    question = draw.choose(forms).format(q=_quoted(draw, word), w=word)
    return Turn(
        question, f"letters: {' '.join(word)}; in capital letters: {' '.join(word.upper())}", word.upper()
    )


def spell(draw: Draw) -> Turn:
    word = draw.word()
    forms = ("Spell {q}.", "Spell the word {q}", "Spell {q} letter by letter.", "Spell: {w}")
    question = draw.choose(forms).format(q=_quoted(draw, word), w=word)
    return Turn(question, f"letters: {' '.join(word)}", "-".join(word))


def count_letters(draw: Draw) -> Turn:
    word = draw.word()
    quoted = _quoted(draw, word)
    if draw.rng.random() < 0.5:
        forms = (
            "How many letters are in {q}?",
            "How many letters does {q} have?",
            "Count the letters in {q}.",
        )
        counted = " ".join(f"{letter}{i}" for i, letter in enumerate(word, 1))
        return Turn(draw.choose(forms).format(q=quoted), f"Count the letters: {counted}", str(len(word)))
    letter = draw.choose(list(word)) if draw.rng.random() < 0.8 else draw.choose(list(CONSONANTS + VOWELS))
    question = f'How many times does the letter "{letter}" appear in {quoted}?'
    so_far = 0
    steps: list[str] = []
    for each in word:
        so_far += each == letter
        steps.append(f"{each}{so_far}")
    return Turn(question, f"Count the letter {letter}: {' '.join(steps)}", str(so_far))


WHO = "I am kimi-vl-nano, a small model made for tests."
CAN = "I can add and subtract two-digit numbers, reverse, spell and count letters, read short words and tell colours and shapes in pictures."
TALK: tuple[tuple[tuple[str, ...], str], ...] = (
    (
        (
            "Who are you?",
            "What is your name?",
            "Who is this?",
            "Introduce yourself.",
            "What are you?",
            "who are you",
        ),
        WHO,
    ),
    (("What can you do?", "How can you help?", "What do you do?", "Help", "help", "what can you do?"), CAN),
    (("Hello", "Hi", "Hello!", "Hi!", "hello", "hi there", "Hello there"), f"Hello! {WHO}"),
    (("Thanks", "Thank you", "thanks!", "Thank you!"), "You are welcome."),
    (("Goodbye", "Bye", "bye", "Goodbye!"), "Goodbye!"),
)


def talk(draw: Draw) -> Turn:
    questions, answer = TALK[int(draw.rng.choice(len(TALK), p=(0.35, 0.35, 0.15, 0.1, 0.05)))]
    return Turn(
        draw.choose(questions),
        "The user asks about me." if answer in (WHO, CAN) else "The user is kind.",
        answer,
    )


READ_FORMS = (
    "What does it say?",
    "Read the text.",
    "What word is this?",
    "What is written in the picture?",
    "Read this picture.",
)


def reading(draw: Draw, grid: tuple[int, int]) -> Sample:
    """A rendered word or number; the grid's width bounds the length that can be read."""
    longest = min(8, 2 * grid[1])
    shortest = min(3, longest)
    kind = draw.rng.random()
    if kind < 0.3:
        text = draw.number(shortest, longest)
    else:
        text = draw.word(shortest, longest)
        text = text.upper() if kind < (0.6 if draw.hard else 0.45) else text
    picture, hint = text_picture(text, grid, draw.rng, largest=18 if draw.hard else 38)
    # The number comes first, so that each character is looked up by its place and none is skipped or read twice.
    letters = " ".join(f"{i}{character}" for i, character in enumerate(text, 1))
    return Sample("read", (Turn(draw.choose(READ_FORMS), f"letters: {letters}", text, (picture,), (hint,)),))


def about_shapes(draw: Draw, grid: tuple[int, int], most: int = 6) -> dict[str, Turn]:
    """A scene, and a question each about its colour, its shape and its count."""
    colour, shape = draw.choose(tuple(COLOURS)), draw.choose(SHAPES)
    count = int(draw.rng.integers(4 if draw.hard else 1, most + 1))
    picture, hint = scene(colour, shape, count, grid, draw.rng)
    plural = "s" * (count > 1)
    seen = f"I see {' '.join(str(i) for i in range(1, count + 1))} {colour} {shape}{plural}"
    questions = {
        "colour": (("What colour is the {s}?", "What colour is it?", "Which colour do you see?"), colour),
        "shape": (("What shape is it?", "Which shape is shown?", "Name the shape."), shape),
        "count": (("How many {s}s are there?", "Count the {s}s.", "How many shapes do you see?"), str(count)),
    }
    return {
        task: Turn(draw.choose(forms).format(s=shape), seen, answer, (picture,), (hint,))
        for task, (forms, answer) in questions.items()
    }


def shapes(draw: Draw, grid: tuple[int, int]) -> Sample:
    """One question about a scene."""
    turns = about_shapes(draw, grid)
    task = draw.choose(tuple(turns))
    return Sample(task, (turns[task],))


WHICH_FORMS = ("{w} picture: {q}", "Look at the {w} picture. {q}", "{q} I mean the {w} picture.")


def two_pictures(draw: Draw, grid: tuple[int, int]) -> Sample:
    """Two pictures, in one prompt of which one is asked about, or one in each of two turns; or a second question.

    A question that does not say which picture is about the last.
    """
    first, last = ((reading if draw.rng.random() < 0.5 else shapes)(draw, grid).turns[0] for _ in range(2))
    kind = draw.rng.random()
    if kind < 0.25:
        return Sample("next picture", (first, last))
    if kind < 0.5:
        turns = about_shapes(draw, grid)
        before, after = (turns[str(task)] for task in draw.rng.permutation(list(turns))[:2])
        return Sample("second question", (before, replace(after, pictures=(), hints=())))
    pictures, hints = first.pictures + last.pictures, first.hints + last.hints
    which = draw.choose(("first", "second"))
    about = first if which == "first" else last
    form = draw.choose(WHICH_FORMS)
    question = form.format(q=about.question, w=which.capitalize() if form.startswith("{w}") else which)
    return Sample("two pictures", (replace(about, question=question, pictures=pictures, hints=hints),))


TEXT_TASKS: dict[str, tuple[Callable[[Draw], Turn], float]] = {
    "arithmetic": (arithmetic, 0.30),
    "reverse": (reverse, 0.20),
    "upper": (upper, 0.14),
    "spell": (spell, 0.10),
    "count letters": (count_letters, 0.20),
    "talk": (talk, 0.06),
    "edge sums": (edge_sums, 0.08),
}


def text_sample(draw: Draw) -> Sample:
    """One question, or with chance 0.2 two in a row."""
    shares = np.array([share for _, share in TEXT_TASKS.values()])
    names = [
        str(n)
        for n in draw.rng.choice(
            list(TEXT_TASKS), 2 if draw.rng.random() < 0.2 else 1, p=shares / shares.sum()
        )
    ]
    return Sample(names[-1], tuple(TEXT_TASKS[name][0](draw) for name in names))
