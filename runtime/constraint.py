"""Answers that are JSON of a given schema, or match a regular expression, by llguidance.

A grammar says which tokens may come next; all others are never drawn. Thinking stays free: the grammar begins with an
optional chain `◁think▷ … ◁/think▷` of any text, and what must be kept to is the answer after it. Where the answer may end,
tokens that end the turn are allowed; where it must, it does without one. Whoever cuts it short (max_tokens, a full context)
gets a piece.
"""

import json
import re
from collections.abc import Mapping
from typing import Any

import llguidance
import numpy as np
from numpy.typing import NDArray

from kimi_lite.errors import UsageError
from kimi_lite.runtime.tokenizer import Tokenizer

MAX_TEXT = 1 << 20  # characters of a schema or an expression
# Between the parts of JSON: what people write, and never so much that a model could go on with it for ever.
WHITE_SPACE = r"(\x20|\x0A{1,2}[\x20\x09]{0,20})"
VALUES = ("const", "default", "enum", "examples")  # keywords that hold values, not schemas
OPEN_BY = {"additionalProperties", "patternProperties", "unevaluatedProperties"}
THINKING = r"think[lazy]: /◁think▷(?s:.*)◁\/think▷/"


class Constraint:
    """Follows one answer: `allowed` before each token, `accept` after it."""

    def __init__(
        self, tokenizer: Tokenizer, *, schema: Mapping[str, Any] | None = None, regex: str | None = None
    ) -> None:
        """One of `schema` and `regex` (Rust's syntax, of the whole answer).

        Raises:
            UsageError: it cannot be read, is too large, or uses what llguidance does not know.
        """
        if schema is not None:
            what, style = "the schema", {"x-guidance": {"whitespace_pattern": WHITE_SPACE}}
            try:
                rule = "%json " + json.dumps({**style, **_closed(schema)})
            except RecursionError:
                raise UsageError("the schema is nested too deeply to be followed") from None
            except TypeError as error:
                raise UsageError(f"the schema holds what JSON cannot: {error}") from None
        else:
            assert regex is not None, "one of the two"
            what, rule = "the regular expression", f"/{llguidance.regex_to_lark(regex)}/"
        if len(rule) > MAX_TEXT:
            raise UsageError(f"{what} has {len(rule):,} characters; at most {MAX_TEXT:,} can be followed")
        self._what, self._tokenizer = what, tokenizer
        self._answer = f"answer: {rule}"
        self._matcher = self._begin(
            f"start: (think SPACE?)? answer\nSPACE: /[ \\n]{{1,4}}/\n{THINKING}\n{self._answer}"
        )

    def _begin(self, grammar: str) -> llguidance.LLMatcher:
        matcher = llguidance.LLMatcher(self._tokenizer.for_grammars, grammar, log_level=0)
        if matcher.is_error():
            raise UsageError(f"{self._what} cannot be followed: {_reason(matcher.get_error())}")
        return matcher

    def allowed(self) -> NDArray[np.bool_]:
        """Which tokens may come next, by id. Raises UsageError where the grammar has become too complex."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        if self._matcher.is_error():
            raise UsageError(f"{self._what} cannot be followed here: {_reason(self._matcher.get_error())}")
        return np.unpackbits(bits, bitorder="little").astype(np.bool_)

    def accept(self, token: int) -> None:
        """The token that was drawn from those allowed."""
        self._matcher.consume_token(token)

    @property
    def complete(self) -> bool:
        """Nothing can follow: the answer has ended, whether the model says so or not."""
        return bool(self._matcher.is_stopped()) and not self._matcher.is_error()

    def close_thinking(self) -> None:
        """Somebody else ended the chain: from here on there is only the answer."""
        self._matcher = self._begin(f"start: answer\n{self._answer}")


def _closed(schema: Mapping[str, Any]) -> dict[str, Any]:
    """The schema with its objects limited to the properties that it names, where it does not say otherwise.

    It would allow any others, and a model that may always add one more seldom comes to an end. Where parts are put
    together by `allOf`, each of them names some of the properties, so those stay open.
    """

    def close(node: Any) -> Any:
        if isinstance(node, list):
            return [close(each) for each in node]
        if not isinstance(node, Mapping):
            return node
        node = {key: value if key in VALUES else close(value) for key, value in node.items()}
        if isinstance(node.get("properties"), dict) and not OPEN_BY.intersection(node):
            node["additionalProperties"] = False
        return node

    return dict(schema) if '"allOf"' in json.dumps(schema) else close(schema)


def _reason(text: str) -> str:
    """One line of an error that shows where in the grammar it stands."""
    lines = [line.strip() for line in text.splitlines()] or [""]
    reasons = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return " ".join([re.sub(r"^\d+\(\d+\): ", "", lines[0]), *reasons])[:300]
