// A pass of a whole model in one call (cpu/step.h): ragged batches one after another, against plain loops in double.
//
// How far a logit may be off has no simple formula behind several layers. So the loops run again with every product,
// norm and stored key moved at random by as much as its kernel may be off (linear_packed.h, linear_dense.h, kv_rows.h):
// a row may be three times as far from the exact one as the worst of these. A mistake is off by the row's own size.
#include "cpu/step.h"

#include "check.h"
#include "common/kv_rows.h"
#include "step_loops.h"

using namespace exl;
using check::Buffer;
using check::Case;
using check::Doubles;
using check::Pass;
using check::Random;

namespace {

// Where everything lies. Pages belong to sequences from the beginning, in no order; one is nobody's.
struct Layout {
  int64_t table_width = 0, pages = 1;
  std::vector<int32_t> table;

  Layout(const Case& c, Random& random) {
    std::vector<int64_t> own(c.steps[0].size());
    for (const auto& step : c.steps) {
      for (size_t s = 0; s < own.size(); ++s) own[s] += step[s];
    }
    for (int64_t& count : own) {
      count = (count + c.page_size - 1) / c.page_size;
      pages += count;
      table_width = count > table_width ? count : table_width;
    }
    std::vector<int32_t> order;
    for (int64_t p = 0; p < pages; ++p) order.push_back(int32_t(p));
    random.shuffle(order);
    for (int64_t count : own) {
      for (int64_t i = 0; i < table_width; ++i) {
        table.push_back(i < count ? order.back() : -1);
        if (i < count) order.pop_back();
      }
    }
  }
};

// What is written behind a guard page for one pass.
struct Inputs {
  Pass pass;
  Buffer<int64_t> places{0}, slots{0}, logit_rows{0};
  Buffer<int32_t> q_starts{0}, kv_lengths{0};
};

std::vector<Inputs> plan(const Case& c, const check::Angles& angles, const Layout& layout, Random& random) {
  std::vector<Inputs> all;
  std::vector<int64_t> length(c.steps[0].size());
  for (size_t i = 0; i < c.steps.size(); ++i) {
    all.emplace_back();
    Inputs& in = all.back();
    std::vector<int64_t> tokens, places, slots;
    std::vector<int32_t> starts{0}, lengths;
    for (size_t s = 0; s < length.size(); ++s) {
      for (int64_t t = 0; t < c.steps[i][s]; ++t, ++length[s]) {
        tokens.push_back(random.below(c.vocabulary));
        in.pass.sequence.push_back(int64_t(s)), in.pass.position.push_back(length[s]);
        places.push_back(angles.place[size_t(length[s])]);
        const int64_t page = layout.table[s * size_t(layout.table_width) + size_t(length[s] / c.page_size)];
        slots.push_back(page * c.page_size + length[s] % c.page_size);
      }
      starts.push_back(int32_t(tokens.size())), lengths.push_back(int32_t(length[s]));
      // The last token of each sequence, and in every second pass all of them.
      for (int64_t t = c.steps[i][s] - 1; t >= 0; --t) {
        const int64_t row = int64_t(tokens.size()) - 1 - t;
        if (t == 0 || i % 2 == 1) in.pass.logit_rows.push_back(row);
      }
    }
    in.pass.tokens = check::guarded(tokens);
    in.places = check::guarded(places), in.slots = check::guarded(slots);
    in.logit_rows = check::guarded(in.pass.logit_rows);
    in.q_starts = check::guarded(starts), in.kv_lengths = check::guarded(lengths);
  }
  return all;
}

double distance(const double* a, const double* b, int64_t count) {
  double sum = 0;
  for (int64_t i = 0; i < count; ++i) sum += (a[i] - b[i]) * (a[i] - b[i]);
  return std::sqrt(sum);
}

void check_case(const check::Ways& ways, const std::string& name, const Case& c, Random& random) {
  check::begin(name);
  set_threads(4);
  const check::Model model(c, random);
  const check::Angles angles(c.head_dim, random);
  const Layout layout(c, random);
  const std::vector<Inputs> passes = plan(c, angles, layout, random);
  const Buffer<int32_t> table = check::guarded(layout.table);
  const int64_t layers = int64_t(c.windows.size()), width = c.vocabulary;

  std::vector<Doubles> exact, allowed;  // logits of each pass, and how far each of its rows may be off
  check::Loops loops(c, model, angles, false, 0);
  for (const Inputs& in : passes) {
    exact.push_back(loops.logits(in.pass));
    allowed.emplace_back(in.pass.logit_rows.size());
  }
  for (int i = 0; i < (ways.threads_only ? 1 : 3); ++i) {
    check::Loops moved(c, model, angles, true, random.next());
    for (size_t p = 0; p < passes.size(); ++p) {
      const Doubles other = moved.logits(passes[p].pass);
      for (size_t r = 0; r < allowed[p].size(); ++r) {
        const size_t at = r * size_t(width);
        allowed[p][r] = std::fmax(allowed[p][r], 3 * distance(&other[at], &exact[p][at], width));
      }
    }
  }

  std::vector<float> first;  // of the instruction set under way: equal bits from any team, and layer by layer
  const int64_t key_row = c.key_bits ? kv_row_bytes(c.head_dim, c.key_bits) : c.head_dim * element_bytes(c.dtype);
  const int64_t value_row = c.value_bits ? kv_row_bytes(c.head_dim, c.value_bits) : c.head_dim * element_bytes(c.dtype);
  const int64_t heads = layout.pages * c.page_size * c.kv_heads;
  ways.each([&](int team) {
    // Every second layer is in a group with pages of its own: the same ones, counted from the other end.
    std::vector<Buffer<uint8_t>> keys, values;
    std::vector<StepHome> homes;
    for (int64_t l = 0; l < layers; ++l) homes.push_back({l % 2, l / 2});
    for (int64_t g = 0; g < 2; ++g) {
      keys.emplace_back((layers + 1 - g) / 2 * heads * key_row);
      values.emplace_back((layers + 1 - g) / 2 * heads * value_row);
    }
    Buffer<int32_t> other_table(table.size());
    for (int64_t i = 0; i < table.size(); ++i) other_table[i] = int32_t(table[i] < 0 ? -1 : layout.pages - 1 - table[i]);
    std::vector<float> said;
    for (size_t p = 0; p < passes.size(); ++p) {
      const Inputs& in = passes[p];
      StepBatch b{};
      b.rows = in.pass.tokens.size(), b.sequences = in.kv_lengths.size();
      b.table_width = layout.table_width, b.page_size = c.page_size;
      b.tokens = in.pass.tokens.data(), b.places = in.places.data();
      b.q_starts = in.q_starts.data(), b.kv_lengths = in.kv_lengths.data();
      b.ropes = angles.ropes.data(), b.rope_count = int64_t(angles.ropes.size());
      Buffer<int64_t> other_slots(b.rows);
      for (int64_t r = 0; r < b.rows; ++r) {
        const int64_t page = in.slots[r] / c.page_size;
        other_slots[r] = (layout.pages - 1 - page) * c.page_size + in.slots[r] % c.page_size;
      }
      StepGroup groups[2];
      for (size_t g = 0; g < 2; ++g) {
        groups[g].keys = {keys[g].data(), heads * key_row, c.key_bits};
        groups[g].values = {values[g].data(), heads * value_row, c.value_bits};
        groups[g].slots = g == 0 ? in.slots.data() : other_slots.data();
        groups[g].page_table = g == 0 ? table.data() : other_table.data();
      }
      b.groups = groups, b.homes = homes.data();
      b.page_dtype = c.dtype;
      b.logit_rows = in.logit_rows.data(), b.logits = in.logit_rows.size();
      std::vector<Buffer<float>> weights;  // of every row, for each adapter
      std::vector<StepShare> shares;
      for (size_t a = 0; a < c.shares.size(); ++a) {
        weights.emplace_back(b.rows);
        for (int64_t r = 0; r < b.rows; ++r) {
          weights.back()[r] = float(c.shares[a][size_t(in.pass.sequence[size_t(r)])]);
        }
        shares.push_back({&model.adapters[a], weights.back().data()});
      }
      b.shares = shares.data(), b.share_count = int64_t(shares.size());
      Buffer<float> x(b.rows * c.hidden), logits(b.logits * width);
      StepTimes times{};
      if (team == 1) {
        for (int64_t l = 0; l < layers; ++l) step_cpu(model.step, b, l, l + 1, x.data(), logits.data(), &times);
        double total = 0;
        for (double seconds : times.seconds) total += seconds;
        EXPECT(b.rows == 0 || total > 0);
      } else {
        step_cpu(model.step, b, 0, layers, x.data(), logits.data(), nullptr);
      }
      for (int64_t r = 0; r < b.logits; ++r) {
        const Doubles got(logits.data() + r * width, logits.data() + (r + 1) * width);
        const double off = distance(got.data(), &exact[p][size_t(r * width)], width);
        check::expect_near(off, 0, allowed[p][size_t(r)], "the distance of logits", int64_t(p), r);
      }
      EXPECT(all_finite(logits.data(), logits.size()));
      said.insert(said.end(), logits.begin(), logits.end());
    }
    if (team == 4) first = said;
    EXPECT(said.size() == first.size() && check::same_bits(said.data(), first.data(), int64_t(said.size())));
  });
}

void check_finite(const check::Ways& ways, int64_t count, Random& random) {
  check::begin("finite, " + std::to_string(count));
  Buffer<float> x(count);
  fill_normal(x, random, 1e38f / 8);
  ways.each([&](int) {
    EXPECT(all_finite(x.data(), count));
    for (const float bad : {std::nanf(""), INFINITY, -INFINITY}) {
      if (count == 0) continue;
      const int64_t at = random.below(count);
      const float before = x[at];
      x[at] = bad;
      EXPECT(!all_finite(x.data(), count));
      x[at] = before;
    }
  });
}

}  // namespace

int main(int argc, char** argv) {
  const check::Ways ways(argc, argv);
  Random random(6);
  // Large enough that every thread has a part: 160 tokens of three sequences, then one more of each.
  Case large;
  large.hidden = 128, large.head_dim = 32, large.inner = 160, large.windows = {20};
  large.steps = {{60, 40, 60}, {1, 1, 1}};
  check_case(ways, "dense, large", large, random);
  large.packed = true, large.bias = true;
  check_case(ways, "packed, large", large, random);
  large.bias = false, large.experts = 6, large.visits = 3, large.inner = 64;
  check_case(ways, "packed experts, large", large, random);
  large.packed = false;
  check_case(ways, "dense experts, large", large, random);
  large.experts = large.visits = 0, large.shares = {{1, 0, 0.5}, {0.25, -1, 0}};
  check_case(ways, "adapters, large", large, random);
  check_finite(ways, 300000, random);
  if (ways.threads_only) return 0;

  // Prompts of any length, chunks of them beside single tokens, sequences that pause, and nothing at all.
  Case small;
  small.steps = {{7, 1, 0, 4}, {1, 1, 5, 1}, {3, 0, 1, 1}, {0, 0, 0, 0}, {1, 1, 1, 1}};
  for (const bool packed : {false, true}) {
    for (const bool plain : {false, true}) {
      for (const Dtype dtype : check::kDtypes) {
        Case c = small;
        c.packed = packed, c.dtype = dtype;
        c.post_norms = !plain, c.head_norms = packed || !plain, c.bias = plain;
        if (plain) c.activation = Activation::gelu_tanh;
        const std::string kind = std::string(packed ? "packed" : "dense") + (plain ? ", plain" : "");
        check_case(ways, kind + ", dtype " + std::to_string(int(dtype)), c, random);
        if (dtype != Dtype::float16) continue;
        c.key_bits = 8, c.value_bits = packed ? 6 : 8;
        check_case(ways, kind + ", quantized pages", c, random);
      }
    }
  }
  for (const bool packed : {false, true}) {
    for (const int64_t visits : {1, 2, 5}) {
      Case c = small;
      c.packed = packed, c.post_norms = visits != 2;
      c.experts = 5, c.visits = visits, c.inner = 32, c.windows.push_back(7);
      const std::string kind = packed ? "packed experts, " : "dense experts, ";
      check_case(ways, kind + std::to_string(visits) + " of 5", c, random);
    }
  }
  for (const bool packed : {false, true}) {
    for (const Dtype dtype : check::kDtypes) {
      Case c = small;
      c.packed = packed, c.dtype = dtype, c.bias = packed;
      c.shares = {{0.5, 0, 1, -1}, {0, 0, 0, 0.25}, {1, 1, 1, 1}};
      check_case(ways, std::string(packed ? "packed" : "dense") + ", adapters", c, random);
      if (packed) continue;
      c.bias = false, c.experts = 4, c.visits = 2;
      check_case(ways, "adapters beside experts", c, random);
    }
  }
  for (const int64_t page_size : {1, 16}) {
    Case c = small;
    c.page_size = page_size, c.windows = {1, 3, 6}, c.kv_heads = 1, c.heads = 3, c.head_dim = 24, c.hidden = 32;
    check_case(ways, "windows, pages of " + std::to_string(page_size), c, random);
  }
  for (const int64_t count : {0, 1, 15, 16, 17, 100}) check_finite(ways, count, random);
  return 0;
}
