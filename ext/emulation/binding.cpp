// torch.ops.exl_cuda_emulated.*: how tests steer the emulation.
#include "../binding/checks.h"
#include "control.h"

namespace exl {
namespace {

// order 0 forward, 1 reverse, 2 random with this seed: in which the threads and blocks of the next launches run.
void emulation_order(int64_t order, int64_t seed) {
  EXL_CHECK(order >= 0 && order <= 2, "emulation_order: 0 forward, 1 reverse, 2 random, got ", order);
  exl_emu::set_order(exl_emu::Order(order), uint64_t(seed));
}

// Launches so far in this process.
int64_t emulation_launches() { return int64_t(exl_emu::launches()); }

}  // namespace
}  // namespace exl

STABLE_TORCH_LIBRARY(exl_cuda_emulated, m) {
  m.def("emulation_order(int order, int seed) -> ()");
  m.def("emulation_launches() -> int");
}

STABLE_TORCH_LIBRARY_IMPL(exl_cuda_emulated, CompositeExplicitAutograd, m) {
  m.impl("emulation_order", TORCH_BOX(&exl::emulation_order));
  m.impl("emulation_launches", TORCH_BOX(&exl::emulation_launches));
}
