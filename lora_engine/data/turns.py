"""Where a rendering holds what the assistant writes, turn by turn, told by rendering.

What a turn says is found by marks (see `marks`), never by searching for its text. From there:

- it begins where the generation prompt ends: the conversation before it, rendered with that
  prompt, is a prefix of the whole; or, where the template writes earlier turns otherwise once more
  follow, what it adds for the prompt stands between the marks before and those of the turn;
- it ends with what the template writes behind it whatever follows: the conversation up to it,
  rendered, and the whole go on alike behind its last mark. White space behind an end goes without
  it. A template that writes no end of a turn has the next role's mark, which the model then has to
  write; behind the last turn it is added.

Whatever cannot be told so is an Undecided with the message's number.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from lora_engine.data.forms import Written
from lora_engine.data.inputs import TemplateInputs
from lora_engine.data.marks import EVERY, TAG, Mark, Marked, Marker, read_marks
from lora_engine.data.plans import Look
from lora_engine.data.template import Message, Tokenizer, Undecided, try_render
from lora_engine.data.turn_ends import ASKED, TurnEnds

# What is said of turns whose ends are learned although the template writes others, or none.
ADDED, LEARNED_THERE = "added, which ends the last turn", "which is learned there"
_NO_END = "the end of an answer is written otherwise where more follows, and not learned there"


@dataclass(frozen=True)
class Turn:
    """What an assistant writes in one message: characters [start, end) of the rendering.

    reasoning_end: where its reasoning and the tag behind it end; start: it has none.
    calls: characters [from, to) of its tool calls, with the end of the turn; none: (end, end).
    added: the end of the turn, where the rendering stops before it.
    instead: (where a control token behind the turn ends, the one to learn in its place), where the
        template ends a turn by another one once more follows.
    notes: what its author may not expect.
    """

    message: int
    start: int
    end: int
    reasoning_end: int
    calls: tuple[int, int]
    added: str = ""
    instead: tuple[int, str] | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Turns:
    """Finds the turns of one conversation, as `written`.

    needs_reasoning: whether the reasoning of the last answer has to be written.
    looks: the renderings that were looked at.
    """

    written: Written
    tokenizer: Tokenizer
    inputs: TemplateInputs
    ends: TurnEnds
    origin: str
    needs_reasoning: bool = True
    looks: list[Look] = field(default_factory=list)

    def find(self, messages: Sequence[int]) -> list[Turn]:
        """The turns of these assistant's messages, which do not overlap."""
        turns: list[Turn] = []
        for index in messages:
            turn = self._turn(index)
            if turns and turn.start < (end := turns[-1].end):
                if self.written.whole[turn.start : end].strip():
                    raise self._refusal(index, "it does not stand behind the message before")
                turn = replace(turn, start=end)
            turns.append(turn)
        return turns

    def check(self, index: int) -> None:
        """Raises Undecided if the template does not write all that the message says."""
        self._run(index)

    def after_prompt(self, index: int, start: int, end: int) -> int:
        """`start`, or where the generation prompt ends if that is known and within [start, end)."""
        run = self._run(index)
        try:
            prompt_end = self._start(index, self._floor(run), run[0].position)[0]
        except Undecided:
            return start
        return prompt_end if start <= prompt_end < end else start

    def parts(self, index: int, start: int, end: int) -> tuple[int, tuple[int, int]]:
        """(end of the reasoning, tool calls) as in a Turn, of what stands in [start, end)."""
        run = self._run(index)
        thought_end = self._reasoning_end(run, start, end)
        return thought_end, self._calls(run, thought_end, end)

    def _turn(self, index: int) -> Turn:
        run = self._run(index)
        first, floor, ceiling = run[0].position, self._floor(run), self._ceiling(run)
        start, notes = self._start(index, floor, first)
        end, added = self._end(index, run, ceiling)
        instead = None
        if added:
            notes = (*notes, f"{added.strip()!r} {ADDED}")
        elif self.ends.are_written and not self.written.whole[run[-1].position : end].strip():
            instead = self._instead(index, run, end, ceiling)
            notes = (*notes, self._end_note(end, instead))
        reasoning_end, calls = self.parts(index, start, end)
        return Turn(
            message=index,
            start=start,
            end=end,
            reasoning_end=reasoning_end,
            calls=calls,
            added=added,
            instead=instead,
            notes=notes,
        )

    def _run(self, index: int) -> list[Mark]:
        """The marks of the message up to those of another one."""
        leaves, run = self.written.leaves, list[Mark]()
        for mark in self.written.marked.marks:
            if leaves[mark.leaf].message == index:
                run.append(mark)
            elif run:
                break
        if not run and any(leaf.message == index and not leaf.blank for leaf in leaves):
            raise self._unwritten(index, "text")
        if not run:
            raise self._refusal(index, "its text cannot be seen in what the template writes")
        nowhere = self.written.unwritten()
        for leaf in self.written.unwritten(run):
            if leaf.message != index:
                continue
            if leaf.part == "reasoning" and not (
                self.needs_reasoning and self._is_in_last_answer(index)
            ):
                continue
            what = {"text": "text", "reasoning": "reasoning", "call": "tool calls"}[leaf.part]
            if leaf in nowhere:
                raise self._unwritten(index, what)
            raise self._refusal(index, f"its {what} stands apart from the rest of it")
        return run

    def _unwritten(self, index: int, what: str) -> Undecided:
        return Undecided(
            f"{self.origin}: the chat template does not write the {what} of message {index + 1}; "
            "take it out, or give a data.chat_template that does"
        )

    def _is_in_last_answer(self, index: int) -> bool:
        return all(m["role"] not in ("user", "system") for m in self.written.messages[index:])

    def _floor(self, run: Sequence[Mark]) -> int:
        """The end of what another message says before the run."""
        place = self.written.marked.marks.index(run[0])
        return self.written.marked.marks[place - 1].position if place else 0

    def _ceiling(self, run: Sequence[Mark]) -> int:
        """The beginning of what another message says behind the run."""
        marks = self.written.marked.marks
        place = marks.index(run[0]) + len(run)
        return marks[place].position if place < len(marks) else len(self.written.whole)

    # Where a turn begins

    def _start(self, index: int, floor: int, first: int) -> tuple[int, tuple[str, ...]]:
        whole, before = self.written.whole, self.written.messages[:index]
        prompt = self._try(before, generation_prompt=True)
        if prompt is not None and whole.startswith(prompt) and floor <= len(prompt) <= first:
            return len(prompt), ()
        gap = whole[floor:first]
        rendered = self._try(before)
        header = self.ends.header
        if prompt is not None and rendered is not None:
            header = self.ends.added_to(rendered, prompt)
        pieces = list(self.ends.pieces(header))
        for count in range(len(pieces), 0, -1):
            written, left = "".join(pieces[:count]), "".join(pieces[count:])
            if not written.strip():
                break
            place = gap.rfind(written)
            if place >= 0 and self.ends.is_optional(left):
                return floor + place + len(written), _left_out(left)
        if (
            rendered is not None
            and whole.startswith(rendered)
            and floor <= len(rendered) <= first
            and (not header or (header != self.ends.header and self.ends.is_optional(header)))
        ):
            return len(rendered), _left_out(header)
        if index and self._joins(index, gap):
            return floor, ()
        if not header and (behind := self._behind_last(index)):
            common = self.ends.common(behind, gap)
            if not behind[len(common) :].strip():
                return floor + len(common), ()
        raise self._refusal(index, "the generation prompt is not written before it")

    def _joins(self, index: int, gap: str) -> bool:
        """Whether the template writes the message on behind the assistant's one before it."""
        return self.written.messages[index - 1]["role"] == "assistant" and not gap.strip()

    def _behind_last(self, index: int) -> str:
        """What the template writes behind the last mark of the messages before."""
        marked = self._marked(index)
        return marked.text[marked.marks[-1].position :] if marked and marked.marks else ""

    # Where a turn ends

    def _end(self, index: int, run: Sequence[Mark], ceiling: int) -> tuple[int, str]:
        """(where the turn ends, what ends it that is not written)."""
        whole, messages = self.written.whole, self.written.messages
        is_last = index == len(messages) - 1
        calls = bool(messages[index].get("tool_calls") or messages[index].get("function_call"))
        closing = self.ends.closing.strip()
        if not calls and closing and self._shows_all(index, run):
            last = run[-1].position
            after = whole[last:ceiling]
            blank = len(after) - len(after.lstrip())
            if after[blank:].startswith(closing):
                return last + blank + len(closing), ""
        last, behind = self._behind_turn(index, run)
        after = whole[last:ceiling]
        if is_last and (own := behind.rstrip()) and self.ends.are_written:
            return last + len(self._kept_end(index, own)), ""
        own = self.ends.common(behind, after)
        if self.ends.are_written:
            own = self.ends.without_opening(own, whole)
            return last + len(own.rstrip() or own), ""
        if mark := self.ends.mark_at(after[len(own) :]):
            is_prompt = self.ends.header.strip().startswith(mark.strip())
            return last + len(own) + (0 if is_prompt else len(mark)), ""
        if is_last and (added := self._next_mark(calls)):
            return len(whole), added
        if self.ends.closing and own.endswith(self.ends.closing):  # white space
            return last + len(own), ""
        if is_last and self.tokenizer.eos_token:
            return len(whole), self.tokenizer.eos_token
        raise self._refusal(index, "nothing ends it that the model could learn to write")

    def _instead(
        self, index: int, run: Sequence[Mark], end: int, ceiling: int
    ) -> tuple[int, str] | None:
        """See `Turn.instead`: where nothing but one control token ends the turn if nothing follows,
        and another one stands in its place."""
        last, behind = self._behind_turn(index, run)
        token, there = self.ends.mark_at(behind), self.ends.mark_at(self.written.whole[end:ceiling])
        if end != last or token.strip() != behind.strip() or not there:
            return None
        return (
            (end + len(there), token) if there == there.strip() and token == token.strip() else None
        )

    def _end_note(self, end: int, instead: tuple[int, str] | None) -> str:
        if instead is None:
            return _NO_END
        there = self.written.whole[end : instead[0]]
        return f"{there!r} behind an answer stands for {instead[1]!r}, {LEARNED_THERE}"

    def _kept_end(self, index: int, own: str) -> str:
        """What of the end of the whole is there too where another message follows."""
        more = self._marked(len(self.written.messages), [*self.written.messages, ASKED])
        places = [m.position for m in more.marks if self._message(m) == index] if more else []
        if more is None or not places:
            return own
        kept = self.ends.common(own, more.text[places[-1] :])
        return self.ends.without_opening(kept, more.text).rstrip() or own

    def _behind_turn(self, index: int, run: Sequence[Mark]) -> tuple[int, str]:
        """(end of what the turn says, what the template writes behind it if nothing follows)."""
        if index == len(self.written.messages) - 1:
            alone: Marked | None = self.written.marked
        else:
            alone = self._marked(index + 1)
        marks = [m for m in alone.marks if self._message(m) == index] if alone else []
        if alone is None or not marks:
            raise self._refusal(index, "the template does not write the messages up to it")
        for mark in reversed(marks):
            last = next((m for m in run if m.leaf == mark.leaf and not m.opens), None)
            if last is not None:
                return last.position, alone.text[mark.position :]
            if not self.written.leaves[mark.leaf].blank:
                break
        raise self._refusal(index, "its end is written otherwise where more follows")

    def _next_mark(self, calls: bool) -> str:
        """What the next message would begin with: a tool's behind calls, otherwise a user's."""
        whole = self.written.whole
        follower: Message = {"role": "tool", "content": "?"} if calls else ASKED
        more = self._try([*self.written.messages, follower])
        if more is not None and more.startswith(whole):
            return self.ends.mark_at(more[len(whole) :])
        return "" if calls else self.ends.next_mark

    def _shows_all(self, index: int, run: Sequence[Mark]) -> bool:
        """Whether the run has each leaf of the message once, the end of its text among them."""
        once = len({mark.leaf for mark in run}) * 2 == len(run)
        return once and self.written.levels[index] == EVERY

    # What a turn consists of

    def _reasoning_end(self, run: Sequence[Mark], start: int, end: int) -> int:
        marks = [i for i, mark in enumerate(run) if self._part(mark) == "reasoning"]
        if not marks:
            return start
        if any(self._part(mark) == "text" for mark in run[: marks[-1]]):
            if not self.needs_reasoning:
                index = self._message(run[0])
                raise self._refusal(index, "its reasoning stands behind its text")
            return start
        behind = run[marks[-1]].position
        rest = self.written.whole[behind : self._next_open(run, marks[-1], end)]
        length = 0
        for piece in self.ends.pieces(rest):
            length += len(piece)
            if TAG.fullmatch(piece):
                blank = rest[length:]
                return min(behind + length + len(blank) - len(blank.lstrip()), end)
        return behind + len(rest)

    def _next_open(self, run: Sequence[Mark], place: int, end: int) -> int:
        return next((mark.position for mark in run[place + 1 :] if mark.opens), end)

    def _calls(self, run: Sequence[Mark], thought_end: int, end: int) -> tuple[int, int]:
        places = [i for i, mark in enumerate(run) if self._part(mark) == "call"]
        if not places:
            return end, end
        leaves = self.written.leaves
        texts = [mark for mark in run if self._part(mark) == "text"]
        said = [mark.position for mark in texts if not leaves[mark.leaf].blank]
        before = [p for p in said if p <= run[places[0]].position]
        behind = [p for p in said if p >= run[places[-1]].position]
        return max([thought_end, *before[-1:]]), min([end, *behind[:1]])

    # Renderings

    def _try(self, messages: Sequence[Message], *, generation_prompt: bool = False) -> str | None:
        self.looks.append(Look(messages, generation_prompt))
        return try_render(
            messages, self.tokenizer, generation_prompt=generation_prompt, inputs=self.inputs
        )

    def _marked(self, count: int, messages: Sequence[Message] | None = None) -> Marked | None:
        """The first `count` messages with their marks, or `messages`, of which they are."""
        messages = self.written.messages[:count] if messages is None else messages
        self.looks.append(Look(messages))
        levels = [*self.written.levels, 0][: len(messages)]
        marked = Marker(levels).mark(messages)
        rendered = try_render(marked, self.tokenizer, inputs=self.inputs)
        return None if rendered is None else read_marks(rendered)

    def _message(self, mark: Mark) -> int:
        return self.written.leaves[mark.leaf].message

    def _part(self, mark: Mark) -> str:
        return self.written.leaves[mark.leaf].part

    def _refusal(self, index: int, why: str) -> Undecided:
        return Undecided(
            f"{self.origin}: the chat template writes message {index + 1} so that its tokens "
            f"cannot be told from the rest: {why}; give another data.chat_template, learn from all "
            "tokens (loss_on: all), or use records with 'prompt' and 'completion'"
        )


def _left_out(text: str) -> tuple[str, ...]:
    if not text.strip():
        return ()
    return (f"an answer is written without {text.strip()!r}, which the generation prompt ends in",)
