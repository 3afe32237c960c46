// The mixture of experts of a pass (step.h): what exl_runtime/model/moe.py computes with the operators of this folder,
// to the same bits.
//
//   weight, experts = route(x @ router)                                                  (route.h)
//   y = 0, then for the experts e of a row in ascending order:   y = y + weight * ((activation(x @ Wg) * (x @ Wu)) @ Wd)
//
// Rows are sorted by expert, so that every expert in use is read once for all of its rows. Experts that are packed share
// three regions of threads (linear_groups.h), dense ones are multiplied one by one.
//
// A row of an expert counts as one of a batch of that expert's rows in the pass (StepMatrix::residual_rows).
#pragma once

#include "step.h"
#include "step_watch.h"

namespace exl {

// x, y float32 (rows, hidden), rows >= 1; y may be the memory of x.
void step_moe(const StepMoe& m, Activation activation, const float* x, float* y, int64_t rows, Stopwatch& watch);

}  // namespace exl
