"""The client of OpenAI-compatible servers, against a real HTTP server that fails in every way that servers fail in."""

import threading
import time

import pytest

from infopo.errors import ConfigError, ServerError
from infopo.evaluation.server import Request, ServedModel, ServerSettings
from infopo.secrets import masked
from servers import completion, failure, serving

CHAT = [{"role": "user", "content": "Is water wet?"}]
KEY = "key-of-nobody-0123456789"


@pytest.fixture(autouse=True)
def _environment(monkeypatch):
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


def settings(url, **kwargs):
    return ServerSettings(url, **{"retries": 2, "timeout": 5.0, **kwargs})


def request(prompt=CHAT, **kwargs):
    return Request(prompt, **{"max_tokens": 7, **kwargs})


def test_a_chat_request_says_all_that_was_asked():
    with serving(lambda body, n: completion("yes")) as served:
        model = ServedModel(settings(served.url))
        reply = model.ask(
            request(
                temperature=0.5,
                top_p=0.9,
                seed=3,
                stop=["\n"],
                extra={"chat_template_kwargs": {"think": False}},
            )
        )
    assert model.name == "served-model"
    assert (reply.text, reply.finished, reply.model) == ("yes", True, "served-model-2026")
    assert (reply.prompt_tokens, reply.tokens, reply.refusal) == (11, 5, None)
    assert served.bodies == [
        {
            "path": "/v1/chat/completions",
            "model": "served-model",
            "messages": CHAT,
            "max_tokens": 7,
            "temperature": 0.5,
            "top_p": 0.9,
            "seed": 3,
            "stop": ["\n"],
            "chat_template_kwargs": {"think": False},
        }
    ]
    assert served.keys == [f"Bearer {KEY}"]


def test_text_is_continued_and_a_cut_response_is_unfinished():
    with serving(lambda body, n: completion(" wet", finish="length", kind="text")) as served:
        reply = ServedModel(settings(served.url, model="mine")).ask(request("Water is", temperature=0.0))
    assert (reply.text, reply.finished) == (" wet", False)
    assert served.bodies[0]["path"] == "/v1/completions"
    assert served.bodies[0]["prompt"] == "Water is"
    assert served.bodies[0]["temperature"] == 0.0


def test_a_bare_host_gets_its_path():
    assert ServerSettings("http://localhost:8000").base_url == "http://localhost:8000/v1"
    assert ServerSettings("http://localhost:8000/").base_url == "http://localhost:8000/v1"
    assert ServerSettings("https://host/openai/v1").base_url == "https://host/openai/v1"


@pytest.mark.parametrize(
    "fails",
    [
        pytest.param([failure(429, "slow down", Retry_After="0.1")], id="429"),
        pytest.param([failure(500, "oops"), failure(503, "still")], id="5xx"),
        pytest.param([None], id="dropped connection"),
        pytest.param([(200, {}, b"<html>a proxy's page</html>")], id="no JSON"),
        pytest.param([(200, {"Content-Type": "text/html"}, b"<html></html>")], id="a page"),
        pytest.param([(200, {}, b'{"choices": []}'), (200, {}, b"[]")], id="JSON of another kind"),
        pytest.param([(200, {}, b'{"choices": [{"message": {}}], "usage"')], id="half an answer"),
    ],
)
def test_what_may_pass_is_tried_again(fails):
    with serving(lambda body, n: fails[n] if n < len(fails) else completion("yes")) as served:
        assert ServedModel(settings(served.url)).ask(request()).text == "yes"
    assert len(served.bodies) == len(fails) + 1


@pytest.mark.parametrize(
    ("answer", "message", "asked"),
    [
        (
            failure(401, "bad key"),
            "refuses access .401. with the key in the environment variable OPENAI_API_KEY",
            1,
        ),
        (failure(403, "not yours"), "refuses access .403.", 1),
        (failure(404, "no model"), "knows no such model or path .no model.; does the URL end in /v1", 1),
        (failure(429, "no quota", Retry_After="0.01"), "too many requests, after 2 tries: no quota", 2),
        (failure(500, "oops", Retry_After="0.01"), "failed .500., after 2 tries: oops", 2),
        ((200, {}, b"nonsense"), "answers what is no response of an OpenAI-compatible server", 3),
    ],
)
def test_what_does_not_pass_is_one_line(answer, message, asked):
    with serving(lambda body, n: answer) as served, pytest.raises(ServerError, match=message) as caught:
        ServedModel(settings(served.url, retries=1)).ask(request())
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500
    assert len(served.bodies) == asked


def test_a_slow_answer_is_given_up():
    release = threading.Event()

    def slow(body, n):
        if n == 0:
            release.wait(5)
        return completion("yes")

    with serving(slow) as served:
        assert ServedModel(settings(served.url, timeout=0.3)).ask(request()).text == "yes"
        assert len(served.bodies) == 2
        release.set()
    with (
        serving(lambda body, n: time.sleep(0.6) or completion("late")) as served,
        pytest.raises(ServerError, match=r"no answer within 0.2 s, after 1 try; raise the time-out"),
    ):
        ServedModel(settings(served.url, timeout=0.2, retries=0)).ask(request())


def test_a_server_that_is_not_there():
    with serving(lambda body, n: None) as served:
        pass
    with pytest.raises(ServerError, match="cannot be reached, after 1 try"):
        ServedModel(settings(served.url, retries=0))
    with pytest.raises(ServerError, match="cannot be reached"):
        ServedModel(settings(served.url, retries=0, model="mine")).ask(request())


def test_a_request_that_is_refused_is_a_reply():
    """A prompt that is too long is the item's fault, and does not end the evaluation."""
    with serving(lambda body, n: failure(400, "maximum context length is 10 tokens")) as served:
        reply = ServedModel(settings(served.url)).ask(request())
        lone = ServedModel(settings(served.url)).ask(request([{"role": "user", "content": "\ud800"}]))
    assert (reply.refusal, reply.text, reply.finished) == ("maximum context length is 10 tokens", "", False)
    assert lone.refusal == "the prompt contains characters that cannot be sent"


def test_parameters_that_a_server_does_not_know(caplog):
    """`max_tokens` goes by its newer name. What can be left out is left out, with one warning; the rest is not."""

    def picky(body, n):
        if "max_tokens" in body:
            return failure(400, "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead.")
        return (
            failure(400, "Unsupported value: 'temperature'") if "temperature" in body else completion("yes")
        )

    with serving(picky) as served:
        model = ServedModel(settings(served.url))
        wanted = request(temperature=0.0, dispensable=frozenset({"temperature"}))
        assert model.ask(wanted).text == model.ask(wanted).text == "yes"
        assert len(served.bodies) == 4, "two are refused, once each"
        assert served.bodies[-1]["max_completion_tokens"] == 7
        refused = model.ask(request(temperature=0.0))
        assert refused.refusal == "Unsupported value: 'temperature'"
    assert caplog.text.count("takes no temperature") == 1


def test_a_refused_parameter_costs_no_request_of_those_under_way(caplog):
    """All that were sent with it are sent again, whichever answer comes first."""
    barrier = threading.Barrier(4, timeout=10)

    def picky(body, n):
        for name, said in (("max_tokens", "Use 'max_completion_tokens'"), ("seed", "It is not supported")):
            if name in body:
                barrier.wait()
                return failure(400, f"Unsupported parameter: {name!r}. {said}.")
        return completion("yes")

    with serving(picky) as served:
        model = ServedModel(settings(served.url, concurrency=4))
        asked = [request(seed=place, dispensable=frozenset({"seed"})) for place in range(4)]
        found = dict(model.ask_all(asked))
    assert [(reply.text, reply.refusal) for reply in found.values()] == [("yes", None)] * 4
    assert len(served.bodies) == 12
    assert caplog.text.count("takes no seed") == 1


def test_requests_go_side_by_side_and_keep_their_places():
    barrier = threading.Barrier(4, timeout=10)

    def answer(body, n):
        barrier.wait()
        return completion(body["messages"][0]["content"].upper())

    with serving(answer) as served:
        model = ServedModel(settings(served.url, concurrency=4))
        asked = [request([{"role": "user", "content": f"q{i}"}]) for i in range(12)]
        found = dict(model.ask_all(asked))
    assert {place: reply.text for place, reply in found.items()} == {i: f"Q{i}" for i in range(12)}
    assert served.most_at_once == 4


def test_what_was_answered_before_a_failure_is_kept():
    def answer(body, n):
        return failure(401, "expired") if n >= 5 else completion("yes")

    kept = []
    with serving(answer) as served:
        model = ServedModel(settings(served.url, concurrency=2))
        replies = model.ask_all(request() for _ in range(50))
        with pytest.raises(ServerError, match="expired"):
            kept.extend(replies)
    assert len(kept) == 5
    assert len(served.bodies) <= 7, "nothing new is asked once a request has failed"


def test_a_caller_who_stops_does_not_wait_for_what_is_under_way():
    release = threading.Event()

    def answer(body, n):
        if n:
            release.wait(20)
        return completion("yes")

    with serving(answer) as served:
        replies = ServedModel(settings(served.url, concurrency=3, timeout=30)).ask_all(
            request() for _ in range(9)
        )
        next(replies)
        begin = time.monotonic()
        replies.close()
        assert time.monotonic() - begin < 10
        release.set()


def test_requests_per_minute():
    times = []

    def answer(body, n):
        times.append(time.monotonic())
        return completion("yes")

    with serving(answer) as served:
        model = ServedModel(settings(served.url, per_minute=600, concurrency=8))
        list(model.ask_all(request() for _ in range(5)))
    assert max(times) - min(times) > 0.3, "five requests at ten per second"


def test_the_key_is_in_no_text(monkeypatch):
    monkeypatch.setenv("MY_PASSPORT", "opens-every-door")
    with (
        serving(lambda body, n: failure(401, "the key opens-every-door is wrong")) as served,
        pytest.raises(ServerError) as caught,
    ):
        ServedModel(settings(served.url, key_variable="MY_PASSPORT")).ask(request())
    assert served.keys == ["Bearer opens-every-door"]
    assert "opens-every-door" not in str(caught.value) + masked("opens-every-door")
    monkeypatch.delenv("MY_PASSPORT")
    with (
        serving(lambda body, n: failure(401, "who are you")) as served,
        pytest.raises(ServerError, match="with no key in the environment variable MY_PASSPORT"),
    ):
        ServedModel(settings(served.url, key_variable="MY_PASSPORT")).ask(request())
    monkeypatch.setenv("MY_PASSPORT", "line\nend")
    with pytest.raises(ConfigError, match="MY_PASSPORT: the key has characters that no key has"):
        ServedModel(settings(served.url, key_variable="MY_PASSPORT"))


def test_which_model_is_meant():
    with (
        serving(lambda body, n: completion("yes"), models=("a", "b")) as served,
        pytest.raises(ServerError, match="name one of its models; it serves a, b"),
    ):
        ServedModel(settings(served.url))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"url": "localhost:8000"}, "expected a URL such as"),
        ({"url": "file:///etc/passwd"}, "expected a URL such as"),
        ({"concurrency": 0}, "concurrency: expected at least 1"),
        ({"timeout": float("nan")}, "timeout: expected seconds above 0"),
        ({"per_minute": 0}, "per_minute: expected a number above 0"),
        ({"retries": -1}, "retries: expected at least 0"),
    ],
)
def test_settings_are_judged(wrong, message):
    with pytest.raises(ConfigError, match=message):
        ServerSettings(**{"url": "http://localhost:1/v1", **wrong})
