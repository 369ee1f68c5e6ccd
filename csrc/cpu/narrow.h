// Small networks: the weights stay in the cache, and a panel of rows runs through all layers.
#pragma once

#include <vector>

#include "call.h"

namespace fastbp::cpu {

template <class S>
std::vector<Tensor> forward_narrow(Call& call);

template <class S>
std::vector<Maybe> backward_narrow(Call& call, const Tensor& dy, const std::vector<bool>& needs);

// The same in bfloat16 where the CPU multiplies it.
std::vector<Tensor> forward_narrow_pairs(Call& call);
std::vector<Maybe> backward_narrow_pairs(Call& call, const Tensor& dy, const std::vector<bool>& needs);

}  // namespace fastbp::cpu
