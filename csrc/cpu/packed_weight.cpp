// Packed weights but those of blockwise_4bit.cpp: codes with scales for groups of columns, and the
// blocks of GGUF files. What the bits mean stands in lora_engine/quantization/, a file a format.
#include "isa.hpp"
#include "simd/pairs.hpp"

namespace lora_engine {
namespace {

constexpr int64_t kStrip = 512;  // values decoded at a time: whole blocks of every format
constexpr int64_t kRun = 32;     // values that share a minimum in GGUF's blocks

// e4m3's magnitude moved to float32's place and bias. The numbers below 8, which have no implicit
// one, are put right by exact operations on normal numbers: those hold where the processor flushes
// subnormal ones.
inline float e4m3_magnitude(uint32_t code) {
  const float normal = float_of((code << 20) + (120u << 23));
  return code < 8 ? (normal - 0x1p-7f) * 2.0f : normal;
}
inline float with_sign(float x, uint32_t sign) { return float_of(bits_of(x) | sign); }

inline float of_e4m3(uint32_t code) {
  const uint32_t magnitude = code & 0x7f;
  const float x = e4m3_magnitude(magnitude);
  return with_sign(magnitude == 0x7f ? float_of(0x7fc00000u) : x, (code & 0x80) << 24);
}
// The values of the 16 codes of four bits.
constexpr float kE2m1[16] = {0.0f,  0.5f,  1.0f,  1.5f,  2.0f,  3.0f,  4.0f,  6.0f,
                             -0.0f, -0.5f, -1.0f, -1.5f, -2.0f, -3.0f, -4.0f, -6.0f};
constexpr float kUint4[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

// Two codes in a byte, the first in its lower half.
inline void decode_halves(const uint8_t* codes, int64_t count, float* x, const float* values) {
  const Table16 table(values);
  int64_t i = 0;
  for (; i + 2 * kLanes <= count; i += 2 * kLanes) {
    const Ints both = widened_bytes(codes + i / 2);
    put_pairs({table[both & 15], table[both >> 4]}, x + i);
  }
  for (; i < count; ++i) x[i] = values[i % 2 ? codes[i / 2] >> 4 : codes[i / 2] & 15];
}

// Values [begin, begin + count) of a row, without their scales; begin is even.
void decode_elements(PackedElement element, const uint8_t* codes, int64_t begin, int64_t count,
                     float* x) {
  const uint8_t* bytes = codes + begin;
  switch (element) {
    case PackedElement::kInt8:
#pragma omp simd
      for (int64_t i = 0; i < count; ++i) x[i] = static_cast<float>(static_cast<int8_t>(bytes[i]));
      break;
    case PackedElement::kUint8:
#pragma omp simd
      for (int64_t i = 0; i < count; ++i) x[i] = static_cast<float>(bytes[i]);
      break;
    case PackedElement::kE4m3:
#pragma omp simd
      for (int64_t i = 0; i < count; ++i) x[i] = of_e4m3(bytes[i]);
      break;
    case PackedElement::kE2m1:
      decode_halves(codes + begin / 2, count, x, kE2m1);
      break;
    case PackedElement::kUint4:
      decode_halves(codes + begin / 2, count, x, kUint4);
      break;
  }
}

template <class T>
inline void round_to(const float* x, int64_t count, T* w) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) w[i] = store<T>(static_cast<acc_t<T>>(x[i]));
}

template <class T>
void decode_scaled_row(const DecodeScaledArgs& a, int64_t row, T* w) {
  const uint8_t* codes = a.codes + row * a.codes_stride;
  const float* scales = a.scale + row * a.scale_stride;
  const float* zeros = a.zero ? a.zero + row * a.zero_stride : nullptr;
  alignas(64) float x[kStrip];
  for (int64_t begin = 0; begin < a.cols; begin += kStrip) {
    const int64_t count = a.cols - begin < kStrip ? a.cols - begin : kStrip;
    decode_elements(static_cast<PackedElement>(a.element), codes, begin, count, x);
    int64_t group = begin / a.group, end = (group + 1) * a.group - begin;
    for (int64_t i = 0; i < count; ++group, end += a.group) {
      const int64_t stop = end < count ? end : count;
      const float scale = scales[group], zero = zeros ? zeros[group] : a.zero_of_all;
#pragma omp simd
      for (int64_t j = i; j < stop; ++j) x[j] = (x[j] - zero) * scale * a.factor;
      i = stop;
    }
    round_to(x, count, w + begin);
  }
}

inline float half_at(const uint8_t* at) {
  uint16_t bits;
  std::memcpy(&bits, at, sizeof bits);
  const uint32_t sign = (bits & 0x8000u) << 16, magnitude = bits & 0x7fffu;
  if (magnitude >= 0x7c00u) return float_of(sign | 0x7f800000u | magnitude << 13);
  if (magnitude < 0x400u) return with_sign(static_cast<float>(magnitude) * 0x1p-24f, sign);
  return float_of(sign | ((magnitude << 13) + (112u << 23)));
}

// GGUF's blocks: each decodes kValues values out of kBytes bytes, but for the minimum `least` of
// each kRun of them. That is added apart, so that the compiler does not round product and sum once.
struct Q8_0 {
  static constexpr int64_t kValues = 32, kBytes = 34;
  static void decode(const uint8_t* block, float* x, float*) {
    const float d = half_at(block);
#pragma omp simd
    for (int i = 0; i < 32; ++i) x[i] = static_cast<float>(static_cast<int8_t>(block[2 + i])) * d;
  }
};

// Q4_0, Q4_1, Q5_0 and Q5_1. kMinimum: whether codes are above m, or around 0.
template <int kBits, bool kMinimum>
struct Half32 {
  static constexpr int64_t kScales = kMinimum ? 4 : 2, kHigh = kBits == 5 ? 4 : 0;
  static constexpr int64_t kValues = 32, kBytes = kScales + kHigh + 16;
  static void decode(const uint8_t* block, float* x, float* least) {
    constexpr int32_t kMiddle = kMinimum ? 0 : 1 << (kBits - 1);
    const float d = half_at(block);
    if (kMinimum) *least = half_at(block + 2);
    uint32_t high = 0;
    if (kHigh) std::memcpy(&high, block + kScales, sizeof high);
    const uint8_t* halves = block + kScales + kHigh;
#pragma omp simd
    for (int i = 0; i < 16; ++i) {
      const int32_t first = (halves[i] & 15) | (high >> i & 1) << 4;
      const int32_t second = halves[i] >> 4 | (high >> (i + 16) & 1) << 4;
      x[i] = d * static_cast<float>(first - kMiddle);
      x[16 + i] = d * static_cast<float>(second - kMiddle);
    }
  }
};

// Q4_K and Q5_K.
template <int kBits>
struct Minima256 {
  static constexpr int64_t kHigh = kBits == 5 ? 32 : 0;
  static constexpr int64_t kValues = 256, kBytes = 16 + kHigh + 128;
  static void decode(const uint8_t* block, float* x, float* least) {
    const float d = half_at(block), m = half_at(block + 2);
    const uint8_t *six = block + 4, *high = block + 16, *halves = block + 16 + kHigh;
    for (int run = 0; run < 8; ++run) {
      const int i = run & 3;
      const int s = run < 4 ? six[i] & 63 : (six[8 + i] & 15) | six[i] >> 6 << 4;
      const int t = run < 4 ? six[4 + i] & 63 : six[8 + i] >> 4 | six[4 + i] >> 6 << 4;
      const float scale = d * static_cast<float>(s);
      least[run] = -(m * static_cast<float>(t));
      const uint8_t* bytes = halves + run / 2 * 32;
      const int shift = run % 2 * 4;
#pragma omp simd
      for (int j = 0; j < 32; ++j) {
        int32_t code = bytes[j] >> shift & 15;
        if (kHigh) code |= (high[j] >> run & 1) << 4;
        x[32 * run + j] = static_cast<float>(code) * scale;
      }
    }
  }
};

struct Q6_K {
  static constexpr int64_t kValues = 256, kBytes = 210;
  static void decode(const uint8_t* block, float* x, float*) {
    const float d = half_at(block + 208);
    for (int run = 0; run < 8; ++run) {  // of 32 values
      const int half = run / 4, place = run % 4;
      const uint8_t* low = block + 64 * half + 32 * (place % 2);
      const uint8_t* high = block + 128 + 32 * half;
      const int low_shift = place / 2 * 4, high_shift = 2 * place;
      for (int part = 0; part < 2; ++part) {
        const int8_t s = static_cast<int8_t>(block[192 + 2 * run + part]);
        const float scale = static_cast<float>(s) * d;
#pragma omp simd
        for (int i = 0; i < 16; ++i) {
          const int j = 16 * part + i;
          const int32_t code = (low[j] >> low_shift & 15) | (high[j] >> high_shift & 3) << 4;
          x[32 * run + j] = static_cast<float>(code - 32) * scale;
        }
      }
    }
  }
};

// Adds each run's minimum. Not inlined: see above.
__attribute__((noinline)) void add_minima(float* x, int64_t count, const float* least) {
  for (int64_t run = 0; run < count / kRun; ++run)
#pragma omp simd
    for (int64_t i = 0; i < kRun; ++i) x[run * kRun + i] += least[run];
}

template <class Block, bool kMinimum, class T>
void decode_blocks_as(const DecodeBlocksArgs& a) {
#pragma omp parallel for schedule(static)
  for (int64_t row = 0; row < a.rows; ++row) {
    const uint8_t* block = a.codes + row * a.codes_stride;
    T* w = static_cast<T*>(a.w) + row * a.stride;
    alignas(64) float x[kStrip], least[kStrip / kRun];
    for (int64_t begin = 0; begin < a.cols; begin += kStrip) {
      const int64_t count = a.cols - begin < kStrip ? a.cols - begin : kStrip;
      for (int64_t i = 0; i < count; i += Block::kValues, block += Block::kBytes)
        Block::decode(block, x + i, least + i / kRun);
      if (kMinimum) add_minima(x, count, least);
      round_to(x, count, w + begin);
    }
  }
}

template <class T>
void decode_blocks_of(const DecodeBlocksArgs& a) {
  switch (static_cast<GgufType>(a.type)) {
    case GgufType::kQ4_0:
      return decode_blocks_as<Half32<4, false>, false, T>(a);
    case GgufType::kQ4_1:
      return decode_blocks_as<Half32<4, true>, true, T>(a);
    case GgufType::kQ5_0:
      return decode_blocks_as<Half32<5, false>, false, T>(a);
    case GgufType::kQ5_1:
      return decode_blocks_as<Half32<5, true>, true, T>(a);
    case GgufType::kQ8_0:
      return decode_blocks_as<Q8_0, false, T>(a);
    case GgufType::kQ4_K:
      return decode_blocks_as<Minima256<4>, true, T>(a);
    case GgufType::kQ5_K:
      return decode_blocks_as<Minima256<5>, true, T>(a);
    case GgufType::kQ6_K:
      return decode_blocks_as<Q6_K, false, T>(a);
  }
}

}  // namespace

namespace LORA_ENGINE_ISA {

void decode_scaled(DType dtype, const DecodeScaledArgs& args) {
  dispatch(dtype, [&](auto t) {
    using T = decltype(t);
#pragma omp parallel for schedule(static)
    for (int64_t row = 0; row < args.rows; ++row)
      decode_scaled_row(args, row, static_cast<T*>(args.w) + row * args.stride);
  });
}

void decode_blocks(DType dtype, const DecodeBlocksArgs& args) {
  dispatch(dtype, [&](auto t) { decode_blocks_of<decltype(t)>(args); });
}

}  // namespace LORA_ENGINE_ISA
}  // namespace lora_engine
