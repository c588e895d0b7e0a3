#!/usr/bin/env python3
# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "tornado>=6.6.1", "redis>=8.0.1", "fakeredis>=2.40",
#   "pytest", "hypothesis", "playwright", "websockets", "confusable-homoglyphs", "prompt_toolkit", "pyte",
# ]
# ///
# ruff: noqa: N802, PTH208 - G1 to G10 are the README's names; in a coroutine listdir is as good as Path
"""The tests of tornchat, in the order of its sections.

    uv run test_tornchat.py                          those that are quick, packages fetched
    python -m pytest -q test_tornchat.py             those that are quick, packages installed
    TORNCHAT_TEST_ALL=1 python -m pytest ...         those that take seconds too, as .ci/run does
    python -m pytest -q -k "G2 and redis"            one guarantee of the README, over a real Redis only
    TORNCHAT_TEST_PATIENCE=30 python -m pytest ...   on a slow machine
    TORNCHAT_NODE_MODULES=... python -m pytest ...   with what `npm install axe-core wscat` has put there
    TORNCHAT_SCREENSHOTS=folder python -m pytest -k axe   what the page looks like, in every state

    python test_tornchat.py bench                    no test: how fast it is beside a chat as in the tutorials
    python test_tornchat.py bench floods             ... what clients cost that mean ill
    python test_tornchat.py bench page               ... how quick the page is
    python test_tornchat.py bench transports         ... what polling costs beside a socket

Every test reads as a transcript: who logs in, says, expects. `Browser` is one tab of one person, `Lan` is all that
one test started, `Program` is tornchat.py as a user runs it, `RedisServer` is a real one on a free port. The tests
that are about the room run twice: over the fakeredis inside the daemon, and over a real redis-server. A machine that
has no redis-server, Chromium, nginx, axe-core or wscat skips what needs it, and says so; where CI is set that fails.

No test sleeps to let something happen. "Nothing came" is proven by a barrier: what must come next comes next.
"""

from __future__ import annotations

import argparse
import ast
import asyncio
import base64
import bisect
import collections
import contextlib
import ctypes
import dataclasses
import datetime
import errno
import fcntl
import functools
import gc
import gzip
import html
import html.parser
import inspect
import itertools
import json
import logging
import math
import os
import pty
import random
import re
import select
import selectors
import shlex
import shutil
import signal
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import termios
import textwrap
import time
import types
import unicodedata
import urllib.parse
import uuid
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from http.cookies import SimpleCookie
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, ParamSpec, Self, TypeVar

import fakeredis
import hypothesis
import hypothesis.stateful
import hypothesis.strategies as st
import pyte
import pytest
import redis
import redis.asyncio
import tornado.httpserver
import tornado.netutil
import tornado.web
import tornado.websocket
import websockets
from confusable_homoglyphs.confusables import confusables_data  # type: ignore[import-untyped,unused-ignore]
from playwright.async_api import Page as WebPage
from playwright.async_api import async_playwright
from tornado.httpclient import AsyncHTTPClient, HTTPClientError, HTTPRequest, HTTPResponse
from tornado.httputil import HTTPServerRequest
from tornado.websocket import WebSocketClosedError, websocket_connect

import tornchat

PATIENCE = float(os.environ.get("TORNCHAT_TEST_PATIENCE", "5"))  # seconds that an answer may take
RETURN = 6 * PATIENCE  # ... and until a client or a store is surely back: three times a client's longest pause of 10 s
NODE_MODULES = Path(os.environ.get("TORNCHAT_NODE_MODULES", "/nonexistent"))  # where npm has put axe-core and wscat
PROGRAM = Path(tornchat.__file__).resolve()
SOURCE = PROGRAM.read_text(encoding="utf-8")
CHATTER = {"joined", "left", "hosts", "time"}  # frames that come when they like: passed over unless they are asked for
Frame = dict[str, Any]
P = ParamSpec("P")
T = TypeVar("T")

hypothesis.settings.register_profile("tornchat", deadline=None, max_examples=100)
hypothesis.settings.load_profile("tornchat")


# === The stage: what the tests are played on ==========================================================================


def missing(what: str) -> NoReturn:
    """Skip for want of a program on a newcomer's machine; fail where CI is set, for there nothing may be skipped."""
    if os.environ.get("CI"):
        pytest.fail(f"{what} is not installed")
    pytest.skip(f"{what} is not installed")


ALL = bool(os.environ.get("CI") or os.environ.get("TORNCHAT_TEST_ALL"))
slow = pytest.mark.skipif(not ALL, reason="takes seconds: TORNCHAT_TEST_ALL=1 runs it")


def transcript(test: Callable[P, Coroutine[Any, Any, None]]) -> Callable[P, None]:
    """Run a test that is a coroutine in a loop of its own, for a bounded time, and close what it used in that loop."""

    @functools.wraps(test)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        async def play() -> None:
            async with contextlib.AsyncExitStack() as stack, asyncio.timeout(4 * RETURN):
                stack.push_async_callback(sweep)
                for value in kwargs.values():
                    if isinstance(value, Lan | Feeds):
                        stack.push_async_callback(value.close)
                await test(*args, **kwargs)

        asyncio.run(play())

    return run


class Transcripts:
    """Tests that are coroutines: each is run as a transcript."""

    def __init_subclass__(cls) -> None:
        for name, test in list(vars(cls).items()):
            if name.startswith("test_") and inspect.iscoroutinefunction(test):
                setattr(cls, name, transcript(test))


async def sweep() -> None:
    """Cancel whatever is left of a test. Some need to be told twice: before Python 3.12 `wait_for` may swallow it."""
    for _ in range(100):
        if not (others := asyncio.all_tasks() - {asyncio.current_task()}):
            return
        for task in others:
            task.cancel()
        await asyncio.wait(others, timeout=0.05)


async def until(condition: Callable[[], object]) -> None:
    """Wait until the condition, which may be a coroutine, holds."""
    began = time.monotonic()
    while not (await held if inspect.isawaitable(held := condition()) else held):
        if time.monotonic() - began > RETURN:
            pytest.fail(f"still not so after {RETURN} s: {condition}")
        await asyncio.sleep(0.01)


def free_port() -> int:
    """A port that was free a moment ago."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def listens(port: int) -> bool:
    with socket.socket() as visitor:
        return visitor.connect_ex(("127.0.0.1", port)) == 0


def place(daemon: tornchat.Daemon) -> str:
    return f"http://127.0.0.1:{daemon.port}"


class RedisServer:
    """A redis-server of our own on a free port, in a folder of its own."""

    def __init__(self, folder: Path, *options: str) -> None:
        self.folder, self.options = folder, options
        self.program = shutil.which("redis-server")
        if self.program is None:
            missing("redis-server")
        self.port = 0
        self.process: Any = None
        self.start()

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    @property
    def client(self) -> redis.Redis:
        return redis.Redis.from_url(self.url, socket_timeout=PATIENCE)

    def start(self) -> None:
        """Start it, on the port of last time if there was one, and wait until it answers."""
        for _ in range(5):  # somebody may take the free port before the server does
            self.port = self.port or free_port()
            command = [str(self.program), "--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(self.folder)]
            command += ["--save", "", "--logfile", "redis.log", *(self.options or ("--appendonly", "no"))]
            self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
            if self._answers():
                return
            self.port = 0
        pytest.fail("redis-server does not start: " + (self.folder / "redis.log").read_text())

    def _answers(self) -> bool:
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline and self.process.poll() is None:
            with contextlib.suppress(redis.ConnectionError, redis.TimeoutError), self.client as client:
                return bool(client.ping()) and client.connection_pool is not None
            time.sleep(0.01)
        return False

    def kill(self) -> None:
        self.process.send_signal(signal.SIGCONT)
        self.process.kill()
        self.process.wait()

    def send_signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)


@dataclass(frozen=True)
class Store:
    """Where the daemons of one test keep their messages: a URL (empty: inside the daemon) and a room of their own."""

    url: str
    room: str = field(default_factory=lambda: f"room-{uuid.uuid4().hex[:12]}")

    @property
    def lasts(self) -> bool:
        return bool(self.url)

    def key(self, name: str) -> bytes:
        return f"tornchat:{{{self.room}}}:{name}".encode()


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """One redis-server for all tests that do not harm it."""
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    yield server
    server.kill()


@pytest.fixture
def own_redis(tmp_path: Path) -> Iterator[RedisServer]:
    """A redis-server that this test may kill, stop and flush; it keeps what it has confirmed."""
    server = RedisServer(tmp_path, "--appendonly", "yes", "--appendfsync", "always")
    yield server
    server.kill()


@pytest.fixture
def own_lan(own_redis: RedisServer) -> Lan:
    return Lan(Store(own_redis.url), repair_seconds=0.2)


@pytest.fixture(params=["fakeredis", "redis"])
def store(request: pytest.FixtureRequest) -> Store:
    """The store of one test: first the one inside the daemon, then a real one."""
    return Store("" if request.param == "fakeredis" else request.getfixturevalue("redis_server").url)


@pytest.fixture
def lan(store: Store) -> Lan:
    return Lan(store)


@pytest.fixture
def memory_lan() -> Lan:
    """A network of one daemon that keeps its messages in itself: for what no store can change."""
    return Lan(Store(""))


@pytest.fixture
def redis_lan(redis_server: RedisServer) -> Lan:
    return Lan(Store(redis_server.url))


@pytest.fixture(scope="session", autouse=True)
def quick_collections() -> None:
    """What is there before the first test stays: it need not be looked through after each one."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def no_nohup() -> None:
    """Programs heed a closed window, also where the tests were started with `nohup`."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(autouse=True)
def no_errors_logged(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """No test leaves an error or a traceback in the log: what clients and stores do wrong is no error of the daemon."""
    yield
    gc.collect()  # a task that died alone says so when it is collected
    for record in caplog.get_records("call"):
        told = "store is away" in record.getMessage()
        assert record.levelno < logging.ERROR or told, (record.getMessage(), record.exc_info)
        assert not record.exc_info, (record.getMessage(), record.exc_info)


class Lan:
    """What one test starts: daemons over one store, and browsers. Closed when the test ends."""

    def __init__(self, store: Store, **options: Any) -> None:
        self.store, self.options = store, options
        self.daemons: list[tornchat.Daemon] = []
        self.browsers: list[Browser] = []
        self.programs: list[Program] = []

    async def serve(self, **options: Any) -> tornchat.Daemon:
        """Start one more daemon in this process, with quick timers and no limit to the rate unless told otherwise."""
        quick: dict[str, Any] = {
            "port": 0,
            "host": "127.0.0.1",
            "rate": 0.0,
            "grace_seconds": 0.2,
            "renew_seconds": 0.1,
        }
        quick |= {"tick_seconds": 0.05, "guess_seconds": 0.05, "repair_seconds": 0.05, "name_seconds": 0.0}
        quick["ping_seconds"] = 600.0  # clients made by hand answer no ping, nor does one whose frames we leave unread
        quick |= {"redis_url": self.store.url, "room": self.store.room} | self.options
        daemon = await tornchat.Daemon.start(tornchat.Config(**quick | options))
        self.daemons.append(daemon)
        return daemon

    async def restart(self, **options: Any) -> tornchat.Daemon:
        """Stop the newest daemon in order and start another on its port."""
        port = self.daemons[-1].port
        await self.daemons[-1].stop()
        return await self.serve(**{"port": port} | options)

    async def run(self, *options: str) -> Program:
        """Start tornchat.py as a user does, on a free port and this store."""
        where = ["--redis-url", self.store.url] if self.store.url else []
        return self.add(await Program.start("--host", "127.0.0.1", "--room", self.store.room, *where, *options))

    def add(self, program: Program) -> Program:
        """A program that ends with the test."""
        self.programs.append(program)
        return program

    def browser(self, at: tornchat.Daemon | str | None = None, language: str = "en") -> Browser:
        """Someone's browser, at the newest daemon unless another is named."""
        if at is None:
            at = self.daemons[-1]
        return Browser(self, at if isinstance(at, str) else place(at), language)

    async def open(self) -> tornchat.Daemon:
        """The newest daemon; the first one is started for whoever comes first."""
        return self.daemons[-1] if self.daemons else await self.serve()

    async def login(self, name: str, password: str = "", at: tornchat.Daemon | str | None = None) -> Browser:
        """Someone who has logged in, and has no connection yet."""
        browser = self.browser(at or await self.open())
        await browser.login(name, password)
        return browser

    async def join(self, name: str, at: tornchat.Daemon | str | None = None) -> Browser:
        """Someone who has logged in, opened the page and been welcomed."""
        browser = await self.login(name, at=at)
        await browser.connect()
        browser.welcome = await browser.expect("welcome", name=name)
        return browser

    async def ask_raw(
        self, method: str, path: str, headers: Mapping[str, str], body: str = "", end: bytes = b"\r\n\r\n"
    ) -> str:
        """What the newest daemon answers to a request that is written as it stands here, up to the body."""
        lines = [f"{method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in headers.items())]
        if method in ("POST", "PUT"):
            lines.append(f"Content-Length: {len(body)}")
        request = "\r\n".join([*lines, "", body])
        return (await exchange((await self.open()).port, request.encode("latin-1"), end)).decode("latin-1")

    async def close(self) -> None:
        for browser in self.browsers:
            browser.drop()
        for program in self.programs:
            await program.kill()
        for daemon in self.daemons:
            await asyncio.wait_for(daemon.stop(), RETURN)
        if self.store.url:
            with contextlib.suppress(redis.RedisError), redis.Redis.from_url(self.store.url) as client:
                for key in client.scan_iter(self.store.key("*")):
                    client.delete(key)


class Browser:
    """One tab of one person's browser: cookies, a language, at most one socket, and all frames that came through it."""

    def __init__(self, lan: Lan, url: str, language: str) -> None:
        self.lan, self.url, self.language = lan, url, language
        self.cookies: dict[str, str] = {}
        self.http = AsyncHTTPClient(force_instance=True, max_clients=100)
        self.socket: Any = None  # a WebSocketClientConnection, while there is one
        self.frames: list[Frame] = []
        self.welcome: Frame = {}
        self.epoch: str | None = None  # where a page would resume
        self.after: int | None = None
        self.last: str | None = None  # the cursor of its last poll
        self.port = urllib.parse.urlsplit(url).port or 80
        self.certificates: str | None = None  # whom to trust for https
        self.cids = (f"cid-{uuid.uuid4().hex[:6]}-{n}" for n in itertools.count(1))
        lan.browsers.append(self)

    def tab(self, at: tornchat.Daemon | str | None = None) -> Browser:
        other = self.lan.browser(at or self.url, self.language)
        other.cookies = self.cookies
        return other

    # HTTP

    def headers(self, **more: str) -> dict[str, str]:
        headers = {"Accept-Language": self.language}
        if self.cookies:
            headers["Cookie"] = "; ".join(f"{name}={value}" for name, value in self.cookies.items())
        return headers | {name.replace("_", "-"): value for name, value in more.items()}

    async def fetch(
        self,
        path: str,
        method: str = "GET",
        *,
        form: Mapping[str, str] | None = None,
        body: str | bytes | None = None,
        **headers: str,
    ) -> HTTPResponse:
        """One request, redirects not followed; cookies are kept as a browser keeps them."""
        if form is not None:
            method, body = "POST", urllib.parse.urlencode(form)
            headers = {"Content_Type": "application/x-www-form-urlencoded"} | headers
        request = HTTPRequest(
            self.url + path,
            method,
            headers=self.headers(**headers),
            body=body,
            follow_redirects=False,
            request_timeout=7 * PATIENCE,
            ca_certs=self.certificates,
            allow_nonstandard_methods=True,
        )
        answer = await self.http.fetch(request, raise_error=False)
        for line in answer.headers.get_list("Set-Cookie"):
            for name, morsel in SimpleCookie(line).items():
                self.cookies[name] = morsel.coded_value
                if not morsel.value:
                    del self.cookies[name]
        return answer

    async def login(self, nickname: str, password: str = "") -> HTTPResponse:
        """Send the login form; it must succeed."""
        answer = await self.fetch("/login", form={"nickname": nickname, "password": password})
        assert (answer.code, answer.headers.get("Location")) == (303, "./"), text_of(answer)
        return answer

    async def ask(self, nickname: str, password: str = "") -> tuple[int, Frame]:
        """Log in as a script does; return the status and what the JSON says."""
        form = {"nickname": nickname, "password": password}
        answer = await self.fetch("/login", form=form, Accept="application/json")
        return answer.code, json.loads(answer.body)

    async def messages(self, after: object = None, epoch: str | None = None, **query: object) -> tuple[int, Frame]:
        places = {"after": after, "epoch": epoch, **query}
        wanted = urllib.parse.urlencode({name: value for name, value in places.items() if value is not None})
        answer = await self.fetch(f"/messages?{wanted}")
        return answer.code, json.loads(answer.body)

    async def poll(self, wait: float = 0) -> list[Frame]:
        """Ask for what is new since the last poll or frame, as a page does that has no socket; return the events."""
        status, answer = await self.messages(self.after, self.epoch, wait=wait, last=self.last)
        assert status == 200, answer
        for frame in answer["events"]:
            self.note(frame)
        self.after, self.epoch, self.last = answer["seq"], answer["epoch"], answer["last"]
        events: list[Frame] = answer["events"]
        return events

    async def post(self, text: str, cid: str | None = None, **more: str) -> tuple[int, Frame]:
        form = {"text": text} | ({"cid": cid} if cid else {}) | more
        answer = await self.fetch("/messages", form=form)
        return answer.code, json.loads(answer.body)

    # The socket

    async def connect(
        self,
        after: object = None,
        epoch: str | None = None,
        *,
        subprotocols: list[str] | None = None,
        headers: Mapping[str, str] | None = None,
        **query: str,
    ) -> Self:
        """Open /chat, in place of the socket that was open."""
        self.drop()
        places = {"after": after, "epoch": epoch, **query}
        wanted = urllib.parse.urlencode({name: value for name, value in places.items() if value is not None})
        told = self.headers() | dict(headers or {})
        request = HTTPRequest(f"ws{self.url[4:]}/chat?{wanted}", headers=told, ca_certs=self.certificates)
        connecting = websocket_connect(request, subprotocols=subprotocols, max_message_size=2**24)
        self.socket = await asyncio.wait_for(connecting, RETURN)
        return self

    async def knock(self, query: str = "", **headers: str) -> int:
        """Ask for /chat with this query and these headers; the status of the answer, 101 if it is a socket."""
        request = HTTPRequest(f"ws{self.url[4:]}/chat?{query}", headers=self.headers(**headers))
        try:
            self.socket = await asyncio.wait_for(websocket_connect(request), RETURN)
        except HTTPClientError as refused:
            return refused.code
        return 101

    async def resume(self) -> Frame:
        """Connect where the last socket ended, as the page does; return the welcome."""
        await self.connect(self.after, self.epoch)
        return await self.expect("welcome")

    def drop(self) -> None:
        """Vanish: the connection is cut without a goodbye."""
        if self.socket is not None and self.socket.protocol is not None and self.socket.protocol.stream is not None:
            self.socket.protocol.stream.close()
        self.socket = None

    async def send(self, raw: str | bytes) -> None:
        await self.socket.write_message(raw, binary=isinstance(raw, bytes))

    async def say(self, text: str, cid: str | None = None) -> str:
        """Say something; return the cid that it went with."""
        cid = cid or next(self.cids)
        await self.send(json.dumps({"type": "say", "text": text, "cid": cid}, ensure_ascii=False))
        return cid

    async def say_many(self, count: int, first: int = 1) -> None:
        """Say "1", "2", ... and see each confirmed, fifty in flight."""
        for start in range(first, first + count, 50):
            numbers = range(start, min(start + 50, first + count))
            cids = [await self.say(str(number)) for number in numbers]
            for number, cid in zip(numbers, cids, strict=True):
                await self.expect("message", text=str(number), cid=cid)

    async def read(self) -> str | bytes | None:
        """The next frame as it is; None at the end."""
        return await asyncio.wait_for(asyncio.ensure_future(self.socket.read_message()), RETURN)

    async def frame(self) -> Frame | None:
        """The next frame; None at the end."""
        raw = await self.read()
        if raw is None:
            return None
        frame: Frame = json.loads(raw)
        self.note(frame)
        return frame

    def note(self, frame: Frame) -> None:
        """Keep a frame, and where it leads."""
        self.frames.append(frame)
        if frame["type"] == "welcome":
            self.epoch = frame["epoch"]
            if not frame["recovered"]:
                self.after = 0 if frame["seq"] == 0 else None
        if frame["type"] == "message":
            self.after = frame["seq"]

    async def expect(self, kind: str, /, **fields: object) -> Frame:
        """Return the next frame: it is of this kind and has these fields. Chatter is passed over unless asked for."""
        while (frame := await self.frame()) is not None:
            if frame["type"] == kind and fields.items() <= frame.items():
                return frame
            if frame["type"] not in CHATTER:
                pytest.fail(f"expected {kind} {str(fields)[:200]}, got {str(frame)[:200]}")
        code = self.socket.close_code if self.socket else None
        pytest.fail(f"expected {kind} {str(fields)[:200]}, but the socket was closed with {code}")

    async def expect_texts(self, *texts: object) -> None:
        """The next messages have these texts."""
        for text in texts:
            await self.expect("message", text=str(text))

    async def quiet(self) -> None:
        """Assert that nothing but chatter is under way: what is said now is the next that comes."""
        await self.expect("message", cid=await self.say("(is anything else coming?)"))

    async def closed(self, code: int, reason: str | None = None) -> None:
        """Assert that nothing but chatter comes before the daemon closes the socket with this code."""
        while (frame := await self.frame()) is not None:
            assert frame["type"] in CHATTER, frame
        assert self.socket.close_code == code, (self.socket.close_code, self.socket.close_reason)
        if reason is not None:
            assert self.socket.close_reason == reason

    async def ended(self) -> int | None:
        """Read all that came before the socket was closed, whatever it is; return the close code."""
        while await self.frame() is not None:
            pass
        return self.socket.close_code if self.socket else None

    def seen(self, kind: str) -> list[Frame]:
        """The frames of a kind that came so far."""
        return [frame for frame in self.frames if frame["type"] == kind]

    def names_in(self, kind: str) -> list[str]:
        return [name for frame in self.seen(kind) for name in frame["names"]]


class Program:
    """tornchat.py as a user runs it: a process, what it prints, how it ends."""

    def __init__(self, process: Any) -> None:
        self.process = process
        self.printed = ""

    @classmethod
    async def start(cls, *options: str, python: tuple[str, ...] = (str(PROGRAM),), **environ: str) -> Self:
        """Start it with these options and, of the environment, only what a program needs to run."""
        return await cls.spawn([*python, *options], environ)

    @classmethod
    async def spawn(cls, command: Sequence[str], environ: Mapping[str, str], **streams: Any) -> Self:
        """Start it; where no stream is given it reads nothing, and what it prints comes through pipes."""
        kept = ("PATH", "HOME", "LANG", "SYSTEMROOT", "VIRTUAL_ENV")
        env = {name: os.environ[name] for name in kept if name in os.environ} | dict(environ)
        streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | streams
        return cls(await asyncio.create_subprocess_exec(sys.executable, *command, env=env, **streams))

    async def address(self) -> str:
        """The first address that it prints."""
        while line := (await asyncio.wait_for(self.process.stdout.readline(), RETURN)).decode():
            self.printed += line
            if found := re.search(r"https?://[^\s/]+", line):
                return found[0]
        pytest.fail(f"no address printed: {self.printed} {await self.ended()}")

    async def logs(self, words: str) -> str:
        """The next line of its log with these words."""
        while line := await asyncio.wait_for(self.process.stderr.readline(), RETURN):
            if re.search(words, line.decode()):
                return str(line.decode())
        pytest.fail(f"it ends without a word of {words}")

    async def ended(self) -> tuple[int, str, str]:
        """Its exit code, and what it printed on stdout and on stderr."""
        try:
            out, err = await asyncio.wait_for(self.process.communicate(), RETURN)
        except TimeoutError:
            await self.kill()
            pytest.fail("the program does not end")
        return self.process.returncode, self.printed + (out or b"").decode(), err.decode()

    async def stop(self, number: signal.Signals = signal.SIGTERM) -> tuple[str, str]:
        """Stop it in order; what it printed on stdout and on stderr."""
        self.signal(number)
        code, out, err = await self.ended()
        assert code == 0, err
        return out, err

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    async def kill(self) -> None:
        if self.process.returncode is None:
            self.process.kill()
        await self.process.wait()


def after(start: str) -> tuple[str, str]:
    """How Python runs tornchat.py, once these statements are done."""
    return "-c", f"import runpy, sys; {start}; runpy.run_path({str(PROGRAM)!r}, run_name='__main__')"


async def run_to_end(*options: str, python: tuple[str, ...] = (str(PROGRAM),), **environ: str) -> tuple[int, str, str]:
    """Run tornchat.py until it ends by itself; whatever went wrong, nobody is shown a traceback."""
    program = await Program.start(*options, python=python, **environ)
    code, out, err = await program.ended()
    assert "Traceback" not in out + err
    return code, out, err


async def fails(code: int, *options: str, **how: Any) -> str:
    """Run tornchat.py, which ends with this exit code and one line; return the line."""
    ended, out, err = await run_to_end(*options, **how)
    assert (ended, out, len(err.splitlines())) == (code, "", 1), err
    return err


def complaints(log: str) -> list[str]:
    """The lines of a log, but for those that say that the room was opened and closed."""
    return [line for line in log.splitlines() if not re.search(r" INFO (started: |stopped$)", line)]


async def exchange(port: int, request: bytes, end: bytes = b"") -> bytes:
    """What the daemon answers to these bytes, up to this end, or before it closes, or until patience is over."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    answer = b""
    with contextlib.suppress(ConnectionError, TimeoutError):
        writer.write(request)
        while piece := await asyncio.wait_for(reader.read(65536), PATIENCE):
            answer += piece
            if end and (found := re.search(end, answer, re.DOTALL)):
                answer = answer[: found.end()]
                break
    writer.transport.abort()
    return answer


async def handshake(
    url: str, cookie: str = "", after: bytes = b"", *, query: str = "", buffer: int = 65536
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A WebSocket made by hand, for a client that does not do what clients do; `after` is sent in the same breath."""
    place = urllib.parse.urlsplit(url)
    reader, writer = await asyncio.open_connection(place.hostname, place.port, limit=buffer)
    head = f"GET /chat{query} HTTP/1.1\r\nHost: {place.netloc}\r\nCookie: {cookie}\r\n{UPGRADE_LINES}\r\n"
    writer.write(head.encode() + after)
    await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), RETURN)
    return reader, writer


def reset(writer: asyncio.StreamWriter) -> None:
    """Ends a connection as a phone does that is switched off: with an error, not with a word."""
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


async def verdict(answer: Awaitable[tuple[int, Frame]]) -> tuple[int, object]:
    """The status of an answer, and the code with which it refuses."""
    status, told = await answer
    return status, told.get("code")


def text_of(answer: HTTPResponse) -> str:
    return answer.body.decode()


# === Messages and names ===============================================================================================

RESERVED_NAMES = (
    "Admin2|2admin|The Admin|TheAdmin|Admin-Bob|Bob (Admin)|superadmin|aclmin|The Room|Host 1|AdminBob|Sys Admin 3"
    "|Adm1n2|系统消息|聊天室管理员|システム通知|시스템알림|ผู้ดูแลห้อง|Админ Иван|admin🦊bob"
)
# Blank, too long, of marks and signs alone, of two scripts, of letters out of use, with joiners where nothing joins, or
# reserved, however it is written.
BAD_NAMES = [" " * 3, "x" * 25, "a" + "\u0301" * 70, "A" + "\u0301\u0316" * 4 + "nn", "Ann\u0323\u0323", "Ann\u200d"]
BAD_NAMES += ["\u0301nn", "\x1b[31mAnn", "\u2066Ann\u2069", "\u3164", "\u2800\u2800", "Ann\U000e0041", "\U0001d159"]
BAD_NAMES += ["ក\u17b4", "Ann\u200d🚀", "Ол\u200cьга", "ad\u200dmin"]
BAD_NAMES += ["!?", "Аnn", "Πавел", "user٣", "Ⲙⲁⲣⲓⲁ", "ᏣᎳᎩ", "李⺠", "ꥠᅡ", "محـمد", "अाशा", "🅐🅝🅝"]
BAD_NAMES += ["admin", "Ａｄｍ1n", "系统", "★ [Admin] ★", "🅰🅳🅼🅸🅽", "ꜱʏꜱᴛᴇᴍ", "$y573m", "moderateur", "hоst"]
# Controls, what nothing shows, marks of direction, breaks of a line, half a character, and what has no meaning yet.
UNFIT = "\0\7\n\r\x9b\xad\u034f\u0378\u061c\u180e\u200b\u200d\u200e\u2028\u202e\u2060"
UNFIT += "\ud800\ue000\ufe00\ufeff\uffa0\ufff9\ufffc\uffff"
BAD_NAMES += [f"An{char}n" for char in UNFIT]
RESERVED = f"{tornchat.RESERVED} {tornchat.RESERVED_WORDS} {tornchat.RESERVED_PARTS}".split()
BAD_NAMES += [*RESERVED, *(f"{word}2" for word in RESERVED), *RESERVED_NAMES.split("|")]
# In plain lines they could be taken for somebody else's words, for two people, or for the room's.
FORGING_NAMES = [f"Teacher{colon} go home I" for colon in ":ːः։׃܃᛬᠃᠉⁚∶ꓽ꞉：ઃ፡៖"]
FORGING_NAMES += [f"Bob{comma} Teacher" for comma in [*",،、，‚;；፣٫", " \u0326", "\u0326"]]
FORGING_NAMES += ["~Ann", "Ann ~~~", *(f"{tilde * 3} Bob left {tilde * 3}" for tilde in "~≈〜˜∼∽≋")]
FORGING_NAMES += [f"{mark} Ann" for mark in (tornchat.HOST_MARK, *"⭐🌟✪✯👑♔✔✅☑🛡")]
BAD_NAMES += FORGING_NAMES
GOOD_NAMES = (
    "Ann|Ann Lee|王小明|Ærøskøbing|Ольга|مريم|कुमार|क्\u200dष|می\u200cنا|İpek|0|42|__proto__|constructor|O'Brien"
    "|<b>Ann</b>|a&b|🦊|👩\u200d🚀|❤\ufe0f|guest|null|undefined|toString|hasOwnProperty|Ελένη|Νίκη|Արմեն|ქეთი|דוד"
    "|عَبْدُ الله|نظام|ابن‌سینا|हर्ष|श्री|শ্রীমতী|தமிழ்|అనిల్|അനില്\u200d|ශ්\u200dරී|สมชาย|ကျော်"
    "|ភក្ដី|བསྒྲུབས|ኃይሌ|김민준|さくら|サクラ|葛\U000e0100城|ıldız|IŞIL|Nguyễn Ánh|Łukasz|Đorđe|Ħal|Øyvind"
    "|Kahe\u02bbili|ʻOkina|Jean-Luc"
    "|J. R. R.|Ann (5b)|@ann|#1|?!1|👩🏽\u200d🚀|👨\u200d👩\u200d👧\u200d👦|🏳\ufe0f\u200d🌈|❤\ufe0f\u200d🔥|🇩🇪"
    "|1\ufe0f\u20e3|♡ Ann ♪|☕🆗|⬅ Bob ▶|Αθηνᾶ|ㄅㄆㄇ|Systematics|Hosta|Administrateurin"
)
CLEANED = [
    ("  Ann   Lee ", "Ann Lee"),
    ("Ａｎｎ", "Ann"),
    ("Ann\u00a0Lee", "Ann Lee"),
    ("e\u0301va", "éva"),
    ("\u3000王", "王"),
]
# What people are called, a language a line: none is refused, and no two are taken for one.
PEOPLE = {
    "Albanian": "Arbër Çelik|Besnik Hoxha|Drita Shehu|Ermal Meta|Gëzim Brahimi|Liridona Krasniqi|Xhevdet Ymeri",
    "Amharic": "አበበ ቢቂላ|ኃይሌ ገብረሥላሴ|ጥሩነሽ ዲባባ|መሠረት ደፋር|ሰለሞን|ሙሉወርቅ|ዘነበች",
    "Arabic": "محمد عبد الله|فاطمة الزهراء|أحمد شوقي|نجيب محفوظ|عائشة|إبراهيم|زياد الرحباني|ليلى مراد",
    "Armenian": "Արամ Խաչատրյան|Անահիտ|Հովհաննես|Գայանե|Տիգրան Պետրոսյան|Սիրանուշ|Վարդան",
    "Assamese": "ভূপেন হাজৰিকা|ৰাজেশ শৰ্মা|অনামিকা বৰুৱা|জুবিন গাৰ্গ",
    "Azerbaijani": "Əli Əliyev|Şəhla|Günay|Çingiz|Nigar Rəfibəyli|Mübariz|Zülfüqar",
    "Bengali": "রবীন্দ্রনাথ ঠাকুর|কাজী নজরুল|মোঃ রহিম|শ্রেয়া ঘোষাল|সত্যজিৎ রায়|ঋতুপর্ণ|দুঃখহরণ",
    "Bulgarian": "Георги Димитров|Христо Ботев|Цветана|Бойко|Снежана Макавеева|Любомир|Йорданка",
    "Burmese": "အောင်ဆန်းစုကြည်|ဦးသန့်|ကျော်စိုး|မြင့်မြင့်|ခင်ညွန့်|သန္တာ|ဇော်ဇော်",
    "Catalan": "Núria Espert|Jordi Solé|Marçal|Miquel Martí i Pol|Gal·la Placídia|Montserrat|Lluís Llach",
    "Chinese": "王小明|李娜|张伟|欧阳修|司马光|陈美玲|诸葛亮|丘成桐|阿迪力·买买提",
    "Croatian": "Luka Modrić|Željko|Vjekoslav|Ljerka Očić|Mirjana Šučić|Zdravko Čolić|Tomislav",
    "Czech": "Antonín Dvořák|Božena Němcová|Jiří Ďuriš|Zdeněk|Věra Čáslavská|Růžena|Miloš Forman",
    "Danish": "Søren Kierkegaard|Åse Høgh|Mette Frederiksen|Jørn Utzon|Kjærsgaard|Bjørg|Niels Bohr",
    "Dhivehi": "މުހައްމަދު|އައިޝަތު|އިބްރާހީމް|ފާތިމަތު",
    "Dutch": "Joost van den Vondel|Anouk Teeuwe|Daniëlle|Sjoerd|IJsbrand|Coöper|Geert-Jan 't Hart|Wubbo Ockels",
    "English": "Ann Rooney|Hugh O'Neill|Paige Turner|J. R. R. Tolkien|Zoë Kravitz|Siobhan|Mary-Jane|Will Hostetler|"
    "Ann Root|Bartholomew Badmington|Clara|Dara|Chloe Systrom",
    "Estonian": "Õnne Pärt|Jüri Ratas|Tõnu Kaljuste|Ülle|Kersti Kaljulaid|Märt|Lauri-Õie",
    "Finnish": "Väinö Linna|Tarja Halonen|Yrjö|Pirkko Mannola|Äijö|Kimi Räikkönen|Eero Saarinen",
    "French": "François Truffaut|Anaïs Nin|Hélène Cixous|Jean-Luc Godard|Noël Cœur|Théo|Maëlys|Benoît L’Hermite",
    "Georgian": "შოთა რუსთაველი|ქეთევან|ნინო ქათამაძე|გიორგი|თამარ მეფე|ზურაბ ჟვანია|ლაშა",
    "German": "Jürgen Groß|Käthe Kollwitz|Günter Strauß|Sören Weiß|Anke von Hößlin|Wolfgang Amadé|Heinz Rühmann",
    "Greek": "Νίκος Καζαντζάκης|Ελένη|Γιάννα|Μελίνα Μερκούρη|Οδυσσέας Ελύτης|Θεόδωρος|Ψαραντώνης|Ευαγγελία",
    "Gujarati": "મોહનદાસ ગાંધી|ધીરુભાઈ અંબાણી|હેમંત|કિંજલ દવે|વિક્રમ સારાભાઈ|જિજ્ઞેશ",
    "Hausa": "Ɓala Ƙwari|Ɗanjuma|Muhammadu Buhari|Hajiya Ƴar'adua|Rahama Sadau",
    "Hawaiian": "Kahe\u02bbili|Liliʻuokalani|Kamehameha|Keʻalohi|Mākaha",
    "Hebrew": "דוד בן־גוריון|גולדה מאיר|רחל|צ׳רלי ביטון|יהודה עמיחי|נועה|שִׁמְעוֹן",
    "Hindi": "नरेन्द्र मोदी|लता मंगेशकर|अमिताभ बच्चन|प्रेमचंद|ऐश्वर्या|सचिन तेंडुलकर|कृष्ण|श्रीदेवी|ओम पुरी",
    "Hungarian": "Bartók Béla|Kodály Zoltán|Őze Lajos|Széchenyi István|Gyöngyi|Szőke Tünde|Nagy Örs",
    "Icelandic": "Björk Guðmundsdóttir|Þór Ægisson|Eiður|Sigríður Þorláksdóttir|Ásgeir|Æsa|Vigdís",
    "Irish": "Aoife Ní Bhriain|Séamus Heaney|Tadhg Ó Súilleabháin|Gráinne|Caoimhín|Méabh|Pádraig",
    "Italian": "Nicolò Paganini|Chiara D'Angelo|Giuseppe Verdi|Ilaria|Mattia Dell’Orso|Rocco Carlucci",
    "Japanese": "夏目漱石|宮崎駿|佐々木|𠮷田|さくら|タロウ|大坂なおみ|桜井ユキ|〆木|三ツ矢|一ノ瀬|ヴィクトリア",
    "Kannada": "ಕುವೆಂಪು|ರಾಜ್ ಕುಮಾರ್|ಗಿರೀಶ್ ಕಾರ್ನಾಡ್|ಸುಧಾ ಮೂರ್ತಿ|ದೀಪಿಕಾ",
    "Kazakh": "Абай Құнанбайұлы|Нұрсұлтан|Әлия Молдағұлова|Дінмұхамед|Қаныш Сәтбаев|Гүлнәр|Шоқан",
    "Khmer": "ស៊ិន ស៊ីសាមុត|នរោត្តម សីហនុ|សុភ័ក្ត្រ|បុប្ផា|រស់ សេរីសុទ្ធា|វុទ្ធី",
    "Kurdish": "شێرکۆ بێکەس|ئەحمەد|ڕێبوار|ژیان|گۆران|Şivan Perwer|Rojîn|Nûdem",
    "Korean": "김민준|이서연|박지성|최유나|남궁민|한강|손흥민|방장현",
    "Kyrgyz": "Чыңгыз Айтматов|Үмүт|Гүлназ|Өмүрбек|Курманжан датка|Жээнбек",
    "Lao": "ສົມພອນ|ບຸນມາ|ວິໄລ|ແກ້ວ|ໄກສອນ ພົມວິຫານ|ສຸພານຸວົງ",
    "Latvian": "Rainis Pliekšāns|Vaira Vīķe-Freiberga|Ģirts|Ņikita|Ķēniņš|Žanis Lipke|Mārtiņš",
    "Lithuanian": "Dalia Grybauskaitė|Žemyna|Mikalojus Čiurlionis|Jūratė|Šarūnas|Ąžuolas|Eglė Tūbelytė",
    "Malayalam": "വൈക്കം ബഷീര്\u200d|അരുന്ധതി റോയ്|മോഹൻലാൽ|കെ. ജെ. യേശുദാസ്|ഒ. എൻ. വി.|ഐശ്വര്യ",
    "Marathi": "लक्ष्मण देशपांडे|ॲनी|ज्ञानेश्वर|तुळशीदास|बाळासाहेब",
    "Mongolian": "Чингис хаан|Батбаяр|Өнөржаргал|Сүхбаатар|Энхтуяа|Цэцэгмаа",
    "Nepali": "लक्ष्मीप्रसाद देवकोटा|पुष्पकमल दाहाल|डॉ॰ ऋचा|छिरिङ|झमक घिमिरे",
    "Norwegian": "Åge Aleksandersen|Bjørnstjerne|Øyvind|Liv Ullmann|Kjersti Horn|Håkon|Edvard Grieg",
    "Odia": "ନବୀନ ପଟ୍ଟନାୟକ|ସୁବ୍ରତ|ଫକୀର ମୋହନ|ପ୍ରତିଭା|ଗୋପବନ୍ଧୁ",
    "Pashto": "ملاله یوسفزۍ|خوشحال خټک|ګل بدین|پښتانه|غني خان|ځلمی",
    "Persian": "فروغ فرخزاد|علیرضا|ابن‌سینا|پروین اعتصامی|گلشیفته|شهرام ناظری|می‌نا",
    "Polish": "Łukasz Żak|Wisława Szymborska|Stanisław Lem|Małgorzata|Bożena Gęś|Źdźbło|Kazimierz|Święty",
    "Portuguese": "João Gilberto|Conceição Lima|Antônio Brandão|Sebastião|Fátima d’Ávila|Inês|Vinícius",
    "Punjabi": "ਗੁਰਪ੍ਰੀਤ ਸਿੰਘ|ਅੰਮ੍ਰਿਤਾ ਪ੍ਰੀਤਮ|ਹਰਜੀਤ|ਮਨਮੋਹਨ|ਦਿਲਜੀਤ ਦੋਸਾਂਝ|ਜੱਸੀ",
    "Romanian": "Ion Țiriac|Ștefan cel Mare|Nadia Comăneci|Mădălina|Gheorghiță|Cătălin Bălan|Ilinca Roșu",
    "Russian": "Ольга|Олег|Фёдор Достоевский|Анна-Мария|Пётр Ильич|Щукин|Наталья Объедкова|Юрий Гагарин|Лиза|Лиса",
    "Serbian": "Ђорђе Петровић|Новак Ђоковић|Љиљана|Његош|Ћосић|Јелена Карлеуша|Đorđe Stanković",
    "Sinhala": "මාර්ටින් වික්\u200dරමසිංහ|කුමාර සංගක්කාර|ශ්\u200dරී|නදීෂා|චන්ද්\u200dරිකා",
    "Slovak": "Ľudovít Štúr|Mária Ďurišová|Žofia Kráľ|Ján Kollár|Ľubica|Vŕba|Oľga Ťažká",
    "Spanish": "José Ñuñez|María Begoña|Jesús Ibáñez|Pilar Agüero|Íñigo Errejón|Concepción|Ángel Nieto",
    "Swedish": "Astrid Lindgren|Åke Öberg|Görel|Pär Lagerkvist|Sara Sjöström|Håkan Hellström|Märta",
    "Tajik": "Рӯдакӣ|Ҷомӣ|Шаҳноза|Ғафуров|Қурбон Саид|Садриддин Айнӣ|Зӯҳро",
    "Tamil": "இளையராஜா|அப்துல் கலாம்|ஃபாத்திமா|ஜெயலலிதா|சுப்பிரமணிய பாரதி|கண்ணதாசன்|ஸ்ரீதர்",
    "Telugu": "అనిల్ కుమార్|శ్రీశ్రీ|చిరంజీవి|సుబ్బలక్ష్మి|నాగార్జున|పి. వి. సింధు",
    "Thai": "สมชาย ใจดี|สมหญิง|ภูมิพล|ปรีดี พนมยงค์|ทักษิณ ชินวัตร|น้ำผึ้ง|แดง|เปิ้ล|ธีระ",
    "Tibetan": "བསྟན་འཛིན་རྒྱ་མཚོ|ཚེ་རིང|པདྨ|བསྒྲུབས|སྒྲོལ་མ|དོན་གྲུབ",
    "Turkish": "Işıl Öztürk|İpek Çağlar|Orhan Pamuk|Şükrü Saraçoğlu|Ayşegül|Barış Manço|Yıldız",
    "Ukrainian": "Тарас Шевченко|Леся Українка|Мар'яна|Ґалаґан|Їжакевич|Володимир Зеленський|Оксана Є.",
    "Urdu": "فیض احمد فیض|نصرت فتح علی|بینظیر بھٹو|ثریا|علّامہ اقبال|ڈاکٹر رُتھ|نورجہاں",
    "Uyghur": "ئىلھام توختى|رابىيە قادىر|ئەلىشىر|گۈلنار|ئابدۇرېھىم ئۆتكۈر",
    "Uzbek": "Abdulla Qodiriy|O‘g‘iloy|Shavkat Mirziyoyev|Gʻafur|Dilshodbek|Server Djeparov",
    "Vietnamese": "Nguyễn Ánh|Hồ Xuân Hương|Trần Đại Nghĩa|Lê Thị Hằng|Phạm Tuyên|Đặng Thùy Trâm|Võ Nguyên Giáp",
    "Welsh": "Siân Phillips|Llŷr Gwyn|Rhŷs Ifans|Bryn Terfel|Angharad|Gwenllian|Ŵyn",
    "Yiddish": "שלום עליכם|איציק מאַנגער|רבֿקה|װעלװל|חנה'לע",
    "Yoruba": "Wọlé Ṣóyínká|Ọláńrewájú|Fẹlá Kútì|Adékúnlé|Yéwándé Ọmọ́tọ́ṣọ̀|Ṣadé",
    "Ewe": "Kɔfi Ɖogbe|Yawo Ŋutsu|Afi Ƒoli|Ɣevi|Efua Dɛla",
}
# Of each pair the second looks like the first: by its case, its width, letters of another script, digits, marks, signs.
TWINS = (
    "Ann/ANN|Ann/Ａｎｎ|Ann/𝐀𝐧𝐧|Ann Lee/AnnLee|Paco/Расо|Tom/Τοm|cope/соре|lol/1o1|Bob/B0b|Irina/ırına|Al/AI"
    "|Tom/Torn|Tom/Tor n|Will/VVill|❤/❤\ufe0f|éva/e\u0301va|Ann/ᴀɴɴ|Hans/Ηans|ANNA/ΑΝΝΑ|HYMNZ/ΗΥΜΝΖ|Νίκος/νίκος"
    "|BOBA HEP/ВОВА НЕР|Yuri Ghost/Υurі Ԍһоѕt|paypal/раураӏ|hugo/հսցօ|ANDREW/ᎪNᎠᎡᎬᎳ|LISA/ꓡꓲꓢꓮ|Mom/ⲙⲟⲙ|AB/ᗅᗷ"
    "|Ann/𝒜𝓃𝓃|fifi/ﬁﬁ|XIV/ⅩⅣ|Ann/ⓐⓝⓝ|Ann/🅐🅝🅝|DE/🇩🇪|İpek/ipek|علی۱/علی١|علي كريم/علی کریم|Bob TZ/8o8 72|Ann/@nn"
    "|力口/カロ|O'Brien/O’Brien|Jean-Luc/Jean\u2010Luc|Jean-Luc/Jean–Luc|Jean—Luc/Jean一Luc|玛丽·居里/玛丽・居里"
    "|Ăna/Ǎna|Ştefan/Ștefan|Ann/An\ufe00n|葛城/葛\U000e0100城|❤/❤\ufe0e|क्ष/क्\u200dष|שמעון/שִׁמְעוֹן|Noa/Νοα"
)
ONE_TO_THE_EYE = (  # each pair was two names
    "Павел/Πавел Đuro/Ðuro Þór/Ϸór Æsa/Ӕsa Əli/Әli François/Franҫois Jan-Erik/Jan⁃Erik Tom!/Tomǃ 小马/小⻢ 李民/李⺠"
    " محمد/محـمد แดง/เเดง Boo/Bꝏ Bob/B٥b Şəhla/Şәhla Tom/Tοm"
)
DISTINCT = (
    "Ann/Anna user1/user2 user1/user10 王小明/王小红 Éva/Eva Ольга/Олег a/b Øle/Ole Łukasz/Lukasz Đan/Dan"
    " Лиза/Лиса Вера/Вёра Νίκος/Γιώργος מרים/מירי علي/عمر राम/रामा 김민준/김민지 さくら/さくな สมชาย/สมหญิง 🦊/🐺 "
    "👩🏽/👩🏿 🇩🇪/🇫🇷 Ann/Ann- user6/user8 user0/user9"
)


def said(text: object, **more: object) -> str:
    return json.dumps({"type": "say", "text": text} | more)


# No JSON, no object, another type, no text, and what no text, name or cid can be: the last cid is as the daemon's are.
BAD_FRAMES: list[str | bytes] = ["hello", "", "null", "[" * 8000, said("hi").encode(), said("\ud800"), said(7)]
BAD_FRAMES += ['{"text": "hi"}', '{"type": ["say"], "text": "hi"}', '{"type": "say", "cid": "c1"}']
BAD_FRAMES += ['{"type": "say", "text": NaN}', '{"type": "say", "text": ' + "9" * 5000 + "}"]
BAD_FRAMES += ['{"type": "say", "cid":' + '{"a":' * 1500 + "1" + "}" * 1501]
BAD_FRAMES += ['{"type": "mute", "name": "\\ud800", "seconds": 9}']
BAD_FRAMES += [said("hi", cid=cid) for cid in ("a b", "", "c" * 65, 7, None, "c\n", "\u0661", "~1")]
OURS = ("message", "joined", "left", "opened", "welcome", "store", "time", "refused", "Say")  # or nobody's
BAD_FRAMES += [said("hi", type=kind, names=["Bob"]) for kind in OURS]
EMPTY_FRAMES = [said(""), said(" \n\t\u3000 "), said("\u200b\u2800\u3164\0")]
WRONG_FRAMES = [*((frame, "bad-frame") for frame in BAD_FRAMES), *((frame, "empty") for frame in EMPTY_FRAMES)]
WRONG_FRAMES += [(said("x" * 4001), "too-long")]
any_json = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["type", "text", "cid", "x"]), inner),
    max_leaves=8,
)
any_frame = (
    st.text()
    | st.binary()
    | any_json.map(json.dumps)
    | st.builds(lambda text, cid: json.dumps({"type": "say", "text": text, "cid": cid}), any_json, any_json)
)


# What a mark is tried on: a letter of each script, or nothing.
BASES = ["", *"aαяաאبހकকਕકକகతಕകකกກཀကክកか"]
# Where the table still has pairs of two: Malayalam vowels, and two of Armenian that look like Ethiopic.
SCRIPTS_LEFT = {"MALAYALAM", "ARMENIAN", "ETHIOPIC"}


def key_of_name(raw: str) -> str | None:
    with contextlib.suppress(tornchat.Refused):
        return tornchat.name_key(tornchat.clean_name(raw))
    return None


def confusable_characters() -> list[set[str]]:
    """Sets of single characters that UTS 39 has for one."""
    sets: dict[str, set[str]] = {}
    for char, twins in confusables_data.items():
        alike = {one.replace("\u200e", "") for one in (char, *(twin["c"] for twin in twins))}
        alike = alike.union(*(sets.get(one, ()) for one in alike))
        sets |= dict.fromkeys(alike, alike)
    return [{char for char in alike if len(char) == 1} for alike in {id(each): each for each in sets.values()}.values()]


def keys_beside(base: str, chars: set[str]) -> Iterable[tuple[tuple[str, str], tuple[str, str]]]:
    """All pairs of those characters that a name shows as they are (marks on that base), each with its name's key."""
    chars = {char for char in chars if unicodedata.category(char)[0] == "M"} if base else chars
    keys = {char: key_of_name(base + char) for char in sorted(chars) if shown_as_it_is(base + char)}
    return itertools.combinations(((char, key) for char, key in keys.items() if key), 2)


def shown_as_it_is(name: str) -> bool:
    return unicodedata.normalize("NFKD", name) == unicodedata.normalize("NFD", name)


def refusal(wish: Callable[[], object]) -> str:
    """The code with which a wish is refused."""
    with pytest.raises(tornchat.Refused) as refused:
        wish()
    for language in tornchat.WORDS:
        sentence = refused.value.sentence(language)
        assert sentence
        assert "{" not in sentence
    return refused.value.code


class TestMessagesAndNames:
    def test_bad_names(self) -> None:
        """A name that could deceive, cannot be shown or is the room's own is refused, in words in every language."""
        for name in BAD_NAMES:
            assert refusal(functools.partial(tornchat.clean_name, name)) == "invalid", ascii(name)

    def test_good_names(self) -> None:
        """Names in any script, with the joiners that it needs, stay; spaces are folded, letters composed."""
        for name in [*GOOD_NAMES.split("|"), "x" * 24]:
            assert tornchat.clean_name(name) == name
        for raw, name in CLEANED:
            assert tornchat.clean_name(raw) == name

    def test_G7_twins(self) -> None:
        """Of two names that look alike the second is none at all, or has the key of the first; a key is its own key."""
        for pair in [*TWINS.split("|"), *ONE_TO_THE_EYE.split()]:
            name, twin = pair.split("/")
            assert key_of_name(name), pair
            assert key_of_name(twin) in (key_of_name(name), None), pair
            for key in map(tornchat.name_key, (name, twin)):
                assert tornchat.name_key(key) == key
        for pair in DISTINCT.split():
            assert len(set(map(tornchat.name_key, pair.split("/")))) == 2, pair

    def test_people(self) -> None:
        """People of all languages get in under their names, and no two of them are taken for one."""
        people = [name for names in PEOPLE.values() for name in names.split("|")]
        assert (len(PEOPLE) > 60, len(people) > 400) == (True, True)
        assert [name for name in people if key_of_name(name) is None] == []
        keys = collections.Counter(map(tornchat.name_key, people))
        assert [name for name in people if keys[tornchat.name_key(name)] > 1] == []

    def test_G7_confusables(self) -> None:
        """Characters that the table of Unicode Technical Standard 39 has for one don't make two names."""
        pairs = [pair for twins in confusable_characters() for base in BASES for pair in keys_beside(base, twins)]
        apart = [(one, other) for (one, key), (other, other_key) in pairs if key != other_key]
        print(f"{len(apart)} of {len(pairs)} confusable pairs make two names:", *map("/".join, apart))
        assert len(pairs) > 100
        scripts = {unicodedata.name(char).split()[0] for pair in apart for char in pair}
        assert scripts <= SCRIPTS_LEFT

    def test_G5_a_long_name_is_cut(self) -> None:
        """A nickname of any length is looked at as far as a name could reach: marks take the square of their number."""
        name = "a" + "\u0316\u0301" * 100_000
        assert refusal(lambda: tornchat.clean_name(name)) == "invalid"
        assert tornchat.name_key(name) == tornchat.name_key(name[:500])

    def test_guest_name(self) -> None:
        """A guest is called after the end of the address; the zone of one may hold anything."""
        ends = {"192.168.1.7": "7", "fe80::1:2ab": "2ab", "fe80::1%e\u200bth.0\u202e": "1", "": ""}
        for address, end in ends.items():
            assert tornchat.guest_name(address) == f"guest-{end}"

    @hypothesis.given(st.text(max_size=70))
    def test_any_name(self, raw: str) -> None:
        """Whatever comes in: refused, or a short name without control characters that cleaning leaves alone."""
        try:
            name = tornchat.clean_name(raw)
        except tornchat.Refused:
            assert refusal(lambda: tornchat.clean_name(raw)) == "invalid"
            return
        assert tornchat.clean_name(name) == name == " ".join(name.split())
        assert 1 <= len(name) <= 64
        unfit = r"[\x00-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2060-\u206f\ud800-\udfff\ue000-\uf8ff]"
        assert not re.search(unfit, name)
        assert tornchat.name_key(name)

    @hypothesis.given(st.text("aAnNmMrvVwW01lIiİıοоО éеÉ\u0301２", min_size=1, max_size=12), st.data())
    def test_G7_keys(self, name: str, data: st.DataObject) -> None:
        """Neither case nor width nor spaces make another key, and a key is its own key."""
        key = tornchat.name_key(name)
        assert tornchat.name_key(key) == key
        at = data.draw(st.integers(0, len(name)))
        assert tornchat.name_key(name.replace(" ", "")) == key
        assert tornchat.name_key(name[:at].swapcase() + name[at:]) == key

    @pytest.mark.parametrize("name", ["Ann", "x" * 24, "王小明", "👩\u200d🚀" * 8])
    def test_variants(self, name: str) -> None:
        offered = [name, *itertools.islice(tornchat.variants(tornchat.clean_name(name)), 30)]
        assert len({tornchat.name_key(tornchat.clean_name(variant)) for variant in offered}) > 25

    @hypothesis.given(any_frame)
    def test_any_frame(self, frame: str | bytes) -> None:
        """Whatever comes in: refused, or a text that can be sent to everybody."""
        try:
            wish = tornchat.parse_frame(frame)
        except tornchat.Refused:
            return
        if wish.type != "message":
            return
        text, cid = wish.text, wish.cid
        assert 1 <= len(text.encode()) <= 4 * 4000
        assert tornchat.clean_text(text) == text
        assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", text)
        assert cid == "" or re.fullmatch(r"[A-Za-z0-9_-]{1,64}", cid)

    def test_text(self) -> None:
        """A text keeps its lines and its signs, an emoji newer than this Python too, and loses control characters."""
        for text in ("hi", "a\tb", "x" * 4000, "\U0001fae9", "👩\u200d🚀", "\u202eabc", "?"):
            assert tornchat.clean_text(text) == text
        changed = {"a\r\nb\rc": "a\nb\nc", "\n\n  indented\n\n": "  indented", "a\x00\x1b[31mb": "a[31mb"}
        for raw, text in changed.items():
            assert tornchat.clean_text(raw) == text

    @pytest.mark.parametrize("size", [0, 1, 125, 126, 65535, 65536])
    def test_websocket_frame(self, size: int) -> None:
        """A frame has the length that RFC 6455 gives it."""
        frame = tornchat.ws_frame(b"x" * size)
        head = 2 if size < 126 else 4 if size < 65536 else 10
        assert (frame[0], len(frame) - head) == (0x81, size)
        assert int.from_bytes(frame[2:head] or frame[1:2], "big") == size

    @pytest.mark.parametrize(
        ("event", "line"),
        [
            ({"type": "message", "name": "Ann", "text": "hi"}, "Ann: hi"),
            ({"type": "message", "name": "Ann", "text": "one\n~~~ Bob joined ~~~"}, "Ann: one\n    ~~~ Bob joined ~~~"),
            ({"type": "message", "name": "Ann", "text": "\u202eabc\u2066"}, "Ann: abc"),
            ({"type": "joined", "names": ["Ann", "Bob"]}, "~~~ Ann, Bob joined ~~~"),
            ({"type": "left", "names": ["Ann"]}, "~~~ Ann left ~~~"),
            ({"type": "refused", "text": "Too fast."}, "~~~ Too fast. ~~~"),
            ({"type": "store", "available": False}, "~~~ the message store is away ~~~"),
            ({"type": "store", "available": True}, "~~~ the message store is back ~~~"),
            ({"type": "time", "ts": 7}, ""),
        ],
    )
    def test_line(self, event: Frame, line: str) -> None:
        """For readers of plain lines an event is a line, and only the room's own begin with a tilde."""
        encoded = tornchat.encode(event)
        assert encoded.line == (tornchat.ws_frame(line.encode()) if line else b"")
        assert decoded(encoded) == event


# === Store and feed ===================================================================================================


def decoded(event: tornchat.Encoded) -> Frame:
    frame: Frame = json.loads(event.frame[{126: 4, 127: 10}.get(event.frame[1], 2) :])
    return frame


class Recorder:
    """A listener without a socket: what it was told, as frames."""

    def __init__(self, member: tornchat.Member) -> None:
        self.member, self.base = member, 0
        self.frames: list[Frame] = []
        self.closed: list[int] = []

    def send(self, batch: tornchat.Batch) -> None:
        assert bytes(batch.frames) == b"".join(event.frame for event in batch.events)
        self.replay(batch.events)

    def replay(self, events: Sequence[tornchat.Encoded]) -> None:
        self.frames += map(decoded, events)

    def heartbeat(self, now: float, time: tornchat.Encoded) -> None:
        pass

    def refuse(self, refused: tornchat.Refused) -> None:
        self.frames.append({"type": "refused", "code": refused.code})

    def turn_away(self, refused: tornchat.Refused) -> None:
        self.refuse(refused)
        self.closed.append(tornchat.CLOSE_CODES[refused.code])

    def shut(self, code: int, reason: str) -> None:
        self.closed.append(code)

    def of(self, kind: str) -> list[Frame]:
        return [frame for frame in self.frames if frame["type"] == kind]

    @property
    def seqs(self) -> list[int]:
        return [frame["seq"] for frame in self.of("message")]


def member(name: str) -> tornchat.Member:
    return tornchat.Member(f"sid-{name}", name, tornchat.name_key(name))


class Feeds:
    """Some feeds, each with a room, as many daemons have them: over one store, and with hands on what is in it."""

    def __init__(self, store: Store) -> None:
        self.place = store
        self.memory = fakeredis.FakeServer()
        self.feeds: list[tornchat.Feed] = []
        self.presences: list[tornchat.Presence] = []
        self.key = store.key("feed").decode()
        self.redis = self.connect()()
        self.repair_seconds = 0.05  # more where a test has the store forget: a few looks of the daemons

    def connect(self) -> Callable[..., Any]:
        if self.place.url:
            return tornchat.connect(tornchat.Config(redis_url=self.place.url, room=self.place.room))
        return functools.partial(fakeredis.FakeAsyncRedis, server=self.memory, protocol=2)

    async def start(self, kind: type[tornchat.Store] = tornchat.Store, **options: Any) -> tornchat.Feed:
        """One more daemon's feed, at work."""
        quick: dict[str, Any] = {"rate": 0.0, "tick_seconds": 0.05, "retry_seconds": 0.1, "room": self.place.room}
        quick |= {"repair_seconds": self.repair_seconds, "name_seconds": 0.0}
        feed = await open_feed(kind, self.connect(), tornchat.Config(**quick | options))
        presence = tornchat.Presence(feed, tornchat.Admission(feed, tornchat.Limits(0)).keep_few)
        presence.start()
        self.feeds.append(feed)
        self.presences.append(presence)
        return feed

    async def enter(self, feed: tornchat.Feed, name: str) -> Recorder:
        """A member of this feed's room, with a listener."""
        recorder = Recorder(await feed.outbox.enter(f"sid-{name}", name))
        feed.room.join(recorder)
        return recorder

    async def settled(self, count: int) -> None:
        """Until every room is at message `count`."""
        await until(lambda: all(feed.room.seq == count for feed in self.feeds))

    async def close(self) -> None:
        for feed, presence in zip(self.feeds, self.presences, strict=True):
            assert not [task for task in feed.tasks + presence.tasks if task.done() and not task.cancelled()]
            await asyncio.wait_for(presence.stop(), RETURN)
            await asyncio.wait_for(feed.stop(), RETURN)
            await feed.store.close()
        await self.flush()
        await self.redis.aclose()

    async def roll_back(self, count: int) -> None:
        entries = await self.redis.xrange(self.key)
        async with self.redis.pipeline() as pipe:
            pipe.delete(self.key)
            for id, fields in entries[:-count]:
                pipe.xadd(self.key, fields, id=id)
            await pipe.execute()

    async def flush(self) -> None:
        await self.redis.delete(*map(self.place.key, ("feed", "wishes", "names", "leases", "state", "secret")))


async def open_feed(kind: type[tornchat.Store], connect: Callable[..., Any], config: tornchat.Config) -> tornchat.Feed:
    """A daemon's feed at work, over a store that others may use as well."""
    store = kind(connect, config)
    store.shared = True
    feed = tornchat.Feed(store, tornchat.Outbox(tornchat.Room(config), config))
    await feed.open()
    feed.start()
    return feed


@pytest.fixture
def feeds(store: Store) -> Feeds:
    return Feeds(store)


@pytest.fixture
def redis_feeds(redis_server: RedisServer) -> Feeds:
    return Feeds(Store(redis_server.url))


def say(feed: tornchat.Feed, who: Recorder, text: str, cid: str = "") -> list[object]:
    """Say something at this feed; the list fills with what is heard of it."""
    outcomes: list[object] = []
    feed.outbox.act(who.member, tornchat.Event("message", 0, 0, cid=cid, text=text), outcomes.append)
    return outcomes


class TestFeed(Transcripts):
    async def test_poisoned_entries(self, feeds: Feeds) -> None:
        """Entries that no tornchat wrote are passed over, by who reads along and by who starts later."""
        feed = await feeds.start()
        ann = await feeds.enter(feed, "Ann")
        said = b'[{"type":"message","seq":2,"ts":0,"sid":"s","cid":"c","name":"Eve","text":%b}]'
        events = (b"\xff", b"17", b'[{"type":"message","seq":"two"}]', said % b"7", said % b'"\\ud800"')
        poisons = [{b"x": b"y"}, {b"text": b"x" * 1_000_000}, *({b"events": each} for each in events)]
        for count, poison in enumerate(poisons, 1):
            say(feed, ann, "hi")
            await feeds.settled(count)
            await feeds.redis.xadd(feeds.key, poison)
        later = await feeds.start()
        bob = await feeds.enter(later, "Bob")
        say(later, bob, "hi Ann")
        await feeds.settled(len(poisons) + 1)
        assert ann.seqs == bob.seqs == [*range(1, len(poisons) + 2)]
        assert not [frame for frame in ann.of("welcome") if frame["reset"]]

    async def test_G2_who_has_seen_most_puts_back_most(self, feeds: Feeds) -> None:
        """Of two daemons one has seen less when the store forgets: what the other one has seen is there again."""
        feeds.repair_seconds = 0.5
        first, second = await feeds.start(), await feeds.start()
        ann, bob = await feeds.enter(first, "Ann"), await feeds.enter(second, "Bob")
        say(first, ann, "all have seen this")
        await feeds.settled(1)
        await tornchat.end_tasks(second.tasks)  # it hears nothing for a while
        for text in ("only one daemon", "has seen this"):
            say(first, ann, text)
        await until(lambda: first.room.seq == 3)
        await tornchat.end_tasks(first.tasks)
        await feeds.flush()
        second.start()
        say(second, bob, "last")
        await until(lambda: feeds.redis.xlen(feeds.key))
        first.start()
        await feeds.settled(4)
        assert ann.of("message") == bob.of("message")
        assert [frame["text"] for frame in bob.of("message")][1:] == ["only one daemon", "has seen this", "last"]

    async def test_G2_another_history(self, feeds: Feeds) -> None:
        """Entries of the same numbers that are others: the store's word counts, and everybody is told `reset`."""
        feeds.repair_seconds = 0.2
        feed = await feeds.start()
        ann = await feeds.enter(feed, "Ann")
        for n in range(1, 4):
            say(feed, ann, f"{n}")
            await feeds.settled(n)
        *kept, (third, fields) = await feeds.redis.xrange(feeds.key)
        other = {b"events": fields[b"events"].replace(b'"3"', b'"another"')}
        async with feeds.redis.pipeline() as pipe:
            pipe.delete(feeds.key)
            for id, fields in [*kept, (third, other)]:
                pipe.xadd(feeds.key, fields, id=id)
            await pipe.execute()
        await until(lambda: ann.of("welcome")[-1]["reset"] is True)
        assert [frame["text"] for frame in ann.of("message")][3:] == ["1", "2", "another"]
        say(feed, ann, "on")
        await feeds.settled(4)

    async def test_G2_forgotten_by_all(self, feeds: Feeds) -> None:
        """The tail of the feed and all daemons are gone. A client that knows it comes back: `at` tells `reset`."""
        feeds.repair_seconds = 0.2
        feed = await feeds.start()
        ann = await feeds.enter(feed, "Ann")
        for n in range(1, 4):
            say(feed, ann, f"{n}")
            await feeds.settled(n)
        seen = ann.of("message")[-1]
        await tornchat.end_tasks(feed.tasks)
        await feeds.roll_back(1)
        later = await feeds.start()
        for point in (tornchat.ResumePoint(3, feed.room.epoch, seen["ts"]), tornchat.ResumePoint(3, feed.room.epoch)):
            await later.catch_up(point)  # which is ahead of all that is known
            assert later.room.owed(point)[1]["reset"]
        carl = await feeds.enter(later, "Carl")
        for text in ("another 3", "4"):
            say(later, carl, text)
        await until(lambda: later.room.seq == 4)
        bob = Recorder(member("Bob"))
        later.room.join(bob, tornchat.ResumePoint(3, feed.room.epoch, seen["ts"]))
        assert (bob.of("welcome")[0]["reset"], bob.seqs) == (True, [1, 2, 3, 4])
        known = tornchat.ResumePoint(2, feed.room.epoch, ann.of("message")[1]["ts"])
        messages, gap = later.room.owed(known)
        assert (gap["recovered"], len(messages)) == (True, 2)

    async def test_G2_ahead_of_a_daemon(self, feeds: Feeds, monkeypatch: pytest.MonkeyPatch) -> None:
        """A client ahead of a daemon that can't read now is told to come again, not that the history is lost."""
        first, second = await feeds.start(), await feeds.start(store_seconds=0.3)
        ann = await feeds.enter(first, "Ann")
        await tornchat.end_tasks(second.tasks)
        say(first, ann, "hi")
        await until(lambda: first.room.seq == 1)
        point = tornchat.ResumePoint(1, first.room.epoch, first.room.ts)
        with pytest.raises(tornchat.Refused) as refused:
            await second.catch_up(point)
        assert refused.value.code == "unavailable"
        second.start()
        await second.catch_up(point)
        assert second.room.owed(point)[1]["recovered"]

    async def test_a_daemon_starts_on_what_was_flushed(self, feeds: Feeds) -> None:
        """A store is flushed while a daemon starts: it waits for the others, and all sign with the one secret."""
        feeds.repair_seconds = 0.2
        first = await feeds.start()
        ann = await feeds.enter(first, "Ann")
        say(first, ann, "before")
        await feeds.settled(1)
        await feeds.flush()
        second = await feeds.start()
        say(first, ann, "after", "c1")
        await feeds.settled(2)
        assert second.store.secret == first.store.secret
        assert [frame["text"] for frame in ann.of("message")] == ["before", "after"]
        assert (ann.closed, len(ann.of("welcome"))) == ([], 1)
        assert [*second.room.roster] == [tornchat.name_key("Ann")]

    async def test_a_wish(self, feeds: Feeds, monkeypatch: pytest.MonkeyPatch) -> None:
        """A daemon that loses every race, and a wish on its way, gets all into the feed by the others' hands, once."""
        near, far = await feeds.start(), await feeds.start()

        async def lose(*args: object) -> bool:
            return False

        async def lost_once(raw: bytes, wish: Callable[[bytes], Awaitable[None]] = far.store.wish) -> None:
            monkeypatch.setattr(far.store, "wish", wish)
            raise redis.ConnectionError("cut")

        monkeypatch.setattr(far.store, "append", lose)
        if feeds.place.lasts:
            monkeypatch.setattr(far.store, "wish", lost_once)
        ann, bob = await feeds.enter(near, "Ann"), await feeds.enter(far, "Bob")
        said = [say(far, bob, f"{n}", f"c{n}") for n in range(10)]
        for n in range(10):
            say(near, ann, f"{n}")
        await feeds.settled(20)
        assert all(isinstance(outcome, tornchat.Event) for (outcome,) in said)
        assert ann.of("message") == bob.of("message")
        assert sorted(frame["text"] for frame in ann.of("message") if frame["name"] == "Bob") == [*map(str, range(10))]
        assert not near.outbox.waiting
        assert not far.outbox.waiting

    async def test_a_long_history_is_read_in_pages(self, feeds: Feeds, monkeypatch: pytest.MonkeyPatch) -> None:
        """A large feed is read newest first, in pages that each come in time, smaller ones where the line is slow."""
        monkeypatch.setattr(tornchat, "GROUP_EVENTS", 1)
        feed = await feeds.start()
        ann = await feeds.enter(feed, "Ann")
        for n in range(300):
            say(feed, ann, f"{n}" + "x" * 1000)
        await feeds.settled(300)
        counts: list[int] = []

        class Slow(tornchat.Store):
            async def page(self, at: str, until: str, count: int) -> list[tornchat.Entry]:
                counts.append(count)
                if count > 20:
                    raise TimeoutError
                return await super().page(at, until, count)

        later = await feeds.start(Slow)
        assert later.room.seq == 300
        assert (max(counts) > 20, len(counts) > 300 / 20) == (True, True)
        bob = await feeds.enter(later, "Bob")
        assert bob.seqs == [*range(201, 301)]

    async def test_G8_the_feed_is_something_else(self, redis_feeds: Feeds) -> None:
        """A feed that is no stream makes the store unavailable; when it is gone the room goes on, after a reset."""
        feeds = redis_feeds
        feeds.repair_seconds = 0.2
        feed = await feeds.start(confirm_seconds=0.2)
        ann = await feeds.enter(feed, "Ann")
        await feeds.redis.set(feeds.key, "nonsense")
        outcomes = say(feed, ann, "hi", "c1")
        await until(lambda: outcomes)
        (outcome,) = outcomes
        assert isinstance(outcome, tornchat.Refused)
        assert (outcome.code, outcome.cid) == ("unavailable", "c1")
        assert ann.of("store") == [{"type": "store", "available": False}]
        await feeds.redis.delete(feeds.key)
        await until(lambda: {"type": "store", "available": True} in ann.frames)
        say(feed, ann, "hi", "c1")
        await feeds.settled(1)

    async def test_bounds(self, feeds: Feeds, monkeypatch: pytest.MonkeyPatch) -> None:
        """Neither the feed nor what a daemon remembers of it grows without end; notices never push a message out."""
        for name, value in {"FEED_MESSAGES": 200, "FEED_NOTICES": 20, "INDEX_EVENTS": 100, "GROUP_EVENTS": 1}.items():
            monkeypatch.setattr(tornchat, name, value)
        feed = await feeds.start()
        ann = await feeds.enter(feed, "Ann")
        for n in range(500):
            say(feed, ann, f"{n}")
        await feeds.settled(500)
        for n in range(60):
            bob = await feeds.enter(feed, f"B{n}")
            feed.room.leave(bob)
            await feed.outbox.exit(bob.member.sid, bob.member.name)
        say(feed, ann, "on")
        await feeds.settled(501)
        assert await feeds.redis.xlen(feeds.key) < 210 + 21 + 100  # Redis trims by whole nodes of 100 entries
        assert len(feed.outbox.stored) == 100
        assert 200 <= feed.memory.said - feed.memory.extent[0].said <= 210
        assert 20 <= len(feed.memory.notices) <= 21
        for _ in range(200):  # of which each is off and on again, and nobody talks
            await feed.outbox.exit("sid-Eve", "Eve")
            await feed.outbox.enter("sid-Eve", "Eve")
        assert len(feed.memory.extent) <= 211
        assert len(feed.memory.kept) <= 501 + 21 + 100
        carl = await feeds.enter(await feeds.start(), "Carl")
        assert carl.seqs == list(range(402, 502))

    async def test_bytes_are_bounded(self, feeds: Feeds, monkeypatch: pytest.MonkeyPatch) -> None:
        """Long messages push out old ones in the feed, and in what is kept to repair it."""
        monkeypatch.setattr(tornchat, "FEED_BYTES", 600_000)
        monkeypatch.setattr(tornchat, "RING_BYTES", 50_000)
        monkeypatch.setattr(tornchat, "GROUP_EVENTS", 1)
        feed = await feeds.start()
        ann = await feeds.enter(feed, "Ann")
        for n in range(400):
            say(feed, ann, f"{n}" + "x" * 3000)
        await feeds.settled(400)
        assert feed.memory.size - feed.memory.kept[0].size <= 50_000
        assert await feeds.redis.xlen(feeds.key) < 220 + 100
        bob = await feeds.enter(await feeds.start(), "Bob")
        assert bob.seqs == list(range(301, 401))

    async def test_full_outbox(self, feeds: Feeds, monkeypatch: pytest.MonkeyPatch) -> None:
        """What comes while too much waits for the store is refused at once."""
        monkeypatch.setattr(tornchat, "OUTBOX_PROPOSALS", 10)
        feed = await feeds.start()
        ann = await feeds.enter(feed, "Ann")
        for n in range(10):
            say(feed, ann, f"{n}")
        assert refusal(lambda: say(feed, ann, "more", "c1")) == "unavailable"
        await feeds.settled(10)
        say(feed, ann, "more", "c1")
        await feeds.settled(11)

    async def test_G7_name_lost(self, feeds: Feeds) -> None:
        """Somebody whose name another has in a new history is told name-lost, and closed with 4409."""
        feeds.repair_seconds = 0.2
        feed = await feeds.start()
        ann, bob = await feeds.enter(feed, "Ann"), await feeds.enter(feed, "Bob")
        began = feed.memory.last[0] + 1
        thief = tornchat.Event("joined", 0, began, "sid-thief", "~1", "Ann")
        async with feeds.redis.pipeline() as pipe:
            pipe.hset(feeds.place.key("state"), "epoch", began).delete(feeds.key, feeds.place.key("names"))
            pipe.xadd(feeds.key, {"events": tornchat.encode_events([thief])}, id=f"{began}-1")
            await pipe.execute()
        await until(lambda: ann.closed and tornchat.name_key("Bob") in feed.room.roster)
        assert ann.of("refused")[0]["code"] == "name-lost"
        assert (set(ann.closed), bob.closed) == ({4409}, [])
        say(feed, bob, "hi")
        await feeds.settled(1)

    async def test_the_store_fails_while_it_is_read_anew(self, feeds: Feeds, monkeypatch: pytest.MonkeyPatch) -> None:
        """A store that goes away while a replaced history is read anew is read again when it is back."""
        feeds.repair_seconds = 0.2
        feed = await feeds.start()
        ann = await feeds.enter(feed, "Ann")
        read_state, failures = feed.store.read_state, iter([redis.ConnectionError("away"), OSError("away")])

        async def failing() -> tuple[dict[str, str], dict[str, str]]:
            for failure in failures:
                raise failure
            return await read_state()

        monkeypatch.setattr(feed.store, "read_state", failing)
        async with feeds.redis.pipeline() as pipe:
            pipe.delete(feeds.key).hset(feeds.place.key("state"), "epoch", "another")
            pipe.xadd(feeds.key, {"events": "[]"}, id=f"{feed.memory.last[0] + 1}-1")
            await pipe.execute()
        await until(lambda: ann.of("welcome")[-1]["reset"] is True)
        say(feed, ann, "on")
        await feeds.settled(1)

    async def test_one_return_at_a_time(self, feeds: Feeds) -> None:
        """Who is on the way back to the list does not set out a second time."""
        feed = await feeds.start()
        ann, bob = await feeds.enter(feed, "Ann"), await feeds.enter(feed, "Bob")
        await feed.outbox.exit(bob.member.sid, bob.member.name)
        for _ in range(3):
            feeds.presences[0].rejoin_missing()
        assert len(feed.outbox.waiting) == 1
        say(feed, ann, "on")
        await feeds.settled(1)
        assert [frame["names"] for frame in ann.of("joined")] == [["Bob"], ["Bob"]]

    async def test_G6_a_lease_is_lost(self, feeds: Feeds) -> None:
        """Somebody whose lease another daemon finds lapsed, but who is here, is back on the list at once."""
        feed, _ = await feeds.start(), await feeds.start()
        ann, bob = await feeds.enter(feed, "Ann"), await feeds.enter(feed, "Bob")

        async def lapsed() -> bool:
            await feeds.redis.zadd(feeds.place.key("leases"), {tornchat.name_key("Ann"): 1}, xx=True)  # until it holds
            return bool(bob.of("left"))

        await until(lapsed)
        await until(lambda: bob.of("joined"))
        assert bob.of("left")[0]["names"] == bob.of("joined")[0]["names"] == ["Ann"]
        assert ann.closed == []
        say(feed, ann, "still here")
        await feeds.settled(1)

    async def test_G6_nobody_leaves_for_an_outage(self, feeds: Feeds) -> None:
        """After an outage, or when the store's clock has jumped, leases that are over are spared for a while."""
        feed = await feeds.start(renew_seconds=0.1, lease_seconds=0.3)
        await feeds.enter(feed, "Ann")
        absent = await feed.outbox.enter("sid-Carl", "Carl")
        feed.store.clock_ahead -= 3_600_000  # as if the last reading had been an hour behind
        await until(lambda: feeds.presences[0].spared_until > time.monotonic())
        await until(lambda: absent.key not in feed.room.roster)
        assert [*feed.room.roster] == [tornchat.name_key("Ann")]

    async def test_a_name_without_a_lease(self, feeds: Feeds) -> None:
        """A name whose lease was lost gets another one, and so can leave."""
        feed = await feeds.start(renew_seconds=0.1, lease_seconds=0.3)
        carl = await feed.outbox.enter("sid-Carl", "Carl")
        await feeds.redis.delete(feeds.place.key("leases"))
        await until(lambda: carl.key not in feed.room.roster)

    async def test_two_daemons_begin(self, feeds: Feeds) -> None:
        """Of two daemons that find no feed, only the first begins one."""
        feed = await feeds.start()
        before = await feeds.redis.xrange(feeds.key)
        await feed.store.open_epoch(feed.store.now() + 1)
        assert await feeds.redis.xrange(feeds.key) == before

    async def test_trimmed_by_hand(self, feeds: Feeds) -> None:
        """A feed that somebody trimmed to its newest entries is the same feed: nobody is told anything."""
        feed = await feeds.start()
        ann = await feeds.enter(feed, "Ann")
        for n in range(5):
            say(feed, ann, f"{n}")
        await feeds.settled(5)
        await feeds.redis.xtrim(feeds.key, maxlen=1, approximate=False)
        say(feed, ann, "on")
        await feeds.settled(6)
        assert len(ann.of("welcome")) == 1

    async def test_old_notices(self, feeds: Feeds, monkeypatch: pytest.MonkeyPatch) -> None:
        """Who joined in an entry with a message, and whose leaving was deleted since, is not back after a start;
        and that entry is still known when the store forgets what came after it.
        """
        monkeypatch.setattr(tornchat, "FEED_NOTICES", 4)
        feed = await feeds.start()
        bob = member("Bob")
        feed.outbox.propose("joined", bob)
        feed.outbox.propose("message", bob, text="hi")
        await feeds.settled(1)
        await feed.outbox.exit(bob.sid, bob.name)
        for n in range(9):
            await feed.outbox.enter(f"sid-{n}", f"Carl{n}")
        later = await feeds.start()
        assert set(later.room.roster) == set(feed.room.roster)
        before = await feeds.redis.xrange(feeds.key)
        (said,) = [at for at, (_, fields) in enumerate(before) if b'"hi"' in fields[b"events"]]
        await tornchat.end_tasks(feed.tasks)
        await feeds.roll_back(len(before) - 1 - said)

        async def put_back() -> bool:
            return bool(await feeds.redis.xrange(feeds.key) == before)

        await until(put_back)

    async def test_a_late_joining(self, feeds: Feeds) -> None:
        """A daemon freezes before it has put Eve on the roster, and meanwhile she is removed, and the feed trimmed."""
        first, second = await feeds.start(), await feeds.start()
        tess = await first.outbox.enter("sid-Tess", "Tess", host=True)
        eve = await feeds.enter(second, "Eve")
        await tornchat.end_tasks(second.tasks)
        await self.remove_and_clear(first, tess)
        await second.store.write_names({eve.member.key: str(eve.member)}, {})
        second.start()
        await until(lambda: eve.closed == [4403])
        assert [feed.room.roster.keys() for feed in (second, await feeds.start())] == [first.room.roster.keys()] * 2

    async def test_removed_while_it_reads(self, feeds: Feeds) -> None:
        """While a daemon starts and reads what the store holds, somebody is removed, and the feed trimmed."""
        first = await feeds.start()
        tess, eve = await first.outbox.enter("sid-Tess", "Tess", host=True), await first.outbox.enter("sid-Eve", "Eve")

        class Slow(tornchat.Store):
            async def page(self, *args: Any) -> list[tornchat.Entry]:
                if eve.key in first.room.roster:
                    await TestFeed.remove_and_clear(first, tess)
                return await super().page(*args)

        later = await feeds.start(Slow)
        assert [*later.room.roster] == [*first.room.roster] == [tess.key]

    @staticmethod
    async def remove_and_clear(feed: tornchat.Feed, host: tornchat.Member) -> None:
        feed.outbox.propose("removed", host, details={"name": "Eve", "seconds": 600})
        feed.outbox.propose("cleared", host)
        await until(lambda: feed.memory.cleared and not feed.memory.to_trim)

    async def test_G3_killed_after_a_deletion(self, feeds: Feeds, monkeypatch: pytest.MonkeyPatch) -> None:
        """The daemon where a message is deleted is killed at once: who starts later still has its place in the log."""
        first, _ = await feeds.start(), await feeds.start()
        ann = await feeds.enter(first, "Ann")
        for text in ("one", "oops", "three"):
            say(first, ann, text)
            await feeds.settled(first.room.seq + 1)

        monkeypatch.setattr(first.store, "write_names", self.killed)
        first.outbox.propose("note", ann.member, details={"to": 2, "kind": "delete", "value": True})

        async def erased() -> bool:
            return "oops" not in str(await feeds.redis.xrange(feeds.key))

        await until(erased)
        bob = await feeds.enter(await feeds.start(), "Bob")
        assert [frame["text"] for frame in bob.of("message")] == ["one", "", "three"]

    async def test_killed_after_an_act(self, feeds: Feeds, monkeypatch: pytest.MonkeyPatch) -> None:
        """The daemon where the room is locked is killed at once, and the room cleared at another: it stays locked."""
        first, second = await feeds.start(), await feeds.start()
        tess = await first.outbox.enter("sid-Tess", "Tess", host=True)
        monkeypatch.setattr(first.store, "write_names", self.killed)
        first.outbox.propose("mode", tess, details={"talk": "hosts"})
        await until(lambda: second.room.state.mode["talk"] == "hosts")
        second.outbox.propose("cleared", tess)
        await until(lambda: second.memory.cleared and not second.memory.to_trim)
        assert (await feeds.start()).room.state.mode["talk"] == "hosts"

    @staticmethod
    async def killed(*_: object) -> NoReturn:
        """What is left of a daemon that was killed before it could write that."""
        await asyncio.Event().wait()
        raise AssertionError

    async def test_many_refusals(self, feeds: Feeds, monkeypatch: pytest.MonkeyPatch) -> None:
        """A group in which all are refused isn't the end of the work: the next in the outbox is committed at once."""
        monkeypatch.setattr(tornchat, "GROUP_EVENTS", 3)
        feed = await feeds.start(tick_seconds=60.0)
        ann, eve = await feeds.enter(feed, "Ann"), Recorder(tornchat.Member("sid-Eve", "Ann", "ann"))
        for n in range(4):
            say(feed, eve, f"{n}")
        say(feed, ann, "hi")
        await feeds.settled(1)


# === Room =============================================================================================================


def filled_room(count: int, history: int = 100, first: int = 1) -> tornchat.Room:
    """A room in which messages `first` to `count` were said."""
    room = tornchat.Room(tornchat.Config(history=history))
    room.epoch, room.seq = "e", first - 1
    room.apply(messages(first, count))
    return room


def messages(first: int, last: int) -> list[tornchat.Event]:
    seqs = range(first, last + 1)
    return [tornchat.Event("message", seq, 1000 * seq, "s", f"c{seq}", "Ann", f"{seq}", (1, seq, 0)) for seq in seqs]


def presence(kind: str, *names: str) -> list[tornchat.Event]:
    return [tornchat.Event(kind, 0, 7, f"sid-{name}", "", name, "", (1, 7, n)) for n, name in enumerate(names)]


class TestRoom:
    @pytest.mark.parametrize(
        ("count", "after", "epoch", "told", "owed"),
        [
            (0, None, "", (False, 0, False), []),
            (50, None, "", (False, 0, False), range(1, 51)),
            (250, None, "", (False, 0, False), range(151, 251)),
            (250, 250, "e", (True, 0, False), []),
            (250, 0, "e", (True, 0, False), range(1, 251)),
            (250, 240, "", (True, 0, False), range(241, 251)),
            (250, 240, "at 240000", (True, 0, False), range(241, 251)),
            (250, 240, "at 239999", (False, 0, True), range(151, 251)),
            (250, 251, "e", (False, 0, True), range(151, 251)),
            (250, 240, "f", (False, 0, True), range(151, 251)),
            (1000, 0, "e", (True, 0, False), range(1, 1001)),
            (1001, 0, "e", (False, 901, False), range(902, 1002)),
            (1500, 0, "e", (False, 1400, False), range(1401, 1501)),
            (1500, 500, "e", (True, 0, False), range(501, 1501)),
            (1500, 499, "e", (False, 901, False), range(1401, 1501)),
        ],
    )
    def test_G2_what_is_owed(
        self, count: int, after: int | None, epoch: str, told: tuple[bool, int, bool], owed: Iterable[int]
    ) -> None:
        """Who comes is owed exactly what it has not seen; or the newest 100, and is told how many it missed."""
        ann = Recorder(member("Ann"))
        epoch, _, at = epoch.partition("at ")
        filled_room(count).join(ann, tornchat.ResumePoint(after, epoch, int(at) if at else None))
        welcome = ann.frames[0]
        assert (welcome["recovered"], welcome["missed"], welcome["reset"]) == told
        assert welcome["seq"] == count
        assert ann.seqs == list(owed)

    def test_a_room_without_history(self) -> None:
        """An operator may show newcomers nothing; who was away still gets what was missed."""
        room = filled_room(50, history=0)
        ann, bob = Recorder(member("Ann")), Recorder(member("Bob"))
        room.join(ann)
        room.join(bob, tornchat.ResumePoint(40, "e"))
        assert (ann.seqs, bob.seqs) == ([], list(range(41, 51)))

    @hypothesis.given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 25)), max_size=30))
    def test_G2_any_comings_and_goings(self, steps: list[tuple[int, int]]) -> None:
        """However speaking, cuts and returns follow each other: nothing twice, nothing lost or told how much."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tornchat, "RING_MESSAGES", 10)
            room = filled_room(0, history=4)
            listeners: list[Recorder | None] = [None] * 3
            seen: list[int] = [0] * 3
            for who, count in steps:
                listener = listeners[who]
                if listener is None:
                    listener = listeners[who] = Recorder(member(f"P{who}"))
                    room.join(listener, tornchat.ResumePoint(seen[who], "e"))
                elif count % 3 == 0:
                    room.leave(listener)
                    welcome, seqs = listener.frames[0], listener.seqs
                    assert seqs == list(range(seqs[0], seqs[0] + len(seqs))) if seqs else True
                    assert welcome["recovered"] is (welcome["missed"] == 0)
                    assert not seqs or seqs[0] == seen[who] + welcome["missed"] + 1
                    assert room.seq == (seqs[-1] if seqs else seen[who])
                    seen[who], listeners[who] = room.seq, None
                else:
                    room.apply(messages(room.seq + 1, room.seq + count))

    def test_one_frame_for_many(self) -> None:
        """Who comes in one turn is told in one frame, with the count that is true then."""
        room, ann = filled_room(0), Recorder(member("Ann"))
        room.apply(presence("joined", "Ann"))
        room.join(ann)
        room.apply(presence("joined", "Bob", "Carl", "Bob") + presence("left", "Carl", "Nobody") + messages(1, 1))
        assert [frame["type"] for frame in ann.frames] == ["welcome", "joined", "left", "message"]
        assert (ann.frames[1]["names"], ann.frames[1]["count"]) == (["Bob", "Carl"], 3)
        assert (ann.frames[2]["names"], ann.frames[2]["count"]) == (["Carl"], 2)

    def test_a_thousand_names(self) -> None:
        """A welcome lists at most 1,000 names, the own one first; the count is the truth."""
        room = filled_room(0)
        room.apply(presence("joined", *(f"P{n}" for n in range(1500))))
        last = Recorder(room.roster[tornchat.name_key("P1499")])
        room.join(last)
        welcome = last.frames[0]
        assert (len(welcome["members"]), welcome["members"][0], welcome["count"]) == (1000, "P1499", 1500)
        assert len(set(welcome["members"])) == 1000

    def test_deleted_long_ago(self) -> None:
        """A room that is read anew has no deleted text, and knows which entry still holds it, or that none does."""
        room, later = filled_room(5), filled_room(0)
        for seq in (2, 4):
            details = {"to": seq, "kind": "delete", "value": True, "by": "author"}
            room.apply([tornchat.Event("note", 5, 5000, "s", "d", "Ann", place=(1, 6, seq), details=details)])
        later.adopt("e", (1, 6), {}, [event for event in messages(1, 5) if event.seq != 4], room.state.fields())
        assert [(event.text, event.entry_id) for event, _ in later.ring.kept] == [
            ("1", (1, 1)), ("", (1, 2)), ("3", (1, 3)), ("", (0, 0)), ("5", (1, 5))]  # fmt: skip

    def test_G5_what_is_remembered(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Who spoke is known for as long as slow mode needs it, and of hosts who have logged out the newest."""
        monkeypatch.setattr(tornchat, "HOST_LOGOUTS", 2)
        room = filled_room(0)
        room.state.mode["every"] = 3
        room.apply([event._replace(sid=f"s{event.seq}", name=f"P{event.seq}") for event in messages(1, 50)])
        assert [mark for mark in room.state.said if mark.startswith("s")] == ["s48", "s49", "s50"]
        assert len(room.state.said) == 6
        for joined in presence("joined", "Ann", "Bob", "Carl"):
            room.apply([joined._replace(details={"host": True}), joined._replace(type="left", text=tornchat.LOGOUT)])
        assert [*room.state.ended] == ["sid-Bob", "sid-Carl"]


# === Command line =====================================================================================================

# A field of Config, its default, a flag with its value, and the environment with its value.
EVERY_OPTION: list[tuple[str, object, list[str], object, dict[str, str], object]] = [
    ("port", None, ["-p", "9000"], 9000, {"TORNCHAT_PORT": "9001", "PORT": "9002"}, 9001),
    ("host", "", ["--host", "127.0.0.1"], "127.0.0.1", {"TORNCHAT_HOST": "::1"}, "::1"),
    ("title", "tornchat", ["--title", "Class 3b"], "Class 3b", {"TORNCHAT_TITLE": "房间"}, "房间"),
    ("password", "", ["--password", "a"], "a", {"TORNCHAT_PASSWORD": "b"}, "b"),
    ("redis_url", "", ["--redis-url", "rediss://b/1"], "rediss://b/1", {"REDIS_URL": "redis://a/0"}, "redis://a/0"),
    ("room", "lobby", ["--room", "blue"], "blue", {"TORNCHAT_ROOM": "red"}, "red"),
    ("history", 100, ["--history", "5"], 5, {"TORNCHAT_HISTORY": "7"}, 7),
    ("rate", 2.0, ["--rate", "0"], 0.0, {"TORNCHAT_RATE": "0.5"}, 0.5),
    ("pictures", 32, ["--pictures", "0"], 0, {"TORNCHAT_PICTURES": "64"}, 64),
    ("wait", 30, ["--wait", "0.5"], 0.5, {"TORNCHAT_WAIT": "5"}, 5),
    ("allow_host", (), ["--allow-host", "a"], ["a"], {"TORNCHAT_ALLOW_HOST": "c, d"}, ["c", "d"]),
    ("trust_proxy", False, ["--trust-proxy"], True, {"TORNCHAT_TRUST_PROXY": "1"}, True),
    ("secret", "", ["--secret", "s"], "s", {"TORNCHAT_SECRET": "t"}, "t"),
    ("name", "", ["--name", "Bob"], "Bob", {"USER": "ann"}, "ann"),
]
FIELDS: list[tuple[list[str], dict[str, str], str, object]] = [
    *(([], {}, field, default) for field, default, *_ in EVERY_OPTION),
    *((argv, environ, field, value) for field, _, argv, value, environ, _ in EVERY_OPTION),
    *(([], environ, field, value) for field, _, _, _, environ, value in EVERY_OPTION),
    (["--port", "0"], {}, "port", 0),
    ([], {"PORT": "9002"}, "port", 9002),
    ([], {"TORNCHAT_PORT": "", "PORT": "9002"}, "port", 9002),
    ([], {"PORT": ""}, "port", None),
    (["-p", "0"], {"PORT": "abc"}, "port", 0),
    (["--join", "host"], {"TORNCHAT_PASSWORD": "b"}, "password", "b"),
    (["--redis-url", "unix:///run/r.sock"], {}, "redis_url", "unix:///run/r.sock"),
    (["--redis-url", "redis://b"], {"REDIS_URL": "http://a"}, "redis_url", "redis://b"),
    ([], {"REDIS_URL": ""}, "redis_url", ""),
    (["--allow-host", "a", "--allow-host", "b"], {}, "allow_host", ["a", "b"]),
    (["--allow-host", "A.org.:8888,[2001:db8::1]:80"], {}, "allow_host", ["a.org", "2001:db8::1"]),
    ([], {"TORNCHAT_TRUST_PROXY": "0"}, "trust_proxy", False),
    ([], {"USER": "root"}, "name", ""),
    ([], {}, "join", None),
    (["--join", "http://a/"], {"PORT": "x", "REDIS_URL": "http://b", "TORNCHAT_WORKERS": "4"}, "join", "http://a/"),
    *(
        (["--join", given], {}, "join", meant)
        for given, meant in {
            "http://localhost:8888/": "http://localhost:8888/",
            "https://chat.example.org": "https://chat.example.org/",
            "HTTP://192.168.1.7:9000/login?nickname=Ann": "http://192.168.1.7:9000/",
            "ws://host/chat": "http://host/",
            "wss://host:443/class/5b/chat": "https://host:443/class/5b/",
            "classroom": "http://classroom:8888/",
            "classroom:9000": "http://classroom:9000/",
            "[::1]:9000": "http://[::1]:9000/",
        }.items()
    ),
]

TEXT_OPTIONS = ("host", "title", "password", "secret", "name", "room", "redis-url", "allow-host")
OPTIONS = (*TEXT_OPTIONS, "certfile", "keyfile", "port", "history", "rate", "workers", "wait", "join", "trust-proxy")

WRONG_LINES = (
    "--port eighty|--port 70000|--port -1|--history many|--history -1|--history 1001|--rate fast|--rate -1"
    "|--rate nan|--pictures -1|--pictures 1.5|--redis-url http://a:secret@127.0.0.1/|--redis-url redis://:secret@127.0.0.1:port/"
    "|--redis-url nonsense|--redis-url redis://a/abc|--redis-url redis://a/1/2|--redis-url redis://a..b/0"
    "|--redis-url unix://run/redis.sock|--colour red|stray|--keyfile key.pem|--host a..b|--wait -1|--room a:b"
    "|--join http://|--join http://host:port/|--join|--title a\x1bb|--join http://host:99999/|--join http://[::1/"
    "|--join ftp://host/|--join http://user:secret@host/"
)
WRONG_USAGE: list[tuple[list[str], dict[str, str]]] = [
    *((line.split(" "), {}) for line in WRONG_LINES.split("|")),
    *(([f"--{name}", ""], {}) for name in OPTIONS),
    *(([f"--{name}", "caf\udce9"], {}) for name in TEXT_OPTIONS),
    (["--title", "x" * 81], {}),
    (["--room", "a b"], {}),
    (["--join", "http://a host/"], {}),
    *(
        (["--allow-host", host], {})
        for host in (" , ", "b.org,https://a.org/", "*.a.org", "a b", "a.org;reboot", "ä.org")
    ),
    ([], {"PORT": "eighty"}),
    ([], {"TORNCHAT_PORT": "", "PORT": "1.5"}),
    ([], {"REDIS_URL": "redis//missing-colon"}),
    ([], {"TORNCHAT_PASSWORD": ""}),
    ([], {"TORNCHAT_ROOM": "{a}"}),
    ([], {"TORNCHAT_TRUST_PROXY": "perhaps"}),
]


class TestCommandLine(Transcripts):
    def test_options(self) -> None:
        """Each option has its default, its name in the environment, and a flag beats the environment."""
        for argv, environ, name, value in FIELDS:
            assert getattr(tornchat.parse_config(argv, environ), name) == value, (argv, environ)

    def test_wrong_usage(self, capsys: pytest.CaptureFixture[str]) -> None:
        """Wrong usage is one line that says what was wrong, without a password, and exit code 2."""
        for argv, environ in WRONG_USAGE:
            with pytest.raises(SystemExit) as stopped:
                tornchat.parse_config(argv, environ)
            out, err = capsys.readouterr()
            assert (stopped.value.code, out, len(err.splitlines())) == (2, "", 1), (argv, environ, err)
            assert "secret@" not in err

    def test_help_is_the_manual(self, capsys: pytest.CaptureFixture[str]) -> None:
        """--help prints the module's docstring, and names every variable of the environment; --version the version."""
        with pytest.raises(SystemExit) as stopped:
            tornchat.parse_config(["--help"], {})
        assert stopped.value.code == 0
        printed = " ".join(capsys.readouterr().out.split())
        assert " ".join((tornchat.__doc__ or "").split()) in printed
        for _, environ, _, _ in FIELDS:
            for name in environ:
                assert name in printed
        with pytest.raises(SystemExit) as stopped:  # whatever another program has put into the environment
            tornchat.parse_config(["--version"], {"PORT": "abc", "REDIS_URL": "http://a"})
        assert (stopped.value.code, tornchat.__version__ in capsys.readouterr().out) == (0, True)

    async def test_ports_are_busy(self, memory_lan: Lan, monkeypatch: pytest.MonkeyPatch) -> None:
        """A daemon says that all ports from the default one on are busy."""

        def busy(*args: object, **kwargs: object) -> NoReturn:
            raise OSError(errno.EADDRINUSE, "in use")

        monkeypatch.setattr("tornado.netutil.bind_sockets", busy)
        with pytest.raises(tornchat.FatalError, match=str(tornchat.DEFAULT_PORT)):
            await memory_lan.serve(port=None)

    async def test_default_port_is_busy(self, memory_lan: Lan) -> None:
        with contextlib.ExitStack() as stack:
            with contextlib.suppress(OSError):  # then it is busy already
                stack.enter_context(socket.create_server(("127.0.0.1", 8888)))
            program = await memory_lan.run()
            address = await program.address()
            assert 8888 < int(address.rsplit(":", 1)[1]) < 9100
            assert "8888" in "".join(await program.stop())

    async def test_a_port_of_another_program(self, memory_lan: Lan, monkeypatch: pytest.MonkeyPatch) -> None:
        """A port that another program has on 127.0.0.1 alone is busy, even where the system would give us the rest."""
        monkeypatch.setattr("tornado.netutil.bind_sockets", lambda *args, **kwargs: [socket.create_server(("", 0))])
        with socket.create_server(("127.0.0.1", 0)) as busy, pytest.raises(tornchat.FatalError, match="in use"):
            await memory_lan.serve(host="", port=busy.getsockname()[1])

    @pytest.mark.parametrize(
        ("options", "code", "why"),
        [
            ("-p {busy}", 1, "{busy}"),
            ("--redis-url redis://:hunter2@127.0.0.1:port/0", 2, "malformed"),
            ("--workers 2", 2, "Redis"),
            ("--workers 2 --redis-url redis://:hunter2@127.0.0.1:1/0 --wait 0", 1, "refused|Connect call failed"),
        ],
    )
    async def test_bad_start(self, options: str, code: int, why: str) -> None:
        """A start that cannot be ends with its exit code and one line with the cause: no traceback, no password."""
        with socket.create_server(("127.0.0.1", 0)) as taken:
            busy = taken.getsockname()[1]
            err = await fails(code, "--host", "127.0.0.1", *options.format(busy=busy).split())
        assert "hunter2" not in err
        assert re.search(why.format(busy=busy), err), err

    @pytest.mark.parametrize(
        ("options", "why"),
        [
            ("--redis-url redis://:hunter2@127.0.0.1:1/0", "refused|Connect call failed"),
            ("--redis-url redis://:hunter2@no-such-host.invalid/0", "no-such-host.invalid"),
            ("--redis-url unix:///nowhere/redis.sock?password=hunter2", "No such file"),
            ("--redis-url redis://:hunter2@127.0.0.1:{redis}/0", "(?i)password|auth"),
            ("--redis-url redis://127.0.0.1:{redis}/99", "out of range"),
            ("--redis-url rediss://127.0.0.1:{redis}/0", "no answer to TLS"),
            ("--certfile /nowhere/cert.pem --keyfile /nowhere/key.pem", "/nowhere/key.pem: No such file"),
            ("--certfile {folder}/none.pem --keyfile {folder}/none.pem", "none.pem"),
            ("--certfile {folder}/cert.pem --keyfile {folder}/locked.pem", "passphrase"),
            ("--host 192.0.2.1", r"192.0.2.1 port \d+: Cannot assign requested address$"),
            ("--host no-such-host", r"no-such-host port \d+: [^:.]+$"),  # another port is no cure
        ],
    )
    async def test_why_it_cannot_start(
        self, options: str, why: str, tmp_path: Path, request: pytest.FixtureRequest
    ) -> None:
        """What a start needs and doesn't find is named in one line, without a password; the port is given back."""
        (tmp_path / "none.pem").write_text("nonsense")
        if "locked" in options:
            _, key = certificate(tmp_path)
            lock = ["openssl", "pkey", "-in", key, "-aes128", "-passout", "pass:hunter2"]
            assert await (await asyncio.create_subprocess_exec(*lock, "-out", tmp_path / "locked.pem")).wait() == 0
        server = request.getfixturevalue("redis_server").port if "{redis}" in options else 0
        given = ["-p", str(port := free_port()), "--wait", "0", *options.format(folder=tmp_path, redis=server).split()]
        config = tornchat.parse_config([*given, *([] if "--host" in given else ["--host", "127.0.0.1"])], {})
        with pytest.raises(tornchat.FatalError, match=why) as refused:
            await tornchat.Daemon.start(dataclasses.replace(config, store_seconds=1.0))
        assert not re.search("hunter2|\n", str(refused.value))
        assert not listens(port)

    @slow
    async def test_a_redis_that_is_not_up_yet(self, own_redis: RedisServer, own_lan: Lan) -> None:
        """A daemon that starts before its Redis says so in a line, and opens the room when it is there."""
        own_redis.kill()
        program = await own_lan.run("-p", "0")
        assert own_redis.url in await program.logs("waiting up to 30 s")
        own_redis.start()
        ann = await own_lan.join("Ann", at=await program.address())
        await ann.quiet()

    @pytest.mark.parametrize("workers", [1, 2])
    async def test_ctrl_c_while_the_redis_is_silent(self, workers: int, memory_lan: Lan) -> None:
        """Ctrl+C ends a daemon at once that still waits for what its Redis says."""
        asked = asyncio.Event()
        silent = await asyncio.start_server(lambda reader, writer: asked.set(), "127.0.0.1", 0)
        url = f"redis://127.0.0.1:{silent.sockets[0].getsockname()[1]}"
        program = await memory_lan.run("-p", "0", "--redis-url", url, "--workers", str(workers))
        await asyncio.wait_for(asked.wait(), RETURN)
        program.signal(signal.SIGINT)
        assert await program.ended() == (0, "", "")
        silent.close()

    @pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "tgkill"), reason="one thread can't be signalled here")
    async def test_ctrl_c_just_before_the_loop_waits(self, memory_lan: Lan) -> None:
        """Ctrl+C ends a daemon at once though it interrupts no wait: here another thread than the loop's gets it."""
        asked = asyncio.Event()
        silent = await asyncio.start_server(lambda reader, writer: asked.set(), "127.0.0.1", 0)
        url = f"redis://localhost:{silent.sockets[0].getsockname()[1]}"  # a name is looked up in a thread
        program = await memory_lan.run("-p", "0", "--redis-url", url)
        await asyncio.wait_for(asked.wait(), RETURN)
        pid = program.process.pid
        ctypes.CDLL(None).tgkill(pid, max(map(int, os.listdir(f"/proc/{pid}/task"))), signal.SIGINT)
        assert await program.ended() == (0, "", "")  # without a word of waiting for the Redis, which comes after 4 s
        silent.close()

    async def test_ctrl_c_while_it_is_loaded(self) -> None:
        """Ctrl+C ends the program at once and without a traceback, even while Python still loads its packages."""
        find = "lambda name, path, target=None: os.kill(os.getpid(), signal.SIGINT) if name == 'fakeredis' else None"
        start = f"import os, signal, types; sys.meta_path.insert(0, types.SimpleNamespace(find_spec={find}))"
        assert await run_to_end(python=after(start)) == (0, "", "")

    async def test_workers_of_a_program_that_is_no_file(self) -> None:
        """`python - --workers 2` has nothing that a worker could be started from."""
        with PROGRAM.open() as source:
            options = ["-", "--workers", "2", "--redis-url", "redis://127.0.0.1:1/0"]
            program = await Program.spawn(options, {}, stdin=source.fileno())
            code, out, err = await program.ended()
        assert (code, out, len(err.splitlines())) == (2, "", 1), err

    def test_python_before_match(self) -> None:
        """A Python that is too old to read the file shows a line that says so: the first one that it can't read."""
        statements = [node for node in ast.walk(ast.parse(SOURCE)) if isinstance(node, ast.Match)]
        with pytest.raises(SyntaxError, match="Pattern matching"):  # nothing else stops it before
            ast.parse(SOURCE, feature_version=(3, 7))
        first = min(node.lineno for node in statements)
        assert "tornchat needs Python 3.11 or newer" in SOURCE.splitlines()[first - 1]

    async def test_python_3_10(self) -> None:
        """An old Python that can read the file is told in one line, before anything that it lacks is imported."""
        assert "needs Python 3.11 or newer" in await fails(1, python=after("sys.version_info = (3, 10, 13)"))

    @pytest.mark.parametrize(
        ("versions", "named"),
        [
            ({"tornado": "6.5.2"}, ["tornado>="]),
            ({"tornado": "6.6", "redis": "8.0.0", "fakeredis": "2.34.1"}, ["tornado>=", "redis>=", "fakeredis>="]),
            ({"redis": "9.0.0b1", "fakeredis": "10.0"}, []),
        ],
    )
    async def test_old_packages(self, versions: dict[str, str], named: list[str], tmp_path: Path) -> None:
        """All packages that are too old are named in one line, with the command that mends it."""
        for name, version in versions.items():
            info = tmp_path / f"{name}-{version}.dist-info"
            info.mkdir()
            (info / "METADATA").write_text(f"Name: {name}\nVersion: {version}\n")
        if not named:
            assert (await run_to_end("--version", PYTHONPATH=str(tmp_path)))[::2] == (0, "")
            return
        reason, command = (await fails(1, "--version", PYTHONPATH=str(tmp_path))).split("python -m pip install")
        assert re.findall(r"\w+>=", reason) == named
        assert command.split() == [f'"{requirement}"' for requirement in tornchat.REQUIREMENTS]

    @pytest.mark.parametrize(
        "python",
        [
            after("sys.modules['fakeredis'] = None"),
            ("-I", "-S", str(PROGRAM)),
        ],
        ids=["fakeredis", "all"],
    )
    async def test_missing_packages(self, python: tuple[str, ...]) -> None:
        """Without one of its packages, or all, the program prints a line that names them as pip takes them."""
        err = await fails(1, python=python)
        assert "pip install" in err
        assert all(requirement in err for requirement in tornchat.REQUIREMENTS)


# === Login and names ==================================================================================================


def signed(secret: str, name: str, *, days_ago: float = 0, value: str = "0123456789abcdef Eve") -> str:
    """A cookie as a daemon with that secret makes it."""
    clock = functools.partial(float, time.time() - days_ago * 86400)
    return tornado.web.create_signed_value(secret, name, value, clock=clock).decode()


def forgeries(secret: str, name: str, value: str) -> list[str]:
    """What isn't the room's, though its secret, the name of its cookie and a good value of it may be known."""
    forged = ["", "nonsense", "0123456789abcdef Eve", "x" * 12_000, "2|1:0|10:" + "9" * 5000 + "|", '"\\777\\000\\"']
    forged += [value[:-3], value.rpartition("|")[0] + "|", value[:-1] + ("0" if value[-1] != "0" else "1")]
    forged += [re.sub(r"\|\d+:[^|]*\|(?=[0-9a-f]{64})", "|4:====|", value), "\xff\xfe\x80" + value]
    forged += [value.replace("2|", f"{version}|", 1) for version in (1, 3)] + [value.replace("2|1:0|", "2|1:7|", 1)]
    forged += [re.sub(r"\|(\d+):", rf"|{lie}\1:", value) for lie in ("9", "-")]
    forged += [tornado.web.create_signed_value(secret, name, "sid Eve", version=1).decode()]
    forged += [signed("another secret", name), signed(secret, "tornchat-00000000"), signed(secret, name, days_ago=31)]
    return [*forged, signed(secret, name, value="0123456789abcdef")]


class TestLogin(Transcripts):
    async def test_login(self, lan: Lan) -> None:
        """A nickname is enough: a cookie, and the page is there."""
        await lan.serve(title="Class 3b")
        ann = lan.browser()
        asked = await ann.fetch("/")
        assert (asked.code, asked.headers["Location"]) == (302, "login")
        assert 'type="password"' not in text_of(await ann.fetch("/login"))
        answer = await ann.login("Ann")
        cookie = answer.headers["Set-Cookie"]
        assert "httponly" in cookie.lower()
        assert re.search(r"samesite=(lax|strict)", cookie, re.IGNORECASE)
        assert "secure" not in cookie.lower()
        page = await ann.fetch("/")
        assert page.code == 200
        assert "Class 3b" in text_of(page)

    @pytest.mark.parametrize("name", ["x" * 25, "An\u202en", "admin"])
    async def test_bad_name(self, name: str, memory_lan: Lan) -> None:
        """A name that could deceive or cannot be shown is refused with 400, in words, without a cookie."""
        await memory_lan.serve()
        ann = memory_lan.browser()
        assert await verdict(ann.ask(name)) == (400, "invalid")
        page = await ann.fetch("/login", form={"nickname": name})
        assert page.code == 400
        assert 'name="nickname"' in text_of(page)
        assert ann.cookies == {}

    @pytest.mark.parametrize("name", ["Ann Lee", "王小明", "مريم", "__proto__", "<b>Ann</b>", "👩\u200d🚀"])
    async def test_good_name(self, name: str, memory_lan: Lan) -> None:
        """Names in any script are welcome and come back as they were typed: in the welcome and with a message."""
        browser = await memory_lan.join(name)
        assert browser.welcome["members"] == [name]
        await browser.say("hi")
        await browser.expect("message", name=name)
        assert (await browser.fetch("/")).code == 200

    async def test_G7_a_taken_name(self, lan: Lan) -> None:
        """A name that is taken stays with its owner: the refused one gets 409, a free variant, and no cookie."""
        ann, other = await lan.join("Ann"), lan.browser()
        code, said = await other.ask("Ann")
        assert (code, said["code"]) == (409, "taken")
        page = await other.fetch("/login", form={"nickname": "Ann"})
        assert page.code == 409
        assert said["suggestion"] in text_of(page)
        assert other.cookies == {}
        await ann.quiet()
        await other.login(said["suggestion"])

    @pytest.mark.parametrize("twin", ["PACO", "Ｐａｃｏ", " Paco ", "P a c o", "Расо"])
    async def test_G7_look_alikes(self, twin: str, memory_lan: Lan) -> None:
        """A name that looks like one on the list cannot stand beside it; what is offered is a variant of the latter."""
        await memory_lan.join("Paco")
        code, said = await memory_lan.browser().ask(twin)
        assert (code, said["code"], said["suggestion"]) == (409, "taken", "Paco2")

    async def test_why_one_is_asked_to_log_in(self, memory_lan: Lan) -> None:
        """The login page tells whom the chat page sends there why; it says nothing else that is in the address."""
        await memory_lan.serve()
        for why in ("taken", "password", "invalid", "logout", "cookie"):
            page = text_of(await memory_lan.browser().fetch(f"/login?nickname=Ann&why={why}"))
            assert html.escape(tornchat.WORDS["en"]["login_why_" + why], quote=False).replace("'", "&#39;") in page
        page = text_of(await memory_lan.browser().fetch("/login?nickname=Ann&why=<b>"))
        assert 'class="error"' not in page

    async def test_G7_fifty_logins_for_one_name(self, lan: Lan) -> None:
        """50 logins for one name at once, at two daemons of a Redis: one wins, 49 get 409 and a free variant."""
        daemons = [await lan.serve() for _ in range(2 if lan.store.lasts else 1)]
        answers = await asyncio.gather(*(lan.browser(daemons[n % len(daemons)]).ask("Ann") for n in range(50)))
        assert sorted(code for code, _ in answers) == [200] + [409] * 49
        for suggestion in {said["suggestion"] for code, said in answers if code == 409}:
            assert (await lan.browser().ask(suggestion))[0] == 200

    @pytest.mark.parametrize("nickname", ["Anna", ""])
    async def test_a_session_has_one_name(self, nickname: str, lan: Lan) -> None:
        """Who logs in under another name, or without one, gives the first one back."""
        bob, ann = await lan.join("Bob"), await lan.join("Ann")
        await ann.login(nickname)
        await bob.expect("left", names=["Ann"])
        await ann.closed(4401)
        await ann.connect()
        assert "Ann" not in (await ann.expect("welcome", count=2))["members"]

    async def test_no_guest_name_is_free(self, memory_lan: Lan, monkeypatch: pytest.MonkeyPatch) -> None:
        """When others take every guest name first, the guest is told to try again."""
        daemon = await memory_lan.serve()
        await memory_lan.join("Ann")
        monkeypatch.setattr(tornchat, "guest_name", lambda address: "Ann")
        monkeypatch.setattr(daemon.room, "free_variant", lambda name: "Ann")
        assert await verdict(memory_lan.browser().ask("")) == (503, "unavailable")

    async def test_guests(self, lan: Lan, monkeypatch: pytest.MonkeyPatch) -> None:
        """Who gives no name gets one; when all the numbers of an address are taken, there are other guest names."""
        await lan.serve()
        names = [(await lan.browser().ask(nickname))[1]["name"] for nickname in ("", "  ", "")]
        assert all(name.startswith("guest-") for name in names)
        monkeypatch.setattr(tornchat, "variants", lambda name: iter(()))
        others = [(await lan.browser().ask(""))[1]["name"] for _ in range(3)]
        assert all(re.fullmatch("guest-[0-9a-f]+", name) for name in others)
        assert len({tornchat.name_key(name) for name in names + others}) == 6

    async def test_password(self, memory_lan: Lan) -> None:
        """A room with a password lets in who knows it, and nobody else."""
        await memory_lan.serve(password="open säsame")
        ann = memory_lan.browser()
        assert 'type="password"' in text_of(await ann.fetch("/login"))
        for wrong in ("", "open", "Open säsame"):
            assert await verdict(ann.ask("Ann", wrong)) == (403, "password")
        page = await ann.fetch("/login", form={"nickname": "Ann", "password": "wrong"})
        assert page.code == 403
        assert 'value="Ann"' in text_of(page)
        assert ann.cookies == {}
        await ann.login("Ann", "open säsame")

    async def test_names_without_end(self, memory_lan: Lan, monkeypatch: pytest.MonkeyPatch) -> None:
        """One address may take a school's worth of names at once, then two a second; others aren't held up by it."""
        monkeypatch.setattr(tornchat, "LOGINS_AT_ONCE", 20)
        await memory_lan.serve(trust_proxy=True)
        eve, ann = memory_lan.browser(), memory_lan.browser()

        async def login(browser: Browser, address: str) -> int:
            browser.cookies = {}
            return (await browser.fetch("/login", form={"nickname": ""}, X_Forwarded_For=address)).code

        assert {await login(eve, "192.0.2.66") for _ in range(tornchat.LOGINS_AT_ONCE)} == {303}
        assert 429 in [await login(eve, "192.0.2.66") for _ in range(tornchat.LOGINS_AT_ONCE)]
        assert await login(ann, "192.0.2.7") == 303

    def test_paces_are_bounded(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(tornchat, "PACES", 10)
        paces = tornchat.TokenBuckets(1, 1)
        assert [paces.take(f"address {number}", number) for number in range(100)] == [0] * 100
        assert len(paces.buckets) == 10
        assert paces.take("address 99", 99.5) == 0.5

    async def test_who_is_in_gives_no_password(self, memory_lan: Lan) -> None:
        """Somebody guesses from the same address: that keeps nobody from coming back who was there."""
        await memory_lan.serve(password="lighthouse", guess_seconds=1)
        ann, eve = memory_lan.browser(), memory_lan.browser()
        await ann.login("Ann", "lighthouse")
        guesses = [asyncio.create_task(eve.ask("Eve", "?")) for _ in range(6)]
        assert (await next(asyncio.as_completed(guesses)))[0] == 403
        assert (await ann.ask("Ann"))[0] == 200
        assert {(await guess)[0] for guess in guesses} == {403}

    async def test_guessing_a_password(self, memory_lan: Lan) -> None:
        """Wrong ones are refused after a while, or at once while five wait; the right one is always let in at once."""
        await memory_lan.serve(password="lighthouse", guess_seconds=1.5)
        eve, ann = memory_lan.browser(), memory_lan.browser()
        guesses = [asyncio.create_task(eve.ask("Eve", f"guess {number}")) for number in range(10)]
        refused = asyncio.as_completed(guesses)
        answers = [await next(refused)]
        assert (await ann.ask("Ann", "lighthouse"))[0] == 200
        assert [guess.done() for guess in guesses].count(False) == 5
        answers += [await answer for answer in refused]
        assert [status for status, _ in answers] == [403] * 10
        texts = ("Too many wrong passwords at once. Please wait a moment.", "That is not the room’s password.")
        assert [answer["text"] for _, answer in answers] == [texts[n // 5] for n in range(10)]

    async def test_G6_logout(self, lan: Lan) -> None:
        """A logout gives the name back at once, closes every tab of the session, and everyone sees it: no grace."""
        await lan.serve(grace_seconds=60)
        bob, ann = await lan.join("Bob"), await lan.join("Ann")
        tab = await ann.tab().connect()
        await tab.expect("welcome", name="Ann")
        await bob.expect("joined", names=["Ann"])
        answer = await ann.fetch("/logout", form={})
        assert (answer.code, answer.headers["Location"]) == (303, "login")
        await ann.closed(4401, "logout")
        await tab.closed(4401, "logout")
        await bob.expect("left", names=["Ann"], count=1)
        assert (await ann.fetch("/")).code == 302
        assert (await ann.fetch("/logout", form={})).code == 303  # once more is no error
        assert (await lan.browser().ask("Ann"))[0] == 200

    async def test_language(self, memory_lan: Lan) -> None:
        """The room speaks Chinese to a browser that prefers it, and English to any other."""
        await memory_lan.serve()
        speakers = {language: memory_lan.browser(language=language) for language in ("en", "zh-CN,zh;q=0.9", "fr", "")}
        english, chinese, *others = [text_of(await speaker.fetch("/login")) for speaker in speakers.values()]
        assert ('lang="en"' in english, 'lang="zh' in chinese) == (True, True)
        assert others == [english, english]
        bob = speakers["zh-CN,zh;q=0.9"]
        refused = (await bob.ask("x" * 30))[1]["text"]
        await bob.login("小明")
        await bob.connect()
        await bob.expect("welcome")
        await bob.send("nonsense")
        for told in (chinese, refused, (await bob.expect("refused", code="bad-frame"))["text"]):
            assert re.search(r"[\u4e00-\u9fff]{2}", told)

    def test_languages(self) -> None:
        """The one that is liked most of those that there are; English where nothing else is asked for."""
        for header in (
            *("zh; q=0.9, en; q=0.1", "en ;q=0.1 , ZH-Hant-TW ; q=0.9", "fr, zh;q=0.2, en;q=0.1"),
            *("zh-CN;q=0.3, en;q=0.5, zh;q=0.8", "zh-CN.UTF-8"),  # as the terminal client's LANG says it
        ):
            assert tornchat.choose_language(header) == "zh"
        long = "de-DE,de;q=0.9," + "fr," * 4000 + "zh"  # of 12 KB only the beginning is looked at
        for header in ("zh;q=0", "en, zh", "zh;q=high, en;q=0.1", "*", long):
            assert tornchat.choose_language(header) == "en"

    async def test_one_secret_for_two_rooms(self, redis_lan: Lan) -> None:
        """The operator gave both the same --secret: they know nobody of each other, and log nobody out."""
        first = await redis_lan.serve(secret="given")
        second = await redis_lan.serve(secret="given", room=f"{redis_lan.store.room}-second")
        memory = await redis_lan.serve(secret="given", redis_url="")
        ann = await redis_lan.join("Ann", at=first)
        for other in (second, memory):
            there = ann.tab(at=other)
            assert (await there.fetch("/")).code == 302
            (value,) = [value for name, value in ann.cookies.items() if name == first.cookie]
            there.cookies = {other.cookie: value}  # under the name of the other room
            assert (await there.fetch("/")).code == 302
            there.cookies = ann.cookies
            await there.login("Anna")
        assert len(ann.cookies) == 3
        assert (await ann.fetch("/")).code == 200
        assert not await first.store.redis.exists(redis_lan.store.key("secret"))  # an operator's own is not stored

    async def test_the_password_is_changed(self, redis_lan: Lan) -> None:
        """Whoever was let in by the old one has to give the new one."""
        await redis_lan.serve(password="lighthouse")
        ann = await redis_lan.login("Ann", "lighthouse")
        await redis_lan.restart(password="lighthouse")
        assert (await ann.fetch("/")).code == 200
        await redis_lan.restart(password="harbour")
        assert (await ann.fetch("/")).code == 302
        assert await ann.knock() == 101
        await ann.closed(4401)
        assert (await ann.ask("Ann", "lighthouse"))[0] == 403

    async def test_the_secret_is_another(self, redis_lan: Lan) -> None:
        """The store was emptied and has a new secret: the daemons agree on that, and old cookies are no sessions."""
        first, second = await redis_lan.serve(), await redis_lan.serve()
        ann = await redis_lan.login("Ann", at=first)
        with redis.Redis.from_url(redis_lan.store.url) as client:
            client.set(redis_lan.store.key("secret"), "new")
        await until(lambda: first.store.secret == second.store.secret == "new")
        assert (await ann.fetch("/")).code == 302
        bob = await redis_lan.join("Bob", at=first)
        await (await bob.tab(at=second).connect()).expect("welcome", name="Bob")

    async def test_two_cookies_of_one_name(self, memory_lan: Lan) -> None:
        """One that another port has planted comes first: the valid one counts, or the last; odd ones hide nothing."""
        daemon = await memory_lan.serve()
        ann, eve = memory_lan.browser(), memory_lan.browser()
        await ann.login("Ann")
        await eve.login("Eve")
        ours, hers, bad = ann.headers()["Cookie"], eve.headers()["Cookie"], f"{daemon.cookie}=bad"
        owners = {f"{bad}; {ours}": "Ann", f"{ours}; {bad}": "Ann", f"{hers}; {ours}": "Ann", f"{bad}; {hers}": "Eve"}
        for cookies, name in owners.items():
            page = text_of(await memory_lan.browser().fetch("/", Cookie=cookies))
            assert f'data-name="{name}"' in page
        for odd in ("; ".join(f"c{n}={n}" for n in range(500)), 'a="\\', "=;;;=; ,", "a=\xff", "$Version=1", "\xa0=x"):
            for cookie in (f"{odd}; {ours}", f"{ours}; {odd}"):  # do not hide it
                answer = await memory_lan.ask_raw("GET", "/", {"Host": "localhost", "Cookie": cookie})
                assert answer.startswith("HTTP/1.1 200 "), answer

    async def test_a_planted_cookie(self, memory_lan: Lan) -> None:
        """Eve gives Ann's browser a session that she has too: when Ann logs in, even under its name, it has another."""
        eve = await memory_lan.join("Ann")
        ann = memory_lan.browser()
        ann.cookies = dict(eve.cookies)
        await ann.login("Ann")
        await ann.connect()
        await ann.expect("welcome", name="Ann", count=1)
        await eve.closed(4401)
        assert ann.cookies.keys() == eve.cookies.keys()
        assert ann.cookies != eve.cookies
        assert (await eve.fetch("/messages")).code == 409

    async def test_logout_at_another_daemon(self, redis_lan: Lan) -> None:
        """A logout closes every connection of the session, at every daemon, and the requests that wait there."""
        first, second = await redis_lan.serve(grace_seconds=60), await redis_lan.serve(grace_seconds=60)
        ann = await redis_lan.join("Ann", at=first)
        there, waiting = await ann.tab(at=second).connect(), ann.tab(at=second)
        welcome = await there.expect("welcome", name="Ann")
        poll = asyncio.create_task(waiting.fetch(f"/messages?after=0&epoch={welcome['epoch']}&wait=30"))
        await until(lambda: len(second.room.listeners) == 2)
        assert (await ann.tab(at=second).fetch("/logout", form={})).code == 303
        await ann.closed(4401, "logout")
        await there.closed(4401, "logout")
        assert (await poll).code == 401
        assert (await redis_lan.browser(first).ask("Ann"))[0] == 200

    async def test_forged_cookies(self, memory_lan: Lan) -> None:
        """A cookie that the room did not sign, or too long ago, is no session: never an error of the server."""
        daemon, ann = await memory_lan.serve(), await memory_lan.login("Ann")
        ((name, value),) = ann.cookies.items()
        for forged in forgeries(daemon.cookie_key, name, value.strip('"')):
            thief = {"Cookie": f"{name}={forged}", "Host": "localhost"}
            for method, path, status in [
                *[("GET", "/", 302), ("GET", "/login", 200), ("GET", "/messages", 401), ("POST", "/messages", 401)],
                *[("POST", "/logout", 303), ("GET", "/chat", 400)],
            ]:
                answer = await memory_lan.ask_raw(method, path, thief)
                assert re.match(rf"HTTP/1.1 ({status}|400) ", answer), (forged, answer)
            answer = await memory_lan.ask_raw("GET", "/chat", thief | UPGRADE, end=rb"\x88.{3}| 400 .*\r\n\r\n")
            assert "\x11\x31" in answer or " 400 " in answer, forged  # 4401
        assert (await ann.fetch("/")).code == 200

    async def test_a_cookie_too_big(self, memory_lan: Lan, caplog: pytest.LogCaptureFixture) -> None:
        """A cookie of 60 KB is not even read."""
        ann = await memory_lan.login("Ann")
        reader, writer = await asyncio.open_connection("127.0.0.1", memory_lan.daemons[-1].port)
        with contextlib.suppress(ConnectionError):
            writer.write(b"GET / HTTP/1.1\r\nHost: localhost\r\nCookie: a=" + b"x" * 60_000 + b"\r\n\r\n")
            assert await asyncio.wait_for(reader.read(), RETURN) == b""
        writer.close()
        assert (await ann.fetch("/")).code == 200
        assert len(caplog.records) <= 1

    @pytest.mark.parametrize("cookie", ["{name}={x}", "{name}=2|1:0|10:1;" * 400, ";" * 15_000])
    async def test_G5_cookies_that_take_time(
        self, cookie: str, memory_lan: Lan, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Of what claims to be a session little is looked at; ours is found behind it."""
        daemon = await memory_lan.serve()
        ann, looked_at, decode = memory_lan.browser(), [], tornado.web.decode_signed_value
        await ann.login("Ann")
        cookie = cookie.format(name=daemon.cookie, x="x" * 14_000)

        def count(key: str, name: str, value: str, **limits: Any) -> bytes | None:
            looked_at.append(len(value))
            return decode(key, name, value, **limits)

        monkeypatch.setattr(tornado.web, "decode_signed_value", count)
        assert (await memory_lan.browser().fetch("/", Cookie=cookie)).code == 302
        assert len(looked_at) <= 10
        assert sum(looked_at) < 7_000
        assert (await memory_lan.browser().fetch("/", Cookie=f"{cookie}; {ann.headers()['Cookie']}")).code == 200


# === Socket ===========================================================================================================


class TestSocket(Transcripts):
    async def test_welcome(self, lan: Lan) -> None:
        """The first frame tells a newcomer everything: its name, who is there, where the room stands, the limits."""
        await lan.serve(title="Class 3b", history=7)
        ann = await lan.join("Ann")
        await ann.expect("message", cid=await ann.say("hi"))
        bob = await lan.join("Bob")
        told = {"name": "Bob", "title": "Class 3b", "members": ["Bob", "Ann"], "count": 2, "epoch": ann.epoch, "seq": 1}
        told |= {"recovered": False, "missed": 0, "reset": False, "host": False, "hosts": [], "muted_until": 0}
        assert told.items() <= bob.welcome.items()
        assert (bob.welcome["limits"]["text"], bob.welcome["limits"]["history"]) == (4000, 7)

    async def test_two_people_talk(self, lan: Lan) -> None:
        """What one says both see, the same bytes, with name, cid, number and time."""
        ann, bob = await lan.join("Ann"), await lan.join("Bob")
        now = time.time() * 1000
        cid = await ann.say("hi <b>Bob</b> & all\n二")
        at_ann = await ann.expect("message", text="hi <b>Bob</b> & all\n二", name="Ann", cid=cid, seq=1)
        at_bob = await bob.expect("message", seq=1)
        assert at_ann == at_bob
        assert set(at_ann) == {"type", "seq", "ts", "name", "text", "cid"}
        assert abs(at_ann["ts"] - now) < 1000 * RETURN
        for seq in (2, 3):  # without a cid it is said each time
            await bob.send('{"type": "say", "text": "hi Ann"}')
            assert not (await ann.expect("message", name="Bob", text="hi Ann", seq=seq)).get("cid")

    async def test_G3_one_order(self, lan: Lan) -> None:
        """Six people speak at once, at three daemons of a Redis: all see the same in one order, seq growing by one."""
        daemons = [await lan.serve() for _ in range(3 if lan.store.lasts else 1)]
        people = [await lan.join(f"P{n}", at=daemons[n % len(daemons)]) for n in range(6)]
        for n in range(20):
            await asyncio.gather(*(person.say(f"{n}") for person in people))
        logs = [[await person.expect("message") for _ in range(120)] for person in people]
        assert [message["seq"] for message in logs[0]] == list(range(1, 121))
        assert all(log == logs[0] for log in logs)
        for n in range(6):
            own = [message["text"] for message in logs[0] if message["name"] == f"P{n}"]
            assert own == [str(i) for i in range(20)]

    async def test_G7_wrong_input(self, memory_lan: Lan, caplog: pytest.LogCaptureFixture) -> None:
        """Wrong input is refused with its code; the log has one line at most of it, and nobody else is disturbed."""
        ann, bob = await memory_lan.join("Ann"), await memory_lan.join("Bob")
        caplog.set_level(logging.INFO)
        for frame, code in WRONG_FRAMES:
            caplog.clear()
            await ann.send(frame)
            assert (await ann.expect("refused", code=code))["text"]
            assert len(caplog.records) <= 1
        await ann.say("still here")
        await bob.expect("message", text="still here", seq=1)

    @pytest.mark.parametrize("size", [50_000, 1_000_000])
    async def test_a_frame_too_big(self, size: int, memory_lan: Lan, caplog: pytest.LogCaptureFixture) -> None:
        """A 50 KB frame closes the socket with 1009; the log has one line at most, and nobody else is disturbed."""
        ann, bob = await memory_lan.join("Ann"), await memory_lan.join("Bob")
        caplog.set_level(logging.INFO)
        caplog.clear()
        await ann.send(json.dumps({"type": "say", "text": "x" * size}))
        await ann.closed(1009)
        assert len(caplog.records) <= 1
        await bob.quiet()

    async def test_a_refusal_names_its_message(self, memory_lan: Lan) -> None:
        """A refusal carries the cid of what it refuses, so that the page can give the text back."""
        ann = await memory_lan.join("Ann")
        await ann.expect("refused", code="too-long", cid=await ann.say("x" * 4001))
        await ann.expect("refused", code="empty", cid=await ann.say("  "))
        await ann.send('{"type": "say", "text": "hi", "cid": "a b"}')
        assert "cid" not in await ann.expect("refused", code="bad-frame")

    @pytest.mark.parametrize("text", ["好" * 4000, "🎈" * 4000, '"\\\u2028</script>' * 100])
    async def test_4000_characters_escaped(self, text: str, memory_lan: Lan) -> None:
        """A text that the client escapes to ASCII is the same text, on the socket as by POST."""
        ann = await memory_lan.join("Ann")
        say = {"type": "say", "text": text, "cid": "c" * 64}
        await ann.send(json.dumps(say, ensure_ascii=True))
        await ann.expect("message", cid="c" * 64, text=text)
        body = json.dumps(say | {"cid": "d"})
        answer = await ann.fetch("/messages", "POST", body=body, Content_Type="application/json")
        assert (answer.code, json.loads(answer.body)["text"]) == (201, text)
        assert (await ann.post(text))[0] == 201

    async def test_G7_no_field_changes_the_speaker(self, lan: Lan) -> None:
        """Whatever a frame, a form or a query says: the speaker is who logged in, number and time are the room's."""
        ann, bob = await lan.join("Ann"), await lan.join("Bob")
        false = {"name": "Bob", "nickname": "Bob", "sid": "x", "session": "x", "seq": "99", "ts": "1", "epoch": "x"}
        false |= {"id": "9-9", "names": "Bob", "member": "Bob", "from": "Bob", "text": "hi"}
        path = "/messages?" + urllib.parse.urlencode(false | {"type": "left"})
        await (await ann.tab().connect(nickname="Bob")).closed(4409)
        await ann.connect(name="Bob", sid="x", session="x", seq="9")
        await ann.expect("welcome", name="Ann")
        await ann.send(json.dumps({"type": "say", "cid": "c1"} | false))
        heard = [await bob.expect("message", cid="c1")]
        await ann.fetch(path, form=false | {"cid": "c2", "type": "left"})
        heard.append(await bob.expect("message", cid="c2"))
        body = json.dumps(false | {"cid": "c3", "type": "left"})
        await ann.fetch(path, "POST", body=body, Content_Type="application/json", X_Forwarded_User="Bob")
        heard.append(await bob.expect("message", cid="c3"))
        for seq, message in enumerate(heard, 1):
            assert (message["name"], message["seq"], message["text"]) == ("Ann", seq, "hi")
            assert message["ts"] > 1_600_000_000_000
            assert set(message) == {"type", "seq", "ts", "name", "text", "cid"}

    async def test_too_fast(self, lan: Lan) -> None:
        """Five times the rate goes at once; what is more is refused with the wait, and nothing of it is stored."""
        await lan.serve(rate=1)
        ann, bob = await lan.join("Ann"), await lan.join("Bob")
        cids = [await ann.say(str(n)) for n in range(7)]
        refused: list[Frame] = []
        while len(refused) < 2:
            frame = await ann.frame()
            assert frame is not None
            if frame["type"] == "refused":
                refused.append(frame)
        assert [(frame["code"], frame["cid"]) for frame in refused] == [("too-fast", cid) for cid in cids[5:]]
        assert all(0 < frame["retry_after"] <= 5 and frame["text"] for frame in refused)
        await bob.expect_texts(0, 1, 2, 3, 4)
        await bob.quiet()

    async def test_G5_a_flooder_is_closed(self, lan: Lan) -> None:
        """Who goes on and on after being refused is closed with 4429; the others notice nothing."""
        await lan.serve(rate=1)
        ann, bob = await lan.join("Ann"), await lan.join("Bob")
        with contextlib.suppress(Exception):  # the daemon may close while we still write
            for n in range(2000):
                await ann.say(str(n))
        assert await ann.ended() == 4429
        await bob.expect_texts(0, 1, 2, 3, 4)
        await bob.quiet()

    async def test_G5_nonsense_without_end(self, lan: Lan) -> None:
        """A client that sends only what can't be understood is closed; one that errs now and then is not."""
        ann, bob = await lan.join("Ann"), await lan.join("Bob")
        for n in range(60):
            await bob.send("nonsense")
            await bob.expect("refused", code="bad-frame")
            await bob.say(str(n))
            await bob.expect("message", text=str(n))
        for _ in range(51):
            await ann.send("nonsense")
        assert await ann.ended() == 4429

    @pytest.mark.parametrize(
        "frames",
        [b"\x89\x80\0\0\0\0", b"\x8a\x80\0\0\0\0", b"\x00\x80\0\0\0\0", b"\x00\x81\0\0\0\0x"],
        ids=["pings", "pongs", "empty fragments", "fragments"],
    )
    async def test_G5_frames_that_say_nothing(self, frames: bytes, memory_lan: Lan) -> None:
        """A client may ping; one that sends nothing else is closed, and no more of it is read. The others chat on."""
        await memory_lan.serve(tick_seconds=2)
        bob, ann = await memory_lan.join("Bob"), await memory_lan.login("Ann")
        began = b"\x01\x80\0\0\0\0" if frames[0] == 0 else b""
        for count in (100, 5000):
            reader, writer = await handshake(ann.url, ann.headers()["Cookie"], began + frames * count)
            if count == 100:
                await bob.quiet()
                assert not reader.at_eof()
                continue
            heard = await asyncio.wait_for(reader.readuntil(b"\x11\x4dtoo many frames"), RETURN)
            assert heard.endswith(b"\x88\x11\x11\x4dtoo many frames")
            assert heard.count(b"\x8a\x00") <= tornchat.FRAMES_A_TICK + 1
            writer.transport.abort()
        await bob.quiet()

    async def test_speaking_after_being_turned_away(self, memory_lan: Lan) -> None:
        """What somebody says who was turned away is said to nobody."""
        ann = await memory_lan.join("Ann")
        frame = b'{"type":"say","text":"hi"}'
        reader, writer = await handshake(ann.url, after=bytes([0x81, len(frame)]) + frame)
        head = await asyncio.wait_for(reader.readexactly(4), RETURN)
        assert (head[0], int.from_bytes(head[2:])) == (0x88, 4401)
        writer.close()
        await ann.quiet()

    async def test_login_by_the_socket(self, lan: Lan) -> None:
        """?nickname= lets a script in without a cookie, or refuses it like the form: 4409 taken, 4403 for the rest."""
        await lan.serve(password="open")
        await lan.login("Ann", "open")
        refusals = [("Bob", "", 4403), ("Bob", "wrong", 4403), ("ann", "open", 4409), ("x" * 30, "open", 4403)]
        for nickname, password, code in refusals:
            refused = await lan.browser().connect(nickname=nickname, password=password)
            assert (await refused.ended(), refused.seen("welcome")) == (code, [])
        bob = await lan.browser().connect(nickname="Bob", password="open")
        await bob.expect("welcome", name="Bob")
        await bob.expect("message", cid=await bob.say("hi"), name="Bob")

    async def test_too_many_tabs(self, memory_lan: Lan) -> None:
        """A session may have ten sockets; the eleventh is closed with 4504, the ten go on."""
        ann = await memory_lan.login("Ann")
        tabs = [await ann.tab().connect() for _ in range(10)]
        for tab in tabs:
            await tab.expect("welcome")
        eleventh = await ann.tab().connect()
        await eleventh.closed(4504)
        await tabs[0].quiet()
        tabs[0].drop()
        await until(lambda: opens(ann.tab()))

    async def test_time(self, memory_lan: Lan) -> None:
        """The room's clock is told every time_seconds."""
        await memory_lan.serve(time_seconds=0.6, ping_seconds=0.6)
        ann = await memory_lan.join("Ann")
        first, second = await ann.expect("time"), await ann.expect("time")
        assert set(first) == {"type", "ts"}
        assert first["ts"] < second["ts"]
        assert abs(second["ts"] - time.time() * 1000) < 1000 * RETURN

    async def test_G6_a_dead_client(self, lan: Lan) -> None:
        await lan.serve(ping_seconds=0.5)
        bob, ann = await lan.join("Bob"), await lan.login("Ann")
        await bob.expect("joined", names=["Ann"])
        reader, writer = await handshake(ann.url, ann.headers()["Cookie"])
        await bob.expect("left", names=["Ann"])
        await asyncio.wait_for(reader.read(), RETURN)
        writer.close()

    async def test_G7_a_logged_out_socket_is_deaf(self, lan: Lan) -> None:
        """Who logs out and does not close the socket can't talk on it, not even when the name is somebody else's."""
        bob, ann = await lan.join("Bob"), await lan.login("Ann")
        reader, writer = await handshake(ann.url, ann.headers()["Cookie"])
        await ann.fetch("/logout", form={})
        await bob.expect("left", names=["Ann"])
        other = await lan.join("Ann")
        await bob.expect("joined", names=["Ann"])
        said = b'{"type":"say","text":"I am still Ann"}'
        writer.write(bytes((0x81, 0x80 | len(said), 0, 0, 0, 0)) + said)
        await other.say("I am Ann")
        await bob.expect("message", text="I am Ann", seq=1)
        writer.write(b"\x88\x80\0\0\0\0")
        heard = await asyncio.wait_for(reader.read(), RETURN)
        assert heard.endswith(b"\x88\x08\x11\x31logout")  # 4401, and nothing behind it
        writer.close()

    async def test_plain_text(self, lan: Lan) -> None:
        """With the subprotocol `text` every frame sent is a message, and every event that comes is a line."""
        ann = await lan.join("Ann")
        script = await lan.browser().connect(subprotocols=["text"], nickname="Script")
        assert script.socket.selected_subprotocol == "text"
        await ann.expect("joined", names=["Script"])
        await script.send("hello")
        await ann.expect("message", name="Script", text="hello")
        await ann.say("hi Script")
        lines = []
        while "Ann: hi Script" not in lines:
            line = await script.read()
            assert isinstance(line, str)
            lines.append(line)
        assert "Script: hello" in lines
        ann.drop()
        while (await script.read()) != "~~~ Ann left ~~~":
            pass
        await ann.connect(subprotocols=["mqtt"])  # which nobody here knows
        assert ann.socket.selected_subprotocol is None
        await ann.expect("welcome")

    @pytest.mark.parametrize("method", ["GET", "DELETE"])
    async def test_G5_gone_before_the_answer(
        self, method: str, memory_lan: Lan, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Who has reset the connection before there is an answer leaves nothing behind, neither here nor in the log."""
        daemon, prepare = await memory_lan.serve(), tornchat.ChatSocket.prepare
        asking: list[tornchat.ChatSocket] = []
        gone = asyncio.Event()

        async def slowly(handler: tornchat.ChatSocket) -> None:
            asking.append(handler)
            await gone.wait()
            await prepare(handler)

        monkeypatch.setattr(tornchat.ChatSocket, "prepare", slowly)
        _, writer = await asyncio.open_connection("127.0.0.1", daemon.port)
        writer.write(f"{method} /chat?nickname=Zoe HTTP/1.1\r\nHost: localhost\r\n{UPGRADE_LINES}\r\n".encode())
        await until(lambda: asking)
        reset(writer)
        await until(asking[0].stream.closed)
        gone.set()
        await memory_lan.join("Bob")
        assert len(daemon.sockets) == 1

    async def test_G6_gone_while_it_is_let_in(self, memory_lan: Lan, monkeypatch: pytest.MonkeyPatch) -> None:
        """Who is on the list, but hangs up before the welcome, leaves as after a closed tab."""
        daemon = await memory_lan.serve(lease_seconds=600)
        bob = await memory_lan.join("Bob")

        async def hang_up(seen: tornchat.ResumePoint) -> None:
            for handler in [*daemon.sockets]:
                if not handler.is_member():
                    handler.stream.close()

        monkeypatch.setattr(daemon.feed, "catch_up", hang_up)
        await handshake(bob.url, query="?nickname=Zoe")
        await bob.expect("joined", names=["Zoe"])
        await bob.expect("left", names=["Zoe"])

    async def test_a_connection_that_breaks_in_the_midst_of_a_write(self, memory_lan: Lan) -> None:
        """A connection that the client has reset is given up where the daemon finds out, and nobody else notices."""
        daemon = await memory_lan.serve()
        ann, bob = await memory_lan.join("Ann"), await memory_lan.join("Bob")
        stream = ann.socket.protocol.stream
        stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        stream.close()
        for _ in range(3):  # now, before the daemon's loop can see the end
            daemon.room.send(tornchat.Batch(tornchat.encode({"type": "time", "ts": 1})))
        await bob.quiet()
        await bob.expect("left", names=["Ann"])

    @slow
    async def test_G5_a_client_that_does_not_read(self, lan: Lan) -> None:
        """A client that stops reading is closed with 4008, leaves no trace, and may resume; others are not held up."""
        daemon, ann, tasks = await lan.serve(), await lan.join("Ann"), len(asyncio.all_tasks())
        bob = await lan.join("Bob")
        for n in range(1, 1801):  # about 21 MB: more than the kernel holds for Bob
            await ann.expect("message", cid=await ann.say("好" * 4000), seq=n)
        last = 0
        while (frame := await bob.frame()) is not None:
            if frame["type"] == "message":
                last += 1
                assert frame["seq"] == last
        assert bob.socket.close_code in (4008, None)  # the close frame may have stayed behind what was not read
        assert last < 1800
        await until(lambda: len(daemon.sockets) == 1 and len(asyncio.all_tasks()) <= tasks)
        await bob.connect(900, bob.epoch)
        await ann.say("the end")  # before Bob has read anything of 11 MB
        await ann.expect("message")
        assert (await bob.expect("welcome"))["recovered"] is True
        for seq in range(901, 1801):
            await bob.expect("message", seq=seq, text="好" * 4000)
        await bob.expect("message", seq=1801, text="the end")

    @pytest.mark.parametrize(
        ("text", "lag", "enough"),
        [("x", 0, 513), ("x" * 4000, 0, 65), ("x", 60, 13_000), ("x" * 4000, 60, 193)],
        ids=["events", "bytes", "events at once", "bytes at once"],
    )
    async def test_G5_what_waits_is_bounded(
        self, text: str, lag: float, enough: int, memory_lan: Lan, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Who takes nothing for a while may have 512 events and 256 KB waiting, who lags just now 768 KB; then 4008."""
        monkeypatch.setattr(tornchat, "LAG_SECONDS", lag or -1)
        daemon = await memory_lan.serve()
        bob = await memory_lan.join("Bob")
        (listener,) = daemon.room.listeners
        assert isinstance(listener, tornchat.ChatSocket)
        listener.wait([])
        event = tornchat.encode({"type": "message", "seq": 1, "ts": 1, "name": "Ann", "text": text})
        for _ in range(enough - 1):
            daemon.room.send(tornchat.Batch(event))
        assert listener in daemon.room.listeners
        for _ in range(1 + enough // 10):
            daemon.room.send(tornchat.Batch(event))
        assert listener not in daemon.room.listeners
        assert await bob.ended() == 4008

    async def test_a_socket_that_takes_nothing_just_now(self, memory_lan: Lan, monkeypatch: pytest.MonkeyPatch) -> None:
        """What a socket does not take at once it gets later, in order."""
        daemon = await memory_lan.serve()
        ann = await memory_lan.join("Ann")
        (listener,) = daemon.room.listeners
        assert isinstance(listener, tornchat.ChatSocket)
        write, refusals = listener.transmit, iter([BlockingIOError()] * 2)

        def full(data: memoryview) -> int | None:
            for refusal in refusals:
                raise refusal
            return write(data)

        monkeypatch.setattr(listener, "transmit", full)
        await ann.say_many(5)
        assert next(refusals, None) is None

    async def test_no_message_within_a_pong(self, memory_lan: Lan, monkeypatch: pytest.MonkeyPatch) -> None:
        """While a socket has taken only the beginning of a pong, a message waits for the rest of it."""
        daemon = await memory_lan.serve()
        ann = await memory_lan.login("Ann")
        reader, writer = await handshake(ann.url, ann.headers()["Cookie"])
        await until(lambda: daemon.room.listeners)
        (listener,) = daemon.room.listeners
        assert isinstance(listener, tornchat.ChatSocket)
        await until(lambda: not listener.stream.writing())
        write, room = listener.stream.write_to_fd, [1]

        def full(data: memoryview) -> int:
            if not room:
                raise BlockingIOError
            return write(data[: room.pop()])

        monkeypatch.setattr(listener.stream, "write_to_fd", full)
        writer.write(masked(0x89, b"are you there?"))
        await until(listener.stream.writing)
        message = tornchat.encode({"type": "message", "seq": 1, "ts": 1, "name": "Bob", "text": "yes"})
        daemon.room.send(tornchat.Batch(message))
        monkeypatch.setattr(listener.stream, "write_to_fd", write)
        pong = tornchat.ws_frame(b"are you there?", 0xA)
        assert (await asyncio.wait_for(reader.readuntil(message.frame), RETURN)).endswith(pong + message.frame)
        writer.close()


async def opens(browser: Browser) -> bool:
    await browser.connect()
    frame = await browser.frame()
    return frame is not None and frame["type"] == "welcome"


# === Resume ===========================================================================================================


class TestResume(Transcripts):
    async def test_a_newcomer_gets_the_newest_hundred(self, lan: Lan) -> None:
        """250 messages said, then a newcomer: exactly 151 to 250, in order, once, then the live ones."""
        ann = await lan.join("Ann")
        await ann.say_many(250)
        bob = await lan.join("Bob")
        assert (bob.welcome["seq"], bob.welcome["recovered"], bob.welcome["missed"]) == (250, False, 0)
        for number in range(151, 251):
            await bob.expect("message", seq=number, text=str(number))
        await ann.say_many(3, first=251)
        await bob.expect_texts(251, 252, 253)
        await bob.quiet()

    @slow
    async def test_three_hundred_newcomers(self, lan: Lan) -> None:
        """300 newcomers join while messages flow: each sees the newest 100 and everything after, no gap, no double."""
        ann = await lan.join("Ann")
        await ann.say_many(150)

        async def come(number: int) -> Browser:
            newcomer = await lan.login(f"N{number}")
            await ann.say(f"N{number} is coming")
            await newcomer.connect()
            await ann.say(f"N{number} is connected")
            newcomer.welcome = await newcomer.expect("welcome")
            return newcomer

        newcomers: list[Browser] = []
        for start in range(0, 300, 60):
            newcomers += await asyncio.gather(*(come(number) for number in range(start, start + 60)))
            for _ in range(120):
                await ann.expect("message")
        for newcomer in newcomers:
            first = newcomer.welcome["seq"] - 99
            assert first >= 51
            for seq in range(first, 751):
                await newcomer.expect("message", seq=seq)

    @slow
    @pytest.mark.parametrize(("away", "recovered", "missed", "first"), [(1000, True, 0, 1), (1500, False, 1400, 1401)])
    async def test_G2_away(self, lan: Lan, away: int, recovered: bool, missed: int, first: int) -> None:
        """Away for 1,000: all of them. Away for 1,500: told that it missed 1,400 and shown 100."""
        await lan.serve(grace_seconds=60)
        ann, bob = await lan.join("Ann"), await lan.join("Bob")
        ann.drop()
        await bob.say_many(away)
        welcome = await ann.resume()
        assert (welcome["recovered"], welcome["missed"], welcome["reset"]) == (recovered, missed, False)
        for seq in range(first, away + 1):
            await ann.expect("message", seq=seq, text=str(seq))
        await ann.quiet()

    async def test_G2_another_history(self, lan: Lan) -> None:
        """Who comes with another epoch, or from a number not yet reached, is told reset and shown what is there."""
        ann = await lan.join("Ann")
        await ann.say_many(3)
        for after, epoch in [(2, "other"), (3, "other"), (99, ann.epoch)]:
            await ann.connect(after, epoch)
            await ann.expect("welcome", reset=True, recovered=False, missed=0, seq=3)
            await ann.expect_texts(1, 2, 3)

    async def test_G4_the_same_cid_twice(self, lan: Lan) -> None:
        """The same cid sent twice: one message, nothing more where it was delivered; another person's is another."""
        ann, bob = await lan.join("Ann"), await lan.join("Bob")
        await ann.say("hi", cid="c1")
        await ann.say("hi", cid="c1")
        await ann.expect("message", cid="c1", seq=1)
        await ann.say("hi", cid="c1")
        await ann.quiet()
        await bob.expect_texts("hi", "(is anything else coming?)")
        await bob.say("I am Bob", cid="c1")
        await ann.expect("message", name="Bob", text="I am Bob")

    async def test_G4_the_same_cid_after_being_shown_it_again(self, lan: Lan) -> None:
        """A client that lost the confirmation and says it again hears it once: the replay is the confirmation."""
        ann, bob = await lan.join("Ann"), await lan.join("Bob")
        await ann.say("hi", cid="c1")
        await bob.expect("message", cid="c1")
        ann.drop()  # before it has read the confirmation
        await ann.resume()
        await ann.say("hi", cid="c1")
        await ann.expect("message", cid="c1", seq=1)
        await ann.quiet()

    async def test_G4_the_same_cid_after_a_reconnect(self, lan: Lan) -> None:
        """A cid said again on a new connection, at any daemon, is confirmed with the stored message, to the sender."""
        first = await lan.serve()
        second = await lan.serve() if lan.store.lasts else first
        ann, bob = await lan.join("Ann", at=first), await lan.join("Bob", at=second)
        await ann.say("hi", cid="c1")
        stored = await ann.expect("message", cid="c1")
        there = ann.tab(at=second)
        await there.connect(stored["seq"], ann.epoch)
        assert (await there.expect("welcome"))["recovered"] is True
        await there.say("hi again", cid="c1")
        assert await there.expect("message") == stored
        await there.quiet()
        await bob.expect_texts("hi", "(is anything else coming?)")

    async def test_G2_restart(self, lan: Lan) -> None:
        """A daemon restarts: over a Redis all goes on; without one the session is unknown, and history is reset."""
        ann = await lan.join("Ann")
        await ann.say_many(3)
        await lan.restart()
        if lan.store.lasts:
            assert (await ann.resume())["recovered"] is True
            await ann.say_many(1, first=4)
            assert ann.seen("message")[-1]["seq"] == 4
            return
        await ann.connect(ann.after, ann.epoch)
        await ann.closed(4401)
        await ann.login("Ann")
        welcome = await ann.resume()
        assert (welcome["reset"], welcome["recovered"], welcome["seq"]) == (True, False, 0)
        await ann.say_many(1)


# === Polling ==========================================================================================================


def texts_of(events: Iterable[Frame]) -> list[str]:
    return [event["text"] for event in events if event["type"] == "message"]


def kinds_of(events: Iterable[Frame]) -> list[str]:
    return [event["type"] for event in events]


async def hanging_poll(browser: Browser, daemon: tornchat.Daemon) -> asyncio.StreamWriter:
    """A request that waits, on a connection that can be cut."""
    _, connection = await asyncio.open_connection("127.0.0.1", daemon.port)
    cookie = browser.headers()["Cookie"]
    path = f"/messages?after={browser.after}&epoch={browser.epoch}&last={browser.last}&wait=30"
    connection.write(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nCookie: {cookie}\r\n\r\n".encode())
    return connection


async def waits(daemon: tornchat.Daemon, count: int = 1) -> None:
    """Wait until so many listeners are in the room: polls that wait, and sockets."""
    await until(lambda: len(daemon.room.listeners) == count)


class TestMessages(Transcripts):
    async def test_a_conversation_by_polling(self, lan: Lan) -> None:
        """Ann has only HTTP, Bob a socket: both see everything, in one order."""
        bob, ann = await lan.join("Bob"), lan.browser()
        await bob.say("before Ann")
        await bob.expect("message", text="before Ann")
        await ann.login("Ann")
        welcome, first = await ann.poll()
        assert (welcome["type"], welcome["name"], sorted(welcome["members"])) == ("welcome", "Ann", ["Ann", "Bob"])
        assert (welcome["recovered"], welcome["missed"], welcome["reset"]) == (False, 0, False)
        assert first["text"] == "before Ann"
        status, stored = await ann.post("hello", "c1")
        assert (status, stored["type"], stored["name"], stored["seq"]) == (201, "message", "Ann", 2)
        assert await bob.expect("message", text="hello") == stored
        await bob.say("welcome")
        await bob.expect("message", text="welcome")
        assert texts_of(await ann.poll()) == ["hello", "welcome"]
        assert await ann.poll() == []
        assert ann.seen("message") == [first, *bob.seen("message")[1:]]

    async def test_what_is_refused(self, memory_lan: Lan) -> None:
        """A form or JSON that is no message is refused with a code, and so is a wait that is no number."""
        ann = await memory_lan.join("Ann")
        for form, status, code in [
            ("", 400, "bad-frame"),
            ("text=", 400, "empty"),
            ("text=+%0a+", 400, "empty"),
            ("text=x&cid=", 400, "bad-frame"),
            ("text=x&cid=a+b", 400, "bad-frame"),
            ("text=" + "x" * 4001, 413, "too-long"),
            ("text=%ff", 400, 400),
        ]:
            answer = await ann.fetch("/messages", "POST", body=form, Content_Type="application/x-www-form-urlencoded")
            assert (answer.code, json.loads(answer.body)["code"]) == (status, code)
        for body in ("", "{", "[]", "7", '{"text": 7}', '{"text": "x", "cid": 7}', "[" * 9000):
            answer = await ann.fetch("/messages", "POST", body=body, Content_Type="application/json")
            assert (answer.code, json.loads(answer.body)["code"]) == (400, "bad-frame")
        for wait in ("soon", "-1", "nan", ""):
            assert await verdict(ann.messages(wait=wait)) == (400, "bad-frame")
        await ann.quiet()

    async def test_without_a_session(self, memory_lan: Lan) -> None:
        await memory_lan.serve()
        stranger = memory_lan.browser(language="zh")
        assert await stranger.messages() == (401, {"type": "refused", "code": "no-session", "text": "请先登录。"})
        assert (await stranger.post("hello"))[0] == 401

    async def test_nothing_comes(self, memory_lan: Lan, monkeypatch: pytest.MonkeyPatch) -> None:
        """A wait ends by itself: an empty answer, not an error; nobody may wait for longer than POLL_SECONDS."""
        monkeypatch.setattr(tornchat, "POLL_SECONDS", 0.1)
        ann = await memory_lan.login("Ann")
        await ann.poll()
        place = ann.after, ann.epoch, ann.last
        assert await ann.poll(wait=0.05) == []
        assert await ann.poll(wait=1e9) == []
        assert place == (ann.after, ann.epoch, ann.last)

    async def test_comings_and_goings(self, lan: Lan) -> None:
        """What has no seq comes once and in its place: while one waits, and between two polls."""
        daemon = await lan.serve()
        ann = await lan.login("Ann")
        await ann.poll()
        waiting = asyncio.create_task(ann.poll(wait=30))
        await waits(daemon)
        bob = await lan.join("Bob")
        assert [event["names"] for event in await waiting] == [["Bob"]]
        await bob.say("1")
        await bob.expect("message", text="1")
        eve = await lan.join("Eve")
        await bob.expect("joined", names=["Eve"])
        await bob.say("2")
        await bob.expect("message", text="2")
        await eve.fetch("/logout", form={})
        await bob.expect("left", names=["Eve"])
        assert kinds_of(await ann.poll()) == ["message", "joined", "message", "left"]
        assert await ann.poll() == []

    async def test_comings_and_goings_without_a_cursor(self, memory_lan: Lan) -> None:
        """A script that gives back only `after` hears of them too."""
        ann = await memory_lan.login("Ann")
        _, answer = await ann.messages()
        place = answer["seq"], answer["epoch"]
        await memory_lan.join("Bob")
        _, answer = await ann.messages(*place)
        assert [event["names"] for event in answer["events"]] == [["Bob"]]
        _, answer = await ann.messages(*place)
        assert answer["events"] == []

    async def test_a_lost_answer(self, memory_lan: Lan) -> None:
        """Who asks again from the same place is told the same."""
        ann = await memory_lan.login("Ann")
        await ann.poll()
        place: dict[str, Any] = {"after": ann.after, "epoch": ann.epoch, "last": ann.last}
        bob = await memory_lan.join("Bob")
        await bob.say("1")
        await bob.expect("message")
        first = await ann.messages(**place)
        assert kinds_of(first[1]["events"]) == ["joined", "message"]
        assert await ann.messages(**place) == first

    async def test_G5_long_answers_come_in_parts(self, memory_lan: Lan, monkeypatch: pytest.MonkeyPatch) -> None:
        """What is too much for one answer comes with the next ones, in its order; nothing twice."""
        monkeypatch.setattr(tornchat, "POLL_BYTES", 1000)
        bob, ann = await memory_lan.join("Bob"), await memory_lan.login("Ann")
        for name in ("Eve", "Mallory"):
            for number in range(4):
                await bob.say(f"{name} {number}".ljust(200, "x"))
                await bob.expect("message")
            await memory_lan.browser().login(name)
            await bob.expect("joined", names=[name])
        first = await ann.poll()
        assert kinds_of(first) == ["welcome", "message", "message", "message"]
        assert kinds_of(await ann.poll()) == ["message", "message", "message"]
        await memory_lan.browser().login("Trent")
        assert kinds_of(await ann.poll()) == ["message", "message", "joined"]
        assert await ann.poll() == []
        monkeypatch.setattr(tornchat, "POLL_BYTES", 100)
        await bob.say("longer than what is told at once".ljust(200, "x"))
        await bob.expect("message", name="Bob")
        assert kinds_of(await ann.poll()) == ["message"]
        assert await ann.poll() == []

    @pytest.mark.parametrize("cursor", ["", "nonsense", "1-0", "99999999999999999-0", "-1-0"])
    async def test_a_cursor_that_leads_nowhere(self, cursor: str, memory_lan: Lan) -> None:
        """The welcome tells who is here; no message comes twice, none is lost."""
        ann = await memory_lan.join("Ann")
        await ann.say_many(3)
        _, answer = await ann.messages(2, ann.epoch, last=cursor)
        welcome, message = answer["events"]
        assert (welcome["type"], welcome["recovered"], welcome["missed"]) == ("welcome", True, 0)
        assert message["text"] == "3"

    async def test_more_notices_than_are_kept(self, memory_lan: Lan, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(tornchat, "RING_MESSAGES", 3)
        await memory_lan.serve(history=0)
        ann = await memory_lan.login("Ann")
        await ann.poll()
        place: dict[str, Any] = {"after": ann.after, "epoch": ann.epoch}
        for name in ("P1", "P2", "P3"):
            await memory_lan.browser().login(name)
        assert kinds_of((await ann.messages(**place, last=ann.last))[1]["events"]) == ["joined"] * 3
        await memory_lan.browser().login("P4")
        assert kinds_of((await ann.messages(**place, last=ann.last))[1]["events"]) == ["welcome"]

    async def test_G2_from_socket_to_poll_and_back(self, lan: Lan) -> None:
        """Ann changes the transport after every few messages: nothing is lost, nothing comes twice."""
        bob, ann = await lan.join("Bob"), await lan.join("Ann")
        for first in range(1, 60, 6):
            await bob.say_many(3, first)
            if first % 12 == 1:
                await ann.expect_texts(*range(first, first + 2))
                await bob.say_many(3, first + 3)
                ann.last = ""
                events = await ann.poll()
                assert kinds_of(events)[0] == "welcome"
                ann.drop()
            else:
                await bob.say_many(3, first + 3)
                await ann.poll()
                await ann.resume()
        await ann.poll()
        assert texts_of(ann.frames) == [str(number) for number in range(1, 61)]

    async def test_G2_polls_at_two_daemons_in_turn(self, redis_lan: Lan) -> None:
        """A balancer sends every request somewhere else."""
        here, there = await redis_lan.serve(), await redis_lan.serve()
        bob, ann = await redis_lan.join("Bob", at=here), redis_lan.browser(here)
        await ann.login("Ann")
        for number in range(20):
            ann.url = f"http://127.0.0.1:{(here, there)[number % 2].port}"
            await bob.say(str(number))
            await bob.expect("message", text=str(number))
            await ann.poll()
        assert texts_of(ann.frames) == [str(number) for number in range(20)]
        assert kinds_of(ann.frames).count("welcome") <= 2  # one for each daemon's notices

    async def test_G4_the_same_cid_at_once(self, lan: Lan) -> None:
        """Ten impatient posts of one message, and one over the socket: it is stored once, each is told the same."""
        ann = await lan.join("Ann")
        answers = await asyncio.gather(*(ann.post("once", "c1") for _ in range(10)))
        assert [status for status, _ in answers] == [201] * 10
        assert len({frame["seq"] for _, frame in answers}) == 1
        assert await ann.expect("message") == answers[0][1]
        await ann.say("once", "c1")
        await ann.quiet()

    async def test_a_logout_fills_no_bucket(self, memory_lan: Lan) -> None:
        """The pace belongs to the cookie: whoever logs out and goes on with it goes on at the same pace."""
        await memory_lan.serve(rate=0.1)
        ann = await memory_lan.login("Ann")
        copied = dict(ann.cookies)
        assert [(await ann.post(text))[0] for text in "12"] == [201, 429]
        await ann.fetch("/logout", form={})
        ann.cookies = copied
        assert (await ann.post("3"))[0] == 429

    async def test_too_fast(self, memory_lan: Lan) -> None:
        """The pace is the session's, whichever way it speaks; the answer says how long to wait."""
        await memory_lan.serve(rate=1)
        ann = await memory_lan.join("Ann")
        for number in range(4):
            await ann.say(str(number))
            await ann.expect("message", text=str(number))
        assert (await ann.post("the fifth"))[0] == 201
        answer = await ann.fetch("/messages", form={"text": "too much", "cid": "c9"})
        frame = json.loads(answer.body)
        assert (answer.code, frame["code"], frame["cid"]) == (429, "too-fast", "c9")
        assert 0 < frame["retry_after"] <= 1
        assert answer.headers["Retry-After"] == "1"

    async def test_G8_the_store_is_gone(self, own_redis: RedisServer, own_lan: Lan) -> None:
        """A poll that waits is told, and so is one that comes later; what is posted is refused."""
        daemon = await own_lan.serve(confirm_seconds=0.3)
        ann = await own_lan.login("Ann")
        await ann.poll()
        place: dict[str, Any] = {"after": ann.after, "epoch": ann.epoch, "last": ann.last}
        waiting = asyncio.create_task(ann.poll(wait=30))
        await waits(daemon)
        own_redis.kill()
        assert [event["available"] for event in await waiting] == [False]
        _, answer = await ann.messages(**place)
        assert [event["available"] for event in answer["events"]] == [False]
        status, frame = await ann.post("hello", "c1")
        assert (status, frame["code"], frame["cid"]) == (503, "unavailable", "c1")
        assert kinds_of((await ann.messages())[1]["events"]) == ["welcome", "store"]
        waiting = asyncio.create_task(ann.poll(wait=30))
        await waits(daemon)
        own_redis.start()
        assert [event["available"] for event in await waiting] == [True]

    async def test_G6_a_poller_is_present(self, lan: Lan) -> None:
        """While a request waits the name stays, whatever the grace; when it is cut off, it leaves."""
        daemon = await lan.serve(lease_seconds=0.3, ping_seconds=0.6, time_seconds=0.6)
        bob, ann = await lan.join("Bob"), await lan.login("Ann")
        await ann.poll()
        connection = await hanging_poll(ann, daemon)
        await waits(daemon, 2)
        for _ in range(2):  # more than three leases
            await bob.expect("time")
        assert bob.names_in("left") == []
        connection.transport.abort()
        await waits(daemon, 1)
        await bob.expect("left", names=["Ann"])

    async def test_G6_between_two_polls(self, lan: Lan) -> None:
        """An answered poller has time to come back; who doesn't has left, and is back with the next request."""
        await lan.serve(poller_seconds=0.2)
        bob, ann = await lan.join("Bob"), await lan.login("Ann")
        await ann.poll()
        await bob.expect("left", names=["Ann"])
        assert kinds_of(await ann.poll())[-1] == "joined"
        await bob.expect("joined", names=["Ann"])

    async def test_G6_a_dead_poller(self, lan: Lan, monkeypatch: pytest.MonkeyPatch) -> None:
        """Whoever dies while a request waits for long is not given the time of somebody who has just asked."""
        monkeypatch.setattr(tornchat, "POLL_SECONDS", 0.1)
        monkeypatch.setattr(HTTPServerRequest, "request_time", lambda request: 1000)
        daemon = await lan.serve(poller_seconds=1000)
        bob, ann = await lan.join("Bob"), await lan.login("Ann")
        await ann.poll()
        connection = await hanging_poll(ann, daemon)  # and nobody reads the answer
        await bob.expect("left", names=["Ann"])
        connection.close()

    async def test_G7_name_lost(self, lan: Lan) -> None:
        """Ann was away, and another Ann has come: the first can neither read nor write under that name."""
        await lan.serve(poller_seconds=0.1)
        bob, ann = await lan.join("Bob"), await lan.login("Ann")
        await ann.poll()
        await bob.expect("left", names=["Ann"])
        await lan.browser().login("Ann")
        for answer in (ann.messages(), ann.post("hello")):
            assert await verdict(answer) == (409, "name-lost")

    async def test_G9_stopping_ends_a_wait(self, lan: Lan) -> None:
        """Who waits while the daemon is stopped is told to come again."""
        daemon = await lan.serve()
        ann = await lan.login("Ann")
        await ann.poll()
        waiting = asyncio.create_task(ann.messages(ann.after, ann.epoch, wait=30))
        await waits(daemon)
        await daemon.stop()
        status, frame = await waiting
        assert (status, frame["code"], frame["retry_after"]) == (503, "unavailable", 1)

    async def test_too_many_waits(self, memory_lan: Lan) -> None:
        daemon = await memory_lan.serve()
        ann = await memory_lan.login("Ann")
        await ann.poll()
        waiting = [asyncio.create_task(ann.messages(ann.after, ann.epoch, wait=30)) for _ in range(10)]
        await waits(daemon, 10)
        assert await verdict(ann.messages(ann.after, ann.epoch, wait=30)) == (429, "too-many-tabs")
        assert (await ann.post("for all ten"))[0] == 201
        assert {tuple(texts_of(answer["events"])) for _, answer in await asyncio.gather(*waiting)} == {("for all ten",)}

    async def test_G5_polls_given_up(self, memory_lan: Lan) -> None:
        """Whoever hangs up leaves nothing behind: no listener, no descriptor, no task."""
        daemon = await memory_lan.serve()
        ann = await memory_lan.login("Ann")
        await ann.poll()
        before, tasks = len(os.listdir("/dev/fd")), len(asyncio.all_tasks())
        for _ in range(20):
            connections = [await hanging_poll(ann, daemon) for _ in range(10)]
            await waits(daemon, 10)
            for connection in connections:
                connection.transport.abort()
            await waits(daemon, 0)
        await until(lambda: len(os.listdir("/dev/fd")) <= before and len(asyncio.all_tasks()) <= tasks)
        assert ann.after == 0
        assert await ann.poll() == []


# === Pictures =========================================================================================================


def chunk(kind: bytes, body: bytes = b"") -> bytes:
    """One of PNG."""
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(*more: bytes, width: int = 8, height: int = 6) -> bytes:
    """With more chunks before the pixels."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress((b"\0" + 8 * b"\x99") * 6))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(more) + pixels + chunk(b"IEND")


def gif(*more: bytes, width: int = 8, height: int = 6, wide: int = 8) -> bytes:
    """With more blocks before its one image, which is so wide."""
    screen = b"GIF89a" + struct.pack("<HHBBB", width, height, 0x80, 0, 0) + b"\xcc\x33\x33\xff\xff\xff"
    pixels = b"\x07\x32\x80" + 48 * b"\0" + b"\x81\0"
    return screen + b"".join(more) + b"," + struct.pack("<HHHHB", 0, 0, wide, 6, 0) + pixels + b";"


def webp(*chunks: tuple[bytes, bytes]) -> bytes:
    parts = [kind + struct.pack("<I", len(body)) + body + b"\0" * (len(body) % 2) for kind, body in chunks]
    return b"RIFF" + struct.pack("<I", 4 + len(b"".join(parts))) + b"WEBP" + b"".join(parts)


def canvas(width: int, height: int) -> tuple[bytes, bytes]:
    """The chunk of WebP that tells how large everything is."""
    return b"VP8X", bytes(4) + (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")


JPEG = base64.b64decode(
    "/9j/4AAQSkZJRgABAQAAAQABAAD/2wBDAFA3PEY8MlBGQUZaVVBfeMiCeG5uePWvuZHI//////////////////////////////////////////////"
    "//////2wBDAVVaWnhpeOuCguv/////////////////////////////////////////////////////////////////////////wAARCAAGAAgDASIA"
    "AhEBAxEB/8QAFQABAQAAAAAAAAAAAAAAAAAAAAL/xAAUEAEAAAAAAAAAAAAAAAAAAAAA/8QAFQEBAQAAAAAAAAAAAAAAAAAAAgP/xAAUEQEAAAAA"
    "AAAAAAAAAAAAAAAA/9oADAMBAAIRAxEAPwCABXf/2Q=="
)
FRAME = JPEG.index(b"\xff\xc0")  # of it: there its height and width stand
LOSSY = b"VP8 ", base64.b64decode("cAEAnQEqCAAGAAdAliWgAnQBQAAA/tomxcMhiPyS9SflYIgA")
LOSSLESS = b"VP8L", base64.b64decode("LwdAAQAH0Jkyd6b/gYjofwA=")
PAGE = b"<html><script>alert(1)</script></html>"
SVG = b'<svg xmlns="http://www.w3.org/2000/svg" onload="alert(1)"/>'

PICTURES = {
    "png": ("image/png", png()),
    "png, with a text": ("image/png", png(chunk(b"tEXt", b"Title\0A < B"))),
    "jpeg": ("image/jpeg", JPEG),
    "gif": ("image/gif", gif()),
    "gif, with a pause": ("image/gif", gif(b"!\xf9\x04\0\x0a\0\0\0")),
    "webp, lossy": ("image/webp", webp(LOSSY)),
    "webp, lossless": ("image/webp", webp(LOSSLESS)),
    "webp, extended": ("image/webp", webp(canvas(8, 6), LOSSY)),
}
CHUNKS = png(80_000 * chunk(b"tEXt"))
LIES = [b"", SVG, b'<?xml version="1.0"?>' + SVG, b"\xef\xbb\xbf<!doctype html>" + PAGE, PAGE + JPEG, bytes(2_000_000)]
LIES += [b"%PDF-1.4\n1 0 obj", b"PK\3\4" + bytes(26), b"\0\0\0\x20ftypavif" + bytes(20)]
LIES += [picture + PAGE for picture in (png(), JPEG, gif(), webp(LOSSY))]
LIES += [picture[:-10] for picture in (png(), JPEG, gif(), webp(LOSSY))]
# With a page within; with dimensions that nobody could draw; with parts too many, or too large.
LIES += [png(chunk(b"tEXt", b"Title\0" + PAGE)), gif(b"!\xfe" + bytes([len(PAGE)]) + PAGE + b"\0")]
LIES += [JPEG[:2] + b"\xff\xfe" + struct.pack(">H", 2 + len(PAGE)) + PAGE + JPEG[2:], webp(LOSSY, (b"XMP ", PAGE))]
LIES += [png(width=0), png(width=30_000, height=30_000), png(width=40_000_000), gif(width=30_000, height=30_000)]
LIES += [JPEG[: FRAME + 5] + struct.pack(">HH", 30_000, 30_000) + JPEG[FRAME + 9 :]]
LIES += [webp(canvas(16_000, 16_000), (b"ANMF", bytes(16))), webp(canvas(8, 7), LOSSY), gif(wide=9000)]
LIES += [CHUNKS, JPEG[:2] + 200_000 * b"\xff\xe0\0\2" + JPEG[2:], webp(LOSSY, *(100_000 * [(b"XMP ", b"")]))]
LIES += [gif(b"!\xfe" + 200_000 * b"\1x" + b"\0"), gif(200_000 * b"!\xfe\0"), png(chunk(b"teXt", bytes(1_100_000)))]
# PNG: a wrong checksum, no header, two of them, no pixels, a chunk that never ends. JPEG: no end in sight, two frames.
# GIF: a script, no image. WebP: a sound.
LIES += [png().replace(b"IDAT", b"IDAt"), png()[:8] + png()[33:], png()[:33] + png()[8:], png()[:33] + chunk(b"IEND")]
LIES += [png()[:33] + b"\xff\xff\xff\xffIDAT" + png()[33:], JPEG[:-2] + 1_000_000 * b"\xff"]
LIES += [JPEG[: FRAME + 19] + JPEG[FRAME:], b"GIF89a/*" + bytes(40) + b"*/=1;alert(1);", gif()[:19] + b";"]
LIES += [webp(LOSSY).replace(b"WEBP", b"WAVE")]


async def upload(
    browser: Browser, data: bytes = PICTURES["png"][1], kind: str = "image/png", **headers: Any
) -> tuple[int, Frame]:
    """Send a picture; the status and what the JSON says."""
    answer = await browser.fetch("/pictures", "POST", body=data, Content_Type=kind, **headers)
    return answer.code, json.loads(answer.body)


async def show(browser: Browser, picture: str, text: str = "") -> Frame:
    """Say something with a picture."""
    cid = next(browser.cids)
    await browser.send(json.dumps({"type": "say", "text": text, "cid": cid, "picture": picture}))
    return await browser.expect("message", cid=cid, text=text)


class TestPictureStore(Transcripts):
    async def test_shown(self, lan: Lan) -> None:
        """What is sent as a picture is seen by everybody, with its size beforehand; to plain lines it is an address."""
        await lan.serve()
        ann, bob = await lan.join("Ann"), await lan.join("Bob")
        wscat = await lan.browser().connect(subprotocols=["text"], nickname="Cat")
        status, picture = await upload(ann)
        assert (status, picture["width"], picture["height"]) == (201, 8, 6)
        await ann.expect("joined", names=["Cat"])
        await show(ann, picture["id"], "look")
        await bob.expect("message", name="Ann", text="look", picture=picture)
        status, said = await ann.post("", picture=picture["id"])
        assert (status, said["picture"]) == (201, picture)
        await bob.expect("message", name="Ann", text="", picture=picture)
        seen = await bob.fetch(f"/pictures/{picture['id']}")
        assert (seen.code, seen.body) == (200, PICTURES["png"][1])
        line = f"[picture /pictures/{picture['id']}]"
        while (heard := str(await wscat.read())).startswith("~~~"):
            pass
        assert [heard, await wscat.read()] == [f"Ann: look\n    {line}", f"Ann: {line}"]
        newcomer = await lan.join("Eve")
        await newcomer.expect("message", text="look", picture=picture)

    @pytest.mark.parametrize("what", PICTURES)
    async def test_types(self, memory_lan: Lan, what: str) -> None:
        """The type is taken from the bytes, and nothing can be done with a picture but look at it."""
        kind, data = PICTURES[what]
        await memory_lan.serve()
        ann = await memory_lan.join("Ann")
        status, picture = await upload(ann, data, "text/html")
        assert (status, picture["width"], picture["height"]) == (201, 8, 6)
        seen = await ann.fetch(f"/pictures/{picture['id']}")
        assert seen.body == data
        for header, value in {
            "Content-Type": kind,
            "X-Content-Type-Options": "nosniff",
            "Content-Security-Policy": "default-src 'none'; sandbox",
            "Cache-Control": "private, max-age=31536000, immutable",
        }.items():
            assert seen.headers[header] == value

    async def test_lies(self, memory_lan: Lan) -> None:
        """Whatever says that it is a picture, and isn't one from its first byte to its last, is refused in words."""
        daemon = await memory_lan.serve()
        ann = await memory_lan.join("Ann")
        assert len(LIES) >= 40
        for number, data in enumerate(LIES):
            status, told = await upload(ann, data)
            assert (status, told["code"]) in ((415, "bad-picture"), (413, "too-long")), (number, data[:50])
            assert told["text"].endswith(".")
        film = f"POST /pictures HTTP/1.1\r\nHost: localhost\r\nCookie: {ann.headers()['Cookie']}\r\n"
        assert b" 413 " in await exchange(ann.port, f"{film}Content-Length: 9000000\r\n\r\n".encode(), b"\r\n")
        assert await daemon.store.redis.keys("*picture*") == []
        assert (await upload(ann))[0] == 201

    @slow
    async def test_bounded(self, lan: Lan) -> None:
        """Of a thousand pictures the newest that 32 MB hold are kept, whichever daemon took them; the rest is gone."""
        first = await lan.serve()
        second = await lan.serve() if lan.store.lasts else first
        ids = [f"{number:016x}-8x6-{'0' * 16}" for number in range(1000)]
        data = PICTURES["png"][1].ljust(100_000, b"\0")
        for number, id in enumerate(ids):
            await (first, second)[number % 2].store.add_picture(id, data)
        kept = 32 * 2**20 // len(data)
        ann = await lan.join("Ann", first)
        for daemon in (first, second):
            eve = ann.tab(daemon)
            for id, status in ((ids[-1], 200), (ids[-kept], 200), (ids[-kept - 1], 404), (ids[0], 404)):
                assert (await eve.fetch(f"/pictures/{id}")).code == status
        keys = await first.store.redis.keys(f"{first.store.picture}*")
        assert sum([await first.store.redis.strlen(key) for key in keys]) <= 32 * 2**20
        assert len(keys) == kept == await first.store.redis.hlen(first.store.pictures)

    async def test_members_only(self, memory_lan: Lan) -> None:
        """Without a member's cookie nobody sees or sends a picture; a picture is said by who has sent it alone."""
        await memory_lan.serve()
        ann, bob, stranger = await memory_lan.join("Ann"), await memory_lan.join("Bob"), memory_lan.browser()
        _, picture = await upload(ann)
        assert (await stranger.fetch(f"/pictures/{picture['id']}")).code == 403
        assert await verdict(upload(stranger)) == (401, "no-session")
        evil = await ann.fetch("/pictures", "POST", body=PICTURES["png"][1], Origin="http://evil.example")
        assert evil.code == 403
        for number, id in enumerate((picture["id"], picture["id"][:-1], "x", "0" * 16 + "-8x6-" + "0" * 16, 7, ["x"])):
            await bob.send(json.dumps({"type": "say", "text": "mine", "cid": f"c{number}", "picture": id}))
            await bob.expect("refused", code="no-picture", cid=f"c{number}")
        gone = await ann.fetch(f"/pictures/{picture['id'][:-1]}z")
        assert gone.code == 404

    async def test_pace(self, memory_lan: Lan) -> None:
        """A picture and the message that shows it cost the pace of ten messages; one comes in at a time."""
        daemon = await memory_lan.serve(rate=2.0)
        ann = await memory_lan.join("Ann")
        _, picture = await upload(ann)
        await show(ann, picture["id"])
        await ann.say("and another thing")
        await ann.expect("refused", code="too-fast")
        bob = await memory_lan.join("Bob")
        _, writer = await asyncio.open_connection("127.0.0.1", daemon.port)
        head = "POST /pictures HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99"
        writer.write(f"{head}\r\nCookie: {bob.headers()['Cookie']}\r\n\r\nhalf".encode())
        await until(lambda: daemon.uploads)
        assert await verdict(upload(bob)) == (429, "too-fast")
        writer.close()
        await until(lambda: not daemon.uploads)
        assert (await upload(bob))[0] == 201

    async def test_G5_stalled_uploads(self, memory_lan: Lan, monkeypatch: pytest.MonkeyPatch) -> None:
        """Eve stalls as many uploads as there may be: the oldest gives way to another address, or once it is old."""
        monkeypatch.setattr(tornchat, "UPLOADS_AT_ONCE", 3)
        daemon = await memory_lan.serve(trust_proxy=True)
        stalled = list[tuple[asyncio.StreamReader, asyncio.StreamWriter]]()
        for number in range(3):
            eve = await memory_lan.login(f"Eve {number}")
            reader, writer = await asyncio.open_connection("127.0.0.1", daemon.port)
            head = f"POST /pictures HTTP/1.1\r\nHost: localhost\r\nCookie: {eve.headers()['Cookie']}\r\n"
            more = f"X-Forwarded-For: 192.0.2.66\r\nContent-Length: {len(JPEG)}\r\n\r\n"
            writer.write((head + more).encode() + JPEG[:99])
            await until(lambda: len(daemon.uploads) == len(stalled) + 1)
            stalled.append((reader, writer))
        ann, bob = await memory_lan.login("Ann"), await memory_lan.login("Bob")
        assert (await upload(ann, X_Forwarded_For="192.0.2.7"))[0] == 201
        monkeypatch.setattr(tornchat, "UPLOADS_AT_ONCE", 2)
        assert (await upload(bob, X_Forwarded_For="192.0.2.66"))[0] == 429
        monkeypatch.setattr(tornchat, "UPLOAD_SECONDS", 0)
        assert (await upload(bob, X_Forwarded_For="192.0.2.66"))[0] == 201
        for (reader, writer), status in zip(stalled, (b"429", b"429", b"201"), strict=True):
            writer.write(JPEG[99:])
            assert status in await asyncio.wait_for(reader.readline(), RETURN)
            writer.close()

    async def test_none(self, memory_lan: Lan) -> None:
        """With --pictures 0 the room takes none, and says so; its page has no button for it."""
        await memory_lan.serve(pictures=0)
        ann = await memory_lan.join("Ann")
        status, told = await upload(ann)
        assert (status, told["text"]) == (404, "This room takes no pictures.")
        assert re.search(r'<button id="pick"[^>]*\bhidden\b', text_of(await ann.fetch("/")))

    async def test_store_away(self, own_lan: Lan, own_redis: RedisServer) -> None:
        """While the store is away a picture is refused for now, and one that cannot be read isn't said to be gone."""
        await own_lan.serve()
        ann = await own_lan.join("Ann")
        _, picture = await upload(ann)
        own_redis.kill()
        await ann.expect("store", available=False)
        assert (await ann.fetch(f"/pictures/{picture['id']}")).code == 503
        assert await verdict(upload(ann)) == (503, "unavailable")

    async def test_slow_reader(self, memory_lan: Lan) -> None:
        """Who asks for a large picture and doesn't take it is cut off, and has cost the daemon a piece of it."""
        daemon = await memory_lan.serve(answer_seconds=0.2)
        ann = await memory_lan.join("Ann")
        _, picture = await upload(ann, png(chunk(b"teXt", bytes(1_000_000))))
        slow = socket.socket()
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow.setblocking(False)
        await asyncio.get_running_loop().sock_connect(slow, ("127.0.0.1", daemon.port))
        reader, writer = await asyncio.open_connection(sock=slow, limit=1024)
        head = f"GET /pictures/{picture['id']} HTTP/1.1\r\nHost: localhost"
        writer.write(f"{head}\r\nCookie: {ann.headers()['Cookie']}\r\n\r\n".encode())
        assert b"200 OK" in await reader.readuntil(b"\r\n\r\n")
        here = slow.getsockname()

        connections = daemon.visitors.open
        await until(lambda: here not in [it.socket.getpeername() for it in connections if not it.closed()])
        writer.close()

    async def test_terminal(self, memory_lan: Lan) -> None:
        """In the terminal a picture is an address that can be opened."""
        daemon = await memory_lan.serve()
        ann = await memory_lan.join("Ann")
        _, picture = await upload(ann)
        await show(ann, picture["id"], "look")
        ear = await Joined.run(memory_lan, "--name", "ear")
        address = f"[picture http://127.0.0.1:{daemon.port}/pictures/{picture['id']}]"
        assert await ear.lines(2) == ["Ann: look", f"    {address}"]

    async def test_deleted(self, lan: Lan) -> None:
        """With its message a picture is deleted, and with the room cleared all that came before."""
        daemon = await lan.serve()
        tess, ann, bob = await join_as_host(lan), await lan.join("Ann"), await lan.join("Bob")
        pictures = [(await upload(sender))[1]["id"] for sender in (ann, bob)]

        async def kept() -> list[str]:
            answers = [await tess.fetch(f"/pictures/{id}") for id in pictures]
            return [id for id, answer in zip(pictures, answers, strict=True) if answer.code == 200]

        async def are_kept(*wanted: str) -> bool:
            return await kept() == [*wanted]

        for sender, id in zip((ann, bob), pictures, strict=True):
            await sender.connect()
            await until_frame(sender, "welcome")
            assert (await sender.post("", picture=id))[0] == 201
        await ann.send(json.dumps(note(1, "delete")))
        await until(lambda: are_kept(pictures[1]))
        eve = await lan.join("Eve")
        assert "picture" not in await eve.expect("message", seq=1, deleted=True)
        await eve.expect("message", seq=2, picture={"id": pictures[1], "width": 8, "height": 6})
        assert (await post_act(tess, {"type": "clear"}))[0] == 201
        await until(lambda: are_kept())
        assert await daemon.store.redis.keys("*picture*") == []
        _, picture = await upload(bob)
        pictures.append(picture["id"])
        daemon.feed.ring_for_look()
        await bob.say("later")
        await until_frame(bob, "message", text="later")
        assert await kept() == pictures[2:]

    async def test_hosts_decide(self, memory_lan: Lan) -> None:
        """Who may not write sends no picture either; a host has no pace."""
        await memory_lan.serve(rate=0.1)
        tess, bob = await join_as_host(memory_lan), await memory_lan.join("Bob")
        assert [(await upload(tess))[0] for _ in range(3)] == [201, 201, 201]
        await post_act(tess, {"type": "mode", "talk": "hosts"})
        await until_frame(bob, "mode")
        assert await verdict(upload(bob)) == (403, "locked")


# === Presence =========================================================================================================


async def is_admitted(browser: Browser, name: str) -> bool:
    return (await browser.ask(name))[0] == 200


class TestPresence(Transcripts):
    async def test_G7_the_name_of_somebody_away(self, lan: Lan) -> None:
        """Who has left keeps the name for a while, at every daemon; who logs out gives it back at once."""
        daemon = await lan.serve(name_seconds=600.0)
        ann, bob = await lan.join("Ann"), await lan.join("Bob")
        bob.drop()
        await ann.expect("left", names=["Bob"], count=1)
        other = await lan.serve(name_seconds=600.0) if lan.store.lasts else daemon
        assert (await lan.browser(other).ask("Bob"))[0] == 409
        await bob.connect()
        await bob.expect("welcome", name="Bob", count=2)
        bob.drop()
        await ann.expect("left", names=["Bob"])
        await bob.fetch("/logout", "POST", body="")
        impostor = lan.browser(other)
        await until(lambda: is_admitted(impostor, "Bob"))
        await ann.expect("joined", names=["Bob"], count=2)

    async def test_G7_a_name_is_free_again(self, lan: Lan) -> None:
        """Whoever doesn't come back in time has lost the name to whoever takes it."""
        await lan.serve(name_seconds=0.3)
        ann, bob = await lan.join("Ann"), await lan.join("Bob")
        bob.drop()
        await ann.expect("left", names=["Bob"])
        impostor = lan.browser()
        await until(lambda: is_admitted(impostor, "Bob"))
        assert (await bob.ask("Bob"))[0] == 409

    @pytest.mark.parametrize("back", [False, True], ids=["once", "who come back with their cookies"])
    async def test_G7_names_that_one_pupil_takes(self, redis_lan: Lan, back: bool) -> None:
        """Of the names of one address that have left 20 are kept, and those of others as well."""
        daemon = await redis_lan.serve(name_seconds=600.0, lease_seconds=0.5, trust_proxy=True, poller_seconds=0.3)
        await redis_lan.login("Ann")
        pupils = [redis_lan.browser() for _ in range(30)]
        for number, pupil in enumerate(pupils):
            form = {"nickname": f"Pupil {number}"}
            assert (await pupil.fetch("/login", form=form, X_Forwarded_For="192.0.2.9")).code == 303
        if back:
            await until(lambda: not daemon.room.roster)
            for pupil in pupils:
                await pupil.fetch("/messages", X_Forwarded_For="192.0.2.9")
        await until(lambda: not daemon.room.roster)
        keys = [tornchat.name_key(f"Pupil {number}") for number in range(30)]
        await until(lambda: sum(bool(daemon.room.owner(key)) for key in keys) == tornchat.NAMES_KEPT)
        assert (await redis_lan.browser().ask("Ann"))[0] == 409

    async def test_G7_a_login_by_hand_keeps_the_name(self, lan: Lan) -> None:
        """It makes a new session of the same name, which nobody can take in between, however often that is tried."""
        await lan.serve()
        ann, thief = lan.browser(), lan.browser()
        await ann.login("Ann")
        tries = asyncio.gather(*(thief.ask("Ann") for _ in range(60)))
        for _ in range(10):
            await ann.login("Ann")
        assert {status for status, _ in await tries} == {409}

    async def test_G6_a_login_without_a_page(self, lan: Lan) -> None:
        """Who logs in and never opens the page leaves when the lease is over; a page that comes later joins again."""
        await lan.serve(lease_seconds=0.3)
        ann, bob = await lan.join("Ann"), await lan.login("Bob")
        await ann.expect("joined", names=["Bob"])
        await ann.expect("left", names=["Bob"], count=1)
        await bob.connect()
        await bob.expect("welcome", name="Bob")
        await ann.expect("joined", names=["Bob"], count=2)

    @pytest.mark.parametrize("goodbye", [False, True])
    async def test_G6_a_closed_tab(self, goodbye: bool, lan: Lan) -> None:
        """A name leaves the list after its last tab, whether that is cut off or closed in order, and is free then."""
        ann, bob = await lan.join("Ann"), await lan.join("Bob")
        await ann.expect("joined", names=["Bob"])
        assert (await lan.browser().ask("Bob"))[0] == 409
        if goodbye:
            bob.socket.close(1000)
        else:
            bob.drop()
        await ann.expect("left", names=["Bob"], count=1)
        assert (await lan.browser().ask("Bob"))[0] == 200

    async def test_G6_a_reload(self, lan: Lan) -> None:
        """A reload is not announced: when somebody who left later is gone, there was no word of who came back."""
        ann, bob, carl = await lan.join("Ann"), await lan.join("Bob"), await lan.join("Carl")
        for _ in range(3):
            bob.drop()
            await bob.connect()
            await bob.expect("welcome", members=["Bob", "Ann", "Carl"], count=3)
        carl.drop()
        await ann.expect("left", names=["Carl"], count=2)
        assert "Bob" not in ann.names_in("left")
        assert ann.names_in("joined").count("Bob") == 1

    async def test_G6_many_tabs_are_one_person(self, lan: Lan) -> None:
        """A person is one entry, however many tabs, at however many daemons; and stays while one of them is open."""
        first = await lan.serve()
        second = await lan.serve() if lan.store.lasts else first
        ann, bob = await lan.join("Ann", at=first), await lan.join("Bob", at=first)
        tabs = [await bob.tab(at=second).connect() for _ in range(3)]
        for tab in tabs:
            await tab.expect("welcome", count=2, members=["Bob", "Ann"])
        await bob.say("in every tab")
        for tab in (ann, bob, *tabs):
            await tab.expect("message", text="in every tab")
        bob.drop()
        tabs[0].drop()
        carl = await lan.join("Carl")
        carl.drop()
        await ann.expect("left", names=["Carl"])
        assert "Bob" not in ann.names_in("left")
        tabs[1].drop()
        tabs[2].drop()
        await ann.expect("left", names=["Bob"], count=1)
        assert ann.names_in("joined").count("Bob") == 1

    async def test_G7_name_lost(self, lan: Lan) -> None:
        """Who comes back after somebody else took the name is told name-lost, and closed with 4409."""
        ann, bob = await lan.join("Ann"), await lan.join("Bob")
        ann.drop()
        await bob.expect("left", names=["Ann"])
        other = await lan.join("Ann")
        await ann.connect()
        await ann.expect("refused", code="name-lost")
        await ann.closed(4409)
        await ann.fetch("/logout", form={})  # which takes nothing from the other one
        await other.quiet()
        assert "Ann" in (await bob.resume())["members"]


# === Being the host ===================================================================================================


async def join_as_host(lan: Lan, name: str = "Tess", at: tornchat.Daemon | None = None) -> Browser:
    """Somebody who has opened the host's link, and then logged in."""
    browser = lan.browser(at)
    answer = await browser.fetch(f"/host?key={(at or lan.daemons[-1]).host_key}")
    assert (answer.code, answer.headers["Location"]) == (302, "./")
    await browser.login(name)
    await browser.connect()
    browser.welcome = await browser.expect("welcome", name=name, host=True)
    return browser


async def post_act(browser: Browser, act: Frame) -> tuple[int, Frame]:
    """POST /acts; the status and what the JSON says."""
    answer = await browser.fetch("/acts", "POST", body=json.dumps(act), Content_Type="application/json")
    return answer.code, json.loads(answer.body)


def note(to: int, kind: str, **value: object) -> Frame:
    return {"type": "note", "to": to, "kind": kind, **value}


OPEN = {"talk": "everyone", "every": 0, "door": "open"}
ACTS: dict[str, tuple[Frame, str, Frame]] = {  # what it is, the frame, and the type and fields of what all are told
    "pin": (note(1, "pin", value=True), "note", {"to": 1, "kind": "pin"}),
    "unpin": (note(1, "pin", value=False), "note", {"to": 1, "kind": "pin", "message": None}),
    "react": (note(1, "react", value="👍"), "note", {"to": 1, "kind": "react", "counts": {"👍": 1}}),
    "take it back": (note(1, "react", value=""), "note", {"to": 1, "kind": "react", "counts": {}}),
    "lock": ({"type": "mode", "talk": "hosts"}, "mode", {"talk": "hosts", "every": 0, "door": "open", "by": "Tess"}),
    "slow": ({"type": "mode", "every": 30}, "mode", {"talk": "hosts", "every": 30, "door": "open"}),
    "door": ({"type": "mode", "door": "closed"}, "mode", {"talk": "hosts", "every": 30, "door": "closed"}),
    "mute": ({"type": "mute", "name": "Eve", "seconds": 300}, "muted", {"name": "Eve"}),
    "end it": ({"type": "mute", "name": "Eve", "seconds": 0}, "muted", {"name": "Eve", "until": 0}),
    "remove": ({"type": "remove", "name": "Eve", "seconds": 600}, "left", {"names": ["Eve"]}),
    "delete": (note(1, "delete"), "note", {"to": 1, "kind": "delete"}),
    "delete a host's": (note(2, "delete"), "note", {"to": 2, "kind": "delete"}),
    "clear": ({"type": "clear"}, "cleared", {"seq": 2}),
}
MAY = {"host": [*ACTS], "author": ["react", "take it back", "delete"], "nobody": []}
MAY |= {who: ["react", "take it back"] for who in ("member", "forger", "was host")}


async def actor(who: str, lan: Lan, tess: Browser, bob: Browser) -> Browser:
    """Who does it."""
    if who == "was host":
        max = await join_as_host(lan, "Max")
        copied = dict(max.cookies)
        await max.fetch("/logout", form={})
        await max.ended()
        max.cookies = copied
        await max.connect()
        await max.expect("welcome", host=False)
        return max
    if who in ("member", "forger"):
        return await lan.join("Max")
    return {"host": tess, "author": bob}.get(who) or lan.browser()


class TestHost(Transcripts):
    @pytest.mark.parametrize("way", ["socket", "POST /acts"])
    @pytest.mark.parametrize("who", MAY)
    async def test_who_may(self, who: str, way: str, memory_lan: Lan, monkeypatch: pytest.MonkeyPatch) -> None:
        """Every act by everybody, by both ways: who may, may; all others are refused, and nothing changes."""
        monkeypatch.setattr(tornchat, "REACT_SECONDS", 0.01)
        daemon = await memory_lan.serve()
        tess, bob, eve = await join_as_host(memory_lan), await memory_lan.join("Bob"), await memory_lan.join("Eve")
        await bob.say("from Bob")
        await bob.expect("message", seq=1)
        await tess.say("from Tess")
        await bob.expect("message", seq=2, host=True)
        someone = await actor(who, memory_lan, tess, bob)
        forged = {"host": True, "by": "host", "sid": daemon.room.roster["tess"].sid} if who == "forger" else {}
        for what, (act, kind, fields) in ACTS.items():
            by_socket = way == "socket" and who != "nobody"
            status = 0
            answer: Frame = {}
            if by_socket:
                await someone.send(json.dumps(act | forged))
            else:
                status, answer = await post_act(someone, act | forged)
            if what in MAY[who]:
                assert by_socket or status == 201
                await until_frame(tess, kind, **fields)
            elif by_socket:
                await until_frame(someone, "refused", code="not-host")
            else:
                assert (status, answer["code"]) == ((401, "no-session") if who == "nobody" else (403, "not-host"))
        if who != "host":
            await eve.connect()
            await eve.expect("welcome", mode=OPEN, pinned=None, muted_until=0)
            await eve.expect_texts("" if who == "author" else "from Bob", "from Tess")

    async def test_the_link(self, lan: Lan) -> None:
        """The right key makes a host of who has logged in, and of who does so then; a logout ends it, on the spot."""
        daemon = await lan.serve(guess_seconds=0.3)
        began = time.monotonic()
        ann = await lan.join("Ann")
        answer = await ann.fetch("/host?key=guessed")
        assert (answer.code, time.monotonic() - began > 0.3) == (403, True)
        assert "not the host’s key" in text_of(answer)
        assert (await post_act(ann, {"type": "clear"}))[0] == 403
        await ann.fetch(f"/host?key={daemon.host_key}")
        other = await lan.join("Bob")
        await ann.tab().connect()
        await other.expect("hosts", names=["Ann"])  # without having left
        assert (await post_act(ann, {"type": "clear"}))[0] == 201
        await ann.fetch("/logout", form={})
        await ann.login("Ann")
        assert (await post_act(ann, {"type": "clear"}))[0] == 403

    async def test_one_key(self, redis_lan: Lan) -> None:
        """All daemons of a room agree on the key, and a restart changes nothing; an operator's own is not stored."""
        first, second = await redis_lan.serve(), await redis_lan.serve()
        assert first.host_key == second.host_key
        third = await redis_lan.restart()
        assert third.host_key == first.host_key
        assert (await redis_lan.serve(host_key="lantern")).host_key == "lantern"

    async def test_badge(self, lan: Lan) -> None:
        """A host's messages, the list and plain lines say so; a host from elsewhere is one at every daemon."""
        await lan.serve()
        line = lan.browser()
        await line.connect(subprotocols=["text"], nickname="Cat")
        bob, tess = await lan.join("Bob"), await join_as_host(lan)
        await tess.say("hi")
        await bob.expect("hosts", names=["Tess"])
        assert (await bob.expect("message", text="hi"))["host"] is True
        await bob.say("me, too", "c1")
        assert "host" not in await bob.expect("message", cid="c1")
        lines: list[object] = []
        while "Bob: me, too" not in lines:
            lines.append(await line.read())
        assert lines[-4:] == ["~~~ Tess joined ~~~", "~~~ hosts: ★ Tess ~~~", "★ Tess: hi", "Bob: me, too"]
        assert (await bob.resume())["hosts"] == ["Tess"]

    async def test_all_modes(self, lan: Lan) -> None:
        """Lock, slow mode, mute and door in all combinations: each does its own, and the host talks through all."""
        await lan.serve()
        tess, bob = await join_as_host(lan), await lan.join("Bob")
        for number, (locked, slow, muted, shut) in enumerate(itertools.product([False, True], repeat=4)):
            talk, door = "hosts" if locked else "everyone", "closed" if shut else "open"
            mode = {"talk": talk, "every": 60 * slow, "door": door}
            assert (await post_act(tess, {"type": "mode"} | mode))[1].items() >= mode.items()
            assert (await post_act(tess, {"type": "mute", "name": "Bob", "seconds": 60 * muted}))[0] == 201
            status, answer = await bob.post(f"{number}")
            code = "muted" if muted else "locked" if locked else None
            assert (status, answer.get("code")) == (403, code) if code else (201, None)
            if slow and not code:
                status, answer = await bob.post(f"{number} again")
                assert (status, answer["code"], 55 < answer["retry_after"] <= 60) == (429, "slow", True)
            assert (await tess.post(f"host {number}"))[0] == 201
            assert (await tess.post(f"host {number} again"))[0] == 201
            stranger = lan.browser()
            status, answer = await stranger.ask("Zoe")
            assert (status, answer.get("code")) == ((403, "door") if shut else (200, None))
            if not shut:
                await stranger.fetch("/logout", form={})
            assert (await bob.tab().connect()).socket is not None  # who was here comes back
            lan.daemons[0].room.state.said.clear()  # as if a minute had passed

    async def test_slow_everywhere(self, redis_lan: Lan) -> None:
        """Slow mode keeps its pace over tabs, daemons and a logout, even under another name."""
        first, second = await redis_lan.serve(), await redis_lan.serve()
        tess = await join_as_host(redis_lan, at=first)
        await tess.fetch("/acts", "POST", body=json.dumps({"type": "mode", "every": 60}))
        bob = redis_lan.browser(first)
        await bob.login("Bob")
        assert (await bob.post("one"))[0] == 201
        await until(lambda: second.room.seq == 1)
        elsewhere = bob.tab(at=second)
        for _ in range(2):
            assert (await elsewhere.post("two"))[1]["code"] == "slow"
        await elsewhere.fetch("/logout", form={})
        for name in ("Bob", "Robert"):
            await elsewhere.login(name)
            assert (await elsewhere.post("three"))[1]["code"] == "slow"
        stranger = redis_lan.browser(second)
        await stranger.login("Bob")  # who has thrown the cookie away comes under the same name
        assert (await stranger.post("four"))[1]["code"] == "slow"

    @pytest.mark.parametrize("alone", [True, False])
    async def test_removed(self, alone: bool, redis_lan: Lan, monkeypatch: pytest.MonkeyPatch) -> None:
        """A removed member is told why, and none of the ways back leads in, at any daemon, until the time is over."""
        first, second = await redis_lan.serve(trust_proxy=True), await redis_lan.serve(trust_proxy=True)
        tess = await join_as_host(redis_lan, at=first)

        def from_school(at: tornchat.Daemon, cookies: dict[str, str] | None = None) -> Browser:
            browser = redis_lan.browser(at)
            browser.cookies = cookies or {}
            browser.fetch = functools.partial(browser.fetch, X_Forwarded_For="192.0.2.1")  # type: ignore[method-assign]
            return browser

        if not alone:
            await from_school(second).login("Ann")
        eve = from_school(second)
        await eve.login("Eve")
        copied = dict(eve.cookies)
        await eve.connect(headers={"X-Forwarded-For": "192.0.2.1"})
        await eve.expect("welcome")
        status, removed = await post_act(tess, {"type": "remove", "name": "eve", "seconds": 600})
        assert status == 201
        assert (await until_frame(eve, "refused"))["code"] == "removed"
        await eve.closed(4403, "A host has removed you from the room for a while.")
        assert "Eve" in tess.names_in("left") or await until_frame(tess, "left", names=["Eve"])
        for daemon in (first, second):
            assert await from_school(daemon, copied).ask("Robert") == (403, UNWANTED)
            assert await verdict(from_school(daemon, copied).post("me again")) == (403, "removed")
            assert (await redis_lan.browser(daemon).ask("EvE"))[0] == 403  # from anywhere
            assert (await from_school(daemon).ask(f"Zoe {daemon.port}"))[0] == (403 if alone else 200)
            assert (await redis_lan.browser(daemon).ask(f"Max {daemon.port}"))[0] == 200
        monkeypatch.setattr(second.store, "now", lambda: removed["until"] + 1)
        assert await from_school(second, copied).ask("Eve") == (200, {"name": "Eve"})

    async def test_spam(self, lan: Lan) -> None:
        """Thirty talk as fast as they can. The host locks: nothing said after that is shown, but the host's own is."""
        await lan.serve()
        tess = await join_as_host(lan)
        spammers = [await lan.join(f"Eve{n}") for n in range(30)]
        for n in range(10):
            await asyncio.gather(*(eve.say(f"{n}") for eve in spammers))
        await tess.send(json.dumps({"type": "mode", "talk": "hosts"}))
        for _ in range(3):
            await asyncio.gather(*(eve.say("late") for eve in spammers))
        await until_frame(tess, "mode", talk="hosts")
        await tess.say("quiet, please", "c1")
        assert (await tess.frame() or {}).get("cid") == "c1"

    async def test_name_kept(self, lan: Lan) -> None:
        """A host's name is nobody else's while the host is away, whatever becomes of other names; a logout frees it."""
        daemon = await lan.serve()
        tess, bob = await join_as_host(lan), await lan.join("Bob")
        for browser in (tess, bob):
            browser.drop()
        await until(lambda: not daemon.room.roster)
        assert (await lan.browser().ask("Bob"))[0] == 200
        if lan.store.url:
            await lan.restart()
        assert (await lan.browser().ask("Tess"))[0] == 409
        elsewhere = await join_as_host(lan, "Tess")  # a host can have it from another browser
        await elsewhere.fetch("/logout", form={})
        assert (await lan.browser().ask("Tess"))[0] == 200

    async def test_names_of_one_address(self, memory_lan: Lan) -> None:
        """Who takes and leaves many names at the host's address doesn't have the host's given back."""
        daemon = await memory_lan.serve(name_seconds=60.0)
        tess = await join_as_host(memory_lan)
        tess.drop()
        await until(lambda: not daemon.room.roster)
        for number in range(tornchat.NAMES_KEPT + 2):
            (await memory_lan.join(f"{number} pupils")).drop()
        await until(lambda: not daemon.room.roster and len(daemon.room.kept_names) == tornchat.NAMES_KEPT)
        assert (await memory_lan.browser().ask("Tess"))[0] == 409
        await tess.connect()
        await tess.expect("welcome", name="Tess", host=True)

    async def test_removed_meanwhile(self, redis_lan: Lan) -> None:
        """A daemon that was frozen while somebody was removed, and lost the thread of the feed, closes the door too."""
        first, second = await redis_lan.serve(), await redis_lan.run("-p", "0")
        tess, eve = await join_as_host(redis_lan), await redis_lan.join("Eve", at=await second.address())
        second.signal(signal.SIGSTOP)
        await tess.say("this is what its reader has been given")
        await until_frame(tess, "message", seq=1)
        assert (await post_act(tess, {"type": "remove", "name": "Eve", "seconds": 600}))[0] == 201
        assert (await post_act(tess, {"type": "clear"}))[0] == 201
        await until(lambda: not stored_messages(redis_lan.store) and not first.feed.memory.to_trim)
        second.signal(signal.SIGCONT)
        await until_frame(eve, "refused", code="removed")
        await eve.closed(4403)

    async def test_kept(self, own_redis: RedisServer, own_lan: Lan) -> None:
        """What hosts have decided outlives a store that forgets, and a restart."""
        await own_lan.serve()
        tess, bob = await join_as_host(own_lan), await own_lan.join("Bob")
        await tess.expect("message", cid=await tess.say("the plan"))
        for act in (note(1, "pin"), {"type": "mode", "every": 9}, {"type": "mute", "name": "Bob", "seconds": 600}):
            assert (await post_act(tess, act))[0] == 201
        own_redis.client.flushall()
        await until(lambda: own_redis.client.exists(own_lan.store.key("state")))
        await own_lan.restart()
        told = await bob.tab(at=own_lan.daemons[-1]).connect()
        welcome = await told.expect("welcome", mode=OPEN | {"every": 9}, hosts=["Tess"])
        assert (welcome["pinned"]["text"], welcome["muted_until"] > 0) == ("the plan", True)
        assert (await told.post("hi"))[1]["code"] == "muted"
        await tess.tab(at=own_lan.daemons[-1]).connect()


UNWANTED = {"code": "removed", "text": "A host has removed you from the room for a while."}


def everything_in(redis_server: RedisServer) -> str:
    """All that a Redis holds, as one text."""
    client, found = redis_server.client, []
    for key in client.scan_iter("*"):
        kind = client.type(key)
        read: dict[Any, Any] = {b"stream": client.xrange, b"hash": client.hgetall, b"string": client.get}
        found.append(read[kind](key) if kind in read else b"")
    return "".join(f"{value!r}" for value in found)


class TestNotes(Transcripts):
    async def test_delete(self, own_redis: RedisServer, own_lan: Lan) -> None:
        """Deleted at one daemon: gone for all who are here, who come or come back, and from a store that forgets."""
        first, second = await own_lan.serve(), await own_lan.serve()
        tess, bob = await join_as_host(own_lan, at=first), await own_lan.join("Bob", at=second)
        line, poller = own_lan.browser(second), own_lan.browser(second)
        await line.connect(subprotocols=["text"], nickname="Cat")
        await poller.login("Polly")
        await bob.say("a joke", "c1")
        await until_frame(tess, "message", seq=1)
        assert "a joke" in texts_of(await poller.poll())
        away = bob.tab(at=first)
        away.after, away.epoch = 1, tess.epoch
        assert (await post_act(tess, note(1, "pin")))[0] == 201
        assert (await post_act(tess, note(1, "delete")))[1].items() >= {"kind": "delete", "by": "host"}.items()
        await until_frame(bob, "note", to=1, kind="delete", by="host")
        assert [event["kind"] for event in await poller.poll() if event["type"] == "note"] == ["pin", "delete"]
        while (told := await line.read()) != "~~~ a message of Bob was deleted ~~~":
            assert told is not None
        assert (await away.resume())["pinned"] is None
        await away.expect("note", to=1, kind="delete", by="host")
        await until(lambda: "a joke" not in everything_in(own_redis))
        for _ in range(2):
            newcomer = await own_lan.join("Zoe", at=first)
            gone = await newcomer.expect("message", seq=1, name="Bob", text="", deleted=True, cid="c1")
            assert "joke" not in json.dumps(newcomer.frames) + text_of(await tess.fetch("/transcript"))
            await newcomer.fetch("/logout", form={})
            own_redis.client.flushall()
            await until(lambda: own_redis.client.exists(own_lan.store.key("feed")))
            assert "a joke" not in everything_in(own_redis)
        third = await own_lan.serve()
        assert third.room.ring.newest(1)[0].fields() == gone
        assert await bob.post("a joke", "c1") == (201, gone)  # sent again, it is not said again

    async def test_pinned_and_gone(self, lan: Lan) -> None:
        """Who polls from before a pin isn't told what was pinned once that is deleted, or cleared."""
        await lan.serve()
        tess, poller = await join_as_host(lan), await lan.login("Polly")
        for seq, end in enumerate((note(1, "delete"), {"type": "clear"}), 1):
            await tess.say("a joke")
            await until_frame(tess, "message", seq=seq)
            await poller.poll()
            assert (await post_act(tess, note(seq, "pin")))[0] == 201
            assert (await post_act(tess, end))[0] == 201
            pin, _ = await poller.poll()
            assert (pin["kind"], pin["message"]) == ("pin", None)

    async def test_delete_in_company(self, own_redis: RedisServer, own_lan: Lan) -> None:
        """Of an entry that holds more than the deleted message the rest stays, put back and read anew as well."""
        await own_lan.serve()
        bob = await own_lan.join("Bob")
        for text in ("one", "a joke", "three"):
            await bob.say(text)
        await bob.expect_texts("one", "a joke", "three")
        await bob.send(json.dumps(note(2, "delete")))
        await bob.expect("note", to=2, by="author")
        own_redis.client.flushall()
        await until(lambda: own_redis.client.exists(own_lan.store.key("feed")))
        assert "a joke" not in everything_in(own_redis)
        await own_lan.restart()
        ann = await own_lan.join("Ann")
        await ann.expect_texts("one", "", "three")

    async def test_clear(self, lan: Lan) -> None:
        """The room is cleared: newcomers and the store have nothing of it, who was away is told, and it goes on."""
        await lan.serve()
        tess, bob = await join_as_host(lan), await lan.join("Bob")
        await bob.say_many(5)
        bob.drop()
        poller = bob.tab()
        poller.after, poller.epoch = 3, bob.epoch
        await tess.send(json.dumps({"type": "clear"}))
        await until_frame(tess, "cleared", seq=5, by="Tess")
        await tess.say("fresh")
        await until_frame(tess, "message", seq=6)
        bob.after = 3
        welcome = await bob.resume()
        assert {name: welcome[name] for name in ("cleared", "recovered", "missed", "reset")} == {
            "cleared": 5, "recovered": True, "missed": 0, "reset": False}  # fmt: skip
        await bob.expect_texts("fresh")
        assert texts_of(await poller.poll()) == ["fresh"]
        assert not lan.store.url or [event.text for event in stored_messages(lan.store)] == ["fresh"]
        if lan.store.url:
            await lan.restart()
        zoe = await lan.join("Zoe")
        await zoe.expect_texts("fresh")
        await zoe.quiet()

    async def test_reactions(self, lan: Lan, monkeypatch: pytest.MonkeyPatch) -> None:
        """One a person and message, the last one counts; all see the same, a newcomer and a restarted daemon too."""
        monkeypatch.setattr(tornchat, "REACT_SECONDS", 0.01)
        await lan.serve()
        ann, bob = await lan.join("Ann"), await lan.join("Bob")
        await ann.expect("message", cid=await ann.say("who agrees?"))
        sign: object
        for who, sign in ((ann, "👍"), (bob, "❓"), (bob, "👍"), (bob.tab(), "👍"), (ann, ""), (ann, "✋")):
            assert (await post_act(who, note(1, "react", value=sign)))[0] == 201
        await until_frame(bob, "note", kind="react", counts={"👍": 1, "✋": 1})
        for sign in ("💣", "👍👍", None, 7):
            assert (await post_act(bob, note(1, "react", value=sign)))[0] == 400
        assert (await post_act(bob, note(2, "react", value="👍")))[0] == 404
        if lan.store.url:
            await lan.restart()
        zoe = await lan.join("Zoe")
        await zoe.expect("message", seq=1, counts={"👍": 1, "✋": 1})
        again = await bob.tab(at=lan.daemons[-1]).connect()
        assert (await again.expect("welcome"))["mine"] == {"1": "👍"}

    async def test_hands(self, lan: Lan, monkeypatch: pytest.MonkeyPatch) -> None:
        """Who raises a hand is named in the order they came, to newcomers and after a restart, too."""
        monkeypatch.setattr(tornchat, "REACT_SECONDS", 0.01)
        await lan.serve()
        ann, bob, carl = [await lan.join(name) for name in ("Ann", "Bob", "Carl")]
        await ann.expect("message", cid=await ann.say("who is next?"))
        both, turned = ["Bob", "Ann"], ["Ann", "Bob"]
        steps: list[tuple[Browser, str, list[str]]] = [(bob, "✋", ["Bob"]), (ann, "✋", both), (carl, "👍", both)]
        steps += [(bob, "✋", both), (bob, "", ["Ann"]), (bob, "✋", turned), (carl, "", turned)]
        for who, sign, hands in steps:
            status, told = await post_act(who, note(1, "react", value=sign))
            assert (status, told["hands"]) == (201, hands)
        await until_frame(carl, "note", hands=turned, counts={"✋": 2})
        if lan.store.url:
            await lan.restart()
        zoe = await lan.join("Zoe")
        await zoe.expect("message", seq=1, hands=turned)

    async def test_one_cid_for_several(self, memory_lan: Lan) -> None:
        """A message and an act with the same cid are two things: both are done, and each of them once."""
        await memory_lan.serve()
        ann, tess = await memory_lan.join("Ann"), await join_as_host(memory_lan)
        await ann.say("secret of Ann", "c1")
        await until_frame(tess, "message", seq=1)
        for _ in range(2):
            for act, told in (({"type": "mute", "name": "Ann", "seconds": 9}, "muted"), (note(1, "pin"), "note")):
                status, answer = await post_act(tess, act | {"cid": "c1"})
                assert (status, answer["type"]) == (201, told)
            status, said = await tess.post("mine", "c1")
            assert (status, said["seq"], said["name"], said["text"]) == (201, 2, "Tess", "mine")
        await tess.send(json.dumps({"type": "mute", "name": "Nobody", "seconds": 9, "cid": "c2"}))
        await until_frame(tess, "refused", code="no-member", cid="c2")

    async def test_a_class_votes(self, memory_lan: Lan) -> None:
        """Two hundred react to a message: that is told once a second, and twice if they do it within one."""
        await memory_lan.serve()
        ann = await memory_lan.join("Ann")
        await ann.say("who agrees?")
        await ann.expect("message", seq=1)
        pupils = [memory_lan.browser() for _ in range(200)]
        for n, pupil in enumerate(pupils):
            await pupil.login(f"Pupil {n}")
        began = time.monotonic()
        answers = await asyncio.gather(*(post_act(pupil, note(1, "react", value="✋")) for pupil in pupils))
        assert {status for status, _ in answers} == {201}
        last = await until_frame(ann, "note", counts={"✋": 200})
        assert len(ann.seen("note")) <= 1 + math.ceil(time.monotonic() - began)
        assert (last["to"], len(last["hands"])) == (1, 30)

    async def test_replies(self, lan: Lan) -> None:
        """A reply says which message it answers; in plain lines, whom. One to what isn't there yet is refused."""
        await lan.serve()
        ann, bob, line = await lan.join("Ann"), await lan.join("Bob"), lan.browser()
        await line.connect(subprotocols=["text"], nickname="Cat")
        await ann.say("why?")
        await bob.expect("message", seq=1)
        await bob.send(json.dumps({"type": "say", "text": "because", "re": 1}))
        await ann.expect("message", text="why?")
        await ann.expect("message", text="because", re=1, answered="Ann")
        while (told := await line.read()) != "Bob (to Ann): because":
            assert told is not None
        status, answer = await bob.post("because", re="1")
        assert (status, answer["re"]) == (201, 1)
        await bob.send(json.dumps({"type": "say", "text": "because", "re": 9}))
        await until_frame(bob, "refused", code="no-message")

    async def test_pin(self, lan: Lan) -> None:
        """The pinned message is shown to newcomers, also when the history has gone on, until it is unpinned."""
        await lan.serve(history=1)
        tess = await join_as_host(lan)
        await tess.say_many(2)
        await tess.send(json.dumps(note(1, "pin", value=True)))
        pinned = (await tess.expect("note", kind="pin"))["message"]
        assert (pinned["seq"], pinned["text"], pinned["host"]) == (1, "1", True)
        if lan.store.lasts:
            await lan.restart()
        assert (await lan.join("Bob")).welcome["pinned"] == pinned
        assert (await post_act(tess, note(1, "pin", value=False)))[0] == 201
        assert (await lan.join("Zoe")).welcome["pinned"] is None


class TestTranscript(Transcripts):
    async def test_transcript(self, lan: Lan) -> None:
        """All that was said, as a file of readable lines or of JSON; no text and no name can forge a line of it."""
        await lan.serve(title="Class 5b")
        tess, bob = await join_as_host(lan), await lan.join("Bob")
        for text in ("hi", "one\n2026-01-01 10:00:00 Tess: forged\u2028★ Tess: forged", "gone"):
            await bob.say(text)
        await until_frame(bob, "message", seq=3)
        assert (await bob.post("yes", re="1"))[0] == 201
        await tess.say("well")
        await until_frame(tess, "message", seq=5)
        assert (await post_act(tess, note(3, "delete")))[0] == 201
        answer = await tess.fetch("/transcript")
        assert "Class%205b-20" in answer.headers["Content-Disposition"]
        lines = re.sub(r"(?m)^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d ", "", text_of(answer)).splitlines()
        assert lines == ["Bob: hi", "Bob: one", "    2026-01-01 10:00:00 Tess: forged★ Tess: forged",
                         "Bob (to Bob): yes", "★ Tess: well"]  # fmt: skip
        said = [json.loads(line) for line in text_of(await tess.fetch("/transcript?format=json")).split("\n") if line]
        assert [(told["seq"], told["text"][:3]) for told in said] == [(1, "hi"), (2, "one"), (4, "yes"), (5, "wel")]

    @pytest.mark.parametrize(
        ("option", "statuses"),
        [("host", (200, 403, 401)), ("everyone", (200, 200, 401)), ("off", (404, 404, 404))],
    )
    async def test_whose(self, option: str, statuses: tuple[int, ...], memory_lan: Lan) -> None:
        """Hosts have it, or everyone, or nobody; never somebody who hasn't logged in, or was removed."""
        await memory_lan.serve(transcript=option)
        readers = await join_as_host(memory_lan), await memory_lan.join("Bob"), memory_lan.browser()
        assert tuple([(await reader.fetch("/transcript")).code for reader in readers]) == statuses
        assert (await post_act(readers[0], {"type": "remove", "name": "Bob", "seconds": 600}))[0] == 201
        assert (await readers[1].fetch("/transcript")).code == max(403, statuses[1])

    async def test_long(self, lan: Lan) -> None:
        """A long room comes in pieces: the daemon never holds all of it."""
        daemon = await lan.serve()
        tess = await join_as_host(lan)
        for n in range(200):
            await tess.say(f"{n}" + "x" * 3990)
        await until(lambda: daemon.room.seq == 200)
        pages = [page async for page in daemon.store.pages("-", "+")]
        assert len(pages) > 1
        assert len(text_of(await tess.fetch("/transcript")).splitlines()) == 200


# === Security basics ==================================================================================================

OUR_HOSTS = (
    "localhost LOCALHOST localhost. 127.0.0.1 192.168.1.5 [::1] printer room.local x.lan a.home.arpa b.internal"
    " CHAT.example.org"
)
FOREIGN_HOSTS = (
    "evil.example|127.0.0.1.evil.example|EVIL.example|evil.example.|local.evil.example|notlocal.evillocal.com"
    "|chat.example.org.evil.example|xchat.example.org|example.org||@|1.2.3|[::1].evil.example|a b.local.x.y"
)


ROUTES = [
    *[
        ("GET", path)
        for path in ("/", "/login", "/chat", "/messages", "/healthz", "/style.css", "/chat.js", "/icon.svg", "/nothing")
    ],
    *[("POST", path) for path in ("/", "/login", "/logout", "/messages", "/healthz", "/nothing")],
    *[("HEAD", "/login"), ("OPTIONS", "/login"), ("PUT", "/login"), ("GET", "/logout"), ("GET", "/style.css?v=1")],
]
UPGRADE = {
    "Upgrade": "websocket",
    "Connection": "Upgrade",
    "Sec-WebSocket-Version": "13",
    "Sec-WebSocket-Key": "x3JJHMbDL1EzLkh9GBhXDw==",
}
UPGRADE_LINES = "".join(f"{name}: {value}\r\n" for name, value in UPGRADE.items())


def certificate(folder: Path) -> tuple[str, str]:
    if (openssl := shutil.which("openssl") or "") == "":
        missing("openssl")
    cert, key = str(folder / "cert.pem"), str(folder / "key.pem")
    command = [openssl, "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    command += ["-days", "2", "-keyout", key, "-out", cert]
    command += ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
    subprocess.run(command, check=True, capture_output=True)
    return cert, key


class TestSecurity(Transcripts):
    @pytest.mark.parametrize("host", [*OUR_HOSTS.split(), socket.gethostname()])
    async def test_our_host(self, host: str, memory_lan: Lan) -> None:
        """The room opens under an address, under names that no outsider can give, and under those that were allowed."""
        await memory_lan.serve(allow_host=("chat.example.org",))
        browser = memory_lan.browser()
        for header in (host, f"{host}:8888"):
            assert (await browser.fetch("/login", Host=header)).code == 200

    @pytest.mark.parametrize("host", FOREIGN_HOSTS.split("|"))
    async def test_G10_foreign_host(self, host: str, memory_lan: Lan) -> None:
        """Any other Host is refused on every route with 421 and the flag to use: DNS rebinding finds no door."""
        await memory_lan.serve(allow_host=("chat.example.org",))
        malformed = set(host) & set("@ ")
        # As the page of an attacker's name sends them.
        origin = {"Origin": f"http://{host or '['}", "Cookie": "tornchat=x"}
        for method, path in ROUTES:
            answer = await memory_lan.ask_raw(method, path, {"Host": host, "Connection": "close"} | origin)
            assert answer.startswith(f"HTTP/1.1 {400 if malformed else 421} "), (method, path, answer)
            if not malformed:
                assert "default-src 'none'" in answer
        answer = await memory_lan.ask_raw("GET", "/chat?nickname=Eve", {"Host": host} | UPGRADE | origin)
        assert re.match(r"HTTP/1.1 4(21|00) ", answer), answer
        assert (await memory_lan.browser().ask("Eve"))[0] == 200  # nobody has taken the name

    @pytest.mark.parametrize(
        ("version", "hosts", "status"),
        [
            ("1.1", [], 400),
            ("1.0", [], 421),
            ("1.0", ["evil.example"], 421),
            ("1.1", ["localhost", "localhost"], 400),
            ("1.1", ["localhost", "evil.example"], 400),
            ("1.1", ["localhost, evil.example"], 400),
            ("1.1", ["localhost\t"], 200),
            ("1.1", ["local\x00host"], 400),
            ("1.1", ["localhost:evil"], 421),
            ("1.1", ["a" * 301], 421),
            ("1.1", [":8888"], 421),
        ],
    )
    async def test_G10_odd_hosts(self, version: str, hosts: list[str], status: int, memory_lan: Lan) -> None:
        """No Host, two of them, or one that could be read in two ways opens nothing, in HTTP 1.0 as in 1.1."""
        await memory_lan.serve()
        lines = "".join(f"Host: {host}\r\n" for host in hosts)
        wish = f"GET /login HTTP/{version}\r\n{lines}\r\n".encode()
        answer = await exchange(memory_lan.browser().port, wish, b"\r\n")
        assert answer.startswith(b"HTTP/1.1 %d " % status)

    async def test_an_absolute_address(self, memory_lan: Lan) -> None:
        """What stands in the request line is no way around the Host."""
        answer = await memory_lan.ask_raw("GET", "http://localhost/login", {"Host": "evil.example"})
        assert answer.startswith("HTTP/1.1 421 ")
        answer = await memory_lan.ask_raw("GET", "http://evil.example/login", {"Host": "localhost"})
        assert answer.startswith("HTTP/1.1 404 ")

    @pytest.mark.parametrize("host", ["chat.example.org", "CHAT.example.org:8888", "chat.example.org.:80"])
    async def test_G10_the_flag_is_named(self, host: str, memory_lan: Lan, caplog: pytest.LogCaptureFixture) -> None:
        """The refusal of a Host names the flag that allows it, on the page and in the log; with that it is let in."""
        await memory_lan.serve()
        answer = await memory_lan.browser().fetch("/login", Host=host)
        assert answer.code == 421
        for told in (text_of(answer), caplog.text):
            assert re.search(r"--allow-host chat\.example\.org(?![.:\w])", told)
        config = tornchat.parse_config(["--allow-host", host], {})
        await memory_lan.serve(allow_host=config.allow_host)
        assert (await memory_lan.browser().fetch("/login", Host=host)).code == 200

    @pytest.mark.parametrize("upstream", ["tornchat_backend", "127.0.0.1:8888"])
    async def test_a_proxy_that_drops_the_host(
        self, upstream: str, memory_lan: Lan, caplog: pytest.LogCaptureFixture
    ) -> None:
        """Behind a proxy that puts its own name for us into Host, the log says in one line what the proxy has to do."""
        await memory_lan.serve(trust_proxy=True, allow_host=("chat.example.org",))
        browser = memory_lan.browser()
        dropped: dict[str, Any] = {
            "Host": upstream,
            "Origin": "http://chat.example.org",
            "X_Forwarded_For": "192.0.2.7",
        }
        assert (await browser.fetch("/login", form={"nickname": "Ann"}, **dropped)).code == 403
        await browser.login("Ann")
        assert await browser.knock(**dropped) == 403
        told = [record.getMessage() for record in caplog.records]
        assert told
        for line in told:
            assert "http://chat.example.org" in line
            assert "proxy_set_header Host $http_host" in line

    @pytest.mark.parametrize(
        "origin",
        [
            *("", "same", "same in capitals", "null", "http://evil.example", "http://127.0.0.1:1", "http://127.0.0.1"),
            *("https://127.0.0.1.evil.example:{port}", "http://evil.example#127.0.0.1:{port}", "127.0.0.1:{port}"),
            *("http://127.0.0.1:{port}@evil.example", "http://evil.example@127.0.0.1:{port}", "http://["),
            *("http://localhost:{port}", "file://", "http://127.0.0.1:{port}, http://evil.example"),
        ],
    )
    async def test_G10_origins(self, origin: str, memory_lan: Lan) -> None:
        """No page of another origin can log in, write, log out or open a socket, whether its browser says so or not."""
        daemon = await memory_lan.serve()
        ours = place(daemon)
        origin = {"same": ours, "same in capitals": ours.upper()}.get(origin, origin.format(port=daemon.port))
        sites = ("", "cross-site", "same-origin", "none", "same-site", "odd")
        for site in sites if origin in ("", ours) else sites[:2]:
            told: dict[str, Any] = {"Origin": origin, "Sec_Fetch_Site": site}
            told = {name: value for name, value in told.items() if value}
            # What the browser says of the site can't be forged by a page; where it says nothing, the Origin decides.
            allowed = site in ("same-origin", "none") if site else origin.lower() in ("", ours)
            ann, eve, said = await memory_lan.login("Ann"), memory_lan.browser(), daemon.room.seq
            assert await ann.knock(**told) == (101 if allowed else 403)
            assert (await eve.fetch("/login", form={"nickname": "Eve"}, **told)).code == (303 if allowed else 403)
            assert bool(eve.cookies) == allowed
            assert (await ann.fetch("/messages", form={"text": "hi"}, **told)).code == (201 if allowed else 403)
            body: dict[str, Any] = {"body": '{"text":"hi"}', "Content_Type": "application/json"}
            assert (await ann.fetch("/messages", "POST", **body, **told)).code == (201 if allowed else 403)
            assert daemon.room.seq == said + (2 if allowed else 0)
            assert (await ann.fetch("/logout", form={}, **told)).code == (303 if allowed else 403)
            assert (await ann.fetch("/")).code == (302 if allowed else 200)
            for browser in (ann, eve):
                await browser.fetch("/logout", form={})

    async def test_G10_names_and_titles_are_text(self, memory_lan: Lan) -> None:
        """A name and a title that look like HTML come back escaped, wherever they stand."""
        await memory_lan.serve(title='<i>Room</i> & "co"')
        ann = memory_lan.browser()
        await ann.login("<b>'\"&Ann")
        refused = await memory_lan.browser().fetch("/login", form={"nickname": "<b>'\"&Ann"})
        asked = await memory_lan.browser().fetch("/login?nickname=%22%3E%3Cb%3E")
        for page in (text_of(await ann.fetch("/")), text_of(refused), text_of(asked)):
            assert "<b>" not in page
            assert "<i>" not in page
            assert "&lt;b&gt;" in page
            assert "&lt;i&gt;" in page

    async def test_not_found(self, memory_lan: Lan) -> None:
        """Nor is there a method that a route has no use for: above all no GET logs out."""
        ann = await memory_lan.login("Ann")
        for path in ("/nothing", "/chat.js/../login2", "/static/x", "/%00", "/login/", "//evil.example/"):
            answer = await ann.fetch(path)
            assert (answer.code, answer.headers.get("Location")) == (404, None)
            assert "tornado" not in (text_of(answer) + str(dict(answer.headers))).lower()
        for method, path in (("PUT", "/login"), ("DELETE", "/"), ("GET", "/logout"), ("POST", "/healthz")):
            assert (await ann.fetch(path, method, body="" if method in ("PUT", "POST") else None)).code == 405

    async def test_a_refused_program_is_told_in_json(self, memory_lan: Lan) -> None:
        """A program that asks for JSON gets it in a refusal too; /messages and /healthz answer nothing else."""
        await memory_lan.serve()
        browser = memory_lan.browser()
        answer = await browser.fetch("/login", Host="evil.example", Accept="application/json")
        refused = json.loads(answer.body)
        assert (answer.code, refused["code"]) == (421, 421)
        assert "--allow-host" in refused["text"]
        refusals: list[tuple[int, str, dict[str, Any]]] = [
            (403, "POST", {"Origin": "http://evil.example"}),
            (403, "POST", {"Sec_Fetch_Site": "cross-site"}),
            (421, "POST", {"Host": "evil.example"}),
            (405, "PUT", {}),
            (401, "GET", {}),
        ]
        for code, method, headers in refusals:
            path = "/healthz" if code == 405 else "/messages"
            answer = await browser.fetch(path, method, body=None if method == "GET" else "", **headers)
            assert answer.code == code
            assert answer.headers["Content-Type"].startswith("application/json")
            assert json.loads(answer.body)["text"]

    async def test_a_bug(
        self, memory_lan: Lan, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        """A bug is 500 in one sentence, with the traceback in the log and not on the page."""
        await memory_lan.serve()

        def broken(handler: tornchat.LoginHandler) -> NoReturn:
            raise RuntimeError("a bug")

        monkeypatch.setattr(tornchat.LoginHandler, "get", broken)
        answer = await memory_lan.browser().fetch("/login?password=hunter2")
        assert answer.code == 500
        assert "a bug" not in text_of(answer)
        assert "a bug" in caplog.text
        assert "hunter2" not in caplog.text
        caplog.clear()

    async def test_head(self, memory_lan: Lan) -> None:
        """What GET answers, without its body, without a session and with one; a poll isn't asked for in this way."""
        await memory_lan.serve()
        for browser in (memory_lan.browser(), await memory_lan.login("Ann")):
            for path in ("/", "/login", "/healthz", "/chat.js", "/nothing", "/messages", "/join.json"):
                get, head = await browser.fetch(path), await browser.fetch(path, "HEAD")
                assert (head.code, head.body) == (405 if path == "/messages" else get.code, b"")

    async def test_proxy_headers_of_a_stranger(self, memory_lan: Lan, caplog: pytest.LogCaptureFixture) -> None:
        """Without --trust-proxy nobody is believed about addresses, hosts and https; the operator is told so, once."""
        await memory_lan.serve()
        forged: dict[str, Any] = {"X_Forwarded_For": "1.2.3.4", "X_Forwarded_Proto": "https"}
        forged["X_Forwarded_Host"] = "evil.example"
        answer = await memory_lan.browser().fetch("/login", form={"nickname": ""}, Accept="application/json", **forged)
        assert json.loads(answer.body)["name"] == "guest-1"  # of 127.0.0.1
        assert "secure" not in answer.headers["Set-Cookie"].lower()
        await memory_lan.browser().fetch("/login", **forged)
        (told,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
        assert "--trust-proxy" in told

    def test_a_proxy_on_another_machine(self) -> None:
        """Even with --trust-proxy, only a proxy on this machine is believed."""
        headers = {"X-Forwarded-Proto": "https"}
        request: Any = types.SimpleNamespace(remote_ip="192.0.2.1", protocol="http", headers=headers)
        tornchat.believe_proxy(request)
        assert (request.remote_ip, request.protocol) == ("192.0.2.1", "http")

    async def test_trusted_proxy(self, memory_lan: Lan) -> None:
        """With --trust-proxy a proxy on this machine is believed: address, https, and a Host that must be allowed."""
        await memory_lan.serve(trust_proxy=True, allow_host=("chat.example.org",))
        browser = memory_lan.browser()
        told: dict[str, Any] = {"X_Forwarded_For": "198.51.100.7, 1.2.3.4", "X_Forwarded_Proto": "https"}
        told["X_Forwarded_Host"] = "chat.example.org"
        answer = await browser.fetch("/login", form={"nickname": "Ann"}, Origin="https://chat.example.org", **told)
        assert answer.code == 303
        assert "secure" in answer.headers["Set-Cookie"].lower()
        assert (await browser.fetch("/login", **told | {"X_Forwarded_Host": "evil.example"})).code == 421
        for odd in ({"X_Forwarded_For": "nonsense"}, {"X_Forwarded_Proto": "gopher"}, {"X_Forwarded_Host": ""}):
            assert (await browser.fetch("/login", **told | odd)).code < 500

    @pytest.mark.parametrize("address", ["nonsense", "unix:", "-", "127.0.0.1.", "192.0.2.1, "])
    async def test_a_proxy_that_tells_no_address(
        self, address: str, memory_lan: Lan, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Whom a trusted proxy gives anything but an address is no one on this machine: all of them share one limit."""
        monkeypatch.setattr(tornchat, "LOGINS_AT_ONCE", 2)
        await memory_lan.serve(trust_proxy=True)
        told: dict[str, Any] = {"Accept": "application/json", "X_Forwarded_For": address}
        forms = [{"nickname": name} for name in ("Ann", "Bob", "Eve")]
        answers = [await memory_lan.browser().fetch("/login", form=form, **told) for form in forms]
        assert [answer.code for answer in answers] == [200, 200, 429]
        assert (await memory_lan.browser().ask("Eve"))[0] == 200

    async def test_https(self, memory_lan: Lan, tmp_path: Path) -> None:
        """With a certificate the room is https and wss, and its cookie never leaves them."""
        cert, key = certificate(tmp_path)
        daemon = await memory_lan.serve(certfile=cert, keyfile=key)
        assert daemon.url == f"https://127.0.0.1:{daemon.port}/"
        ann = memory_lan.browser(f"https://127.0.0.1:{daemon.port}")
        ann.certificates = cert
        answer = await ann.login("Ann")
        assert answer.headers["Set-Cookie"].startswith("__Host-tornchat-")
        assert {"Secure", "Path=/"} <= set(answer.headers["Set-Cookie"].split("; "))
        await ann.connect()
        await ann.expect("welcome", name="Ann")
        await ann.expect("message", cid=await ann.say("x" * 4000))
        assert "Secure" in (await ann.fetch("/logout", form={})).headers["Set-Cookie"]


# === Attacks: slow ones, greedy ones, and whatever bytes there are ====================================================

CLOSES = (0, 999, 1000, 1001, 1003, 1004, 1005, 1006, 1007, 1011, 1012, 1015, 1016, 2999, 3000, 4999, 5000, 65535)
ODD_HEADERS = ["Origin", "Sec-Fetch-Site", "Accept", "Accept-Language", "X-Forwarded-For", "X-Forwarded-Proto"]
ODD_HEADERS += ["X-Forwarded-Host", "If-None-Match", "Range", "Expect", "Sec-WebSocket-Protocol", "Content-Encoding"]
MISCHIEF = "\x1b]0;owned\x07\x1b[31m\x9b31m\x7f\x00\x08\r\u202e\u2066\u200f\u061c\u2028"  # not for a terminal
STEERS = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")
any_header = st.text(st.characters(min_codepoint=1, max_codepoint=255, exclude_characters="\r\n"), max_size=60)
any_query = st.dictionaries(
    st.sampled_from(["after", "epoch", "wait", "last", "nickname", "password", "why", "v", "name", "seq", "x"]),
    st.text(max_size=30).map(lambda text: urllib.parse.quote(text, errors="surrogatepass"))
    | st.binary(max_size=30).map(urllib.parse.quote_from_bytes)
    | st.sampled_from(
        ["0", "-1", "1e3", "1e999", "nan", "inf", "9" * 15, "9" * 5000, "1-0", "0-0!", "%", "%FF", "&", ""]
    )
    | st.text(st.characters(min_codepoint=33, max_codepoint=255), max_size=20),
).map(lambda query: "&".join(f"{name}={value}" for name, value in query.items()))
any_form = (
    st.binary(max_size=300)
    | st.dictionaries(st.sampled_from(["nickname", "password", "text", "cid", "x"]), st.text(max_size=40)).map(
        lambda form: urllib.parse.urlencode(form, errors="surrogatepass").encode()
    )
    | any_json.map(json.dumps).map(str.encode)
    | st.builds(
        lambda name, head, value: (
            b'--x\r\nContent-Disposition: form-data; name="%b"\r\n%b\r\n\r\n%b\r\n--x--\r\n' % (name, head, value)
        ),
        st.sampled_from([b"nickname", b"text", b"\xff", b'"', b""]),
        st.binary(max_size=30),
        st.binary(max_size=60),
    )
)
any_type = (
    st.sampled_from(
        [
            *("application/x-www-form-urlencoded", "application/x-www-form-urlencoded; charset=utf-16", ""),
            *("application/json", "application/json;charset=latin-1", "text/plain", "multipart/form-data"),
            *("multipart/form-data; boundary=x", 'multipart/form-data; boundary="', "multipart/mixed; boundary=x"),
            *("multipart/form-data; boundary=" + "x" * 300, "multipart/form-data; boundary=x; boundary=y"),
            "Application/JSON",
        ]
    )
    | any_header
)
any_ws_frame = st.builds(
    lambda head, masked, size, payload: bytes((head, masked << 7 | min(size, 125) if size >= 0 else len(payload)))
    + (b"\0\0\0\0" if masked else b"")
    + payload,
    st.integers(0, 255) | st.sampled_from([0x81, 0x82, 0x80, 0x01, 0x88, 0x89, 0x8A]),
    st.booleans(),
    st.sampled_from([-1, -1, -1, 0, 1, 126, 127]),
    st.binary(max_size=120) | any_frame.map(lambda frame: frame.encode() if isinstance(frame, str) else frame)
    .filter(lambda frame: len(frame) < 126),
)  # fmt: skip


def masked(head: int, payload: bytes = b"", size: int | None = None) -> bytes:
    """A frame of a client, masked with zeros; `size` is what it claims to have."""
    size = len(payload) if size is None else size
    width = 0 if size < 126 else 2 if size < 65536 else 8
    length = bytes((0x80 | (size if not width else 126 if width == 2 else 127),))
    return bytes((head,)) + length + (size.to_bytes(width, "big") if width else b"") + bytes(4) + payload


HALF = masked(0x01, b"a")  # the first fragment of a text
# Pings, of any size and between fragments; texts that never began, begin twice, or are too long; no UTF-8, whole
# and in fragments; a close within a text, before other frames, with and without a code and a reason.
PROTOCOL = [masked(0x89) + masked(0x89, b"hi") + masked(0x89, b"\x00\xff" * 62) + masked(0x8A, b"unasked")]
PROTOCOL += [masked(0x89, b"x" * 126), masked(0x09, b"x") + masked(0x80, b"y")]
PROTOCOL += [HALF + masked(0x89, b"1") + masked(0x00, b"b") + masked(0x80, b"c"), HALF + masked(0x81, b"b")]
PROTOCOL += [masked(0x80, b"x"), masked(0x00, b"x"), masked(0x01, b"x" * 30_000) + masked(0x80, b"x" * 30_000)]
PROTOCOL += [masked(0x81, b"x" * 50_000), masked(0x81, b"x", 2**62), masked(0x81, b"x", 2**64 - 1)]
PROTOCOL += [masked(0x81, b"\xff"), masked(0x81, b"\xed\xa0\x80"), masked(0x01, b"\xe5") + masked(0x80, b"x")]
PROTOCOL += [masked(0x01, b"\xe5\xa5") + masked(0x80, b"\xbd"), HALF + masked(0x88, b"\x03\xe8")]
PROTOCOL += [masked(0x88, b"\x03\xe8") + masked(0x81, b"x") + masked(0x89, b"x")]
PROTOCOL += [masked(0x81 | bit, b"x") for bit in (0x10, 0x20, 0x40, 0x70)]
PROTOCOL += [masked(0x80 | code, b"x") for code in (3, 4, 5, 6, 7, 11, 12, 13, 14, 15)]
PROTOCOL += [masked(0x88, code.to_bytes(2, "big") + b"why") for code in CLOSES]
PROTOCOL += [masked(0x88, told) for told in (b"", b"\x03", b"\x03\xe8\xff\xfe", b"\x03\xe8" + b"x" * 124)]


class Mute(tornado.websocket.WebSocketHandler):
    """Plain Tornado, without any behaviour of its own."""

    def on_message(self, message: str | bytes) -> None:
        """Called by Tornado."""


@contextlib.contextmanager
def on_stage(lan: Lan) -> Iterator[Callable[[Coroutine[Any, Any, T]], T]]:
    """One loop and what runs in it for all examples of a test: what it yields plays a coroutine there."""
    with asyncio.Runner() as runner:
        try:
            yield lambda scene: runner.run(asyncio.wait_for(scene, RETURN))
        finally:
            runner.run(lan.close())
            runner.run(sweep())


def examples(few: int, many: int) -> pytest.MarkDecorator:
    """Fuzz with a few examples, and as a slow test with many."""
    return pytest.mark.parametrize("examples", [few, pytest.param(many, marks=slow)])


class TestAttacks(Transcripts):
    @examples(50, 500)
    def test_any_frames_at_the_door(self, examples: int, memory_lan: Lan) -> None:
        """Whatever frames and bytes come through a socket: the daemon logs no error, and others talk on."""
        with on_stage(memory_lan) as play:
            play(memory_lan.serve())
            bob, ann = play(memory_lan.join("Bob")), memory_lan.browser()
            play(ann.login("Ann"))

            async def attack(frames: list[bytes], plain: bool) -> None:
                protocol = "Sec-WebSocket-Protocol: text\r\n" if plain else ""
                head = f"Host: localhost\r\nCookie: {ann.headers()['Cookie']}\r\n{protocol}{UPGRADE_LINES}"
                end = b"\x88\x82\0\0\0\0\x03\xe8" + bytes(20_000) + b"\xff" * 40  # an end in any case
                request = f"GET /chat HTTP/1.1\r\n{head}\r\n".encode() + b"".join(frames)
                heard = await exchange(ann.port, request + end)
                assert heard.startswith(b"HTTP/1.1 101 ")
                cid = await bob.say("still here")
                while (await bob.expect("message")).get("cid") != cid:
                    pass  # what the attack said well

            @hypothesis.settings(max_examples=examples)
            @hypothesis.given(st.lists(any_ws_frame | st.binary(max_size=40), max_size=8), st.booleans())
            def attacks(frames: list[bytes], plain: bool) -> None:
                play(attack(frames, plain))

            attacks()

    @examples(80, 1000)
    def test_any_request(self, examples: int, memory_lan: Lan) -> None:
        """Whatever form, query, type and header comes to any route: an answer below 500, and no error in the log."""
        with on_stage(memory_lan) as play:
            play(memory_lan.serve(password="open", trust_proxy=True))
            ann = memory_lan.browser()
            play(ann.login("Ann", "open"))

            @hypothesis.settings(max_examples=examples)
            @hypothesis.given(
                st.sampled_from(["GET", "POST", "POST", "PUT", "HEAD"]),
                st.sampled_from(
                    ["/", "/login", "/login", "/logout", "/chat", "/messages", "/messages", "/chat.js", "/x"]
                ),
                any_query,
                any_form,
                any_type,
                st.dictionaries(st.sampled_from(ODD_HEADERS), any_header, max_size=3),
                st.booleans(),
            )
            def attacks(
                method: str, path: str, query: str, form: bytes, kind: str, more: dict[str, str], upgrade: bool
            ) -> None:
                headers = {"Host": "localhost", "Content-Type": kind, "Content-Length": str(len(form))}
                headers |= {"Cookie": ann.headers()["Cookie"]} if path != "/logout" else {}
                headers |= UPGRADE if upgrade and path == "/chat" else {}
                query = re.sub("wait=[^&]*", "wait=0", query) if path == "/messages" else query
                lines = [f"{method} {path}?{query} HTTP/1.1", *(f"{n}: {v}" for n, v in (headers | more).items())]
                request = "\r\n".join([*lines, "", ""]).encode("latin-1")
                hypothesis.assume(len(request) <= tornchat.HEADER_BYTES)  # more is cut off without an answer
                answer = play(exchange(ann.port, request + form, b"\r\n\r\n"))
                assert re.match(rb"HTTP/1.1 [1-4]\d\d ", answer), (request, form, answer)
                assert len(re.findall(rb"(?mi)^(?:set-cookie|location): (?!tornchat-|login|\./)", answer)) == 0, answer

            attacks()
            assert play(ann.fetch("/")).code == 200

    async def test_the_protocol(self, memory_lan: Lan) -> None:
        """Good and bad frames are answered as plain Tornado answers them, with the same pongs and close frames."""
        ann = await memory_lan.login("Ann")
        application = tornado.web.Application([("/chat", Mute)], websocket_max_message_size=tornchat.FRAME_BYTES)
        server = tornado.httpserver.HTTPServer(application)
        (port,) = tornado.netutil.bind_sockets(0, "127.0.0.1")
        server.add_socket(port)
        plain = f"http://127.0.0.1:{port.getsockname()[1]}"
        for frames in PROTOCOL:
            ours, theirs = [await self.answers(url, ann.headers()["Cookie"], frames) for url in (ann.url, plain)]
            assert ours == theirs, frames[:60]
        server.stop()

    async def answers(self, url: str, cookie: str, frames: bytes) -> list[tuple[int, bytes]]:
        """Opcode and data of each pong and close frame that comes for these frames and a goodbye."""
        reader, writer = await handshake(url, cookie, after=frames + b"\x88\x82\0\0\0\0\x03\xe8")
        answers: list[tuple[int, bytes]] = []
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                head, size = await asyncio.wait_for(reader.readexactly(2), RETURN)
                size = int.from_bytes(await reader.readexactly(2), "big") if size == 126 else size
                answers += [(head & 0xF, await reader.readexactly(size))]
        writer.transport.abort()
        return [answer for answer in answers if answer[0] & 0x8]

    @pytest.mark.parametrize(
        "frame", [b"\x81\x02hi", b"\x89\x00", b"\x01\x01h" + masked(0x80, b"i"), b"\x88\x02\x03\xe8"]
    )
    async def test_frames_that_are_not_masked(self, frame: bytes, memory_lan: Lan) -> None:
        """RFC 6455, 5.1: the connection is closed with 1002, and what such a frame said isn't heard."""
        daemon = await memory_lan.serve()
        ann = await memory_lan.login("Ann")
        reader, writer = await handshake(ann.url, ann.headers()["Cookie"], after=frame + masked(0x81, b"hello"))
        assert (await asyncio.wait_for(reader.read(), RETURN)).endswith(b"\x88\x0a\x03\xeaunmasked")
        writer.close()
        assert daemon.room.seq == 0

    async def test_G5_slow_requests(self, memory_lan: Lan, caplog: pytest.LogCaptureFixture) -> None:
        """Headers that stop half-way, bodies that drip, connections that say nothing: all are cut; others log in."""
        daemon = await memory_lan.serve(header_seconds=0.4, body_seconds=0.4)
        caplog.set_level(logging.INFO)
        head = b"POST /login HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/x-www-form-urlencoded\r\n"
        slow = [b"", b"G", head[:60], head, head + b"X: ", head + b"Content-Length: 99\r\n\r\nnick", b"\x16\x03\x01"]
        slow += [head + b"Transfer-Encoding: chunked\r\n\r\n", head + b"Transfer-Encoding: chunked\r\n\r\n500\r\nni"]

        async def drip(opening: bytes) -> None:
            """Go on with a byte now and then until one is cut off."""
            reader, writer = await asyncio.open_connection("127.0.0.1", daemon.port)
            writer.write(opening)
            cut = asyncio.create_task(reader.read())
            while not cut.done():
                if opening:
                    writer.write(b"a")
                await asyncio.wait([cut], timeout=0.05)
            writer.transport.abort()
            assert not isinstance(cut.exception(), Exception) or isinstance(cut.exception(), ConnectionError)

        drops = [asyncio.create_task(drip(opening)) for opening in slow * 10]
        await memory_lan.browser().login("Ann")
        await asyncio.wait_for(asyncio.gather(*drops), RETURN)
        await memory_lan.browser().login("Bob")
        assert not [record for record in caplog.records if record.name == "tornchat"]

    async def test_G5_a_handshake_of_tls_that_stops(self, memory_lan: Lan, tmp_path: Path) -> None:
        """Who opens a connection for https and says nothing, or half of it, is cut off; who has gone is no error."""
        cert, key = certificate(tmp_path)
        daemon = await memory_lan.serve(certfile=cert, keyfile=key, header_seconds=0.3)
        for opening in (b"", b"\x16\x03\x01"):
            with socket.create_connection(("127.0.0.1", daemon.port)) as connection:
                connection.sendall(opening)
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        for opening in (b"", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", b"GET / HTTP/1.1\r\n\r\n"):
            reader, writer = await asyncio.open_connection("127.0.0.1", daemon.port)
            writer.write(opening)
            with contextlib.suppress(ConnectionError):
                await asyncio.wait_for(reader.read(), RETURN)
            writer.transport.abort()

    async def test_G5_answers_that_nobody_takes(self, memory_lan: Lan) -> None:
        """Who asks and asks and doesn't read the answers is cut off: they are not kept for ever."""
        daemon = await memory_lan.serve(answer_seconds=0.3)
        ann = await memory_lan.join("Ann")
        for _ in range(10):
            await ann.expect("message", cid=await ann.say("好" * 4000))
        connections = daemon.server._connections
        before = len(connections)
        cookie = ann.headers()["Cookie"]
        request = f"GET /messages HTTP/1.1\r\nHost: localhost\r\nCookie: {cookie}\r\n\r\n".encode()
        with socket.socket() as greedy:
            greedy.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            greedy.setblocking(False)
            loop = asyncio.get_running_loop()
            await loop.sock_connect(greedy, ("127.0.0.1", daemon.port))
            await loop.sock_sendall(greedy, request * 10)
            sent = len(await loop.sock_recv(greedy, 1))
            await until(lambda: len(connections) <= before)
            with contextlib.suppress(ConnectionError):
                while piece := await loop.sock_recv(greedy, 65536):
                    sent += len(piece)
        page = await ann.fetch("/messages")
        assert 50_000 < len(page.body) < 70_000
        assert sent < 3 * len(page.body)  # of ten answers

    def test_whose_limits(self) -> None:
        """An IPv4 address has its own limits, an IPv6 address shares those of its /64."""
        for address in ("192.0.2.7", "::1", "nonsense"):
            assert tornchat.network(address) == address
        shared = {"2001:db8:1:2:3:4:5:6": "2001:db8:1:2::/64", "fe80::1%eth0": "fe80::/64"}
        for address, whose in (shared | {"::ffff:192.0.2.7": "192.0.2.7"}).items():
            assert tornchat.network(address) == whose

    @pytest.mark.parametrize(("char", "least", "most"), [("x", 40, 70), ("\U0001f600", 80, 105)])  # 17 tokens, or 65
    async def test_G5_a_pace_of_an_address(
        self, char: str, least: int, most: int, memory_lan: Lan, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Many long messages of many names from one address are slowed down together; elsewhere nobody is."""
        monkeypatch.setattr(tornchat, "CROWD", 0.01)  # so that a slow machine gives no more tokens than a quick one
        await memory_lan.serve(rate=2, trust_proxy=True)
        refused: list[Frame] = []
        for number in range(12):
            crowd = await memory_lan.login(f"Crowd {number}")
            await crowd.connect(headers={"X-Forwarded-For": f"2001:db8::{number}"})
            cids = {await crowd.say(char * 4000) for _ in range(10)}
            while cids:
                frame = await crowd.frame()
                assert frame
                cids.discard(frame.get("cid"))
            refused += crowd.seen("refused")
        assert least <= len(refused) <= most  # of 120, where there are 1,000 tokens
        assert {frame["code"] for frame in refused} == {"too-fast"}
        assert refused[0]["retry_after"] > 0
        bob = await memory_lan.join("Bob")
        assert (await bob.post("hi"))[0] == 201

    @pytest.mark.parametrize(
        ("at_once", "apart"), [(10, 19 / tornchat.REQUESTS_A_SECOND), (100, 29 * tornchat.TURN_SECONDS)]
    )
    async def test_G5_turns(self, at_once: int, apart: float, monkeypatch: pytest.MonkeyPatch) -> None:
        """Requests of one address come 3 ms apart, and at its pace; those of another don't wait for them."""
        monkeypatch.setattr(tornchat, "REQUESTS_AT_ONCE", at_once)
        limits, order = tornchat.Limits(rate=2), list[str]()
        stream: Any = types.SimpleNamespace(closed=lambda: False)

        async def request(address: str) -> None:
            await limits.turn(address, stream)
            order.append(address)

        began = time.monotonic()
        await asyncio.gather(*(request(address) for address in ["192.0.2.66"] * 30 + ["192.0.2.7"]))
        assert order.index("192.0.2.7") <= 1
        assert time.monotonic() - began >= apart

    async def test_G5_polls_of_an_address(self, memory_lan: Lan, monkeypatch: pytest.MonkeyPatch) -> None:
        """So many polls of one address may wait; more are told to come back later."""
        monkeypatch.setattr(tornchat, "POLLS_AN_ADDRESS", 3)
        daemon = await memory_lan.serve(trust_proxy=True)
        ann = await memory_lan.login("Ann")
        await ann.poll()
        path = f"/messages?after={ann.after}&epoch={ann.epoch}&last={ann.last}&wait=20"
        waiting = [asyncio.create_task(ann.fetch(path, X_Forwarded_For="192.0.2.66")) for _ in range(3)]
        await waits(daemon, 3)
        assert (await ann.fetch(path, X_Forwarded_For="192.0.2.66")).code == 429
        waiting.append(asyncio.create_task(ann.fetch(path, X_Forwarded_For="192.0.2.7")))
        await waits(daemon, 4)
        assert (await ann.post("hi"))[0] == 201
        assert [(await answer).code for answer in waiting] == [200] * 4

    async def test_G5_leaving_and_coming(self, memory_lan: Lan) -> None:
        """Who logs out and comes back with the old cookie, over and over again, is soon slowed down."""
        bob, eve = await memory_lan.join("Bob"), await memory_lan.login("Eve")
        cookies, codes = dict(eve.cookies), []
        for _ in range(2 * tornchat.REJOINS_AT_ONCE):
            await eve.fetch("/logout", form={})
            eve.cookies = dict(cookies)
            codes.append((await eve.messages())[0])
        assert codes[: tornchat.REJOINS_AT_ONCE] == [200] * tornchat.REJOINS_AT_ONCE
        assert codes[-1] == 429
        assert (await eve.ask("Eve"))[0] == 429  # nor by the form
        await bob.quiet()
        assert len(bob.seen("joined")) <= tornchat.REJOINS_AT_ONCE + 3

    async def test_a_school_comes_back(self, memory_lan: Lan, monkeypatch: pytest.MonkeyPatch) -> None:
        """As many as may log in at once may come back at once, too, after an outage in which their names have left."""
        monkeypatch.setattr(tornchat, "LOGINS_AT_ONCE", 5)
        daemon = await memory_lan.serve(trust_proxy=True, lease_seconds=0.2, name_seconds=600.0)
        pupils = [memory_lan.browser() for _ in range(5)]
        for number, pupil in enumerate(pupils):
            await pupil.fetch("/login", form={"nickname": f"Pupil {number}"}, X_Forwarded_For="192.0.2.66")
        await until(lambda: not daemon.room.roster)
        codes = [(await pupil.fetch("/messages", X_Forwarded_For="192.0.2.66")).code for pupil in pupils]
        assert codes == [200] * 5

    @pytest.mark.parametrize("files", ["Windows", "one address"])
    async def test_G5_a_full_door(self, files: str, memory_lan: Lan, monkeypatch: pytest.MonkeyPatch) -> None:
        """Connections that ask for nothing are closed for those that come; nobody inside is, and nobody waits."""
        if files == "Windows":  # where a process can't have more than so many
            monkeypatch.setattr(tornchat, "resource", None)
            monkeypatch.setattr(tornchat, "SELECT_SOCKETS", tornchat.SPARE_FILES + 20)
        else:
            monkeypatch.setattr(tornchat, "is_this_machine", lambda address: False)
            monkeypatch.setattr(tornchat, "VISITORS_AN_ADDRESS", 20)
        daemon = await memory_lan.serve()
        ann = await memory_lan.join("Ann")
        poller = await memory_lan.login("Poller")
        await poller.poll()
        poll = asyncio.create_task(poller.poll(20))
        await waits(daemon)
        crowd = [await asyncio.open_connection("127.0.0.1", daemon.port) for _ in range(50)]
        for _, writer in crowd:
            writer.write(b"G")
        bob = await memory_lan.join("Bob")
        await bob.quiet()
        await ann.expect("message", name="Bob")
        await ann.quiet()
        assert [frame["names"] for frame in await poll] == [["Bob"]]
        assert await asyncio.wait_for(crowd[0][0].read(), RETURN) == b""
        assert len(daemon.visitors.open) <= 24
        for _, writer in crowd:
            writer.transport.abort()
        ann.drop()
        bob.drop()
        await until(lambda: not (daemon.visitors.open or daemon.visitors.quiet))

    @slow
    async def test_a_school(self, memory_lan: Lan) -> None:
        """Two hundred people behind one address, each with two tabs, who all say something: nobody is refused."""
        await memory_lan.serve(rate=2, trust_proxy=True)
        people, sockets = 200, list[asyncio.StreamWriter]()
        school: dict[str, Any] = {"X_Forwarded_For": "192.0.2.66"}

        async def listen(reader: asyncio.StreamReader) -> None:
            heard = 0
            while heard < 3 * people:
                await asyncio.wait_for(reader.readuntil(b'"type":"'), RETURN)
                kind = await reader.readexactly(7)
                assert kind != b"refused"
                heard += kind == b"message"

        tasks = []
        for number in range(people):
            pupil = memory_lan.browser()
            answer = await pupil.fetch("/login", form={"nickname": f"Pupil {number}"}, **school)
            assert answer.code == 303
            cookie = pupil.headers()["Cookie"] + "\r\nX-Forwarded-For: 192.0.2.66"
            for _ in range(2):
                reader, writer = await handshake(pupil.url, cookie)
                tasks.append(asyncio.create_task(listen(reader)))
                sockets.append(writer)
        for _ in range(3):
            for writer in sockets[::2]:
                writer.write(masked(0x81, b'{"type":"say","text":"here"}'))
            await asyncio.sleep(1)
        await asyncio.gather(*tasks)
        for writer in sockets:
            writer.transport.abort()

    async def test_G10_no_redirect_leads_away(self, memory_lan: Lan) -> None:
        """Whatever stands in an address, a redirect leads to the room or to its login page, and splits no header."""
        await memory_lan.serve()
        ann, nobody = memory_lan.browser(), memory_lan.browser()
        await ann.login("Ann")
        for path in [
            *("/", "//", "//evil.example", "//evil.example/.."),
            *("/\\evil.example", "/%5cevil.example", "/@evil.example"),
            *("/?next=//evil.example", "/login?next=//evil.example", "/login?next=https://evil.example&nickname=x"),
            *("/%0d%0aSet-Cookie:%20a=b", "/?%0d%0aLocation:%20//evil.example", "/login?why=%0d%0aX:y"),
            "/.//evil.example",
        ]:
            for browser in (ann, nobody):
                answer = await browser.fetch(path)
                assert answer.headers.get("Location", "login") == "login"
                assert answer.code in (200, 302, 404)
                assert {"X", "Set-Cookie"}.isdisjoint(answer.headers)
        for path in ("/login?next=//evil.example", "/login?%0d%0aSet-Cookie:a=b"):
            answer = await memory_lan.browser().fetch(path, form={"nickname": "", "next": "//evil.example"})
            assert (answer.code, answer.headers["Location"]) == (303, "./")
        answer = await nobody.fetch("/logout?next=//evil.example", form={"next": "//evil.example"})
        assert (answer.code, answer.headers["Location"]) == (303, "login")

    @pytest.mark.parametrize("line", ["\r\nSet-Cookie: a=b", "\nX: y", "\r\n\r\n<script>", "\x0bX: y", "\x85X: y"])
    async def test_G10_nothing_splits_a_header(self, line: str, memory_lan: Lan) -> None:
        """A line break in a name, a password, a cid or a title ends no header and begins none."""
        with pytest.raises(argparse.ArgumentTypeError):
            tornchat.room_title(f"Room{line}")
        await memory_lan.serve(title=f"Room{line}")
        eve = memory_lan.browser()
        for accept in ("text/html", "application/json"):
            answer = await eve.fetch("/login", form={"nickname": f"Eve{line}", "password": line}, Accept=accept)
            assert answer.code == 400
            assert {"Set-Cookie", "X"}.isdisjoint(answer.headers)
            assert "<script>" not in text_of(answer)
        await eve.login("Eve")
        answer = await eve.fetch("/messages", form={"text": f"hi{line}", "cid": f"c{line}"})
        assert (answer.code, json.loads(answer.body)["code"]) == (400, "bad-frame")
        assert {"Set-Cookie", "X"}.isdisjoint(answer.headers)

    async def test_G10_headers_of_every_answer(self, memory_lan: Lan) -> None:
        """Every route in every way, errors too, has the headers that forbid what the pages do not need."""
        ann = await memory_lan.login("Ann")
        cookie = {"Cookie": ann.headers()["Cookie"]}
        for method, path in ROUTES:
            for more in ({}, cookie, cookie | {"Host": "evil.example"}, {"Origin": "http://evil.example"}):
                if path == "/logout" and "Origin" not in more:
                    continue
                answer = await memory_lan.ask_raw(method, path, {"Host": "localhost"} | more)
                headers = dict(line.split(": ", 1) for line in answer.strip().split("\r\n")[1:])
                policy = headers["Content-Security-Policy"]
                assert {"default-src 'none'", "frame-ancestors 'none'"} <= set(policy.split("; "))
                assert "unsafe" not in policy
                assert headers["X-Content-Type-Options"] == "nosniff"
                assert (headers["Referrer-Policy"], headers["Server"]) == ("no-referrer", "tornchat")
                if not path.startswith(("/style", "/chat.js", "/icon")) or " 200 " not in answer:
                    assert headers["Cache-Control"] == "no-store", (method, path)
                assert not any(name.startswith("Access-Control") for name in headers)

    @pytest.mark.parametrize("verbose", [("-v",), ("-v", "-v")], ids=["-v", "-v -v"])
    async def test_what_reaches_the_operator(
        self, verbose: tuple[str, ...], redis_server: RedisServer, redis_lan: Lan
    ) -> None:
        """Whoever writes what where: no control character reaches the operator's terminal, and no secret his log."""
        with redis_server.client as client:
            client.acl_setuser("tornchat", enabled=True, passwords=["+redispassword"], keys=["*"], commands=["+@all"])
        url = redis_server.url.replace("redis://", "redis://tornchat:redispassword@")
        options = "-p 0 --host 127.0.0.1 --password roompassword --rate 0 --trust-proxy --secret cookiesecret --room"
        program = redis_lan.add(await Program.start(*options.split(), redis_lan.store.room, *verbose, REDIS_URL=url))
        address = await program.address()
        port = int(address.rpartition(":")[2])
        ann = await redis_lan.login("Ann", "roompassword", at=address)
        await ann.connect()
        await ann.expect("welcome")
        await ann.expect("message", cid=await ann.say("private matters" + MISCHIEF.replace("\x00", "")))
        await ann.send("nonsense" + MISCHIEF)
        await ann.expect("refused")
        await ann.fetch("/messages", form={"text": "private matters too", "cid": MISCHIEF})
        quoted, raw = urllib.parse.quote(MISCHIEF), MISCHIEF.encode().replace(b"\r", b"")
        bare = "".join(char for char in MISCHIEF if char > "\x7f").encode()
        cookie = ann.headers()["Cookie"].encode()
        ours, post = b"Host: localhost\r\n", b"POST /login HTTP/1.1\r\nHost: localhost\r\n"
        requests = [
            b"GET /!?nickname=!&password=roompassword HTTP/1.1\r\n" + ours,
            b"GET /login HTTP/1.1\r\nHost: a!.example\r\n",
            b"GET /login HTTP/1.1\r\nX-Forwarded-Host: a!.example\r\n" + ours,
            b"GET /login HTTP/1.1\r\nX-Forwarded-For: !\r\nUser-Agent: !\r\n!: x\r\n" + ours,
            b"! /login HTTP/1.1\r\n" + ours,
            b"GET /login !\r\n" + ours,
            post + b"Origin: http://!\r\nContent-Length: 0\r\n",
            post + b"Content-Length: !\r\n",
            post + b"Content-Type: multipart/form-data; boundary=!\r\nContent-Length: 0\r\n",
            b"GET / HTTP/1.1\r\nCookie: %b; !\r\n" % cookie + ours,
            b"GET /chat?nickname=!&password=roompassword HTTP/1.1\r\nUpgrade: !\r\n" + ours,
        ]
        for mischief in (quoted.encode(), raw, bare, b"\xc2\x9b31m", b"\x9b31m"):
            for request in requests:
                await exchange(port, request.replace(b"!", mischief) + b"\r\n", b"\r\n\r\n")
        ann.drop()
        out, err = await program.stop()
        assert "Traceback" not in err
        assert not STEERS.search((out + err).replace("\n", ""))
        assert "owned" in err  # the attacks are in the log, but tame
        secrets = ["redispassword"]
        if verbose != ("-v", "-v"):
            secrets += [
                "private matters",
                "roompassword",
                "cookiesecret",
                *(value.strip('"') for value in ann.cookies.values()),
            ]
        for secret in secrets:
            assert secret not in out + err


# === Health ===========================================================================================================


class TestHealth(Transcripts):
    async def test_health(self, lan: Lan) -> None:
        """/healthz says how the daemon is, without a login."""
        await lan.join("Ann")
        await lan.browser().login("Bob")
        answer = await lan.browser().fetch("/healthz")
        health = json.loads(answer.body)
        assert answer.code == 200
        assert answer.headers["Content-Type"].startswith("application/json")
        assert set(health) == {"status", "version", "uptime", "connections", "members", "store"}
        assert (health["version"], health["connections"], health["members"]) == (tornchat.__version__, 1, 2)
        assert 0 <= health["uptime"] < 10 * RETURN

    async def test_G8_logging_in_again(self, own_redis: RedisServer, own_lan: Lan) -> None:
        """Who logs in once more while the store is away keeps the session that still is good, and the name."""
        ann = await own_lan.join("Ann")
        own_redis.kill()
        await ann.expect("store", available=False)
        await ann.tab().login("Ann")
        own_redis.start()
        await ann.expect("store", available=True)
        await ann.quiet()

    @slow
    async def test_G1_a_silent_store(
        self, own_redis: RedisServer, own_lan: Lan, caplog: pytest.LogCaptureFixture
    ) -> None:
        """Redis falls silent: a message is refused in time, everybody is told, nothing is stored twice."""
        daemon = await own_lan.serve()
        assert (daemon.config.confirm_seconds <= 5, daemon.config.store_seconds <= 6) == (True, True)
        ann = await own_lan.join("Ann")
        await ann.say_many(1)
        own_redis.send_signal(signal.SIGSTOP)
        cid = await ann.say("hello?")
        while not (ann.seen("refused") and ann.seen("store")):
            assert await ann.frame()
        assert [(frame["code"], frame["cid"]) for frame in ann.seen("refused")] == [("unavailable", cid)]
        own_redis.send_signal(signal.SIGCONT)
        await until_frame(ann, "store", available=True)
        await ann.say("hello?", cid)
        while not [frame for frame in ann.seen("message") if frame["cid"] == cid]:
            await ann.frame()
        await ann.quiet()
        assert [frame["seq"] for frame in ann.seen("message")] == [1, 2, 3]
        assert state_lines(caplog) == ["away", "back"]

    @slow
    async def test_G1_killed_with_fifty_in_flight(self, own_redis: RedisServer, own_lan: Lan) -> None:
        """Redis is killed with 50 sends in flight and started again after 1 s: all 50 are confirmed, once."""
        ann = await own_lan.join("Ann")
        cids = [await ann.say(str(n)) for n in range(50)]
        own_redis.kill()
        await asyncio.sleep(1)  # the outage is what is tested
        own_redis.start()
        confirmed = [(await until_frame(ann, "message"))["cid"] for _ in range(50)]
        assert confirmed == cids
        await ann.say("on")
        assert (await until_frame(ann, "message"))["seq"] == 51


# === Stopping =========================================================================================================


class TestStopping(Transcripts):
    async def test_G9_members_are_told(self, lan: Lan) -> None:
        """A daemon that stops closes every socket with 1001 and leaves nothing behind; it may be told to stop twice."""
        before, daemon = asyncio.all_tasks(), await lan.serve()
        ann, bob = await lan.join("Ann"), await lan.join("Bob")
        await asyncio.gather(daemon.stop(), ann.closed(1001), bob.closed(1001))
        await daemon.stop()
        with pytest.raises(ConnectionRefusedError):
            await asyncio.open_connection("127.0.0.1", daemon.port)
        for person in (ann, bob):
            person.drop()
        await until(lambda: not asyncio.all_tasks() - before)

    async def test_stopping_in_the_midst_of_it(self, lan: Lan) -> None:
        """A daemon stops in time whatever it is just doing."""
        for moment in range(0, 20, 2):
            daemon = await lan.serve()
            ann = await lan.join(f"Ann {moment}")
            for _ in range(moment):
                await ann.say("hi")
            for _ in range(moment % 5):
                await asyncio.sleep(0)
            await asyncio.gather(asyncio.wait_for(daemon.stop(), RETURN), ann.ended())

    async def test_G9_what_was_said_is_stored(self, redis_lan: Lan) -> None:
        """What was on its way when the daemon stops is stored; saying the unconfirmed again doubles nothing."""
        daemon = await redis_lan.serve()
        ann = await redis_lan.join("Ann")
        cids = [await ann.say(str(n)) for n in range(200)]
        await daemon.stop()
        await ann.ended()
        await redis_lan.serve(port=daemon.port)
        there = ann.tab()
        await there.connect(ann.after or 0, ann.epoch)
        await there.expect("welcome", recovered=True)
        confirmed = {frame["cid"] for frame in ann.seen("message")}
        for n, cid in enumerate(cids):
            if cid not in confirmed:
                await there.say(str(n), cid)
        last = ann.after or 0
        while last < 200:
            last += 1
            await there.expect("message", seq=last, text=str(last - 1), cid=cids[last - 1])
        await there.quiet()

    @slow
    async def test_G9_what_waits_is_stored(self, own_redis: RedisServer, own_lan: Lan) -> None:
        """A daemon that stops waits for the store to take what was said before it says goodbye."""
        daemon = await own_lan.serve()
        ann = await own_lan.join("Ann")
        own_redis.send_signal(signal.SIGSTOP)
        cid = await ann.say("wait for me")
        await until(lambda: daemon.outbox.waiting)
        stopping = asyncio.create_task(daemon.stop())
        await asyncio.sleep(0)
        own_redis.send_signal(signal.SIGCONT)
        await ann.expect("message", cid=cid)
        await ann.closed(1001)
        await stopping

    @slow
    async def test_G1_what_cannot_be_stored_is_refused(self, own_redis: RedisServer, own_lan: Lan) -> None:
        """What the store does not take before the daemon must stop is refused aloud."""
        daemon = await own_lan.serve(drain_seconds=0.2)
        ann = await own_lan.join("Ann")
        own_redis.send_signal(signal.SIGSTOP)
        cid = await ann.say("too late")
        await until(lambda: daemon.outbox.waiting)
        stopping = asyncio.create_task(daemon.stop())
        await ann.expect("refused", code="unavailable", cid=cid)
        await ann.closed(1001)
        await asyncio.wait_for(stopping, RETURN)
        own_redis.send_signal(signal.SIGCONT)

    async def test_G9_names_stay(self, redis_lan: Lan) -> None:
        """A restart is no leaving: at the other daemon nobody hears of it, and who comes back has the name."""
        first, second = await redis_lan.serve(), await redis_lan.serve()
        bob = await redis_lan.join("Bob", at=second)
        ann = await redis_lan.join("Ann", at=first)
        await first.stop()
        await ann.closed(1001)
        carl = await redis_lan.join("Carl", at=second)
        assert sorted(carl.welcome["members"]) == ["Ann", "Bob", "Carl"]
        assert (await redis_lan.browser(second).ask("Ann"))[0] == 409
        await ann.tab(at=second).connect()
        carl.drop()
        await bob.expect("left", names=["Carl"])
        assert bob.names_in("left") == ["Carl"]

    async def test_a_bug_ends_the_daemon(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A daemon one of whose tasks has died does not pretend to be alive: it ends, with the reason."""

        async def broken(feed: tornchat.Feed) -> None:
            raise RuntimeError("a bug")

        monkeypatch.setattr(tornchat.Feed, "run", broken)
        monkeypatch.setattr(tornchat, "stop_on_signals", asyncio.Event)
        with pytest.raises(RuntimeError, match="a bug"):
            await asyncio.wait_for(tornchat.serve(tornchat.Config(port=0, host="127.0.0.1", quiet=True)), RETURN)


# === What the operator sees ===========================================================================================


class TestOperator(Transcripts):
    async def test_banner(self, memory_lan: Lan, monkeypatch: pytest.MonkeyPatch) -> None:
        """The banner says in less than 15 lines where to open the room, where messages are kept and how to stop it."""
        monkeypatch.setattr(tornchat, "lan_addresses", lambda: ["192.0.2.7", "192.0.2.8"])
        daemon = await memory_lan.serve(host="0.0.0.0")
        lines = tornchat.banner(daemon.config, daemon.port, "key").splitlines()
        assert len(lines) < 15
        urls = [f"http://{host}:{daemon.port}/" for host in ("localhost", "192.0.2.7", "192.0.2.8")]
        assert re.findall(r"http://\S+", "\n".join(lines)) == urls
        assert tornchat.__version__ in lines[0]
        assert "memory" in "\n".join(lines)
        assert "Phones" in "\n".join(lines)
        assert "Ctrl+C" in lines[-1]
        monkeypatch.setattr(tornchat, "lan_addresses", lambda: [f"192.0.2.{n}" for n in range(9)])
        banner = tornchat.banner(tornchat.Config(workers=2), 8888, "key")
        assert (len(banner.splitlines()) < 15, "and 4 more" in banner) == (True, True)  # it stays on one screen
        assert len(tornchat.lan_urls(tornchat.Config(), 8888)) == 9

    async def test_banner_of_one_address(self, redis_lan: Lan) -> None:
        """A daemon bound to one address names that one and its Redis, without a password."""
        daemon = await redis_lan.serve()
        banner = tornchat.banner(daemon.config, daemon.port, "key")
        assert re.findall(r"http://\S+", banner) == [daemon.url]
        assert redis_lan.store.url in banner
        elsewhere = tornchat.Config(redis_url="redis://user:hunter2@example.org:7000/3")
        assert tornchat.store_name(elsewhere) == "redis://example.org:7000/3"

    def test_banner_with_a_certificate(self) -> None:
        """A certificate is for a name: that address stands first, and no port where it is the one of https."""
        config = tornchat.Config(
            certfile="cert.pem", keyfile="key.pem", allow_host=("chat.example.org",), host="127.0.0.1"
        )
        assert tornchat.lan_urls(config, 443) == ["https://chat.example.org/"]
        assert tornchat.lan_urls(config, 8888) == ["https://chat.example.org:8888/"]
        assert tornchat.local_url(config, 443) == "https://127.0.0.1/"
        assert tornchat.local_url(tornchat.Config(host="::1"), 80) == "http://[::1]/"

    async def test_the_link_of_the_host(self, memory_lan: Lan, monkeypatch: pytest.MonkeyPatch) -> None:
        """The banner shows it at a terminal only; elsewhere the key stands in no line of the daemon, and in no page."""
        config = tornchat.Config(host="127.0.0.1")
        monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
        assert "http://127.0.0.1:8888/host?key=a+key\n" in tornchat.banner(config, 8888, "a key")
        monkeypatch.setattr(sys.stdout, "isatty", lambda: False, raising=False)
        assert "key" not in tornchat.banner(config, 8888, "a key")
        program = await memory_lan.run("-p", "0", "-v", "--host-key", "lantern")
        ann = memory_lan.browser(await program.address())
        assert (await ann.fetch("/host?key=lantern")).code == 302
        await ann.login("Ann")
        pages = [text_of(await ann.fetch(path)) for path in ("/", "/login", "/chat.js", "/join.json", "/healthz")]
        out, err = await program.stop()
        assert "/host" in err
        assert "lantern" not in "".join([out, err, *pages])

    async def test_workers_have_one_key(self, redis_lan: Lan) -> None:
        """The link that the supervisor shows is that of its workers, and of every daemon of the room."""
        daemon = await redis_lan.serve()
        master, slave = pty.openpty()
        os.set_blocking(master, False)
        where = ["--redis-url", redis_lan.store.url, "--room", redis_lan.store.room]
        program = await Program.spawn([str(PROGRAM), "--workers", "2", "-p", "0", *where], {}, stdout=slave)
        redis_lan.programs.append(program)

        def printed() -> bool:
            with contextlib.suppress(BlockingIOError):
                program.printed += os.read(master, 65536).decode()
            return "stops" in program.printed

        await until(printed)
        assert f"/host?key={daemon.host_key}" in program.printed
        await program.stop()
        os.close(master)
        os.close(slave)

    @pytest.mark.parametrize(
        ("routed", "interfaces", "order"),
        [
            ("192.168.1.7", "eth0 10.0.0.2, wlan0 192.168.1.7", "192.168.1.7 10.0.0.2"),
            ("10.8.0.2", "lo 127.0.0.1, tun0 10.8.0.2, wlan0 192.168.1.7", "192.168.1.7 10.8.0.2"),
            ("1.2.3.4", "eth0 1.2.3.4, docker0 172.17.0.1", "1.2.3.4 172.17.0.1"),
            ("1.2.3.4", "eth0 1.2.3.4, eth1 10.0.0.2", "10.0.0.2 1.2.3.4"),
            ("192.168.1.7", "docker0 172.17.0.1, br0 192.168.1.7", "192.168.1.7 172.17.0.1"),
            ("", "eth0 169.254.7.7, tailscale0 100.64.0.7, docker0 172.17.0.1", "172.17.0.1 100.64.0.7 169.254.7.7"),
            ("", "br-18 172.18.0.1, br-19 172.19.0.1, wlan0 192.168.1.7", "192.168.1.7 172.18.0.1 172.19.0.1"),
            ("192.168.1.7", "", "192.168.1.7"),
        ],
    )
    def test_the_likeliest_address(
        self, routed: str, interfaces: str, order: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """What phones in the room can reach stands first: no tunnel's, no bridge's address."""
        found = {address: name for name, address in map(str.split, filter(None, interfaces.split(", ")))}
        monkeypatch.setattr(tornchat, "default_address", lambda: routed)
        monkeypatch.setattr(tornchat, "interface_addresses", lambda: found)
        monkeypatch.setattr(tornchat, "is_hardware", lambda name: name.startswith(("eth", "wlan")))
        assert " ".join(tornchat.lan_addresses()).startswith(order)

    def test_qr_code(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The QR code is drawn where segno is installed, and missed where it is not."""

        class Code:
            def terminal(self, out: Any, **kwargs: object) -> None:
                out.write("the code")

        monkeypatch.setitem(sys.modules, "segno", types.SimpleNamespace(make=lambda url, **kwargs: Code()))
        assert "the code" in tornchat.qr_code("http://192.0.2.7:8888/")
        monkeypatch.setitem(sys.modules, "segno", None)
        assert tornchat.qr_code("http://192.0.2.7:8888/") == ""

    def test_a_system_without_fcntl(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Where the system does not list its interfaces, its own name and the way out tell the addresses."""
        monkeypatch.setitem(sys.modules, "fcntl", None)
        monkeypatch.setattr(socket, "gethostbyname_ex", lambda name: (name, [], ["10.8.0.2", "192.168.1.7"]))
        monkeypatch.setattr(tornchat, "default_address", lambda: "192.168.1.7")
        assert tornchat.lan_addresses() == ["192.168.1.7", "10.8.0.2"]

    def test_one_line_a_second(self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        """A hundred lines from one place are one, the next one tells; requests and the room's own all come."""
        handler = tornchat.LogHandler()

        def write(seconds: float, level: int, words: str, line: int, name: str = "tornado.general") -> None:
            record = logging.LogRecord(name, level, "somewhere.py", line, words, None, None)
            monkeypatch.setattr(time, "monotonic", lambda: seconds)
            handler.handle(record)

        for number in range(100):
            write(number / 200, logging.WARNING, f"odd: {number}", 1)
        write(0.5, logging.ERROR, "another place", 2)
        write(0.5, logging.DEBUG, "a request", 3)
        write(0.5, logging.DEBUG, "a request", 3)
        for number in range(2):
            write(0.5, logging.ERROR, f"changed {number} times", 4, name="tornchat")
        write(1.1, logging.WARNING, "odd: 100", 1)
        assert capsys.readouterr().err.splitlines() == [
            *("odd: 0", "another place", "a request", "a request", "changed 0 times", "changed 1 times"),
            "odd: 100 (and 99 more like this)",
        ]

    def test_a_log_line_steers_no_terminal(self) -> None:
        """Whatever is logged, no control character and no bidi control reaches the terminal."""
        record = logging.LogRecord("tornchat", logging.INFO, "", 1, "%s\n%s", ("a\x1b[31m\x9b\r\u202eb", "c"), None)
        assert tornchat.LogHandler().format(record) == "a[31mb\nc"


# === Pages ============================================================================================================


class Page(html.parser.HTMLParser):
    """An HTML page, taken apart; what is open at the end or closed in a wrong order is `wrong`."""

    VOID = frozenset({"meta", "link", "input", "br", "img", "hr", "path", "circle", "rect", "line", "polyline"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.wrong: list[str] = []
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.feed(text)
        self.close()
        self.wrong += self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.wrong.append(f"</{tag}> at {self.getpos()}")

    @property
    def ids(self) -> list[str]:
        return [attributes["id"] for _, attributes in self.elements if "id" in attributes]

    @property
    def links(self) -> list[str]:
        names = ("href", "src", "action")
        return [attributes[name] for _, attributes in self.elements for name in names if name in attributes]


async def pages(lan: Lan) -> tuple[Page, Page, str]:
    """The login page with a refusal on it, the chat page, and the script."""
    await lan.serve(password="open")
    ann = lan.browser()
    refused = await ann.fetch("/login", form={"nickname": "Ann", "password": "wrong"})
    await ann.login("Ann", "open")
    return Page(text_of(refused)), Page(text_of(await ann.fetch("/"))), text_of(await ann.fetch("/chat.js"))


class TestPages(Transcripts):
    async def test_html(self, memory_lan: Lan) -> None:
        """The pages are balanced HTML that names its language; no id stands twice, no style or script within."""
        login, chat, script = await pages(memory_lan)
        writers = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function|createContextual"
        assert not re.search(writers, script)
        for page in (login, chat):
            assert page.wrong == []
            assert len(page.ids) == len(set(page.ids))
            assert page.elements[0] == ("html", {"lang": "en"})
            for tag, attributes in page.elements:
                assert tag != "style"
                assert tag != "script" or "src" in attributes
                assert not [name for name in attributes if name == "style" or name.startswith("on")]

    async def test_ids(self, memory_lan: Lan) -> None:
        """Every element that the script asks for is there, and every label and description has its control."""
        login, chat, script = await pages(memory_lan)
        asked = set(re.findall(r"(?:getElementById\(['\"]|querySelector\(['\"]#)([\w-]+)", script))
        for names in re.findall(r"const \{([^{}]*)\} = Object.fromEntries\(\[\.\.\.document", script):
            asked |= {name.split(":")[0].strip("' \n") for name in names.split(",")} - {""}
        assert asked
        assert asked <= {re.sub("-(.)", lambda dash: dash[1].upper(), id) for id in chat.ids}
        for page in (login, chat):
            for _, attributes in page.elements:
                for name in ("for", "aria-describedby", "aria-controls"):
                    assert attributes.get(name, page.ids[0]) in page.ids

    async def test_nothing_from_outside(self, memory_lan: Lan) -> None:
        """The pages load their own parts and nothing else; a browser keeps each part for as long as it is the same."""
        login, chat, script = await pages(memory_lan)
        ann = memory_lan.browser()
        style = text_of(await ann.fetch("/style.css"))
        for text in (script, style):
            assert not re.search(r"(https?:)?//[\w.-]+\.\w|@import|url\((?!['\"]?data:)", text)
        for page in (login, chat):
            for link in page.links:
                assert not re.match(r"\w+:|//", link)
            for link in [link for link in page.links if "?v=" in link]:
                answer = await ann.fetch(urllib.parse.urljoin("/login", link))
                assert answer.code == 200
                assert "immutable" in answer.headers["Cache-Control"]
        stale = await ann.fetch("/style.css?v=older")
        assert "immutable" not in stale.headers["Cache-Control"]

    @pytest.mark.parametrize(
        ("accepted", "packed"),
        [
            *(("gzip", True), ("GZIP, deflate, br", True), ("br;q=1, gzip;q=0.8", True), ("x, gzip;q=1.0", True)),
            *(("", False), ("identity", False), ("gzip;q=0", False), ("gzip; q=0.00, br", False), ("gzipped", False)),
        ],
    )
    async def test_compression(self, accepted: str, packed: bool, memory_lan: Lan) -> None:
        """Pages and their parts come compressed to whoever takes that, under 32 KB in all; what a poll says doesn't."""
        daemon = await memory_lan.serve()
        ann = memory_lan.browser()
        await ann.login("Ann")
        size = 0
        for path in ("/", "/style.css", "/chat.js", "/theme.js", "/messages", "/healthz"):
            told = f"Host: localhost\r\nAccept-Encoding: {accepted}\r\nCookie: {ann.headers()['Cookie']}\r\n"
            answer = await exchange(daemon.port, f"GET {path} HTTP/1.0\r\n{told}\r\n".encode())
            head, _, body = answer.partition(b"\r\n\r\n")
            room = path not in ("/messages", "/healthz")
            assert (b"\r\nVary: Accept-Encoding\r\n" in head) == room
            assert (b"\r\nContent-Encoding: gzip\r\n" in head) == (room and packed)
            size += len(body)
            if path.endswith((".css", ".js")):
                assert (gzip.decompress(body) if packed else body) == (await ann.fetch(path)).body
                tag = re.findall(r"\r\nEtag: (.*)\r\n", head.decode())[0]
                again = f"GET {path} HTTP/1.0\r\nIf-None-Match: {tag}\r\n{told}\r\n"
                assert b" 304 " in await exchange(daemon.port, again.encode())
        assert (size < 32_000) == packed

    def test_words(self) -> None:
        """Every word has a text in each language, with the same values to fill in."""
        for key, texts in tornchat.TEXTS.items():
            assert len(texts) == len(tornchat.LANGUAGES), key
            assert len({frozenset(re.findall(r"\{\w*\}", text)) for text in texts}) == 1, key
            assert re.search(r"[\u4e00-\u9fff]", texts[1]), key

    def test_words_are_used(self) -> None:
        """Every word that the script asks for is given to it, and none that it does not ask for."""
        script = tornchat.ASSETS["chat.js"][1]
        given = set(tornchat.page_words("en"))
        assert set(re.findall(r"(?<!\.)words\.(\w+)", script)) <= given
        for key in given:
            assert re.search(rf"words\.{key}\b|words\[['\"`]{key.split('_')[0]}_", script), key


class TestSource:
    def test_map(self) -> None:
        banners = re.findall(r"^# === (.+?) =+$", SOURCE, re.MULTILINE)
        listed = re.search(r"The file, top to bottom[^:]*:\s*([^.]+?)\.?\s*$", tornchat.__doc__ or "")
        assert listed is not None
        assert re.split(r",\s+", re.sub(r"\s+\([^)]*\)", "", " ".join(listed[1].split()))) == banners

    def test_readme_commands(self, capsys: pytest.CaptureFixture[str]) -> None:
        """The options and variables that the README names exist, and tornchat takes its commands as they stand."""
        text = readme_text()
        with pytest.raises(SystemExit):
            tornchat.parse_config(["--help"], {})
        printed = capsys.readouterr().out
        for name in re.findall(r"`(--[a-z-]+|(?:TORNCHAT_[A-Z]+|REDIS_URL)(?=`))", text):
            assert re.search(rf"{name}\b", printed), name
        commands = re.findall(r"^ {4}(?:(\w+)=(\S+) )?(?:.*[ /])?tornchat\.py(.*)$", text, re.MULTILINE)
        assert len(commands) > 8
        for variable, value, rest in commands:
            words = shlex.split(rest, comments=True)
            arguments = list(itertools.takewhile(lambda word: word not in "|&<>", words))
            tornchat.parse_config(arguments, {variable: value})

    def test_header(self) -> None:
        """Both files say what they need, for `uv run`; the program needs three packages."""
        for text in (SOURCE, Path(__file__).read_text(encoding="utf-8")):
            header = re.search(r"^# /// script\n(?:#.*\n)+?# ///$", text, re.MULTILINE)
            assert header is not None
            assert 'requires-python = ">=3.11"' in header[0]
            assert set(tornchat.REQUIREMENTS) <= set(re.findall(r'"([^"]+)"', header[0]))


# === Process ==========================================================================================================


class TestProcess(Transcripts):
    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
    async def test_start_chat_stop(self, memory_lan: Lan, number: signal.Signals) -> None:
        """The real file: its address is opened, two people talk, SIGTERM, Ctrl+C or a closed window, exit code 0."""
        program = await memory_lan.run("-p", "0")
        address = await program.address()
        ann, bob = await memory_lan.join("Ann", at=address), await memory_lan.join("Bob", at=address)
        await ann.say("hi")
        for person in (ann, bob):
            await person.expect("message", name="Ann", text="hi")
        (out, err), *_ = await asyncio.gather(program.stop(number), ann.closed(1001), bob.closed(1001))
        assert complaints(err) == []
        assert len(out.splitlines()) < 15
        assert "Ctrl+C" in out
        assert "memory" in out

    @slow
    async def test_the_log_of_a_service(self, own_redis: RedisServer, own_lan: Lan) -> None:
        """A log in a file has a line with date and time zone for: started, store away, store back, stopped."""
        program = await own_lan.run("-p", "0")
        address = await program.address()
        lines = [await program.logs("started")]
        assert address.rsplit(":", 1)[1] in lines[0]
        own_redis.kill()
        lines.append(await program.logs("store is away"))
        own_redis.start()
        lines.append(await program.logs("store is back"))
        program.signal(signal.SIGTERM)
        lines.append(await program.logs("stopped"))
        for line in lines:
            when = re.match(r"(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d[+-]\d{4}) (INFO|WARNING|ERROR) ", line)
            assert when is not None
            assert abs(datetime.datetime.strptime(when[1], "%Y-%m-%d %H:%M:%S%z").timestamp() - time.time()) < 60

    async def test_the_log_on_a_terminal(self, memory_lan: Lan) -> None:
        master, slave = pty.openpty()
        command = [str(PROGRAM), "-p", "0", "--host", "127.0.0.1"]
        program = memory_lan.add(await Program.spawn(command, {}, stderr=slave))
        await program.address()
        program.signal(signal.SIGTERM)
        assert await program.process.wait() == 0
        assert select.select([master], [], [], 0) == ([], [], [])
        os.close(master)
        os.close(slave)

    @pytest.mark.parametrize(
        ("before", "options"),
        [
            ("r, w = os.pipe(); os.close(r); os.dup2(w, 1)", ()),
            ("os.dup2(os.open('/dev/full', os.O_WRONLY), 1)", ()),
            ("os.close(1)", ()),
            ("os.environ['PYTHONIOENCODING'] = 'cp1252'", ("--title", "教室")),
            ("signal.signal(signal.SIGHUP, signal.SIG_IGN)", ()),
        ],
        ids=["nobody-reads", "full", "closed", "cp1252", "nohup"],
    )
    async def test_odd_streams(self, before: str, options: tuple[str, ...], memory_lan: Lan) -> None:
        """Whatever becomes of its stdout and its terminal, the room is open, and is closed in order."""
        port = free_port()
        start = f"import os, signal, sys; {before}; os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
        python = ("-c", start, str(PROGRAM))
        program = memory_lan.add(await Program.start("--host", "127.0.0.1", "-p", str(port), *options, python=python))
        await program.logs("started")
        ann = await memory_lan.join("Ann", at=f"http://127.0.0.1:{port}")
        if "SIGHUP" in before:
            program.signal(signal.SIGHUP)
            await ann.quiet()
        (_, err), _ = await asyncio.gather(program.stop(signal.SIGINT), ann.closed(1001))
        assert complaints(err) == []

    async def test_alone_in_an_empty_folder(self, tmp_path: Path, memory_lan: Lan) -> None:
        """The file alone is the whole program: nothing beside it is needed, nothing is left beside it."""
        copy = str(shutil.copy(PROGRAM, tmp_path))
        program = memory_lan.add(await Program.start("-p", "0", "--host", "127.0.0.1", python=(copy,)))
        ann = await memory_lan.join("Ann", at=await program.address())
        await ann.quiet()
        assert os.listdir(tmp_path) == ["tornchat.py"]

    async def test_all_addresses(self, memory_lan: Lan) -> None:
        """Without --host the room is on every address of the machine: each that is printed can be opened."""
        program = memory_lan.add(await Program.start("-p", "0"))
        await program.address()
        out, _ = await program.stop()
        addresses = re.findall(r"http://([^\s/]+)", out)
        assert addresses[0].startswith("localhost:")
        assert all(re.fullmatch(r"[\d.]+:\d+", address) for address in addresses[1:])
        assert len(set(addresses)) == len(addresses)

    async def test_quiet(self, memory_lan: Lan) -> None:
        port = free_port()
        program = await memory_lan.run("-p", str(port), "-q")
        await until(lambda: listens(port))
        await memory_lan.join("Ann", at=f"http://127.0.0.1:{port}")
        assert await program.stop() == ("", "")

    @slow
    async def test_G5_more_visitors_than_descriptors(self, memory_lan: Lan) -> None:
        """300 connections where 128 files may be open: newcomers get in at once, until it is full of members."""
        limited = after("import resource as r; r.setrlimit(r.RLIMIT_NOFILE, (128, 128))")
        program = memory_lan.add(await Program.start("--host", "127.0.0.1", "--port", "0", python=limited))
        address = await program.address()
        bob = await memory_lan.join("Bob", at=address)
        port = urllib.parse.urlsplit(address).port
        crowd = [await asyncio.open_connection("127.0.0.1", port) for _ in range(300)]
        eve = await memory_lan.join("Eve", at=address)
        full = asyncio.create_task(program.logs("full: newcomers wait"))
        for number in range(120):
            crowd.append(await asyncio.open_connection("127.0.0.1", port))
            wish = f"GET /chat?nickname=v{number} HTTP/1.1\r\nHost: localhost\r\n{UPGRADE_LINES}\r\n"
            crowd[-1][1].write(wish.encode())
            welcome = asyncio.create_task(crowd[-1][0].readuntil(b'"welcome"'))
            await asyncio.wait([welcome, full], return_when=asyncio.FIRST_COMPLETED, timeout=RETURN)
            if full.done():
                break
        welcome.cancel()
        await full
        zoe = asyncio.create_task(memory_lan.join("Zoe", at=address))
        for number in range(8):
            await eve.say(str(number))
            await bob.expect("message", name="Eve", text=str(number))
        assert not zoe.done()
        for _, writer in crowd:
            writer.close()
        await zoe
        assert complaints((await program.stop())[1]) == []

    def test_a_system_that_promises_more_files(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """macOS says that there is no limit and refuses more than 10,240: less is asked for."""
        resource = pytest.importorskip("resource")
        given = []

        def refuse_many(which: int, limits: tuple[int, int]) -> None:
            if limits[0] > 10_240:
                raise ValueError("current limit exceeds maximum limit")
            given.append(limits)

        monkeypatch.setattr(resource, "getrlimit", lambda which: (256, resource.RLIM_INFINITY))
        monkeypatch.setattr(resource, "setrlimit", refuse_many)
        tornchat.raise_file_limit()
        assert given == [(8192, resource.RLIM_INFINITY)]

    @slow
    @pytest.mark.parametrize("signals", [1, 2])
    async def test_a_second_signal(self, signals: int, own_redis: RedisServer, own_lan: Lan) -> None:
        """A stop that cannot finish its work, for the store is silent, ends in order; a second one at once."""
        program = await own_lan.run("-p", "0")
        ann = await own_lan.join("Ann", at=await program.address())
        own_redis.send_signal(signal.SIGSTOP)
        await ann.say("this will not be stored")
        program.signal(signal.SIGTERM)
        while "stopping" not in (await program.process.stdout.readline()).decode():
            pass
        if signals == 2:
            program.signal(signal.SIGTERM)
        await program.ended()
        own_redis.send_signal(signal.SIGCONT)
        assert await ann.ended() == (1001 if signals == 1 else None)
        assert [frame["code"] for frame in ann.seen("refused")] == ["unavailable"] * (2 - signals)


# === Two real windows =================================================================================================


def chromium_path() -> str:
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if path := shutil.which(name):
            return path
    return missing("Chromium")


# An address as phones have it: plain http, and not this machine's.
CHROMIUM_FLAGS = ["--host-resolver-rules=MAP room.lan 127.0.0.1", "--no-sandbox", "--disable-gpu", "--disable-quic"]
CHROMIUM_FLAGS += ["--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"]


class Window:
    """A real browser window on the room, and the person before it. Every check waits for what should be there."""

    def __init__(self, page: WebPage, url: str) -> None:
        self.page, self.url, self.tabs = page, url, list[Window]()
        self.problems: list[str] = []
        page.set_default_timeout(1000 * RETURN)
        page.on("console", lambda message: self.problems.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: self.problems.append(str(error)))
        page.on("dialog", lambda dialog: self.problems.append("a dialog"))
        page.on("request", lambda request: self.requests.append(request.url))
        self.requests: list[str] = []

    async def login(self, name: str) -> None:
        await self.page.goto(self.url)
        await self.page.fill("#nickname", name)
        await self.page.press("#nickname", "Enter")
        # On a phone it is in a drawer.
        await self.page.locator("#members", has_text=name).first.wait_for(state="attached")
        await self.state("connected")

    async def say(self, text: str) -> None:
        await self.page.fill("#box", text)
        await self.page.press("#box", "Enter")

    async def state(self, state: str) -> None:
        await self.page.wait_for_selector(f"body[data-state={state}]")

    async def shows(self, where: str, text: str) -> None:
        await self.page.locator(where, has_text=text).first.wait_for()

    async def tab(self, query: str = "") -> Window:
        other = Window(await self.page.context.new_page(), self.url)
        self.tabs.append(other)
        await other.page.goto(self.url + query)
        await other.state("connected")
        return other

    async def hide(self, hidden: bool = True) -> None:
        """The window is out of sight, as far as the page is told."""
        await self.page.evaluate(
            """(hidden) => {
                Object.defineProperty(document, 'hidden', {configurable: true, get: () => hidden});
                document.dispatchEvent(new Event('visibilitychange'));
            }""",
            hidden,
        )

    async def look(self) -> None:
        await self.hide(False)

    async def scroll(self, pixels: float) -> None:
        """The wheel, over the log, until it has an effect."""
        before = await self.number("scroller.scrollTop")
        await self.page.hover("#scroller", position={"x": 200, "y": 20})
        await self.page.mouse.wheel(0, pixels)
        await self.holds(f"scroller.scrollTop !== {before} && following === (below() < BOTTOM_PX)")

    async def keys(self, *keys: str) -> None:
        for key in keys:
            await self.page.press("#box", key)

    async def written(self, text: str) -> None:
        await self.holds(f"box.value === {json.dumps(text)}")

    async def titled(self, text: str) -> None:
        await self.holds(f"document.title === {json.dumps(text)}")

    async def texts(self, where: str) -> list[str]:
        return await self.page.locator(where).all_inner_texts()

    async def holds(self, expression: str) -> None:
        """What is true in the page, soon (its policy forbids what wait_for_function does)."""
        try:
            await until(lambda: self.page.evaluate(expression))
        except pytest.fail.Exception:
            pytest.fail(f"still not so: {expression}")

    async def links(self) -> list[str]:
        return list(await self.page.eval_on_selector_all("#log a", "all => all.map(a => a.href)"))

    async def number(self, expression: str) -> float:
        return float(await self.page.evaluate(expression))

    async def messages(self) -> list[str]:
        return [text.strip() for text in await self.page.locator("#log .message .text").all_text_contents()]

    async def shows_messages(self, *texts: str) -> None:
        """The messages in the window are these, once each, in this order; nothing waits to be sent."""

        async def shown() -> bool:
            return await self.messages() == list(texts) and await self.page.locator("#outbox .message").count() == 0

        try:
            await until(shown)
        except pytest.fail.Exception:
            pytest.fail(f"{await self.messages()} instead of {texts}")

    def well_behaved(self, *, restarts: bool = False) -> None:
        """Nothing in the console, but what a browser itself writes when a server is away; nothing from elsewhere."""
        expected = r"net::ERR_|WebSocket connection to|status of (401|503)" if restarts else r"(?!)"
        assert [problem for problem in self.problems if not re.search(expected, problem)] == []
        ours = (self.url, "ws" + self.url[4:], "data:", "blob:")
        assert [url for url in self.requests if not url.startswith(ours)] == []
        for tab in self.tabs:
            tab.well_behaved(restarts=restarts)


@contextlib.asynccontextmanager
async def windows(
    lan: Lan, *names: str, at: str = "", restarts: bool = False, **options: Any
) -> AsyncIterator[list[Window]]:
    """Windows of real browsers that share nothing, whose people have logged in, unless they have no name yet.

    A host's name has a star. In the end nothing was wrong in any window.
    """
    url = at or place(await lan.open()) + "/"
    options = {"locale": "en-US", "viewport": {"width": 1280, "height": 800}} | options
    async with async_playwright() as tools:
        chromium = await tools.chromium.launch(executable_path=chromium_path(), args=CHROMIUM_FLAGS)
        try:
            people = [Window(await (await chromium.new_context(**options)).new_page(), url) for _ in names]
            for person, name in zip(people, names, strict=True):
                if name.startswith("★"):
                    await person.page.goto(f"{url}host?key={lan.daemons[-1].host_key}")
                if name:
                    await person.login(name.strip("★ "))
            yield people
            for person in people:
                person.well_behaved(restarts=restarts)
        finally:
            await chromium.close()


@contextlib.asynccontextmanager
async def window(lan: Lan, **options: Any) -> AsyncIterator[Window]:
    """Ann's window, when she has logged in."""
    async with windows(lan, "Ann", **options) as (ann,):
        yield ann


@slow
class TestWindows(Transcripts):
    async def test_two_people_talk_in_windows(self, lan: Lan) -> None:
        """Two real windows: each sees the other come, both see what both say, as text and in one order."""
        async with windows(lan, "Ann", "Bob <i>") as (ann, bob):
            await ann.shows("#members", "Bob <i>")
            attack = "<img src=x onerror=alert(1)> https://example.org/?a=b&c javascript:alert(1)"
            await ann.say(attack)
            await bob.shows_messages(attack)
            await bob.say("hi Ann")
            await ann.shows_messages(attack, "hi Ann")
            assert await bob.page.locator("#log img").count() == 0
            assert await bob.links() == ["https://example.org/?a=b&c"]

    async def test_a_reload_keeps_all(self, lan: Lan) -> None:
        """A reload keeps name and history, and a draft; a taken name is refused with a free one filled in."""
        async with windows(lan, "Ann", "") as (ann, bob):
            await ann.say("first")
            await ann.shows_messages("first")
            await ann.page.fill("#box", "half a sent")
            await ann.page.reload()
            await ann.shows_messages("first")
            assert await ann.page.locator("body").get_attribute("data-name") == "Ann"
            assert await ann.page.input_value("#box") == "half a sent"
            await bob.page.goto(bob.url)
            await bob.page.fill("#nickname", "ann")
            await bob.page.press("#nickname", "Enter")
            await bob.page.wait_for_selector("#error")
            bob.problems.clear()  # of which the status 409 is one
            assert await bob.page.input_value("#nickname") not in ("Ann", "ann", "")
            offered = "nickname.selectionEnd - nickname.selectionStart === nickname.value.length"
            await bob.holds(f"document.activeElement === nickname && {offered}")
            await bob.page.press("#nickname", "Enter")
            await bob.shows_messages("first")
            await ann.page.click("summary")
            await ann.page.click("#logout button")
            await ann.page.wait_for_selector("#nickname")

    async def test_G9_a_restart_under_windows(self, lan: Lan) -> None:
        """A restart under two windows, one that polls: what is said meanwhile is sent once; a lost history is told."""
        async with windows(lan, "Ann", "Bob", restarts=True) as (ann, bob):
            await bob.page.goto(bob.url + "?transport=polling")
            await bob.shows("#state-text", "by polling")
            await ann.say("before")
            await bob.shows_messages("before")
            port = lan.daemons[-1].port
            await lan.daemons[-1].stop()
            await ann.page.wait_for_selector("body:not([data-state=connected])")
            await ann.say("meanwhile")
            await ann.shows("#outbox", "meanwhile")
            await lan.serve(port=port)
            await ann.state("connected")
            await bob.state("connected")
            await ann.shows_messages("before", "meanwhile")
            await bob.shows_messages("before", "meanwhile")
            for window in (ann, bob):
                assert await window.page.locator(".notice[data-kind=reset]").count() == (0 if lan.store.lasts else 1)
                assert await window.page.locator("#log .past .text").count() == (0 if lan.store.lasts else 1)
            await bob.say("after")
            await ann.shows_messages("before", "meanwhile", "after")
            await ann.shows("#members", "Bob")

    async def test_chinese_window(self, memory_lan: Lan) -> None:
        async with windows(memory_lan, "小明", locale="zh-CN") as (ann,):
            assert (await ann.page.locator("html").get_attribute("lang") or "").startswith("zh")
            assert await ann.page.locator("#logout button").text_content() == tornchat.WORDS["zh"]["chat_logout"]
            await ann.say("大家好")
            await ann.shows_messages("大家好")


@slow
class TestWriting(Transcripts):
    async def test_keys(self, memory_lan: Lan) -> None:
        """Enter sends, Shift+Enter breaks the line; the box grows to six lines; what is pasted keeps its lines."""
        async with window(memory_lan) as ann:
            await ann.keys("o", "n", "e", "Shift+Enter", "t", "w", "o")
            await ann.written("one\ntwo")
            await ann.keys("Enter")
            await ann.shows_messages("one\ntwo")
            await ann.written("")
            await ann.keys("Enter")
            lines = [await ann.number("box.clientHeight")]
            for _ in range(8):
                await ann.keys("x", "Shift+Enter")
                lines.append(await ann.number("box.clientHeight"))
            assert lines[0] < lines[2] < lines[5] == lines[8]
            await ann.page.fill("#box", "")
            pasted = "  def f():\n\n      return 1"
            await ann.page.evaluate("text => { box.focus(); document.execCommand('insertText', false, text); }", pasted)
            await ann.keys("Enter")
            await ann.shows_messages("one\ntwo", pasted.strip())
            assert await ann.page.locator("#log .text").last.text_content() == pasted

    async def test_composition(self, memory_lan: Lan) -> None:
        """Enter while an input method composes ends the composition: it neither sends nor breaks the line."""
        async with window(memory_lan) as ann:
            await ann.page.focus("#box")
            keyboard = await ann.page.context.new_cdp_session(ann.page)
            await keyboard.send("Input.imeSetComposition", {"text": "ni", "selectionStart": 2, "selectionEnd": 2})
            await ann.written("ni")
            await ann.page.evaluate("""for (const told of [{isComposing: true}, {keyCode: 229}]) {
                box.dispatchEvent(new KeyboardEvent('keydown', {key: 'Enter', bubbles: true, ...told}));
            }""")
            await ann.written("ni")
            await keyboard.send("Input.insertText", {"text": "你好"})
            await ann.written("你好")
            assert await ann.page.locator(".message").count() == 0
            await ann.keys("Enter")
            await ann.shows_messages("你好")

    async def test_counter(self, memory_lan: Lan) -> None:
        """Near the limit the rest is counted; what is too long is neither sent nor cut."""
        async with window(memory_lan) as ann:
            await ann.page.fill("#box", "x" * 3799)
            assert await ann.page.locator("#left-over").inner_text() == ""
            await ann.page.fill("#box", "😀" * 3990)
            await ann.shows("#left-over", "left: 10")
            await ann.say("x" * 4001)
            await ann.shows("#left-over.over", "too many: 1")
            await ann.written("x" * 4001)
            await ann.keys("Backspace", "Enter")
            await ann.shows_messages("x" * 4000)

    async def test_recall(self, memory_lan: Lan) -> None:
        """The arrow keys bring back what was said, also after a reload, and never over something written."""
        async with window(memory_lan) as ann:
            for text in ("first", "second"):
                await ann.say(text)
            await ann.shows_messages("first", "second")
            for key, text in zip(
                ("Up", "Left", "Up", "Up", "Down", "Down"),
                ("second", "second", "first", "first", "second", ""),
                strict=True,
            ):
                await ann.keys(f"Arrow{key}")
                await ann.written(text)
            await ann.page.reload()
            await ann.state("connected")
            await ann.keys("ArrowUp", "!", "ArrowUp")
            await ann.written("second!")

    async def test_names_are_completed(self, memory_lan: Lan) -> None:
        """Tab completes a name behind an @, one after the other; without one it goes on to the next control."""
        for name in ("Bob", "Boris Z", "小明"):
            await memory_lan.join(name)
        async with window(memory_lan) as ann:
            await ann.page.type("#box", "hi @bo")
            assert await ann.texts("#matches button") == ["Bob", "Boris Z"]
            await ann.keys("Tab")
            await ann.written("hi @Bob ")
            await ann.keys("Tab")
            await ann.written("hi @Boris Z ")
            assert await ann.page.locator("#matches").is_hidden()
            await ann.page.type("#box", "and @小")
            await ann.page.click("#matches button")
            await ann.written("hi @Boris Z and @小明 ")
            await ann.page.fill("#box", "ann@example.org")
            assert await ann.page.locator("#matches").is_hidden()
            await ann.keys("Tab")
            assert await ann.page.evaluate("document.activeElement.id") == "send"

    async def test_what_is_refused_is_kept(self, memory_lan: Lan) -> None:
        """What came too fast waits and says for how long; what the room does not take can be tried again or changed."""
        await memory_lan.serve(rate=2.0)
        async with window(memory_lan) as ann:
            await ann.page.evaluate("for (let n = 0; n < 12; n += 1) { box.value = `${n}`; composer.requestSubmit(); }")
            await ann.shows("#outbox .status", "Sends in 1 s")
            await ann.page.evaluate("{ const now = Date.now; Date.now = () => now() - 3600000; }")  # it is set back
            await ann.shows_messages(*map(str, range(12)))
            await ann.say("\x07")
            await ann.shows("#outbox .failed .status", "Not sent: The message is empty.")
            await ann.page.click("#outbox button >> text=Try again")
            await ann.shows("#outbox .failed .status", "Not sent")
            await ann.page.click("#outbox button >> text=Edit")
            await ann.written("\x07")
            assert await ann.page.locator("#outbox .message").count() == 0

    async def test_a_phone(self, memory_lan: Lan) -> None:
        """A phone has a key for a new line, nothing too small for a thumb, and no text that makes it zoom."""
        phone: dict[str, Any] = {"viewport": {"width": 360, "height": 640}, "has_touch": True, "is_mobile": True}
        async with window(memory_lan, **phone) as ann:
            await ann.page.fill("#box", "one")
            await ann.page.tap("#break")
            await ann.page.keyboard.type("two")
            await ann.page.tap("#send")
            await ann.shows_messages("one\ntwo")
            await ann.page.tap("#people")
            await ann.page.wait_for_selector("#roster.open")
            await ann.page.tap("summary")
            for control in await ann.page.locator("summary:visible, .settings label:visible").all():
                box = await control.bounding_box()
                assert box
                assert min(box["width"], box["height"]) >= 44, await control.inner_text()
            assert await ann.number("parseFloat(getComputedStyle(box).fontSize)") >= 16
            await ann.page.keyboard.press("Escape")
            await ann.page.wait_for_selector("#roster:not(.open)", state="attached")
            assert await ann.number("document.documentElement.scrollWidth") == 360

    async def test_a_phone_on_its_side(self, memory_lan: Lan, monkeypatch: pytest.MonkeyPatch) -> None:
        """Above a keyboard the box leaves the log its place; an invitation can be closed; no name widens it."""
        monkeypatch.setattr(tornchat, "lan_addresses", lambda: ["192.0.2.7", "198.51.100.9"])
        at = f"http://127.0.0.1:{(await memory_lan.serve(host='')).port}/"
        await memory_lan.join("W" * 24)
        async with window(memory_lan, at=at, viewport={"width": 740, "height": 180}) as ann:
            await ann.page.fill("#box", "line\n" * 8)
            assert await ann.number("composer.getBoundingClientRect().height / innerHeight") <= 0.4
            assert await ann.number("composer.getBoundingClientRect().bottom") <= 180
            assert await ann.number("scroller.clientHeight") > 45
            await ann.page.set_viewport_size({"width": 740, "height": 360})
            closing = "const it = invite.querySelector('.close'); it.getBoundingClientRect().bottom < 360 && it.click()"
            for close in (closing, ""):
                await ann.page.click("#join")
                await ann.holds("addresses.options.length > 1")
                await (ann.page.evaluate(close) if close else ann.page.mouse.click(8, 180))
                await ann.page.wait_for_selector("#invite", state="hidden")
            await ann.page.set_viewport_size({"width": 320, "height": 560})
            await ann.page.fill("#box", "")
            await ann.page.type("#box", "@ww")
            await ann.shows("#matches button", "WWW")
            assert await ann.number("document.documentElement.scrollWidth") == 320
            assert await ann.number("matchList.firstChild.getBoundingClientRect().right") <= 320

    async def test_typing_after_a_click_into_the_log(self, memory_lan: Lan) -> None:
        """What is typed after a click into the log comes into the box; keys that scroll, scroll."""
        async with window(memory_lan) as ann:
            await ann.page.click("#scroller")
            await ann.page.keyboard.press("PageUp")
            await ann.page.keyboard.press("Control+c")
            await ann.page.keyboard.press("Space")
            assert await ann.page.evaluate("document.activeElement.id") == "scroller"
            await ann.page.keyboard.type("hi you")
            await ann.written("hi you")


@slow
class TestReading(Transcripts):
    async def test_follows_only_at_the_bottom(self, memory_lan: Lan) -> None:
        """Whoever has scrolled back stays there, is told how many came below, and led to the first, then to the end."""
        bob = await memory_lan.join("Bob")
        await bob.say_many(60)
        async with window(memory_lan) as ann:
            await ann.shows("#log", "60")
            await ann.holds("below() < 2")
            await ann.scroll(-800)
            await ann.shows("#newer", "Latest messages")
            # The wheel turns for some frames more.
            await ann.page.evaluate("new Promise((done) => { scroller.onscrollend = done; setTimeout(done, 500); })")
            top = await ann.number("topOf(shown.get(30))")
            await bob.say_many(60, first=61)
            await ann.shows("#newer", "60 new")
            assert abs(await ann.number("topOf(shown.get(30))") - top) < 1
            await ann.page.click("#newer")
            await ann.holds("newLine.getBoundingClientRect().top - scroller.getBoundingClientRect().top < 40")
            assert await ann.texts(".notice[data-kind=new] + .message .text") == ["61"]
            assert not await ann.page.evaluate("following")
            await ann.page.click("#newer")
            await ann.holds("following && below() < 2 && newer.hidden")
            await bob.say("121")
            await ann.shows("#log", "121")
            await ann.holds("below() < 2")

    async def test_less_keeps_its_place(self, memory_lan: Lan) -> None:
        """A long message begins where it began, whether all of it is shown or less again."""
        bob = await memory_lan.join("Bob")
        await bob.say_many(40)
        async with window(memory_lan) as ann:
            await bob.say("\n".join(f"line {number}" for number in range(200)))
            for number in range(5):
                await bob.say(str(number))
            await ann.holds("shown.size === 46 && following && below() < 2")
            top = "document.querySelector('.fold').parentElement.getBoundingClientRect().top"
            before = await ann.number(top)
            for text in ("Show less", "Show all"):
                await ann.page.evaluate("document.querySelector('.fold').click()")
                await ann.shows(".fold", text)
                await ann.page.evaluate("new Promise((done) => requestAnimationFrame(() => setTimeout(done, 50)))")
                assert abs(await ann.number(top) - before) < 2
            await ann.page.click(".fold")
            await ann.page.locator(".fold").scroll_into_view_if_needed()
            await ann.page.click(".fold")
            await ann.holds(f"{top} > 57")

    async def test_new_since_you_left(self, memory_lan: Lan) -> None:
        """What came while nobody looked stands below a line, the title counts it, the icon has a dot."""
        await memory_lan.serve(title="Den")
        bob = await memory_lan.join("Bob")
        async with window(memory_lan) as ann:
            await bob.say("before")
            await ann.shows_messages("before")
            await ann.hide()
            await bob.say("while away")
            await bob.say("and more")
            await ann.titled("(2) Den")
            icon = str(await ann.page.get_attribute("#icon", "href"))
            assert "unread" in icon
            assert (await memory_lan.browser().fetch(icon.removeprefix("."))).code == 200
            await ann.shows_messages("before", "while away", "and more")
            await ann.look()
            await ann.titled("Den")
            assert "unread" not in (await ann.page.get_attribute("#icon", "href") or "")
            line = "[...log.querySelectorAll('.part > *')].findIndex(row => row.dataset.kind === 'new')"
            rows = await ann.texts("#log .part > *")
            assert rows[int(await ann.number(line))] == "New messages"
            assert "while away" in rows[int(await ann.number(line)) + 1]
            await ann.page.reload()
            await ann.shows_messages("before", "while away", "and more")
            assert await ann.number(line) == -1
            await ann.page.goto("about:blank")
            await bob.say("after the page")
            await ann.page.goto(ann.url)
            await ann.shows_messages("before", "while away", "and more", "after the page")
            assert "after the page" in (await ann.texts("#log .part > *"))[int(await ann.number(line)) + 1]
            await ann.say("I am here")
            await ann.holds(f"{line} === -1")

    async def test_what_is_more_than_text(self, memory_lan: Lan) -> None:
        """Addresses, code and emoji are shown as such, and nothing else; what is long is folded."""
        bob = await memory_lan.join("\u05d1\u05d5\u05d1")
        async with window(memory_lan) as ann:
            await bob.say(
                "see (https://example.org/a_(b)?c=1#d), or http://[::1]/ and javascript:alert(1) *not* <b>b</b>"
            )
            await bob.say("run `ls -l` and\n```python\nif x:\n    y = '`https://no.link`'\n```\nthen `")
            await bob.say("👍🏽 👨‍👩‍👧 🇩🇪")
            await bob.say("5 👍")
            await bob.say("long " * 400)
            await bob.say("\u202eevil\u202c and \u2067rtl")
            await ann.shows("#log", "rtl")
            assert await ann.links() == ["https://example.org/a_(b)?c=1#d", "http://[::1]/"]
            for attribute, value in (("rel", "noopener noreferrer"), ("target", "_blank")):
                assert await ann.page.get_attribute("#log a", attribute) == value
            assert await ann.texts("#log code") == ["ls -l", "if x:\n    y = '`https://no.link`'"]
            assert await ann.texts("#log pre") == ["if x:\n    y = '`https://no.link`'"]
            assert await ann.page.locator("#log .emoji").count() == 1
            assert await ann.page.locator("#log .folded").count() == 1
            tall = await ann.number("document.querySelector('.folded').clientHeight")
            await ann.page.click("#log .fold")
            await ann.shows("#log .fold[aria-expanded=true]", "Show less")
            assert await ann.number("document.querySelectorAll('#log .text')[4].clientHeight") > tall
            assert await ann.page.locator("#log .who").first.evaluate("who => who.localName") == "bdi"
            assert await ann.page.locator("#log .line").last.get_attribute("dir") == "auto"

    async def test_a_message_is_no_more_than_it_has_to_be(self, memory_lan: Lan) -> None:
        """A message has at most a hundred elements, the rest of it is text; what is long is folded on a wall too."""
        bob = await memory_lan.join("Bob")
        heavy = ("`x`" * 1333, "@Ann " * 800, "```x``` @Ann" * 300)
        async with window(memory_lan) as ann:
            wall = await ann.tab("?view=projector")
            for text in heavy:
                await bob.say(text)
            await bob.say("\n".join("x" * 2000))
            await ann.holds("shown.size === 4")
            counted = "all => all.map((text) => text.querySelectorAll('*').length)"
            assert await ann.page.eval_on_selector_all("#log .text", counted) == [100, 100, 99, 0]
            assert (await ann.messages())[0] == "x" * 100 + heavy[0][300:]
            assert (await ann.messages())[1] == heavy[1].strip()
            await wall.holds("shown.size === 4")
            assert await wall.number("lastRow().clientHeight") < 800

    async def test_addresses_in_a_message(self, memory_lan: Lan) -> None:
        """What begins with www. is an address as well; no mark of direction turns one round, within it or before."""
        bob = await memory_lan.join("Bob")
        async with window(memory_lan) as ann:
            await bob.say("www.example.org/a, awww.b https://c.example/\u202egpj.exe \u202ehttps://d.example/")
            await ann.shows("#log", "awww.b")
            links = "#log a >> visible=true"
            assert await ann.links() == ["http://www.example.org/a", "https://c.example/", "https://d.example/"]
            assert await ann.texts(links) == ["www.example.org/a", "https://c.example/", "https://d.example/"]
            order = "a => { const range = new Range(); const at = (n) => { range.setStart(a.firstChild, n);"
            order += "range.setEnd(a.firstChild, n + 1); return range.getBoundingClientRect().left; };"
            assert await ann.page.locator(links).last.evaluate(order + "return at(0) < at(10); }")

    async def test_days_by_the_servers_clock(self, memory_lan: Lan) -> None:
        """Today is what the server calls so, whatever the reader's clock says; each time tells its date."""
        bob = await memory_lan.join("Bob")
        async with windows(memory_lan, "", "", timezone_id="Asia/Shanghai") as (ann, eve):
            await eve.page.clock.set_system_time(time.time() - 3 * 86400)
            for window, name in ((ann, "Ann"), (eve, "Eve")):
                await window.login(name)
            await bob.say("hi")
            for window in (ann, eve):
                await window.shows_messages("hi")
                assert await window.page.get_attribute("#log .message", "data-day") == "Today"
            times = [await window.page.get_attribute("#log time", "title") for window in (ann, eve)]
            assert times[0] == times[1]
            assert str(time.gmtime().tm_year) in str(times[0])
            await eve.page.evaluate("setClock({ts: serverTime() + 86400000}); tick()")
            assert await eve.page.get_attribute("#log .message", "data-day") == "Yesterday"

    async def test_presence_is_folded(self, memory_lan: Lan) -> None:
        """Who comes and goes is one quiet line and wakes nobody; who differs in a number alone has another colour."""
        async with window(memory_lan) as ann:
            hues = await ann.page.evaluate("Array.from({length: 10}, (_, n) => hueOf(`Pupil 0${n}`))")
            apart = [abs(one - other) for one, other in itertools.combinations(hues, 2)]
            assert min(min(degrees, 360 - degrees) for degrees in apart) >= 30
            await ann.hide()
            crowd = [await memory_lan.join(f"Guest {letter}") for letter in "abcde"]
            await ann.shows(".notice[data-kind=presence]", "5 people joined")
            assert await ann.page.locator("#log .notice").count() == 1
            assert await ann.page.title() == "tornchat"
            await crowd[0].fetch("/logout", form={})
            await ann.shows(".notice[data-kind=presence]", "4 people joined")


@slow
class TestAttention(Transcripts):
    async def test_mention(self, memory_lan: Lan) -> None:
        """A message that names the reader stands out; a longer name, or one's own words, do not."""
        bob = await memory_lan.join("Bob")
        async with window(memory_lan, color_scheme="dark") as ann:
            for text in ("hi @ann!", "hi @Anna", "write `@Ann`", "@Ann"):
                await bob.say(text)
            await ann.say("I am @Ann")
            await ann.shows_messages("hi @ann!", "hi @Anna", "write `@Ann`".replace("`", ""), "@Ann", "I am @Ann")
            assert await ann.texts("#log .mention .text") == ["hi @ann!", "@Ann"]
            shadow = "getComputedStyle(document.querySelector('.mention .bubble')).boxShadow"
            assert "inset" in str(await ann.page.evaluate(shadow))
            assert await ann.texts("#log mark") == ["@ann", "@Ann", "@Ann"]

    async def test_sound_and_notifications(self, memory_lan: Lan) -> None:
        """Both are off until they are asked for; the second is offered only where a browser allows it at all."""
        bob = await memory_lan.join("Bob")
        async with windows(memory_lan, "", permissions=["notifications"]) as (ann,):
            await ann.page.add_init_script(
                "window.told = []; window.Notification = class { static permission = 'granted';"
                "static requestPermission = async () => 'granted'; constructor(...it) { told.push(it); } };"
            )
            await ann.login("Ann")
            await ann.hide()
            await bob.say("unheard")
            await ann.titled("(1) tornchat")
            assert await ann.page.evaluate("[audio, told.length]") == [None, 0]
            await ann.look()
            await ann.page.click("summary")
            await ann.page.check("#sound")
            await ann.page.check("#notify")
            await ann.holds("audio.state === 'running' && kept('notify', 'localStorage')")
            await ann.page.reload()
            await ann.state("connected")
            assert await ann.page.is_checked("#sound")
            await ann.hide()
            await bob.say("heard")
            await ann.holds("audio !== null && told.length === 1")
            assert (await ann.page.evaluate("told"))[0][:1] == ["Bob"]

    async def test_two_tabs_agree(self, memory_lan: Lan) -> None:
        """Two tabs of one person: what one says is both's own, what one has read is read, one taste in colours."""
        bob = await memory_lan.join("Bob")
        async with window(memory_lan, color_scheme="dark") as ann:
            other = await ann.tab()
            await ann.say("mine")
            await other.shows_messages("mine")
            assert await other.page.locator("#log .mine").count() == 1
            await other.hide()
            await bob.say("news")
            await ann.shows_messages("mine", "news")
            await other.titled("tornchat")
            await ann.hide()
            await bob.say("more")
            await other.titled("(1) tornchat")
            await ann.titled("(1) tornchat")
            await ann.look()
            await other.titled("tornchat")
            assert await ann.page.get_attribute("html", "data-theme") == "dark"
            await ann.page.click("summary")
            await ann.page.select_option("#theme", "light")
            await other.page.wait_for_selector("html[data-theme=light]")
            await other.holds("themeChoice.value === 'light'")
            await other.page.reload()
            await other.page.wait_for_selector("html[data-theme=light]")

    async def test_plain_http(self, memory_lan: Lan, monkeypatch: pytest.MonkeyPatch) -> None:
        """On an address of the network, where browsers trust nothing, all works; what they forbid is not offered."""
        monkeypatch.setattr(tornchat, "lan_addresses", lambda: ["192.0.2.7", "198.51.100.9"])
        daemon = await memory_lan.serve(host="")
        async with window(memory_lan, at=f"http://room.lan:{daemon.port}/") as ann:
            assert not await ann.page.evaluate("isSecureContext")
            await ann.say("hello")
            await ann.shows_messages("hello")
            assert await ann.page.locator("#notify").is_hidden()
            await ann.page.click("#join")
            await ann.holds("addresses.options.length === 3")
            await ann.page.click("#copy")
            await ann.shows("#copy", "Copied")
            await ann.page.keyboard.press("Escape")
            await ann.page.focus("#box")
            await ann.page.keyboard.press("Control+V")
            await ann.written(ann.url.rstrip("/"))


@slow
class TestTruth(Transcripts):
    async def test_G1_state_line(self, own_redis: RedisServer, own_lan: Lan) -> None:
        """The page says what is wrong: no store, no server and when it tries again, no network."""
        daemon = await own_lan.serve(store_seconds=0.5, block_seconds=0.1)
        async with window(own_lan, restarts=True) as ann:
            await ann.shows("#state-text", "Connected")
            own_redis.kill()
            await ann.state("away")
            await ann.shows("#state-text", "cannot save messages right now")
            await ann.say("later")
            await ann.shows("#outbox .status", "Waiting until it can be saved")
            assert await ann.messages() == []
            own_redis.start()
            await ann.shows_messages("later")
            await daemon.stop()
            await ann.state("restarting")
            await ann.shows("#state-text", "The server was stopped.")
            await ann.shows("#state-wait", "Next try in")
            await ann.page.context.set_offline(True)
            await ann.state("offline")
            await ann.shows("#state-text", "This device is offline.")
            await ann.say("much later")
            await ann.shows("#outbox .status", "Waiting for the connection")
            await own_lan.serve(port=daemon.port)
            await ann.page.context.set_offline(False)
            await ann.shows_messages("later", "much later")

    async def test_G2_missed(self, memory_lan: Lan) -> None:
        """Whoever was away for too long is told how many messages are missing, where they are missing."""
        bob = await memory_lan.join("Bob")
        async with window(memory_lan) as ann:
            await bob.expect("message", cid=await bob.say("0"))
            await ann.shows_messages("0")
            await ann.page.evaluate("link.close()")
            await bob.say_many(1203)
            await ann.page.evaluate("connect()")
            await ann.shows_messages("0", *map(str, range(1104, 1204)))
            rows = await ann.page.locator("#log .part > *").all_text_contents()
            assert rows.index("Messages missed while you were away: 1103") == 1 + rows.index(rows[0])

    @pytest.mark.parametrize("query", ["", "?transport=polling"])
    async def test_G2_another_message_of_that_number(self, query: str, memory_lan: Lan) -> None:
        """A page says when its last message was said: where the room has another of that number, all is shown anew."""
        async with window(memory_lan) as ann:
            await ann.page.goto(ann.url + query)
            await ann.state("connected")
            await ann.say("one")
            await ann.shows_messages("one")
            await ann.page.evaluate("connect()")
            await ann.holds("phase === 'connected'")
            await ann.say("two")
            await ann.shows_messages("one", "two")
            await ann.page.evaluate("at -= 1000; connect()")
            await ann.shows(".notice[data-kind=reset]", "lost its history")
            await ann.shows_messages("one", "two", "one", "two")

    async def test_waking_up(self, memory_lan: Lan) -> None:
        """A wake from sleep, a page out of the browser's cache, another network: the connection is renewed at once."""
        async with window(memory_lan) as ann:
            sockets: list[str] = []
            ann.page.on("websocket", lambda socket: sockets.append(socket.url))
            for number, happens in enumerate(
                (
                    "heard -= 30000; document.dispatchEvent(new Event('visibilitychange'))",
                    "wallStart -= 30000; tick()",
                    "window.dispatchEvent(new PageTransitionEvent('pageshow', {persisted: true}))",
                    "window.dispatchEvent(new Event('online'))",
                ),
                1,
            ):
                await ann.page.evaluate(happens)
                await ann.holds("phase === 'connected'")
                assert len(sockets) == number, happens
            await ann.page.evaluate("document.dispatchEvent(new Event('visibilitychange')); tick()")
            await ann.say("still here")
            await ann.shows_messages("still here")
            assert len(sockets) == 4

    async def test_polling(self, memory_lan: Lan) -> None:
        """Behind a proxy that knows no WebSocket the page polls, says so, and comes back to the socket when it can."""
        daemon = await memory_lan.serve()
        bob = await memory_lan.join("Bob")
        async with OldProxy(daemon.port) as proxy, window(memory_lan, at=proxy.http, restarts=True) as ann:
            assert proxy.refused >= 2
            await ann.shows("#state-text", "Connected, by polling")
            await bob.expect("joined", names=["Ann"])
            await ann.say("by post")
            await ann.shows_messages("by post")
            await bob.expect("message", name="Ann", text="by post")
            for number in range(20):
                await bob.say(str(number))
                await ann.say(f"re {number}")
            await ann.shows("#log", "re 19")
            eve = await memory_lan.join("Eve")
            await ann.shows("#members", "Eve")
            await eve.fetch("/logout", form={})
            await ann.holds("!members.has('Eve')")
            both = await ann.messages()
            assert sorted(both[1:]) == sorted([*map(str, range(20)), *(f"re {number}" for number in range(20))])
            proxy.modern = True
            await ann.page.evaluate("probe()")
            await ann.shows("#state-text", "Connected")
            await ann.holds("!polling")
            await ann.say("by socket")
            await ann.shows_messages(*both, "by socket")
            await until_frame(bob, "message", text="by socket")
            assert bob.names_in("left") == ["Eve"]

    @slow
    async def test_too_many_polls(self, memory_lan: Lan, monkeypatch: pytest.MonkeyPatch) -> None:
        """Where too many poll from one address a page waits, and is back as soon as it may."""
        monkeypatch.setattr(tornchat, "is_this_machine", lambda address: False)
        async with window(memory_lan, restarts=True) as ann:
            other = await ann.tab("?transport=polling")
            monkeypatch.setattr(tornchat, "POLLS_AN_ADDRESS", 0)
            await ann.say("one")
            await other.holds("phase === 'waiting'")
            monkeypatch.setattr(tornchat, "POLLS_AN_ADDRESS", 400)
            await ann.say("two")
            await other.shows_messages("one", "two")
            other.problems.clear()  # that it was refused

    async def test_polling_ends_for_good(self, memory_lan: Lan) -> None:
        async with window(memory_lan, restarts=True) as ann:
            other = await ann.tab("?transport=polling")
            await other.shows("#state-text", "by polling")
            await ann.page.click("summary")
            await ann.page.click("#logout button")
            await other.page.wait_for_selector("#nickname")
            assert "why=logout" in other.page.url


class TestJoiningIn(Transcripts):
    @slow
    async def test_invitation(self, memory_lan: Lan, monkeypatch: pytest.MonkeyPatch) -> None:
        """The panel shows an address that works for others, large, and its code; the host picks another one."""
        monkeypatch.setattr(tornchat, "lan_addresses", lambda: ["192.0.2.7", "198.51.100.9"])
        daemon = await memory_lan.serve(host="")
        first, second = (f"http://{address}:{daemon.port}" for address in tornchat.lan_addresses())
        has_code = tornchat.qr_symbol("/") is not None
        async with window(memory_lan) as ann:
            wall = await ann.tab("?view=projector")
            await wall.shows("#address", first)
            await ann.page.click("#join")
            await ann.shows("#address", first)
            await ann.page.wait_for_selector("#code", state="visible" if has_code else "hidden")
            await ann.page.select_option("#addresses", second + "/")
            await ann.shows("#address", second)
            await wall.shows("#address", second)
            if has_code:
                await ann.holds("code.complete && code.naturalWidth > 0")
            await ann.page.keyboard.press("Escape")
            await ann.page.wait_for_selector("#invite", state="hidden")
            await ann.say("to the wall")
            await wall.shows_messages("to the wall")
            assert await wall.page.locator("#composer").is_hidden()
            assert await wall.number("parseFloat(getComputedStyle(document.body).fontSize)") > 20
            corner = await wall.page.locator("#invite").bounding_box()
            assert corner
            assert corner["x"] + corner["width"] > 1200
            assert corner["y"] + corner["height"] > 700

    async def test_addresses(self, memory_lan: Lan, monkeypatch: pytest.MonkeyPatch) -> None:
        """Members are told the addresses; a code is drawn of these and of the one that is in use, and of no other."""
        monkeypatch.setattr(tornchat, "lan_addresses", lambda: ["192.0.2.7"])
        daemon = await memory_lan.serve(host="")
        ann = memory_lan.browser()
        for path in ("/join.json", "/qr.svg?url=" + ann.url):
            assert (await ann.fetch(path)).code == 401
        await ann.login("Ann")
        told = json.loads(text_of(await ann.fetch("/join.json")))
        assert told["addresses"] == [f"http://192.0.2.7:{daemon.port}/"]
        assert told["qr"] == (tornchat.qr_symbol("/") is not None)
        ours = (told["addresses"][0], ann.url + "/", ann.url.replace("http", "https") + "/room/")
        others = ("", "http://evil.example/", ann.url + ".evil.example/", ann.url + "@evil.example/", "javascript:1")
        for url in (*ours, *others):
            answer = await ann.fetch("/qr.svg?" + urllib.parse.urlencode({"url": url}))
            assert answer.code == (200 if url in ours and told["qr"] else 404), url
            assert (answer.headers["Content-Type"] == "image/svg+xml") == (answer.code == 200)
        if told["qr"]:
            made_up = [ann.url + f"/{number}" for number in range(2 * tornchat.DRAWINGS_AT_ONCE)]
            codes = [(await ann.fetch("/qr.svg?" + urllib.parse.urlencode({"url": url}))).code for url in made_up]
            assert (codes[0], codes[-1]) == (200, 429)
            for url in ours:
                assert (await ann.fetch("/qr.svg?" + urllib.parse.urlencode({"url": url}))).code == 200
        long = "x" * 8000
        assert (await ann.fetch(f"/qr.svg?url=http://{long}/", Host=long)).code == 421

    async def test_without_segno(self, memory_lan: Lan, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "segno", None)
        ann = await memory_lan.login("Ann")
        assert json.loads(text_of(await ann.fetch("/join.json"))) == {"addresses": [], "qr": False}
        assert (await ann.fetch("/qr.svg?" + urllib.parse.urlencode({"url": ann.url + "/"}))).code == 404

    async def test_the_view_outlives_a_login(self, memory_lan: Lan) -> None:
        """Whoever opens the wall's view without a session comes back to it after the login."""
        await memory_lan.serve()
        ann = memory_lan.browser()
        asked = await ann.fetch("/?view=projector")
        assert (asked.code, asked.headers["Location"]) == (302, "login?view=projector")
        form = Page(text_of(await ann.fetch("/login?view=projector")))
        assert ("login?view=projector") in form.links
        answer = await ann.fetch("/login?view=projector", form={"nickname": "Wall"})
        assert (answer.code, answer.headers["Location"]) == (303, "./?view=projector")
        assert 'data-view="projector"' in text_of(await ann.fetch("/?view=projector"))
        assert 'data-view="window"' in text_of(await ann.fetch("/?view=nonsense"))


MARKUP = [
    *("<script>alert(1)</script>", "<img src=x onerror=alert(1)>", "<svg/onload=alert(1)>"),
    *('"><svg onload=alert(1)>', "'><img src=x onerror=alert(1)>", "</title><script>alert(1)</script>"),
    *("</textarea><script>alert(1)</script>", "</script><script>alert(1)</script>"),
    *("<!--<img src=--><img src=x onerror=alert(1)>-->", "<iframe srcdoc='<script>alert(1)</script>'>"),
    *("<iframe src=javascript:alert(1)>", "<a href=javascript:alert(1)>x</a>", "<body onload=alert(1)>"),
    *("<details open ontoggle=alert(1)>", "<input autofocus onfocus=alert(1)>", "<video><source onerror=alert(1)>"),
    "<math><mtext></form><form><mglyph><style></math><img src onerror=alert(1)>",
    *("<style>*{display:none}</style>", "<link rel=stylesheet href=//evil.example/x.css>"),
    *("<meta http-equiv=refresh content='0;url=//evil.example'>", "<base href=//evil.example/>"),
    *("<object data=javascript:alert(1)>", "<form action=//evil.example><button>x", "javascript:alert(1)"),
    *('https://a.example/"onmouseover=alert(1)//', "https://a.example/'><img src=x onerror=alert(1)>"),
    *("http://a.example/<svg/onload=alert(1)>", "http://javascript:alert(1)@a.example/"),
    *("hTtPs://a.example/&quot;onclick=alert(1)", "data:text/html,<script>alert(1)</script>"),
    *("`<img src=x onerror=alert(1)>`", "```html\n<script>alert(1)</script>\n```"),
    *("``` onload=alert(1)\n<svg/onload=alert(1)>```", "{{ title }}{% raw alert(1) %}{# x #}", "${alert(1)}"),
    *("{name}{n}{reason}{constructor}", "$& $` $' $1 {names}", "&lt;img src=x onerror=alert(1)&gt;", "__proto__"),
    *("constructor", "\ufeff<scr\u200bipt>alert(1)</scr\u200bipt>", "<<script>alert(1)//<</script>"),
]


@functools.cache
def axe_core() -> str:
    axe = NODE_MODULES / "axe-core" / "axe.min.js"
    if not axe.exists():
        missing("axe-core (npm)")
    return axe.read_text(encoding="utf-8")


async def find_nothing(window: Window, where: str) -> None:
    """axe-core has nothing to object to, nothing is cut off, a thumb meets every control; a picture, if wanted."""
    if folder := os.environ.get("TORNCHAT_SCREENSHOTS"):
        await window.page.screenshot(path=Path(folder) / f"{where}.png")
    await window.page.evaluate(axe_core())
    result = await window.page.evaluate("axe.run()")
    faults = [(fault["id"], [node["html"] for node in fault["nodes"]]) for fault in result["violations"]]
    assert faults == [], where
    assert await window.number("document.documentElement.scrollWidth - innerWidth") == 0
    if await window.page.evaluate("navigator.maxTouchPoints"):
        in_dialog = await window.page.locator("dialog[open]").count()  # a finger holds a message instead of its .more
        controls = "dialog[open] :is(a, button, label)" if in_dialog else "button:not(.more)"
        for control in await window.page.locator(f":is({controls}):visible").all():
            box = await control.bounding_box()
            assert box
            assert min(box["width"], box["height"]) >= 44, (where, await control.inner_text())


class TestEveryone(Transcripts):
    @slow
    async def test_G10_attacks(self, memory_lan: Lan) -> None:
        """Whatever is said, whatever somebody or the room is called, is text: no element, no attribute, no dialog."""
        await memory_lan.serve(title="</title><img src=x onerror=alert(1)>")
        bob = await memory_lan.join("Bob")
        plain = [tag for tag, _ in Page(text_of(await bob.fetch("/login", form={"nickname": "\0"}))).elements]
        named = 0
        for number, attack in enumerate(MARKUP):
            refusal = await memory_lan.browser().fetch("/login", form={"nickname": f"{attack}\0"})
            assert [tag for tag, _ in Page(text_of(refusal)).elements] == plain
            status, _ = await (mallory := memory_lan.browser()).ask(attack[: tornchat.NAME_CHARS - 2] + str(number))
            if status == 200:
                named += 1
                await mallory.connect()
        assert named > 10
        async with window(memory_lan) as ann:
            found = """() => {
                const [tags, attributes] = [new Set(), new Set()];
                for (const element of document.querySelectorAll('*')) {
                    tags.add(element.localName);
                    for (const {name} of element.attributes) attributes.add(name);
                }
                return [[...tags], [...attributes]];
            }"""
            await bob.say("plain https://a.example/ `code` ```\nblock\n``` @Ann " + "x " * 600)
            await ann.shows("#log", "block")
            await ann.page.evaluate("passed({type: 'joined', names: ['Eve'], count: 3}, 'add')")
            await ann.shows("#log", "Eve")
            tags, attributes = map(set, await ann.page.evaluate(found))
            for attack in MARKUP:
                await bob.say(attack)
                await ann.page.fill("#box", f"@{attack[:5]}")
            await ann.page.evaluate("all => all.forEach(text => refused({text}))", MARKUP)
            await ann.page.evaluate("all => passed({type: 'joined', names: all, count: 50}, 'add')", MARKUP)
            await bob.say("the end")
            await ann.shows("#log", "the end")
            more_tags, more_attributes = map(set, await ann.page.evaluate(found))
            assert more_tags <= tags
            assert more_attributes <= attributes
            assert all(re.match("https?://", link) for link in await ann.links())
            for attack in MARKUP[::6]:
                await ann.page.goto(f"{ann.url}login?{urllib.parse.urlencode({'nickname': attack, 'why': attack})}")
                await ann.page.press("#nickname", "Enter")
                await ann.page.wait_for_load_state()
                foreign = "img:not([src^='icon.svg'], #code, #large), script:not([src]), iframe"
                assert await ann.page.locator(foreign).count() == 0
            ann.problems = [problem for problem in ann.problems if "status of 40" not in problem]

    @slow
    @pytest.mark.parametrize(
        ("look", "options"),
        [
            ("desktop", {}),
            ("dark", {"color_scheme": "dark"}),
            ("phone", {"viewport": {"width": 390, "height": 780}, "has_touch": True, "device_scale_factor": 2}),
            ("dark-phone", {"viewport": {"width": 390, "height": 780}, "color_scheme": "dark"}),
            ("small", {"viewport": {"width": 320, "height": 560}}),
            ("4k", {"viewport": {"width": 3840, "height": 2160}}),
        ],
    )
    async def test_axe(
        self, look: str, options: dict[str, Any], memory_lan: Lan, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """axe-core finds nothing to object to on any page, in light and dark, on desktop and phone."""
        monkeypatch.setattr(tornchat, "lan_addresses", lambda: ["192.168.178.24"])
        at = f"http://127.0.0.1:{(await memory_lan.serve(title='Class 5b', host='')).port}/"
        people = {name: await memory_lan.join(name) for name in ("Bob", "小明", "Omar", "Zoë")}
        for name, text in (
            ("Bob", "Good morning! https://a.example/ `x`"),
            ("小明", "大家好，我这边也可以了"),
            ("Omar", "👍🎉"),
            ("Omar", "@Ann can you show the line again?"),
            ("Zoë", "مرحبا means hello"),
            ("Zoë", "```\ncode\n```"),
            ("Bob", "line\n" * 40),
        ):
            await people[name].post(text)
        async with windows(memory_lan, "", at=at, reduced_motion="reduce", **options) as (ann,):
            await ann.page.goto(ann.url)
            await find_nothing(ann, f"{look}-login")
            await ann.login("Ann")
            await ann.say("mine")
            await ann.shows("#log", "mine")
            await find_nothing(ann, f"{look}-chat")
            await ann.page.click("#join")
            await ann.shows("#address", "192.168.178.24")
            await ann.holds("code.hidden || code.complete")
            await find_nothing(ann, f"{look}-invitation")
            await ann.page.keyboard.press("Escape")
            if await ann.page.is_visible("#people"):
                await ann.page.click("#people")
            await ann.page.click("summary")
            await find_nothing(ann, f"{look}-people")
            await ann.page.goto(ann.url + "?view=projector")
            await ann.state("connected")
            await find_nothing(ann, f"{look}-projector")

    @slow
    async def test_screen_reader(self, memory_lan: Lan) -> None:
        """History is not read out, what comes then is; every control has a name; Tab leads through them in order."""
        bob = await memory_lan.join("Bob")
        await bob.say("history")
        async with windows(memory_lan, "", reduced_motion="reduce") as (ann,):
            await ann.page.add_init_script(
                "new MutationObserver(() => { const log = document.getElementById('log');"
                "if (log?.childElementCount) window.first ??= log.getAttribute('aria-live'); })"
                ".observe(document, {childList: true, subtree: true});"
            )
            await ann.login("Ann")
            await ann.page.wait_for_selector("#log[aria-live=polite][role=log]")
            assert await ann.page.evaluate("first") == "off"
            order = []
            await ann.page.focus("#join")
            for _ in range(9):
                order.append(await ann.page.evaluate("document.activeElement.id || document.activeElement.localName"))
                outline = await ann.page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
                assert outline != "none", order
                if order[-1] == "summary":
                    await ann.page.keyboard.press("Enter")
                await ann.page.keyboard.press("Tab")
            assert order == ["join", "scroller", "button", "pick", "box", "send", "members", "summary", "theme"]
            assert await ann.page.get_attribute("html", "lang") == "en"

    @slow
    async def test_without_javascript(self, memory_lan: Lan) -> None:
        """Without JavaScript the page says that it needs it, and draws nothing that would not work."""
        async with windows(memory_lan, "", java_script_enabled=False) as (ann,):
            await ann.page.goto(ann.url)
            await ann.page.fill("#nickname", "Ann")
            await ann.page.press("#nickname", "Enter")
            assert await ann.texts("noscript") == [tornchat.WORDS["en"]["chat_needs_script"]]
            assert await ann.page.locator("noscript").bounding_box() is not None
            for part in ("#composer", "#state", "#join", "#people", "#roster .settings"):
                assert await ann.page.locator(part).is_hidden()
            await ann.page.click("summary")
            await ann.page.click("#logout button")
            await ann.page.wait_for_selector("#nickname")


@slow
class TestHostOnThePage(Transcripts):
    async def test_room(self, memory_lan: Lan) -> None:
        """A host locks the room, slows it and closes its door: all see so, nothing typed is lost, and it ends."""
        async with windows(memory_lan, "★ Tess", "★ Tom", "Bob", "") as (tess, tom, bob, eve):
            assert await bob.page.locator(".for-hosts:visible").count() == 0
            await bob.page.fill("#box", "half a sentence")
            for host in (tess, tom):
                await host.page.focus("#manage")
                await host.page.keyboard.press("Enter")
            await tess.page.check("#lock")
            await bob.shows("#hold", "Only hosts can write.")
            await bob.shows(".notice", "\u2068Tess\u2069: Only hosts can write.")
            await bob.holds("box.readOnly && send.disabled")
            await bob.written("half a sentence")
            await tom.holds("lock.checked && !door.checked")
            await tom.page.uncheck("#lock")
            await bob.holds("!box.readOnly")
            await bob.keys("Enter")
            await tess.shows_messages("half a sentence")
            await tess.page.select_option("#every", "60")
            await tess.page.check("#door")
            await bob.shows("#hold", "One message in 60 s. Your next one in")
            await bob.say("and the rest")
            await bob.shows("#outbox .status", "Sends in")
            await tom.holds("every.value === '60' && door.checked")
            await eve.page.goto(eve.url)
            await eve.page.press("#nickname", "Enter")
            await eve.shows("#error", "The door is closed")
            eve.problems.clear()  # of which the status 403 is one
            await tom.page.select_option("#every", "0")
            await tess.shows_messages("half a sentence", "and the rest")
            await bob.shows(".notice", "\u2068Tom\u2069: No pause between messages any more.")
            async with tess.page.expect_download() as saved:
                await tess.page.click("#room a >> nth=0")
            file = Path(await (await saved.value).path())
            assert "Bob: half a sentence" in await asyncio.to_thread(file.read_text, encoding="utf-8")

    @pytest.mark.parametrize("way", ["", "?transport=polling"])
    async def test_people(self, way: str, memory_lan: Lan) -> None:
        """A host mutes somebody for a while, which both hosts and the muted one see; to remove somebody asks first."""
        async with windows(memory_lan, "★ Tess", "★ Tom", "Bob") as (tess, tom, bob):
            await bob.page.goto(bob.url + way)
            await bob.shows("#members li:has-text('Tess') .badge", "Host")
            assert await bob.page.locator("#members button").count() == 0
            await tess.page.focus("#members button")
            await tess.page.keyboard.press("Enter")
            await tess.page.click("#mute button:has-text('15')")
            await bob.shows("#hold", "A host has muted you until")
            await bob.shows("#hold-wait", "14:5")
            for host in (tess, tom):
                await host.shows("#members li:has-text('Bob')", "muted till")
            await tess.shows("#person-muted", "muted till")
            await tess.page.click("#unmute")
            await bob.holds("!box.readOnly && holdText.textContent === ''")
            await tom.page.wait_for_selector("#members .muted", state="detached")
            await tess.page.click("#remove")
            await tess.page.keyboard.press("Enter")  # Cancel has the focus
            await bob.say("still here")
            await tom.shows_messages("still here")
            await tess.page.click("#members button")
            await tess.page.click("#remove")
            await tess.page.click("#yes")
            await bob.shows("#state-text", tornchat.WORDS["en"]["refused_removed"])
            assert await bob.page.locator(".notice[data-kind=refused]").count() == 0
            await tom.page.wait_for_selector("#members li:has-text('Bob')", state="detached")
            asked = len(bob.requests)
            await bob.page.evaluate("tick()")
            await bob.page.click("#login-again")
            await bob.page.press("#nickname", "Enter")
            await bob.shows("#error", tornchat.WORDS["en"]["refused_removed"])
            assert not [url for url in bob.requests[asked:] if "/chat?" in url or "/messages" in url]
            bob.problems.clear()  # of which each refusal is one

    @pytest.mark.parametrize(("mode", "waits"), [({"talk": "hosts"}, "Not sent"), ({"every": 600}, "Sends in")])
    async def test_on_its_way(self, mode: Frame, waits: str, memory_lan: Lan) -> None:
        """What is on its way when a mode changes is kept, and offered again or sent."""
        tess = await join_as_host(memory_lan, at=await memory_lan.serve())
        async with window(memory_lan) as ann:
            await ann.say("first")
            await ann.shows_messages("first")
            await ann.page.evaluate("() => { window.later = receivers.mode; receivers.mode = () => {}; }")
            await tess.send(json.dumps({"type": "mode", **mode}))
            await until_frame(tess, "mode")
            if waits == "Sends in":  # the pace counts from now on
                await ann.say("second")
                await until_frame(tess, "message", text="second")
            await ann.say("on its way")
            await ann.shows("#outbox .status", waits)
            await ann.page.evaluate("() => { receivers.mode = later; }")
            await tess.send(json.dumps({"type": "mode", "talk": "everyone", "every": 0}))
            if waits == "Not sent":
                await ann.page.click("#outbox .choices button")
            await until_frame(tess, "message", text="on its way")

    async def test_pinned(self, memory_lan: Lan) -> None:
        """A pinned message stands above the log for all, newcomers and the wall too; a tap leads to it."""
        tess = await join_as_host(memory_lan, at=await memory_lan.serve())
        await told(tess, "Read page 7.\nThen https://example.org/")
        async with window(memory_lan) as ann:
            await tess.send(json.dumps(note(1, "pin", value=True)))
            await ann.shows("#pin-line", "Tess")
            await until_frame(tess, "note")
            await tess.say_many(60)
            await ann.shows("#log", "60")
            assert not await ann.page.is_visible("#pin-text")
            await ann.page.click("#pin-line")
            await ann.holds("document.activeElement === shown.get(1)")
            await ann.page.click("#pin-fold")
            assert await ann.page.get_attribute("#pin-text a", "href") == "https://example.org/"
            assert await ann.page.get_attribute("#pin-fold", "aria-expanded") == "true"
            wall = await ann.tab("?view=projector")
            await wall.shows("#pin-line", "Read page 7.")
            await tess.send(json.dumps({"type": "mode", "talk": "hosts"}))
            await wall.shows("#hold", "Only hosts can write.")
            await tess.send(json.dumps(note(1, "delete")))
            for window_of in (ann, wall):
                await window_of.page.wait_for_selector("#pinned", state="hidden")

    async def test_clear(self, memory_lan: Lan) -> None:
        """To delete all asks once; then it is gone from every screen, and nobody misses earlier messages."""
        await memory_lan.serve(history=2)
        bob = await memory_lan.join("Bob")
        for text in ("one", "two", "three"):
            await bob.say(text)
            await until_frame(bob, "message", text=text)
        async with windows(memory_lan, "★ Tess", "Ann") as (tess, ann):
            await ann.shows_messages("two", "three")
            await ann.shows("#earlier", "Earlier messages aren’t shown")
            await tess.page.click("#manage")
            await tess.page.click("#clear")
            await tess.shows("#asked", "Delete everything that was said")
            await tess.page.click("#yes")
            await ann.shows_messages()
            await ann.shows(".notice", tornchat.WORDS["en"]["js_cleared"])
            assert await ann.page.is_hidden("#earlier")
            await ann.page.reload()
            await bob.say("anew")
            await ann.shows_messages("anew")
            assert await ann.page.is_hidden("#earlier")

    @pytest.mark.parametrize(
        ("scheme", "width", "height"), [("light", 390, 844), ("dark", 740, 360), ("dark", 1280, 800)]
    )
    async def test_axe(self, scheme: str, width: int, height: int, memory_lan: Lan) -> None:
        """In every state of host and member axe-core finds nothing, nothing is cut off, and a thumb meets all of it."""
        look = f"host-{scheme}-{width}"
        touch: dict[str, Any] = {"has_touch": True, "is_mobile": True} if width < 1000 else {}
        options: dict[str, Any] = {"color_scheme": scheme, "viewport": {"width": width, "height": height}}
        async with windows(memory_lan, "★ Tess", "Pupil 07", reduced_motion="reduce", **options, **touch) as (
            tess,
            bob,
        ):
            await tess.say("Read page 7. " * 20)
            await tess.shows("#log", "page 7")
            await tess.page.evaluate("act({type: 'note', to: 1, kind: 'pin', value: true})")
            await tess.page.evaluate("act({type: 'mute', name: 'Pupil 07', seconds: 300})")
            await bob.shows("#hold", "muted")
            await bob.page.click("#pin-fold")
            await tess.holds("memberList.children[1].firstChild.textContent === 'P7'")
            await find_nothing(bob, f"{look}-muted")
            if await tess.page.is_visible("#people"):
                await tess.page.click("#people")
            await find_nothing(tess, f"{look}-roster")
            await tess.page.click("#members button")
            await find_nothing(tess, f"{look}-person")
            await tess.page.click("#remove")
            await find_nothing(tess, f"{look}-question")
            await tess.page.keyboard.press("Escape")
            await tess.page.click("#manage")
            await find_nothing(tess, f"{look}-room")


@slow
class TestLongRoom(Transcripts):
    async def test_five_thousand(self, memory_lan: Lan) -> None:
        """Nothing jumps when messages come; of 5,000 at once the newest stay in the page, in order."""
        bob = await memory_lan.join("Bob")
        async with window(memory_lan) as ann:
            await bob.say_many(40)
            await ann.page.locator("#log .text", has_text=re.compile("^40$")).wait_for()
            await ann.page.evaluate("""() => {
                window.moved = 0;
                new PerformanceObserver((list) => { for (const {value} of list.getEntries()) moved += value; })
                    .observe({type: 'layout-shift', buffered: false});
            }""")
            for number in range(41, 61):
                await bob.say_many(1, first=number)
                await ann.page.locator("#log .text", has_text=re.compile(f"^{number}$")).wait_for()
            assert await ann.number("moved") == 0
            await bob.say_many(4940, first=61)
            await ann.page.locator("#log .text", has_text=re.compile("^5000$")).wait_for()
            texts = await ann.page.eval_on_selector_all("#log .text", "all => all.map((text) => text.textContent)")
            assert texts == [str(number) for number in range(5001 - len(texts), 5001)]
            assert 1000 <= len(texts) <= 1200
            await ann.holds("following && below() < 2")

    async def test_nothing_but_the_reader_ends_following(self, memory_lan: Lan) -> None:
        """All of a long history is shown, and of a catch-up; both, and bursts, leave the reader at the bottom."""
        await memory_lan.serve(history=1000)
        bob = await memory_lan.join("Bob")
        await bob.say_many(1000)
        async with window(memory_lan) as ann:
            await ann.holds("shown.size === 1000 && following && below() < 2")
            await ann.page.evaluate("link.close()")
            await bob.say_many(1000, first=1001)
            await ann.page.evaluate("connect()")
            await ann.holds("shown.has(2000) && following && below() < 2")
            for number in range(20):
                await ann.page.evaluate("draw(() => { scroller.scrollTop -= 100; })")
                await bob.say_many(100, first=2001 + 100 * number)
            await ann.holds("shown.has(4000) && following && below() < 2")
            assert await ann.page.locator("#log .message").count() <= 1200

    async def test_a_burst_is_drawn_in_slices(self, memory_lan: Lan) -> None:
        """A burst takes no more of a frame than its slice; what comes meanwhile waits for its turn."""
        async with window(memory_lan) as ann:
            slices = await ann.page.evaluate("""async () => {
                const sizes = [];
                for (let seq = 1; seq <= 1000; seq += 1) {
                    receive({type: 'message', seq, ts: Date.now(), name: 'Bob', text: `message ${seq}`, cid: ''});
                }
                while (toDraw.length) {
                    const before = toDraw.length;
                    const spent = performance.now();
                    while (performance.now() - spent < 1) { /* a slower machine */ }
                    await new Promise(requestAnimationFrame);
                    sizes.push(before - toDraw.length);
                }
                return sizes;
            }""")
            assert (sum(slices), len(slices) > 1) == (1000, True)
            assert await ann.page.locator("#log .message").count() == 1000

    async def test_a_slow_phone_rests(self, memory_lan: Lan) -> None:
        """Where it takes long to draw, what comes then is drawn together after a while, which is for the keys."""
        async with windows(memory_lan, "Ann") as (ann,):
            rest = await ann.page.evaluate("""async () => {
                const drawn = (work) => new Promise((done) => draw(() => setTimeout(done, work())));
                await drawn(() => { for (const began = now(); now() - began < 50;) { /* a slow phone */ } });
                const drawnBefore = drawnAt;
                receive({type: 'message', seq: 1, ts: Date.now(), name: 'Bob', text: 'one', cid: ''});
                receive({type: 'message', seq: 2, ts: Date.now(), name: 'Bob', text: 'two', cid: ''});
                await drawn(() => {});
                return drawnAt - drawnBefore;
            }""")
            assert rest > 500
            await ann.shows_messages("one", "two")


GIVE = """async ([way, name, type, content, width, height]) => {
    const canvas = new OffscreenCanvas(width, height);
    const pen = canvas.getContext('2d');
    for (let at = 0; at < 40; at += 1) {
        pen.fillStyle = `hsl(${at * 9} 70% 50%)`;
        pen.fillRect(at * width / 40, 0, width / 40, height);
    }
    const files = new DataTransfer();
    files.items.add(new File([content || await canvas.convertToBlob({type})], name, {type}));
    const event = {
        choose: () => new Event('change'),
        paste: () => new ClipboardEvent('paste', {clipboardData: files, bubbles: true, cancelable: true}),
        drop: () => new DragEvent('drop', {dataTransfer: files, bubbles: true, cancelable: true}),
    }[way]();
    if (way === 'choose') fileChoice.files = files.files;
    const target = {choose: fileChoice, paste: box, drop: log}[way];
    return target.dispatchEvent(event);
}"""


async def give(
    window: Window,
    way: str,
    name: str = "photo.jpg",
    kind: str = "image/jpeg",
    content: str = "",
    size: tuple[int, int] = (3000, 2000),
) -> None:
    """A file, a striped photo if nothing else is in it, comes into the page; the browser doesn't go where it leads."""
    assert await window.page.evaluate(GIVE, [way, name, kind, content, *size]) == (way == "choose")


@slow
class TestPicturesInWindows(Transcripts):
    async def test_ways(self, memory_lan: Lan) -> None:
        """A picture is chosen, pasted or dropped, drawn smaller, and goes with the text in the box; all see it."""
        async with windows(memory_lan, "Ann", "Bob") as (ann, bob):
            for count, way in enumerate(("choose", "paste", "drop"), 1):
                await give(ann, way)
                await ann.page.locator("#attached button").wait_for()
                await ann.say(way)
                await bob.shows("#log .message", way)
                seen = "[...document.querySelectorAll('#log img')].filter((image) => image.naturalWidth === 1600)"
                await bob.holds(f"{seen}.length === {count}")
            await give(ann, "paste")
            await ann.holds("attached.length === 1")
            await give(ann, "paste", size=(40, 30))
            await ann.holds("attached.length === 2")
            await ann.page.locator("#attached button").first.click()
            await ann.keys("Enter")
            await bob.shows_messages("choose", "paste", "drop", "")
            assert await bob.page.locator("#log .picture").last.evaluate("(frame) => frame.clientWidth") == 44
            await ann.shows_messages("choose", "paste", "drop", "")

    async def test_no_picture(self, memory_lan: Lan) -> None:
        """What is no picture is refused in words before it is sent; a text with a picture of itself is a text."""
        async with window(memory_lan) as ann:
            for way, name, kind, content in (
                ("drop", "notes.pdf", "application/pdf", "%PDF-1.4"),
                ("paste", "drawing.svg", "image/svg+xml", SVG.decode()),
                ("choose", "photo.png", "image/png", "no photo"),
            ):
                await give(ann, way, name, kind, content)
                await ann.shows("#log .notice", f"“{name}” was not added")
            assert await ann.page.locator("#attached button").count() == 0
            await ann.say("still here")
            await ann.shows_messages("still here")
        await memory_lan.serve(pictures=0)
        async with window(memory_lan) as ann:
            assert await ann.page.locator("#pick").is_hidden()
            await give(ann, "drop")
            await ann.shows("#log .notice", "This room takes no pictures.")

    @pytest.mark.parametrize(("scheme", "width", "height"), [("light", 1280, 800), ("dark", 390, 780)])
    async def test_large(self, memory_lan: Lan, scheme: str, width: int, height: int) -> None:
        """The log knows a picture's size before it comes; a tap shows it large, Escape leads back. axe has no fault."""
        looks: dict[str, Any] = {"color_scheme": scheme, "viewport": {"width": width, "height": height}}
        held = asyncio.Event()

        async def hold(route: Any) -> None:
            await held.wait()
            await route.continue_()

        async with window(memory_lan, **looks) as ann:
            await ann.page.route("**/pictures/*", hold)
            await give(ann, "drop")
            await ann.page.locator("#attached canvas").wait_for()
            await find_nothing(ann, f"picture-{scheme}-attached")
            await ann.keys("Enter")
            frame = ann.page.locator("#log .picture")
            before = await frame.bounding_box()
            held.set()
            await ann.holds("document.querySelector('#log img').complete")
            assert before == await frame.bounding_box()
            assert before is not None
            assert before["width"] / before["height"] == pytest.approx(1.5, abs=0.02)
            await frame.focus()
            await ann.page.keyboard.press("Enter")
            await ann.holds("viewer.open && large.naturalWidth === 1600")
            await find_nothing(ann, f"picture-{scheme}-large")
            await ann.page.keyboard.press("Escape")
            await ann.holds("!viewer.open && document.activeElement.className === 'picture'")
            assert await ann.page.locator("#log img").get_attribute("alt") == "Picture from Ann"

    async def test_pending(self, memory_lan: Lan) -> None:
        """A picture that doesn't get through waits like text, over a reload too; then it is sent once, in its turn."""
        async with window(memory_lan, restarts=True) as ann:
            await ann.page.route("**/pictures", lambda route: route.abort())
            await give(ann, "paste")
            await ann.page.locator("#attached button").wait_for()
            await ann.say("the board")
            await ann.say("as I said")
            await ann.shows("#outbox .status", "Sends in")
            await ann.holds("sessionStorage.length >= 3")
            await ann.page.reload()
            await ann.shows("#outbox .message", "the board")
            assert await ann.page.locator("#outbox canvas").count() == 1
            await ann.page.unroute("**/pictures")
            await ann.shows_messages("the board", "as I said")
            await ann.holds("document.querySelector('#log img').naturalWidth === 1600")
            await ann.holds("!Object.keys(sessionStorage).some((key) => key.includes('picture'))")

    async def test_taken_back(self, memory_lan: Lan) -> None:
        """What the room refuses can be tried again, or taken back into the box, with its text."""
        async with window(memory_lan, restarts=True) as ann:
            refusal = json.dumps({"type": "refused", "code": "bad-picture", "text": "Not that one."})
            await ann.page.route("**/pictures", lambda route: route.fulfill(status=415, body=refusal))
            await give(ann, "paste")
            await ann.page.locator("#attached button").wait_for()
            await ann.say("the board")
            await ann.shows("#outbox .status", "Not sent: Not that one.")
            await ann.page.locator("#outbox .choices button").last.click()
            await ann.written("the board")
            await ann.page.locator("#attached button").wait_for()
            await ann.page.unroute("**/pictures")
            await ann.keys("Enter")
            await ann.shows_messages("the board")
            ann.problems.clear()

    async def test_gone(self, memory_lan: Lan) -> None:
        """A picture that is no longer kept says so in its place; one that could not be loaded is tried again."""
        async with window(memory_lan, restarts=True) as ann:
            await give(ann, "drop")
            await ann.page.locator("#attached button").wait_for()
            await ann.keys("Enter")
            frame = ann.page.locator("#log .picture")
            await frame.wait_for()
            box = await frame.bounding_box()
            await ann.page.route("**/pictures/*", lambda route: route.abort())
            await ann.page.reload()
            await ann.shows("#log .picture", "could not be loaded")
            await ann.page.unroute("**/pictures/*")
            await frame.click()
            await ann.holds("document.querySelector('#log img')?.naturalWidth === 1600")
            store = memory_lan.daemons[-1].store
            await store.drop_pictures([], before=store.now() + 1)
            await ann.page.route("**/pictures/*", lambda route: route.continue_())  # past the browser's own copies
            await ann.page.reload()
            await ann.shows("#log .picture", "no longer kept")
            after = await frame.bounding_box()
            assert (box and (box["width"], box["height"])) == (after and (after["width"], after["height"]))
            ann.problems.clear()


async def told(who: Browser, text: str, **more: object) -> int:
    """Somebody says something; the number of the message."""
    await who.send(json.dumps({"type": "say", "text": text, "cid": next(who.cids), **more}))
    seq: int = (await until_frame(who, "message", text=text))["seq"]
    return seq


@slow
class TestNotesOnThePage(Transcripts):
    async def choose(self, window: Window, text: str, choice: str) -> None:
        """From the menu of the message with that text, by the keyboard alone."""
        row = window.page.locator("#log .message", has=window.page.locator(".text", has_text=text)).last
        await row.locator(".more").focus()
        await window.page.keyboard.press("Enter")
        await window.page.locator("#menu button", has_text=choice).focus()
        await window.page.keyboard.press("Enter")

    async def test_reactions(self, memory_lan: Lan) -> None:
        """A sign from the menu or a tap on one that is there; once more takes it back; a reload knows it."""
        bob = await memory_lan.join("Bob")
        async with window(memory_lan) as ann:
            seq = await told(bob, "who agrees?")
            await ann.shows("#log", "who agrees?")
            await self.choose(ann, "who agrees?", "👍")
            await until_frame(bob, "note", to=seq, counts={"👍": 1})
            await bob.send(json.dumps(note(seq, "react", value="👍")))
            await ann.shows(".sign[aria-pressed=true]", "👍 2")
            assert await ann.page.evaluate("document.activeElement.className") == "more"
            polling = await ann.tab("?transport=polling")
            await polling.shows(".sign[aria-pressed=true]", "👍 2")
            await self.choose(polling, "who agrees?", "✋")
            await polling.shows(".sign[aria-pressed=true]", "✋ 1")
            await ann.shows(".sign", "👍 1")
            await ann.page.reload()
            await ann.page.click(".sign:has-text('✋')")
            await until_frame(bob, "note", to=seq, counts={"👍": 1})
            await ann.holds("document.querySelectorAll('.sign').length === 1")
            await ann.shows(".sign[aria-pressed=false]", "👍 1")
            await ann.page.evaluate("react(99, '👍')")
            await ann.shows(".notice", tornchat.WORDS["en"]["refused_no-message"])

    async def test_replies(self, memory_lan: Lan) -> None:
        """A reply says to whom and to what before it is sent and after; that leads to the message, and back."""
        bob = await memory_lan.join("Bob")
        seq = await told(bob, "What is on page 41?\nAnd on 42?")
        await bob.say_many(40)
        async with window(memory_lan) as ann:
            await ann.shows("#log", "40")
            await self.choose(ann, "page 41", "Reply")
            await ann.shows("#reply", "to Bob: What is on page 41?")
            await ann.keys("Escape")
            assert await ann.page.locator("#reply").is_hidden()
            await self.choose(ann, "page 41", "Reply")
            await ann.page.evaluate("storeChanged({available: false})")
            await ann.say("The exercise.")
            assert await ann.page.locator("#reply").is_hidden()
            await ann.shows("#outbox", "to Bob: What is on page 41?")
            await ann.page.reload()
            await until_frame(bob, "message", name="Ann", text="The exercise.", re=seq)
            await ann.shows("#log .mine .quote", "to Bob: What is on page 41?")
            await ann.page.click("#log .quote")
            await ann.shows(".found .text", "page 41")
            await ann.holds("below() > 400 && !following && document.activeElement === back")
            await ann.page.keyboard.press("Enter")
            await ann.holds("below() < 200 && document.activeElement.className === 'quote'")
            assert await ann.page.locator(".found, .back").count() == 0
            polling = await ann.tab("?transport=polling")
            await polling.shows("#log", "The exercise.")
            await self.choose(polling, "page 41", "Reply")
            await polling.say("by another way")
            await until_frame(bob, "message", text="by another way", re=seq)
            await bob.send(json.dumps(note(seq, "delete")))
            for page in (ann, polling):
                await page.shows("#log .mine .quote", "to Bob: This message was deleted.")
            assert "on page 41" not in await polling.page.content()

    async def test_deletion(self, memory_lan: Lan) -> None:
        """Authors delete their own, hosts all, after one question; no page has the text any more, nor gets it."""
        bob = await memory_lan.join("Bob")
        async with windows(memory_lan, "★ Tess", "Ann") as (tess, ann):
            wall = await ann.tab("?view=projector")
            await told(bob, "something silly")
            await ann.shows("#log", "something silly")
            await ann.page.locator("#log .more").focus()
            await ann.page.keyboard.press("Enter")
            assert [text.strip() for text in await ann.texts("#menu > button")] == ["Reply", "Copy the text"]
            await ann.page.keyboard.press("Escape")
            await ann.holds("document.activeElement.className === 'more'")
            await ann.say("my own")
            for answer in ("Cancel", "Delete"):
                await self.choose(ann, "my own", "Delete")
                await ann.page.click(f"#question button:has-text('{answer}')")
            await self.choose(tess, "something silly", "Delete")
            await tess.page.click("#yes")
            for page in (ann, tess, wall, await ann.tab()):
                await page.shows_messages(*2 * ["This message was deleted."])
                assert not re.search("silly|my own", await page.page.content())
            await told(bob, "again")
            await self.choose(ann, "again", "Reply")
            await tess.page.evaluate("act({type: 'clear'})")
            for page in (ann, wall):
                await page.shows(".notice", "All that was said before is deleted.")
                await page.shows_messages()
            await ann.shows("#reply", "to a message that is not here any more")

    async def test_hosts(self, memory_lan: Lan) -> None:
        """Hosts wear a badge that only the room gives; they pin, and their page and the wall sort by a sign."""
        bob = await memory_lan.join("Bob")
        async with windows(memory_lan, "★ Tess", "Ann") as (tess, ann):
            await tess.say("a word from the desk")
            await ann.shows("#log .message:has(.badge)", "a word from the desk")
            await told(bob, "Host", host=True)
            await ann.shows("#log .message:not(:has(.badge))", "Bob")
            await self.choose(tess, "a word", "Pin")
            await until_frame(bob, "note", kind="pin")
            await tess.holds("pinned !== null")
            await self.choose(tess, "a word", "Unpin")
            await until_frame(bob, "note", kind="pin", message=None)
            assert await ann.page.locator("#sorting").is_hidden()
            wall = await ann.tab("?view=projector")
            seqs = [await told(bob, f"question {number}") for number in range(3)]
            for who, seq, sign in ((bob, 1, "👍"), (ann, 2, "👍"), (bob, 2, "👍"), (bob, 0, "✋")):
                if who is ann:
                    await ann.page.evaluate(f"react({seqs[seq]}, '{sign}')")
                else:
                    await bob.send(json.dumps(note(seqs[seq], "react", value=sign)))
            await until_frame(bob, "note", hands=["Bob"])
            await ann.page.evaluate(f"react({seqs[0]}, '✋')")
            for page in (tess, wall):
                await page.shows("#log", "question 2")
                await page.page.select_option("#sort", "👍")
                await page.holds("sorted.textContent.match(/question \\d/g).join() === 'question 2,question 1'")
                await page.page.select_option("#sort", "✋")
                await page.shows("#sorted .hint", "\u2068Bob\u2069, \u2068Ann\u2069")
                await page.page.select_option("#sort", "")
                assert await page.page.locator("#sorted").is_hidden()

    async def test_fingers(self, memory_lan: Lan) -> None:
        """A message that a finger holds opens its menu, one pushed aside is replied to; all is 44 px high."""
        bob = await memory_lan.join("Bob")
        seq = await told(bob, "hold me")
        phone: dict[str, Any] = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True}
        async with window(memory_lan, **phone) as ann:
            await ann.page.evaluate(f"react({seq}, '👍')")
            await ann.shows(".sign", "👍 1")
            finger = await ann.page.context.new_cdp_session(ann.page)
            x, y = 100, await ann.number("document.querySelector('.bubble').getBoundingClientRect().top + 20")

            async def touch(kind: str, *at: float) -> None:
                points = [dict(zip("xy", at, strict=True))] if at else []
                await finger.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})

            await touch("touchStart", x, y)
            await ann.page.wait_for_selector("#menu[open]")
            await touch("touchEnd")
            small = "[...document.querySelectorAll('#menu button, .sign, #sort')].filter((one) => one.offsetParent && "
            small += "one.offsetHeight < 44).length"
            assert await ann.number(small) == 0
            await ann.page.click("#menu button:has-text('👍')")
            await ann.holds("!menu.open && !document.querySelector('.sign')")
            await touch("touchStart", x, y)
            for step in (20, 40, 60, 80):
                await touch("touchMove", x + step, y)
            await touch("touchEnd")
            await ann.shows("#reply", "to Bob: hold me")
            assert await ann.number("document.documentElement.scrollWidth - innerWidth") == 0

    @pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
    async def test_axe(self, width: int, scheme: str, memory_lan: Lan) -> None:
        """axe-core finds nothing to object to in signs, replies, what is deleted, the menu and the sorted messages."""
        bob, look = await memory_lan.join("Bob"), f"notes-{scheme}-{width}"
        options: dict[str, Any] = {"color_scheme": scheme, "viewport": {"width": width, "height": 844}}
        async with windows(memory_lan, "★ Tess", reduced_motion="reduce", **options) as (tess,):
            seqs = [await told(bob, text) for text in ("who agrees?", "silly", "why?")]
            for answered in seqs[:2]:
                await told(bob, f"to {answered}", re=answered)
            for act in (note(seqs[0], "react", value="👍"), note(seqs[1], "delete")):
                await bob.send(json.dumps(act))
            await tess.say("a host's")
            await tess.page.evaluate(f"react({seqs[2]}, '✋'); replyTo({seqs[2]})")
            await tess.say("one's own reply")
            await tess.page.evaluate(f"replyTo({seqs[2]})")
            await tess.shows("#log", "one's own reply")
            await tess.shows(".deleted", "deleted")
            await tess.page.locator("#log .quote").first.click()
            await find_nothing(tess, f"{look}-log")
            await tess.page.evaluate(f"openMenu(shown.get({seqs[2]}))")
            await find_nothing(tess, f"{look}-menu")
            await tess.page.click("#menu .bad")
            await find_nothing(tess, f"{look}-question")
            await tess.page.keyboard.press("Escape")
            await tess.page.select_option("#sort", "✋")
            await find_nothing(tess, f"{look}-sorted")
            await (wall := await tess.tab("?view=projector")).shows("#log", "reply")
            await find_nothing(wall, f"{look}-wall")


# === Many daemons, and faults =========================================================================================
# One room over many daemons, and what is promised while its parts fail: daemons, workers, Redis, the way to Redis.


class Proxy:
    """A TCP proxy before a Redis: it can cut, hold back and delay what Redis answers when the thing is done already."""

    def __init__(self, port: int) -> None:
        self.target = port
        self.random = random.Random(4)
        self.cut_share = 0.0  # of the answers: they are lost, and their connection with them
        self.delay = 0.0  # in s, of each answer
        self.cuts = self.refused = 0
        self.gone = False  # connections are closed, and new ones at once
        self.talking = asyncio.Event()  # cleared: answers are held back
        self.talking.set()
        self.writers: set[asyncio.StreamWriter] = set()

    async def __aenter__(self) -> Self:
        self.server = await asyncio.start_server(self.accept, "127.0.0.1", 0)
        address = f"127.0.0.1:{self.server.sockets[0].getsockname()[1]}"
        self.url, self.http = f"redis://{address}/0", f"http://{address}/"
        return self

    async def __aexit__(self, *error: object) -> None:
        self.server.close()
        self.disappear()

    def disappear(self) -> None:
        """Redis is gone: no connection is left, and none can be made."""
        self.gone = True
        for writer in self.writers:
            writer.transport.abort()

    async def accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.gone:
            self.refused += 1
            writer.transport.abort()
            return
        redis_reader, redis_writer = await asyncio.open_connection("127.0.0.1", self.target)
        self.writers |= (pair := {writer, redis_writer})
        ways = [asyncio.create_task(way) for way in (self.ask(reader, redis_writer), self.answer(redis_reader, writer))]
        await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        for way in ways:
            way.cancel()
        await asyncio.gather(*ways, return_exceptions=True)
        for end in pair:
            end.transport.abort()
        self.writers -= pair

    async def ask(self, client: asyncio.StreamReader, server: asyncio.StreamWriter) -> None:
        while data := await client.read(65536):
            server.write(data)

    async def answer(self, server: asyncio.StreamReader, client: asyncio.StreamWriter) -> None:
        while data := await server.read(65536):
            await self.talking.wait()
            await asyncio.sleep(self.delay)
            if self.random.random() < self.cut_share:
                self.cuts += 1
                return
            client.write(data)


class OldProxy(Proxy):
    """A proxy before a daemon that knows no WebSocket: whoever asks it for one is cut off."""

    def __init__(self, port: int) -> None:
        super().__init__(port)
        self.modern = False

    async def ask(self, client: asyncio.StreamReader, server: asyncio.StreamWriter) -> None:
        while data := await client.read(65536):
            if b"Upgrade: websocket" in data and not self.modern:
                self.refused += 1
                return
            server.write(data)


class Talker:
    """Someone who goes on as the page does: comes back wherever the room is, and says again what isn't confirmed."""

    def __init__(self, browser: Browser, name: str, places: Sequence[str], pause: tuple[float, float]) -> None:
        self.browser, self.name, self.places, self.pause = browser, name, places, pause
        self.log: list[Frame] = []  # the messages on the page
        self.outbox: dict[str, str] = {}
        self.here = False  # welcomed, on this connection
        self.mouth = asyncio.Lock()  # nothing overtakes what is said again
        self.free = asyncio.Semaphore(0)
        self.cuts: set[int] = set()  # after how many messages the connection is cut
        self.resets = self.connects = 0
        self.ended = False

    @property
    def seqs(self) -> list[int]:
        return [frame["seq"] for frame in self.log]

    async def live(self) -> None:
        while not self.ended:
            with contextlib.suppress(OSError, HTTPClientError, WebSocketClosedError):
                self.browser.url = random.choice(self.places)
                await self.browser.connect(self.browser.after, self.browser.epoch)
                await self.listen()
            self.here = False
            await asyncio.sleep(random.uniform(*self.pause))

    async def listen(self) -> None:
        while not self.ended and (frame := await self.browser.frame()) is not None:
            await self.hear(frame)
            if len(self.log) in self.cuts:
                self.cuts.remove(len(self.log))
                self.browser.drop()
                return

    async def hear(self, frame: Frame) -> None:
        """What a frame does to the page."""
        match frame["type"]:
            case "welcome":
                self.welcomed(frame)
                await self.say_again()
            case "message":
                self.log.append(frame)
                if frame["name"] == self.name and self.outbox.pop(frame["cid"], None) is not None:
                    self.free.release()
            case "store" if frame["available"]:
                await self.say_again()
            case "refused":
                assert frame["code"] == "unavailable", frame
                await asyncio.sleep(min(0.1, frame["retry_after"]))
                await self.say_again()

    def welcomed(self, welcome: Frame) -> None:
        assert (welcome["name"], welcome["missed"]) == (self.name, 0)
        self.connects += 1
        self.here = True
        if welcome["reset"]:
            self.resets += 1
            self.log.clear()

    async def say_again(self) -> None:
        async with self.mouth:
            for cid, text in list(self.outbox.items()):
                await self.browser.say(text, cid)

    async def say(self, text: str) -> None:
        """Say it now, or when the room is there again."""
        cid = next(self.browser.cids)
        self.outbox[cid] = text
        async with self.mouth:
            if self.here and cid in self.outbox:
                with contextlib.suppress(WebSocketClosedError):
                    await self.browser.say(text, cid)

    async def talk(self, texts: Iterable[object], in_flight: int = 20) -> None:
        """Say all this, so many at a time, until all of it is confirmed."""
        self.free = asyncio.Semaphore(in_flight)
        for text in texts:
            await self.free.acquire()
            await self.say(f"{self.name} {text}")
        for _ in range(in_flight):
            await self.free.acquire()


@contextlib.asynccontextmanager
async def talkers(
    lan: Lan, names: Sequence[str], *places: str, pause: tuple[float, float] = (0.0, 0.05)
) -> AsyncIterator[list[Talker]]:
    """Some people in the room, each at any of these places."""
    people = [Talker(lan.browser(random.choice(places)), name, places, pause) for name in names]
    for person in people:
        await person.browser.login(person.name)
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(person.live()) for person in people]
        await until(lambda: all(person.connects for person in people))
        yield people
        for person, task in zip(people, tasks, strict=True):
            person.ended = True
            task.cancel()


async def heard_from(people: Sequence[Talker], seq: int) -> bool:
    return all(person.log and person.log[-1]["seq"] >= seq for person in people)


async def all_heard(people: Sequence[Talker], seq: int) -> None:
    await until(lambda: all(person.log and person.log[-1]["seq"] == seq for person in people))


def assert_one_history(people: Sequence[Talker], count: int) -> None:
    """Assert that all have 1 to `count` in this order, the same, each author's words once and in the author's order."""
    for person in people:
        assert person.seqs == list(range(1, count + 1)), person.name
        assert person.log == people[0].log, person.name
        assert not person.browser.names_in("left")
        assert not person.outbox
    for author in people:
        texts = [frame["text"] for frame in author.log if frame["name"] == author.name]
        assert texts == [f"{author.name} {n}" for n in range(len(texts))]


async def until_frame(browser: Browser, kind: str, /, **fields: object) -> Frame:
    """Pass over whatever comes until this does."""
    while (frame := await browser.frame()) is not None:
        if frame["type"] == kind and fields.items() <= frame.items():
            return frame
    pytest.fail(f"expected {kind} {fields}, but the socket was closed")


def stored_messages(store: Store) -> list[tornchat.Event]:
    with redis.Redis.from_url(store.url) as client:
        entries = client.xrange(store.key("feed"))
    events = [event for _, fields in entries for event in tornchat.decode_events(fields[b"events"])]
    return [event for event in events if event.type == "message"]


def crash(daemon: tornchat.Daemon) -> None:
    """End a daemon of this process as kill -9 would: nothing more is stored, nobody is told, connections just end."""
    for task in daemon.feed.tasks + daemon.presence.tasks:
        task.cancel()
    daemon.server.stop()
    for listener in tuple(daemon.sockets):
        listener.stream.close()


def state_lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What was logged of the store, in short."""
    found = (re.search(r"the message store is (\w+)|(damaged)", record.getMessage()) for record in caplog.records)
    return [line[1] or line[2] for line in found if line]


def workers_of(program: Program) -> set[int]:
    listing = Path(f"/proc/{program.process.pid}/task/{program.process.pid}/children")
    if not listing.exists():
        pytest.skip("needs the /proc of Linux")
    return set(map(int, listing.read_text().split()))


def is_running(pid: int) -> bool:
    """Whether a process is there and not just a zombie that nobody has asked after."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    return False


@pytest.fixture
def snapshot_redis(tmp_path: Path) -> Iterator[RedisServer]:
    """A redis-server that keeps only what it is told to SAVE."""
    server = RedisServer(tmp_path)
    yield server
    server.kill()


@pytest.fixture
def snapshot_lan(snapshot_redis: RedisServer) -> Lan:
    return Lan(Store(snapshot_redis.url), repair_seconds=0.2)


CROWD = r"""
// `count` pages lose the server at 0 and can reach it again at `down` ms. Time is a queue of events.
const [count, down, code] = process.argv.slice(2).map(Number);
const queue = [], connects = [], back = [];
let clock = 0, seed = 1;
performance.now = () => clock;
Math.random = () => (seed = seed * 16807 % 2147483647) / 2147483647;  // the same at every run
const setTimeout = (act, ms) => queue.push({at: clock + ms, act});
function page(memberCount) {
  let phase = 'connected', failures = 0, retryAt = 0, retryTimer = 0, restarting = false;
  const showState = () => {};
  function connect() {
    connects.push(clock);
    if (clock < down) setTimeout(() => disconnected({code: 1006, reason: ''}), 1);
    else back.push(clock);
  }
  RULES
  disconnected({code, reason: ''});
}
for (let n = 0; n < count; n++) page(count);
while (queue.length) {
  queue.sort((a, b) => b.at - a.at);
  const {at, act} = queue.pop();
  clock = at;
  act();
}
console.log(JSON.stringify({connects, back}));
"""


RULES = ("RETRY_MS", "RESTART_MS", "SPREAD_MS", "FINAL_CODES", "between", "now")


def back_off(count: int, down: int, code: int) -> tuple[list[float], list[float]]:
    """When the pages of a crowd try to connect and when they are back, in s, by the very functions of the page."""
    node = shutil.which("node")
    if node is None:
        pytest.skip("node is not installed")
    functions = [rf"^function {name}\(.*?^}}$" for name in ("disconnected", "retryIn", "stayAway")]
    constants = [rf"^const {name} = .*?;" for name in RULES]
    rules = [re.search(rule, tornchat.CHAT_JS, re.DOTALL | re.MULTILINE) for rule in constants + functions]
    script = CROWD.replace("RULES", "\n".join(rule[0] for rule in rules if rule))
    command = [str(node), "-", *map(str, (count, down, code))]
    result = subprocess.run(command, input=script, capture_output=True, text=True, timeout=RETURN, check=True)
    times = json.loads(result.stdout)
    return ([ms / 1000 for ms in times["connects"]], [ms / 1000 for ms in times["back"]])


class FaultyStore(tornchat.Store):
    """A store of which as many answers as one likes are lost, after the thing was done."""

    cuts = 0

    def cut(self) -> None:
        if self.cuts:
            self.cuts -= 1
            raise redis.ConnectionError("cut")

    async def append(self, *args: Any, **kwargs: Any) -> bool:
        appended = await super().append(*args, **kwargs)
        self.cut()
        return appended

    async def put_back(self, *args: Any, **kwargs: Any) -> None:
        await super().put_back(*args, **kwargs)
        self.cut()

    async def newest(self) -> tornchat.Entry | None:
        newest = await super().newest()
        self.cut()
        return newest


class Witness(Recorder):
    """One of the machine's people: at a daemon, with an outbox, as a page has it."""

    def __init__(self, feed: tornchat.Feed, name: str) -> None:
        super().__init__(member(name))
        self.feed, self.name = feed, name
        self.said: dict[str, str] = {}  # all by cid
        self.told: dict[str, tornchat.Outcome] = {}  # what only the author hears: refused, or stored before

    def unconfirmed(self) -> list[str]:
        heard = {frame.get("cid") for frame in self.of("message") if frame["name"] == self.name}
        heard |= {cid for cid, outcome in self.told.items() if isinstance(outcome, tornchat.Event)}
        return [cid for cid in self.said if cid not in heard]

    async def join(self, feed: tornchat.Feed) -> None:
        """Come to this daemon, for the first time or with what one has seen, and say again what isn't confirmed."""
        self.feed, welcomes = feed, self.of("welcome")
        self.member = await feed.outbox.enter(f"sid-{self.name}", self.name)
        if not welcomes:
            feed.room.join(self)
        else:
            seen = self.seqs_of_history()
            after = seen[-1] if seen else welcomes[-1]["seq"]
            feed.room.join(self, tornchat.ResumePoint(after, welcomes[-1]["epoch"]))
        for cid in self.unconfirmed():
            self.say(cid)

    def say(self, cid: str) -> None:
        done = functools.partial(self.told.__setitem__, cid)
        self.feed.outbox.act(self.member, tornchat.Event("message", 0, 0, cid=cid, text=self.said[cid]), done)

    def say_refused(self) -> None:
        for cid in self.unconfirmed():
            if isinstance(refused := self.told.pop(cid, None), tornchat.Refused):
                assert refused.code == "unavailable"
                self.say(cid)

    def histories(self) -> list[tuple[str, list[Frame]]]:
        """Epoch and messages, for each beginning that it was told of."""
        histories: list[tuple[str, list[Frame]]] = []
        for frame in self.frames:
            if frame["type"] == "welcome":
                assert frame["missed"] == 0
                if frame["recovered"]:
                    assert histories[-1][0] == frame["epoch"]
                else:
                    assert frame["reset"] or not histories
                    histories.append((frame["epoch"], []))
            elif frame["type"] == "message":
                histories[-1][1].append(frame)
        return histories

    def seqs_of_history(self) -> list[int]:
        return [frame["seq"] for frame in self.histories()[-1][1]]


def in_its_loop(act: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Run what is done by a machine in the machine's own loop."""
    return functools.wraps(act)(lambda self, **kwargs: self.runner.run(act(self, **kwargs)))


class Faults(hypothesis.stateful.RuleBasedStateMachine):
    """Two daemons over one fakeredis, three people, and everything that can happen to them, in any order.

    Each machine has a loop of its own, which runs only inside its rules.
    """

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.cids = (f"c{n}" for n in itertools.count(1))
        self.runner.run(self.begin())

    async def begin(self) -> None:
        self.server = fakeredis.FakeServer()
        self.feeds = [await self.open_feed(), await self.open_feed()]
        self.people = [Witness(self.feeds[n % 2], name) for n, name in enumerate(("Ann", "Bob", "Carl"))]
        for person in self.people:
            await person.join(person.feed)

    async def open_feed(self) -> tornchat.Feed:
        quick: dict[str, Any] = dict.fromkeys(("tick_seconds", "retry_seconds", "block_seconds"), 0.01)
        config = tornchat.Config(rate=0.0, repair_seconds=0.05, name_seconds=0.0, **quick)
        connect = functools.partial(fakeredis.FakeAsyncRedis, server=self.server, protocol=2)
        return await open_feed(FaultyStore, connect, config)

    async def turns(self, count: int) -> None:
        """Let the daemons work a little, or not at all."""
        for _ in range(count):
            await asyncio.sleep(0)

    @hypothesis.stateful.rule(who=st.integers(0, 2), count=st.integers(1, 5), turns=st.integers(0, 30))
    @in_its_loop
    async def say(self, who: int, count: int, turns: int) -> None:
        person = self.people[who]
        for cid in itertools.islice(self.cids, count):
            person.said[cid] = f"{person.name} {cid}"
            person.say(cid)
        await self.turns(turns)

    @hypothesis.stateful.rule(who=st.integers(0, 2), at=st.integers(0, 1), last=st.integers(1, 4))
    @in_its_loop
    async def say_the_same_again(self, who: int, at: int, last: int) -> None:
        """G4: at either daemon; what was lost with a history may be stored anew."""
        person, feed = self.people[who], self.feeds[at]
        here = await feed.outbox.enter(f"sid-{person.name}", person.name)
        for cid in list(person.said)[-last:]:
            feed.outbox.act(here, tornchat.Event("message", 0, 0, cid=cid, text=person.said[cid]), lambda outcome: None)

    @hypothesis.stateful.rule(at=st.integers(0, 1), answers=st.integers(1, 3))
    def cut(self, at: int, answers: int) -> None:
        store = self.feeds[at].store
        assert isinstance(store, FaultyStore)
        store.cuts = answers

    @hypothesis.stateful.rule(who=st.integers(0, 2), at=st.integers(0, 1))
    @in_its_loop
    async def move(self, who: int, at: int) -> None:
        """The connection is lost, and made again at any daemon."""
        person = self.people[who]
        person.feed.room.leave(person)
        await person.join(self.feeds[at])

    @hypothesis.stateful.rule(at=st.integers(0, 1), in_order=st.booleans())
    @in_its_loop
    async def restart(self, at: int, in_order: bool) -> None:
        """A daemon stops in order or is killed, and another takes its place."""
        old = self.feeds[at]
        if in_order:
            await old.outbox.drain()
        await old.stop()
        await old.store.close()
        self.feeds[at] = await self.open_feed()
        for person in self.people:
            if person.feed is old:
                await person.join(self.feeds[at])

    @hypothesis.stateful.rule(turns=st.integers(0, 30))
    @in_its_loop
    async def flush(self, turns: int) -> None:
        await self.feeds[0].store.redis.flushall()
        await self.turns(turns)

    @hypothesis.stateful.rule()
    def settle(self) -> None:
        """All that was said is confirmed, and everybody has the same before the eyes."""

        async def same() -> bool:
            for person in self.people:
                person.say_refused()
            rooms = {(it.room.epoch, it.room.seq, it.memory.last, len(it.outbox.waiting)) for it in self.feeds}
            length = await self.feeds[0].store.redis.xlen(self.feeds[0].store.feed)
            return len(rooms) == 1 and bool(length) and not any(person.unconfirmed() for person in self.people)

        self.runner.run(until(same))
        tails = [person.histories()[-1][1][-100:] for person in self.people]
        shortest = min(map(len, tails))
        assert all(tail[len(tail) - shortest :] == tails[0][len(tails[0]) - shortest :] for tail in tails)

    @hypothesis.stateful.invariant()
    def nothing_is_lost_or_doubled(self) -> None:
        """G2, G3, G4, as far as anybody has heard."""
        truth: dict[tuple[str, int], Frame] = {}
        for person in self.people:
            for epoch, messages in person.histories():
                for before, frame in itertools.pairwise(messages):
                    assert frame["seq"] == before["seq"] + 1
                for frame in messages:
                    assert truth.setdefault((epoch, frame["seq"]), frame) == frame
        first: dict[tuple[str, str, str], int] = {}
        for (epoch, seq), frame in truth.items():
            assert first.setdefault((epoch, frame["name"], frame["cid"]), seq) == seq

    def teardown(self) -> None:
        async def end() -> None:
            for feed in self.feeds:
                await feed.stop()
                await feed.store.close()
            await sweep()

        try:
            self.settle()
            self.nothing_is_lost_or_doubled()
        finally:
            self.runner.run(end())
            self.runner.close()


class TestManyDaemons(Transcripts):
    @slow
    async def test_G2_two_hundred_cuts(self, redis_lan: Lan) -> None:
        """Two daemons, ten people at either, 5,000 messages, 200 cuts: none lost, none doubled, all logs equal."""
        places = [place(await redis_lan.serve(grace_seconds=5)) for _ in range(2)]
        async with talkers(redis_lan, [f"P{n}" for n in range(10)], *places) as people:
            for n, person in enumerate(people):
                person.cuts = set(random.Random(n).sample(range(1, 5000), 20))
            await asyncio.gather(*(person.talk(range(500)) for person in people))
            await all_heard(people, 5000)
        assert_one_history(people, 5000)
        assert [len(person.cuts) for person in people] == [0] * 10
        assert sum(person.connects for person in people) >= 210

    async def test_G4_one_answer_in_twenty_is_cut(self, redis_server: RedisServer, redis_lan: Lan) -> None:
        """5 % of what Redis answers the daemon is lost after it was done: 500 said are 500 stored, 1 to 500."""
        async with Proxy(redis_server.port) as proxy:
            daemon = await redis_lan.serve(redis_url=proxy.url, grace_seconds=5)
            async with talkers(redis_lan, ["Ann", "Bob", "Carl", "Dan"], place(daemon)) as people:
                proxy.cut_share = 0.05
                await asyncio.gather(*(person.talk(range(125), in_flight=1) for person in people))
                proxy.cut_share = 0.0
                await all_heard(people, 500)
            assert_one_history(people, 500)
            stored = stored_messages(redis_lan.store)
            assert [event.seq for event in stored] == list(range(1, 501))
            assert len({event.text for event in stored}) == 500
            assert proxy.cuts > 10
            await daemon.stop()

    async def test_G2_a_daemon_is_killed(self, redis_lan: Lan) -> None:
        """kill -9 of a daemon: its people are at the other under their names, nothing lost, nobody left."""
        first = await redis_lan.run("-p", "0", "--rate", "0")
        address, second = await first.address(), place(await redis_lan.serve())
        async with talkers(redis_lan, ["Ann", "Bob"], address) as two, talkers(redis_lan, ["Eve"], second) as (eve,):
            people = [*two, eve]
            talking = asyncio.gather(*(person.talk(range(500)) for person in people))
            await until(lambda: heard_from(two, 100))
            await first.kill()
            for person in two:
                person.places = [address, second]
            await talking
            await all_heard(people, 1500)
        assert_one_history(people, 1500)
        assert [person.connects for person in people] == [2, 2, 1]

    async def test_G6_who_does_not_come_back(self, redis_lan: Lan) -> None:
        """Of a killed daemon's people those who don't come back leave with their leases; of the others nobody hears."""
        lease = {"lease_seconds": 1.0, "renew_seconds": 0.2}
        first, second = await redis_lan.serve(**lease), await redis_lan.serve(**lease)
        ann = await redis_lan.join("Ann", at=first)
        await redis_lan.join("Bob", at=first)
        eve = await redis_lan.join("Eve", at=second)
        crash(first)
        await ann.ended()
        await ann.tab(at=second).connect(ann.after, ann.epoch)
        await eve.expect("left", names=["Bob"], count=2)
        assert eve.names_in("left") == ["Bob"]
        await until(lambda: is_admitted(redis_lan.browser(second), "Bob"))

    @slow
    async def test_G9_a_rolling_restart(self, redis_lan: Lan) -> None:
        """Two daemons are restarted, one after the other, while people talk: nothing lost."""
        programs = [await redis_lan.run("-p", "0", "--rate", "0") for _ in range(2)]
        addresses = [await program.address() for program in programs]
        names, restarted = ["Ann", "Bob", "Carl", "Dan"], asyncio.Event()
        said = dict.fromkeys(names, 0)

        async def talk(person: Talker) -> None:
            while not restarted.is_set():
                await person.say(f"{person.name} {said[person.name]}")
                said[person.name] += 1
                await asyncio.sleep(0.02)

        async with talkers(redis_lan, names, *addresses, pause=(0.2, 2.0)) as people:  # the page's RESTART_MS
            talking = asyncio.gather(*map(talk, people))
            for program, address in zip(programs, addresses, strict=True):
                assert complaints((await program.stop())[1]) == []
                again = await redis_lan.run("-p", str(urllib.parse.urlsplit(address).port), "--rate", "0")
                assert await again.address() == address
                await until(lambda: all(person.here for person in people))
            restarted.set()
            await talking
            await all_heard(people, sum(said.values()))
        assert_one_history(people, sum(said.values()))
        assert sum(person.connects for person in people) >= 8

    @pytest.mark.parametrize("skew", [3600, -3600])
    async def test_G6_a_wrong_clock(self, skew: int, redis_lan: Lan) -> None:
        """A daemon whose clock is an hour off changes nothing: the times of messages and leases are Redis's."""
        options = ["-p", "0", "--host", "127.0.0.1", "--room", redis_lan.store.room, "--redis-url", redis_lan.store.url]
        clock = f"import time; now = time.time; time.time = lambda: now() + {skew}"
        wrong = redis_lan.add(await Program.start(*options, python=after(clock)))
        address, right = await wrong.address(), await redis_lan.serve()
        ann, bob = await redis_lan.join("Ann", at=address), await redis_lan.join("Bob", at=right)
        with redis.Redis.from_url(redis_lan.store.url) as client:
            began = client.time()[0]
            await ann.say("what time is it?")
            heard = [await person.expect("message", text="what time is it?") for person in (bob, ann)]
            leases = dict(client.zrange(redis_lan.store.key("leases"), 0, -1, withscores=True))
        assert all(began <= frame["ts"] / 1000 < began + 600 for frame in heard)
        assert sorted(leases) == sorted(tornchat.name_key(name).encode() for name in ("Ann", "Bob"))
        assert all(began < lapses / 1000 < began + 600 for lapses in leases.values())
        there = await ann.tab(at=right).connect(ann.after, ann.epoch)
        await there.expect("welcome", name="Ann", recovered=True)
        carl = await redis_lan.join("Carl", at=right)
        carl.drop()
        await bob.expect("left", names=["Carl"])
        assert bob.names_in("left") == ["Carl"]

    @slow
    async def test_workers(self, redis_lan: Lan) -> None:
        """Two workers are one room; each is killed, replaced and missed by nobody; SIGTERM ends all, with code 0."""
        program = await redis_lan.run("-p", "0", "--rate", "0", "--workers", "2")
        address = await program.address()
        async with talkers(redis_lan, [f"P{n}" for n in range(8)], address) as people:
            talking = asyncio.gather(*(person.talk(range(100), in_flight=1) for person in people))
            workers = workers_of(program)
            assert len(workers) == 2
            for worker in workers:
                others = workers_of(program) - {worker}
                os.kill(worker, signal.SIGKILL)
                await program.logs(r"worker \d has ended")

                async def replaced(others: set[int] = others) -> bool:
                    return len(workers_of(program)) == 2 and workers_of(program) > others

                await until(replaced)
            await talking
            await all_heard(people, 800)
            assert_one_history(people, 800)
            await until(lambda: all(person.connects >= 2 for person in people))
            workers = workers_of(program)
            out, err = await program.stop()
            assert (len(out.splitlines()) < 15, complaints(err)) == (True, [])
            assert not any(map(is_running, workers))

    async def test_workers_end_with_their_parent(self, redis_lan: Lan) -> None:
        """Workers whose parent is killed with -9 stop in order by themselves, and give the port back."""
        program = await redis_lan.run("-p", "0", "--workers", "2")
        address = await program.address()
        ann = await redis_lan.join("Ann", at=address)
        workers = workers_of(program)
        await program.kill()
        await ann.closed(1001)
        try:
            await until(lambda: not any(map(is_running, workers)))
        finally:
            for worker in filter(is_running, workers):
                os.kill(worker, signal.SIGKILL)
        with socket.create_server(("127.0.0.1", urllib.parse.urlsplit(address).port or 0)):
            pass

    @pytest.mark.parametrize("harm", ["gone", *(pytest.param(harm, marks=slow) for harm in ("full", "read-only"))])
    async def test_G8_a_redis_that_takes_nothing(
        self, harm: str, own_redis: RedisServer, own_lan: Lan, caplog: pytest.LogCaptureFixture
    ) -> None:
        """Redis is killed, full, or a replica: what is said is refused, reading goes on, and writing when it can."""
        await own_lan.serve(confirm_seconds=1.0)
        ann, bob, dan = await own_lan.join("Ann"), await own_lan.join("Bob"), await own_lan.join("Dan")
        await ann.say_many(3)
        await bob.expect_texts(1, 2, 3)
        with own_redis.client as client:
            if harm == "gone":
                own_redis.kill()
            elif harm == "full":
                client.config_set("maxmemory", 1)
            else:
                client.replicaof("127.0.0.1", "1")
            cid = await ann.say("too much?")
            assert (await until_frame(ann, "refused", code="unavailable", cid=cid))["retry_after"] > 0
            assert ann.seen("store")[-1] == {"type": "store", "available": False}
            assert (await own_lan.browser().fetch("/healthz")).code == 503
            assert await verdict(own_lan.browser().ask("Carl")) == (503, "unavailable")
            assert (await dan.fetch("/logout", form={})).code == 303
            assert await dan.ended() == 4401
            there = await bob.tab().connect(after=0, epoch=bob.welcome["epoch"])
            await there.expect("welcome", recovered=True, seq=3)
            await there.expect("store", available=False)
            await there.expect_texts(1, 2, 3)
            if harm == "gone":
                own_redis.start()
            elif harm == "full":
                client.config_set("maxmemory", 0)
            else:
                client.replicaof("NO", "ONE")
        await until_frame(ann, "store", available=True)
        await ann.say("too much?", cid)
        await until_frame(ann, "message", cid=cid, seq=4)
        assert (await own_lan.browser().fetch("/healthz")).code == 200
        await until(lambda: len(own_lan.daemons[0].room.roster) == 2)  # the logout was not forgotten
        lines = state_lines(caplog)
        assert lines == ["away", "back"] * (len(lines) // 2)
        assert len(lines) <= 4

    async def test_G2_an_older_snapshot(
        self, snapshot_redis: RedisServer, snapshot_lan: Lan, caplog: pytest.LogCaptureFixture
    ) -> None:
        """Redis is killed and comes back with 95 of 100 messages: the daemons put the others back, nobody notices."""
        daemons = [await snapshot_lan.serve(), await snapshot_lan.serve()]
        ann, bob = await snapshot_lan.join("Ann", at=daemons[0]), await snapshot_lan.join("Bob", at=daemons[1])
        await ann.say_many(95)
        with snapshot_redis.client as client:
            client.save()
        await ann.say_many(5, first=96)
        await bob.expect_texts(*range(1, 101))
        snapshot_redis.kill()
        snapshot_redis.start()
        for person in (ann, bob):
            await until_frame(person, "store", available=True)
        await ann.say("101")
        for person in (ann, bob):
            await until_frame(person, "message", text="101", seq=101)
            assert [welcome["reset"] for welcome in person.seen("welcome")] == [False]
            assert not person.names_in("left")
        assert [event.text for event in stored_messages(snapshot_lan.store)] == [str(n) for n in range(1, 102)]
        assert sorted(set(state_lines(caplog))) == ["away", "back"]
        carl = await snapshot_lan.join("Carl", at=await snapshot_lan.serve())
        await carl.expect_texts(*range(2, 102))

    async def test_G2_a_lagging_replica_is_promoted(
        self, snapshot_redis: RedisServer, snapshot_lan: Lan, tmp_path_factory: pytest.TempPathFactory
    ) -> None:
        """The address leads to another Redis, which has only the beginning: it gets the rest, nobody notices."""
        replica = RedisServer(tmp_path_factory.mktemp("replica"))
        async with contextlib.AsyncExitStack() as stack:
            stack.callback(replica.kill)
            proxy = await stack.enter_async_context(Proxy(snapshot_redis.port))
            daemon = await snapshot_lan.serve(redis_url=proxy.url)
            ann = await snapshot_lan.join("Ann")
            await ann.say_many(5)
            key = snapshot_lan.store.key("feed")
            with replica.client as client:
                snapshot_redis.client.config_set("repl-diskless-sync-delay", 0)
                client.replicaof("127.0.0.1", str(snapshot_redis.port))

                async def copied() -> bool:
                    newest = [each.xrevrange(key, count=1) for each in (client, snapshot_redis.client)]
                    return newest[0] != [] and newest[0] == newest[1]

                await until(copied)
                client.replicaof("NO", "ONE")
            await ann.say_many(5, first=6)
            proxy.target = replica.port
            proxy.disappear()
            proxy.gone = False
            await ann.say("11")
            await until_frame(ann, "message", text="11", seq=11)
            await until_frame(await snapshot_lan.join("Bob"), "message", seq=11)
            assert [welcome["reset"] for welcome in ann.seen("welcome")] == [False]
            with replica.client as client:
                assert client.exists(snapshot_lan.store.key("secret"), snapshot_lan.store.key("names")) == 2
            await daemon.stop()

    async def test_G2_flushed_under_traffic_of_two_daemons(self, own_redis: RedisServer, own_lan: Lan) -> None:
        """FLUSHALL while people talk at two daemons: nobody notices, nothing is lost or doubled."""
        places = [place(await own_lan.serve()) for _ in range(2)]
        async with talkers(own_lan, ["Ann", "Bob", "Carl", "Dan"], *places) as people:
            talking = asyncio.gather(*(person.talk(range(200), in_flight=2) for person in people))
            key = own_lan.store.key
            with own_redis.client as client:
                secret = client.get(key("secret"))
                for seq in (20, 300):
                    await until(functools.partial(heard_from, people, seq))
                    client.flushall()
                await talking
                await all_heard(people, 800)
                await until(lambda: (client.zcard(key("leases")), client.hlen(key("names"))) == (4, 4))
                assert client.get(key("secret")) == secret
            assert_one_history(people, 800)
            assert [event.seq for event in stored_messages(own_lan.store)] == list(range(1, 801))
            for person in people:
                assert (person.resets, person.connects) == (0, 1)

    @slow
    async def test_G4_frozen_in_the_middle_of_a_commit(self, redis_lan: Lan) -> None:
        """A daemon is stopped while it commits, and goes on 7 s later: nothing doubled, nothing in the wrong place."""
        frozen, other = await redis_lan.run("-p", "0", "--rate", "0"), await redis_lan.serve(lease_seconds=60.0)
        address = await frozen.address()
        async with talkers(redis_lan, ["Ann"], address) as one, talkers(redis_lan, ["Bob"], place(other)) as two:
            people = [*one, *two]
            # One at a time, as clients do: what is confirmed too late is refused, and said again behind the next.
            talking = asyncio.gather(*(person.talk(range(400), in_flight=1) for person in people))
            await until(lambda: heard_from(people, 50))
            frozen.signal(signal.SIGSTOP)
            await until(lambda: heard_from(two, 400))
            began = time.monotonic()
            await until(lambda: time.monotonic() - began > 7)
            frozen.signal(signal.SIGCONT)
            await talking
            await all_heard(people, 800)
        assert_one_history(people, 800)
        assert [event.seq for event in stored_messages(redis_lan.store)] == list(range(1, 801))

    @slow
    async def test_G1_far_daemons(self, redis_server: RedisServer, redis_lan: Lan) -> None:
        """Daemons 0, 10, 60 and 150 ms from Redis, 40 messages a second at each: all are confirmed within 4 s."""
        async with contextlib.AsyncExitStack() as proxies:
            places = []
            for delay in (0, 0.01, 0.06, 0.15):
                proxy = await proxies.enter_async_context(Proxy(redis_server.port))
                places.append(place(daemon := await redis_lan.serve(redis_url=proxy.url)))
                proxies.push_async_callback(daemon.stop)
                proxy.delay = delay
            people: list[Talker] = []
            for n, where in enumerate(places):
                people += await proxies.enter_async_context(talkers(redis_lan, [f"P{n}"], where))

            async def pace(person: Talker) -> None:
                for n in range(200):
                    await person.say(f"{person.name} {n}")
                    await asyncio.sleep(1 / 40)

            await asyncio.gather(*map(pace, people))
            await all_heard(people, 800)
            assert_one_history(people, 800)
            assert not [person.browser.seen("refused") for person in people if person.browser.seen("refused")]

    @pytest.mark.parametrize("code", [1001, 1006])
    def test_G9_five_hundred_come_back(self, code: int) -> None:
        """500 pages lose the server for 3 s: all are back within 20 s, never more than 100 connects a second."""
        connects, back = back_off(500, 3000, code)
        assert len(back) == 500
        assert max(back) < 20
        connects.sort()
        in_one_second = [n - bisect.bisect_left(connects, at - 1) + 1 for n, at in enumerate(connects)]
        assert max(in_one_second) <= 100

    @slow
    def test_G2_G3_G4_whatever_happens(self) -> None:
        """Sends, lost answers, second tries, flushes and restarts in any order: G2, G3 and G4 hold."""
        hypothesis.stateful.run_state_machine_as_test(  # type: ignore[no-untyped-call,unused-ignore]
            Faults,
            settings=hypothesis.settings(
                max_examples=30,
                stateful_step_count=25,
                deadline=None,
                suppress_health_check=list(hypothesis.HealthCheck),
            ),
        )


# === Terminal client ==================================================================================================

# Colours, the cursor, the window's title, links, the clipboard, in escapes and in C1; bells and backspaces; what ends a
# line; marks that turn the direction; half a character.
ATTACKS = ["\x1b[31mred", "\x1b[2J\x1b[H", "\x9b2J", "\x1b]0;pwned\x07", "\x1b[6n\x1b[c", "\x07", "\x0e\x0f"]
ATTACKS += ["\x1b]8;;http://evil.example\x1b\\click\x1b]8;;\x1b\\", "\x1b]52;c;cHduZWQ=\x07", "\x9d52;c;cHduZWQ=\x9c"]
ATTACKS += ["Bob: hi\x08\x08\x08\x08", "hi\rAnn: bye", "a\x0bb\x0cc", "a\x85Ann: bye", "hi\nAnn: bye\n12:34 Ann: bye"]
ATTACKS += ["\x1bP$q\x1b\\", "a\x00b\x7fc", "\u202egnp.exe", "\u2066a\u2067b\u2069", "\u200ea\u200fb\u061cc"]
ATTACKS += ["a\u2028Ann: bye\u2029b", "a\ud800b"]
# What fills rows of a terminal, so that it might wrap what comes next; other terminals draw some of it wider.
FILLINGS = ["hi" + 67 * "\u00ad", 67 * "x", "x" + 66 * " ", 67 * "\u0434", 67 * "\u4dc0", 67 * "\u1161", 67 * "a\u0301",
            40 * "\u2764\ufe0f", 30 * "\U0001f469\u200d\U0001f680", 40 * "\U0001fae9"]  # fmt: skip


class Joined(Program):
    """`tornchat.py --join` in a pipe: lines go in, lines come out."""

    @classmethod
    async def run(cls, lan: Lan, *options: str, at: str = "", **environ: str) -> Self:
        command = [str(PROGRAM), "--join", at or place(await lan.open()), *options]
        program = await cls.spawn(command, environ, stdin=asyncio.subprocess.PIPE)
        lan.programs.append(program)
        return program

    def feed(self, *lines: object) -> None:
        self.process.stdin.write("".join(f"{line}\n" for line in lines).encode())

    def feed_no_more(self) -> None:
        if self.process.stdin is not None:
            self.process.stdin.close()

    async def kill(self) -> None:
        self.feed_no_more()
        await super().kill()

    async def lines(self, count: int) -> list[str]:
        read = self.process.stdout.readline
        return [(await asyncio.wait_for(read(), RETURN)).decode().rstrip("\n") for _ in range(count)]


class Terminal(Program):
    """`tornchat.py --join` as a person runs it, in a terminal of its own: pyte shows what stands there."""

    @classmethod
    async def run(
        cls,
        lan: Lan,
        *options: str,
        at: str = "",
        columns: int = 80,
        python: Sequence[str] = (str(PROGRAM),),
        **environ: str,
    ) -> Self:
        master, slave = pty.openpty()
        command = [*python, "--join", at or place(await lan.open()), *options]
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        modes = termios.tcgetattr(slave)
        environ = {"TERM": "xterm-256color"} | environ
        own: dict[str, Any] = {"start_new_session": True, "preexec_fn": lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0)}
        program = await cls.spawn(command, environ, stdin=slave, stdout=slave, stderr=slave, **own)
        program.master, program.slave, program.modes = master, slave, modes
        program.screen = pyte.HistoryScreen(columns, 24, history=5000)
        program.screen.write_process_input = program.keys  # where the cursor is, when it is asked
        program.stream = pyte.ByteStream(program.screen)
        lan.programs.append(program)
        os.set_blocking(master, False)
        asyncio.get_running_loop().add_reader(master, program.on_output)
        return program

    master: int
    slave: int
    modes: list[Any]  # of the terminal, before
    screen: Any
    stream: Any

    def on_output(self) -> None:
        with contextlib.suppress(BlockingIOError):
            self.stream.feed(os.read(self.master, 65536))

    def keys(self, keys: str) -> None:
        os.write(self.master, keys.encode())

    def resize(self, columns: int) -> None:
        fcntl.ioctl(self.slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        self.screen.resize(24, columns)
        self.signal(signal.SIGWINCH)

    @property
    def rows(self) -> list[str]:
        """What stands in the terminal, and what has scrolled out of it."""
        lines = [*self.screen.history.top, *(self.screen.buffer[row] for row in range(24))]
        return ["".join(line[column].data for column in range(self.screen.columns)).rstrip() for line in lines]

    @property
    def text(self) -> str:
        return "\n".join(self.rows).rstrip() + "\n"

    async def shows(self, text: str) -> None:
        try:
            await until(lambda: text in self.text)
        except BaseException:
            print(self.text)
            raise

    async def prompts(self) -> None:
        """Wait until it takes keys: the prompt stands below what was printed last."""
        await self.shows("\nAnn>\n")

    async def leaves(self) -> int:
        """Wait for its end; the terminal is as it was before."""
        code = await asyncio.wait_for(self.process.wait(), RETURN)
        assert termios.tcgetattr(self.slave) == self.modes
        self.on_output()
        return int(code)

    async def kill(self) -> None:
        await super().kill()
        asyncio.get_running_loop().remove_reader(self.master)
        os.close(self.master)
        os.close(self.slave)


WITHOUT_PROMPT_TOOLKIT = after("sys.modules['prompt_toolkit'] = None")


class StandIn:
    """A server that isn't tornchat: it lets everybody in, and says to every socket what it was told to say."""

    def __init__(self, *frames: Frame | str | bytes, login: Frame | None = None) -> None:
        self.frames, self.login = frames, login or {"name": "Me"}
        self.events: list[object] = []  # what it was asked for: the arguments of a /chat, or "logout"
        self.sockets: list[tornado.websocket.WebSocketHandler] = []
        self.busy = asyncio.Event()  # a handshake has begun ...
        self.free = asyncio.Event()  # ... and may go on
        self.free.set()

    async def __aenter__(self) -> Self:
        room = self

        class Login(tornado.web.RequestHandler):
            def post(self) -> None:
                self.finish(room.login)

        class Logout(tornado.web.RequestHandler):
            def post(self) -> None:
                room.events.append("logout")

        class Chat(tornado.websocket.WebSocketHandler):
            async def prepare(self) -> None:
                room.busy.set()
                await room.free.wait()

            def open(self, *args: str, **kwargs: str) -> None:
                room.sockets.append(self)
                room.events.append({name: self.get_argument(name) for name in self.request.arguments})
                for frame in room.frames:
                    data = json.dumps(frame) if isinstance(frame, dict) else frame
                    self.write_message(data, binary=isinstance(data, bytes))

            def on_message(self, message: str | bytes) -> None:
                """What is said is heard by nobody."""

        routes = [("/login", Login), ("/logout", Logout), ("/chat", Chat)]
        application = tornado.web.Application(routes, log_function=lambda handler: None)
        self.server = tornado.httpserver.HTTPServer(application)
        sockets = tornado.netutil.bind_sockets(0, "127.0.0.1")
        self.server.add_sockets(sockets)
        self.url = f"http://127.0.0.1:{sockets[0].getsockname()[1]}/"
        return self

    async def __aexit__(self, *error: object) -> None:
        self.server.stop()
        await self.server.close_all_connections()


def hostile_room() -> StandIn:
    """It says to a terminal whatever it likes, in every field of its frames."""
    everything = "".join(ATTACKS)
    frames = [WELCOME | {"title": "Room" + everything, "name": "Me" + everything,
                         "members": ["Me", "Bob" + everything], "seq": len(ATTACKS) + 1}]  # fmt: skip
    common: Frame = {"ts": 1795166143321, "count": 2}
    for seq, attack in enumerate(ATTACKS, 1):
        name = f"attack{seq}:"
        frames += [
            common | {"type": "joined", "names": ["Bob" + attack]},
            common | {"type": "refused", "code": "empty", "text": name + attack},
            common | {"type": "left", "names": ["Bob" + attack]},
            common | {"type": "hosts", "names": ["Me", "Bob" + attack]},
            common | {"type": "mode", "talk": attack, "every": 7, "door": attack, "by": "Bob" + attack},
            common | {"type": "muted", "name": "Bob" + attack, "until": 0},
            common
            | {"type": "note", "to": seq, "kind": "pin", "message": {"name": "Bob" + attack, "text": name + attack}},
            common | {"type": "message", "seq": seq, "cid": "x", "name": "Bob" + attack, "text": name + attack},
            common | {"type": "note", "to": seq, "kind": "react", "counts": {attack: attack}},
            common | {"type": "note", "to": seq - 1, "kind": "delete"},
        ]
    frames.append(common | {"type": "message", "seq": len(ATTACKS) + 1, "name": "Eve", "text": "the end"})
    return StandIn(*frames, login={"name": "Me" + everything})


WELCOME: Frame = {"type": "welcome", "name": "Ann", "title": "5b", "members": ["Ann"], "count": 1, "epoch": "e",
                  "seq": 1000, "recovered": True, "missed": 0, "reset": False,
                  "limits": {"text": 4000, "history": 100}}  # fmt: skip


def client_of(url: str = "http://h/", *, at_a_screen: bool = False) -> tornchat.Client:
    """A client in this process, which prints what it hears."""
    client = tornchat.Client(tornchat.Config(join=url), "en")
    client.view = tornchat.Screen(client, colors=False) if at_a_screen else tornchat.Lines(client)
    return client


class TestTerminal(Transcripts):
    @hypothesis.given(st.text(st.sampled_from("ab 你é\u0301\n👩"), max_size=200), st.integers(13, 40))
    @hypothesis.example("é" * 100, 20)
    @hypothesis.example("x" * 100, 20)
    @hypothesis.example("a\n" + " " * 50 + "12:34 Bob: hi", 20)
    def test_wrap(self, text: str, columns: int) -> None:
        """Rows of a message fit, lose no letter, and only the first begins at the margin."""
        first, *others = tornchat.wrap("12:34 Ann: " + text, columns, tornchat.most_columns)
        assert first.startswith("12:34 Ann:"[:columns])
        assert all(row.startswith("    ") or not row for row in others)
        assert "".join([first, *others]).replace(" ", "") == "12:34Ann:" + re.sub(r"\s", "", text)
        assert all(tornchat.most_columns(row) <= columns for row in [first, *others])
        url = f"http://h/{'x' * (columns - 13)}"  # as long as a row: it stays whole, so that it can be copied
        assert f"    {url}" in tornchat.wrap(f"12:34 Ann: see {url} there", columns, tornchat.most_columns)

    async def test_gibberish(self) -> None:
        """A server that isn't the room's is told as such, whatever it says."""
        frames: list[str | bytes] = ["hello", "[]", "7", "{}", b"\xff", "[" * 5000, '{"type":"refused"}']
        frames += ['{"type":"welcome"}', '{"type":"time","ts":"soon"}']
        frames += ['{"type":"message","seq":"x"}', '{"type":"joined","names":7,"count":1}']
        for frame in frames:
            async with StandIn(frame) as room:
                with pytest.raises(tornchat.FatalError, match="There is no tornchat at"):
                    await tornchat.join(tornchat.Config(join=room.url), {})

    @pytest.mark.parametrize(
        ("refused", "status"),
        [("/login", "404 No\x85t\x9b2J"), ("/login", "7"), ("/chat", "503 \x9b2J"), ("/chat", "200 \x1b[2J")],
    )
    async def test_G10_an_odd_answer(self, refused: str, status: str) -> None:
        """Nor does what it answers instead of HTTP as it should be steer the terminal."""

        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            request = await reader.readuntil(b"\r\n\r\n")
            line, body = (status, "") if f" {refused}".encode() in request else ("200 OK", '{"name":"Me"}')
            answer = f"HTTP/1.1 {line}\r\nDate: 7\r\nContent-Length: {len(body)}\r\n\r\n{body}"
            writer.write(answer.encode("latin-1"))
            writer.close()

        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        err = await fails(1, "--join", f"http://127.0.0.1:{port}/")
        server.close()
        assert [char for char in err if tornchat.STEERING.match(char)] == []

    async def test_a_bug_of_our_own(self, memory_lan: Lan, monkeypatch: pytest.MonkeyPatch) -> None:
        """What goes wrong in the client is not blamed on the room."""

        def broken(self: tornchat.Lines, frame: Frame) -> None:
            raise KeyError("a bug")

        monkeypatch.setattr(tornchat.Lines, "message", broken)
        bob = await memory_lan.join("Bob")
        await bob.say("hi")
        with pytest.raises(KeyError, match="a bug"):
            await tornchat.join(tornchat.Config(join=memory_lan.daemons[0].url), {})

    async def test_G10_attacks(self, memory_lan: Lan) -> None:
        """No byte of others steers the terminal or writes a line of somebody else's, whatever field it stands in."""
        async with hostile_room() as room:
            terminal = await Terminal.run(memory_lan, at=room.url, TZ="UTC")
            await terminal.shows("Eve: the end")
            terminal.keys("/who\r/nothing\r")
            await terminal.shows("/nothing")
            terminal.keys("\x03")
            assert await terminal.leaves() == 0
            piped = await Joined.run(memory_lan, "-v", at=room.url)
            piped.feed_no_more()
            code, out, err = await piped.ended()
        assert code == 0
        for printed in (terminal.text, out, err):
            assert [char for char in printed if tornchat.STEERING.match(char)] == []
            assert not re.search(r"^(\d\d:\d\d )?Ann", printed, re.MULTILINE), printed
        assert terminal.screen.title == ""
        assert [seq for seq in range(1, len(ATTACKS) + 1) if f" attack{seq}:" not in terminal.text] == []
        said = [line for line in out.splitlines() if not line.startswith(" ")]
        assert len(said) == len(ATTACKS) + 1
        assert all(line.startswith("Bob") for line in said[:-1])

    @pytest.mark.parametrize("python", [(str(PROGRAM),), WITHOUT_PROMPT_TOOLKIT], ids=["prompt_toolkit", "plain"])
    async def test_G10_forged_lines(
        self, python: Sequence[str], memory_lan: Lan, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The terminal has nothing to wrap, however wide it draws what somebody wrote: no row is somebody else's."""
        monkeypatch.setattr(pyte.screens, "wcwidth", lambda char: 1 if char.isascii() else 2)
        await memory_lan.serve(rate=0)
        eve = await memory_lan.join("Eve")
        for filling in FILLINGS:
            await eve.say(f"{filling}14:39 Bob: I hate you")
        await eve.say("the end")
        ann = await Terminal.run(memory_lan, "--name", "Ann", python=python)
        await ann.shows("pip install prompt_toolkit" if python is WITHOUT_PROMPT_TOOLKIT else "/help tells")
        await ann.shows("Eve: the end")
        for row in ann.rows:
            assert re.match(r"(\d\d:\d\d )?(Eve: |~ |Eve:$)|    |tornchat: |Ann> ?$|$", row), row

    async def test_a_conversation(self, memory_lan: Lan) -> None:
        """A person at a terminal sees the history and who comes and goes, talks, asks, and leaves."""
        bob = await memory_lan.join("Bob")
        await bob.say("before")
        ann = await Terminal.run(memory_lan, "--name", "Ann")
        await ann.shows("Bob: before")
        await bob.expect("message", text="before")
        await bob.expect("joined", names=["Ann"])
        ann.keys("hello 你好\r")
        await bob.expect("message", name="Ann", text="hello 你好")
        await ann.shows("Ann: hello 你好")
        carl = await memory_lan.join("Carl")
        await ann.shows("~ Carl joined")
        ann.keys("/who\r//who\r/foo\r")
        await bob.expect("message", text="/who")
        await ann.shows("here: Ann, Bob, Carl")
        await ann.shows("no command /foo")
        await carl.fetch("/logout", form={})
        await ann.shows("~ Carl left")
        for keys in ("\x1b[200~one\rtwo\x1b[201~\r", "one\x1b\rtwo\r", "\x1b[A\r"):  # a paste, Alt-Enter, arrow up
            await ann.prompts()
            ann.keys(keys)
            await bob.expect("message", text="one\ntwo")
        await ann.shows("Ann: one\n    two\n")
        ann.keys("bye\r/quit\r")
        await bob.expect("message", text="bye")
        assert await ann.leaves() == 0
        await bob.expect("left", names=["Ann"])

    async def test_what_is_being_typed_stays(self, memory_lan: Lan) -> None:
        """Lines that come in are printed above what is being typed, in windows of any width, also after a change."""
        bob = await memory_lan.join("Bob")
        ann = await Terminal.run(memory_lan, "--name", "Ann", columns=40)
        await ann.prompts()
        ann.keys("a draft that is longer than a row, 也有中文!\x1b[D")
        draft = ["Ann> a draft that is longer than a row,", "也有中文!"]
        await ann.shows("\n".join(draft))
        await bob.say("hi")
        await ann.shows("Bob: hi")
        await ann.shows("\n".join(draft))
        assert [re.sub(r"^\d\d:\d\d ", "", row) for row in ann.rows if row] == [
            "~ tornchat · here: Ann, Bob ·",
            "    /help tells what you can do",
            "Bob: hi",
            *draft,
        ]
        ann.resize(20)
        await bob.say("a line that is longer")
        await ann.shows("Bob: a line\n    that is longer\nAnn> a draft that is\n")
        ann.keys("好\r")
        await bob.expect_texts("hi", "a line that is longer", "a draft that is longer than a row, 也有中文好!")

    async def test_time(self, memory_lan: Lan) -> None:
        """/time is the room's clock, in any zone; messages show their time of it, in the reader's zone."""
        ann = await Terminal.run(memory_lan, "--name", "Ann", TZ="UTC")
        ann.keys("/time\r/time Asia/Shanghai\r/time new york\r/time ../passwd\r/time Asia\r")
        await ann.shows("no time zone “Asia”")
        await ann.shows("no time zone “../passwd”")
        told = re.findall(r"clock it is ([\d-]+ [\d:]+) \(([\w/]+)\)", ann.text)
        assert [zone for _, zone in told] == ["UTC", "Asia/Shanghai", "America/New_York"]
        here, there, _ = [datetime.datetime.fromisoformat(clock) for clock, _ in told]
        assert abs((there - here).total_seconds() - 8 * 3600) <= 1
        store_clock = memory_lan.daemons[0].store.now() / 1000
        assert abs(here.replace(tzinfo=datetime.UTC).timestamp() - store_clock) < RETURN
        client = client_of()
        client.receive(json.dumps({"type": "time", "ts": round((time.time() + 86400) * 1000)}))
        assert abs(client.now().timestamp() - time.time() - 86400) < 1

    @pytest.mark.parametrize("end", ["\x03", "\x04", "SIGTERM"])
    async def test_the_terminal_is_restored(self, end: str, memory_lan: Lan) -> None:
        """However the client ends, in the midst of typing too, the terminal is as before, and the name is free."""
        daemon = await memory_lan.serve()
        ann = await Terminal.run(memory_lan, "--name", "Ann")
        await ann.prompts()
        if end != "\x04":
            ann.keys("x")
            await ann.shows("Ann> x")
        if end == "SIGTERM":
            ann.signal(signal.SIGTERM)
        else:
            ann.keys(end)
        assert await ann.leaves() == 0
        assert daemon.room.roster == {}

    async def test_the_terminal_goes_away(self, memory_lan: Lan) -> None:
        """A window that is closed without a word ends the client, and gives the name back."""
        daemon = await memory_lan.serve()
        ann = await Terminal.run(memory_lan, "--name", "Ann")
        await ann.shows("here: Ann")
        asyncio.get_running_loop().remove_reader(ann.master)
        os.dup2(ann.slave, ann.master)
        await asyncio.wait_for(ann.process.wait(), RETURN)
        assert daemon.room.roster == {}

    def test_what_is_told(self, capsys: pytest.CaptureFixture[str]) -> None:
        """In words: what was missed, that the history is lost, what was not sent; and another day."""
        client = client_of(at_a_screen=True)
        message: Frame = {"type": "message", "name": "Bob", "text": "hi", "seq": 1000, "ts": 1}
        for frame, told in [
            (WELCOME, "here: Ann"),
            (message, "~ 1970-01-01"),
            (message | {"seq": 1001, "ts": round(client.now().timestamp() * 1000)}, f"~ {client.now().date()}"),
            (WELCOME | {"seq": 2000, "missed": 7}, "Messages missed while you were away: 7"),
            (WELCOME | {"seq": 1, "reset": True, "recovered": False}, "The room has lost its history"),
            (message | {"seq": 1, "text": "anew"}, "Bob: anew"),
            ({"type": "refused", "code": "not-host", "text": "Only a host can.", "cid": "x"}, "~ Only a host can."),
            ({"type": "of-tomorrow", "text": 7}, ""),
        ]:
            client.receive(json.dumps(frame))
            assert told in capsys.readouterr().out
        client.say("x" * 4001)
        assert re.search("longer than 4000.* x+…", capsys.readouterr().out)
        assert client.outbox == {}

    def test_what_hosts_do_is_told(self, capsys: pytest.CaptureFixture[str]) -> None:
        """Badges, answers, what was deleted, pinned and reacted to, who can write, and who is muted."""
        client = client_of(at_a_screen=True)
        message: Frame = {"type": "message", "name": "Bob", "text": "hi", "ts": 1}
        pinned = message | {"seq": 990, "text": "Pages 7 to 9"}
        note: Frame = {"type": "note", "to": 1001}
        open_mode: Frame = {"type": "mode", "talk": "everyone", "every": 0, "door": "open", "by": "Ann"}
        for frame, told in [
            (WELCOME | {"hosts": ["Ann"], "mode": open_mode | {"every": 9}, "pinned": pinned},
             "here: ★ Ann|Everybody can write. One message in 9 s.|Pinned: Bob: Pages 7 to 9"),
            (message | {"seq": 1001}, " Bob: hi"),
            (message | {"seq": 1002, "name": "Ann", "host": True, "re": 1001}, " ★ Ann (to Bob): hi"),
            (message | {"seq": 1003, "re": 7, "counts": {"✋": 3}}, " Bob: hi~|~ ✋ 3 · Bob: hi"),
            (message | {"seq": 1004, "deleted": True, "text": ""}, "~ A message of Bob was deleted."),
            (note | {"kind": "react", "counts": {"👍": 2, "😂": 1}}, "~ 👍 2 😂 1 · Bob: hi"),
            (note | {"kind": "pin", "by": "host", "message": message | {"seq": 1001}}, "~ Pinned: Bob: hi"),
            (note | {"kind": "pin", "by": "host", "message": None}, "~ No message is pinned any more."),
            (note | {"kind": "delete", "by": "host"}, "~ A message of Bob was deleted."),
            (open_mode | {"talk": "hosts"}, "~ Ann: Only hosts can write.~"),
            (open_mode | {"door": "closed"}, "~ Ann: Everybody can write. Nobody new gets in.~"),
            ({"type": "muted", "name": "Bob", "until": 1795166143321}, "~ Bob cannot write until "),
            ({"type": "muted", "name": "Bob", "until": 0}, "~ Bob can write again."),
            ({"type": "cleared", "seq": 1004, "by": "Ann"}, "~ Ann: All that was said before is deleted."),
            (message | {"seq": 1005, "re": 1002}, " Bob: hi"),
            (WELCOME | {"seq": 1007, "cleared": 1006}, "~ All that was said before is deleted."),
            (WELCOME | {"seq": 1007, "cleared": 1006}, ""),
            (note | {"kind": "delete"}, ""),
            (message | {"seq": 1, "counts": {"✋": 3}}, ""),
        ]:  # fmt: skip
            client.receive(json.dumps(frame))
            shown = re.sub(r"\x1b\[\?7[lh]", "", capsys.readouterr().out).replace("\n", "~")
            assert all(words in shown for words in told.split("|")), (frame, shown)
            assert (shown == "") == (told == "")
        client.receive(json.dumps({"type": "hosts", "names": ["Bob"]}))
        assert client.people(9) == "here: Ann"

    @slow
    async def test_a_host_at_a_terminal(self, memory_lan: Lan) -> None:
        """Tess keeps the room with her commands; Ann, at another terminal, sees and feels it, and loses no word."""
        daemon = await memory_lan.serve()
        bob = await memory_lan.join("Bob")
        ann = await Terminal.run(memory_lan, "--name", "Ann")
        await ann.prompts()
        tess = await Terminal.run(memory_lan, "--name", "Tess", "--host-key", daemon.host_key)
        await tess.shows("here: ★ Tess")
        await ann.shows("~ Tess joined")
        tess.keys("/help\r")
        await tess.shows("/mute NAME MINUTES")
        await bob.say("a bad joke")
        await tess.shows("Bob: a bad joke")
        tess.keys("/delete-last bob\r")
        for terminal in (ann, tess):
            await terminal.shows("~ A message of Bob was deleted.")
        for forbid, why, allow in [
            ("/lock", "Only hosts can write", "/open"),
            ("/mute Ann 5", "Ann cannot write until", "/mute Ann 0"),
            ("/slow 30", "Tess: Everybody can write. One message in 30 s.", "/slow 0"),
        ]:
            tess.keys(f"{forbid}\r")
            await ann.shows(why)
            if forbid == "/slow 30":
                ann.keys("once\r")
                await ann.shows("Ann: once")
            ann.keys(f"after {forbid}\r")
            await ann.shows(f"· after {forbid}")
            tess.keys(f"said in {forbid[1:]}\r")
            await ann.shows(f"★ Tess: said in {forbid[1:]}")
            assert f"Ann: after {forbid}" not in ann.text
            tess.keys(f"{allow}\r")
            await ann.shows(f"Ann: after {forbid}")
        tess.keys("/pin\r")
        await ann.shows("~ Pinned: Ann: after /slow 30")
        tess.keys("/unpin\r")
        await ann.shows("~ No message is pinned any more.")
        tess.keys("/door\r")
        await ann.shows("Nobody new gets in.")
        await fails(1, "--join", place(daemon), "--name", "Eve")
        tess.keys("/door\r")
        tess.keys("/clear yes\r")
        await ann.shows("~ Tess: All that was said before is deleted.")
        assert await run_to_end("--join", place(daemon)) == (0, "", "")
        tess.keys("/remove Ann\r")
        assert await ann.leaves() == 1
        assert "\ntornchat: A host has removed you from the room for a while.\n" in ann.text
        sentence = tornchat.WORDS["en"]["refused_removed-name"].format(name="Ann")
        assert sentence in await fails(1, "--join", place(daemon), "--name", "Ann")
        tess.keys("\x04")
        assert await tess.leaves() == 0

    @slow
    async def test_who_is_no_host(self, memory_lan: Lan) -> None:
        """A wrong key is told, and what only hosts can do; authors delete what they said; answers say to whom."""
        daemon = await memory_lan.serve()
        told = await fails(1, "--join", place(daemon), "--host-key", "guessed")
        assert told == "tornchat: The room does not take that --host-key.\n"
        ann, bob = await Terminal.run(memory_lan, "--name", "Ann"), await memory_lan.join("Bob")
        await ann.prompts()
        ann.keys("/lock\r")
        await ann.shows("~ Only a host")
        ann.keys("who is there?\r")
        await bob.expect("message", seq=1)
        await bob.send(json.dumps({"type": "say", "text": "I am", "re": 1}))
        await ann.shows("Bob (to Ann): I am")
        await bob.send(json.dumps({"type": "note", "to": 1, "kind": "react", "value": "✋"}))
        await ann.shows("~ ✋ 1 · Ann: who is there?")
        ann.keys("/delete-last\r")
        await ann.shows("~ A message of Ann was deleted.")
        late = await Terminal.run(memory_lan, "--name", "Late")
        await late.shows("~ A message of Ann was deleted.")
        await late.shows("Bob: I am")
        assert "who is there" not in late.text

    @pytest.mark.parametrize(
        ("typed", "frame"),
        [
            ("/delete-last bob", {"type": "note", "to": 2, "kind": "delete"}),
            ("/delete-last", {"type": "note", "to": 1, "kind": "delete"}),
            ("/pin bob", {"type": "note", "to": 2, "kind": "pin", "value": True}),
            ("/pin", {"type": "note", "to": 3, "kind": "pin", "value": True}),
            ("/mute Old Tom 5", {"type": "mute", "name": "Old Tom", "seconds": 300}),
            ("/remove Old Tom", {"type": "remove", "name": "Old Tom", "seconds": 600}),
            ("/clear", "/clear yes: deletes all that was said"),
            ("/mute bob", "/mute NAME MINUTES: "),
            ("/slow", "/slow SECONDS: "),
            ("/delete-last Eve", "/delete-last NAME: "),
        ],
    )
    async def test_what_hosts_ask_for(
        self, typed: str, frame: Frame | str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A command is the frame for it; one that is not complete is explained."""
        said = [("Ann", "one"), ("Bob", "two"), ("Old Tom", "three")]
        messages = [{"type": "message", "name": name, "text": text, "seq": seq, "ts": 1}
                    for seq, (name, text) in enumerate(said, 1)]  # fmt: skip
        client = client_of()
        for known in (WELCOME | {"hosts": ["Ann"], "seq": 3}, *messages):
            client.receive(json.dumps(known))
        asked: list[Any] = []
        monkeypatch.setattr(client, "send", asked.append)
        assert tornchat.obey(client, typed)
        assert [{name: value for name, value in act.items() if name != "cid"} for act in asked] == (
            [frame] if isinstance(frame, dict) else []
        )
        assert isinstance(frame, dict) or frame in capsys.readouterr().err
        assert tornchat.obey(client, "/help")
        assert typed.partition(" ")[0] in capsys.readouterr().err

    @slow
    @pytest.mark.parametrize("python", [(str(PROGRAM),), WITHOUT_PROMPT_TOOLKIT], ids=["prompt_toolkit", "plain"])
    async def test_leaving_before_it_is_sent(self, python: Sequence[str], memory_lan: Lan) -> None:
        """Who leaves before the room has confirmed everything waits a few seconds for it, and is told then."""
        async with StandIn(WELCOME) as room:
            ann = await Terminal.run(memory_lan, "--name", "Ann", at=room.url, python=python)
            await ann.shows("here: Ann")
            ann.keys("hi\r/quit\r")
            assert await ann.leaves() == 0
        assert "Messages that could not be sent: 1" in ann.text

    async def test_where_it_goes_on(self) -> None:
        """After a loss it asks for what came after the message it saw last, which it names by number and time."""
        message = {"type": "message", "name": "Bob", "text": "hi", "seq": 1001, "ts": 1795166143321}
        async with StandIn(WELCOME, message) as room:
            client = client_of(room.url)
            await client.log_in()
            staying = asyncio.create_task(client.keep_connected())
            await until(lambda: client.at == message["ts"])
            room.sockets[0].close(1001)
            await until(lambda: len(room.events) == 2)
            staying.cancel()
        assert room.events == [{}, {"after": "1001", "epoch": "e", "at": "1795166143321"}]

    async def test_a_loss_not_noticed_yet(self) -> None:
        """What is said into a connection that has just broken waits for the next one."""
        async with StandIn(WELCOME) as room:
            client = client_of(room.url)
            await client.connect()
            client.state, connection = "js_state_connected", client.socket and client.socket.protocol
            assert isinstance(connection, tornado.websocket.WebSocketProtocol13)
            connection._abort()
            client.say("hi")
            assert [*client.outbox.values()] == ["hi"]

    async def test_leaving_in_a_handshake(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Who leaves while a connection is being made logs out when it is there: it would bring the name back."""
        leave = asyncio.Event()
        monkeypatch.setattr(tornchat, "stop_on_signals", lambda: leave)
        async with StandIn(WELCOME) as room:
            room.free.clear()
            joined = asyncio.create_task(tornchat.join(tornchat.Config(join=room.url), {}))
            await asyncio.wait_for(room.busy.wait(), RETURN)
            leave.set()
            asyncio.get_running_loop().call_later(0.1, room.free.set)
            await asyncio.wait_for(joined, RETURN)
        assert room.events == [{}, "logout"]

    @slow
    async def test_colours(self, memory_lan: Lan) -> None:
        """A name has its colour, the same in every window; with NO_COLOR there is none."""
        bob = await memory_lan.join("Bob")
        await bob.say("hi")
        one, two = await Terminal.run(memory_lan), await Terminal.run(memory_lan)
        plain = await Terminal.run(memory_lan, NO_COLOR="1")
        for terminal in (one, two, plain):
            await terminal.shows("Bob: hi")
        lines = [terminal.screen.buffer.values() for terminal in (one, two, plain)]
        colors = [{cell.fg for line in each for cell in line.values()} - {"default"} for each in lines]
        assert len(colors[0]) == 1
        assert colors == [colors[0], colors[0], set()]

    @slow
    async def test_in_chinese(self, memory_lan: Lan) -> None:
        """The client speaks the language of its user, and so does the room to it."""
        ann = await Terminal.run(memory_lan, "--name", "Ann", LANG="zh_CN.UTF-8")
        await ann.shows("在场：Ann")
        where = place(memory_lan.daemons[0])
        assert "已被使用" in await fails(1, "--join", where, "--name", "Ann", LC_ALL="zh_CN.UTF-8")

    async def test_pipe(self, lan: Lan) -> None:
        """Each line of stdin is said, each message is a line of stdout; it ends when all is said and confirmed."""
        bob = await lan.join("Bob")
        await bob.say("old")
        await bob.expect("message")
        piped = await Joined.run(lan, "--name", "Ann")
        assert await piped.lines(1) == ["Bob: old"]
        piped.feed("one", "", "/who is a path", "\ttab", "x" * 4001, "last 你好")
        assert await piped.lines(4) == ["Ann: one", "Ann: /who is a path", "Ann:     tab", "Ann: last 你好"]
        await bob.say("two\nlines")
        assert await piped.lines(2) == ["Bob: two", "    lines"]
        piped.process.stdin.write(b"no newline at the end")
        piped.feed_no_more()
        code, out, err = await piped.ended()
        assert (code, out) == (0, "Ann: no newline at the end\n")
        assert len(err.splitlines()) == 1
        assert "longer than 4000" in err
        await bob.expect_texts("one", "/who is a path", "\ttab", "last 你好", "two\nlines", "no newline at the end")
        await bob.expect("left", names=["Ann"])

    async def test_only_the_history(self, memory_lan: Lan) -> None:
        """With nothing to say it prints the history and ends; --history tells how much of it."""
        daemon = await memory_lan.serve()
        bob = await memory_lan.join("Bob")
        await bob.say_many(5)
        everything = "".join(f"Bob: {n}\n" for n in range(1, 6))
        amounts = ((), ("--history", "2"), ("--history", "0"))
        heard = await asyncio.gather(*(run_to_end("--join", place(daemon), *amount) for amount in amounts))
        assert heard == [(0, everything, ""), (0, "Bob: 4\nBob: 5\n", ""), (0, "", "")]

    async def test_faster_than_allowed(self, memory_lan: Lan) -> None:
        """A pipe that is faster than the room allows waits: nothing is lost, nothing overtakes."""
        await memory_lan.serve(rate=20)
        piped = await Joined.run(memory_lan, "--name", "log")
        piped.feed(*range(120))
        piped.feed_no_more()
        assert await piped.ended() == (0, "".join(f"log: {n}\n" for n in range(120)), "")

    async def test_nobody_reads_any_more(self, memory_lan: Lan) -> None:
        """When the reader of the pipe has enough (`| head`, `| grep -m1`), the client ends without a word."""
        daemon = await memory_lan.serve()
        bob = await memory_lan.join("Bob")
        command = f"tail -f /dev/null | {sys.executable} {PROGRAM} --join {place(daemon)} --name Ann | head -n 2"
        pipes: dict[str, Any] = dict.fromkeys(("stdout", "stderr"), subprocess.PIPE)
        shell: Any = await asyncio.create_subprocess_exec("sh", "-c", command, start_new_session=True, **pipes)
        try:
            await bob.expect("joined", names=["Ann"])
            await bob.say_many(2)
            assert await asyncio.wait_for(shell.stdout.readline(), RETURN) == b"Bob: 1\n"
            assert await asyncio.wait_for(shell.stdout.readline(), RETURN) == b"Bob: 2\n"
            await bob.say_many(2, 3)
            await bob.expect("left", names=["Ann"])
        finally:
            os.killpg(shell.pid, signal.SIGKILL)
        assert await shell.communicate() == (b"", b"")

    async def test_a_full_disk(self, memory_lan: Lan) -> None:
        daemon = await memory_lan.serve()
        bob = await memory_lan.join("Bob")
        await bob.say("hi")
        if not (disk := Path("/dev/full")).exists():
            pytest.skip("this system has no /dev/full")
        with disk.open("w") as full:  # noqa: ASYNC230 - opened at once
            ann = await Joined.spawn([str(PROGRAM), "--join", place(daemon)], {}, stdout=full.fileno())
        memory_lan.programs.append(ann)
        assert await ann.ended() == (1, "", "tornchat: No space left on device\n")

    async def test_a_person_types_into_a_pipe(self, memory_lan: Lan) -> None:
        """With stdout in a pipe and stdin a terminal, what is typed is said, until Ctrl-D; commands are answered."""
        daemon = await memory_lan.serve()
        bob = await memory_lan.join("Bob")
        master, slave = pty.openpty()
        ann = await Joined.spawn([str(PROGRAM), "--join", place(daemon), "--name", "Ann"], {}, stdin=slave)
        memory_lan.programs.append(ann)
        os.write(master, b"hi\n")
        await bob.expect("message", name="Ann", text="hi")
        await bob.say("hello")
        assert await ann.lines(2) == ["Ann: hi", "Bob: hello"]
        os.write(master, b"/who\n\x04")
        code, out, err = await ann.ended()
        assert (code, out) == (0, "")
        assert err.count("here: Ann, Bob") == 2  # when she came, and when she asked
        os.close(master)
        os.close(slave)

    @slow
    async def test_G2_killed_under_it(self, redis_lan: Lan) -> None:
        """kill -9 of the daemon while a pipe says its lines: the client comes back, nothing is lost or doubled."""
        port = free_port()
        daemon = await redis_lan.run("-p", str(port), "--rate", "0")
        address = await daemon.address()
        piped = await Joined.run(redis_lan, "--name", "Ann", at=address)
        person = await Terminal.run(redis_lan, "--name", "Bob", at=address)
        await person.shows("here: Bob")
        for killed in range(2):
            first = 100 * killed
            piped.feed(*range(first, first + 100))
            assert await piped.lines(50) == [f"Ann: {n}" for n in range(first, first + 50)]
            await daemon.kill()
            person.keys(f"while it is away {killed}\r")
            await person.shows("Waiting for the connection")
            daemon = await redis_lan.run("-p", str(port), "--rate", "0")
            await daemon.address()
            others = sorted(await piped.lines(51))
            assert others == sorted([*(f"Ann: {n}" for n in range(first + 50, first + 100)),
                                     f"Bob: while it is away {killed}"])  # fmt: skip
            await person.shows(f"Bob: while it is away {killed}")
        piped.feed_no_more()
        assert (await piped.ended())[:2] == (0, "")
        said = [event.text for event in stored_messages(redis_lan.store)]
        assert [text for text in said if text.isdigit()] == [str(n) for n in range(200)]
        assert len(said) == 202
        person.keys("\x04")
        assert await person.leaves() == 0
        for n in range(200):
            assert person.text.count(f"Ann: {n}\n") == 1

    @slow
    async def test_G4_the_confirmation_is_lost(self, lan: Lan) -> None:
        """The connection breaks when a message is stored, unconfirmed: said again, it is stored once."""
        daemon = await lan.serve()
        async with Proxy(daemon.port) as line:
            ann = await Terminal.run(lan, "--name", "Ann", at=line.http)
            ann.keys("hi\r")
            await ann.shows("Ann: hi")
            line.talking.clear()
            ann.keys("once\r")
            await until(lambda: daemon.room.seq == 2)
            line.disappear()
            await ann.shows("Waiting for the connection · once")
            line.talking.set()
            line.gone = False
            await ann.shows("Ann: once")
            ann.keys("next\r")
            await ann.shows("Ann: next")
            assert [message.text for message, _ in daemon.room.ring.kept] == ["hi", "once", "next"]
            assert [row[6:] for row in ann.rows if "Ann: " in row] == ["Ann: hi", "Ann: once", "Ann: next"]
            ann.keys("\x03")
            assert await ann.leaves() == 0

    @slow
    async def test_the_name_was_taken_meanwhile(self, memory_lan: Lan) -> None:
        """Somebody else took the name while the room was away: the client says so and ends, the terminal as before."""
        daemon = await memory_lan.serve()
        async with Proxy(daemon.port) as line:
            ann = await Terminal.run(memory_lan, "--name", "Ann", at=line.http)
            ann.keys("hi\r")
            await ann.shows("Ann: hi")
            line.disappear()
            await ann.shows("Connection lost.")
            line.target = (await memory_lan.restart(port=0)).port
            await memory_lan.join("Ann")
            line.gone = False
            assert await ann.leaves() == 1
            assert re.search("^tornchat: .*“Ann”", ann.text, re.MULTILINE), ann.text

    @slow
    async def test_the_store_is_away(self, own_redis: RedisServer, own_lan: Lan) -> None:
        """While the store is away the client says so, and what is said waits until it is back."""
        daemon = await own_lan.serve()
        piped = await Joined.run(own_lan, "--name", "Bob")
        ann = await Terminal.run(own_lan, "--name", "Ann")
        await until(lambda: len(daemon.room.listeners) == 2)
        own_redis.kill()
        await ann.shows("cannot save messages right now")
        ann.keys("hi\r")
        await ann.shows("Waiting until it can be saved · hi")
        own_redis.start()
        assert await piped.lines(1) == ["Ann: hi"]
        await ann.shows("Ann: hi")
        piped.feed_no_more()
        assert "cannot save" in (await piped.ended())[2]

    async def test_ends_at_once(self, memory_lan: Lan, tmp_path: Path) -> None:
        """What makes a start impossible is told: unreachable, no room, wrong password, name taken."""
        secure = await memory_lan.serve(**dict(zip(("certfile", "keyfile"), certificate(tmp_path), strict=True)))
        daemon = await memory_lan.serve(password="lighthouse")
        ann = await memory_lan.login("Ann", "lighthouse")
        await ann.connect()
        async with StandIn() as other:
            for where, name, password, told in [
                (f"http://127.0.0.1:{free_port()}/", "", "", "cannot be reached"),
                ("http://no-such-host.invalid/", "", "", "cannot be reached"),
                (f"http://{'x' * 70}.example/", "", "", "cannot be reached"),
                (secure.url, "", "", "certificate"),
                (f"{other.url}deeper/", "", "", "no tornchat"),
                (daemon.url, "", "", "not the room’s password"),
                (daemon.url, "Ann", "lighthouse", '--name "Ann2"'),
                (daemon.url, "a:b", "lighthouse", "does not belong in a name"),
                (daemon.url.replace("127.0.0.1", "localhost.example.org"), "", "", "cannot be reached"),
            ]:
                with pytest.raises(tornchat.FatalError, match=told):
                    await tornchat.join(tornchat.Config(join=where, name=name, password=password), {})
        assert "not the room’s password" in await fails(1, "--join", place(daemon))
        assert (await run_to_end("--join", place(daemon), TORNCHAT_PASSWORD="lighthouse")) == (0, "", "")

    @pytest.mark.parametrize("code", [4403, 4409, 4429, 4504])
    async def test_closed_for_good(self, code: int) -> None:
        """A close code that says "do not come back" ends the client with its reason."""
        async with StandIn(WELCOME) as room:
            joined = asyncio.create_task(tornchat.join(tornchat.Config(join=room.url), {}))
            await until(lambda: room.sockets)
            room.sockets[0].close(code, "because")
            with pytest.raises(tornchat.FatalError):
                await asyncio.wait_for(joined, RETURN)


# === Every way in =====================================================================================================
# Programs that know nothing of tornchat, and those that do, in one room: all hear the same.


class Voice:
    """A program in the room: a line of its stdin is said, a message is a line of its stdout, as "Ann: hi"."""

    name = ""

    def __init__(self, lan: Lan) -> None:
        self.url = f"127.0.0.1:{lan.daemons[-1].port}"
        self.heard: list[str] = []

    def command(self) -> list[str]:
        raise NotImplementedError

    async def come(self) -> None:
        pipe = asyncio.subprocess.PIPE
        self.process: Any = await asyncio.create_subprocess_exec(*self.command(), stdin=pipe, stdout=pipe)
        self.reading = asyncio.create_task(self.read())

    async def read(self) -> None:
        async for line in self.process.stdout:  # wscat draws a prompt before each
            self.heard.append(re.sub(r"^(\x1b\[\w+|> |< |\r)+", "", line.decode()).rstrip())

    async def say(self, text: str) -> None:
        self.process.stdin.write(f"{text}\n".encode())

    async def go(self) -> None:
        self.process.stdin.close()
        self.process.kill()
        await self.process.wait()
        await self.reading

    async def lines(self) -> list[str]:
        """All messages that were heard."""
        return [line for line in self.heard if re.match(r"\w+: \d+$", line)]

    async def has(self, count: int) -> bool:
        return len(await self.lines()) >= count


class TerminalClient(Voice):
    name = "Terry"

    def command(self) -> list[str]:
        return [sys.executable, str(PROGRAM), "--join", self.url, "--name", self.name, "--history", "200"]


class Wscat(Voice):
    """npm's wscat, on plain lines."""

    name = "Wanda"

    def command(self) -> list[str]:
        wscat = NODE_MODULES / ".bin" / "wscat"
        if not wscat.exists():
            missing("wscat (npm)")
        return [str(wscat), "-s", "text", "-c", f"ws://{self.url}/chat?nickname={self.name}"]

    async def come(self) -> None:
        await super().come()
        await until(lambda: self.heard != [])


class Websockets(Voice):
    """The package `websockets`, on JSON."""

    name = "Sigrid"

    async def come(self) -> None:
        self.chat = await websockets.connect(f"ws://{self.url}/chat?nickname={self.name}")
        self.reading = asyncio.create_task(self.read())

    async def read(self) -> None:
        async for raw in self.chat:
            frame = json.loads(raw)
            if frame["type"] == "message":
                self.heard.append(f"{frame['name']}: {frame['text']}")

    async def say(self, text: str) -> None:
        await self.chat.send(json.dumps({"type": "say", "text": text}))

    async def go(self) -> None:
        await self.chat.close()
        await self.reading


class Curl(Voice):
    """curl: the three lines of the README, again and again."""

    name = "Carla"

    async def curl(self, path: str, *data: str) -> str:
        if not shutil.which("curl"):
            missing("curl")
        command = ["curl", "-s", *data, f"http://{self.url}{path}"]
        process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
        try:
            return (await process.communicate())[0].decode()
        finally:
            if process.returncode is None:
                process.kill()
                await process.communicate()

    async def come(self) -> None:
        self.folder = tempfile.TemporaryDirectory()
        self.jar = f"{self.folder.name}/jar"
        await self.curl("/login", "-c", self.jar, "-d", f"nickname={self.name}")
        self.reading = asyncio.create_task(self.read())

    async def read(self) -> None:
        place = "after=0"
        while True:
            answer = json.loads(await self.curl(f"/messages?{place}&wait=30", "-b", self.jar))
            assert "events" in answer, answer
            place = f"after={answer['seq']}&epoch={answer['epoch']}"
            self.heard += [f"{event['name']}: {event['text']}" for event in answer["events"] if "text" in event]

    async def say(self, text: str) -> None:
        answer = json.loads(await self.curl("/messages", "-b", self.jar, "--data-urlencode", f"text={text}"))
        assert answer["type"] == "message", answer

    async def go(self) -> None:
        self.reading.cancel()
        await asyncio.wait([self.reading])
        self.folder.cleanup()


class PageVoice(Voice):
    """The page, in a window of a real browser."""

    def __init__(self, lan: Lan, window: Window, name: str, query: str = "") -> None:
        super().__init__(lan)
        self.window, self.name, self.query = window, name, query

    async def come(self) -> None:
        await self.window.login(self.name)
        if self.query:
            await self.window.page.goto(self.window.url + self.query)
            await self.window.state("connected")

    async def say(self, text: str) -> None:
        await self.window.say(text)

    async def go(self) -> None:
        """The browser is closed with the windows."""

    async def lines(self) -> list[str]:
        rows = "[...document.querySelectorAll('#log .message')]"
        line = "`${row.dataset.name}: ${row.querySelector('.text').textContent}`"
        return list(await self.window.page.evaluate(f"{rows}.map((row) => {line})"))


class TestEveryWayIn(Transcripts):
    @slow
    async def test_one_conversation(self, lan: Lan) -> None:
        """Two hundred messages from six kinds of programs: each program shows all of them, in the same order."""
        await lan.serve(history=200)
        ann = await lan.join("Ann")
        async with windows(lan, "", "") as (first, second), contextlib.AsyncExitStack() as leaving:
            pages = PageVoice(lan, first, "Paula"), PageVoice(lan, second, "Quentin", "?transport=polling")
            voices = [*pages, TerminalClient(lan), Wscat(lan), Websockets(lan), Curl(lan)]
            for voice in voices:
                await voice.come()
                leaving.push_async_callback(voice.go)

            async def speak(voice: Voice, first: int) -> None:
                for number in range(first, 200, len(voices)):
                    await voice.say(str(number))

            await asyncio.gather(*(speak(voice, number) for number, voice in enumerate(voices)))
            said = [await ann.expect("message") for _ in range(200)]
            await ann.say("0")
            order = [f"{frame['name']}: {frame['text']}" for frame in said] + ["Ann: 0"]
            assert sorted(int(frame["text"]) for frame in said) == list(range(200))
            for voice in voices:
                await until(functools.partial(voice.has, len(order)))
                assert await voice.lines() == order, voice.name
        assert {frame["name"] for frame in said} == {voice.name for voice in voices}


# === Readme: what it gives to copy, as it stands there ================================================================


def readme_text() -> str:
    path = PROGRAM.with_name("README.md")
    if not path.exists():
        pytest.skip("there is no README.md beside tornchat.py")
    return path.read_text(encoding="utf-8")


def readme(beginning: str) -> str:
    """The code in the README that begins with these words, up to the next paragraph of it."""
    paragraphs = map(textwrap.dedent, re.findall(r"(?:^ {4}.*\n)+", readme_text(), re.MULTILINE))
    return next(paragraph for paragraph in paragraphs if paragraph.startswith(beginning))


@contextlib.asynccontextmanager
async def nginx(folder: Path, server: str, port: int) -> AsyncIterator[None]:
    """A real nginx with this block, which listens on that port."""
    program = shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin")
    if program is None:
        missing("nginx")
    kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    own = f"error_log stderr; pid {folder}/pid; daemon off; master_process off; events {{}}"
    temporary = "".join(f"{kind}_temp_path {folder}/{kind}; " for kind in kinds)
    (folder / "nginx.conf").write_text(f"{own}\nhttp {{ access_log off; {temporary}\n{server} }}\n")
    process = await asyncio.create_subprocess_exec(str(program), "-p", str(folder), "-c", str(folder / "nginx.conf"))
    try:
        await until(lambda: process.returncode is not None or listens(port))
        yield
    finally:
        process.terminate()
        await process.wait()


def console(page: WebPage) -> list[str]:
    """What a page prints, from now on."""
    lines: list[str] = []
    page.on("console", lambda message: lines.append(message.text))
    return lines


class TestReadme(Transcripts):
    async def test_proxy_and_service(self, memory_lan: Lan, tmp_path: Path) -> None:
        """The nginx block and the systemd unit, both as they stand there, fit each other."""
        unit = re.search(r"^ExecStart=\S+/python \S+/tornchat.py (.+)$", readme("[Unit]"), re.MULTILINE)
        assert unit is not None
        program = memory_lan.add(await Program.start(*unit[1].split(), "-p", "0"))
        upstream = urllib.parse.urlsplit(await program.address()).port
        port, (cert, key) = free_port(), certificate(tmp_path)
        server = readme("server {").replace("127.0.0.1:8888", f"127.0.0.1:{upstream}")
        server = server.replace("listen 443 ssl", f"listen 127.0.0.1:{port} ssl")
        server = server.replace("/etc/ssl/chat.pem", cert).replace("/etc/ssl/chat.key", key)
        async with nginx(tmp_path, server, port):
            ann = memory_lan.browser(f"https://127.0.0.1:{port}")
            ann.certificates = cert
            room: dict[str, Any] = {"Host": "chat.example.org", "Origin": "https://chat.example.org"}
            answer = await ann.fetch("/login", form={"nickname": "Ann"}, **room, X_Forwarded_Host="evil.example")
            assert (answer.code, answer.headers["Location"]) == (303, "./")
            assert "Secure" in answer.headers["Set-Cookie"]
            assert (await ann.fetch("/", Host="evil.example", X_Forwarded_Host="chat.example.org")).code == 421
            await ann.connect(headers=room)
            await ann.expect("welcome", name="Ann")
            await ann.quiet()

    @slow
    async def test_a_path_of_a_proxy(self, memory_lan: Lan, tmp_path: Path) -> None:
        """Under /chat/ of another site the page logs in, talks by its socket and by polling, and logs out."""
        daemon, port = await memory_lan.serve(trust_proxy=True), free_port()
        server = readme("server {").replace("listen 443 ssl", f"listen 127.0.0.1:{port}")
        server = re.sub("ssl_certificate.*", "", server).replace("location / {", "location /chat/ {")
        server = server.replace("http://127.0.0.1:8888", f"http://127.0.0.1:{daemon.port}/")
        url = f"http://127.0.0.1:{port}/chat/"
        async with nginx(tmp_path, server, port), windows(memory_lan, "Ann", "Bob", at=url) as (ann, bob):
            await bob.page.goto(f"{url}?transport=polling")
            await bob.state("connected")
            for speaker, hearer, text in ((ann, bob, "hello, Bob"), (bob, ann, "hello, Ann")):
                await speaker.say(text)
                await hearer.shows("#log", text)
            await ann.page.goto(url + "no/such/page")
            await ann.page.click("a")
            await ann.state("connected")
            await ann.page.evaluate("document.getElementById('logout').requestSubmit()")
            await ann.page.wait_for_url(url + "login")
            ann.problems = [problem for problem in ann.problems if "404" not in problem]

    @slow
    async def test_lesson_in_javascript(self, memory_lan: Lan) -> None:
        """Pupils paste it into the console of the login page: they hear each other, and who can't come in reads why."""
        ann = await memory_lan.join("Ann")
        async with windows(memory_lan, "", "", "") as pupils:
            printed = [console(pupil.page) for pupil in pupils]
            for pupil, name in zip(pupils, ("小 明", "Bob & co", "ann"), strict=True):
                await pupil.page.goto(pupil.url + "login")
                lesson = readme("const url = ")
                await pupil.page.evaluate(f"() => {{ window.prompt = () => '{name}'; {lesson}; window.chat = chat; }}")
                if name != "ann":
                    await ann.expect("joined", names=[name])
            await pupils[0].page.evaluate("chat.send('hi')")
            told = ["小 明: hi", "小 明: hi", "closed with 4409: “ann” is taken, or looks like a name that is."]
            await until(lambda: [lines[-1:] for lines in printed] == [[line] for line in told])

    async def test_lesson_in_python(self, memory_lan: Lan, tmp_path: Path) -> None:
        """Two pupils run it: they hear each other; a third one with the same name reads why not."""
        daemon = await memory_lan.serve()
        lesson = tmp_path / "lesson.py"
        lesson.write_text(readme("import urllib").replace("localhost:8888", f"127.0.0.1:{daemon.port}"), "utf-8")
        ann = await memory_lan.join("Ann")
        for name, told in [("小 明", "Ann: welcome"), ("bob & co", "Ann: welcome"), ("Ann", "“Ann” is taken")]:
            pupil = memory_lan.add(await Program.spawn(["-u", str(lesson)], {"PYTHONUTF8": "1"}, stdin=subprocess.PIPE))
            printed = pupil.process.stderr if name == "Ann" else pupil.process.stdout
            pupil.process.stdin.write(f"{name}\n".encode())
            if name != "Ann":
                await ann.expect("message", name=name, text="hello from Python")
                await ann.say("welcome")
                await ann.expect("message", text="welcome")
            async with asyncio.timeout(RETURN):
                while told not in (line := (await printed.readline()).decode()):
                    assert line


# === Benchmark ========================================================================================================
# `python test_tornchat.py bench`: tornchat beside a chat as the tutorials write it, in turn and under the same load.
# It prints, and never fails on time. The load is one thread on raw sockets, so that the chats are the limit. It needs
# Linux, where what a process has used stands in /proc.

TUTORIAL = """
import asyncio, sys, tornado.web, tornado.websocket
clients = set()
class Chat(tornado.websocket.WebSocketHandler):
    def open(self): clients.add(self)
    def on_close(self): clients.discard(self)
    def on_message(self, message):
        for client in clients:
            client.write_message(message)
async def main():
    tornado.web.Application([("/chat", Chat)]).listen(int(sys.argv[1]), "127.0.0.1")
    await asyncio.Event().wait()
asyncio.run(main())
"""


class Chat:
    """A chat in a process of its own, tornchat unless another is named, and what it uses."""

    def __init__(self, *options: str, command: Sequence[str] = (), redis_url: str = "") -> None:
        self.port = free_port()
        ours = (str(PROGRAM), "--host", "127.0.0.1", "--room", uuid.uuid4().hex, *options, "-p")
        full_command = [sys.executable, *(command or ours), str(self.port)]
        quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen(full_command, env=os.environ | {"REDIS_URL": redis_url}, **quiet)
        self.proc = Path(f"/proc/{self.process.pid}")

    def __enter__(self) -> Self:
        while not listens(self.port):
            assert self.process.poll() is None, "the chat has ended"
            time.sleep(0.05)
        return self

    def __exit__(self, *error: object) -> None:
        self.process.terminate()
        self.process.wait(10)

    def cpu(self) -> float:
        """The seconds of a core that it has used."""
        fields = (self.proc / "stat").read_text().rpartition(") ")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def memory(self) -> int:
        return int((self.proc / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class Load:
    """Some members of a chat on raw sockets, and when each message came to each of them."""

    def __init__(self, port: int, members: int, name: str = "member", query: str = "") -> None:
        self.selector = selectors.DefaultSelector()
        self.sockets = [self.join(port, f"nickname={name}{number}{query}") for number in range(members)]
        self.delays: list[float] = []  # of every delivery, in s
        self.tails = dict.fromkeys(self.sockets, b"")

    def join(self, port: int, query: str) -> socket.socket:
        sock = socket.create_connection(("127.0.0.1", port), 10)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.sendall(f"GET /chat?{query} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n{UPGRADE_LINES}\r\n".encode())
        assert b" 101 " in sock.recv(4096)
        sock.setblocking(False)
        self.selector.register(sock, selectors.EVENT_READ, sock)
        return sock

    def say(self, sock: socket.socket, size: int = 70) -> None:
        """A message that tells when it was sent, mostly of 100 bytes."""
        text = f"@{time.perf_counter():.6f}@".ljust(70, "x").ljust(size, "y")
        sock.sendall(masked(0x81, json.dumps({"type": "say", "text": text}).encode()))

    def hear(self, seconds: float) -> list[socket.socket]:
        """Take what has arrived, or wait so long for it; on which sockets."""
        ready: list[socket.socket] = [key.data for key, _ in self.selector.select(max(0, seconds))]
        for sock in ready:
            heard = sock.recv(1 << 18)
            assert heard, "the chat has closed a connection"
            *whole, rest = re.split(rb"x{20}", self.tails[sock] + heard)  # behind its moment each text has a row of x
            self.tails[sock] = rest[-100:]  # of the texts of others nothing is kept
            now = time.perf_counter()
            moments = [float(moment[1]) for piece in whole if (moment := re.search(rb"@([\d.]+)@", piece))]
            self.delays += [now - moment for moment in moments]
        return ready

    def settle(self) -> list[float]:
        """Take what is still on its way; return the delays so far, and forget them."""
        while self.hear(0.3):
            pass
        delays, self.delays = self.delays, []
        return delays

    def steady(self, rate: float, seconds: float, size: int = 70) -> list[float]:
        """So many messages a second, from one member after the other; return how long each took to each."""
        talkers = itertools.cycle(self.sockets)
        began = time.perf_counter()
        for number in range(int(rate * seconds)):
            while (wait := began + number / rate - time.perf_counter()) > 0:
                self.hear(wait)
            self.say(next(talkers), size)
        return self.settle()

    def flood(self, seconds: float) -> float:
        """Eight members speak again as soon as they hear something; return the deliveries a second."""
        talkers = set(self.sockets[:8])
        for sock in talkers:
            self.say(sock)
        until = time.perf_counter() + seconds
        while time.perf_counter() < until:
            for sock in talkers.intersection(self.hear(0.1)):
                self.say(sock)
        return len(self.delays) / seconds


def ms(delays: list[float], percent: int) -> float:
    """So many of a hundred delays, in s, are shorter than these ms."""
    return 1000 * statistics.quantiles(delays, n=100)[percent - 1]


def measure(command: Sequence[str], members: int) -> tuple[float, ...]:
    """One fresh chat under all loads: us of a core a delivery, ms p50 and p99, deliveries/s in a flood, KB a member."""
    with Chat("--rate", "0", "-q", command=command) as chat:
        Load(chat.port, 10, "early").settle()  # what is allocated once is allocated
        empty = chat.memory()
        load = Load(chat.port, members)
        load.settle()
        kilobytes = (chat.memory() - empty) / members / 1024
        spent = chat.cpu()
        delays = load.steady(20_000 / members, 4)
        spent = (chat.cpu() - spent) / len(delays) * 1e6
        return spent, ms(delays, 50), ms(delays, 99), load.flood(4), kilobytes


def bench(members: int = 200, rounds: int = 3) -> None:
    """Prints the medians of some rounds, the chats in turn."""
    chats: dict[str, Sequence[str]] = {"tornchat": (), "as in the tutorials": ("-c", TUTORIAL)}
    results: dict[str, list[tuple[float, ...]]] = {name: [] for name in chats}
    for _ in range(rounds):
        for name, command in chats.items():
            results[name].append(measure(command, members))
    print(f"{members} members, medians of {rounds} rounds; 20,000 deliveries/s, then a flood from 8 members")
    print(f"{'':20}  us of CPU/delivery  p50 ms  p99 ms  flood: deliveries/s  KB/member")
    for name, figures in results.items():
        cpu, p50, p99, flood, memory = map(statistics.median, zip(*figures, strict=True))
        print(f"{name:20}  {cpu:18.1f}  {p50:6.1f}  {p99:6.1f}  {flood:19,.0f}  {memory:9.1f}")


async def bench_transport(way: str, wait: float = 0, pause: float = 0, members: int = 20) -> None:
    """Prints what it costs to follow a chat in this way, in which somebody says something every three seconds."""
    lan, polls, delays = Lan(Store("")), itertools.count(), list[float]()

    async def follow(browser: Browser) -> None:
        while True:
            if browser.socket:
                events = [await browser.frame() or {}]
            else:
                next(polls)
                events = await browser.poll(wait)
            delays.extend(time.perf_counter() - float(event["text"]) for event in events if "text" in event)
            await asyncio.sleep(pause)

    with Chat("--rate", "0") as chat:
        talker, *people = [await lan.login(f"P{n}", at=f"http://127.0.0.1:{chat.port}") for n in range(members + 1)]
        for person in people:
            await (person.connect() if way == "WebSocket" else person.poll())
        spent, tasks = chat.cpu(), [asyncio.create_task(follow(person)) for person in people]
        for _ in range(20):
            await asyncio.sleep(3)
            await talker.post(f"{time.perf_counter():.6f}")
        await asyncio.sleep(2.5)
        spent = (chat.cpu() - spent) / len(delays) * 1e6
        for task in tasks:
            task.cancel()
    assert len(delays) == 20 * members, "a message is missing, or came twice"
    print(
        f"{way:20} 20 messages in a minute: {next(polls) / members:4.1f} polls a member; {spent:4.0f} us of CPU a"
        f" delivery, {1000 * statistics.mean(delays):6.1f} ms late, at the most {1000 * max(delays):4.0f}"
    )


async def bench_transports() -> None:
    """Each way in a room of its own, all at once."""
    logging.getLogger("tornado.application").disabled = True  # it tells of each request that is given up at the end
    polling = bench_transport("short polling, 2 s", 0, 2), bench_transport("long polling", 25)
    await asyncio.gather(*polling, bench_transport("WebSocket"))


async def write_messages(url: str, room: str, name: str, count: int) -> None:
    """One daemon without its web side, that writes as fast as the store takes it; prints when it began and ended."""
    config = tornchat.Config(redis_url=url, room=room, rate=0.0)
    store = tornchat.Store(tornchat.connect(config), config)
    feed = tornchat.Feed(store, tornchat.Outbox(tornchat.Room(config), config))
    await feed.open()
    feed.start()
    member = await feed.outbox.enter(name, name)
    began = time.time()
    for number in range(count):
        if len(feed.outbox.waiting) >= 500:
            await feed.outbox.empty.wait()
        feed.outbox.act(member, tornchat.Event("message", 0, 0, cid=f"c{number}", text="x" * 100), lambda outcome: None)
    await feed.outbox.empty.wait()
    print(began, time.time())
    await feed.stop()
    await feed.store.close()


def bench_store(url: str, daemons: int, count: int = 10_000) -> None:
    """Prints how many messages a second so many daemons store together, each `count` of them."""
    room = uuid.uuid4().hex
    commands = [[sys.executable, __file__, "write", url, room, f"writer{n}", str(count)] for n in range(daemons)]
    writers = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for command in commands]
    moments = [list(map(float, writer.communicate(timeout=120)[0].split())) for writer in writers]
    seconds = max(end for _, end in moments) - min(began for began, _ in moments)
    print(f"messages/s into {'Redis' if url else 'fakeredis'}, {daemons} daemon(s): {daemons * count / seconds:,.0f}")


@contextlib.contextmanager
def bench_redis() -> Iterator[str]:
    """The URL of a Redis for a benchmark; empty where there is none."""
    with tempfile.TemporaryDirectory() as folder:
        server = RedisServer(Path(folder)) if shutil.which("redis-server") else None
        yield server.url if server else ""
        if server:
            server.kill()


def bench_stalled(rate: float = 600, seconds: float = 15) -> None:
    """Prints what five members who stop reading cost the others."""
    with bench_redis() as url, Chat("--rate", "0", redis_url=url) as chat:
        load = Load(chat.port, 25)
        _, quiet = [load.steady(rate, seconds, 1000) for _ in range(2)]  # first, until ring, index and buffers are full
        before, stalled = chat.memory(), Load(chat.port, 5, "stalled")
        delays = load.steady(rate, seconds, 1000)
        print(
            f"{len(stalled.sockets)} of 30 stop reading, {rate * seconds:,.0f} messages of 1 KB: the others'"
            f" p99 {ms(delays, 99):.1f} ms, {ms(quiet, 99):.1f} before; +{(chat.memory() - before) / 1e6:.1f} MB"
        )


class Attack(NamedTuple):
    """What somebody does over and over again, on so many connections from one address under so many names."""

    send: Callable[[int], bytes]  # the n-th time
    sockets: bool = True  # else requests, each when the one before is answered
    connections: int = 10
    names: int = 1
    times: float = math.inf


def request(line: str, body: bytes = b"", size: int = 0, more: bytes = b"") -> bytes:
    """Of HTTP, with a place for a cookie; a body may be shorter than it says."""
    kind = f"Content-Type: application/x-www-form-urlencoded\r\nContent-Length: {size or len(body)}\r\n"
    head = f"{line} HTTP/1.1\r\nHost: localhost\r\nX-Forwarded-For: 192.0.2.66\r\nCookie: {{}}\r\n{kind}"
    return head.encode() + more + b"\r\n" + body


LONG_HEADER = b"Accept-Language: %b\r\n" % (b"a-b;q=1," * 1900)
LONG = json.dumps({"type": "say", "text": "\U0001f600" * 4000}, ensure_ascii=False).encode()
SIGN = '{"type":"note","to":1,"kind":"react","value":"👍"}'.encode()
FLOODS = {
    "messages": Attack(lambda n: masked(0x81, b'{"type":"say","text":"x"}') * 1000, connections=1),
    "nonsense": Attack(lambda n: masked(0x81, b"x") * 1000, connections=1),
    "pings": Attack(lambda n: masked(0x89) * 1000),
    "pongs": Attack(lambda n: masked(0x8A) * 1000),
    "fragments": Attack(lambda n: masked(0x01) * (n == 0) + masked(0x00) * 1000),
    "16 KB x 10 by 100 names": Attack(lambda n: masked(0x81, LONG) * 10, connections=100, names=100, times=1),
    "codes of made-up addresses": Attack(lambda n: request(f"GET /qr.svg?url=http://localhost/{n}"), sockets=False),
    "1,000 polls": Attack(lambda n: request("GET /messages?wait=25&after=0"), False, 1000, 100),
    "signs": Attack(lambda n: masked(0x81, SIGN) * 1000, connections=100, names=100),
    "pictures": Attack(lambda n: request("POST /pictures", CHUNKS), False, 100, 100),
    "leaving and coming": Attack(lambda n: request(("POST /logout", "GET /messages")[n % 2]), False, 1),
    "bodies that never end": Attack(lambda n: request("POST /login", b"x" * 48_000, 49_000), False, 500),
    "requests": Attack(lambda n: request("GET /"), False, 200),
    "long headers": Attack(lambda n: request("GET /login", more=LONG_HEADER), False, 50),
    "thousands of headers": Attack(lambda n: request("GET /login", more=b"a:\r\n" * 3800), False, 50),
    "handshakes": Attack(lambda n: masked(0x88), connections=50),
    "connections": Attack(lambda n: b"GET / HTTP/1.0\r\nHost: localhost\r\n\r\n", False, 50),
    "wrong passwords": Attack(lambda n: request("POST /login", b"nickname=x&password=y"), False, 50),
}


async def log_in(port: int, name: bytes, address: bytes = b"192.0.2.66") -> bytes:
    """Somebody of that address; the cookie."""
    form = request("POST /login", b"nickname=%b&password=open" % name).replace(b"192.0.2.66", address)
    return bytes(re.findall(rb"(?i)set-cookie: ([^;]+)", await exchange(port, form, b"\r\n\r\n"))[0])


async def attack(port: int, attack: Attack) -> None:
    """Does it until it is killed, or a minute is over; who is closed comes again."""

    async def flood(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heard = asyncio.create_task(reader.read())
        heard.add_done_callback(asyncio.Task.exception)  # asked for, so that nobody logs it
        for n in itertools.count():
            writer.write(attack.send(n))
            await writer.drain()
            await asyncio.wait([heard], timeout=0 if n + 1 < attack.times else 1e9)
            if heard.done():
                return

    async def ask(cookie: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for n in itertools.count():
            writer.write(attack.send(n).replace(b"{}", cookie, 1))
            head = await reader.readuntil(b"\r\n\r\n")
            size = re.search(rb"(?i)content-length: (\d+)", head)
            await reader.readexactly(int(size[1]) if size else 0)

    async def act(cookie: bytes) -> None:
        while True:
            with contextlib.suppress(OSError, EOFError):
                reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 20)
                if attack.sockets:
                    writer.write(request("GET /chat", more=UPGRADE_LINES.encode()).replace(b"{}", cookie))
                    assert b" 101 " in await reader.readuntil(b"\r\n\r\n")
                    await flood(reader, writer)
                else:
                    await ask(cookie, reader, writer)
            writer.transport.abort()

    cookies = [await log_in(port, b"eve%d" % number) for number in range(attack.names)]
    await asyncio.gather(*(act(cookies[number % attack.names]) for number in range(attack.connections)))


def bench_attack(what: str, seconds: float = 4) -> None:
    """Prints what twenty members and a newcomer notice of an attack from another address."""
    with Chat("--trust-proxy", "--password", "open") as chat:
        load = Load(chat.port, 20, query="&password=open")
        load.settle()
        calm, before = load.steady(20, seconds), chat.memory()
        # It has a machine of its own: here it may take what the members leave of the second core.
        attacker = subprocess.Popen(["nice", "-n", "19", sys.executable, __file__, "attack", str(chat.port), what])
        try:
            time.sleep(1)
            spent = chat.cpu()
            delays = load.steady(20, seconds)
            spent, began = chat.cpu() - spent, time.perf_counter()
            asyncio.run(log_in(chat.port, b"newcomer", b"192.0.2.7"))
            newcomer = 1000 * (time.perf_counter() - began)
        finally:
            attacker.kill()
        print(
            f"{what:28} p50 {ms(delays, 50):6.1f} ms ({ms(calm, 50):.1f} before), p99 {ms(delays, 99):6.1f}; login"
            f" {newcomer:6.0f} ms; {100 * spent / seconds:3.0f} % CPU; +{(chat.memory() - before) / 1e6:.1f} MB"
        )


BURST = """() => new Promise((done) => {
    const began = performance.now();
    for (let seq = 1; seq <= 1000; seq += 1) {
        receive({type: 'message', seq, ts: Date.now(), name: `Bob ${seq % 7}`, text: `message ${seq}`, cid: ''});
    }
    const drawn = () => toDraw.length ? requestAnimationFrame(drawn) : done(performance.now() - began);
    requestAnimationFrame(drawn);
})"""


async def bench_page(rounds: int = 5) -> None:
    """Prints medians of what a browser needs: from the login to a usable chat, and to show 1,000 messages."""
    lan, usable, shown = Lan(Store("")), [], []
    address = await (await lan.run("-p", "0", "--rate", "0")).address()
    async with windows(lan, *[""] * rounds, at=address) as people:
        for number, person in enumerate(people):
            await person.page.goto(address)
            await person.page.fill("#nickname", f"Ann {number}")
            began = time.perf_counter()
            await person.page.press("#nickname", "Enter")
            await person.state("connected")
            usable.append(1000 * (time.perf_counter() - began))
            shown.append(await person.page.evaluate(BURST))
            await person.page.context.close()
    await lan.close()
    print(f"page, medians of {rounds}: {statistics.median(usable):.0f} ms from the login to a usable chat;", end=" ")
    print(f"{statistics.median(shown):.0f} ms to show 1,000 messages that come at once, a slice of a frame at a time")


PHONE = """window.tasks = []; window.keys = [];
new PerformanceObserver((list) => tasks.push(...list.getEntries())).observe({type: 'longtask'});
addEventListener('keydown', ({timeStamp}) => {
    requestAnimationFrame(() => setTimeout(() => keys.push(performance.now() - timeStamp)));
});"""


async def bench_phone(seconds: int = 20, rate: int = 20) -> None:
    """Prints how busy a phone with a sixth of this CPU is with messages, and when its keys are answered."""
    lan = Lan(Store(""))
    address = await (await lan.run("-p", "0", "--rate", "0")).address()
    async with windows(lan, "", at=address, viewport={"width": 390, "height": 844}, device_scale_factor=3) as (ann,):
        await ann.page.add_init_script(PHONE)
        await ann.login("Ann")
        bob = await lan.join("Bob", at=address.rstrip("/"))
        devtools = await ann.page.context.new_cdp_session(ann.page)
        await devtools.send("Emulation.setCPUThrottlingRate", {"rate": 6})
        for number in range(seconds * rate):
            await bob.say(f"message {number} of a class that is wide awake: see https://example.org/{number}")
            if number % 5 == 0:
                await devtools.send("Input.dispatchKeyEvent", {"type": "keyDown", "key": "a", "text": "a"})
            await asyncio.sleep(1 / rate)
        tasks, keys = await ann.page.evaluate("[tasks.map(({duration}) => duration), keys]")
    await lan.close()
    print(
        f"phone: {len(tasks)} tasks of more than 50 ms in {seconds} s, the longest {max(tasks, default=0):.0f} ms;",
        end=" ",
    )
    print(f"keys answered after {statistics.median(keys):.0f} ms (median)")


PAGE_BENCHES: dict[str, Callable[[], Coroutine[Any, Any, None]]] = {
    "page": bench_page,
    "phone": bench_phone,
    "transports": bench_transports,
}


def main(*arguments: str) -> int:
    """The tests, or what else this file can do."""
    match arguments:
        case ["bench"]:
            bench()
            bench_store("", 1)
            with bench_redis() as url:
                for daemons in (1, 4):
                    bench_store(url, daemons)
            asyncio.run(bench_page())
        case ["bench", "page" | "phone" | "transports" as what]:
            asyncio.run(PAGE_BENCHES[what]())
        case ["bench", "floods", *kinds]:
            if not kinds:
                bench_stalled()
            for kind in kinds or FLOODS:
                bench_attack(kind)
        case ["attack", port, what]:
            with contextlib.suppress(TimeoutError):
                asyncio.run(asyncio.wait_for(attack(int(port), FLOODS[what]), 60))
        case ["write", url, room, name, count]:
            asyncio.run(write_messages(url, room, name, int(count)))
        case _:
            return pytest.main([__file__, "-W", "ignore::pytest.PytestAssertRewriteWarning", *arguments])
    return 0


if __name__ == "__main__":
    raise SystemExit(main(*sys.argv[1:]))
