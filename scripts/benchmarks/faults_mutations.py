"""Files as a stranger or a failing disk may leave them: bytes, JSON and headers of tensors, changed at random."""

import json
import random
import struct
from collections.abc import Callable
from typing import Any

Mutation = Callable[[bytes, random.Random], bytes]

DEEP, LONG = 50_000, 200_000
STRANGE: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2**31, 2**63, 2**64, 10**12, 10**18, 10**400, -(10**12), 0.0, -0.0, 0.5, 1e-320, 1e30,
    1e308, float("inf"), float("-inf"), float("nan"), "", "0", "nan", "none", "svd", "cp", "torch", "onnxruntime",
    "../../outside", "/etc/passwd", "..", ".", "C:\\outside", "a/b", "file:///etc/passwd", "model.safetensors",
    "<script>alert(1)</script>", "$(touch outside)", "'; drop table studies; --", "%s%n{0}", "\x00", "\x1b]0;x\x07",
    "\ud800", "\u202e", "é" * 300, "x" * LONG, [], {}, [[]], [0] * 1000, {"": {}}, {"a": {"b": [None]}},
)  # fmt: skip


def of_bytes(content: bytes, rng: random.Random) -> bytes:
    """Some bytes others, or left out, or put in, or the end cut off."""
    changed = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 8, 64))):
        place = rng.randrange(len(changed) + 1)
        match rng.randrange(5):
            case 0 if place < len(changed):
                changed[place] ^= 1 << rng.randrange(8)
            case 1 if place < len(changed):
                changed[place] = rng.randrange(256)
            case 2:
                del changed[place:]
            case 3:
                changed[place:place] = rng.randbytes(rng.choice((1, 8, 256)))
            case _:
                del changed[place : place + rng.choice((1, 8, 256))]
    return bytes(changed)


def of_json(content: bytes, rng: random.Random) -> bytes:
    """A value of it another, a key gone, renamed or there twice, or all of it nested deeply."""
    match rng.randrange(20):
        case 0:
            return b"[" * DEEP if rng.random() < 0.5 else b'{"layers":' * DEEP + b"1" + b"}" * DEEP
        case 1:
            return content.replace(
                b"{", b'{"schema": 1, "layers": {}, ' if rng.random() < 0.5 else b'{"": 1, "": 2,', 1
            )
        case 2:
            return json.dumps(rng.choice(STRANGE)).encode()
    value = json.loads(content)
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        value = _changed(value, rng)
    return json.dumps(value).encode()


def of_lines(content: bytes, rng: random.Random) -> bytes:
    """A line of JSON among many changed, gone, there twice or elsewhere, or half of the last one lost."""
    lines = content.splitlines(keepends=True)
    place = rng.randrange(len(lines))
    match rng.randrange(8):
        case 0:
            return content[: -rng.randrange(1, max(len(lines[-1]), 2))]
        case 1:
            return content + rng.choice((b"\x00" * 4096, b"{", b"null\n", b"[]\n", rng.randbytes(100)))
        case 2:
            lines.insert(rng.randrange(len(lines)), lines[place])
        case 3:
            del lines[place]
        case 4:
            lines[place] = of_bytes(lines[place], rng)
        case _:
            lines[place] = of_json(lines[place], rng) + b"\n"
    return b"".join(lines)


def of_safetensors(content: bytes, rng: random.Random) -> bytes:
    """The header's JSON changed, or its length: tensors of other names, types, shapes and places."""
    (length,) = struct.unpack("<Q", content[:8])
    header, data = content[8 : 8 + length], content[8 + length :]
    match rng.randrange(5):
        case 0:
            lengths = 0, 1, length - 1, length + 8, 10**8, 2**40, 2**63, 2**64 - 1
            return struct.pack("<Q", rng.choice(lengths)) + header + data
        case 1:
            types = (b"F32", b"F64"), (b"F32", b"I32"), (b"U8", b"I8"), (b"F32", b"BF16"), (b"F32", b"F8_E4M3")
            header = header.replace(*rng.choice(types))
        case 2:
            shapes = (b"[", b"[1,", 1), (b'"shape":[', b'"shape":[0,', -1), (b'"shape":[', b'"shape":[4294967296,', 1)
            header = header.replace(*rng.choice(shapes))
        case _:
            header = of_json(header, rng)
    return struct.pack("<Q", len(header)) + header + data


def _changed(value: Any, rng: random.Random) -> Any:
    """The value with something somewhere in it changed."""
    if isinstance(value, str) and value[:1] in ("{", "[") and rng.random() < 0.8:
        return of_json(value.encode(), rng).decode()
    if not isinstance(value, dict | list) or not value or rng.random() < 0.1:
        return _strange(value, rng)
    keys: list[Any] = list(value) if isinstance(value, dict) else list(range(len(value)))
    key = rng.choice(keys)
    changed = value.copy()
    match rng.randrange(10):
        case 0:
            del changed[key]
        case 1 if isinstance(changed, dict):
            changed[rng.choice(("", "../x", "schema", "x" * 1000, "__proto__", "\ud800"))] = changed.pop(key)
        case 2:
            changed[key] = value[rng.choice(keys)]
        case 3 if isinstance(changed, list):
            changed = changed * rng.choice((2, 100))
        case _:
            changed[key] = _changed(value[key], rng)
    return changed


def _strange(value: Any, rng: random.Random) -> Any:
    if isinstance(value, int | float) and rng.random() < 0.3:
        return value * rng.choice((-1, 0, 2, 10**6, 10**30))
    return rng.choice(STRANGE)
