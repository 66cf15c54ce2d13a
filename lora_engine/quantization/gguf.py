"""The block formats of GGUF files: Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q4_K, Q5_K, Q6_K.

A row is whole blocks, a block a run of bytes: float16 scales, then codes. d and m are a block's
scale and minimum, q a code:

    Q4_0, Q5_0  32 values d * (q - 8), d * (q - 16)
    Q4_1, Q5_1  32 values d * q + m
    Q8_0        32 values d * q, q signed
    Q4_K, Q5_K  256 values d * s * q - m * t, with 6-bit s and t for each 32 of them
    Q6_K        256 values d * s * (q - 32), with a signed byte s for each 16 of them

Values j and j + 16 of a block of 32 are the lower and upper half of byte j; of the K formats',
values j and j + 32 of each 64 (Q6_K: j and j + 64 of each 128). The fifth and sixth bits stand
apart. Every sum and product is rounded to float32, as llama.cpp's reference does it.
"""

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from lora_engine.quantization.format import Blocks, Entry, all_finite


class _Type(NamedTuple):
    """Values of a block, its bytes, at which of them float16 numbers stand, and how blocks
    [B, bytes] become values [B, values]."""

    values: int
    bytes: int
    scales: tuple[int, ...]
    decode: Callable[[Tensor], Tensor]
    encode: Callable[[Tensor], Tensor] | None


@dataclass(frozen=True)
class Gguf:
    """The format of one weight. type: "q4_0", …; one of TYPES.

    Raises ValueError for another type.
    """

    type: str

    def __post_init__(self) -> None:
        if self.type not in TYPES:
            raise ValueError(f"GGUF type {self.type}: expected one of {', '.join(TYPES)}")

    @property
    def name(self) -> str:
        """The type's."""
        return self.type

    def layout(self, shape: tuple[int, int]) -> Mapping[str, Entry]:
        """codes [N, bytes of a row] uint8, scales among them."""
        of = TYPES[self.type]
        if shape[1] % of.values:
            columns = f"{shape[1]} columns are no whole number of blocks of {of.values}"
            raise ValueError(f"{self.type}: {columns}")
        return {"codes": Entry((shape[0], shape[1] // of.values * of.bytes), torch.uint8)}

    def decode(
        self, tensors: Mapping[str, Tensor], shape: tuple[int, int], start: int, stop: int
    ) -> Tensor:
        """Rows [stop - start, K], float32."""
        of = TYPES[self.type]
        return of.decode(tensors["codes"][start:stop].view(-1, of.bytes)).view(stop - start, -1)

    def packed_rows(self, tensors: Mapping[str, Tensor], start: int, stop: int) -> Blocks | None:
        """Rows [start, stop) as kernels decode them."""
        if sys.byteorder != "little":
            return None
        return Blocks(tensors["codes"][start:stop], self.type)

    @property
    def rows_together(self) -> int:
        """Those of a scale."""
        return 1

    def is_finite(self, tensors: Mapping[str, Tensor]) -> bool:
        """Whether no value is NaN or infinite."""
        return self._scales_are_finite(tensors["codes"])

    def encode(self, w: Tensor, largest: Tensor) -> dict[str, Tensor]:
        """Codes as llama.cpp's reference chooses them.

        Raises ValueError for K formats, whose codes llama.cpp searches for, and for values beyond
        what a float16 scale reaches.
        """
        of = TYPES[self.type]
        if of.encode is None:
            raise ValueError(f"{self.type}: is read and trained on, but not written")
        blocks = of.encode(w.view(-1, of.values))
        if not self._scales_are_finite(blocks):
            raise ValueError(f"{self.type}: a value is too large for the float16 scale of a block")
        return {"codes": blocks.view(w.shape[0], -1)}

    def _scales_are_finite(self, codes: Tensor) -> bool:
        of = TYPES[self.type]
        blocks = codes.view(-1, of.bytes)
        return all(all_finite(_float16(blocks, at)) for at in of.scales)


def _float16(blocks: Tensor, at: int) -> Tensor:
    """[B, 1] float32: the float16 numbers at byte `at`."""
    return blocks[:, at : at + 2].contiguous().view(torch.float16).float()


def _nibbles(packed: Tensor, run: int) -> Tensor:
    """[B, 2 P] uint8 out of packed [B, P]: of each `run` bytes the lower halves, then the upper."""
    runs = packed.reshape(packed.shape[0], -1, 1, run)
    return torch.cat((runs & 15, runs >> 4), dim=2).flatten(1)


@cache
def _powers(count: int, device: torch.device) -> Tensor:
    return 2 ** torch.arange(count, dtype=torch.uint8, device=device)


def _fifth_bits(packed: Tensor) -> Tensor:
    """[B, 32] uint8, 0 or 16: bit i of the four bytes [B, 4] is value i's."""
    bits = packed[:, :, None] & _powers(8, packed.device)
    return (bits != 0).flatten(1).to(torch.uint8) << 4


def _decode_q4_0(blocks: Tensor) -> Tensor:
    return _float16(blocks, 0) * (_nibbles(blocks[:, 2:], 16).float() - 8)


def _decode_q4_1(blocks: Tensor) -> Tensor:
    return _float16(blocks, 0) * _nibbles(blocks[:, 4:], 16).float() + _float16(blocks, 2)


def _decode_q5_0(blocks: Tensor) -> Tensor:
    codes = _nibbles(blocks[:, 6:], 16) | _fifth_bits(blocks[:, 2:6])
    return _float16(blocks, 0) * (codes.float() - 16)


def _decode_q5_1(blocks: Tensor) -> Tensor:
    codes = _nibbles(blocks[:, 8:], 16) | _fifth_bits(blocks[:, 4:8])
    return _float16(blocks, 0) * codes.float() + _float16(blocks, 2)


def _decode_q8_0(blocks: Tensor) -> Tensor:
    return blocks[:, 2:].view(torch.int8).float() * _float16(blocks, 0)


def _six_bit_scales(packed: Tensor) -> tuple[Tensor, Tensor]:
    """s and t, [B, 8] float32 each, out of 12 bytes.

    The first four of s are the lower 6 bits of bytes 0 to 3, of t those of bytes 4 to 7. The last
    four have their lower 4 bits in the halves of bytes 8 to 11 and their upper 2 bits on top of the
    first four.
    """
    first_s, first_t, lower = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    s = torch.cat((first_s & 63, lower & 15 | first_s >> 6 << 4), dim=1)
    t = torch.cat((first_t & 63, lower >> 4 | first_t >> 6 << 4), dim=1)
    return s.float(), t.float()


def _decode_with_minima(blocks: Tensor, codes: Tensor) -> Tensor:
    """Q4_K and Q5_K, of codes [B, 256]."""
    s, t = _six_bit_scales(blocks[:, 4:16])
    scale, least = _float16(blocks, 0) * s, _float16(blocks, 2) * t
    values = codes.view(-1, 8, 32).float() * scale[:, :, None]
    return values.sub_(least[:, :, None]).flatten(1)


def _decode_q4_k(blocks: Tensor) -> Tensor:
    return _decode_with_minima(blocks, _nibbles(blocks[:, 16:], 32))


def _decode_q5_k(blocks: Tensor) -> Tensor:
    # Bit i of byte j is that of value 32 i + j.
    fifth = (blocks[:, None, 16:48] & _powers(8, blocks.device)[:, None]) != 0
    codes = _nibbles(blocks[:, 48:], 32) | fifth.flatten(1).to(torch.uint8) << 4
    return _decode_with_minima(blocks, codes)


def _decode_q6_k(blocks: Tensor) -> Tensor:
    lower = _nibbles(blocks[:, :128], 64)
    pairs = blocks[:, 128:192].reshape(-1, 2, 32)  # of two bits, for each 128 values
    upper = torch.stack([(pairs >> shift & 3) << 4 for shift in (0, 2, 4, 6)], dim=2).flatten(1)
    scale = blocks[:, 192:208].view(torch.int8).float() * _float16(blocks, 208)
    values = (lower | upper).float() - 32
    return (values.view(-1, 16, 16) * scale[:, :, None]).flatten(1)


def _inverse(d: Tensor) -> Tensor:
    return torch.where(d == 0, 0.0, 1 / d)


def _bytes_of(numbers: Tensor) -> Tensor:
    """[B, 2] uint8 of [B, 1], rounded to float16."""
    return numbers.to(torch.float16).view(torch.uint8)


def _pack_nibbles(codes: Tensor) -> Tensor:
    return codes[:, :16] & 15 | codes[:, 16:] << 4


def _pack_fifth_bits(codes: Tensor) -> Tensor:
    bits = (codes >> 4).view(-1, 4, 8) * _powers(8, codes.device)
    return bits.sum(dim=2, dtype=torch.uint8)


def _encode_signed(blocks: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """d and codes [B, 32] of values d * (q - half): the value of largest magnitude has q = 0."""
    half = 2 ** (bits - 1)
    largest = blocks.gather(1, blocks.abs().argmax(dim=1, keepdim=True))
    d = largest / -half
    codes = (blocks * _inverse(d) + (half + 0.5)).trunc().clamp(0, 2 * half - 1)
    return d, codes.to(torch.uint8)


def _encode_from_least(blocks: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """d, m and codes [B, 32] of values d * q + m, m being the block's least."""
    least, most = blocks.amin(dim=1, keepdim=True), blocks.amax(dim=1, keepdim=True)
    d = (most - least) / (2**bits - 1)
    codes = ((blocks - least) * _inverse(d) + 0.5).trunc().clamp(0, 2**bits - 1)
    return d, least, codes.to(torch.uint8)


def _encode_q4_0(blocks: Tensor) -> Tensor:
    d, codes = _encode_signed(blocks, 4)
    return torch.cat((_bytes_of(d), _pack_nibbles(codes)), dim=1)


def _encode_q4_1(blocks: Tensor) -> Tensor:
    d, m, codes = _encode_from_least(blocks, 4)
    return torch.cat((_bytes_of(d), _bytes_of(m), _pack_nibbles(codes)), dim=1)


def _encode_q5_0(blocks: Tensor) -> Tensor:
    d, codes = _encode_signed(blocks, 5)
    return torch.cat((_bytes_of(d), _pack_fifth_bits(codes), _pack_nibbles(codes)), dim=1)


def _encode_q5_1(blocks: Tensor) -> Tensor:
    d, m, codes = _encode_from_least(blocks, 5)
    packed = _pack_fifth_bits(codes), _pack_nibbles(codes)
    return torch.cat((_bytes_of(d), _bytes_of(m), *packed), dim=1)


def _encode_q8_0(blocks: Tensor) -> Tensor:
    d = blocks.abs().amax(dim=1, keepdim=True) / 127
    scaled = blocks * _inverse(d)
    size = scaled.abs()
    floor = size.floor()
    rounded = floor + (2 * (size - floor)).floor()  # halves away from zero
    codes = (scaled.sign() * rounded).to(torch.int8).view(torch.uint8)
    return torch.cat((_bytes_of(d), codes), dim=1)


TYPES = {
    "q4_0": _Type(values=32, bytes=18, scales=(0,), decode=_decode_q4_0, encode=_encode_q4_0),
    "q4_1": _Type(values=32, bytes=20, scales=(0, 2), decode=_decode_q4_1, encode=_encode_q4_1),
    "q5_0": _Type(values=32, bytes=22, scales=(0,), decode=_decode_q5_0, encode=_encode_q5_0),
    "q5_1": _Type(values=32, bytes=24, scales=(0, 2), decode=_decode_q5_1, encode=_encode_q5_1),
    "q8_0": _Type(values=32, bytes=34, scales=(0,), decode=_decode_q8_0, encode=_encode_q8_0),
    "q4_k": _Type(values=256, bytes=144, scales=(0, 2), decode=_decode_q4_k, encode=None),
    "q5_k": _Type(values=256, bytes=176, scales=(0, 2), decode=_decode_q5_k, encode=None),
    "q6_k": _Type(values=256, bytes=210, scales=(208,), decode=_decode_q6_k, encode=None),
}
