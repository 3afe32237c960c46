#include "row_kernels_body.h"

namespace exl {

const RowKernels row_kernels_avx2 = kThisInstructionSet;

}  // namespace exl
