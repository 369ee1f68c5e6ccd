#include "route.h"

#include <stdlib.h>

#include <atomic>

#include "errors.h"

namespace fastbp::cuda {

namespace {

Route named(const std::string& name) {
  check(name.empty() || name == "library" || name == "fused", "routes on a GPU are library and fused");
  return name == "fused" ? Route::fused : Route::library;
}

Route of_environment() {
  const char* name = getenv("FASTBP_CUDA_ROUTE");
  return named(name ? name : "");
}

std::atomic<Route>& chosen() {
  static std::atomic<Route> route{of_environment()};
  return route;
}

}  // namespace

Route route() { return chosen(); }

void force_route(std::string name) { chosen() = name.empty() ? of_environment() : named(name); }

}  // namespace fastbp::cuda
