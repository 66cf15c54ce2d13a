// Which instruction sets were built, and which of them this processor runs. setup.py compiles the
// kernel files once for each entry of the list and defines LORA_ENGINE_X86 where there are several.
#include <cstring>

#include "kernels.hpp"
#include "matrix_unit.hpp"

namespace lora_engine {

#ifdef LORA_ENGINE_X86
namespace amx_bf16 {
extern const Kernels table;
}
namespace avx512_bf16 {
extern const Kernels table;
}
namespace avx512 {
extern const Kernels table;
}
namespace avx2 {
extern const Kernels table;
}

static const BuiltIsa* built() {
  __builtin_cpu_init();
  // All of x86-64-v4 and x86-64-v3: the compiler may use any of their instructions.
  const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                  __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2");
  const bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                  __builtin_cpu_supports("avx512vl");
  const bool v4_bf16 = v4 && __builtin_cpu_supports("avx512bf16");
  static const BuiltIsa list[] = {
      {&amx_bf16::table, v4_bf16 && matrix_unit_permitted()},
      {&avx512_bf16::table, v4_bf16},
      {&avx512::table, v4},
      {&avx2::table, v3},
  };
  return list;
}
static constexpr int kBuilt = 4;
#else
namespace generic {
extern const Kernels table;
}
static const BuiltIsa* built() {
  static const BuiltIsa list[] = {{&generic::table, true}};
  return list;
}
static constexpr int kBuilt = 1;
#endif

int built_isas(const BuiltIsa** list) {
  *list = built();
  return kBuilt;
}

static const Kernels* best() {
  for (int i = 0; i < kBuilt; ++i)
    if (built()[i].runs) return built()[i].table;
  return nullptr;
}

static const Kernels*& chosen() {
  static const Kernels* table = best();
  return table;
}

const Kernels* kernels() { return chosen(); }

bool select_isa(const char* isa) {
  for (int i = 0; i < kBuilt; ++i) {
    if (built()[i].runs && std::strcmp(built()[i].table->isa, isa) == 0) {
      chosen() = built()[i].table;
      return true;
    }
  }
  return false;
}

}  // namespace lora_engine
