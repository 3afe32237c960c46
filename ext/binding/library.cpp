// The operators that steer the library itself. Every other file here declares its own (see checks.h).
#include "../cpu/isa.h"
#include "../cpu/threads.h"
#include "checks.h"

namespace exl {
namespace {

// "" only asks, "best" lifts a restriction. Returns the name of the instruction set in use.
std::string op_set_isa(const std::string& name) {
  if (name == "best") {
    for (Isa which : {Isa::avx512, Isa::avx2, Isa::portable}) {
      if (set_isa(which)) break;
    }
  } else if (!name.empty()) {
    bool known = false;
    for (Isa which : {Isa::portable, Isa::avx2, Isa::avx512}) {
      if (name != isa_name(which)) continue;
      known = true;
      EXL_CHECK(set_isa(which), "exl::set_isa: this CPU or build has no ", name);
    }
    EXL_CHECK(known, "exl::set_isa: unknown instruction set '", name, "'; portable, avx2, avx512 or best");
  }
  return isa_name(isa());
}

// 0 only asks. Returns the number of threads in use.
int64_t op_set_threads(int64_t count) {
  EXL_CHECK(count >= 0 && count <= 256, "exl::set_threads: 1 to 256 threads (0 asks), got ", count);
  if (count > 0) set_threads(int(count));
  return threads();
}

// Cost of an empty parallel region, mean over `repeats`, in nanoseconds: for doctor and benchmarks.
double op_region_cost(int64_t repeats) {
  EXL_CHECK(repeats > 0, "exl::region_cost: repeats must be positive, got ", repeats);
  return region_cost_ns(repeats);
}

}  // namespace
}  // namespace exl

STABLE_TORCH_LIBRARY(exl, m) {
  m.def("set_isa(str name) -> str");
  m.def("set_threads(int count) -> int");
  m.def("region_cost(int repeats) -> float");
}

STABLE_TORCH_LIBRARY_IMPL(exl, CompositeExplicitAutograd, m) {
  m.impl("set_isa", TORCH_BOX(&exl::op_set_isa));
  m.impl("set_threads", TORCH_BOX(&exl::op_set_threads));
  m.impl("region_cost", TORCH_BOX(&exl::op_region_cost));
}
