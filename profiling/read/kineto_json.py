"""Decodes Chrome traces one event at a time, so that neither the text nor a million dicts exist at once.

A file of 1,500,000 events is some 600 MB of text. Profilers have written control characters, bytes that are no UTF-8,
single backslashes and `nan`. Such damage costs only the event that it stands in, as each is decoded by itself.
"""

from __future__ import annotations

import codecs
import collections
import json
import re
from collections.abc import Callable
from typing import Any, BinaryIO

CHUNK = 1 << 22
_KEYS = r'"(?:ph|cat|name|pid|tid|ts|dur|args|id|bp|s)"\s*:'
_SKIP = re.compile(r"[\s,]*")
_SPACE = re.compile(r"\s*")
_BETWEEN = re.compile(r"\}\s*,?\s*(?=\{\s*" + _KEYS + ")")
_EVENT = re.compile(r"\{\s*" + _KEYS)
_NAME = re.compile(r'"(?:[^"\\]|\\.)*"\s*:')
_CLOSE = re.compile(r'\]\s*(?:,\s*"|\}|$)')
_NEXT_KEY = re.compile(r',\s*"[A-Za-z_][\w ]*"\s*:')
_EVENTS_BEGIN = re.compile(r'"traceEvents"\s*:\s*\[|\[\s*(?=\{\s*"(?:ph|cat|ts|pid)"\s*:)')
_BACKSLASH = re.compile(r'\\(?:(["\\/bfnrt]|u[0-9a-fA-F]{4})|)')
_LAST_BACKSLASH = re.compile(r'\\"(?=\s*[,}\]])')
_VALUES = re.compile(
    r'("(?:[^"\\]|\\.)*")|(-?\b(?:nan|inf(?:inity)?)\b(?:\([^)]*\))?)|,(?=\s*[}\]])|(:)(?=\s*[,}])',
    re.IGNORECASE | re.DOTALL,
)
_CONTROL = bytes(set(range(32)) - set(b"\t\n\r"))

_decode = json.JSONDecoder(strict=False).raw_decode


class CutShort(ValueError):
    """The text ends before the trace does."""


class NoJson(ValueError):
    """The text does not begin as JSON does."""


class TraceScan:
    """Reads a Chrome trace to its end and gives each event to `take`.

    Attributes:
      header: entries beside the events; None if the text is a bare list of events.
      has_events: whether there is a list of events.
      damage: what was repaired or left out, and how often.

    Raises:
      CutShort: the text ends in the middle.
      NoJson: the text does not begin with a brace or a bracket.

    >>> import io
    >>> found = []
    >>> text = b'{"a": 1, "traceEvents": [{"ph": "X", "name": "torch\\\\cuda"}, {"ph": 3 4}, ]}'
    >>> scan = TraceScan(io.BytesIO(text), found.append)
    >>> found, scan.header
    ([{'ph': 'X', 'name': 'torch\\\\cuda'}], {'a': 1})
    >>> scan.damage["events whose text is no JSON, left out"], len(scan.damage)
    (1, 2)
    """

    def __init__(self, stream: BinaryIO, take: Callable[[dict[str, Any]], None]) -> None:
        self.header: dict[str, Any] | None = None
        self.has_events = False
        self.damage: collections.Counter[str] = collections.Counter()
        self._stream = stream
        self._take = take
        self._text = ""
        self._at = 0
        self._decoder = None
        self._is_utf8 = True
        first = self._peek()
        if first == "[":
            self._at += 1
            self._events()
        elif first == "{":
            self._at += 1
            self._object({})
            if not self.has_events and self._seek(_EVENTS_BEGIN):
                self.damage["braces too many before the events"] += 1
                self._events()
                self._object(self.header or {})
        else:
            raise NoJson("no JSON" if first else "nothing in it")
        self._trailer()

    def _more(self) -> bool:
        """Reads on and forgets what was decoded; False at the end. Each read is at least as long as what is left."""
        raw = self._stream.read(max(CHUNK, len(self._text) - self._at))
        if self._decoder is None:
            self._is_utf8 = not (raw[:2] in (b"\xff\xfe", b"\xfe\xff") or raw[1:2] == b"\x00")
            wide = "utf-16-le" if raw[1:2] == b"\x00" else "utf-16"
            self._decoder = codecs.getincrementaldecoder("utf-8-sig" if self._is_utf8 else wide)(errors="replace")
        text = self._decoder.decode(raw, final=not raw)
        if self._is_utf8:
            if "\ufffd" in text:
                bad = text.count("\ufffd") - raw.count(b"\xef\xbf\xbd")
                self.damage["bytes that are no UTF-8, replaced"] += max(bad, 0)
            controls = len(raw) - len(raw.translate(None, _CONTROL))
            if controls:
                self.damage["control characters in the text"] += controls
        self._text = self._text[self._at :] + text
        self._at = 0
        return bool(raw)

    def _peek(self, skipped: re.Pattern[str] = _SPACE) -> str:
        """The next character; "" at the end."""
        while True:
            match = skipped.match(self._text, self._at)
            assert match is not None
            self._at = match.end()
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._more():
                return ""

    def _value(self) -> Any:
        """Decodes the value that starts here, and reads on for it if needed."""
        while True:
            try:
                value, self._at = _decode(self._text, self._at)
                return value
            except json.JSONDecodeError as error:
                # A value at the end of what was read may go on in the file; a string may begin long before.
                open_ended = error.msg.startswith("Unterminated") or error.pos >= len(self._text) - 16
                if not (open_ended and self._more()):
                    raise

    def _events(self) -> None:
        self.has_events = True
        while True:
            match = _SKIP.match(self._text, self._at)
            assert match is not None
            at = match.end()
            if at >= len(self._text):
                # The skipped text is kept, to see a comma before the closing bracket.
                if not self._more():
                    raise CutShort("it ends within its list of events")
                continue
            first = self._text[at]
            if first == "]":
                if "," in match.group():
                    self.damage["commas after the last event"] += 1
                self._at = at + 1
                return
            self._at = at
            if first == "}" or (first == '"' and self._matches(_NAME)):
                # This is the rest of an event or, if no event follows, what comes after the list.
                if not self._seek(_EVENT, stay=True):
                    self.damage["lists of events without an end"] += 1
                    return
                self.damage["stretches of text between events, left out"] += 1
                continue
            try:
                try:
                    item, self._at = _decode(self._text, at)
                except json.JSONDecodeError:
                    item = self._value()
            except (ValueError, RecursionError):
                self._recover(first)
                continue
            if isinstance(item, dict):
                self._take(item)
                continue
            inner = [each for each in item if isinstance(each, dict)] if isinstance(item, list) else []
            for each in inner:
                self._take(each)
            what = "brackets too many among the events" if inner else "entries of the list that are no events, left out"
            self.damage[what] += 1

    def _recover(self, first: str) -> None:
        """Goes on after text that cannot be decoded: at the next event, or at the end of the list."""
        pattern = _BETWEEN if first == "{" else _EVENT
        while not (match := pattern.search(self._text, self._at)) and self._more():
            pass
        if match and first != "{":
            self._at = match.start()
            self.damage["stretches of text between events, left out"] += 1
            return
        if match:
            end, after = match.start() + 1, match.end()
        else:
            close = _CLOSE.search(self._text, self._at)
            if close is None or self._text.rstrip("\0 \t\r\n")[-1:] not in ("}", "]"):
                raise CutShort("it ends within an event")
            end = after = close.start()
        text, self._at = self._text[self._at : end].rstrip(", \t\r\n"), after
        item = _repaired(text)
        if item is None:
            self.damage["events whose text is no JSON, left out"] += 1
        else:
            self.damage["events whose text is no JSON, repaired"] += 1
            self._take(item)

    def _object(self, header: dict[str, Any]) -> None:
        self.header = header
        while (first := self._peek(_SKIP)) != "}":
            if not first:
                raise CutShort("it ends before its last brace")
            if first == "{" and self.has_events and self._matches(_EVENT):
                self.damage["brackets too many among the events"] += 1
                self._events()
                continue
            try:
                key = self._value()
                if not isinstance(key, str) or self._peek() != ":":
                    raise ValueError("no key")
                self._at += 1
                if self._peek() == "[" and (key == "traceEvents" or self._unnamed_events()):
                    self._at += 1
                    self._events()
                    continue
                header[key] = self._value()
            except (ValueError, RecursionError) as error:
                if isinstance(error, CutShort):
                    raise
                self._skip_entry()
        self._at += 1

    def _matches(self, pattern: re.Pattern[str]) -> bool:
        """Whether the next few hundred characters begin with a pattern."""
        while len(self._text) - self._at < 512 and self._more():
            pass
        return bool(pattern.match(self._text, self._at))

    def _unnamed_events(self) -> bool:
        """Whether the list that begins here holds events although its name is not traceEvents."""
        return not self.has_events and self._matches(_EVENTS_BEGIN)

    def _skip_entry(self) -> None:
        """Goes on after an entry of the header that cannot be decoded: at the events if they are still to come."""
        self.damage["entries beside the events whose text is no JSON, left out"] += 1
        if not self.has_events and self._seek(_EVENTS_BEGIN):
            self._events()
            return
        if self._seek(_NEXT_KEY, stay=True):
            return
        end = self._text.rstrip("\0 \t\r\n")
        if not self.has_events or not end.endswith("}"):
            raise CutShort("it ends within an entry beside its events")
        self._at = len(end) - 1

    def _seek(self, pattern: re.Pattern[str], stay: bool = False) -> bool:
        """Goes to the end of the next match of a pattern, or with `stay` to its start; False if there is none."""
        while not (match := pattern.search(self._text, self._at)):
            if not self._more():
                return False
        self._at = match.start() if stay else match.end()
        return True

    def _trailer(self) -> None:
        behind = False
        while True:
            behind = behind or bool(self._text[self._at :].strip("\0 \t\r\n"))
            self._at = len(self._text)
            if not self._more():
                break
        if behind:
            self.damage["text behind the end, left out"] += 1


def _repaired(text: str) -> dict[str, Any] | None:
    """The event in a text with single backslashes, `nan`, `inf`, missing values or extra commas; None if it has none.

    >>> _repaired('{"name": "a\\\\b c", "bandwidth": inf, "grid": [1, 2,], "dur": }') == {
    ...     "name": "a\\b c", "bandwidth": None, "grid": [1, 2], "dur": None}
    True
    """
    for broken in (text, _LAST_BACKSLASH.sub(r'\\\\"', text)):
        escaped = _BACKSLASH.sub(lambda found: found[0] if found[1] else "\\\\", broken)
        try:
            item = json.loads(_VALUES.sub(_mended, escaped), strict=False)
        except (ValueError, RecursionError):
            continue
        if isinstance(item, dict):
            return item
    return None


def _mended(found: re.Match[str]) -> str:
    if found[1]:
        return found[1]
    if found[2]:
        return "null"
    return ": null" if found[3] else ""
