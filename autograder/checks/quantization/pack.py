"""`pack` and `unpack`: two codes a byte."""

import torch
from torch import Tensor

from autograder.cases import between, total_bytes
from autograder.drive import Observation
from autograder.exercise import Exercise


def pack(codes: Tensor) -> Tensor:
    """Return bytes of shape (n / 2, 1): 16 times the first code of a pair plus the second."""
    pairs = codes.reshape(-1, 2).tolist()
    return torch.tensor([[16 * first + second] for first, second in pairs], dtype=torch.uint8)


def unpack(packed: Tensor) -> Tensor:
    """Return the codes, two for every byte, in their order."""
    codes = []
    for byte in packed.flatten().tolist():
        codes += [byte // 16, byte % 16]
    return torch.tensor(codes, dtype=torch.uint8)


def pack_case(generator: torch.Generator, low: int = 20, high: int = 40) -> dict:
    """Return codes, and bytes of another number: both have all values."""
    half = between(generator, low, high)
    return {
        "codes": torch.randint(0, 16, (2 * half,), generator=generator, dtype=torch.uint8),
        "other": torch.randint(0, 256, (half + 3, 1), generator=generator, dtype=torch.uint8),
    }


def drive_pack(pack, unpack, codes, other):
    """Pack codes, and unpack bytes that the case supplies: the second must not depend on the first."""
    from peftlab.memory import whole_storage

    packed = pack(codes)
    return {
        "packed": packed.clone(),
        "kept": whole_storage(packed),
        "unpacked": unpack(other),
        "codes": codes,
        "other": other,
    }


def read_pack(observation: Observation, case: dict) -> Observation:
    """Count what the packed tensor keeps in memory, which may be more than it shows."""
    return {
        "what pack returns": observation["packed"],
        "the number of bytes that it keeps in memory": total_bytes([observation["kept"]]),
        "what unpack returns": observation["unpacked"],
        "the codes after pack": observation["codes"],
        "the bytes after unpack": observation["other"],
    }


_BYTE = "[16 * first + second]"
_PACKED = "torch.tensor([[16 * first + second] for first, second in pairs], dtype=torch.uint8)"
_CODES = "[byte // 16, byte % 16]"
_UNPACKED = "return torch.tensor(codes, dtype=torch.uint8)"

check_pack = Exercise(
    spec=[pack, unpack],
    cases=lambda generator: [pack_case(generator), pack_case(generator)],
    driver=drive_pack,
    reading=read_pack,
    at_most=frozenset({"the number of bytes that it keeps in memory"}),
    mistakes={
        "the first code of a pair sits in the low half of the byte: it belongs in the high half": {
            _BYTE: "[16 * second + first]"
        },
        "code i shares its byte with code i + n/2: neighbours share a byte": {
            "codes.reshape(-1, 2).tolist()": "codes.reshape(2, -1).T.tolist()",
        },
        "the two halves overlap: shift the first code by four bits, that is, multiply it by 16": {
            _BYTE: "[(first + second) % 256]"
        },
        "the first code is shifted by three bits: a code has four": {_BYTE: "[(8 * first) | second]"},
        "the halves are joined by `&`, which keeps only common bits: use `|` or `+`": {_BYTE: "[(16 * first) & second]"},
        "what pack returns lies flat: its shape is (n / 2, 1), as in bitsandbytes": {_BYTE: "16 * first + second"},
        "the bytes are signed: use uint8": {_PACKED: _PACKED + ".view(torch.int8)"},
        "a byte is kept in a larger dtype: use uint8": {_PACKED: _PACKED + ".int()"},
        "what pack returns is a view, and keeps more in memory than it shows: make a tensor of its own": {
            "return " + _PACKED: "wide = torch.zeros(2 * len(pairs), 1, dtype=torch.uint8)\n"
            f"    wide[::2] = {_PACKED}\n"
            "    return wide[::2]",
        },
        "unpack gives the low half first: the first code is in the high half": {_CODES: "[byte % 16, byte // 16]"},
        "unpack gives all high halves and then all low ones: the two codes of a byte are neighbours": {
            _UNPACKED: "return torch.tensor(codes[::2] + codes[1::2], dtype=torch.uint8)",
        },
        "unpack does not shift the high half down: divide by 16, or shift by four bits": {
            _CODES: "[byte // 16 * 16, byte % 16]"
        },
        "unpack does not mask the low half: take `& 0xF`, or the remainder by 16": {_CODES: "[byte // 16, byte]"},
        "unpack shifts a signed byte, and its sign comes along: stay in uint8": {
            _CODES: "[(byte - 256 * (byte > 127)) // 16 % 256, byte % 16]",
        },
        "unpack returns another dtype: codes are uint8": {_UNPACKED: "return torch.tensor(codes)"},
        "unpack returns pairs: its shape is (n,), all codes in a row": {_UNPACKED: _UNPACKED + ".view(-1, 2)"},
    },
    variants={
        "shift and or": """
            def pack(codes):
                return ((codes[::2] << 4) | codes[1::2]).unsqueeze(1)

            def unpack(packed):
                flat = packed.flatten()
                return torch.stack([flat >> 4, flat & 0xF], dim=1).flatten()
        """,
        "arithmetic in int32": """
            def pack(codes):
                pairs = codes.int().view(-1, 2)
                return (pairs * torch.tensor([16, 1])).sum(1, keepdim=True).to(torch.uint8)

            def unpack(packed):
                wide = packed.int()
                return torch.cat([wide // 16, wide % 16], dim=1).reshape(-1).to(torch.uint8)
        """,
        "filling an empty tensor": """
            def pack(codes):
                packed = torch.empty(len(codes) // 2, 1, dtype=torch.uint8)
                packed[:, 0] = codes[0::2] * 16 + codes[1::2]
                return packed

            def unpack(packed):
                codes = packed.new_empty(2 * packed.numel())
                codes[0::2] = packed.view(-1) // 16
                codes[1::2] = packed.view(-1).remainder(16)
                return codes
        """,
        "in place on a copy": """
            def pack(codes):
                high = codes[0::2].clone()
                high.mul_(16).add_(codes[1::2])
                return high[:, None]

            def unpack(packed):
                return torch.cat([packed >> 4, packed - (packed >> 4 << 4)], 1).view(-1)
        """,
    },
)
