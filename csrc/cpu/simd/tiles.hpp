// The tile registers of a matrix unit: eight of 16 rows of 64 bytes, that AMX-BF16 multiplies.
//
// A tile holds [16, 32] elements of bfloat16 of a left operand, as many of a right one, in pairs of
// rows (element (k, n) stands in row k / 2 at 2 n + k % 2), or [16, 16] sums in float32. With
// LORA_ENGINE_TILE_MODEL the registers are a model in memory, so that kernels made for them are
// tested on any processor.
#pragma once

#include <cstdint>
#include <cstring>

#include "numeric.hpp"

#if defined(__AMX_BF16__) || defined(LORA_ENGINE_TILE_MODEL)
#define LORA_ENGINE_TILES
#endif

namespace lora_engine {
namespace {

constexpr int64_t kUnitRows = 16;   // of a tile; also sums in a row
constexpr int64_t kUnitDepth = 32;  // elements that a tile of an operand has of the inner size

#ifdef LORA_ENGINE_TILES

constexpr int64_t kUnitBytes = 64;  // of a row
constexpr int kUnitTiles = 8;

#ifdef LORA_ENGINE_TILE_MODEL

struct ModelTile {
  alignas(64) unsigned char rows[kUnitRows][kUnitBytes];
};

inline ModelTile& model_tile(int number) {
  static thread_local ModelTile tiles[kUnitTiles];
  return tiles[number];
}

inline bool& model_configured() {
  static thread_local bool configured = false;
  return configured;
}

// The model's registers, used outside the scope of a MatrixUnit: the processor would raise SIGILL.
inline ModelTile& used_tile(int number) {
  if (!model_configured()) __builtin_trap();
  return model_tile(number);
}

// Tiles can be used while one exists in this thread; there may be one at a time.
struct MatrixUnit {
  MatrixUnit() {
    if (model_configured()) __builtin_trap();
    model_configured() = true;
    for (int i = 0; i < kUnitTiles; ++i) std::memset(&model_tile(i), 0, sizeof(ModelTile));
  }
  ~MatrixUnit() { model_configured() = false; }
  MatrixUnit(const MatrixUnit&) = delete;
  MatrixUnit& operator=(const MatrixUnit&) = delete;
};

template <int kTile>
inline void tile_zero() {
  std::memset(&used_tile(kTile), 0, sizeof(ModelTile));
}
template <int kTile>
inline void tile_load(const void* from, int64_t stride) {
  for (int64_t i = 0; i < kUnitRows; ++i)
    std::memcpy(used_tile(kTile).rows[i], static_cast<const char*>(from) + i * stride, kUnitBytes);
}
template <int kTile>
inline void tile_store(void* to, int64_t stride) {
  for (int64_t i = 0; i < kUnitRows; ++i)
    std::memcpy(static_cast<char*>(to) + i * stride, used_tile(kTile).rows[i], kUnitBytes);
}
template <int kSums, int kLeft, int kRight>
inline void tile_multiply_add() {
  float sums[kUnitRows][kUnitRows];
  bf16 left[kUnitRows][kUnitDepth], right[kUnitRows][kUnitDepth];
  std::memcpy(sums, used_tile(kSums).rows, sizeof sums);
  std::memcpy(left, used_tile(kLeft).rows, sizeof left);
  std::memcpy(right, used_tile(kRight).rows, sizeof right);
  for (int64_t i = 0; i < kUnitRows; ++i)
    for (int64_t k = 0; k < kUnitRows; ++k)
      for (int64_t part = 0; part < 2; ++part)
        for (int64_t j = 0; j < kUnitRows; ++j)
          sums[i][j] += load(left[i][2 * k + part]) * load(right[k][2 * j + part]);
  std::memcpy(used_tile(kSums).rows, sums, sizeof sums);
}

#else

struct MatrixUnit {
  MatrixUnit() {
    struct alignas(64) Configuration {
      uint8_t palette, start_row, reserved[14];
      uint16_t row_bytes[16];
      uint8_t rows[16];
    };
    Configuration c{};
    c.palette = 1;
    for (int i = 0; i < kUnitTiles; ++i) {
      c.row_bytes[i] = kUnitBytes;
      c.rows[i] = kUnitRows;
    }
    asm volatile("ldtilecfg %0" ::"m"(c));
  }
  ~MatrixUnit() { asm volatile("tilerelease"); }
  MatrixUnit(const MatrixUnit&) = delete;
  MatrixUnit& operator=(const MatrixUnit&) = delete;
};

template <int kTile>
inline void tile_zero() {
  asm volatile("tilezero %%tmm%c0" ::"i"(kTile));
}
template <int kTile>
inline void tile_load(const void* from, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(kTile) : "memory");
}
template <int kTile>
inline void tile_store(void* to, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(kTile) : "memory");
}
template <int kSums, int kLeft, int kRight>
inline void tile_multiply_add() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kSums), "i"(kLeft), "i"(kRight));
}

#endif

#else

struct MatrixUnit {};

#endif

}  // namespace
}  // namespace lora_engine
