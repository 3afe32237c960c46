// Matrix products on the card. Contracts: ../../cuda/skinny.h, skinny_stage.h.
#include "linear.h"

#include "../../cuda/skinny_stage.h"
#include "library.h"

namespace exl {
namespace {

constexpr int64_t kCutRows[kLinearCuts] = {kSkinnyRows, kGemmRows, kMostGemmRows};

LinearCut linear_cut(const char* op, const Tensor& segments, const Tensor& first, int64_t slots, const Tensor& like) {
  check_cuda(op, "segments", segments, ScalarType::Int);
  check_same_device(op, "segments", segments, like);
  check_shape(op, "segments", segments, {-1, int64_t(sizeof(Segment) / 4)});
  check_cuda(op, "first", first, ScalarType::Int);
  check_same_device(op, "first", first, like);
  EXL_CHECK(first.dim() == 1 && first.size(0) >= 1 && slots >= 0, "exl_cuda::", op, ": first ", describe(first),
            ", slots ", slots);
  return {static_cast<const Segment*>(segments.data_ptr()), static_cast<const int32_t*>(first.data_ptr()),
          int32_t(first.size(0) - 1), int32_t(slots)};
}

// uint8 on the CPU: everything about one launch but the input. All tensors given must outlive it. `matrices` by
// linear_matrix, all with the same rows; segments, first, slots for up to 32, 64 and 256 rows; biases one per matrix, or
// none. gate: 0, or which activation joins two matrices to one result (skinny.h).
Tensor cuda_linear_plan(std::vector<Tensor> matrices, std::vector<Tensor> biases, const std::optional<Tensor>& rows,
                        int64_t inputs, std::vector<Tensor> segments, std::vector<Tensor> first,
                        std::vector<int64_t> slots, const Tensor& partials, const Tensor& tickets, int64_t gate) {
  const char* op = "linear_plan";
  EXL_CHECK(!matrices.empty() && matrices.size() <= size_t(kMostMatrices), "exl_cuda::", op, ": 1 to ", kMostMatrices,
            " matrices, got ", matrices.size());
  EXL_CHECK(biases.empty() || biases.size() == matrices.size(), "exl_cuda::", op, ": no bias or one per matrix");
  EXL_CHECK(segments.size() == kLinearCuts && first.size() == kLinearCuts && slots.size() == kLinearCuts, "exl_cuda::",
            op, ": ", kLinearCuts, " lists of segments, first and slots");
  LinearPlanBlob plan{};
  plan.magic = kLinearPlanMagic;
  plan.device = partials.get_device_index();
  plan.count = int64_t(matrices.size());
  plan.inputs = inputs;
  for (size_t i = 0; i < matrices.size(); ++i) {
    const auto& blob = linear_unblob<LinearMatrixBlob>(op, "matrices", matrices[i], kLinearMatrixMagic);
    const CudaMatrix& w = plan.work.matrix[i] = blob.matrix;
    EXL_CHECK(blob.device == plan.device, "exl_cuda::", op, ": matrix ", i, " is on device ", blob.device, ", not ",
              plan.device);
    EXL_CHECK(i == 0 || w.unit_count == plan.units, "exl_cuda::", op, ": matrix ", i, " has ", w.unit_count,
              " units, the first ", plan.units);
    plan.units = w.unit_count;
    const int32_t slot = int32_t(w.widest * kLineBytes + w.record);
    if (slot > plan.work.slot_bytes) plan.work.slot_bytes = slot;
    if (!biases.empty()) {
      check_cuda(op, "biases", biases[i], ScalarType::Half);
      check_same_device(op, "biases", biases[i], partials);
      check_shape(op, "biases", biases[i], {w.outputs});
      plan.work.output[i].bias = biases[i].data_ptr();
    }
  }
  EXL_CHECK(gate >= 0 && gate <= 4, "exl_cuda::", op, ": gate is 0 to 4, got ", gate);
  EXL_CHECK(gate == 0 || (matrices.size() == 2 && biases.empty() &&
                          plan.work.matrix[0].outputs == plan.work.matrix[1].outputs),
            "exl_cuda::", op, ": a gate joins two matrices of as many outputs, without bias");
  plan.work.gate = Gate(gate);
  EXL_CHECK(inputs >= 0 && (rows.has_value() || inputs <= plan.units * kUnitRows), "exl_cuda::", op, ": ", inputs,
            " inputs for ", plan.units, " units");
  if (rows.has_value()) {
    check_cuda(op, "rows", *rows, ScalarType::Int);
    check_same_device(op, "rows", *rows, partials);
    check_shape(op, "rows", *rows, {plan.units * kUnitRows});
    plan.rows = static_cast<const int32_t*>(rows->data_ptr());
  }
  check_cuda(op, "partials", partials, ScalarType::Float);
  check_cuda(op, "tickets", tickets, ScalarType::Int);
  for (int i = 0; i < kLinearCuts; ++i) {
    plan.cut[i] = linear_cut(op, segments[i], first[i], slots[i], partials);
    const int64_t columns = (i == 0 ? kSkinnyColumns : kGemmColumns) * kTileColumns32;
    const int64_t blocks = i == 2 ? kMostGemmRows / kGemmRows : 1, height = i == 0 ? kSkinnyRows : kGemmRows;
    EXL_CHECK(partials.numel() >= blocks * slots[i] * columns * height && tickets.numel() >= blocks * slots[i],
              "exl_cuda::", op, ": ", slots[i], " slots of batches up to ", kCutRows[i], " do not fit partials ",
              describe(partials), ", tickets ", describe(tickets));
  }
  plan.work.partials = static_cast<float*>(partials.data_ptr());
  plan.work.tickets = static_cast<int32_t*>(tickets.data_ptr());
  return linear_blob(plan);
}

void linear_stage(const Tensor& x, const int32_t* rows, const Tensor& staged, const Tensor& factors, int64_t units,
                  Dtype dtype, cudaStream_t stream) {
  const char* op = "linear_stage";
  check_cuda(op, "staged", staged, ScalarType::Half);
  check_cuda(op, "factors", factors, ScalarType::Float);
  check_same_device(op, "staged", staged, x);
  check_same_device(op, "factors", factors, x);
  check_aligned(op, "staged", staged, 16);
  EXL_CHECK(staged.numel() >= x.size(0) * units * kUnitRows && factors.numel() >= x.size(0), "exl_cuda::", op, ": ",
            units, " units of x ", describe(x), " need more room than staged ", describe(staged), ", factors ",
            describe(factors));
  skinny_stage_cuda(x.data_ptr(), dtype, rows, staged.data_ptr(), static_cast<float*>(factors.data_ptr()), x.size(0),
                    x.size(1), units, stream);
}

// The products of x (m, inputs), m at most 256, with all matrices of the plan. Results have x's dtype, or float32 if
// `wide`; with a gate there is one. With `stream`, float32 (m, outputs), the result of the one matrix is added to it and
// nothing is returned.
std::vector<Tensor> cuda_linear_multiply(const Tensor& x, const Tensor& plan_blob, const Tensor& staged,
                                         const Tensor& factors, bool wide, const std::optional<Tensor>& stream) {
  const char* op = "linear_multiply";
  const auto& plan = linear_unblob<LinearPlanBlob>(op, "plan", plan_blob, kLinearPlanMagic);
  const Dtype dtype = check_cuda_float(op, "x", x);
  check_shape(op, "x", x, {-1, plan.inputs});
  EXL_CHECK(x.get_device_index() == plan.device, "exl_cuda::", op, ": the plan is for device ", plan.device,
            ", got x ", describe(x));
  const int64_t m = x.size(0);
  EXL_CHECK(m <= kMostGemmRows, "exl_cuda::", op, ": at most ", kMostGemmRows, " rows, got ", m);
  const OnDevice on(x);
  LinearWork work = plan.work;
  std::vector<Tensor> results;
  if (stream.has_value()) {
    EXL_CHECK(plan.count == 1, "exl_cuda::", op, ": a stream takes the result of one matrix, the plan has ",
              plan.count);
    check_cuda(op, "stream", *stream, ScalarType::Float);
    check_same_device(op, "stream", *stream, x);
    check_shape(op, "stream", *stream, {m, work.matrix[0].outputs});
    work.output[0].stream = static_cast<float*>(stream->data_ptr());
  } else {
    for (int64_t i = 0; i < (work.gate == Gate::none ? plan.count : 1); ++i) {
      results.push_back(empty_cuda({m, work.matrix[i].outputs}, wide ? ScalarType::Float : x.scalar_type(), x));
      work.output[i].y = results.back().data_ptr();
      work.output[i].dtype = wide ? Dtype::float32 : dtype;
    }
  }
  if (m == 0) return results;
  linear_stage(x, plan.rows, staged, factors, plan.units, dtype, on.stream());
  const LinearCut& cut = plan.cut[m <= kCutRows[0] ? 0 : m <= kCutRows[1] ? 1 : 2];
  work.segments = cut.segments;
  work.first = cut.first;
  work.blocks = cut.blocks;
  work.slots = cut.slots;
  work.staged = staged.data_ptr();
  work.factors = static_cast<const float*>(factors.data_ptr());
  work.m = int32_t(m);
  (m <= kSkinnyRows ? skinny_cuda : gemm_cuda)(work, on.stream());
  return results;
}

}  // namespace
}  // namespace exl

EXL_CUDA_FRAGMENT(m) {
  m.def(
      "linear_plan(Tensor[] matrices, Tensor[] biases, Tensor? rows, int inputs, Tensor[] segments, Tensor[] first, "
      "int[] slots, Tensor partials, Tensor tickets, int gate) -> Tensor");
  m.def(
      "linear_multiply(Tensor x, Tensor plan, Tensor(a!) staged, Tensor(b!) factors, bool wide, Tensor(c!)? stream) "
      "-> Tensor[]");
}

EXL_CUDA_IMPL(m) {
  m.impl("linear_plan", TORCH_BOX(&exl::cuda_linear_plan));
  m.impl("linear_multiply", TORCH_BOX(&exl::cuda_linear_multiply));
}
