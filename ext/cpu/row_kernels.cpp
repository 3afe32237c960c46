#include "isa.h"
#include "row_kernels_body.h"

namespace exl {

const RowKernels row_kernels_portable = kThisInstructionSet;

const RowKernels& row_kernels() {
#if EXL_X86_ISA
  if (isa() != Isa::portable) return row_kernels_avx2;
#endif
  return row_kernels_portable;
}

}  // namespace exl
