// Every CPU operator at every instruction-set level against naive double loops: odd sizes, strided inputs,
// guard bands behind the outputs, one and two threads bit for bit. Built with the address and
// undefined-behaviour sanitizers.
#include <cstdio>
#include <string>

#include "cpu_testing.h"
#include "vidops/cpu_isa.h"

using namespace vidops;

namespace {

template <class T>
void every_family() {
  testing::slot_tests<T>();
  testing::token_tests<T>();
  testing::attention_tests<T>();
  testing::clustering_tests<T>();
  testing::label_propagation_tests<T>();
}

}  // namespace

int main() {
  for (const std::string& isa : cpu_isas()) {
    set_cpu_isa(isa.c_str());
    testing::where = isa + " float32";
    every_family<float>();
    testing::attention_corner_cases();
    testing::clustering_corner_cases();
    testing::expect_refused([] { set_cpu_isa("z80"); }, "an unknown level");
    testing::where = isa + " float64";
    every_family<double>();
  }
  std::printf("%d checks on %zu levels, %d failures\n", testing::checks, cpu_isas().size(), testing::failures);
  return testing::failures ? 1 : 0;
}
