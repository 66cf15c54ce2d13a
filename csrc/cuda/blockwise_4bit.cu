// NF4 and FP4: codes of four bits, and a scale for each block of consecutive values. Tables are
// kept by a warp's lanes and looked up with shuffles, whose index is the lowest five bits of a
// register.
#include "elements.cuh"
#include "launchers.hpp"

namespace lora_engine {
namespace cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kRows = 4;           // of W that a warp decodes at a time: so many loads under way
constexpr int kResident = 4;       // blocks of the encoder on a multiprocessor: 64 registers
constexpr int64_t kSpan = 32 * 8;  // values that a warp encodes at a time
constexpr int kNestedBits = 8;     // 256 scales share an absmax of their own
constexpr float kTiny = 1e-38f;    // TINY of lora_engine/quantization/blockwise_4bit.py

// Scales of the blocks of kRows groups: absmax, or what its own codes stand for. All loads of one
// kind come first: each waits for memory once.
template <bool kNested>
__device__ void load_scales(const void* __restrict__ absmax,
                            const float* __restrict__ nested_absmax,
                            const float* __restrict__ nested_code, const float* __restrict__ offset,
                            const int64_t (&block)[kRows], float (&scale)[kRows]) {
  if (kNested) {
    float nested[kRows];
    uint8_t code[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      code[r] = static_cast<const uint8_t*>(absmax)[block[r]];
      nested[r] = nested_absmax[block[r] >> kNestedBits];
    }
    const float mean = *offset;
#pragma unroll
    for (int r = 0; r < kRows; ++r) scale[r] = nested_code[code[r]];
    // Rounded before the sum: not fused.
#pragma unroll
    for (int r = 0; r < kRows; ++r) scale[r] = __fadd_rn(__fmul_rn(scale[r], nested[r]), mean);
  } else {
#pragma unroll
    for (int r = 0; r < kRows; ++r) scale[r] = static_cast<const float*>(absmax)[block[r]];
  }
}

// The codes of a group of 8 or 4 values; a single code may have others above its four bits.
template <int kGroup>
__device__ uint32_t group_codes(const uint8_t* codes, int64_t group) {
  if (kGroup == 8) return reinterpret_cast<const uint32_t*>(codes)[group];
  if (kGroup == 4) return reinterpret_cast<const uint16_t*>(codes)[group];
  return codes[group / 2] >> (group % 2 ? 0 : 4);
}

__device__ void store_group(float* to, const float (&x)[4]) { store_vector(to, x); }
template <class T>
__device__ void store_group(T* to, const float (&x)[8]) {
  store_vector(to, x);
}
template <class T>
__device__ void store_group(T* to, const float (&x)[1]) {
  *to = rounded(T{}, x[0]);
}

// w = values[code] * scale. A warp takes kRows rows of 32 groups, a lane a group of each; a group
// lies in one block. Lanes i and i + 16 hold the value of code i, so that a shuffle's fifth bit, of
// the next code, does not matter. What is outside of W reads its last row or column again.
template <class T, int kGroup, bool kNested>
__global__ void __launch_bounds__(kThreads)
    dequantize_4bit_kernel(const uint8_t* __restrict__ codes,        // [values / 2]
                           const void* __restrict__ absmax,          // [blocks]
                           const float* __restrict__ nested_absmax,  // [blocks / 256]
                           const float* __restrict__ nested_code,    // [256]
                           const float* __restrict__ offset,         // []
                           const float* __restrict__ values,         // [16]
                           T* __restrict__ w,                        // [rows, groups * kGroup]
                           int64_t rows, int64_t groups, int64_t stride, int64_t first,
                           int block_bits, unsigned across, unsigned tiles) {
  const unsigned tile = blockIdx.x * kWarps + threadIdx.x / 32, lane = threadIdx.x % 32;
  if (tile >= tiles) return;
  const float value_of_lane = values[lane % 16];
  const int64_t top = static_cast<int64_t>(tile / across) * kRows;
  const int64_t column = static_cast<int64_t>(tile % across) * 32 + lane;
  const int64_t inside = column < groups ? column : groups - 1;
  uint32_t word[kRows];
  int64_t block[kRows];
  float scale[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const int64_t row = top + r < rows ? top + r : rows - 1;
    const int64_t group = first + row * groups + inside;
    word[r] = group_codes<kGroup>(codes, group);
    block[r] = group * kGroup >> block_bits;
  }
  load_scales<kNested>(absmax, nested_absmax, nested_code, offset, block, scale);
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    float x[kGroup];
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      const int bits = kGroup == 1 ? 0 : 4 * (i ^ 1);  // a byte's upper half comes first
      x[i] = __fmul_rn(__shfl_sync(kFullWarp, value_of_lane, word[r] >> bits), scale[r]);
    }
    if (top + r < rows && column < groups) store_group(w + (top + r) * stride + column * kGroup, x);
  }
}

template <class T, int kGroup>
void dequantize(const Dequantize4bitArgs& a, int block_bits, void* stream) {
  const int64_t groups = a.cols / kGroup, across = ceil_div(groups, 32);
  const int64_t tiles = across * ceil_div(a.rows, kRows);
  if (tiles >= int64_t{1} << 31) throw std::runtime_error("dequantize_4bit: too many values");
  const auto kernel = a.nested_absmax ? dequantize_4bit_kernel<T, kGroup, true>
                                      : dequantize_4bit_kernel<T, kGroup, false>;
  launch("dequantize_4bit", kernel, static_cast<unsigned>(ceil_div(tiles, kWarps)), kThreads, 0,
         stream, a.codes, a.absmax, a.nested_absmax, a.nested_code, a.offset, a.values,
         static_cast<T*>(a.w), a.rows, groups, a.stride, a.first / kGroup, block_bits,
         static_cast<unsigned>(across), static_cast<unsigned>(tiles));
}

template <class T>
void dequantize_any(const Dequantize4bitArgs& a, void* stream) {
  constexpr int kGroup = kVector<T>;
  int block_bits = 0;
  while (int64_t{1} << block_bits < a.block) ++block_bits;
  const bool is_aligned = a.cols % kGroup == 0 && a.stride % kGroup == 0 && a.first % kGroup == 0 &&
                          aligned(a.w, 16) && aligned(a.codes, kGroup / 2);
  if (is_aligned)
    dequantize<T, kGroup>(a, block_bits, stream);
  else
    dequantize<T, 1>(a, block_bits, stream);
}

// The code of the value nearest to x in [-1, 1]: the number of 15 ascending bounds below x, as a
// place among the codes in the order of their values.
class Codes {
 public:
  __device__ Codes(const float* bounds, const uint8_t* ascending, int lane) {
    by_place_ = ascending[lane % 16];
    at_place_ = bounds[lane % 16 < 15 ? lane % 16 : 0];
    half_ = bounds[7];
    lower_ = bounds[3];
    upper_ = bounds[11];
    // Of equal parts of [-1, 1] the lane's own: its bound, and the codes below and above that.
    const int part = lane < 16 ? lane : lane - 32;
    int below = 0;
    bool has_one = false, fit = true;
    for (int i = 0; i < 15; ++i) {
      const float at = bounds[i] * kParts, nearest = rintf(at);
      below += nearest < part;
      has_one = has_one || nearest == part;
      fit = fit && fabsf(at) <= kParts && fabsf(at - nearest) <= 0.49f &&
            (i == 0 || rintf(bounds[i - 1] * kParts) != nearest);
    }
    by_parts_ = __shfl_sync(kFullWarp, fit, 0);
    in_part_ = has_one ? bounds[below] : INFINITY;
    of_part_ = ascending[below] | ascending[below < 15 ? below + 1 : 15] << 4;
  }

  // Whether there is at most one bound in each part, the same for the whole warp. It comes from one
  // lane, so that the compiler knows.
  __device__ bool by_parts() const { return by_parts_; }

  // Every lane of the warp calls it.
  template <bool kByParts>
  __device__ uint32_t of(float x) const {
    if (kByParts) {
      // Rounded to an integer by the addition, whose lowest bits are then the part's.
      const uint32_t part = __float_as_uint(fmaf(x, kParts, 12582912.0f));
      const uint32_t codes = __shfl_sync(kFullWarp, of_part_, part);
      return x > __shfl_sync(kFullWarp, in_part_, part) ? codes >> 4 : codes & 15;
    }
    uint32_t place = x > half_ ? 8 : 0;
    place += x > (place ? upper_ : lower_) ? 4 : 0;
    place += x > __shfl_sync(kFullWarp, at_place_, place + 1) ? 2 : 0;
    place += x > __shfl_sync(kFullWarp, at_place_, place) ? 1 : 0;
    return __shfl_sync(kFullWarp, by_place_, place);
  }

 private:
  // NF4's bounds are at least 1 / 15 apart, none of them so near a part's edge that rounding
  // matters; FP4's are not.
  static constexpr float kParts = 15;
  float at_place_, half_, lower_, upper_, in_part_;
  uint32_t by_place_, of_part_;
  bool by_parts_;
};

template <bool kWhole, class T>
__device__ void load_values(const T* w, int64_t rest, float (&x)[8]) {
  if (kWhole) {
    load_eight(w, x);
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) x[i] = i < rest ? widened(w[i]) : 0.0f;
  }
}

// A warp's span: a block of at least kSpan values, or as many smaller ones as kSpan holds. `begin`
// is its first value. Where kWhole is false it ends with the weight, perhaps within a block.
template <bool kWhole, bool kByParts, class T>
__device__ void quantize_span(const T* __restrict__ w, const Codes& code_of,
                              uint8_t* __restrict__ codes, float* __restrict__ absmax,
                              int64_t begin, int64_t size, int block_bits) {
  const int64_t block = int64_t{1} << block_bits;
  const int steps = block > kSpan ? static_cast<int>(block / kSpan) : 1;
  const int lanes = block > kSpan ? 32 : static_cast<int>(block / 8);  // of a block
  const int64_t mine = begin + threadIdx.x % 32 * 8;
  float x[8];
  uint32_t most = 0;
  for (int step = 0; step < steps; ++step) {
    const int64_t at = mine + step * kSpan;
    load_values<kWhole>(w + at, size - at, x);
    // As integers magnitudes are ordered as they are, those of NaN above all.
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const uint32_t magnitude = __float_as_uint(x[i]) & 0x7fffffffu;
      most = magnitude > most ? magnitude : most;
    }
  }
  for (int away = lanes / 2; away; away /= 2) {
    const uint32_t other = __shfl_xor_sync(kFullWarp, most, away);
    most = other > most ? other : most;
  }
  const float largest = __uint_as_float(most), divisor = largest < kTiny ? kTiny : largest;
  const float inverse = __fdiv_rn(1.0f, divisor);
  // A last block that is not full is divided, and has no scale of zero.
  const bool is_full = kWhole || ((mine >> block_bits) + 1) << block_bits <= size;
  if ((mine & (block - 1)) == 0 && (kWhole || mine < size))
    absmax[mine >> block_bits] = is_full ? largest : divisor;
  for (int step = 0; step < steps; ++step) {
    const int64_t at = mine + step * kSpan;
    if (steps > 1) load_values<kWhole>(w + at, size - at, x);
    uint32_t word = 0;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float scaled = is_full ? __fmul_rn(x[i], inverse) : __fdiv_rn(x[i], divisor);
      word |= code_of.of<kByParts>(scaled) << 4 * (i ^ 1);  // a byte's upper half comes first
    }
    if (kWhole) {
      *reinterpret_cast<uint32_t*>(codes + at / 2) = word;
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if (at + 2 * i < size) codes[at / 2 + i] = static_cast<uint8_t>(word >> 8 * i);
    }
  }
}

// absmax = max |w| over a block, code = that of the value nearest to w / absmax.
template <class T>
__global__ void __launch_bounds__(kThreads, kResident)
    quantize_4bit_kernel(const T* __restrict__ w,                // [size]
                         const float* __restrict__ bounds,       // [15]
                         const uint8_t* __restrict__ ascending,  // [16]
                         uint8_t* __restrict__ codes,            // [size / 2]
                         float* __restrict__ absmax,             // [blocks]
                         int64_t size, int block_bits, bool is_aligned) {
  const Codes code_of(bounds, ascending, threadIdx.x % 32);
  const unsigned warp_of_block = __shfl_sync(kFullWarp, threadIdx.x / 32, 0);
  const int64_t block = int64_t{1} << block_bits, span = block > kSpan ? block : kSpan;
  for (int64_t warp = static_cast<int64_t>(blockIdx.x) * kWarps + warp_of_block; warp * span < size;
       warp += static_cast<int64_t>(gridDim.x) * kWarps) {
    // The branch is the same for the whole warp: its lanes take part in the same shuffles.
    if (!is_aligned || (warp + 1) * span > size)
      quantize_span<false, false>(w, code_of, codes, absmax, warp * span, size, block_bits);
    else if (code_of.by_parts())
      quantize_span<true, true>(w, code_of, codes, absmax, warp * span, size, block_bits);
    else
      quantize_span<true, false>(w, code_of, codes, absmax, warp * span, size, block_bits);
  }
}

template <class T>
void quantize(const Quantize4bitArgs& a, void* stream) {
  if (!a.size) return;
  int block_bits = 0;
  while (int64_t{1} << block_bits < a.block) ++block_bits;
  const int64_t span = a.block > kSpan ? a.block : kSpan;
  const int64_t wanted = ceil_div(ceil_div(a.size, span), kWarps);
  const int64_t most = static_cast<int64_t>(multiprocessors("quantize_4bit")) * kResident;
  launch("quantize_4bit", quantize_4bit_kernel<T>,
         static_cast<unsigned>(wanted < most ? wanted : most), kThreads, 0, stream,
         static_cast<const T*>(a.w), a.bounds, a.ascending, a.codes, a.absmax, a.size, block_bits,
         aligned(a.w, 16) && aligned(a.codes, 4));
}

// Calls `run` with an element of the dtype.
template <class Run>
void dispatch(const char* name, int64_t dtype, const Run& run) {
  if (dtype == kFloat32) return run(float{});
  if (dtype == kBFloat16) return run(BFloat16{});
  if (dtype == kFloat16) return run(Float16{});
  throw std::runtime_error(std::string(name) + ": there is no kernel for this dtype");
}

}  // namespace

void quantize_4bit(const Quantize4bitArgs& a, void* stream) {
  dispatch("quantize_4bit", a.dtype, [&](auto t) { quantize<decltype(t)>(a, stream); });
}

void dequantize_4bit(const Dequantize4bitArgs& a, void* stream) {
  if (!a.rows || !a.cols) return;
  dispatch("dequantize_4bit", a.dtype, [&](auto t) { dequantize_any<decltype(t)>(a, stream); });
}

}  // namespace cuda
}  // namespace lora_engine
