"""`infopo chat` talks with a model in the terminal, or with two at once whose answers stand one below the other."""

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from transformers.utils.logging import disable_progress_bar

from infopo import durable
from infopo.adapters import load_for_use
from infopo.errors import ConfigError, DataError, InfoPOError, printable
from infopo.evaluation.drawing import Drawn, Request
from infopo.evaluation.items import Item, Task
from infopo.evaluation.law import Law
from infopo.evaluation.prompting import Prompts
from infopo.evaluation.samples import prompt_hash, seed_of
from infopo.evaluation.streaming import stream
from infopo.evaluation.subjects import LoadedModel
from infopo.models import load_tokenizer
from infopo.output import say
from infopo.runs import to_json
from infopo.texts import Message
from infopo.workflows.evaluate import model_in

COMMANDS = (
    "/reset begins anew, /system TEXT sets the system message (none removes it), /save FILE writes the "
    "conversation, /quit ends"
)

_TASK = Task("chat", lambda _: [], {}, 512, plain="{prompt}")


@dataclass
class Side:
    """A model in a conversation, with its own history.

    Attributes:
        subject: The model.
        prompts: How it is asked.
        law: The distribution of its answers.
        seed: Seed of the conversation.
        history: The messages so far, without the system message.
    """

    subject: LoadedModel
    prompts: Prompts
    law: Law
    seed: int
    history: list[Message] = field(default_factory=list)

    @property
    def is_plain(self) -> bool:
        """Whether it continues text, since it has no chat template."""
        return self.prompts.style == "plain"

    def answer(
        self, message: str, system: str | None, on_text: Callable[[str], object]
    ) -> tuple[Drawn | None, str]:
        """Answers a message, and keeps both in its history.

        Args:
            message: What the user says.
            system: System message, or None.
            on_text: Takes the answer piece by piece.

        Returns:
            The answer, or None if Ctrl-C has stopped it, and a note on why it ended early, or "".

        Raises:
            DataError: The template refuses the conversation, or it leaves no room for an answer.
        """
        asked: Message = {"role": "user", "content": message}
        first: list[Message] = [{"role": "system", "content": system}] if system else []
        # Plain text has no turns: what came before would be read as part of the text.
        item = Item("the conversation", message if self.is_plain else [*first, *self.history, asked], {})
        ids = self.prompts.ids(item)
        law, room = self._law_within(len(ids))
        request = Request(ids, seed_of(self.seed, prompt_hash(ids), 0))
        ends = self.subject.law(self.prompts, law)["ends"]
        said: list[str] = []

        def take(piece: str) -> None:
            said.append(piece)
            on_text(piece)

        drawn, note = None, "stopped"
        with contextlib.suppress(KeyboardInterrupt):
            drawn = stream(self.subject.model, self.subject.tokenizer, request, law, ends=ends, on_text=take)
            note = "" if drawn.finished else self._why_cut(law, room)
        self.history += [asked, {"role": "assistant", "content": drawn.text if drawn else "".join(said)}]
        return drawn, note

    def _law_within(self, tokens: int) -> tuple[Law, int | None]:
        """Returns the law with as many new tokens as the model's context has room for, and that room."""
        context = getattr(self.subject.model.config.get_text_config(), "max_position_embeddings", None)
        if context is None or context <= 0:
            return self.law, None
        room = context - tokens
        if room < 1:
            raise DataError(
                f"{self.subject.name} reads at most {context} tokens, and the conversation has {tokens}; /reset begins "
                "anew",
                "context",
                "prompt too long",
            )
        return replace(self.law, max_new_tokens=min(self.law.max_new_tokens, room)), room

    def _why_cut(self, law: Law, room: int | None) -> str:
        if room is not None and law.max_new_tokens == room < self.law.max_new_tokens:
            return f"cut off: the context of {self.subject.name} is full; /reset begins anew"
        return f"cut off at {law.max_new_tokens} tokens; --max-new-tokens allows more"


def chat(
    model: str,
    *,
    against: str | None = None,
    system: str | None = None,
    law: Law | None = None,
    prompting: str | None = None,
    seed: int = 0,
    dtype: str = "auto",
) -> None:
    """Talks with a model until the input ends.

    An answer has the same law and seed as that of `infopo generate` to the same messages.

    Args:
        model: Run directory, checkpoint, adapter, folder, hub name or `lab:policy`.
        against: A second model, which gets the same messages and keeps a history of its own.
        system: System message.
        law: Distribution of the answers, by default greedy decoding of up to 512 tokens.
        prompting: "chat" or "plain". None means chat if the tokenizer has a chat template.
        seed: Seed of the conversation.
        dtype: Type of the weights.

    Raises:
        ConfigError: A setting is wrong.
        ModelError: A model cannot be loaded.
    """
    law = law or Law(_TASK.max_new_tokens)
    names = [model, *([against] if against is not None else [])]
    sides = [_side(name, prompting, law, seed, dtype) for name in names]
    talk = Talk(sides, system)
    say(*talk.introduction())
    for line in _typed():
        if not talk.take(line):
            return


def _side(name: str, prompting: str | None, law: Law, seed: int, dtype: str) -> Side:
    if name.startswith(("http://", "https://")):
        raise ConfigError(f"{name}: chat loads its models; infopo generate --server URL asks a server")
    path = model_in(name)
    disable_progress_bar()
    tokenizer = load_tokenizer(path)
    # Nothing is stored, so nothing has to be found by the hash of the weights.
    subject = LoadedModel(name, load_for_use(path, dtype), tokenizer, 1, weights="not hashed")
    return Side(subject, Prompts(tokenizer, _TASK, prompting), law, seed)


class Talk:
    """A conversation with one or two models, and its commands.

    Args:
        sides: The models.
        system: System message, or None.
    """

    def __init__(self, sides: Sequence[Side], system: str | None = None) -> None:
        self.sides = sides
        self._saved: set[Path] = set()
        self._system: str | None = None
        if system is not None:
            self._set_system(system)

    def introduction(self) -> list[str]:
        """Returns who talks, and the commands."""
        lines = []
        for side in self.sides:
            how = (
                "no chat template, so each message is continued as plain text, on its own"
                if side.is_plain and not side.subject.tokenizer.chat_template
                else "each message is continued as plain text, on its own"
                if side.is_plain
                else "chat"
            )
            lines.append(f"{side.subject.name}: {how}")
        return [*lines, COMMANDS, "Ctrl-C stops an answer, Ctrl-D ends"]

    def take(self, line: str) -> bool:
        """Takes a line that was typed, a command or a message, and returns whether the conversation goes on."""
        text = line.strip()
        if not text:
            return True
        if text.startswith("//"):
            text = text[1:]
        elif text.startswith("/"):
            return self._command(*text.partition(" ")[::2])
        for side in self.sides:
            self._answer(side, text)
        return True

    def _command(self, name: str, rest: str) -> bool:
        rest = rest.strip()
        try:
            if name in ("/quit", "/exit"):
                return False
            if name == "/reset":
                self._reset()
                say("(begun anew)")
            elif name == "/system":
                self._system_command(rest)
            elif name == "/save":
                self._save(rest)
            else:
                say(f"no command {name}: {COMMANDS}; // at the beginning of a message stands for /")
        except InfoPOError as error:
            say(f"error: {error}")
        return True

    def _reset(self) -> None:
        for side in self.sides:
            side.history.clear()

    def _system_command(self, text: str) -> None:
        if not text:
            say(f"system message: {self._system or 'none'}")
            return
        self._set_system(None if text == "none" else text)
        self._reset()
        say(f"(begun anew {'without a' if text == 'none' else 'with this'} system message)")

    def _set_system(self, text: str | None) -> None:
        """Sets the system message, if the templates of all models take one."""
        for side in self.sides if text is not None else ():
            if side.is_plain:
                raise ConfigError(f"system message: {side.subject.name} continues plain text, which has none")
            side.prompts.ids(
                Item(
                    f"system message for {side.subject.name}",
                    [{"role": "system", "content": text}, {"role": "user", "content": "Hello."}],
                    {},
                )
            )
        self._system = text

    def _save(self, name: str) -> None:
        if not name:
            raise ConfigError("/save: expected the name of a file")
        path = Path(name).expanduser()
        if path.exists() and path.resolve() not in self._saved:
            raise ConfigError(f"/save: {path} is there already; name another file")
        first = [{"role": "system", "content": self._system}] if self._system else []
        lines = [{"model": side.subject.name, "messages": [*first, *side.history]} for side in self.sides]
        try:
            durable.write(path, [f"{to_json(line)}\n".encode() for line in lines])
        except OSError as error:
            raise ConfigError(f"/save: {path} cannot be written: {error.strerror or error}") from error
        self._saved.add(path.resolve())
        say(f"{path}: {len(self.sides[0].history) // 2} messages and their answers")

    def _answer(self, side: Side, message: str) -> None:
        if len(self.sides) > 1:
            say(f"[{side.subject.name}]")
        try:
            drawn, note = side.answer(message, self._system, _print_piece)
        except InfoPOError as error:
            say(f"error: {error}")
            return
        if drawn is not None and not drawn.text.strip():
            note = note or "an empty answer"
        say(f"{' ' if note else ''}{f'[{note}]' if note else ''}")


def _print_piece(piece: str) -> None:
    sys.stdout.write(printable(piece))
    sys.stdout.flush()


def _typed() -> Iterator[str]:
    """Yields the lines that are typed at a terminal, or that stand in standard input, until it ends."""
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        for line in sys.stdin:
            say(f"> {line.rstrip()}")  # so that the output is the whole conversation
            yield line
        return
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - gives `input` a history and keys to edit with
    while True:
        try:
            line = input("> ")
        except KeyboardInterrupt:
            say("", "(Ctrl-D or /quit ends)")
        except EOFError:
            say("")
            return
        else:
            yield line
