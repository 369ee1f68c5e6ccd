// What a library of csrc/cuda takes from elsewhere, for tests on a CPU: the operations that only a CUDA build of
// PyTorch exports (csrc/cuda/shims.h), and the capability of a CPU for which nothing was compiled here.
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <stdexcept>

#include "cpu/call.h"
#include "cuda/shims.h"

using torch::stable::Tensor;

extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return 0;
}

extern "C" AOTITorchError aoti_torch_cuda_addmm_out(AtenTensorHandle out, AtenTensorHandle self, AtenTensorHandle a,
                                                    AtenTensorHandle b, double, double) {
  const auto borrowed = [](AtenTensorHandle handle) {
    AtenTensorHandle copy;
    aoti_torch_new_tensor_handle(handle, &copy);
    return Tensor(copy);
  };
  Tensor to = borrowed(out);
  const Tensor sum = torch::stable::subtract(borrowed(self), torch::stable::matmul(borrowed(a), borrowed(b)), -1.0);
  torch::stable::copy_(to, sum);
  return 0;
}

namespace fastbp::cpu {
const Capability& capability() { throw std::runtime_error("no kernels of the CPU are here"); }
}  // namespace fastbp::cpu
