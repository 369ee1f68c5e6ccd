#include "capture.h"

#include <mutex>
#include <set>
#include <shared_mutex>
#include <utility>

#include "errors.h"

namespace fastbp::cuda {

void first_outside_capture(const void* kernel, cudaStream_t stream) {
  static std::shared_mutex guard;
  static std::set<std::pair<const void*, int>> done;
  int device;
  check_cuda(cudaGetDevice(&device));
  {
    const std::shared_lock lock(guard);
    if (done.count({kernel, device})) return;
  }
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  check_cuda(cudaStreamIsCapturing(stream, &status));
  check(status == cudaStreamCaptureStatusNone,
        "a first call inside a CUDA graph capture, which does not allow what a first call does (its kernels are loaded "
        "then); run the same step once before the capture, as torch.cuda.make_graphed_callables does");
  const std::unique_lock lock(guard);
  done.emplace(kernel, device);
}

}  // namespace fastbp::cuda
