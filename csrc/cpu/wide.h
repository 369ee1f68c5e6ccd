// Layer by layer: one blocked product for each linear and direction, with the elementwise work inside it.
#pragma once

#include <vector>

#include "call.h"

namespace fastbp::cpu {

// y and the residuals of the policy. The call's own residuals are filled in passing.
template <class S>
std::vector<Tensor> forward_wide(Call& call);

// The gradients of x, of every weight and of every bias where `needs` asks for them, in this order.
template <class S>
std::vector<Maybe> backward_wide(const Call& call, const Tensor& dy, const std::vector<bool>& needs);

}  // namespace fastbp::cpu
