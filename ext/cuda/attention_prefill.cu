// Grid of the prefill kernels: from the host's numbers alone.
#include "attention_prefill_kernel.cuh"

namespace exl {

void attention_prefill_cuda(const CudaAttention& a, cudaStream_t stream) {
  if (a.tokens <= kDecodeRows || a.table_width == 0) return;  // no sequence has that many rows
  // A sequence fills all of its blocks but the last.
  const int64_t long_sequences = a.tokens / (kDecodeRows + 1);
  const int64_t partial = long_sequences < a.sequences ? long_sequences : a.sequences;
  const int64_t blocks = int64_t(a.tokens) * (a.heads / a.kv_heads) / kPrefillColumns + partial;
  const dim3 grid(unsigned(a.kv_heads), unsigned(blocks));
  if (a.kind == PageKind::codes) {
    attention_prefill_codes(a, grid, stream);
  } else {
    attention_prefill_floats(a, grid, stream);
  }
}

}  // namespace exl
