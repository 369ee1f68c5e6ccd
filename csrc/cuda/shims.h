// What only a CUDA build of PyTorch exports. Weak, so that the library loads into every build; null where it is absent.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

extern "C" {
__attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream);
// out = beta self + alpha mat1 mat2
__attribute__((weak)) AOTITorchError aoti_torch_cuda_addmm_out(AtenTensorHandle out, AtenTensorHandle self,
                                                               AtenTensorHandle mat1, AtenTensorHandle mat2,
                                                               double beta, double alpha);
}
