#include "matrix_unit.hpp"

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace lora_engine {

#if defined(__x86_64__) && defined(__linux__)

bool matrix_unit_permitted() {
  // Intel's manual, volume 2, CPUID: leaf 7, EDX bit 22 AMX-BF16 and bit 24 AMX-TILE.
  constexpr unsigned kBf16 = 1u << 22, kTiles = 1u << 24;
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  if ((d & kBf16) == 0 || (d & kTiles) == 0) return false;
  // Linux, Documentation/arch/x86/xstate.rst: ARCH_REQ_XCOMP_PERM, for XTILEDATA.
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

#else

bool matrix_unit_permitted() { return false; }

#endif

}  // namespace lora_engine
