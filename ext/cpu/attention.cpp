// Paged attention: cuts the queries into blocks and the keys into chunks, and shares the work among threads. None of
// that changes a result, see attention.h.
#include "attention.h"

#include <atomic>
#include <cstring>
#include <limits>
#include <vector>

#include "../common/kv_rows.h"
#include "attention_isa.h"
#include "isa.h"
#include "row_kernels.h"
#include "scratch.h"
#include "threads.h"

namespace exl {
namespace {

const AttentionIsa& chosen() {
#if EXL_X86_ISA
  if (isa() == Isa::avx512) return attention_avx512();
  if (isa() == Isa::avx2) return attention_avx2();
#endif
  return attention_portable();
}

// Consecutive query rows of one sequence and one key/value head. Row n of a (sequence, head) is query head n % group of
// that key/value head at token n / group, so that the heads that share keys lie together.
struct Item {
  int64_t sequence;
  int64_t kv_head;
  int64_t row;   // first
  int64_t rows;  // 1 .. kMostRows
  int64_t first_chunk, last_chunk;
};

// One chunk of one item, to be merged later.
struct Part {
  int64_t item;
  int64_t chunk;
};

// Which keys of a chunk the rows of an item see, and where they are: what AttentionChunk says of them.
struct Places {
  int64_t begin[kMostRows], end[kMostRows];
  int64_t first, last;
  const void *keys[kChunk], *values[kChunk];  // by the index within the chunk; those of [first, last) are set
};

// What a thread works on, and what it asks for meanwhile. Works are counted from 0.
struct Lane {
  FetchQueue queue;
  Places places[2];
  int which;          // those of the work that comes next
  int64_t announced;  // which work that is; -1: none
};

class Job {
 public:
  explicit Job(const AttentionArgs& args)
      : a_(args), kernels_(chosen()), group_(args.heads / args.kv_heads), padded_((args.head_dim + 15) / 16 * 16) {
    for (int64_t s = 0; s < a_.sequences; ++s) {
      const int64_t rows = (a_.q_starts[s + 1] - a_.q_starts[s]) * group_;
      for (int64_t row = 0; row < rows; row += kMostRows) {
        Item item{s, 0, row, rows - row < kMostRows ? rows - row : kMostRows, 0, 0};
        item.first_chunk = oldest(index_of(item, 0)) / kChunk;
        item.last_chunk = index_of(item, item.rows - 1) / kChunk;
        for (item.kv_head = 0; item.kv_head < a_.kv_heads; ++item.kv_head) items_.push_back(item);
      }
    }
  }

  void run() {
    if (a_.key_bits != 0) rotate_queries();
    const int64_t team = threads(), items = int64_t(items_.size());
    const bool few_items = team > 1 && items < 4 * team;
    std::vector<int64_t> whole, first_part(size_t(items), -1);
    std::vector<Part> parts;
    int64_t most_rows = 0;  // of an item that is cut into parts
    int64_t part_cost = 1;  // cycles, roughly, of the longest part
    for (int64_t i = 0; i < items; i += a_.kv_heads) {  // the heads of one block of queries
      const Item& item = items_[size_t(i)];
      const int64_t end = i + a_.kv_heads;
      if (item.rows > kFewRows && !few_items) {
        for (int64_t head = i; head < end; ++head) whole.push_back(head);
        continue;
      }
      // Chunk by chunk, all heads of a chunk together: the heads' keys interleave in memory, and a walk over the whole
      // context for each head alone would miss the caches of address translation at every key.
      for (int64_t head = i; head < end; ++head) first_part[size_t(head)] = int64_t(parts.size()) + head - i;
      most_rows = item.rows > most_rows ? item.rows : most_rows;
      const int64_t keys = item.last_chunk > 0 ? kChunk : a_.kv_lengths[item.sequence];
      const int64_t cost = keys * (item.rows * padded_ / 8 + 20);
      part_cost = cost > part_cost ? cost : part_cost;
      for (int64_t chunk = item.first_chunk; chunk <= item.last_chunk; ++chunk) {
        for (int64_t head = i; head < end; ++head) parts.push_back({head, chunk});
      }
    }
    static thread_local Scratch memory;
    slot_size_ = 2 * state_size() + kMostRows * (padded_ + kChunk) + panel_floats(padded_);
    scratch_ = memory.floats(team * slot_size_ + int64_t(parts.size()) * state_size(most_rows));
    float* partial = scratch_ + team * slot_size_;

    each(int64_t(whole.size()), 1, [&](int64_t n, float* total, int64_t) {
      const Item& item = items_[size_t(whole[whole.size() - 1 - size_t(n)])];  // the longest ones first
      clear(item, total);
      Places places;
      for (int64_t chunk = item.first_chunk; chunk <= item.last_chunk; ++chunk) {
        find(item, chunk, places);
        const AttentionState next = state(total + state_size());
        attend(&item, 1, places, queries(total), &next, nullptr);
        kernels_.merge(state(total), state(total + state_size()), item.rows, padded_);
      }
      finish(item, total);
    });
    // A work is some neighbouring heads of a chunk, as many as leave every thread something to do.
    const int64_t count = int64_t(parts.size());
    int64_t heads = 1;
    for (int64_t h = 2; h <= kMostHeads && most_rows <= kFewRows && a_.key_bits == 0; ++h) {
      if (a_.kv_heads % h == 0 && (team == 1 || count >= 2 * team * h)) heads = h;
    }
    const int64_t works = count / heads, share = works / (8 * team) + 1, least = kGrainCycles / (part_cost * heads) + 1;
    const int64_t most = a_.kv_heads / heads, fair = share < most ? share : most, grain = fair > least ? fair : least;
    static thread_local std::vector<Lane> lane_memory;
    if (int64_t(lane_memory.size()) < team) lane_memory.resize(size_t(team));
    Lane* const lanes = lane_memory.data();
    for (int64_t slot = 0; slot < team; ++slot) lanes[slot].announced = -1;
    each(works, grain, [&](int64_t n, float* memory, int64_t slot) {
      Lane& lane = lanes[slot];
      const Part& part = parts[size_t(n * heads)];
      const Item* items = &items_[size_t(part.item)];
      if (lane.announced != n) {
        lane.queue = {};
        announce(part, heads, lane);
        fetch_some(lane.queue, kFirstLines);
      }
      const Places& places = lane.places[lane.which];
      fetch_only(lane.queue, 2);
      lane.which ^= 1;
      const int64_t next = (n + 1) % grain != 0 ? n + 1 : n + 1 + (team - 1) * grain;  // most likely
      lane.announced = next < works ? next : -1;
      if (next < works) announce(parts[size_t(next * heads)], heads, lane);
      AttentionState to[kMostHeads];
      for (int64_t h = 0; h < heads; ++h) {
        to[h] = state(partial + (n * heads + h) * state_size(most_rows), most_rows);
      }
      attend(items, heads, places, queries(memory), to, &lane.queue);
    });
    each(parts.empty() ? 0 : items, a_.kv_heads, [&](int64_t i, float* total, int64_t) {
      if (first_part[size_t(i)] < 0) return;
      const Item& item = items_[size_t(i)];
      clear(item, total);
      float* from = partial + first_part[size_t(i)] * state_size(most_rows);
      for (int64_t chunk = item.first_chunk; chunk <= item.last_chunk; ++chunk) {
        kernels_.merge(state(total), state(from, most_rows), item.rows, padded_);
        from += a_.kv_heads * state_size(most_rows);
      }
      finish(item, total);
    });
  }

 private:
  static constexpr int64_t kFewRows = 12;
  static_assert(kFewRows * kMostHeads <= kMostRows, "scratch memory");
  static constexpr int64_t kGrainCycles = 16000;  // work worth waking a thread for
  static constexpr int64_t kFirstLines = 512;     // asked for before a thread's first work

  // body(n, slot memory, slot) for every n < count, `grain` at a time to whichever thread is free.
  template <class Body>
  void each(int64_t count, int64_t grain, const Body& body) const {
    if (count == 0) return;
    std::atomic<int64_t> next{0};
    const int64_t team = threads(), pieces = (count + grain - 1) / grain;
    parallel_for(team < pieces ? team : pieces, [&](int64_t slot, int64_t) {
      for (int64_t n; (n = next.fetch_add(grain, std::memory_order_relaxed)) < count;) {
        for (int64_t i = n; i < n + grain && i < count; ++i) body(i, scratch_ + slot * slot_size_, slot);
      }
    });
  }

  // Slot memory: two states, the queries of an item, their scores, a panel of keys or values.
  float* queries(float* slot) const { return slot + 2 * state_size(); }
  int64_t state_size(int64_t rows = kMostRows) const { return rows * (padded_ + 2); }

  AttentionState state(float* memory, int64_t rows = kMostRows) const {
    return {memory + rows * padded_, memory + rows * (padded_ + 1), memory};
  }

  // Index in its sequence of the token of row `r` of an item, and the oldest key it sees.
  int64_t index_of(const Item& item, int64_t r) const {
    const int64_t tokens = a_.q_starts[item.sequence + 1] - a_.q_starts[item.sequence];
    return a_.kv_lengths[item.sequence] - tokens + (item.row + r) / group_;
  }
  int64_t oldest(int64_t index) const { return index < a_.window ? 0 : index - a_.window + 1; }

  // Elements of q and out before row `r` of an item.
  int64_t offset(const Item& item, int64_t r) const {
    const int64_t n = item.row + r, token = a_.q_starts[item.sequence] + n / group_;
    return (token * a_.heads + item.kv_head * group_ + n % group_) * a_.head_dim;
  }

  // Keys are stored rotated, so the queries meet them rotated. All at once: every part of an item loads its queries.
  void rotate_queries() {
    static thread_local Scratch memory;
    const int64_t count = a_.q_starts[a_.sequences] * a_.heads;
    float* rotated = memory.floats(count * a_.head_dim);
    const RowKernels& rows = row_kernels();
    const auto body = [&](int64_t begin, int64_t end) {
      const size_t bytes = size_t((end - begin) * a_.head_dim) * sizeof(float);
      std::memcpy(rotated + begin * a_.head_dim, a_.q + begin * a_.head_dim, bytes);
      for (int64_t n = begin; n < end; ++n) rows.rotate(rotated + n * a_.head_dim, a_.head_dim);
    };
    parallel_for(count, body, 1 + kGrainCycles / a_.head_dim);
    q_ = rotated;
  }

  void load_queries(const Item& item, float* q) const {
    for (int64_t r = 0; r < item.rows; ++r, q += padded_) {
      std::memcpy(q, q_ + offset(item, r), size_t(a_.head_dim) * sizeof(float));
      for (int64_t d = a_.head_dim; d < padded_; ++d) q[d] = 0.0f;
    }
  }

  void clear(const Item& item, float* memory) const {
    const AttentionState total = state(memory);
    for (int64_t r = 0; r < item.rows; ++r) {
      total.maximum[r] = -std::numeric_limits<float>::infinity();
      total.sum[r] = 0.0f;
    }
    std::memset(total.mixed, 0, size_t(item.rows * padded_) * sizeof(float));
  }

  // The pointers of a chunk's keys are looked up one by one: pages of any size, in any order.
  void find(const Item& item, int64_t chunk, Places& to) const {
    const int64_t base = chunk * kChunk;
    int64_t first = kChunk, last = 0;
    for (int64_t r = 0; r < item.rows; ++r) {
      const int64_t index = index_of(item, r), low = oldest(index) - base, high = index + 1 - base;
      const int64_t begin = low < 0 ? 0 : low, end = high > kChunk ? kChunk : high;
      to.begin[r] = begin, to.end[r] = end;
      if (begin >= end) continue;
      first = begin < first ? begin : first;
      last = end > last ? end : last;
    }
    if (first >= last) first = last = 0;
    to.first = first, to.last = last;
    const int32_t* pages = a_.page_table + item.sequence * a_.table_width;
    const int64_t key_bytes = head_bytes(a_.key_bits), value_bytes = head_bytes(a_.value_bits);
    for (int64_t j = first; j < last;) {
      const int64_t page = (base + j) / a_.page_size, start = page * a_.page_size - base;
      const int64_t stop = start + a_.page_size < last ? start + a_.page_size : last;
      int64_t head = (int64_t(pages[page]) * a_.page_size + j - start) * a_.kv_heads + item.kv_head;
      for (; j < stop; ++j, head += a_.kv_heads) {
        to.keys[j] = static_cast<const char*>(a_.k_pages) + head * key_bytes;
        to.values[j] = static_cast<const char*>(a_.v_pages) + head * value_bytes;
      }
    }
  }

  // Finds the keys of `heads` heads from the first of `part` on, and puts them last in the lane's queue. Rows of codes
  // are asked for by their kernels.
  void announce(const Part& part, int64_t heads, Lane& lane) const {
    Places& places = lane.places[lane.which];
    find(items_[size_t(part.item)], part.chunk, places);
    if (a_.key_bits != 0) return;
    const int64_t count = places.last - places.first, bytes = heads * head_bytes(0);
    fetch_later(lane.queue, {places.keys + places.first, count, bytes});
    fetch_later(lane.queue, {places.values + places.first, count, bytes});
  }

  // `heads` items that differ in their head only. q: their queries, then scratch for scores and a panel.
  void attend(const Item* items, int64_t heads, const Places& places, float* q, const AttentionState* to,
              FetchQueue* queue) const {
    const int64_t rows = items->rows;
    AttentionChunk chunks[kMostHeads];
    for (int64_t h = 0; h < heads; ++h) {
      AttentionChunk& c = chunks[h];
      c.q = q + h * rows * padded_;
      c.rows = rows;
      c.head_dim = a_.head_dim, c.padded_dim = padded_;
      c.keys = places.keys, c.values = places.values, c.skip = h * a_.head_dim;
      c.dtype = a_.dtype, c.key_bits = a_.key_bits, c.value_bits = a_.value_bits;
      c.first = places.first, c.last = places.last, c.begin = places.begin, c.end = places.end;
      c.scale = a_.key_bits != 0 ? a_.scale / kv_middle(a_.key_bits) : a_.scale;
      c.softcap = a_.softcap;
      c.scores = q + kMostRows * padded_ + h * rows * kChunk;
      c.panel = q + kMostRows * (padded_ + kChunk);
      load_queries(items[h], q + h * rows * padded_);
    }
    kernels_.attend(chunks, heads, to, queue);
  }

  int64_t head_bytes(int bits) const {
    return bits != 0 ? kv_row_bytes(a_.head_dim, bits) : a_.head_dim * element_bytes(a_.dtype);
  }

  void finish(const Item& item, float* memory) const {
    const AttentionState total = state(memory);
    for (int64_t r = 0; r < item.rows; ++r) {
      float* out = a_.out + offset(item, r);
      const float* mixed = total.mixed + r * padded_;
      for (int64_t d = 0; d < a_.head_dim; ++d) out[d] = mixed[d] / total.sum[r];
      if (a_.value_bits == 0) continue;
      row_kernels().rotate(out, a_.head_dim);
      for (int64_t d = 0; d < a_.head_dim; ++d) out[d] /= kv_middle(a_.value_bits);
    }
  }

  const AttentionArgs& a_;
  const float* q_ = a_.q;
  const AttentionIsa& kernels_;
  const int64_t group_, padded_;
  std::vector<Item> items_;
  float* scratch_ = nullptr;
  int64_t slot_size_ = 0;
};

}  // namespace

void paged_attention_cpu(const AttentionArgs& args) { Job(args).run(); }

}  // namespace exl
