#include "route.h"

#include <stdlib.h>

#include <atomic>

#include "errors.h"

namespace fastbp::cuda {

namespace {

Route named(const std::string& name) {
  if (name == "fused") return Route::fused;
  if (name == "cublaslt") return Route::cublaslt;
  check(name.empty() || name == "library", "routes on a GPU are library, fused and cublaslt");
  return Route::library;
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
