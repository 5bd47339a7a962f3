"""Who is asked for guidance: every way in which a server can fail, tapes, budgets, and models in this process.

Passed is: the run goes on with the goals it had, in bounded time, and it is counted; no key is in any file."""

import dataclasses
import itertools
import json
import shutil
import socket
import time

import pytest
from advisors import FAULTS, GOOD, Far, Scripted, chat, echo, send, situations

from promptnb.core import PromptnbError
from promptnb.llm import Guidance, Request, exchanges
from promptnb.llm.encoders import encoder
from promptnb.llm.text import GOALS, decision_prompt, scene

pytest.importorskip("openai")
from promptnb.llm.backends import Budget, Budgeted, Cassette, Constant, Local, Server, Unreachable, as_text

SECRET = "sk-very-secret-0123456789"


@pytest.fixture
def far(monkeypatch):
    monkeypatch.setenv("PNB_TEST_KEY", SECRET)
    far = Far()
    yield far
    far.close()


def server(url, **kw):
    "A client of the server that gives up soon."
    hurried = dict(timeout=0.4, deadline=1.5, retries=1, backoff=0.02, patience=99)
    return Server(url, "toy", key_env="PNB_TEST_KEY", **{**hurried, **kw})


def ask(far, **kw):
    return server(far.url, **kw).complete([Request(decision_prompt(scene(), ()))])[0]


@pytest.fixture(autouse=True, scope="module")
def first_call():
    "The first call of a process loads half of openai's client: that time is no server's fault."
    far = Far()
    patient = server(far.url, timeout=60, deadline=60)
    assert patient.complete([Request(decision_prompt(scene(), ()))])[0].ok
    far.close()


def seconds(f):
    "(result, seconds it took)."
    start = time.monotonic()
    return f(), time.monotonic() - start


# ---- a server and its faults

# what is not tried again, or has no time for it: a header that never ends takes the whole deadline
TRIED_ONCE = ("busy_for_an_hour", "wrong_key", "no_model", "moved", "filtered", "slow_header")


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_the_server(far, fault, tmp_path):
    "The first attempt and its repetition fail; the goals stay; the next query is answered."
    g = Guidance(None, server(far.url), log=tmp_path / "log.jsonl")
    first = g([scene()])
    far.faults = [FAULTS[fault]] * 2
    second, took = seconds(lambda: g([scene(step=100)]))
    far.faults = []
    third = g([scene(step=200)])
    assert (first, second, third) == ([GOOD[0]], [GOOD[0]], [GOOD[1]])
    assert took < (1.2 if fault == "busy_for_an_hour" else 2.0)  # no waiting for what comes after the deadline
    assert g.counts["failed"] == g.counts["kept"] == 1 and g.counts["queries"] == g.counts["calls"] == 3
    why = exchanges(g.log)[1]["why"]
    assert why and why.isprintable() and SECRET not in g.log.read_text()
    assert len(far.seen) == 2 + (1 if fault in TRIED_ONCE else 2)


PASSED_OVER = ["timeout", "slow_trickle", "busy", "busy_since_ever", "error"]
PASSED_OVER += ["half_reply", "half_json", "no_body", "html"]


@pytest.mark.parametrize("fault", PASSED_OVER)
def test_one_fault_is_passed_over(far, fault):
    far.faults = [FAULTS[fault]]
    r = ask(far)
    assert r.ok and r.attempts == 2 and r.text == GOOD[0] and r.model == "toy-2"
    if fault == "busy":
        assert far.seen[1][0] - far.seen[0][0] >= 0.1


USAGES = dict(
    nan=dict(prompt_tokens=float("nan"), completion_tokens="many"),
    negative=dict(prompt_tokens=-5, completion_tokens=float("inf")),
    none=None,
    number=7,
    empty={},
)


@pytest.mark.parametrize("usage", USAGES)
def test_tokens_that_are_no_numbers_are_guessed(far, usage):
    far.faults = [lambda h: send(h, chat(usage=USAGES[usage]))]
    r = ask(far)
    assert r.ok and type(r.tokens_in) is type(r.tokens_out) is int
    assert 200 < r.tokens_in < 400 and r.tokens_out == len(GOOD[0]) // 4


def test_attempts_that_may_be_billed_count_as_tokens(far):
    "Nothing was generated for a server that is busy; a reply that was cut may have been paid for."
    far.faults = [FAULTS["busy"]]
    assert ask(far).tokens_in == 90
    far.faults = [FAULTS["half_reply"]]
    assert ask(far).tokens_in > 200


BAD_TEXTS = dict(
    empty="",
    spaces=" \n\t ",
    foreign="喝水，睡觉，砍树",
    megabyte="la " * 350_000,
    unknown="fly to the moon, become king",
    control="\x00\x1b[2J\x07\u202e",
    prose="I am sorry, I cannot help with that.",
    wrong_keys='{"plan": ["sleep"]}',
    numbers='{"goals": [1, NaN, -Infinity]}',
    script="<script>alert(1)</script>",
    deep="[" * 100_000,
    tool='{"tool": "shell", "args": ["rm -rf /"]}',
    surrogate="\ud800",
)


@pytest.mark.parametrize("text", BAD_TEXTS)
def test_a_reply_that_is_none(far, text, tmp_path):
    g = Guidance(None, server(far.url), log=tmp_path / "log.jsonl")
    first = g([scene()])
    far.faults = [lambda h: send(h, chat(BAD_TEXTS[text]))] * 2
    second, took = seconds(lambda: g([scene(step=100)]))
    far.faults = []
    assert second == first == [GOOD[0]] and took < 2
    assert g([scene(step=200)]) == [GOOD[1]]
    assert g.counts["kept"] == 1 and g.counts["invalid"] + g.counts["failed"] == 1
    assert g.log.stat().st_size < 40_000


def test_a_server_that_refuses_is_given_a_rest(far):
    free = socket.create_server(("127.0.0.1", 0))
    port = free.getsockname()[1]
    free.close()
    s = server(f"http://127.0.0.1:{port}/v1", retries=2, patience=2, rest=3)
    g = Guidance(None, s)
    start = time.monotonic()
    unasked = []
    for k in range(6):
        assert g([scene(step=k)]) == [""]
        unasked.append(g.counts["unasked"])
    assert unasked == [0, 0, 1, 2, 3, 3] and g.counts["retried"] == 6
    assert g.counts["calls"] == 0  # no connection: nothing was sent
    assert time.monotonic() - start < 5
    s.url, s.resting = far.url, 0  # it is back
    assert g([scene(step=9)]) == [GOOD[0]] and s.fails == 0


def requests(n):
    return [Request(decision_prompt(scene(), ()), seed=i) for i in range(n)]


def test_a_batch_keeps_its_deadline(far):
    s = server(far.url, workers=1, deadline=0.5, timeout=5.0)
    far.faults = [lambda h: time.sleep(30)]
    replies, took = seconds(lambda: s.complete(requests(5)))
    assert took < 0.9 and not any(r.ok for r in replies)


def test_workers_that_hang_do_not_hold_up_the_others(far):
    s = server(far.url, workers=4, deadline=4.0, timeout=2.0, retries=0)
    far.good = itertools.cycle(GOOD[:1])
    far.faults = [lambda h: time.sleep(30)] * 3
    replies, took = seconds(lambda: s.complete(requests(12)))
    assert took < 4.3
    assert sum(not r.ok for r in replies) == 3 and {r.text for r in replies if r.ok} == {GOOD[0]}


# ---- what is sent


def test_what_is_sent(far):
    r = Request([dict(role="user", content="hi")], max_tokens=7, temperature=0.25, seed=11)
    server(far.url).complete([r])
    server(far.url, extra=dict(max_tokens=None, max_completion_tokens=9)).complete([r])
    first, second = (body for _, body in far.seen)
    expected = dict(model="toy", messages=r.messages, max_tokens=7, temperature=0.25, seed=11)
    assert {k: first[k] for k in expected} == expected
    assert "max_tokens" not in second and second["max_completion_tokens"] == 9


def test_urls_that_are_none(refused):
    refused(Server, "ftp://x/v1", "m", says=("URL",))
    refused(Server, "localhost:8000", "m", says=("http://",))
    refused(Server, f"https://me:{SECRET}@x/v1", "m", says=("OPENAI_API_KEY",))


def test_the_key_is_nowhere(far, tmp_path, capfd, monkeypatch):
    "A server that sends it back, in errors and in replies; a cassette, a log, a state, a record of everything."
    s = server(far.url, retries=0)
    c = Cassette(tmp_path / "tape.jsonl", s)
    g = Guidance(c, c, log=tmp_path / "log.jsonl", raw=True)
    far.faults = [lambda h, n=n: echo(h, n) for n in (200, 200, 401, 500, 200, 429, 400, 200)]
    sentences = [g([scene(step=k)]) for k in range(4)]
    bad = []
    for n in (401, 500, 200):
        far.faults = [lambda h, n=n: echo(h, n)]
        bad.append(ask(far, retries=0))
    assert "(key)" in sentences[0][0] and "(key)" in bad[0].why and all(body for _, body in far.seen)
    monkeypatch.setenv("PNB_TEST_KEY", SECRET + "\u20ac")  # a key that no header can hold
    worse = ask(far, retries=0)
    assert not worse.ok
    texts = [repr(x) for x in (s, c, g, vars(s), vars(c), g.state(), sentences, bad, worse, dataclasses.asdict(bad[0]))]
    texts += [p.read_text() for p in tmp_path.rglob("*") if p.is_file()]
    texts += list(capfd.readouterr())
    assert len(texts) == 14
    assert not any(SECRET in t or SECRET[3:] in t for t in texts)


# ---- content, ends, roles: what servers do differently


def one(far, body, **kw):
    "The reply where a server answers once with this body."
    far.faults = [lambda h: send(h, body)]
    return ask(far, retries=0, **kw)


TEXT = dict(type="text", text="sleep")
CONTENTS = {
    "thinking, text": ([dict(type="thinking", thinking="attack zombie?"), TEXT], "sleep"),
    "text of two parts": ([TEXT, dict(type="text", text="chop tree")], "sleep\nchop tree"),
    "output text, annotated": ([dict(type="output_text", text=dict(value="sleep", annotations=[]))], "sleep"),
    "reasoning, null, text": ([dict(type="reasoning", text="attack zombie"), None, TEXT], "sleep"),
}


@pytest.mark.parametrize("content", CONTENTS)
def test_content_in_parts_is_its_text(far, content):
    parts, text = CONTENTS[content]
    r = one(far, chat(parts))
    assert (r.ok, r.text) == (True, text)


@pytest.mark.parametrize("parts", [[], [dict(type="thinking", thinking="sleep")], dict(text="sleep"), None])
def test_content_without_text_is_no_reply(far, parts):
    r = one(far, chat(parts))
    assert not r.ok and "no text" in r.why


@pytest.mark.parametrize("end", [None, 7, ["stop"]])
def test_a_text_whose_end_is_not_said_is_taken_and_counted(far, end):
    g = Guidance(None, server(far.url))
    far.faults = [lambda h: send(h, chat(end=end))]
    assert g([scene()]) == [GOOD[0]]
    assert (g.counts["unended"], g.counts["failed"], g.counts["calls"]) == (1, 0, 1)
    assert g([scene(step=9)]) == [GOOD[0]] and g.counts["unended"] == 1  # that one ended


def test_a_reply_that_was_all_thinking_says_that_tokens_were_too_few(far):
    r = one(far, chat("", end="length"))
    assert not r.ok and "too few" in r.why and r.tokens_in > 0


def picky(refuse):
    "A server that refuses requests with the first message that `refuse` finds for their body, else answers well."

    def answer(h):
        said = refuse(h.request_body)
        body = json.dumps(dict(error=dict(message=said))).encode()
        send(h, *((body, 400) if said else (chat(GOOD[0]),)))

    return answer


def no_system(said):
    return lambda body: said if body["messages"][0]["role"] == "system" else ""


def no_field(name, said):
    return lambda body: said if name in body else ""


REFUSALS = {
    "system, of a template": (no_system("System role not supported"), dict(system=False)),
    "system, of a hosted model": (
        no_system("Unsupported value: 'messages[0].role' does not support 'system' with this model."),
        dict(system=False),
    ),
    "system, roles alternate": (
        no_system("Conversation roles must alternate user/assistant/user/assistant/..."),
        dict(system=False),
    ),
    "system, contracted": (no_system("This model doesn't support system prompts."), dict(system=False)),
    "system, as an instruction": (no_system("Developer instruction is not enabled for models/toy"), dict(system=False)),
    "system, by the roles there are": (
        no_system("messages[0].role must be one of ['user','assistant']"),
        dict(system=False),
    ),
    "max_tokens": (
        no_field("max_tokens", "'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead."),
        dict(limit="max_completion_tokens"),
    ),
    "temperature": (
        no_field("temperature", "'temperature' does not support 1.0 with this model. Only the default is supported."),
        dict(temperature=False),
    ),
    "seed": (no_field("seed", "Extra inputs are not permitted: seed"), dict(seed=False)),
}


@pytest.mark.parametrize("what", REFUSALS)
def test_what_a_server_refuses_is_left_out_from_then_on_and_said_once(far, what, capsys):
    refuse, takes = REFUSALS[what]
    far.answer = picky(refuse)
    s = server(far.url, retries=0)
    replies = s.complete(requests(3)) + s.complete(requests(3))
    assert {r.text for r in replies} == {GOOD[0]}
    assert {k: getattr(s.takes, k) for k in takes} == takes
    assert capsys.readouterr().err.count("the server ") == 1
    n = len(far.seen)
    s.complete(requests(2))
    assert len(far.seen) == n + 2  # it is not asked again in the old way
    text = "\n".join(m["content"] for m in far.seen[-1][1]["messages"])
    assert all(m["content"] in text for m in requests(1)[0].messages)  # nothing of the prompt is lost


@pytest.mark.parametrize(
    "said",
    [
        "max_tokens is too large: 100. This model supports at most 7.",
        "Invalid 'max_tokens': integer above maximum value. Expected a value <= 7, but got 100 instead.",
        "max_tokens is too large: this model supports only 7.",
        "This model's maximum context length is 7 tokens, max_tokens included: invalid request",
        "Invalid 'temperature': decimal above maximum value. Expected a value <= 1, but got 3 instead.",
        "Internal system error: unexpected failure",
    ],
)
def test_a_refusal_of_a_size_or_a_failure_teaches_nothing(said, far):
    far.answer = picky(lambda body: said)
    s = server(far.url, retries=0)
    assert not s.complete(requests(1))[0].ok and s.takes == type(s.takes)() and len(far.seen) == 1


def test_a_server_that_refuses_all_is_not_asked_for_ever(far):
    said = "system unsupported, max_tokens unsupported, max_completion_tokens unsupported, unknown seed, temperature"
    far.answer = picky(lambda body: said)
    r = server(far.url, retries=0).complete(requests(1))[0]
    assert not r.ok and len(far.seen) <= 6 and r.sent == len(far.seen)


# ---- the way there: keys, proxies, URLs. What was not sent is not paid for.


class Unsent:
    "A guidance with a budget, of whose question nothing goes out."

    def __init__(self, url, **kw):
        self.budget = Budget(calls=10, tokens=2000)
        self.guidance = Guidance(None, server(url, **kw), budget=self.budget)
        self.goals = self.guidance([scene()])

    @property
    def free(self):
        "Was nothing counted?"
        counts = {self.guidance.counts[k] for k in ("calls", "tokens_in", "tokens_out")}
        return counts == {0} and self.budget.used() | dict(seconds=0) == dict(calls=0, tokens=0, dollars=0, seconds=0)


@pytest.fixture
def no_proxies(monkeypatch):
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    return monkeypatch


PROXY, LOCAL = "http://me:hidden-word@127.0.0.1:9", "127.0.0.1"


@pytest.mark.parametrize(
    "env",
    [
        dict(ALL_PROXY="socks5://127.0.0.1:9", NO_PROXY="127.0.0.1"),
        dict(ALL_PROXY="socks5://127.0.0.1:9"),
        dict(HTTP_PROXY=PROXY),
        dict(http_proxy="127.0.0.1:9", NO_PROXY="example.org"),
        dict(all_proxy="nonsense://x", NO_PROXY="*"),
    ],
    ids=["socks, excepted", "socks", "http", "http, another excepted", "nonsense"],
)
def test_a_server_on_this_machine_is_asked_directly(far, env, no_proxies):
    for name, value in env.items():
        no_proxies.setenv(name, value)
    assert ask(far, retries=0).ok
    assert server(far.url.replace(LOCAL, "localhost"), retries=0).complete(requests(1))[0].ok


@pytest.mark.parametrize(
    "env, says",
    [
        (dict(ALL_PROXY="socks5://127.0.0.1:9"), "ALL_PROXY names a SOCKS proxy"),
        (dict(http_proxy=PROXY), "the proxy that http_proxy names"),
        (dict(HTTP_PROXY="gopher://127.0.0.1:9"), "HTTP_PROXY names no proxy that can be used"),
    ],
    ids=["socks", "closed", "unknown kind"],
)
def test_a_proxy_that_is_in_the_way_is_named_and_costs_nothing(env, says, no_proxies):
    for name, value in env.items():
        no_proxies.setenv(name, value)
    asked = Unsent("http://far.invalid/v1")
    (reply,) = asked.guidance.decision.complete(requests(1))
    assert says in reply.why and "hidden" not in reply.why and not reply.ok
    assert asked.free and asked.guidance.counts["failed"] == 1


def test_a_host_that_is_excepted_is_asked_without_the_proxy(no_proxies):
    from promptnb.llm.backends import proxy_for

    no_proxies.setenv("HTTP_PROXY", PROXY)
    no_proxies.setenv("NO_PROXY", "my.host, 10.0.0.0/8")
    hosts = ["my.host", "sub.my.host", "10.2.3.4", "my.host.org", "11.2.3.4", "[::1]:8000", "127.3.2.1"]
    assert [proxy_for(f"http://{h}/v1")[0] for h in hosts] == ["", "", "", "HTTP_PROXY", "HTTP_PROXY", "", ""]


@pytest.mark.parametrize(
    "sign, name",
    [("\u2013", "EN DASH"), ("\u00a0", "NO-BREAK SPACE"), ("\u200b", "ZERO WIDTH SPACE"), ("\n", "U+000A")],
)
def test_a_key_that_no_header_can_hold_is_named_and_not_shown(far, sign, name, monkeypatch, refused):
    monkeypatch.setenv("PNB_TEST_KEY", SECRET[:7] + sign + SECRET[7:])
    asked = Unsent(far.url)
    (reply,) = asked.guidance.decision.complete(requests(1))
    assert name in reply.why and "PNB_TEST_KEY" in reply.why and SECRET[8:] not in reply.why and not far.seen
    assert asked.free
    refused(server(far.url).preflight, says=(name, "PNB_TEST_KEY"))


def test_a_closed_port_and_an_unknown_host_cost_nothing():
    with socket.create_server((LOCAL, 0)) as free:
        port = free.getsockname()[1]
    assert Unsent(f"http://{LOCAL}:{port}/v1").free
    assert Unsent("http://nobody.invalid/v1").free


def test_a_request_that_never_had_its_turn_costs_nothing(far):
    "One worker, and a server that is silent: the first request went out, the others did not."
    far.faults = [lambda h: time.sleep(30)] * 9
    b = Budget(tokens=10**6)
    s = server(far.url, workers=1, deadline=0.5, timeout=5.0, retries=0)
    replies = b.complete(s, requests(5))
    assert [r.reached for r in replies] == [1, 0, 0, 0, 0] and b.used()["calls"] == 1
    assert b.used()["tokens"] == replies[0].tokens_in > 200


def test_a_silent_server_may_have_been_paid(far):
    "What was sent is counted, each time that it was."
    far.faults = [lambda h: time.sleep(30)] * 2
    r = ask(far, timeout=0.2)
    assert (r.ok, r.attempts, r.sent) == (False, 2, 2) and r.tokens_in > 400 and "no reply within" in r.why
    assert len(r.retries) == 1


@pytest.mark.parametrize(
    "path, hint",
    [("", "/v1"), ("/api", "/api/v1"), ("/v1", "is 'toy' a model"), ("/api/v1/models", "/api/v1)"), ("/V1", "/v1)")],
)
def test_a_url_that_lacks_its_version_gets_a_hint(far, path, hint):
    far.faults = [lambda h: send(h, b"{}", 404)]
    r = server(far.url.removesuffix("/v1") + path, retries=0).complete(requests(1))[0]
    assert hint in r.why and ("does not end in /v1" in r.why) == (path != "/v1")


def test_a_web_page_where_the_protocol_should_be_gets_the_hint(far):
    far.faults = [FAULTS["html"]]
    r = server(far.url.removesuffix("/v1"), retries=0).complete(requests(1))[0]
    assert "no choices" in r.why and "try http" in r.why


NO_URLS = (
    "http://[::1/v1",
    "http://x:abc/v1",
    "http://x:99999/v1",
    "http://x y/v1",
    "http://../v1",
    "http://a\x00b/v1",
)
TOLD = ("me:hidden@host/v1", "http//me:hidden@host/v1", "https://me:hid@den@host/v1", "http://host/api?key=hidden")


@pytest.mark.parametrize("url", NO_URLS)
def test_a_url_that_cannot_be_asked_is_refused_before_work(url, refused):
    refused(server, url, says=("is no URL",))


@pytest.mark.parametrize("url", TOLD)
def test_a_secret_in_a_url_is_refused_and_not_shown(url):
    with pytest.raises(PromptnbError, match="PNB_TEST_KEY") as e:
        server(url)
    assert "hid" not in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize("variable", ["OPENAI_ORG_ID", "OPENAI_PROJECT_ID"])
def test_what_the_client_sends_along_is_named_too(variable, far, monkeypatch):
    monkeypatch.setenv(variable, "hidden\u2013word")
    asked = Unsent(far.url)
    (reply,) = asked.guidance.decision.complete(requests(1))
    assert f"{variable} has a sign" in reply.why and "hidden" not in reply.why and asked.free and not far.seen


def test_certificates_that_cannot_be_read_are_named(monkeypatch, tmp_path):
    (tmp_path / "file.pem").write_text("no certificate")
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "file.pem"))
    asked = Unsent("https://far.invalid/v1")
    (reply,) = asked.guidance.decision.complete(requests(1))
    assert "SSL_CERT_FILE" in reply.why and "certificates" in reply.why and asked.free


def test_a_url_of_the_whole_call_is_refused(refused):
    refused(Server, "https://x/v1/chat/completions", "m", says=("leave '/chat/completions' off",))


# ---- before work


REFUSED = {
    "key": (401, "PNB_TEST_KEY"),
    "place": (403, "PNB_TEST_KEY"),
    "model": (404, "'toy'"),
    "request": (400, "400"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_the_preflight_is_refused_at_the_first_refusal(far, what, refused):
    status, says = REFUSED[what]
    far.faults = [lambda h: echo(h, status)] * 9
    refused(server(far.url, retries=5).preflight, says=("cannot be asked", f"status {status}", says))
    assert len(far.seen) == 1


def test_the_preflight_waits_for_a_busy_server(far):
    far.faults = [FAULTS["busy"], FAULTS["error"]]
    r = server(far.url, retries=3).preflight()
    assert r.ok and r.attempts == 3 and [w[:10] for w in r.retries] == ["status 429", "status 500"]


@pytest.mark.parametrize("fault", ["timeout", "slow_trickle", "slow_header", "cut_at_once"])
def test_a_server_without_an_answer_is_unreachable(far, fault):
    far.faults = [FAULTS[fault]] * 9
    with pytest.raises(Unreachable, match="cannot be asked"):
        server(far.url, timeout=0.2, deadline=0.8).preflight()


def test_the_preflight_learns_what_the_server_takes(far):
    said = "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead."
    far.answer = picky(
        lambda body: no_field("max_tokens", said)(body) or no_system("no system role: unsupported")(body)
    )
    s = server(far.url)
    assert s.preflight(33).ok and (s.takes.limit, s.takes.system) == ("max_completion_tokens", False)
    assert far.seen[-1][1]["max_completion_tokens"] == 33


@pytest.mark.parametrize("text, end", [("<think>I could attack", "length"), ("", "length")])
def test_a_model_that_only_thinks_is_found_before_work(far, text, end, refused):
    far.faults = [lambda h: send(h, chat(text, end))]
    refused(server(far.url, retries=0).preflight, says=("toy", "tokens"))


# ---- tapes


def play(g):
    "The sentences of five queries of three environments."
    queries = [[dict(s, env=i, step=100 * t) for i, s in enumerate(situations(3, t))] for t in range(5)]
    return [g(scenes) for scenes in queries]


def guided_by(cassette, seed=3):
    return Guidance(Constant("Sleep soon."), cassette, encoder("hash"), seed=seed)


@pytest.fixture
def taped(far, tmp_path):
    "(tape, guidance, its sentences) of a run with a server that fails every third request and is then closed."
    far.faults = [FAULTS["no_model"] if k % 3 == 0 else (lambda h, k=k: send(h, chat(GOOD[k % 2]))) for k in range(40)]
    tape = tmp_path / "t.jsonl"
    live = guided_by(Cassette(tape, server(far.url, workers=1)))
    sentences = play(live)
    assert len(far.seen) == 15
    far.close()
    return tape, live, sentences


def test_a_tape_replays_the_run_offline(far, taped):
    "What failed then fails again; a torn last line is passed over."
    tape, live, sentences = taped
    with open(tape, "ab") as f:
        f.write(b'{"key": "torn')
    again = guided_by(Cassette(tape))
    assert play(again) == sentences and len(far.seen) == 15
    assert again.counts["cached"] == 10
    assert again.counts["failed"] == live.counts["failed"] == 5 and again.counts["kept"] == live.counts["kept"]


def test_a_tape_is_of_one_version_of_a_model(far, taped):
    other = guided_by(Cassette(taped[0], server(far.url, version="2", retries=0, patience=1)))
    assert play(other) == [[""] * 3] * 5 and other.counts["cached"] == 0


def test_a_tape_is_of_one_way_to_ask(far, taped):
    "Other fields of the request's body are another name; without any the name is that of older tapes."
    hot = dict(extra=dict(top_p=0.5), retries=0, patience=1)
    other = guided_by(Cassette(taped[0], server(far.url, **hot)))
    assert play(other) == [[""] * 3] * 5 and other.counts["cached"] == 0
    names = [server(far.url, extra=extra).name for extra in ({}, dict(top_p=0.5), dict(top_p=0.9))]
    assert names[0] == "server:toy" and len({*names}) == 3


def test_a_tape_is_of_one_seed(taped):
    moved = guided_by(Cassette(taped[0]), seed=4)
    play(moved)
    assert moved.counts["cached"] == 0


ONE = Request(decision_prompt(scene(), ()), seed=1)


@pytest.fixture
def two_voices(tmp_path):
    "A tape with a reply of each of two backends to one request."
    path = tmp_path / "t.jsonl"
    first, second = Scripted(GOOD[0]), Scripted(GOOD[1])
    second.name = "scripted-2"
    replies = Cassette(path, first).complete([ONE, ONE])
    assert [(r.text, r.cached) for r in replies] == [(GOOD[0], False), (GOOD[0], True)]
    assert len(first.asked) == 1 and Cassette(path, first).complete([ONE])[0].cached
    assert Cassette(path, second).complete([ONE])[0].text == GOOD[1]
    return path


def test_whose_replies_to_play_must_be_clear(two_voices, tmp_path, refused):
    refused(Cassette, tmp_path / "none.jsonl", says=("no replies",))
    refused(Cassette, two_voices, says=("scripted-1, scripted-2",))
    refused(Cassette, two_voices, name="scripted-3", says=("did you mean",))


@pytest.mark.parametrize(
    "change",
    [dict(temperature=0.0), dict(max_tokens=9), dict(seed=2), dict(messages=ONE.messages[:1])],
    ids=["temperature", "max_tokens", "seed", "messages"],
)
def test_another_request_is_not_on_the_tape(two_voices, change):
    assert not Cassette(two_voices, name="scripted-1").complete([dataclasses.replace(ONE, **change)])[0].ok


def test_a_kill_in_the_middle_of_a_line_costs_that_line_only(two_voices):
    with open(two_voices, "ab") as f:
        f.write(b'{"key": "x", "na')
    late = dataclasses.replace(ONE, seed=7)
    Cassette(two_voices, Scripted(GOOD[0])).complete([late])
    assert all(Cassette(two_voices, name="scripted-1").complete([r])[0].cached for r in (ONE, late))


def test_nonsense_on_a_tape_is_passed_over(two_voices):
    rows = two_voices.read_text().splitlines()
    rows = ["nonsense", "[]", '{"key": 1}', rows[0].replace('"text"', '"txet"'), rows[1]]
    two_voices.write_text("\n".join(rows) + "\n")
    assert Cassette(two_voices, name="scripted-1").complete([ONE])[0].why.startswith("damaged")
    assert Cassette(two_voices, name="scripted-2").complete([ONE])[0].text == GOOD[1]


# ---- budgets

LIMITS = {
    "calls": (dict(calls=10), 10),
    "tokens": (dict(tokens=1000), 10),
    "tokens of half a call": (dict(tokens=950), 10),
    "dollars in": (dict(dollars=0.01, price_in=10.0), 12),
    "dollars out": (dict(dollars=0.001, price_out=10.0), 10),
    "none": (dict(), 32),
    "no calls": (dict(calls=0), 0),
}


@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("envs", [1, 8])
def test_a_budget_is_passed_by_one_call_at_most(limit, envs):
    limits, calls = LIMITS[limit]
    d, b = Scripted("sleep"), Budget(**limits)
    g = Guidance(None, d, budget=b)
    for t in range(32 // envs):
        out = g([scene(env=e, step=t) for e in range(envs)])
    assert len(d.asked) == calls == g.counts["calls"]
    assert g.counts["unasked"] == g.counts["kept"] == 32 - calls
    assert out == ["sleep" if calls else ""] * envs
    one_call = {"calls": -1, "tokens": -100, "dollars": -100e-5 - 1e-12}
    assert all(left > one_call[k] for k, left in b.left().items())


def test_a_budget_in_dollars_needs_prices(refused):
    refused(Budget, dollars=1.0, says=("price_in",))


def test_a_budget_in_seconds():
    class Slow(Scripted):
        def complete(self, requests):
            time.sleep(0.03)
            return super().complete(requests)

    b = Budget(seconds=0.05)
    replies = [Budgeted(Slow("sleep"), b).complete([Request([])])[0].ok for _ in range(5)]
    assert replies == [True, True, False, False, False]


def test_what_is_on_tape_is_free(tmp_path):
    Cassette(tmp_path / "t", Scripted("sleep")).complete([ONE])
    b = Budget(calls=1)
    c = Budgeted(Cassette(tmp_path / "t", Scripted("sleep")), b)
    assert all(c.complete([ONE])[0].ok for _ in range(5)) and b.used()["calls"] == 0
    assert c.complete([dataclasses.replace(ONE, seed=2)])[0].ok and b.used()["calls"] == 1


def advised_by(tape):
    "A guidance with ten calls to make, in front of a tape."
    return Guidance(None, Cassette(tape, Scripted("sleep")), budget=Budget(calls=10), log=tape.with_name("log.jsonl"))


def account(g):
    "What a guidance has counted and paid."
    return {**g.counts, "seconds": 0}, g.budget.used()["calls"], g.budget.used()["tokens"]


def ask_at(g, steps):
    for step in steps:
        g([scene(step=step)])
    return g


def test_a_run_that_was_killed_has_paid_what_one_that_was_not_has(tmp_path):
    "A checkpoint after 4 calls, a kill after 9, and a second one, after 7, in what follows."
    whole = ask_at(advised_by(tmp_path / "whole" / "tape.jsonl"), range(15))
    tape = tmp_path / "killed" / "tape.jsonl"
    first = ask_at(advised_by(tape), range(4))
    state = json.loads(json.dumps(first.state()))
    ask_at(first, range(4, 9))
    second = ask_at(advised_by(tape).load(state), range(4, 6))
    state = json.loads(json.dumps(second.state()))
    ask_at(second, range(6, 7))
    last = ask_at(advised_by(tape).load(state), range(6, 15))
    assert account(last) == account(whole)
    assert (last.budget.used()["calls"], last.counts["cached"], last.counts["withheld"]) == (10, 0, 5)
    assert len(tape.read_text().splitlines()) == 10


def test_a_checkpoint_of_old_says_nothing_of_tapes(tmp_path):
    "Then what is on them is free, as it was."
    g = advised_by(tmp_path / "t" / "tape.jsonl")
    state = {k: v for k, v in g.state().items() if k != "tapes"}
    ask_at(g, range(3))
    again = ask_at(advised_by(tmp_path / "t" / "tape.jsonl").load(state), range(3))
    assert (again.counts["calls"], again.counts["cached"]) == (0, 3)


def test_a_tape_in_front_of_another_backend_still_knows_what_is_owed(tmp_path):
    "As when an adapter is tuned: the first one's replies are played, then the second one's."
    first, second = Scripted(GOOD[0]), Scripted(GOOD[1])
    second.name = "scripted-2"
    c = Cassette(tmp_path / "t", first)
    begun = c.state()
    c.complete([ONE])
    c.change(second)
    c.complete([ONE])
    again = Cassette(tmp_path / "t", first)
    again.load(begun)
    assert [(r.text, r.cached) for r in again.complete([ONE, ONE])] == [(GOOD[0], False), (GOOD[0], True)]
    again.change(second)
    assert [(r.text, r.cached) for r in again.complete([ONE, ONE])] == [(GOOD[1], False), (GOOD[1], True)]


def test_a_budget_behind_a_tape_is_part_of_the_state(tmp_path):
    b = Budget(calls=3)
    g = Guidance(None, Cassette(tmp_path / "u", Budgeted(Scripted("sleep"), b)))
    g([scene(step=1)])
    state = json.loads(json.dumps(g.state()))
    b.spent["calls"] = 0
    g.load(state)
    assert b.spent["calls"] == 1


# ---- models in this process


def toy_lm(folder, template=None, seed=0):
    "A language model of random weights that knows the words of the goals."
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = ["<pad>", "</s>", "<unk>", *sorted({w for g in GOALS for w in g.split()}), ","]
    t = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    t.pre_tokenizer = pre_tokenizers.Whitespace()
    t = PreTrainedTokenizerFast(tokenizer_object=t, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    t.chat_template = template
    t.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=64,
        eos_token_id=1,
        pad_token_id=0,
    )
    torch.manual_seed(seed)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return Local(toy_lm(tmp_path_factory.mktemp("lm") / "toy"))


SAMPLED = [Request(decision_prompt(s, ()), max_tokens=6, seed=i) for i, s in enumerate(situations(5))]
GREEDY = [dataclasses.replace(r, temperature=0.0) for r in SAMPLED]


def texts(model, requests):
    return [r.text for r in model.complete(requests)]


def test_sampling_has_a_seed_of_its_own(toy):
    import torch

    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    replies = toy.complete(SAMPLED)
    assert torch.equal(before, torch.random.get_rng_state())
    torch.manual_seed(9)
    assert texts(toy, SAMPLED) == [r.text for r in replies]
    assert all(r.ok and r.tokens_out <= 6 and r.tokens_in <= 58 for r in replies) and len({r.text for r in replies}) > 1
    assert texts(toy, [dataclasses.replace(r, seed=r.seed + 1) for r in SAMPLED]) != [r.text for r in replies]


def test_greedy_replies_depend_on_neither_company_nor_seed(toy):
    together = texts(toy, GREEDY)
    assert [texts(toy, [r])[0] for r in GREEDY] == together
    assert texts(toy, [dataclasses.replace(r, seed=99) for r in GREEDY]) == together
    mixed = texts(toy, [GREEDY[0], SAMPLED[0], GREEDY[1]])
    assert [mixed[0], mixed[2]] == together[:2]
    assert toy.complete([]) == []


def test_a_reply_ends_at_the_first_stop_token(toy, monkeypatch):
    assert max(r.tokens_out for r in toy.complete(SAMPLED)) == 6
    monkeypatch.setattr(toy, "stop", set(range(len(toy.tokenizer))))
    assert {(r.text, r.tokens_out) for r in toy.complete(SAMPLED)} == {("", 0)}


def test_padding_changes_no_reply(toy):
    short = [Request([dict(role="user", content="chop tree " * k)], 6, 0.0) for k in (1, 3, 9)]
    assert [texts(toy, [r])[0] for r in short] == texts(toy, short)


def test_a_models_name_is_that_of_its_weights(toy, tmp_path):
    assert Local(toy.folder).name == toy.name
    assert Local(toy_lm(tmp_path / "toy", seed=1)).name != toy.name
    assert str(toy.folder.parent) not in toy.name


@pytest.mark.parametrize("name, is_the_same", [("facts.json", True), ("tokenizer_config.json", False)])
def test_how_a_model_was_made_is_not_in_its_name(toy, tmp_path, name, is_the_same):
    again = shutil.copytree(toy.folder, tmp_path / toy.folder.name)
    (again / name).write_text('{"seconds": 3.2}')
    assert (Local(again).name == toy.name) == is_the_same


def test_a_model_without_memory_gives_failed_replies(toy, monkeypatch):
    import torch

    def generate(**kw):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(toy.model, "generate", generate)
    assert not toy.complete(SAMPLED)[0].ok


def test_a_template_without_a_system_role(toy, tmp_path):
    no_system = "{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    strict = Local(toy_lm(tmp_path / "c", "{% for m in messages %}" + no_system + "{{ m.content }}{% endfor %}"))
    messages = SAMPLED[0].messages
    assert strict.complete(SAMPLED)[0].ok
    assert as_text(strict.tokenizer, messages) == "\n\n".join(m["content"] for m in messages)
    assert as_text(toy.tokenizer, messages).endswith("\nassistant:")


@pytest.mark.parametrize("name", ["gpt2", "distilgpt2", "nobody/gpt2"])
def test_a_model_in_the_hubs_cache_is_found_by_its_name(name, tmp_path, monkeypatch):
    "Names of old have no owner."
    import huggingface_hub.constants

    commit = "0123456789abcdef0123456789abcdef01234567"
    stored = tmp_path / f"models--{name.replace('/', '--')}"
    toy_lm(stored / "snapshots" / commit)
    (stored / "refs").mkdir()
    (stored / "refs" / "main").write_text(commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    assert Local(name).name == f"local:{commit}@{commit[:12]}"


@pytest.mark.parametrize("name", ["", " ", None, 3])
def test_a_model_without_a_name_is_not_the_folder_at_hand(name, tmp_path, monkeypatch, refused):
    monkeypatch.chdir(toy_lm(tmp_path / "lm"))
    refused(Local, name, says=(f"model is {name!r}", "wanted a folder"))


def test_models_that_are_not_there(tmp_path, refused):
    refused(Local, "gpt3", says=("gpt3",))
    refused(Local, "./no", says=("no folder",))
    refused(Local, "nobody/nothing", says=("nobody/nothing",))


def test_folders_without_sound_weights(tmp_path, refused):
    folder = tmp_path / "m"
    folder.mkdir()
    refused(Local, folder, says=("no .safetensors",))
    (folder / "pytorch_model.bin").write_bytes(b"x")
    (folder / "model.safetensors").write_bytes(b"x")
    refused(Local, folder, says=(str(folder),))
