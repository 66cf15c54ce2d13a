// y = x w^T for sm_90a as warp-specialised kernels are written: a producer warp brings tiles with
// TMA, two consumer warpgroups multiply with wgmma, x out of shared memory or out of registers, and
// the result leaves by TMA. For tests of the machine that executes PTX.
#include <cstdint>

struct alignas(64) TensorMap {
  unsigned char bytes[128];
};

constexpr int kRows = 128, kCols = 64, kDepth = 64, kStages = 2;
constexpr uint32_t kXBytes = kRows * kDepth * 2, kWBytes = kCols * kDepth * 2;

__device__ inline uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}
__device__ inline void init(uint64_t* bar, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(bar)), "r"(count));
}
__device__ inline void expect(uint64_t* bar, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(bar)),
               "r"(bytes)
               : "memory");
}
__device__ inline void arrive(uint64_t* bar) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(bar)) : "memory");
}
__device__ inline void wait(uint64_t* bar, uint32_t parity) {
  asm volatile(
      "{\n.reg .pred done;\n"
      "again: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra finished;\nbra again;\nfinished:\n}" ::"r"(shared_address(bar)),
      "r"(parity)
      : "memory");
}
__device__ inline void load(void* to, const TensorMap* map, uint64_t* bar, int x, int y) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4}], [%2];" ::"r"(shared_address(to)),
      "l"(map), "r"(shared_address(bar)), "r"(x), "r"(y)
      : "memory");
}
// A tile whose rows of 128 bytes run along K, with the swizzle of 128 bytes.
__device__ inline uint64_t descriptor(const void* tile) {
  return static_cast<uint64_t>((shared_address(tile) & 0x3ffff) >> 4) | uint64_t{1} << 16 |
         uint64_t{1024 >> 4} << 32 | uint64_t{1} << 62;
}
#define ACCUMULATORS                                                                             \
  "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,"  \
  "%25,%26,%27,%28,%29,%30,%31}"
#define OUTPUTS(c)                                                                               \
  "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]), "+f"(c[4]), "+f"(c[5]), "+f"(c[6]),             \
      "+f"(c[7]), "+f"(c[8]), "+f"(c[9]), "+f"(c[10]), "+f"(c[11]), "+f"(c[12]), "+f"(c[13]),     \
      "+f"(c[14]), "+f"(c[15]), "+f"(c[16]), "+f"(c[17]), "+f"(c[18]), "+f"(c[19]), "+f"(c[20]),  \
      "+f"(c[21]), "+f"(c[22]), "+f"(c[23]), "+f"(c[24]), "+f"(c[25]), "+f"(c[26]), "+f"(c[27]),  \
      "+f"(c[28]), "+f"(c[29]), "+f"(c[30]), "+f"(c[31])

__device__ inline void multiply(float (&c)[32], uint64_t a, uint64_t b, int adds) {
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\n"
               "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 " ACCUMULATORS
               ", %32, %33, p, 1, 1, 0, 0;\n}"
               : OUTPUTS(c)
               : "l"(a), "l"(b), "r"(adds));
}
__device__ inline void multiply(float (&c)[32], const uint32_t (&a)[4], uint64_t b, int adds) {
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %37, 0;\n"
               "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 " ACCUMULATORS
               ", {%32,%33,%34,%35}, %36, p, 1, 1, 0;\n}"
               : OUTPUTS(c)
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(adds));
}

template <bool kFromRegisters>
__device__ void product(const TensorMap* x_map, const TensorMap* w_map, const TensorMap* y_map,
                        int depth) {
  extern __shared__ __align__(1024) unsigned char memory[];
  __shared__ alignas(8) uint64_t full[kStages], empty[kStages];
  unsigned char* base = memory + (1024 - (shared_address(memory) & 1023)) % 1024;
  unsigned char* x = base;                      // [stages][rows][depth]
  unsigned char* w = base + kStages * kXBytes;  // [stages][cols][depth]
  const int group = threadIdx.x / 128, tiles = (depth + kDepth - 1) / kDepth;
  if (threadIdx.x == 0) {
    for (int s = 0; s < kStages; ++s) init(&full[s], 1), init(&empty[s], 2);
    asm volatile("fence.mbarrier_init.release.cluster;");
  }
  __syncthreads();
  if (group == 2) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
    if (threadIdx.x == 256) {
      for (int t = 0; t < tiles; ++t) {
        const int s = t % kStages;
        wait(&empty[s], (t / kStages & 1) ^ 1);
        expect(&full[s], kXBytes + kWBytes);
        load(x + s * kXBytes, x_map, &full[s], t * kDepth, blockIdx.x * kRows);
        load(w + s * kWBytes, w_map, &full[s], t * kDepth, blockIdx.y * kCols);
      }
    }
    return;
  }
  asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
  const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
  float c[32];
  for (int t = 0; t < tiles; ++t) {
    const int s = t % kStages;
    wait(&full[s], t / kStages & 1);
    const unsigned char* left = x + s * kXBytes + group * 64 * kDepth * 2;
    const unsigned char* right = w + s * kWBytes;
    if (kFromRegisters) {
      uint32_t a[kDepth / 16][4];
#pragma unroll
      for (int k = 0; k < kDepth / 16; ++k) {
        const int row = warp * 16 + lane % 16, chunk = 2 * k + lane / 16;
        const uint32_t at = shared_address(left) + row * 128 + ((chunk ^ (row & 7)) << 4);
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                     : "=r"(a[k][0]), "=r"(a[k][1]), "=r"(a[k][2]), "=r"(a[k][3])
                     : "r"(at));
      }
      asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
      for (int k = 0; k < kDepth / 16; ++k) multiply(c, a[k], descriptor(right + 32 * k), t + k);
      asm volatile("wgmma.commit_group.sync.aligned;\nwgmma.wait_group.sync.aligned 0;" ::: "memory");
    } else {
      asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
      for (int k = 0; k < kDepth / 16; ++k)
        multiply(c, descriptor(left + 32 * k), descriptor(right + 32 * k), t + k);
      asm volatile("wgmma.commit_group.sync.aligned;\nwgmma.wait_group.sync.aligned 0;" ::: "memory");
    }
    if (threadIdx.x % 128 == 0) arrive(&empty[s]);
  }
  // Both warpgroups have read the last tiles before the result takes their place.
  asm volatile("bar.sync 1, 256;" ::: "memory");
  float* out = reinterpret_cast<float*>(base) + group * 64 * kCols;  // [64][64]
  for (int i = 0; i < 32; ++i) {
    const int row = warp * 16 + lane / 4 + 8 * (i / 2 % 2);
    out[row * kCols + i / 4 * 8 + 2 * (lane % 4) + i % 2] = c[i];
  }
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  asm volatile("bar.sync %0, 128;" ::"r"(2 + group) : "memory");
  if (threadIdx.x % 128 == 0) {
    asm volatile(
        "cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%1, %2}], [%3];\n"
        "cp.async.bulk.commit_group;\ncp.async.bulk.wait_group.read 0;" ::"l"(y_map),
        "r"(blockIdx.y * kCols), "r"(blockIdx.x * kRows + group * 64), "r"(shared_address(out))
        : "memory");
  }
}

extern "C" __global__ void __launch_bounds__(288)
    product_from_shared(const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap w,
                        const __grid_constant__ TensorMap y, int depth) {
  product<false>(&x, &w, &y, depth);
}
extern "C" __global__ void __launch_bounds__(288)
    product_from_registers(const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap w,
                           const __grid_constant__ TensorMap y, int depth) {
  product<true>(&x, &w, &y, depth);
}
