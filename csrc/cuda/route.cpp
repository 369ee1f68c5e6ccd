#include "route.h"

#include <stdlib.h>

#include <atomic>

#include "errors.h"

namespace fastbp::cuda {

namespace {

Route named(const std::string& name) {
  if (name == "fused") return Route::fused;
  if (name == "cublaslt") return Route::cublaslt;
  check(name == "library", "routes on a GPU are library, fused and cublaslt");
  return Route::library;
}

constexpr int kNone = -1, kRoutes = 3;

int by_name(const std::string& name) { return name.empty() ? kNone : static_cast<int>(named(name)); }

int of_environment() {
  const char* name = getenv("FASTBP_CUDA_ROUTE");
  return by_name(name ? name : "");
}

std::atomic<int>& forced() {
  static std::atomic<int> route{of_environment()};
  return route;
}

}  // namespace

Route route_of(const cpu::Settings& settings) {
  const int now = forced();
  if (now != kNone) return static_cast<Route>(now);
  check(settings.route <= kRoutes, "no such route on a GPU");
  return settings.route ? static_cast<Route>(settings.route - 1) : Route::library;
}

void force_route(std::string name) { forced() = name.empty() ? of_environment() : by_name(name); }

}  // namespace fastbp::cuda
