// What more than one binding checks or reads. Names the operator `op` in its messages.
#pragma once

#include "../cpu/attention.h"
#include "../cpu/gated.h"
#include "../cpu/sample.h"
#include "../cpu/tiles.h"
#include "checks.h"

namespace exl {

inline Activation activation_of(const char* op, std::string_view name) {
  if (name == "silu") return Activation::silu;
  if (name == "gelu_tanh") return Activation::gelu_tanh;
  if (name == "gelu") return Activation::gelu;
  if (name == "relu") return Activation::relu;
  fail("exl::", op, ": unknown activation '", name, "'; silu, gelu, gelu_tanh or relu");
}

// What pack_tiles made. It checked the tables; here only what tells such memory from any other.
inline Packed check_packed(const char* op, const Tensor& weight) {
  check_cpu(op, "weight", weight, ScalarType::Byte);
  const PackedHeader* header = static_cast<const PackedHeader*>(weight.data_ptr());
  EXL_CHECK(weight.numel() >= int64_t(sizeof(PackedHeader)) && header->magic == kPackedMagic &&
                header->bytes == weight.numel(),
            "exl::", op, ": weight must be what pack_tiles made, got ", describe(weight));
  return {header};
}

// What cpu/sample.h asks of a draw from `count` logits.
inline void check_draw(const char* op, const Draw& how, int64_t count) {
  EXL_CHECK(how.temperature >= 0 && how.min_p >= 0 && how.min_p <= 1 && how.u >= 0 && how.u < 1, "exl::", op,
            ": wanted temperature > 0 (0: the best), 0 <= min_p <= 1 and 0 <= u < 1, got ", how.temperature, ", ",
            how.min_p, " and ", how.u);
  int64_t least = 0;
  for (int64_t i = 0; i < how.banned.count; ++i) {
    const int64_t id = how.banned.ids[i];
    EXL_CHECK(id >= least && id < count, "exl::", op, ": banned ids must ascend and lie in 0 to ", count - 1, ", got ",
              id, " at ", i);
    least = id + 1;
  }
}

// Every page that will be read exists, and every sequence has a key for each of its queries.
inline void check_tables(const char* op, const AttentionArgs& a, int64_t tokens, int64_t pages) {
  EXL_CHECK(a.q_starts[0] == 0 && a.q_starts[a.sequences] == tokens, "exl::", op, ": q_starts must run from 0 to ",
            tokens, " rows of q, got ", a.q_starts[0], " to ", a.q_starts[a.sequences]);
  for (int64_t s = 0; s < a.sequences; ++s) {
    const int64_t rows = int64_t(a.q_starts[s + 1]) - a.q_starts[s], length = a.kv_lengths[s];
    EXL_CHECK(rows >= 0, "exl::", op, ": q_starts decreases at sequence ", s);
    if (rows == 0) continue;
    EXL_CHECK(length >= rows && length <= a.table_width * a.page_size, "exl::", op, ": sequence ", s, " has ", rows,
              " queries, ", length, " keys and room for ", a.table_width * a.page_size, " in its pages");
    const int64_t index = length - rows, oldest = index < a.window ? 0 : index - a.window + 1;
    for (int64_t p = oldest / a.page_size; p <= (length - 1) / a.page_size; ++p) {
      const int32_t page = a.page_table[s * a.table_width + p];
      EXL_CHECK(page >= 0 && page < pages, "exl::", op, ": sequence ", s, " wants page ", page, " of ", pages);
    }
  }
}

}  // namespace exl
