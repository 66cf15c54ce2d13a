"""Segments of text as token ids, such that no token lies in two segments."""

import json
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import accumulate, pairwise

from lora_engine.data.control import ControlTokens
from lora_engine.data.inputs import NO_INPUTS, TemplateInputs
from lora_engine.data.plans import Plans
from lora_engine.data.segments import Segment
from lora_engine.data.template import Tokenizer, Undecided
from lora_engine.data.turn_ends import TurnEnds
from lora_engine.data.word_memo import Backend, WordMemo, word_memo

# Precedes a text whose beginning must not be taken for that of the whole.
_ANCHOR = "\n"
# On which the two ways to encode are compared.
_SAMPLE = " The quick\n\n  brown Füchse: 12,345 日本 🙂\t<x> don't"


class Encoder:
    """Encodes text by `tokenizer`; what stand-ins stand for is spelled out in plain tokens.

    inputs: what the chat template is given where a record brings nothing of its own.
    """

    def __init__(self, tokenizer: Tokenizer, inputs: TemplateInputs = NO_INPUTS) -> None:
        self.tokenizer = tokenizer
        self.inputs = inputs
        self.control = ControlTokens(tokenizer)
        self.ends = TurnEnds(tokenizer, self.control)
        self.plans = Plans(tokenizer, self.control, inputs)

    def encode_segments(
        self, segments: Sequence[Segment], *, origin: str = ""
    ) -> tuple[list[int], list[bool]]:
        """Token ids [n] and supervised [n] of `encode_parts`."""
        parts = self.encode_parts(segments, origin=origin)
        ids: list[int] = []
        supervised: list[bool] = []
        for segment, part in zip(segments, parts, strict=True):
            ids += part
            supervised += [segment.supervised] * len(part)
        return ids, supervised

    def encode_parts(self, segments: Sequence[Segment], *, origin: str = "") -> list[list[int]]:
        """Token ids of each segment; no token lies in two.

        Each segment is encoded by itself, which is how generation encodes a prompt, if that spells
        the same text as encoding the whole. It does not for tokenizers that put a space before
        whatever they encode; there the whole is encoded, and cut where a token ends at the
        boundary. Raises Undecided "origin: why" where no token ends there, and where text cannot
        be told from a control token.
        """
        parts = [self.encode(segment.text, origin) for segment in segments]
        if len(segments) > 1 and not self._spells_as_written:
            whole = self.encode("".join(segment.text for segment in segments), origin)
            joined = [token for part in parts for token in part]
            if joined != whole and self._spell(joined) != self._spell(whole):
                parts = self._cut(whole, segments, origin)
        return parts

    def token(self, segment: Segment) -> int:
        """The id of the token that is learned in place of the segment's own; -1: none."""
        return self.tokenizer.convert_tokens_to_ids([segment.target])[0] if segment.target else -1

    def encode(self, text: str, origin: str = "") -> list[int]:
        """Token ids of `text`, without the tokens that the tokenizer puts around a whole text."""
        if not self.control.is_marked(text):
            return self._encode(text)
        ids: list[int] = []
        for piece, inner in self._pieces(text):
            if self.control.is_marked(piece):
                ids += self._spelled_out(piece, origin, inner=inner)
            else:
                ids += self._encode(piece)
        return ids

    def _pieces(self, text: str) -> Iterator[tuple[str, bool]]:
        """Pieces of `text`: stretches between control tokens that hold stand-ins, and the rest.

        Yields (piece, whether text precedes it). Where a control token strips the white space
        beside it, it is stripped here: the tokenizer sees the token and the text apart.
        """
        parts = self.control.pattern.split(text)  # plain, token, plain, ..., token, plain
        whole = ""
        for i in range(0, len(parts), 2):
            plain, token = parts[i], parts[i + 1] if i + 1 < len(parts) else ""
            if not self.control.is_marked(plain):
                whole += plain + token
                continue
            if i and self.control.strips(parts[i - 1])[1]:
                plain = plain.lstrip()
            if token and self.control.strips(token)[0]:
                plain = plain.rstrip()
            if whole:
                yield whole, False
            yield plain, i > 0
            whole = token
        if whole:
            yield whole, False

    def _spelled_out(self, marked: str, origin: str, *, inner: bool) -> list[int]:
        """The text of `marked`, which holds no control token, in tokens that are none."""
        ids = self._encode_plain([self.control.unmark(marked)], inner)
        if not self._has_control(ids):
            return ids
        # This tokenizer makes a token of the text nonetheless: encode it in two halves.
        pieces, text = [""], self.control.unmark(marked)
        for i, part in enumerate(self.control.pattern.split(text)):
            half = len(part) // 2 if i % 2 else len(part)
            pieces[-1] += part[:half]
            if i % 2:
                pieces.append(part[half:])
        ids = self._encode_plain(pieces, inner)
        if self._has_control(ids) or self._decode(ids).strip() != text.strip():
            tokens = ", ".join(map(repr, self.control.found_in(text)))
            raise Undecided(
                f"{origin}: the text holds {tokens}, a control token that this tokenizer cannot "
                "write as plain text; take it out of the text"
            )
        return ids

    def _encode_plain(self, pieces: Sequence[str], inner: bool) -> list[int]:
        """The pieces without looking for special tokens in them; inner: text precedes them."""
        ids: list[int] = []
        for piece in filter(None, pieces):
            before: list[int] = []
            if (inner or ids) and not self._begins_alike:
                before = self._encode(_ANCHOR)
                piece = _ANCHOR + piece
            ids += self._encode_as_text(piece)[len(before) :]
        return ids

    @cached_property
    def _begins_alike(self) -> bool:
        """Whether text behind a special token is encoded as at the beginning of the whole."""
        token = next(iter(self.control.texts), "")
        alone = self._encode("a")
        return self._encode(token + "a")[-len(alone) :] == alone

    def _has_control(self, ids: Sequence[int]) -> bool:
        return not self.control.ids.isdisjoint(ids)

    def _cut(self, whole: list[int], segments: Sequence[Segment], origin: str) -> list[list[int]]:
        """Cut the tokens of the whole text at the segments' boundaries.

        The token boundary is where the tokens so far spell what the text so far encodes to.
        """
        spellings = self.tokenizer.convert_ids_to_tokens(whole)
        token_ends = {end: i for i, end in enumerate(accumulate(map(len, spellings)), start=1)}
        spelled = "".join(spellings)
        text, cuts = "", [0]
        for segment in segments[:-1]:
            text += segment.text
            head = self._spell(self.encode(text, origin))
            cut = token_ends.get(len(head))
            if cut is None or not spelled.startswith(head):
                ending = self.control.unmark(text)[-20:]
                raise Undecided(
                    f"{origin}: the tokenizer merges the end of {ending!r} with what follows, so "
                    "the answer does not begin at a token; move a space at the end of the prompt "
                    "to the start of the answer"
                )
            cuts.append(cut)
        cuts.append(len(whole))
        return [whole[start:end] for start, end in pairwise(cuts)]

    def _encode(self, text: str) -> list[int]:
        if self._words is not None:
            return self._words.encode(text)
        if self._backend is not None:
            self._backend.encode_special_tokens = False
            return self._backend.encode_batch_fast([text], add_special_tokens=False)[0].ids
        return self._encode_slowly(text)

    def _encode_slowly(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    @cached_property
    def _backend(self) -> Backend | None:
        """The tokenizer's own part in Rust, if it gives the same, in two thirds of the time."""
        backend: Backend | None = getattr(self.tokenizer, "backend_tokenizer", None)
        if not hasattr(backend, "encode_batch_fast"):
            return None
        assert backend is not None
        texts = [_SAMPLE, *self.control.texts]
        expected = [self._encode_slowly(text) for text in texts]  # sets its state, too
        found = backend.encode_batch_fast(texts, add_special_tokens=False)
        return backend if [encoding.ids for encoding in found] == expected else None

    @cached_property
    def _words(self) -> WordMemo | None:
        """The same by words, where a text's tokens are those of its words."""
        if self._backend is None:
            return None
        self._backend.encode_special_tokens = False
        return word_memo(self._backend, self.tokenizer.added_tokens_decoder)

    @cached_property
    def _spells_as_written(self) -> bool:
        """Whether tokens spell their text byte by byte, whatever stands before and behind it.

        So it is without a normalizer, where the bytes are the alphabet, no space is put before
        the text, and no added token takes in the space beside it.
        """
        if self._backend is None or any(
            token.lstrip or token.rstrip for token in self.tokenizer.added_tokens_decoder.values()
        ):
            return False
        if self._backend.normalizer is not None or self._backend.pre_tokenizer is None:
            return False
        before = json.loads(self._backend.pre_tokenizer.__getstate__())
        steps = before.get("pretokenizers", [before])
        bytes_ = [step for step in steps if step.get("type") == "ByteLevel"]
        prefixed = any(step.get("add_prefix_space") for step in steps)
        return len(bytes_) == 1 and not prefixed

    def _encode_as_text(self, text: str) -> list[int]:
        """The same where special tokens are spelled out too."""
        return self.tokenizer(
            text, add_special_tokens=False, verbose=False, split_special_tokens=True
        )["input_ids"]

    def _decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(ids, clean_up_tokenization_spaces=False)

    def _spell(self, ids: Sequence[int]) -> str:
        return "".join(self.tokenizer.convert_ids_to_tokens(ids))
