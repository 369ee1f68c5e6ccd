// A call of a single row: vectors where the other ways of computing have panels. Each weight is read once, where it
// lies; packing it would be most of the work.
#pragma once

#include "call.h"

namespace fastbp::cpu {

// Whether the weights can be read where they lie.
bool has_dense_rows(const Call& call);
template <class S>
std::vector<Tensor> forward_row(const Call& call);
template <class S>
std::vector<Maybe> backward_row(const Call& call, const Tensor& dy, const std::vector<bool>& needs);

}  // namespace fastbp::cpu
