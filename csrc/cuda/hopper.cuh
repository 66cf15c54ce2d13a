// Instructions of sm_90a: barriers in shared memory, bulk copies, products of warpgroups.
#pragma once

#include <cstdint>

#include "elements.cuh"
#include "launch.cuh"

namespace lora_engine {
namespace cuda {
namespace {

// ---- mbarriers

__device__ inline void init_barrier(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
__device__ inline void show_barriers() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
__device__ inline void arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
// One arrival of a warp.
__device__ inline void release(uint32_t barrier) {
  if (threadIdx.x % 32 == 0) arrive(barrier);
}
// Arrives, and announces bytes that copies will bring.
__device__ inline void arrive_expecting(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}
// Waits for the end of the barrier's phase of that parity.
__device__ inline void wait_for(uint32_t barrier, uint32_t parity) {
  uint32_t done = 0;
  do {
    asm volatile(
        "{\n.reg .pred p;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;\n}"
        : "=r"(done)
        : "r"(barrier), "r"(parity)
        : "memory");
  } while (!done);
}

template <int kBarrier, int kThreads>
__device__ inline void sync_threads() {
  asm volatile("bar.sync %0, %1;" ::"n"(kBarrier), "n"(kThreads) : "memory");
}
// A named barrier of `threads`, some of which only arrive.
__device__ inline void await_threads(int barrier, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}
__device__ inline void arrive_threads(int barrier, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

// ---- copies

struct alignas(64) TensorMap {  // CUtensorMap
  unsigned char bytes[128];
};

// Shows writes of this thread to shared memory to bulk copies and wgmma.
__device__ inline void fence_async() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

__device__ inline void load_box(uint32_t to, const TensorMap* map, uint32_t barrier, int x, int y,
                                int z) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4, %5}], [%2];" ::"r"(to),
      "l"(map), "r"(barrier), "r"(x), "r"(y), "r"(z)
      : "memory");
}
__device__ inline void load_bytes(uint32_t to, const void* from, uint32_t bytes, uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(to),
      "l"(from), "r"(bytes), "r"(barrier)
      : "memory");
}

// ---- registers of a warpgroup

template <int kRegisters>
__device__ inline void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ inline void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// ---- products

// A tile of rows of 128 bytes, swizzled over 128: its rows run along the inner dimension, or along
// M or N, and then `leading` bytes part one 64 of them from the next.
__device__ inline uint64_t tile_descriptor(uint32_t address, uint32_t leading = 16) {
  return static_cast<uint64_t>((address & 0x3ffff) >> 4) |
         static_cast<uint64_t>(leading >> 4) << 16 | uint64_t{1024 >> 4} << 32 | uint64_t{1} << 62;
}

__device__ inline void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void end_products() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <int kPending>
__device__ inline void wait_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}
// Keeps the compiler from using sums before the wait that stands above.
template <int kCount>
__device__ inline void pin(float (&c)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(c[i])::"memory");
}

#define LORA_ENGINE_PLACES_64                                                      \
  "{"                                                                              \
  "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21," \
  "%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"                                        \
  "}"
#define LORA_ENGINE_SUMS_64                                                                       \
  "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]), "+f"(c[4]), "+f"(c[5]), "+f"(c[6]), "+f"(c[7]), \
      "+f"(c[8]), "+f"(c[9]), "+f"(c[10]), "+f"(c[11]), "+f"(c[12]), "+f"(c[13]), "+f"(c[14]),    \
      "+f"(c[15]), "+f"(c[16]), "+f"(c[17]), "+f"(c[18]), "+f"(c[19]), "+f"(c[20]), "+f"(c[21]),  \
      "+f"(c[22]), "+f"(c[23]), "+f"(c[24]), "+f"(c[25]), "+f"(c[26]), "+f"(c[27]), "+f"(c[28]),  \
      "+f"(c[29]), "+f"(c[30]), "+f"(c[31])
#define LORA_ENGINE_PLACES_128                                                       \
  "{"                                                                                \
  "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,"   \
  "%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41," \
  "%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61," \
  "%62,%63"                                                                          \
  "}"
#define LORA_ENGINE_SUMS_128                                                                      \
  "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]), "+f"(c[4]), "+f"(c[5]), "+f"(c[6]), "+f"(c[7]), \
      "+f"(c[8]), "+f"(c[9]), "+f"(c[10]), "+f"(c[11]), "+f"(c[12]), "+f"(c[13]), "+f"(c[14]),    \
      "+f"(c[15]), "+f"(c[16]), "+f"(c[17]), "+f"(c[18]), "+f"(c[19]), "+f"(c[20]), "+f"(c[21]),  \
      "+f"(c[22]), "+f"(c[23]), "+f"(c[24]), "+f"(c[25]), "+f"(c[26]), "+f"(c[27]), "+f"(c[28]),  \
      "+f"(c[29]), "+f"(c[30]), "+f"(c[31]), "+f"(c[32]), "+f"(c[33]), "+f"(c[34]), "+f"(c[35]),  \
      "+f"(c[36]), "+f"(c[37]), "+f"(c[38]), "+f"(c[39]), "+f"(c[40]), "+f"(c[41]), "+f"(c[42]),  \
      "+f"(c[43]), "+f"(c[44]), "+f"(c[45]), "+f"(c[46]), "+f"(c[47]), "+f"(c[48]), "+f"(c[49]),  \
      "+f"(c[50]), "+f"(c[51]), "+f"(c[52]), "+f"(c[53]), "+f"(c[54]), "+f"(c[55]), "+f"(c[56]),  \
      "+f"(c[57]), "+f"(c[58]), "+f"(c[59]), "+f"(c[60]), "+f"(c[61]), "+f"(c[62]), "+f"(c[63])

// c = a b + (adds ? c : 0) with a [64, 16] and b [16, N], in shared memory by descriptors, a also
// in registers. kAlongM, kAlongN: whether rows of a's and b's tile run along M and N.
#define LORA_ENGINE_PRODUCTS_64(TYPE, NAME)                                                   \
  template <int kAlongM, int kAlongN>                                                         \
  __device__ inline void multiply(TYPE, float (&c)[32], uint64_t a, uint64_t b, int adds) {   \
    asm volatile(                                                                             \
        "{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\n"                                          \
        "wgmma.mma_async.sync.aligned.m64n64k16.f32." NAME "." NAME " " LORA_ENGINE_PLACES_64 \
        ", %32, %33, p, 1, 1, %35, %36;\n}"                                                   \
        : LORA_ENGINE_SUMS_64                                                                 \
        : "l"(a), "l"(b), "r"(adds), "n"(kAlongM), "n"(kAlongN));                             \
  }                                                                                           \
  template <int kAlongN>                                                                      \
  __device__ inline void multiply(TYPE, float (&c)[32], const uint32_t (&a)[4], uint64_t b,   \
                                  int adds) {                                                 \
    asm volatile(                                                                             \
        "{\n.reg .pred p;\nsetp.ne.b32 p, %37, 0;\n"                                          \
        "wgmma.mma_async.sync.aligned.m64n64k16.f32." NAME "." NAME " " LORA_ENGINE_PLACES_64 \
        ", {%32,%33,%34,%35}, %36, p, 1, 1, %38;\n}"                                          \
        : LORA_ENGINE_SUMS_64                                                                 \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(adds), "n"(kAlongN));       \
  }
#define LORA_ENGINE_PRODUCTS_128(TYPE, NAME)                                                    \
  template <int kAlongM, int kAlongN>                                                           \
  __device__ inline void multiply(TYPE, float (&c)[64], uint64_t a, uint64_t b, int adds) {     \
    asm volatile(                                                                               \
        "{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\n"                                            \
        "wgmma.mma_async.sync.aligned.m64n128k16.f32." NAME "." NAME " " LORA_ENGINE_PLACES_128 \
        ", %64, %65, p, 1, 1, %67, %68;\n}"                                                     \
        : LORA_ENGINE_SUMS_128                                                                  \
        : "l"(a), "l"(b), "r"(adds), "n"(kAlongM), "n"(kAlongN));                               \
  }                                                                                             \
  template <int kAlongN>                                                                        \
  __device__ inline void multiply(TYPE, float (&c)[64], const uint32_t (&a)[4], uint64_t b,     \
                                  int adds) {                                                   \
    asm volatile(                                                                               \
        "{\n.reg .pred p;\nsetp.ne.b32 p, %69, 0;\n"                                            \
        "wgmma.mma_async.sync.aligned.m64n128k16.f32." NAME "." NAME " " LORA_ENGINE_PLACES_128 \
        ", {%64,%65,%66,%67}, %68, p, 1, 1, %70;\n}"                                            \
        : LORA_ENGINE_SUMS_128                                                                  \
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(adds), "n"(kAlongN));         \
  }
LORA_ENGINE_PRODUCTS_64(BFloat16, "bf16")
LORA_ENGINE_PRODUCTS_64(Float16, "f16")
LORA_ENGINE_PRODUCTS_128(BFloat16, "bf16")
LORA_ENGINE_PRODUCTS_128(Float16, "f16")

}  // namespace
}  // namespace cuda
}  // namespace lora_engine
