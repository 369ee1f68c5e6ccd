// The ops of the library and nothing else: schemas, and which function serves them.
#include <torch/csrc/stable/library.h>

#include "cpu/checks.h"
#include "cpu/native.h"
#ifdef FASTBP_CUDA_ARCHITECTURES
#include "cuda/calls.h"
#include "cuda/device.h"
#include "cuda/route.h"
#endif

STABLE_TORCH_LIBRARY(fastbp_native, m) {
  // What the library was built from, for the Python side to compare with itself; what the CPU offers.
  m.def("build_info() -> str");
  m.def("capability() -> str");
  // For tests: fill scratch memory and fresh results with NaN; take this way of computing wherever it can serve.
  m.def("set_debug(bool poison, str route) -> ()");
  m.def("routes() -> str");
  // What stands for a tensor that is absent. (PyTorch resolves lazy negation in lists of tensors, and not in lists of
  // optional ones.)
  m.def("absent() -> Tensor");
  // `tensors` are the weights and then the biases; before them comes `up`, where the call is given that. `settings` is
  // 1 for a gated form, plus 2 for a projected one, plus 4 times the policy (in the order of saving.py), plus 32 times
  // the activation, plus 4096 times one more than the way of computing that the call asks for (cpu/route.h,
  // cuda/route.h), plus 32768 for a form that is given z in the place of x, or gate and up. Returns y and the residuals
  // of the policy.
  m.def("forward(Tensor x, Tensor[] tensors, int settings, float[] params) -> Tensor[]");
  // `saved` is x (or z, or gate and up), y, the weights, the biases, the residuals. Returns a gradient for each true
  // entry of needs, which is about x, the weights, the biases. With 2048 added to `settings` the residuals (policy
  // preact) may be written over.
  m.def("backward(Tensor dy, Tensor[] saved, int settings, float[] params, bool[] needs) -> Tensor[]");
  // The activation of such settings alone, policy preact, on contiguous tensors of a CPU: f(z), and dz from dy and z.
  m.def("activate(Tensor z, int settings, float[] params) -> Tensor");
  m.def("activate_backward(Tensor dy, Tensor z, int settings, float[] params) -> Tensor");
#ifdef FASTBP_CUDA_ARCHITECTURES
  // In a library with CUDA kernels: what they are compiled for; whether PyTorch exports what they need; why they cannot
  // serve a device, or nothing; and for tests the way of computing.
  m.def("cuda_architectures() -> str");
  m.def("cuda_shims() -> bool");
  m.def("cuda_refusal(int device) -> str");
  m.def("set_cuda_route(str route) -> ()");
#endif
}

STABLE_TORCH_LIBRARY_IMPL(fastbp_native, CompositeExplicitAutograd, m) {
  m.impl("build_info", TORCH_BOX(&fastbp::cpu::build_info));
  m.impl("capability", TORCH_BOX(&fastbp::cpu::capability_name));
  m.impl("absent", TORCH_BOX(&fastbp::cpu::absent));
  m.impl("set_debug", TORCH_BOX(&fastbp::cpu::set_debug));
  m.impl("routes", TORCH_BOX(&fastbp::cpu::routes));
#ifdef FASTBP_CUDA_ARCHITECTURES
  m.impl("cuda_architectures", TORCH_BOX(&fastbp::cuda::architectures));
  m.impl("cuda_shims", TORCH_BOX(&fastbp::cuda::shims_resolved));
  m.impl("cuda_refusal", TORCH_BOX(&fastbp::cuda::refusal));
  m.impl("set_cuda_route", TORCH_BOX(&fastbp::cuda::force_route));
#endif
}

STABLE_TORCH_LIBRARY_IMPL(fastbp_native, CPU, m) {
  m.impl("forward", TORCH_BOX(&fastbp::cpu::forward));
  m.impl("backward", TORCH_BOX(&fastbp::cpu::backward));
  m.impl("activate", TORCH_BOX(&fastbp::cpu::activate));
  m.impl("activate_backward", TORCH_BOX(&fastbp::cpu::activate_backward));
}

#ifdef FASTBP_CUDA_ARCHITECTURES
STABLE_TORCH_LIBRARY_IMPL(fastbp_native, CUDA, m) {
  m.impl("forward", TORCH_BOX(&fastbp::cuda::forward));
  m.impl("backward", TORCH_BOX(&fastbp::cuda::backward));
}
#endif
