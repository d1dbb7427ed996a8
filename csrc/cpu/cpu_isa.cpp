#include "vidops/cpu_isa.h"

#include <atomic>
#include <cstdlib>

#include "vidops/tensor_view.h"

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace vidops {
namespace {

constexpr const char* kNames[] = {"scalar", "avx2", "avx512", "avx512_bf16", "amx"};
constexpr int kLevels = 5;
std::atomic<int> forced{-1};

#if defined(__x86_64__)
bool amx_usable() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  if (!(d & (1u << 22)) || !(d & (1u << 24))) return false;  // AMX-BF16, AMX-TILE
#if defined(__linux__)
  // The tile state is large, so Linux hands it out only to processes that ask.
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
#endif

int detect() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return 0;
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
      !__builtin_cpu_supports("avx512dq") || !__builtin_cpu_supports("avx512vl"))
    return 1;
  if (!__builtin_cpu_supports("avx512bf16")) return 2;
  return amx_usable() ? 4 : 3;
#else
  return 0;
#endif
}

int highest() {
  static const int level = detect();
  return level;
}

int parse(const char* name) {
  for (int i = 0; i < kLevels; ++i) {
    if (std::string(name) != kNames[i]) continue;
    require(i <= highest(), std::string("CPU level '") + name + "' is not available here; the highest is '" +
                                kNames[highest()] + "'");
    return i;
  }
  throw ArgumentError(std::string("unknown CPU level '") + name +
                      "'; expected scalar, avx2, avx512, avx512_bf16 or amx");
}

}  // namespace

std::vector<std::string> cpu_isas() { return {kNames, kNames + highest() + 1}; }

CpuIsa cpu_isa_level() {
  const int level = forced.load();
  if (level >= 0) return static_cast<CpuIsa>(level);
  const char* name = std::getenv("VIDOPS_CPU_ISA");
  return static_cast<CpuIsa>(name && *name ? parse(name) : highest());
}

const char* cpu_isa() { return kNames[static_cast<int>(cpu_isa_level())]; }

void set_cpu_isa(const char* name) { forced.store(name && *name ? parse(name) : -1); }

}  // namespace vidops
