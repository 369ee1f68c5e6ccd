#include "native.h"

#include "../activations.h"
#include "checks.h"
#include "library.h"
#include "narrow.h"
#include "route.h"
#include "row.h"
#include "wide.h"

#ifndef FASTBP_IDENTITY
#error "FASTBP_IDENTITY must be the version of the package and the fingerprint of the sources"
#endif

namespace fastbp::cpu {

namespace {

#define FASTBP_NAME(A) " " #A
constexpr const char* kActivationNames = FASTBP_FOR_EACH_ACTIVATION(FASTBP_NAME);

template <class S>
std::vector<Tensor> compute_forward(Call& call, const Tensor& x, const std::vector<Tensor>& weights) {
  switch (route_of(call)) {
    case Route::narrow:
      return forward_narrow<S>(call);
    case Route::narrow_pairs:
      return forward_narrow_pairs(call);
    case Route::wide:
      return forward_wide<S>(call);
    case Route::row:
      return forward_row<S>(call);
    default:
      return forward_library<S>(call, x, weights);
  }
}

template <class S>
std::vector<Maybe> compute_backward(Call& call, const Tensor& dy, const Maybe& x, const std::vector<Maybe>& weights,
                                    const std::vector<bool>& needs) {
  switch (route_of(call)) {
    case Route::narrow:
      return backward_narrow<S>(call, dy, needs);
    case Route::narrow_pairs:
      return backward_narrow_pairs(call, dy, needs);
    case Route::wide:
      return backward_wide<S>(call, dy, needs);
    case Route::row:
      return backward_row<S>(call, dy, needs);
    default:
      return backward_library<S>(call, dy, x, weights, needs);
  }
}

}  // namespace

std::string build_info() { return std::string(FASTBP_IDENTITY) + kActivationNames; }

std::string capability_name() { return capability().name; }

void set_debug(bool poison_on, std::string route) {
  poison = poison_on;
  force_route(route);
}

std::string routes() { return route_names(); }

std::vector<Tensor> forward(const Tensor& x, std::vector<Tensor> tensors, int64_t settings,
                            std::vector<double> params) {
  Call call = forward_call(x, tensors, settings, params);
  const std::vector<Tensor> weights = weights_of(call, tensors);
  return call.dtype == Dtype::float64 ? compute_forward<double>(call, x, weights)
                                      : compute_forward<float>(call, x, weights);
}

std::vector<Tensor> backward(const Tensor& dy, std::vector<Tensor> saved, int64_t settings, std::vector<double> params,
                             std::vector<bool> needs) {
  Maybe x;
  std::vector<Maybe> weights;
  Call call = backward_call(dy, saved, settings, params, needs, x, weights);
  return only_needed(call.dtype == Dtype::float64 ? compute_backward<double>(call, dy, x, weights, needs)
                                                  : compute_backward<float>(call, dy, x, weights, needs),
                     needs);
}

}  // namespace fastbp::cpu
