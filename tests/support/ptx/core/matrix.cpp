// Matrices of 8 by 8 in shared memory, and mma.sync.
#include <cstring>

#include "elements.hpp"
#include "memory.hpp"

namespace ptx {
namespace {

// Lane l holds elements 2 (l % 4) and the next of row l / 4 of a matrix; lanes 8 i to 8 i + 7 give
// the addresses of the rows of matrix i.
Action matrix_access(const Op& op) {
  const bool loads = op.base() == "ldmatrix";
  if (!op.only({"sync", "aligned", "m8n8", "x1", "x2", "x4", "trans", "shared", "shared::cta"}) ||
      op.type() != "b16" || !op.has("m8n8"))
    return nullptr;
  const bool transposed = op.has("trans");
  const int count = op.has("x4") ? 4 : op.has("x2") ? 2 : 1;
  const Address address(op[loads ? 1 : 0]);
  const Operand& list = op[loads ? 0 : 1];
  std::vector<uint32_t> registers;
  if (list.kind == Kind::kVector)
    registers = register_offsets(list);
  else
    registers = {list.offset};
  if (static_cast<int>(registers.size()) != count) throw Fault("a register for each matrix");
  const Space space = op.has("shared") || op.has("shared::cta") ? Space::kShared : Space::kGeneric;
  return [=](Warp& warp, Mask mask) {
    if (misses(warp, mask, kAll)) return Outcome::kWait;
    uint64_t rows[kLanes];
    for (int l = 0; l < 8 * count; ++l) rows[l] = address.get(warp, l);
    for (int i = 0; i < count; ++i) {
      uint16_t matrix[8][8];
      uint32_t* words = warp.lanes<uint32_t>(registers[static_cast<size_t>(i)]);
      const auto place = [&](int lane, int half) -> uint16_t& {
        const int row = lane / 4, column = 2 * (lane % 4) + half;
        return transposed ? matrix[column][row] : matrix[row][column];
      };
      for (int r = 0; loads && r < 8; ++r)
        std::memcpy(matrix[r], locate(warp, r, space, rows[8 * i + r], 16), 16);
      for (int l = 0; l < kLanes; ++l) {
        if (loads) {
          words[l] = place(l, 0) | uint32_t{place(l, 1)} << 16;
        } else {
          place(l, 0) = static_cast<uint16_t>(words[l]);
          place(l, 1) = static_cast<uint16_t>(words[l] >> 16);
        }
      }
      for (int r = 0; !loads && r < 8; ++r) {
        std::memcpy(locate(warp, r, space, rows[8 * i + r], 16), matrix[r], 16);
        note_write(warp, space, rows[8 * i + r], 16);
      }
    }
    return Outcome::kDone;
  };
}

Action movmatrix(const Op& op) {
  if (!op.only({"sync", "aligned", "m8n8", "trans"}) || op.type() != "b16") return nullptr;
  const Target<uint32_t> d(op[0]);
  const Source<uint32_t> a(op[1]);
  return [=](Warp& warp, Mask mask) {
    if (misses(warp, mask, kAll)) return Outcome::kWait;
    uint16_t matrix[8][8];
    for (int l = 0; l < kLanes; ++l)
      for (int half = 0; half < 2; ++half)
        matrix[2 * (l % 4) + half][l / 4] = static_cast<uint16_t>(a.get(warp, l) >> 16 * half);
    for (int l = 0; l < kLanes; ++l)
      d.set(warp, l, matrix[l / 4][2 * (l % 4)] | uint32_t{matrix[l / 4][2 * (l % 4) + 1]} << 16);
    return Outcome::kDone;
  };
}

// d[16][8] = a[16][k] b[k][8] + c, a's rows and b's columns consecutive.
Action mma(const Op& op) {
  if (op.parts.size() != 10 || op.parts[1] != "sync" || op.parts[2] != "aligned" ||
      op.parts[3].rfind("m16n8k", 0) != 0 || op.parts[4] != "row" || op.parts[5] != "col")
    return nullptr;
  const int k = std::stoi(op.parts[3].substr(6));
  const Element ea = element_of(op.parts[7]), eb = element_of(op.parts[8]);
  const bool in_float = op.parts[6] == "f32" && op.parts[9] == "f32";
  const bool in_half = op.parts[6] == "f16" && op.parts[9] == "f16";
  if (!ea.bits || ea.bits != eb.bits || k > 32 || (!in_float && !in_half)) return nullptr;
  const auto d = register_offsets(op[0]), a = register_offsets(op[1]), b = register_offsets(op[2]);
  std::vector<Operand> c = op[3].parts;
  const size_t words = static_cast<size_t>(k * ea.bits / 32 / 4);
  if (a.size() != 2 * words || b.size() != words || d.size() != (in_half ? 2u : 4u) ||
      c.size() != d.size())
    throw Fault("the operands' sizes are not those of the shape");
  return [=](Warp& warp, Mask mask) {
    if (misses(warp, mask, kAll)) return Outcome::kWait;
    float left[16 * 32], right[32 * 8], sum[16][8] = {};
    read_a(warp, a, ea, k, left);
    const int per = eb.per_register();
    for (size_t i = 0; i < b.size(); ++i)
      for (int l = 0; l < kLanes; ++l)
        for (int e = 0; e < per; ++e) {
          const int row = l % 4 * per + 4 * per * static_cast<int>(i) + e;
          right[row * 8 + l / 4] = element_at(eb, warp.lanes<uint32_t>(b[i])[l], e);
        }
    for (int m = 0; m < 16; ++m)
      for (int i = 0; i < k; ++i)
        for (int n = 0; n < 8; ++n) sum[m][n] += left[m * k + i] * right[i * 8 + n];
    for (size_t i = 0; i < d.size(); ++i)
      for (int l = 0; l < kLanes; ++l) {
        const uint32_t before = static_cast<uint32_t>(read_any(warp, c[i], l));
        uint32_t& out = warp.lanes<uint32_t>(d[i])[l];
        if (in_float) {
          const float x = sum[l / 4 + 8 * (i >> 1)][2 * (l % 4) + (i & 1)];
          out = bits_as<uint32_t>(bits_as<float>(before) + x);
          continue;
        }
        uint32_t both = 0;
        for (int e = 0; e < 2; ++e) {
          const float x = sum[l / 4 + 8 * i][2 * (l % 4) + e];
          const float y = value_of_float16(before >> 16 * e & 0xffff) + x;
          both |= uint32_t{narrow<Float16>(y).bits} << 16 * e;
        }
        out = both;
      }
    return Outcome::kDone;
  };
}

}  // namespace

std::vector<Entry> matrix_entries() {
  return {{"ldmatrix", matrix_access},
          {"stmatrix", matrix_access},
          {"movmatrix", movmatrix},
          {"mma", mma},
          {"wgmma", make_wgmma}};
}

}  // namespace ptx
