// Instruction-set level of the CPU kernels: detected once, forceable by VIDOPS_CPU_ISA or set_cpu_isa().
#pragma once

#include <string>
#include <vector>

namespace vidops {

// Ordered: every level may use all the ones below it.
enum class CpuIsa : int { scalar, avx2, avx512, avx512_bf16, amx };

// Levels this machine (and kernel: AMX state needs a permission) can run, lowest first.
std::vector<std::string> cpu_isas();

// The level in force: set_cpu_isa(), else the environment (read at each call), else the highest available.
CpuIsa cpu_isa_level();
const char* cpu_isa();

// Forces a level for the process; null or "" returns to the automatic choice. Throws ArgumentError.
void set_cpu_isa(const char* name);

}  // namespace vidops
