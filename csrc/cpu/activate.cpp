// An activation by itself, where no linear of ours is beside it: one pass over contiguous numbers.
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <initializer_list>

#include "checks.h"
#include "native.h"
#include "parallel.h"

namespace fastbp::cpu {

namespace {

constexpr int64_t kLine = 64;      // numbers: no two threads write to one line of a cache
constexpr double kWorkOfOne = 20;  // operations of an activation, about

// A call of one layer, whose linear is not looked at.
Call call_of(std::initializer_list<const Tensor*> tensors, int64_t settings, const std::vector<double>& params) {
  const Tensor& first = **tensors.begin();
  STD_TORCH_CHECK(first.dim() > 0, "fastbp_native: z must have a dimension");
  const Call call = make_call(first, 1, settings, params);
  STD_TORCH_CHECK(!call.settings.projected, "fastbp_native: an activation alone has no linear");
  const auto sizes = first.sizes();
  for (const Tensor* tensor : tensors) {
    check(*tensor, call, "z or dy");
    const auto own = tensor->sizes();
    STD_TORCH_CHECK(own.size() == sizes.size() && std::equal(own.begin(), own.end(), sizes.begin()),
                    "fastbp_native: z and dy must have one shape");
    STD_TORCH_CHECK(tensor->is_contiguous(), "fastbp_native: z and dy must be contiguous");
  }
  return call;
}

const Elementwise& loops_of(const Call& call) {
  return call.dtype == Dtype::float64 ? call.loops<double>(call.dtype) : call.loops<float>(call.dtype);
}

// f(count, the offset in bytes of the first) for as many pieces as there are threads: long ones, for the CPU fetches
// ahead along them, and pieces of 32 KiB took 1.25 times as long.
template <class F>
void for_each_piece(const Call& call, int64_t numbers, const F& f) {
  const int64_t item = kItemSize[static_cast<int>(call.dtype)], threads = threads_for(kWorkOfOne * numbers);
  const int64_t piece = ((numbers + threads - 1) / threads + kLine - 1) / kLine * kLine;
  if (numbers == 0) return;
  for_each((numbers + piece - 1) / piece, threads,
           [&](int64_t i) { f(std::min(piece, numbers - i * piece), i * piece * item); });
}

}  // namespace

Tensor activate(const Tensor& z, int64_t settings, std::vector<double> params) {
  const Call call = call_of({&z}, settings, params);
  const Tensor y = call.make(z.sizes().back());
  const auto value = loops_of(call).value[call.settings.activation];
  const char* from = static_cast<const char*>(z.const_data_ptr());
  char* to = static_cast<char*>(y.mutable_data_ptr());
  for_each_piece(call, z.numel(), [&](int64_t n, int64_t at) { value(n, from + at, to + at, call.settings.params); });
  return y;
}

Tensor activate_backward(const Tensor& dy, const Tensor& z, int64_t settings, std::vector<double> params) {
  const Call call = call_of({&z, &dy}, settings, params);
  const Tensor dz = call.make(z.sizes().back());
  const auto grad = loops_of(call).grad[call.settings.activation];
  const char *d = static_cast<const char*>(dy.const_data_ptr()), *from = static_cast<const char*>(z.const_data_ptr());
  char* to = static_cast<char*>(dz.mutable_data_ptr());
  for_each_piece(call, z.numel(),
                 [&](int64_t n, int64_t at) { grad(n, d + at, from + at, to + at, call.settings.params); });
  return dz;
}

}  // namespace fastbp::cpu
