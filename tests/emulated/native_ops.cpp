// The ops of a library of csrc/cuda whose kernels run in the emulator, in a namespace that Python names: a test may
// load several such libraries, each with another fault put in.
#include <cuda_runtime_api.h>
#include <torch/csrc/stable/library.h>

#include <stdexcept>

#include "cpu/absent.h"
#include "cpu/scratch.h"
#include "cuda/calls.h"
#include "cuda/device.h"
#include "cuda/hopper.h"
#include "cuda/route.h"

namespace fastbp::cuda {

// What is not compiled for the emulator: elementwise.cu and hopper.cu name the launches of every dtype.
[[noreturn]] void refuse() { throw std::runtime_error("this dtype is not compiled for the emulator"); }

template <Dtype D, class Pass>
void launch_of(const Activation&, const Pass&, cudaStream_t) {
  refuse();
}
template <Dtype D>
void launch_column_sum_of(const void*, void*, int64_t, int64_t, cudaStream_t) {
  refuse();
}
template <Dtype D, Product::Kind KIND>
void launch_product_as(const Activation&, const Product&, int, cudaStream_t) {
  refuse();
}

#define FASTBP_ABSENT(D)                                                                                       \
  template void launch_of<Dtype::D, Value>(const Activation&, const Value&, cudaStream_t);                     \
  template void launch_of<Dtype::D, CompressedValue>(const Activation&, const CompressedValue&, cudaStream_t); \
  template void launch_of<Dtype::D, ChainRule>(const Activation&, const ChainRule&, cudaStream_t);             \
  template void launch_of<Dtype::D, GatedChainRule>(const Activation&, const GatedChainRule&, cudaStream_t);   \
  template void launch_column_sum_of<Dtype::D>(const void*, void*, int64_t, int64_t, cudaStream_t);
FASTBP_ABSENT(float64)
FASTBP_ABSENT(float16)

#define FASTBP_ABSENT_PRODUCT(KIND) \
  template void launch_product_as<Dtype::float16, Product::KIND>(const Activation&, const Product&, int, cudaStream_t);
FASTBP_ABSENT_PRODUCT(forward)
FASTBP_ABSENT_PRODUCT(gated_forward)
FASTBP_ABSENT_PRODUCT(dgrad)
FASTBP_ABSENT_PRODUCT(gated_dgrad)

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
