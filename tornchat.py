#!/usr/bin/env python3
# /// script
# requires-python = ">=3.11"
# dependencies = ["tornado>=6.6.1", "redis>=8.0.1", "fakeredis>=2.40"]
# ///
"""tornchat: a chat room in one file.

  python tornchat.py            serve the room on port 8888 and print its addresses
  python tornchat.py -p 9000    on another port
  python tornchat.py --join URL talk in a room from the terminal; in a pipe: say its lines, print messages
                                (python -m pip install prompt_toolkit: edit what you type; NO_COLOR is heeded);
                                /help lists its commands; --host-key KEY: as a host

Everybody on the same network opens a printed address, types a nickname and talks. The last 100 messages wait
for whoever comes later. Without a Redis they live as long as this process; with one (--redis-url or REDIS_URL)
they outlive a restart, and all daemons with the same Redis and --room are one room. "Invite" on the page shows an
address for others, with a QR code where the package segno is installed; /?view=projector is a view for the wall, and
/?transport=polling goes without a WebSocket.

A flag beats its environment variable; an empty variable counts as unset, but the password's is refused. Exit codes:
0 stopped on request, 1 could not start, join or stay (the name is taken, a host has removed you), 2 wrong usage.

The socket (GET /chat) speaks JSON, one event a frame. A client says
  {"type":"say","text":"hi","cid":"made-by-the-client"}
and hears welcome, message, joined, left, note, cleared, muted, mode, hosts, refused, store and time. The `message`
that carries its own cid is the confirmation that the store has it. After a drop it comes back with
?after=SEQ&epoch=EPOCH&at=TS (seq and ts of the last message seen, epoch of the last welcome) and gets what it missed,
or a welcome with "reset":true if this is not the history that it knows; the same cid sent again is stored once. Log in
first with POST /login (nickname=Ann), or open /chat?nickname=Ann. With the subprotocol `text` all of it is plain lines,
for wscat and the like.

Whoever opens /host?key=KEY is a host: its messages carry "host":true, `hosts` has its name. The key is --host-key, or
made up; the banner shows the link to a terminal only, never to a pipe or a log, and no page has it.
The socket takes acts too, and so does POST /acts, which answers 201 with what all are told, or what is refused:
  {"type":"note","to":12,"kind":"delete"}   authors their own, hosts all; the message stays as "text":"","deleted":true
  {"type":"note","to":12,"kind":"react","value":"👍"}   everybody; of welcome's `signs`, "" takes it back; counts follow
                                       (and in "hands" the names of those who raise one, ✋, in the order they came)
  {"type":"note","to":12,"kind":"pin","value":true}   hosts, as all that follows: {"type":"clear"},
  {"type":"mute","name":"Bob","seconds":300} and "remove", {"type":"mode","talk":"hosts","every":30,"door":"closed"}
  (every: slow mode, so many seconds between two messages of one person)
A say may have "re":12, the message that it answers: all get its author as "answered". GET /transcript?format=txt|json
is all that was said, as a file.

Without a socket, GET /messages?after=SEQ&epoch=EPOCH&at=TS&wait=25 answers {"events":[...],"seq":N,"epoch":E,"last":L}
as soon as there are events after SEQ, or when 25 s are over; what is more than 64 KB comes with the next requests.
Give back `last` too, and no joined or left is missed between two of them. POST /messages (text=hi, cid=...) answers
with the stored message, or with what is refused. GET /healthz says how the daemon is.

A picture is sent first: POST /pictures (its bytes: PNG, JPEG, WebP or GIF, at most 1 MB and 40 megapixels) answers
{"id":ID,"width":W,"height":H}, and "picture":ID in a say (or picture=ID) shows it; members load /pictures/ID. The room
keeps the newest 32 MB of them (--pictures MB). In plain lines a picture is [picture /pictures/ID].

Words of the source:
  session       a browser or program that has logged in: a sid and a name, signed in its cookie
  member        a session under its name in the room; each of its connections, and each poll that waits, is a listener
  roster        the names that all see; a lease says till when one stays if its daemon dies, the grace how long after
                its last connection has ended
  feed          the stream in the store, which is the truth; each commit to it is one entry, of one or many events
  event         a message, which has the next seq, or a notice (all others); by its cid a second try is recognized
  epoch         the name of a history: where nothing is left of one, the next begins with seq 1
  act           what a client asks for: to say something, a note (on a message: delete, pin, react), clear, mute, ...
  state         what the acts have made of the room; a mark is by what a muted or removed person is known
  outbox        proposals wait there to be committed; wishes are those that other daemons are asked to commit
  ring          the newest messages as they are sent; a batch is what goes to all listeners at once
  backlog       what waits for a listener that is slow
  resume point  what a client has seen last: after, epoch and at; a cursor is the same for the notices of a poller

The file, top to bottom; a section uses only what stands above it, but for the pages, which come last. Parts of one
begin with "# ---", those of the page's script with "// ===":
  Limits and settings (constants, Config), Messages and names (what may be said, what looks alike, events on the
  wire), Acts (what clients ask for, and what it changes), Store (Redis), Room (roster, ring, who hears what),
  Outbox (what may be stored, and in which order), Memory (what is known of the feed), Feed (commits, reads, repairs),
  Presence (leases, who has left), Limits by address (paces, visitors), Web (checks of a request, cookie, language,
  pages, QR code), Login (password, name, session), Sockets (GET /chat), Polling (GET and POST /messages), Pictures
  (taken, measured, shown), Addresses and banner (what is printed at the start), Application (routes, Daemon, workers,
  signals), Terminal client (--join), Terminal views (how that looks), Command line (options, log), Pages (words in each
  language, HTML, style, script)
"""

from __future__ import annotations

import os
import signal
import sys

if sys.version_info < (3, 11):  # noqa: UP036 - whoever has an older one shall be told
    sys.exit("tornchat needs Python 3.11 or newer, and this is " + sys.version.split()[0])
if __name__ == "__main__":  # until the room is open there is nothing to stop in order: Ctrl+C ends even these imports
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: os._exit(0))

import argparse
import asyncio
import collections
import concurrent.futures
import contextlib
import dataclasses
import datetime
import email.utils
import errno
import functools
import gzip
import hashlib
import hmac
import importlib.metadata
import io
import ipaddress
import itertools
import json
import logging
import math
import random
import re
import secrets
import socket
import ssl
import string
import struct
import threading
import time
import types
import unicodedata
import urllib.parse
import weakref
import zlib
import zoneinfo
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Concatenate, NamedTuple, NoReturn, ParamSpec, Protocol, Self, TextIO, TypeVar

try:
    import resource
except ModuleNotFoundError:
    resource = None  # type: ignore[assignment]  # Windows has no limit of files

# An older Tornado ignores `cross_origin_protection` without a word. An older redis may, where a transaction is
# cancelled, hand on its connection with a reply that nobody has read. An older fakeredis is too old for these.
REQUIREMENTS = ("tornado>=6.6.1", "redis>=8.0.1", "fakeredis>=2.40")


def version_numbers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)[:3]]


try:
    installed = {name: importlib.metadata.version(name.partition(">=")[0]) for name in REQUIREMENTS}
    unmet = [name for name in REQUIREMENTS if version_numbers(installed[name]) < version_numbers(name)]
    if unmet:
        raise ImportError(", ".join(unmet))
    import fakeredis
    import redis.asyncio
    import tornado.httpclient
    import tornado.httpserver
    import tornado.httputil
    import tornado.ioloop
    import tornado.iostream
    import tornado.locale
    import tornado.netutil
    import tornado.template
    import tornado.web
    import tornado.websocket
    from redis.asyncio.retry import Retry
    from redis.backoff import NoBackoff
    from redis.exceptions import RedisError, ResponseError, WatchError
except ImportError as missing:
    packages = " ".join(f'"{requirement}"' for requirement in REQUIREMENTS)
    sys.exit(f"tornchat lacks what it needs ({missing}): python -m pip install {packages}")

__version__ = "1.0.0"

log = logging.getLogger("tornchat")  # what becomes of the room: each line counts
web_log = logging.getLogger("tornchat.web")  # what visitors can cause: one line of a kind a second

# === Limits and settings ==============================================================================================
# A limit is a constant, with its unit and its reason. What an operator may choose is a field of Config and a flag;
# a timer is a field without a flag, so that tests can run it faster.

TEXT_CHARS = 4000  # of one message: a long paragraph, or a page of code
FRAME_BYTES = 48 * 1024  # of one frame or body from a client: 4,000 characters that JSON or a form escapes to 12 bytes
HEADER_BYTES = 16 * 1024  # of one request, with the cookies of others
NAME_CHARS = 24  # that are seen: marks, joiners and variation selectors come on top, up to
NAME_CODEPOINTS = 64
RAW_NAME_CODEPOINTS = 256  # looked at, before they are normalized
PILED_MARKS = 6  # accents and vowels on one letter; the fullest Tibetan and Thai syllables have five
RING_MESSAGES = 1000  # in memory, for clients that come back (G2), and to put back what the store forgets
RING_BYTES = 16 * 1024 * 1024  # 1,000 of the longest messages, as they are stored
FEED_MESSAGES = 10_000  # in the store; ten times the ring, because a burst must not outrun a reader
FEED_BYTES = 32 * 1024 * 1024  # in the store
FEED_NOTICES = 1000  # entries without a message (joined, left, acts): they must never push a message out
FEED_SLACK = 0.05  # by so much may the feed outgrow its limits: it is trimmed now and then, not with every message
INDEX_EVENTS = 10_000  # (sid, cid) remembered against doubles (G4)
OUTBOX_PROPOSALS = 1000  # waiting for the store; more are refused at once
GROUP_EVENTS = 256  # proposals committed in one entry ...
ENTRY_CHARS = 64 * 1024  # ... or as many as have so much text: an entry of 256 KB comes in time over a slow line
GATHER_TURNS = 3  # of the loop, for more to come while many talk: about 0.1 ms
READ_ENTRIES = 256  # at a time
PAGE_BYTES = 128 * 1024  # of the feed, read at a time: 0.3 s over 4 Mbit/s
WISHES = 1000  # entries of the stream in which daemons help each other
YOUNG_SECONDS = 3  # a Redis that has been up for less may not have seen all daemons back
BACKLOG_BYTES = 256 * 1024  # waiting for one slow listener ...
BACKLOG_EVENTS = 512  # ... or this many: it is closed with 4008, to come back when it can, once it has lagged for
LAG_SECONDS = 0.5  # (who reads takes the largest batch within that), or at once with
BACKLOG_MOST_BYTES = 768 * 1024  # so that it costs less than 1 MB (G5)
SEND_BUFFER_BYTES = 64 * 1024  # of the kernel, which would hold 3 MB for a client that doesn't read
CHUNK_BYTES = 64 * 1024  # handed to a slow stream at a time: about what a socket's buffer takes
ROSTER_NAMES = 1000  # listed in one welcome; `count` tells the truth
GUESSES_AT_ONCE = 5  # wrong passwords from one address that wait for their refusal; more are refused at once
SOCKETS_A_SESSION = 10  # tabs of one browser, and polls that wait
POLL_BYTES = 64 * 1024  # in one answer, which the kernel takes at once; the next one goes on from there
POLL_SECONDS = 25  # a poll waits, at the most: below SILENCE_MS of the page, and poller_seconds
NAMES_KEPT = 20  # of one address, for people who have left
PACES = 10_000  # sessions, and addresses, whose pace is remembered
LOGINS_AT_ONCE = 200  # from one address, which may be that of a whole school; then
LOGINS_A_SECOND = 2
REJOINS_AT_ONCE = 10  # of one session whose name had left the list; a phone that sleeps needs one a minute; then
REJOINS_A_SECOND = 0.2
CROWD = 200  # people behind one address who may all write at the pace of one (--rate); at once as many messages as
MESSAGE_BYTES = 250  # so long ones: all of them together don't close a reader (BACKLOG_BYTES)
REQUESTS_AT_ONCE = 1000  # from one address: 400 tabs that come back; what comes above that waits for its turn at
TURN_SECONDS = 0.003  # from one of them to the next: the others' messages come in between
TRANSCRIPT_COST = 100  # requests: 10,000 messages take a daemon some 0.3 s
REQUESTS_A_SECOND = 200  # which takes a fifth of a core; 200 people who open two tabs within a minute make 60
HEADERS_A_REQUEST = 100  # one with 3,000, which takes 8 ms to read, counts as thirty requests
POLLS_AN_ADDRESS = 400  # that wait: 200 people with two tabs
VISITORS_AN_ADDRESS = 200  # connections on which nobody has joined
IGNORED_REFUSALS = 50  # in a row, before a client that doesn't listen is closed
FRAMES_A_TURN = 8  # of one client and turn of the loop: about 0.5 ms
FRAMES_A_TICK = 500  # pings, pongs, fragments and refused messages, each KB counted as one, before a client is closed
DRAWINGS_AT_ONCE = 10  # QR codes of addresses that lead here without being announced, 50 ms each; then
DRAWINGS_A_SECOND = 0.1
URL_CHARS = 300  # of an address of the room: the longest host name and a path
LANGUAGES_CHARS = 300  # looked at, of the languages that a browser likes: some twenty
PICTURE_BYTES = 1024 * 1024  # of one picture; pages draw theirs smaller
PICTURE_PIXELS = 40_000_000  # what a large camera takes: 160 MB in the browser of whoever sees it
PICTURE_SIDE = 16_383  # the longest of WebP
PICTURE_PARTS = 10_000  # blocks, chunks or segments of one file; the most have GIFs, 4,100 in 1 MB
PICTURE_LEAST_BYTES = 16 * 1024  # that a smaller one counts as, so that there are at most some 2,000 in 32 MB
PICTURE_COST = 9  # messages, for sending a picture; the message that shows it is the tenth
PICTURE_DAYS = 365  # a browser keeps a picture, which never changes
UPLOADS_AT_ONCE = 32  # pictures on their way in, each of another browser, which are in memory till they are complete
UPLOAD_SECONDS = 5  # from then on one gives way, where there are more: 1 MB over 2 Mbit/s
TRANSFERS_AT_ONCE = 8  # pictures, or pieces of them, on their way from and to the store, which has 100 connections
COOKIE_DAYS = 30  # a browser keeps its session, and a host the name
COOKIE_CHARS = 700  # of a signed session with the longest name
COOKIES_READ = 10  # of those that have the name of the session's, 15 us each
ACT_SECONDS = 30 * 86400  # the longest that somebody can be muted or kept out
MOST_MESSAGES = 10**15  # of a room: a seq above that is none
EVERY_SECONDS = 3600  # the slowest pace that a host can set
REACT_SECONDS = 1  # between two entries with reactions: a class that votes costs two of them, not two hundred
HOST_LOGOUTS = 1000  # remembered, the newest: a copied cookie of such a session makes nobody a host again
NOTED_MESSAGES = 2 * FEED_MESSAGES  # that older ones are deleted is forgotten: the feed doesn't hold them any more
BROWSER_CHARS = 16  # of a sid, that tell the browser: they stay when it logs out; the rest is new with each login
DEFAULT_PORT = 8888
PORTS_TRIED = 20  # upwards from the default one
BANNER_URLS = 5  # for others on the network; it must fit on a screen, and the likeliest stand first
FILES = 65536  # open at once, if the system allows: nearly as many people
SPARE_FILES = 32  # of those allowed, never given to visitors: the store may have to be connected anew
CROWD_SECONDS = 0.001  # from one newcomer to the next, while each costs a quiet visitor its connection
ACCEPTS_A_TURN = 4  # of the loop, so that those inside needn't wait for a crowd at the door
SELECT_SOCKETS = 512  # on Windows: Tornado's thread that selects ends for good beyond that
FULL_SECONDS = 1  # between two looks whether a full daemon has room again
FULL_LOG_SECONDS = 60  # between two lines that say it is full
WORKER_PAUSE_SECONDS = 1  # between two starts of a worker that dies young
WORKER_END_SECONDS = 5  # for a worker to stop in order; it needs less than 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """What an operator can choose, and the timers (all in seconds)."""

    port: int | None = None  # None: 8888, or the next free one
    host: str = ""  # "": all addresses
    title: str = "tornchat"
    password: str = ""
    redis_url: str = ""  # "": fakeredis in this process
    room: str = "lobby"
    history: int = 100
    rate: float = 2.0
    pictures: int = 32  # MB of them in the store; 0: none
    allow_host: Sequence[str] = ()
    trust_proxy: bool = False
    certfile: str = ""
    keyfile: str = ""
    secret: str = ""
    host_key: str = ""  # "": the room makes one up
    transcript: str = "host"  # who may have it: "host", "everyone" or "off"
    workers: int = 1
    inherited: tuple[int, ...] = ()  # descriptors that a worker listens on
    join: str | None = None  # the address of a room to talk in; None: serve one
    name: str = ""  # under which to talk there; "": a guest's
    wait: float = 30  # seconds at the start for a Redis that doesn't answer yet
    quiet: bool = False
    verbose: int = 0

    ping_seconds: float = 10  # a listener not heard of for two of these is dead: 20 s, then the grace (G6: 35 s)
    time_seconds: float = 20  # between two `time` events; SILENCE_MS and STALE_MS of the page count on it
    lease_seconds: float = 30  # how long a name outlives its daemon (G6: 35 s)
    renew_seconds: float = 5  # below the grace: a tab closed here must not shorten the lease of one open elsewhere
    grace_seconds: float = 7  # from the last closed tab to `left` (G6: 10 s); a reload takes less
    poller_seconds: float = 32  # from a poller's last request to `left` (G6: 35 s, as for a mute socket)
    tick_seconds: float = 1  # the beat of leases, pings and sweeping
    confirm_seconds: float = 4  # until an unconfirmed message is refused, at the next tick (G1: 5 s)
    block_seconds: float = 1  # the reader's wait for news; must stay below the silence
    store_seconds: float = 4  # until a call of the store has failed (G8: 6 s)
    retry_seconds: float = 1  # the longest pause between two tries to reach Redis (G8: back within 2 s)
    repair_seconds: float = 1.5  # for other daemons to put back what the store forgot: they look once a tick
    name_seconds: float = 600  # a name stays with its session after it left the roster (G7)
    drain_seconds: float = 2  # for stopping in order
    guess_seconds: float = 1  # until a wrong password is refused
    goodbye_seconds: float = 2  # for a client to take our close code and answer it
    header_seconds: float = 15  # for a request to come, up to its body: from the last answer, or from the start
    body_seconds: float = 10  # for its body
    picture_seconds: float = 30  # for one that is a picture
    answer_seconds: float = 30  # for the client to take the answer, or 64 KB of a long one


# === Messages and names ===============================================================================================
# Pure functions: what a client may say, what it may be called, and how an event looks on the wire.
# No input or output here, no clock, no Tornado.

CID = re.compile(r"[A-Za-z0-9_-]{1,64}")
PICTURE = re.compile(r"[0-9a-f]{16}-([0-9]{1,5})x([0-9]{1,5})-[0-9a-f]{16}")
CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # all but tab and newline
# What could steer a terminal, or deceive its reader: controls but newline, and the marks of bidirectional text.
STEERING = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")
to_json = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


class Refused(Exception):  # noqa: N818 - it is an answer, not an error
    """What was asked is not done; programs get the code, people the sentence that `word` is the key of."""

    def __init__(self, code: str, word: str = "", *, cid: str = "", retry_after: float = 0, **values: object) -> None:
        super().__init__(code)
        self.code, self.word, self.cid, self.retry_after, self.values = code, word or code, cid, retry_after, values

    def sentence(self, language: str) -> str:
        return WORDS[language]["refused_" + self.word].format(**self.values)

    def event(self, language: str) -> dict[str, object]:
        cid = self.cid.rpartition(":")[2]  # as the client wrote it, see parse_act
        event = {"type": "refused", "code": self.code, "text": self.sentence(language), "cid": cid}
        more = {"retry_after": math.ceil(self.retry_after * 10) / 10}
        return {name: value for name, value in (event | more).items() if value}


class Taken(Refused):
    def __init__(self, name: str) -> None:
        super().__init__("taken", name=name)


def picture_fields(id: str) -> dict[str, object]:
    """A picture as clients are told of it: its id, which tells its size."""
    width, height = id.split("-")[1].split("x")
    return {"id": id, "width": int(width), "height": int(height)}


def check_characters(text: str) -> None:
    """Raises Refused for half a character, which JSON may spell, and which can't be sent."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise Refused("bad-frame", "surrogate") from None


def clean_text(text: str, *, may_be_empty: bool = False) -> str:
    """The text as it is stored: newlines as \\n, no control characters. Raises Refused."""
    text = CONTROLS.sub("", text.replace("\r\n", "\n").replace("\r", "\n")).strip("\n").rstrip()
    if len(text) > TEXT_CHARS:
        raise Refused("too-long", limit=TEXT_CHARS)
    check_characters(text)
    if all(unicodedata.category(char) in UNSEEN or char in BLANKS for char in text):
        if may_be_empty:
            return ""
        raise Refused("empty")
    return text


# Letters that show nothing: Hangul fillers, Khmer inherent vowels, the grapheme joiner, Mongolian separators, Braille,
# the object replacement, the Khitan filler, the null notehead.
BLANKS = frozenset("\u034f\u115f\u1160\u17b4\u17b5\u180b\u180c\u180d\u180f\u2800\u3164\uffa0\ufffc\U00016fe4\U0001d159")
UNSEEN = ("Cc", "Cf", "Zs", "Zl", "Zp")  # not Cn: what this Python doesn't know may be next year's emoji
JOINERS = "\u200c\u200d"
VIRAMA = 9  # canonical combining class of the sign after which Indic scripts write joiners (RFC 5892, appendix A)

# What a name is made of: digits, ASCII's signs and emoji, without what can be read as the signs of plain lines (colon,
# comma, semicolon, tilde), ...
COMMON = re.compile(
    r"""[ !"#$%&'()*+\-./0-9<=>?@[\\\]^_`{|}‘’ʻʼ׳״־‐–—·•・་॰\u200c\u200d\ufe0e\ufe0f\u20e3↔-↙↩↪⌚⌛⌨⏏⏩-⏺▶◀◻-◾"""
    "☀-☄☎-☒☔-☯☸-♮♲-⚉⚐-⛿✂-✒✨❄-❎❓-❗❣-❧➕-➗➡⤴⤵⬅-⬇⬛⬜⭕🀄🃏🆎🆑-🆚🇦-🇿🌀-🙏🚀-\U0001f6ff🟠-🟫🤌-🧿🩰-\U0001faff]"
)
# ... and letters of scripts in everyday use (Unicode Standard Annex 31, table 5), without radicals, obsolete ones and
# technical ones. A name has those of one of these (Unicode Technical Standard 39, "highly restrictive").
LATIN = (
    "A-Za-zÀ-ÖØ-öø-ıĴ-ķĹ-ľŁ-ňŊ-žƁƆƉ-ƋƏ-ƔƘƙƝƠơƯưƲ-ƴǍ-ǜǞ-ǣǦ-ǰǴǵǸ-țȞȟȦ-ȳɓɔɖɗəɛɣɲʋḀ-ẙẞẠ-ỹ"
    "\u0300-\u0304\u0306-\u030c\u030f\u0311\u0323-\u0325\u032d\u032e\u0330\u0331"
)
HAN = LATIN + "々〆〇㐀-䶿一-鿿﨎-﨩𠀀-\U0002ebe0\U00030000-\U000323af\U000e0100-\U000e01ef"
SCRIPTS = (
    *(HAN + "ぁ-ゖゝゞァ-ヺー-ヾ", HAN + "ㄅ-ㄭㄯㆠ-ㆿˇˊˋ", HAN + "가-힣"),
    "Ά-ώ\u1f00-\u1f7c\u1fb6\u1fc6\u1fd6\u1fe4-\u1fe6\u1ff6\u0300\u0301\u0308\u0313\u0314\u0342",
    "Ѐ-ЌЎ-ќў-џҊ-ӿԐ-ԩ\u0301\u0304\u0306\u0308\u030b\u030f",
    *("Ա-Ֆա-ֆ", "ა-ჰᲐ-Ჰ", "א-תװ-ײ\u05b0-\u05bc\u05bf\u05c1\u05c2\u05c7"),
    "ء-غف-\u0655٠-٩\u0670ٱٹ-ٿڀځڃ-ڊڌ-ڏڑړڕ-ژښڤڦکڪګگڭڱڳڵںڻڼھہ-ۃۅ-ۈۋیۍ-ېےۓە۰-۹",
    *("ހ-ޱ", "က-႟ꧠ-ꧾꩠ-ꩿ", "ሀ-፿ᎀ-ᎏⶀ-ⷞ", "ཀ-࿆༠-༩", "ក-៿"),
    *(f"{chr(first)}-{chr(first + 0x7F)}" for first in range(0x900, 0xF00, 0x80)),  # from Devanagari to Lao
)
ONE_SCRIPT = re.compile("|".join(f"[{letters}]*" for letters in SCRIPTS))
HOST_MARK = "★"  # before a host's name; no name has it, nor an emoji that could pass for the badge of a host
NOT_IN_NAMES = re.compile(
    # Colons to the eye (three visargas), obsolete signs, ...
    f"[\u0903\u0a83\u0f7fॱឣឤ\u17b4\u17b5\u17d3{HOST_MARK}🌟🌠⚝⚜👑♔♕♚♛✅☑🗸🗹🏅🎖🛡🔰🔱]"
    # ... and in Indic scripts a vowel with the sign of a vowel, which is mostly drawn like one letter.
    + "".join(f"|[{chr(at + 5)}-{chr(at + 20)}][{chr(at + 62)}-{chr(at + 76)}]" for at in range(0x900, 0xD80, 0x80))
)

# What looks alike among these letters, folded as in name_key; the first of a word stands for the others. Most are from
# the table of UTS 39; digits and signs that stand in for letters are here too, each for a letter of its own, so that
# user1 and user10 stay two names. An accent or a stroke is seen, so that Éva, Øle and Łukasz stay what they are.
LOOKALIKES = (
    "aаα4@ bьβвßẞ8৪੪ cс eеεєɛԑзӡҽ3 fքƒ gгց6б hһհн jјյ kкκԟ mм nпπηոռበ oоοσօ0ഠဝዐଠ〇סهھہە٥۵०০੦૦୦௦౦೦൦๐໐၀ pрρ qԛգզ9৭੧୨൭ rг "
    "sѕտ5$ tтτ7 uυսцʋሀ vνט٧۷ wԝωшա xхχ yуүγɣყ z2 lі1|ӏιı!丨iاוןו١۱ æӕ đðɖ əә ħћ өθ фφփቀ ծδ մሆ իኮ պሣ ձኔ л٨۸ ҷӌ ӈӊ "
    "-‐–—➖־一ーㄧ ·•・་ '‘’ʻʼ`׳יˊˋ \"״ײ +➕十 /ノ丿 \\丶 ?ॽ .٠۰ ॰⚬ ☽🌒🌙 ☾🌘 \u0306\u030c \u0308\u030b \u0302\u0311 "
    "\u0307\u030a \u0327\u0326 يىیںے كکڪ ٹڻ ثپ ٻې ٢۲ ٣۳ ٤۴ ٦۶ ٩۹१ २૨ ३૩ ४૪ ८૮ ऽઽ \u0941\u0ac1 \u0942\u0ac2 "
    "\u094d\u0a4d\u0acd ৠৡ அ௮ ஈரா உ௨ഉ எ௭ ஐஜജ க௧ ச௪ ணണ ழഴ ளௗ ஶശ ౧೧ ౨೨ ౯೯ అಅ ఆಆ ఇಇ ఒಒ ఔಔ ఓಓ జಜ ఞಞ ణಣ యಯ ఱಱ లಲ ഞൡ ഌങ ൯ൻ "
    "രറ ൪ർ ජ෪ ද෫ ขฃ คดต ฆม จຈ ชซ ฎฏ ฑท บບ ปປ ฝຝ พພ ฟຟ ภฦ ยຍ าๅ \u0e38\u0eb8 \u0e39\u0eb9 \u0e48\u0ec8 \u0e49\u0ec9 རཪ "
    "၁ၥ =ニ二 イ亻 ハ八 カ力ㄌ ト卜 ロ口囗 タ夕 エ工 ^へヘ リり <く𡿨ㄑ ムㄙ厶 チ千 オ才 メㄨ乂 ヨ彐 ㄇ冂 ㄈ匚 ㄏ厂 "
    "ㄒ丅 ㄚ丫 ㄦ儿 ㄩ凵 併倂 値值 㖈䎛 啓啟 土士 㘽㦳 塡填 墫壿 媯嬀 帡帲 戶戸 㩁搉 㫚曶 晚晩 朌肦 朏胐 朐胊 朓脁 "
    "㬵胶 朘脧 㬺幐 㬻䐠 朣膧 杮柿 㮣槩 榝樧 溈潙 䀹鿃 䀿晣 研硏 絕絶 胼腁 䑃朦 蒍蔿 蘷虁 訮詽 䚶訞 讆讏 豜豣 赿趆 "
    "跥跺 躗躛 軿輧 郎郞 鎭鎮 隷隸 鹂鹃 黑黒 櫸𣟱 逸𨓜 㶷𤈎 﨣𧺯 𩿎𩿗"
)
SKELETON = str.maketrans(
    {twin: twins[0] for twins in LOOKALIKES.split() for twin in twins[1:]}
    | {"ة": "o\u0308", "ۃ": "o\u0308", "ҫ": "c\u0327", "ҿ": "e\u0328", "ɲ": "n\u0327", "װ": "ll"}
    | {chr(0x1F1E6 + at): letter for at, letter in enumerate("abcdefghljklmnopqrstuvwxyz")}  # of flags
    | dict.fromkeys([*JOINERS, " ", "\ufe0e", "\ufe0f", *map(chr, range(0xE0100, 0xE01F0))], None)
    | dict.fromkeys(map(chr, (*range(0x5B0, 0x5C8), *range(0x64B, 0x653))), None)  # points that most people leave out
)
PAIRS = {"l\u0307": "l", "rn": "m", "vv": "w", "g\u0327": "g\u0301", "เเ": "แ"}  # two that look like one
# Capitals that look unlike their small letters. In a name with small letters that only Greek has, a Ν begins νίκη.
CAPITALS = str.maketrans("ΑΒΕΖΗΙΚΜΝΟΡΤΥΧΓΛßẞ", "ABEZHIKMNOPTYXГЛββ")
GREEK_WORD = re.compile("(?=.*[α-ω]).*[ΓΔΘΛΞΠΣΦΨΩβδ-ηθλμξπςτφψω]")

# What could be mistaken for the room itself, in the languages that most people read. Not by itself, nor with a number:
RESERVED = "room raum root host server hôte хост сервер مدير میزبان होस्ट 서버 방장 司会"
# ... nor as a word of a longer name, or its end (words that are names of people, as Nizam, are not in it):
RESERVED_WORDS = (
    "tornchat system admin administrator moderator gastgeber systeem beheerder gastheer système administrateur"
    " modérateur serveur sistema administrador anfitrión moderador servidor anfitrião amministratore moderatore sistem"
    " yönetici moderatör sunucu pengelola gospodarz serwer hệthống quảntrịviên система администратор админ модератор"
    " ведущий адміністратор адмін ведучий σύστημα διαχειριστής النظام المدير المشرف المضيف سیستم מערכת מנהל מארח"
    " सिस्टम प्रशासक व्यवस्थापक संचालक एडमिन সিস্টেম অ্যাডমিন"
)
# ... nor, where words stand without spaces, as any part of it:
RESERVED_PARTS = (
    "ระบบ ผู้ดูแล แอดมิน システム 管理者 管理人 ホスト モデレーター サーバー 시스템 관리자 운영자 호스트 진행자"
    " 房间 房間 系统 管理员 主持人 服务器 聊天室 房主 系統 管理員 伺服器"
)


def clean_name(raw: str) -> str:
    """The nickname as it is shown: NFKC, spaces folded. Raises Refused("invalid").

    The rules are those of RFC 8266 (PRECIS nicknames) and UTS 39, with joiners where a script or an emoji needs them.
    """
    raw = raw.strip()
    if len(raw) > RAW_NAME_CODEPOINTS:
        raise Refused("invalid", "name-long", limit=NAME_CHARS)
    name = " ".join(filter(None, unicodedata.normalize("NFKC", raw).split(" ")))
    kinds = [unicodedata.category(char) for char in name]
    if len(name) > NAME_CODEPOINTS or sum(kind not in ("Mn", "Me", "Cf", "Sk") for kind in kinds) > NAME_CHARS:
        raise Refused("invalid", "name-long", limit=NAME_CHARS)
    if NOT_IN_NAMES.search(name) or not one_script(name) or not well_formed(name, kinds):
        raise Refused("invalid", "name-characters")
    if not any(kind[0] in "LN" or kind == "So" for kind in kinds):
        raise Refused("invalid", "name-empty")
    if reserved(name):
        raise Refused("invalid", "name-reserved", name=name)
    return name


def one_script(name: str) -> bool:
    """Whether the letters of a name are in everyday use, and of scripts that are written together."""
    letters = COMMON.sub("", name)
    kinds = {unicodedata.category(char) for char in letters}
    return ONE_SCRIPT.fullmatch(letters) is not None and kinds <= {"Lu", "Ll", "Lo", "Lm", "Mn", "Mc", "Nd", "Nl"}


def well_formed(name: str, kinds: Sequence[str]) -> bool:
    """Whether marks stand on letters, no mark twice, not too many on one, and joiners where they belong."""
    marks = "".join(kind[0] for char, kind in zip(name, kinds, strict=True) if char not in "\ufe0e\ufe0f\u20e3")
    pairs = itertools.pairwise(unicodedata.normalize("NFD", name))
    doubled = any(one == other and unicodedata.category(one) == "Mn" for one, other in pairs)
    joined = all(joins(name, at) for at, kind in enumerate(kinds) if kind == "Cf")
    return joined and not doubled and not MISPLACED_MARKS.search(marks)


# On nothing, or on a sign, where they could be a comma; or piled up over the neighbours.
MISPLACED_MARKS = re.compile("(?:^|[^LMN])M|" + "M" * PILED_MARKS)


def joins(name: str, at: int) -> bool:
    """Whether the format character at this place is a joiner where one belongs: in Indic or Arabic words, in emoji."""
    before, behind = name[at - 1 : at] or " ", name[at + 1 : at + 2] or " "
    arabic = unicodedata.bidirectional(before) == unicodedata.bidirectional(behind) == "AL"
    emoji = unicodedata.category(before) in ("So", "Sk", "Mn") and unicodedata.category(behind) == "So"
    return unicodedata.combining(before) == VIRAMA or arabic or (emoji and name[at] == "\u200d")


def name_key(name: str) -> str:
    """What two names have in common that look alike: a member's key on the roster (G7)."""
    return key_of(name[:RAW_NAME_CODEPOINTS])


@functools.lru_cache(10_000)  # names: more than a room has
def key_of(name: str) -> str:
    """The key of a name that is not too long."""
    name = unicodedata.normalize("NFKD", name)
    if not GREEK_WORD.match(name):
        name = name.translate(CAPITALS)
    key = name.casefold().translate(SKELETON)
    for pair, one in PAIRS.items():
        key = key.replace(pair, one)
    return unicodedata.normalize("NFC", key)


def reserved(name: str) -> bool:
    """Whether a name could be mistaken for the room itself."""
    spaced = (char if unicodedata.category(char)[0] in "LMN" or char in "!@$|" else " " for char in name)
    words = {word.strip(string.digits) for word in CAMEL.sub(" ", "".join(spaced)).split()}
    return (
        any(not RESERVED_KEYS.isdisjoint(letter_keys(form)) for form in (name, ARTICLE_OR_NUMBER.sub("", name)))
        or any(key.endswith(RESERVED_WORD_KEYS) for word in words for key in letter_keys(word))
        or any(part in name_key(name) for part in RESERVED_PART_KEYS)
    )


def letter_keys(name: str) -> set[str]:
    """The keys of a name without its accents and signs, which don't make another word of a reserved one; cl is a d."""
    keys = letters_of(name_key(name)), name_key(letters_of(name))
    return {key.replace("cl", "d") for key in keys}


def letters_of(name: str) -> str:
    """The letters and digits alone."""
    return "".join(filter(str.isalnum, unicodedata.normalize("NFD", name)))


CAMEL = re.compile("(?<=[a-z])(?=[A-Z])")
ARTICLE_OR_NUMBER = re.compile(r"(?i)^the|^\d+|\d+$")
RESERVED_WORD_KEYS = tuple(set().union(*map(letter_keys, RESERVED_WORDS.split())))
RESERVED_PART_KEYS = [name_key(part) for part in RESERVED_PARTS.split()]
RESERVED_KEYS = frozenset(RESERVED_WORD_KEYS).union(*map(letter_keys, RESERVED.split()))


def variants(name: str) -> Iterable[str]:
    """Names to offer instead of one that is taken: Ann2, Ann3, ..., Ann99."""
    for number in range(2, 100):
        for length in range(min(len(name), NAME_CODEPOINTS - 3), 0, -1):
            with contextlib.suppress(Refused):
                yield clean_name(f"{name[:length]}{number}")
                break


Place = tuple[int, int, int]  # of an event in the feed: its entry's id, and which of its events it is
NOWHERE: Place = (0, 0, 0)
END_OF_ENTRY = 999_999  # behind the last event of any entry
LOGOUT = "logout"  # text of a `left` that gives its name back
EVENTS = ("message", "joined", "left", "note", "cleared", "muted", "removed", "mode")
NO_DETAILS: Mapping[str, Any] = types.MappingProxyType({})
OPEN_MODE = types.MappingProxyType({"talk": "everyone", "every": 0, "door": "open"})  # a room's, if no host changes it


class Event(NamedTuple):
    """What happened, as the feed keeps it: a `message`, or a notice (all others), which has the seq before it.

    `details` are what only some have: a message `host`, `re`, `answered`, `picture` and `deleted`; a `joined` `origin`
    and `host`; an act what its frame says, and whom and when that means (`Outbox.details`).
    """

    type: str
    seq: int
    ts: int  # the store's clock, in ms, as the daemon that committed it carried it on; never before that of another
    sid: str = ""
    cid: str = ""
    name: str = ""
    text: str = ""
    place: Place = NOWHERE  # isn't stored
    details: Mapping[str, Any] = NO_DETAILS

    @property
    def entry_id(self) -> tuple[int, int]:
        """Of the entry that holds it."""
        return self.place[:2]

    def is_same(self, other: Event) -> bool:
        """Whether that is this message, whatever was done to it since."""
        deleted = "deleted" in self.details or "deleted" in other.details
        return self[2:4] == other[2:4] and (deleted or self.text == other.text)


FIELDS = Event._fields[:-2]
DETAILS = {"to": int, "kind": str, "value": str | bool, "by": str, "name": str, "sid": str, "seconds": int,
           "until": int, "origin": str, "talk": str, "every": int, "door": str, "host": bool, "re": int,
           "answered": str, "picture": str}  # fmt: skip
NEEDED = {"note": {"to", "kind", "value"}, "muted": {"name", "seconds"}, "removed": {"name", "seconds"}}


def encode_events(events: Iterable[Event]) -> bytes:
    """The field `events` of an entry: a JSON array."""
    return to_json([event_fields(event) for event in events]).encode()


def event_fields(event: Event) -> dict[str, Any]:
    fields = dict(zip(FIELDS, event, strict=False))
    return fields | {"details": event.details} if event.details else fields


def decode_events(raw: bytes, id: tuple[int, int] = (0, 0)) -> list[Event]:
    """The events of the entry with that id; none for one that no tornchat wrote."""
    try:
        events = [Event(**fields, place=(*id, n)) for n, fields in enumerate(json.loads(raw))]
        return events if all(map(is_event, events)) else []
    except (ValueError, TypeError, AttributeError, RecursionError):
        return []


def is_event(event: Event) -> bool:
    """Whether what was read is one. Raises some error where a field is no text that can be sent, or no mapping."""
    type, seq, ts, *texts, _, details = event
    "".join([*texts, *(value for value in details.values() if isinstance(value, str))]).encode()  # half a character?
    return (
        type in EVENTS
        and all(isinstance(number, int) and number >= 0 for number in (seq, ts))
        and NEEDED.get(type, set()) <= details.keys()
        and all(isinstance(value, DETAILS.get(name, object)) for name, value in details.items())
        and ("picture" not in details or PICTURE.fullmatch(details["picture"]) is not None)
    )


def shown(text: str) -> str:
    """Text from outside as one line of a log: nothing that steers a terminal, no bidi tricks."""
    return STEERING.sub("", text.replace("\n", " "))


def guest_name(address: str) -> str:
    """A name for whoever gives none: the end of the address tells who it may be, without telling the address."""
    return "guest-" + re.split(r"[.:]", address.partition("%")[0])[-1]  # without a zone, which may hold anything


def ws_frame(payload: bytes, opcode: int = 0x1) -> bytes:
    """A whole WebSocket frame as a server sends it (RFC 6455, 5.2): unmasked."""
    size = len(payload)
    if size < 126:
        return bytes((0x80 | opcode, size)) + payload
    if size < 65536:
        return bytes((0x80 | opcode, 126)) + size.to_bytes(2, "big") + payload
    return bytes((0x80 | opcode, 127)) + size.to_bytes(8, "big") + payload


class Encoded:
    """An event as a WebSocket frame, made once and sent to everybody as it is."""

    def __init__(self, frame: bytes) -> None:
        self.frame = frame

    @property
    def json(self) -> bytes:
        """The JSON alone, for answers of HTTP."""
        return self.frame[{126: 4, 127: 10}.get(self.frame[1], 2) :]

    def fields(self) -> Any:
        return json.loads(self.json)

    @functools.cached_property
    def line(self) -> bytes:
        """The frame for the subprotocol `text`; b"" if the event has no words."""
        line = STEERING.sub("", line_of(self.fields()))
        return ws_frame(line.encode()) if line else b""


PING = Encoded(ws_frame(b"", 0x9))
PING.line = PING.frame


def encode(event: Mapping[str, Any]) -> Encoded:
    """An event that is given as its JSON object."""
    return Encoded(ws_frame(to_json(event).encode()))


def encode_message(event: Event, reactions: Mapping[str, Any] = NO_DETAILS) -> Encoded:
    """A `message` event as everybody gets it; a cid that the daemon made ("~...") stays inside."""
    message = {"type": "message", "seq": event.seq, "ts": event.ts, "name": event.name, "text": event.text}
    if not event.cid.startswith("~"):
        message["cid"] = event.cid
    if event.details:
        message |= event.details
        if "picture" in message:
            message["picture"] = picture_fields(event.details["picture"])
    if reactions:
        message |= reactions
    return encode(message)


def encode_store(available: bool) -> Encoded:
    return encode({"type": "store", "available": available})


def line_of(event: Mapping[str, Any]) -> str:
    """What a reader of plain lines is told. Only the room begins a line with a tilde: a message has a name before it,
    and spaces before its further lines.
    """
    if event["type"] == "message" and "deleted" not in event:
        host = HOST_MARK + " " if "host" in event else ""
        answered = f" (to {event['answered']})" if "answered" in event else ""
        picture = f"[picture /pictures/{event['picture']['id']}]" if "picture" in event else ""
        text = "\n".join(filter(None, (event["text"], picture)))
        return f"{host}{event['name']}{answered}: {text}".replace("\n", "\n    ")
    words = words_of(event)
    return f"~~~ {words} ~~~" if words else ""


def words_of(event: Mapping[str, Any]) -> str:
    """What the room says of an event; "" for one without words."""
    match event:  # a SyntaxError here? tornchat needs Python 3.11 or newer
        case {"type": "message", "name": name} | {"type": "note", "kind": "delete", "name": name}:
            return f"a message of {name} was deleted"
        case {"type": "note", "kind": "pin", "message": pinned}:
            return f"pinned: {shown(line_of(pinned))}" if pinned else "nothing is pinned"
        case {"type": "joined" | "left" as what, "names": names}:
            return f"{', '.join(names)} {what}"
        case {"type": "hosts", "names": names}:
            return "hosts: " + ", ".join(f"{HOST_MARK} {name}" for name in names)
        case {"type": "welcome", "title": title, "count": count, "members": members, "missed": missed, "mode": mode}:
            lost = "; the history was lost" if event["reset"] else ""
            gap = f"; {missed} messages missed" if missed else ""
            rules = f"; {mode_line(mode)}" if mode != OPEN_MODE else ""
            return f"{title}, {count} here: {', '.join(members)}{lost}{gap}{rules}"
        case {"type": "store", "available": available}:
            return f"the message store is {'back' if available else 'away'}"
        case {"type": "cleared", "by": host}:
            return f"{host} has cleared the room"
        case {"type": "muted", "name": name, "until": until}:
            return f"{name} {'cannot write for now' if until else 'can write again'}"
        case {"type": "mode", "by": host}:
            return f"{host}: {mode_line(event)}"
    return str(event.get("text", ""))  # why something is refused


def mode_line(mode: Mapping[str, Any]) -> str:
    """What a mode means for those who aren't hosts."""
    talk = "only hosts can write" if mode["talk"] == "hosts" else "everybody can write"
    pace = f", one message in {mode['every']} s" if mode["every"] else ""
    return f"{talk}{pace}, the door is {mode['door']}"


# === Acts =============================================================================================================
# What clients ask for: to say something, to do something to a message (a note), and what hosts do with people and the
# room. All of it goes through the outbox and the feed. What comes of it, beside messages, is the State, which follows
# from the feed alone, so that all daemons agree. Pure, too.

HAND = "✋"
SIGNS = ("👍", "👎", "❤️", "😂", HAND, "❓")  # to react with
HANDS_SHOWN = 30  # by name: as many as a host calls upon
# What a note can say, by its kind. Hosts alone may, but for what `Outbox.verdict_on_act` lets others do. What is done
# to a message is kept for as long as the ring has it, a deletion for as long as the feed (`State.forget_notes`).
NOTES: Mapping[str, Sequence[Any]] = {"delete": (True,), "pin": (True, False), "react": ("", *SIGNS)}
MODES: Mapping[str, Sequence[Any]] = {  # what a mode can be
    "talk": ("everyone", "hosts"),  # who may; for hosts alone the room is locked
    "every": range(EVERY_SECONDS + 1),  # slow mode: seconds between two messages of one person
    "door": ("open", "closed"),  # for those who weren't here yet
}


def parse_object(raw: str | bytes) -> dict[str, Any]:
    """A JSON object; {} for any other JSON. Raises Refused."""
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError):
        raise Refused("bad-frame", "not-json") from None
    return value if isinstance(value, dict) else {}


def parse_frame(raw: str | bytes) -> Event:
    """What a client sends through its socket. Raises Refused."""
    if isinstance(raw, bytes):
        raise Refused("bad-frame", "binary")
    return parse_act(parse_object(raw))


def parse_act(frame: Mapping[str, Any]) -> Event:
    """The event that is asked for, as far as the client knows it; without a cid where it wants no confirmation. Raises
    Refused, with the cid once that is known to be one.
    """
    cid = frame.get("cid", "")
    if not isinstance(cid, str) or ("cid" in frame and not CID.fullmatch(cid)):
        raise Refused("bad-frame", "bad-cid")
    try:
        text = read_text(frame) if frame.get("type") == "say" else ""
        type, details = read_act(frame)
    except Refused as refused:
        refused.cid = cid
        raise
    own = f"{type}:{cid}" if cid and type != "message" else cid  # an act and a message with one cid are two things
    return Event(type, 0, 0, cid=own, text=text, details=details)


def read_act(frame: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The type and details of the event."""
    match frame.get("type"):
        case "say":
            answered, picture = read_field(frame, "re", range(MOST_MESSAGES + 1), 0), frame.get("picture")
            return "message", ({"re": answered} if answered else {}) | ({"picture": picture} if picture else {})
        case "note":
            kind = read_field(frame, "kind", tuple(NOTES))
            to = read_field(frame, "to", range(1, MOST_MESSAGES + 1))
            return "note", {"to": to, "kind": kind, "value": read_field(frame, "value", NOTES[kind], True)}
        case "clear":
            return "cleared", {}
        case "mute":
            return "muted", read_target(frame, 0)
        case "remove":
            return "removed", read_target(frame, 1)
        case "mode" if mode := {name: read_field(frame, name, MODES[name]) for name in MODES if name in frame}:
            return "mode", mode
        case "mode":
            raise Refused("bad-frame", "bad-field", field=", ".join(MODES))
    raise Refused("bad-frame", "unknown-type")


def read_text(frame: Mapping[str, Any]) -> str:
    """The text of a message; a picture needs none."""
    picture = frame.get("picture", "")
    if not isinstance(picture, str) or (picture and not PICTURE.fullmatch(picture)):
        raise Refused("no-picture")
    text = frame.get("text", "" if picture else None)
    if not isinstance(text, str):
        raise Refused("bad-frame", "no-text")
    return clean_text(text, may_be_empty=bool(picture))


def read_target(frame: Mapping[str, Any], least: int) -> dict[str, Any]:
    """Who is meant, and for how many seconds."""
    if not isinstance(name := frame.get("name"), str):
        raise Refused("bad-frame", "bad-field", field="name")
    check_characters(name)
    return {"name": name[:RAW_NAME_CODEPOINTS], "seconds": read_field(frame, "seconds", range(least, ACT_SECONDS + 1))}


def read_field(frame: Mapping[str, Any], name: str, values: Sequence[Any], default: object = None) -> Any:
    """One of these values, which are of one type. Raises Refused."""
    value = frame.get(name, default)
    if type(value) is type(values[0]) and value in values:
        return value
    raise Refused("bad-frame", "bad-field", field=name)


@dataclasses.dataclass(slots=True)
class Noted:
    """The sum of all notes to one message; but a pin is the room's (State.pinned)."""

    signs: dict[str, str] = dataclasses.field(default_factory=dict)  # browser -> its reaction
    hands: dict[str, str] = dataclasses.field(default_factory=dict)  # browser -> name, in the order they were raised
    deleted: Event | None = None  # the message without its text
    changed: int = 0  # the seq of the room then

    def react(self, browser: str, sign: str, name: str) -> None:
        """The reaction of somebody from now on; "" for none. A hand that is up already keeps its place."""
        if sign:
            self.signs[browser] = sign
        else:
            self.signs.pop(browser, None)
        if sign == HAND:
            self.hands[browser] = name
        else:
            self.hands.pop(browser, None)

    def reactions(self) -> dict[str, Any]:
        """How many reacted with which sign, in the order of SIGNS, and who has raised a hand, the first ones."""
        counter = collections.Counter(self.signs.values())
        counts = {sign: counter[sign] for sign in SIGNS if sign in counter}
        hands = [*itertools.islice(self.hands.values(), HANDS_SHOWN)]
        return ({"counts": counts} if counts else {}) | ({"hands": hands} if hands else {})


def marks_of(sid: str, name: str) -> tuple[str, str]:
    """By what a person is known who is muted, removed or slowed down: browser and name; a logout changes neither."""
    return sid[:BROWSER_CHARS], "name " + name_key(name)


class State:
    """What the acts have made of the room. Times are in ms of the store's clock; a mark is one of `marks_of`."""

    def __init__(self) -> None:
        self.mode: dict[str, Any] = dict(OPEN_MODE)
        self.pinned: dict[str, Any] | None = None  # the message as it is sent
        self.cleared = 0  # messages up to this one are gone
        self.muted: dict[str, int] = {}  # mark -> till when
        self.barred: dict[str, int] = {}  # mark, or "from origin" -> till when
        self.hosts: dict[str, tuple[str, int]] = {}  # a name's key -> sid, and till when (ms) it is that host's
        self.ended: dict[str, int] = {}  # sids of hosts who have logged out: their cookies are no host's any more
        self.notes: dict[int, Noted] = {}
        self.said: dict[
            str, int
        ] = {}  # in slow mode alone: mark -> when, oldest first; isn't stored: the feed tells it
        self.changed: set[str] = set()  # fields to be stored, see `field`

    # --- as it is stored: the fields of a hash, each of them JSON ---

    PARTS = ("mode", "pinned", "cleared", "muted", "barred", "hosts", "ended")

    def fields(self) -> dict[str, str]:
        """Each of PARTS, and under its number what was done to a message."""
        return {name: self.field(name) for name in (*self.PARTS, *map(str, self.notes))}

    def field(self, name: str) -> str:
        """As it is stored; empty where it is forgotten."""
        if name in self.PARTS:
            return to_json(getattr(self, name))
        note = self.notes.get(int(name))
        if note is None:
            return ""
        deleted = note.deleted and event_fields(note.deleted)
        return to_json({"signs": note.signs, "hands": note.hands, "deleted": deleted})

    def take_changes(self) -> dict[str, str]:
        changed, self.changed = self.changed, set()
        return {name: self.field(name) for name in changed}

    def load(self, fields: Mapping[str, str], seq: int) -> None:
        """Takes what is stored. Whoever comes back is told all that was done to messages before `seq`, just in case."""
        for name, value in fields.items():
            with contextlib.suppress(ValueError, TypeError, KeyError, RecursionError):  # of no tornchat
                stored = json.loads(value)
                if name in self.PARTS:
                    if type(stored) is type(getattr(self, name)) or name == "pinned":
                        setattr(self, name, stored)
                elif name.isdecimal():
                    deleted = decode_events(to_json([stored["deleted"]]).encode())
                    signs, hands = dict(stored["signs"]), dict(stored.get("hands", {}))
                    self.notes[int(name)] = Noted(signs, hands, next(iter(deleted), None), seq)

    # --- what the feed brings ---

    def apply(self, event: Event, about: Event | None = None) -> None:
        """Takes an event; with a note comes the message that it is `about`, if that is still known."""
        match event.type:
            case "message":
                self.remember_speaker(event)
            case "joined" if event.details.get("host"):
                self.hosts[name_key(event.name)] = event.sid, event.ts + COOKIE_DAYS * 86_400_000
                self.changed.add("hosts")
            case "left" if event.text == LOGOUT and self.is_host(event.sid, name_key(event.name)):
                newest = itertools.islice(self.ended.items(), max(0, len(self.ended) + 1 - HOST_LOGOUTS), None)
                self.ended = {sid: until for sid, until in newest if until > event.ts}
                self.ended[event.sid] = self.hosts.pop(name_key(event.name))[1]
                self.changed |= {"hosts", "ended"}
            case "mode":
                self.mode |= event.details
                self.changed.add("mode")
                if not self.mode["every"]:
                    self.said.clear()
            case "muted" | "removed":
                self.restrict(event)
            case "cleared":
                self.cleared, self.pinned = event.seq, None
                self.changed |= {"cleared", "pinned", *map(str, self.notes)}
                self.notes.clear()
            case "note":
                self.note(event, about)

    def remember_speaker(self, event: Event) -> None:
        """Keeps in mind who said something, for as long as slow mode lets them say no more."""
        for mark in marks_of(event.sid, event.name):
            self.said.pop(mark, None)
            self.said[mark] = event.ts
        while self.said[oldest := next(iter(self.said))] <= event.ts - 1000 * self.mode["every"]:
            del self.said[oldest]

    def restrict(self, event: Event) -> None:
        """Somebody is muted or kept out for a while, or, with until = 0, no longer."""
        name, details = "muted" if event.type == "muted" else "barred", event.details
        marks = [*marks_of(details.get("sid", ""), details["name"])]
        if "origin" in details:
            marks.append("from " + details["origin"])
        table = getattr(self, name) | dict.fromkeys(marks, details.get("until", 0))
        setattr(self, name, {mark: until for mark, until in table.items() if until > event.ts})
        self.changed.add(name)

    def note(self, event: Event, about: Event | None) -> None:
        to, kind, value = (event.details[name] for name in ("to", "kind", "value"))
        if kind == "pin":
            if not value or self.is_deleted(to):
                self.pin(None)
            elif about and not (self.pinned and self.pinned["seq"] == to):
                self.pin(about)
            return
        if to not in self.notes:
            self.forget_notes(event.seq)
        note = self.notes.setdefault(to, Noted())
        note.changed = event.seq
        if kind == "react" and not note.deleted:
            note.react(event.sid[:BROWSER_CHARS], value, event.name)
        elif kind == "delete" and about:
            self.delete(note, about, event.details.get("by", "host"))
        self.changed.add(str(to))

    def forget_notes(self, last: int) -> None:
        """Forgets the reactions to what nobody is sent any more, and the deletions of what the feed doesn't hold."""
        for seq, note in [*self.notes.items()]:
            if seq <= last - (NOTED_MESSAGES if note.deleted else RING_MESSAGES):
                del self.notes[seq]
                self.changed.add(str(seq))

    def pin(self, message: Event | None) -> None:
        self.pinned = encode_message(message).fields() if message else None
        self.changed.add("pinned")

    def delete(self, note: Noted, message: Event, by: str) -> None:
        """The text is gone, the rest stays."""
        if self.pinned and self.pinned["seq"] == message.seq:
            self.pin(None)
        kept = {name: message.details[name] for name in ("host", "re") if name in message.details}
        note.signs, note.hands = {}, {}
        note.deleted = message._replace(text="", details=kept | {"deleted": True, "by": by})

    def restored(self, events: Sequence[Event]) -> list[Event]:
        """What the feed holds, without the deleted texts, and with what is left of messages that it holds no more."""
        first = events[0].seq if events else math.inf
        places = {event.seq: event.place for event in events if event.type == "message"}
        deleted = [note.deleted for seq, note in self.notes.items() if note.deleted and seq >= first]
        left = [event._replace(place=places.get(event.seq, NOWHERE)) for event in deleted]
        others = (event for event in events if event.type != "message" or not self.is_deleted(event.seq))
        return sorted([*left, *others], key=lambda event: event.seq)

    # --- as it is told ---

    def encode(self, event: Event) -> Encoded:
        """An act as all are told of it; a POST answers the same."""
        details, frame = event.details, {"type": event.type, "ts": event.ts, "by": event.name}
        match event.type:
            case "message":
                return encode_message(event)
            case "note":
                return self.encode_note(details["to"], details["kind"])
            case "cleared":
                frame["seq"] = event.seq
            case "muted" | "removed":
                frame |= {name: details[name] for name in ("name", "until") if name in details}
            case "mode":
                frame |= self.mode
        return encode(frame)

    def encode_note(self, to: int, kind: str) -> Encoded:
        note, frame = self.notes.get(to, Noted()), {"type": "note", "to": to, "kind": kind}
        if kind == "react":
            return encode(frame | {"counts": {}} | note.reactions())
        if kind == "pin":
            return encode(frame | {"message": self.pinned})
        left = note.deleted or Event("message", to, 0)  # kind is "delete"
        return encode(frame | {"by": left.details.get("by", "host"), "name": left.name})

    def notes_since(self, after: int) -> list[Encoded]:
        """What was done to messages up to this one after it came: whoever has seen it last comes back."""
        first = after - RING_MESSAGES  # no client keeps more
        changed = ((seq, note) for seq, note in self.notes.items() if first < seq <= after <= note.changed)
        return [self.encode_note(seq, "delete" if note.deleted else "react") for seq, note in changed]

    def standing(self, sid: str, name: str) -> dict[str, Any]:
        """What a welcome says of all this."""
        browser = sid[:BROWSER_CHARS]
        return {
            "host": self.is_host(sid, name_key(name)),
            "mode": self.mode,
            "pinned": self.pinned,
            "muted_until": self.muted_until(sid, name),
            "cleared": self.cleared,
            "signs": SIGNS,
            "mine": {str(seq): note.signs[browser] for seq, note in self.notes.items() if browser in note.signs},
        }

    # --- who may ---

    def is_host(self, sid: str, key: str) -> bool:
        return key in self.hosts and self.hosts[key][0] == sid

    def muted_until(self, sid: str, name: str) -> int:
        return max(self.muted.get(mark, 0) for mark in marks_of(sid, name))

    def waits(self, table: Mapping[str, int], marks: Iterable[str], now: int) -> float:
        """For how many s one of these marks is still in that table."""
        return max(0, *(table.get(mark, 0) - now for mark in marks)) / 1000

    def cannot_write(self, sid: str, name: str, now: int) -> Refused | None:
        """Why somebody who isn't a host can't write now, nor send a picture: muted, locked or slow."""
        marks = marks_of(sid, name)
        if wait := self.waits(self.muted, marks, now):
            return Refused("muted", retry_after=wait)
        if self.mode["talk"] == "hosts":
            return Refused("locked")
        every = self.mode["every"]
        if every and (wait := self.waits(self.said, marks, now - 1000 * every)):
            return Refused("slow", every=every, retry_after=wait)
        return None

    def is_deleted(self, seq: int) -> bool:
        return seq <= self.cleared or (seq in self.notes and self.notes[seq].deleted is not None)


# === Store ============================================================================================================
# The only section that knows Redis; fakeredis in this process is the same code. One stream, `feed`, is the truth. Its
# entry is one commit, with an id that we make: Redis refuses one that isn't above its newest, so that XADD alone is the
# compare-and-append. Nothing here tries twice: a lost reply may mean "done", so the Feed looks before it tries again.

P = ParamSpec("P")
T = TypeVar("T")
Id = tuple[int, int]  # "<ms>-<n>": n counts the commits, ms is the store's clock when the history began
NO_ENTRY: Id = (0, 0)

STORE_ERRORS = (RedisError, OSError)  # away, silent, full, read-only, or holding something that isn't ours
OVERTAKEN = "equal or smaller"  # in the words of Redis, for an id that isn't above its newest


class Entry(NamedTuple):
    """One commit. `raw` is its field `events`, a JSON array; b"" where no tornchat wrote it, or nobody needs it."""

    id: Id
    raw: bytes
    size: int = 0  # of `raw`, as it was stored


def parse_id(id: bytes) -> Id:
    ms, _, n = id.partition(b"-")
    return int(ms), int(n)


def id_text(id: Id) -> str:
    return f"{id[0]}-{id[1]}"


def parse_entries(found: Iterable[tuple[bytes, dict[bytes, bytes]]]) -> list[Entry]:
    return [Entry(parse_id(id), raw := fields.get(b"events", b""), size=len(raw)) for id, fields in found]


def connect(config: Config) -> Callable[..., Any]:
    """Makes clients of the Redis asked for, or of one in this process. Raises ValueError for a malformed URL."""
    if not config.redis_url:
        return functools.partial(
            fakeredis.FakeAsyncRedis, server=fakeredis.FakeServer(), protocol=2, socket_timeout=None
        )
    return functools.partial(
        redis.asyncio.Redis.from_url,
        config.redis_url,
        client_name=client_prefix(config.room) + secrets.token_hex(4),
        protocol=2,
        retry=Retry(NoBackoff(), 0),  # its own retries would write a message once more for each lost reply
        socket_timeout=None,  # its own time-outs cost a task a command; `bounded` has one timer for all of a call
    )


def client_prefix(room: str) -> str:
    """How the connections of a room's daemons are called, so that they see each other; Redis takes ASCII only."""
    return f"tornchat-{hashlib.sha256(room.encode()).hexdigest()[:8]}-"


def bounded(
    method: Callable[Concatenate[Store, P], Coroutine[Any, Any, T]],
) -> Callable[Concatenate[Store, P], Coroutine[Any, Any, T]]:
    """A method that raises TimeoutError (one of STORE_ERRORS) when the store is silent."""

    @functools.wraps(method)
    async def call(self: Store, /, *args: P.args, **kwargs: P.kwargs) -> T:
        async with asyncio.timeout(self.silence_seconds):
            return await method(self, *args, **kwargs)

    return call


class Store:
    """The keys of one room under `tornchat:{room}:` and the few commands on them. Every coroutine raises STORE_ERRORS.

    feed     the stream of entries, each one commit
    wishes   a stream of events that a daemon far away asks the others to commit for it
    names    hash: a member's key -> "sid@origin name": the roster, written after the feed and never ahead of it
    leases   sorted set: a member's key -> when it lapses, in ms of the store's clock
    state    hash: `epoch`, the name of the history, and what acts have made of the room (State); written like names
    secret   signs the cookies of all daemons
    pictures hash: id -> "ms bytes": when it came, and what it counts
    picture:ID  its bytes
    host_key makes hosts at all daemons
    """

    def __init__(self, client: Callable[..., Any], config: Config) -> None:
        self.config = config
        self.shared = bool(config.redis_url)  # others may write as well
        self.silence_seconds = config.store_seconds if self.shared else None  # this process is never silent
        self.redis = client()
        self.reading = client(single_connection_client=True)  # blocks most of the time
        self.line = self.redis.connection_pool.make_connection()  # for `append` alone
        prefix = f"tornchat:{{{config.room}}}:"  # the braces keep all keys in one slot of a Cluster
        self.feed, self.wishes, self.names = prefix + "feed", prefix + "wishes", prefix + "names"
        self.leases, self.state = prefix + "leases", prefix + "state"
        self.prefix, self.secret, self.host_key = prefix, config.secret, config.host_key
        self.pictures, self.picture = prefix + "pictures", prefix + "picture:"
        self.transfers = asyncio.Semaphore(TRANSFERS_AT_ONCE)
        self.clock_ahead = 0.0  # of time.monotonic, in ms

    # --- the feed ---

    @bounded
    async def append(self, entry: Entry, keep_from: Id | None = None) -> bool:
        """Appends an entry, and forgets those before `keep_from`. False: the feed is gone, or others were first.

        Only on the connection of the last `newest`: behind a new one the feed may have gone back to an older state,
        which would take the entry all the same.
        """
        if not self.line.is_connected:
            raise redis.exceptions.ConnectionError("the connection was lost")
        trim = ("MINID", "~", id_text(keep_from)) if keep_from else ()
        await self.line.send_command("XADD", self.feed, "NOMKSTREAM", *trim, id_text(entry.id), "events", entry.raw)
        try:
            return await self.line.read_response() is not None
        except ResponseError as error:
            if OVERTAKEN in str(error):
                return False
            raise

    @bounded
    async def newest(self) -> Entry | None:
        """The newest entry of the feed, None if there is no feed. `raw` is b"" where it has been deleted since."""
        if not self.line.is_connected:
            await self.line.connect()
        await self.line.send_command("XINFO", "STREAM", self.feed)
        try:
            reply = await self.line.read_response()
        except ResponseError as error:
            if "no such key" in str(error):
                return None
            raise
        about = dict(zip(reply[::2], reply[1::2], strict=True))
        newest, last = parse_id(about[b"last-generated-id"]), about[b"last-entry"]
        if last and parse_id(last[0]) == newest:
            fields = dict(zip(last[1][::2], last[1][1::2], strict=True))
            return Entry(newest, fields.get(b"events", b""))
        return Entry(newest, b"")

    async def pages(self, since: str = "", until: str = "") -> AsyncIterator[list[Entry]]:
        """The feed, newest first, or from one id on to another, in pages that come in time over a slow line, too."""
        at, count = since or "+", 8
        while True:
            try:
                page = await self.page(at, until, count)
            except TimeoutError:
                if count == 1:
                    raise
                count = max(1, count // 8)
                continue
            if not page:
                return
            yield page
            at = "(" + id_text(page[-1].id)
            size = sum(entry.size for entry in page)
            count = max(1, min(count * PAGE_BYTES // (size + 1), 4 * count, READ_ENTRIES))

    @bounded
    async def page(self, at: str, until: str, count: int) -> list[Entry]:
        """So many entries from that id on, it included, to another; without one those before it, newest first."""
        if until:
            return parse_entries(await self.redis.xrange(self.feed, min=at, max=until, count=count))
        return parse_entries(await self.redis.xrevrange(self.feed, max=at, count=count))

    @bounded
    async def follow(self, last: Id, wish: bytes) -> tuple[list[Entry], list[tuple[bytes, bytes]]]:
        """Waits a moment for entries after `last` and for wishes after the one with the id `wish`: (id, events)."""
        streams = {self.feed: id_text(last), self.wishes: wish}
        block = int(self.config.block_seconds * 1000)
        found = dict(await self.reading.xread(streams, count=READ_ENTRIES, block=block) or [])
        wishes = [(id, fields.get(b"events", b"")) for id, fields in found.get(self.wishes.encode(), [])]
        return parse_entries(found.get(self.feed.encode(), [])), wishes

    @bounded
    async def wish(self, raw: bytes) -> None:
        """Asks the other daemons to commit these events."""
        await self.redis.xadd(self.wishes, {"events": raw}, maxlen=WISHES, approximate=True)

    @bounded
    async def forget(self, ids: set[Id], pictures: set[str], cleared: Event | None) -> None:
        """Deletes these entries and pictures, all from before the room was cleared, and wishes: one may hold a copy."""
        async with self.redis.pipeline() as pipe:
            if ids:
                pipe.xdel(self.feed, *map(id_text, ids))
            if cleared:
                pipe.xtrim(self.feed, minid=id_text(cleared.entry_id), approximate=False)
            await pipe.xtrim(self.wishes, maxlen=0).execute()
        await self.drop_pictures(pictures, cleared.ts if cleared else 0)

    # --- beginning, and putting back what was forgotten ---

    @bounded
    async def read_state(self) -> tuple[dict[str, str], dict[str, str]]:
        """The roster, and the fields of the State with the epoch, as they were given to `write_names`."""
        async with self.redis.pipeline() as pipe:
            found = await pipe.hgetall(self.names).hgetall(self.state).execute()
        names, state = (
            {key.decode(errors="replace"): value.decode(errors="replace") for key, value in table.items()}
            for table in found
        )
        return names, state

    @bounded
    async def open_epoch(self, began: int) -> None:
        """Begins a history in an empty feed, unless another daemon was first."""
        async with self.redis.pipeline() as pipe:
            await pipe.watch(self.feed)
            if await pipe.exists(self.feed):
                return
            pipe.multi()
            pipe.delete(self.names, self.state).hset(self.state, "epoch", str(began))
            pipe.xadd(self.feed, {"events": "[]"}, id=id_text((began, 1)))
            with contextlib.suppress(WatchError):
                await pipe.execute()

    @bounded
    async def put_back(self, entries: Sequence[Entry]) -> None:
        """Appends entries under the ids that they had; those that others have put back already are left out. All at
        once, or an append of a daemon that hasn't noticed yet would come before the last of them, and leave a hole.
        """
        pipe = self.redis.pipeline()
        for entry in entries:
            pipe.xadd(self.feed, {"events": entry.raw}, id=id_text(entry.id))
        for error in await pipe.execute(raise_on_error=False):
            if isinstance(error, Exception) and OVERTAKEN not in str(error):
                raise error

    def made_up(self) -> list[str]:
        """The secrets that the operator didn't give, which all daemons then take from the store."""
        return [name for name in ("secret", "host_key") if not getattr(self.config, name)]

    @bounded
    async def keep_secrets(self) -> None:
        """Takes the secrets that the store holds, or gives it ours."""
        for name in self.made_up():
            key = self.prefix + name
            while (kept := await self.redis.get(key)) is None:
                await self.redis.set(key, getattr(self, name) or secrets.token_urlsafe(16), nx=True)
            setattr(self, name, kept.decode(errors="replace"))

    @bounded
    async def server(self) -> tuple[str, float]:
        """Which Redis answers, another one after each start, and its age in s; ("", 0) where it won't tell."""
        try:
            about = await self.redis.info("server")
        except ResponseError:
            return "", 0
        return about.get("run_id", ""), about.get("uptime_in_seconds", 0)

    @bounded
    async def has_company(self) -> bool:
        """Whether another daemon of this room is connected, or may be."""
        try:
            names = {client["name"] for client in await self.redis.client_list()}
            names.discard(await self.redis.client_getname())
        except ResponseError:  # we may not ask
            return True
        return any(name.startswith(client_prefix(self.config.room)) for name in names)

    async def wait_for_feed(self) -> None:
        """A daemon that has seen what this store has forgotten puts it back; that is given its time."""
        for _ in range(20):
            if await self.newest():
                return
            await asyncio.sleep(self.config.repair_seconds / 20)

    # --- names and leases ---

    @bounded
    async def write_names(self, names: Mapping[str, str], state: Mapping[str, str], *, anew: bool = False) -> None:
        """Puts names on the roster, with a lease, and fields into the State, after the feed has them; "" takes one off.
        `anew`: they are all that there is, and the secrets come with them.
        """
        async with self.redis.pipeline() as pipe:
            if anew:
                pipe.delete(self.names, self.state)
                for name in self.made_up():
                    pipe.set(self.prefix + name, getattr(self, name), nx=True)
            for key, fields in ((self.state, state), (self.names, names)):  # names last: they have leases, below
                if kept := {name: value for name, value in fields.items() if value}:
                    pipe.hset(key, mapping=kept)
                if gone := [name for name, value in fields.items() if not value]:
                    pipe.hdel(key, *gone)
            if kept:
                pipe.zadd(self.leases, dict.fromkeys(kept, self.lapses_in(self.config.lease_seconds)))
            if gone:
                pipe.zrem(self.leases, *gone)
            await pipe.execute()

    @bounded
    async def renew(self, seconds: Mapping[str, float], *, missing: bool = False) -> None:
        """Sets the leases of these keys, for so long, or those of them that are missing."""
        leases = [(key, self.lapses_in(wish)) for key, wish in seconds.items()]
        for at in range(0, len(leases), 500):  # about 2 ms of fakeredis each
            await self.redis.zadd(self.leases, dict(leases[at : at + 500]), nx=missing)

    @bounded
    async def lapsed(self) -> set[str]:
        return {key.decode(errors="replace") for key in await self.redis.zrangebyscore(self.leases, "-inf", self.now())}

    # --- pictures ---

    @bounded
    async def add_picture(self, id: str, data: bytes) -> None:
        """Keeps a picture. All together stay within `--pictures`: the oldest go for it, whichever daemon took them."""
        async with self.transfers, self.redis.pipeline() as pipe:
            counted = max(len(data), PICTURE_LEAST_BYTES)
            pipe.set(self.picture + id, data).hset(self.pictures, id, f"{self.now()} {counted}")
            *_, index = await pipe.hgetall(self.pictures).execute()
        pictures = sorted((*map(int, about.split()), id.decode()) for id, about in index.items())[::-1]  # newest first
        sizes = itertools.accumulate(size for _, size, _ in pictures)
        most = self.config.pictures * 2**20
        await self.drop_pictures([id for (*_, id), size in zip(pictures, sizes, strict=True) if size > most])

    @bounded
    async def read_picture(self, id: str, start: int = 0) -> tuple[bytes, int]:
        """A piece of a picture from there on, and how many bytes all of it has: 0 if it is gone."""
        async with self.transfers, self.redis.pipeline(transaction=False) as pipe:
            pipe.getrange(self.picture + id, start, start + CHUNK_BYTES - 1).strlen(self.picture + id)
            piece, size = await pipe.execute()
        return piece, size

    @bounded
    async def drop_pictures(self, ids: Iterable[str], before: int = 0) -> None:
        """Deletes pictures, and all that came before that time, in ms."""
        index = await self.redis.hgetall(self.pictures) if before else {}
        if ids := [*ids, *(id.decode() for id, about in index.items() if int(about.split()[0]) < before)]:
            async with self.redis.pipeline() as pipe:
                await pipe.delete(*(self.picture + id for id in ids)).hdel(self.pictures, *ids).execute()

    # --- the clock ---

    @bounded
    async def read_clock(self) -> float:
        """Learns the store's time, which a clock that nobody can set carries on; by how many s it has jumped ahead."""
        seconds, microseconds = await self.redis.time()
        before, self.clock_ahead = self.clock_ahead, (seconds + microseconds / 1e6 - time.monotonic()) * 1000
        return (self.clock_ahead - before) / 1000

    def now(self) -> int:
        return int(self.clock_ahead + time.monotonic() * 1000)

    def lapses_in(self, seconds: float) -> int:
        return self.now() + int(seconds * 1000)

    async def close(self) -> None:
        await self.line.disconnect()
        for client in (self.redis, self.reading):
            await client.aclose()


# === Room =============================================================================================================
# Who is here and what was said, as the feed tells it. Plain and synchronous: no Tornado, no Redis, no waiting, so
# that a newcomer's replay and registration are one step, and nothing can come between them.


class Batch:
    """The events that came in one turn; every listener of a kind writes the same bytes, in one write."""

    def __init__(self, *events: Encoded) -> None:
        self.events = events
        self.frames = memoryview(b"".join([event.frame for event in events]))

    @functools.cached_property
    def lines(self) -> memoryview:
        return memoryview(b"".join([event.line for event in self.events]))


class Listener(Protocol):
    """Where a member's events go."""

    member: Member
    base: int  # messages with a higher seq were or will be sent to this listener

    def send(self, batch: Batch) -> None: ...  # live events
    def replay(self, events: list[Encoded]) -> None: ...  # what is owed from before, as much as it takes
    def heartbeat(
        self, now: float, time: Encoded
    ) -> None: ...  # a sign of life may be due; `now` in s of the loop's clock
    def turn_away(self, refused: Refused) -> None: ...  # the end, for that reason
    def shut(self, code: int, reason: str) -> None: ...  # the end, with a WebSocket close code


@dataclasses.dataclass(slots=True, eq=False)
class Member:
    """One session under its name: on the roster, or with listeners here, or both."""

    sid: str
    name: str
    key: str
    origin: str = ""  # tells whether two members come from one address, without telling the address
    listeners: list[Listener] = dataclasses.field(default_factory=list)
    renewed: float = 0  # when this daemon last renewed the lease, in s
    grace: float = 0  # for how many s the name is to outlive the last connection here, till its lease says so
    refusals: int = 0  # in a row
    rejoining: bool = False
    polled_to: str = ""  # where its last poll here ended, the text of a Cursor

    @property
    def joining(self) -> Mapping[str, Any]:
        """The details of its `joined`."""
        return {"origin": self.origin} if self.origin else NO_DETAILS

    def __str__(self) -> str:
        """As the roster is stored, see `Room.restore`."""
        return f"{self.sid}{'@' * bool(self.origin)}{self.origin} {self.name}"


class Ring:
    """The newest messages, and how they are sent, without a hole."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.kept: collections.deque[tuple[Event, Encoded]] = collections.deque(maxlen=size)  # oldest first
        self.last = 0  # seq of the newest

    def append(self, event: Event) -> Encoded:
        """Takes the next message, encoded. One that isn't the next begins anew."""
        if event.seq != self.last + 1:
            self.kept.clear()
        encoded = encode_message(event)
        self.last = event.seq
        self.kept.append((event, encoded))
        return encoded

    def replace(self, event: Event, encoded: Encoded) -> None:
        """Another form of a message that is here."""
        self.kept[event.seq - self.last - 1] = event, encoded

    def newest(self, count: int) -> list[Encoded]:
        """The last `count`, oldest first."""
        return [encoded for _, encoded in itertools.islice(self.kept, max(0, len(self.kept) - count), None)]

    def after(self, seq: int) -> list[Encoded] | None:
        """All that came after `seq`, oldest first; None if the first of them has fallen out."""
        return self.newest(self.last - seq) if self.last - seq <= len(self.kept) else None

    def find(self, seq: int) -> Event | None:
        """The message of that number, if it is still here."""
        return self.kept[seq - self.last - 1][0] if 0 <= self.last - seq < len(self.kept) else None


class ResumePoint(NamedTuple):
    """The resume point of a client: all up to the message `after` of that epoch. None: a newcomer."""

    after: int | None = None
    epoch: str = ""
    at: int | None = None  # ts of that message: another one of the same number is another history


NEWCOMER = ResumePoint()


class Room:
    """The sum of the feed: ring, roster, and the listeners of this daemon."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.epoch, self.seq, self.ts = "", 0, 0  # seq and ts of the newest message and event
        self.place = self.notices_after = NOWHERE  # of the newest event, and of that before the first of the notices
        self.state = State()
        self.ring = Ring(RING_MESSAGES)
        self.notices: collections.deque[tuple[Event, Encoded]] = collections.deque(maxlen=RING_MESSAGES)
        self.roster: dict[str, Member] = {}  # by key
        self.sessions: dict[str, Member] = {}  # by sid: the roster, and whoever has listeners here
        self.kept_names: dict[str, tuple[str, int]] = {}  # key -> sid, and till when, in ms; in the order of leaving
        self.listeners: set[Listener] = set()
        self.available = True

    # --- listeners ---

    def join(self, listener: Listener, seen: ResumePoint = NEWCOMER) -> None:
        """Replays to a listener what it is owed, and registers it: no event falls between the two."""
        self.replay(listener, seen)
        self.register(listener)

    def register(self, listener: Listener) -> None:
        self.listeners.add(listener)
        listener.member.listeners.append(listener)
        self.sessions[listener.member.sid] = listener.member

    def replay(self, listener: Listener, seen: ResumePoint) -> None:
        messages, gap = self.owed(seen)
        listener.base = self.seq - len(messages)
        listener.replay([*self.greeting(listener.member, seen, gap), *messages])

    def greeting(self, member: Member, seen: ResumePoint, gap: Mapping[str, Any]) -> list[Encoded]:
        """The welcome, the store if it is away, and what was done since to messages that the client has seen."""
        away = [] if self.available else [encode_store(self.available)]
        notes = [] if seen.after is None or gap["reset"] else self.state.notes_since(seen.after)
        return [self.welcome(member, gap), *away, *notes]

    def leave(self, listener: Listener) -> None:
        self.listeners.discard(listener)
        member = listener.member
        if listener in member.listeners:
            member.listeners.remove(listener)
        if not member.listeners and self.roster.get(member.key) is not member:
            self.sessions.pop(member.sid, None)

    def send(self, batch: Batch) -> None:
        """The only way out to everybody. A listener that can't keep up deals with it by itself."""
        for listener in tuple(self.listeners):
            listener.send(batch)

    def concerns(self, event: Event, member: Member) -> bool:
        """Whether a member is told of an event: who is muted knows it, and the hosts do."""
        return event.type != "muted" or event.details.get("sid") == member.sid or self.is_host(member)

    def is_host(self, member: Member) -> bool:
        return self.state.is_host(member.sid, member.key)

    def hosts(self) -> list[str]:
        here = (self.roster.get(key) for key in self.state.hosts)
        return [member.name for member in here if member and self.is_host(member)]

    def set_available(self, available: bool) -> bool:
        """Tells everybody when the store goes away or comes back; whether that is news."""
        if news := available != self.available:
            self.available = available
            self.send(Batch(encode_store(available)))
        return news

    # --- what somebody is owed who comes, or comes back ---

    def owed(self, seen: ResumePoint) -> tuple[list[Encoded], dict[str, Any]]:
        """The messages that somebody is to be told who has seen that, and what the welcome says of those between."""
        after, found = max(seen.after or 0, self.state.cleared), self.ring.find(seen.after or 0)
        ours = seen.after is not None and not self.is_ahead(seen) and (found is None or seen.at in (None, found.ts))
        messages = self.ring.after(after) if ours else None
        if messages is None:
            messages = self.ring.newest(self.config.history)
        missed = self.seq - after - len(messages) if ours else 0
        reset = not ours and seen.after is not None  # it was another history, as far as can be told
        return messages, {"recovered": ours and not missed, "missed": missed, "reset": reset}

    def is_ahead(self, seen: ResumePoint) -> bool:
        """Whether a resume point lies beyond what this daemon knows: the store may know more."""
        return seen.after is not None and (seen.after > self.seq or seen.epoch not in ("", self.epoch))

    def welcome(self, member: Member, gap: Mapping[str, Any]) -> Encoded:
        """The first event of a connection, and of a new beginning."""
        others = (other.name for key, other in self.roster.items() if key != member.key)
        return encode(
            {
                "type": "welcome",
                "name": member.name,
                "title": self.config.title,
                "members": [member.name, *itertools.islice(others, ROSTER_NAMES - 1)],
                "count": len(self.roster) + (member.key not in self.roster),  # not yet back on it after a reset
                "epoch": self.epoch,
                "seq": self.seq,
                "limits": {"text": TEXT_CHARS, "history": self.config.history},
                "hosts": self.hosts(),
                **gap,
                **({"muted": self.muted()} if self.is_host(member) else {}),
                **self.state.standing(member.sid, member.name),
            }
        )

    def muted(self) -> dict[str, int]:
        """Who on the roster is muted, and till when."""
        roster = self.roster.values() if self.state.muted else ()
        times = {member.name: self.state.muted_until(member.sid, member.name) for member in roster}
        return {name: until for name, until in times.items() if until}

    # --- what the feed brings ---

    def adopt(
        self, epoch: str, last: Id, names: Mapping[str, str], events: Sequence[Event], state: Mapping[str, str]
    ) -> None:
        """Takes what the store holds for the truth: its newest entry's id, the roster (key -> str of the Member) and
        the fields of the State, both as they were before `events` or later, and these, oldest first. Who listens
        already is told as if just back: recovered or reset.
        """
        seen, known = ResumePoint(self.seq, self.epoch), self.ring.find(self.seq)
        listeners, self.listeners = self.listeners, set()
        self.restore(names, events, state)
        self.listeners = listeners
        self.epoch, self.seq, self.ts = epoch, *((events[-1].seq, events[-1].ts) if events else (0, 0))
        self.place = self.notices_after = (*last, END_OF_ENTRY)
        if known and (found := self.ring.find(known.seq)) and not found.is_same(known):
            seen = seen._replace(epoch="another")  # nobody's: told as reset
        for listener in tuple(listeners):
            self.replay(listener, seen)

    def restore(self, names: Mapping[str, str], events: Sequence[Event], state: Mapping[str, str]) -> None:
        """Begins anew with these, told to nobody."""
        self.state = State()
        self.state.load(state, events[-1].seq if events else 0)
        for table in (self.ring.kept, self.roster, self.kept_names):
            table.clear()
        self.sessions = {member.sid: member for member in self.sessions.values() if member.listeners}
        for who, name in (value.split(" ", 1) for value in names.values() if " " in value):
            sid, _, origin = who.partition("@")
            if not self.state.waits(self.state.barred, marks_of(sid, name), events[-1].ts if events else 0):
                self.enter(sid, name, origin)  # else a daemon has written it late, when that one had been removed
        pinned = self.state.pinned
        self.apply(self.state.restored(events))
        self.notices.clear()
        if pinned and self.state.pinned and self.state.pinned["seq"] == pinned["seq"]:
            self.state.pinned = pinned  # it may be older than the texts that were read of the feed
        for seq in self.state.notes:
            self.show_note(seq)
        self.state.take_changes()

    def apply(self, events: Iterable[Event]) -> None:
        """Takes what the feed brought in one turn, in its order, and hands it to every listener as one batch."""
        encoded: list[Encoded] = []
        for type, run in itertools.groupby(events, key=lambda event: event.type):
            if type == "message":
                encoded += map(self.add_message, run)
            elif type == "joined":
                encoded += self.add_joined([*run])
            elif type == "left":
                encoded += self.notice(type, [event for event in run if self.exit(event)])
            else:
                encoded += self.add_acts(run)
        if encoded and self.listeners:
            self.send(Batch(*encoded))

    def add_message(self, event: Event) -> Encoded:
        self.seq, self.ts, self.place = event.seq, event.ts, event.place
        if self.state.mode["every"]:
            self.state.apply(event)
        return self.ring.append(event)

    def add_joined(self, events: Sequence[Event]) -> list[Encoded]:
        """Who has come; and who is a host now, be it that they come as one or have become one."""
        new = [event for event in events if self.enter(event.sid, event.name, event.details.get("origin", ""))]
        encoded = self.notice("joined", new)
        for event in (hosts := [event for event in events if "host" in event.details]):
            self.state.apply(event)
        if hosts:
            encoded.append(self.keep_notice(hosts[-1], encode({"type": "hosts", "names": self.hosts()})))
        return encoded

    def notice(self, type: str, events: Sequence[Event]) -> list[Encoded]:
        """One event for however many came or went in this turn."""
        if not events:
            return []
        last, names = events[-1], [event.details.get("name", event.name) for event in events]
        frame = {"type": type, "names": names, "count": len(self.roster), "ts": last.ts}
        return [self.keep_notice(last, encode(frame))]

    def keep_notice(self, event: Event, encoded: Encoded) -> Encoded:
        """For those who poll."""
        if len(self.notices) == self.notices.maxlen:
            self.notices_after = self.notices[0][0].place
        self.notices.append((event, encoded))
        self.ts, self.place = event.ts, event.place
        return encoded

    def add_acts(self, events: Iterable[Event]) -> list[Encoded]:
        """What everybody is told of these; reactions to one message are one event."""
        last: dict[object, Event] = {}
        for event in filter(self.act, events):
            about = event.details["to"] if event.details.get("kind") == "react" else event.place
            last.pop(about, None)
            last[about] = event
        encoded: list[Encoded] = []
        for event in last.values():
            if event.type == "removed":
                encoded += self.notice("left", [event])
                continue
            if event.type == "note":
                self.show_note(event.details["to"])
            told = self.keep_notice(event, self.state.encode(event))
            if event.type == "muted":
                for listener in [listener for listener in self.listeners if self.concerns(event, listener.member)]:
                    listener.send(Batch(told))
            else:
                encoded.append(told)
        return encoded

    def act(self, event: Event) -> bool:
        """Does what was to be done; whether that is news."""
        self.state.apply(event, self.ring.find(event.details.get("to", 0)))
        if event.type == "cleared" or event.details.get("kind") == "delete":
            self.forget_pins()
        if event.type == "cleared":
            self.ring.kept.clear()
        elif event.type == "removed":
            sid, name = event.details.get("sid", ""), event.details["name"]
            return self.exit(event._replace(type="left", sid=sid, name=name, text=LOGOUT))
        return True

    def show_note(self, seq: int) -> None:
        """The ring has a message with what was done to it."""
        note, message = self.state.notes.get(seq), self.ring.find(seq)
        if note and message:
            message = note.deleted._replace(place=message.place) if note.deleted else message
            self.ring.replace(message, encode_message(message, note.reactions()))

    def forget_pins(self) -> None:
        """A notice of what was pinned may hold what is deleted now: whoever polls is told what is pinned instead."""
        for at, (event, _) in enumerate(self.notices):
            if event.details.get("kind") == "pin":
                self.notices[at] = event, self.state.encode(event)

    # --- names ---

    def enter(self, sid: str, name: str, origin: str = "") -> bool:
        """Puts a session on the roster; whether it wasn't there."""
        key = name_key(name)
        member = self.sessions.get(sid)
        if member is None or member.key != key:
            member = self.sessions[sid] = Member(sid, name, key)
        member.origin = origin or member.origin
        news = self.roster.get(key) is not member
        self.roster[key] = member
        self.kept_names.pop(key, None)
        return news

    def exit(self, left: Event) -> bool:
        """Takes a session off the roster; whether it was there. Its name is kept for it, unless it was given back."""
        key = name_key(left.name)
        if self.owner(key) != left.sid:
            return False
        member = self.roster.pop(key, None)
        if member and not member.listeners:
            self.sessions.pop(member.sid, None)
        if left.text == LOGOUT:
            self.kept_names.pop(key, None)
            self.state.apply(left)
        elif member and self.config.name_seconds and not self.is_host(member):  # whose name the State keeps
            self.kept_names[key] = member.sid, left.ts + int(1000 * self.config.name_seconds)
        return member is not None

    def forget_names(self, now: int) -> None:
        """Frees the names whose owners have been away for too long; `now` in ms of the store's clock."""
        for key in [key for key, (_, until) in self.state.hosts.items() if until <= now and key not in self.roster]:
            del self.state.hosts[key]
        while self.kept_names and (first := next(iter(self.kept_names.items())))[1][1] <= now:
            del self.kept_names[first[0]]

    def owner(self, key: str) -> str:
        """The sid of who has a name, or left it a short while ago; "" if it is free."""
        member = self.roster.get(key)
        return member.sid if member else (self.kept_names.get(key) or self.state.hosts.get(key, ("", 0)))[0]

    def free_variant(self, name: str) -> str:
        """A name like this one that nobody has; "" if there is none. A look-alike's is that of the original."""
        member = self.roster.get(name_key(name))
        name = member.name if member else name
        return next((new for new in variants(name) if not self.owner(name_key(new))), "")


# === Outbox ===========================================================================================================
# What members want to be stored waits here until the feed has it. What becomes of it is decided by what the feed says
# then: who has the name, and whether the same cid has been stored before.

Outcome = Event | Refused
Done = Callable[[Outcome], None]


@dataclasses.dataclass(slots=True, eq=False)
class Proposal:
    """An event that waits in the outbox to be committed: without seq, ts and place, and with what the client asks for
    as its details, of which `Outbox.details` makes those that are stored.
    """

    event: Event
    expires: float  # in s of the loop's clock
    member: Member | None = None  # None: another daemon's, see `wishes`
    done: list[Done] = dataclasses.field(default_factory=list)  # they get the stored Event, or the Refused
    wished: bool = False  # others have been asked to commit it

    @property
    def id(self) -> tuple[str, str]:
        """Under which the feed knows it: this is stored once, however often and by whomever it is tried."""
        return self.event.sid, self.event.cid


class Outbox:
    """The proposals of members here, in order of arrival, and those that other daemons wish for."""

    def __init__(self, room: Room, config: Config) -> None:
        self.room, self.config = room, config
        self.waiting: dict[tuple[str, str], Proposal] = {}
        self.stored: collections.OrderedDict[tuple[str, str], int] = collections.OrderedDict()  # (sid, cid) -> seq
        # A cid of the daemon's own: none for the client, but it tells a second try from a second message.
        self.cids, self.counter = f"~{secrets.token_hex(8)}-", itertools.count()
        self.bell = asyncio.Event()  # there is something to do for the Feed
        self.empty = asyncio.Event()
        self.empty.set()
        self.reactions: dict[tuple[str, int], Proposal] = {}  # browser and message -> wait for their next entry
        self.reacted = -math.inf  # when they had the last one, in s of the loop's clock
        self.grouped = 0  # events in the last group

    def act(self, member: Member, act: Event, done: Done) -> None:
        """Takes what a client asks for. `done` gets the refusal, or the event, be it an older one with the same cid.
        Raises Refused.
        """
        if (seq := self.stored.get((member.sid, act.cid))) is not None:
            found = self.room.ring.find(seq) if act.type == "message" else None  # else as it is asked for now
            done(found or act._replace(seq=seq, ts=self.room.ts, sid=member.sid, name=member.name))
        elif len(self.waiting) + len(self.reactions) >= OUTBOX_PROPOSALS:
            raise Refused("unavailable", cid=act.cid, retry_after=self.config.retry_seconds)
        else:
            self.propose(act.type, member, done, act.cid, text=act.text, details=act.details)

    def react(self, proposal: Proposal) -> None:
        """Reactions share entries; of one person's to a message only the last one counts."""
        about = proposal.event.sid[:BROWSER_CHARS], proposal.event.details["to"]
        if before := self.reactions.pop(about, None):
            proposal.done[:0] = before.done
        loop = asyncio.get_running_loop()
        if not self.reactions:
            loop.call_at(max(loop.time(), self.reacted + REACT_SECONDS), self.release_reactions)
        self.reactions[about] = proposal

    def release_reactions(self) -> None:
        """All that have come since the last ones."""
        self.reacted = asyncio.get_running_loop().time()
        for proposal in self.reactions.values():
            self.put(proposal)
        self.reactions.clear()

    async def enter(self, sid: str, name: str, origin: str = "", *, host: bool = False) -> Member:
        """Puts a session on the roster under a clean name, or finds it there; `host`: as a host. Raises Refused (taken,
        removed, unavailable).
        """
        member = self.room.sessions.get(sid)
        if member is None or member.key != name_key(name):
            member = Member(sid, name, name_key(name), origin)
        if self.room.roster.get(member.key) is not member or (host and not self.room.is_host(member)):
            future: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
            details = {"origin": origin} | ({"host": True} if host else {})
            self.propose("joined", member, future.set_result, details=details)
            if isinstance(outcome := await future, Refused):
                raise outcome
        entered = self.room.roster.get(member.key)
        if entered is None or entered.sid != sid:  # it has left again meanwhile
            raise Taken(name)
        return entered

    async def exit(self, sid: str, name: str) -> None:
        """Gives a name back, and closes the session everywhere; if the store is away, as soon as it is back."""
        if self.room.owner(name_key(name)) == sid:
            member = self.room.sessions.get(sid) or Member(sid, name, name_key(name))
            written, cid = asyncio.Event(), f"~logout-{self.room.ts}"
            self.propose("left", member, lambda _: written.set(), cid, math.inf, text=LOGOUT)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(written.wait(), self.config.confirm_seconds)

    def propose(
        self, type: str, member: Member, done: Done | None = None, cid: str = "", patience: float = 0, **fields: Any
    ) -> None:
        """Has an event of this member, with these fields, committed within so many seconds, or refused."""
        expires = asyncio.get_running_loop().time() + (patience or self.config.confirm_seconds)
        event = Event(type, 0, 0, member.sid, cid or f"{self.cids}{next(self.counter)}", member.name, **fields)
        proposal = Proposal(event, expires, member, [done] if done else [])
        (self.react if event.details.get("kind") == "react" else self.put)(proposal)

    def put(self, proposal: Proposal) -> None:
        """Lets it wait, and wakes the Feed. The same proposal once more only adds to who is told."""
        self.empty.clear()
        self.bell.set()
        waiting = self.waiting.setdefault(proposal.id, proposal)
        if waiting is not proposal:
            waiting.done += [done for done in proposal.done if done not in waiting.done]

    def settle(self, id: tuple[str, str], outcome: Outcome) -> None:
        """Takes a proposal out of the outbox and tells whoever waits for it."""
        if proposal := self.waiting.pop(id, None):
            if isinstance(outcome, Refused) and not id[1].startswith("~"):  # a cid that its author knows
                outcome.cid = id[1]
            for done in proposal.done:
                done(outcome)
            if not self.waiting:
                self.empty.set()

    def expire(self, now: float) -> None:
        """Refuses what has waited too long (G1). Should it be stored after all, its cid prevents a double."""
        for id in [id for id, proposal in self.waiting.items() if proposal.expires <= now]:
            self.settle(id, Refused("unavailable", retry_after=self.config.retry_seconds))

    async def drain(self) -> None:
        """Waits until all that was said is stored or refused, for a while; then refuses the rest."""
        self.release_reactions()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.empty.wait(), self.config.drain_seconds)
        self.expire(math.inf)

    # --- for the Feed ---

    async def gather(self) -> None:
        """While many talk, lets the loop turn as long as more comes: a larger entry costs hardly more than a small one.
        Who talks alone never waits for that.
        """
        before = -1
        while self.grouped > 1 and before < len(self.waiting) < GROUP_EVENTS:
            before = len(self.waiting)
            for _ in range(GATHER_TURNS):
                await asyncio.sleep(0)

    def group(self, id: Id, now: int) -> list[Event]:
        """The events of the entry with that id: what is to be committed, given what was absorbed. The rest is answered.

        Who talks, is connected here, and isn't on the roster any more (a lease was lost) joins first.
        """
        events: list[Event] = []
        seq, ts, size = self.room.seq, max(self.room.ts, now), 0
        owners: dict[str, tuple[str, bool]] = {}  # key -> sid, and whether it is on the roster, after these events
        together = {"joined", "left", "note"} | (set() if self.room.state.mode["every"] else {"message"})
        for proposal in list(itertools.islice(self.waiting.values(), GROUP_EVENTS)):
            asked = proposal.event
            key = name_key(asked.name)
            owner, present = owners.get(key) or (self.room.owner(key), key in self.room.roster)
            if verdict := self.verdict(proposal, owner, present, ts):
                self.settle(proposal.id, verdict)
                continue
            alone = asked.type not in together  # on it depend the verdicts on what comes behind it
            if alone and events:
                break
            if not present and asked.type not in ("joined", "left"):  # who acts, and was lost, is back
                details = proposal.member.joining if proposal.member else NO_DETAILS
                place = *id, len(events)
                events.append(Event("joined", seq, ts, asked.sid, "", asked.name, place=place, details=details))
            seq += asked.type == "message"
            place, details = (*id, len(events)), self.details(asked, ts)
            events.append(Event(asked.type, seq, ts, *proposal.id, asked.name, asked.text, place, details))
            owners[key] = ("", False) if asked.type == "left" else (asked.sid, True)
            size += len(asked.text)
            if alone or size > ENTRY_CHARS:
                break
        self.grouped = len(events)
        return events

    def details(self, asked: Event, now: int) -> Mapping[str, Any]:
        """Those that are stored, which say all that is needed to apply the event."""
        room, details = self.room, asked.details
        if asked.type == "message":
            if details and (answered := room.ring.find(details.get("re", 0))):
                details = {**details, "answered": answered.name}
            host = room.state.hosts and room.state.is_host(asked.sid, name_key(asked.name))
            return {"host": True, **details} if host else details
        if asked.type in ("muted", "removed") and (target := self.target(details["name"])):
            until = now + 1000 * details["seconds"] if details["seconds"] else 0
            alone = target.origin and [other.origin for other in room.roster.values()].count(target.origin) == 1
            bars = {"origin": target.origin} if alone and asked.type == "removed" else {}
            return {**details, "name": target.name, "sid": target.sid, "until": until, **bars}
        if details.get("kind") == "delete":
            return {**details, "by": "author" if self.is_author(asked) else "host"}
        return details

    def target(self, name: str) -> Member | None:
        """Whom an act means: who has that name, or left it a short while ago."""
        key = name_key(name)
        if sid := self.room.owner(key):
            return self.room.roster.get(key) or Member(sid, name, key)
        return None

    def is_author(self, asked: Event) -> bool:
        found = self.room.ring.find(asked.details["to"])
        return found is not None and found.sid[:BROWSER_CHARS] == asked.sid[:BROWSER_CHARS]

    def verdict(self, proposal: Proposal, owner: str, present: bool, now: int) -> Outcome | None:
        """What a proposal gets that is not to be committed, else None. `owner` has its name, or has it kept."""
        asked, state = proposal.event, self.room.state
        ours = owner == asked.sid
        if asked.type == "left":
            return None if ours and (present or asked.text == LOGOUT) else self.unchanged(asked)
        if state.barred and (wait := state.waits(state.barred, marks_of(asked.sid, asked.name), now)):
            return Refused("removed", retry_after=wait)
        if asked.type == "joined":
            return self.verdict_on_joined(asked, owner, present)
        here = proposal.member and proposal.member.listeners
        if not ((ours and present) or (here and owner in ("", asked.sid))):
            return Refused("name-lost", name=asked.name)
        return self.verdict_on_message(asked, now) if asked.type == "message" else self.verdict_on_act(asked)

    def unchanged(self, asked: Event) -> Event:
        """It is so already."""
        return asked._replace(seq=self.room.seq, ts=self.room.ts)

    def verdict_on_joined(self, asked: Event, owner: str, present: bool) -> Outcome | None:
        key, state = name_key(asked.name), self.room.state
        becomes_host = "host" in asked.details and not state.is_host(asked.sid, key)
        inherits = becomes_host and not present and key in state.hosts  # a host's, from elsewhere
        if owner not in ("", asked.sid) and not inherits:
            return Taken(asked.name)
        return self.unchanged(asked) if owner == asked.sid and present and not becomes_host else None

    def verdict_on_message(self, asked: Event, now: int) -> Refused | None:
        state = self.room.state
        if asked.details.get("re", 0) > self.room.seq:
            return Refused("no-message")
        if (not state.muted and state.mode == OPEN_MODE) or state.is_host(asked.sid, name_key(asked.name)):
            return None
        return state.cannot_write(asked.sid, asked.name, now)

    def verdict_on_act(self, asked: Event) -> Outcome | None:
        """Hosts may do all of them, authors delete their own messages, and everybody reacts."""
        state, details = self.room.state, asked.details
        kind, to = details.get("kind"), details.get("to", 0)
        owns = kind == "react" or (kind == "delete" and self.is_author(asked))
        if not (owns or state.is_host(asked.sid, name_key(asked.name))):
            return Refused("not-host")
        if asked.type in ("muted", "removed"):
            if (target := self.target(details["name"])) is None:
                return Refused("no-member", name=shown(details["name"]))
            return Refused("is-host", name=target.name) if state.is_host(target.sid, target.key) else None
        if asked.type != "note" or (kind == "pin" and not details["value"]):
            return None
        if kind == "delete" and to > state.cleared and state.is_deleted(to):
            return self.unchanged(asked)
        return Refused("no-message") if state.is_deleted(to) or not self.room.ring.find(to) else None

    def absorbed(self, events: Iterable[Event]) -> None:
        """The feed has these: whoever waits for one is told, and remembers it against doubles."""
        for event in events:
            if event.cid:
                self.stored[event.sid, event.cid] = event.seq
                self.settle((event.sid, event.cid), event)
        while len(self.stored) > INDEX_EVENTS:
            self.stored.popitem(last=False)

    def wishes(self) -> list[Proposal]:
        """What other daemons have not been asked yet to commit for us, as much as one entry takes."""
        ours = [each for each in self.waiting.values() if each.member and not each.wished][:GROUP_EVENTS]
        sizes = itertools.accumulate((len(each.event.text) for each in ours), initial=0)
        return [each for each, before in zip(ours, sizes, strict=False) if before <= ENTRY_CHARS]

    def take_wishes(self, events: Iterable[Event]) -> None:
        """Another daemon asks us to commit these. It judges by itself what it then finds in the feed."""
        expires = asyncio.get_running_loop().time() + self.config.confirm_seconds
        for event in events:
            if (event.sid, event.cid) not in self.stored and len(self.waiting) < OUTBOX_PROPOSALS:
                self.put(Proposal(event, expires))


# === Memory ===========================================================================================================
# What a daemon remembers of the feed, which is more than the room: what is in which entry, so that entries can be given
# back, and how much the store holds.


class Held(NamedTuple):
    """What is in an entry, and how many messages and bytes there were up to its end."""

    id: Id
    events: Sequence[Event]
    said: int
    size: int


def exceed(held: Sequence[Held], messages: float, size: float) -> bool:
    """Whether there are more after the first of these."""
    return held[-1].said - held[0].said > messages or held[-1].size - held[0].size > size


class Memory:
    """The newest entries, without deleted texts, to put back what the store forgets; and of all that have messages how
    much they hold, to have the store forget the oldest.
    """

    def __init__(self, room: Room) -> None:
        self.room = room
        self.last = NO_ENTRY  # the newest
        self.said = self.size = 0  # messages and bytes in all that were added
        self.kept: collections.deque[Held] = collections.deque()  # the newest
        self.extent: collections.deque[Held] = collections.deque()  # those with messages, without what they hold
        self.notices: collections.deque[Id] = collections.deque()  # those without a message
        self.cleared: Event | None = None  # the last time
        # What the store is still to forget: these entries and pictures, and all from before the room was cleared.
        self.to_erase: set[Id] = set()
        self.pictures: set[str] = set()
        self.to_trim = False

    def add(self, entry: Entry, events: Sequence[Event]) -> None:
        """The next entry, with the events in it."""
        self.last = entry.id
        if messages := len([event for event in events if event.type == "message"]):
            self.said += messages
            self.size += entry.size
            self.extent.append(Held(entry.id, (), self.said, self.size))
        else:
            self.notices.append(entry.id)
            for event in events:
                if event.type == "cleared":
                    self.clear(event)
        if entry.raw:
            self.kept.append(Held(entry.id, events, self.said, self.size))
            while exceed(self.kept, RING_MESSAGES, RING_BYTES):
                self.kept.popleft()

    def shrink(self) -> Id | None:
        """Forgets the oldest entries where the store holds too much; which one it is to keep as its oldest then."""
        slack = 1 + FEED_SLACK
        if not self.extent or not exceed(self.extent, slack * FEED_MESSAGES, slack * FEED_BYTES):
            return None
        while exceed(self.extent, FEED_MESSAGES, FEED_BYTES):
            self.extent.popleft()
        return self.extent[0].id

    def since(self, id: Id) -> list[Entry]:
        return [Entry(held.id, encode_events(held.events)) for held in self.kept if held.id > id]

    def differs(self, entry: Entry) -> bool:
        """Whether this is not what was absorbed under its id: the store holds another history."""
        if not entry.raw:  # deleted since
            return False
        events = decode_events(entry.raw, entry.id)
        ours = next((held.events for held in reversed(self.kept) if held.id == entry.id), events)
        return [*ours] not in (events, [*map(self.blank, events)])

    def blank(self, event: Event) -> Event:
        """What may be kept of an event."""
        if not self.is_deleted(event):
            return event
        details = {name: value for name, value in event.details.items() if name != "picture"}
        return event._replace(text="", details=details)

    def is_deleted(self, event: Event) -> bool:
        return event.type == "message" and self.room.state.is_deleted(event.seq)

    def erase(self, seqs: Iterable[int]) -> dict[str, str]:
        """Forgets the texts of these messages, of those that are deleted. The fields of the State that are to be stored
        before the store forgets them, by every daemon: who has committed that may have been killed before it could.
        """
        found = {str(seq): kept.entry_id for seq in seqs if (kept := self.room.ring.find(seq))}
        self.blank_entries({*found.values()})
        return {name: self.room.state.field(name) for name in found}

    def blank_entries(self, ids: set[Id]) -> None:
        """Forgets what is deleted in these entries; those that hold nothing else go."""
        for at, held in enumerate(self.kept):
            deleted = [*filter(self.is_deleted, held.events)] if held.id in ids else []
            if deleted:
                self.pictures |= {event.details["picture"] for event in deleted if "picture" in event.details}
                if len(deleted) == len(held.events):
                    self.to_erase.add(held.id)
                self.kept[at] = held._replace(events=[*map(self.blank, held.events)])

    def clear(self, cleared: Event) -> None:
        """The room was cleared: what stood before that is forgotten."""
        for entries in (self.kept, self.extent):
            while entries and entries[0].id < cleared.entry_id:
                entries.popleft()
        self.notices = collections.deque(notice for notice in self.notices if notice >= cleared.entry_id)
        self.cleared, self.to_trim = cleared, True

    def drop_notices(self) -> bool:
        """Forgets the oldest entries without a message, once they are too many; whether there were any."""
        if len(self.notices) <= (1 + FEED_SLACK) * FEED_NOTICES:
            return False
        surplus = {self.notices.popleft() for _ in range(len(self.notices) - FEED_NOTICES)}
        self.kept = collections.deque(held for held in self.kept if held.id not in surplus)
        self.to_erase |= surplus
        return True

    def erase_again(self) -> None:
        """The store is in an older state, and may hold what was deleted since."""
        self.blank_entries({held.id for held in self.kept})
        self.to_trim = self.cleared is not None

    async def erase_from(self, store: Store) -> None:
        """Has the store forget what it is to. Raises STORE_ERRORS."""
        cleared = self.cleared if self.to_trim else None
        if self.to_erase or self.pictures or cleared:
            await store.forget(self.to_erase, self.pictures, cleared)
        self.to_erase.clear()
        self.pictures.clear()
        self.to_trim = False


async def read_feed(store: Store, messages: int) -> list[tuple[Entry, list[Event], list[Event]]]:
    """All that the store holds, oldest first: entries, their events, and those of them that count. Of what is older
    than so many messages only the index is needed. Raises STORE_ERRORS.
    """
    read: list[tuple[Entry, list[Event], list[Event]]] = []
    said = notices = 0
    async for page in store.pages():
        for entry in page:
            events = decode_events(entry.raw, entry.id)
            if said > messages:
                entry, events = entry._replace(raw=b""), [event._replace(text="") for event in events]
            talk = [event for event in events if event.type == "message"]
            # Of the older notices some have been deleted: the roster and the state know better.
            read.append((entry, events, talk if notices >= FEED_NOTICES else events))
            said, notices = said + len(talk), notices + (not talk)
    return read[::-1]


# === Feed =============================================================================================================
# The room is the sum of the feed. One task, `run`, owns what is absorbed: it commits what waits in the outbox, takes
# what the reader brings from other daemons, and mends what the store has forgotten. All others only ring.


class Gap(Exception):  # noqa: N818 - a fact about the feed
    """The store doesn't hold what would follow what was absorbed so far."""


class Feed:
    """Keeps the room the sum of the feed, and commits to the feed what waits in the outbox."""

    def __init__(self, store: Store, outbox: Outbox) -> None:
        self.store, self.outbox, self.room, self.config = store, outbox, outbox.room, outbox.config
        self.bell = outbox.bell
        self.arrived: asyncio.Queue[list[Entry]] = asyncio.Queue(1)  # from the reader
        self.read_to = NO_ENTRY  # id of the newest entry that the reader brought
        self.memory = Memory(self.room)  # what was absorbed
        self.names: dict[str, str] = {}  # to be written beside the feed; "": is not on the roster any more
        self.state: dict[str, str] = {}  # ... and these fields of the State
        self.unsure = True  # the store may hold something else than was absorbed: look
        self.confirmed = False  # it was seen to hold that, since the last tick
        self.asked: set[asyncio.Event] = set()  # who waits for the next look
        self.run_id = ""  # of the Redis that was looked at last
        self.quiet_until = 0.0  # in s of the loop's clock: others put back what the store forgot
        self.losses = 0  # commits in a row
        self.stranded = asyncio.Event()  # somebody who is connected here is not on the roster
        self.answers = {"reading": True, "writing": True}  # the store, or is it away
        self.tasks: list[asyncio.Task[NoReturn]] = []

    async def run(self) -> NoReturn:
        """Absorbs what the reader brings and commits what waits in the outbox, for ever."""
        failures = 0
        while True:
            await self.bell.wait()
            self.bell.clear()
            try:
                await self.step()
                failures = 0
            except STORE_ERRORS as error:
                failures += 1
                await self.pause_after_failure("writing", error, failures)

    async def step(self) -> None:
        """Whatever there is to do. Raises STORE_ERRORS."""
        try:
            if self.unsure:
                await self.look()
            while not self.arrived.empty():
                self.absorb(self.arrived.get_nowait())
            await self.commit()
        except Gap:
            await self.reload()
            self.ring_for_look()
        if self.memory.drop_notices() or self.memory.to_trim:  # acts go from the store: first what came of them
            self.state |= self.room.state.fields()
        if self.names or self.state:
            await self.store.write_names(self.names, self.state)
            self.names.clear()
            self.state.clear()
        await self.memory.erase_from(self.store)

    # --- committing ---

    async def commit(self) -> None:
        """One entry with what waits in the outbox. Raises Gap and STORE_ERRORS; then nobody knows what was stored."""
        idle = not self.outbox.waiting and self.answers["writing"]
        if idle or asyncio.get_running_loop().time() < self.quiet_until:
            return
        await self.outbox.gather()
        id = self.memory.last[0], self.memory.last[1] + 1
        events = self.outbox.group(id, self.store.now())
        if events or not self.answers["writing"]:  # an empty entry tries a store that took nothing
            await self.append(Entry(id, raw := encode_events(events), size=len(raw)), events)
        if self.outbox.waiting:
            self.bell.set()

    async def append(self, entry: Entry, events: Sequence[Event]) -> None:
        """Stores an entry and absorbs it, unless another daemon was first. Raises Gap and STORE_ERRORS."""
        if not await self.store.append(entry, self.memory.shrink()):
            await self.lose()
            return
        self.losses, self.confirmed = 0, True
        self.note_answer("writing")
        self.memory.add(entry, events)
        self.tell(events)
        for event in events:
            if event.type in ("joined", "left", "removed"):
                key = name_key(event.details.get("name", event.name))
                self.names[key] = str(self.room.roster.get(key, ""))
        self.state |= self.room.state.take_changes()

    async def lose(self) -> None:
        """Reads what another daemon has committed first. Who is far from the store would lose for ever: after the
        second time it asks the others to commit its own; (sid, cid) prevents doubles.
        """
        self.losses += 1
        if self.losses > 1 and (wishes := self.outbox.wishes()):
            await self.store.wish(encode_events(each.event for each in wishes))
            self.losses = 0
            for each in wishes:
                each.wished = True
        before = self.memory.last
        await self.read_on()
        if self.memory.last == before:
            self.ring_for_look()
        self.bell.set()

    # --- absorbing ---

    async def follow(self) -> NoReturn:
        """The reader: hands over what other daemons commit, for ever, and notices when the store is gone."""
        failures, wish = 0, b"%d-0" % self.store.now()
        while True:
            try:
                self.read_to = max(self.read_to, self.memory.last)
                entries, wishes = await self.store.follow(self.read_to, wish)
                self.note_answer("reading")
                failures = 0
            except STORE_ERRORS as error:
                failures += 1
                await self.pause_after_failure("reading", error, failures)
                continue
            for id, raw in wishes:
                wish = id
                self.outbox.take_wishes(decode_events(raw))
            if entries:
                self.read_to = entries[-1].id
                await self.arrived.put(entries)
                self.bell.set()

    async def read_on(self) -> None:
        """Absorbs what the store holds beyond us. Raises Gap and STORE_ERRORS."""
        while entries := await self.store.page(id_text(self.memory.last), "+", READ_ENTRIES):
            if self.memory.differs(entries[0]):
                raise Gap
            self.absorb(entries)
            if len(entries) < READ_ENTRIES:
                break
        self.confirmed = True

    def absorb(self, entries: Iterable[Entry]) -> None:
        """Takes entries in their order, each once. Raises Gap where one isn't the next."""
        absorbed: list[Event] = []
        seq = self.room.seq
        try:
            for entry in entries:
                ms, n = self.memory.last
                if entry.id <= (ms, n):
                    continue
                events = decode_events(entry.raw, entry.id)
                seqs = [event.seq for event in events if event.type == "message"]
                if entry.id != (ms, n + 1) or seqs != [*range(seq + 1, seq + 1 + len(seqs))]:
                    raise Gap
                seq += len(seqs)
                self.memory.add(entry, events)
                absorbed += events
        finally:
            self.tell(absorbed)
            self.room.state.take_changes()  # who has committed them stores that

    def tell(self, events: Sequence[Event]) -> None:
        """Lets the room and whoever waits know what was absorbed."""
        self.room.apply(events)
        self.outbox.absorbed(events)
        for event in events:
            if event.type != "message":
                self.heed(event)

    def heed(self, event: Event) -> None:
        """Does what a notice asks for outside of the room."""
        details = event.details
        member = self.room.sessions.get(details.get("sid", "") if event.type == "removed" else event.sid)
        listeners = tuple(member.listeners) if member else ()
        match event.type:
            case "left" if event.text == LOGOUT:
                for listener in listeners:
                    listener.shut(4401, LOGOUT)
            case "left" if member:  # it lapsed, but somebody is here: the lease was lost, or a clock jumped
                self.stranded.set()
            case "removed":
                for listener in listeners:
                    listener.turn_away(Refused("removed", retry_after=details["seconds"]))
            case "note" if details["kind"] == "delete":
                self.state |= self.memory.erase([details["to"]])

    # --- where the store holds something else ---

    def ring_for_look(self) -> None:
        self.unsure = True
        self.bell.set()

    async def pause_after_failure(self, what: str, error: Exception, failures: int) -> None:
        self.note_answer(what, error)
        self.ring_for_look()
        await asyncio.sleep(backoff(failures, self.config.retry_seconds))

    async def catch_up(self, seen: ResumePoint) -> None:
        """Looks into the store where a client has seen more than this daemon. Raises Refused: that isn't known now."""
        if not self.room.is_ahead(seen):
            return
        looked = asyncio.Event()
        self.asked.add(looked)
        self.ring_for_look()
        try:
            await asyncio.wait_for(looked.wait(), self.config.store_seconds)
        except TimeoutError:
            raise Refused("unavailable", retry_after=self.config.retry_seconds) from None
        finally:
            self.asked.remove(looked)

    async def look(self) -> None:
        """Compares the newest entry of the store with ours, and mends what is behind. Raises Gap and STORE_ERRORS."""
        asked, self.unsure = list(self.asked), False
        if not self.room.available:  # a Redis that was started anew may have forgotten
            before, (self.run_id, _) = self.run_id, await self.store.server()
            if self.run_id != before:
                self.keep_quiet()
        newest = await self.store.newest()
        if newest and self.memory.differs(newest):
            raise Gap
        if newest is None or newest.id < self.memory.last:
            await self.put_back(newest.id if newest else NO_ENTRY)
        elif newest.id > self.memory.last:
            await self.read_on()
            if self.memory.last < newest.id:
                raise Gap
        for looked in asked:
            looked.set()

    def keep_quiet(self) -> None:
        """Commits nothing for a while, so that other daemons can put back what the store forgot."""
        loop = asyncio.get_running_loop()
        self.quiet_until = loop.time() + self.config.repair_seconds
        loop.call_later(self.config.repair_seconds, self.bell.set)

    async def put_back(self, since: Id) -> None:
        """Gives back to the store the entries after `since`, which it has forgotten, as they were."""
        names = {member.key: str(member) for member in self.room.roster.values()}
        await self.store.write_names(names, {"epoch": self.room.epoch, **self.room.state.fields()}, anew=True)
        forgotten = self.memory.since(since)
        for at in range(0, len(forgotten), READ_ENTRIES):
            await self.store.put_back(forgotten[at : at + READ_ENTRIES])
        self.memory.erase_again()
        log.warning("the store had forgotten a part of the history: %d entries were put back", len(forgotten))
        self.keep_quiet()

    async def reload(self) -> None:
        """Reads all that the store holds, and goes on from there. Raises STORE_ERRORS."""
        newest = await self.store.newest()
        if newest is None:
            return  # the next look deals with that
        read = await read_feed(self.store, self.room.ring.size)
        names, state = await self.store.read_state()  # after the feed: it tells what has been erased there
        if self.room.epoch:
            log.warning("the history in the store was replaced or damaged: it is read anew")
        self.memory = Memory(self.room)
        for entry, events, _ in read:
            self.memory.add(entry, events)
        self.read_to = self.memory.last = max(self.memory.last, newest.id)  # the newest entries may have been deleted
        history = [event for *_, events in read for event in events]
        epoch = state.pop("epoch", "") or str(newest.id[0])
        self.room.adopt(epoch, self.memory.last, names, history, state)
        self.state |= self.memory.erase(self.room.state.notes)
        self.outbox.stored.clear()
        self.outbox.absorbed(history)  # another try may have stored what waits here
        self.stranded.set()  # whoever is connected here and not on the roster joins again

    def note_answer(self, what: str, error: Exception | None = None) -> None:
        """How the store answers; everybody is told when that changes: one line, one event."""
        self.answers[what] = error is None
        if self.room.set_available(all(self.answers.values())):
            if error:
                log.error("the message store is away: %s", str(error) or type(error).__name__)
            else:
                log.warning("the message store is back")

    # --- its life ---

    async def open(self) -> None:
        """Reads what the store holds; the room is then ready. Raises STORE_ERRORS."""
        await self.store.read_clock()
        self.run_id, up = await self.store.server()
        if self.store.shared and up < YOUNG_SECONDS:
            self.keep_quiet()
        while not self.room.epoch:
            if await self.store.newest() is None:
                if self.store.shared and (up < YOUNG_SECONDS or await self.store.has_company()):
                    await self.store.wait_for_feed()
                    self.keep_quiet()
                await self.store.open_epoch(self.store.now())
            await self.reload()
        await self.store.keep_secrets()

    def start(self) -> None:
        tasks = [self.run, self.tick, *([self.follow] if self.store.shared else [])]  # in memory nobody else writes
        self.tasks = [asyncio.create_task(task()) for task in tasks]

    async def tick(self) -> NoReturn:
        """Everything that must go on while the store is silent, and a look into it now and then."""
        while True:
            await asyncio.sleep(self.config.tick_seconds)
            self.outbox.expire(asyncio.get_running_loop().time())
            if not self.confirmed:
                self.ring_for_look()
            self.confirmed = False

    async def stop(self) -> None:
        await end_tasks(self.tasks)


async def end_tasks(tasks: Iterable[asyncio.Task[Any]]) -> None:
    """Asks again and again, because in Python 3.11 a wait_for in a library may swallow a cancellation."""
    pending = set(tasks)
    while pending:
        for task in pending:
            task.cancel()
        _, pending = await asyncio.wait(pending, timeout=0.02)


def backoff(failures: int, longest: float) -> float:
    """The pause in s after so many failures in a row: from 50 ms up to `longest`, shortened at random, so that daemons
    and clients spread out.
    """
    return min(longest, 0.025 * 2.0 ** min(failures, 10)) * random.uniform(0.5, 1)


# === Presence =========================================================================================================
# Who is connected, for how long a name outlives its last connection, and signs of life. A lease in the store says till
# when a name is on the roster, on the store's clock; the daemon where its member is connected renews it.


class Presence:
    """Renews the leases of who is connected here, and has those leave whose lease is over."""

    def __init__(self, feed: Feed, keep_few: Callable[[], Awaitable[None]]) -> None:
        self.feed, self.store, self.room, self.config = feed, feed.store, feed.room, feed.config
        self.keep_few = keep_few
        self.spared_until = 0.0  # in s of time.monotonic: until then no lease lapses
        self.all_leased = 0.0  # when the roster was last searched for names without a lease
        self.stopping = False
        self.tasks: list[asyncio.Task[NoReturn]] = []

    def release(self, member: Member, seconds: float) -> None:
        """A connection of this member has ended: if it was the last one, the name stays for so long. While we stop, the
        lease stays as it is, for who comes back elsewhere.
        """
        if not self.stopping:
            member.grace = seconds

    async def heartbeat(self) -> NoReturn:
        """Sends everybody pings and the time."""
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(self.config.tick_seconds)
            told = encode({"type": "time", "ts": self.store.now()})
            for listener in tuple(self.room.listeners):
                listener.heartbeat(loop.time(), told)

    async def keep_leases(self) -> NoReturn:
        """Renews, shortens and sweeps leases, for ever, and at once when somebody has to join again."""
        while True:
            try:
                if await self.store.read_clock() > self.config.renew_seconds:
                    self.spare()
                self.rejoin_missing()
                await self.store.keep_secrets()
                await self.renew()
                await self.sweep()
            except STORE_ERRORS as error:
                log.debug("leases: %s", error)  # the feed's reader tells
                self.spare()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.feed.stranded.wait(), self.config.tick_seconds)
            self.feed.stranded.clear()

    def spare(self) -> None:
        """The store was away, or its clock jumped: first every daemon must have had the time to renew its leases."""
        self.spared_until = time.monotonic() + self.config.renew_seconds + 2 * self.config.tick_seconds

    def rejoin_missing(self) -> None:
        """Whoever is connected here belongs on the roster."""
        for member in list(self.room.sessions.values()):
            if member.listeners and self.room.roster.get(member.key) is not member and not member.rejoining:
                self.rejoin(member)

    def rejoin(self, member: Member) -> None:
        """Puts a connected member back on the roster; who may not come back is told why, and closed."""
        member.rejoining = True

        def done(outcome: Outcome) -> None:
            member.rejoining = False
            why = Refused("name-lost", name=member.name) if isinstance(outcome, Taken) else outcome
            if isinstance(why, Refused) and why.code in ("name-lost", "removed"):
                for listener in tuple(member.listeners):
                    listener.turn_away(why)

        self.feed.outbox.propose("joined", member, done, details=member.joining)

    async def renew(self) -> None:
        """The leases that are due, and of who has gone: a name without a connection keeps its own for the grace."""
        now, lease, sessions = time.monotonic(), self.config.lease_seconds, list(self.room.sessions.values())
        gone = [member for member in sessions if member.grace and not member.listeners]
        here = [member for member in sessions if member.listeners and now - member.renewed >= self.config.renew_seconds]
        await self.store.renew({member.key: member.grace for member in gone} | {member.key: lease for member in here})
        for member in gone:
            member.renewed = member.grace = 0  # whoever comes back gets a long lease at once
        for member in here:
            member.renewed = now
        if now - self.all_leased >= lease:  # a name without a lease would never leave
            await self.store.renew(dict.fromkeys(self.room.roster, lease), missing=True)
            self.all_leased = now

    async def sweep(self) -> None:
        """Whose lease is over leaves; a name that nobody has been back for is free after a while."""
        self.room.forget_names(self.store.now())
        if len(self.room.kept_names) > NAMES_KEPT:
            await self.keep_few()
        if time.monotonic() <= self.spared_until:
            return
        lapsed = await self.store.lapsed()
        for key in lapsed & self.room.roster.keys():
            if not (member := self.room.roster[key]).listeners:
                self.feed.outbox.propose("left", member, cid=f"~lapsed-{self.room.ts}")
        if strays := lapsed - self.room.roster.keys():
            await self.store.write_names(dict.fromkeys(strays, ""), {})

    def start(self) -> None:
        self.tasks = [asyncio.create_task(task()) for task in (self.heartbeat, self.keep_leases)]

    async def stop(self) -> None:
        await end_tasks(self.tasks)


# === Limits by address ================================================================================================
# What all who come from one address may do together, and whose connection is closed when too many want to come in. A
# whole school may be behind one address: 200 people with two tabs each notice nothing.


@functools.lru_cache(PACES)
def network(address: str) -> str:
    """Whose limits an address shares: with IPv6 those of its /64, because one machine has all of that."""
    with contextlib.suppress(ValueError):  # of IPv4
        parsed = ipaddress.IPv6Address(address.partition("%")[0])
        if parsed.ipv4_mapped:
            return str(parsed.ipv4_mapped)
        if not parsed.is_loopback:
            return str(ipaddress.ip_network((parsed, 64), strict=False))
    return address


def is_this_machine(address: str) -> bool:
    """Whether proxies and tests come from there: a crowd of people may stand behind it."""
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(network(address)).is_loopback
    return False


@contextlib.contextmanager
def at_most(most: float, counter: collections.Counter[str], name: str, refused: Refused) -> Iterator[None]:
    """One more of that name, for a while. Raises `refused` where there are so many already."""
    if counter[name] >= most:
        raise refused
    counter[name] += 1
    try:
        yield
    finally:
        counter[name] -= 1
        if not counter[name]:
            del counter[name]


class TokenBuckets:
    """A token bucket for each of many, by name: it holds `burst` tokens, and gets `rate` a second; 0 = no limit."""

    def __init__(self, rate: float, burst: float) -> None:
        self.rate, self.burst = rate, burst if rate else math.inf
        self.buckets: collections.OrderedDict[str, tuple[float, float]] = collections.OrderedDict()  # tokens, and when

    def take(self, name: str, now: float, cost: float = 1) -> float:
        """Takes tokens, if there is one; else how many s to wait for it. What costs more leaves a debt."""
        tokens, then = self.buckets.pop(name, (self.burst, now))
        tokens = min(self.burst, tokens + (now - then) * self.rate)
        self.buckets[name] = tokens - (cost if tokens >= 1 else 0), now
        if len(self.buckets) > PACES:
            self.buckets.popitem(last=False)  # the one that was used longest ago is full again, or nearly
        return 0 if tokens >= 1 else (1 - tokens) / self.rate

    def pace(self, name: str, cid: str = "", cost: float = 1) -> None:
        """Takes tokens now. Raises Refused if there is none."""
        if wait := self.take(name, asyncio.get_running_loop().time(), cost):
            raise Refused("too-fast", cid=cid, retry_after=wait)


class Limits:
    """The paces of those who ask. An address is what `network` makes of it."""

    def __init__(self, rate: float) -> None:
        self.logins = TokenBuckets(LOGINS_A_SECOND, LOGINS_AT_ONCE)
        self.rejoins = TokenBuckets(REJOINS_A_SECOND, REJOINS_AT_ONCE)  # by sid
        self.returns = TokenBuckets(LOGINS_A_SECOND, LOGINS_AT_ONCE)  # of those, by address: an outage ends for all
        self.says = TokenBuckets(rate, max(1, rate * 5))  # by browser: a new tab or a logout fills no bucket
        self.messages = TokenBuckets(CROWD * rate, RING_MESSAGES)
        self.requests = TokenBuckets(REQUESTS_A_SECOND if rate else 0, REQUESTS_AT_ONCE)
        self.turns = weakref.WeakValueDictionary[str, asyncio.Lock]()
        self.rest = TURN_SECONDS if rate else 0
        self.guesses = collections.Counter[str]()  # wrong passwords that wait for their refusal
        self.polls = collections.Counter[str]()  # those that wait for news
        self.drawings = TokenBuckets(DRAWINGS_A_SECOND, DRAWINGS_AT_ONCE)  # of everybody
        self.drawn = collections.deque[str](maxlen=50)  # addresses of the room that aren't announced
        self.proxy_seen = False

    async def turn(self, address: str, stream: tornado.iostream.IOStream, cost: float = 1) -> None:
        """Waits for the address's turn: its requests come one after the other, and no more than its pace allows."""
        turn = self.turns.setdefault(address, asyncio.Lock())
        loop = asyncio.get_running_loop()
        await turn.acquire()
        try:
            if not stream.closed() and (wait := self.requests.take(address, loop.time(), cost)):
                await asyncio.sleep(wait)
                self.requests.take(address, loop.time(), cost)
        finally:
            loop.call_later(self.rest if cost else 0, turn.release)

    def warn_of_proxy(self, address: str) -> None:
        """Tells the operator, once, of a proxy on this machine that isn't trusted."""
        if not self.proxy_seen and is_this_machine(address):
            self.proxy_seen = True
            web_log.warning(
                "a proxy on this machine sends X-Forwarded-For, which is not believed: to all limits its visitors are"
                " one address; --trust-proxy tells them apart"
            )


class Visitors:
    """The connections on which nobody has joined or waits for news, by address, in the order of their last requests.

    Everybody gets in as long as that can be had by closing one of these: the one that has been quiet for longest, of
    too many from one address, or of the address with most of them when the daemon is full. A browser opens another.
    """

    def __init__(self) -> None:
        self.open: dict[tornado.iostream.IOStream, str] = {}  # all connections, of members too
        self.quiet: dict[str, collections.OrderedDict[tornado.iostream.IOStream, None]] = {}
        self.crowded = False  # one has been closed for a newcomer: the door opens no wider than that

    def come(self, stream: tornado.iostream.IOStream, address: str) -> None:
        self.open[stream] = address
        self.wait(stream)
        if len(self.quiet[address]) > VISITORS_AN_ADDRESS and not is_this_machine(address):
            self.make_room(address)

    def wait(self, stream: tornado.iostream.IOStream) -> None:
        """A request has come, or a poll has ended."""
        if address := self.open.get(stream):
            quiet = self.quiet.setdefault(address, collections.OrderedDict())
            quiet[stream] = None
            quiet.move_to_end(stream)

    def join(self, stream: tornado.iostream.IOStream) -> None:
        """From now on it is a member's."""
        address = self.open.get(stream, "")
        if quiet := self.quiet.get(address):
            quiet.pop(stream, None)
            if not quiet:
                del self.quiet[address]

    def leave(self, stream: tornado.iostream.IOStream) -> None:
        self.join(stream)
        self.open.pop(stream, None)

    def make_room(self, address: str = "") -> None:
        """Closes the connection that has been quiet for longest: of that address, or of that with most of them."""
        quiet = self.quiet[address] if address else max(self.quiet.values(), key=len)
        stream = next(iter(quiet))
        self.leave(stream)
        stream.close()
        self.crowded = True


# === Web ==============================================================================================================
# What all routes have in common: which Host and Origin may ask, whose session a cookie is, in which language the answer
# is; and the pages with their parts. Handlers are thin: they parse, ask the room or the feed, and answer.

SECURITY_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; form-action 'self'; frame-ancestors 'none'; base-uri 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}
STATUSES = {"no-session": 401, "logout": 401, "password": 403, "host-key": 403, "not-host": 403, "not-member": 403,
            "door": 403, "removed": 403, "muted": 403, "locked": 403, "no-message": 404, "no-member": 404,
            "no-picture": 404, "is-host": 409, "taken": 409, "name-lost": 409, "too-long": 413, "bad-picture": 415,
            "too-fast": 429, "slow": 429, "too-many-tabs": 429,
            "unavailable": 503}  # of HTTP, for the same; else 400  # fmt: skip
LOCAL_SUFFIXES = (".local", ".lan", ".home.arpa", ".internal")  # names that no public DNS can give to another machine


class Session(NamedTuple):
    """What the cookie says, signed: a browser and its name, "" before the login and after the logout."""

    sid: str
    name: str
    host: bool = False

    @classmethod
    def make(cls, name: str, before: Session | None = None, *, host: bool = False) -> Session:
        """A new one; the browser stays the same, and so does a host."""
        browser = before.sid[:BROWSER_CHARS] if before else secrets.token_hex(BROWSER_CHARS // 2)
        return cls(browser + secrets.token_hex(8), name, host or (before is not None and before.host))

    def __str__(self) -> str:
        return f"{self.sid}{HOST_MARK * self.host} {self.name}"

    @classmethod
    def parse(cls, text: str) -> Session:
        sid, _, name = text.partition(" ")
        return cls(sid.removesuffix(HOST_MARK), name, sid.endswith(HOST_MARK))


def host_name(header: str) -> str:
    """The name or address in a Host header, without port and final dot; "" if there is none."""
    host = header.lower() if len(header) <= URL_CHARS else ""
    match = re.fullmatch(r"(?:\[([0-9a-f:.]+)\]|([a-z0-9._-]+?)\.?)(?::[0-9]+)?", host)
    return (match[1] or match[2]) if match else ""


def is_our_host(name: str, hosts: frozenset[str]) -> bool:
    """Whether a Host is ours. A name that isn't local may be one that an attacker's DNS points at us."""
    with contextlib.suppress(ValueError):
        ipaddress.ip_address(name)
        return True
    return name in hosts or name.endswith(LOCAL_SUFFIXES) or (name != "" and "." not in name)


def whole_number(text: str) -> int | None:
    return int(text) if re.fullmatch(r"[0-9]{1,15}", text) else None


def choose_language(header: str) -> str:
    """The language of WORDS that an Accept-Language header likes best; else the first one."""
    qualities: dict[str, float] = {}
    for wish in header[:LANGUAGES_CHARS].lower().split(","):
        if match := re.fullmatch(r"\s*([a-z]+)(?:-[^;\s]*)?\s*(?:;\s*q\s*=\s*([01](?:\.[0-9]*)?)\s*)?", wish):
            qualities[match[1]] = max(float(match[2] or 1), qualities.get(match[1], 0))
    known = [tag for tag in qualities if tag in WORDS and qualities[tag]]
    return max(known, key=qualities.__getitem__, default=next(iter(LANGUAGES)))


def believe_proxy(request: tornado.httputil.HTTPServerRequest) -> None:
    """Takes the browser's address, scheme and Host from a proxy on this machine, and from nobody else."""
    if not is_this_machine(request.remote_ip or ""):
        return
    if forwarded := request.headers.get("X-Forwarded-For"):
        try:
            request.remote_ip = str(ipaddress.ip_address(forwarded.split(",")[-1].strip()))  # that our proxy has seen
        except ValueError:
            request.remote_ip = "unknown"  # those who come so are limited together: they aren't this machine
    if (scheme := request.headers.get("X-Forwarded-Proto", "").lower()) in ("http", "https"):
        request.protocol = scheme
    if host := request.headers.get("X-Forwarded-Host"):
        request.headers["Host"] = request.host = host


class BaseHandler(tornado.web.RequestHandler):
    """What all routes have in common: Host check, security headers, session, language."""

    current_user: Session | None
    stream: tornado.iostream.IOStream
    only_json = False  # whatever a client accepts: only programs ask here

    def initialize(self, daemon: Daemon) -> None:
        """Called by Tornado with what the route was given, before any check."""
        self.daemon = daemon
        self.stream = self.request.connection.stream  # type: ignore[union-attr]
        self.language = choose_language(self.request.headers.get("Accept-Language", ""))
        if daemon.config.trust_proxy:
            believe_proxy(self.request)
        elif "X-Forwarded-For" in self.request.headers:
            daemon.limits.warn_of_proxy(self.request.remote_ip or "")
        self.address = network(self.request.remote_ip or "")
        try:
            urllib.parse.urlsplit(self.request.headers.get("Origin", ""))
        except ValueError:  # where Tornado compares it, that would be an error of ours
            self.request.headers["Origin"] = "null"

    def set_default_headers(self) -> None:
        for name, value in SECURITY_HEADERS.items():
            self.set_header(name, value)
        self.set_header("Server", "tornchat")
        if self.only_json:
            self.set_header("Content-Type", "application/json; charset=UTF-8")

    async def prepare(self) -> None:
        """Called by Tornado before the method, after its own checks of Origin. An address that asks too much waits."""
        self.daemon.visitors.wait(self.stream)
        cost = 1 + sum(1 for _ in self.request.headers.get_all()) // HEADERS_A_REQUEST
        await self.daemon.limits.turn(self.address, self.stream, cost)
        self.check_host()

    def check_host(self) -> None:
        name = host_name(self.request.headers.get("Host", ""))
        if not is_our_host(name, self.daemon.hostnames):
            host, option = name[:100] or "(none)", f"--allow-host {name[:100] or 'NAME'}"
            web_log.warning(
                "a request for the host %s was refused: if that is a name of this room, %s lets it in", host, option
            )
            raise tornado.web.HTTPError(421, reason="Misdirected Request")

    def check_trusted_origin(self, origin: str) -> bool:
        """Called by Tornado for a page that doesn't seem to be ours, which is not trusted, whatever it is."""
        self.check_host()
        web_log.warning(
            "a page of %s was refused at %s: if it is the room's own, a proxy between them has to pass the Host"
            " (nginx: proxy_set_header Host $http_host;)",
            shown(origin)[:100],
            shown(self.request.headers.get("Host", ""))[:100],
        )
        return False

    def get_current_user(self) -> Session | None:
        session = self.browser()
        return session if session and session.name else None

    def browser(self) -> Session | None:
        """What the cookie says of this browser, which may have logged out, or be a host who hasn't logged in yet.

        Of several cookies with our name the last valid one counts: whoever has another port of this host can plant one
        for a path, and browsers send those first.
        """
        name, key = self.daemon.cookie, self.daemon.cookie_key
        cookie = rf'(?:^|;)\s*{name}="?([\w|:=+/-]{{1,{COOKIE_CHARS}}})"?\s*(?=;|$)'
        for value in re.findall(cookie, self.request.headers.get("Cookie", ""), re.ASCII)[: -1 - COOKIES_READ : -1]:
            if signed := tornado.web.decode_signed_value(key, name, value, max_age_days=COOKIE_DAYS, min_version=2):
                session = Session.parse(signed.decode(errors="replace"))
                return session._replace(host=session.host and session.sid not in self.daemon.room.state.ended)
        return None

    def get_user_locale(self) -> tornado.locale.Locale:
        """Called by Tornado for each page. It would look at all languages that the browser likes, 16 KB of them."""
        return tornado.locale.get(self.language)

    def set_session(self, session: Session) -> None:
        """The cookie. Lax and not Strict, so that a link to the room from elsewhere finds its member logged in;
        what a foreign page could do with it is stopped by the checks of Origin.
        """
        name, secure = self.daemon.cookie, self.request.protocol == "https"
        value = tornado.web.create_signed_value(self.daemon.cookie_key, name, str(session))
        self.set_cookie(name, value, expires_days=COOKIE_DAYS, httponly=True, samesite="Lax", secure=secure)

    def page_path(self) -> str:
        """Leads to the chat page in the view that was asked for: that of a projector is read-only, in huge type."""
        return "?view=projector" if self.get_query_argument("view", "") == "projector" else ""

    def field(self, name: str) -> str | None:
        """A field of the form as it was sent: get_body_argument would turn control characters into spaces."""
        try:
            return self.request.body_arguments[name][-1].decode() if name in self.request.body_arguments else None
        except UnicodeDecodeError:
            raise tornado.web.HTTPError(400) from None

    def seen(self) -> ResumePoint:
        """Where the client says it has been; a nonsense number is none."""
        after, at = (self.get_query_argument(name, "") for name in ("after", "at"))
        return ResumePoint(whole_number(after), self.get_query_argument("epoch", ""), whole_number(at))

    def take(self, member: Member, act: Event, done: Done) -> None:
        """What a member asks for, at the pace of its browser and of its address; hosts have none. Raises Refused."""
        limits, paced = self.daemon.limits, not self.daemon.room.is_host(member)
        picture = act.details.get("picture", "")
        if picture and picture != self.picture_id(member, picture.rpartition("-")[0]):
            raise Refused("no-picture", cid=act.cid)
        if paced:
            limits.messages.pace(self.address, act.cid, cost=0)
            limits.says.pace(member.sid[:BROWSER_CHARS], act.cid)
        self.daemon.outbox.act(member, act, done)  # only what that takes counts
        if paced:
            limits.messages.pace(self.address, act.cid, cost=1 + len(act.text.encode()) // MESSAGE_BYTES)

    def picture_id(self, member: Member, name: str) -> str:
        """The one under which this browser alone can say that picture, which goes with its own message then."""
        made_of = f"{member.sid[:BROWSER_CHARS]} {name}".encode()
        return f"{name}-{hmac.new(self.daemon.cookie_key.encode(), made_of, 'sha256').hexdigest()[:16]}"

    async def admit(self, session: Session | None) -> Member:
        """The member whose session it is, back on the roster if its name had left that. Raises Refused."""
        if session is None:
            raise Refused("no-session")
        if self.daemon.presence.stopping:
            raise Refused("unavailable", retry_after=1)
        try:
            return await self.daemon.admission.rejoin(session, self.address)
        except Taken:
            raise Refused("name-lost", name=session.name) from None

    def finish(self, chunk: str | bytes | dict[str, Any] | None = None) -> asyncio.Future[None]:
        """The answer is complete. Tornado would hold it for ever for a client that doesn't take it."""
        taken = super().finish(chunk)
        if not taken.done() and self.get_status() != 101:  # after which the connection is a socket's
            cut = asyncio.get_running_loop().call_later(self.daemon.config.answer_seconds, self.stream.close)
            taken.add_done_callback(lambda _: cut.cancel())
        return taken

    def wants_json(self) -> bool:
        return self.only_json or "application/json" in self.request.headers.get("Accept", "")

    def log_exception(self, *error: Any) -> None:
        """A bug, with its traceback. Tornado would also tell of refused requests, with the query and its password."""
        if not isinstance(error[1], tornado.web.HTTPError | Refused):
            web_log.error("%s %s", self.request.method, shown(self.request.path), exc_info=error)

    def write_error(self, status_code: int, **kwargs: Any) -> None:
        """Called by Tornado with what a handler has raised: a Refused, an HTTPError, or a bug."""
        if self.stream.closed():  # nobody is left to be told
            return
        error = kwargs["exc_info"][1] if "exc_info" in kwargs else None
        if isinstance(error, Refused):
            self.set_status(STATUSES.get(error.code, 400))
            self.refuse(error)
        else:
            words, host = WORDS[self.language], host_name(self.request.headers.get("Host", ""))[:100] or "?"
            text = words.get(f"error_{status_code}", words["error"])
            self.explain(status_code, text.format(status=status_code, reason=self._reason, host=host))

    def refuse(self, refused: Refused) -> None:
        self.explain(refused.code, refused.sentence(self.language))

    def explain(self, code: int | str, text: str) -> None:
        """Answers with a sentence: JSON, or a page."""
        if self.wants_json():
            self.finish({"code": code, "text": text})
        else:
            self.page("error.html", text=text)

    def page(self, template: str, **values: object) -> None:
        """Answers with one of the HTML templates, in the reader's language."""
        html = self.render_string(
            template,
            lang=LANGUAGES[self.language],
            w=WORDS[self.language],
            title=self.daemon.config.title,
            asset=asset_url,
            root="../" * (self.request.path.count("/") - 1) or "./",  # from this address to the room's
            **values,
        )
        self.deliver(html, compress)

    def deliver(self, text: bytes, compress: Callable[[bytes], bytes]) -> None:
        """Answers with a text, compressed where the client takes that."""
        self.set_header("Vary", "Accept-Encoding")
        accepted = self.request.headers.get("Accept-Encoding", "").lower()
        if re.search(r"\bgzip\b(?!\s*;\s*q=0(?:\.0*)?\s*(?:,|$))", accepted):
            self.set_header("Content-Encoding", "gzip")
            text = compress(text)
        self.finish(text)

    async def deliver_pieces(self, pieces: AsyncIterator[bytes]) -> None:
        """Answers with each piece when the one before has been taken. Half an answer must not look like a whole one:
        where a piece can't be had, or nobody takes it, the connection is closed.
        """
        try:
            async for piece in pieces:
                self.write(piece)
                async with asyncio.timeout(self.daemon.config.answer_seconds):
                    await self.flush()
        except STORE_ERRORS:
            self.stream.close()


compress = functools.partial(gzip.compress, mtime=0)  # the same text always gives the same bytes
compress_once = functools.cache(compress)  # for what is made once


class PageHandler(BaseHandler):
    """GET /: the chat page."""

    def get(self) -> None:
        if self.current_user is None:
            self.redirect("login" + self.page_path())
            return
        self.page(
            "chat.html",
            name=self.current_user.name,
            view="projector" if self.page_path() else "window",
            pictures=self.daemon.config.pictures > 0,
            transcript=self.daemon.config.transcript,
            now=round(1000 * time.time()),
            words="\n".join(f"{key}\t{text}" for key, text in page_words(self.language).items()),
        )

    head = get


class NotFoundHandler(BaseHandler):
    """Everything else."""

    async def prepare(self) -> None:
        await super().prepare()
        raise tornado.web.HTTPError(404)


class HealthHandler(BaseHandler):
    """GET /healthz: for load balancers and for the curious."""

    only_json = True

    def get(self) -> None:
        room = self.daemon.room
        self.set_status(200 if room.available else 503)
        self.finish(
            {
                "status": "ok" if room.available else "unavailable",
                "version": __version__,
                "uptime": round(time.monotonic() - self.daemon.started, 1),
                "connections": len(self.daemon.sockets),
                "members": len(room.roster),
                "store": "redis" if self.daemon.config.redis_url else "memory",
            }
        )

    head = get


def qr_symbol(url: str) -> Any:
    """The URL for a phone's camera, if the package segno is installed; else None."""
    try:
        import segno  # type: ignore[import-not-found,unused-ignore]
    except ModuleNotFoundError:
        return None
    return segno.make(url, micro=False)


@functools.lru_cache(maxsize=100)
def qr_picture(url: str) -> bytes:
    """The URL as a picture (SVG); b"" without segno."""
    picture = io.BytesIO()
    if symbol := qr_symbol(url):
        symbol.save(picture, kind="svg", border=2, light="#fff", omitsize=True)
    return picture.getvalue()


class JoinHandler(BaseHandler):
    """GET /join.json and /qr.svg?url=...: what the page's panel for those who want to join shows, to members."""

    async def get(self, what: str) -> None:
        if self.current_user is None:
            raise tornado.web.HTTPError(401)
        if what == "join.json":
            self.finish({"addresses": self.daemon.addresses(), "qr": qr_symbol("/") is not None})
            return
        url = self.get_query_argument("url", "")
        picture = await asyncio.to_thread(qr_picture, url) if self.may_draw(url) else b""  # it takes some 50 ms
        if not picture:
            raise tornado.web.HTTPError(404)
        self.set_header("Content-Type", "image/svg+xml")
        self.finish(picture)

    head = get

    def may_draw(self, url: str) -> bool:
        """Whether the room announces it, or it leads to where this page was opened: of these now and then a new one."""
        limits, here = self.daemon.limits, re.escape(self.request.headers["Host"])
        if url in limits.drawn or url in self.daemon.addresses():
            return True
        if len(url) > URL_CHARS or not re.fullmatch(rf"https?://{here}/[\w./~-]*", url):
            return False
        limits.drawings.pace("")
        limits.drawn.append(url)
        return True


class AssetHandler(BaseHandler):
    """GET /style.css and its like: kept by browsers for as long as the hash in the URL stays the same."""

    def get(self, name: str) -> None:
        type, text = ASSETS[name]
        self.set_header("Content-Type", type)
        fresh = f"{name}?{self.request.query}" == asset_url(name)
        self.set_header("Cache-Control", "public, max-age=31536000, immutable" if fresh else "no-cache")
        self.deliver(text.encode(), compress_once)

    head = get


@functools.cache
def asset_url(name: str) -> str:
    """Relative, so that a proxy may serve the room under a path of its own; and another one for each version."""
    return f"{name}?v={hashlib.sha256(ASSETS[name][1].encode()).hexdigest()[:12]}"


# === Login ============================================================================================================
# Who gets in, and under which name: an Admission checks password, pace and name, and makes the session. The login page
# asks it, and so does a socket that comes with ?nickname=.


class Admission:
    """Gives sessions to those who may come in: checks the room's password and the pace of an address, takes names."""

    def __init__(self, feed: Feed, limits: Limits) -> None:
        self.store, self.outbox, self.room, self.config = feed.store, feed.outbox, feed.room, feed.config
        self.limits = limits
        self.origins: dict[str, tuple[Session, str]] = {}  # sid -> session and address, in the order of last use

    async def log_in(
        self, nickname: str, password: str, address: str, before: Session | None = None, *, renew: bool = False
    ) -> Session:
        """A session under that name; "" = a guest. Raises Refused.

        `before` is what the browser has: who is logged in gives no password. Under the same name it is kept, or
        renewed; another name is given back: it can't talk under it any more.
        """
        session = before if before and before.name else None
        if session is None:
            await self.check_guess(password, self.config.password, "password", address)
        name = clean_name(nickname) if nickname.strip() else ""
        same = session if session and name and name_key(session.name) == name_key(name) else None
        if same and not (renew and self.room.available):  # or the name would be given back, and not taken again
            await self.rejoin(same, address)
            return same
        self.check_door(before, name, address)
        if not is_this_machine(address):
            self.limits.logins.pace(network(address))
        if same:  # given back and taken in one entry, so that nobody else can take it between the two
            _, new = await asyncio.gather(self.give_back(same), self.enter_as(name, address, before))
        else:
            new = await self.enter_as(name, address, before)
            if session:
                await self.give_back(session)
        return new

    def check_door(self, before: Session | None, name: str, address: str) -> None:
        """Raises Refused for somebody new while the door is closed, and for who was removed a while ago."""
        if before and before.host:
            return
        state, now = self.room.state, self.store.now()
        browser, key = marks_of(before.sid if before else "", name)
        if wait := state.waits(state.barred, (browser, "from " + self.origin(address)), now):
            raise Refused("removed", retry_after=wait)
        if wait := state.waits(state.barred, (key, ""), now):
            raise Refused("removed", "removed-name", retry_after=wait, name=name)
        if before is None and state.mode["door"] == "closed":
            raise Refused("door")

    def origin(self, address: str) -> str:
        """The same for all who come from an address; nobody who reads it learns the address."""
        return hmac.new(self.store.secret.encode(), network(address).encode(), "sha256").hexdigest()[:12]

    async def give_back(self, session: Session) -> None:
        """Frees a session's name at once, and closes its connections."""
        await self.outbox.exit(session.sid, session.name)
        if member := self.room.sessions.get(session.sid):
            for listener in tuple(member.listeners):
                listener.shut(4401, LOGOUT)

    async def keep_few(self) -> None:
        """An address may have so many names kept for people who have left: else one pupil takes all. The oldest go."""
        away: dict[str, list[Session]] = {}
        for sid, _ in self.room.kept_names.values():
            if sid in self.origins:
                session, address = self.origins[sid]
                away.setdefault(address, []).append(session)
        surplus = [session for sessions in away.values() for session in sessions[:-NAMES_KEPT]]
        await asyncio.gather(*map(self.give_back, surplus))

    async def check_guess(self, guess: str, right: str, code: str, address: str) -> None:
        """Raises Refused for a wrong password or key, but not at once. The right one never waits, whoever guesses."""
        if not right or hmac.compare_digest(guess.encode(), right.encode()):
            return
        too_many = Refused(code, "guesses", retry_after=self.config.guess_seconds)
        with at_most(GUESSES_AT_ONCE, self.limits.guesses, network(address), too_many):
            await asyncio.sleep(self.config.guess_seconds)
        raise Refused(code)

    async def rejoin(self, session: Session, address: str) -> Member:
        """The member of that session; where its name had left the list, that has its pace. Raises Refused."""
        if session.sid not in self.room.sessions:
            self.limits.rejoins.pace(session.sid)
            if not is_this_machine(address):
                self.limits.returns.pace(network(address))
        return await self.enter(session, address)

    async def enter(self, session: Session, address: str) -> Member:
        """Takes the session's name, if it has it not. Raises Refused."""
        member = await self.outbox.enter(session.sid, session.name, self.origin(address), host=session.host)
        self.origins.pop(session.sid, None)
        self.origins[session.sid] = session, network(address)
        if len(self.origins) > PACES:
            del self.origins[next(iter(self.origins))]
        return member

    async def enter_as(self, name: str, address: str, before: Session | None) -> Session:
        """A new session under that name; "" = a guest's, another one where that is taken meanwhile. Raises Refused."""
        for _ in range(5):
            session = Session.make(name or self.free_guest_name(address), before)
            try:
                await self.enter(session, address)
                return session
            except Taken:
                if name:
                    raise
        raise Refused("unavailable", retry_after=1)

    def free_guest_name(self, address: str) -> str:
        name = guest_name(address)
        taken = self.room.owner(name_key(name))
        return (self.room.free_variant(name) or f"guest-{secrets.token_hex(4)}") if taken else name


class LoginHandler(BaseHandler):
    """GET and POST /login."""

    def get(self) -> None:
        """The form, filled in with ?nickname=; the chat page adds ?why= when it sends somebody here."""
        self.form(WORDS[self.language].get("login_why_" + self.get_query_argument("why", ""), ""))

    head = get

    async def post(self) -> None:
        nickname, password = (self.field(name) or "" for name in ("nickname", "password"))
        # The cookie may have been planted by somebody who has it too: who logs in by hand gets another one. A page that
        # comes back by itself keeps it, for it may do so in several tabs at once.
        renew = not self.wants_json()
        address, log_in = self.request.remote_ip or "", self.daemon.admission.log_in
        session = await log_in(nickname, password, address, self.browser(), renew=renew)
        self.set_session(session)
        if self.wants_json():
            self.finish({"name": session.name})
        else:
            self.redirect("./" + self.page_path(), status=303)

    def refuse(self, refused: Refused) -> None:
        """The reason, and with a name that is taken a free one that is like it."""
        text, taken = refused.sentence(self.language), isinstance(refused, Taken)
        suggestion = self.daemon.room.free_variant(self.field("nickname") or "") if taken else ""
        if self.wants_json():
            self.finish({"code": refused.code, "text": text} | ({"suggestion": suggestion} if suggestion else {}))
        else:
            self.form(text, suggestion, wrong_password=refused.code == "password")

    def form(self, error: str, suggestion: str = "", *, wrong_password: bool = False) -> None:
        config, nickname = self.daemon.config, self.field("nickname") or self.get_query_argument("nickname", "")
        kept = WORDS[self.language]["kept_redis" if config.redis_url else "kept_memory"]
        self.page(
            "login.html",
            nickname=nickname[:NAME_CODEPOINTS],
            error=error,
            suggestion=suggestion,
            password_needed=bool(config.password),
            wrong_password=wrong_password,
            path=self.page_path(),
            kept=kept.format(history=config.history),
        )


class LogoutHandler(BaseHandler):
    """POST /logout."""

    async def post(self) -> None:
        """Gives the name back and ends the session. The browser stays the one that was muted, or has just spoken."""
        if browser := self.browser():
            if browser.name:
                await self.daemon.admission.give_back(browser)
            self.set_session(browser._replace(name="", host=False))
        self.redirect("login", status=303)


class HostHandler(BaseHandler):
    """GET /host?key=...: makes a host of whoever opens it, now or with the login that follows."""

    async def get(self) -> None:
        daemon, browser = self.daemon, self.browser()
        key = self.get_query_argument("key", "")
        await daemon.admission.check_guess(key, daemon.host_key, "host-key", self.request.remote_ip or "")
        if browser and browser.name and browser.sid not in daemon.room.state.ended:
            self.set_session(browser._replace(host=True))
        else:
            self.set_session(Session.make("", browser, host=True))
        self.redirect("./")


# === Sockets ==========================================================================================================
# GET /chat. A member's way in, frame by frame; and the way out: bytes that were made once for everybody go straight to
# the socket, and what a slow client can't take waits in a bounded backlog.

CLOSE_CODES = {"no-session": 4401, "password": 4403, "invalid": 4403, "removed": 4403, "door": 4403, "taken": 4409,
               "name-lost": 4409, "too-many-tabs": 4504, "unavailable": 1013, "too-fast": 1013}  # fmt: skip


class FrameReader(tornado.websocket.WebSocketProtocol13):
    """Tornado's protocol, but it reads all that has come at once, and no coroutine waits for more: that would keep 4 KB
    a connection. Each frame is counted; one that isn't masked closes the connection (RFC 6455, 5.1).
    """

    handler: ChatSocket
    unread = b""
    at = 0  # how many bytes of that belong to the frame which is being read

    async def _receive_frame_loop(self) -> None:
        """Called by Tornado after the handshake."""
        self.stream.set_close_callback(self.end)
        self.read()

    def end(self) -> None:
        self._abort()
        self.handler.on_connection_close()

    def read(self) -> None:
        try:
            asyncio.ensure_future(self.stream.read_bytes(CHUNK_BYTES, partial=True)).add_done_callback(self.take)
        except tornado.iostream.StreamClosedError:
            self.end()

    def take(self, read: asyncio.Future[bytes]) -> None:
        """More has come, unless the connection is gone."""
        if not read.exception():
            self.unread += read.result()
            self.handler.heard = asyncio.get_running_loop().time()
            self.work()

    def work(self) -> None:
        """Handles what is complete, but in one turn of the loop no more than others don't notice."""
        for _ in range(FRAMES_A_TURN):
            self.at = 0
            try:
                self._receive_frame().send(None)  # all of it in one go
            except StopIteration:
                self.unread = self.unread[self.at :]
            except UnicodeDecodeError:  # in the reason of a close
                self._abort()
            except BlockingIOError:
                self.read()
                return
            if self.handler.count(self.at):
                return  # the client has been told, and no more of it is read
        asyncio.get_running_loop().call_soon(self.work)

    async def _read_bytes(self, n: int) -> bytes:
        """Called by Tornado for each part of a frame. Raises BlockingIOError where that hasn't come yet."""
        data = self.unread[self.at : self.at + n]
        if len(data) < n:
            raise BlockingIOError
        if not self.at and not data[1] & 0x80:
            self.close(1002, "unmasked")
            self._abort()
            raise BlockingIOError
        self.at += n
        return data

    def _write_frame(self, *frame: Any, **flags: Any) -> asyncio.Future[None]:
        """Called by Tornado for pongs and the close. What the socket doesn't take of them holds up all that follows."""
        written = super()._write_frame(*frame, **flags)
        if self.stream.writing():
            self.handler.wait([])
        return written


class ChatSocket(BaseHandler, tornado.websocket.WebSocketHandler):
    """GET /chat: a member's WebSocket, and the reason why tornchat is fast.

    A batch of events is bytes that were made once for everybody. While nothing waits here, `send` hands them straight
    to the socket: no task, no future, none of the stream's bookkeeping. Only a client that can't take them at once
    gets a backlog. It is bounded, and goes through the stream in chunks, each when the one before is out.
    """

    __slots__ = ("backlog", "plain", "transmit")  # which `send` needs; in the object itself they are found sooner

    member: Member  # once it has joined
    base = 0
    frames = 0  # since the last heartbeat, that brought no act, each KB counted as one
    acted = False  # the last frame was an act, and was not refused
    draining: asyncio.Task[None] | None = None  # while there is a backlog; kept, or the loop might drop the task

    async def prepare(self) -> None:
        """Reads the query while an error can still be an answer of HTTP."""
        await super().prepare()
        self.resume_point = self.seen()
        self.nickname = self.get_query_argument("nickname", None)
        self.password = self.get_query_argument("password", "")

    def select_subprotocol(self, subprotocols: list[str]) -> str | None:
        """`text`: lines instead of JSON."""
        return "text" if "text" in subprotocols else None

    def get_websocket_protocol(self) -> tornado.websocket.WebSocketProtocol | None:
        """Called by Tornado in the handshake; None for a version that it doesn't speak."""
        protocol: Any = super().get_websocket_protocol()
        return protocol and FrameReader(self, False, protocol.params)

    async def open(self, *args: str, **kwargs: str) -> None:
        """From the handshake to the first event, or to the close code that says why not."""
        if self.stream.closed():  # gone within the handshake: on_close has been called already
            return
        self.set_nodelay(True)
        self.daemon.sockets.add(self)
        self.heard = self.pinged = self.timed = asyncio.get_running_loop().time()
        self.plain = self.selected_subprotocol == "text"
        # Of a socket that is closed it raises an error, though its descriptor may belong to another one by then.
        tls = isinstance(self.stream, tornado.iostream.SSLIOStream)
        self.transmit: Callable[[memoryview], int | None] = self.stream.write_to_fd if tls else self.stream.socket.send
        self.backlog: collections.deque[tuple[memoryview, int]] | None = None  # data, and how many live events in it
        self.waiting_bytes = self.waiting_events = 0  # live ones in the backlog
        try:
            await self.enter(await self.session())
        except Refused as refused:
            if refused.code == "name-lost":
                with contextlib.suppress(tornado.websocket.WebSocketClosedError):
                    await self.write_message(to_json(refused.event(self.language)))
            self.close(CLOSE_CODES[refused.code], self.reason(refused))
        self.request.headers.clear()  # nobody needs them any more, for as long as the connection lasts

    def reason(self, refused: Refused) -> str:
        """The sentence, as much of it as a closing frame takes."""
        return refused.sentence(self.language).encode()[:123].decode(errors="ignore")

    async def session(self) -> Session | None:
        """Who wants to join, by the cookie or by ?nickname=. Raises Refused."""
        known, nickname, password = self.current_user, self.nickname, self.password
        if nickname is None or (known and name_key(nickname) == name_key(known.name)):
            return known
        return await self.daemon.admission.log_in(nickname, password, self.request.remote_ip or "")

    async def enter(self, session: Session | None) -> None:
        member, seen = await self.admit(session), self.resume_point
        await self.daemon.feed.catch_up(seen)
        if len(member.listeners) >= SOCKETS_A_SESSION:
            raise Refused("too-many-tabs", limit=SOCKETS_A_SESSION)
        if self.ws_connection is not None and not self.stream.closed():  # it may have gone while we waited
            self.member = member
            self.daemon.visitors.join(self.stream)
            self.daemon.room.join(self, seen)
        elif not member.listeners:  # gone while it was let in
            self.daemon.presence.release(member, self.daemon.config.grace_seconds)

    def is_member(self) -> bool:
        """Whether it has joined, and hasn't been turned away."""
        return self in self.daemon.room.listeners

    # --- the way in ---

    def on_message(self, message: str | bytes) -> None:
        if not self.is_member():
            return
        try:
            act = parse_act({"type": "say", "text": message}) if self.plain else parse_frame(message)
            self.take(self.member, act, self.settled)
            self.member.refusals = 0
            self.acted = True
        except Refused as refused:
            self.tell_refused(refused)
            self.member.refusals += 1
            if self.member.refusals > IGNORED_REFUSALS:
                self.shut(4429, "too fast")

    def count(self, size: int) -> bool:
        """Counts a frame that has been read; whether there were too many, and the socket is closed."""
        self.frames += 0 if self.acted else 1 + size // 1024
        self.acted = False
        if self.frames > FRAMES_A_TICK and self.is_member():
            self.shut(4429, "too many frames")
        return self.frames > FRAMES_A_TICK

    def settled(self, outcome: Outcome) -> None:
        """What became of an act: if a message, its event is on its way to everybody, unless it is an older one."""
        if isinstance(outcome, Refused):
            self.tell_refused(outcome)
        elif outcome.type == "message" and outcome.seq <= self.base:
            self.tell(encode_message(outcome))

    def tell_refused(self, refused: Refused) -> None:
        self.tell(encode(refused.event(self.language)))

    def tell(self, event: Encoded) -> None:
        """Something for this client alone, if it is still there."""
        if self.is_member():
            self.send(Batch(event))

    # --- the way out ---

    def send(self, batch: Batch) -> None:
        """Live events. Too many of them in the backlog are the end: the client comes back when it can."""
        data = batch.lines if self.plain else batch.frames
        if self.backlog is not None:
            self.wait([(data, len(batch.events))])
            self.waiting_bytes += len(data)
            self.waiting_events += len(batch.events)
            if self.too_slow():
                self.shut(4008, "too slow")
            return
        try:
            sent = self.transmit(data) or 0
        except BlockingIOError:
            sent = 0
        except OSError:
            self.stream.close()  # if it isn't, and on_close is on its way
            return
        if sent < len(data):
            self.stream.write(data[sent:])
            self.wait([])

    def too_slow(self) -> bool:
        """Whether too much waits, and for too long: who reads takes a large batch, and may need a moment for it."""
        if self.waiting_bytes <= BACKLOG_BYTES and self.waiting_events <= BACKLOG_EVENTS:
            return False
        lag = asyncio.get_running_loop().time() - self.lagging
        return lag > LAG_SECONDS or self.waiting_bytes > BACKLOG_MOST_BYTES

    def replay(self, events: list[Encoded]) -> None:
        """History: shared with the ring and with everybody, so that it doesn't count as waiting, whatever its size."""
        self.wait([(memoryview(event.line if self.plain else event.frame), 0) for event in events])

    def wait(self, pieces: list[tuple[memoryview, int]]) -> None:
        """Into the backlog, and out again as soon as the stream can take it: without a backlog the stream is empty."""
        if self.backlog is None:  # most connections never need one, and an empty one has 600 bytes
            self.backlog = collections.deque()
            self.lagging = asyncio.get_running_loop().time()
            self.draining = asyncio.create_task(self.drain())
        self.backlog.extend(pieces)

    async def drain(self) -> None:
        """Hands over the backlog, a chunk at a time."""
        with contextlib.suppress(tornado.iostream.StreamClosedError):
            while self.backlog or self.stream.writing():
                await self.stream.write(self.next_chunk())
        self.backlog = self.draining = None

    def next_chunk(self) -> bytes:
        """The oldest of the backlog, as much as goes out well in one piece."""
        chunk: list[memoryview] = []
        size = 0
        while self.backlog and size < CHUNK_BYTES:
            data, events = self.backlog.popleft()
            chunk.append(data)
            size += len(data)
            self.waiting_bytes -= len(data) if events else 0
            self.waiting_events -= events
        return b"".join(chunk)

    def heartbeat(self, now: float, time: Encoded) -> None:
        """Pings; a client that has been silent for two pings is dead, and waiting for its goodbye is no use."""
        config = self.daemon.config
        self.frames = 0
        if now - self.heard > 2 * config.ping_seconds:
            self.stream.close()
        elif now - self.pinged >= config.ping_seconds:
            self.pinged = now
            events = [PING]
            if now - self.timed >= config.time_seconds:
                self.timed = now
                events.append(time)
            self.send(Batch(*events))

    # --- the end ---

    def turn_away(self, refused: Refused) -> None:
        self.tell_refused(refused)
        self.shut(CLOSE_CODES[refused.code], self.reason(refused))

    def shut(self, code: int, reason: str) -> None:
        """The end in both directions; the client is told why. Tornado would listen to it for 5 s more."""
        self.leave()
        self.backlog = None
        self.close(code, reason)
        asyncio.get_running_loop().call_later(self.daemon.config.goodbye_seconds, self.stream.close)

    def on_close(self) -> None:
        self.daemon.sockets.discard(self)
        self.daemon.visitors.leave(self.stream)
        self.leave()

    def leave(self) -> None:
        """From now on nothing that comes in is heard, and nothing goes out."""
        if self.is_member():
            self.daemon.room.leave(self)
            self.daemon.presence.release(self.member, self.daemon.config.grace_seconds)


# === Polling ==========================================================================================================
# GET and POST /messages, POST /acts: the room for whatever speaks HTTP. A request that waits is a listener like a
# socket; whatever comes ends the waiting, and the answer is what the room says then.

CURSOR = re.compile(r"([0-9]{1,15})-([0-9]{1,15})-([0-9]{1,15})(!?)")  # as clients give it back, "!": the store is away
Cursor = tuple[Place, bool]  # how far a poller knows what has no seq, to any daemon; and whether the store was there
News = tuple[list[Encoded], int, Cursor]  # what a poller is told, and from which seq and cursor it goes on


def cursor_of(room: Room, member: Member, given: str | None) -> Cursor | None:
    """From where a poller goes on: as it says, or else where its last poll here ended; None if it says nonsense."""
    match = CURSOR.fullmatch(member.polled_to if given is None else given)
    cursor = ((int(match[1]), int(match[2]), int(match[3])), not match[4]) if match else None
    if given is None and (cursor is None or cursor[0] < room.notices_after):
        return room.place, room.available
    return cursor


def news_since(room: Room, member: Member, seen: ResumePoint, cursor: Cursor | None) -> News:
    """In the feed's order; a greeting first where somebody can't be told the rest alone."""
    (owed, gap), newest = room.owed(seen), (room.place, room.available)
    events: list[Encoded] = []
    if not gap["recovered"] or cursor is None or cursor[0] < room.notices_after:
        events, cursor = room.greeting(member, seen, gap), newest
    told, available = cursor
    messages = [(seq, NOWHERE, encoded) for seq, encoded in enumerate(owed, room.seq - len(owed) + 1)]
    recent = [notice for notice in room.notices if notice[0].place > told and room.concerns(notice[0], member)]
    notices = [(event.seq, event.place, encoded) for event, encoded in recent]
    size = 0
    for seq, place, encoded in sorted([*messages, *notices], key=lambda item: item[0]):
        if size and size + len(encoded.frame) > POLL_BYTES:
            return events, seq - (place == NOWHERE), (told, available)
        size += len(encoded.frame)
        events.append(encoded)
        told = max(place, told)
    if available != room.available:
        events.append(encode_store(room.available))
    return events, room.seq, newest


class ActsHandler(BaseHandler):
    """POST /acts: whatever a socket takes. What else a member asks for without a socket is made of this."""

    only_json = True

    async def post(self) -> None:
        """201 when the store has it."""
        member = await self.admit(self.current_user)
        outcome: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
        self.take(member, self.asked(), outcome.set_result)
        stored = await outcome
        if isinstance(stored, Refused):
            raise stored
        self.release(member)
        self.set_status(201)
        self.finish(self.daemon.room.state.encode(stored).json)

    def asked(self) -> Event:
        return parse_act(parse_object(self.request.body))

    def release(self, member: Member) -> None:
        """The name stays until the next request is due; whoever has hung up has closed the tab."""
        config = self.daemon.config
        rest = 0 if self.stream.closed() else config.poller_seconds - self.request.request_time()
        self.daemon.presence.release(member, max(config.grace_seconds, rest))

    def refuse(self, refused: Refused) -> None:
        """A refusal is an event here too."""
        if refused.retry_after:
            self.set_header("Retry-After", str(math.ceil(refused.retry_after)))
        self.finish(refused.event(self.language))


class MessagesHandler(ActsHandler):
    """GET and POST /messages; while a GET waits it is the member's listener."""

    member: Member
    base = 0
    refused: Refused | None = None  # why it waits no more

    def initialize(self, daemon: Daemon) -> None:
        super().initialize(daemon)
        self.woken = asyncio.Event()  # there is a reason to answer

    async def get(self) -> None:
        """The events after `after`; if there are none, those that come within `wait` seconds."""
        wait = self.patience()
        self.member = await self.admit(self.current_user)
        try:
            news = await self.news(wait)
        finally:
            self.release(self.member)
        if not self.stream.closed():
            self.tell(*news)

    def patience(self) -> float:
        """How long the client is ready to wait, in s. Raises Refused."""
        wait = self.get_query_argument("wait", "0")
        if not re.fullmatch(r"[0-9]+(\.[0-9]+)?", wait):
            raise Refused("bad-frame", "bad-wait", limit=POLL_SECONDS)
        return min(float(wait), POLL_SECONDS)

    async def news(self, wait: float) -> News:
        """As `news_since`, after a wait where that is nothing. Raises Refused."""
        room, seen = self.daemon.room, self.seen()
        await self.daemon.feed.catch_up(seen)
        cursor = cursor_of(room, self.member, self.get_query_argument("last", None))
        if wait and not (self.stream.closed() or news_since(room, self.member, seen, cursor)[0]):
            await self.listen(wait)
        return news_since(room, self.member, seen, cursor)

    async def listen(self, wait: float) -> None:
        """Until there is news, or time is over, or nobody waits any more. Raises Refused."""
        daemon = self.daemon
        if len(self.member.listeners) >= SOCKETS_A_SESSION:
            raise Refused("too-many-tabs", limit=SOCKETS_A_SESSION)
        self.request.body, self.request.body_arguments = b"", {}  # nothing that a GET may have brought is kept
        most = math.inf if is_this_machine(self.address) else POLLS_AN_ADDRESS
        with at_most(most, daemon.limits.polls, self.address, Refused("too-fast", retry_after=1)):
            daemon.room.register(self)
            daemon.visitors.join(self.stream)
            try:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(wait):
                        await self.woken.wait()
            finally:
                daemon.room.leave(self)
                daemon.visitors.wait(self.stream)
        if self.refused:
            raise self.refused
        await daemon.limits.turn(self.address, self.stream, cost=0)

    def tell(self, events: Sequence[Encoded], seq: int, cursor: Cursor) -> None:
        place, available = cursor
        self.member.polled_to = "-".join(map(str, place)) + "!" * (not available)
        end = to_json({"seq": seq, "epoch": self.daemon.room.epoch, "last": self.member.polled_to}).encode()
        self.finish(b'{"events":[%b],%b' % (b",".join([event.json for event in events]), end[1:]))

    def asked(self) -> Event:
        return parse_act({**self.fields(), "type": "say"})

    def fields(self) -> Mapping[str, Any]:
        """Those of the body, JSON or form. Raises Refused."""
        if self.request.headers.get("Content-Type", "").partition(";")[0].strip().lower() == "application/json":
            return parse_object(self.request.body)
        values: dict[str, Any] = {name: self.field(name) for name in ("text", "cid", "re", "picture")}
        values["re"] = whole_number(values["re"] or "")
        return {name: value for name, value in values.items() if value is not None}

    # --- as a listener ---

    def wake(self, refused: Refused | None = None) -> None:
        self.refused = self.refused or refused
        self.woken.set()

    def send(self, batch: Batch) -> None:
        self.wake()

    def replay(self, events: list[Encoded]) -> None:
        """There is another history."""
        self.wake()

    def heartbeat(self, now: float, time: Encoded) -> None:
        """A request needs no sign of life: its end is near."""

    turn_away = wake

    def shut(self, code: int, reason: str) -> None:
        """The end of the session, or of the daemon."""
        self.wake(Refused("logout") if code == 4401 else Refused("unavailable", retry_after=1))

    def on_connection_close(self) -> None:
        super().on_connection_close()
        self.wake()


class TranscriptHandler(BaseHandler):
    """GET /transcript?format=txt|json: what the feed holds, as a file."""

    async def get(self) -> None:
        daemon, session = self.daemon, self.current_user
        if daemon.config.transcript == "off":
            raise tornado.web.HTTPError(404)
        if session is None:
            raise Refused("no-session")
        if daemon.config.transcript == "host" and not session.host:
            raise Refused("not-host")
        daemon.admission.check_door(session, session.name, self.request.remote_ip or "")
        await daemon.limits.turn(self.address, self.stream, cost=TRANSCRIPT_COST)
        as_json = self.get_query_argument("format", "txt") == "json"
        name = f"{daemon.config.title}-{datetime.date.today()}.{'json' if as_json else 'txt'}"
        self.set_header("Content-Type", "application/x-ndjson" if as_json else "text/plain; charset=UTF-8")
        self.set_header("Content-Disposition", f"attachment; filename*=UTF-8''{urllib.parse.quote(name, safe='')}")
        await self.deliver_pieces(self.pieces(as_json))

    async def pieces(self, as_json: bool) -> AsyncIterator[bytes]:
        """A page of the feed each. Raises STORE_ERRORS."""
        is_deleted = self.daemon.room.state.is_deleted
        async for page in self.daemon.store.pages("-", id_text(self.daemon.feed.memory.last)):
            events = itertools.chain.from_iterable(decode_events(entry.raw) for entry in page)
            said = [event for event in events if event.type == "message" and not is_deleted(event.seq)]
            yield b"".join([transcript_line(event, as_json) for event in said])


def transcript_line(event: Event, as_json: bool) -> bytes:
    """A message; what looks like the next line of the file is indented."""
    message = encode_message(event)
    if as_json:
        return message.json + b"\n"
    line = STEERING.sub("", line_of(message.fields()))
    return f"{datetime.datetime.fromtimestamp(event.ts / 1000).astimezone():%Y-%m-%d %H:%M:%S} {line}\n".encode()


# === Pictures =========================================================================================================
# POST /pictures and GET /pictures/ID. What a file is is read from its bytes, and it must be that from the first to the
# last one. It comes whole, bounded in size and number; it goes piece by piece, so that a slow reader costs one piece.


MARKUP = (b"<!doctype", b"<html", b"<script", b"<iframe")  # of a page that would also be a picture,
SVG = re.compile(rb"<svg\s+\w")  # as this would
SEGMENT = re.compile(rb"\xff+([^\x00\xff])")  # of JPEG: how one begins, ...
AFTER_PIXELS = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")  # ... and where the pixels end


def measure_picture(data: bytes) -> tuple[int, int]:
    """Width and height in pixels. Raises Refused where it is no whole picture of the types that all browsers show."""
    kind = picture_type(data)
    if kind is None:
        raise Refused("bad-picture", "picture-type")
    try:
        width, height = PICTURE_TYPES[kind][1](data)
    except (ValueError, IndexError, StopIteration, struct.error):
        raise Refused("bad-picture", "picture-broken") from None
    text = data.lower()
    if SVG.search(text) or any(mark in text for mark in MARKUP):
        raise Refused("bad-picture", "picture-broken")
    if not 0 < width * height <= PICTURE_PIXELS or max(width, height) > PICTURE_SIDE:
        raise Refused("bad-picture", "picture-pixels", limit=PICTURE_PIXELS // 1_000_000, side=PICTURE_SIDE)
    return width, height


def picture_type(data: bytes) -> str | None:
    """As the first bytes tell it, for Content-Type."""
    return next((kind for kind, (beginning, _) in PICTURE_TYPES.items() if re.match(beginning, data)), None)


def png_size(data: bytes) -> tuple[int, int]:
    """Of its header (PNG 11.2.2), where all chunks are whole and the last one ends the file. Raises ValueError."""
    at, kinds = 8, list[bytes]()
    while at < len(data) and len(kinds) < PICTURE_PARTS:
        length, kind = struct.unpack_from(">I4s", data, at)
        (checksum,) = struct.unpack_from(">I", data, at + 8 + length)
        if checksum != zlib.crc32(data[at + 4 : at + 8 + length]):
            raise ValueError
        at += 12 + length
        kinds.append(kind)
    if kinds[0] != b"IHDR" or kinds.count(b"IHDR") > 1 or b"IDAT" not in kinds:
        raise ValueError
    if at != len(data) or kinds.index(b"IEND") < len(kinds) - 1:
        raise ValueError
    width, height = struct.unpack_from(">II", data, 16)
    return width, height


def jpeg_size(data: bytes) -> tuple[int, int]:
    """Of its only frame (JPEG B.2.2), where the end of the image is that of the file. Raises ValueError."""
    at, sizes, scans, parts = 2, list[tuple[int, int]](), 0, iter(range(PICTURE_PARTS))
    while marker := SEGMENT.match(data, at):
        next(parts)
        kind, at = marker[1][0], marker.end()
        if kind == 0xD9 and at == len(data) and scans and len(sizes) == 1:
            return sizes[0]
        (length,) = struct.unpack_from(">H", data, at)
        if 0xC0 <= kind <= 0xCF and kind not in (0xC4, 0xC8, 0xCC):
            height, width = struct.unpack_from(">HH", data, at + 3)
            sizes.append((width, height))
        at += length
        if kind == 0xDA and (after := AFTER_PIXELS.search(data, at)):
            scans, at = scans + 1, after.start()
    raise ValueError


def webp_size(data: bytes) -> tuple[int, int]:
    """Of its canvas (RFC 9649), which its picture fills, where all chunks fill the file. Raises ValueError."""
    at, kinds, sizes = 12, list[bytes](), set[tuple[int, int]]()
    if struct.unpack_from("<I", data, 4)[0] + 8 != len(data):
        raise ValueError
    while at < len(data) and len(kinds) < PICTURE_PARTS:
        kind, length = struct.unpack_from("<4sI", data, at)
        head = int.from_bytes(data[at + 8 : at + 18], "little")
        if kind == b"VP8X":
            sizes.add(((head >> 32 & 0xFFFFFF) + 1, (head >> 56 & 0xFFFFFF) + 1))
        elif kind == b"VP8L":
            sizes.add(((head >> 8 & 0x3FFF) + 1, (head >> 22 & 0x3FFF) + 1))
        elif kind == b"VP8 ":
            sizes.add((head >> 48 & 0x3FFF, head >> 64 & 0x3FFF))
        at += 8 + length + length % 2
        kinds.append(kind)
    if at != len(data) or len(sizes) != 1 or not {b"VP8L", b"VP8 ", b"ANMF"}.intersection(kinds):
        raise ValueError
    return sizes.pop()


def gif_size(data: bytes) -> tuple[int, int]:
    """Of its screen (GIF89a 18), on which all images are, where its trailer ends the file. Raises ValueError."""
    width, height, flags = struct.unpack_from("<HHB", data, 6)
    at, images, parts = 13 + gif_colors(flags), 0, iter(range(PICTURE_PARTS))
    while (kind := data[at]) != 0x3B:
        next(parts)
        if kind == 0x2C:
            left, top, wide, high, flags = struct.unpack_from("<HHHHB", data, at + 1)
            if left + wide > width or top + high > height:
                raise ValueError
            at, images = at + 11 + gif_colors(flags), images + 1
        elif kind == 0x21:
            at += 2
        else:
            raise ValueError
        while data[at]:
            next(parts)
            at += 1 + data[at]
        at += 1
    if at + 1 != len(data) or not images:
        raise ValueError
    return width, height


def gif_colors(flags: int) -> int:
    """How many bytes the table of colours has that these flags announce."""
    return 3 * 2 ** (1 + flags % 8) if flags & 0x80 else 0


PICTURE_TYPES = {  # how a file of that type begins, and what measures it
    "image/png": (rb"\x89PNG\r\n\x1a\n", png_size),
    "image/jpeg": (rb"\xff\xd8\xff", jpeg_size),
    "image/webp": (rb"(?s:RIFF....WEBP)", webp_size),
    "image/gif": (rb"GIF8[79]a", gif_size),
}


@tornado.web.stream_request_body
class PicturesHandler(ActsHandler):
    """POST /pictures: takes one, and tells the id to say it with."""

    sender: Member | None = None
    received: bytearray | None = None  # of what is on its way in, and isn't refused
    refused: Refused | None = None

    async def prepare(self) -> None:
        """Whoever may not send one hears so when all of it has come: who is still sending doesn't listen."""
        await super().prepare()
        if (whole_number(self.request.headers.get("Content-Length", "")) or 0) > 2 * PICTURE_BYTES:
            raise Refused("too-long", "picture-large", limit=PICTURE_BYTES // 1024)  # that is too much to wait for
        connection: Any = self.request.connection
        connection.set_max_body_size(2 * PICTURE_BYTES)
        connection.set_body_timeout(self.daemon.config.picture_seconds)
        try:
            self.begin(await self.admit(self.current_user))
        except Refused as refused:
            self.refused = refused

    def begin(self, member: Member) -> None:
        """One at a time of a browser, at its pace and that of its address; hosts have none. Raises Refused."""
        limits, uploads, browser = self.daemon.limits, self.daemon.uploads, member.sid[:BROWSER_CHARS]
        if not self.daemon.config.pictures:
            raise Refused("no-picture", "pictures-off")
        if browser in uploads:
            raise Refused("too-fast", retry_after=1)
        surplus = self.surplus() if len(uploads) >= UPLOADS_AT_ONCE else None
        if not self.daemon.room.is_host(member):
            if refused := self.daemon.room.state.cannot_write(member.sid, member.name, self.daemon.store.now()):
                raise refused
            limits.messages.pace(self.address, cost=0)
            limits.says.pace(browser, cost=PICTURE_COST)
            limits.messages.pace(self.address, cost=PICTURE_COST)
        if surplus:
            surplus.end(Refused("too-fast", retry_after=1))
        self.sender, self.received = member, bytearray()
        uploads[browser] = self

    def surplus(self) -> PicturesHandler:
        """Which upload ends for this one: the oldest from the address with most of them. Raises Refused where that
        would not be fair: it has just begun, and as many come from this address.
        """
        coming = [upload for upload in self.daemon.uploads.values() if upload.received is not None]
        counts = collections.Counter(upload.address for upload in coming)
        oldest = max(coming, key=lambda upload: counts[upload.address], default=None)
        if oldest and counts[oldest.address] > counts[self.address] + 1:
            return oldest
        if oldest and oldest.request.request_time() >= UPLOAD_SECONDS:
            return oldest
        raise Refused("too-fast", retry_after=1)

    def data_received(self, chunk: bytes) -> None:
        """Of what is refused or too large nothing is kept."""
        if self.received is not None and len(self.received) <= PICTURE_BYTES:
            self.received += chunk

    async def post(self) -> None:
        """201 when the store has it."""
        if not (sender := self.sender) or self.received is None:
            raise self.refused or Refused("unavailable")
        data, self.received = bytes(self.received), None
        if len(data) > PICTURE_BYTES:
            raise Refused("too-long", "picture-large", limit=PICTURE_BYTES // 1024)
        width, height = await asyncio.to_thread(measure_picture, data)  # it may take 100 ms
        id = self.picture_id(sender, f"{secrets.token_hex(8)}-{width}x{height}")
        try:
            await self.daemon.store.add_picture(id, data)
        except STORE_ERRORS:
            raise Refused("unavailable", retry_after=self.daemon.config.retry_seconds) from None
        self.release(sender)
        self.set_status(201)
        self.finish(picture_fields(id))

    def on_finish(self) -> None:
        self.end()

    def on_connection_close(self) -> None:
        super().on_connection_close()
        self.end()

    def end(self, refused: Refused | None = None) -> None:
        """Nothing of it is kept any more."""
        if self.sender:
            del self.daemon.uploads[self.sender.sid[:BROWSER_CHARS]]
            self.sender, self.received, self.refused = None, None, refused


class PictureHandler(BaseHandler):
    """GET /pictures/ID: for members, and for nothing but to be looked at."""

    async def get(self, id: str) -> None:
        """Its bytes, kept by the browser for good."""
        if self.current_user is None:
            raise Refused("not-member", "no-session")
        try:
            piece, size = await self.daemon.store.read_picture(id)
        except STORE_ERRORS:
            raise Refused("unavailable", retry_after=self.daemon.config.retry_seconds) from None
        if not size:
            raise Refused("no-picture")
        self.set_header("Content-Type", picture_type(piece) or "application/octet-stream")
        self.set_header("Content-Length", size)
        self.set_header("Content-Security-Policy", "default-src 'none'; sandbox")
        self.set_header("Cache-Control", f"private, max-age={PICTURE_DAYS * 86400}, immutable")
        await self.deliver_pieces(self.pieces(id, piece, size))

    async def pieces(self, id: str, piece: bytes, size: int) -> AsyncIterator[bytes]:
        """The rest is read as it is needed. Raises STORE_ERRORS."""
        yield piece
        sent = len(piece)
        while sent < size:
            piece, _ = await self.daemon.store.read_picture(id, sent)
            if not piece:
                raise ConnectionError("the picture is gone")
            yield piece
            sent += len(piece)


# === Addresses and banner =============================================================================================
# Under which URLs the room can be opened, on this machine and by others on the network, and how the operator is told.

ALL_ADDRESSES = ("", "0.0.0.0", "::")  # of --host: every address of this machine


def local_url(config: Config, port: int, host: str = "") -> str:
    """The room's address under that name, or on this machine."""
    host = host or (config.host if config.host not in ALL_ADDRESSES else "localhost")
    scheme, default_port = ("https", 443) if config.certfile else ("http", 80)
    return f"{scheme}://{f'[{host}]' if ':' in host else host}{f':{port}' if port != default_port else ''}/"


def lan_urls(config: Config, port: int) -> list[str]:
    """The room's addresses for everybody else on the network, the best first: a certificate is for a name."""
    names = config.allow_host if config.certfile else ()
    addresses = lan_addresses() if config.host in ALL_ADDRESSES else []
    return [local_url(config, port, host) for host in (*names, *addresses)]


def lan_addresses() -> list[str]:
    """This machine's IPv4 addresses that others may reach, the likeliest first.

    That is the private address of real hardware, even where a tunnel has the default route, and before the bridges of
    containers; of several, that of the default route.
    """
    routed = default_address()
    found = {routed: ""} | interface_addresses()

    def unlikely(address: str) -> tuple[bool, ...]:
        """What speaks against it, the worst first."""
        ip = ipaddress.ip_address(address)
        return ip.is_link_local, not is_hardware(found[address]), not ip.is_private, address != routed

    return sorted((a for a in found if a and not ipaddress.ip_address(a).is_loopback), key=unlikely)


def default_address() -> str:
    """From which address this machine would reach the outside; "" if it can't. Nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, contextlib.suppress(OSError):
        probe.connect(("203.0.113.1", 9))  # an address reserved for documentation
        return str(probe.getsockname()[0])
    return ""


def is_hardware(interface: str) -> bool:
    """Whether that is no tunnel, bridge or the like, where the system tells."""
    if sys.platform == "darwin":
        return interface.startswith("en")
    return Path(f"/sys/class/net/{interface}/device").exists()


def interface_addresses() -> dict[str, str]:
    """The address of each interface, and the interface's name where the system tells (not Windows)."""
    found: dict[str, str] = {}
    try:
        import fcntl
    except ModuleNotFoundError:
        with contextlib.suppress(OSError):
            found = dict.fromkeys(socket.gethostbyname_ex(socket.gethostname())[2], "")
        return found
    command = 0xC0206921 if sys.platform == "darwin" else 0x8915  # SIOCGIFADDR
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):  # it has no IPv4 address
                answer = fcntl.ioctl(sock, command, name.encode()[:15].ljust(40, b"\0"))
                found[socket.inet_ntoa(answer[20:24])] = name
    return found


def store_name(config: Config) -> str:
    """Where messages are kept, without a password."""
    if not config.redis_url:
        return "memory"
    parts = urllib.parse.urlsplit(config.redis_url)
    return f"{parts.scheme}://{parts.hostname or ''}{f':{parts.port}' if parts.port else ''}{parts.path}"


def host_path(key: str) -> str:
    """What makes a host of whoever opens it."""
    return "host?" + urllib.parse.urlencode({"key": key})


def banner(config: Config, port: int, host_key: str) -> str:
    """What the operator sees: where to open the room, and what to know. The host's link and a picture of the room's are
    for a person at a terminal: what goes elsewhere may be a log that others read.
    """
    urls, here = lan_urls(config, port), local_url(config, port)
    terminal = sys.stdout is not None and sys.stdout.isatty()
    moved = f" (port {DEFAULT_PORT} is in use)" if config.port is None and port != DEFAULT_PORT else ""
    rows = [("on this machine", here + moved), *(("on the network", url) for url in urls[:BANNER_URLS])]
    if len(urls) > BANNER_URLS:
        rows.append(("", f"and {len(urls) - BANNER_URLS} more"))
    if terminal:
        rows.append(("for the host", here + host_path(host_key)))
    kept = f"in {store_name(config)}, room {config.room}" if config.redis_url else "in memory: a restart forgets them"
    rows.append(("messages", kept))
    if config.workers > 1:
        rows.append(("workers", f"{config.workers} processes"))
    lines = [f"tornchat {__version__}: {config.title}{', with a password' if config.password else ''}"]
    lines += [f"  {what:<17}{told}" for what, told in rows]
    if urls:
        lines += [
            "  Phones cannot connect? They need the same Wi-Fi,",
            "  and this machine's firewall must let Python in.",
        ]
    lines.append("  Ctrl+C stops.")
    return "\n".join(lines) + (qr_code(urls[0]) if urls and terminal else "")


def qr_code(url: str) -> str:
    """The URL for a phone's camera, below what is printed in a terminal; "" without segno."""
    out = io.StringIO()
    if symbol := qr_symbol(url):
        out.write("\n")
        symbol.terminal(out, border=2, compact=True)
    return out.getvalue()


# === Application ======================================================================================================
# Where everything is wired: routes, sockets to listen on, the order of starting and of stopping.


class FatalError(Exception):
    """Why the program ends, in one line for its user."""


def make_app(daemon: Daemon) -> tornado.web.Application:
    context = {"daemon": daemon}
    return tornado.web.Application(
        [
            (r"/", PageHandler, context),
            (r"/login", LoginHandler, context),
            (r"/logout", LogoutHandler, context),
            (r"/host", HostHandler, context),
            (r"/chat", ChatSocket, context),
            (r"/messages", MessagesHandler, context),
            (r"/pictures", PicturesHandler, context),
            (rf"/pictures/({PICTURE.pattern.replace('(', '(?:')})", PictureHandler, context),
            (r"/acts", ActsHandler, context),
            (r"/transcript", TranscriptHandler, context),
            (r"/healthz", HealthHandler, context),
            (r"/(join\.json|qr\.svg)", JoinHandler, context),
            (rf"/({'|'.join(map(re.escape, ASSETS))})", AssetHandler, context),
        ],
        default_handler_class=NotFoundHandler,
        default_handler_args=context,
        template_loader=tornado.template.DictLoader(TEMPLATES),
        cross_origin_protection=True,
        websocket_max_message_size=FRAME_BYTES,
        log_function=log_request,
    )


def log_request(handler: tornado.web.RequestHandler) -> None:
    """The access log: paths without their query, which may hold a password."""
    request, status = handler.request, handler.get_status()
    level = logging.ERROR if status == 500 else logging.DEBUG
    web_log.log(level, "%d %s %s %s", status, request.method, shown(request.path), request.remote_ip)


class Door(socket.socket):
    """A listening socket that lets nobody in while nearly all descriptors of the process are in use.

    Tornado alone would fail to accept, log it, and try again at once, for as long as the crowd lasts. Here the crowd
    waits outside, unheard, and is let in as others leave.
    """

    visitors: Visitors  # set by the daemon; a supervisor accepts nobody
    accepted = 0
    logged = -math.inf  # when the log said last that it is full, in s of time.monotonic

    def accept(self) -> tuple[socket.socket, Any]:
        """Called by Tornado until it raises BlockingIOError."""
        self.accepted += 1
        if not self.accepted % ACCEPTS_A_TURN:
            raise BlockingIOError  # the rest in the next turn
        if self.visitors.crowded:
            self.visitors.crowded = False
            self.pause(CROWD_SECONDS)
            raise BlockingIOError
        full = len(self.visitors.open) >= file_limit() - SPARE_FILES
        try:
            if full and not self.visitors.quiet:
                raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
            newcomer = super().accept()  # nobody has to leave before somebody is there
            if full:
                self.visitors.make_room()
            return newcomer
        except OSError as error:
            if error.errno not in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                raise
            self.pause(FULL_SECONDS)
            if time.monotonic() - self.logged > FULL_LOG_SECONDS:
                self.logged = time.monotonic()
                log.warning("full: newcomers wait until somebody leaves (%s; `ulimit -n` allows more)", error.strerror)
        raise BlockingIOError

    def pause(self, seconds: float) -> None:
        """Accepts nobody for a while."""
        loop = tornado.ioloop.IOLoop.current()
        loop.update_handler(self.fileno(), 0)
        loop.call_later(seconds, self.resume)

    def resume(self) -> None:
        if self.fileno() >= 0:  # else it was closed for good meanwhile
            tornado.ioloop.IOLoop.current().update_handler(self.fileno(), tornado.ioloop.IOLoop.READ)


class Server(tornado.httpserver.HTTPServer):
    """Tornado's, which tells the visitors' list who comes and goes."""

    visitors: Visitors

    def handle_stream(self, stream: tornado.iostream.IOStream, address: tuple[Any, ...]) -> None:
        self.visitors.come(stream, network(address[0]))
        super().handle_stream(stream, address)

    def _handle_connection(self, connection: socket.socket, address: Any) -> None:
        """Called by Tornado, which with TLS raises an error for whoever has gone before it could be let in."""
        try:
            super()._handle_connection(connection, address)
        except OSError:
            connection.close()

    def on_close(self, server_conn: Any) -> None:
        """Called by Tornado when a connection is closed, or has become a WebSocket's."""
        super().on_close(server_conn)
        if server_conn.stream.closed():
            self.visitors.leave(server_conn.stream)


def bind(config: Config) -> list[Door]:
    """The sockets to listen on, with the next free port if the default one is busy. Raises FatalError."""
    if config.inherited:
        return [Door(fileno=descriptor) for descriptor in config.inherited]
    first, tries = (DEFAULT_PORT, PORTS_TRIED) if config.port is None else (config.port, 1)
    for port in range(first, first + tries):
        try:
            if config.host in ALL_ADDRESSES and is_answered(port):
                raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))
            ports = tornado.netutil.bind_sockets(port, config.host or None, backlog=1024)
            for bound in ports:  # what it accepts inherits that
                bound.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
            return [Door(fileno=bound.detach()) for bound in ports]
        except OSError as error:  # getaddrinfo's errors have numbers of their own, below 0
            if tries == 1 or error.errno != errno.EADDRINUSE:
                where = f"{config.host} port {port}" if config.host else f"port {port}"
                advice = ". Another port: --port N" if error.errno in (errno.EADDRINUSE, errno.EACCES) else ""
                raise FatalError(f"cannot listen on {where}: {error.strerror}{advice}") from None
    raise FatalError(f"ports {DEFAULT_PORT} to {port} are all in use: choose another one with --port")


def is_answered(port: int) -> bool:
    """Whether a program has that port of 127.0.0.1: macOS and Windows would let us bind all addresses beside it."""
    with socket.socket() as probe:
        probe.settimeout(0.2)  # Windows asks a closed port again and again, for 2 s
        return probe.connect_ex(("127.0.0.1", port)) == 0


def tls_context(config: Config) -> ssl.SSLContext | None:
    """For https, where a certificate was given. Raises FatalError."""
    if not config.certfile:
        return None

    def refuse_passphrase() -> NoReturn:  # OpenSSL would ask at the terminal; a service has none
        key = config.keyfile or config.certfile
        raise FatalError(f"the key in {key} has a passphrase: openssl pkey -in {key} -out FILE writes it without")

    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    try:
        context.load_cert_chain(config.certfile, config.keyfile or None, refuse_passphrase)
    except ssl.SSLError:
        raise FatalError(f"{config.certfile} and its key are not PEM files that belong together (--keyfile)") from None
    except OSError as error:
        files = " or ".join(filter(None, (config.certfile, config.keyfile)))
        raise FatalError(f"cannot read the certificate {files}: {error.strerror}") from None
    return context


class Daemon:
    """A running room: what `python tornchat.py` starts, and what tests start in their own loop."""

    def __init__(self, config: Config, ports: list[Door]) -> None:
        self.config, self.ports, self.tls = config, ports, tls_context(config)
        self.port = int(ports[0].getsockname()[1])
        self.started = time.monotonic()
        self.hostnames = frozenset(
            host.lower().removesuffix(".") for host in (socket.gethostname(), *config.allow_host)
        )
        self.sockets: set[ChatSocket] = set()  # all that are open, joined or not
        self.uploads: dict[str, PicturesHandler] = {}  # of browsers that are sending a picture, the oldest first
        self.limits, self.visitors = Limits(config.rate), Visitors()
        for bound in ports:
            bound.visitors = self.visitors
        self.store = Store(connect(config), config)
        self.room = Room(config)
        self.outbox = Outbox(self.room, config)
        self.feed = Feed(self.store, self.outbox)
        self.admission = Admission(self.feed, self.limits)
        self.presence = Presence(self.feed, self.admission.keep_few)

    @classmethod
    async def start(cls, config: Config) -> Self:
        """Takes a port, reads the store, opens the room. Raises FatalError, and then leaves nothing behind."""
        async with contextlib.AsyncExitStack() as undo:
            ports = bind(config)
            for port in ports:
                undo.callback(port.close)
            daemon = cls(config, ports)
            undo.push_async_callback(daemon.store.close)
            await wait_for_redis(config, daemon.feed.open)
            daemon.listen()
            undo.pop_all()
        return daemon

    def listen(self) -> None:
        self.server = Server(
            make_app(self),
            ssl_options=self.tls,
            max_header_size=HEADER_BYTES,
            max_body_size=FRAME_BYTES,
            idle_connection_timeout=self.config.header_seconds,
            body_timeout=self.config.body_seconds,
        )
        self.server.visitors = self.visitors
        self.server.add_sockets(self.ports)
        self.feed.start()
        self.presence.start()

    @property
    def url(self) -> str:
        return local_url(self.config, self.port)

    def addresses(self) -> list[str]:
        """URLs for others on the network, the best first."""
        return lan_urls(self.config, self.port)

    @property
    def host_key(self) -> str:
        """What opens /host?key=..."""
        return self.store.host_key

    @property
    def cookie(self) -> str:
        """The name of the session's cookie: all daemons of a room have the same, for they have the secret in common.

        Browsers send a cookie to every port of a host, so two rooms there must not have one name, or each would log out
        the people of the other. `__Host-` is a promise that browsers keep: set over TLS, by this very host.
        """
        place = f"{self.store.secret} {self.config.room}" if self.config.redis_url else str(self.port)
        return ("__Host-" if self.tls else "") + "tornchat-" + hashlib.sha256(place.encode()).hexdigest()[:8]

    @property
    def cookie_key(self) -> str:
        """What signs the cookies: none of another room is valid, nor one from before the password was changed."""
        made_of = to_json([self.config.room, self.config.password])
        return hmac.new(self.store.secret.encode(), made_of.encode(), "sha256").hexdigest()

    async def stop(self) -> None:
        """Nobody new, nothing lost: what was said is stored, everybody is told, the leases stay for their return."""
        if self.presence.stopping:
            return
        self.presence.stopping = True
        self.server.stop()
        await self.outbox.drain()
        await self.say_goodbye()
        await self.presence.stop()
        await self.feed.stop()
        await self.store.close()

    async def say_goodbye(self) -> None:
        """Tells everybody, and gives them a moment to close; who doesn't is cut off."""
        for handler in tuple(self.sockets):
            handler.shut(1001, "stopping")
        for listener in tuple(self.room.listeners):
            listener.shut(1001, "stopping")
        deadline = time.monotonic() + 0.5
        while (self.sockets or self.room.listeners) and time.monotonic() < deadline:  # noqa: ASYNC110 - short, and once
            await asyncio.sleep(0.01)
        for handler in tuple(self.sockets):
            handler.stream.close()
        await self.server.close_all_connections()


async def wait_for_redis(config: Config, reach: Callable[[], Awaitable[T]]) -> T:
    """Tries until the Redis can be used: one that isn't up yet has `--wait` seconds. Raises FatalError."""
    deadline, waiting = time.monotonic() + config.wait, False
    while True:
        try:
            return await reach()
        except STORE_ERRORS as error:
            asked = "to TLS " if config.redis_url.startswith("rediss:") else ""
            reason = str(error) or f"no answer {asked}within {config.store_seconds:g} s"
            if not is_passing(error) or time.monotonic() >= deadline:
                raise FatalError(f"cannot use the Redis at {store_name(config)}: {reason}") from None
        if not waiting:
            log.warning("waiting up to %g s for the Redis at %s: %s", config.wait, store_name(config), reason)
        waiting = True
        await asyncio.sleep(config.retry_seconds)


def is_passing(error: Exception) -> bool:
    """Whether that may pass: nobody is there, or is silent, or is loading. Any other answer will be the same again."""
    refused = isinstance(error, redis.exceptions.AuthenticationError) or isinstance(error.__context__, ssl.SSLError)
    return isinstance(error, redis.exceptions.ConnectionError | OSError) and not refused


async def serve(config: Config) -> None:
    """Runs a daemon until it is told to stop, or until the parent of a worker is gone. Raises FatalError."""
    raise_file_limit()
    daemon = await Daemon.start(config)
    stop = stop_on_signals()
    if config.inherited:
        asyncio.get_running_loop().add_reader(sys.stdin.fileno(), stop.set)
    announce(config, daemon.port, daemon.host_key)
    stopped = asyncio.create_task(stop.wait())
    tasks = [*daemon.feed.tasks, *daemon.presence.tasks]
    await asyncio.wait([stopped, *tasks], return_when=asyncio.FIRST_COMPLETED)
    for task in tasks:
        if task.done():
            task.result()  # a bug: its traceback is the best we can give
    print_out(config, "tornchat: stopping")
    await daemon.stop()
    log.info("stopped")


def file_limit() -> float:
    """How many files and connections this process may have open."""
    if resource is None:
        return SELECT_SOCKETS
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return math.inf if limit == resource.RLIM_INFINITY else limit


def raise_file_limit() -> None:
    """Lets the process have as many connections as the system allows; a shell's own limit is often 1,024."""
    if resource is None:
        return
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    wanted = FILES if hard == resource.RLIM_INFINITY else min(hard, FILES)
    while file_limit() < wanted:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
            return
        except (ValueError, OSError):  # macOS promises more than it gives
            wanted //= 2


async def supervise(config: Config, command: Sequence[str]) -> None:
    """Runs workers, each a daemon, on sockets that it holds for them, until it is told to stop. Raises FatalError."""
    ports = bind(config)
    tls_context(config)  # what a worker could not start for is said once, here
    store = Store(connect(config), config)
    try:
        await wait_for_redis(config, store.keep_secrets)
    finally:
        await store.close()
    stop = stop_on_signals()
    announce(config, int(ports[0].getsockname()[1]), store.host_key)
    descriptors = [port.fileno() for port in ports]
    async with asyncio.TaskGroup() as group:
        numbers = range(1, config.workers + 1)
        workers = [group.create_task(keep_worker(number, command, descriptors)) for number in numbers]
        await stop.wait()
        print_out(config, "tornchat: stopping")
        for worker in workers:
            worker.cancel()
    log.info("stopped")


async def keep_worker(number: int, command: Sequence[str], descriptors: Sequence[int]) -> NoReturn:
    """Starts a worker, and another one whenever it has ended, but not twice within WORKER_PAUSE_SECONDS."""
    environ = {**os.environ, "TORNCHAT_INHERITED": ",".join(map(str, descriptors))}
    while True:
        began = time.monotonic()
        worker = await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.PIPE,  # it ends when we do, however we do
            pass_fds=descriptors,
            env=environ,
            start_new_session=True,  # Ctrl+C is for us; we pass it on
        )
        try:
            code = await worker.wait()
        finally:  # we may have been cancelled
            await end_worker(worker)
        log.error("worker %d has ended with code %d: another one is started", number, code)
        await asyncio.sleep(began + WORKER_PAUSE_SECONDS - time.monotonic())


async def end_worker(worker: asyncio.subprocess.Process) -> None:
    """In order, and if that takes longer than it may, at once."""
    with contextlib.suppress(ProcessLookupError):
        worker.terminate()
    try:
        await asyncio.wait_for(worker.wait(), WORKER_END_SECONDS)
    except TimeoutError:
        worker.kill()
        await worker.wait()


def stop_on_signals() -> asyncio.Event:
    """What the first signal to stop sets; the second one ends the process."""
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()

    def handle(number: int, frame: object) -> None:
        if stop.is_set():
            os._exit(0)
        loop.call_soon_threadsafe(stop.set)

    on_stop_signals(handle)
    return stop


def on_stop_signals(handler: Any) -> None:
    """Sets what Ctrl+C, a service manager and a closed terminal call; with `nohup` the last one is not heeded."""
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK"):
        number = getattr(signal, name, None)
        if number and not (name == "SIGHUP" and signal.getsignal(number) == signal.SIG_IGN):
            signal.signal(number, handler)


def announce(config: Config, port: int, host_key: str) -> None:
    """Says where the room is: to a person with the banner, to the log of a service in a line."""
    print_out(config, banner(config, port, host_key))
    log.info("started: tornchat %s on port %d, messages in %s", __version__, port, store_name(config))


def print_out(config: Config, text: str) -> None:
    """Prints for the operator. That nobody reads it (a closed pipe, a full disk) must not end the room."""
    if config.quiet or config.inherited or sys.stdout is None:
        return
    try:
        print(text, flush=True)
    except OSError:
        discard_stdout()


def discard_stdout() -> None:
    """Nobody reads it any more: Python's own flush at the end must not spoil the exit code."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


# === Terminal client ==================================================================================================
# A member without a browser. The Client keeps session, socket and outbox as the page's script does; what it hears goes
# to a Screen (a person at a terminal) or to Lines (pipes).

RETRY_SECONDS = 10  # the longest pause between two tries
PING_SECONDS = 5  # a server that doesn't answer a ping before the next one is gone
HOLD_SECONDS = 3  # to wait where a refusal names no time
QUIT_SECONDS = 5  # for what was said last to be confirmed; then its author is told that it wasn't
LOGOUT_SECONDS = 2  # for the name to be given back
NAMES_IN_LINE = 10  # of more people only the number is told
QUOTED_CHARS = 60  # of what was not sent, or of what no tornchat would say
TIMES = range(253_402_214_400_000)  # in ms, up to the year 9999: what datetime can show
HOST_REFUSALS = ("muted", "locked", "slow")  # what a host has decided; its author is told why the text waits
PASSING_REFUSALS = ("too-fast", "unavailable", "name-lost", *HOST_REFUSALS)  # keep the text: it may be said later
RECENT_MESSAGES = 1000  # whose author and beginning are remembered, for what is done to them later
REMOVE_SECONDS = 600  # for which /remove keeps somebody out
UNREACHED = (OSError, UnicodeError, tornado.httpclient.HTTPError, tornado.websocket.WebSocketError)  # an odd host name


def parse_any(raw: str | bytes) -> dict[str, Any]:
    """A JSON object; {} for anything else."""
    with contextlib.suppress(Refused):
        return parse_object(raw)
    return {}


def quoted(text: str) -> str:
    text = shown(text)
    return text if len(text) <= QUOTED_CHARS else text[: QUOTED_CHARS - 1] + "…"


class Client:
    """One session in a room: it comes back after every loss, where it was, and what isn't confirmed is said again."""

    view: Lines

    def __init__(self, config: Config, language: str) -> None:
        self.config, self.language, self.words = config, language, WORDS[language]
        self.url, self.name = config.join or "", config.name
        self.headers = {"Accept": "application/json", "Accept-Language": language}
        self.let_in = False  # the room knows our session
        self.clock_ahead = 0.0  # the room's clock, of ours, in s
        self.handshake: asyncio.Future[tornado.websocket.WebSocketClientConnection] | None = None
        self.socket: tornado.websocket.WebSocketClientConnection | None = None
        self.state = "js_state_connecting"  # of the connection: its word
        self.failures = 0  # in a row, to connect
        self.epoch, self.after, self.at = "", 0, 0  # of the newest message heard; `at` is its ts, 0: not heard
        self.replay_end = self.skipped = 0  # up to which seq it is history; and older than what the user wants
        self.members: dict[str, None] = {}
        self.count = 0
        self.outbox: dict[str, str] = {}  # cid -> text of what isn't confirmed, in order
        self.in_flight = ""  # cid of the one said and not yet answered: one at a time keeps the order
        self.hold_until = 0.0  # nothing is said before, in s of time.monotonic ...
        self.hold_reason = ""  # ... because of a host, in words
        self.hosts: list[str] = []
        self.mode: Mapping[str, Any] = OPEN_MODE
        self.recent: dict[int, tuple[str, str]] = {}  # seq -> author and beginning
        self.idle = asyncio.Event()  # all history is shown, all that was said is confirmed

    async def log_in(self) -> None:
        """Under our name, in the session that we have or a new one. Raises FatalError if refused, and UNREACHED."""
        if (key := self.config.host_key) and (await self.fetch(host_path(key))).code >= 400:
            if not self.epoch:
                raise FatalError(self.words["term_no_host"])
            self.view.notice(self.words["term_no_host"])  # the room was restarted, and has another key
        answer = await self.fetch("login", "POST", nickname=self.name, password=self.config.password)
        fields = parse_any(answer.body)
        if answer.code >= 500:
            raise OSError(fields.get("text", answer.reason))
        match fields:
            case {"name": str(name)}:
                self.name = shown(name)
            case {"text": str(reason), "suggestion": free}:
                raise FatalError(f"{reason} {self.words['term_free'].format(name=free)}")
            case {"text": str(reason)}:
                raise FatalError(reason)
            case _:
                raise self.no_room(f"{answer.code} {answer.reason}")
        with contextlib.suppress(ValueError, OverflowError):  # to the second, until the room tells its time
            date = email.utils.parsedate_to_datetime(answer.headers.get("Date", ""))
            self.clock_ahead = date.timestamp() + 0.5 - time.time()

    async def fetch(self, path: str, method: str = "GET", **form: str) -> tornado.httpclient.HTTPResponse:
        body = urllib.parse.urlencode(form) if method == "POST" else None
        request = tornado.httpclient.HTTPRequest(self.url + path, method, self.headers, body, follow_redirects=False)
        answer = await tornado.httpclient.AsyncHTTPClient().fetch(request, raise_error=False)
        if cookies := answer.headers.get_list("Set-Cookie"):
            self.headers["Cookie"] = "; ".join(cookie.split(";")[0] for cookie in cookies)
        return answer

    async def log_out(self) -> None:
        """Gives the name back, so that it is free for whoever comes next."""
        if self.handshake:  # one that is still under way would bring the name back
            await asyncio.wait([self.handshake], timeout=LOGOUT_SECONDS)
        with contextlib.suppress(*UNREACHED, TimeoutError):
            await asyncio.wait_for(self.fetch("logout", "POST"), LOGOUT_SECONDS)

    # --- connection ---

    @property
    def connected(self) -> bool:
        return self.state in ("js_state_connected", "js_state_away")

    async def keep_connected(self) -> NoReturn:
        """Connects, again and again. Raises FatalError."""
        while True:
            try:
                if self.epoch and not self.let_in:
                    await self.log_in()
                await self.connect()
            except UNREACHED as error:
                if not self.epoch:
                    raise self.unreachable(error) from None
            else:
                await self.receive_all()
            self.update()
            self.failures += 1
            await asyncio.sleep(backoff(self.failures, RETRY_SECONDS))

    async def connect(self) -> None:
        """A new socket, which goes on after the newest message heard. Raises UNREACHED."""
        self.in_flight = ""
        self.update()
        place = {"after": self.after, "epoch": self.epoch} | ({"at": self.at} if self.at else {})
        url = f"ws{self.url.removeprefix('http')}chat?{urllib.parse.urlencode(place if self.epoch else {})}"
        request = tornado.httpclient.HTTPRequest(url, headers=self.headers)
        self.handshake = asyncio.ensure_future(tornado.websocket.websocket_connect(request, ping_interval=PING_SECONDS))
        self.socket = await asyncio.shield(self.handshake)

    async def receive_all(self) -> None:
        """Until the connection ends. Raises FatalError if there is no coming back."""
        assert self.socket is not None
        try:
            while (raw := await self.socket.read_message()) is not None:
                self.receive(raw)
                self.update()
        finally:
            self.socket.close()
        code, reason = self.socket.close_code, self.socket.close_reason or ""
        if word := self.words.get(f"js_closed_{code}"):
            raise FatalError(shown(reason) if code == 4403 and reason else word.format(name=self.name))
        if code == 4401:  # restarted without a lasting store
            if not self.let_in or reason == "logout":
                raise FatalError(self.words.get(f"login_why_{reason}", reason))
            self.let_in = False
        if not self.epoch:
            raise self.unreachable(ConnectionError(reason or "silence"))
        self.state = "js_state_restarting" if code == 1001 else "js_state_waiting"

    def no_room(self, reason: str) -> FatalError:
        return FatalError(self.words["term_no_room"].format(url=self.url, reason=quoted(reason)))

    def unreachable(self, error: Exception) -> FatalError:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        return FatalError(self.words["term_unreachable"].format(url=self.url, reason=shown(reason)))

    # --- frames ---

    def receive(self, raw: str | bytes) -> None:
        """One frame; what only newer clients know is skipped. Raises FatalError."""
        match frame := parse_any(raw):
            case {"type": "welcome", "name": str(), "title": str(), "members": [*_], "count": int(), "epoch": str(),
                  "seq": int(), "recovered": bool(), "missed": int(), "reset": bool(),
                  "limits": {"history": int()}} if isinstance(frame.get("mode", {}), dict):  # fmt: skip
                self.on_welcome(frame)
            case {"type": "message", "seq": int(), "ts": int(ts), "name": str(), "text": str()} if ts in TIMES:
                self.on_message(frame)
            case {"type": "joined" | "left", "names": [*_], "count": int()}:
                self.on_passage(frame)
            case {"type": "refused", "code": str(), "text": str()}:
                self.on_refused(frame)
            case {"type": "note" | "cleared" | "muted" | "mode" | "hosts"}:
                self.on_act(frame)
            case {"type": "store", "available": bool(available)} if self.connected:
                self.state, self.hold_until = "js_state_connected" if available else "js_state_away", 0
            case {"type": "time", "ts": int(ts)} if ts in TIMES:
                self.clock_ahead = ts / 1000 - time.time()
            case _ if not self.epoch:
                raise self.no_room(str(raw))

    def on_welcome(self, frame: Mapping[str, Any]) -> None:
        """The beginning of a connection, or of a new history."""
        first, self.epoch, self.replay_end = not self.epoch, frame["epoch"], frame["seq"]
        self.name, self.count = shown(frame["name"]), frame["count"]
        self.members = dict.fromkeys(shown(str(name)) for name in frame["members"])
        self.on_act({"type": "hosts", "names": frame.get("hosts")})
        self.state, self.let_in, self.failures, self.hold_until = "js_state_connected", True, 0, 0
        if not frame["recovered"]:  # what was before won't come
            self.after, self.at = max(0, frame["seq"] - frame["limits"]["history"]), 0
        if isinstance(cleared := frame.get("cleared"), int) and cleared > self.after:
            self.after, self.at = cleared, 0
            if not first:
                self.on_act({"type": "cleared", "seq": cleared})
        if first:
            self.skipped = frame["seq"] - self.config.history
            title, hint = shown(frame["title"]), self.words["term_hint"]
            self.view.notice(f"{title} · {self.people(NAMES_IN_LINE)} · {hint}", minor=True)
        if frame["reset"]:
            self.skipped = 0
            self.view.notice(self.words["js_reset"])
        if frame["missed"]:
            self.view.notice(self.words["js_missed"].format(n=frame["missed"]))
        if (mode := frame.get("mode", self.mode)) != self.mode:
            self.on_act({"type": "mode"} | mode)
        if first and frame.get("pinned"):
            self.on_act({"kind": "pin", "message": frame["pinned"]})

    def on_message(self, frame: Mapping[str, Any]) -> None:
        """Somebody said something; if it is what we said, it is confirmed."""
        seq, name, deleted = frame["seq"], shown(frame["name"]), frame.get("deleted") is True
        if seq > self.after:
            self.after, self.at = seq, frame["ts"]
        if seq > self.skipped and deleted:
            self.view.notice(self.words["term_deleted"].format(name=name), minor=True)
        elif seq > self.skipped:
            self.view.message(frame)
        if name == self.name:
            self.resolve(frame.get("cid"))
        if not deleted:
            self.recent[seq] = name, quoted(self.text_of(frame))
        if seq > self.skipped:
            self.on_act({"kind": "react", "to": seq, "counts": frame.get("counts")})
        if len(self.recent) > RECENT_MESSAGES:
            del self.recent[next(iter(self.recent))]

    def text_of(self, frame: Mapping[str, Any]) -> str:
        """The text, and below it the address of a picture."""
        match frame.get("picture"):
            case {"id": str(id)}:
                return f"{frame['text']}\n[picture {self.url}pictures/{id}]".lstrip("\n")
        return str(frame["text"])

    def on_passage(self, frame: Mapping[str, Any]) -> None:
        self.count = frame["count"]
        names = dict.fromkeys(shown(str(name)) for name in frame["names"] if name != self.name)
        self.members = {name: None for name in self.members if name not in names}
        if frame["type"] == "joined":
            self.members |= names
        if names:
            self.view.notice(self.words["js_" + frame["type"]].format(names=", ".join(names)), minor=True)

    def on_refused(self, frame: Mapping[str, Any]) -> None:
        """What we said wasn't stored: later, or never. An act isn't tried again."""
        cid, code, reason = str(frame.get("cid", "")), frame["code"], shown(frame["text"])
        if cid in self.outbox and code not in PASSING_REFUSALS:
            self.report_unsent(self.resolve(cid), reason)
        elif cid in self.outbox:
            seconds = frame.get("retry_after")
            if not isinstance(seconds, int | float):
                seconds = math.inf if code == "locked" else HOLD_SECONDS  # a mode ends the lock
            self.in_flight, self.hold_until = "", time.monotonic() + seconds
            self.hold_reason = reason if code in HOST_REFUSALS else ""
            asyncio.get_running_loop().call_later(seconds + 0.02, self.update)
        elif cid:  # without one it ends the connection, and is told then
            self.view.notice(reason)

    def on_act(self, frame: Mapping[str, Any]) -> None:
        """A host, or somebody with a message, did something: tells it, and takes note of it."""
        words, told = self.words, ""
        by = shown(f"{frame['by']}: ") if "by" in frame else ""
        match frame:
            case {"kind": "delete", "to": int(seq)} if message := self.recent.pop(seq, None):
                told = words["term_deleted"].format(name=message[0])
            case {"kind": "react", "to": int(seq), "counts": {**counts}} if counts and seq in self.recent:
                signs = " ".join(shown(f"{sign} {count}") for sign, count in counts.items())
                told = f"{signs} · {': '.join(self.recent[seq])}"
            case {"kind": "pin", "message": {"name": str(name), "text": str(text)}}:
                told = words["term_pinned"].format(name=shown(name), text=text)
            case {"kind": "pin", "message": None}:
                told = words["term_unpinned"]
            case {"type": "cleared", "seq": int(last)}:
                self.recent = {seq: message for seq, message in self.recent.items() if seq > last}
                told = by + words["js_cleared"]
            case {"type": "muted", "name": str(name), "until": int(until)} if until in TIMES:
                self.hold_until = 0
                clock = f"{datetime.datetime.fromtimestamp(until / 1000):%H:%M}"
                told = words["js_muted" if until else "js_unmuted"].format(name=shown(name), time=clock)
            case {"type": "mode", "talk": talk, "every": int(every), "door": door}:
                self.hold_until, self.mode = 0, {"talk": talk, "every": every, "door": door}
                told = by + words["js_locked" if talk == "hosts" else "js_unlocked"]
                told += f" {words['js_slow'].format(n=every)}" if every else ""
                told += f" {words['js_door_closed']}" if door == "closed" else ""
            case {"type": "hosts", "names": [*names]}:
                self.hosts = [shown(str(name)) for name in names]
        if told:
            self.view.notice(told, minor="counts" in frame)

    # --- outbox ---

    def say(self, text: str) -> None:
        try:
            self.outbox[secrets.token_hex(12)] = clean_text(text)
        except Refused as refused:
            self.report_unsent(text, refused.sentence(self.language))
        self.update()

    def update(self) -> None:
        """After whatever has changed: says what can be said, and lets everybody know."""
        ready = self.state == "js_state_connected" and time.monotonic() >= self.hold_until
        if ready and self.outbox and not self.in_flight:
            self.in_flight, text = next(iter(self.outbox.items()))
            self.hold_reason = ""
            self.send({"type": "say", "text": text, "cid": self.in_flight})
        idle = self.connected and not self.outbox and self.after >= self.replay_end
        (self.idle.set if idle else self.idle.clear)()
        self.view.update()

    def send(self, frame: Mapping[str, Any]) -> None:
        """Into the connection, if there is one; a loss is noticed where it is read."""
        with contextlib.suppress(tornado.websocket.WebSocketClosedError):
            if self.socket:
                written = self.socket.write_message(to_json(frame))
                written.add_done_callback(lambda done: done.cancelled() or done.exception())

    def resolve(self, cid: object) -> str:
        """Takes out of the outbox what is confirmed or given up; its text."""
        if cid == self.in_flight:
            self.in_flight = ""
        return self.outbox.pop(str(cid), "")

    def report_unsent(self, text: str, reason: str) -> None:
        self.view.notice(f"{self.words['js_not_sent'].format(reason=reason)} {quoted(text)}")

    def people(self, most: int) -> str:
        names = [f"{HOST_MARK} {name}" if name in self.hosts else name for name in [*self.members][:most]]
        more = [self.words["js_more"].format(n=self.count - len(names))] if self.count > len(names) else []
        return self.words["term_here"].format(names=", ".join([*names, *more]))

    def now(self) -> datetime.datetime:
        """By the room's clock, in our time zone."""
        return datetime.datetime.fromtimestamp(time.time() + self.clock_ahead).astimezone()


# --- what the user asks for ---


def obey(client: Client, typed: str) -> bool:
    """Says what was typed, or does what stands after a slash. Whether the user wants to stay."""
    command, _, rest = typed.strip().partition(" ")
    match command:
        case "/quit":
            return False
        case "/who":
            client.view.notice(client.people(client.count))
        case "/help":
            more = f"\n{client.words['term_help_host']}" if client.name in client.hosts else ""
            client.view.notice(client.words["term_help"] + more)
        case "/time":
            client.view.notice(room_time(client, rest.strip()))
        case _ if re.match("/(?!/)", command):
            ask(client, command, rest.strip())
        case _ if command:
            client.say(typed.removeprefix("/"))
    return True


def room_time(client: Client, wish: str) -> str:
    """The room's clock in a time zone, which may be named by its city alone; without one, in ours."""
    end = "/" + wish.lower().replace(" ", "_")
    zones = [zone for zone in zoneinfo.available_timezones() if f"/{zone}".lower().endswith(end)] if wish else [""]
    if not zones:
        return client.words["term_no_zone"].format(zone=shown(wish))
    zone = min(zones, key=lambda zone: (len(zone), zone))  # the one that was meant, where it was named in full
    now = client.now().astimezone(zoneinfo.ZoneInfo(zone) if zone else None)
    return client.words["term_time"].format(time=f"{now:%F %T}", zone=zone or f"{now:%Z}")


def ask(client: Client, command: str, rest: str) -> None:
    """Asks for what a command of `act_frame` means. The room tells everybody of it, or us why not."""
    try:
        frame = act_frame(client, command, rest)
    except ValueError:
        lines = client.words["term_help_host"].splitlines()
        usage = [line for line in lines if command in re.findall("/[a-z-]+", line)]
        client.view.notice(*usage or [client.words["term_no_command"].format(command=shown(command))])
    else:
        if client.connected:
            client.send(frame | {"cid": secrets.token_hex(12)})
        else:
            client.view.notice(client.words[client.state])


def act_frame(client: Client, command: str, rest: str) -> dict[str, Any]:
    """The frame for a command; ValueError where there is none, or what stands behind it makes no sense."""
    match [command, *rest.split()]:
        case ["/delete-last", *_]:
            return {"type": "note", "kind": "delete", "to": last_message(client, rest or client.name)}
        case ["/pin" | "/unpin", *_]:
            return {"type": "note", "kind": "pin", "to": last_message(client, rest), "value": command == "/pin"}
        case ["/mute", *name, minutes]:
            return {"type": "mute", "name": " ".join(name), "seconds": 60 * int(minutes)}
        case ["/remove", *_]:
            return {"type": "remove", "name": rest, "seconds": REMOVE_SECONDS}
        case ["/lock" | "/open"]:
            return {"type": "mode", "talk": "hosts" if command == "/lock" else "everyone"}
        case ["/slow", seconds]:
            return {"type": "mode", "every": int(seconds)}
        case ["/door"]:
            return {"type": "mode", "door": "closed" if client.mode["door"] == "open" else "open"}
        case ["/clear", "yes"]:  # it can't be undone
            return {"type": "clear"}
    raise ValueError(command)


def last_message(client: Client, name: str) -> int:
    """The seq of the last message of somebody; of all for "". Raises ValueError for none."""
    key = name_key(name)
    return max(seq for seq, (author, _) in client.recent.items() if not name or name_key(author) == key)


# === Terminal views ===================================================================================================
# How a Client is seen and fed: a Screen is for a person at a terminal, Lines are for pipes.

PENDING_ROWS = 3  # shown of what isn't sent yet
WAITS = {"js_state_connected": "js_sending", "js_state_away": "js_waiting_store"}  # else js_waiting: for the connection
NAME_COLORS = (32, 33, 37, 64, 67, 98, 130, 133, 136, 161, 166, 168)  # of 256; legible on black and on white
INDENT = "    "
WIDE = "\u1100-\u115f\u2e80-\ua4cf\uac00-\ud7a3\uf900-\ufaff\ufe30-\ufe6f\uff00-\uff60\U0001f300-\U0003fffd"
PIECE = re.compile(f"[^ {WIDE}]+ *| +|[{WIDE}](?:\ufe0f|[🏻-🏿]|\u200d.)* *")  # between two of them a row may end


def most_columns(text: str) -> int:
    """What it takes at the most, whichever terminal draws it."""
    return sum(1 if char.isascii() else 2 for char in text)


def wrap(text: str, columns: int, width: Callable[[str], int]) -> list[str]:
    """The rows of a text. Only the first one begins at the margin: nobody can write a line of somebody else's.

    A URL that fits into a row stays whole, so that it can be copied.
    """
    rows: list[str] = []
    for line in text.split("\n"):
        row = INDENT if rows else ""
        used = len(row)
        for piece in PIECE.findall(line):
            whole = width(piece.rstrip()) <= columns - len(INDENT)
            for part in [piece] if whole else piece:
                if used + width(part.rstrip()) > columns:
                    rows.append(row.rstrip())
                    row, used = INDENT, len(INDENT)
                row, used = row + part, used + width(part)
        rows.append(row.rstrip())
    return rows


def lines_for(stream: TextIO, text: str, width: Callable[[str], int] = most_columns) -> str:
    """Text of others as it may be written there, without controls; a terminal is left nothing to wrap by itself."""
    text = STEERING.sub("", text.replace("\t", INDENT))
    try:
        columns = os.get_terminal_size(stream.fileno()).columns or 80
    except OSError:  # it is no terminal
        return text.replace("\n", f"\n{INDENT}")
    return "\n".join(wrap(text, max(columns - 1, 12), width))


class Lines:
    """Pipes: a line of stdin is said, a message is a line of stdout; whatever else there is to know goes to stderr."""

    def __init__(self, client: Client) -> None:
        self.client, self.config, self.words = client, client.config, client.words
        self.state, self.hold_reason = "js_state_connected", ""  # that were told last
        self.leaving = asyncio.Event()
        self.typed = os.isatty(0)  # by a person, who has commands and is told who comes and goes

    def said(self, frame: Mapping[str, Any]) -> str:
        """Who says it, with the badge of a host, to whom, and what."""
        name, text = shown(frame["name"]), self.client.text_of(frame)
        match frame:
            case {"re": int(seq)} if seq in self.client.recent:
                name = self.words["term_answer"].format(name=name, other=self.client.recent[seq][0])
        return f"{HOST_MARK} {name}: {text}" if frame.get("host") is True else f"{name}: {text}"

    def message(self, frame: Mapping[str, Any]) -> None:
        """Raises FatalError, without a word when nobody reads any more."""
        try:
            print(lines_for(sys.stdout, self.said(frame)), flush=True)
        except OSError as error:
            discard_stdout()
            raise FatalError("" if isinstance(error, BrokenPipeError) else error.strerror) from None

    def notice(self, text: str, *, minor: bool = False) -> None:
        if not minor or self.config.verbose or (self.typed and not self.config.quiet):
            with contextlib.suppress(BrokenPipeError):
                print(lines_for(sys.stderr, f"tornchat: {text}"), file=sys.stderr, flush=True)

    def update(self) -> None:
        """Tells when the connection is lost, and when it is back; and why a host lets nobody write."""
        if (state := self.client.state) not in (self.state, "js_state_connecting"):
            self.state = state
            if not self.config.quiet:
                self.notice(self.words[state])
        if (reason := self.client.hold_reason) not in ("", self.hold_reason):
            self.hold_reason = reason
            self.notice(reason)

    async def run(self) -> None:
        """Says what comes, until it ends and all is confirmed; a person waits for that only so long."""
        await self.read()
        if self.client.outbox or not self.typed:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.client.idle.wait(), QUIT_SECONDS if self.typed else None)

    async def read(self) -> None:
        threading.Thread(target=self.read_stdin, args=[asyncio.get_running_loop()], daemon=True).start()
        await self.leaving.wait()

    def read_stdin(self, loop: asyncio.AbstractEventLoop) -> None:
        """A thread: a file can't be waited for in the loop. It reads no further than what has been said."""
        with contextlib.suppress(RuntimeError, concurrent.futures.CancelledError):  # the loop has ended
            with contextlib.suppress(OSError):
                for line in open(0, encoding="utf-8", errors="replace", newline="\n", closefd=False):  # noqa: SIM115
                    asyncio.run_coroutine_threadsafe(self.on_line(line), loop).result()
            loop.call_soon_threadsafe(self.leaving.set)

    async def on_line(self, line: str) -> None:
        """Says it and waits until that is confirmed, or does what a person asks for."""
        if self.typed:
            if not obey(self.client, line):
                self.leaving.set()
        elif line.strip():
            self.client.say(line)
            await self.client.idle.wait()


class Screen(Lines):
    """A person at a terminal: prompt_toolkit edits what is typed, and keeps it below what is printed."""

    def __init__(self, client: Client, *, colors: bool) -> None:
        """Raises ModuleNotFoundError where prompt_toolkit isn't installed."""
        import prompt_toolkit.patch_stdout  # type: ignore[import-not-found,unused-ignore]

        super().__init__(client)
        self.colors, self.day = colors, client.now().date()
        self.tools: Any = prompt_toolkit
        keys = prompt_toolkit.key_binding.KeyBindings()
        keys.add("escape", "enter")(lambda event: event.current_buffer.insert_text("\n"))
        self.session: Any = prompt_toolkit.PromptSession(
            lambda: f"{client.name}> ", key_bindings=keys, enable_suspend=True, erase_when_done=True
        )

    def message(self, frame: Mapping[str, Any]) -> None:
        """With the time of the room's clock, in our zone."""
        when = datetime.datetime.fromtimestamp(frame["ts"] / 1000).astimezone()
        if when.date() != self.day:
            self.day = when.date()
            self.show([f"~ {self.day}"], "2")
        head, name = f"{when:%H:%M} ", shown(frame["name"])
        first, *rows = self.rows(head + self.said(frame))
        color = f"1;38;5;{NAME_COLORS[sum(map(ord, name)) % len(NAME_COLORS)]}"
        colored = self.styled(head, "2") + first[len(head) :].replace(name, self.styled(name, color), 1)
        self.show([colored, *rows])

    def notice(self, text: str, *, minor: bool = False) -> None:
        """After a tilde, with which no name begins."""
        self.show(self.rows(f"{self.client.now():%H:%M} ~ {text}"), "2" if minor else "")

    def rows(self, text: str) -> list[str]:
        width = self.tools.utils.get_cwidth  # where terminals differ (marks, joiners), the most
        return lines_for(sys.stdout, text, lambda part: sum(max(1, width(char)) for char in part)).split("\n")

    def show(self, rows: Iterable[str], style: str = "") -> None:
        """Above what is being typed. Where the terminal draws a row wider than we thought, it must not wrap it."""
        print("\n".join(f"\x1b[?7l{self.styled(row, style)}\x1b[?7h" for row in rows))

    def styled(self, text: str, style: str) -> str:
        return f"\x1b[{style}m{text}\x1b[0m" if self.colors and style else text

    def update(self) -> None:
        """Below what is being typed: what is wrong, and what isn't sent yet."""
        texts, state = [*self.client.outbox.values()], self.client.state
        rows = [self.words[state]] if state != "js_state_connected" else []
        why = (self.client.connected and self.client.hold_reason) or self.words[WAITS.get(state, "js_waiting")]
        rows += [f"{why} · {shown(text)}" for text in texts[:PENDING_ROWS]]
        if len(texts) > PENDING_ROWS:
            rows.append(f"+ {len(texts) - PENDING_ROWS}")
        self.session.bottom_toolbar = "\n".join(rows) or None
        self.session.app.invalidate()

    async def read(self) -> None:
        with self.tools.patch_stdout.patch_stdout(raw=True), contextlib.suppress(EOFError, KeyboardInterrupt):
            while obey(self.client, await self.session.prompt_async(handle_sigint=False)):
                pass


def choose_view(client: Client, environ: Mapping[str, str]) -> Lines:
    if os.isatty(0) and os.isatty(1) and environ.get("TERM") != "dumb":
        try:
            return Screen(client, colors=not environ.get("NO_COLOR"))
        except ModuleNotFoundError:
            Lines(client).notice(client.words["term_plain"])
    return Lines(client)


async def join(config: Config, environ: Mapping[str, str]) -> None:
    """Talks in a room until its user or the room ends it. Raises FatalError."""
    locale = environ.get("LC_ALL") or environ.get("LC_MESSAGES") or environ.get("LANG") or ""
    client = Client(config, choose_language(locale.replace("_", "-")))
    try:
        await client.log_in()
    except UNREACHED as error:
        raise client.unreachable(error) from None
    client.view = choose_view(client, environ)
    ends = client.keep_connected(), client.view.run(), stop_on_signals().wait()
    tasks = [asyncio.create_task(end) for end in ends]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        await end_tasks(tasks)
    finally:
        await client.log_out()
    if client.outbox:
        print("tornchat:", client.words["term_unsent"].format(n=len(client.outbox)), file=sys.stderr)
    for task in done:
        task.result()


# === Command line =====================================================================================================
# The only place that reads the arguments and the environment, and that configures logging. Bad input is one line.

# What the value of an option must be: each of these raises ArgumentTypeError with the reason.


def within(least: float, most: float, kind: type[int] | type[float] = int) -> Callable[[str], Any]:
    def convert(value: str) -> float:
        with contextlib.suppress(ValueError):
            if re.fullmatch("[0-9.e+-]+", value) and least <= (number := kind(value)) <= most:
                return number  # Python itself takes 8_0 and digits of every script
        raise argparse.ArgumentTypeError(f"{value!r} is not a number from {least} to {most}")

    return convert


def one_of(meanings: Mapping[str, Any]) -> Callable[[str], Any]:
    def convert(value: str) -> Any:
        if value.lower() in meanings:
            return meanings[value.lower()]
        raise argparse.ArgumentTypeError(f"{value!r} is none of {', '.join(meanings)}")

    return convert


yes_or_no = one_of(dict.fromkeys(("1", "yes", "true", "on"), True) | dict.fromkeys(("0", "no", "false", "off"), False))


def text(value: str) -> str:
    """Any text but none, which is mostly an unset variable, and might leave a door open."""
    if not value:
        raise argparse.ArgumentTypeError("is empty")
    if any(unicodedata.category(char) == "Cs" for char in value):  # what os.fsdecode makes of bytes that are no text
        raise argparse.ArgumentTypeError(f"{value!r} is not text in this system's encoding")
    return value


def host_address(value: str) -> str:
    with contextlib.suppress(UnicodeError):
        value.encode("idna")
        return text(value)
    raise argparse.ArgumentTypeError(f"{value!r} is not the name of a host")


def room_title(value: str) -> str:
    if shown(value) != value or not 0 < len(value) <= 80:
        raise argparse.ArgumentTypeError("a title has 1 to 80 characters, all of them visible")
    return text(value)


def room_name(value: str) -> str:
    """Part of a Redis key, where braces and colons mean something."""
    if not re.fullmatch(r"[^\s{}:]{1,64}", value):
        raise argparse.ArgumentTypeError(f"{value!r} is not 1 to 64 characters without spaces, colons and braces")
    return text(value)


def host_names(value: str) -> list[str]:
    names = [host_name(name) for name in map(str.strip, value.split(",")) if name]
    if not names or "" in names:
        raise argparse.ArgumentTypeError(f"{value!r} is not the name of a host, or several with commas")
    return names


def redis_url(value: str) -> str:
    """A URL that redis-py can use. The reason doesn't quote it: there may be a password in it."""
    with contextlib.suppress(ValueError, TypeError, RedisError):
        url = urllib.parse.urlsplit(value)
        host = (url.hostname or "").encode("idna")
        if re.fullmatch(r"(/\d*)?", url.path) if url.scheme != "unix" else not host:  # else redis-py takes another one
            connect(Config(redis_url=text(value)))().connection_pool.make_connection()
            return value
    raise argparse.ArgumentTypeError("malformed: redis://host:port/db expected, or rediss://, or unix:///path")


def room_url(value: str) -> str:
    """The address of a room, as its routes begin.

    People leave out the scheme, and then mean our default port; or they copy the address of a page.
    """
    with contextlib.suppress(ValueError):
        parts = urllib.parse.urlsplit(value if "://" in value else f"http://{value}")
        scheme = {"http": "http", "ws": "http", "https": "https", "wss": "https"}.get(parts.scheme)
        port = f":{parts.port}" if parts.port else "" if "://" in value else f":{DEFAULT_PORT}"
        if scheme and re.fullmatch(r"[\w.-]+|[0-9a-f:.]+(%\w+)?", parts.hostname or "") and "@" not in parts.netloc:
            host = f"[{parts.hostname}]" if ":" in (parts.hostname or "") else parts.hostname
            path = urllib.parse.quote(re.sub(r"/(login|chat)?$", "", parts.path), safe="/%")
            return f"{scheme}://{host}{port}{path}/"
    raise argparse.ArgumentTypeError("malformed: http://host:8888/ expected, or https://, or host:port")


# Each option with a value: flags, metavar, its variables in the environment, what the value must be, help. A setting
# without flag and variable is what Config says.
# fmt: off
OPTIONS: tuple[tuple[str, str, str, Callable[[str], Any], str], ...] = (
    ("-p --port", "N", "TORNCHAT_PORT PORT", within(0, 65535),
     "port to listen on, 0 = any free one; default 8888, or the next free one"),
    ("--host", "ADDR", "TORNCHAT_HOST", host_address, "address to bind; default all"),
    ("--title", "TEXT", "TORNCHAT_TITLE", room_title, "name of the room on every page; default tornchat"),
    ("--password", "TEXT", "TORNCHAT_PASSWORD", text, "asked at login; default none"),
    ("--redis-url", "URL", "REDIS_URL", redis_url,
     "redis://, rediss:// or unix://; default none: messages are kept in memory"),
    ("--room", "NAME", "TORNCHAT_ROOM", room_name, "which room of that Redis; default lobby"),
    ("--history", "N", "TORNCHAT_HISTORY", within(0, RING_MESSAGES), "messages shown to a newcomer; default 100"),
    ("--rate", "N", "TORNCHAT_RATE", within(0, 1_000_000, float),
     "messages per second and session, burst 5 times that, 0 = no limit; default 2"),
    ("--pictures", "MB", "TORNCHAT_PICTURES", within(0, 100_000),
     "so much of pictures is kept in all, the oldest go first, 0 = no pictures; default 32"),
    ("--allow-host", "NAME", "TORNCHAT_ALLOW_HOST", host_names,
     "a public name under which the room may be opened; repeatable, or with commas"),
    ("--trust-proxy", "yes", "TORNCHAT_TRUST_PROXY", yes_or_no,
     "believe X-Forwarded-For, -Proto and -Host from a proxy on this machine"),
    ("--workers", "N", "TORNCHAT_WORKERS", within(1, 64),
     "that many processes on one port; more than 1 needs a Redis; default 1"),
    ("--wait", "SECONDS", "TORNCHAT_WAIT", within(0, 86400, float),
     "for a Redis that doesn't answer yet at the start; default 30"),
    ("--certfile", "FILE", "", text, "certificate (PEM) to serve https with"),
    ("--keyfile", "FILE", "", text, "its key, where that is a file of its own"),
    ("--transcript", "WHO", "TORNCHAT_TRANSCRIPT", one_of({who: who for who in ("host", "everyone", "off")}),
     "who may download what was said: host, everyone or off; default host"),
    ("--secret", "TEXT", "TORNCHAT_SECRET", text, "signs the cookies; default: made up"),
    ("--host-key", "TEXT", "TORNCHAT_HOST_KEY", text,
     "whoever opens /host?key=TEXT, or joins with it, is a host; default: made up, printed on a terminal only"),
    ("--join", "URL", "", room_url, "talk in that room instead of serving one: http://host:8888/, or host:port; "
     "the password as above, and --history is how many earlier messages are shown"),
    ("--name", "NAME", "", text, "with --join: the nickname; default [USER]"),
)
# fmt: on
CLIENT_SETTINGS = ("password", "history", "host_key")  # of the environment, with --join


def parse_config(argv: Sequence[str], environ: Mapping[str, str]) -> Config:
    """The Config of a command line; what isn't on it may be in the environment. Wrong usage exits with 2 and a line.

    A variable that a flag overrides, or that has no use for a client, isn't looked at: it may be another program's.
    """
    parser, variables = make_parser()
    settings = vars(parser.parse_args(argv))
    for setting in CLIENT_SETTINGS if "join" in settings else variables:
        names, kind = variables[setting]
        name = next(filter(environ.get, names), "")
        if name and setting not in settings:
            try:
                settings[setting] = kind(environ[name])
            except argparse.ArgumentTypeError as error:
                parser.error(f"environment variable {name}: {error}")
    with contextlib.suppress(Refused):  # root, for one, comes as a guest
        settings.setdefault("name", clean_name(environ.get("USER", "")))
    settings["inherited"] = tuple(map(int, filter(None, environ.get("TORNCHAT_INHERITED", "").split(","))))
    config = Config(**settings)
    several = config.workers > 1
    for wrong, why in (
        (several and not config.redis_url, "--workers needs a Redis (--redis-url), where the workers meet"),
        (several and not hasattr(os, "fork"), "--workers needs a Unix system"),
        (several and not Path(__file__).is_file(), "--workers needs tornchat.py as a file that they can read"),
        (config.keyfile and not config.certfile, "--keyfile needs --certfile"),
        (environ.get("TORNCHAT_PASSWORD") == "" and not (config.password or config.join),
         "environment variable TORNCHAT_PASSWORD is empty: unset it for a room without a password"),
    ):  # fmt: skip
        if wrong:
            parser.error(why)
    return config


def make_parser() -> tuple[argparse.ArgumentParser, dict[str, tuple[list[str], Callable[[str], Any]]]]:
    """The parser; and for each setting its variables in the environment, the best first, and what its value must be."""
    parser = argparse.ArgumentParser(
        prog="tornchat",
        usage=argparse.SUPPRESS,  # the manual begins with it, and a mistake is one line
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    variables = {}
    for flags, metavar, env, kind, words in OPTIONS:
        names = env.split()
        words += f" [{', '.join(names)}]" if names else ""
        extra: dict[str, Any] = {"action": "extend"} if kind is host_names else {}
        extra |= {"nargs": "?", "const": True} if kind is yes_or_no else {}
        action = parser.add_argument(*flags.split(), metavar=metavar, type=kind, help=words, **extra)
        variables[action.dest] = names, kind
    parser.add_argument("-q", "--quiet", action="store_true", help="no banner; log warnings and errors only")
    parser.add_argument("-v", "--verbose", action="count", help="log requests; twice: everything")
    parser.add_argument("--version", action="version", version=f"tornchat {__version__}")
    return parser, variables


class LogHandler(logging.StreamHandler[TextIO]):
    """Writes to stderr what can steer no terminal, and what visitors can cause once a second from each place in the
    code; the next line says how many there were. What becomes of the room, and what -v asks for, is always written.
    """

    def __init__(self) -> None:
        super().__init__()
        self.places: dict[tuple[object, ...], tuple[float, int]] = {}  # when one was written, how many since not

    def format(self, record: logging.LogRecord) -> str:
        return "\n".join(map(shown, super().format(record).split("\n")))  # a traceback keeps its newlines

    def filter(self, record: logging.LogRecord) -> bool:
        if record.exc_info and isinstance(record.exc_info[1], tornado.httputil.HTTPInputError):
            return False  # Tornado's, of a body that was wrong when its time was over: the client's fault
        if record.levelno < logging.INFO or record.name == log.name:
            return True
        place, now = (record.pathname, record.lineno, record.exc_info and record.exc_info[0]), time.monotonic()
        last, left_out = self.places.get(place, (-math.inf, 0))
        due = now - last >= 1
        self.places[place] = (now, 0) if due else (last, left_out + 1)
        if due and left_out:
            record.msg = f"{record.msg} (and {left_out} more like this)"
        return due


def configure_logging(config: Config) -> None:
    """On stderr: warnings with -q, what becomes of the room without, requests with -v, everything with -v -v.

    A terminal has no need of dates, nor of lines that say what the banner says.
    """
    terminal = sys.stderr is not None and sys.stderr.isatty()
    level = logging.CRITICAL if config.join else logging.WARNING  # a client tells by itself what Tornado complains of
    logging.basicConfig(
        handlers=[LogHandler()],
        format="%(asctime)s %(levelname)s %(message)s",
        datefmt="%H:%M:%S" if terminal else "%Y-%m-%d %H:%M:%S%z",
        level=logging.DEBUG if config.verbose > 1 else level,
    )
    terse = config.quiet or terminal or config.inherited  # the supervisor speaks for its workers
    log.setLevel(logging.DEBUG if config.verbose else logging.WARNING if terse else logging.INFO)


async def run(config: Config) -> None:
    """Talks in a room, serves one, or keeps workers that do. Raises FatalError."""
    if os.name == "posix":  # where the loop handles a signal of its own, each wakes it: Python's handlers don't
        asyncio.get_running_loop().add_signal_handler(signal.SIGURG, lambda: None)
    if config.join:
        await join(config, os.environ)
    elif config.workers > 1 and not config.inherited:
        await supervise(config, [sys.executable, __file__, *sys.argv[1:]])
    else:
        await serve(config)


def main() -> None:
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:  # a closed standard stream must not become a socket
        pass
    os.close(descriptor)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a title may have letters that this terminal doesn't
    config = parse_config(sys.argv[1:], os.environ)
    configure_logging(config)
    try:
        asyncio.run(run(config))
    except FatalError as error:
        sys.exit(lines_for(sys.stderr, f"tornchat: {error}") if str(error) else 0)
    on_stop_signals(signal.SIG_IGN)  # the rest takes no time, and must not spoil the exit code


# === Pages ============================================================================================================
# What the user sees, one language a string. Nothing above depends on it but for the names LANGUAGES, WORDS, page_words,
# TEMPLATES and ASSETS. Only the HTML passes the template engine; style and script are served without their comments.

# Every word that a user sees, in each of the LANGUAGES; the page's script gets those that begin with js_.
LANGUAGES = {"en": "en", "zh": "zh-CN"}  # as Accept-Language begins: as a page says it; the first one is the default
TEXTS = {
    "login_heading": ("Join the room", "加入聊天室"),
    "login_nickname": ("Nickname", "昵称"),
    "login_hint": ("Leave it empty to come in as a guest.", "不填则以访客身份进入。"),
    "login_password": ("Room password", "房间密码"),
    "login_free": ("is free: join with it, or choose another.", "还没有人用：可以直接加入，也可以另选一个。"),
    "login_submit": ("Join", "加入"),
    "login_why_taken": (
        "While you were away, somebody else took your name. Please choose another one.",
        "您离开期间，您的昵称已被他人使用，请另选一个。",
    ),
    "login_why_password": ("The room was restarted. Please give its password again.", "聊天室已重启，请再次输入密码。"),
    "login_why_invalid": (
        "The room was restarted, and does not take your name any more.",
        "聊天室已重启，不再接受您的昵称。",
    ),
    "login_why_logout": (
        "In another tab you logged out, or took another name.",
        "您在另一个标签页中退出了，或换了昵称。",
    ),
    "login_why_cookie": (
        "This browser does not keep the room’s cookie, so the room cannot know you.",
        "此浏览器没有保存聊天室的 Cookie，因此无法识别您。",
    ),
    "chat_needs_script": (
        "This page needs JavaScript. It loads nothing from outside this server.",
        "本页面需要启用 JavaScript，不会从本服务器以外加载任何内容。",
    ),
    "chat_log": ("Messages", "消息"),
    "chat_outbox": ("Not yet sent", "尚未发出"),
    "chat_empty": ("Nobody has written yet. Say hello!", "还没有人发言，打个招呼吧！"),
    "chat_people": ("People", "成员"),
    "chat_show_people": ("Show people", "显示成员"),
    "chat_logout": ("Log out", "退出"),
    "chat_message": ("Message", "消息"),
    "chat_placeholder": ("Write a message", "输入消息"),
    "chat_send": ("Send", "发送"),
    "chat_login_again": ("Log in again", "重新登录"),
    "chat_join": ("Invite", "邀请"),
    "chat_join_title": ("Join this room", "加入本聊天室"),
    "chat_join_hint": ("Open this address on any device in the same network.", "在同一网络中的任何设备上打开此地址。"),
    "chat_code": ("The address as a QR code", "该地址的二维码"),
    "chat_addresses": ("Another address", "其他地址"),
    "chat_copy": ("Copy", "复制"),
    "chat_projector": ("Projector view", "投影视图"),
    "chat_close": ("Close", "关闭"),
    "chat_break": ("New line", "换行"),
    "chat_settings": ("Settings", "设置"),
    "chat_theme": ("Appearance", "外观"),
    "chat_theme_system": ("Automatic", "跟随系统"),
    "chat_theme_light": ("Light", "浅色"),
    "chat_theme_dark": ("Dark", "深色"),
    "chat_sound": ("Sound", "提示音"),
    "chat_notify": ("Notifications", "系统通知"),
    "chat_reply": ("What you reply to", "回复的消息"),
    "chat_sort": ("Messages of the last hour", "最近一小时的消息"),
    "chat_sort_time": ("In order", "按时间"),
    "chat_sort_empty": ("No message of the last hour has this sign.", "最近一小时没有带此标记的消息。"),
    "chat_picture": ("Add a picture", "添加图片"),
    "chat_attached": ("Pictures to send", "待发送的图片"),
    "chat_viewer": ("Picture", "图片"),
    "chat_host_page": ("Room", "管理"),
    "chat_lock": ("Only hosts write", "仅主持人可发言"),
    "chat_slow": ("Slow mode", "慢速模式"),
    "chat_slow_off": ("Off", "关闭"),
    "chat_slow_seconds": ("every {n} s", "每 {n} 秒一条"),
    "chat_door": ("Nobody new gets in", "不再让新人进入"),
    "chat_transcript": ("Transcript", "聊天记录"),
    "chat_transcript_txt": ("As text", "文本"),
    "chat_transcript_json": ("As JSON", "JSON 数据"),
    "chat_clear": ("Delete all messages", "清空聊天室"),
    "chat_mute": ("Mute: can read, but not write", "禁言：可以看，不能发言"),
    "chat_minutes": ("{n} min", "{n} 分钟"),
    "chat_unmute": ("End", "解除"),
    "chat_remove": ("Remove for 10 minutes", "移出 10 分钟"),
    "chat_cancel": ("Cancel", "取消"),
    "chat_pinned": ("Pinned message", "置顶消息"),
    "chat_unfold": ("Show all of it", "展开"),
    "chat_unpin": ("Unpin", "取消置顶"),
    "chat_earlier": ("Earlier messages aren’t shown", "更早的消息未显示"),
    "js_host": ("Host", "主持人"),
    "js_manage": ("Mute or remove {name}", "禁言或移出{name}"),
    "js_clear_question": ("Delete everything that was said, for everybody?", "为所有人删除全部消息？"),
    "js_clear": ("Delete all", "全部删除"),
    "js_remove_question": ("Remove {name}, for 10 minutes?", "将{name}移出 10 分钟？"),
    "js_remove": ("Remove", "移出"),
    "js_muted_till": ("muted till {time}", "禁言至 {time}"),
    "js_muted_you": ("A host has muted you until {time}.", "主持人已将您禁言至 {time}。"),
    "js_wait": ("{time} left", "还剩 {time}"),
    "js_next_in": ("Your next one in {n} s.", "{n} 秒后可发下一条。"),
    "js_slow_over": ("No pause between messages any more.", "发言不再有间隔。"),
    "js_door_open": ("New people can come in.", "新人可以进入了。"),
    "js_picture": ("Picture", "图片"),
    "js_picture_of": ("Picture from {name}", "{name}发送的图片"),
    "js_picture_gone": ("This picture is no longer kept.", "图片已不再保存。"),
    "js_picture_again": ("This picture could not be loaded: try again", "图片加载失败，点此重试"),
    "js_picture_remove": ("Picture: take it out", "图片：点此移除"),
    "js_picture_lost": ("the picture is gone since the page was loaded again", "页面重新加载后图片已丢失"),
    "js_no_picture": (
        "“{name}” was not added: it is no picture that can be shown here.",
        "未添加“{name}”：它不是可以在此显示的图片。",
    ),
    "js_uploading": ("Sending… {n} %", "正在发送… {n}%"),
    "js_state_connecting": ("Connecting…", "正在连接…"),
    "js_state_connected": ("Connected", "已连接"),
    "js_state_polling": ("Connected, by polling", "已连接（轮询）"),
    "js_state_waiting": ("Connection lost.", "连接已断开。"),
    "js_state_offline": ("This device is offline.", "本设备已离线。"),
    "js_state_restarting": (
        "The server was stopped. You are back as soon as it is.",
        "服务器已停止。它一恢复，您就会自动重新连接。",
    ),
    "js_state_away": (
        "The room cannot save messages right now. What you write waits, and is sent when it can.",
        "聊天室暂时无法保存消息。您写下的内容会先保留，恢复后自动发送。",
    ),
    "js_retry_in": ("Next try in {n} s", "{n} 秒后重试"),
    "js_retry_now": ("Trying now…", "正在重试…"),
    "js_closed_4403": ("This room cannot be entered from here.", "无法从这里进入本聊天室。"),
    "js_closed_4409": ("Somebody else has the name “{name}” now.", "昵称“{name}”现已被他人使用。"),
    "js_closed_4429": (
        "Too much was sent at once, so the server has closed the connection.",
        "发送过于频繁，服务器已断开连接。",
    ),
    "js_closed_4504": (
        "The room is open in too many tabs. Close one of them first.",
        "打开的标签页过多，请先关闭一个。",
    ),
    "js_sending": ("Sending…", "正在发送…"),
    "js_waiting": ("Waiting for the connection", "等待连接"),
    "js_waiting_store": ("Waiting until it can be saved", "等待保存"),
    "js_waiting_seconds": ("Sends in {n} s", "{n} 秒后发送"),
    "js_waiting_turn": ("Waiting its turn", "排队中"),
    "js_not_sent": ("Not sent: {reason}", "未发送：{reason}"),
    "js_too_long": ("the text is too long", "内容过长"),
    "js_other_name": ("written under the name “{name}”", "这是您用昵称“{name}”写的"),
    "js_try_again": ("Try again", "重试"),
    "js_edit": ("Edit", "编辑"),
    "js_left_over": ("Characters left: {n}", "还可输入 {n} 个字符"),
    "js_too_many": ("Characters too many: {n}", "超出 {n} 个字符"),
    "js_joined": ("{names} joined", "{names}加入了聊天室"),
    "js_left": ("{names} left", "{names}离开了聊天室"),
    "js_people": ("{n} people", "{n} 人"),
    "js_missed": ("Messages missed while you were away: {n}", "您离开期间错过了 {n} 条消息"),
    "js_reset": (
        "The room has lost its history and starts again here. Everything above is only on your screen.",
        "聊天记录已丢失，从这里重新开始。以上内容仅保留在您的屏幕上。",
    ),
    "js_new": ("{n} new", "{n} 条新消息"),
    "js_latest": ("Latest messages", "最新消息"),
    "js_new_line": ("New messages", "以下是新消息"),
    "js_show_all": ("Show all", "展开全文"),
    "js_show_less": ("Show less", "收起"),
    "js_copied": ("Copied", "已复制"),
    "js_copy_by_hand": ("Marked: copy it by hand", "已选中，请手动复制"),
    "js_you": ("you", "我"),
    "js_deleted": ("This message was deleted.", "此消息已删除。"),
    "js_cleared": ("All that was said before is deleted.", "此前的消息均已删除。"),
    "js_choices": ("What to do with the message of {name}", "对{name}的消息进行操作"),
    "js_reply": ("Reply", "回复"),
    "js_copy": ("Copy the text", "复制文字"),
    "js_pin": ("Pin above the messages", "置顶"),
    "js_unpin": ("Unpin", "取消置顶"),
    "js_delete": ("Delete", "删除"),
    "js_delete_ask": (
        "Delete this message on every screen? This can’t be undone.",
        "从所有人的屏幕上删除此消息？无法撤销。",
    ),
    "js_answer": ("to {name}:", "回复{name}："),
    "js_answer_gone": ("to a message that is not here any more", "回复的消息已不在此处"),
    "js_no_answer": ("Don’t reply to it", "取消回复"),
    "js_back": ("Back", "返回"),
    "js_most": ("Most {sign}", "最多{sign}"),
    "js_hands": ("Hands up {sign}", "举手{sign}"),
    "js_more": ("and {n} more", "还有 {n} 人"),
    "term_unreachable": ("{url} cannot be reached: {reason}", "无法连接 {url}：{reason}"),
    "term_no_room": ("There is no tornchat at {url}: {reason}", "{url} 不是 tornchat 聊天室：{reason}"),
    "term_free": ('It is free as --name "{name}".', '可以改用 --name "{name}"。'),
    "term_here": ("here: {names}", "在场：{names}"),
    "term_hint": ("/help tells what you can do", "输入 /help 查看帮助"),
    "term_help": (
        "/who: who is here\n/time Asia/Shanghai: the room’s clock, there\n/quit, Ctrl-C, Ctrl-D: leave\n"
        "//text: says “/text”\n/delete-last: deletes what you said last\nAlt-Enter: a new line\n"
        "Up, Down, Ctrl-R: what you said before",
        "/who：成员\n/time Asia/Shanghai：聊天室在该时区的时间\n/quit、Ctrl-C、Ctrl-D：退出\n"
        "//文字：发送“/文字”\n/delete-last：删除自己的最后一条消息\nAlt-Enter：换行\n上下方向键、Ctrl-R：调出说过的话",
    ),
    "term_no_host": ("The room does not take that --host-key.", "聊天室不接受该 --host-key。"),
    "term_help_host": (
        "/delete-last NAME: the last message of NAME, or your own\n"
        "/pin NAME: the last message of NAME, or of all, stands above the others; /unpin\n"
        "/mute NAME MINUTES: NAME can only read, for so long; 0 ends it\n"
        "/remove NAME: out of the room, for 10 minutes\n"
        "/lock: only hosts can write; /open ends that\n"
        "/slow SECONDS: between two messages of a member; 0 ends it\n"
        "/door: nobody new gets in; once more ends that\n"
        "/clear yes: deletes all that was said",
        "/delete-last 名字：删除此人（或自己）的最后一条消息\n"
        "/pin 名字：置顶此人（或所有人）的最后一条消息；/unpin 取消\n"
        "/mute 名字 分钟：在此期间禁止此人发言；0 为解除\n"
        "/remove 名字：请出聊天室 10 分钟\n"
        "/lock：仅主持人可发言；/open 解除\n"
        "/slow 秒数：每人两条消息的间隔；0 为解除\n"
        "/door：不再让新人进入；再次输入则恢复\n"
        "/clear yes：删除所有消息",
    ),
    "term_answer": ("{name} (to {other})", "{name}（回复{other}）"),
    "term_deleted": ("A message of {name} was deleted.", "{name}的一条消息已删除。"),
    "term_pinned": ("Pinned: {name}: {text}", "置顶：{name}：{text}"),
    "term_unpinned": ("No message is pinned any more.", "已取消置顶。"),
    "js_muted": ("{name} cannot write until {time}.", "{name}在 {time} 之前不能发言。"),
    "js_unmuted": ("{name} can write again.", "{name}可以发言了。"),
    "js_locked": ("Only hosts can write.", "仅主持人可以发言。"),
    "js_unlocked": ("Everybody can write.", "所有人都可以发言。"),
    "js_slow": ("One message in {n} s.", "每 {n} 秒可发一条消息。"),
    "js_door_closed": ("Nobody new gets in.", "不再让新人进入。"),
    "term_no_command": (
        "There is no command {command}; /help lists them. To say that: /{command}",
        "没有 {command} 这个命令，输入 /help 查看帮助。要发送它，请输入 /{command}",
    ),
    "term_time": ("By the room’s clock it is {time} ({zone}).", "聊天室的时间是 {time}（{zone}）。"),
    "term_no_zone": (
        "There is no time zone “{zone}”. They have names like Asia/Shanghai.",
        "没有“{zone}”这个时区，时区名如 Asia/Shanghai。",
    ),
    "term_plain": ("Typing is nicer with: pip install prompt_toolkit", "安装后输入更方便：pip install prompt_toolkit"),
    "term_unsent": ("Messages that could not be sent: {n}", "有 {n} 条消息未能发送"),
    "kept_memory": (
        "Earlier messages that you will see: the last {history}. Stopping the room forgets them.",
        "您将看到最近的 {history} 条消息；聊天室关闭后即清除。",
    ),
    "kept_redis": (
        "Earlier messages that you will see: the last {history}. They outlive a restart.",
        "您将看到最近的 {history} 条消息；重启后仍会保留。",
    ),
    "error_back": ("To the room", "回到聊天室"),
    "error": ("{status}: {reason}", "出错了：{status} {reason}"),
    "error_404": ("There is no such page here.", "没有这个页面。"),
    "error_421": (
        "This room is not known as “{host}”. Whoever runs it can allow that: --allow-host {host}",
        "本聊天室不以“{host}”为名。管理者可用 --allow-host {host} 允许。",
    ),
    "refused_not-json": ("That is not JSON.", "这不是 JSON。"),
    "refused_binary": ("Only text frames are understood.", "只接受文本帧。"),
    "refused_unknown-type": (
        "The type of a frame is say, note, clear, mute, remove or mode.",
        "帧的类型须为 say、note、clear、mute、remove 或 mode。",
    ),
    "refused_bad-field": ("The field “{field}” is missing or wrong.", "字段“{field}”缺失或有误。"),
    "refused_host-key": ("That is not the host’s key of this room.", "这不是本聊天室的主持密钥。"),
    "refused_not-host": ("Only a host can do that.", "只有主持人可以这样做。"),
    "refused_is-host": ("{name} is a host, and hosts can’t be muted or removed.", "{name}是主持人，不能禁言或移出。"),
    "refused_no-member": ("Nobody here has the name “{name}”.", "这里没有人叫“{name}”。"),
    "refused_no-message": ("That message is gone, or too old.", "该消息已不存在，或者太旧了。"),
    "refused_muted": ("A host has muted you for a while.", "主持人已将您暂时禁言。"),
    "refused_locked": ("Only hosts can write now.", "现在只有主持人可以发言。"),
    "refused_slow": ("Everybody can write one message in {every} s.", "每人每 {every} 秒可以发一条消息。"),
    "refused_door": ("The door is closed: nobody new can come in now.", "聊天室已关门，暂不接受新成员。"),
    "refused_removed-name": (
        "A host has removed somebody named “{name}” for a while: please choose another name.",
        "主持人已将名为“{name}”的成员暂时移出，请换一个昵称。",
    ),
    "refused_removed": ("A host has removed you from the room for a while.", "主持人已将您暂时移出聊天室。"),
    "refused_bad-cid": (
        "A cid has 1 to 64 of the characters A-Z a-z 0-9 _ and -.",
        "cid 须由 1 到 64 个 A-Z a-z 0-9 _ - 字符组成。",
    ),
    "refused_no-text": ("There is no text in it.", "没有文本。"),
    "refused_surrogate": ("The text has an incomplete character in it.", "文本中有不完整的字符。"),
    "refused_empty": ("The message is empty.", "消息是空的。"),
    "refused_too-long": ("The message is longer than {limit} characters.", "消息超过了 {limit} 个字符。"),
    "refused_too-fast": ("Too fast. Please wait a moment.", "发送太快，请稍等片刻。"),
    "refused_unavailable": (
        "The room cannot save anything right now. Please try again in a moment.",
        "聊天室暂时无法保存，请稍后再试。",
    ),
    "refused_name-lost": ("Somebody else has the name “{name}” now.", "昵称“{name}”现已被他人使用。"),
    "refused_taken": ("“{name}” is taken, or looks like a name that is.", "“{name}”已被使用，或与已有昵称相似。"),
    "refused_password": ("That is not the room’s password.", "房间密码不正确。"),
    "refused_guesses": ("Too many wrong passwords at once. Please wait a moment.", "密码错误次数过多，请稍等片刻。"),
    "refused_name-empty": ("A nickname needs a letter or a digit.", "昵称至少要有一个字母、文字或数字。"),
    "refused_name-long": ("A nickname has at most {limit} characters.", "昵称最多 {limit} 个字符。"),
    "refused_name-characters": (
        "There is a character in it that cannot be seen, does not belong in a name, or is of another script.",
        "昵称中有不可见、不适合或属于另一种文字的字符。",
    ),
    "refused_name-reserved": (
        "“{name}” could be mistaken for the room itself. Please choose another name.",
        "“{name}”容易被误认为聊天室本身，请换一个昵称。",
    ),
    "refused_no-picture": ("There is no such picture any more.", "图片已不存在。"),
    "refused_pictures-off": ("This room takes no pictures.", "本聊天室不接收图片。"),
    "refused_picture-type": (
        "That is no picture that can be shown: PNG, JPEG, WebP and GIF can.",
        "无法显示此文件，仅支持 PNG、JPEG、WebP 和 GIF 图片。",
    ),
    "refused_picture-broken": (
        "The picture is incomplete, or there is something else in the file.",
        "图片不完整，或文件中含有其他内容。",
    ),
    "refused_picture-pixels": (
        "A picture has at most {limit} million pixels, and {side} on a side.",
        "图片不得超过 {limit} 百万像素，每边不得超过 {side} 像素。",
    ),
    "refused_picture-large": ("The picture is larger than {limit} KB.", "图片超过 {limit} KB。"),
    "refused_no-session": ("Please log in first.", "请先登录。"),
    "refused_logout": ("You have logged out.", "您已退出。"),
    "refused_bad-wait": ("“wait” is a number of seconds, from 0 to {limit}.", "“wait”须为 0 到 {limit} 之间的秒数。"),
    "refused_too-many-tabs": ("The room is open in {limit} tabs already.", "聊天室已在 {limit} 个标签页中打开。"),
}
WORDS = {language: {key: texts[column] for key, texts in TEXTS.items()} for column, language in enumerate(LANGUAGES)}


def page_words(language: str) -> dict[str, str]:
    """The words that the script needs."""
    return {key.removeprefix("js_"): text for key, text in WORDS[language].items() if key.startswith("js_")}


# With the header's "no-referrer" a form's Origin would be "null", and on plain http, where browsers send no
# Sec-Fetch-Site, a login would look like another page's: so the pages ask for "same-origin".
# language=html
PAGE_HTML = r"""<!doctype html>
<html lang="{{ lang }}">
<head>
  <meta charset="utf-8">
  <meta name="referrer" content="same-origin">
  <meta name="viewport"
    content="width=device-width, initial-scale=1, viewport-fit=cover, interactive-widget=resizes-content">
  <title>{{ title }}</title>
  <link id="icon" rel="icon" href="{{ root }}{{ asset("icon.svg") }}" type="image/svg+xml"
    data-unread="{{ root }}{{ asset("icon-unread.svg") }}">
  <link rel="stylesheet" href="{{ root }}{{ asset("style.css") }}">
  <script src="{{ root }}{{ asset("theme.js") }}"></script>
</head>
{% block body %}{% end %}
</html>
"""

# language=html
LOGIN_HTML = r"""{% extends "page.html" %}{% block body %}<body class="login">
  <main>
    <img src="{{ asset("icon.svg") }}" alt="" width="56" height="56">
    <h1 dir="auto">{{ title }}</h1>
    <form action="login{{ path }}" method="post" aria-label="{{ w["login_heading"] }}">
      {% if error %}
      <p class="error" id="error" role="alert">{{ error }}
        {% if suggestion %}<span><bdi>{{ suggestion }}</bdi> {{ w["login_free"] }}</span>{% end %}</p>
      {% end %}
      <label for="nickname">{{ w["login_nickname"] }}</label>
      <input id="nickname" name="nickname" value="{{ suggestion or nickname }}" maxlength="64" dir="auto"
        {{ "" if wrong_password else "autofocus" }} autocomplete="nickname" autocapitalize="none"
        spellcheck="false" aria-describedby="hint">
      <p class="hint" id="hint">{{ w["login_hint"] }}</p>
      {% if password_needed %}
      <label for="password">{{ w["login_password"] }}</label>
      <input id="password" name="password" type="password" autocomplete="current-password" required
        {{ "autofocus" if wrong_password else "" }}>
      {% end %}
      <button>{{ w["login_submit"] }}</button>
    </form>
    <p class="hint">{{ kept }}</p>
  </main>
</body>{% end %}
"""

# language=html
ERROR_HTML = r"""{% extends "page.html" %}{% block body %}<body class="login">
  <main>
    <h1 dir="auto">{{ title }}</h1>
    <p class="error" role="alert">{{ text }}</p>
    <p><a href="{{ root }}">{{ w["error_back"] }}</a></p>
  </main>
</body>{% end %}
"""

# language=html
CHAT_HTML = r"""{% extends "page.html" %}{% block body %}
<body class="chat {{ view }}" data-view="{{ view }}" data-state="connecting" data-name="{{ name }}" data-now="{{ now }}"
  data-words="{{ words }}">
  <header>
    <h1 id="title" dir="auto">{{ title }}</h1>
    <p id="state" class="scripted"><span id="state-text" role="status"></span>
      <span id="state-wait" aria-hidden="true"></span>
      <a id="login-again" href="login" hidden>{{ w["chat_login_again"] }}</a></p>
    <label id="sorting" class="scripted" hidden><span id="sort-sign"></span>
      <svg viewBox="0 0 24 24" aria-hidden="true"><path d="M3 5h18v2H3zm0 6h12v2H3zm0 6h6v2H3z"/></svg>
      <select id="sort" aria-label="{{ w["chat_sort"] }}"><option value="">{{ w["chat_sort_time"] }}</option></select>
    </label>
    <button id="join" class="plain scripted" type="button" aria-haspopup="dialog">
      <svg viewBox="0 0 24 24" aria-hidden="true"><path d="M3 3h8v8H3zm2 2v4h4V5zm8-2h8v8h-8zm2 2v4h4V5zM3 13h8v8H3zm2
        2v4h4v-4zm8-2h3v3h-3zm5 0h3v3h-3zm-5 5h3v3h-3zm5 0h3v3h-3z"/></svg> <span>{{ w["chat_join"] }}</span></button>
    <button id="manage" class="plain for-hosts" type="button" aria-haspopup="dialog">
      <svg viewBox="0 0 24 24" aria-hidden="true"><path d="M2 6h9v2H2zm17 0h3v2h-3zM2 16h3v2H2zm11 0h9v2h-9z"/>
        <circle cx="15" cy="7" r="3"/><circle cx="9" cy="17" r="3"/></svg>
      <span>{{ w["chat_host_page"] }}</span></button>
    <button id="people" class="plain scripted" type="button" aria-controls="roster" aria-expanded="false">
      <svg viewBox="0 0 24 24" role="img" aria-label="{{ w["chat_show_people"] }}"><circle cx="9" cy="8" r="4"/>
        <path d="M1 20a8 8 0 0 1 16 0z"/><path d="M15 4.3a4 4 0 0 1 0 7.4M19 20h4a8 8 0 0 0-5-7.4"/></svg>
      <span class="count"></span></button>
  </header>
  <section id="pinned" aria-label="{{ w["chat_pinned"] }}" hidden>
    <button id="pin-line" class="plain" type="button"></button>
    <button id="pin-fold" class="plain" type="button" aria-controls="pin-text" aria-label="{{ w["chat_unfold"] }}">
      <svg viewBox="0 0 24 24" aria-hidden="true"><path d="m6 8-1.5 1.5L12 17l7.5-7.5L18 8l-6 6z"/></svg></button>
    <div id="pin-text" class="text" dir="auto" tabindex="0"></div>
    <button id="unpin" class="plain for-hosts" type="button">{{ w["chat_unpin"] }}</button>
  </section>
  <main id="scroller" tabindex="0"><noscript>{{ w["chat_needs_script"] }}</noscript><div id="content">
    <p id="earlier" class="notice" hidden>{{ w["chat_earlier"] }}</p>
    <div id="log" role="log" aria-live="off" aria-label="{{ w["chat_log"] }}" data-empty="{{ w["chat_empty"] }}"></div>
    <div id="outbox" role="group" aria-label="{{ w["chat_outbox"] }}"></div></div></main>
  <section id="sorted" role="main" tabindex="0" aria-label="{{ w["chat_sort"] }}"
    data-empty="{{ w["chat_sort_empty"] }}" hidden></section>
  <form id="composer" class="scripted" aria-label="{{ w["chat_placeholder"] }}">
    <button id="newer" type="button" hidden></button>
    <div id="reply" role="group" aria-label="{{ w["chat_reply"] }}" hidden></div>
    <div id="matches" role="group" aria-label="{{ w["chat_people"] }}" hidden></div>
    <p id="hold"><span id="hold-text" role="status"></span> <span id="hold-wait" aria-hidden="true"></span></p>
    <p id="left-over" role="status"></p>
    <div id="attached" role="group" aria-live="polite" aria-label="{{ w["chat_attached"] }}" hidden></div>
    <input id="file" type="file" accept="image/*" multiple hidden>
    <button id="pick" class="plain" type="button" aria-label="{{ w["chat_picture"] }}"
      {{ "" if pictures else "hidden" }} data-off="{{ w["refused_pictures-off"] }}">
      <svg viewBox="0 0 24 24" aria-hidden="true"><path fill-rule="evenodd" d="M5 3h14a3 3 0 0 1 3 3v12a3 3 0 0 1-3
        3H5a3 3 0 0 1-3-3V6a3 3 0 0 1 3-3zm0 2a1 1 0 0 0-1 1v10l4-4 4 4 5-5 3 3V6a1 1 0 0 0-1-1zm3 1.5a2 2 0 0 1 0
        4 2 2 0 0 1 0-4z"/></svg></button>
    <textarea id="box" rows="1" dir="auto" enterkeyhint="send" autocomplete="off" aria-label="{{ w["chat_message"] }}"
      aria-describedby="hold-text" placeholder="{{ w["chat_placeholder"] }}"
      title="Shift+Enter: {{ w["chat_break"] }}"></textarea>
    <button id="break" class="plain" type="button" aria-label="{{ w["chat_break"] }}">
      <svg viewBox="0 0 24 24" aria-hidden="true"><path d="M18 5h2v9H8v4l-6-5 6-5v4h10z"/></svg></button>
    <button id="send" aria-label="{{ w["chat_send"] }}"><svg viewBox="0 0 24 24" aria-hidden="true">
      <path d="M3 20.5 21.5 12 3 3.5l2.6 7L15 12l-9.4 1.5z"/></svg></button></form>
  <aside id="roster" aria-label="{{ w["chat_people"] }}">
    <h2>{{ w["chat_people"] }} <span class="count"></span></h2>
    <ul id="members" tabindex="0" aria-label="{{ w["chat_people"] }}"></ul>
    <details><summary>{{ w["chat_settings"] }}</summary>
    <div class="settings scripted">
      <label>{{ w["chat_theme"] }} <select id="theme"><option value="system">{{ w["chat_theme_system"] }}</option>
        <option value="light">{{ w["chat_theme_light"] }}</option>
        <option value="dark">{{ w["chat_theme_dark"] }}</option></select></label>
      <label>{{ w["chat_sound"] }} <input id="sound" type="checkbox"></label>
      <label hidden>{{ w["chat_notify"] }} <input id="notify" type="checkbox"></label>
    </div>
    <form id="logout" action="logout" method="post"><button class="plain">{{ w["chat_logout"] }}</button></form>
    </details>
  </aside>
  <dialog id="invite" aria-labelledby="invite-title"><div>
    <h2 id="invite-title">{{ w["chat_join_title"] }}</h2>
    <img id="code" alt="{{ w["chat_code"] }}" hidden>
    <p id="address" dir="ltr"></p>
    <select id="addresses" aria-label="{{ w["chat_addresses"] }}" hidden></select>
    <p class="hint">{{ w["chat_join_hint"] }}</p>
    <p class="choices"><button id="copy" type="button">{{ w["chat_copy"] }}</button>
      <a href="?view=projector" target="_blank">{{ w["chat_projector"] }}</a>
      <button id="close" class="plain close" type="button">{{ w["chat_close"] }}</button></p>
  </div></dialog>
  <dialog id="room" aria-labelledby="room-title"><div>
    <h2 id="room-title">{{ w["chat_host_page"] }}</h2>
    <div class="settings">
      <label>{{ w["chat_lock"] }} <input id="lock" type="checkbox"></label>
      <label>{{ w["chat_slow"] }} <select id="every"><option value="0">{{ w["chat_slow_off"] }}</option>
        {% for seconds in (5, 10, 30, 60) %}
        <option value="{{ seconds }}">{{ w["chat_slow_seconds"].format(n=seconds) }}</option>{% end %}</select></label>
      <label>{{ w["chat_door"] }} <input id="door" type="checkbox"></label>
      {% if transcript != "off" %}
      <p>{{ w["chat_transcript"] }} <span>{% for kind in ("txt", "json") %}
        <a href="transcript?format={{ kind }}" download>{{ w["chat_transcript_" + kind] }}</a>{% end %}</span></p>
      {% end %}
    </div>
    <p class="choices"><button id="clear" class="plain bad" type="button">{{ w["chat_clear"] }}</button>
      <button class="plain close" type="button">{{ w["chat_close"] }}</button></p>
  </div></dialog>
  <dialog id="person" aria-labelledby="person-name"><div>
    <h2 id="person-name" dir="auto"></h2>
    <p id="person-muted" class="hint" role="status"></p>
    <p id="mute-label">{{ w["chat_mute"] }}</p>
    <p id="mute" class="choices" role="group" aria-labelledby="mute-label">{% for minutes in (5, 15, 60) %}
      <button class="plain" type="button" value="{{ minutes }}">{{ w["chat_minutes"].format(n=minutes) }}</button>
      {% end %}<button id="unmute" class="plain" type="button" value="0">{{ w["chat_unmute"] }}</button></p>
    <p class="choices"><button id="remove" class="plain bad" type="button">{{ w["chat_remove"] }}</button>
      <button class="plain close" type="button">{{ w["chat_close"] }}</button></p>
  </div></dialog>
  <dialog id="question" role="alertdialog" aria-labelledby="asked"><div>
    <p id="asked"></p>
    <p class="choices"><button class="plain close" type="button">{{ w["chat_cancel"] }}</button>
      <button id="yes" class="bad" type="button"></button></p>
  </div></dialog>
  <dialog id="menu"></dialog>
  <dialog id="viewer" aria-label="{{ w["chat_viewer"] }}"><img id="large" alt="">
    <button class="plain" type="button">{{ w["chat_close"] }}</button></dialog>
  <script src="{{ asset("chat.js") }}"></script>
</body>{% end %}
"""

# language=css
STYLE_CSS = r"""
:root {
  color-scheme: light; --page: #f3f4f0; --surface: #fff; --ink: #1c2326; --quiet: #59646a; --line: #dcdfd9;
  --accent: #0f6b5c; --on-accent: #fff; --mine: #d5ece4; --warn: #ffedc4; --on-warn: #5c3f00; --bad: #a32c1b;
  --shadow: 0 1px 2px #1c232614; --code: #1c23260d; --name: .47 .13; --face: .9 .06; --on-face: .42 .12;
}
:root[data-theme="dark"] {
  color-scheme: dark; --page: #121719; --surface: #1e2629; --ink: #e4eae9; --quiet: #9aa8ad; --line: #2d373b;
  --accent: #5fcdb3; --on-accent: #06251e; --mine: #174037; --warn: #43340d; --on-warn: #ffdf9b; --bad: #ff9f8f;
  --shadow: 0 0 #0000; --code: #ffffff12; --name: .82 .1; --face: .36 .07; --on-face: .9 .07;
}

:root {
  font-size: max(100%, .6vw);  /* 4K: not smaller than a hand can point at */
  --left: max(12px, env(safe-area-inset-left)); --right: max(12px, env(safe-area-inset-right));
  --foot: max(12px, env(safe-area-inset-bottom));
}
* { box-sizing: border-box; }
[hidden] { display: none !important; }
:focus-visible { outline: 3px solid var(--accent); outline-offset: 2px; }
input:focus-visible, textarea:focus-visible { outline-offset: -2px; }
#box:focus-visible { outline: 2px solid var(--quiet); }  /* one knows where one writes: no louder than the text */
.chat:not(.host) .for-hosts { display: none; }
.chat:not(.live) .scripted { display: none !important; }
.chat:not(.live) noscript { display: block; padding: 32px 16px; color: var(--quiet); text-align: center; }
body {
  margin: 0; background: var(--page); color: var(--ink);
  font: 1rem/1.45 system-ui, "PingFang SC", "Microsoft YaHei", sans-serif; -webkit-text-size-adjust: 100%;
  scrollbar-color: var(--quiet) transparent;
}
h1, h2, p, ul { margin: 0; padding: 0; }
a { color: var(--accent); }
svg { width: 22px; height: 22px; fill: currentColor; vertical-align: middle; }
button {
  min-width: 44px; min-height: 44px; padding: 0 16px; border: 0; border-radius: 12px; background: var(--accent);
  color: var(--on-accent); font: inherit; font-weight: 600; cursor: pointer; touch-action: manipulation;
}
button:hover { filter: brightness(1.08); }
button.plain { border: 1px solid var(--line); background: none; color: var(--ink); }
button.bad { background: var(--bad); }
button.plain.bad { background: none; color: var(--bad); }
button:where(:disabled) { background: var(--line); color: var(--quiet); cursor: default; }
button.plain:disabled { color: var(--quiet); }
input:not([type="checkbox"]), textarea, select {
  width: 100%; min-height: 46px; padding: 10px 14px; border: 1px solid var(--quiet); border-radius: 12px;
  background: var(--surface); color: inherit; font: inherit;
}

/* Login */
.login main { max-width: 24rem; margin: 0 auto; padding: min(14vh, 7rem) 20px 32px; text-align: center; }
.login h1 { margin: 8px 0 24px; font-size: 1.7rem; line-height: 1.2; overflow-wrap: anywhere; }
.login form {
  margin-bottom: 20px; padding: 24px; border: 1px solid var(--line); border-radius: 20px; background: var(--surface);
  box-shadow: var(--shadow); text-align: start;
}
.login label { display: block; margin-bottom: 6px; font-weight: 600; }
.login form button { width: 100%; min-height: 48px; }
#password { margin-bottom: 20px; }
.hint { color: var(--quiet); font-size: .875rem; }
.login form .hint { margin: 6px 0 16px; }
.error { margin-bottom: 16px; padding: 10px 14px; border-radius: 12px; background: var(--warn); color: var(--on-warn); }
.error span { display: block; }
.error bdi { font-weight: 700; }

/* Chat: header, people, messages, composer */
.chat {
  display: grid; grid-template: auto auto minmax(0, 1fr) auto / minmax(0, 1fr) 16rem;
  height: var(--height, 100dvh); overflow: hidden;
}
header {
  position: relative; z-index: 3; grid-column: 1 / -1; display: flex; align-items: center; gap: 12px; min-height: 56px;
  padding: env(safe-area-inset-top) var(--right) 0 var(--left); border-bottom: 1px solid var(--line);
  background: var(--surface);
}
header h1 { overflow: hidden; font-size: 1.125rem; text-overflow: ellipsis; white-space: nowrap; }
header .plain { flex: none; border: 0; padding: 0 10px; }
#join { margin-inline-start: auto; }
#people { display: none; margin-inline-start: -8px; }

/* The state: a dot beside the title while all is well, else a strip that covers nothing new */
#state { flex: none; color: var(--quiet); font-size: .8125rem; }
#state::before {
  content: ""; display: inline-block; width: .6em; height: .6em; margin-inline-end: 6px; border-radius: 50%;
  background: #2c9c6a;
}
.chat:not([data-state="connected"]) #state {
  position: absolute; inset: 100% 16rem auto 0; padding: 8px 16px; background: var(--warn); color: var(--on-warn);
  font-size: .9375rem; text-align: center; animation: appear .2s backwards;
}
.chat:not([data-state="connected"]) #state::before { background: #d98a00; }
.chat[data-state="connecting"] #state { animation-delay: .6s; }
.chat[data-state="closed"] #state::before { background: var(--bad); }
#state a { color: inherit; font-weight: 700; }
@keyframes appear { from { opacity: 0; } }

#roster {
  grid-area: 2 / 2 / 5 / 3; display: flex; flex-direction: column; gap: 8px; min-height: 0;
  padding: 16px var(--right) var(--foot) 12px; border-inline-start: 1px solid var(--line); background: var(--surface);
}
#roster h2 { padding-inline: 6px; color: var(--quiet); font-size: .875rem; }
#members { flex: 1; overflow-y: auto; overscroll-behavior: contain; list-style: none; }
#members li { display: flex; flex-wrap: wrap; align-items: center; gap: 0 10px; padding: 5px 6px; }
#members bdi { flex: 0 1 auto; max-width: calc(100% - 42px); overflow-wrap: anywhere; }
#members small, #members .more { color: var(--quiet); }
#members .muted { order: 1; flex-basis: 100%; padding-inline-start: 42px; font-size: .75rem; }
#members button {
  flex: none; margin: -8px -6px -8px 0; padding: 0; border: 0; color: var(--quiet); font-size: 1.25rem;
}
#members bdi:has(~ button) { flex: 1 0 0; }
.badge {
  flex: none; padding: 0 7px; border-radius: 9px; background: var(--accent); color: var(--on-accent);
  font-size: .6875rem; font-weight: 700; line-height: 18px;
}
details { border-block-start: 1px solid var(--line); color: var(--quiet); font-size: .875rem; }
summary { display: flex; align-items: center; min-height: 44px; padding-inline: 6px; cursor: pointer; }
summary::after { content: "▴"; margin-inline-start: auto; }
[open] summary::after { content: "▾"; }
#logout button { width: 100%; margin-block-start: 4px; }
.settings { padding-inline: 6px; }
.settings > * { display: flex; align-items: center; justify-content: space-between; gap: 12px; min-height: 44px; }
.settings select { width: auto; min-height: 44px; padding: 4px 8px; border-color: var(--line); color: var(--ink); }
input[type="checkbox"] { width: 20px; height: 20px; margin: 0 12px; accent-color: var(--accent); }

#scroller { grid-area: 3 / 1; overflow: hidden auto; overscroll-behavior: contain; overflow-wrap: anywhere; }
#scroller.following { overflow-anchor: none; }
#scroller:focus-visible, #members:focus-visible { outline-offset: -3px; }
#content {
  display: flex; flex-direction: column; justify-content: flex-end; max-width: 56rem; min-height: 100%; margin: 0 auto;
  padding: 16px var(--right) 8px var(--left);
}
/* What a host has pinned: a line that unfolds */
#pinned {
  grid-area: 2 / 1; display: flex; flex-wrap: wrap; align-items: center; border-bottom: 1px solid var(--line);
  padding: 0 var(--right) 0 var(--left); background: var(--surface);
}
#pinned button { flex: none; padding: 0 10px; border: 0; border-radius: 8px; }
#pinned #pin-line {
  flex: 1; min-width: 0; overflow: hidden; padding: 0 2px; font-weight: 400; text-align: start;
  text-overflow: ellipsis; white-space: nowrap;
}
#pin-line bdi:first-child { margin-inline-end: 8px; font-weight: 700; }
#pin-line bdi:first-child::before {
  content: ""; display: inline-block; width: 3px; height: 1.2em; margin-inline-end: 10px; border-radius: 2px;
  background: var(--accent); vertical-align: middle;
}
#pinned:not(.open) > :is(#pin-text, #unpin), #pinned.open #pin-line bdi + bdi { display: none; }
#pinned.open #pin-fold svg { rotate: 180deg; }
#pinned #pin-text {
  flex: 1 0 100%; max-height: calc(.35 * var(--height, 100dvh)); overflow-y: auto; overflow-wrap: anywhere;
  padding: 0 2px 10px 15px;
}
#unpin { margin-inline-start: auto; }
[data-state="connected"] #log:empty::before, #sorted:empty::before {
  content: attr(data-empty); display: block; padding: 32px 0; color: var(--quiet); text-align: center;
}
.face {
  flex: none; display: grid; place-items: center; width: 32px; height: 32px; border-radius: 50%;
  background: oklch(var(--face) var(--hue)); color: oklch(var(--on-face) var(--hue)); font-size: .8125rem;
  font-weight: 700; letter-spacing: -.03em; text-transform: uppercase;
}
.who { display: block; color: oklch(var(--name) var(--hue)); font-size: .875rem; font-weight: 700; }
.message { display: flex; flex-wrap: wrap; gap: 0 8px; margin-top: 12px; }
/* A long room costs little: what is out of sight is not laid out, where nothing jumps for it when one scrolls back */
@supports (overflow-anchor: auto) {
  .part { contain: content; contain-intrinsic-block-size: auto 1920px; overflow-clip-margin: 6px; }
  .part:not(:last-child) { content-visibility: auto; }
}
.message.run { margin-top: 3px; }
.message[data-day]::before { content: attr(data-day); flex-basis: 100%; }
.message[data-day]::before, .notice { padding: 8px 12px; color: var(--quiet); font-size: .8125rem; text-align: center; }
.message[data-day]::before { margin-bottom: 8px; font-weight: 600; }
.bubble {
  position: relative; max-width: min(85% - 40px, 40rem); padding: 7px 12px; border-radius: 6px 16px 16px;
  background: var(--surface); box-shadow: var(--shadow);
}
/* A run's time stands in its last line if there is room, else below: the text ends with as much room as that takes */
.line { position: relative; display: flex; flex-wrap: wrap; align-items: last baseline; gap: 0 12px; }
.text:not(:empty) ~ time { position: absolute; inset-block-end: 0; inset-inline-end: 0; }
.text[data-time]::after {
  content: attr(data-time); display: inline-block; padding-inline-start: 12px; font-size: .75rem; visibility: hidden;
}
.goes-on time, .goes-on .text::after { display: none; }
.failed .line { display: block; }
.text { flex: 1 1 auto; min-width: 0; white-space: pre-wrap; }
.text.emoji { font-size: 2.5em; line-height: 1.2; }
.text.folded { flex-basis: 100%; max-height: 14.5em; overflow: hidden; mask: linear-gradient(#000 70%, #0000); }
.fold { margin: 4px 0; padding: 0 12px; font-size: .875rem; }
code { padding: .1em .3em; border-radius: 5px; background: var(--code); font: .9em/1.5 ui-monospace, Menlo, monospace; }
pre { margin: 6px 0; padding: 8px 10px; border-radius: 8px; background: var(--code); white-space: pre-wrap; }
pre code { padding: 0; background: none; }
.text a { direction: ltr; unicode-bidi: isolate; }
mark { border-radius: 4px; padding: 0 .2em; background: var(--warn); color: var(--on-warn); font-weight: 600; }
.mention .bubble { box-shadow: inset 3px 0 var(--on-warn), var(--shadow); }
.bubble time, .status { margin-inline-start: auto; color: var(--quiet); font-size: .75rem; text-align: end; }
.run .face { visibility: hidden; height: 0; }
.run .bubble { border-start-start-radius: 16px; }
[data-state="connected"] #state-text, .run .who, .mine .who {
  position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%);
}
.mine { justify-content: flex-end; }
.mine .face { display: none; }
.mine .bubble { max-width: min(85%, 40rem); border-radius: 16px 16px 6px; background: var(--mine); }
.past { color: var(--quiet); filter: grayscale(1); }
.past .bubble, .deleted .bubble { background: none; box-shadow: inset 0 0 0 1px var(--line); }
.notice:empty { display: none; }
[data-kind="new"] { display: flex; align-items: center; gap: 12px; color: var(--accent); font-weight: 600; }
[data-kind="new"]::before, [data-kind="new"]::after { content: ""; flex: 1; border-block-start: 1px solid; }
[data-kind="missed"], [data-kind="reset"], [data-kind="refused"] {
  margin: 12px auto; border-radius: 12px; background: var(--warn); color: var(--on-warn);
}
#outbox .bubble { border: 1px dashed var(--quiet); background: none; box-shadow: none; }
#outbox .failed .bubble { border-color: var(--bad); }
#outbox .failed .status { color: var(--bad); }
.choices { display: none; gap: 8px; justify-content: flex-end; padding-top: 4px; }
.failed .choices { display: flex; }
.choices button + button { border: 1px solid var(--line); background: none; color: inherit; }

#composer {
  position: relative; grid-area: 4 / 1; display: flex; flex-wrap: wrap; align-items: flex-end; gap: 0 8px; width: 100%;
  max-width: 56rem; margin: 0 auto; padding: 8px var(--right) var(--foot) var(--left);
}
#box {
  flex: 1; width: 0; max-height: min(6 * 1.45em + 22px, .4 * var(--height, 100dvh) - 20px); border-radius: 22px;
  field-sizing: content; resize: none;
}
#send, #break, #pick { flex: none; width: 46px; height: 46px; padding: 0; border: 0; border-radius: 50%; }
#break { margin-inline-end: -8px; color: var(--quiet); }
@media not (any-pointer: coarse) { #break { display: none; } }  /* Enter sends, and a phone has no Shift+Enter */
#matches {
  position: absolute; z-index: 1; bottom: 100%; inset-inline-start: var(--left); max-width: calc(100% - 24px);
  padding: 4px; border: 1px solid var(--line); border-radius: 14px; background: var(--surface);
  box-shadow: 0 2px 8px #0003;
}
#matches button { display: block; width: 100%; border: 0; text-align: start; overflow-wrap: anywhere; }
#matches button:first-child:not(:hover) { background: var(--code); }
#left-over, #hold { flex-basis: 100%; color: var(--quiet); font-size: .8125rem; text-align: center; }
#hold:has(#hold-text:not(:empty)) { padding-bottom: 6px; }
#hold-wait { font-variant-numeric: tabular-nums; }
#box:read-only { background: var(--page); color: var(--quiet); }
#left-over.over { color: var(--bad); font-weight: 700; }
#newer {
  position: absolute; bottom: 100%; left: 50%; translate: -50%; border-radius: 22px; box-shadow: 0 2px 8px #0004;
}

/* Pictures: as large as they will be, before they are there */
#pick { margin-inline: -6px -4px; }
#attached { display: flex; flex-wrap: wrap; flex-basis: 100%; gap: 8px; padding-bottom: 8px; }
#attached button { position: relative; padding: 0; overflow: hidden; background: var(--code); }
#attached button::after {
  content: "×"; position: absolute; inset: 2px 2px auto auto; width: 22px; border-radius: 50%;
  background: var(--ink); color: var(--surface); line-height: 22px;
}
#attached canvas { display: block; width: 72px; height: 72px; object-fit: cover; }
.picture, .sign, .quote { background: var(--code); color: inherit; font-size: .8125rem; font-weight: 400; }
.picture {
  display: block; width: min(1px * var(--wide), 20rem * var(--wide) / var(--high)); min-width: 44px; max-width: 100%;
  max-height: 20rem; margin: 3px 0 5px; padding: 0; overflow: hidden; aspect-ratio: var(--wide) / var(--high);
  border-radius: 8px;
}
.picture > * { display: block; width: 100%; height: 100%; object-fit: contain; }
.picture.gone { min-width: 10rem; padding: 8px; }
.text:empty { display: none; }
#viewer { width: fit-content; max-width: none; max-height: none; padding: 8px; }
#large { display: block; max-width: calc(100vw - 40px); max-height: calc(100dvh - 100px); margin: 0 auto 8px; }

/* What is done to messages: the button of the menu, the menu, signs, replies, deletion */
.more { align-self: center; min-width: 32px; min-height: 32px; padding: 0; background: none; color: var(--quiet); }
.more::before { content: "⋯"; font-size: 1.25rem; line-height: 1; }
.more:not(:focus-visible, .message:hover > *) { opacity: 0; }
.mine .more { order: -1; }
.past :is(.more, .signs) { display: none; }
@media (hover: none) {  /* a finger holds the message instead */
  .more:not(:focus-visible) { position: absolute; width: 1px; min-width: 0; min-height: 0; clip-path: inset(50%); }
  .bubble { user-select: none; -webkit-user-select: none; -webkit-touch-callout: none; }
}
#menu {
  inset: var(--y) auto auto var(--x); width: 17.5rem; margin: 0; padding: 6px; border: 1px solid var(--line);
  border-radius: 16px; text-align: start;
}
#menu::backdrop { background: none; }
#menu button {
  display: block; width: 100%; padding: 0 12px; background: none; color: inherit; font-weight: 400; text-align: start;
}
#menu button:is(:hover, [aria-pressed="true"]) { background: var(--code); filter: none; }
#menu .bad { color: var(--bad); }
#menu p { padding: 8px 12px; }
#menu .offered {
  display: grid; grid-template-columns: repeat(6, 1fr); margin-bottom: 6px; padding: 0 0 6px;
  border-block-end: 1px solid var(--line);
}
#menu .offered button { min-width: 0; padding: 0; font-size: 1.375rem; text-align: center; }
#menu .offered [aria-pressed="true"] { box-shadow: inset 0 0 0 2px var(--accent); }
.copied { position: absolute; opacity: 0; }
.signs { display: flex; flex-wrap: wrap; gap: 4px; margin: 4px 0 1px; }
.sign {
  min-width: 0; min-height: 28px; padding: 0 9px; border-radius: 22px; background-clip: padding-box; font-weight: 600;
  font-variant-numeric: tabular-nums;
}
.sign[aria-pressed="true"] { box-shadow: inset 0 0 0 1.5px var(--accent); color: var(--accent); }
.quote {
  display: block; max-width: 100%; min-height: 32px; margin: 2px 0 5px; padding: 0 10px; overflow: hidden;
  border-inline-start: 3px solid oklch(var(--name) var(--hue, 0)); border-radius: 4px 8px 8px 4px; text-align: start;
  text-overflow: ellipsis; white-space: nowrap;
}
.quote:disabled { border-color: currentColor; color: var(--quiet); }
.quote bdi { color: oklch(var(--name) var(--hue)); font-weight: 700; }
@media (any-pointer: coarse) {
  .signs { gap: 0; margin: -4px -4px -6px; }
  .sign { min-width: 44px; min-height: 44px; border: solid transparent; border-width: 8px 4px; }
  .quote { min-height: 44px; }
}
.deleted .text { color: var(--quiet); font-style: italic; }
.found .bubble { outline: 2px solid var(--accent); outline-offset: 2px; }
.back { display: block; margin: 6px 0 4px; font-size: .875rem; }
#reply { display: flex; flex-basis: 100%; align-items: center; gap: 8px; min-width: 0; padding-bottom: 6px; }
#reply .quote { flex: 1; min-height: 44px; margin: 0; background: var(--surface); }
#reply .plain { flex: none; padding: 0; border: 0; border-radius: 50%; color: var(--quiet); font-size: 1.25rem; }
#sorting {
  position: relative; flex: none; min-width: 44px; margin-inline-start: auto; line-height: 44px; text-align: center;
}
#sorting:has(:focus-visible) { outline: 3px solid var(--accent); border-radius: 12px; }
#sorting:not([hidden]) ~ #join { margin-inline-start: 0; }
#sort { position: absolute; inset: 0; min-height: 44px; padding: 0; opacity: 0; cursor: pointer; }
#sorted {
  z-index: 1; grid-area: 3 / 1; overflow: hidden auto; background: var(--page); overflow-wrap: anywhere;
  padding: 4px calc(max(0px, 50% - 28rem) + var(--right)) 16px calc(max(0px, 50% - 28rem) + var(--left));
}
#sorted:not([hidden]) ~ #composer #newer { display: none; }
@media (max-width: 48rem) {
  #menu { inset: auto 0 0; width: 100%; max-width: 100%; padding: 12px 12px var(--foot); border-radius: 20px 20px 0 0; }
  #menu::backdrop { background: #0006; }
}

/* The panel for those who want to join; on a wall it stands in a corner for good */
dialog {
  width: min(26rem, 100vw - 24px); padding: 0; border: 0; border-radius: 20px; background: var(--surface);
  color: inherit; text-align: center; box-shadow: 0 8px 40px #0005;
}
dialog > div { padding: 24px; }
dialog::backdrop { background: #0008; }
dialog h2 { font-size: 1.25rem; }
#code { display: block; width: min(100%, 18rem, 40vh); margin: 16px auto 0; border-radius: 12px; background: #fff; }
#address { margin: 12px 0; font-size: clamp(1.0625rem, 5.5vw, 1.375rem); font-weight: 700; overflow-wrap: anywhere; }
dialog .hint { margin-block: 12px; }
dialog .choices { display: flex; flex-wrap: wrap; align-items: center; justify-content: center; gap: 8px 16px; }
dialog .settings { margin: 12px 0; text-align: start; }
.settings span a, .choices a { display: inline-block; padding: 12px 6px; }
dialog #mute { flex-wrap: nowrap; gap: 8px; margin-block: 4px 16px; }
#mute button { flex: 1; padding: 0 4px; }
#asked { margin-bottom: 16px; overflow-wrap: anywhere; }

@media (max-height: 30rem) {  /* a phone lies on its side */
  .window #invite { width: min(40rem, 100vw - 24px); }
  .window #invite div { display: grid; grid-template-columns: auto 1fr; gap: 0 24px; }
  #invite div > * { grid-column: 2; }
  .window #code { grid-area: 1 / 1 / 6; width: 50vh; margin: auto; }
}

/* On a wall: read-only, and as large as the screen allows */
:root:has(.projector) { font-size: clamp(20px, 1.9vw, 72px); }
.projector {
  grid-template: auto auto minmax(0, 1fr) auto / minmax(0, 1fr) minmax(12rem, 27vw); font-size: 1rem;
}
.projector :is(#composer > :not(#hold), #roster, #join, #manage, #people, #unpin, #invite .choices) { display: none; }
.projector #pinned { padding: .3em 2vw; }
.projector #composer { padding: 0; max-width: none; }
.projector #content { max-width: none; }
.projector :is(#content, #sorted) { padding-inline: 2vw; }
.projector .bubble { max-width: 90%; padding: .4em .8em; }
.projector .face { width: 2.2em; height: 2.2em; }
.projector #invite {
  grid-area: 2 / 2 / 5; position: static; align-self: end; width: auto; margin: 0 1.5vw 1.5vw 0; box-shadow: none;
  outline: none;
}
.projector #invite div { padding: 1.2vw; }
.projector #code { width: min(100%, 40vh); }
.projector #address { font-size: 1.7vw; }
.projector:not([data-state="connected"]) #state { right: 0; }
@media (max-aspect-ratio: 1) {
  .projector { grid-template: auto auto minmax(0, 1fr) auto auto / minmax(0, 1fr) !important; }
  .projector #invite { grid-area: 5 / 1; align-self: auto; max-width: none; margin: 0 12px 12px; }
  .projector #code { width: 24vh; }
  .projector #address { font-size: 1.1em; }
}

@media (max-width: 48rem) {
  .chat { grid-template-columns: minmax(0, 1fr); }
  #people { display: block; }
  header .plain span:not(.count) { font-size: 0; }
  .chat:not([data-state="connected"]) #state { right: 0; }
  #roster {
    position: fixed; z-index: 2; inset: calc(56px + env(safe-area-inset-top)) 0 0 auto; width: min(18rem, 85vw);
    box-shadow: -8px 8px 32px #0005; visibility: hidden; translate: 100%; transition: translate .2s, visibility .2s;
  }
  #roster.open { visibility: visible; translate: 0; }
}
@media (prefers-reduced-motion: reduce) { * { animation: none !important; transition: none !important; } }
@media (forced-colors: active) { .bubble, button { border: 1px solid; } }
"""

# language=javascript
THEME_JS = r"""
'use strict';

// Runs before the first paint, so that no page shows in the wrong colours first. Tabs of one browser agree.
const THEME = 'tornchat:theme';
const darkSystem = matchMedia('(prefers-color-scheme: dark)');
let theme = 'system';

function readTheme() {
  try { theme = localStorage.getItem(THEME) || 'system'; } catch { /* forbidden: this page alone knows */ }
  showTheme();
}

function chooseTheme(chosen) {
  theme = chosen;
  try { localStorage.setItem(THEME, chosen); } catch { /* as above */ }
  showTheme();
}

function showTheme() {
  const dark = theme === 'system' ? darkSystem.matches : theme === 'dark';
  document.documentElement.dataset.theme = dark ? 'dark' : 'light';
}

readTheme();
darkSystem.onchange = showTheme;
window.onstorage = readTheme;
window.addEventListener('DOMContentLoaded', () => document.querySelector('input[autofocus]')?.select());
"""

# language=javascript
CHAT_JS = r"""
'use strict';

// === Constants: milliseconds, rows and pixels, each with its reason ===
const RETRY_MS = [500, 10000];    // back-off between tries: the first, and the longest
const RESTART_MS = [200, 2000];   // after 1001 everybody comes back at once: spread out
const SPREAD_MS = 20;             // a member: a crowd comes back with no more than 50 tries a second
const SILENCE_MS = 45000;         // the server tells the time every 20 s: two of these are missing
const STALE_MS = 25000;           // woken up: one of them is missing, do not wait for the second
const ANSWER_MS = 10000;          // to connect, or to confirm a message, which the server does within 5 s
const HOLD_MS = 3000;             // to wait where a refusal names no time
const SOCKETS_TRIED = 2;          // in a row that never got through, before it is tried by polling
const PROBE_MS = [3000, 300000];  // while polling, pauses between tries of the socket: the first, and the longest
const POLL_SECONDS = 25;          // below what proxies and the server end by themselves
const SLICE_MS = 24;              // of drawing what has come, before keys are listened to
const REST = [16, 800];           // after drawing: times as long as it took, milliseconds at most: for keys and fingers
const RUN_MS = 5 * 60000;         // a longer pause shows the name again
const PART_ROWS = 40;             // of the log: a few of them are in sight, and the others cost nothing
const MAX_PARTS = 30;             // of the log: the 1,000 messages that come back at most, and notices between them
const FOLD = [1000, 15];          // characters and lines, of which a longer message shows only the beginning
const MAX_ELEMENTS = 100;         // in a message: what comes behind them is plain text
const SAID_KEPT = 20;             // for the arrow keys
const NAMES_OFFERED = 5;
const NAMES_IN_LINE = 3;          // of more people only the number is told
const BOTTOM_PX = 24;
const STEER_MS = 1000;            // after a wheel, a touch or a key a scroll is the reader's
const COUNT_FROM = 200;           // characters left when the counter appears
const FINAL_CODES = [4403, 4409, 4429, 4504];
const CLOSE_CODES = {401: 4401, 403: 4403, 409: 4409, 429: 4504, 503: 1013};  // what a poll's status is on a socket
const PASSING_REFUSALS = ['too-fast', 'unavailable', 'name-lost', 'slow'];
const REMOVE_SECONDS = 600;
const ADDRESS = /(?:https?:\/\/|\bwww\.(?=\w))[^\s<>"'`，。；：！？（）【】《》“”、\p{Bidi_C}]+/u;
const MARKUP = /```(?:[\w+-]*\n)?([^]+?)```|`([^`\n]+)`|/.source + ADDRESS.source;
const LINK_TAIL = '.,;:!?)]}*';
const EMOJI = /^(?:[\p{Extended_Pictographic}\p{Emoji_Modifier}\p{RI}\u200d\ufe0f\s]){1,24}$/u;
const words = Object.fromEntries(document.body.dataset.words.split('\n').map((line) => line.split('\t')));
const lang = document.documentElement.lang;
const region = navigator.languages.find((tag) => tag.startsWith(lang.slice(0, 2))) || lang;
const projector = document.body.dataset.view === 'projector';
const pollingOnly = new URLSearchParams(location.search).get('transport') === 'polling';

// === Pure formatting ===
const clockFormat = new Intl.DateTimeFormat(region, {timeStyle: 'short'});
const dateFormat = new Intl.DateTimeFormat(region, {dateStyle: 'full'});
const fullFormat = new Intl.DateTimeFormat(region, {dateStyle: 'full', timeStyle: 'medium'});
const daysFormat = new Intl.RelativeTimeFormat(region, {numeric: 'auto'});
const listFormat = new Intl.ListFormat(lang);
const collator = new Intl.Collator(lang);
const now = () => performance.now();
const between = (low, high) => low + Math.random() * (high - low);
const fill = (text, values) => text.replace(/\{(\w+)\}/g, (_, key) => values[key]);
const midnight = (time) => new Date(time).setHours(0, 0, 0, 0);
const isolate = (name) => `\u2068${name}\u2069`;  // keeps a right-to-left name from turning its sentence around
const newCid = () => crypto.getRandomValues(new Uint32Array(4)).join('-');
const folded = (text) => text.normalize('NFKC').toLowerCase();
const camelCase = (id) => id.replace(/-./g, ([, letter]) => letter.toUpperCase());

function hueOf(name) {  // those who are numbered get colours far apart
  let hash = 2166136261;
  for (const letter of name.replace(/\d+$/, '')) hash = Math.imul(hash ^ letter.codePointAt(0), 16777619);
  return ((hash >>> 0) + 109 * (name.match(/\d+$/) || 0)) % 360;
}

function initials(name) {  // of those who are numbered the number too
  const [, number] = name.match(/0*(\d{1,2})$/) || ['', ''];
  return [...name][0] + number;
}

function dayText(ts) {  // by the server's clock: a wrong one here must not make yesterday of today
  const days = Math.round((midnight(ts) - midnight(serverTime())) / 86400000);
  if (days !== 0 && days !== -1) return dateFormat.format(ts);
  const text = daysFormat.format(days, 'day');
  return text[0].toLocaleUpperCase(lang) + text.slice(1);
}

function listed(names) {
  return names.size > NAMES_IN_LINE ? fill(words.people, {n: names.size}) : listFormat.format([...names].map(isolate));
}

// === DOM: the only place that makes elements, and text only ever as text ===
const {  // every element with an id
  icon, title, stateText, stateWait, loginAgain, join, people, scroller, sorting, sort, sortSign, sorted,
  reply: replyLine, menu, content, log, outbox: outboxList, composer, newer, matches: matchList, leftOver, box,
  break: lineBreak, send, roster, members: memberList, theme: themeChoice, sound, notify, logout, invite, code, address,
  addresses, copy, pick, file: fileChoice, attached: attachedList, viewer, large, pinned: pinBar, pinLine, pinFold,
  pinText, unpin, earlier, holdText, holdWait, manage, room, lock, every, door, clear, person, personName, personMuted,
  mute, unmute, remove, question, asked, yes,
} = Object.fromEntries([...document.querySelectorAll('[id]')].map((element) => [camelCase(element.id), element]));
const shown = new Map();          // seq -> row, of this epoch
const toDraw = [];                // what changes the page, in its order, until there is time for it
let sliceTimer = 0;
let restUntil = 0;
let members = new Set();
let memberCount = 0;
let passing = null;               // who came and went in the newest line of the log
let newLine = null;               // "new since you left"
let following = true;             // the reader is at the bottom
let steeredAt = -STEER_MS;        // by a wheel, a touch or a key
let drawnAt = 0;
let unseen = 0;                   // below what is in view

function make(tag, className, ...children) {
  const element = document.createElement(tag);
  element.className = className;
  element.append(...children);
  return element;
}

function makeButton(content, onclick, attributes = {}) {
  return Object.assign(make('button', '', content), {type: 'button', onclick, ...attributes});
}

function topOf(element) {
  return element.getBoundingClientRect().top;
}

function setText(element, text) {  // an unchanged text is not announced again
  if (element.textContent !== text) element.textContent = text;
}

function draw(task) {
  if (toDraw.push(task) === 1) nextSlice();
}

function nextSlice() {
  clearTimeout(sliceTimer);
  sliceTimer = setTimeout(drawSlice, restUntil - now());
}

function drawSlice() {
  const began = now();
  try {
    while (toDraw.length && now() < began + SLICE_MS) toDraw.shift()();
  } finally {
    if (toDraw.length) nextSlice();
  }
  earlier.hidden = !(log.querySelector('[data-seq]')?.dataset.seq > clearedTo + 1);
  if (following) toBottom();  // as many rows may have come as have gone, which no observer of sizes is told
  else showNewer();
  drawnAt = now();
  if (toDraw.length) return;
  restUntil = drawnAt + Math.min(REST[0] * (drawnAt - began), REST[1]);
  if (!document.hidden) markRead();
}

function withFace(name, row) {
  row.style.setProperty('--hue', hueOf(name));
  row.prepend(Object.assign(make('span', 'face', initials(name)), {ariaHidden: true}));
  return row;
}

function linkTo(match) {  // what ends a sentence ends no address
  let end = match.length;
  while (LINK_TAIL.includes(match[end - 1])) end -= 1;
  const text = match.slice(0, end);
  const href = /^www/i.test(text) ? `http://${text}` : text;
  return [Object.assign(make('a', '', text), {href, target: '_blank', rel: 'noopener noreferrer'}), match.slice(end)];
}

function richText(text) {  // code, links and one's own name; nothing else is anything but text
  const nodes = [];
  let [end, left] = [0, MAX_ELEMENTS];
  for (const {0: match, 1: block, 2: inline, index} of text.matchAll(markup)) {
    left -= block ? 2 : 1;
    if (left < 0) break;
    nodes.push(text.slice(end, index));
    end = index + match.length;
    if (block) nodes.push(make('pre', '', make('code', '', block.replace(/\n$/, ''))));
    else if (inline) nodes.push(make('code', '', inline));
    else if (match.startsWith('@')) nodes.push(make('mark', '', match));
    else nodes.push(...linkTo(match));
    if (block && text[end] === '\n') end += 1;
  }
  return [...nodes, text.slice(end)];
}

function foldButton(body) {  // the top of the text stays, or comes into view
  const button = makeButton(words.show_all, () => {
    const top = Math.max(topOf(body), topOf(scroller) + BOTTOM_PX);
    const open = !body.classList.toggle('folded');
    button.textContent = open ? words.show_less : words.show_all;
    button.ariaExpanded = open;
    scroller.scrollTop += topOf(body) - top;
    steer();
    onScroll();
  }, {className: 'plain fold', ariaExpanded: false});
  body.classList.add('folded');
  return button;
}

function messageRow({name, text, picture, host, re}, ...foot) {
  const body = make('div', 'text', ...richText(text));
  body.classList.toggle('emoji', EMOJI.test(text));
  if (text.length > FOLD[0] || text.split('\n').length > FOLD[1]) foot.unshift(foldButton(body));
  const line = Object.assign(make('div', 'line', body, ...foot), {dir: 'auto'});
  const badge = host && make('small', 'badge', words.host);  // the frame's word: no name can bring it along
  const who = host ? make('div', 'who', make('bdi', '', name), ' ', badge) : make('bdi', 'who', name);
  const bubble = make('div', 'bubble', who, line);
  if (re) line.before(quoteOf(re));
  if (picture) line.before(pictureOf(picture, name));
  const mine = name === me && !projector;  // a wall is nobody's
  const row = withFace(name, make('div', mine ? 'message mine' : 'message', bubble));
  row.classList.toggle('mention', name !== me && !projector && bubble.querySelector('mark') !== null);
  row.dataset.name = name;
  if (host) row.dataset.host = '';
  return row;
}

function showMessage(frame, away) {
  const {seq, ts, name, deleted} = frame;
  if (seq <= lastDrawn) return;
  const time = make('time', '', clockFormat.format(ts));
  Object.assign(time, {dateTime: new Date(ts).toISOString(), title: fullFormat.format(ts)});
  const row = messageRow(frame, time);
  row.querySelector('.text').dataset.time = time.textContent;
  Object.assign(row.dataset, {seq, ts});
  if (deleted) deleteText(row);
  else addChoices(row, frame);
  const missed = !following && name !== me;
  const absent = name !== me && seq > readTo && (away || seq <= firstReplayEnd);
  if (missed && !unseen) removeNewLine();
  if ((missed || absent) && !projector) newLine ||= notice('new', words.new_line);
  addRow(row);
  lastDrawn = seq;
  shown.set(seq, row);
  settle(row);
  dropOldest();
  if (missed) unseen += 1;
}

function addRow(row) {
  if (!(log.lastElementChild?.childElementCount < PART_ROWS)) log.append(make('div', 'part'));
  log.lastElementChild.append(row);
}

function lastRow() {
  return log.lastElementChild?.lastElementChild;
}

function rowAbove(row) {
  return row.previousElementSibling || row.parentElement.previousElementSibling?.lastElementChild;
}

function settle(row) {  // what a message shows of its day and its author depends on the one above
  if (!row?.dataset.seq) return;
  const {name, ts} = row.dataset;
  let above = rowAbove(row);
  const next = above?.dataset.name === name && above.dataset.host === row.dataset.host;
  while (above && !above.dataset.ts) above = rowAbove(above);
  const sameDay = above && midnight(+above.dataset.ts) === midnight(+ts);
  const run = Boolean(sameDay && next && ts - above.dataset.ts < RUN_MS);
  row.classList.toggle('run', run);
  above?.classList.toggle('goes-on', run);
  if (sameDay) delete row.dataset.day;
  else row.dataset.day = dayText(+ts);
}

function dropOldest() {  // not from above a reader who has scrolled back, unless there is no end to it
  if (log.childElementCount <= (following ? MAX_PARTS : 3 * MAX_PARTS)) return;
  for (const row of log.firstElementChild.children) shown.delete(Number(row.dataset.seq));
  log.firstElementChild.remove();
  settle(log.firstElementChild.firstElementChild);
}

function notice(kind, text) {
  let row = lastRow();
  if (row?.dataset.kind !== kind) addRow(row = make('p', 'notice'));
  row.dataset.kind = kind;
  row.textContent = text;
  return row;
}

function removeNewLine() {
  newLine?.remove();
  newLine = null;
}

function showPresence(type, names) {  // lines are folded, and who is back at once was never away
  if (lastRow()?.dataset.kind !== 'presence') passing = {joined: new Set(), left: new Set()};
  const undone = passing[type === 'joined' ? 'left' : 'joined'];
  for (const name of names) if (name !== me && !undone.delete(name)) passing[type].add(name);
  const {joined, left} = passing;
  const came = joined.size ? fill(words.joined, {names: listed(joined)}) : '';
  const went = left.size ? fill(words.left, {names: listed(left)}) : '';
  notice('presence', came && went ? `${came} · ${went}` : came || went);
}

function forgetHistory() {  // what was read stays readable, greyed, but it is no longer the room's
  for (const row of log.querySelectorAll('.part > *')) {
    row.classList.add('past');
    delete row.dataset.seq;
  }
  shown.clear();
  lastDrawn = 0;
  notice('reset', words.reset);
}

function showRoster() {  // once for all that wait: a whole class may come in at once
  if (!toDraw.includes(drawRoster)) draw(drawRoster);
}

function drawRoster() {
  const others = [...members].filter((name) => name !== me).sort(collator.compare);
  const rows = [me, ...others].map(memberRow);
  const more = memberCount - rows.length;
  if (more > 0) rows.push(make('li', 'more', fill(words.more, {n: more})));
  const focused = memberList.contains(document.activeElement) ? document.activeElement.dataset.name : '';
  memberList.replaceChildren(...rows);
  if (focused) memberList.querySelector(`[data-name="${CSS.escape(focused)}"]`)?.focus();
  for (const element of document.querySelectorAll('.count')) setText(element, String(memberCount));
  showPerson();
}

function memberRow(name) {
  const row = withFace(name, make('li', '', make('bdi', '', name)));
  if (hosts.has(name)) row.append(make('span', 'badge', words.host));
  if (name === me) row.append(make('small', '', words.you));
  if (muted.has(name)) row.append(make('small', 'muted', mutedTill(name)));
  if (isHost && name !== me && !hosts.has(name)) row.append(manageButton(name));
  return row;
}

function manageButton(name) {
  const attributes = {className: 'plain', ariaLabel: fill(words.manage, {name}), ariaHasPopup: 'dialog'};
  const button = makeButton('⋯', () => openPerson(name), attributes);
  button.dataset.name = name;
  return button;
}

function openRoster(open) {
  if (open === roster.classList.contains('open')) return;
  roster.classList.toggle('open', open);
  people.ariaExpanded = open;
  (open ? memberList : people).focus();
}

function showNewer() {
  if (following) unseen = 0;
  newer.hidden = following;
  scroller.classList.toggle('following', following);
  setText(newer, unseen ? fill(words.new, {n: unseen}) : words.latest);
}

function toNewer() {  // first to the line above what is unseen, then past it
  if (!(newLine && topOf(newLine) > topOf(composer))) return toBottom();
  newLine.scrollIntoView();
  steer();
}

function toBottom() {
  following = true;
  scroller.scrollTop = scroller.scrollHeight;
  showNewer();
}

function below() {
  return scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight;
}

function steer() {
  steeredAt = now();
}

function onScroll() {  // rows that come and go make a browser scroll too: then one still follows
  const [steered, quiet] = [now() - steeredAt < STEER_MS, now() - drawnAt > STEER_MS];
  following = projector || below() < BOTTOM_PX || (following && !steered && !quiet);
  showNewer();
}

function failing() {
  return phase === 'waiting' || (phase === 'connecting' && failures > 0);
}

function stateName() {
  if (failing()) return !navigator.onLine ? 'offline' : restarting ? 'restarting' : 'waiting';
  return phase === 'connected' && storeAway ? 'away' : phase;
}

function stateSentence(state) {
  if (phase === 'closed') return closing;
  return state === 'connected' && polling ? words.state_polling : words[`state_${state}`];
}

function showState() {
  const state = document.body.dataset.state = stateName();
  const seconds = Math.ceil((retryAt - now()) / 1000);
  const wait = phase === 'waiting' && seconds > 0 ? fill(words.retry_in, {n: seconds}) : words.retry_now;
  setText(stateText, stateSentence(state));
  setText(stateWait, failing() ? wait : '');
  loginAgain.hidden = phase !== 'closed';
  showHold();
  drawOutbox();
}

function fitBox() {
  if (!CSS.supports('field-sizing', 'content')) {
    box.style.height = 'auto';
    box.style.height = `${box.scrollHeight + box.offsetHeight - box.clientHeight}px`;
  }
  const rest = maxText - [...box.value].length;
  setText(leftOver, rest < COUNT_FROM ? fill(rest < 0 ? words.too_many : words.left_over, {n: Math.abs(rest)}) : '');
  leftOver.classList.toggle('over', rest < 0);
  return rest;
}

function fitScreen() {  // some phones draw their keyboard over the page; a reader who zooms keeps the layout
  if (visualViewport.scale !== 1) return;
  document.body.style.setProperty('--height', `${visualViewport.height}px`);
  window.scrollTo(0, 0);
}

// === Memory: the session's belongs to this tab, the browser's to all of its tabs; both may be forbidden or full ===
const shelf = `tornchat:${location.pathname}:`;

const SHARED = 'localStorage';

function keep(key, value, storage = 'sessionStorage') {
  try {
    if (value) window[storage].setItem(shelf + key, JSON.stringify(value));
    else window[storage].removeItem(shelf + key);
  } catch { /* only a reload will tell */ }
}

function kept(key, storage = 'sessionStorage') {
  try { return JSON.parse(window[storage].getItem(shelf + key)); } catch { return null; }
}

function clearShelf() {
  for (const key of ['outbox', 'draft', 'said', 'reply', ...outbox.map(({cid}) => `picture-${cid}`)]) keep(key, null);
}

// === Attention: what is unread, and what may tell of it ===
let unread = 0;                   // since the page was last in front
let readTo = 0;                   // the newest seq that was in front of a reader, in whichever tab
let audio = null;

function showUnread(count) {
  unread = count;
  document.title = count ? `(${count}) ${title.textContent}` : title.textContent;
  const wanted = count ? icon.dataset.unread : iconUrl;
  if (icon.getAttribute('href') !== wanted) icon.setAttribute('href', wanted);
}

function markRead() {
  if (after === null) return;
  readTo = Math.max(readTo, after);
  keep('read', {epoch, seq: readTo}, SHARED);
  if (unread) showUnread(0);
}

function readElsewhere() {  // another tab has shown it, or had shown it before this one was opened
  const mark = kept('read', SHARED);
  if (mark?.epoch === epoch) readTo = mark.seq;
  if (readTo >= after) showUnread(0);
}

function attract({seq, name, text}, away) {
  if (away && seq > readTo) showUnread(unread + 1);
  if (seq <= Math.max(replayEnd, readTo)) return;  // it is old news, here or in another tab
  if (sound.checked && (away || mention.test(text))) chime();
  if (notify.checked && away) popUp(name, text || words.picture);
}

function chime() {
  audio ||= new AudioContext();
  audio.resume();
  for (const [tone, delay] of [[660, 0], [880, .12]]) {
    const [source, volume] = [audio.createOscillator(), audio.createGain()];
    const start = audio.currentTime + delay;
    source.frequency.value = tone;
    volume.gain.setValueAtTime(.12, start);
    volume.gain.exponentialRampToValueAtTime(.001, start + .3);
    source.connect(volume).connect(audio.destination);
    source.start(start);
    source.stop(start + .3);
  }
}

function popUp(name, body) {
  try {
    new Notification(name, {body, tag: shelf, icon: iconUrl}).onclick = () => window.focus();
  } catch { notify.checked = false; }  // a phone's browser wants a service worker for it
}

function restoreChoices() {
  const allowed = window.isSecureContext && 'Notification' in window;
  themeChoice.value = theme;
  sound.checked = kept('sound', SHARED);
  notify.parentElement.hidden = !allowed;
  notify.checked = allowed && Notification.permission === 'granted' && kept('notify', SHARED);
}

// === Joining others in: the addresses of the room, one of them large, with its code ===
const here = new URL('.', location.href).href;
const loopback = /^(localhost|127\..*|\[::1\])$/.test(location.hostname);

async function loadAddresses() {  // what leads here is the best, unless it leads only from this machine
  const answer = await fetch('join.json').then((response) => response.json()).catch(() => ({}));
  const others = (answer.addresses || []).filter((url) => url !== here);
  const urls = loopback && others.length ? others : [here, ...others];
  addresses.replaceChildren(...urls.map((url) => new Option(url, url, false, url === kept('address', SHARED))));
  addresses.hidden = urls.length === 1 || projector;
  code.hidden = !answer.qr;
  showAddress();
}

function showAddress() {
  const [, ...parts] = addresses.value.match(/^(\w+:\/\/)(.*?)(:\d+)?\/?$/);
  address.replaceChildren(...parts.flatMap((part) => [part || '', make('wbr', '')]));  // where it may be broken
  if (!code.hidden) code.src = `qr.svg?${new URLSearchParams({url: addresses.value})}`;
}

async function openInvite() {
  setText(copy, copyText);
  if (projector) invite.show();
  else invite.showModal();
  await loadAddresses();
}

async function copyAddress() {  // without a secure context there is only the old way: mark it, and copy what is marked
  getSelection().selectAllChildren(address);
  const copied = await navigator.clipboard?.writeText(addresses.value).then(() => true, () => false);
  setText(copy, copied || document.execCommand('copy') ? words.copied : words.copy_by_hand);
}

// === Writing: what the keys do in the box ===
let said = kept('said') || [];
let recalled = said.length;       // which of them stands in the box
let offer = null;                 // {start, names, turn}: a name that is being completed

function submit(event) {
  event.preventDefault();
  const text = box.value.trimEnd().replace(/^(\s*\n)+/, '');  // the first line keeps its indentation
  if (!(text || attached.length) || fitBox() < 0 || send.disabled || projector) return;
  setBox('');
  if (text) remember(text);
  removeNewLine();
  outbox.push({cid: newCid(), name: me, text, failed: '', ...reply});
  setReply(null);
  sendAttached();
  outboxChanged();
  toBottom();
}

function remember(text) {
  said = [...said.filter((other) => other !== text), text].slice(-SAID_KEPT);
  recalled = said.length;
  keep('said', said);
}

function recall(step) {  // only over an empty box or what was recalled, unchanged: nothing written is lost
  const [before, behind] = [box.value.slice(0, box.selectionStart), box.value.slice(box.selectionEnd)];
  if (box.value !== (said[recalled] || '') || (step < 0 ? before : behind).includes('\n')) return false;
  if (recalled + step < 0 || recalled + step > said.length) return false;
  recalled += step;
  setBox(said[recalled] || '');
  return true;
}

function focusBox() {  // a phone would open its keyboard
  if (matchMedia('(hover: hover)').matches) box.focus();
}

function setBox(text) {
  box.value = text;
  onDraft();
}

function onDraft() {
  keep('draft', box.value);
  fitBox();
  offerNames();
}

function offerNames() {
  const before = box.value.slice(0, box.selectionEnd);
  const start = before.lastIndexOf('@') + 1;
  const begun = folded(before.slice(start));
  const open = start > 0 && !/[\p{L}\p{N}]$/u.test(before.slice(0, start - 1)) && begun.length <= 24;
  const names = open ? [...members].filter((name) => name !== me && folded(name).startsWith(begun)) : [];
  showOffer(names.length ? {start, names: names.sort(collator.compare).slice(0, NAMES_OFFERED), turn: 0} : null);
}

function showOffer(next) {
  offer = next;
  matchList.replaceChildren(...(offer?.names || []).map(offerButton));
  matchList.hidden = !offer;
}

function offerButton(name) {  // Tab takes one without leaving the box
  return makeButton(make('bdi', '', name), () => complete(name), {className: 'plain', tabIndex: -1});
}

function complete(name) {
  const {start, names, turn} = offer;
  if (box.selectionEnd < start) return;
  box.setRangeText(`${name} `, start, box.selectionEnd, 'end');
  onDraft();
  showOffer(turn + 1 < names.length ? {start, names, turn: turn + 1} : null);  // then Tab leads out of the box again
  box.focus();
}

function onKey(event) {
  const {key, shiftKey, ctrlKey, altKey, metaKey} = event;
  const plain = !(shiftKey || ctrlKey || altKey || metaKey);
  const step = {ArrowUp: -1, ArrowDown: 1}[key];
  if (event.isComposing || event.keyCode === 229) return;  // 229: Safari ends a composition before its Enter
  if (key === 'Enter' && !shiftKey) return submit(event);
  if (key === 'Escape' && !offer) setReply(null);
  if (key === 'Escape') showOffer(null);
  if (key === 'Tab' && plain && offer) complete(offer.names[offer.turn]);
  else if (!(plain && step && recall(step))) return;
  event.preventDefault();
}

function onAnyKey({key, target, ctrlKey, altKey, metaKey}) {  // what is typed into the log is meant for the box
  if (key === 'Escape') openRoster(false);
  if (target !== box) steer();
  const typed = /^\S$/u.test(key) && ctrlKey === altKey && !metaKey;  // both are AltGr
  if (typed && [document.body, scroller].includes(target)) box.focus();
}

// === Outbox: what is said stays here until the server has confirmed it or its author takes it back ===
// A duplicated tab says the same cids, which the room stores once.
const outboxRows = new Map();     // cid -> row
let outbox = [];                  // {cid, name, text, failed}: failed is the reason in words
let inFlight = '';                // cid of the one said and not yet answered: one at a time keeps the order
let saidAt = 0;
let holdUntil = 0;

function restoreOutbox() {
  outbox = kept('outbox') || [];
  for (const item of outbox) {
    if (item.picture) item.failed = restorePicture(item) || item.failed;
    if (item.name !== me) item.failed = fill(words.other_name, {name: isolate(item.name)});
  }
}

function outboxChanged() {
  keep('outbox', outbox);
  drawOutbox();
  pump();
}

function nextUp() {
  return outbox.find(({failed}) => !failed);
}

function pump() {
  const item = nextUp();
  if (!item || inFlight || phase !== 'connected' || storeAway || pause() > 0) return;
  [inFlight, saidAt] = [item.cid, now()];
  if (item.picture && !item.picture.id) upload(item);
  else {
    const re = item.epoch === epoch ? item.re : undefined;  // the number is of another message in another history
    link.say({type: 'say', text: item.text, cid: item.cid, picture: item.picture?.id, re});
  }
}

function takeOut(cid) {
  const row = outboxRows.get(cid);
  if (inFlight === cid) inFlight = '';
  outbox = outbox.filter((item) => item.cid !== cid);
  outboxRows.delete(cid);
  keep(`picture-${cid}`, null);
  outboxChanged();
  return row;
}

function pause() {  // milliseconds until the next message may be said
  return Math.max(holdUntil - now(), slowUntil() - serverTime());
}

function refused({cid, code, text, retry_after: seconds}) {
  const item = outbox.find((entry) => entry.cid === cid);
  if (code === 'removed') return;  // the end of the link says it
  if (!item) {
    wishes.clear();
    showMode();  // or a switch would show what isn't so
    return draw(() => notice('refused', text));
  }
  inFlight = '';
  if (PASSING_REFUSALS.includes(code)) {
    const wait = seconds * 1000 || HOLD_MS;
    holdUntil = now() + wait;
    setTimeout(pump, wait + 20);
  } else item.failed = text;
  outboxChanged();
}

function tryAgain(item) {
  Object.assign(item, {name: me, failed: ''});
  if (item.picture?.blob) delete item.picture.id;  // it may have been another session's
  outboxChanged();
}

function edit(item) {
  setBox(box.value ? `${item.text}\n${box.value}` : item.text);
  box.focus();
  if (item.re && !reply) setReply({re: item.re, epoch: item.epoch});
  if (item.picture?.blob) attached.push(item.picture);
  showAttached();
  takeOut(item.cid).remove();
}

function statusOf(item) {
  if (item.failed) return fill(words.not_sent, {reason: item.failed});
  if (phase !== 'connected') return words.waiting;
  if (storeAway) return words.waiting_store;
  if (item !== nextUp()) return words.waiting_turn;
  const seconds = Math.ceil(pause() / 1000);
  if (seconds > 0) return fill(words.waiting_seconds, {n: seconds});
  return item.sent ? fill(words.uploading, {n: item.sent}) : words.sending;
}

function outboxRow(item) {
  const choices = [makeButton(words.try_again, () => tryAgain(item)), makeButton(words.edit, () => edit(item))];
  const row = messageRow({...item, name: me}, make('p', 'status'), make('p', 'choices', ...choices));
  outboxRows.set(item.cid, row);
  outboxList.append(row);
  return row;
}

function drawOutbox() {
  for (const item of outbox) {
    const row = outboxRows.get(item.cid) || outboxRow(item);
    const status = row.querySelector('.status');
    row.classList.toggle('failed', item.failed !== '');
    row.querySelector('.choices button').disabled = cannotWrite() !== null;
    status.role = item.failed ? 'alert' : 'none';
    setText(status, statusOf(item));
  }
}

// === Pictures: drawn anew before they are sent, which makes them small and leaves out where a photo was taken ===
const PICTURE_BYTES = 2 ** 20;    // what the server takes
const DRAWINGS = [[1600, .85], [1600, .6], [1000, .6], [600, .5]];  // the longer side and the quality, till it fits
const attached = [];              // {blob, width, height}: to be sent with what is in the box
let uploading = null;

function pictureOf(picture, name) {  // in the outbox it has a blob, in the log an id; its frame is as large before
  const {id, width, height, blob} = picture;
  const alt = fill(words.picture_of, {name});
  const image = Object.assign(make('img', ''), {alt, loading: 'lazy', onerror: () => missing(frame, image)});
  const frame = makeButton('', () => {
    if (!image.isConnected) return frame.replaceWith(pictureOf(picture, name));  // it failed
    Object.assign(large, {src: image.src, alt});
    viewer.showModal();
  });
  Object.assign(frame, {className: 'picture', disabled: Boolean(blob)});
  if (!blob) image.src = `pictures/${id}`;
  frame.append(blob ? canvasOf(blob, width, height, alt) : image);
  frame.style.setProperty('--wide', width);
  frame.style.setProperty('--high', height);
  return frame;
}

function canvasOf(source, width, height, label) {
  const canvas = Object.assign(make('canvas', ''), {width, height, role: 'img', ariaLabel: label});
  const show = (bitmap) => canvas.getContext('2d').drawImage(bitmap, 0, 0, width, height);
  createImageBitmap(source).then(show, () => {});
  return canvas;
}

async function missing(frame, image) {  // deleted, or is only the way to it cut?
  const gone = await fetch(image.src).then(({status}) => status === 404, () => false);
  frame.replaceChildren(gone ? words.picture_gone : words.picture_again);
  frame.classList.add('gone');
  frame.disabled = gone;
}

async function attach(files) {
  for (const file of projector ? [] : files) {
    const picture = pick.hidden ? null : await redraw(file).catch(() => null);
    if (picture) attached.push(picture);
    else draw(() => notice('refused', pick.hidden ? pick.dataset.off : fill(words.no_picture, {name: file.name})));
  }
  showAttached();
  focusBox();
}

async function redraw(file) {  // null where it can't be made to fit; throws where the browser sees no picture in it
  const bitmap = await createImageBitmap(file);
  for (const [side, quality] of DRAWINGS) {
    const scale = Math.min(1, side / Math.max(bitmap.width, bitmap.height));
    const [width, height] = [bitmap.width, bitmap.height].map((pixels) => Math.ceil(scale * pixels));
    const canvas = Object.assign(make('canvas', ''), {width, height});
    const context = Object.assign(canvas.getContext('2d'), {imageSmoothingQuality: 'high', fillStyle: '#fff'});
    for (const type of ['image/webp', 'image/jpeg']) {  // a browser that can't make the first one makes a PNG of it
      if (type === 'image/jpeg') context.fillRect(0, 0, width, height);
      context.drawImage(bitmap, 0, 0, width, height);
      const blob = await new Promise((done) => { canvas.toBlob(done, type, quality); });
      if (blob.type === type && blob.size <= PICTURE_BYTES) return {blob, width, height};
    }
  }
  return null;
}

function showAttached() {
  attachedList.replaceChildren(...attached.map((picture) => {
    const button = makeButton('', () => {
      attached.splice(attached.indexOf(picture), 1);
      showAttached();
      box.focus();
    });
    button.append(canvasOf(picture.blob, picture.width, picture.height, words.picture_remove));
    return button;
  }));
  attachedList.hidden = !attached.length;
}

function sendAttached() {  // the first one with the text, each of the others as a message of its own
  for (const [at, picture] of attached.splice(0).entries()) {
    if (at) outbox.push({cid: newCid(), name: me, text: '', failed: ''});
    outbox.at(-1).picture = picture;
    shelve(outbox.at(-1));
  }
  showAttached();
}

function shelve(item) {  // for a reload
  const reader = new FileReader();
  reader.onload = () => { if (outbox.includes(item)) keep(`picture-${item.cid}`, reader.result); };
  reader.readAsDataURL(item.picture.blob);
}

function restorePicture({cid, picture}) {
  const [, data] = (kept(`picture-${cid}`) || '').split(',');
  picture.blob = data && new Blob([Uint8Array.from(atob(data), (char) => char.charCodeAt(0))]);
  return picture.blob || picture.id ? '' : words.picture_lost;
}

function upload(item) {  // its answer leads to the message that shows it
  const request = new XMLHttpRequest();
  uploading?.abort();
  uploading = request;
  request.responseType = 'json';
  request.upload.onprogress = ({loaded, total}) => {
    [saidAt, item.sent] = [now(), Math.floor(100 * loaded / total)];
    drawOutbox();
  };
  request.onloadend = () => {
    if (uploading !== request || inFlight !== item.cid) return;
    const {status, statusText, response} = request;
    const passing = !status || status === 401 || status >= 500;
    [inFlight, item.sent] = ['', 0];
    const fault = {text: statusText, ...response, cid: item.cid, ...(passing && {code: 'unavailable'})};
    if (status !== 201) return refused(fault);
    item.picture.id = response.id;
    outboxChanged();
  };
  request.open('POST', 'pictures');
  request.send(item.picture.blob);
}

function onPaste(event) {  // cells of an office bring a picture of themselves along, but are meant as text
  const {files, types} = event.clipboardData;
  if (!files.length || (types.includes('text/plain') && types.includes('text/html'))) return;
  event.preventDefault();
  attach([...files]);
}

function onDrag(event) {  // a file that is let go would be opened in place of the room
  if (!event.dataTransfer.types.includes('Files')) return;
  event.preventDefault();
  if (event.type === 'drop') attach([...event.dataTransfer.files]);
}

function onChoice() {
  attach([...fileChoice.files]);
  fileChoice.value = '';
}

// === Hosts: what they have decided for the room, and how they do ===
let isHost = false;
let hosts = new Set();
let mode = {talk: 'everyone', every: 0, door: 'open'};
let mutedUntil = 0;               // one's own
let lastSaid = 0;                 // the ts of one's newest message: slow mode counts from there
let muted = new Map();            // name -> until, which hosts are told
let pinned = null;                // the message above the log
let clearedTo = 0;

function act(frame) {
  if (phase === 'connected') link.say(frame);
  else refused({text: stateSentence(stateName())});
}

function ask(text, verb, then) {  // once, before what can't be undone
  setText(asked, text);
  setText(yes, verb);
  yes.onclick = () => {
    question.close();
    then();
  };
  question.showModal();
}

function cannotWrite() {  // why one can't write: {text, until}
  if (isHost) return null;
  const time = clockFormat.format(mutedUntil);
  if (mutedUntil > serverTime()) return {text: fill(words.muted_you, {time}), until: mutedUntil};
  return mode.talk === 'hosts' ? {text: words.locked, until: 0} : null;
}

function slowUntil() {
  return isHost || !mode.every ? 0 : lastSaid + 1000 * mode.every;
}

function modeWords({talk, every: pause, door: entry}) {
  return {
    talk: talk === 'hosts' ? words.locked : words.unlocked,
    every: pause ? fill(words.slow, {n: pause}) : words.slow_over,
    door: entry === 'closed' ? words.door_closed : words.door_open,
  };
}

function inForce() {  // of the mode: what this reader is kept from, or has decided
  const {talk, every: pace, door: entry} = modeWords(mode);
  return [mode.talk === 'hosts' && talk, mode.every && pace, isHost && mode.door === 'closed' && entry].filter(Boolean);
}

function showHold() {  // above the box: why it can't be used, and until when
  const silent = cannotWrite();
  const seconds = Math.ceil(((silent ? silent.until : slowUntil()) - serverTime()) / 1000);
  const left = `${Math.floor(seconds / 60)}:${String(seconds % 60).padStart(2, '0')}`;
  setText(holdText, silent ? silent.text : inForce().join(' '));
  setText(holdWait, seconds > 0 ? fill(silent ? words.wait : words.next_in, {n: seconds, time: left}) : '');
  box.readOnly = silent !== null;
  send.disabled = pick.disabled = box.readOnly || phase === 'closed';
}

function showMode() {
  document.body.classList.toggle('host', isHost);
  manage.classList.toggle('on', inForce().length > 0);
  [lock.checked, door.checked] = [mode.talk === 'hosts', mode.door === 'closed'];
  if (!every.querySelector(`[value="${mode.every}"]`)) every.append(new Option(mode.every));
  every.value = mode.every;
  showHold();
}

function modeChanged(frame) {
  const told = modeWords(frame);
  const changed = Object.keys(told).filter((part) => frame[part] !== mode[part]);
  mode = frame;
  holdUntil = 0;
  if (changed.length) {
    const sentences = changed.map((part) => told[part]).join(' ');
    draw(() => notice(`mode ${changed}`, `${isolate(frame.by)}: ${sentences}`));
  }
  showMode();
  pump();
}

function mutedBy({name, until}) {
  if (name === me) mutedUntil = until;
  muted.set(name, until);
  const text = fill(until ? words.muted : words.unmuted, {name: isolate(name), time: clockFormat.format(until)});
  if (isHost) draw(() => notice('muted', text));
  endMutes();
  showRoster();
  showHold();
}

function endMutes() {
  for (const [name, until] of muted) if (until <= serverTime() && muted.delete(name)) showRoster();
}

function mutedTill(name) {
  return fill(words.muted_till, {time: clockFormat.format(muted.get(name))});
}

function openPerson(name) {
  setText(personName, name);
  showPerson();
  person.showModal();
}

function showPerson() {
  const name = personName.textContent;
  setText(personMuted, muted.has(name) ? mutedTill(name) : '');
  unmute.hidden = !muted.has(name);
}

function onMute({target: {value}}) {
  if (value) act({type: 'mute', name: personName.textContent, seconds: 60 * value});
}

function removePerson() {
  const name = personName.textContent;
  person.close();
  ask(fill(words.remove_question, {name: isolate(name)}), words.remove, () => {
    act({type: 'remove', name, seconds: REMOVE_SECONDS});
  });
}

function cleared({seq}) {
  clearedTo = seq;
  draw(() => clearLog(seq));
  showPinned(null);
}

function showPinned(message) {
  if (message?.seq === pinned?.seq) return;
  const before = scroller.offsetTop;
  pinned = message;
  pinBar.hidden = !pinned;
  unfoldPin(false);
  if (pinned) {
    const {name, text} = pinned;
    pinLine.replaceChildren(make('bdi', '', name), make('bdi', '', text || words.picture));
    pinText.replaceChildren(...richText(text));
  }
  if (!following) scroller.scrollTop += scroller.offsetTop - before;
}

function unfoldPin(open) {
  pinBar.classList.toggle('open', open);
  pinFold.ariaExpanded = open;
}

function toPinned() {  // where it isn't in the page any more, the whole of it is shown here
  const row = shown.get(pinned.seq);
  if (!row) return unfoldPin(true);
  showFound(row);
  row.tabIndex = -1;
  row.focus({preventScroll: true});
}

// === Notes: what is done to messages. The menu of one, its signs, and what it answers ===
const HOLD_TO_OPEN_MS = 450;      // a finger on a message
const SLIP_PX = 10;               // then it is no longer held, but moved
const SWIPE_PX = 64;              // to the side, to reply
const HOUR_MS = 3600000;
const HAND = '✋';                // hands go up one after the other: they are not sorted by their number
let mine = new Map();             // seq -> one's own sign
let wishes = new Map();           // the same, on its way
let signs = [];                   // that one can react with
let reply = null;                 // {re, epoch}: what the next message answers
let menuRow = null;
let tabStop = null;               // of the log's many menu buttons the one that Tab leads to
let touch = null;                 // the finger on a message
let sortedDue = false;
const back = makeButton(words.back, null, {className: 'plain back'});

function react(seq, sign) {
  const value = (wishes.get(seq) ?? mine.get(seq)) === sign ? '' : sign;
  wishes.set(seq, value);
  act({type: 'note', to: seq, kind: 'react', value});
}

function welcomeNotes(frame) {
  ({signs} = frame);
  mine = new Map(Object.entries(frame.mine).map(([seq, sign]) => [Number(seq), sign]));
  wishes.clear();
  offerSorting();
  draw(() => {
    clearLog(frame.cleared);
    for (const row of log.querySelectorAll('[data-signs]')) showSigns(row, JSON.parse(row.dataset.signs));
  });
}

function noted({to, kind, counts, hands, message}) {
  if (kind === 'pin') showPinned(message);
  if (kind === 'delete' && pinned?.seq === to) showPinned(null);
  if (kind === 'react' && wishes.has(to)) {
    mine.set(to, wishes.get(to));
    wishes.delete(to);
  }
  draw(() => {
    const row = shown.get(to);
    if (row && kind === 'delete') deleteText(row);
    if (row && kind === 'react') showSigns(row, {counts, hands});
  });
}

function addChoices(row, {counts, hands}) {
  if (!projector) {
    const aria = {ariaLabel: fill(words.choices, {name: isolate(row.dataset.name)}), ariaHasPopup: 'dialog'};
    const more = makeButton('', () => openMenu(row), {className: 'more', tabIndex: -1, ...aria});
    row.append(more);
    if (!row.nextSibling) stopAt(more);
  }
  if (counts) showSigns(row, {counts, hands});
}

function stopAt(button) {
  if (tabStop) tabStop.tabIndex = -1;
  tabStop = button || null;
  if (tabStop) tabStop.tabIndex = 0;
}

function onLogKey(event) {
  const step = {ArrowUp: -1, ArrowDown: 1}[event.key];
  if (!step || !event.target.matches('.more')) return;
  const all = [...log.querySelectorAll('.more')];
  all[all.indexOf(event.target) + step]?.focus();
  event.preventDefault();
}

function showSigns(row, {counts, hands}) {  // a sign that stays keeps its button, and with it the focus
  const [seq, bubble] = [Number(row.dataset.seq), row.querySelector('.bubble')];
  const list = bubble.querySelector('.signs') || make('div', 'signs');
  const buttons = Object.entries(counts).map(([sign, count]) => {
    const button = [...list.children].find(({value}) => value === sign)
      || makeButton('', () => react(seq, sign), {className: 'sign', value: sign, disabled: projector});
    button.ariaPressed = !projector && mine.get(seq) === sign;
    setText(button, `${sign} ${count}`);
    return button;
  });
  const focused = list.contains(document.activeElement) && document.activeElement;
  row.dataset.signs = JSON.stringify({counts, hands});
  list.ariaLive = 'off';  // thirty hands are not thirty announcements
  list.replaceChildren(...buttons);
  if (buttons.length) bubble.append(list);
  else list.remove();
  if (focused) (focused.isConnected ? focused : row.querySelector('.more')).focus();
  sortSoon();
}

function deleteText(row) {  // its place stays, and says so; nothing of it is left in the page
  if (menuRow === row) menu.close();
  if (row.contains(document.activeElement)) scroller.focus();
  for (const part of row.querySelectorAll('.picture, .quote, .fold, .signs, .more')) part.remove();
  const text = row.querySelector('.text');
  text.className = 'text';
  text.replaceChildren(words.deleted);
  row.classList.remove('mention');
  row.classList.add('deleted');
  delete row.dataset.signs;
  if (!tabStop?.isConnected) stopAt([...log.querySelectorAll('.more')].at(-1));
  fillQuotes(`[data-re="${row.dataset.seq}"]`);
  sortSoon();
}

function clearLog(upTo) {
  if (![...shown.keys()].some((seq) => seq <= upTo)) return;
  const rest = [...log.querySelectorAll('[data-seq]')].filter(({dataset: {seq}}) => seq > upTo);
  if (menuRow && !rest.includes(menuRow)) menu.close();
  for (const seq of [...shown.keys()].filter((number) => number <= upTo)) shown.delete(seq);
  log.replaceChildren();
  [newLine, unseen] = [null, 0];
  notice('cleared', words.cleared);
  rest.forEach(addRow);
  settle(rest[0]);
  showUnread(0);
  fillQuotes('');
  sortSoon();
}

// A message's menu: beside its button, or at the foot of a phone's screen
function openMenu(row) {
  const seq = Number(row.dataset.seq);
  if (!seq || !row.querySelector('.more')) return;  // of a history that is lost, or deleted
  const choose = (text, todo, attributes) => makeButton(text, () => {
    menu.close();
    todo();
  }, attributes);
  const note = (kind, value) => act({type: 'note', to: seq, kind, value});
  const pin = seq === pinned?.seq;
  const choices = [choose(words.reply, () => replyTo(seq)), makeButton(words.copy, () => copyMessage(row))];
  if (isHost) choices.push(choose(pin ? words.unpin : words.pin, () => note('pin', !pin)));
  if (isHost || row.dataset.name === me) {
    const sure = () => ask(words.delete_ask, words.delete, () => note('delete', true));
    choices.push(choose(words.delete, sure, {className: 'bad'}));
  }
  const offered = signs.map((sign) => choose(sign, () => react(seq, sign), {ariaPressed: mine.get(seq) === sign}));
  menuRow = row;
  menu.ariaLabel = row.querySelector('.more').ariaLabel;
  menu.replaceChildren(make('p', 'offered', ...offered), ...choices);
  menu.showModal();
  placeMenu(row.querySelector('.more').getBoundingClientRect());
}

function placeMenu({left, top, bottom}) {
  const [width, height] = [menu.offsetWidth, menu.offsetHeight];
  const below = bottom + height < innerHeight;
  menu.style.setProperty('--x', `${Math.max(8, Math.min(left, innerWidth - width - 8))}px`);
  menu.style.setProperty('--y', `${below ? bottom : Math.max(8, top - height)}px`);
}

function copyMessage(row) {  // a page by plain http has no other way to the clipboard
  const area = Object.assign(make('textarea', 'copied'), {value: row.querySelector('.text').innerText, readOnly: true});
  menu.append(area);
  area.select();
  document.execCommand('copy');
  menu.close();
}

// Replies: quoted in one line, which leads to the message, and back
function firstLine(row) {
  return row.querySelector('.text').textContent.trim().split('\n', 1)[0] || words.picture;
}

function quoteOf(re) {
  const quote = makeButton('', () => leadTo(quote), {className: 'quote'});
  quote.dataset.re = re;
  return fillQuote(quote);
}

function fillQuote(quote) {
  const row = shown.get(Number(quote.dataset.re));
  if (row) quote.style.setProperty('--hue', hueOf(row.dataset.name));
  const [to, text] = row ? words.answer.split('{name}') : [words.answer_gone];
  quote.replaceChildren(to, ...(row ? [make('bdi', '', row.dataset.name), `${text} `, firstLine(row)] : []));
  quote.disabled = !row;
  return quote;
}

function fillQuotes(which) {
  for (const quote of document.querySelectorAll(`.quote${which}`)) fillQuote(quote);
}

function leadTo(quote) {
  const [target, from] = [shown.get(Number(quote.dataset.re)), quote.closest('#log .message')];
  if (!target) return fillQuote(quote);
  showFound(target);
  if (!from) return;
  target.querySelector('.bubble').append(back);
  back.onclick = () => {
    forgetFound();
    showInLog(from);
    quote.focus({preventScroll: true});
  };
  back.focus({preventScroll: true});
}

function showFound(row) {
  forgetFound();
  row.classList.add('found');
  showInLog(row);
}

function showInLog(row) {
  row.scrollIntoView({block: 'center'});
  steer();
  onScroll();
}

function forgetFound() {
  back.remove();
  log.querySelector('.found')?.classList.remove('found');
}

function replyTo(re) {
  setReply({re, epoch});
  box.focus();
}

function setReply(next) {
  reply = next;
  keep('reply', reply);
  replyLine.hidden = !reply;
  const cancel = makeButton('×', () => {
    setReply(null);
    box.focus();
  }, {className: 'plain', ariaLabel: words.no_answer});
  replyLine.replaceChildren(...(reply ? [quoteOf(reply.re), cancel] : []));
}

function onTouchStart({touches, target}) {
  endTouch();
  const row = target.closest('.message');
  if (touches.length > 1 || !row || target.closest('a')) return;
  const [{clientX: x, clientY: y}] = touches;
  touch = {row, x, y, swiped: 0, held: false, timer: setTimeout(() => {
    touch.held = true;
    openMenu(row);
  }, HOLD_TO_OPEN_MS)};
}

function onTouchMove({touches: [{clientX, clientY}]}) {
  if (!touch) return;
  const [dx, dy] = [clientX - touch.x, Math.abs(clientY - touch.y)];
  if (Math.hypot(dx, dy) > SLIP_PX) clearTimeout(touch.timer);
  if (touch.held || dy > SWIPE_PX / 2) return;
  touch.swiped = Math.max(0, Math.min(dx, SWIPE_PX));
  touch.row.style.translate = `${touch.swiped}px`;
}

function onTouchEnd(event) {
  if (touch?.held) event.preventDefault();  // or the finger that opened the menu would choose in it
  if (touch?.swiped === SWIPE_PX && touch.row.querySelector('.more')) replyTo(Number(touch.row.dataset.seq));
  endTouch();
}

function endTouch() {
  clearTimeout(touch?.timer);
  touch?.row.style.removeProperty('translate');
  touch = null;
}

// Questions as polls: the last hour's messages with a sign, in place of the log
function offerSorting() {
  const texts = signs.map((sign) => fill(sign === HAND ? words.hands : words.most, {sign}));
  if (sort.length === 1) sort.append(...signs.map((sign, at) => new Option(texts[at], sign)));
  sorting.hidden = !(isHost || projector);
}

function sortSoon() {
  if (sort.value && !sortedDue) requestAnimationFrame(drawSorted);
  sortedDue = sort.value !== '';
}

function drawSorted() {
  sortedDue = false;
  const [sign, since] = [sort.value, serverTime() - HOUR_MS];
  const countOf = ({dataset: {ts, signs: stored}}) => ts > since ? JSON.parse(stored).counts[sign] || 0 : 0;
  const rows = [...log.querySelectorAll('[data-signs]')].filter(countOf);
  if (sign !== HAND) rows.sort((one, other) => countOf(other) - countOf(one));
  sorted.replaceChildren(...rows.map(copyOf));
  sorted.hidden = sign === '';
  scroller.inert = sign !== '';
  setText(sortSign, sign);
}

function copyOf(row) {  // to be read
  const copy = row.cloneNode(true);
  copy.classList.remove('run', 'goes-on', 'mine', 'found');
  delete copy.dataset.day;
  for (const part of copy.querySelectorAll('.more, .fold, .back')) part.remove();
  for (const button of copy.querySelectorAll('button')) button.disabled = true;
  if (sort.value === HAND) copy.querySelector('.signs').after(make('p', 'hint', handsOf(row)));
  return copy;
}

function handsOf(row) {  // who raises one, in the order they came
  const {counts, hands = []} = JSON.parse(row.dataset.signs);
  const rest = counts[HAND] - hands.length;
  return hands.map(isolate).join(', ') + (rest ? ` ${fill(words.more, {n: rest})}` : '');
}

// === Frames: everything that the server says comes through here ===
let me = '';
let mention = null;               // @me, where the name does not go on
let markup = null;                // what in a text is more than text
let epoch = '';
let after = null;                 // the newest seq that came, null before the first
let at = 0;                       // its ts, where it is known
let lastDrawn = 0;                // the newest that is in the log
let replayEnd = 0;                // up to this seq it is history and is not read out
let firstReplayEnd = 0;           // and up to this one it was there before the page
let maxText = Infinity;           // until the welcome tells it
let storeAway = false;
let serverStart = Number(document.body.dataset.now) - now();  // its time at 0 of ours

function setName(name) {
  me = name;
  mention = RegExp(`@${name.replace(/[\\^$.*+?()[\]{}|/]/g, '\\$&')}(?![\\p{L}\\p{N}\\p{M}])`, 'iu');
  markup = RegExp(`${MARKUP}|${mention.source}`, 'giu');
}

function serverTime() {
  return serverStart + now();
}

function setClock({ts}) {
  if (ts) serverStart = ts - now();
}

const receivers = {
  welcome: welcomed, message: arrived, stored, note: noted, joined: passed, left: passed, refused, hosts: hostsChanged,
  mode: modeChanged, muted: mutedBy, cleared, store: storeChanged, time: setClock,
};

function receive(frame) {  // of a kind that a newer server has, nothing is known
  receivers[frame.type]?.(frame);
}

function welcomed(frame) {
  continueHistory(frame);
  setName(frame.name);
  ({count: memberCount, limits: {text: maxText}} = frame);
  [phase, failures, misses, restarting, loggedIn] = ['connected', 0, 0, false, false];
  members = new Set(frame.members);
  setText(title, frame.title);
  showUnread(unread);
  welcomedBy(frame);
  welcomeNotes(frame);
  storeChanged({available: true});
  probeLater();
  if (projector) loadAddresses();
}

function welcomedBy(frame) {  // what hosts have made of the room by now
  ({host: isHost, mode, muted_until: mutedUntil} = frame);
  muted = new Map(Object.entries(frame.muted || {}));
  clearedTo = frame.cleared;
  hostsChanged({names: frame.hosts});
  showPinned(frame.pinned);
  showMode();
}

function hostsChanged({names}) {
  hosts = new Set(names);
  showRoster();
}

function continueHistory({epoch: room, seq, reset, missed, limits}) {  // where it goes on, and what will be missing
  if (reset || (epoch && epoch !== room)) {
    [after, at, readTo, firstReplayEnd] = [null, 0, 0, -1];
    setReply(null);
    draw(forgetHistory);
  }
  if (missed) draw(() => notice('missed', fill(words.missed, {n: missed})));
  if (!seq || !limits.history) after ??= seq;  // there is no message that would tell it
  [epoch, replayEnd] = [room, seq];
  log.ariaLive = replayEnd > after ? 'off' : 'polite';
  if (firstReplayEnd) return;
  [firstReplayEnd, readTo] = [seq || -1, seq];
  readElsewhere();
}

function arrived(frame) {
  const [fresh, away] = [frame.seq > after, document.hidden];
  if (fresh) [after, at] = [frame.seq, frame.ts];
  if (frame.name === me) lastSaid = Math.max(lastSaid, frame.ts);
  const pending = frame.name === me && outboxRows.has(frame.cid) ? takeOut(frame.cid) : null;
  draw(() => {
    pending?.remove();
    showMessage(frame, away);
  });
  if (fresh && !frame.deleted && frame.name !== me && frame.seq > firstReplayEnd) attract(frame, away);
  if (frame.seq !== replayEnd) return;
  draw(() => {
    fillQuotes('');
    setTimeout(() => { log.ariaLive = 'polite'; }, 500);
  });
}

function stored(frame) {  // the answer to a post: the message comes in its turn by a poll, unless it came before
  if (frame.seq <= after) arrived(frame);
}

function passed({type, names, count}) {
  for (const name of names) {
    members[type === 'joined' ? 'add' : 'delete'](name);
    if (type === 'left') hosts.delete(name);
  }
  memberCount = count;
  draw(() => showPresence(type, names));
  showRoster();
}

function storeChanged({available}) {
  [storeAway, holdUntil] = [!available, 0];
  showState();
  pump();
}

// === Ways to the server: each lets us hear events, and tells once how it ended ===
function resumePoint() {  // another message of that number means another history
  return new URLSearchParams(after === null ? {} : {after, epoch, ...(at && {at})});
}

function openSocket(hear, ended) {
  const url = new URL('chat', location.href);
  url.protocol = url.protocol.replace('http', 'ws');
  url.search = resumePoint();
  const socket = new WebSocket(url);
  socket.onmessage = ({data}) => hear([JSON.parse(data)]);
  socket.onclose = ended;
  return {
    say: (frame) => socket.send(JSON.stringify(frame)),
    close() {
      socket.onmessage = socket.onclose = null;
      socket.close();
    },
  };
}

function openPolls(hear, ended) {
  const hangUp = new AbortController();
  const {signal} = hangUp;

  async function ask(path, options) {
    const answer = await fetch(path, {...options, signal});
    heard = now();  // the rest may take its time
    const body = await answer.json();
    setClock({ts: Date.parse(answer.headers.get('Date'))});
    if (answer.ok || (options && body.type === 'refused' && answer.status !== 401)) return body;
    const code = body.code === 'too-fast' ? 1013 : CLOSE_CODES[answer.status] || 1006;
    throw {code, reason: answer.status === 401 ? body.code : body.text};
  }

  function failed({code, reason}) {  // without a code it is the network, or an answer that is not the room's
    if (signal.aborted) return;
    hangUp.abort();
    ended(code > 1000 ? {code, reason} : {code: 1006});
  }

  async function poll() {  // the first one asks for the welcome, and does not wait
    for (let wait = 0, last = ''; !signal.aborted; wait = POLL_SECONDS) {
      const query = resumePoint();
      query.set('wait', wait);
      query.set('last', last);
      const answer = await ask(`messages?${query}`);
      last = answer.last;
      if (!signal.aborted) hear(answer.events);
    }
  }

  async function post(frame) {
    const headers = {'Content-Type': 'application/json'};
    const path = frame.type === 'say' ? 'messages' : 'acts';
    const event = await ask(path, {method: 'POST', headers, body: JSON.stringify(frame)});
    if (event.type === 'message') event.type = 'stored';
    if (!signal.aborted && ['stored', 'refused'].includes(event.type)) hear([event]);  // an act is told by a poll
  }

  poll().catch(failed);
  return {say: (frame) => post(frame).catch(failed), close: () => hangUp.abort()};
}

// === Connection: one way at a time, replaced when it is lost, silent or doubtful ===
let link = null;
let polling = pollingOnly;
let phase = 'connecting';         // connected: the welcome is here; waiting: for retryAt; closed: for good
let heard = 0;
let failures = 0;
let misses = 0;                   // sockets in a row that never got through
let retryAt = 0;
let retryTimer = 0;
let probeTimer = 0;
let probePause = PROBE_MS[0];
let wallStart = Date.now() - now();  // a sleep makes it grow, where only the first goes on
let restarting = false;
let loggedIn = false;             // by itself, since the last welcome
let closing = '';                 // why it is closed for good, in words

function connect() {
  clearTimeout(retryTimer);
  clearTimeout(probeTimer);
  link?.close();
  [phase, heard, inFlight] = ['connecting', now(), ''];
  link = (polling ? openPolls : openSocket)(hear, disconnected);
  showState();
}

function hear(events) {
  heard = now();
  events.forEach(receive);
}

function disconnected({code, reason}) {
  if (phase === 'connecting' && code === 1006) countMiss();
  phase = 'waiting';
  if (code === 4401) return reason === 'logout' ? location.assign(loginUrl('logout')) : logInAgain();
  if (FINAL_CODES.includes(code)) return stayAway(code, reason);
  if (code === 1009) refused({cid: inFlight, code: 'too-long', text: words.too_long});
  restarting ||= code === 1001;
  const [first, longest] = RETRY_MS;
  const [low, high] = code === 1001 ? RESTART_MS : [first, Math.min(longest, first * 2 ** (failures + 1))];
  retryIn(between(low, Math.max(high, low + memberCount * SPREAD_MS)));
}

function countMiss() {  // after two sockets a poll, and after a poll that fails too, sockets again
  misses += 1;
  if (pollingOnly || (!polling && misses < SOCKETS_TRIED)) return;
  [polling, misses, probePause] = [!polling, 0, PROBE_MS[0]];
}

function probeLater() {
  clearTimeout(probeTimer);
  if (!polling || pollingOnly) return;
  probeTimer = setTimeout(probe, probePause);
  probePause = Math.min(2 * probePause, PROBE_MS[1]);
}

function probe() {  // beside the polls, which go on until a socket has proven itself by an event
  const socket = openSocket(() => {
    socket.close();
    if (!polling) return;
    polling = false;
    connect();
  }, probeLater);
}

function retryIn(milliseconds) {
  phase = 'waiting';
  failures += 1;
  retryAt = now() + milliseconds;
  retryTimer = setTimeout(connect, milliseconds);
  showState();
}

function stayAway(code, reason) {
  [phase, closing] = ['closed', (code === 4403 && reason) || fill(words[`closed_${code}`], {name: me})];
  if (code === 4504) Object.assign(loginAgain, {href: '', textContent: words.try_again});
  else loginAgain.href = loginUrl('');
  showState();
}

function loginUrl(why) {  // the login page says why one finds oneself there
  return `login?${new URLSearchParams({nickname: me, why, ...(projector && {view: 'projector'})})}`;
}

async function logInAgain() {  // the server no longer knows this session: it was restarted without a lasting store
  if (loggedIn) return location.assign(loginUrl('cookie'));  // once already, in vain: it does not hold
  [phase, heard] = ['connecting', now()];
  showState();
  const body = new URLSearchParams({nickname: me});
  const answer = await fetch('login', {method: 'POST', headers: {Accept: 'application/json'}, body}).catch(() => null);
  const refusal = answer?.status === 403 ? await answer.json() : {};
  if (['door', 'removed'].includes(refusal.code)) return stayAway(4403, refusal.text);
  const why = {400: 'invalid', 403: 'password', 409: 'taken'}[answer?.status];
  if (why) return location.assign(loginUrl(why));
  if (phase === 'connected') return;  // another try was quicker
  loggedIn = Boolean(answer?.ok);
  if (loggedIn) connect();
  else retryIn(between(...RETRY_MS));
}

function wake(patience) {  // a sleep, a drop of the network or the bfcache may have ended the link without a word
  if (phase !== 'closed' && (phase !== 'connected' || now() - heard > patience)) connect();
}

function tick() {
  const wall = Date.now() - now();
  const silent = wall - wallStart > STALE_MS || now() - heard > SILENCE_MS || (inFlight && now() - saidAt > ANSWER_MS);
  const stuck = phase === 'connecting' && now() - heard > ANSWER_MS;
  wallStart = wall;
  for (const row of log.querySelectorAll('[data-day]')) row.dataset.day = dayText(+row.dataset.ts);  // midnight passes
  endMutes();
  pump();
  if (!stuck && !(phase === 'connected' && silent)) return showState();
  if (stuck) countMiss();
  failures += 1;
  connect();
}

// === Start ===
const iconUrl = icon.getAttribute('href');
const copyText = copy.textContent;

composer.onsubmit = submit;
box.oninput = onDraft;
box.onkeydown = onKey;
lineBreak.onclick = () => {
  box.setRangeText('\n', box.selectionStart, box.selectionEnd, 'end');
  onDraft();
  box.focus();
};
for (const button of [send, lineBreak, pick, matchList]) {  // a phone would close its keyboard
  button.onmousedown = (event) => event.preventDefault();
}
newer.onclick = toNewer;
scroller.onscroll = onScroll;
for (const type of ['wheel', 'touchmove', 'pointerdown']) scroller.addEventListener(type, steer, {passive: true});
scroller.onclick = () => openRoster(false);
people.onclick = () => openRoster(!roster.classList.contains('open'));
logout.onsubmit = () => {
  clearShelf();
  link.close();  // or its end would be taken for a logout in another tab
};
themeChoice.onchange = () => chooseTheme(themeChoice.value);
sound.onchange = () => {
  keep('sound', sound.checked, SHARED);
  if (sound.checked) chime();
};
notify.onchange = async () => {
  if (notify.checked) notify.checked = await Notification.requestPermission() === 'granted';
  keep('notify', notify.checked, SHARED);
};
join.onclick = openInvite;
addresses.onchange = () => {
  keep('address', addresses.value, SHARED);
  showAddress();
};
copy.onclick = copyAddress;
code.onerror = () => { code.hidden = true; };
for (const dialog of document.querySelectorAll('dialog')) {  // by its button, or by a click beside it
  dialog.onclick = ({target}) => { if (target.matches('dialog, .close')) dialog.close(); };
}
manage.onclick = () => room.showModal();
lock.onchange = () => act({type: 'mode', talk: lock.checked ? 'hosts' : 'everyone'});
every.onchange = () => act({type: 'mode', every: Number(every.value)});
door.onchange = () => act({type: 'mode', door: door.checked ? 'closed' : 'open'});
clear.onclick = () => ask(words.clear_question, words.clear, () => act({type: 'clear'}));
mute.onclick = onMute;
remove.onclick = removePerson;
pinLine.onclick = toPinned;
pinFold.onclick = () => unfoldPin(!pinBar.classList.contains('open'));
unpin.onclick = () => act({type: 'note', to: pinned.seq, kind: 'pin', value: false});
pick.onclick = () => fileChoice.click();
fileChoice.onchange = onChoice;
menu.onclose = () => { menuRow = null; };
log.addEventListener('focusin', ({target}) => { if (target.matches('.more')) stopAt(target); });
log.onkeydown = onLogKey;
log.addEventListener('touchstart', onTouchStart, {passive: true});
log.addEventListener('touchmove', onTouchMove, {passive: true});
log.ontouchend = onTouchEnd;
log.ontouchcancel = endTouch;
log.oncontextmenu = (event) => { if (touch) event.preventDefault(); };  // a finger's: ours comes instead
sort.onchange = drawSorted;
viewer.onclick = () => viewer.close();
document.onpaste = onPaste;
window.ondragover = window.ondrop = onDrag;
window.onkeydown = onAnyKey;
window.ononline = () => wake(0);
window.onoffline = showState;
window.onpageshow = ({persisted}) => { if (persisted) wake(0); };
window.addEventListener('storage', ({key}) => {  // another tab of this browser
  if (key === `${shelf}read`) readElsewhere();
  if (key === `${shelf}address`) loadAddresses();
  restoreChoices();
});
document.onvisibilitychange = () => {
  nextSlice();  // out of sight a timer may have to wait for a minute
  if (!document.hidden) wake(STALE_MS);
  else if (!unseen) removeNewLine();  // what comes from now on is new
};
let network = navigator.connection?.type;
navigator.connection?.addEventListener('change', () => {  // there is not always a moment without any
  if (navigator.connection.type !== network) wake(0);
  network = navigator.connection.type;
});
visualViewport.onresize = fitScreen;
const sizes = new ResizeObserver(() => { if (following) toBottom(); });
for (const element of [scroller, content]) sizes.observe(element);

document.body.classList.add('live');
setName(document.body.dataset.name);
restoreChoices();
setBox(kept('draft') || '');
setReply(kept('reply'));
restoreOutbox();
connect();
setInterval(tick, 1000);
if (projector) openInvite();
else focusBox();
"""

# language=svg
ICON_SVG = r"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 64 64">
  <rect width="64" height="64" rx="16" fill="#0f6b5c"/>
  <path d="M14 19a6 6 0 0 1 6-6h20a6 6 0 0 1 6 6v12a6 6 0 0 1-6 6H28l-9 8v-8a6 6 0 0 1-5-6z" fill="#fff"/>
  <path d="M50 25a6 6 0 0 1 3 5v11a6 6 0 0 1-4 5.7V53l-7-6H31a6 6 0 0 1-4-2l2-3h12a9 9 0 0 0 9-9z" fill="#7fd6c1"/>
  <g fill="#0f6b5c"><circle cx="23" cy="25" r="2.5"/><circle cx="30" cy="25" r="2.5"/>
    <circle cx="37" cy="25" r="2.5"/></g>
</svg>
"""

# On the icon while there is something unread.
UNREAD_DOT = '<circle cx="50" cy="14" r="13" fill="#e5484d" stroke="#fff" stroke-width="3"/>'


def without_comments(source: str) -> str:
    """Style or script as browsers get it: what explains it is for those who read this file."""
    return re.sub(r"(?m)(^| +)// .*$|^ +|\s*/\*[^*]*\*/|(?<=\n)\n", "", source)


TEMPLATES = {"page.html": PAGE_HTML, "login.html": LOGIN_HTML, "error.html": ERROR_HTML, "chat.html": CHAT_HTML}
ASSETS = {
    "style.css": ("text/css; charset=utf-8", without_comments(STYLE_CSS)),
    "chat.js": ("text/javascript; charset=utf-8", without_comments(CHAT_JS)),
    "theme.js": ("text/javascript; charset=utf-8", without_comments(THEME_JS)),
    "icon.svg": ("image/svg+xml", ICON_SVG),
    "icon-unread.svg": ("image/svg+xml", ICON_SVG.replace("</svg>", UNREAD_DOT + "</svg>")),
}


if __name__ == "__main__":
    main()
