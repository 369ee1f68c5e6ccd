// Loops over threads, as many as torch.set_num_threads says.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <atomic>

namespace fastbp::cpu {

// Below so many operations a second thread costs more than it saves.
constexpr double kSerialWork = 5e5;

inline int64_t threads_for(double work) {
  return work < kSerialWork ? 1 : static_cast<int64_t>(torch::stable::get_num_threads());
}

// f(item) for every item, by whichever thread is free. What an item computes must not depend on who computes it.
template <class F>
void for_each(int64_t items, int64_t threads, const F& f) {
  if (threads <= 1 || items <= 1) {
    for (int64_t item = 0; item < items; ++item) f(item);
    return;
  }
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, threads < items ? threads : items, 1, [&](int64_t, int64_t) {
    for (int64_t item = next++; item < items; item = next++) f(item);
  });
}

}  // namespace fastbp::cpu
