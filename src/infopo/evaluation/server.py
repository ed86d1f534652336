"""A model behind an OpenAI-compatible server (vLLM, SGLang, a provider), asked through the `openai` client. No torch.

The client retries what may pass by itself (429 with its Retry-After, 5xx, dropped connections, time-outs) with growing
pauses. What cannot pass is one `ServerError`: a wrong key, an unknown model, a server that is not there.
"""

import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from infopo.errors import ConfigError, ServerError
from infopo.output import counted, get_logger
from infopo.secrets import keep_secret
from infopo.texts import Text

log = get_logger(__name__)

KEY_VARIABLE = "OPENAI_API_KEY"
"""Environment variable of the key, unless the user names another. A server of one's own needs none."""

NONSENSE_TRIES = 3
"""Number of times that a request is sent whose answer is no answer, such as a proxy's page."""

_CUT_OFF = (None, "length", "max_tokens", "content_filter")
"""Reasons to finish with which a model has not ended its response itself."""


@dataclass(frozen=True)
class ServerSettings:
    """Where a model is served, and how it may be asked.

    Attributes:
        url: Address of the API, e.g. `http://localhost:8000/v1`. `/v1` is added to a bare host.
        model: Name of the model, or None for the only one that is served.
        key_variable: Environment variable of the key.
        concurrency: Largest number of requests at a time.
        per_minute: Largest number of requests per minute, or None for no limit.
        timeout: Seconds after which a request is given up, and sent again.
        retries: Number of times that a request is sent again.
    """

    url: str
    model: str | None = None
    key_variable: str = KEY_VARIABLE
    concurrency: int = 8
    per_minute: float | None = None
    timeout: float = 300.0
    retries: int = 6

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        problems = []
        if parts.scheme not in ("http", "https") or not parts.netloc:
            problems.append(f"server: expected a URL such as http://localhost:8000/v1, got {self.url!r}")
        if self.concurrency < 1:
            problems.append(f"concurrency: expected at least 1, got {self.concurrency}")
        if self.per_minute is not None and not self.per_minute > 0:
            problems.append(f"per_minute: expected a number above 0, got {self.per_minute}")
        if not self.timeout > 0:
            problems.append(f"timeout: expected seconds above 0, got {self.timeout}")
        if self.retries < 0:
            problems.append(f"retries: expected at least 0, got {self.retries}")
        if problems:
            raise ConfigError(problems)

    @property
    def base_url(self) -> str:
        """The address with a path."""
        return self.url if urlsplit(self.url).path.strip("/") else f"{self.url.rstrip('/')}/v1"


@dataclass(frozen=True)
class Request:
    """One request for one response.

    Attributes:
        prompt: A conversation, which the server renders, or text, which the model continues.
        max_tokens: Largest number of tokens of the response.
        temperature: 0 is greedy decoding. None leaves it to the server.
        top_p: Mass of the nucleus, or None.
        seed: Seed of this response, or None.
        stop: Texts at which a response ends.
        schema: JSON schema that the response is to follow, or None.
        extra: Further parameters of the server, such as vLLM's `chat_template_kwargs`.
        dispensable: Parameters that are left out, with a warning, if the server refuses them.
    """

    prompt: Text
    max_tokens: int
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    stop: Sequence[str] = ()
    schema: Mapping[str, Any] | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)
    dispensable: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Reply:
    """A response of the server.

    Attributes:
        text: The response.
        finished: Whether the model ended it itself.
        model: Name of the model, as the server reports it.
        prompt_tokens: Number of tokens of the prompt, or None if the server does not say.
        tokens: Number of tokens of the response, or None.
        refusal: Why the server takes no such request (a prompt that is too long, a filter), or None. There is no text
            then.
    """

    text: str
    finished: bool
    model: str = ""
    prompt_tokens: int | None = None
    tokens: int | None = None
    refusal: str | None = None


class ServedModel:
    """A model behind a server.

    Args:
        settings: Where it is.

    Raises:
        ConfigError: The extra `judge` is not installed.
        ServerError: The server cannot be reached, refuses the key, or does not say which model it serves.
    """

    def __init__(self, settings: ServerSettings) -> None:
        self.settings = settings
        self._openai = _openai()
        key = os.environ.get(settings.key_variable) or ""
        keep_secret(key)
        if not key.isascii() or not key.isprintable() or key != key.strip():
            raise ConfigError(
                f"{settings.key_variable}: the key has characters that no key has, such as a line end"
            )
        # The client insists on a key, which a server of one's own does not read.
        self._client = self._openai.OpenAI(
            api_key=key or "none",
            base_url=settings.base_url,
            timeout=settings.timeout,
            max_retries=settings.retries,
        )
        self._pace = _Pace(settings.per_minute)
        self._left_out: frozenset[str] = frozenset()
        self._noting = threading.Lock()
        self.name = self._model()

    def ask(self, request: Request) -> Reply:
        """Returns the response to one request.

        Raises:
            ServerError: There is none, after all retries.
        """
        for attempt in range(NONSENSE_TRIES):
            self._pace.wait()
            parameters = self._parameters(request)
            try:
                reply = self._send(request, parameters)
            except self._openai.BadRequestError as error:
                if self._leaves_out(request, parameters, error):
                    return self.ask(request)
                return Reply("", False, refusal=_said(error))
            except self._openai.OpenAIError as error:
                raise self._error(error) from error
            except UnicodeEncodeError:
                return Reply("", False, refusal="the prompt contains characters that cannot be sent")
            except ValueError as error:  # what is no JSON
                reply, problem = None, str(error)
            else:
                problem = "there is no choice in it"
            if reply is not None:
                return reply
            time.sleep(min(0.2 * 2**attempt, 5))
        raise ServerError(
            f"{self.settings.url}: answers what is no response of an OpenAI-compatible server: {problem}"
        )

    def ask_all(self, requests: Iterable[Request]) -> Iterator[tuple[int, Reply]]:
        """Yields place and reply of each request, as they arrive.

        What has been answered when a request fails is yielded before the error is raised, so that it can be kept.

        Raises:
            ServerError: A request has no response, after all retries.
        """
        yield from in_threads(self.ask, requests, self.settings.concurrency, self._client.close)

    def _parameters(self, request: Request) -> dict[str, Any]:
        """Returns what a request is sent with, without what the server is known to refuse."""
        arguments: dict[str, Any] = {
            "model": self.name,
            "temperature": request.temperature,
            "seed": request.seed,
        }
        arguments |= {
            "top_p": request.top_p,
            "stop": list(request.stop) or None,
            "max_tokens": request.max_tokens,
        }
        if request.schema is not None:
            schema = {"name": "answer", "schema": dict(request.schema), "strict": True}
            arguments["response_format"] = {"type": "json_schema", "json_schema": schema}
        left_out = self._left_out & (request.dispensable | {"max_tokens"})
        if "max_tokens" in left_out:  # newer models of OpenAI know it by another name
            arguments["max_completion_tokens"] = request.max_tokens
        return {key: value for key, value in arguments.items() if value is not None and key not in left_out}

    def _send(self, request: Request, parameters: Mapping[str, Any]) -> Reply | None:
        extra = dict(request.extra) or None
        if isinstance(request.prompt, str):
            answer = self._client.completions.create(prompt=request.prompt, extra_body=extra, **parameters)
        else:
            answer = self._client.chat.completions.create(
                messages=request.prompt, extra_body=extra, **parameters
            )
        return _reply(answer, self.name)

    def _leaves_out(self, request: Request, sent: Mapping[str, Any], error: Any) -> bool:
        """Returns whether a request is to be sent again without a parameter that the server names, and notes which.

        Of several requests under way, each was sent with it, and the first one's answer is only the first to come.
        """
        dispensable = {"temperature", "seed", "top_p", "response_format"} & request.dispensable
        said = f"{getattr(error, 'param', None) or ''} {_said(error)}"
        for name in sorted((dispensable | {"max_tokens"}) & sent.keys()):
            if name in said and (name != "max_tokens" or "max_completion_tokens" in said):
                self._note_left_out(name, error)
                return True
        return False

    def _note_left_out(self, name: str, error: Any) -> None:
        """Notes that a parameter is not to be sent again, and says so once, since threads may find it together."""
        with self._noting:
            is_new = name not in self._left_out
            # A new set, since another thread may be reading the old one.
            self._left_out = self._left_out | {name}
        if is_new and name != "max_tokens":
            log.warning("%s takes no %s, which is left out: %s", self.settings.url, name, _said(error))

    def _model(self) -> str:
        """Returns the name of the model. A server that is not there is found here, before anything is asked."""
        retries, named = min(1, self.settings.retries), self.settings.model
        try:
            served = [
                each.id for each in self._client.with_options(max_retries=retries).models.list().data or []
            ]
        except (self._openai.APIConnectionError, self._openai.AuthenticationError) as error:
            raise self._error(error, retries) from error
        except self._openai.OpenAIError as error:
            if named is None:
                raise self._error(error, retries) from error
            return named  # not every server has a list
        except (ValueError, AttributeError, TypeError) as error:
            if named is None:
                problem = f"{self.settings.url}: is no OpenAI-compatible server: /models is no list"
                raise ServerError(problem) from error
            return named
        if named is None and len(served) != 1:
            there = ", ".join(map(str, served[:10])) or "none"
            raise ServerError(f"{self.settings.url}: name one of its models; it serves {there}")
        return named or str(served[0])

    def _error(self, error: Any, retries: int | None = None) -> ServerError:
        url, variable = self.settings.url, self.settings.key_variable
        tried = (self.settings.retries if retries is None else retries) + 1
        tries = f"after {counted(tried, 'try')}"
        if isinstance(error, self._openai.AuthenticationError | self._openai.PermissionDeniedError):
            has = "the key" if os.environ.get(variable) else "no key"
            return ServerError(
                f"{url}: refuses access ({error.status_code}) with {has} in the environment variable {variable}: "
                f"{_said(error)}"
            )
        if isinstance(error, self._openai.NotFoundError):
            return ServerError(
                f"{url}: knows no such model or path ({_said(error)}); does the URL end in /v1?"
            )
        if isinstance(error, self._openai.APITimeoutError):
            return ServerError(
                f"{url}: no answer within {self.settings.timeout:g} s, {tries}; raise the time-out"
            )
        if isinstance(error, self._openai.RateLimitError):
            return ServerError(
                f"{url}: too many requests, {tries}: {_said(error)}; lower requests per minute"
            )
        if isinstance(error, self._openai.APIConnectionError):
            cause = error.__cause__ or error
            return ServerError(f"{url}: cannot be reached, {tries}: {cause or type(cause).__name__}")
        if isinstance(error, self._openai.APIStatusError):
            return ServerError(f"{url}: failed ({error.status_code}), {tries}: {_said(error)}")
        return ServerError(f"{url}: failed: {type(error).__name__}: {_said(error)}")


def in_threads(
    ask: Callable[[Request], Reply], requests: Iterable[Request], threads: int, close: Callable[[], object]
) -> Iterator[tuple[int, Reply]]:
    """Yields place and result of each request as they arrive, with so many at a time.

    Args:
        ask: Answers one request.
        requests: The requests.
        threads: Number of requests at a time.
        close: Ends what is under way, if the caller stops early or Ctrl-C is pressed.
    """
    waiting: dict[Future[Reply], int] = {}
    upcoming = enumerate(requests)
    failed: BaseException | None = None
    pool = ThreadPoolExecutor(threads)
    try:
        while True:
            while (
                failed is None and len(waiting) < threads and (following := next(upcoming, None)) is not None
            ):
                waiting[pool.submit(ask, following[1])] = following[0]
            if not waiting:
                break
            for done in wait(waiting, return_when=FIRST_COMPLETED).done:
                place = waiting.pop(done)
                if (error := done.exception()) is None:
                    yield place, done.result()
                failed = failed or error
    finally:
        if waiting:
            close()
        pool.shutdown(wait=not waiting, cancel_futures=True)
    if failed is not None:
        raise failed


class _Pace:
    """Lets so many requests pass per minute, evenly."""

    def __init__(self, per_minute: float | None) -> None:
        self._seconds = 60 / per_minute if per_minute else 0.0
        self._lock = threading.Lock()
        self._next = 0.0

    def wait(self) -> None:
        if not self._seconds:
            return
        with self._lock:
            now = time.monotonic()
            begin = max(now, self._next)
            self._next = begin + self._seconds
        time.sleep(begin - now)


def _reply(answer: Any, name: str) -> Reply | None:
    """Returns what an answer contains, or None if it is none."""
    choices = getattr(answer, "choices", None)
    if not isinstance(choices, list) or not choices:
        return None
    choice = choices[0]
    message = getattr(choice, "message", None)
    text = getattr(choice, "text", None) if message is None else message.content
    if text is None and message is not None:
        text = getattr(message, "refusal", None) or ""
    if not isinstance(text, str):
        return None
    usage = getattr(answer, "usage", None)
    return Reply(
        text,
        finished=getattr(choice, "finish_reason", None) not in _CUT_OFF,
        model=str(getattr(answer, "model", None) or name),
        prompt_tokens=_count(usage, "prompt_tokens"),
        tokens=_count(usage, "completion_tokens"),
    )


def _count(usage: Any, name: str) -> int | None:
    value = getattr(usage, name, None)
    return value if isinstance(value, int) else None


def _said(error: Any) -> str:
    """Returns what a server says of an error, in one line."""
    body = getattr(error, "body", None)
    message = body.get("message") if isinstance(body, Mapping) else None
    return " ".join(str(message or getattr(error, "message", None) or error).split())[:200]


def _openai() -> Any:
    try:
        import openai
    except ImportError as error:
        raise ConfigError("the client of servers is not installed: pip install 'infopo[judge]'") from error
    return openai
