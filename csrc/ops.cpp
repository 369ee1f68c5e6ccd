// The ops of the library and nothing else: schemas, and which function serves them.
#include <torch/csrc/stable/library.h>

#include "cpu/native.h"

STABLE_TORCH_LIBRARY(fastbp_native, m) {
  // What the library was built from, for the Python side to compare with itself; what the CPU offers.
  m.def("build_info() -> str");
  m.def("capability() -> str");
  // Fill scratch memory and fresh results with NaN: for tests.
  m.def("set_poison(bool on) -> ()");
  // An absent tensor is one without dimensions, which no other is: PyTorch resolves lazy negation in lists of tensors,
  // and not in lists of optional ones. `form`: 1 gated, 2 projected; `save`: 0 preact, 1 output, 2 recompute.
  // Returns y and the residuals of the policy.
  m.def(
      "forward(Tensor x, Tensor[] weights, Tensor[] biases, int form, int activation, float[] params, int save) -> "
      "Tensor[]");
  // Returns a gradient for each true entry of needs, which is about x, the weights, the biases.
  m.def(
      "backward(Tensor dy, Tensor x, Tensor y, Tensor[] weights, Tensor[] biases, Tensor[] residuals, int form, "
      "int activation, float[] params, int save, bool[] needs) -> Tensor[]");
}

STABLE_TORCH_LIBRARY_IMPL(fastbp_native, CompositeExplicitAutograd, m) {
  m.impl("build_info", TORCH_BOX(&fastbp::cpu::build_info));
  m.impl("capability", TORCH_BOX(&fastbp::cpu::capability_name));
  m.impl("set_poison", TORCH_BOX(&fastbp::cpu::set_poison));
}

STABLE_TORCH_LIBRARY_IMPL(fastbp_native, CPU, m) {
  m.impl("forward", TORCH_BOX(&fastbp::cpu::forward));
  m.impl("backward", TORCH_BOX(&fastbp::cpu::backward));
}
