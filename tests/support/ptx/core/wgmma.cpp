// Products of a warpgroup. They read shared memory and write registers when they are waited for.
#include <cstring>
#include <numeric>

#include "elements.hpp"

namespace ptx {
namespace {

// Where a tile lies in shared memory, as its descriptor says.
struct Tile {
  uint32_t start, leading, stride, span, swizzle;

  explicit Tile(uint64_t d) {
    static constexpr uint32_t kSpans[] = {0, 128, 64, 32}, kMasks[] = {0, 7, 3, 1};
    start = static_cast<uint32_t>(d & 0x3fff) << 4;
    leading = static_cast<uint32_t>(d >> 16 & 0x3fff) << 4;
    stride = static_cast<uint32_t>(d >> 32 & 0x3fff) << 4;
    if (d >> 49 & 7) throw Fault("a base offset in a matrix descriptor is not implemented");
    span = kSpans[d >> 62];
    swizzle = kMasks[d >> 62];
  }
  // 16 bytes of row r of a tile whose rows run along K: the cth of two.
  uint32_t along_k(uint32_t r, uint32_t c) const {
    if (!span) return swizzled(start + r / 8 * stride + c * leading + r % 8 * 16);
    return swizzled(start + r / 8 * stride + r % 8 * span + c * 16);
  }
  // 16 bytes of row k of a tile whose rows run along M or N: the jth.
  uint32_t along_mn(uint32_t k, uint32_t j) const {
    if (!span) return swizzled(start + j * stride + k / 8 * leading + k % 8 * 16);
    const uint32_t chunks = span / 16;
    return swizzled(start + j / chunks * leading + j % chunks * 16 + k / 8 * stride + k % 8 * span);
  }
  uint32_t swizzled(uint32_t address) const {
    return address ^ ((address >> 7 & swizzle) << 4);
  }
};

// Reads [rows][32 bytes] into out[k][rows], as floats.
void read_tile(Cta& cta, uint64_t descriptor, uint32_t first, uint32_t rows, bool mn_major,
               const Element& element, std::vector<float>& out) {
  const Tile tile(descriptor);
  const uint32_t per_chunk = 16 / static_cast<uint32_t>(element.bytes()), k = 2 * per_chunk;
  out.resize(k * rows);
  const auto decode_chunk = [&](uint32_t address, float* to, uint32_t step) {
    const uint8_t* bytes = cta.async_read(address, 16);
    for (uint32_t e = 0; e < per_chunk; ++e) {
      uint32_t code = 0;
      std::memcpy(&code, bytes + e * static_cast<uint32_t>(element.bytes()),
                  static_cast<size_t>(element.bytes()));
      to[e * step] = element.value(code);
    }
  };
  if (mn_major) {
    for (uint32_t i = 0; i < k; ++i)
      for (uint32_t j = 0; j < rows / per_chunk; ++j)
        decode_chunk(tile.along_mn(i, first / per_chunk + j), &out[i * rows + j * per_chunk], 1);
    return;
  }
  for (uint32_t r = 0; r < rows; ++r)
    for (uint32_t c = 0; c < 2; ++c)
      decode_chunk(tile.along_k(first + r, c), &out[c * per_chunk * rows + r], rows);
}

struct Product {
  std::vector<uint32_t> d, a;
  Operand a_descriptor, b_descriptor, scale_d;
  bool a_in_registers = false, in_half = false, a_mn_major = false, b_mn_major = false;
  int negate = 1;
  uint32_t n = 0;
  Element left, right;

  // What the warp's lanes held when it was issued is all that is read early: descriptors.
  void operator()(Warp& warp, uint64_t descriptor_a, uint64_t descriptor_b, bool adds) const {
    const uint32_t k = 32 / static_cast<uint32_t>(left.bytes());
    static thread_local std::vector<float> rows, columns, tile;
    if (a_in_registers) {
      tile.resize(16 * k);
      read_a(warp, a, left, static_cast<int>(k), tile.data());
    } else {
      const uint32_t first = 16 * static_cast<uint32_t>(warp.index % 4);
      read_tile(*warp.cta, descriptor_a, first, 16, a_mn_major, left, rows);
      tile.resize(16 * k);
      for (uint32_t i = 0; i < k; ++i)
        for (uint32_t m = 0; m < 16; ++m) tile[m * k + i] = rows[i * 16 + m];
    }
    read_tile(*warp.cta, descriptor_b, 0, n, b_mn_major, right, columns);
    float sum[16][256];
    for (uint32_t m = 0; m < 16; ++m) {
      std::fill(sum[m], sum[m] + n, 0.0f);
      for (uint32_t i = 0; i < k; ++i) {
        const float x = tile[m * k + i] * static_cast<float>(negate);
        const float* column = &columns[i * n];
        for (uint32_t j = 0; j < n; ++j) sum[m][j] += x * column[j];
      }
    }
    for (size_t i = 0; i < d.size(); ++i) store(warp, i, sum, adds);
  }

  void store(Warp& warp, size_t i, const float (&sum)[16][256], bool adds) const {
    uint32_t* out = warp.lanes<uint32_t>(d[i]);
    const uint32_t block = static_cast<uint32_t>(in_half ? i / 2 : i / 4) * 8;
    for (int l = 0; l < kLanes; ++l) {
      const uint32_t column = block + 2 * static_cast<uint32_t>(l % 4);
      if (!in_half) {
        const float x = sum[l / 4 + 8 * (i >> 1 & 1)][column + (i & 1)];
        out[l] = bits_as<uint32_t>(adds ? bits_as<float>(out[l]) + x : x);
        continue;
      }
      uint32_t both = 0;
      for (uint32_t e = 0; e < 2; ++e) {
        const float x = sum[l / 4 + 8 * (i & 1)][column + e];
        const float y = adds ? value_of_float16(out[l] >> 16 * e & 0xffff) + x : x;
        both |= uint32_t{narrow<Float16>(y).bits} << 16 * e;
      }
      out[l] = both;
    }
  }

  void mark(Warp& warp, int by) const {
    warp.products.in_flight += by;
    for (const auto* list : {&d, &a})
      for (uint32_t offset : *list) warp.flight[offset / 128] += static_cast<uint8_t>(by);
  }
};

Action multiply(const Op& op) {
  // wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16
  if (op.parts.size() != 8 || op.parts[4].rfind("m64n", 0) != 0) return nullptr;
  Product p;
  p.in_half = op.parts[5] == "f16";
  p.left = element_of(op.parts[6]);
  p.right = element_of(op.parts[7]);
  if ((!p.in_half && op.parts[5] != "f32") || !p.left.bits || p.left.bits != p.right.bits)
    return nullptr;
  const size_t k = op.parts[4].find('k');
  p.n = static_cast<uint32_t>(std::stoi(op.parts[4].substr(4, k - 4)));
  if (std::stoi(op.parts[4].substr(k + 1)) * p.left.bits != 256 || p.n > 256 || p.n % 8)
    throw Fault("there is no such shape");
  p.d = register_offsets(op[0]);
  if (p.d.size() != p.n / (p.in_half ? 4 : 2)) throw Fault("accumulators do not fit the shape");
  p.a_in_registers = op[1].kind == Kind::kVector;
  if (p.a_in_registers)
    p.a = register_offsets(op[1]);
  else
    p.a_descriptor = op[1];
  p.b_descriptor = op[2];
  const Condition adds(op[3]);
  p.negate = static_cast<int>(op[4].value) * static_cast<int>(op[5].value);
  size_t next = 6;
  if (!p.a_in_registers && op.size() > next) p.a_mn_major = op[next++].value != 0;
  if (op.size() > next) p.b_mn_major = op[next].value != 0;
  if ((p.a_mn_major || p.b_mn_major) && p.left.bits != 16)
    throw Fault("only operands of 16 bits may be transposed");
  return [=](Warp& warp, Mask mask) {
    if (misses(warp, mask, kAll)) return Outcome::kWait;
    const uint64_t a = p.a_in_registers ? 0 : read_any(warp, p.a_descriptor, 0);
    const uint64_t b = read_any(warp, p.b_descriptor, 0);
    const bool sums = adds.get(warp) & 1;
    if (warp.cta->machine->at_once()) {
      p(warp, a, b, sums);
      return Outcome::kDone;
    }
    p.mark(warp, 1);
    Warp* own = &warp;
    warp.products.open.push_back([=] {
      p(*own, a, b, sums);
      p.mark(*own, -1);
    });
    return Outcome::kDone;
  };
}

Outcome commit(Warp& warp, Mask) {
  Products& products = warp.products;
  products.committed.push_back(std::move(products.open));
  products.open.clear();
  ++products.commits;
  return Outcome::kDone;
}

// A warpgroup's products are one operation: they are done for its four warps at the same time, and
// not before all four have issued them.
Action wait(const Op& op) {
  const uint64_t allowed = op[0].value;
  return [=](Warp& warp, Mask mask) {
    if (misses(warp, mask, kAll)) return Outcome::kWait;
    const uint64_t commits = warp.products.commits;
    if (commits <= allowed) return Outcome::kDone;
    const uint64_t through = commits - allowed;
    const size_t first = static_cast<size_t>(warp.index / 4 * 4);
    auto& warps = warp.cta->warps;
    const size_t last = std::min(first + 4, warps.size());
    for (size_t i = first; i < last; ++i)
      if (warps[i]->alive && warps[i]->products.commits < through) return Outcome::kWait;
    for (size_t i = first; i < last; ++i) {
      Products& products = warps[i]->products;
      while (products.completed < through && !products.committed.empty()) {
        for (const Job& job : products.committed.front()) job();
        products.committed.pop_front();
        ++products.completed;
      }
    }
    return Outcome::kDone;
  };
}

}  // namespace

Action make_wgmma(const Op& op) {
  if (op.parts.size() < 4 || op.parts[2] != "sync" || op.parts[3] != "aligned") return nullptr;
  const std::string& what = op.parts[1];
  if (what == "fence") return [](Warp&, Mask) { return Outcome::kDone; };
  if (what == "commit_group") return commit;
  if (what == "wait_group") return wait(op);
  return what == "mma_async" ? multiply(op) : nullptr;
}

}  // namespace ptx
