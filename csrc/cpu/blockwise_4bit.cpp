// NF4 and FP4: codes of four bits, and a scale for each block of consecutive values.
#include <cmath>

#include "isa.hpp"
#include "simd/pairs.hpp"

namespace lora_engine {
namespace {

constexpr float kTiny = 1e-38f;  // TINY of lora_engine/quantization/blockwise_4bit.py
constexpr int64_t kNestedBlock = 256;
typedef uint8_t Bytes __attribute__((vector_size(16)));

// How many of 15 ascending bounds are below a value: its place among 16 ascending values.
class Places {
 public:
  explicit Places(const float* bounds) : bounds_(bounds), half_(bounds[7]) {
    for (int bit = 0; bit < 3; ++bit)
      for (int i = 0; i < kLanes; ++i) tables_[bit][i] = bounds[bound_of(bit, i)];
  }

  // By halves: each comparison decides one bit of the place, from the highest.
  Ints operator()(Floats x) const {
    Ints place = (x > half_) & 8;
    place |= (x > bounds_at(place, 2)) & 4;
    place |= (x > bounds_at(place, 1)) & 2;
    return place | ((x > bounds_at(place, 0)) & 1);
  }
  int32_t operator()(float x) const {
    int32_t place = 0;
    for (int i = 0; i < 15; ++i) place += x > bounds_[i];
    return place;
  }

 private:
  // Whether a register holds a bound for each place; if not, it holds those of even places.
  static constexpr bool kWide = kLanes >= 16;

  // The bound that decides `bit`, once the higher bits of a place are known.
  static int bound_of(int bit, int entry) {
    const int place = (kWide ? entry : entry << (bit + 1)) & (14 << bit) & 15;
    return place + (1 << bit) - 1;
  }
  Floats bounds_at(Ints place, int bit) const {
    return __builtin_shuffle(tables_[bit], kWide ? place : place >> (bit + 1));
  }

  const float* bounds_;
  float half_;
  Floats tables_[3];  // by bit
};

#ifdef __AVX512F__
// Places among bounds of which equal parts of [-1, 1] hold at most one each, as NF4's: the part
// tells the bound to compare with, and how many lie below the part.
class Parts {
 public:
  // Whether such parts hold these bounds, none of them so near an edge that rounding matters.
  static bool hold(const float* bounds) {
    for (int i = 0; i < 15; ++i) {
      const float at = bounds[i] * kScale, edge = std::abs(at - std::nearbyint(at));
      const bool alone = i == 0 || part_of(bounds[i]) != part_of(bounds[i - 1]);
      if (std::abs(at) > kScale || edge > 0.49f || !alone) return false;
    }
    return true;
  }
  explicit Parts(const float* bounds) {
    for (int part = -16; part < 16; ++part) {
      int below = 0;
      while (below < 15 && part_of(bounds[below]) < part) ++below;
      const bool has_one = below < 15 && part_of(bounds[below]) == part;
      below_[(part & 31) / 16][part & 15] = below;
      bounds_[(part & 31) / 16][part & 15] = has_one ? bounds[below] : INFINITY;
    }
  }
  Ints operator()(Floats x) const {
    // Rounded to an integer by the addition, whose low bits are then the part's.
    const Ints part = (Ints)(x * kScale + 0x1.8p23f);
    const Ints below = __builtin_shuffle(below_[0], below_[1], part);
    return below + ((x > __builtin_shuffle(bounds_[0], bounds_[1], part)) & 1);
  }

 private:
  static constexpr float kScale = 15;
  static int part_of(float x) { return static_cast<int>(std::nearbyint(x * kScale)); }
  Ints below_[2];     // by part, the negative ones last
  Floats bounds_[2];  // infinite where a part has none
};
#endif

// The largest of a register's lanes, by halves.
template <class Lanes, int kStep = sizeof(Lanes) / sizeof(Lanes{}[0]) / 2>
inline auto largest_lane(Lanes lanes) {
  if constexpr (kStep == 0) {
    return lanes[0];
  } else {
    Lanes partners;
    for (size_t i = 0; i < sizeof lanes / sizeof lanes[0]; ++i) partners[i] = i ^ kStep;
    const Lanes others = __builtin_shuffle(lanes, partners);
    return largest_lane<Lanes, kStep / 2>(others > lanes ? others : lanes);
  }
}

// Bits without the sign. As integers they are ordered as the magnitudes are, NaN's the largest.
inline uint16_t magnitude(bf16 x) { return x.bits & 0x7fff; }
template <class T>
inline uint32_t magnitude(T x) {
  return bits_of(static_cast<float>(x)) & 0x7fffffffu;
}
inline float of_magnitude(uint16_t bits) { return float_of(static_cast<uint32_t>(bits) << 16); }
inline float of_magnitude(uint32_t bits) { return float_of(bits); }

// Those of 2 kLanes elements; of wider types than bfloat16 the larger of two and two.
typedef uint16_t Shorts __attribute__((vector_size(kRegisterBytes)));
inline Shorts magnitudes(const bf16* x) {
  Shorts bits;
  std::memcpy(&bits, x, sizeof bits);
  return bits & 0x7fff;
}
template <class T>
inline Words magnitudes(const T* x) {
  const Pairs pairs = pairs_at(x);
  const Words even = (Words)pairs.even & 0x7fffffffu, odd = (Words)pairs.odd & 0x7fffffffu;
  return even > odd ? even : odd;
}

// The largest magnitude; NaN if there is one.
template <class T>
float largest_magnitude(const T* x, int64_t count) {
  using Lanes = decltype(magnitudes(x));
  Lanes most = {};
  int64_t i = 0;
  for (; i + 2 * kLanes <= count; i += 2 * kLanes) {
    const Lanes next = magnitudes(x + i);
    most = next > most ? next : most;
  }
  auto largest = largest_lane(most);
  for (; i < count; ++i) {
    const auto next = magnitude(x[i]);
    largest = next > largest ? next : largest;
  }
  return of_magnitude(largest);
}

// A full block: values times 1 / absmax. `place` is a copy, whose tables stay in registers: in
// memory of another's they would have to be read again after each byte that is stored.
template <class T, class Place>
float quantize_block(const T* x, int64_t count, Place place, uint8_t* codes) {
  const float absmax = largest_magnitude(x, count);
  const float inverse = 1.0f / (absmax > kTiny ? absmax : kTiny);
  for (int64_t i = 0; i < count; i += 2 * kLanes) {
    const Pairs pairs = pairs_at(x + i);
    const Ints both = place(pairs.even * inverse) << 4 | place(pairs.odd * inverse);
    const LaneBytes bytes = __builtin_convertvector(both, LaneBytes);
    std::memcpy(codes + i / 2, &bytes, sizeof bytes);
  }
  return absmax;
}

// A last block that is not full: values divided by absmax; a zero fills an odd last byte.
template <class T>
float quantize_rest(const T* x, int64_t count, const Places& place, uint8_t* codes) {
  const float largest = largest_magnitude(x, count);
  const float absmax = largest < kTiny ? kTiny : largest;
  for (int64_t i = 0; i < count; i += 2) {
    const float even = static_cast<float>(load(x[i])) / absmax;
    const float odd = i + 1 < count ? static_cast<float>(load(x[i + 1])) / absmax : 0.0f;
    codes[i / 2] = static_cast<uint8_t>(place(even) << 4 | place(odd));
  }
  return absmax;
}

// Places of `count` pairs to the codes of those places.
inline void recode(uint8_t* pairs, int64_t count, const uint8_t* code_of) {
  Bytes table;
  std::memcpy(&table, code_of, sizeof table);
  int64_t i = 0;
  for (; i + 16 <= count; i += 16) {
    Bytes both;
    std::memcpy(&both, pairs + i, sizeof both);
    both = __builtin_shuffle(table, both >> 4) << 4 | __builtin_shuffle(table, both & 15);
    std::memcpy(pairs + i, &both, sizeof both);
  }
  for (; i < count; ++i)
    pairs[i] = static_cast<uint8_t>(code_of[pairs[i] >> 4] << 4 | code_of[pairs[i] & 15]);
}

// `place` is for full blocks, `places` for the last one.
template <class T, class Place>
void quantize_with(const Quantize4bitArgs& a, const Place& place, const Places& places) {
  bool ascending = true;
  for (int i = 0; i < 16; ++i) ascending &= a.ascending[i] == i;
  const int64_t blocks = (a.size + a.block - 1) / a.block;
#pragma omp parallel for schedule(static)
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t begin = block * a.block, rest = a.size - begin;
    const T* x = static_cast<const T*>(a.w) + begin;
    uint8_t* codes = a.codes + begin / 2;
    const int64_t count = rest < a.block ? rest : a.block;
    a.absmax[block] = count == a.block ? quantize_block(x, count, place, codes)
                                       : quantize_rest(x, count, places, codes);
    if (!ascending) recode(codes, (count + 1) / 2, a.ascending);
  }
}

template <class T>
void quantize(const Quantize4bitArgs& a) {
  const Places places(a.bounds);
#ifdef __AVX512F__
  if (Parts::hold(a.bounds)) return quantize_with<T>(a, Parts(a.bounds), places);
#endif
  quantize_with<T>(a, places, places);
}

// Scales of blocks: absmax, or what its own codes stand for.
class Scales {
 public:
  explicit Scales(const Dequantize4bitArgs& a)
      : absmax_(a.absmax),
        nested_absmax_(a.nested_absmax),
        nested_code_(a.nested_code),
        offset_(a.offset ? *a.offset : 0.0f) {}
  float operator[](int64_t block) const {
    if (!nested_absmax_) return static_cast<const float*>(absmax_)[block];
    const uint8_t code = static_cast<const uint8_t*>(absmax_)[block];
    // Rounded before the sum: the compiler must not fuse them.
    volatile float product = nested_code_[code] * nested_absmax_[block / kNestedBlock];
    return product + offset_;
  }

 private:
  const void* absmax_;
  const float *nested_absmax_, *nested_code_;
  float offset_;
};

// The 16 values of a block, rounded to T once for the whole block, and the codes' way to them.
template <class T>
class BlockValues {
 public:
  BlockValues(const float* values, float scale) {
    for (int i = 0; i < 16; ++i) at_[i] = store<T>(static_cast<acc_t<T>>(values[i] * scale));
  }
  T operator[](int code) const { return at_[code]; }

  // Writes the values of kStep codes.
  void put(const uint8_t* codes, T* w) const {
    for (int64_t i = 0; i < kStep / 2; ++i) {
      w[2 * i] = at_[codes[i] >> 4];
      w[2 * i + 1] = at_[codes[i] & 15];
    }
  }
  static constexpr int64_t kStep = 2;

 private:
  T at_[16];
};

// float32: every lane looks up its value.
template <>
class BlockValues<float> {
 public:
  BlockValues(const float* values, float scale) {
    for (int part = 0; part < 16 / kLanes; ++part) {
      Floats x;
      std::memcpy(&x, values + part * kLanes, sizeof x);
      x *= scale;
      std::memcpy(at_ + part * kLanes, &x, sizeof x);
    }
  }
  float operator[](int code) const { return at_[code]; }

  void put(const uint8_t* codes, float* w) const {
    const Ints both = widened_bytes(codes);
    const Table16 table(at_);
    put_pairs({table[both >> 4], table[both & 15]}, w);
  }
  static constexpr int64_t kStep = 2 * kLanes;

 private:
  alignas(64) float at_[16];
};

// bfloat16: a register of 32 lanes of 16 bits looks them up at once; without AVX-512, lower and
// upper bytes are looked up apart, by the shuffle of 16 bytes.
template <>
class BlockValues<bf16> {
 public:
  BlockValues(const float* values, float scale) {
    for (int part = 0; part < 16 / kLanes; ++part) {
      Floats x;
      std::memcpy(&x, values + part * kLanes, sizeof x);
      const Words rounded = rounded_bits((Words)(x * scale)) >> 16;
      const auto halves = __builtin_convertvector(rounded, HalfWords);
      std::memcpy(at_ + part * kLanes, &halves, sizeof halves);
    }
#ifdef __AVX512F__
    std::memcpy(&table_, at_, sizeof at_);
#else
    Bytes both[2];
    std::memcpy(both, at_, sizeof both);
    const Bytes lower = {0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30};
    low_ = __builtin_shuffle(both[0], both[1], lower);
    high_ = __builtin_shuffle(both[0], both[1], lower + 1);
#endif
  }
  bf16 operator[](int code) const { return bf16{at_[code]}; }

#ifdef __AVX512F__
  void put(const uint8_t* codes, bf16* w) const {
    const Words both = (Words)widened_bytes(codes);
    const Wide result = __builtin_shuffle(table_, (Wide)(both >> 4 | (both & 15) << 16));
    std::memcpy(w, &result, sizeof result);
  }
#else
  void put(const uint8_t* codes, bf16* w) const {
    Bytes bytes;
    std::memcpy(&bytes, codes, sizeof bytes);
    const Bytes first = bytes >> 4, second = bytes & 15;
    const Bytes front = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23};
    const Bytes codes_of[2] = {__builtin_shuffle(first, second, front),
                               __builtin_shuffle(first, second, front + 8)};
    for (int half = 0; half < 2; ++half) {
      const Bytes low = __builtin_shuffle(low_, codes_of[half]);
      const Bytes high = __builtin_shuffle(high_, codes_of[half]);
      const Bytes values[2] = {__builtin_shuffle(low, high, front),
                               __builtin_shuffle(low, high, front + 8)};
      std::memcpy(w + 16 * half, values, sizeof values);
    }
  }
#endif
  static constexpr int64_t kStep = 32;

 private:
  typedef uint16_t HalfWords __attribute__((vector_size(2 * kLanes)));
  alignas(64) uint16_t at_[16];
#ifdef __AVX512F__
  typedef uint16_t Wide __attribute__((vector_size(64)));
  Wide table_ = {};
#else
  Bytes low_, high_;
#endif
};

// Values [begin, end) of the weight, all of one block.
template <class T>
inline void dequantize_run(const uint8_t* codes, int64_t begin, int64_t end,
                           const BlockValues<T>& values, T* w) {
  constexpr int64_t kStep = BlockValues<T>::kStep;
  int64_t i = begin;
  if (i % 2) *w++ = values[codes[i++ / 2] & 15];
  for (; i + kStep <= end; i += kStep, w += kStep) values.put(codes + i / 2, w);
  for (; i < end; ++i) *w++ = values[i % 2 ? codes[i / 2] & 15 : codes[i / 2] >> 4];
}

// A row that begins with value `first` of the weight.
template <class T>
void dequantize_row(const Dequantize4bitArgs& a, int64_t first, T* w) {
  constexpr int64_t kStep = BlockValues<T>::kStep;
  const Scales scales(a);
  const uint8_t* codes = a.codes;
  const float* values = a.values;
  const int64_t size = a.block, last = first + a.cols;
  int64_t block = first / size, begin = first;
  for (; begin < last; ++block) {
    const int64_t next = (block + 1) * size, end = next < last ? next : last;
    const BlockValues<T> of_block(values, scales[block]);
    if (end - begin == size && size % kStep == 0)
      for (int64_t i = begin; i < end; i += kStep) of_block.put(codes + i / 2, w + (i - first));
    else
      dequantize_run(codes, begin, end, of_block, w + (begin - first));
    begin = end;
  }
}

template <class T>
void dequantize(const Dequantize4bitArgs& a) {
#pragma omp parallel for schedule(static)
  for (int64_t row = 0; row < a.rows; ++row)
    dequantize_row(a, a.first + row * a.cols, static_cast<T*>(a.w) + row * a.stride);
}

}  // namespace

namespace LORA_ENGINE_ISA {

void quantize_4bit(DType dtype, const Quantize4bitArgs& args) {
  dispatch(dtype, [&](auto t) { quantize<decltype(t)>(args); });
}

void dequantize_4bit(DType dtype, const Dequantize4bitArgs& args) {
  dispatch(dtype, [&](auto t) { dequantize<decltype(t)>(args); });
}

}  // namespace LORA_ENGINE_ISA
}  // namespace lora_engine
