"""Mutants of files: bytes anywhere, and inside what a container wraps, so that they come past the outermost check.

A mutant is a function of (parser, seed, number) alone, so that a number is enough to see it again.
"""

from __future__ import annotations

import base64
import io
import json
import random
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any

Mutation = Callable[[bytes, random.Random], bytes]

_NUMBERS = [
    0,
    1,
    2,
    3,
    0x7F,
    0x80,
    0xFF,
    0x7FFF,
    0xFFFF,
    0x10000,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**40,
    2**63 - 1,
    2**64 - 1,
]
_ODD: tuple[Any, ...] = (
    0, -1, 2**31, 2**63, 2**64, "x", "", "\0", "\u202e", "x" * 5000, None, [], {}, 1.5, -0.0, 1e308, True, [2**62, 2**62], [0, 0, 0],
)  # fmt: skip
_PNG = b"\x89PNG\r\n\x1a\n"

PICKLE = [
    b"ctorch._utils\n_rebuild_tensor_v2\n", b"ctorch._utils\n_rebuild_parameter\n", b"ctorch\nFloatStorage\n",
    b"ctorch\nFloatTensor\n", b"ctorch\nSize\n", b"ctorch.storage\nUntypedStorage\n", b"ccollections\nOrderedDict\n",
    b"ccollections\nCounter\n", b"c__builtin__\nset\n", b"c__builtin__\nbytearray\n", b"c_codecs\nencode\n",
    b"ctorch._utils\n_rebuild_sparse_tensor\n", b"ctorch._tensor\n_rebuild_from_type_v2\n", b"cposix\nsystem\n",
    b"ctorch.nn.parameter\nParameter\n", b"ctorch\ndevice\n", b"cnumpy.core.multiarray\nscalar\n", b"cnumpy\ndtype\n",
    b"R", b"b", b"Q", b"\x81", b"t", b"(", b")", b"}", b"]", b"a", b"e", b"s", b"u", b"\x85", b"\x86", b"\x87", b"N", b"0", b"2",
    b".", b"q\x00", b"h\x00", b"h\x01", b"j\xff\xff\xff\x7f", b"r\xff\xff\xff\x7f", b"K\xff", b"M\xff\xff", b"J\xff\xff\xff\x7f",
    b"J\xff\xff\xff\xff", b"\x8a\x08\xff\xff\xff\xff\xff\xff\xff\x7f", b"\x8a\x05\x00\x00\x00\x00\x10", b"G\x7f\xf0\x00\x00\x00\x00\x00\x00",
    b"X\x00\x00\x00\x00", b"X\xff\xff\xff\xff", b"U\x00", b"\x8f", b"\x88", b"\x89", b"\x80\x02", b"\x80\x04", b"\x95",
]  # fmt: skip
TOML = [
    b"[", b"]", b"[[", b"]]", b"{", b"}", b"=", b".", b",", b'"', b"'", b'"""', b"'''", b"\\u0000", b"\\uD800", b"\n", b"\r\n", b"#", b"\x00",
    b"1e999", b"nan", b"inf", b"-0", b"0x", b"9" * 40, b"1979-05-27T07:32:00Z", b"true", b"name", b"data", b"[distill]", b"epochs", b"a.b.c",
    b"opset = ", b"max_batch = ", b"{a={a={a={", b"[[[[[[[[", b"\xff", b"\xc3", "\N{RIGHT-TO-LEFT OVERRIDE}".encode(),
]  # fmt: skip
JSON = [
    b"{", b"}", b"[", b"]", b":", b",", b'"', b"null", b"true", b"-1", b"1e999", b"NaN", b"9" * 40, b'"\\ud800"', b"[[[[[[", b'"__metadata__"',
    b'"dtype"', b'"F32"', b'"I64"', b'"BOOL"', b'"shape"', b'"data_offsets"', b"[0]", b"[]", b"[9223372036854775807]", b'"F8_E4M3"', b'"arch"', b'"wrn-9999-999"',
]  # fmt: skip
NPY = [
    b"\x93NUMPY\x01\x00", b"\x93NUMPY\x02\x00", b"\x93NUMPY\x03\x00", b"'descr'", b"'|O'", b"'<f4'", b"'|u1'", b"'<U9'", b"'<c16'", b"'|V9'", b"'<M8[s]'",
    b"'fortran_order'", b"True", b"False", b"'shape'", b"()", b"(0,)", b"(-1,)", b"(99999999999,)", b"(3, 4, 4)", b"((((((", b"-" * 40, b"[" * 40, b"1L", b"1e9", b"\n",
]  # fmt: skip
ONNX = [
    b"\x68\x0d", b"\x6a\x08\x0a\x01a\x12\x03a.b", b"\x70\x01", b"\x70\x02", b"\xf0\x80\x80\x80\x10\x01", b"\x3a", b"\x2a", b"\x0a", b"\x12", b"\x42", b"\x4a", b"\x52",
    b"\xa2\x01", b"\xca\x01", b"\xb2\x01", b"\xff" * 9 + b"\x01", b"\x80" * 9, b"\x0b", b"\x0c", b"\x0d", b"If", b"Loop", b"Scan", b"Reshape", b"Resize", b"EPContext", b"ConstantOfShape",
    b"com.microsoft", b"ORTM", b"Einsum", b"Conv", b"Expand", b"Tile", b"SequenceAt", b"\x08\x0b", b"\x10\xff\xff\xff\xff\x07",
]  # fmt: skip
IMAGE = [
    b"IHDR", b"IDAT", b"PLTE", b"tRNS", b"iCCP", b"zTXt", b"acTL", b"fcTL", b"IEND", b"RIFF", b"WEBP", b"VP8 ", b"VP8L", b"VP8X", b"ALPH", b"ANIM", b"ANMF",
    b"\xff\xd8", b"\xff\xc0", b"\xff\xc2", b"\xff\xc4", b"\xff\xda", b"\xff\xe1", b"II*\0", b"MM\0*", b"GIF89a", b"BM", b"P6\n", b"P5\n", b"65536 65536\n",
    b"\x89PNG\r\n\x1a\n", b"\0\0\x40\0", b"\x78\x9c", b"\xff\xff\xff\xff",
]  # fmt: skip
PEM = [
    b"-----BEGIN PRIVATE KEY-----\n", b"-----END PRIVATE KEY-----\n", b"-----BEGIN PUBLIC KEY-----\n", b"-----END PUBLIC KEY-----\n",
    b"-----BEGIN RSA PRIVATE KEY-----\n", b"-----BEGIN ENCRYPTED PRIVATE KEY-----\n", b"-----BEGIN EC PARAMETERS-----\n", b"\n", b"=", b"====", b"\0", b"Proc-Type: 4,ENCRYPTED\n",
]  # fmt: skip
_DER = [
    b"\x06\x03\x2b\x65\x70", b"\x06\x03\x2b\x65\x6e", b"\x06\x03\x2b\x65\x71", b"\x06\x09\x2a\x86\x48\x86\xf7\x0d\x01\x01\x01", b"\x30\x80", b"\x30\x84\x7f\xff\xff\xff",
    b"\x02\x01\x00", b"\x02\x01\x01", b"\x04\x20", b"\x04\x22", b"\x05\x00", b"\x03\x21\x00",
]  # fmt: skip


def bytewise(tokens: Sequence[bytes], others: Sequence[bytes]) -> Mutation:
    """One to six changes anywhere; `others` give pieces to splice in."""

    def mutate(data: bytes, rng: random.Random) -> bytes:
        changed = bytearray(data)
        for _ in range(rng.choice((1, 1, 1, 2, 3, 6))):
            _change(changed, rng, tokens, others)
        return bytes(changed)

    return mutate


def _change(data: bytearray, rng: random.Random, tokens: Sequence[bytes], others: Sequence[bytes]) -> None:
    at = rng.randrange(len(data) + 1)
    kind = rng.randrange(10)
    if kind == 0 and at < len(data):
        data[at] ^= 1 << rng.randrange(8)
    elif kind == 1 and at < len(data):
        data[at] = rng.randrange(256)
    elif kind == 2:
        del data[at : at + rng.randint(1, 16)]
    elif kind == 3:
        data[at:at] = rng.randbytes(rng.randint(1, 16))
    elif kind == 4:
        number, size = rng.choice(_NUMBERS), rng.choice((1, 2, 4, 8))
        raw = (number % 256**size).to_bytes(size, rng.choice(("little", "big")))
        data[at : at + (size if rng.random() < 0.8 else 0)] = raw
    elif kind == 5:
        start = rng.randrange(len(data) + 1)
        data[at:at] = data[start : start + rng.randint(1, 64)]
    elif kind == 6:
        other = rng.choice(others)
        start = rng.randrange(len(other) + 1)
        data[at : at + rng.randint(0, 64)] = other[start : start + rng.randint(1, 64)]
    elif kind == 7 and rng.random() < 0.3:
        del data[at:]
    else:
        data[at : at + rng.choice((0, 0, 1, 4))] = rng.choice(tokens) * rng.choice((1, 1, 1, 2, 50))


def inside_zip(member: Mutation, wanted: Callable[[str], bool]) -> Mutation:
    """Change the members that are `wanted`, or their names and number, and pack them again with right sums."""

    def mutate(data: bytes, rng: random.Random) -> bytes:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = [(entry.filename, archive.read(entry)) for entry in archive.infolist()]
        i = rng.choice([i for i, (name, _) in enumerate(members) if wanted(name)])
        name, content = members[i]
        if rng.random() < 0.9:
            members[i] = name, member(content, rng)
        else:
            _reorder(members, i, rng)
        return pack(members, zipfile.ZIP_STORED if rng.random() < 0.9 else zipfile.ZIP_DEFLATED)

    return mutate


def _reorder(members: list[tuple[str, bytes]], i: int, rng: random.Random) -> None:
    name, content = members[i]
    kind = rng.randrange(4)
    if kind == 0:
        del members[i]
    elif kind == 1:
        members.insert(rng.randrange(len(members) + 1), (name + rng.choice(("", "/", ".npy", "\0x", "é")), content))
    elif kind == 2:
        members[i] = rng.choice(("../x", "/x", "x" * 300, "", name.upper())), content
    else:
        rng.shuffle(members)


def pack(members: Sequence[tuple[str, bytes]], method: int = zipfile.ZIP_STORED) -> bytes:
    """A zip archive."""
    import warnings

    buffer = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(buffer, "w", method) as archive:
        warnings.simplefilter("ignore")  # two members of one name
        for name, data in members:
            archive.writestr(zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0)), data, method)
    return buffer.getvalue()


def inside_png(data: bytes, rng: random.Random) -> bytes:
    """Change the chunks of a PNG under right sums; in what is none, bytes anywhere."""
    if not data.startswith(_PNG):
        return bytewise(IMAGE, [data])(data, rng)
    chunks, at = [], len(_PNG)
    while at < len(data):
        (length,) = struct.unpack_from(">I", data, at)
        chunks.append((data[at + 4 : at + 8], data[at + 8 : at + 8 + length]))
        at += 12 + length
    i = rng.randrange(len(chunks))
    kind, content = chunks[i]
    how = rng.randrange(6)
    if how == 0:
        chunks.insert(rng.randrange(len(chunks) + 1), (rng.choice((kind, b"tEXt", b"iCCP", b"tRNS", b"PLTE")), content))
    elif how == 1:
        del chunks[i]
    elif kind == b"IDAT" and how < 4:
        chunks[i] = kind, zlib.compress(bytewise(IMAGE, [content])(zlib.decompress(content), rng))
    else:
        chunks[i] = kind, bytewise(IMAGE, [content])(content, rng)
    parts = [struct.pack(">I", len(c)) + k + c + struct.pack(">I", zlib.crc32(k + c)) for k, c in chunks]
    return _PNG + b"".join(parts)


def inside_pem(data: bytes, rng: random.Random) -> bytes:
    """Change what a PEM block wraps."""
    begin, *lines, end = data.decode().splitlines()
    content = base64.b64decode("".join(lines))
    changed = base64.encodebytes(bytewise(_DER, [content])(content, rng)).decode()
    return f"{begin}\n{changed}{end}\n".encode()


def inside_json(data: bytes, rng: random.Random) -> bytes:
    """Change one to three values anywhere in JSON."""
    value = json.loads(data)
    places = list(_places(value))  # before the changes: what is put in stays as it is
    for _ in range(rng.choice((1, 1, 2, 3))):
        holder, key = rng.choice(places)
        with suppress(KeyError, IndexError):  # it was removed
            _change_entry(holder, key, rng)
    return json.dumps(value).encode()


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Everything in nested objects and lists, as (what holds it, its key)."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, one in inner:
        yield value, key
        yield from _places(one)


def _change_entry(holder: Any, key: Any, rng: random.Random) -> None:
    kind = rng.randrange(4)
    if kind == 0:
        del holder[key]
    elif kind == 1 and isinstance(holder, dict):
        holder[f"{key}{rng.choice(('x', chr(0), '<b>', chr(0x202E)))}"] = holder[key]
    else:
        holder[key] = rng.choice(_ODD)


def inside_header(data: bytes, rng: random.Random) -> bytes:
    """Change the JSON of a safetensors file: as text, or as values under a right length."""
    (length,) = struct.unpack_from("<Q", data)
    head, tensors = data[8 : 8 + length], data[8 + length :]
    if rng.random() < 0.5:
        head = bytewise(JSON, [head])(head, rng)
    else:
        try:
            value = json.loads(head)
        except ValueError:
            return data
        _change_value(value, rng)
        head = json.dumps(value).encode()
    return struct.pack("<Q", len(head)) + head + tensors


def _change_value(value: dict[str, object], rng: random.Random) -> None:
    names = [name for name in value if name != "__metadata__"] or list(value)
    name = rng.choice(names)
    entry = value[name]
    odd = rng.choice(_ODD)
    if isinstance(entry, dict) and rng.random() < 0.8:
        entry[rng.choice([*entry, "extra"])] = odd
    elif rng.random() < 0.5:
        value[name + rng.choice(("", "x", "\0", "\ud800"))] = value[rng.choice(names)]
    else:
        value[name] = odd
