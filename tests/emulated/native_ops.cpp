// The ops of a library of csrc/cuda whose kernels run in the emulator, in a namespace that Python names: a test may
// load several such libraries, each with another fault put in.
#include <cuda_runtime_api.h>
#include <torch/csrc/stable/library.h>

#include <stdexcept>

#include "cpu/absent.h"
#include "cpu/scratch.h"
#include "cuda/calls.h"
#include "cuda/device.h"
#include "cuda/elementwise.h"
#include "cuda/route.h"

namespace fastbp::cuda {

// The dtypes that are not compiled for the emulator: elementwise.cu names the launches of all four.
template <Dtype D, class Pass>
void launch_of(const Activation& activation, const Pass& pass, cudaStream_t stream);
template <Dtype D>
void launch_column_sum_of(const void* sums, void* out, int64_t strips, int64_t n, cudaStream_t stream);

#define FASTBP_ABSENT(D, PASS)                                                       \
  template <>                                                                        \
  void launch_of<Dtype::D, PASS>(const Activation&, const PASS&, cudaStream_t) {     \
    throw std::runtime_error(#D " is not compiled for the emulator");                \
  }
#define FASTBP_ABSENT_DTYPE(D)                                                                    \
  FASTBP_ABSENT(D, Value)                                                                         \
  FASTBP_ABSENT(D, CompressedValue)                                                               \
  FASTBP_ABSENT(D, ChainRule)                                                                     \
  FASTBP_ABSENT(D, GatedChainRule)                                                                \
  template <>                                                                                     \
  void launch_column_sum_of<Dtype::D>(const void*, void*, int64_t, int64_t, cudaStream_t) {       \
    throw std::runtime_error(#D " is not compiled for the emulator");                             \
  }

FASTBP_ABSENT_DTYPE(float64)
FASTBP_ABSENT_DTYPE(float16)

}  // namespace fastbp::cuda

using torch::stable::detail::StableLibrary;

namespace {

void set_debug(bool poison) { fastbp::cpu::poison = poison; }

}  // namespace

extern "C" {

// There is one GPU, and PyTorch knows nothing of it.
AOTITorchError aoti_torch_create_device_guard(int32_t index, DeviceGuardHandle* guard) {
  *guard = nullptr;
  return index != 0;
}
AOTITorchError aoti_torch_delete_device_guard(DeviceGuardHandle) { return 0; }

__attribute__((visibility("default"))) void register_ops(const char* name) {
  using Kind = StableLibrary::Kind;
  auto& ops = *new StableLibrary(Kind::DEF, name, nullptr, __FILE__, __LINE__);
  ops.def("absent() -> Tensor");
  ops.def("set_debug(bool poison) -> ()");
  ops.def("set_cuda_route(str route) -> ()");
  ops.def("cuda_refusal(int device) -> str");
  ops.def("forward(Tensor x, Tensor[] tensors, int settings, float[] params) -> Tensor[]");
  ops.def("backward(Tensor dy, Tensor[] saved, int settings, float[] params, bool[] needs) -> Tensor[]");
  auto& any = *new StableLibrary(Kind::IMPL, name, "CompositeExplicitAutograd", __FILE__, __LINE__);
  any.impl("absent", TORCH_BOX(&fastbp::cpu::absent));
  any.impl("set_debug", TORCH_BOX(&set_debug));
  any.impl("set_cuda_route", TORCH_BOX(&fastbp::cuda::force_route));
  any.impl("cuda_refusal", TORCH_BOX(&fastbp::cuda::refusal));
  auto& cpu = *new StableLibrary(Kind::IMPL, name, "CPU", __FILE__, __LINE__);
  cpu.impl("forward", TORCH_BOX(&fastbp::cuda::forward));
  cpu.impl("backward", TORCH_BOX(&fastbp::cuda::backward));
}

}  // extern "C"
