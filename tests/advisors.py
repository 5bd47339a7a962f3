"Advisors that misbehave on request: a scripted backend, made-up scenes, and a server that plays faults."

import contextlib
import http.server
import itertools
import json
import random
import socket
import threading
import time

from promptnb.llm import Backend, Reply
from promptnb.llm.text import GOAL_OF, scene

GOOD = ("drink water, sleep, chop tree", "mine coal, survival, place furnace")


class Scripted(Backend):
    "Plays texts or replies, raises what is an exception; the last one is played for ever. Keeps the requests."

    name = "scripted-1"

    def __init__(self, *texts):
        self.texts, self.asked = list(texts), []

    def complete(self, requests):
        self.asked += requests
        return [self.play(self.texts.pop(0) if len(self.texts) > 1 else self.texts[0]) for _ in requests]

    def play(self, text):
        if isinstance(text, BaseException):
            raise text
        return text if isinstance(text, Reply) else Reply(text, tokens_in=90, tokens_out=10)


THINGS = ["water", "grass", "tree", "cow", "zombie", "table", "stone", "plant", "iron"]
VITALS = ["health", "food", "drink", "energy"]
GOODS = ["wood", "stone", "coal", "iron", "sapling", "wood_pickaxe", "stone_pickaxe", "iron_pickaxe"]


def situations(n, seed=0):
    "n made-up scenes; some that no game would make."
    rng = random.Random(seed)
    for i in range(n):
        items = {k: rng.randint(1, 9) for k in rng.sample(VITALS + GOODS, rng.randint(0, 12))}
        yield scene(
            rng.sample(THINGS, rng.randint(0, 9)),
            items,
            rng.choices(["noop", "do", "move_left"], k=rng.randint(0, 100)),
            unlocked=rng.sample(list(GOAL_OF), rng.randint(0, 22)),
            env=i,
            step=100 * i,
        )


# ---- what a server can send: each takes the handler of a request


def chat(text=GOOD[0], end="stop", **more):
    "The body of a completion."
    message = dict(role="assistant", content=text)
    body = dict(
        id="x",
        object="chat.completion",
        created=0,
        model="toy-2",
        choices=[dict(index=0, finish_reason=end, message=message)],
        usage=dict(prompt_tokens=90, completion_tokens=10),
    )
    return json.dumps(dict(body, **more)).encode()


def send(h, body, status=200, length=None, **headers):
    "A whole response; `length` is what its header claims."
    h.send_response(status)
    length = len(body) if length is None else length
    headers = {k.replace("_", "-"): v for k, v in headers.items()}
    for k, v in {"Content-Type": "application/json", "Content-Length": str(length), **headers}.items():
        h.send_header(k, v)
    h.end_headers()
    h.wfile.write(body)


def drip(h, body, forever=b"", pause=0.05):
    "One byte at a time; afterwards `forever`, without an end."
    for b in itertools.chain(body, itertools.cycle(forever) if forever else ()):
        h.wfile.write(bytes([b]))
        h.wfile.flush()
        time.sleep(pause)


def drip_body(h, status, length):
    "Headers at once, then a space now and then."
    h.send_response(status)
    h.send_header("Content-Type", "application/json")
    h.send_header("Content-Length", str(length))
    h.end_headers()
    drip(h, b"", b" ")


def echo(h, status):
    "The key comes back: in an error, or in a reply."
    text = f"your header was {h.headers['Authorization']}"
    send(h, chat(text) if status == 200 else json.dumps(dict(error=dict(message=text))).encode(), status)


NO_END_OF_HEADER = b"HTTP/1.1 200 OK\r\nX-A: "
LONG_AGO = "Wed, 21 Oct 2015 07:28:00 GMT"
NAN_TEXT = b'{"choices": [{"finish_reason": "stop", "message": {"content": NaN}}]}'

FAULTS = dict(
    timeout=lambda h: time.sleep(1),
    slow_trickle=lambda h: drip_body(h, 200, 1000000),
    slow_error=lambda h: drip_body(h, 500, 99999),
    slow_header=lambda h: drip(h, NO_END_OF_HEADER, b"a"),
    busy=lambda h: send(h, b"{}", 429, Retry_After="0.1"),
    busy_for_an_hour=lambda h: send(h, b"{}", 429, Retry_After="3600"),
    busy_since_ever=lambda h: send(h, b"{}", 503, Retry_After=LONG_AGO),
    busy_nonsense=lambda h: send(h, b"{}", 429, Retry_After="NaN, soon"),
    error=lambda h: send(h, b'{"error": {"message": "oops\\u0000"}}', 500),
    error_no_json=lambda h: send(h, b"<html>bad gateway", 502),
    wrong_key=lambda h: echo(h, 401),
    no_model=lambda h: send(h, b'{"error": "no such model"}', 404),
    half_reply=lambda h: send(h, chat()[:60], length=len(chat())),
    half_json=lambda h: send(h, chat()[:60]),
    cut_at_once=lambda h: h.connection.shutdown(socket.SHUT_RDWR),
    no_body=lambda h: send(h, b""),
    html=lambda h: send(h, b"<html>hello</html>", Content_Type="text/html"),
    wrong_json=lambda h: send(h, b'{"answer": 42}'),
    a_list=lambda h: send(h, b"[1, 2]"),
    no_choices=lambda h: send(h, chat(choices=[])),
    nan=lambda h: send(h, NAN_TEXT),
    odd_text=lambda h: send(h, chat([{"a": 1}])),
    latin=lambda h: send(h, b'{"choices": "\xff\xfe"}'),
    huge_body=lambda h: send(h, chat("x" * (5 * 2**20))),
    moved=lambda h: send(h, b"", 307, Location="http://127.0.0.1:9/elsewhere"),
    filtered=lambda h: send(h, chat(end="content_filter")),
)


class Far:
    "A server that plays `faults`, one a request, then answers well. Each fault is a function of the handler."

    def __init__(self):
        self.faults, self.seen, self.good = [], [], itertools.cycle(GOOD)
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), self.handler())
        self.server.daemon_threads = True
        self.server.handle_error = lambda *a: None
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"

    def handler(far):
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self):
                self.close_connection = True
                self.request_body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                far.seen.append((time.monotonic(), self.request_body))
                with contextlib.suppress(OSError):
                    far.answer(self)

            def log_message(self, *a):
                pass

        return Handler

    def answer(self, h):
        if self.faults:
            self.faults.pop(0)(h)
        else:
            send(h, chat(next(self.good)))

    def close(self):
        self.server.shutdown()
        self.server.server_close()
