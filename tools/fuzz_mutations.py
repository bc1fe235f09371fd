"""Damage files: bytes as disks and downloads do, and values as a stranger would who knows the format."""

from __future__ import annotations

import copy
import io
import json
import struct
from collections.abc import Callable, MutableMapping, MutableSequence
from random import Random
from typing import Any

import torch
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors

Mutation = Callable[[bytes, Random], bytes]

DEEP = 100_000

#: Values that a reader must not trust, of every type that JSON and YAML have.
NASTY: tuple[Any, ...] = (
    0, -1, 1, 2, 7, 1_000_000, 10_000_000, 2**31, 2**63, 10**400, -(10**400), 0.5, -0.0, 1e300, float("nan"),
    float("inf"), True, False, None, "", "x", "\0", "\ud800", "x" * 100_000, "../../etc/passwd", "10", [], {}, [[]],
    [0], [1] * 1000, {"x": 1}, [None], ["x"], {"": []}, "!!python/object:os.system",
)  # fmt: skip


def mutate_bytes(content: bytes, rng: Random) -> bytes:
    """Truncate, flip, remove, repeat or zero bytes."""
    data, size = bytearray(content), max(1, len(content))
    at, length = rng.randrange(size), rng.choice((1, 2, 8, 64, 1000))
    kind = rng.randrange(7)
    if kind == 0:
        del data[at:]
    elif kind == 1:
        for _ in range(rng.choice((1, 3, 30))):
            data[rng.randrange(size)] = rng.randrange(256) if content else 0
    elif kind == 2:
        del data[at : at + length]
    elif kind == 3:
        data[at:at] = data[at : at + length]
    elif kind == 4:
        data[at : at + length] = bytes(length)
    elif kind == 5:
        data[at : at + 8] = struct.pack("<Q", rng.choice((0, 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1)))
    else:
        data[: rng.choice((1, 4, 16))] = rng.choice(
            (b"PK\x03\x04", b"\x80\x02", b"\x1f\x8b\x08", b"<!doctype html>", b"{")
        )
    return bytes(data)


def mutate_value(value: Any, rng: Random) -> Any:
    """Change one value, name or entry somewhere in nested lists and mappings."""
    value = copy.deepcopy(value)
    holders = [each for each in _holders(value) if each]
    if not holders or rng.random() < 0.03:
        return rng.choice(NASTY)
    holder = rng.choice(holders)
    key = rng.choice(list(holder) if isinstance(holder, MutableMapping) else range(len(holder)))
    kind = rng.randrange(6)
    if kind == 0:
        del holder[key]
    elif kind == 1 and isinstance(holder, MutableMapping):
        holder[str(rng.choice(NASTY))] = holder.pop(key)
    else:
        holder[key] = rng.choice(NASTY)
    return value


def mutate_json(content: bytes, rng: Random) -> bytes:
    """Change a value in JSON, or its depth, or its bytes."""
    if rng.random() < 0.3:
        return mutate_bytes(content, rng)
    if rng.random() < 0.05:
        return rng.choice(
            (b"[" * DEEP, b'{"a":' * DEEP, b"[" * DEEP + b"]" * DEEP, b"9" * 5000, b"[" + b"0," * DEEP + b"0]")
        )
    return json.dumps(mutate_value(json.loads(content), rng)).encode()


def mutate_lines(content: bytes, rng: Random) -> bytes:
    """Change one line of JSON lines."""
    lines = content.splitlines()
    index = rng.randrange(len(lines))
    lines[index] = mutate_json(lines[index], rng)
    return b"\n".join(lines)


def mutate_yaml(content: bytes, rng: Random) -> bytes:
    """Change the value of one line of YAML, or its bytes."""
    if rng.random() < 0.3:
        return mutate_bytes(content, rng)
    lines = content.decode().splitlines()
    index = rng.randrange(len(lines))
    name = lines[index].partition(":")[0]
    bomb = "\n".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9) if i else 'x'}]" for i in range(10))
    lines[index] = rng.choice(
        [
            *(f"{name}: {json.dumps(value)}" for value in NASTY),
            f"{name}: !!bool x", f"{name}: !!int x", f"{name}: 2024-99-99", f"{name}: !!timestamp x", f"{name}: &a *a",
            f"{name}: &a [*a]", f"{name}: !!python/name:os.system", f"{name}: {'[' * 20_000}", f"<<: *{name}", "\t",
            f"{name}: {':'.join(['1'] + ['59'] * 9_000)}", f"{name}: {'9' * 30_000}", f"{name}: .inf",
            f"? {name}", bomb,
        ]
    )  # fmt: skip
    return "\n".join(lines).encode("utf-8", "surrogatepass")


def mutate_safetensors(content: bytes, rng: Random) -> bytes:
    """Change a tensor, a name, the header as JSON, its metadata, or bytes of a .safetensors file."""
    kind = rng.randrange(4)
    if kind == 0:
        return mutate_bytes(content, rng)
    length = int.from_bytes(content[:8], "little")
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    if kind == 1:
        header = mutate_value(header, rng)
        text = json.dumps(header).encode("utf-8", "replace")
        return struct.pack("<Q", len(text)) + text + data
    metadata = header.pop("__metadata__", {})
    if kind == 2 and metadata:
        name = rng.choice(list(metadata))
        metadata[name] = (
            mutate_json(metadata[name].encode(), rng).decode("utf-8", "replace")
            if _is_json(metadata[name])
            else rng.choice(("", "x" * DEEP, "-1", "9" * 5000, "1e9", "\0"))
        )
        return save_safetensors(load_safetensors(content), metadata)
    tensors = mutate_tensors(load_safetensors(content), rng, plain=True)
    return save_safetensors(tensors, metadata)


def mutate_pickle(content: bytes, rng: Random) -> bytes:
    """Change a tensor or a name of a torch pickle, its format, or its bytes."""
    if rng.random() < 0.4:
        return mutate_bytes(content, rng)
    held = torch.load(io.BytesIO(content), weights_only=True)
    tensors = mutate_tensors(held.get("model", held), rng, plain=False)
    changed = rng.choice(
        ({"model": tensors}, tensors, {"model": mutate_value({"a": {"b": 1}}, rng)}, {"state_dict": tensors})
    )
    stream = io.BytesIO()
    torch.save(changed, stream, _use_new_zipfile_serialization=rng.random() < 0.8)
    return stream.getvalue()


def mutate_tensors(tensors: dict[str, Any], rng: Random, plain: bool) -> dict[str, Any]:
    """Replace, rename, remove or add one tensor.

    Args:
        tensors: Tensors by name.
        rng: Source of what is changed.
        plain: Whether only what a .safetensors can hold is used.
    """
    tensors = dict(tensors)
    name = rng.choice(sorted(tensors))
    old = tensors.pop(name)
    kind = rng.randrange(10)
    if kind == 0:
        return tensors
    if kind < 3:
        number = rng.choice(("7", "63", "10000", "10000000", "9" * 400, "-1", "x"))
        parts = [number if part.isdecimal() else part for part in name.split(".")]
        return {**tensors, ".".join(parts) if kind == 1 else name + number: old}
    if kind == 3:
        return {
            **tensors,
            name: old,
            **{f"{name}.{index}": torch.zeros(1) for index in range(rng.choice((1, 100, 11_000)))},
        }
    return {**tensors, name: rng.choice(_nasty_tensors(old, plain))()}


def _nasty_tensors(old: torch.Tensor, plain: bool) -> list[Callable[[], Any]]:
    whole = old.float()
    plain_ones = [
        lambda: torch.full_like(whole, float("nan")),
        lambda: torch.full_like(whole, float("inf")),
        lambda: torch.full(whole.shape, 1e300, dtype=torch.float64),
        lambda: whole.to(torch.int8),
        lambda: whole.to(torch.int64),
        lambda: whole.bool(),
        lambda: whole.to(torch.float8_e4m3fn),
        lambda: whole.half(),
        lambda: whole.double(),
        lambda: torch.tensor(1.0),
        lambda: torch.zeros(0),
        lambda: torch.zeros(0, 2**40),
        lambda: torch.zeros(3, 0, 5),
        lambda: whole.reshape(-1),
        lambda: whole[None].clone(),
        lambda: torch.zeros(1, 1, 1, 1),
        lambda: whole[..., :1].clone() if whole.ndim else whole,
        lambda: torch.zeros(100_000, 3),
    ]
    if plain:
        return plain_ones
    return [
        *plain_ones,
        lambda: torch.empty(whole.shape, device="meta"),
        lambda: torch.empty(2**40, 16, device="meta"),
        lambda: torch.quantize_per_tensor(whole, 0.1, 0, torch.qint8),
        lambda: torch.complex(whole, whole),
        lambda: whole.to_sparse(),
        lambda: torch.zeros(1).expand(2**20, 2**12),
        lambda: "text",
        lambda: 10**400,
        lambda: None,
        lambda: [whole],
        lambda: torch.nn.Parameter(whole),
    ]


def _holders(value: Any) -> list[Any]:
    """Return all lists and mappings in a value."""
    if isinstance(value, MutableMapping):
        return [value, *(holder for each in value.values() for holder in _holders(each))]
    if isinstance(value, MutableSequence):
        return [value, *(holder for each in value for holder in _holders(each))]
    return []


def _is_json(text: str) -> bool:
    return text.startswith(("{", "["))
