"""Decodes the wire format of protocol buffers, as far as profiles need it."""

from __future__ import annotations

from collections.abc import Iterator


def varint(data: bytes | memoryview, at: int) -> tuple[int, int]:
    """The integer that begins at a position, and the position after it.

    Raises:
      ValueError: the integer has more than 64 bits.
      IndexError: the data end within the integer.

    >>> varint(bytes([0xAC, 0x02]), 0)
    (300, 2)
    """
    value = shift = 0
    while shift < 70:
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value & 0xFFFF_FFFF_FFFF_FFFF, at
        shift += 7
    raise ValueError(f"an integer of more than 64 bits at byte {at - 10}: this is no protocol buffer message")


def fields(data: bytes | memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """(number, value) of every field of a message: integers as int, all other values as bytes.

    Raises:
      ValueError: the data are no message.
    """
    data = memoryview(data)
    at = 0
    try:
        while at < len(data):
            key, at = varint(data, at)
            wire_type = key & 7
            if wire_type == 0:
                value, at = varint(data, at)
                yield key >> 3, value
                continue
            if wire_type == 2:
                length, at = varint(data, at)
            elif wire_type in (1, 5):
                length = 8 if wire_type == 1 else 4
            else:
                raise ValueError(f"wire type {wire_type} at byte {at}: this is no protocol buffer message")
            if at + length > len(data):
                raise ValueError(f"a field of {length} bytes at byte {at} of {len(data)}: the message is cut off")
            yield key >> 3, data[at : at + length]
            at += length
    except IndexError:
        raise ValueError(f"the message of {len(data)} bytes is cut off") from None


def messages(data: bytes | memoryview, number: int) -> list[memoryview]:
    """All occurrences of a field that holds messages or text."""
    return [value for found, value in fields(data) if found == number and isinstance(value, memoryview)]


def text(data: bytes | memoryview, number: int) -> str:
    """The last occurrence of a text field; "" if there is none."""
    found = messages(data, number)
    return bytes(found[-1]).decode() if found else ""


def integer(data: bytes | memoryview, number: int) -> int:
    """The last occurrence of an integer field; 0, the default of the format, if there is none."""
    found = [value for at, value in fields(data) if at == number and isinstance(value, int)]
    return found[-1] if found else 0


def integers(data: bytes | memoryview, number: int) -> list[int]:
    """A repeated integer field, packed or not."""
    found: list[int] = []
    for at, value in fields(data):
        if at != number:
            continue
        if isinstance(value, int):
            found.append(value)
            continue
        position = 0
        try:
            while position < len(value):
                one, position = varint(value, position)
                found.append(one)
        except IndexError:
            raise ValueError(f"a list of {len(value)} bytes is cut off") from None
    return found
