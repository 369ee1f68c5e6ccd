// From a product to a launch of its kernel: what the tensor memory accelerator is told, and how many blocks there are.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>

#include "errors.h"
#include "hopper.cuh"
#include "launch.cuh"

namespace fastbp::cuda {

// A matrix as the accelerator reads it: boxes of `box_rows` rows of 64 numbers, 128 bytes, swizzled.
CUtensorMap map_of(const Operand& matrix, Dtype dtype, uint32_t box_rows);

template <Dtype D, Product::Kind KIND>
void launch_product_as(const Activation& activation, const Product& product, int processors, cudaStream_t stream) {
  constexpr bool by_steps = KIND == Product::dgrad || KIND == Product::gated_dgrad;
  auto kernel = product_kernel<D, KIND, Reads::z>;
  if constexpr (KIND == Product::dgrad) {
    if (product.keeps == Keeps::y) kernel = product_kernel<D, KIND, Reads::y>;
    if (product.keeps == Keeps::bits || product.keeps == Keeps::lowest_bit) {
      kernel = product_kernel<D, KIND, Reads::side>;
    }
  }
  check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes));
  const CUtensorMap a = map_of(product.a, D, kTile), b = map_of(product.b, D, by_steps ? kDepth : kHalfRows);
  const CUtensorMap b2 = KIND == Product::gated_forward ? map_of(product.b2, D, kHalfRows) : b;
  constexpr int columns = Epilogue<D, KIND, Reads::z>::columns;
  const int64_t tiles = (product.m + 2 * kTile - 1) / (2 * kTile) * ((product.n + columns - 1) / columns);
  const auto clusters = static_cast<unsigned>(std::max<int64_t>(1, std::min<int64_t>(tiles, processors / 2)));
  const auto [p0, p1] = activation.params;
  launch_kernel(kernel, 2 * clusters, kProductThreads, kSharedBytes, stream, a, b, b2,
                ProductArguments{product, activation.number, p0, p1});
}

#define FASTBP_PRODUCT(PREFIX, KIND)                                                                             \
  PREFIX template void launch_product_as<Dtype::bfloat16, Product::KIND>(const Activation&, const Product&, int, \
                                                                         cudaStream_t);                          \
  PREFIX template void launch_product_as<Dtype::float16, Product::KIND>(const Activation&, const Product&, int,  \
                                                                        cudaStream_t);

}  // namespace fastbp::cuda
