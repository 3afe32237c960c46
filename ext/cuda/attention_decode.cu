// Grid and workspace of the decode kernels: from the host's numbers alone, so that a graph can hold the launch.
#include "attention_decode_dims.cuh"

namespace exl {
namespace {

struct DecodePlan {
  bool wide;
  int columns;    // of a block
  int64_t blocks; // of columns, at most
  int64_t chunks; // of a block, at most
};

DecodePlan decode_plan(const CudaAttention& a) {
  const int64_t group = a.heads / a.kv_heads, rows = (a.tokens + a.sequences - 1) / a.sequences;
  DecodePlan plan{};
  plan.wide = group * rows > 8;
  plan.columns = plan.wide ? 8 * wide_tiles(a.head_dim) : 8;
  const int64_t room = int64_t(kDecodeRows) * a.sequences, most_rows = a.tokens < room ? a.tokens : room;
  plan.blocks = most_rows * group / plan.columns + a.sequences;  // one block of every sequence is not full
  // The number of chunks grows with the length inside a band of decode_chunk and halves at its end.
  const int64_t most_keys = int64_t(a.table_width) * a.page_size;
  for (int64_t length : {int64_t(2048), int64_t(8192), int64_t(32768), int64_t(65536), most_keys}) {
    const int64_t keys = length < most_keys ? length : most_keys, chunk = decode_chunk(int(keys));
    int64_t chunks = (keys + chunk - 1) / chunk;
    // Rows of a block see at most window + kDecodeRows - 1 keys together.
    if (a.window < most_keys) {
      const int64_t inside = (int64_t(a.window) + kDecodeRows - 2) / chunk + 2;
      chunks = chunks < inside ? chunks : inside;
    }
    plan.chunks = plan.chunks > chunks ? plan.chunks : chunks;
  }
  return plan;
}

}  // namespace

bool attention_head_dim(int64_t head_dim) {
#define EXL_DIM(dim) || head_dim == dim
  return false EXL_ATTENTION_DIMS(EXL_DIM);
#undef EXL_DIM
}

DecodeWorkspace decode_workspace(const CudaAttention& a) {
  if (a.tokens == 0 || a.sequences == 0) return {0, 0};
  const DecodePlan plan = decode_plan(a);
  const int64_t rows = plan.blocks * a.kv_heads;
  return {plan.chunks > 1 ? rows * plan.chunks * plan.columns * (a.head_dim + 2) : 0, rows};
}

void attention_decode_cuda(const CudaAttention& a, cudaStream_t stream) {
  if (a.tokens == 0 || a.sequences == 0 || a.table_width == 0) return;
  const DecodePlan plan = decode_plan(a);
  const dim3 grid(unsigned(a.kv_heads), unsigned(plan.chunks), unsigned(plan.blocks));
  if (a.kind == PageKind::codes) {
    attention_decode_codes(a, plan.wide, grid, stream);
  } else {
    attention_decode_floats(a, plan.wide, grid, stream);
  }
}

}  // namespace exl
