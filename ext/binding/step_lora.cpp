// Adapters of a model of step.cpp. Contract: cpu/step_lora.h.
//
// step_adapter checks an adapter's matrices once and keeps them; step_share says who takes part in the next pass.
#include <cmath>

#include "step.h"
#include "step_lora.h"

namespace exl {
namespace {

// The matrix at a place; null: there is none, or it belongs to a mixture.
const StepMatrix* step_place(const StepModel& m, int64_t place) {
  const int64_t layer = place / 7, layers = int64_t(m.layers.size());
  if (place == 7 * layers) return &m.head;
  if (place < 0 || layer >= layers) return nullptr;
  const StepLayer& l = m.layers[size_t(layer)];
  const StepMatrix* const all[] = {&l.query, &l.key, &l.value, &l.out, &l.gate, &l.up, &l.down};
  const StepMatrix* found = all[place % 7];
  return found->place == place ? found : nullptr;
}

// Change i belongs to the matrix at places[i], see cpu/step_lora.h: downs[i] (rank, inputs), ups[i] (outputs, rank).
// Returns a number for step_share and step_drop.
int64_t op_step_adapter(int64_t number, std::vector<int64_t> places, std::vector<Tensor> downs, std::vector<Tensor> ups,
                        std::vector<double> scales) {
  const char* op = "step_adapter";
  const auto program = step_program(op, number);
  const StepModel& m = program->model;
  EXL_CHECK(downs.size() == places.size() && ups.size() == places.size() && scales.size() == places.size(), "exl::", op,
            ": ", places.size(), " places, ", downs.size(), " and ", ups.size(), " matrices, ", scales.size(),
            " scales");
  auto held = std::make_shared<StepAdapterHeld>();
  held->adapter.changes.resize(7 * m.layers.size() + 1);
  for (size_t i = 0; i < places.size(); ++i) {
    const StepMatrix* w = step_place(m, places[i]);
    EXL_CHECK(w != nullptr, "exl::", op, ": there is no matrix at place ", places[i]);
    const Dtype down = check_cpu_float(op, "down", downs[i]), up = check_cpu_float(op, "up", ups[i]);
    check_shape(op, "down", downs[i], {-1, w->inputs});
    const int64_t rank = downs[i].size(0);
    check_shape(op, "up", ups[i], {w->outputs, rank});
    EXL_CHECK(rank > 0 && std::isfinite(scales[i]), "exl::", op, ": rank ", rank, ", scale ", scales[i]);
    held->adapter.changes[size_t(places[i])].push_back({{downs[i].data_ptr(), down, w->inputs, rank},
                                                        {ups[i].data_ptr(), up, rank, w->outputs},
                                                        float(scales[i])});
  }
  held->kept = std::move(downs);
  held->kept.insert(held->kept.end(), ups.begin(), ups.end());
  const int64_t own = ++program->lora.last;
  program->lora.adapters[own] = std::move(held);
  return own;
}

// Nothing happens if the program or the adapter is gone already.
void op_step_drop(int64_t number, int64_t adapter) {
  std::shared_ptr<StepProgram> program;
  {
    const std::lock_guard<std::mutex> hold(step_guard);
    const auto found = step_programs.find(number);
    if (found == step_programs.end()) return;
    program = found->second;
  }
  program->lora.adapters.erase(adapter);
}

// Of the next pass: `adapters`, in the order in which they are added, and the weights of each for every sequence.
void op_step_share(int64_t number, std::vector<int64_t> adapters, std::vector<double> weights) {
  const char* op = "step_share";
  StepLora& lora = step_program(op, number)->lora;
  lora.next.clear(), lora.next_weights.clear();
  for (int64_t adapter : adapters) {
    const auto found = lora.adapters.find(adapter);
    EXL_CHECK(found != lora.adapters.end(), "exl::", op, ": there is no adapter ", adapter);
    lora.next.push_back(found->second);
  }
  for (double weight : weights) lora.next_weights.push_back(float(weight));
}

}  // namespace
}  // namespace exl

STABLE_TORCH_LIBRARY_FRAGMENT(exl, m) {
  m.def("step_adapter(int program, int[] places, Tensor[] downs, Tensor[] ups, float[] scales) -> int");
  m.def("step_drop(int program, int adapter) -> ()");
  m.def("step_share(int program, int[] adapters, float[] weights) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(exl, CPU, m) { m.impl("step_adapter", TORCH_BOX(&exl::op_step_adapter)); }

STABLE_TORCH_LIBRARY_IMPL(exl, CompositeExplicitAutograd, m) {
  m.impl("step_drop", TORCH_BOX(&exl::op_step_drop));
  m.impl("step_share", TORCH_BOX(&exl::op_step_share));
}
