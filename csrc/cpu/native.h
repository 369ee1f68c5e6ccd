// The functions behind the ops.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <string>
#include <vector>

namespace fastbp::cpu {

using torch::stable::Tensor;

std::string build_info();
std::string capability_name();
void set_poison(bool on);

std::vector<Tensor> forward(const Tensor& x, std::vector<Tensor> weights, std::vector<Tensor> biases, int64_t form,
                            int64_t activation, std::vector<double> params, int64_t save);

std::vector<Tensor> backward(const Tensor& dy, const Tensor& x, const Tensor& y, std::vector<Tensor> weights,
                             std::vector<Tensor> biases, std::vector<Tensor> residuals, int64_t form,
                             int64_t activation, std::vector<double> params, int64_t save, std::vector<bool> needs);

}  // namespace fastbp::cpu
