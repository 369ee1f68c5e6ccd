#include "route.h"

#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <atomic>

#include "row.h"

namespace fastbp::cpu {

namespace {

constexpr int64_t kNarrowFeatures = 256, kNarrowWeights = 1 << 18;
// Where the library's products are faster than ours, what decides is what a call of it costs and what packing the
// weights costs us: docs/decisions/2026-11-27-narrow-layers-beside-amx.md.
constexpr int64_t kTinyFeatures = 32, kTinyWork = 5 << 20, kPackingRows = 32;
constexpr int64_t kSmallWeights = 1 << 15, kRowsWorthPacking = 1024;
// Panels run through wider layers too where a row of a panel is short and the rows are many enough to pay for packing
// all weights at once: docs/decisions/2026-11-30-panels-through-wider-layers.md.
constexpr int64_t kPanelRowBytes = 6 << 10;
constexpr double kRowsOfWidest = 1.4;
// From so many rows on, dz and h in one pass beside the library's products are faster than our own products.
constexpr int64_t kGivenRows = 256;

bool is_intel() {
#if defined(__x86_64__)
  static const bool intel = (__builtin_cpu_init(), __builtin_cpu_is("intel"));
  return intel;
#else
  return false;
#endif
}

constexpr const char* kRoutes[] = {"narrow", "narrow_pairs", "wide", "library", "row"};
static_assert(std::size(kRoutes) == kMostRoutes);
std::atomic<int> forced{-1};

}  // namespace

void force_route(const std::string& name) {
  const auto found = std::find(std::begin(kRoutes), std::end(kRoutes), name);
  STD_TORCH_CHECK(name.empty() || found != std::end(kRoutes), "fastbp_native: no route is called ", name);
  forced = name.empty() ? -1 : static_cast<int>(found - kRoutes);
}

std::string route_names() {
  std::string names;
  for (const char* name : kRoutes) names += (names.empty() ? "" : " ") + std::string(name);
  return names;
}

Route route_of(const Call& call) {
  int64_t widest = 0, narrowest = INT64_MAX, total = 0;
  bool by_columns = false;
  for (int64_t i = call.given(); i < call.linears(); ++i) {
    const Weight& w = call.weights[i];
    by_columns |= w.by_columns();
    widest = std::max({widest, w.in, w.out});
    narrowest = std::min({narrowest, w.in, w.out});
    total += w.in * w.out;
  }
  if (call.rows == 0 || narrowest == 0) return Route::wide;
  const bool pairs = call.dtype == Dtype::bfloat16 && kernels<float>().multiply_pairs;
  const bool row = call.rows == 1 && has_dense_rows(call);
  const int forced_now = forced;
  const int asked = forced_now >= 0 ? forced_now : call.settings.route - 1;
  // Panels run through linears, of which a call that is given z has one. A small one is wide: the library costs more.
  const bool given = call.settings.given;
  const auto serves = [&](Route route) {
    if (route == Route::narrow) return !given;
    if (route == Route::narrow_pairs) return pairs && !given;
    return route != Route::row || row;
  };
  if (asked >= 0 && serves(static_cast<Route>(asked))) return static_cast<Route>(asked);
  if (row) return Route::row;
  // The library takes such weights as they lie, and gives gradients that lie so; ours are copied when they are added.
  if (by_columns) return Route::library;
  const bool narrow = widest <= kNarrowFeatures && total <= kNarrowWeights;
  switch (call.dtype) {
    case Dtype::bfloat16:  // where the CPU multiplies bfloat16 itself, that is twice as fast as float panels
      if (narrow && pairs) {
        const bool tiny = widest <= kTinyFeatures || (call.rows + kPackingRows) * total <= kTinyWork;
        if (given) return tiny ? Route::wide : Route::library;
        return capability().amx && !tiny ? Route::library : Route::narrow_pairs;
      }
      if (capability().bf16) return Route::library;
      break;
    case Dtype::float16:
      break;
    default:
      if (given && call.rows >= kGivenRows) return Route::library;
      if (narrow && (total <= kSmallWeights || call.rows >= kRowsWorthPacking)) break;
      if (call.dtype == Dtype::float32 && is_intel()) return Route::library;  // MKL is at the CPU's limit there
      if (!given && widest * kItemSize[static_cast<int>(call.dtype)] <= kPanelRowBytes &&
          call.rows >= kRowsOfWidest * widest)
        return Route::narrow;
  }
  return narrow && !given ? Route::narrow : Route::wide;
}

}  // namespace fastbp::cpu
