// The tensors of a call, checked: what fits together becomes a Call, and all else is refused before a pointer is
// followed.
#pragma once

#include "absent.h"
#include "call.h"

namespace fastbp::cpu {

// `tensors` are what is given after x, the weights and then the biases; `settings` as in ops.cpp.
Call forward_call(const Tensor& x, const std::vector<Tensor>& tensors, int64_t settings,
                  const std::vector<double>& params);

// The weights among them.
std::vector<Tensor> weights_of(const Call& call, const std::vector<Tensor>& tensors);

// `saved` is the inputs, y, the weights, the biases, the residuals, of which x and the weights come back as they are.
Call backward_call(const Tensor& dy, const std::vector<Tensor>& saved, int64_t settings,
                   const std::vector<double>& params, const std::vector<bool>& needs, Maybe& x,
                   std::vector<Maybe>& weights);

// A call of so many linears, as yet unseen, on rows like those of `data`; and that a tensor belongs to it.
Call make_call(const Tensor& data, int64_t linears, int64_t settings, const std::vector<double>& params);
void check(const Tensor& tensor, const Call& call, const char* name);

// The gradients that are needed, in their order.
std::vector<Tensor> only_needed(const std::vector<Maybe>& grads, const std::vector<bool>& needs);

}  // namespace fastbp::cpu
